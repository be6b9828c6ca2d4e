"""What finished runs hold important: scores of weights by several methods, compared from layer to layer.

    python -m advmoe_jax.report.importance --workdir RUN RUN RUN --out FOLDER

Figure 2 of EED (Jung & Song, CVPR 2025, section 3.3): networks that learned from clean images, from attacked ones, and
from both, and one network by several scores. Writes importance.json; importance.png, a map of the nodes of each layer
for every score and run; and ranks.png, how alike two of them rank the weights of a layer.

A node is an output channel; it matters what the weights that enter it score in the mean. L layers.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from scipy.stats import rankdata

from advmoe_jax.attacks import parse
from advmoe_jax.core import cli, files, find, paths, tables
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.core.layer_spec import dotted
from advmoe_jax.core.tables import Table
from advmoe_jax.data import pipeline
from advmoe_jax.pruning import pruned
from advmoe_jax.report import figures, findings, plots, trained
from advmoe_jax.report.trained import Trained

SCORES, ROOM = "nis,erm,ase,bnsf", ("pruning", "score")
ATTACK = "pgd(num_steps=10)"
_RATE = "1/2"  # nothing is pruned
_NOTE = ("Spearman's correlation of the ranks that two of them give the weights of a layer, mean over the layers: 1 is "
         "the same order, 0 none in common.")


def measure(workdirs: Sequence[str], scores: Sequence[str], *, which: str = "best", count: int = 256,
            attack: str = ATTACK) -> dict[str, Any]:
    """What importance.json holds.

    Args:
        workdirs: of finished runs of one dense architecture and on the same data; the name of the folder is the run's.
        scores: modules of advmoe_jax.pruning that score weights.
        which: the checkpoint, "best" or "last".
        count: training images of the first run, attacked on each network by itself, for scores that read images.
        attack: which one, of the norm and eps of the first run.
    Returns:
        {"runs": {name: {"workdir", "checkpoint", "step"}}, "scores": names, "attack", "images", "layers": {layer:
        weights}, "nodes": {run: {score: {layer: a number for each node, the largest 1}}}, "runs_alike": {score: {"a,
        b": {layer: correlation of ranks}}}, "scores_alike": {run: the same}}.
    Raises:
        UserError: a run is not there, has not finished, or is of another architecture or on other data; an unknown
            score or attack.
    """
    one_of("--checkpoint", which, trained.CHECKPOINTS)
    modules = {name: find.module(ROOM[0], name, defines=ROOM[1:], kind="--scores") for name in scores}
    found = trained.alike(workdirs, which)
    first = next(iter(found.values()))
    data, budget = None, first.config.attack
    spec = parse.on_one_network(attack, "--attack", ATTACK, norm=budget.norm, eps=budget.eps)
    if any(module.ABOUT.needs_images for module in modules.values()):
        data = pipeline.load(first.config.data, first.config.train.select_on, 0, first.config.seed)
    sizes = {name: _scored(run, modules, data, count, spec) for name, run in found.items()}
    layers = {path: of.size for path, of in next(iter(next(iter(sizes.values())).values())).items()}
    of_layers = {layer: _correlations({(name, score): of[layer] for name, by_score in sizes.items()
                                       for score, of in by_score.items()}) for layer in layers}

    def alike(kept, names):
        """Of pairs of names, kept(name) being what is ranked."""
        return {", ".join(pair): {layer: of[kept(pair[0]), kept(pair[1])] for layer, of in of_layers.items()}
                for pair in itertools.combinations(names, 2)}

    return {
        "runs": {name: {"workdir": run.workdir, "checkpoint": which, "step": run.step} for name, run in found.items()},
        "scores": list(modules), "attack": spec.text if data else "",
        "images": len(data.rows[:count]) if data else 0, "layers": layers,
        "nodes": {name: {score: {layer: _nodes(size) for layer, size in of.items()} for score, of in by_score.items()}
                  for name, by_score in sizes.items()},
        "runs_alike": {score: alike(lambda name, score=score: (name, score), found) for score in modules},
        "scores_alike": {name: alike(lambda score, name=name: (name, score), modules) for name in found}}


def _scored(run: Trained, modules: Mapping[str, Any], data: pipeline.Data | None, count: int, spec: parse.Spec
            ) -> dict[str, dict[str, np.ndarray]]:
    """{score: {layer: sizes like its kernel}}."""
    x = y = None
    if data is not None:
        x, y = pipeline.images_of(data.train, data.rows[:count])
        takes = spec.function(run.model.outputs_fn(run.variables))
        x = spec.in_parts(takes, jax.random.key(run.config.seed), x, y)
    subject = pruned.of(lambda variables, x: run.model.outputs_fn(variables)(x)[0], run.variables, run.model.layers,
                        _RATE, "every", r"(^|/)router/", x, y)
    return {name: {dotted(path): np.abs(np.asarray(of, np.float32)) for path, of in module.score(
        subject, module.Config()).items()} for name, module in modules.items()}


def _nodes(sizes: np.ndarray) -> list[float]:
    means = sizes.reshape(-1, sizes.shape[-1]).mean(0)
    return [round(float(mean), 4) for mean in means / max(means.max(), np.finfo(np.float32).tiny)]


def _correlations(found: Mapping[Any, np.ndarray]) -> dict[tuple[Any, Any], float]:
    """{(a, b): Spearman's correlation} of every two arrays; 0 where one of them is constant."""
    ranks = {}
    for name, of in found.items():
        centred = rankdata(of.ravel()) - (of.size + 1) / 2
        ranks[name] = centred / max(np.linalg.norm(centred), 1)
    return {(a, b): round(float(ranks[a] @ ranks[b]), 4) for a, b in itertools.combinations(ranks, 2)}


def summary(found: Mapping[str, Any]) -> list[Table]:
    """Tables of what `measure` gave: how alike runs are by each score, and scores in each run."""
    shown = (("Runs", "score", found["runs_alike"]), ("Scores", "run", found["scores_alike"]))
    return [Table(f"{what} that rank weights alike", (by, *next(iter(of.values()))), [
        (name, *(tables.decimals(np.mean(list(layers.values()))) for layers in pairs.values()))
        for name, pairs in of.items()], (_NOTE,)) for what, by, of in shown if any(of.values())]


def write(out: epath.Path, found: Mapping[str, Any]) -> None:
    """Writes importance.json, and with matplotlib importance.png and ranks.png, and prints the tables.

    Args:
        out: the folder, which is made.
        found: what `measure` gave.
    """
    files.write_json(out / "importance.json", found)
    alike = {"two runs": found["runs_alike"], "two scores": found["scores_alike"]}
    drawn = figures.write(out, {"importance.png": plots.nodes(found["nodes"]), "ranks.png": plots.ranks(alike)})
    findings.show(out, ("importance.json", *drawn), summary(found))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for bad input."""
    parser = cli.Parser(prog="python -m advmoe_jax.report.importance", description=(
        "Compares what finished runs of one architecture hold important, layer by layer, by several scores of "
        "weights."))
    parser.add_argument("--workdir", required=True, nargs="+", metavar="DIR", help="of the runs")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where importance.json and the plots go")
    parser.add_argument("--scores", default=SCORES, metavar="NAMES", help=f"of advmoe_jax/pruning, unless {SCORES}")
    parser.add_argument("--checkpoint", default="best", metavar="NAME", help="best or last")
    parser.add_argument("--images", default="256", metavar="N", help="training images for scores that read some")
    parser.add_argument("--attack", default=ATTACK, help=f"on each network, that makes these images; else {ATTACK}")

    def run():
        args = parser.parse_args(argv)
        if not args.images.isdigit() or not int(args.images):
            raise UserError(f"--images is {args.images!r}: expected a whole number of 1 or more")
        scores = list(dict.fromkeys(filter(None, map(str.strip, args.scores.split(",")))))
        if not scores:
            raise UserError(f"--scores is {args.scores!r}: expected names such as {SCORES}")
        out, workdirs = paths.path(args.out), [name for text in args.workdir for name in paths.listed(text)]
        write(out, measure(workdirs, scores, which=args.checkpoint, count=int(args.images), attack=args.attack))

    return cli.ending(run)


if __name__ == "__main__":
    cli.leave(main)
