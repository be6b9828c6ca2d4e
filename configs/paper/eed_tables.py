"""The tables of EED (Jung & Song, CVPR 2025), the paper's numbers beside ours.

Every row is trained as the paper says where it says it: Madry, PGD-20 of step 2/255, eps 8/255, batch 512; 100 epochs
of the base, 20 of each search, 40 of each copy, 80 of the team. What it leaves open is as in configs/eed_digits.py. RA
is AutoAttack's on all test images. The paper's table 3 reports 1.86 times the speed of the dense network for the whole
team; single masked weights save no time in dense kernels, so that here members asked and multiply-accumulates are
shown.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data
          python -m advmoe_jax.main --config configs/paper/eed_tables.py:1
          tables: 1, 1-svhn, 1-vgg16, 1-vgg16-svhn, 2 and 3 (ablations), 5 (sparsity), 6 (trainings), 7 (combiners),
          8 (parts of the images), 9 (hosts), fig6 (weights of the loss); fig2 (what networks hold important), then
          python -m advmoe_jax.report.importance --out runs/fig2 --workdir runs/eed_tables_fig2/{clean,attacked,both}
Hardware: one accelerator; not run yet.
Time:     not measured.
Expected: the columns "paper"; not run yet.
"""

import pathlib
import sys

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import one_of
from advmoe_jax.core.recipe import Recipe

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import eed_digits as eed  # noqa: E402, the recipe beside, whose runs these are

EPOCHS = {"search": 20, "left": 40, "team": 80, "harp_search": 20, "harp_left": 100}
ATTACK = "pgd(num_steps=20,step_size=2/255,keep=last)"
EVERY = 10**6  # images that scores are made of: all training images
ONE = {  # table: {row: (clean, AutoAttack)}, 80 % of the weights gone
    "1": {"AT": (87.05, 48.02), "R-ADMM": (81.25, 43.92), "HYDRA": (77.36, 43.74), "RST": (61.02, 18.38),
          "MAD": (74.18, 41.27), "Flying Bird": (81.07, 44.41), "HARP": (83.84, 45.36), "TwinRep": (77.26, 43.52),
          "EED": (86.13, 48.13)},
    "1-svhn": {"AT": (93.37, 50.14), "R-ADMM": (74.81, 37.40), "HYDRA": (91.06, 47.62), "RST": (82.39, 36.35),
               "MAD": (92.84, 39.87), "Flying Bird": (90.21, 42.01), "HARP": (92.60, 45.89),
               "TwinRep": (92.96, 44.73), "EED": (93.15, 50.18)},
    "1-vgg16": {"AT": (82.70, 48.52), "R-ADMM": (76.51, 40.41), "HYDRA": (78.83, 44.85), "RST": (77.29, 30.15),
                "MAD": (73.65, 40.88), "Flying Bird": (77.36, 45.73), "HARP": (80.92, 44.02),
                "TwinRep": (76.04, 43.26), "EED": (81.39, 47.49)},
    "1-vgg16-svhn": {"AT": (93.06, 52.28), "R-ADMM": (65.40, 44.64), "HYDRA": (90.82, 46.30), "RST": (82.39, 45.52),
                     "MAD": (89.94, 40.31), "Flying Bird": (90.11, 49.18), "HARP": (93.22, 44.73),
                     "TwinRep": (92.60, 49.06), "EED": (93.14, 51.49)}}
TEAMS = {  # table: {row: (clean, AutoAttack, fields that differ)}
    "2": {"EED": (86.13, 48.13, {}), "omega 0": (74.16, 36.37, {"system.omega": 0}),
          "gamma 0": (76.33, 31.59, {"system.gamma": 0}),
          "both 0": (73.95, 28.94, {"system.omega": 0, "system.gamma": 0})},
    "3": {"80 %": (86.13, 48.13, {}), "80 %, all asked": (86.20, 48.11, {"model.gate": "never"}),
          "50 %": (86.15, 52.35, {"rate": "1/2"}),
          "50 %, all asked": (85.93, 50.76, {"rate": "1/2", "model.gate": "never"})},
    "5": {"50 %": (88.07, 52.35, {"rate": "1/2"}), "70 %": (86.45, 49.16, {"rate": "7/10"}),
          "80 %": (86.13, 48.13, {}), "90 %": (83.26, 46.85, {"rate": "9/10"})},
    "6": {"Madry": (86.13, 48.13, {}), "TRADES": (83.84, 51.53, {"system.loss": "trades"}),
          "MART": (84.29, 48.53, {"system.loss": "mart"})},
    "7": {"mean": (86.13, 48.13, {}), "max": (85.69, 48.52, {"model.combiner": "max"})},
    "8": {f"d = {d}": (None, ra, {"parts": d}) for d, ra in ((1, 45.74), (3, 46.59), (4, 48.13), (5, 47.92),
                                                             (6, 46.72))},
    "9": {"ADP": (84.90, 46.87, {"system.host": "adp"}), "GAL": (85.30, 47.50, {"system.host": "gal"}),
          "DVERGE": (86.13, 48.13, {}), "SoE": (85.85, 47.90, {"system.host": "soe"})}}
SWEPT = {"lambda1": ("system.lambda_weights", (0.5, 0.6, 0.7, 0.8)),
         "lambda2": ("system.lambda_activity", (0.2, 0.25, 0.3, 0.35)),
         "omega": ("system.omega", (5.0, 10.0, 15.0)), "gamma": ("system.gamma", (2.0, 4.0, 6.0))}
TEAMS["fig6"] = {"as in table 1": (86.13, 48.13, {})} | {  # a number that differs from that row's, the others as there
    f"{name} {value:g}": (None, None, {field: value}) for name, (field, values) in SWEPT.items() for value in values
    if (name, value) not in (("lambda1", 0.7), ("lambda2", 0.25), ("omega", 10.0), ("gamma", 4.0))}
