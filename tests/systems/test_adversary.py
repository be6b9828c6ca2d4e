"""The adversary of training: what its text names is what evaluations would make, and several attacks count as told.

A network of one block on random images, as it is before training.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXACT, slow_but

from advmoe_jax.attacks import objectives, parse
from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Arrays
from advmoe_jax.models import network
from advmoe_jax.ops import losses
from advmoe_jax.systems import adversarial, adversary, standard
from advmoe_jax.train import state as states

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, COUNT, BATCH = (8, 8, 1), 4, 32, 8
PGD = "pgd(num_steps=2,step_size=0.5 eps)"
OTHER = "pgd(norm=l2,eps=0.4,num_steps=2,loss=margin)"
KEY, INDEX = jax.random.key(3), np.arange(BATCH, dtype=np.int32)[::-1] + 5
DENSE, MOE = "model.num_experts=1", "model.num_experts=2"


def _config(*texts):
    config = configs.default(system="standard")
    configs.override_all(config, ["model.depth=4", "model.width=8", f"data.batch_size={BATCH}", "train.length=2 steps",
                                  "data.pad=1", *texts])
    configs.check(config)
    return config


@functools.cache
def _model(experts=DENSE):
    """A network, and variables that tell images apart more than fresh ones do."""
    net = network.make(_config(experts).model, SHAPE, CLASSES)
    variables = jax.jit(net.init)(jax.random.key(0))
    params = dict(variables["params"])
    linear = params["backbone"]["linear"]
    params["backbone"] |= {"linear": linear | {"kernel": 100 * linear["kernel"]}}
    if "router" in params:
        params["router"] = jax.tree.map(lambda leaf: 10 * leaf, params["router"])
    return net, variables | {"params": params}


@functools.cache
def _images():
    return jnp.asarray(np.random.default_rng(0).uniform(size=(BATCH, *SHAPE)), jnp.float32)


@functools.cache
def _labels(experts=DENSE):
    """(B,) what the network says of the images, but for the last one."""
    net, variables = _model(experts)
    found = np.argmax(net.outputs_fn(variables)(_images())[0], -1).astype(np.int32)
    return np.append(found[:-1], (found[-1] + 1) % CLASSES).astype(np.int32)


@functools.cache
def _attacked(text, *more, loss="madry", step=0, experts=DENSE):
    """(B, A, H, W, C) images that the training by `loss` would see in iteration `step`."""
    config = _config(experts, f"train.attack={text}", f"system.loss={loss}", *more)
    net, variables = _model(experts)
    attack = adversary.training_attack(net, config, "kl" if loss == "trades" else "ce")
    return np.asarray(jax.jit(attack, compiler_options=EXACT)(variables, KEY, _images(), _labels(experts), INDEX, step))


def _evaluated(text, loss, experts=DENSE):
    """(B, H, W, C) images that the same attack makes alone, with one key an image as in evaluation."""
    net, variables = _model(experts)
    [spec] = parse.attacks(text, norm="linf", eps="8/255", loss=objectives.NAMED[loss])
    outputs_fn = net.outputs_fn(variables)
    goal = outputs_fn(_images())[0] if loss == "kl" else _labels(experts)
    attack = jax.jit(lambda logits_fn, keys, x, goal: spec.run(logits_fn, keys, x, goal), compiler_options=EXACT)
    return np.asarray(attack(objectives.logits_fn(outputs_fn), rng.per_example(KEY, INDEX), _images(), goal))


@pytest.mark.parametrize("text, loss, raises", slow_but(lambda case: case[0] == PGD or case[1] == "trades", [
    (PGD, "madry", "ce"), (PGD, "mart", "ce"), (PGD, "trades", "kl"),
    ("pgd(num_steps=2,step_size=0.625 eps,start=gaussian,keep=last)", "trades", "kl"),
    ("fgsm", "madry", "ce"), ("apgd(num_steps=3)", "madry", "ce"), ("apgd(num_steps=3)", "trades", "kl")]))
def test_one_attack_is_that_of_an_evaluation(text, loss, raises):
    """With the same settings and the objective of what is trained it makes the same images, and changes them."""
    found = _attacked(text, loss=loss)
    assert found.shape == (BATCH, 1, *SHAPE)
    np.testing.assert_array_equal(found[:, 0], _evaluated(text, raises))
    assert np.mean(np.any(found[:, 0] != _images(), (1, 2, 3))) > 0.5


@pytest.mark.parametrize("text", slow_but(lambda text: text == OTHER or "ce" in text or "square" in text, [
    "pgd(num_steps=2,loss=ce)", OTHER, "fgsm(loss=margin)", "apgd(num_steps=3,targets=2,loss=dlr)",
    "square(num_queries=4)", "deepfool(num_steps=2)"]))
def test_an_attack_may_raise_another_loss(text):
    """Under TRADES one that names a loss of the labels raises that; so does one that knows no other."""
    found = _attacked(text, loss="trades")
    np.testing.assert_array_equal(found[:, 0], _evaluated(text, "ce"))
    np.testing.assert_array_equal(found, _attacked(text, loss="madry"))
    assert np.any(found[:, 0] != _images())
    if text.startswith("pgd(num_steps=2,"):
        assert np.any(found != _attacked("pgd(num_steps=2)", loss="trades"))


def _losses(found, loss):
    """(B, A) of what is trained."""
    net, variables = _model()
    outputs_fn = net.outputs_fn(variables)
    clean, _ = outputs_fn(_images())

    def of(x):
        logits, _ = outputs_fn(x)
        return losses.kl(clean, logits) if loss == "trades" else losses.cross_entropy(logits, _labels())

    return np.stack([of(found[:, i]) for i in range(found.shape[1])], 1)


def _each(loss):
    return np.concatenate([_attacked(text, loss=loss) for text in (PGD, OTHER)], 1)


def test_several_attacks_take_turns():
    """By the number of the iteration, as the text has them, and round again."""
    each = _each("madry")
    assert np.any(each[:, 0] != each[:, 1])
    for step in range(5):
        found = _attacked(f"{PGD} {OTHER}", step=step)
        np.testing.assert_array_equal(found, each[:, [step % 2]])
    assert np.any(_attacked(f"{OTHER} {PGD}") != each[:, [0]])


@pytest.mark.parametrize("loss", ["madry", "trades"])
def test_the_worst_attack_of_each_image(loss):
    """Is the one of the larger loss that is trained, not one attack for all images nor the one that is broken."""
    each = _each(loss)
    values = _losses(each, loss)
    chosen = np.argmax(values, 1)
    assert set(chosen) == {0, 1}
    found = _attacked(f"{PGD} {OTHER}", "train.several=worst", loss=loss)
    np.testing.assert_array_equal(found, each[np.arange(BATCH), chosen][:, None])


def test_the_attack_of_the_largest_loss_on_the_batch():
    """One for all images, that of the larger mean."""
    each = _each("madry")
    chosen = np.argmax(_losses(each, "madry").mean(0))
    np.testing.assert_array_equal(_attacked(f"{PGD} {OTHER}", "train.several=largest"), each[:, [chosen]])


@pytest.mark.parametrize("loss", ["madry", "trades"])
def test_the_mean_over_attacks_keeps_all_images(loss):
    np.testing.assert_array_equal(_attacked(f"{PGD} {OTHER}", "train.several=mean", loss=loss), _each(loss))


@pytest.mark.parametrize("loss", ["madry", "trades", "mart"])
def test_the_loss_of_several_images_is_the_mean_of_their_losses(loss):
    """Each pass has statistics of its own; "ra" is the mean too, and "sa" that of the clean images."""
    net, variables = _model()
    run = adversarial.objective(net, _config(DENSE, f"system.loss={loss}"))
    both = jnp.asarray(_each("madry"))

    @jax.jit
    def of(adversarial_images):
        batch = {"image": _images(), "adversarial": adversarial_images, "label": _labels()}
        value, (_, metrics) = run(states.fresh(variables, {}), batch)
        return {"loss": value} | metrics

    together, *alone = of(both), of(both[:, :1]), of(both[:, 1:])
    assert alone[0]["loss"] != alone[1]["loss"]
    assert together.keys() == alone[0].keys() == {"loss", "ra"} | ({"sa"} if loss != "madry" else set())
    for name, value in together.items():
        assert value == pytest.approx(float(alone[0][name] + alone[1][name]) / 2, rel=1e-5), name


# The adversary and the router.


def _scores_moved(found):
    """(B,) KL of the router's scores from clean to attacked images."""
    net, variables = _model(MOE)
    outputs_fn = net.outputs_fn(variables)
    clean, attacked = (outputs_fn(x)[1]["router_logits"] for x in (_images(), found[:, 0]))
    return np.mean(losses.kl(clean, attacked), -1)


