"""What every attack promises, for every module of advmoe_jax.attacks that makes one.

A new attack is covered as soon as its file is there; settings that it does not have are left at their defaults.
"""

import dataclasses
import functools
import inspect
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but

from advmoe_jax import attacks
from advmoe_jax.attacks import objectives, parse
from advmoe_jax.attacks.about import About
from advmoe_jax.core import fields, find, rng
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls, losses

NAMES = find.names("attacks", "make")
EPS = {"linf": 0.1, "l2": 0.6, "l1": 3.0}
BATCH, CLASSES, SHAPE = 12, 3, (6, 6, 1)
SMALL = dict(num_steps=8, num_queries=60)  # so that a device loop is not unrolled
OWN = {"cw_l2": dict(c=1.0, binary_search_steps=2, learning_rate=0.05), "ddn": dict(start_eps=0.2),
       "frequency": dict(mean=0.45),
       "normalized": dict(eps_sd=0.5, step_sd=0.2, std=0.2),
       "rays": dict(num_queries=300)}  # of attacks that would not break anything else

MODULES = {name: find.module("attacks", name, defines="make") for name in NAMES}
ABOUTS = {name: module.ABOUT for name, module in MODULES.items() if hasattr(module, "ABOUT")}  # all, by the first test
CASES = [(name, norm) for name, about in ABOUTS.items()
         if about.takes in ("logits", "values")  # others: test_adaptive.py, test_exits.py, test_gated.py
         for norm in about.norms or ("",)]
each = pytest.mark.parametrize("name, norm", CASES)
in_one_norm = pytest.mark.parametrize("name, norm", slow_but(
    lambda case: case[1] == (ABOUTS[case[0]].norms or ("",))[0], CASES))
in_ball = pytest.mark.parametrize("name, norm", [case for case in CASES if case[1]])


def _apply(weights, x):
    """A smooth network that is not linear."""
    h = jnp.tanh(x.reshape(x.shape[0], -1) @ weights[0])
    return h @ weights[1]


@functools.cache
def _case():
    """Weights, images with corners of the box, and the labels that the network gives most of them."""
    numbers = np.random.default_rng(0)
    weights = (numbers.standard_normal((36, 8)) / 6, numbers.standard_normal((8, CLASSES)))
    weights = tuple(jnp.asarray(w, jnp.float32) for w in weights)
    x = jnp.asarray(np.clip(numbers.uniform(-0.2, 1.2, (BATCH, *SHAPE)), 0, 1), jnp.float32)
    y = jnp.argmax(_apply(weights, x), -1).at[0].add(1) % CLASSES  # image 0 is wrong when clean
    return weights, x, y


def _spec(name, norm, eps=None, **more):
    config = find.module("attacks", name, defines="make").Config
    fields = {field.name for field in dataclasses.fields(config)}
    budget = dict(norm=norm, eps=EPS[norm] if eps is None else eps) if norm else {}
    return parse.attack(name, **{k: v for k, v in (SMALL | OWN.get(name, {}) | more | budget).items() if k in fields})


def _keys(index):
    return rng.per_example(jax.random.key(7), jnp.asarray(index))


@functools.cache
def _found(name, norm):
    """Images that the attack found."""
    weights, x, y = _case()
    return _spec(name, norm).run(jax.tree_util.Partial(_apply, weights), _keys(np.arange(BATCH)), x, y)


def _same(ours, theirs):
    """Equal but for the order of sums, which may send single images elsewhere where an attack has to decide."""
    apart = np.abs(np.asarray(ours) - np.asarray(theirs)).max((1, 2, 3)) > 2e-5
    assert apart.sum() <= len(apart) // 4, f"{apart.sum()} of {len(apart)} images differ"


def _verdicts(x_adv, y):
    return np.asarray(jnp.argmax(_apply(_case()[0], jnp.asarray(np.asarray(x_adv))), -1) == y)


