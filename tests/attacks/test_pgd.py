"""PGD against closed forms on linear models, its drivers against each other, and attacks as text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import driver, objectives, parse, pgd
from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls, losses
from advmoe_jax.ops.conv import conv2d, patches_conv2d

SHAPE = (5, 5, 1)
EPS = {"linf": 0.03, "l2": 0.15, "l1": 0.3}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}


def _linear(weights, x):
    return x.reshape(x.shape[0], -1) @ weights["w"] + weights["b"][None]


def _mlp(weights, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ weights["w"]) @ weights["v"]


def _attack(fn, weights, x, y, key=0, **settings):
    return pgd.make(pgd.Config(**settings))(jax.tree_util.Partial(fn, weights), jax.random.key(key), x, y)


@functools.cache
def _binary(n=64):
    """A linear model of two classes and images so far inside the box that it never matters."""
    numbers = np.random.default_rng(0)
    weights = {"w": jnp.asarray(numbers.standard_normal((25, 2)), jnp.float32),
               "b": jnp.asarray(-0.5 * numbers.standard_normal(2), jnp.float32)}
    x = jnp.asarray(numbers.uniform(0.4, 0.6, (n, *SHAPE)), jnp.float32)
    weights["b"] += jnp.asarray([0., 1.]) * -jnp.mean(_linear(weights, x) @ jnp.asarray([-1., 1.]))
    return weights, x, jnp.argmax(_linear(weights, x), -1)


@functools.cache
def _curved(n=24):
    numbers = np.random.default_rng(1)
    weights = {"w": numbers.standard_normal((25, 12)) / 4, "v": numbers.standard_normal((12, 4))}
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)
    x = jnp.asarray(np.clip(numbers.uniform(-0.2, 1.2, (n, *SHAPE)), 0, 1), jnp.float32)
    return weights, x, jnp.argmax(_mlp(weights, x), -1)


def _closed_form(norm):
    """Margins h < 0 of the clean images, and the dual norm of their gradient w, in float64."""
    weights, x, y = _binary()
    w, b = (np.asarray(weights[k], np.float64) for k in "wb")
    logits = np.asarray(x, np.float64).reshape(len(x), -1) @ w + b
    rows, y = np.arange(len(x)), np.asarray(y)
    return logits[rows, 1 - y] - logits[rows, y], np.linalg.norm(w[:, 1] - w[:, 0], DUAL[norm])


@pytest.mark.parametrize("norm", balls.NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_worst_margin_of_a_linear_model(norm, loss):
    """h + eps |w|_q with the dual norm q, which is reached from any start."""
    weights, x, y = _binary()
    x_adv = _attack(_linear, weights, x, y, norm=norm, eps=EPS[norm], loss=loss, num_steps=20,
                    step_size="1 eps")
    h, slope = _closed_form(norm)
    np.testing.assert_allclose(losses.margin(_linear(weights, x_adv), y), h + EPS[norm] * slope,
                               rtol=1e-5, atol=2e-5 if norm == "l1" else 2e-6)


@pytest.mark.parametrize("norm", balls.NORMS)
@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_robust_accuracy_curve_of_a_linear_model(name, norm):
    """Exactly the share of images whose distance to the boundary is above eps."""
    weights, x, y = _binary()
    h, slope = _closed_form(norm)
    distance = -h / slope
    between = np.sort(distance)[:-1] + np.diff(np.sort(distance)) / 2
    for eps in between[[6, 25, 45]]:
        settings = dict(num_steps=20, step_size="1 eps") if name == "pgd" else {}
        x_adv = parse.attack(name, norm=norm, eps=float(eps), **settings).run(
            jax.tree_util.Partial(_linear, weights), jax.random.key(0), x, y)
        robust = np.asarray(jnp.argmax(_linear(weights, x_adv), -1) == y)
        clear = np.abs(distance - eps) > 1e-5
        np.testing.assert_array_equal(robust[clear], (distance > eps)[clear])
        assert clear.sum() >= len(x) - 2


def test_linf_optimum_where_the_box_matters():
    weights, _, _ = _binary()
    x = jnp.asarray(np.clip(np.random.default_rng(2).uniform(-0.5, 1.5, (32, *SHAPE)), 0, 1), jnp.float32)
    y = jnp.argmax(_linear(weights, x), -1)
    x_adv = _attack(_linear, weights, x, y, norm="linf", eps=0.2, num_steps=20)
    w = np.asarray(weights["w"])
    direction = np.sign((w[:, 1] - w[:, 0])[None] * np.where(np.asarray(y) == 0, 1, -1)[:, None]).reshape(x.shape)
    np.testing.assert_allclose(x_adv, np.clip(x + 0.2 * direction, 0, 1), atol=1e-6)


@pytest.mark.parametrize("norm", balls.NORMS)
def test_drivers_agree_in_float32(norm):
    weights, x, y = _curved()
    verdicts = []
    for name in ("unroll", "device", "host"):
        x_adv = _attack(_mlp, weights, x, y, norm=norm, eps=2 * EPS[norm], num_steps=3, driver=name)
        verdicts.append(np.asarray(jnp.argmax(_mlp(weights, x_adv), -1) == y))
    assert 0 < verdicts[0].mean() < 1
    for other in verdicts[1:]:
        np.testing.assert_array_equal(other, verdicts[0])


@pytest.mark.parametrize("norm", balls.NORMS)
def test_drivers_agree_to_1e_10_in_float64(norm):
    with jax.enable_x64(True):
        weights, x, y = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a), jnp.float64 if a.dtype == jnp.float32 else a.dtype), _curved())
        found = [_attack(_mlp, weights, x, y, norm=norm, eps=EPS[norm], num_steps=3, driver=name, keep="last")
                 for name in ("unroll", "device", "host")]
        assert found[0].dtype == jnp.float64
        for other in found[1:]:
            np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-10)


def _convolutional(conv, kernel, x):
    return jnp.mean(jax.nn.relu(conv(x, kernel)), (1, 2))


@pytest.mark.parametrize("conv, loops", [
    (conv2d, True), (patches_conv2d, True), (lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), False)])
def test_on_cpu_convolutions_that_loops_slow_down_are_stepped_by_the_host(conv, loops, monkeypatch):
    """The gradient that autodiff makes of XLA's convolution has another layout."""
    ran = []
    for name in ("_step", "_steps"):
        one = getattr(driver, name)
        spy = functools.partial(lambda one, name, *arguments: (ran.append(name), one(*arguments))[1], one, name)
        spy.trace = getattr(one, "trace", None)
        monkeypatch.setattr(driver, name, spy)
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 5, 4)), jnp.float32)
    x = jnp.full((2, 6, 6, 5), 0.5)
    _attack(functools.partial(_convolutional, conv), kernel, x, jnp.zeros(2, jnp.int32), num_steps=6)
    assert set(ran) == {"_steps" if loops else "_step"}

    def traced(num_steps):
        def attack(kernel, x):
            y = jnp.zeros(len(x), jnp.int32)
            return _attack(functools.partial(_convolutional, conv), kernel, x, y, num_steps=num_steps)
        return any(equation.primitive.name == "while" for equation in driver.equations(
            jax.make_jaxpr(attack)(kernel, x).jaxpr))

    assert [traced(num_steps) for num_steps in (1, 3, 9)] == [loops, loops, True]


