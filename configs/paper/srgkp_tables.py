"""Tables 1 to 20 of SR-GKP (Zhong et al., NeurIPS 2023): every cell, ours beside the paper's.

The argument is the number of a table; without one all runs of all tables are there, of which tables share many. What
the paper prints stands in srgkp_tables.txt. Methods that are not built here, or not whole (DHP, GAL, NPPM, CC, LRF,
OTOv2, TMI-GKP's clustering), are the paper's rows alone; what of them is built has rows of its own, and so has what any
method has to beat, random filters or kernels.

As in the paper a network is trained naturally (300 epochs; bottlenecks and ImageNet 100), pruned, and trained as long
again; every epoch is measured on all test images, and each row is the epoch that is best by one criterion. That is
optimistic: it is for comparison with these tables. All methods train on alike, though the paper lets each have its own
schedule. How the paper trained the ResNet-50 that it calls self-trained, and the networks on Tiny-ImageNet, it does not
say: here as those on CIFAR-10, with ImageNet's batch size, decay and number of epochs.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data  (tiny_imagenet and imagenet for tables 3 and 13)
          python -m advmoe_jax.main --config configs/paper/srgkp_tables.py:10  (without :10 all tables; --list)
          for the torchvision rows of table 3 first: python -m advmoe_jax.interop.torch_import --arch resnet50
          --weights resnet50.pth --data imagenet --out runs/resnet50
          table 7: python -m advmoe_jax.bench pruning
Hardware: accelerators; a run on CIFAR-10 is 300 epochs, one on ImageNet 100.
Time:     not measured yet.
Expected: the paper's numbers stand beside. Not run yet.
"""

import dataclasses
import functools
import importlib
import pathlib

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import unknown_name
from advmoe_jax.core.recipe import Line, Printed, Recipe
from advmoe_jax.models import normalisation

FILE = pathlib.Path(__file__).with_suffix(".txt")
ATTACKED = {"a": "fgsm-0.01sd", "b": "fgsm-0.1sd", "c": "pgd-3-8/255sd"}
ATTACKED_LARGE = {"a": "fgsm-0.001sd", "b": "fgsm-0.01sd", "c": "fgsm-0.1sd", "d": "pgd-3-8/255sd"}
LARGE = 3, 13  # tables whose criteria are those of larger images
COSTS = "MACs, M", "params, M"


@dataclasses.dataclass(frozen=True)
class Net:
    """A network, and how it is trained."""

    model: dict
    data: str = "cifar10"
    epochs: int = 300
    step: int = 100  # epochs after which the learning rate falls to a tenth, again and again
    batch_size: int = 64
    weight_decay: float = 5e-4
    kernels: str = "3x3"
    imported: str = ""  # run that it starts from; "": it is trained here
    frequencies: bool = False  # whether high frequencies are criteria too, for table 1

    @property
    def large(self):
        return self.data != "cifar10"


def _cifar(depth, **more):
    return Net(dict(name="cifar_resnet", depth=depth), **more)


_BOTTLENECK = dict(epochs=100, step=30, weight_decay=1e-4)
_IMAGENET = Net(dict(name="resnet", depth=50, stem="imagenet"), "imagenet", batch_size=256, **_BOTTLENECK)
NETS = {
    "r32": _cifar(32), "r56": _cifar(56, frequencies=True), "r110": _cifar(110),
    "vgg16": Net(dict(name="vgg", depth=16)),
    "tiny56": _cifar(56, data="tiny_imagenet", batch_size=128),
    "tiny101": Net(dict(name="resnet", depth=101), "tiny_imagenet", batch_size=128, **_BOTTLENECK),
    "r50": _IMAGENET,
    "r50tv": dataclasses.replace(_IMAGENET, kernels="all", imported="runs/resnet50")}
METHODS = {
    "l1norm_a": dict(method="l1norm", variant="A"), "l1norm_b": dict(method="l1norm", variant="B"),
    "greedy": dict(method="srgkp", search="greedy"), "least_smooth": dict(method="srgkp", search="least_smooth"),
    "random_kernels": dict(method="srgkp", grouping="random", search="random"),
    "tmi": dict(method="tmi_greedy"), "tmi_random": dict(method="tmi_greedy", grouping="random"),
    **{f"srgkp{csb}": dict(method="srgkp", alpha=csb) for csb in (0.1, 0.25, 0.5, 0.75)},
    **{f"sfp{csb}": dict(method="sfp", norm_weight=csb) for csb in (0.5, 0.75, 0.9)}}