def test_attacks_are_found():
    """Every file that has a part of an attack is one, by its `make`."""
    assert {"fgsm", "pgd"} <= set(NAMES)
    parts = ("\nABOUT = ", "\nclass Config(", "\nclass Config:")
    files = pathlib.Path(attacks.__path__[0]).glob("*.py")
    assert {file.stem for file in files if any(part in file.read_text() for part in parts)} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    """ABOUT, Config, label and make, and that they agree."""
    module = MODULES[name]
    assert isinstance(module.ABOUT, About)
    assert dataclasses.is_dataclass(module.Config) and module.Config.__dataclass_params__.frozen
    config = module.Config()
    assert module.label(config) and isinstance(module.label(config), str)
    assert list(inspect.signature(module.make).parameters) == ["config"] and callable(module.make(config))
    fields = {field.name for field in dataclasses.fields(config)}
    assert ("norm" in fields) == ("eps" in fields) == bool(module.ABOUT.norms)
    assert not module.ABOUT.norms or config.norm in module.ABOUT.norms
    assert module.ABOUT.fixed_by in fields | {""}
    assert bool(module.ABOUT.needs) == (module.ABOUT.takes in ("outputs", "routed", "gated"))
    assert parse.attack(name).about == module.ABOUT


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_a_range(name):
    """What is beyond it is refused, by its name."""
    for field, of in fields.settings(MODULES[name].Config).items():
        assert of.what
        wrong = ["nonsense"]
        if type(of.default) in (int, float):
            least = max(of.least, of.above)
            assert math.isfinite(least) and math.isfinite(of.most) and least <= of.default <= of.most
            wrong += [least - 1, 2 * of.most + 1, 10**400, "inf", float("nan"), None]
            wrong += [least] if of.above > -math.inf else []
            wrong += [least + 0.5] if isinstance(of.default, int) else []
        for value in wrong:
            with pytest.raises(UserError, match=field) as caught:
                parse.attack(name, **{field: value})
            assert "\n" not in str(caught.value)


def test_an_eps_of_linf_in_another_norm_is_noticed():
    with pytest.warns(UserWarning, match="eps of pgd is 8/255 for l2"):
        parse.attack("pgd", norm="l2", eps="8/255")


@pytest.mark.parametrize("name", [name for name, about in ABOUTS.items() if about.norms])
def test_knows_no_other_norm(name):
    with pytest.raises(UserError, match=f"unknown norm of {name if name != 'fgsm' else 'pgd'} 'l7'"):
        parse.attack(name, norm="l7")


def test_a_module_that_does_not_say_what_it_is(monkeypatch):
    monkeypatch.delattr(MODULES["pgd"], "ABOUT")
    with pytest.raises(UserError) as caught:
        parse.attack("pgd")
    assert str(caught.value) == "attack pgd does not say what it is: expected ABOUT = About(...) in pgd.py"


@pytest.mark.parametrize("wrong, words", [
    (dict(takes="logit"), "did you mean 'logits'"), (dict(norms=("linf", "l3")), "unknown norm of an attack 'l3'"),
    (dict(norms="linf"), "unknown norm")])
def test_about_is_checked(wrong, words):
    with pytest.raises(UserError, match=words):
        About(**wrong)


def _weighted(logits, y):
    return jnp.sum(logits * y["weights"], -1)


def _never(logits, y):
    return jnp.zeros(logits.shape[0], bool)


OBJECTIVE = objectives.Objective(_weighted, _never)


@pytest.mark.parametrize("text", ["pgd(num_steps=1,keep=last)", "fgsm"])
def test_raises_the_objective_that_training_gives(text):
    """A default setting, of which `y` may be any pytree; inside a traced program too."""
    weights, x, _ = _case()
    weights = weights[0][:, :CLASSES]
    model = jax.tree_util.Partial(lambda w, u: (u.reshape(len(u), -1) - 0.5) @ w, weights)
    y = {"weights": jnp.asarray(np.random.default_rng(2).standard_normal((BATCH, CLASSES)), jnp.float32)}
    [spec] = parse.attacks(text, norm="linf", eps="8/255", loss=OBJECTIVE)
    assert spec.config.loss is OBJECTIVE
    steepest = jnp.sign(jnp.einsum("bk,dk->bd", y["weights"], weights)).reshape(x.shape)
    expected = jnp.clip(x + 8 / 255 * steepest, 0, 1)
    np.testing.assert_allclose(spec.run(model, _keys(np.arange(BATCH)), x, y), expected, atol=1e-6)
    traced = jax.jit(lambda keys, x, y: spec.run(model, keys, x, y))
    np.testing.assert_allclose(traced(_keys(np.arange(BATCH)), x, y), expected, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if "loss" in vars(MODULES[name].Config())])