def test_unknown_driver():
    with pytest.raises(UserError, match="'host'"):
        _attack(_mlp, *_curved(), driver="hosts")


def _wavy(weights, x):
    """A model on which large steps overshoot."""
    return jnp.sin(8 * _mlp(weights, x))


@pytest.mark.parametrize("key", [0, 1])
def test_best_iterate_is_at_least_as_strong_as_the_last(key):
    weights, x, _ = _curved()
    y = jnp.argmax(_wavy(weights, x), -1)
    robust, loss = {}, {}
    for keep in ("best", "last"):
        x_adv = _attack(_wavy, weights, x, y, key, norm="linf", eps=0.02, num_steps=6, step_size="1 eps", keep=keep)
        robust[keep] = np.asarray(jnp.argmax(_wavy(weights, x_adv), -1) == y)
        loss[keep] = np.asarray(losses.cross_entropy(_wavy(weights, x_adv), y))
    assert not np.any(robust["best"] & ~robust["last"]) and 0 < robust["last"].mean() < 1
    alike = robust["best"] == robust["last"]
    assert np.all((loss["best"] >= loss["last"] - 1e-5)[alike])
    assert np.any((loss["best"] > loss["last"] + 0.01)[alike]), "the last iterate is not the best of all examples"


def test_more_restarts_are_at_least_as_strong():
    """The first starts are the same, so that each example can only get worse."""
    weights, x, y = _curved()
    settings = dict(norm="linf", eps=0.08, num_steps=1, step_size="0.3 eps")
    values = []
    for restarts in (1, 2, 5):
        x_adv = _attack(_mlp, weights, x, y, restarts=restarts, **settings)
        logits = _mlp(weights, x_adv)
        values.append((np.asarray(jnp.argmax(logits, -1) == y), np.asarray(losses.cross_entropy(logits, y))))
    for (few, less), (many, more) in zip(values, values[1:]):
        assert not np.any(many & ~few)
        assert np.all((more >= less - 1e-5) | (few & ~many))
    assert np.mean(values[-1][1]) > np.mean(values[0][1])


