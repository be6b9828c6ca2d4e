"""What networks cost: multiply-accumulates (MACs) of one image and parameters, counted without computing anything.

    python -m advmoe_jax.report.macs --config configs/cifar10_r18.py
    python -m advmoe_jax.report.macs --config configs/cifar10_r18.py --config.model.name=wide_resnet --layers
    python -m advmoe_jax.report.macs --workdir RUN
    python -m advmoe_jax.report.macs --all

--config counts what a config builds, or each distinct model of a recipe once; --workdir a finished run, with the masks
of its best checkpoint; --all the networks of AdvMoE's paper, by `report.advmoe_costs`. Beside a network of that paper
stands the paper's figure. What the paper says of mixtures follows no rule, so that its pathways and ours differ.

Counted are convolutions, linear layers and attention's products. Masks cost no MACs: they are zeros in weights, which
"executed" counts and the others do not. Neither does the choice of an expert, beside the router that is counted: E - 1
comparisons a choice, and then with model.dispatch=all, for each value that a routed layer gives, E products with a gate
of zeros and a one; else images are copied into blocks of one expert, and back.

H height, W width, C channels, K classes, E experts.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from advmoe_jax.core import cli, paths, recipe, status, tables, tree
from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.core.tables import Table
from advmoe_jax.data import pipeline
from advmoe_jax.models import model as models
from advmoe_jax.models.macs import LayerCost
from advmoe_jax.models.model import Model
from advmoe_jax.report import advmoe_costs
from advmoe_jax.train import checkpoint as checkpoints

KINDS = ("pathway", "router", "total", "executed")
_GIGA = 1e9
_ROUTERS = ("router", "gate")  # groups of parameters that choose
_NOTE = ("MACs of one image, of convolutions, linear layers and attention's products. Pathway: one expert a layer; "
         "executed: what model.dispatch computes, also zeros of masks, without the padding of blocks; parameters: the "
         "router's behind the others. Masks and the choice of an expert need no MACs; the choice is comparisons, and "
         "products with a one-hot gate or copies of images.")
_PAPER = ("Paper: 1e9 MACs, as AdvMoE's tables 1 and A2 print them. Difference: our pathway less the paper's, and of a "
          "mixture our total less it.")
_NORMS = "norms, and what is no layer's"


@dataclasses.dataclass(frozen=True)
class Count:
    """What a model costs.

    Attributes:
        network: "ResNet-18, CIFAR-10", or what the fields say.
        method: "S-Dense, r=0.5".
        names: of the runs that build it, if there are any.
        fields: `config.model`.
        image_shape: (H, W, C).
        num_classes: K.
        macs: of each of KINDS.
        params: of all, with masks.
        router_params: of what chooses among them.
        layers: of each layer what it is and what it costs.
        paper: what AdvMoE's paper says, 1e9 MACs; None: nothing.
    """

    network: str
    method: str
    names: tuple[str, ...]
    fields: Mapping[str, Any]
    image_shape: tuple[int, int, int]
    num_classes: int
    macs: Mapping[str, int]
    params: int
    router_params: int
    layers: tuple[tuple[LayerSpec, LayerCost], ...]
    paper: float | None

    @property
    def differences(self) -> dict[str, float]:
        """{kind: ours less the paper's, 1e9 MACs}: the pathway, and if there is a router the total."""
        kinds = ("pathway", "total") if self.macs["router"] else ("pathway",)
        return {} if self.paper is None else {kind: self.macs[kind] / _GIGA - self.paper for kind in kinds}


def of_cases(cases: Sequence[advmoe_costs.Case]) -> Iterator[Count]:
    """Networks of AdvMoE's paper, one after the other."""
    for case in cases:
        yield of_model(case.config().model, case.image_shape, case.num_classes, case.network)


def of_config(text: str, overrides: Sequence[str] = ()) -> Iterator[Count]:
    """What a config file builds, or each distinct model of a recipe.

    Args:
        text: "configs/digits_r18.py", or with an argument "configs/digits_r18.py:at_dense".
        overrides: "model.width=32", of every run.
    Raises:
        UserError: see `recipe.load`; a field is refused, or only the files of the data say the shape of its images or
            the number of classes, and they are not there.
    """
    loaded = recipe.load(text)
    runs = {"": loaded} if isinstance(loaded, ConfigDict) else loaded.runs
    for name, config in runs.items():
        configs.checked(config, list(overrides), name and f"run {name}: ")
    distinct: dict[Any, list[str]] = {}
    for name, config in runs.items():
        fields = {field: value for field, value in config.model.items() if field not in ("mean", "std")}
        distinct.setdefault((str(fields), pipeline.of_images(config.data)), []).append(name)
    for (_, images), names in distinct.items():
        yield of_model(runs[names[0]].model, *images, names=tuple(filter(None, names)))


def of_workdir(workdir: str) -> Count:
    """A finished run, with the masks of its best checkpoint.

    Raises:
        UserError: there is no such run, it has not finished, or its checkpoint cannot be read.
    """
    folder = paths.path(workdir)
    config = status.config_of_trained(folder, f"--workdir is {workdir}")
    shape, classes = pipeline.of_images(config.data)
    with checkpoints.opened(folder, create=False) as saved:
        masks = saved.restore_trained("best", models.make(config.model, shape, classes).shapes).masks
    return of_model(config.model, shape, classes, names=(config.name,), masks=masks)


def of_model(cfg: ConfigDict, image_shape: tuple[int, int, int], num_classes: int, network: str = "",
             names: tuple[str, ...] = (), masks: Mapping[str, Any] | None = None) -> Count:
    """What the model that `config.model` describes costs.

    Args:
        cfg: its fields.
        image_shape: (H, W, C).
        num_classes: K.
        network: what to call it; "": by its fields.
        names: of the runs that build it.
        masks: as `State.masks`; None: dense.
    """
    model = models.make(cfg, image_shape, num_classes)
    costs, groups = model.costs(masks), model.shapes["params"]
    network = network or f"{_called(cfg)}, {'x'.join(map(str, image_shape[:2]))}, {num_classes} classes"
    return Count(network, _method(model, cfg), names, cfg.to_dict(), tuple(image_shape), num_classes,
                 {kind: costs[kind] for kind in KINDS}, costs["params"],
                 sum(tree.size(groups[group]) for group in _ROUTERS if group in groups),
                 tuple(zip(model.layers, model.layer_costs(masks), strict=True)),
                 advmoe_costs.figure(cfg, tuple(image_shape)))


def _called(cfg: ConfigDict) -> str:
    """"resnet 18, width 64" of a backbone, itself or inside another model."""
    backbone = cfg.get("member") or cfg.get("base") or cfg.name
    said = " ".join(str(word) for word in (backbone, cfg.get("depth")) if word)
    return f"{said}, width {cfg.width}" if "width" in cfg else said


def _method(model: Model, cfg: ConfigDict) -> str:
    experts, scale = cfg.get("num_experts", 1), cfg.get("model_scale", 1)
    told = (f"N={experts}" if experts > 1 else "", f"r={scale:g}" if scale != 1 or experts > 1 else "",
            f"{cfg.routing} routing" if experts > 1 else "")
    return ", ".join(filter(None, (model.kind, *told)))


def shown(found: Sequence[Count], layers: bool = False, notes: tuple[str, ...] = ()) -> list[Table]:
    """As tables: all models in one, and with `layers` the layers of each."""
    has_names, has_paper = any(of.names for of in found), any(of.paper is not None for of in found)
    columns = ("network", "method", *(["runs"] if has_names else []), *KINDS, "parameters",
               *(["paper, G", "difference, G"] if has_paper else []))
    rows = [(of.network, of.method, *([_listed(of.names)] if has_names else []), *(
        f"{of.macs[kind]:,}" for kind in KINDS), _params(of), *(_paper(of) if has_paper else ())) for of in found]
    whole = Table("MACs and parameters", columns, rows, (_NOTE, *([_PAPER] if has_paper else []), *notes))
    return [whole, *(_by_layer(of) for of in found if layers)]


def _listed(names: tuple[str, ...]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)


def _params(of: Count) -> str:
    return f"{of.params - of.router_params:,}" + (f" + {of.router_params:,}" if of.router_params else "")


def _paper(of: Count) -> tuple[str, str]:
    if of.paper is None:
        return tables.NOTHING, tables.NOTHING
    return str(of.paper), " / ".join(f"{round(less, 2) + 0.0:+.2f}" for less in of.differences.values())


def _by_layer(of: Count) -> Table:
    rows = [(spec.path, "x".join(map(str, spec.kernel)), "x".join(map(str, spec.out_size)), str(spec.width),
             "yes" if spec.routed else "", f"{int(cost.macs):,}", f"{cost.executed:,}", f"{cost.params:,}")
            for spec, cost in of.layers]
    rest = of.params - sum(cost.params for _, cost in of.layers)
    return Table(f"{of.network}, {of.method}", (
        "layer", "kernel", "output", "channels", "routed", "MACs", "executed", "parameters"),
        [*rows, (_NORMS, "", "", "", "", "0", "0", f"{rest:,}")],
        ("Kernels as they are stored; channels that one image gets; of several networks as if all were computed.",))


def _json(of: Count, layers: bool) -> dict[str, Any]:
    paper = None if of.paper is None else {"giga_macs": of.paper, "difference": of.differences}
    found = {"network": of.network, "method": of.method, "runs": list(of.names), "image_shape": list(of.image_shape),
             "num_classes": of.num_classes, "model": dict(of.fields), "macs": dict(of.macs), "params": of.params,
             "router_params": of.router_params, "paper": paper}
    return found | ({"layers": [{
        "path": spec.path, "kernel": list(spec.kernel), "out_size": list(spec.out_size), "width": spec.width,
        "routed": spec.routed, "macs": int(cost.macs), "executed": cost.executed, "params": cost.params}
        for spec, cost in of.layers]} if layers else {})


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for bad input."""
    parser = cli.Parser(prog="python -m advmoe_jax.report.macs", description=(
        "Counts multiply-accumulates and parameters of what a config builds, of a finished run, or of the networks of "
        "AdvMoE's paper, beside the paper's figures. Nothing is computed or trained."))
    parser.add_argument("--config", default="", metavar="FILE[:ARGUMENT]", help=(
        "a config, or a recipe, of which each distinct model counts; --config.FIELD=VALUE changes a field"))
    parser.add_argument("--workdir", default="", metavar="DIR", help="a finished run, with its masks")
    parser.add_argument("--all", action="store_true", help="the networks of AdvMoE's paper")
    parser.add_argument("--layers", action="store_true", help="each layer too")
    parser.add_argument("--json", action="store_true", help="exact numbers as JSON, a list of models")

    def run():
        args, rest = parser.parse_known_args(argv)
        overrides = parser.overrides(rest)
        given = [flag for flag, value in (("--config", args.config), ("--workdir", args.workdir), ("--all", args.all))
                 if value]
        if len(given) != 1:
            said = f"{' and '.join(given)} are given" if given else "nothing is given"
            raise UserError(f"{said}: expected one of --config FILE, --workdir DIR and --all")
        if overrides and not args.config:
            raise UserError(f"--config.{overrides[0]} is for --config: expected no such flag with {given[0]}")
        found = list(of_config(args.config, overrides) if args.config else of_cases(advmoe_costs.CASES) if args.all else
                     [of_workdir(args.workdir)])
        if args.json:
            print(json.dumps([_json(of, args.layers) for of in found], indent=2))
        else:
            tables.show(shown(found, args.layers, advmoe_costs.NOTES if args.all else ()))

    return cli.ending(run)


if __name__ == "__main__":
    cli.leave(main)