def test_text_goes_before_the_objective_that_training_gives(name):
    given, other = parse.attacks(f"{name} {name}(loss=ce)", norm="linf", eps="8/255", loss=OBJECTIVE)
    assert given.config.loss is OBJECTIVE and other.config.loss == "ce"
    assert " " not in given.label
    weights, x, y = _case()
    x_adv = other.run(jax.tree_util.Partial(_apply, weights), _keys(np.arange(BATCH)), x, y)
    alone = parse.attack(name, norm="linf", eps="8/255").run(
        jax.tree_util.Partial(_apply, weights), _keys(np.arange(BATCH)), x, y)
    np.testing.assert_array_equal(x_adv, alone)


def test_settings_without_a_field_are_dropped_from_the_defaults():
    [spec] = parse.attacks("fog", norm="linf", eps="8/255", loss=OBJECTIVE)
    assert "loss" not in spec.settings


@each
def test_stays_in_the_box(name, norm):
    x, x_adv = _case()[1], _found(name, norm)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
    assert np.all(np.isfinite(x_adv)) and x_adv.min() >= 0 and x_adv.max() <= 1
    assert np.any(x_adv != x)


@in_ball
def test_stays_in_the_ball_and_increases_the_loss(name, norm):
    """Of images that are correct when clean; one that is wrong already may be left as it is."""
    weights, x, y = _case()
    x_adv = _found(name, norm)
    size = np.asarray(balls.norm(x_adv - x, norm))
    assert np.all(size <= EPS[norm] * (1 + 1e-5) + 1e-6) and np.mean(size > 0) > 0.3
    clean, attacked = (np.asarray(losses.cross_entropy(_apply(weights, u), y))[1:] for u in (x, x_adv))
    assert np.all(attacked >= clean - 1e-5)
    assert np.mean(_verdicts(x_adv, y)) < np.mean(_verdicts(x, y))
    assert np.mean(attacked) > np.mean(clean) + 0.01


@each
def test_same_key_same_images(name, norm):
    """One key stands for one per example, folded from the position; numpy arrays are as good as any."""
    weights, x, y = _case()
    again = _spec(name, norm).run(jax.tree_util.Partial(_apply, weights), jax.random.key(7), np.array(x), np.array(y))
    np.testing.assert_array_equal(again, _found(name, norm))
    for key in (_keys(np.arange(BATCH)), jax.random.key(7)):
        again = _spec(name, norm).run(jax.tree_util.Partial(_apply, weights), key, x, y)
        np.testing.assert_array_equal(again, _found(name, norm))


@in_one_norm
def test_an_example_does_not_depend_on_its_batch(name, norm):
    """Order, size of the batch (1 too) and the other images change nothing."""
    weights, x, y = _case()
    permuted = np.random.default_rng(1).permutation(BATCH)
    permuted[:4] = permuted[4]
    for rows in (permuted, np.array([5])):
        x_adv = _spec(name, norm).run(jax.tree_util.Partial(_apply, weights), _keys(rows), x[rows], y[rows])
        _same(x_adv, _found(name, norm)[rows])
        np.testing.assert_array_equal(_verdicts(x_adv, y[rows]), _verdicts(_found(name, norm), y)[rows])


@pytest.mark.parametrize("name, norm", [case for case in CASES if ABOUTS[case[0]].takes == "values"])
def test_values_are_all_that_some_see(name, norm):
    weights, x, y = _case()
    found = _spec(name, norm).run(
        jax.tree_util.Partial(lambda w, u: jax.lax.stop_gradient(_apply(w, u)), weights), _keys(np.arange(BATCH)), x, y)
    _same(found, _found(name, norm))


@in_one_norm
def test_inside_jit_and_as_a_plain_closure(name, norm):
    weights, x, y = _case()
    spec = _spec(name, norm)

    @jax.jit
    def traced(weights, keys, x, y):
        return spec.run(lambda u: _apply(weights, u), keys, x, y)

    _same(traced(weights, _keys(np.arange(BATCH)), x, y), _found(name, norm))
    if norm in ("linf", ""):  # compiles again
        _same(spec.run(lambda u: _apply(weights, u), _keys(np.arange(BATCH)), x, y), _found(name, norm))


def _traced(name, norm, x, y, logits_fn, **more):
    """The images' shape and type, by which an attack runs or fails."""
    spec = _spec(name, norm, **more)
    return jax.eval_shape(lambda keys, x, y: spec.run(logits_fn, keys, x, y), _keys(np.arange(len(x))), x, y)


@pytest.mark.parametrize("name, norm, logits, is_wide", [
    *((*case, "float64", True) for case in CASES), *((*case, "bfloat16", False) for case in dict(CASES).items())])
