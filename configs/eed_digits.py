"""EED on digits: twelve pruned copies of a robust ResNet-18, the team that fails least together, and what it must beat.

Jung & Song, CVPR 2025, in small: four scores begin three searches each, on a shared quarter of the training images and
another one, for 5 % of the weights; what is left is trained on the same images. Four of the twelve become a team, 20 %
of the weights, which is trained on all images. All by TRADES, as the base. Beside it stand HARP at 20 %, a team drawn
from the same pool, a team of random masks, and the single copies. Every team is attacked through each member, its
mean, and the expectation over where it stops; the exits attacks force or delay the stop. The report shows what each
copy keeps of each layer; that of a team, the robust diversity of all teams over their size.

With units=filter or units=block whole filters go, or blocks of four weights; with units=srgkp grouped kernels at once,
by four settings of SR-GKP in place of the four scores. Of these four members keep an eighth each, the team a half.

Command:  python -m advmoe_jax.main --config configs/eed_digits.py
          python -m advmoe_jax.main --config configs/eed_digits.py:hosts=none+adp+gal+dverge+soe,seeds=0+1+2
          python -m advmoe_jax.main --config configs/eed_digits.py:units=filter  (block, srgkp)
Hardware: 2 CPU cores.
Time:     56 minutes on two cores that were shared, 49 of CPU: a copy takes one and a half (search 40 s, training 50 s),
          a team six (training three, attacks three), HARP four, the base four.
Expected: the table in configs/README.md, one seed, host none; other hosts, units and seeds were not run.
"""

import digits_r18

from advmoe_jax.core import config as configs
from advmoe_jax.core import shares
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.core.recipe import Recipe

SCORES, PARTS = ("nis", "erm", "ase", "bnsf"), 4
MEMBER, TEAM = "19/20", "4/5"
UNITS = {  # what goes: (unit, share of it that a copy lacks, member_rate, team_rate)
    "weight": ("weight", MEMBER, MEMBER, TEAM), "filter": ("filter", "9/10", "7/8", "1/2"),
    "block": ("block(4,1)", "9/10", "7/8", "1/2"), "srgkp": ("grouped(8)", "15/16", "7/8", "1/2")}
"""Of all but weights a copy lacks more than member_rate: some layers stay whole, and others keep whole units."""
SRGKP = {"snaking": {}, "ordering": dict(grouping="ordering"), "four": dict(groups=4), "smooth": dict(alpha=0.1)}
"""Ways of SR-GKP, which make a pool as different scores do."""
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


def search(get_config, seed, init_from, length, rate, score, unit="weight"):
    """Scores and shares of the layers are learned for so many weights, or units of them."""
    config = run(get_config, seed, "mask_search", length, init_from, rate=rate, score=score, learn_rates=True,
                 unit=unit)
    config.optim.backbone.learning_rate = 0.1
    return config


def left(get_config, seed, init_from, length, method="given", kernels="every", **fields):
    """What a search has left, or another method leaves, trained on."""
    return run(get_config, seed, "prune", length, init_from, PGD, 256, method=method, kernels=kernels, **fields)


def on_part(config, number, draw, parts=PARTS):
    """The first part of a draw and another one; all images if there is one part."""
    if parts > 1:
        config.data.part, config.data.part_draw = f"0+{number} of {parts}", draw
    return config


def team(get_config, seed, length, init_from, host, choose="budget_fill", rate=TEAM, size=4, member_rate=MEMBER):
    """Four of a pool, trained together."""
    config = run(get_config, seed, "standard", length, ", ".join(init_from), f"{PGD} {STOPS}", 256)
    name, width = config.model.name, config.model.width
    configs.choose(config, model="team", system="eed")
    configs.override(config, f"model.member={name}")
    config.model.update(num_members=size, width=width, num_experts=1, model_scale=1.0)
    config.system.update(loss="trades", host=host, choose=choose, team_rate=rate, member_rate=member_rate)
    return config


