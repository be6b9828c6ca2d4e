"""What routes do in routed networks of finished runs: who takes which, what breaks them, and what they are worth.

    python -m advmoe_jax.report.routing --workdir RUN RUN --against SPARSE_RUN --out FOLDER

Figures 3 to 6 of AdvMoE (Zhang et al., ICCV 2023, sections 4 and 5). Test images are attacked through the whole
network, by the router alone, and with routes held. Writes routing.json; table.md; dissection.png, which part of the
network attacks break; routes.png, each expert alone, the most common pathway and random ones; layers.png, loads and
flips; classes.png, experts by class; and with a sparse run iou.png, how much of it the pathways share.

m images, L routed choices, E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from advmoe_jax.attacks import parse
from advmoe_jax.core import cli, paths
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.core.layer_spec import dotted
from advmoe_jax.report import findings, overlap, routed, routing_plots, routing_tables, trained

ATTACK = "pgd"


def measure(workdirs: Sequence[str], *, against: str = "", which: str = "best", count: int = 0, attack: str = ATTACK
            ) -> dict[str, Any]:
    """What routing.json holds.

    Args:
        workdirs: of finished runs of one routed architecture and on the same data; the name of the folder is the run's.
        against: of a run that prunes whole channels of the dense network, perhaps with "@last"; "": there is none.
        which: the checkpoint of the runs, "best" or "last".
        count: test images, the first so many; 0 for all.
        attack: PGD with settings, of the norm and eps of the first run unless it says others.
    Returns:
        {"attack", "images", "data", "against", "classes": names, "experts": E, "layers": names of the routed layers;
        "runs": {name: {"workdir", "checkpoint", "step"} and what `routed.measured` gives}}.
    Raises:
        UserError: a run is not there, has not finished, has no routing, or is of another architecture or on other data;
            the sparse one does not fit; or the attack is not PGD.
    """
    one_of("--checkpoint", which, trained.CHECKPOINTS)
    found = trained.alike(workdirs, which)
    first = next(iter(found.values()))
    if "routed" not in first.model.surfaces:
        raise UserError(f"--workdir names {first.workdir}, a {first.model.kind} without routing: expected one network "
                        "with model.num_experts of 2 or more")
    if first.model.tokens > 1:
        raise UserError(f"--workdir names {first.workdir}, where {first.model.tokens} tokens choose: expected one "
                        "whose images make one choice a layer; results.json has loads and flips of tokens")
    spec = parse.on_one_network(attack, "--attack", ATTACK, norm=first.config.attack.norm, eps=first.config.attack.eps)
    if spec.name != "pgd" or spec.config.loss == "kl":
        raise UserError(f"--attack is {attack!r}: expected pgd, with a loss of labels, such as 'pgd(num_steps=20)'")
    shared, sparse = {}, None
    if against:
        name, of_sparse = paths.source(against)
        said = f"--against names {name}"
        sparse = trained.load(name, one_of("checkpoint in --against", of_sparse or "best", trained.CHECKPOINTS), said,
                              first)
        shared = {of: overlap.of(run, sparse, said) for of, run in found.items()}
    rows = np.arange(len(first.dataset.test))[:count or None]
    return {
        "attack": spec.text, "images": len(rows), "data": first.config.data.name,
        "against": sparse.workdir if sparse else "", "classes": list(first.dataset.class_names),
        "experts": first.config.model.num_experts,
        "layers": [dotted(layer.path) for layer in first.model.layers if layer.routed],
        "runs": {of: {"workdir": run.workdir, "checkpoint": which, "step": run.step} | routed.measured(
            run, spec, rows, shared.get(of)) for of, run in found.items()}}


def write(out: epath.Path, found: Mapping[str, Any]) -> None:
    """Writes routing.json and table.md, and with matplotlib the figures, and prints the tables.

    Args:
        out: the folder, which is made.
        found: what `measure` gave.
    """
    shown = routing_tables.of(found)
    findings.write(out, "routing", found, shown)
    findings.show(out, ("routing.json", "table.md", *routing_plots.write(out, found)), shown)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for bad input."""
    parser = cli.Parser(prog="python -m advmoe_jax.report.routing", description=(
        "Looks into the routing of finished runs of one architecture: which part attacks break, what each route is "
        "worth, who takes which, and how much of a sparse network the pathways share."))
    parser.add_argument("--workdir", required=True, nargs="+", metavar="DIR", help="of the runs")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where routing.json, table.md and the plots go")
    parser.add_argument("--against", default="", metavar="DIR", help="a run that prunes whole channels of the dense "
                                                                     "network; DIR@last: its last checkpoint")
    parser.add_argument("--checkpoint", default="best", metavar="NAME", help="best or last")
    parser.add_argument("--images", default="0", metavar="N", help="test images, the first so many; 0 for all")
    parser.add_argument("--attack", default=ATTACK, help="pgd with settings, 'pgd(num_steps=20,eps=4/255)'; unless "
                                                         "given pgd-50 within the eps of training")

    def run():
        args = parser.parse_args(argv)
        if not args.images.isdigit():
            raise UserError(f"--images is {args.images!r}: expected a whole number, 0 for all")
        out, workdirs = paths.path(args.out), [name for text in args.workdir for name in paths.listed(text)]
        write(out, measure(workdirs, against=args.against, which=args.checkpoint, count=int(args.images),
                           attack=args.attack))

    return cli.ending(run)


if __name__ == "__main__":
    cli.leave(main)
