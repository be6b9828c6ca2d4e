"""Learning rates and SGD of the released AdvMoE code."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advmoe_jax.train import optim


def _cfg(**changes):
    return types.SimpleNamespace(**(dict(
        learning_rate=.1, momentum=.9, weight_decay=5e-4, schedule="constant", warmup="0%", clip_norm=0.) | changes))


@pytest.mark.parametrize("epoch, rate", [
    (0, .09997533), (1, .1), (2, .09997533), (25, .08644843), (50, .05157054), (51, .05), (75, .01577264),
    (99, 9.866e-5)])
def test_cosine_by_epoch(epoch, rate):
    schedule = optim.schedule(_cfg(schedule="cosine_epoch"), steps_per_epoch=3, total_steps=300)
    for step in range(3 * epoch, 3 * epoch + 3):
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-4, abs=1e-7)
        assert float(jax.jit(schedule)(jnp.int32(step))) == pytest.approx(rate, rel=1e-4, abs=1e-7)


def test_sgd():
    optimizer, p = optim.make(_cfg(), 1, 3), jnp.ones(())
    state, seen = optimizer.init(p), []
    for gradient in (1., 1., -2.):
        updates, state = optimizer.update(jnp.float32(gradient), state, p)
        p = optax.apply_updates(p, updates)
        seen.append(float(p))
    np.testing.assert_allclose(seen, [.8999500, .7098600, .7387435], rtol=1e-6)
