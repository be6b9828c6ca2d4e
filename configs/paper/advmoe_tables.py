r"""The tables and figures of AdvMoE (Zhang et al., ICCV 2023): every cell over three seeds, ours beside the paper's.

The argument is table1, table2, table3, a1, a2, fig1 to fig8 or figA2; r18_cifar10, which is there without one, has
ResNet-18 on CIFAR-10 alone; digits has the same methods, narrow, on scikit-learn's digits, one seed. What the paper
prints stands in advmoe_tables.txt.

Networks are trained as the paper says where it says it: TRADES with PGD-2 (a1: PGD-10), 100 epochs, SGD, cosine, batch
128, of ImageNet 512; table3 as configs/paper/advmoe_vit.py. The mixture is ours, see configs/README.md: shared experts
that start equal, a router in every layer with a learning rate of its own, 0.01 with warm-up and clipping, where the
paper has 0.1. AT(Sparse) is HYDRA's search for whole channels, 100 epochs from AT(Dense) whose weights rest, then 100
epochs of what is left: at r = 0.5 it costs what AT(S-Dense) does, where r does not divide the channels of a layer one
channel more. `mask` (M3 of figure 3) is that search from standard training, and nothing after it. The best checkpoint
is chosen on held-out training images; RA is the worst case over the gradients of the router.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data  (cifar100, tiny_imagenet, imagenet)
          python -m advmoe_jax.main --config configs/paper/advmoe_tables.py:digits  (table1 and all others likewise)
          --only "cifar10-r18-*" takes a part. With one --workdir for several arguments they share their runs, and
          --mode evaluate then measures what another table has of them. In pieces of 25 minutes on one GPU:
          until timeout --preserve-status 25m python -m advmoe_jax.main \
              --config configs/paper/advmoe_tables.py:r18_cifar10
          do [ $? = 75 ] || break; done
          SIGTERM, here of timeout, has a run saved before it ends with code 75; the same command continues it, and
          finished runs are skipped. What was killed loses an epoch at most.
Figures:  of fig1 to fig3, fig7, fig8 and figA2, in the folder of the recipe
          python -m advmoe_jax.report.curves --workdir runs/advmoe_tables_fig2 --out runs/fig2
          of fig4, fig5 (router and backbone) and fig6, of a seed
          python -m advmoe_jax.report.routing --workdir runs/advmoe_tables_fig4/cifar10-r18-router-s0 --out runs/fig4
          python -m advmoe_jax.report.routing --workdir runs/advmoe_tables_fig6/cifar100-r18-{advmoe,at_moe}-s0
          --against runs/advmoe_tables_fig6/cifar100-r18-at_sparse-s0 --out runs/fig6
Hardware: one GPU for r18_cifar10, accelerators for the others, 2 CPU cores for digits.
Time:     not measured. r18_cifar10 by its operations at 20 TFLOP/s (an image of TRADES with PGD-2 is 11 forward passes,
          of standard training 3), an estimate: AT(Dense) 51 minutes a seed, AT(S-Dense) 13, AT(Sparse) 102 more,
          AT(MoE) 27 and AdvMoE 55 with both experts computed, standard training 25 for all three: 4 and a half hours
          a seed. WRN-28-10 takes 9.4 times as long.
Expected: not run yet. The paper's numbers stand beside.
"""

import dataclasses
import functools
import pathlib
import sys
from fractions import Fraction

import advmoe_vit

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import one_of
from advmoe_jax.core.recipe import Line, Printed, Recipe

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import cifar10_r18  # noqa: E402, the configs beside, whose settings these are
import cifar100_r18  # noqa: E402
import digits_dissection as dissection  # noqa: E402
import digits_r18  # noqa: E402
import imagenet_r18  # noqa: E402
import tiny_imagenet_r18  # noqa: E402

FILE = pathlib.Path(__file__).with_suffix(".txt")
DATA = {"cifar10": ("CIFAR-10", cifar10_r18), "cifar100": ("CIFAR-100", cifar100_r18),
        "tiny_imagenet": ("Tiny-ImageNet", tiny_imagenet_r18), "imagenet": ("ImageNet", imagenet_r18),
        "digits": ("digits", digits_r18)}
NETS = {"r18": ("ResNet-18", dict(name="resnet")), "wrn": ("WRN-28-10", dict(name="wide_resnet")),
        "vgg": ("VGG-16", dict(name="vgg", form="released")), "densenet": ("DenseNet", dict(name="densenet")),
        "deit": ("DeiT-Tiny", dict(name="vit"))}
