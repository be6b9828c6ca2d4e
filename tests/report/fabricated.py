"""Workdirs made up from numbers."""

import dataclasses
import json

from advmoe_jax.attacks import parse
from advmoe_jax.core import config as configs
from advmoe_jax.evaluation import results, suites
from advmoe_jax.models import routing_facts
from advmoe_jax.ops.statistics import wilson

ROUTING = {"load": [[0.25, 0.75], [1.0, 0.0]], "load_entropy": [0.8113, -0.0], "flip_rate": [0.125, 0.0]}
VIEWS = {"none": 0.5, "ste_selected": 0.45, "ste_full": 0.41}


def entry(checkpoint="best", *, sa=0.8, ra=0.4, n=200, attack="pgd(num_steps=20)", eps="8/255", seed=0, train_seed=0,
          routed=True, facts=None, **fields):
    """A measurement as results.json has it; `fields` replace what is there."""
    facts = facts if facts is not None else ROUTING if routed else {}
    spec, = parse.attacks(attack, eps=eps)
    return {
        "checkpoint": checkpoint, "step": 30 if checkpoint == "best" else 40, "seed": seed, "train_seed": train_seed,
        "config": "small", "method": "AdvMoE" if routed else "AT(Dense) by trades", "selected_on": "validation",
        "data": "digits", "macs": {"pathway": 139_299_328, "router": 1_005_000 * routed, "total": 140_304_328,
                                   "executed": 280_000_000, "params": 5_834_652},
        "precision": {"verdicts": "float32", "attacks": "default"}, "backend": "cpu",
        "versions": {"advmoe_jax": "0.1.0", "jax": "0.9"},
        "attack": spec.label, "norm": spec.config.norm, "eps": eps, "eps_value": 8 / 255,
        "settings": spec.settings, "asked": suites.alone(attack, spec.config.norm, eps)[0].asked, "n": n,
        "sa": sa, "sa_interval": wilson(round(sa * n), n), "ra": ra, "ra_interval": wilson(round(ra * n), n),
        "attempts": [], "flags": [], "unreliable": False, "facts": facts,
        "fact_tables": [dataclasses.asdict(routing_facts.fact_table(facts))] if facts else [],
        "ra_by_view": dict(VIEWS) if routed else {"none": ra}} | fields


def metrics(routed=True):
    """The records of two epochs of training, of 20 steps each."""
    names = ("lower", "upper") if routed else ("train",)
    for i in (1, 2, 3, 4):
        values = {"loss": 2.3 / i, "sa": 0.2 * i, "ra": 0.1 * i}
        values |= {"load_entropy": [0.9, 0.5], "flip_rate": [0.1, 0.3]} if routed else {}
        yield {"step": 10 * i, "split": "train", "epoch": i / 2} | {
            f"{update}/{k}": v for update in names for k, v in values.items()}
        yield {"step": 10 * i, "split": "validation", "sa": 0.2 * i, "ra": 0.1 * i}


def workdir(folder, entries, *, name="small", seed=0, lines=(), **fields):
    """Makes a workdir of these measurements and records; `fields` are set in its config, which is from configs/NAME.py.
    """
    config = configs.default()
    config.name, config.file, config.seed = name, f"configs/{name}.py", seed
    config.update_from_flattened_dict(fields)
    configs.write(config, folder / "config.json")
    if entries:
        results.add(folder, entries)
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    return folder
