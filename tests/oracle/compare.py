"""Attacks of this package beside pyautoattack's and foolbox's on a small robust CNN with the same weights.

  pip install -e ".[oracle]" && python tests/oracle/compare.py --n 256 > tests/oracle/README.md

Prints Markdown. The adversarial images of both sides are checked in the torch network.
"""

import argparse
import contextlib
import functools
import itertools
import pathlib
import sys
import time
from unittest import mock

import eagerpy
import foolbox
import jax
import jax.numpy as jnp
import numpy as np
import robust_cnn
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.square import SquareAttack
from torch.nn.functional import cross_entropy

import advmoe_jax
from advmoe_jax.attacks import apgd, driver, objectives, parse
from advmoe_jax.bench import cnn
from advmoe_jax.evaluation import autoattack
from advmoe_jax.ops import balls

ATTACKS = {"apgd-ce": "apgd(loss=ce)", "apgd-t": "apgd(loss=dlr,targets=9)", "fab-t": "fab(targets=9)",
           "square": "square(num_queries={queries})"}
EVERY_OFFSET = "square, every offset"
LEAST = {"apgd-ce": 0.92, "apgd-t": 0.97, "fab-t": 0.97, "square": 0.96, EVERY_OFFSET: 0.96, "standard": 0.98}
"""Agreement per example that the reference has with itself, about, over seeds and batch sizes."""
MINIMAL = {
    "deepfool": ("linf", dict(num_steps=50), foolbox.attacks.LinfDeepFoolAttack(steps=50), 1.03),
    "deepfool, l2": ("l2", dict(num_steps=50), foolbox.attacks.L2DeepFoolAttack(steps=50), 1.03),
    "ddn": ("l2", dict(num_steps=100), foolbox.attacks.DDNAttack(init_epsilon=1.0, steps=100), 1.02),
    "cw_l2": ("l2", dict(num_steps=200, binary_search_steps=6, c=0.01), foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=6, steps=200, initial_const=0.01), 1.03)}
"""Norm, our settings, foolbox's attack, and the most that the ratio of the medians may be; the least is its inverse."""


NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}
"""Of norms, in the reference."""


def case(n, seed=7):
    """The trained weights, our network with them, and n images with labels."""
    weights = robust_cnn.trained()
    return weights, jax.tree_util.Partial(cnn.apply, weights), *robust_cnn.images(n, seed)


def in_foolbox(ours):
    return foolbox.JAXModel(jax.jit(ours), bounds=(0, 1), data_format="channels_last")


def reference(model, x, y, norm, eps, attacks, queries, seed=0):
    """x_adv (n, H, W, C) of pyautoattack."""
    attack = AutoAttack(model, norm=NAMES[norm], eps=eps, version="custom",
                        attacks=attacks, seed=seed, device="cpu")
    attack.apgd.n_restarts = 5 if norm == "l1" else 1
    attack.apgd_targeted.n_target_classes = 5 if norm == "l1" else 9
    attack.apgd_targeted.n_restarts = attack.fab.n_restarts = 1
    attack.fab.n_target_classes = 9
    attack.square.n_queries = queries
    x_adv, *_ = attack.run_standard_evaluation(
        cnn.to_torch(x), torch.from_numpy(y).long(), batch_size=128)
    return cnn.from_torch(x_adv)


@contextlib.contextmanager
def every_offset():
    """The reference's Square never puts a window at the last row or column that it fits in; while this is open it does.
    """
    def draw(self, low=0, high=1, shape=(1,)):
        return (low + (high - low + 1) * torch.rand(*shape)).long()

    with mock.patch.object(SquareAttack, "random_int", draw):
        yield


def compare(norm, n, queries):
    """Rows of a table: attack, robust accuracies in percent, agreement, checks of the images, seconds."""
    weights, ours, x, y = case(n)
    theirs, eps = cnn.in_torch(weights), robust_cnn.EPS[norm]
    apart = np.abs(np.asarray(ours(x)) - theirs(cnn.to_torch(x)).numpy()).max()
    assert apart < 1e-4, f"the networks differ by {apart}"
    rows = []
    for name in (*ATTACKS, EVERY_OFFSET, "standard"):
        names = list(ATTACKS) if name == "standard" else [name.split(",")[0]]
        start = time.perf_counter()
        a = autoattack.run(ours, x, y, eps, norm, batch_size=128,
                           suite=" ".join(ATTACKS[i] for i in names).format(queries=queries))
        middle = time.perf_counter()
        with every_offset() if name == EVERY_OFFSET else contextlib.nullcontext():
            b = reference(theirs, x, y, norm, eps, names, queries)
        end = time.perf_counter()
        in_torch, robust = (theirs(cnn.to_torch(u)).argmax(1).numpy() == y for u in (a, b))
        in_jax = np.argmax(ours(a), -1) == y
        size = {"linf": lambda d: np.abs(d).max(1), "l2": lambda d: np.sqrt((d**2).sum(1)),
                "l1": lambda d: np.abs(d).sum(1)}[norm]((a - x).reshape(n, -1))
        broken = ~in_jax & (np.argmax(ours(x), -1) == y)
        agree = np.mean(in_jax == robust)
        rows.append((f"{name}, {norm} {eps:.4g}", f"{100 * in_jax.mean():.2f}", f"{100 * robust.mean():.2f}",
                     f"{100 * agree:.2f} ({100 * LEAST[name]:.0f})", f"{(~in_torch & broken).sum()} of {broken.sum()}",
                     f"{size.max() / eps:.6f}", f"{middle - start:.1f}", f"{end - middle:.1f}"))
    return rows