PEAKS = ("The paper's figure 6 draws AutoAttack over each of these numbers. Only its peaks are told, lambda1 0.6, "
         "lambda2 0.3, omega 10 and gamma 4, while section 5.1 trains by lambda1 0.7 and lambda2 0.25.")
LEARNT_FROM = {"clean": "natural", "attacked": "madry", "both": "trades"}  # figure 2's networks, by system.loss
SIZES = {"1/2": 10, "7/10": 6, "4/5": 4, "9/10": 2}


def get_config(method="at_dense", data="cifar10", model="resnet"):
    """The base, by Madry."""
    config = configs.default(data=data, model=model, system="standard")
    config.model.update(width=64, num_experts=1, model_scale=1.0)
    config.system.loss, config.data.batch_size, config.train.length = "madry", 512, "100 epochs"
    config.data.flip = data != "svhn"
    config.train.attack = ATTACK
    return config


def finished(runs, shown):
    """As the paper trains and attacks: Madry unless a row says another, and AutoAttack on what is shown."""
    for name, config in runs.items():
        if config.system.name not in ("eed", "standard"):
            config.system.loss = "madry"
        config.train.attack = ATTACK
        if name in shown:
            config.eval.suite, config.eval.n, config.eval.black_box = "standard", 0, True
    return runs


def table_one(data, model):
    def get(method):
        return get_config(method, data, model)

    rate = eed.TEAM
    copies = eed.pool(get, EPOCHS, 0, "base", "")
    drawn = eed.run(get, 0, "admm", 100, "base", rate=rate, admm_every="20 epochs")
    scratch = eed.run(get, 0, "rst", 160, rate=rate)
    bird = eed.run(get, 0, "flying_bird", 160, rate=rate, change_every="900 steps")
    twins = eed.run(get, 0, "twin_rep", 100, rate=rate)
    hydra = eed.search(get, 0, "base", 20, rate, "erm")
    hydra.system.learn_rates = False
    runs = {"base": eed.base(get, 0), **copies,
            "eed": eed.team(get, 0, EPOCHS["team"], ("base", *(n for n in copies if not n.startswith("search-"))),
                            "dverge"),
            "search-harp": eed.search(get, 0, "base", EPOCHS["harp_search"], rate, "erm"),
            "harp": eed.left(get, 0, "search-harp@last", EPOCHS["harp_left"]),
            "search-hydra": hydra, "hydra": eed.left(get, 0, "search-hydra@last", 100),
            "admm": drawn, "radmm": eed.left(get, 0, "admm@last", 100, "magnitude", rate=rate),
            "mad": eed.left(get, 0, "base", 60, "mad", rate=rate, images=EVERY), "rst": scratch, "bird": bird,
            "twins": twins}
    return runs, {"AT": ("base",), "R-ADMM": ("radmm",), "HYDRA": ("hydra",), "RST": ("rst",), "MAD": ("mad",),
                  "Flying Bird": ("bird",), "HARP": ("harp",), "TwinRep": ("twins",), "EED": ("eed",)}


def teams(rows):
    """One pool for all rows, or one for each way to cut the images."""
    runs, shown = {"base": eed.base(get_config, 0)}, {}
    for number, (row, (_, _, fields)) in enumerate(rows.items()):
        fields = dict(fields)
        rate, parts = fields.pop("rate", eed.TEAM), fields.pop("parts", eed.PARTS)
        copies = eed.pool(get_config, EPOCHS, 0, "base", f"-d{parts}", parts)
        runs |= copies
        pool = ("base", *(name for name in copies if not name.startswith("search-")))
        made = eed.team(get_config, 0, EPOCHS["team"], pool, "dverge", rate=rate, size=SIZES[rate])
        made.system.loss = "madry"
        for name, value in fields.items():
            configs.override(made, f"{name}={value}")
        runs[f"eed-{number}"], shown[row] = made, (f"eed-{number}",)
    return runs, shown


def figure_two():
    """A plain network that learns from clean images, from attacked ones, or from both, each from the same start."""
    runs = {}
    for name, loss in LEARNT_FROM.items():
        runs[name] = config = get_config(model="vgg")
        config.model.update(depth=11, width=16)
        config.system.loss, config.train.length = loss, "30 epochs"
        config.train.eval_every = "0 steps"  # a natural network is no better early on, where its RA is not yet 0
        if loss == "natural":
            config.train.attack = configs.default().train.attack  # it has no effect there
        config.eval.attacks, config.eval.n, config.eval.black_box = eed.PGD, 1000, False
    return runs


def get_recipe(table="1"):
    one_of("table in the recipe's argument", table, (*ONE, *TEAMS, "fig2"))
    if table == "fig2":
        return Recipe(figure_two(), "EED, figure 2: what networks hold important")
    if table in ONE:
        runs, rows = table_one("svhn" if "svhn" in table else "cifar10", "vgg" if "vgg16" in table else "resnet")
        paper = {row: dict(SA=sa, RA=ra) for row, (sa, ra) in ONE[table].items()}
    else:
        runs, rows = teams(TEAMS[table])
        paper = {row: {k: v for k, v in (("SA", sa), ("RA", ra)) if v is not None}
                 for row, (sa, ra, _) in TEAMS[table].items()}
    for name in rows.get("EED", ()):
        runs[name].system.loss = "madry"
    runs = finished(runs, {name for names in rows.values() for name in names})
    if table == "fig6":
        return Recipe(runs, "EED, figure 6: weights of the loss", rows, paper, (PEAKS,))
    return Recipe(runs, f"EED, table {table}", rows, paper)
