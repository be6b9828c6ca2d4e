"""A pruned run in its compact form: `python -m advmoe_jax.interop.compact --workdir P --out C`.

P pruned grouped kernels, and its network computes with zeros. C becomes a finished run of the same function without
them, by grouped convolutions (`models.compact`): it is evaluated, attacked and counted as any other, and other runs
start from it.
"""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from advmoe_jax.core import cli, console, paths, status
from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.data import pipeline
from advmoe_jax.interop import finished
from advmoe_jax.models import compact, network
from advmoe_jax.train import checkpoint as checkpoints

CHECKPOINTS = ("best", "last")


def make_run(workdir: str, out: str, which: str = "best") -> ConfigDict:
    """Makes `out` the workdir of a finished run of the compact form.

    Args:
        workdir: of a finished run with system.name=prune, whose method prunes grouped kernels.
        out: a folder that is new or empty; it is there whole, or not at all (in a bucket: not finished).
        which: the checkpoint, "best" or "last".
    Returns:
        The config of the run.
    Raises:
        UserError: no such run, one that has not finished, is routed or was pruned otherwise; a folder that holds
            something. Nothing is written.
    """
    one_of("--checkpoint", which, CHECKPOINTS)
    where, source = finished.free(out), paths.path(workdir)
    pruned = _config_of(source, workdir)
    plan = _plan(source, workdir)
    config = _config(pruned, plan)
    dataset = pipeline.open_dataset(pruned.data.name, pruned.data.dir, view=pruned.data)
    shape, classes = dataset.image_shape, dataset.num_classes
    masked, net = network.make(pruned.model, shape, classes), compact.model(config.model, shape, classes)
    with checkpoints.opened(source, create=False) as saved:
        step, trained = saved.step(which), saved.restore_trained(which, masked.shapes)
    variables = compact.from_masked(net, trained.variables, plan["layers"])
    made_of = {"workdir": str(workdir), "checkpoint": which, "step": step}
    finished.write(where, config, variables, {"compacted": made_of})
    before, after = masked.costs(), net.costs()
    console.say(f"{out}: the {which} checkpoint of {workdir} without zeros, of step {step}; of the dense network MACs "
                f"{before['total']:,} to {after['total']:,}, parameters {before['params']:,} to {after['params']:,}; a "
                "finished run for --mode evaluate and init_from")
    return config


def _config_of(source: epath.Path, name: str) -> ConfigDict:
    """The config of a finished run of a dense network."""
    config = status.config_of_trained(source, f"--workdir is {name}")
    if config.model.get("num_experts", 1) > 1:
        raise UserError(f"--workdir is {name}, whose network has {config.model.num_experts} experts: expected a dense "
                        "network, model.num_experts=1")
    return config


def _plan(source: epath.Path, name: str) -> dict[str, Any]:
    """What pruning.json says of a run that pruned grouped kernels."""
    path = source / "pruning.json"
    if not path.exists():
        raise UserError(f"--workdir is {name}, which has no pruning.json: expected a run with system.name=prune")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not found["layers"] or not all("order" in layer for layer in found["layers"].values()):
        raise UserError(f"--workdir is {name}, pruned by {found['method']}, which keeps no groups of filters: expected "
                        "system.method=srgkp or tmi_greedy")
    return found


def _config(before: ConfigDict, plan: dict[str, Any]) -> ConfigDict:
    """That of the compact run, checked: the model, images and evaluations of the pruned one."""
    old = before.to_dict()
    groups = len(next(iter(plan["layers"].values()))["kept"])
    model = old["model"] | {"name": "compact", "base": before.model.name, "groups": groups, "rate": plan["rate"],
                               "kernels": before.system.kernels}
    fresh = configs.default(data=before.data.name).to_dict()
    config = configs.complete(ConfigDict({
        "name": f"{before.name}_compact", "seed": before.seed, "model": model, "data": old["data"],
        "attack": old["attack"], "eval": old["eval"], "train": fresh["train"], "optim": fresh["optim"],
        "system": {"name": "standard", "loss": before.system.loss}}))
    configs.check(config)
    return config


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for bad input."""
    parser = cli.Parser(prog="python -m advmoe_jax.interop.compact", description=(
        "Makes a finished run of the compact form of a run that pruned grouped kernels: the same function by grouped "
        "convolutions, without zeros."))
    parser.add_argument("--workdir", required=True, help="of the pruned run")
    parser.add_argument("--out", required=True, metavar="WORKDIR", help="a folder that is new or empty")
    parser.add_argument("--checkpoint", default="best", metavar="NAME", help="best or last")

    def run():
        args = parser.parse_args(argv)
        make_run(args.workdir, args.out, args.checkpoint)

    return cli.ending(run)


if __name__ == "__main__":
    cli.leave(main)
