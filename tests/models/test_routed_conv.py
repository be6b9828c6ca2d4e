"""What the routed convolution starts as."""

import jax
import numpy as np
import pytest

from advmoe_jax.models import layers
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