def _with_a_hole(weights, x):
    """NaN logits where the first pixel is above 0.55."""
    return jnp.where(x[:, 0, 0, 0, None] > 0.55, jnp.nan, _linear(weights, x))


@pytest.mark.parametrize("name", ["ce", "margin"])
def test_nan_logits_count_as_broken(name):
    weights, x, y = _binary(4)
    x = x.at[:, 0, 0, 0].set(jnp.asarray([0.6, 0.5, 0.6, 0.5]))
    logits = _with_a_hole(weights, x)
    np.testing.assert_array_equal(objectives.NAMED[name].success(logits, y), [True, False, True, False])
    x_adv = _attack(_with_a_hole, weights, x, y, eps=1e-4, num_steps=3, loss=name)
    assert np.all(np.isfinite(x_adv))
    np.testing.assert_array_equal(np.isnan(_with_a_hole(weights, x_adv)).any(-1), [True, False, True, False])


def test_broken_beats_a_higher_loss():
    """An iterate that is broken is kept, although a later one that is not has a higher loss."""
    a = dict(x=jnp.zeros((4, 1, 1, 1)), loss=jnp.asarray([1., 1., 1., jnp.nan]), broken=jnp.asarray([1, 0, 0, 1], bool))
    b = dict(x=jnp.ones((4, 1, 1, 1)), loss=jnp.asarray([9., 0., 2., 5.]), broken=jnp.asarray([0, 1, 0, 0], bool))
    worse = driver.worse(a, b)
    np.testing.assert_array_equal(worse["x"].ravel(), [0, 1, 1, 0])
    np.testing.assert_array_equal(worse["loss"], [1, 0, 2, np.nan])


def _masked(weights, x):
    return jax.lax.stop_gradient(_mlp(weights, x))


def test_l2_moves_on_a_dead_gradient():
    weights, x, y = _curved()
    settings = dict(norm="l2", eps=0.5, num_steps=5, start="none", keep="last")
    moved = np.asarray(balls.norm(_attack(_masked, weights, x, y, **settings) - x, "l2"))
    assert np.all(moved > 0.05) and np.all(moved <= 0.5 * (1 + 1e-5))
    np.testing.assert_array_equal(_attack(_masked, weights, x, y, **settings | dict(norm="linf")), x)