def compare_distances(n):
    """Rows of a table: attack, median distances of images correct when clean, their ratio, how many were not found."""
    _, ours, x, y = case(n)
    model = in_foolbox(ours)
    correct = np.asarray(ours(x)).argmax(-1) == y
    rows = []
    for name, (norm, given, attack, most) in MINIMAL.items():
        run = parse.attack(name.split(",")[0], norm=norm, eps=0, beyond="keep", **given).run
        images = [run(ours, jax.random.key(0), x, y), np.concatenate([  # foolbox takes what is correct alone
            attack(model, *eagerpy.astensors(jnp.asarray(x[rows]), jnp.asarray(y[rows])), epsilons=None)[0].numpy()
            for rows in np.array_split(np.flatnonzero(correct), 2)])]
        images[0] = np.asarray(images[0])[correct]
        found = [np.where(np.asarray(ours(u)).argmax(-1) != y[correct],
                          np.asarray(balls.norm(jnp.asarray(u) - x[correct], norm)), np.inf) for u in images]
        medians = [np.median(distances) for distances in found]
        rows.append((name, norm, f"{medians[0]:.5f}", f"{medians[1]:.5f}",
                     f"{medians[0] / medians[1]:.4f} ({1 / most:.3f} to {most:g})",
                     *(str(np.isinf(distances).sum()) for distances in found)))
    return rows


def compare_pgd(n):
    """PGD without a random start: share of images with the same verdict, and the largest difference of the images."""
    _, ours, x, y = case(n)
    model, eps = in_foolbox(ours), robust_cnn.EPS["linf"]
    rows = []
    for steps in (10, 50):
        images = (parse.attack("pgd", eps=eps, num_steps=steps, step_size=eps / 4, start="none", keep="last").run(
            ours, jax.random.key(0), x, y), foolbox.attacks.LinfPGD(
                abs_stepsize=eps / 4, steps=steps, random_start=False)(
                    model, *eagerpy.astensors(jnp.asarray(x), jnp.asarray(y)), epsilons=eps)[1].raw)
        robust = [np.asarray(ours(u)).argmax(-1) == y for u in images]
        apart = np.abs(np.asarray(images[0]) - np.asarray(images[1])).max((1, 2, 3))
        rows.append((f"pgd-{steps}", *(f"{100 * r.mean():.2f}" for r in robust),
                     f"{100 * np.mean(robust[0] == robust[1]):.2f} (95)", f"{100 * np.mean(apart < 1e-5):.1f}"))
    return rows


def compare_iterates(n, same=22, num_steps=100):
    """APGD from the same start: images whose first `same` iterates agree to 1e-4, and whose best losses agree to 1 %;
    before them the largest difference of the clean gradients, over the largest gradient."""
    weights, ours, x, y = case(n)
    theirs, rows = cnn.in_torch(weights), []
    for norm, loss in itertools.product(("linf", "l2"), ("ce", "dlr")):
        eps = robust_cnn.EPS[norm]
        program = apgd.Program(norm, objectives.get(loss), num_steps, rho=0.75, eot=0, quirks=True, stops=False)
        inputs = driver.Inputs(ours, dict(keys=jax.random.split(jax.random.key(0), n), x=x, y=y), dict(eps=eps))
        carry = program.start(inputs)
        start = np.asarray(carry["x"])
        ahead, found = jax.jit(functools.partial(program.step, inputs)), []
        for i in range(num_steps + 1):
            found.append(np.asarray(carry["x"]))
            carry = ahead(carry, i)
        attack = APGDAttack(theirs, n_iter=num_steps, norm=NAMES[norm], eps=eps, loss=loss, eot_iter=1, device="cpu")
        attack.init_hyperparam(cnn.to_torch(x))
        criterion = attack.dlr_loss if loss == "dlr" else functools.partial(cross_entropy, reduction="none")
        images, labels = cnn.to_torch(x).requires_grad_(), torch.from_numpy(y).long()
        [grad] = torch.autograd.grad(criterion(theirs(images), labels).sum(), images)
        grad = np.nan_to_num(cnn.from_torch(grad))
        ours_grad = jax.grad(lambda u: jnp.sum(objectives.get(loss).loss(ours(u), y)))(x)
        differ = np.abs(ours_grad - grad).max() / np.abs(grad).max()
        looked = []
        hook = theirs.register_forward_pre_hook(lambda _, images: looked.append(cnn.from_torch(images[0].detach())))
        _, _, best, _ = attack.attack_single_run(cnn.to_torch(x), labels, cnn.to_torch(start))
        hook.remove()
        apart = np.abs(np.stack(found[:same]) - np.stack(looked[:same])).max((0, 2, 3, 4))
        best, ours_best = best.numpy(), np.asarray(carry["best_loss"])
        close = np.abs(ours_best - best) <= 0.01 * np.abs(best)
        asked = " (95)" if loss == "ce" else ""
        rows.append((f"apgd-{loss}, {norm}", f"{differ:.1e} (1e-05)", f"{100 * np.mean(apart < 1e-4):.1f}{asked}",
                     f"{100 * np.mean(close):.1f}{asked}", f"{ours_best.mean():.5f}", f"{best.mean():.5f}"))
    return rows


