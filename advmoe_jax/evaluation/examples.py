"""What happened to each image of an evaluation, as arrays and as a table. m images."""

import csv
import io

import numpy as np

from advmoe_jax.evaluation.verdicts import Found


def examples(found: Found) -> dict[str, np.ndarray]:
    """What happened to each image: arrays with one row an image, or one row an attempt and a column an image.

    `broken_by` is the number of the first attempt that broke the image, -1 where none did and -2 where it was
    misclassified when clean.
    """
    called = {"label": "prediction"}
    arrays = {"index": found.index, "label": found.label, "broken_by": broken_by(found),
              **{f"clean_{called.get(name, name)}": values for name, values in found.clean.items()}}
    names = [name for name in (found.attempts[0].after if found.attempts else ())
             if all(name in attempt.after for attempt in found.attempts)]
    return arrays | {f"adversarial_{called.get(name, name)}": np.stack([
        attempt.after[name] for attempt in found.attempts]) for name in names}


def broken_by(found: Found) -> np.ndarray:
    """(m,) see `examples`."""
    first = np.where(found.correct, -1, -2)
    for number, attempt in reversed(list(enumerate(found.attempts))):
        first[found.correct & ~found.survivors([attempt])] = number
    return first


def table(found: Found) -> str:
    """`examples` as CSV, one line an image, with what the attempt that broke it did, or the last one that tried."""
    kept = [name for name in found.clean if name not in ("label", "margin")]
    names = ("index", "label", "clean_prediction", "clean_margin", "broken_by", "view", "adversarial_prediction",
             "adversarial_margin", "linf", "l2", "l1", "l0",
             *(f"{name}_{which}" for name in kept for which in ("clean", "adversarial")))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row, number in enumerate(broken_by(found)):
        tried = [n for n, attempt in enumerate(found.attempts) if attempt.attacked[row]]
        attempt = found.attempts[number if number >= 0 else tried[-1]] if tried else None
        after = {name: values[row] for name, values in (attempt.after if attempt else found.clean).items()}
        writer.writerow((
            found.index[row], found.label[row], found.clean["label"][row], f"{found.clean['margin'][row]:.6g}",
            {-1: "", -2: "clean"}.get(int(number), attempt and attempt.spec.label), attempt.view if attempt else "",
            after["label"], f"{after['margin']:.6g}",
            *(f"{after.get(norm, 0):.6g}" for norm in ("linf", "l2", "l1", "l0")),
            *(" ".join(map(str, np.ravel(value))) for name in kept for value in (found.clean[name][row], after[name]))))
    return out.getvalue()