"""Backbones, with the fields of `config.model` that are not at their defaults."""
STANDARD = {"dense": "Dense", "sdense": "S-Dense", "moe": "MoE"}
METHODS = {"at_dense": "AT(Dense)", "at_sdense": "AT(S-Dense)", "at_sparse": "AT(Sparse)", "at_moe": "AT(MoE)",
           "advmoe": "AdvMoE"}
SEEDS, SCALES, EXPERTS = (0, 1, 2), (0.2, 0.5, 0.8), (2, 5, 8, 10)
PGD, AA, COSTS = "RA by pgd-50", "RA by standard", ("MACs, M", "router MACs, M", "total MACs, M")
AUTOATTACK = "pgd-50: pgd; standard"
NOTES = ("MACs are those of convolutions and linear layers: a pathway, the routers, and both. The paper's stand beside "
         "the latter; those of its mixtures follow from no one rule.",)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run: of METHODS, STANDARD, or a part of the dissection: mask (M3), router (theta-bar), backbone."""

    data: str = "cifar10"
    net: str = "r18"
    method: str = "advmoe"
    scale: float = 0.5
    experts: int = 2
    steps: int = 2  # of PGD in training
    seed: int = 0
    also: str = ""  # what else makes it another run

    @property
    def name(self):
        more = (f"r{self.scale}" if self.scale != 0.5 and not self.method.endswith("_dense") else "",
                f"n{self.experts}" if self.experts != 2 else "", f"k{self.steps}" if self.steps != 2 else "", self.also)
        return "-".join(filter(None, (self.data, self.net, self.method, *more, f"s{self.seed}")))

    def but(self, method):
        """That of another method; a dense network has no scale."""
        return dataclasses.replace(self, method=method, scale=0.5 if method.endswith("dense") else self.scale)


@functools.cache
def _start(data, net, method):
    """A config to be copied: naming modules takes longer than all else."""
    if net == "deit":
        return advmoe_vit.get_config(method)
    config = DATA[data][1].get_config(method)
    configs.choose(config, model=NETS[net][1]["name"])
    config.model.update(NETS[net][1])
    return config


def fresh(cell):
    """The config of a run that starts afresh."""
    method = cell.method if cell.method in METHODS else f"at_{cell.method}"
    config = _start(cell.data, cell.net, method).copy_and_resolve_references()
    config.seed = cell.seed
    if method != "at_dense":
        config.model.model_scale = cell.scale
    if config.model.num_experts > 1:
        config.model.num_experts = cell.experts
    if cell.method in STANDARD:
        config.system.loss = "natural"
    elif cell.steps != 2:
        config.train.attack = f"pgd(num_steps={cell.steps},step_size=0.25 eps,start=gaussian,keep=last)"
    return config


def sparse(cell, system, init_from, **fields):
    """A phase of HYDRA on the dense network."""
    config = fresh(cell.but("at_dense"))
    configs.choose(config, system=system)
    configs.override_all(config, [f"system.{name}={value}" for name, value in fields.items()])
    config.system.loss, config.init_from = "trades", init_from
    return config


def add(runs, cell):
    """Adds a run and those that it needs to {name: config}, unless they are there; returns its name."""
    name, search = cell.name, dict(rate=1 - Fraction(str(cell.scale)), unit="filter", coupled="true",
                                   skip="(^|/)(router/|classifier)")  # VGG's hidden layers have no scale
    if name in runs:
        return name
    if cell.method == "at_sparse":
        runs[f"{name}-search"] = sparse(cell, "mask_search", add(runs, cell.but("at_dense")), **search)
        runs[name] = sparse(cell, "prune", f"{name}-search@last", method="given", kernels="every")
    elif cell.method == "mask":
        runs[name] = sparse(cell, "mask_search", add(runs, cell.but("dense")), **search)
    elif cell.method in ("router", "backbone"):
        source = add(runs, cell.but({"router": "moe", "backbone": "router"}[cell.method]))
        runs[name] = dissection.phase(fresh(cell.but("at_moe")), "trades", cell.method, source)
    else:
        runs[name] = fresh(cell)
    return name


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of a table: its table, its label, what is run, and what the paper prints."""

    table: str
    label: str
    cell: Cell
    printed: dict = dataclasses.field(default_factory=dict)


