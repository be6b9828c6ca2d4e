"""Who survives: runs attacks one after the other and judges what they return.

The verdict on an image is always that of the model as users have it, in float32, on the very image that the attack
returned. m images, B of them in a batch.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import driver, objectives
from advmoe_jax.attacks.parse import Spec
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, stop
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls, losses

Arrays = dict[str, np.ndarray]
MOST_CHECKED = 32  # images, of those that the suite left
_SLACK = (1 + 1e-4, 1e-6)  # of eps, for the rounding of a norm
_PICTURES = 8  # images that are kept to be looked at


class Source(Protocol):
    """Images and labels by their indices."""

    def __call__(self, rows: np.ndarray) -> dict[str, jax.Array]:
        """{"image": (B, H, W, C) floats in [0, 1], "label": (B,), "index": (B,)} on the devices."""


class Log(Protocol):
    """Where what was found is kept, batch by batch, so that a run that was stopped goes on from there."""

    def read(self) -> Iterable[tuple[dict[str, Any], Arrays]]:
        """All that was added, oldest first."""

    def add(self, record: dict[str, Any], arrays: Arrays) -> None:
        """Keeps a record and arrays with one row an image, whole or not at all."""


class Memory(list):
    """A Log that is gone with the process."""

    def read(self):
        return iter(self)

    def add(self, record, arrays):
        self.append((record, arrays))


@dataclasses.dataclass(frozen=True)
class Attempt:
    """An attack through one gradient, and what came of it.

    Attributes:
        spec: the attack.
        view: the gradient it went through.
        attacked: (m,) bool, the images it got.
        after: {"label", "margin", "linf", "l2", "l1", "l0"} (m,): predictions on what it returned and sizes of the
            perturbations, as on clean images where it got none; and what the judge keeps of each image, with leading m.
            The margin is NaN where a logit or what else the model says is not finite; -inf of a masked class is.
        seconds: it took.
        passes: through the model, as driver.Ledger counts them.
        is_check: whether it was added to a suite and got some images only.
    """

    spec: Spec
    view: str
    attacked: np.ndarray
    after: Arrays
    seconds: float
    passes: dict[str, int]
    is_check: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
    """What a run of attacks found.

    Attributes:
        index, label: (m,) of the images.
        clean: predictions on them, as Attempt.after.
        attempts: in order.
    """

    index: np.ndarray
    label: np.ndarray
    clean: Arrays
    attempts: tuple[Attempt, ...]

    @property
    def own(self) -> tuple[Attempt, ...]:
        """The attempts of the suite, without checks."""
        return tuple(attempt for attempt in self.attempts if not attempt.is_check)

    @property
    def correct(self) -> np.ndarray:
        """(m,) bool, classified correctly when clean."""
        return self.clean["label"] == self.label

    def survivors(self, attempts: Sequence[Attempt] | None = None) -> np.ndarray:
        """(m,) bool, classified correctly when clean and after every attempt."""
        return self.correct & self.right_after(self.attempts if attempts is None else attempts)

    def right_after(self, attempts: Sequence[Attempt]) -> np.ndarray:
        """(m,) bool, classified correctly after every attempt, whatever they were when clean."""
        right = np.ones(len(self.label), bool)
        for attempt in attempts:
            right &= attempt.after["label"] == self.label
        return right


def run(views: Mapping[str, jax.tree_util.Partial], source: Source, index: np.ndarray, label: np.ndarray,
        specs: Sequence[Spec], *, key: jax.Array, batch_size: int, survivors_only: bool, checks: Sequence[Spec] = (),
        log: Log | None = None, judge: jax.tree_util.Partial | None = None,
        surfaces: Mapping[str, jax.tree_util.Partial] = MappingProxyType({}), is_random: bool = False,
        of_logits: Collection[str] = ()) -> Found:
    """Runs every attack through every view; those that know of routes, or see no gradient, once.

    Attack keys are folded from the index of the image, so that nothing depends on the batch. Images that are
    misclassified when clean are not attacked; nor, if `survivors_only`, those that an earlier attempt broke; but
    attacks of all images get all. A batch that the devices have no memory for is tried again at half the size.

    Args:
        views: {name: x -> (logits, aux)}, all with the same values.
        source: of the images.
        index, label: (m,) of the images.
        specs: attacks.
        key: of the attacks.
        batch_size: images at a time; a multiple of the devices.
        survivors_only: whether only the worst case counts, or each attack alone too.
        checks: more attacks, on those of the first MOST_CHECKED survivors of `specs` that still stand.
        log: what an earlier run found is taken from there, what this one finds is added.
        judge: x -> (logits, what is kept of each image, with leading B), which gives the verdicts; unless given, the
            first view, of which nothing is kept. "finite" (B,) bool among it says whether all of it is.
        surfaces: other functions of the model that attacks may take, {name: function}.
        of_logits: views with another gradient of the logits alone: attacks that read aux do not go through them.
        is_random: whether views take keys (B,) too. Attacks that average over draws get them all; verdicts, and other
            attacks, know one draw that is the same for all images.
    Raises:
        UserError: an attack takes what the model does not have; or it returned images outside its budget, which count
            for nothing.
    """
    log = Memory() if log is None else log
    drawn = {name: jax.tree_util.Partial(one_draw, view, rng.stream(key, "verdict")) if is_random else view
             for name, view in views.items()}
    judge = jax.tree_util.Partial(_without_aux, next(iter(drawn.values()))) if judge is None else judge
    fits = Fitting(batch_size)
    clean = _join(list(fits.batches(index, functools.partial(_clean, judge, source))))
    found = Found(index, label, clean, ())
    logged: dict[int, list] = {}
    for record, arrays in log.read():
        logged.setdefault(record["attempt"], []).append((record, arrays))
    planned = [(is_check, attempt) for is_check, chosen in ((False, specs), (True, checks))
               for attempt in _plan(chosen, drawn, surfaces, views if is_random else None, of_logits)]
    for number, (is_check, (spec, view, model)) in enumerate(planned):
        stands = found.survivors() if survivors_only or is_check else found.correct
        if spec.about.all_images:
            stands = np.ones_like(stands)
        if is_check:
            stands &= np.cumsum(found.survivors(found.own)) <= MOST_CHECKED
        parts = list(logged.get(number, ()))
        todo = stands & ~np.isin(index, [i for _, arrays in parts for i in arrays["index"]])
        attack = functools.partial(_attack, spec, number, view, model, judge, source, key)
        for part in fits.batches(index[todo], attack):
            log.add(*part)
            parts.append(part)
        attempt = dataclasses.replace(_attempt(spec, view, found, stands, parts), is_check=is_check)
        found = dataclasses.replace(found, attempts=(*found.attempts, attempt))
    return found


def _without_keys(outputs_fn, x, keys):
    return outputs_fn(x)[0]


def _without_aux(outputs_fn, x):
    return outputs_fn(x)[0], {}


def _plan(specs, views, surfaces, with_keys, of_logits):
    """(attack, name of the view, what it attacks) of every attempt."""
    for spec in specs:
        if getattr(spec.config, "eot", 0):
            yield from ((spec, view, objectives.logits_fn(with_keys[view]) if with_keys else jax.tree_util.Partial(
                _without_keys, outputs_fn)) for view, outputs_fn in views.items())
        elif spec.about.takes == "outputs":
            yield from ((spec, view, outputs_fn) for view, outputs_fn in views.items()
                        if not (spec.about.needs and view in of_logits))
        elif spec.about.takes == "logits":
            yield from ((spec, view, objectives.logits_fn(outputs_fn)) for view, outputs_fn in views.items())
        elif spec.about.takes == "values":
            yield spec, "no gradient", objectives.logits_fn(next(iter(views.values())))
        elif spec.about.takes in surfaces:
            yield spec, spec.about.takes, surfaces[spec.about.takes]
        else:
            raise UserError(f"{spec.label} attacks a {spec.about.takes} model: expected one")


@dataclasses.dataclass
class Fitting:
    """The most images at a time: halved for good when the devices have no memory for them."""

    size: int

    def largest(self, work: Callable[[int], Any]) -> Any:
        """work(size) of the largest size that fits, of one image a device or more."""
        devices = jax.device_count()
        while True:
            try:
                return work(self.size)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or self.size <= devices:
                    raise
                self.size = -(-self.size // (2 * devices)) * devices

    def batches(self, index: np.ndarray, work: Callable[[np.ndarray, int], Any]) -> Iterator[Any]:
        """Yields work(rows, size) for at most `size` of `index` after the other."""
        first = 0
        while first < len(index):
            stop.check()
            yield self.largest(lambda size, first=first: work(index[first:first + size], size))
            first += self.size


def _clean(judge, source, rows, size):
    batch, mask = _batch(source, rows, size)
    return _judged(judge, batch, batch["image"], None, mask)


def attack_key(key: jax.Array, name: str) -> jax.Array:
    """The key of an attack by the name of its module, into which the index of each image is folded."""
    return jax.random.fold_in(rng.stream(key, f"attack_eval/{name}"), 0)


def _attack(spec, number, view, model, judge, source, key, rows, size):
    """A record and arrays of one batch."""
    root = attack_key(key, spec.name)
    start = time.perf_counter()
    with driver.counted() as passes, driver.real_rows(len(rows), size):
        batch, mask = _batch(source, rows, size)
        x, y = batch["image"], batch["label"]
        goal = _logits(judge, x) if getattr(spec.config, "loss", "") == "kl" else y
        x_adv = spec.run(model, rng.per_example(root, batch["index"]), x, goal)
        judged = _judged(judge, batch, x_adv, spec, mask)
    broken = judged["label"] != meshes.fetch(y)[mask]
    return ({"attempt": number, "attack": spec.label, "view": view, "images": len(rows), "broken": int(broken.sum()),
             "seconds": round(time.perf_counter() - start, 3), "passes": dataclasses.asdict(passes)},
            {"index": rows, **judged, "x_adv": meshes.fetch(x_adv)[mask]})


def one_draw(random_fn: Callable, key: jax.Array, x: jax.Array) -> Any:
    """A random model `(x, keys) -> ...` with the same key for every image."""
    return random_fn(x, jnp.broadcast_to(key, x.shape[:1]))


def _attempt(spec, view, found, stands, parts) -> Attempt:
    after = {name: np.array(values) for name, values in found.clean.items()}
    for name, values in parts[0][1].items() if parts else ():
        if name not in after and name not in ("index", "x_adv"):
            after[name] = np.zeros(len(found.index), values.dtype)
    place = {int(i): n for n, i in enumerate(found.index)}
    for _, arrays in parts:
        rows = [place[int(i)] for i in arrays["index"]]
        for name in after:
            after[name][rows] = arrays[name]
    passes = {name: sum(record["passes"][name] for record, _ in parts)
              for name in map(lambda field: field.name, dataclasses.fields(driver.Ledger))}
    return Attempt(spec, view, stands, after, sum(record["seconds"] for record, _ in parts), passes)


def adversarial(found: Found, log: Log) -> Arrays:
    """{"index": (k,), "x_adv": (k, H, W, C)} of the images that were broken, by the first attempt that did."""
    kept: dict[int, np.ndarray] = {}
    correct = set(found.index[found.correct].tolist())
    label = dict(zip(found.index.tolist(), found.label.tolist()))
    for _, arrays in sorted(log.read(), key=lambda part: part[0]["attempt"]):
        for row, index in enumerate(arrays["index"].tolist()):
            if index in correct and arrays["label"][row] != label[index]:
                kept.setdefault(index, arrays["x_adv"][row])
    index = np.array(sorted(kept), np.int64)
    return {"index": index, "x_adv": np.stack([kept[i] for i in index.tolist()]) if kept else np.zeros(0, np.float32)}


def pictures(found: Found, log: Log) -> Arrays:
    """{"index", "label", "prediction": (k,), "image": (k, H, W, C)}, the first images as the first attack shows them
    that changes all of them whatever the model; {} if there is none."""
    number = next((number for number, attempt in enumerate(found.attempts) if attempt.spec.about.all_images
                   and attempt.spec.about.takes == "values"), None)
    if number is None:
        return {}
    index, after = found.index[:_PICTURES], found.attempts[number].after["label"]
    kept = {i: image for record, arrays in log.read() if record["attempt"] == number
            for i, image in zip(arrays["index"].tolist(), arrays["x_adv"]) if i in index}
    return {"index": index, "label": found.label[:_PICTURES], "prediction": after[:_PICTURES],
            "image": np.stack([kept[i] for i in index.tolist()])}


def _batch(source, rows, full):
    """Images and labels, and the mask of what is no padding; the last batch has one of a few sizes."""
    size = driver.bucket(len(rows), full, jax.device_count())
    return source(driver.filled(rows, size)), np.arange(size) < len(rows)


@jax.jit
def _predict(judge, x, y):
    with jax.default_matmul_precision("float32"):  # an accelerator's own default is coarser
        logits, kept = judge(x)
    margin = -losses.margin(losses.unmasked(logits), y)
    finite = kept.pop("finite", True) & ~jnp.any(jnp.isnan(logits), -1) & jnp.isfinite(margin)
    return kept | dict(label=jnp.where(jnp.any(jnp.isnan(logits), -1), -1, jnp.argmax(logits, -1)),
                       margin=jnp.where(finite, margin, jnp.nan))


@jax.jit
def _logits(outputs_fn, x):
    return outputs_fn(x)[0]


@jax.jit
def _extent(x_adv, x):
    delta = x_adv - x
    # On several devices min and max lose a NaN.
    return (jnp.all(jnp.isfinite(x_adv)), jnp.min(x_adv), jnp.max(x_adv),
            {kind: balls.norm(delta, kind) for kind in balls.NORMS} | {"l0": jnp.sum(jnp.any(delta != 0, -1), (1, 2))})


def _judged(judge, batch, x_adv, spec, mask) -> Arrays:
    """Predictions on x_adv, and sizes of the perturbation if there is an attack; one that left its budget or the box
    is a bug, not a result."""
    found = meshes.fetch(_predict(judge, x_adv, batch["label"]))
    if spec is not None:
        finite, low, high, sizes = meshes.fetch(_extent(x_adv, batch["image"]))
        _check_budget(spec, finite, low, high, sizes)
        found |= sizes
    return {name: values[mask] for name, values in found.items()}


def _check_budget(spec, finite, low, high, sizes):
    budgets = {} if getattr(spec.config, "beyond", "") == "keep" else spec.budgets
    within = [sizes[norm] <= eps * _SLACK[0] + _SLACK[1] for norm, eps in budgets.items()]
    if not (finite and low >= 0 and high <= 1 and (not within or np.all(np.any(within, 0)))):
        norms = ", ".join(f"{norm} norm {np.max(sizes[norm]):.6g} for eps {eps:.6g}" for norm, eps in budgets.items())
        raise UserError(f"{spec.label} left its budget: {norms or 'no norm'}, pixels "
                        f"{low:.6g} to {high:.6g} for 0 to 1; its result is discarded")


def _join(parts: list[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
