"""AutoAttack of this package and pyautoattack, example by example, on a small robust CNN with the same weights.

  pip install -e ".[oracle]" && python tests/oracle/compare.py --n 256 > tests/oracle/README.md

Prints Markdown. The adversarial images of both sides are checked in the torch network.
"""

import argparse
import pathlib
import sys
import time

import jax
import numpy as np
import robust_cnn
import torch
from pyautoattack import AutoAttack

import advmoe_jax
from advmoe_jax.attacks import autoattack
from advmoe_jax.bench import cnn

ATTACKS = {"apgd-ce": "apgd(loss=ce)", "apgd-t": "apgd(loss=dlr,targets=9)", "fab-t": "fab(targets=9)",
           "square": "square(num_queries={queries})"}
LEAST = {"apgd-ce": 0.92, "apgd-t": 0.97, "fab-t": 0.97, "square": 0.96, "standard": 0.98}
"""Agreement per example that the reference has with itself, about, over seeds and batch sizes."""


def reference(model, x, y, norm, eps, attacks, queries, seed=0):
    """x_adv (n, H, W, C) of pyautoattack."""
    attack = AutoAttack(model, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], eps=eps, version="custom",
                        attacks=attacks, seed=seed, device="cpu")
    attack.apgd.n_restarts = 5 if norm == "l1" else 1
    attack.apgd_targeted.n_target_classes = 5 if norm == "l1" else 9
    attack.apgd_targeted.n_restarts = attack.fab.n_restarts = 1
    attack.fab.n_target_classes = 9
    attack.square.n_queries = queries
    x_adv, *_ = attack.run_standard_evaluation(
        cnn.to_torch(x), torch.from_numpy(y).long(), batch_size=128)
    return cnn.from_torch(x_adv)


def compare(norm, n, queries):
    """Rows of a table: attack, robust accuracies in percent, agreement, checks of the images, seconds."""
    weights = robust_cnn.trained()
    x, y = robust_cnn.images(n, 7)
    ours, theirs, eps = jax.tree_util.Partial(cnn.apply, weights), cnn.in_torch(weights), robust_cnn.EPS[norm]
    apart = np.abs(np.asarray(ours(x)) - theirs(cnn.to_torch(x)).numpy()).max()
    assert apart < 1e-4, f"the networks differ by {apart}"
    rows = []
    for name in (*ATTACKS, "standard"):
        names = list(ATTACKS) if name == "standard" else [name]
        start = time.perf_counter()
        a = autoattack.run(ours, x, y, eps, norm, batch_size=128,
                           suite=" ".join(ATTACKS[i] for i in names).format(queries=queries))
        middle = time.perf_counter()
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--norms", nargs="+", default=["linf", "l2"])
    flags = parser.parse_args()
    print(f"""# Agreement with pyautoattack

{flags.n} examples of made-up images, 16x16x3, on the small CNN of `robust_cnn.py`, trained with PGD. Robust accuracies
in percent; agreement is per example, in parentheses what is asked for. "Confirmed": images that our side broke and that
the torch network misclassifies too. Seconds are of one run each, ours with compilation.

`python tests/oracle/compare.py --n {flags.n} --queries {flags.queries} --norms {' '.join(flags.norms)}` with advmoe_jax
{advmoe_jax.__version__}, jax {jax.__version__}, torch {torch.__version__}, on CPU.
""")
    header = ("attack", "ours", "pyautoattack", "agreement % (asked)", "confirmed", "largest norm / eps", "s, ours",
              "s, pyautoattack")
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for norm in flags.norms:
        for row in compare(norm, flags.n, flags.queries):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    main()
