"""The small CNN of the benchmarks, trained here to be robust, and its images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from advmoe_jax.attacks import pgd
from advmoe_jax.bench import cnn
from advmoe_jax.ops import losses

SIZE, CLASSES, EPS = 16, 10, {"linf": 8 / 255, "l2": 0.5, "l1": 4.0}


@functools.cache
def images(count, seed):
    """Ten classes of smooth patterns, shifted and noisy: (n, 16, 16, 3) floats in [0, 1] and labels (n,)."""
    numbers = np.random.default_rng(0)
    waves = np.fft.irfft2(numbers.standard_normal((CLASSES, 3, SIZE, SIZE // 2 + 1)) * (
        np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None]) < 0.25), s=(SIZE, SIZE))
    patterns = np.moveaxis(waves / np.abs(waves).max((1, 2, 3), keepdims=True), 1, -1)
    numbers = np.random.default_rng(seed)
    y = numbers.integers(0, CLASSES, count)
    shift = numbers.integers(-3, 4, (count, 2))
    x = np.stack([np.roll(patterns[label], tuple(by), (0, 1)) for label, by in zip(y, shift)])
    strength = numbers.uniform(0.05, 0.5, (count, 1, 1, 1))
    x = np.clip(0.5 + strength * x + 0.1 * numbers.standard_normal(x.shape), 0, 1)
    return x.astype(np.float32), y.astype(np.int32)


@functools.cache
def trained(steps=400, batch=64):
    """Weights after PGD training, seconds on a CPU core."""
    x, y = images(4096, 1)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    weights = cnn.init(0, CLASSES)
    state = optimizer.init(weights)
    attack = pgd.make(pgd.Config(eps=EPS["linf"], num_steps=3, step_size="0.5 eps", keep="last"))

    @jax.jit
    def step(weights, state, key, x, y, share):
        x_adv = x + share * (attack(jax.tree_util.Partial(cnn.apply, weights), key, x, y) - x)
        grads = jax.grad(lambda w: jnp.mean(losses.cross_entropy(cnn.apply(w, x_adv), y)))(weights)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(weights, updates), state

    numbers = np.random.default_rng(2)
    for i in range(steps):
        rows = numbers.integers(0, len(x), batch)
        weights, state = step(weights, state, jax.random.key(i), x[rows], y[rows], min(1, 2 * i / steps))
    return weights
