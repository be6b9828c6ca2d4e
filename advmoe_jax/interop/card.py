"""The model card of an export, in the form of the Hugging Face Hub: a README.md that begins with YAML."""

import math
from collections.abc import Sequence
from typing import Any

import yaml

import advmoe_jax
from advmoe_jax.core import config as configs
from advmoe_jax.core import tables, units
from advmoe_jax.core.tables import Table
from advmoe_jax.evaluation import results

_HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "svhn": "ufldl-stanford/svhn",
        "tiny_imagenet": "zh-plus/tiny-imagenet", "imagenet": "ILSVRC/imagenet-1k"}
"""What the Hub calls data sets; the others go by the names that they have here."""
_DEFINITION = ("SA is the accuracy on clean images. Robust accuracy (RA) is the worst case per example over the "
               "gradients attacked through; images misclassified when clean count as broken. Percent, with Wilson 95 % "
               "intervals.")


def text(of, use: str) -> str:
    """The card.

    Args:
        of: an `interop.export.Export`.
        use: how its files are used, as Markdown.
    """
    entries = [entry for entry in results.read(of.workdir)
               if (entry["checkpoint"], entry["step"]) == (of.checkpoint, of.step)]
    head = yaml.safe_dump(_head(of, entries), sort_keys=False, allow_unicode=True, width=math.inf)
    size = "x".join(map(str, of.model.image_shape))
    return "\n".join((
        f"---\n{head}---\n", f"# {of.config.name}\n",
        f"A {of.model.kind} model for {of.config.data.name}: images of {size} in [0, 1], {of.model.num_classes} "
        f"classes. The {of.checkpoint} checkpoint, of step {of.step}, exported as {of.config.export.format} by "
        f"advmoe_jax {advmoe_jax.__version__}.\n",
        "## Use\n", use, *_accuracy(of, entries), tables.markdown(_costs(of, entries), 2), *_config(of)))


def _head(of, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the Hub reads."""
    data = of.config.data.name
    head = {"library_name": "advmoe_jax", "pipeline_tag": "image-classification", "license": of.config.export.licence,
            "datasets": [_HUB.get(data, data)], "tags": ["adversarial-robustness", "jax", of.config.export.format]}
    metrics = []
    for entry in entries:
        among = f"{entry['n']} test images, seed {entry['seed']}"
        metrics += [{"type": "accuracy", "name": f"accuracy, {among}", "value": round(entry["sa"], 6)},
                    {"type": "accuracy", "name": f"robust accuracy, {', '.join(_attack(entry))}, {among}",
                     "value": round(entry["ra"], 6)}]
    once = list({metric["name"]: metric for metric in metrics}.values())
    if not once:  # the Hub takes no index without results
        return head
    return head | {"model-index": [{"name": of.config.name, "results": [{
        "task": {"type": "image-classification"}, "dataset": {"type": head["datasets"][0], "name": data,
                                                               "split": "test"}, "metrics": once}]}]}


def _attack(entry: dict[str, Any]) -> list[str]:
    """["pgd-50", "linf eps 8/255", "of advmoe_jax 0.1.0"]."""
    budget = " ".join(filter(None, (entry["norm"], entry["eps"] and f"eps {units.as_fraction(entry['eps'])}")))
    return [*filter(None, (entry["attack"], budget)), f"of advmoe_jax {entry['versions']['advmoe_jax']}"]


def _accuracy(of, entries: Sequence[dict[str, Any]]) -> list[str]:
    if not entries:
        return ["## Accuracy\n", "This checkpoint was not measured before it was exported.\n"]
    rows = [(entry["attack"], entry["norm"], units.as_fraction(entry["eps"]) if entry["eps"] else tables.NOTHING,
             tables.with_interval(entry["sa"], entry["sa_interval"]),
             tables.with_interval(entry["ra"], entry["ra_interval"]), str(entry["n"]), str(entry["seed"]),
             entry["versions"]["advmoe_jax"]) for entry in entries]
    wrong = dict.fromkeys(flag["reason"] for entry in entries for flag in entry["flags"] if flag["unreliable"])
    notes = [_DEFINITION, *(f"UNRELIABLE: {reason}." for reason in wrong)]
    if of.checkpoint == "best" and of.config.train.select_on == "test":
        notes.append("Optimistic: the checkpoint was chosen on test images.")
    columns = ("attack", "norm", "eps", "SA %", "RA %", "test images", "seed", "advmoe_jax")
    return [tables.markdown(Table("Accuracy", columns, rows, tuple(notes)), 2)]


def _costs(of, entries: Sequence[dict[str, Any]]) -> Table:
    """Of one image, as last measured; else as counted."""
    costs = entries[-1]["macs"] if entries else of.model.costs(of.trained.masks)
    names = ("pathway", "router", "total")
    return Table("Cost of one image", (*(f"MACs, {name}" for name in names), "parameters"),
                 [tuple(f"{costs[name]:,}" for name in (*names, "params"))],
                 ("Multiply-accumulates of the experts or members that an image takes.",))


def _config(of) -> list[str]:
    """The fields that are not at their defaults."""
    values = configs.flatten(of.config)
    changed = {name: values[name] for name, setting in configs.table(values).items()
               if values[name] != setting.default or setting.room}
    lines = [f"{name}: {value!r}" for name, value in changed.items() if not name.startswith(("export.", "eval."))]
    return ["## Config\n", "The fields that are not at their defaults; `config.json` holds all.\n",
            "\n".join(("```", *lines, "```")) + "\n"]
