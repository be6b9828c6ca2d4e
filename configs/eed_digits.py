"""EED on digits: twelve pruned copies of a robust ResNet-18, the team that fails least together, and what it must beat.

Jung & Song, CVPR 2025, in small: four scores begin three searches each, on a shared quarter of the training images and
another one, for 5 % of the weights; what is left is trained on the same images. Four of the twelve become a team, 20 %
of the weights, which is trained on all images. All by TRADES, as the base. Beside it stand HARP at 20 %, a team drawn
from the same pool, a team of random masks, and the single copies. Every team is attacked through each member, its
mean, and the expectation over where it stops; the exits attacks force or delay the stop. The report shows what each
copy keeps of each layer; that of a team, the robust diversity of all teams over their size.

Command:  python -m advmoe_jax.main --config configs/eed_digits.py
          python -m advmoe_jax.main --config configs/eed_digits.py:hosts=none+adp+gal+dverge+soe,seeds=0+1+2
Hardware: 2 CPU cores.
Time:     not measured yet.
Expected: not run yet.
"""

import digits_r18

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.core.recipe import Recipe

SCORES, PARTS = ("nis", "erm", "ase", "bnsf"), 4
MEMBER, TEAM = "19/20", "4/5"
EPOCHS = {"search": 8, "left": 24, "team": 12, "harp_search": 16, "harp_left": 60}
HOSTS = ("none", "adp", "gal", "dverge", "soe")
PGD, STOPS = "pgd(num_steps=20)", "exits(mode=force,num_steps=20) exits(mode=delay,num_steps=20)"


def run(get_config, seed, system, length, init_from="", attacks="fgsm", n=16, **fields):
    """A run of the recipe: a system on the narrow dense ResNet-18, evaluated where it ends."""
    config = get_config("at_dense")
    configs.choose(config, system=system)
    for name, value in fields.items():
        configs.override(config, f"system.{name}={value}")
    config.system.loss, config.seed, config.init_from = "trades", seed, init_from
    config.train.length = f"{length} epochs"
    config.train.eval_every = config.train.save_every = "0 steps"
    config.optim.backbone.learning_rate = 0.05
    config.eval.attacks, config.eval.n, config.eval.black_box = attacks, n, False
    return config


def base(get_config, seed):
    """The dense network that all others are copies of."""
    config = get_config("at_dense")
    config.seed = seed
    config.eval.attacks, config.eval.n, config.eval.black_box = PGD, 256, False
    return config


def search(get_config, seed, init_from, length, rate, score):
    """Scores and shares of the layers are learned for so many weights."""
    config = run(get_config, seed, "mask_search", length, init_from, rate=rate, score=score, learn_rates=True)
    config.optim.backbone.learning_rate = 0.1
    return config


def left(get_config, seed, init_from, length, method="given", **fields):
    """What a search has left, trained on."""
    return run(get_config, seed, "prune", length, init_from, PGD, 256, method=method, kernels="every", **fields)


def on_part(config, number, draw, parts=PARTS):
    """The first part of a draw and another one; all images if there is one part."""
    if parts > 1:
        config.data.part, config.data.part_draw = f"0+{number} of {parts}", draw
    return config


def team(get_config, seed, length, init_from, host, choose="budget_fill", rate=TEAM, size=4):
    """Four of a pool, trained together."""
    config = run(get_config, seed, "standard", length, ", ".join(init_from), f"{PGD} {STOPS}", 256)
    name, width = config.model.name, config.model.width
    configs.choose(config, model="team", system="eed")
    configs.override(config, f"model.member={name}")
    config.model.update(num_members=size, width=width, num_experts=1, model_scale=1.0)
    config.system.update(loss="trades", host=host, choose=choose, team_rate=rate, member_rate=MEMBER)
    return config


def pool(get_config, epochs, seed, dense, end, parts=PARTS):
    """Copies of a dense network by every score, on every part, with the searches that they come from."""
    runs = {}
    for score in SCORES:
        for number in range(1, max(parts, 2)):
            name = f"{score}-{number}{end}"
            runs[f"search-{name}"] = on_part(
                search(get_config, seed, dense, epochs["search"], MEMBER, score), number, score, parts)
            runs[name] = on_part(left(get_config, seed, f"search-{name}@last", epochs["left"]), number, score, parts)
    return runs


def of_seed(get_config, epochs, seed, hosts):
    """The runs of a seed by name, and the label of those that the report shows."""
    end = f"-s{seed}"
    dense, masks = f"base{end}", [f"random-{number}{end}" for number in range(4)]
    runs, labels = {dense: base(get_config, seed)}, {dense: "AT(Dense), the base"}
    runs |= (copies := pool(get_config, epochs, seed, dense, end))
    names = [name for name in copies if not name.startswith("search-")]
    labels |= {name: f"one copy of 5 %, {name.removesuffix(end)}" for name in names}
    for number, name in enumerate(masks):
        runs[name] = on_part(left(get_config, seed, dense, epochs["left"], "random_weights", rate=MEMBER,
                                  method_seed=number), 1 + number % 3, f"random{number // 3}")
    runs[f"search-harp{end}"] = search(get_config, seed, dense, epochs["harp_search"], TEAM, "erm")
    runs[f"harp{end}"] = left(get_config, seed, f"search-harp{end}@last", epochs["harp_left"])
    labels[f"harp{end}"] = "HARP, 20 %"
    for host in hosts:
        runs[f"eed-{host}{end}"] = team(get_config, seed, epochs["team"], (dense, *names), host)
        labels[f"eed-{host}{end}"] = f"EED, host {host}"
    runs[f"drawn{end}"] = team(get_config, seed, epochs["team"], (dense, *names), hosts[0], "random")
    runs[f"masks{end}"] = team(get_config, seed, epochs["team"], (dense, *masks), hosts[0])
    return runs, labels | {f"drawn{end}": f"a team drawn from the pool, host {hosts[0]}",
                           f"masks{end}": f"a team of random masks, host {hosts[0]}"}


def recipe(get_config, epochs, title, argument):
    """The recipe on other data; `argument` is "hosts=none+adp,seeds=0+1+2", either or both."""
    chosen = {"hosts": ["none"], "seeds": ["0"]}
    for text in filter(None, argument.split(",")):
        name, _, values = text.partition("=")
        chosen[one_of("what the recipe's argument sets", name.strip(), chosen)] = values.split("+")
    if not all(seed.isdigit() for seed in chosen["seeds"]):
        raise UserError(f"seeds are {'+'.join(chosen['seeds'])}: expected whole numbers, such as seeds=0+1+2")
    for host in chosen["hosts"]:
        one_of("host in the recipe's argument", host, HOSTS)
    runs, rows = {}, {}
    for seed in map(int, chosen["seeds"]):
        more, labels = of_seed(get_config, epochs, seed, chosen["hosts"])
        runs |= more
        for name, label in labels.items():
            rows.setdefault(label, []).append(name)
    return Recipe(runs, title, {label: tuple(names) for label, names in rows.items()})


def get_recipe(argument=""):
    return recipe(digits_r18.get_config, EPOCHS, "EED on digits, linf 0.1", argument)