"""Fields of a method by the name that it has in names of runs, unless that is the method's own."""
ROBUST = dict(loss="madry", attack="pgd(num_steps=10,step_size=2/255)", eps="8/255")
RANKED = ("CC", "DHP", "FPGM", "L1Norm-A", "L1Norm-B", "NPPM", "SFP", "SR-GKP")
RANKS = {  # table 20; columns
    "ResNet-32": (17, (1, 3.75, 4.25, 5.5, 6.25, 5, 7.5, 2.75)),
    "ResNet-56": (18, (3.5, 7.5, 3.75, 3.75, 6.25, 4, 5, 2.25)),
    "ResNet-110": (19, (5.75, 7.75, 2, 5.75, 4.25, 5.5, 3, 2)),
    "all": (None, (3.42, 6.33, 3.33, 5.0, 5.58, 4.83, 5.17, 2.33))}
TIMES = {  # table 7
    "TMI-GKP": ("47m 6s", "1h 20m 10s", "2h 32m 12s", "2h 36m 22s", "4h 53m 33s", "5h 30m 18s"),
    "SR-GKP": ("3s", "11m 36s", "5s", "20m 43s", "11s", "1h 10m 16s")}
TRAITS = "venue", "type", "procedure", "special setup", "zero-masked", "fully pruned epoch"
DETAILS = {  # table 8: the module of what is built here, and the paper's traits
    "CC": ("", "CVPR", "C", "One-shot", "Y (requires data)", "N", "1"),
    "CC (channels)": ("taylor_channels",),
    "DHP": ("", "ECCV", "F", "Iterative (from scratch)", "Y (hypernet)", "Y", "100"),
    "FPGM": ("fpgm", "CVPR", "F", "Iterative", "N", "Y", "1"),
    "GAL": ("", "CVPR", "F", "Iterative", "Y (GAN)", "Y", "close to 300"),
    "HRank": ("hrank_scores", "CVPR", "F", "Iterative", "N", "N", "325 or 327"),
    "L1Norm": ("l1norm", "ICLR", "F", "One-shot", "Y (dynamic pruning rate)", "N", "1"),
    "LRF": ("", "AAAI", "C", "One-shot", "Y (requires data, adding 1x1, dark knowledge)", "N", "1"),
    "LRF (score)": ("lrf_scores",),
    "NPPM": ("", "CVPR", "C", "One-shot", "Y (hypernet)", "N", "1"),
    "OTO (HESSO)": ("hesso_decay",),
    "RAP-ADMM": ("", "ICCV", "F", "Iterative", "Y (adv. training)", "Y", "151"),
    "SFP": ("sfp", "IJCAI", "F", "Iterative", "Y (soft pruning)", "Y", "300"),
    "TMI-GKP": ("", "ICLR", "GK", "One-shot", "N", "N", "1"),
    "TMI-GKP (greedy)": ("tmi_greedy",),
    "SR-GKP": ("srgkp", "-", "GK", "One-shot", "N", "N", "1"),
    "random filters": ("random_filters",)}
RAP_ADMM = "ICCV 2019", "F", "Iterative", "adversarial training", "Y", "after half of training"
"""The traits of what is two runs here, of the systems admm and prune."""
NOTES = {
    1: ("Filtered in normalised space, clipped to [0, 1]: advmoe_jax/attacks/frequency.py.",),
    3: ("The paper's text has 74.34 for SR-GKP on torchvision's baseline, its table 75.34.",),
    10: ("In the paper (a) and (b) of DHP's best (b) stand in each other's place.",
         "RAP-ADMM is trained on PGD-10 at 8/255, half of the epochs by ADMM and half pruned."),
    12: ("313.433 of the unpruned network is a typing error of the paper's: its counter gives 314.433.",),
    13: ("10081.002 of the unpruned network is a typing error of the paper's: its counter gives 10081.092.",),
    19: ("The paper's numbers of OTOv2 are those of table 18, but for the benign and (a) accuracy from scratch.",),
    20: ("In the paper FPGM and SR-GKP, which tie in one criterion on ResNet-110, do not share the rank there.",)}


def train(config, net, learning_rate, epochs):
    """Sets the training of a network."""
    config.train.length = f"{epochs} epochs"
    config.optim.backbone.learning_rate, config.optim.backbone.weight_decay = learning_rate, net.weight_decay
    if falls := [f"{epoch} epochs:0.1" for epoch in range(net.step, epochs, net.step)]:
        config.optim.backbone.schedule = f"multistep({','.join(falls)})"


