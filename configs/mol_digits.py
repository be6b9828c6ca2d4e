"""MoL on digits: seven pruned experts, one for each perturbation, behind a trained gate, and what it is compared to.

Cheng et al., WACVW 2022, with the network of configs/digits_r18.py at depth 10. Each expert is trained on its own
perturbation alone, drawn by ADMM to a copy of which 3/4 of the blocks of 4 filters are gone, and trained on without
them. A gate with the experts' last layers is then trained (a) on clean and adversarial images, with 4 experts, and (b)
on all perturbations, with 7. MAX, AVG, MSD, E-AT and RAMP train one dense network of the same width for as many network
passes as MoL (a) or (b) took with its experts, their compression and the gate; SA trains the last layers of MoL's
experts without a gate. Trivial versions: the same weight for each expert, a gate that was never trained, the best
single expert (a column), and an oracle that knows the attack.

Strengths: linf 0.1 as in configs/digits_r18.py. On CIFAR-10 the paper's l2 1.0 and l1 16 are 0.57 and 0.166 of the size
of a corner of its linf ball (8/255); here l2 0.46 and l1 1.06 are the same shares of that of linf 0.1. Fog, snow and
rotation are as in the paper.

Command:  python -m advmoe_jax.main --config configs/mol_digits.py
          python -m advmoe_jax.main --config configs/mol_digits.py:3seeds
Hardware: 2 CPU cores.
Time:     an hour and a half and more on two cores that were shared, most of it compiling; 30 of the 36 runs in 55
          minutes.
Expected: the table in configs/README.md, one seed; MAX (b), AVG (b), SA (b) and the untrained gate (b) were not run.
"""

import digits_r18

from advmoe_jax.core import config as configs
from advmoe_jax.core.recipe import Recipe

EPS = {"linf": "0.1", "l2": "0.46", "l1": "1.06"}
STEPS = 4  # of PGD in training
EPOCHS = {"expert": 10, "admm": 5, "retrain": 5, "gate": 6}
N, QUERIES = 128, 200  # test images, and what RayS may ask
MODEL = ("model.width=16", "model.depth=10", "model.num_experts=1", "model.model_scale=1")
CLEAN = "rotation(limit=0)"  # the images as they are
NATURAL = ("fog", "snow", "rotation")
ADVERSARIAL = ("linf", "l2", "l1")
SETS = {"a": ("clean", *ADVERSARIAL), "b": ("clean", *ADVERSARIAL, *NATURAL)}


def pgd(norm, steps=STEPS, **more):
    """PGD at the recipe's strength, as text."""
    settings = {"norm": norm, "eps": EPS[norm], "num_steps": steps, "l1_share": 0.05} | more
    return f"pgd({','.join(f'{name}={value}' for name, value in settings.items())})"


TRAINING = {"clean": CLEAN, **{norm: pgd(norm, keep="last", driver="device") for norm in ADVERSARIAL},
            **{name: name for name in NATURAL}}
"""The attack that stands for each perturbation in training."""
PASSES = {"clean": 1, **dict.fromkeys(ADVERSARIAL, STEPS + 1), **dict.fromkeys(NATURAL, 1)}
"""Forward and backward passes of a network in a training step."""


def rows():
    """The fifteen attacks of the paper's table A5 at digits' strengths, and fog that clips; RayS asks less."""
    of = {norm: f"norm={norm},eps={eps}" for norm, eps in EPS.items()}
    deepfool, rays = "num_steps=9,beyond=project", f"num_queries={QUERIES},early_stop=true"
    return " ".join((
        pgd("l1", 20), f"gaussian_noise({of['l1']})", f"salt_pepper({of['l1']})",
        pgd("l2", 20), f"fgsm({of['l2']})", f"ddn({of['l2']},start_eps={EPS['l2']})",
        f"deepfool({of['l2']},{deepfool})", f"rays({of['l2']},{rays})",
        pgd("linf", 20), f"fgsm({of['linf']})", f"deepfool({of['linf']},{deepfool})", f"rays({of['linf']},{rays})",
        *NATURAL, "fog(overflow=clip)"))


def knowing():
    """Attacks that know of the gate: each expert is made to fail and to lead; the gate is misled first."""
    return " ".join(f"gated(mode={mode},norm={norm},eps={eps},num_steps=10)" for mode in ("lead", "misdirect")
                    for norm, eps in EPS.items())


def base(system, epochs, seed, init_from="", **fields):
    """A run; fields are set by their names, dots as double underscores."""
    config = digits_r18.get_config("at_dense")
    configs.choose(config, system=system)
    config.seed, config.init_from = seed, init_from
    configs.override_all(config, [*MODEL])
    config.train.length = f"{epochs} epochs"
    config.train.eval_every = config.train.save_every = "0 steps"  # the last checkpoint is the one that counts
    config.train.select_attack = CLEAN
    config.data.jitter, config.data.turn = 0.25, 2.0
    config.optim.backbone.schedule = "piecewise(0:0,40%:1,80%:0.05,100%:0)"
    config.eval.n, config.eval.batch_size, config.eval.suite = N, N, f"mol-digits: {rows()}"
    for name, value in fields.items():
        configs.override(config, f"{name.replace('__', '.')}={value}")
    return config


def perturbed(system, epochs, kind, seed, init_from="", **fields):
    """A run on the images of one perturbation alone."""
    trained = {"system__loss": "natural"} if kind == "clean" else {
        "system__loss": "madry", "train__attack": TRAINING[kind]}
    return base(system, epochs, seed, init_from, **trained, **fields)