def recipe(title, entries, columns=(), seeds=SEEDS, notes=(), suite="", **train):
    """The entries as a recipe, seed by seed; without columns the report has its own tables alone."""
    runs, rows = {}, {}
    for seed in seeds:
        for entry in entries:
            name = add(runs, dataclasses.replace(entry.cell, seed=seed))
            rows.setdefault((entry.table, entry.label), []).append(name)
    shown = {name for names in rows.values() for name in names}
    for name, config in runs.items():
        if name not in shown:  # a phase
            rows.setdefault(("a phase", name.replace(f"-s{config.seed}", "")), []).append(name)
            config.eval.attacks, config.eval.n, config.eval.black_box = "fgsm", 1000, False
        config.eval.suite = suite if name in shown else ""
        config.train.update(train)
    tables = [Printed(table, columns, tuple(
        Line(entry.label, printed=entry.printed, runs=tuple(rows[table, entry.label]))
        for entry in entries if entry.table == table), NOTES if COSTS[0] in columns else ())
        for table in dict.fromkeys(entry.table for entry in entries) if columns]
    return Recipe(runs, f"AdvMoE, {title}", {": ".join(filter(None, of)): tuple(names) for of, names in rows.items()},
                  notes=tuple(notes), tables=tuple(tables))


@functools.cache
def printed():
    """{section: {words of a setup: cells, each a tuple of texts}} of the text file."""
    found = {}
    for part in FILE.read_text().split("\n## ")[1:]:
        head, *lines = part.strip().splitlines()
        cells = {tuple(setup.split()): [tuple(map(str.strip, cell.split(","))) for cell in of]
                 for setup, *of in (line.split("|") for line in lines)}
        found[head.partition(":")[0]] = cells
    return found


def setups(section, names, title):
    """Entries of a section of the text file, {method: {column: text}} by its columns' names."""
    for (data, net), cells in printed()[section].items():
        for (method, label), values in zip(METHODS.items(), cells):
            yield Entry(title.format(DATA[data][0]), f"{NETS[net][0]}, {label}", Cell(data, net, method),
                        dict(zip(names, values)))


def table1():
    return recipe("table 1", tuple(setups("1", (PGD, "SA", COSTS[2]), "Table 1: {}")), (PGD, "SA", *COSTS))


def table2():
    first = {entry.cell: entry.printed for entry in setups("1", (PGD, "SA", COSTS[2]), "")}
    entries = [dataclasses.replace(entry, printed=first[entry.cell] | entry.printed)
               for entry in setups("2", (AA,), "Table 2: {}")]
    return recipe("table 2", entries, (PGD, AA, "SA", *COSTS), suite=AUTOATTACK)


def table3():
    of = zip(("at_moe", "advmoe"), ("AT(MoE), as Puigcerver et al.", "AdvMoE"), printed()["3"]["imagenet", "deit"])
    return recipe("table 3", [Entry("Table 3: ImageNet, DeiT-Tiny", label, Cell("imagenet", "deit", method),
                                    dict(zip((PGD, "SA", COSTS[2]), values))) for method, label, values in of],
                  (PGD, "SA", *COSTS))


def a1():
    entries = [dataclasses.replace(entry, cell=dataclasses.replace(entry.cell, steps=10))
               for entry in setups("A1", (PGD, AA, "SA", COSTS[2]), "Table A1: {}, trained with PGD-10")]
    return recipe("table A1", entries, (PGD, AA, "SA", *COSTS), suite=AUTOATTACK)


def scales(what):
    names, text, entries = (PGD, "SA", COSTS[2]), printed(), []
    for net in ("r18", "wrn"):
        title = f"{what}: CIFAR-10, {NETS[net][0]}"
        dense, *half = text["1"]["cifar10", net]
        for scale in SCALES:
            cells = half if scale == 0.5 else text["A2"]["cifar10", net, str(scale)]
            for method, values in zip(list(METHODS)[1:], cells):
                entries.append(Entry(title, f"{METHODS[method]}, r = {scale}", Cell("cifar10", net, method, scale),
                                     dict(zip(names, values))))
        entries.append(Entry(title, METHODS["at_dense"], Cell("cifar10", net, "at_dense"), dict(zip(names, dense))))
    return recipe(what, entries, (PGD, "SA", *COSTS), notes=(
        "The paper's caption of table A2 names CIFAR-100, of which it has no rows; its 130 of ResNet-18 at r = 0.2 is "
        "impossible for so narrow a network.",))


def fig1():
    entries = []
    for (_, net), cells in printed()["fig1"].items():
        of = [*((method, f"standard {label}", "SA") for method, label in STANDARD.items()),
              *((method, METHODS[method], PGD) for method in METHODS if method != "at_sparse")]
        entries += [Entry(f"Figure 1: CIFAR-10, {NETS[net][0]}", label, Cell("cifar10", net, method), {column: value})
                    for (method, label, column), (value,) in zip(of, cells)]
    return recipe("figure 1", entries, ("SA", PGD, *COSTS), notes=(
        "Figure 1 of the paper differs from its table 1, of WRN-28-10 in all that is adversarially trained but AdvMoE.",
    ))