@functools.cache
def _base(name, system):
    """A config of a network and a system, to be copied: naming modules takes longer than all else."""
    net = NETS[name]
    config = configs.default(data=net.data, model=net.model["name"], system=system)
    config.model.update(dict(net.model, num_experts=1, model_scale=1.0))
    config.model.mean, config.model.std = normalisation.IMAGENET if net.large else normalisation.CIFAR10
    config.system.loss = "natural"
    config.data.batch_size = net.batch_size
    config.attack.eps = "1/255"
    std = f",std={config.model.std}"
    attacks = [f"normalized(eps_sd={eps}{std})" for eps in (("0.001",) if net.large else ()) + ("0.01", "0.1")]
    attacks += [f"normalized(num_steps=3,eps_sd=8/255,step_sd=2/255,labels=true{std})"]
    if net.frequencies:
        attacks += [f"frequency(theta={theta},mean={config.model.mean})" for theta in (0.3, 0.5, 0.7)]
    config.train.criteria = config.eval.attacks = " ".join(attacks)
    config.train.select_on, config.train.select_examples = "test", 10**9
    config.train.select_attack = "fgsm(eps=0)"  # the best checkpoint is that of the best benign accuracy
    return config


def run(name, system, **fields):
    """A config of a network and a system, with fields of the system."""
    config = _base(name, system).copy_and_resolve_references()
    config.system.update(fields)
    return config


def natural(name):
    """The network that all methods prune."""
    net, config = NETS[name], run(name, "standard")
    train(config, net, 0.1, net.epochs)
    if net.imported:
        config.init_from, config.train.length = net.imported, "0 steps"
    return config


def pruned(name, method, rate, epochs=None):
    """The network pruned and trained on; `rate` counts sixteenths."""
    net, fields = NETS[name], METHODS.get(method, dict(method=method))
    config = _of_method(name, fields["method"]).copy_and_resolve_references()
    config.system.update(fields | dict(rate=f"{rate}/16", kernels=net.kernels))
    config.init_from = name
    train(config, net, 0.01, net.epochs if epochs is None else epochs)
    if epochs == 0:
        config.train.length = "0 steps"
    return config


@functools.cache
def _of_method(name, method):
    config = _base(name, "prune").copy_and_resolve_references()
    configs.override(config, f"system.method={method}")
    return config


def rap_admm(name, rate):
    """RAP-ADMM: drawn to its own copy without so many sixteenths of the filters, then pruned; both adversarially."""
    net, half = NETS[name], NETS[name].epochs // 2
    drawn = run(name, "admm", rate=f"{rate}/16", kernels=net.kernels, unit="filter", admm_every="10%", loss="madry")
    left = pruned(name, "magnitude", rate, half)
    left.system.update(dict(unit="filter", loss="madry"))
    drawn.init_from, left.init_from = name, f"{name}-admm-{rate}@last"
    train(drawn, net, 0.01, half)
    for config in (drawn, left):
        config.train.attack, config.attack.eps = ROBUST["attack"], ROBUST["eps"]
    return {f"{name}-admm-{rate}": drawn, f"{name}-rap-{rate}": left}


def add(runs, name):
    """Adds a run and those that it needs to {name: config}, unless they are there."""
    net, *more = name.split("-")
    if net not in runs:
        runs[net] = natural(net)
    if more and name not in runs:
        method, rate, *once = more
        runs |= rap_admm(net, rate) if method == "rap" else {name: pruned(net, method, rate, 0 if once else None)}


def read():
    """{number: (title, {column: criterion}, methods)} of the text file; a method is (label, run, costs, rows)."""
    found = {}
    for part in FILE.read_text().split("\n## ")[2:]:
        head, *lines = part.strip().splitlines()
        number, title, columns = map(str.strip, head.split("|"))
        attacked, methods = ATTACKED_LARGE if int(number) in LARGE else ATTACKED, []
        for line in lines:
            if line.startswith("  "):
                methods[-1][-1].append(line.split())
            else:
                label, name, costs = (*map(str.strip, line.split("|")), "", "")[:3]
                methods.append((label, name, costs.split(), []))
        found[int(number)] = title, {column: attacked.get(column, column) for column in columns.split()}, methods
    return found


