"""Learning rates and SGD of the released AdvMoE code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advmoe_jax.train import optim


def _cfg(**changes):
    return optim.Config(**(dict(
        learning_rate=.1, momentum=.9, weight_decay=5e-4, schedule="constant", warmup="0%", clip_norm=0.) | changes))


@pytest.mark.parametrize("epoch, rate", [
    (0, .09997533), (1, .1), (2, .09997533), (25, .08644843), (50, .05157054), (51, .05), (75, .01577264),
    (99, 9.866e-5)])
def test_cosine_by_epoch(epoch, rate):
    schedule = optim.schedule(_cfg(schedule="cosine_epoch"), steps_per_epoch=3, total_steps=300)
    for step in range(3 * epoch, 3 * epoch + 3):
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-4, abs=1e-7)
        assert float(jax.jit(schedule)(jnp.int32(step))) == pytest.approx(rate, rel=1e-4, abs=1e-7)


def test_cosine_by_step_and_warm_up():
    """To 0 at the end; the warm-up starts at the first share of the rate, not at 0, and multiplies."""
    plain = optim.schedule(_cfg(schedule="cosine"), steps_per_epoch=10, total_steps=100)
    np.testing.assert_allclose([plain(step) for step in (0, 25, 50, 100)], [.1, .05 * (1 + 2**-.5), .05, 0], atol=1e-8)
    warm = optim.schedule(_cfg(schedule="cosine", warmup="5%"), steps_per_epoch=10, total_steps=100)
    for step in range(100):
        assert float(warm(step)) == pytest.approx(min(1, (step + 1) / 5) * float(plain(step)), rel=1e-5)
    epoch = optim.schedule(_cfg(warmup="1 epochs"), steps_per_epoch=10, total_steps=100)
    np.testing.assert_allclose([epoch(step) for step in (0, 4, 9, 10, 99)], [.01, .05, .1, .1, .1], rtol=1e-6)


def test_clipping_is_of_the_norm_of_all_gradients():
    optimizer = optim.make(_cfg(momentum=0., weight_decay=0., clip_norm=1.), 1, 3)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    for scale in (1, 10):
        gradient = {"a": jnp.asarray([3., 0.]) * scale, "b": jnp.asarray([4.]) * scale}
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        np.testing.assert_allclose(updates["a"], [-.06, 0], atol=1e-7)
        np.testing.assert_allclose(updates["b"], [-.08], atol=1e-7)
    small = {"a": jnp.asarray([.3, 0.]), "b": jnp.asarray([.4])}
    np.testing.assert_allclose(optimizer.update(small, optimizer.init(params), params)[0]["a"], [-.03, 0], atol=1e-7)


def test_sgd():
    optimizer, p = optim.make(_cfg(), 1, 3), jnp.ones(())
    state, seen = optimizer.init(p), []
    for gradient in (1., 1., -2.):
        updates, state = optimizer.update(jnp.float32(gradient), state, p)
        p = optax.apply_updates(p, updates)
        seen.append(float(p))
    np.testing.assert_allclose(seen, [.8999500, .7098600, .7387435], rtol=1e-6)