def fig2():
    made = recipe("figure 2", [Entry("", METHODS[method], Cell(method=method)) for method in ("at_sdense", "at_moe")],
                  notes=("Trained at 8/255. The paper draws RA at four eps and prints no numbers.",))
    for config in made.runs.values():
        config.eval.eps = "2/255,4/255,6/255,8/255"
    return made


def fig3():
    kinds = {"moe": ("M1, standard MoE", "0"), "at_sdense": ("M2, AT(S-Dense)", "47.68"),
             "mask": ("M3, robust mask of a standard network", "20.04"),
             "router": ("theta-bar, standard MoE with a robust router", "37.64")}
    return recipe("figure 3", [
        Entry(f"Figure 3: r = {scale}", label, Cell(method=method, scale=scale), {PGD: ra} if scale == 0.5 else {})
        for scale in SCALES[::-1] for method, (label, ra) in kinds.items()], (PGD, "SA", *COSTS), notes=(
            "The paper prints numbers at r = 0.5 alone, and 48.12 for M2 in table 1.",))


def dissected(what, parts, notes):
    labels = {"router": "theta-bar", "backbone": "theta-double-bar"}
    return recipe(what, [Entry("", labels[part], Cell(method=part)) for part in parts], notes=notes)


def fig4():
    return dissected("figure 4", ("router",), (
        "The paper's theta-bar at r = 0.5, percent of the test images: neither attacked 31.74, the router alone 5.90, "
        "the pathway alone 44.53, both 17.83. It prints 31.74, 76.27 (the router stands) and 37.64 (RA).",))


def fig5():
    return dissected("figure 5", ("router", "backbone"), (
        "The paper prints no numbers: RA rises from theta-bar to theta-double-bar, and fewer routers stand.",))


def fig6():
    return recipe("figure 6", [Entry("", METHODS[method], Cell("cifar100", method=method))
                               for method in ("advmoe", "at_moe", "at_sparse")])


def fig7():
    entries = [Entry("", f"AdvMoE, N = {experts}, r = {tenths / 10}", Cell(scale=tenths / 10, experts=experts))
               for experts in EXPERTS for tenths in range(1, 10)]
    return recipe("figure 7", [*entries, Entry("", METHODS["at_dense"], Cell(method="at_dense"))], notes=(
        "r = 1.0 is AT(Dense), whatever N: all pathways are the whole network. The paper prints no numbers: with N < 8 "
        "and r of 0.5 to 0.9 AdvMoE is above AT(Dense), with N = 10 and r = 0.8 it suffers.",))


def trajectory():
    return recipe("figure A2", [Entry("", f"AdvMoE, {NETS[net][0]}", Cell(net=net, also="each-epoch"))
                                for net in ("r18", "wrn")], select_on="test", select_examples=10**9, notes=(
        "SA and RA of all test images after each epoch, by PGD-10: metrics.jsonl, and training.png of each run.",))


def every_method(data, seeds):
    """Standard and adversarial training of ResNet-18 by all methods."""
    known = printed()["1"].get((data, "r18"), [()] * len(METHODS))
    standard = printed()["fig1"].get((data, "r18"), [()] * len(METHODS))
    title = f"{DATA[data][0]}, ResNet-18"
    entries = [Entry(title, label, Cell(data, method=method), dict(zip((PGD, "SA", COSTS[2]), values)))
               for (method, label), values in zip(METHODS.items(), known)]
    entries += [Entry(title, f"standard {label}", Cell(data, method=method), dict(zip(("SA",), values)))
                for (method, label), values in zip(STANDARD.items(), standard)]
    return recipe(title, entries, (PGD, "SA", *COSTS), seeds)


ARGUMENTS = {
    "table1": table1, "table2": table2, "table3": table3, "a1": a1, "a2": lambda: scales("Table A2"), "fig1": fig1,
    "fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": fig5, "fig6": fig6, "fig7": fig7,
    "fig8": lambda: scales("Figure 8"), "figA2": trajectory, "r18_cifar10": lambda: every_method("cifar10", SEEDS),
    "digits": lambda: every_method("digits", (0,))}


def get_recipe(table="r18_cifar10"):
    return ARGUMENTS[one_of("table in the recipe's argument", table, ARGUMENTS)]()