def pool(get_config, epochs, seed, dense, end, parts=PARTS, units="weight"):
    """Copies of a dense network by every score, on every part, with the searches that they come from."""
    runs, (unit, rate, *_) = {}, UNITS[units]
    for score in SRGKP if units == "srgkp" else SCORES:
        for number in range(1, max(parts, 2)):
            name = f"{score}-{number}{end}"
            if units == "srgkp":
                copy = at_once(get_config, seed, dense, epochs["search"] + epochs["left"], rate, **SRGKP[score])
            else:
                runs[f"search-{name}"] = on_part(
                    search(get_config, seed, dense, epochs["search"], rate, score, unit), number, score, parts)
                copy = left(get_config, seed, f"search-{name}@last", epochs["left"])
            runs[name] = on_part(copy, number, score, parts)
    return runs


def at_once(get_config, seed, init_from, length, rate, **fields):
    """What SR-GKP leaves of the convolutions in blocks, trained on."""
    return left(get_config, seed, init_from, length, "srgkp", "3x3", rate=rate, **fields)


def of_seed(get_config, epochs, seed, hosts, units):
    """The runs of a seed by name, and the label of those that the report shows."""
    end, (unit, rate, member_rate, team_rate) = f"-s{seed}", UNITS[units]
    dense, masks = f"base{end}", [f"random-{number}{end}" for number in range(4)]
    runs, labels = {dense: base(get_config, seed)}, {dense: "AT(Dense), the base"}
    runs |= (copies := pool(get_config, epochs, seed, dense, end, units=units))
    names = [name for name in copies if not name.startswith("search-")]
    labels |= {name: f"one copy of {share_left(rate)}, {name.removesuffix(end)}" for name in names}
    for number, name in enumerate(masks):
        runs[name] = on_part(left(get_config, seed, dense, epochs["left"], "random_weights",
                                  "3x3" if units == "srgkp" else "every", rate=rate, unit=unit, method_seed=number),
                             1 + number % 3, f"random{number // 3}")
    if units == "srgkp":
        runs[f"single{end}"] = at_once(get_config, seed, dense, epochs["harp_search"] + epochs["harp_left"], team_rate)
        labels[f"single{end}"] = f"SR-GKP, {share_left(team_rate)}"
    else:
        runs[f"search-harp{end}"] = search(get_config, seed, dense, epochs["harp_search"], team_rate, "erm", unit)
        runs[f"harp{end}"] = left(get_config, seed, f"search-harp{end}@last", epochs["harp_left"])
        labels[f"harp{end}"] = f"HARP, {share_left(team_rate)}"

    def drawn(members, host, choose="budget_fill"):
        return team(get_config, seed, epochs["team"], (dense, *members), host, choose, team_rate,
                    member_rate=member_rate)

    for host in hosts:
        runs[f"eed-{host}{end}"] = drawn(names, host)
        labels[f"eed-{host}{end}"] = f"EED, host {host}"
    runs[f"drawn{end}"] = drawn(names, hosts[0], "random")
    runs[f"masks{end}"] = drawn(masks, hosts[0])
    return runs, labels | {f"drawn{end}": f"a team drawn from the pool, host {hosts[0]}",
                           f"masks{end}": f"a team of random masks, host {hosts[0]}"}


def share_left(rate):
    """"5 %" of "19/20"."""
    return f"{float(100 * (1 - shares.share(rate))):g} %"


def recipe(get_config, epochs, title, argument):
    """The recipe on other data; `argument` is "hosts=none+adp,seeds=0+1+2,units=filter", any of them."""
    chosen = {"hosts": ["none"], "seeds": ["0"], "units": ["weight"]}
    for text in filter(None, argument.split(",")):
        name, _, values = text.partition("=")
        chosen[one_of("what the recipe's argument sets", name.strip(), chosen)] = values.split("+")
    if not all(seed.isdigit() for seed in chosen["seeds"]):
        raise UserError(f"seeds are {'+'.join(chosen['seeds'])}: expected whole numbers, such as seeds=0+1+2")
    for host in chosen["hosts"]:
        one_of("host in the recipe's argument", host, HOSTS)
    units, runs, rows = one_of("units in the recipe's argument", "+".join(chosen["units"]), UNITS), {}, {}
    for seed in map(int, chosen["seeds"]):
        more, labels = of_seed(get_config, epochs, seed, chosen["hosts"], units)
        runs |= more
        for name, label in labels.items():
            rows.setdefault(label, []).append(name)
    return Recipe(runs, title, {label: tuple(names) for label, names in rows.items()})


def get_recipe(argument=""):
    return recipe(digits_r18.get_config, EPOCHS, "EED on digits, linf 0.1", argument)
