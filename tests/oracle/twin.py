"""A small robust CNN, trained here, in JAX and in PyTorch with the same weights.

Convolutions 3x3: 3 -> 16, 16 -> 32 with stride 2, 32 -> 64 with stride 2; global average pool; 10 classes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from advmoe_jax.attacks import pgd
from advmoe_jax.ops import losses
from advmoe_jax.ops.conv import conv2d, patches_conv2d

SIZE, CLASSES, EPS = 16, 10, {"linf": 8 / 255, "l2": 0.5, "l1": 4.0}
_SHAPES = ((3, 3, 3, 16), (3, 3, 16, 32), (3, 3, 32, 64))


def init(key):
    """Weights, He initialised."""
    keys = jax.random.split(key, 4)
    kernels = [jax.random.normal(k, s) * np.sqrt(2 / np.prod(s[:3])) for k, s in zip(keys, _SHAPES)]
    return {"kernels": kernels, "biases": [jnp.zeros(s[-1]) for s in _SHAPES],
            "head": jax.random.normal(keys[3], (64, CLASSES)) / 8, "head_bias": jnp.zeros(CLASSES)}


def apply(weights, x, conv=conv2d):
    """(B, H, W, 3) in [0, 1] -> (B, 10)."""
    h = x - 0.5
    for stride, kernel, bias in zip((1, 2, 2), weights["kernels"], weights["biases"]):
        h = jax.nn.relu(conv(h, kernel, stride) + bias[None, None, None])
    return h.mean((1, 2)) @ weights["head"] + weights["head_bias"][None]


def apply_patches(weights, x):
    """As `apply`, every convolution a matrix product over patches."""
    return apply(weights, x, patches_conv2d)


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
    weights = init(jax.random.key(0))
    state = optimizer.init(weights)
    attack = pgd.make(pgd.Config(eps=EPS["linf"], num_steps=3, step_size="0.5 eps", keep="last"))

    @jax.jit
    def step(weights, state, key, x, y, share):
        x_adv = x + share * (attack(jax.tree_util.Partial(apply, weights), key, x, y) - x)
        grads = jax.grad(lambda w: jnp.mean(losses.cross_entropy(apply(w, x_adv), y)))(weights)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(weights, updates), state

    numbers = np.random.default_rng(2)
    for i in range(steps):
        rows = numbers.integers(0, len(x), batch)
        weights, state = step(weights, state, jax.random.key(i), x[rows], y[rows], min(1, 2 * i / steps))
    return weights


def in_torch(weights):
    """The same network as a torch module; images are (B, 3, H, W)."""
    import torch

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = torch.nn.ModuleList(
                torch.nn.Conv2d(s[2], s[3], 3, stride, 1) for s, stride in zip(_SHAPES, (1, 2, 2)))
            self.head = torch.nn.Linear(64, CLASSES)

        def forward(self, x):
            h = x - 0.5
            for conv in self.convs:
                h = torch.relu(conv(h))
            return self.head(h.mean((2, 3)))

    def tensor(array):
        return torch.from_numpy(np.array(array))

    twin = Twin().eval()
    with torch.no_grad():
        for conv, kernel, bias in zip(twin.convs, weights["kernels"], weights["biases"]):
            conv.weight.copy_(tensor(kernel).permute(3, 2, 0, 1))
            conv.bias.copy_(tensor(bias))
        twin.head.weight.copy_(tensor(weights["head"]).T)
        twin.head.bias.copy_(tensor(weights["head_bias"]))
    return twin.requires_grad_(False)


def to_torch(x):
    """(B, H, W, C) numpy -> (B, C, H, W) torch."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def from_torch(x):
    """(B, C, H, W) torch -> (B, H, W, C) numpy."""
    return np.moveaxis(x.detach().numpy(), 1, -1)