def compare_fast(n):
    """Rows of a table: AutoAttack and `fast`, which leaves an image alone once it is broken."""
    _, ours, x, y = case(n, seed=9)
    rows = []
    for norm in ("linf", "l2", "l1"):
        found = {suite: autoattack.run_report(ours, x, y, robust_cnn.EPS[norm], norm, suite=suite)
                 for suite in ("standard", "fast")}
        passes = {suite: sum(a.passes["forward"] + a.passes["backward"] for a in report.found.attempts)
                  for suite, report in found.items()}
        rows.append((norm, *(f"{100 * report.robust_accuracy:.2f}" for report in found.values()),
                     str(np.sum(found["standard"].robust != found["fast"].robust)),
                     *(f"{count / 1e6:.3f}" for count in passes.values()),
                     *(f"{sum(a.seconds for a in report.found.attempts):.0f}" for report in found.values())))
    return rows


def show(header, rows):
    """A table in Markdown, each row as soon as it is there."""
    print("\n| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--norms", nargs="+", default=["linf", "l2"])
    flags = parser.parse_args()
    print(f"""# Agreement with pyautoattack

{flags.n} examples of made-up images, 16x16x3, on the small CNN of `robust_cnn.py`, trained with PGD. Robust accuracies
in percent; agreement is per example, in parentheses what is asked for. "Confirmed": images that our side broke and that
the torch network misclassifies too. The reference's Square never puts a window at the last row or column that it fits
in, which makes it weaker on small images: a row has it at every offset, as ours is. Seconds are of one run each on
shared cores, ours with compilation.

`python tests/oracle/compare.py --n {flags.n} --queries {flags.queries} --norms {' '.join(flags.norms)}` with advmoe_jax
{advmoe_jax.__version__}, jax {jax.__version__}, torch {torch.__version__}, on CPU.
""")
    show(("attack", "ours", "pyautoattack", "agreement % (asked)", "confirmed", "largest norm / eps", "s, ours",
          "s, pyautoattack"), (row for norm in flags.norms for row in compare(norm, flags.n, flags.queries)))
    print("""
# Agreement with foolbox on the same JAX model

Medians of the smallest perturbation found, over the images that are correct when clean; in parentheses what is asked
for of the ratio. PGD without a random start, last iterate: robust accuracies, verdicts that agree, and images that are
equal to 1e-5, all in percent; a sign that rounding turns over sends an image elsewhere.""")
    show(("attack", "norm", "ours", "foolbox", "ratio (asked)", "not found, ours", "not found, foolbox"),
         compare_distances(flags.n))
    show(("attack", "ours", "foolbox", "agreement % (asked)", "equal %"), compare_pgd(flags.n))
    print("""
# The course of APGD from the same start

The largest difference of a gradient at the clean images, over the largest gradient; then shares of the images in
percent: those whose first 22 iterates are equal to 1e-4, and those whose best loss is equal to 1 %; then the means of
the best losses. In parentheses what is asked for. The DLR loss jumps where two logits change places: its courses part.
""")
    show(("attack", "gradients differ", "equal iterates %", "equal losses %", "loss, ours", "loss, pyautoattack"),
         compare_iterates(flags.n))
    print(f"""
# The suite `fast` beside `standard`

{4 * flags.n} examples; passes are of rows through the network, forward and backward, in millions.""")
    show(("norm", "standard", "fast", "verdicts that differ", "passes, standard", "passes, fast", "s, standard",
          "s, fast"), compare_fast(4 * flags.n))


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    main()