def test_the_last_iterate_needs_no_look():
    """With one restart: it is where K steps lead, by K passes; more restarts are compared."""
    weights, x, y = _curved()
    last = {}
    for restarts in (1, 2):
        with driver.counted() as ledger:
            last[restarts] = _attack(_mlp, weights, x, y, norm="linf", eps=0.05, num_steps=3, keep="last",
                                     restarts=restarts)
        assert ledger.forward == {1: 3, 2: 8}[restarts] * len(x)
    best = _attack(_mlp, weights, x, y, norm="linf", eps=0.05, num_steps=3, step_size="0.01 eps", keep="best")
    same = _attack(_mlp, weights, x, y, norm="linf", eps=0.05, num_steps=3, step_size="0.01 eps", keep="last")
    hit = np.argmax(_mlp(weights, best), -1) != y
    assert np.mean(np.all(best == same, (1, 2, 3)) | hit) > 0.9  # tiny steps: the last iterate is the best one
    assert not np.array_equal(last[1], x)


def test_kl_objective_moves_away_from_the_clean_distribution():
    weights, x, _ = _curved()
    clean = _mlp(weights, x)
    x_adv = _attack(_mlp, weights, x, clean, norm="linf", eps=0.1, num_steps=5, loss="kl", start="gaussian")
    noise = _attack(_mlp, weights, x, clean, norm="linf", eps=0.1, num_steps=1, loss="kl", step_size=0.0, keep="last")
    kl = [np.asarray(losses.kl(clean, _mlp(weights, u))) for u in (x_adv, noise)]
    assert np.all(kl[0] > 0) and np.mean(kl[0]) > 3 * np.mean(kl[1])
    assert not np.any(objectives.NAMED["kl"].success(clean, clean))


def test_gaussian_start_of_trades():
    weights, x, y = _curved()
    delta = np.asarray(_attack(_mlp, weights, x, y, eps=0.1, num_steps=1, step_size=0.0, start="gaussian",
                               keep="last") - x)[(x > 0.1) & (x < 0.9)]
    assert 0.0008 < delta.std() < 0.0012 and abs(delta.mean()) < 0.0003


def test_custom_objective_sees_all_outputs_and_any_target():
    """Outputs and targets are trees: a targeted attack that also gets an auxiliary output."""
    weights, x, y = _curved()

    def outputs(weights, x):
        return _mlp(weights, x), {"sum": jnp.sum(x, (1, 2, 3))}

    objective = objectives.Objective(
        lambda out, target: -losses.cross_entropy(out[0], target["class"]) + 0 * out[1]["sum"],
        lambda out, target: jnp.argmax(out[0], -1) == target["class"])
    target = {"class": (y + 1) % 4, "unused": jnp.zeros((len(y), 2))}
    x_adv = _attack(outputs, weights, x, target, norm="linf", eps=0.5, num_steps=10, loss=objective)
    hit = [np.mean(np.argmax(_mlp(weights, u), -1) == target["class"]) for u in (x, x_adv)]
    assert hit[0] == 0 and hit[1] > 0.3


@pytest.mark.parametrize("settings, word", [
    (dict(norm="l3"), "l2"), (dict(start="uniforn"), "uniform"), (dict(keep="first"), "best"), (dict(loss="cee"), "ce"),
    (dict(num_steps=0), "1 to"), (dict(restarts=0), "1 to"), (dict(num_steps=1e20), "whole"),
    (dict(eps="8/0"), "fraction"),
    (dict(eps=8), "8/255"), (dict(eps=-0.1), "0 or more"), (dict(eps="nan"), "number"),
    (dict(step_size="fast"), "number"), (dict(step_size=-1.0), "0 or more"),
    (dict(step_size="2.5 eps / stop"), "'2.5 eps / stop'")])
