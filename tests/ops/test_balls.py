"""Projections, starts and directions of the norm balls, against slow references in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls

EPS = {"linf": 0.1, "l2": 0.7, "l1": 3.0}
SHAPE = (6, 6, 2)
project = jax.jit(balls.project, static_argnums=3)
random_start = jax.jit(balls.random_start, static_argnums=3)
steepest = jax.jit(balls.steepest, static_argnums=2)


def _size(delta, kind):
    order = {"linf": np.inf, "l2": 2, "l1": 1}[kind]
    return np.linalg.norm(np.asarray(delta, np.float64).reshape(len(delta), -1), order, axis=1)


def _keys(n, seed=0):
    return rng.per_example(jax.random.key(seed), jnp.arange(n))


@pytest.fixture(scope="module")
def points():
    """Clean images with corners of the box, and points from inside the balls to far outside of them."""
    numbers = np.random.default_rng(0)
    x = np.clip(numbers.uniform(-0.3, 1.3, (64, *SHAPE)), 0, 1)
    spread = np.geomspace(1e-3, 10, 64).reshape(-1, 1, 1, 1)
    return x.astype(np.float32), (x + spread * numbers.standard_normal(x.shape)).astype(np.float32)


@pytest.mark.parametrize("kind", balls.NORMS)
def test_norm_is_that_of_numpy(points, kind):
    delta = points[1] - points[0]
    np.testing.assert_allclose(balls.norm(jnp.asarray(delta), kind), _size(delta, kind), rtol=1e-5)


@pytest.mark.parametrize("kind", balls.NORMS)
def test_projection_is_allowed_and_changes_nothing_when_repeated(points, kind):
    x, far = points
    once = np.asarray(project(far, x, EPS[kind], kind))
    assert once.dtype == np.float32 and once.min() >= 0 and once.max() <= 1
    assert np.all(_size(once.astype(np.float64) - x, kind) <= EPS[kind] * (1 + 1e-5))
    np.testing.assert_allclose(project(once, x, EPS[kind], kind), once, rtol=0, atol=1e-5)
    assert np.sum(_size(far - x, kind) > EPS[kind]) > 24 and np.sum(_size(far - x, kind) < EPS[kind]) > 8


@pytest.mark.parametrize("kind", balls.NORMS)
def test_projection_keeps_allowed_points(points, kind):
    x, _ = points
    noise = np.random.default_rng(1).standard_normal(x.shape)
    inside = np.clip(x + noise * (0.9 * EPS[kind] / _size(noise, kind)).reshape(-1, 1, 1, 1), 0, 1).astype(np.float32)
    np.testing.assert_allclose(project(inside, x, EPS[kind], kind), inside, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", balls.NORMS)
def test_eps_0_gives_the_clean_images_bit_for_bit(points, kind):
    x, far = points
    np.testing.assert_array_equal(project(far, x, 0.0, kind), x)
    np.testing.assert_array_equal(random_start(_keys(len(x)), x, 0.0, kind), x)


@pytest.mark.parametrize("kind", ["linf", "l1"])
def test_exact_projections_do_not_expand(points, kind):
    x, far = points
    other = far + np.random.default_rng(2).standard_normal(far.shape).astype(np.float32)
    between = _size(np.asarray(project(far, x, EPS[kind], kind)) - project(other, x, EPS[kind], kind), "l2")
    assert np.all(between <= _size(far - other, "l2") * (1 + 1e-5))


def test_linf_and_l2_projections_are_those_of_numpy(points):
    x, far = (p.astype(np.float64) for p in points)
    np.testing.assert_allclose(project(*points[::-1], 0.1, "linf"), np.clip(np.clip(far, x - 0.1, x + 0.1), 0, 1),
                               atol=1e-6)
    shrink = np.minimum(1, 0.7 / _size(far - x, "l2")).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(project(*points[::-1], 0.7, "l2"), np.clip(x + shrink * (far - x), 0, 1), atol=2e-6)


def _l1_by_solver(v, x, eps):
    """min |z - v|^2 with |z|_1 <= eps and 0 <= x + z <= 1, as a quadratic programme in z = p - n, p and n >= 0."""
    d, v, x = len(v), v.astype(np.float64), x.astype(np.float64)
    result = optimize.minimize(
        lambda pn: np.sum((pn[:d] - pn[d:] - v)**2), np.zeros(2 * d), method="SLSQP",
        jac=lambda pn: np.concatenate([2 * (pn[:d] - pn[d:] - v), -2 * (pn[:d] - pn[d:] - v)]),
        bounds=[(0, 1 - u) for u in x] + [(0, u) for u in x],
        constraints={"type": "ineq", "fun": lambda pn: eps - pn.sum(), "jac": lambda pn: -np.ones(2 * d)},
        options={"ftol": 1e-14, "maxiter": 500})
    assert result.success
    return result.x[:d] - result.x[d:]


def test_l1_projection_is_that_of_a_general_solver():
    numbers = np.random.default_rng(3)
    x = np.clip(numbers.uniform(-0.2, 1.2, (12, 2, 2, 2)), 0, 1).astype(np.float32)
    v = numbers.standard_normal(x.shape).astype(np.float32)
    ours = np.asarray(project(x + v, x, 1.2, "l1")) - x
    for z, step, image in zip(ours, x + v - x, x):
        np.testing.assert_allclose(z.ravel(), _l1_by_solver(step.ravel(), image.ravel(), 1.2), atol=2e-5)


@pytest.mark.parametrize("eps", [0.3, 3.0, 20.0])
def test_l1_projection_meets_the_optimality_conditions(points, eps):
    """Free coordinates all moved by the same lam, those at the box by at least as much, and zeros had no more."""
    x, far = (p.astype(np.float64).reshape(64, -1) for p in points)
    projected = np.asarray(project(*points[::-1], eps, "l1"), np.float64).reshape(x.shape)
    active = 0
    for z, v, image in zip(projected - x, far - x, x):
        boxed = np.clip(v, -image, 1 - image)
        if np.abs(boxed).sum() <= eps:
            np.testing.assert_allclose(z, boxed, atol=1e-6)
            continue
        active += 1
        assert np.abs(z).sum() == pytest.approx(eps, rel=2e-5)
        lam = optimize.brentq(lambda t: np.abs(np.clip(
            np.sign(v) * np.maximum(np.abs(v) - t, 0), -image, 1 - image)).sum() - eps, 0, np.abs(v).max())
        bound = np.where(v > 0, 1 - image, image)
        free = (np.abs(z) > 1e-5) & (np.abs(z) < bound - 1e-5)
        np.testing.assert_allclose((np.abs(v) - np.abs(z))[free], lam, atol=3e-5)
        at_box = (np.abs(z) >= bound - 1e-5) & (np.abs(z) > 1e-5)
        assert np.all((np.abs(v) - np.abs(z))[at_box] >= lam - 3e-5)
        assert np.all(np.abs(v)[(np.abs(z) <= 1e-5) & (bound > 1e-5)] <= lam + 3e-5)
    assert active > 10


def test_unknown_norm():
    with pytest.raises(UserError, match="l2"):
        balls.project(jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1)), 0.1, "l3")


@pytest.mark.parametrize("kind", balls.NORMS)
def test_random_start_is_uniform_in_the_ball(kind):
    """Of a uniform point of the ball, the radius to the power of the dimension is uniform in [0, 1]."""
    x = np.full((512, 2, 2, 1), 0.5, np.float32)
    delta = np.asarray(random_start(_keys(512), x, 0.2, kind), np.float64) - 0.5
    assert stats.kstest((_size(delta, kind) / 0.2)**4, "uniform").pvalue > 0.01
    positive = np.bincount(np.sum(delta > 0, axis=(1, 2, 3)), minlength=5)
    assert stats.chisquare(positive, 512 * stats.binom.pmf(np.arange(5), 4, 0.5)).pvalue > 0.01
    assert np.all(np.abs(delta.mean(0)) < 0.03)


@pytest.mark.parametrize("kind", balls.NORMS)
def test_random_start_depends_on_the_key_alone(points, kind):
    x, _ = points
    start = np.asarray(random_start(_keys(64), x, EPS[kind], kind))
    assert start.min() >= 0 and start.max() <= 1 and np.all(_size(start - x, kind) <= EPS[kind] * (1 + 1e-5))
    order = np.random.default_rng(4).permutation(64)[:7]
    np.testing.assert_array_equal(random_start(_keys(64)[order], x[order], EPS[kind], kind), start[order])
    assert np.all(_size(np.asarray(random_start(_keys(64, 1), x, EPS[kind], kind)) - start, "linf") > 0)


def _inner(x, x_adv, kind, grad):
    return np.sum(np.asarray(steepest(grad, x_adv, kind, _keys(len(x))) * grad, np.float64), axis=(1, 2, 3))


def test_steepest_direction_reaches_the_dual_norm():
    """<grad, direction> is the largest that a direction of unit size reaches."""
    numbers = np.random.default_rng(5)
    x = np.full((8, 8, 8, 1), 0.5, np.float32)
    grad = numbers.standard_normal(x.shape).astype(np.float32)
    for kind, dual in (("linf", "l1"), ("l2", "l2"), ("l1", "linf")):
        np.testing.assert_allclose(_inner(x, x, kind, grad), _size(grad, dual), rtol=1e-5)


def test_l2_direction_of_a_dead_gradient():
    x = np.full((4, 8, 8, 1), 0.5, np.float32)
    grad = np.zeros_like(x)
    grad[1] = 1e-30  # its square is 0 in float32
    grad[2, 3, 3] = 1e-42  # subnormal
    direction = np.asarray(steepest(grad, x, "l2", _keys(4)), np.float64)
    np.testing.assert_allclose(_size(direction, "l2")[[0, 1, 3]], 1, rtol=1e-5)
    np.testing.assert_allclose(direction[1], 1 / 8, rtol=1e-5)
    assert np.all(np.isfinite(direction)) and _size(direction, "l2")[2] == pytest.approx(1, rel=1e-4)
    assert np.abs(direction[0] - direction[3]).max() > 0.01, "each example has its own direction"


def test_l1_direction_moves_the_largest_coordinates_that_can_move():
    x = np.full((3, 20, 20, 1), 0.5, np.float32)  # 1 % of 400 coordinates is 4
    grad = np.random.default_rng(6).permutation(np.arange(1., 1201.)).reshape(x.shape).astype(np.float32)
    grad[1] *= -1
    largest = np.argsort(-np.abs(grad.reshape(3, -1)), axis=1)
    x.reshape(3, -1)[0, largest[0, :2]] = 1  # stuck: the gradient points out of the box
    x.reshape(3, -1)[1, largest[1, 0]] = 1  # not stuck: it points back in
    direction = np.asarray(steepest(grad, x, "l1", _keys(3))).reshape(3, -1)
    for b, (first, sign) in enumerate([(2, 1), (0, -1), (0, 1)]):
        expected = np.zeros(400)
        expected[largest[b, first:first + 4]] = sign / 4
        np.testing.assert_allclose(direction[b], expected, atol=1e-7)
    assert not np.any(steepest(np.zeros_like(x), x, "l1", _keys(3)))


def test_golden_l1_step_and_projection():
    """mol.md 8.4 and 8.5, the latter at a tenth, inside the box: a step moves a share of the coordinates, alike."""
    grad = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    sparse = jax.jit(balls.steepest, static_argnums=(2, 4))
    step = np.asarray(sparse(grad, jnp.full(grad.shape, 0.5), "l1", _keys(2), 0.05))
    assert np.all(np.count_nonzero(step, (1, 2, 3)) == 154)
    np.testing.assert_allclose(np.abs(step[step != 0]), 1 / 154, rtol=1e-6)
    for v, z, expected in (((.3, -.1, .05), .2, (.2, 0, 0)), ((.2, -.2, .1), .3, (.4 / 3, -.4 / 3, .1 / 3)),
                           ((.1, -.1, 0), .3, (.1, -.1, 0))):
        x = np.full((1, 1, 1, 3), 0.5, np.float32)
        found = np.asarray(project(x + np.float32(v), x, z, "l1")) - x
        np.testing.assert_allclose(found.ravel(), expected, atol=2e-6)