def test_logits_of_any_float_type(name, norm, logits, is_wide):
    """The rest stays in the images' type, without promotions."""
    weights, x, y = _case()
    model = jax.tree_util.Partial(lambda w, u: _apply(w, u).astype(logits), weights)
    with jax.enable_x64(is_wide), jax.numpy_dtype_promotion("strict"):
        assert _traced(name, norm, x, y, model).dtype == x.dtype


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 3), (64, 1, 1)])
@pytest.mark.parametrize("name, norm, more", [
    *(("square", norm, dict(num_queries=1)) for norm in balls.NORMS), ("msd", "", {}), ("rays", "l2", {}),
    *((name, "", {}) for name in ("spatial", "rotation", "fog", "snow")), ("frequency", "", dict(mean=0.45)),
    *(("corruption", "", dict(kind=kind)) for kind in ("fog", "snow", "defocus_blur", "pixelate"))])
def test_images_of_any_shape(name, norm, more, shape):
    x = jnp.full((2, *shape), 0.5)
    model = jax.tree_util.Partial(lambda u: jnp.stack([u.sum((1, 2, 3)), 1 - u.sum((1, 2, 3))], -1))
    assert _traced(name, norm, x, jnp.zeros(2, int), model, **more).shape == x.shape


@in_one_norm
def test_on_four_devices(name, norm):
    weights, x, y = _case()
    mesh = meshes.make()
    assert mesh.size == 4
    index, x_cut, y_cut = (jax.device_put(a, meshes.by_example(mesh)) for a in (np.arange(BATCH), x, y))
    weights = jax.device_put(weights, meshes.replicated(mesh))
    x_adv = _spec(name, norm).run(jax.tree_util.Partial(_apply, weights), _keys(index), x_cut, y_cut)
    assert {shard.data.shape[0] for shard in x_adv.addressable_shards} == {BATCH // 4}, "still cut over the devices"
    _same(x_adv, _found(name, norm))
    np.testing.assert_array_equal(_verdicts(x_adv, y), _verdicts(_found(name, norm), y))


def test_compaction_on_four_devices():
    """Batches that shrink still cut evenly, also with one key for all."""
    weights, x, y = _case()
    mesh = meshes.make()
    rows = np.arange(80) % BATCH
    x_cut, y_cut = (jax.device_put(a[rows], meshes.by_example(mesh)) for a in (x, y))
    weights = jax.device_put(weights, meshes.replicated(mesh))
    attack = parse.attack("pgd", eps=EPS["linf"], num_steps=40, early_stop=True)
    x_adv = attack.run(jax.tree_util.Partial(_apply, weights), jax.random.key(0), x_cut, y_cut)
    alone = attack.run(jax.tree_util.Partial(_apply, weights), jax.random.key(0), x[rows], y[rows])
    np.testing.assert_array_equal(_verdicts(x_adv, y[rows]), _verdicts(alone, y[rows]))
    assert not np.all(_verdicts(x_adv, y[rows]))


@in_ball
def test_eps_0_gives_the_clean_images_bit_for_bit(name, norm):
    weights, x, y = _case()
    x_adv = _spec(name, norm, 0.0).run(jax.tree_util.Partial(_apply, weights), _keys(np.arange(BATCH)), x, y)
    np.testing.assert_array_equal(x_adv, x)


@in_one_norm
def test_no_gradient_flows_through(name, norm):
    weights, x, y = _case()
    spec = _spec(name, norm, num_steps=2)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(weights, x):
        return jnp.sum(spec.run(jax.tree_util.Partial(_apply, weights), jax.random.key(0), x, y)**2)

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients(weights, x)))


@in_one_norm
def test_one_trace_a_configuration(name, norm):
    """Another eps, other images, other weights and a new attack of the same settings compile nothing."""
    weights, x, y = _case()
    traces = []

    def counted(weights, x):
        traces.append(x.shape)
        return _apply(weights, x)

    def attack(eps, weights, x):
        return _spec(name, norm, eps).run(
            jax.tree_util.Partial(counted, weights), _keys(np.arange(len(x))), x, y[:len(x)])

    eps = EPS.get(norm, 0)
    first = attack(eps, weights, x)
    after_one = len(traces)
    assert after_one <= 5  # four passes of a step, and the look at what is attacked
    second = attack(eps / 10, weights, x)
    attack(eps, tuple(2 * w for w in weights), 1 - x)
    assert len(traces) == after_one
    assert np.any(first != second) or not norm