def of_text(number, title, criteria, methods):
    """A table of the text file."""
    usual = dict.fromkeys(row[0] for *_, rows in methods for row in rows if row[0] != "-") or "-"  # of ours alone
    lines, has_costs = [], any(costs for _, _, costs, _ in methods)
    for label, name, costs, rows in methods:
        for best, *numbers in rows or [[best] for best in usual]:
            numbers += ["?"] * (len(criteria) - len(numbers))
            values = dict(zip((*criteria.values(), *COSTS), numbers + costs))
            if best == "-":  # the paper's only row: of what was not pruned the best epoch, else the last
                of = "benign" if "npruned" in label or number in (1, 3) else "last"
            else:
                of = criteria[best]
            lines.append(Line(label, of if name or best != "-" else "", {
                column: float(value) for column, value in values.items() if value != "?"}, {}, (name,) * bool(name)))
    return Printed(f"Table {number}: {title}", (*criteria.values(), *(COSTS if has_costs else ())), tuple(lines),
                   NOTES.get(number, ()))


def table_7():
    columns = [f"{net} {what}" for net in ("ResNet-32", "ResNet-56", "ResNet-110") for what in ("group", "total")]
    lines = [Line(label, printed=dict(zip(columns, times))) for label, times in TIMES.items()]
    return Printed("Table 7: time of the search", tuple(columns), tuple(lines), (
        "Ours: python -m advmoe_jax.bench pruning measures it; the runs of this table only prune.",))


def table_8():
    lines = []
    for label, (module, *traits) in DETAILS.items():
        ours = {}
        if module:
            about = importlib.import_module(f"advmoe_jax.pruning.{module}").ABOUT
            setup = (about.setup, f"requires data ({', '.join(about.reads)})" if about.reads else "",
                     {"soft": "soft pruning", "decay": "fading"}.get(about.when, ""))
            setup = "; ".join(filter(None, setup)) or "N"
            ours = dict(zip(TRAITS, (about.venue or "-", about.type, about.procedure, setup,
                                     "Y" if about.is_masked else "N", about.fully_pruned)))
        elif label == "RAP-ADMM":
            ours = dict(zip(TRAITS, RAP_ADMM))
        runs = (f"r56-{'l1norm_a' if module == 'l1norm' else module}-7-once",) if module else ()
        lines.append(Line(label, printed=dict(zip(TRAITS, traits)), ours=ours, runs=runs))
    return Printed("Table 8: details of the methods", (*TRAITS, *COSTS), tuple(lines), (
        "Ours are of each method's ABOUT; type: channels, filters, grouped kernels. MACs: ResNet-56 at 7/16. RAP-ADMM "
        "is two runs here, configs/paper/rap_admm.py.",))


def table_20(texts):
    lines = []
    for column, (number, ranks) in RANKS.items():
        printed = dict(zip(RANKED, ranks))
        names = {label: name for label, name, *_ in texts[number][-1]} if number else {}
        for label in (*RANKED, "CC (channels)", "random filters"):
            of = {column: printed[label]} if label in printed else {}
            lines.append(Line(label, column, of, {}, (names[label],) if names.get(label) else ()))
    return Printed("Table 20: mean ranks at 10/16", tuple(RANKS), tuple(lines), NOTES[20], is_of_ranks=True)


@functools.cache
def tables():
    """{number: Printed}, of all."""
    texts = read()
    found = {number: of_text(number, *text) for number, text in texts.items()}
    title, criteria, methods = texts[10]
    methods = [method for method in methods if method[0] not in ("DHP", "GAL", "L1Norm-A")]
    found[2] = of_text(2, f"{title} (a part of table 10)", criteria, methods)
    found |= {7: table_7(), 8: table_8(), 20: table_20(texts)}
    return dict(sorted(found.items()))


def get_recipe(table=""):
    known = tables()
    if table and table not in map(str, known):
        raise unknown_name("table in the recipe's argument", table, map(str, known))
    chosen = [known[int(table)]] if table else list(known.values())
    named = [name for of in chosen for line in of.lines for name in line.runs]
    if any(of is known[7] for of in chosen):
        named += [f"{net}-srgkp-7-once" for net in ("r32", "r56", "r110")]
    runs = {}
    for name in named:
        add(runs, name)
    return Recipe(runs, f"SR-GKP, {f'table {table}' if table else 'tables 1 to 20'}", {name: (name,) for name in runs},
                  tables=tuple(chosen))
