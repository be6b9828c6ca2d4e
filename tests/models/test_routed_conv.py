"""What the routed convolution starts as."""

import jax
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.models import layers, network
from advmoe_jax.ops import routing
from advmoe_jax.ops.dispatch import Choice


def _kernel(channels, num_experts, model_scale, experts, expert_init):
    width = layers.scaled_width(channels, model_scale)
    conv = layers.RoutedConv(channels, width, num_experts, experts, expert_init)
    x, gate = np.zeros((1, 4, 4, 3), np.float32), np.zeros((1, num_experts), np.float32)
    kernel = np.asarray(conv.init(jax.random.key(0), x, Choice(gate))["params"]["kernel"])
    starts = routing.offsets(num_experts, width, channels, experts)
    return [kernel[..., start:start + width] for start in starts]


@pytest.mark.parametrize("channels, num_experts, model_scale, experts", [
    (16, 2, 0.5, "shared"), (16, 2, 0.2, "shared"), (32, 2, 0.3, "shared"), (32, 2, 0.4, "shared"),
    (64, 10, 0.1, "shared"), (64, 5, 0.2, "shared"), (32, 2, 0.3, "disjoint"), (16, 3, 0.5, "disjoint")])
def test_experts_start_equal(channels, num_experts, model_scale, experts):
    first, *others = _kernel(channels, num_experts, model_scale, experts, "equal")
    assert len(others) == num_experts - 1 and np.std(first) > 0
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_overlapping_windows_agree_but_for_what_a_later_one_owns():
    first, second = _kernel(16, 2, 0.75, "shared", "equal")
    np.testing.assert_array_equal(first[..., :4], second[..., :4])
    np.testing.assert_array_equal(first[..., 4:], second[..., :8])


def test_independent_experts_differ():
    first, second = _kernel(16, 2, 0.5, "shared", "independent")
    assert np.mean(first == second) < 0.01


@pytest.mark.parametrize("num_experts", [2, 5, 8, 10])
def test_at_scale_1_every_shared_expert_is_the_whole_layer(num_experts):
    windows = _kernel(16, num_experts, 1.0, "shared", "independent")
    assert len(windows) == num_experts and {window.shape[-1] for window in windows} == {16}
    for other in windows[1:]:
        np.testing.assert_array_equal(other, windows[0])


def test_at_scale_1_a_mixture_is_the_dense_network(tiny_resnet):
    """Of the same weights, whatever route an image takes."""
    def made(num_experts):
        cfg = configs.default(model="resnet").model
        cfg.update(dict(num_experts=num_experts, model_scale=1.0, width=4, depth=4, router_width=4))
        return network.make(cfg, (8, 8, 1), 10)

    dense, mixture = made(1), made(5)
    numbers = np.random.default_rng(0)  # variances are above 0 too
    variables = jax.tree.map(lambda leaf: numbers.uniform(0.1, 0.5, leaf.shape).astype(np.float32), mixture.shapes)
    of_dense = {part: {"backbone": trees["backbone"]} for part, trees in variables.items()}
    x = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1))
    routes = jax.random.randint(jax.random.key(2), (6, 2), 0, 5)
    expected, _ = jax.jit(dense.apply)(of_dense, x)
    logits, aux = jax.jit(mixture.apply)(variables, x, routing.fixed(routes))
    np.testing.assert_array_equal(aux["expert_ids"], routes)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