def test_an_attack_that_weighs_the_router_moves_its_scores():
    """Where the weight is large that is nearly all it does; where it is 0 the router is let be."""
    text = "pgd(num_steps=4)"
    plain, weighed = (_attacked(text, f"attack.router_weight={weight}", experts=MOE) for weight in (0, 1e5))
    np.testing.assert_array_equal(plain[:, 0], _evaluated(text, "ce", experts=MOE))
    before, after = _scores_moved(plain), _scores_moved(weighed)
    assert np.mean(after) > 2 * np.mean(before) > 0 and np.mean(after > before) > 0.8, (before, after)


def test_a_model_s_other_surfaces_are_attacked():
    """An attack of routes takes the routed function, as in evaluation, and a network without routes is refused."""
    text = "adaptive(mode=joint,num_steps=5)"
    net, variables = _model(MOE)
    [spec] = parse.attacks(text, norm="linf", eps="8/255")
    attack = jax.jit(lambda routed_fn, keys: spec.run(routed_fn, keys, _images(), _labels(MOE)), compiler_options=EXACT)
    expected = attack(net.surfaces["routed"](variables), rng.per_example(KEY, INDEX))
    found = _attacked(text, experts=MOE)
    np.testing.assert_array_equal(found[:, 0], expected)
    assert np.any(found[:, 0] != _images())