def compressed(kind, seed):
    """{name: run} of an expert, drawn to its copy and trained without what that lacks."""
    blocks = {"system__rate": "3/4", "system__unit": "block(4,1)"}
    soft = {"system__label_smoothing": 0.1, "system__mixup": 0.3}
    drawn = perturbed("admm", EPOCHS["admm"], kind, seed, f"{kind}-s{seed}", **blocks, **soft, system__rho=0.01,
                      system__kernels="every", train__length=f"{EPOCHS['admm']} epochs", system__admm_every="10%")
    drawn.optim.backbone.learning_rate, drawn.optim.backbone.schedule = 0.05, "constant"
    drawn.eval.suite, drawn.eval.attacks, drawn.eval.black_box = "", CLEAN, False
    left = perturbed("prune", EPOCHS["retrain"], kind, seed, f"{kind}-admm-s{seed}", system__method="magnitude",
                     system__kernels="every", **blocks, **soft)
    left.optim.backbone.learning_rate, left.optim.backbone.warmup = 0.05, "5%"
    left.optim.backbone.schedule = "multistep(40%:0.1,75%:0.1)"
    return {f"{kind}-s{seed}": perturbed("standard", EPOCHS["expert"], kind, seed), f"{kind}-admm-s{seed}": drawn,
            f"{kind}-4x-s{seed}": left}


def mixture(which, seed, epochs=EPOCHS["gate"], **fields):
    """A gate before the pruned experts of a set, trained on its perturbations in turn."""
    kinds = SETS[which]
    config = base("mol", epochs, seed, ", ".join(f"{kind}-4x-s{seed}" for kind in kinds))
    configs.choose(config, model="mixture")
    configs.override_all(config, [*MODEL, f"model.num_members={len(kinds)}"])
    config.train.attack = " ".join(TRAINING[kind] for kind in kinds)
    if "model__gate" not in fields:
        config.eval.suite = f"mol-digits: {rows()} {knowing()}"
    for name, value in fields.items():
        configs.override(config, f"{name.replace('__', '.')}={value}")
    return config


def cost(which):
    """Network passes, in epochs, that MoL takes on a set: experts, compression and gate."""
    kinds = SETS[which]
    alone = EPOCHS["expert"] + EPOCHS["admm"] + EPOCHS["retrain"]
    gate = (len(kinds) + 1) * sum(map(PASSES.get, kinds)) / len(kinds)
    return alone * sum(map(PASSES.get, kinds)) + EPOCHS["gate"] * gate


def single(which, name, seed):
    """A baseline, one dense network, for as many network passes as MoL on that set."""
    attacks = [TRAINING[kind] for kind in SETS[which] if kind != "clean"]
    both = [TRAINING["linf"], TRAINING["l1"]]
    eps = ",".join(f"eps_{norm}={value}" for norm, value in EPS.items())
    msd = f"msd({eps},num_steps={STEPS},step_linf=2.5 eps/steps,step_l2=2.5 eps/steps,step_l1=0.1,driver=device)"
    made = sum(PASSES[kind] - 1 for kind in SETS[which])
    count = len(attacks)
    passes, system, attack, several = {
        "MAX": (made + count / 3 + 1, "standard", attacks, "largest"),  # a look at each, forward alone
        "AVG": (made + count, "standard", attacks, "mean"),
        "MSD": (2 * STEPS + 1, "standard", [msd], "turn"),  # three more looks a step
        "E-AT": (STEPS + 1, "eat", both, "turn"),
        "RAMP": (2 * STEPS + 3, "ramp", both, "mean")}[name]
    config = base(system, round(cost(which) / passes), seed, system__loss="madry")
    config.train.attack, config.train.several = " ".join(attack), several
    return config


def get_recipe(seeds="1seed"):
    runs, rows_of, oracles = {}, {}, {"oracle gate (a)": (), "oracle gate (b)": ()}
    for seed in range(3 if seeds == "3seeds" else 1):
        def add(label, name, config, seed=seed):
            runs[f"{name}-s{seed}"] = config
            rows_of.setdefault(label, []).append(f"{name}-s{seed}")

        for which, kinds in SETS.items():
            for kind in kinds:
                if f"{kind}-s{seed}" not in runs:
                    runs |= compressed(kind, seed)
                    rows_of.setdefault(f"M {kind}", []).append(f"{kind}-s{seed}")
                    rows_of.setdefault(f"M {kind} 1/4", []).append(f"{kind}-4x-s{seed}")
            add(f"MoL ({which}) 1/4", f"mol-{which}", mixture(which, seed))
            even = {"model__gate": "uniform", "model__combine": "log_probabilities"}
            add(f"same weights ({which})", f"uniform-{which}", mixture(which, seed, 0, **even))
            add(f"untrained gate ({which})", f"untrained-{which}", mixture(which, seed, 0))
            add(f"SA ({which})", f"sa-{which}", mixture(which, seed, **even))
            oracles[f"oracle gate ({which})"] += tuple(f"{kind}-4x-s{seed}" for kind in kinds)
            for name in ("MAX", "AVG", *(("MSD", "E-AT", "RAMP") if which == "a" else ())):
                add(f"{name} ({which})", f"{name.lower()}-{which}", single(which, name, seed))
    return Recipe(runs, "MoL on digits", {label: tuple(names) for label, names in rows_of.items()}, oracles=oracles)
