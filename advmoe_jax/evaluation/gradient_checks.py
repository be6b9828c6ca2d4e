"""Checks that the gradient of a model leads attacks: it is there, it has the sign of finite differences, and PGD finds
what single steps, noise, other starts and larger budgets find.

Sources: as `evaluation.flags`. B images, K classes; `logits` (B, K) are those of x, `correct` (B,) bool.
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import pgd
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng
from advmoe_jax.evaluation.flag import Flag
from advmoe_jax.ops import balls, losses

_DIRECTIONS = 32
_DIRECTIONS_ON_THE_WAY = 8
_STEPS = (1e-2, 4e-2, 0.16, 0.64)  # l2 lengths of finite differences: coarse logits need longer ones
_MOST_A_PIXEL = 0.03  # of such a step, root mean square
_NEAR = (1e-3, 4e-3, 1.6e-2)  # linf sizes of steps that should change a gradient little
_BUDGETS = (0.003, 0.01, 0.03, 0.1, 0.3)
_DRAWS = 10
_RESTARTS = 3
_CLIMB = 20  # steps
_LEAST_AGREEMENT = 0.75  # of signs
_MOST_MISSED = 0.05  # of the images, by an attack that should have found them

call = jax.jit(lambda logits_fn, x: logits_fn(x))
_noisy = jax.jit(lambda keys, x, eps: balls.random_start(keys, x, eps, "linf"))
_margin = jax.jit(lambda logits, y: losses.margin(losses.unmasked(logits), y))


@jax.jit
def _pull(logits_fn, x, cotangent):
    return jax.vjp(logits_fn, x)[1](cotangent)[0]


@functools.partial(jax.jit, static_argnames="loss")
def _cotangent(loss, logits, y):
    return jax.grad(lambda z: jnp.sum(loss(z, y)))(logits)


def _slope(loss, logits_fn, x, y, logits):
    """The gradient of a loss (B, H, W, C). All checks share its two programs, which are what compiling them costs."""
    return _pull(logits_fn, x, _cotangent(loss, logits, y))


def _correct(logits_fn, x, y):
    return meshes.fetch(call(logits_fn, x)).argmax(-1) == meshes.fetch(y)


def _attacked(logits_fn, x, y, key, eps, **settings):
    """Images after PGD in linf, and whether they are classified correctly (B,)."""
    attack = pgd.make(pgd.Config(norm="linf", eps=eps, loss="margin", early_stop=True, **settings))
    u = attack(logits_fn, key, x, y)
    return u, _correct(logits_fn, u, y)


def dead_gradient(logits_fn, x, y, logits, correct) -> Flag | None:
    """The gradient of a loss is neither zero nor NaN."""
    slopes = [meshes.fetch(_slope(loss, logits_fn, x, y, logits)) for loss in (losses.cross_entropy, losses.dlr)]
    for name, what, dead in (
            ("nan_gradient", "is NaN or infinite", [~np.all(np.isfinite(slope), (1, 2, 3)) for slope in slopes]),
            ("zero_gradient", "is exactly zero", [np.all(slope == 0, (1, 2, 3)) for slope in slopes])):
        shares = np.stack(dead)[:, correct].mean(-1) if correct.any() else np.zeros(2)
        if shares.max() > 0.01:
            loss = ("cross-entropy", "DLR")[int(shares.argmax())]
            return Flag(name, f"the gradient of the {loss} {what} for {shares.max():.0%} of the correct images: "
                              "expected at most 1 %, gradient attacks cannot move")
    return None


@jax.jit
def _direction(key, x, step):
    """A random way of l2 length `step` for each image."""
    return step * balls.normalized(jax.random.normal(key, x.shape, x.dtype))


@jax.jit
def _both_ways(x, way):
    return x + way, x - way


@jax.jit
def _cosine(a, b):
    """(B,)."""
    return jnp.sum(balls.normalized(a) * balls.normalized(b), (1, 2, 3))


def _agreement(logits_fn, x, y, key, count, of_images):
    """The share of `count` random directions in which the gradient has the sign of finite differences, where there are
    any, as `of_images` sums it up; of the first step that is long enough for it, else the largest."""
    most = 0.0
    for step in (step for step in _STEPS if step == _STEPS[0] or step <= _MOST_A_PIXEL * x[0].size ** 0.5):
        inner, agree = jnp.clip(x, step, 1 - step), []
        grad = _slope(losses.margin, logits_fn, inner, y, call(logits_fn, inner))
        for k in jax.random.split(rng.stream(key, "directions"), count):
            way = _direction(k, x, step)
            ahead, behind = (meshes.fetch(_margin(call(logits_fn, u), y)) for u in _both_ways(inner, way))
            agree.append(np.sign(ahead - behind) * np.sign(meshes.fetch(_cosine(grad, way))))
        tied = np.equal(agree, 0)
        most = max(most, float(of_images(np.sum(np.greater(agree, 0), 0) / np.maximum(np.sum(~tied, 0), 1))))
        if most >= _LEAST_AGREEMENT:
            break
    return most


def gradient(logits_fn, x, y, key) -> Flag | None:
    """The gradient has the sign of finite differences."""
    agree = _agreement(logits_fn, x, y, key, _DIRECTIONS, np.median)
    if agree < _LEAST_AGREEMENT:
        return Flag("wrong_gradient", f"the gradient has the sign of finite differences in {agree:.0%} of random "
                                      "directions: expected over 75 %, something in the model hides its slope")
    return None


@jax.jit
def _neighbours(key, x, grad, near):
    """Images close by at random, and along the sign of the gradient."""
    return x + near * jax.random.uniform(key, x.shape, x.dtype, -1, 1), x + near * jnp.sign(grad)


def shattered(logits_fn, x, y, key, logits) -> Flag | None:
    """A gradient that says nothing about the next grey level leads no attack."""
    here = _slope(losses.margin, logits_fn, x, y, logits)
    near = [_neighbours(rng.stream(key, "landscape"), x, here, size) for size in _NEAR]
    there = _slope(losses.margin, logits_fn, near[0][0], y, call(logits_fn, near[0][0]))
    cosine = np.median(meshes.fetch(_cosine(here, there)))
    rises = max(np.mean(meshes.fetch(_margin(call(logits_fn, along), y)) > meshes.fetch(_margin(logits, y)))
                for _, along in near)
    if cosine < 0.2 or rises < 0.75:
        return Flag("shattered_gradient", f"a quarter of a grey level away the gradient has a cosine of {cosine:.2f} "
                                          "with that of the image, and steps along its sign raise the margin of "
                                          f"{rises:.0%} of the images: expected over 0.2 and 75 %, gradient attacks "
                                          "are led astray")
    return None


def unbounded(logits_fn, x, y, key, correct) -> Flag | None:
    """An attack that may change everything must break everything."""
    _, stands = _attacked(logits_fn, x, y, rng.stream(key, "unbounded"), 1.0, num_steps=40, step_size=0.1)
    left = float(np.mean(correct & stands))
    if left > 0.1:
        return Flag("unbounded_attack_fails", f"{left:.0%} of the images stand an attack without a budget (linf eps "
                                              "1): expected none, the attacks do not work on this model")
    return None


def on_budgets(logits_fn, x, y, key, correct) -> Iterator[Flag | None]:
    """What PGD of ten steps leaves at several budgets, and what else should not have broken it."""
    keys = rng.rowwise(rng.stream(key, "budgets"), x.shape[0])
    attacked = {eps: _attacked(logits_fn, x, y, keys, eps, num_steps=10) for eps in _BUDGETS}
    stands = {eps: correct & left for eps, (_, left) in attacked.items()}
    yield _gradient_on_the_way(logits_fn, y, key, {eps: (attacked[eps][0], stands[eps]) for eps in _BUDGETS})
    yield _single_step(logits_fn, x, y, stands)
    yield _noise(logits_fn, x, y, keys, stands)
    yield _monotone(stands)
    half = min(stands, key=lambda eps: abs(stands[eps].mean() - correct.mean() / 2))
    yield _restarts(logits_fn, x, y, keys, half, stands[half])
    yield from _climb(logits_fn, x, y, half, correct)


def _gradient_on_the_way(logits_fn, y, key, attacked):
    """Where PGD ended without success, its gradient must still be one."""
    for eps, (u, stands) in attacked.items():
        if _missed(stands):
            agree = _agreement(logits_fn, u, y, key, _DIRECTIONS_ON_THE_WAY, lambda of: np.mean(of[stands]))
            if agree < _LEAST_AGREEMENT:
                return Flag("wrong_gradient_later", f"where PGD of linf {eps:g} ends, the gradient has the sign of "
                                                    f"finite differences in {agree:.0%} of random directions: expected "
                                                    "over 75 %, gradient attacks are led astray on their way")
    return None


@jax.jit
def _uphill(u, x, grad, step, eps):
    return balls.project(u + step * jnp.sign(jnp.nan_to_num(grad)), x, eps, "linf")


def _missed(found):
    """Whether an attack that should have found these images (B,) cannot be relied on; one image may be a tie."""
    return found.sum() > max(1, _MOST_MISSED * len(found))


def _single_step(logits_fn, x, y, stands):
    grad = _slope(losses.margin, logits_fn, x, y, call(logits_fn, x))
    for eps, left in stands.items():
        in_one = left & ~_correct(logits_fn, _uphill(x, x, grad, eps, eps), y)
        if _missed(in_one):
            return Flag("single_step_wins", f"one step of linf {eps:g} broke {in_one.sum()} of {len(left)} images that "
                                            f"ten steps had left: expected at most {_MOST_MISSED:.0%}, the gradients "
                                            "may be masked")
    return None


def _noise(logits_fn, x, y, keys, stands):
    for eps, left in stands.items():
        by_noise = np.zeros_like(left)
        for number in range(_DRAWS):  # draw 0 of a key is where PGD started
            by_noise |= left & ~_correct(logits_fn, _noisy(rng.fold_in(keys, number + 1), x, eps), y)
        if _missed(by_noise):
            return Flag("noise_wins", f"random noise of linf {eps:g} broke {by_noise.sum()} of {len(left)} images that "
                                      f"PGD had left at that budget: expected at most {_MOST_MISSED:.0%}, the "
                                      "gradients may be masked")
    return None


def _monotone(stands):
    for small, large in itertools.pairwise(stands):
        if _missed(stands[large] & ~stands[small]) and stands[large].mean() > stands[small].mean() + _MOST_MISSED:
            return Flag("not_monotone", f"{stands[large].mean():.0%} of the images stand PGD with linf {large:g} and "
                                        f"{stands[small].mean():.0%} with {small:g}: expected no more with the larger "
                                        "budget, the attack misses what is there")
    return None


def _restarts(logits_fn, x, y, keys, eps, left):
    others = [_attacked(logits_fn, x, y, rng.fold_in(keys, number), eps, num_steps=10)[1]
              for number in range(_RESTARTS)]
    gain = left & ~np.all(others, 0)
    if _missed(gain):
        return Flag("restarts_win", f"{_RESTARTS} other starts of PGD with linf {eps:g} broke {gain.sum()} of "
                                    f"{len(left)} images that the first had left: expected at most "
                                    f"{_MOST_MISSED:.0%}, attack with more restarts", unreliable=False)
    return None


@jax.jit
def _is_dead(grad):
    """(B,) bool."""
    return jnp.all((grad == 0) | ~jnp.isfinite(grad), (1, 2, 3))


def _climb(logits_fn, x, y, eps, correct):
    """PGD from the clean image, looked at in every step."""
    u, margins, dead = x, [], []
    for _ in range(_CLIMB + 1):
        logits = call(logits_fn, u)
        grad = _slope(losses.margin, logits_fn, u, y, logits)
        margins.append(meshes.fetch(_margin(logits, y)))
        dead.append(meshes.fetch(_is_dead(grad)))
        u = _uphill(u, x, grad, eps / 8, eps)
    margins, dead = np.stack(margins), np.stack(dead)
    broken = np.logical_or.accumulate(~(margins <= 0))
    stuck = (dead & ~broken)[1:].any(0) & correct
    if _missed(stuck):
        yield Flag("zero_gradient_later", f"on the way of PGD the gradient becomes zero or NaN for {stuck.sum()} of "
                                          f"{len(stuck)} images, before they are broken: expected at most "
                                          f"{_MOST_MISSED:.0%}, gradient attacks stop there")
    kept = np.mean(margins[-1] - margins[0] >= 0.5 * (margins.max(0) - margins[0]))
    if kept < 0.75:
        yield Flag("loss_does_not_rise", f"after {_CLIMB} steps of linf {eps:g} the margin of {kept:.0%} of the images "
                                         "is above half of the most that it rose: expected over 75 %, steps along the "
                                         "gradient do not lead up")
    late = broken[-1] & ~broken[_CLIMB // 2]
    if _missed(late):
        yield Flag("not_converged", f"steps {_CLIMB // 2 + 1} to {_CLIMB} of PGD with linf {eps:g} broke {late.sum()} "
                                    f"of {len(late)} images: expected at most {_MOST_MISSED:.0%}, attack with more "
                                    "steps", unreliable=False)