def test_bad_settings(settings, word):
    with pytest.raises(UserError, match=word) as caught:
        pgd.make(pgd.Config(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step_size, num_steps, expected", [
    ("0.625 eps", 1, 5 / 255), ("2/255", 1, 2 / 255), (0.01, 1, 0.01), ("0.5 eps/steps", 2, 4 / 255),
    ("0.5 eps / steps", 2, 4 / 255),
    ("2 eps", 1, 8 / 255)])
def test_step_sizes(step_size, num_steps, expected):
    weights, x, y = _binary()
    x_adv = _attack(_linear, weights, x, y, eps="8/255", num_steps=num_steps, step_size=step_size, start="none")
    np.testing.assert_allclose(np.abs(x_adv - x), expected, rtol=1e-4)


def test_the_same_settings_are_the_same_program():
    """Equal and equally hashed: compiled programs are found again."""
    programs = [pgd.Search("l2", "uniform", objectives.get("ce"), True, False) for _ in range(2)]
    assert programs[0] == programs[1] and hash(programs[0]) == hash(programs[1])
    assert programs[0] != pgd.Search("l2", "uniform", objectives.get("margin"), True, False)


def test_host_driver_leaves_its_inputs_alone():
    """The carry is donated; the images that the caller holds are not."""
    weights, x, y = _curved()
    keys = rng.per_example(jax.random.key(0), jnp.arange(len(x)))
    before = np.array(x)
    for start in pgd.STARTS:
        pgd.make(pgd.Config(eps=0.1, num_steps=2, start=start, driver="host"))(
            jax.tree_util.Partial(_mlp, weights), keys, x, y)
        assert not any(leaf.is_deleted() for leaf in (x, y, keys))
    np.testing.assert_array_equal(x, before)
    assert driver.DRIVERS == ("auto", "unroll", "device", "host")


# Attacks as text.


def test_text_with_settings():
    fgsm, found = parse.attacks(" fgsm  pgd(num_steps=20,norm=l2, eps=0.5) ", norm="linf", eps="8/255")
    assert (fgsm.name, fgsm.label, fgsm.config.norm, fgsm.config.eps) == ("fgsm", "fgsm", "linf", "8/255")
    assert (found.name, found.label, found.config.norm, found.config.eps) == ("pgd", "pgd-20", "l2", 0.5)
    assert found.config == pgd.Config("l2", 0.5, 20)
    assert found.settings["num_steps"] == "20" and found.settings["norm"] == "l2"


def test_text_with_a_fraction_and_words():
    [spec] = parse.attacks("pgd(eps=4/255,step_size=0.5 eps,start=none,keep=last)")
    assert spec.config == pgd.Config(eps="4/255", step_size="0.5 eps", start="none", keep="last")
    weights, x, y = _curved()
    x_adv = spec.run(jax.tree_util.Partial(_mlp, weights), jax.random.key(0), x, y)
    assert float(balls.norm(x_adv - x, "linf").max()) == pytest.approx(4 / 255, rel=1e-4)


@pytest.mark.parametrize("text, words", [
    ("pgdd", ["pgdd", "expected one of", "did you mean 'pgd'"]),
    ("pgd(num_step=3)", ["num_step", "did you mean 'num_steps'"]),
    ("fgsm(num_steps=3)", ["num_steps", "setting of fgsm"]),
    ("pgd(num_steps", ["cannot be read", "pgd(num_steps"]),
    ("pgd)", ["cannot be read"]),
    ("pgd(num_steps)", ["num_steps", "no value", "name=value"]),
    ("pgd(num_steps=0)", ["num_steps of pgd is 0", "1 to"]),
    ("pgd(eps=8)", ["8/255"]),
    ("pgd(num_steps=)", ["num_steps"]),
    ("pgd(num_steps=many)", ["num_steps", "many"]),
    ("pgd(restarts=1.5)", ["restarts"]),
    ("pgd,fgsm", ["cannot be read"]),
    ("", ["no attack"]),
    ("  ", ["no attack"])])
def test_bad_text(text, words):
    with pytest.raises(UserError) as caught:
        parse.attacks(text)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message