# What is refused, before anything is trained.


def _data():
    split = Arrays(np.zeros((COUNT, *SHAPE), np.uint8), np.zeros(COUNT, np.int32))
    return pipeline.Data(split, np.arange(COUNT), split, np.arange(4), split, CLASSES, SHAPE)


def _message(function):
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text, words", [
    ("pdg", ["pdg", "did you mean 'pgd'"]), ("pgd(num_stepz=2)", ["num_stepz", "num_steps"]),
    ("pgd(num_steps=0)", ["num_steps"]),
    ("pgd(", ["cannot be read"]), ("", ["no attack is named"]), (f"{PGD} pdg", ["pdg"]),
    ("pgd(loss=cee)", ["cee"]), ("pgd(norm=l2)", ["no eps"])])
def test_an_attack_that_is_none_is_refused(text, words):
    """When the config is checked: no data has been read."""
    message = _message(lambda: _config(DENSE, f"train.attack={text}"))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text, experts, words", [
    ("adaptive", DENSE, ["adaptive", "router_logits", "S-Dense"]), ("exits", MOE, ["exits", "member_logits", "MoE"]),
    (f"{PGD} exits", DENSE, ["exits", "member_logits"]),
    ("apgd(targets=2)", DENSE, ["apgd", "targets=2", "ce, margin, dlr"])])
def test_an_attack_that_the_model_cannot_take_is_refused(text, experts, words):
    """When the system is made, by one that is good for others."""
    config = _config(experts, f"train.attack={text}")
    net = network.make(config.model, SHAPE, CLASSES)
    message = _message(lambda: standard.make(config, net, _data(), meshes.make(), {}))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("field", ["train.attack=fgsm", "train.several=mean", "attack.router_weight=1"])
def test_natural_training_has_no_adversary(field):
    """Fields of one are refused, and no images are made."""
    message = _message(lambda: _config(MOE, "system.loss=natural", field))
    assert field.partition("=")[0] in message and "no effect" in message


@pytest.mark.parametrize("several", slow_but(lambda several: several == "worst", ["turn", "pass", "worst", "mean"]))
def test_a_system_trains_against_several(several):
    """Through the compiled programs of the steps, on four devices: images made with the iteration's attack."""
    config = _config(DENSE, f"train.attack={PGD} {OTHER}", f"train.several={several}", "system.loss=madry",
                     "data.pad=0", "data.flip=false")
    mesh, (net, _) = meshes.make(), _model()
    system = standard.make(config, net, _data(), mesh, {})
    [step] = system.steps
    images = np.asarray(255 * _images()).astype(np.uint8)
    batch = pipeline.device_batch(mesh, Arrays(images, _labels()), np.arange(BATCH))
    state, made = system.init(jax.random.key(0)), []
    for number in (0, COUNT // BATCH) if several == "pass" else (0, 1):
        state = state.replace(step=jax.device_put(np.int32(number), meshes.replicated(mesh)))
        made.append(step.prepare(state, batch, step.inputs))
    assert made[0]["adversarial"].shape == (BATCH, 2 if several == "mean" else 1, *SHAPE)
    change = [np.asarray(found["adversarial"]) - np.asarray(found["image"])[:, None] for found in made]
    in_linf = [np.abs(values).max((0, 2, 3, 4)) <= 8 / 255 + 1e-6 for values in change]
    assert [list(each) for each in in_linf] == {
        "turn": [[True], [False]], "pass": [[True], [False]], "worst": [[False], [False]],
        "mean": [[True, False], [True, False]]}[several]
    _, metrics = step.update(state, made[1])
    assert metrics["non_finite"] == -1 and np.isfinite(metrics["loss"])
