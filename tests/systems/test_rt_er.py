"""RT-ER and JTDMoE: the losses against their formulas, whom attacks attack, what rests, and what is refused.

What every system promises is in test_steps.py. Networks of one block and width 4, two experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_images

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import dual
from advmoe_jax.models import model as models
from advmoe_jax.systems import rt_er
from advmoe_jax.train import state as states

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, BATCH = (8, 8, 1), 4, 16
BASE = ("model.num_experts=1", "model.model_scale=1", "model.depth=4", "model.width=4", "model.num_members=2",
        "model.gate=linear", "model.serve=top-1", f"data.batch_size={BATCH}", "train.length=3 steps",
        "train.attack=pgd(num_steps=1,keep=last)", "data.pad=0", "data.flip=false")


def _config(*overrides, model="mixture"):
    config = configs.default(system="rt_er", model=model)
    configs.override_all(config, [*BASE, *overrides])
    return config


@functools.cache
def _model(name):
    """A model whose gates send some images to each expert, and whose experts are sure of what they say."""
    model = models.make(_config(model=name).model, SHAPE, CLASSES)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    for group, params in variables["params"].items():
        linear = params["backbone"]["linear"]
        linear["kernel"] = 100 * linear["kernel"]
        if group.endswith("gate"):
            kernel = np.random.default_rng(len(group)).normal(size=linear["kernel"].shape).astype(np.float32)
            params["backbone"]["linear"] = {"kernel": kernel, "bias": -np.asarray(
                _images()[0].reshape(BATCH, -1) @ kernel).mean(0)}
    return model, variables


@functools.cache
def _images():
    """Clean images, those that attack the mixture, and those that attack each expert."""
    return tuple(jax.random.uniform(jax.random.key(i), (BATCH, *SHAPE)) for i in range(4))


@functools.cache
def _by_group(name):
    """{group: (images, BATCH, outputs)} of each network alone, in evaluation mode."""
    model, variables = _model(name)
    mixture = model if name == "mixture" else model.mixture
    found = {}
    for group in model.groups:
        net = mixture.gate if group.endswith("gate") else mixture.experts[0]
        own = {part: trees[group] for part, trees in variables.items()}
        found[group] = np.asarray(_applied(net, own, jnp.concatenate(_images()))).reshape(len(_images()), BATCH, -1)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _applied(net, variables, x):
    return net.apply(variables, x)[0]


def _log_p(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _kl(p, q):
    return (np.exp(_log_p(p)) * (_log_p(p) - _log_p(q))).sum(-1)


def _loss(name, adversarial, objective, *overrides):
    config = _config(*overrides, model=name)
    model, variables = _model(name)
    run = objective(model, config)
    clean, *_ = _images()

    @jax.jit
    def of(variables, adversarial):
        loss, (_, metrics) = run(states.fresh(variables, {}), {
            "image": clean, "adversarial": jnp.stack(adversarial, 1), "label": LABELS})
        return loss, metrics

    return of(variables, adversarial)


LABELS = np.arange(BATCH, dtype=np.int32) % CLASSES


@pytest.mark.parametrize("which", ["second", *(pytest.param(of, marks=pytest.mark.slow) for of in ("every", "none"))])
def test_the_loss_of_a_mixture_is_its_formula(which):
    """The best expert answers on the attacked image; of the second, or of each, what its own attack changes counts."""
    nets, (_, adv, *own) = _by_group("mixture"), _images()
    attacks = {"second": own[:1], "every": own, "none": []}[which]
    loss, metrics = _loss("mixture", (adv, *attacks), rt_er._of_mixture, f"system.experts={which}", "system.beta=3")
    experts, rows = np.stack([nets["expert0"], nets["expert1"]], 2), np.arange(BATCH)  # (images, B, M, K)
    gate = nets["gate"]
    assert {0, 1} == set(gate[0].argmax(-1)), "both experts lead somewhere"
    answer = experts[1][rows, gate[1].argmax(-1)]
    ce = -_log_p(answer)[rows, LABELS].mean()
    second = 1 - gate[0].argmax(-1)
    change = (_kl(experts[0], experts[2])[rows, second] if which == "second" else
              sum(_kl(experts[0, :, i], experts[2 + i, :, i]) for i in range(2)))
    if which == "none":
        assert "expert_kl" not in metrics and float(loss) == pytest.approx(ce, rel=1e-3)
    else:
        assert float(metrics["expert_kl"]) == pytest.approx(change.mean(), rel=1e-3)
        assert float(loss) == pytest.approx(ce + 3 * change.mean(), rel=1e-3)
    assert float(metrics["ra"]) == pytest.approx((answer.argmax(-1) == LABELS).mean())


@pytest.mark.slow
def test_the_standard_mixture_of_a_dual_model_learns_what_both_say():
    """Cross-entropy of (1 - alpha) F_S + alpha F_R on clean images."""
    nets = _by_group("dual")
    loss, metrics = _loss("dual", _images()[1:3], rt_er._of_standard)
    rows = np.arange(BATCH)
    answers = {part: np.stack([nets[f"{part}_expert{i}"][0] for i in range(2)], 1)[
        rows, nets[f"{part}_gate"][0].argmax(-1)] for part in dual.PARTS}
    whole = 0.3 * answers["standard"] + 0.7 * answers["robust"]
    assert float(loss) == pytest.approx(-_log_p(whole)[rows, LABELS].mean(), rel=1e-3)
    model, variables = _model("dual")
    logits, aux = jax.jit(lambda variables, x: model.outputs_fn(variables)(x))(variables, _images()[0])
    np.testing.assert_allclose(logits, whole, rtol=1e-3, atol=1e-4)
    weights = np.exp(_log_p(np.asarray(aux["gate_logits"])))
    np.testing.assert_allclose(weights.reshape(BATCH, 2, 2).sum(-1), np.tile([0.3, 0.7], (BATCH, 1)), rtol=1e-4)
    assert metrics["sa"] == pytest.approx((whole.argmax(-1) == LABELS).mean())


@pytest.mark.slow
@pytest.mark.parametrize("which", ["second", "every"])
def test_each_expert_is_attacked_alone(which):
    """Its images raise its own loss most, and all stay in the ball."""
    config = _config(f"system.experts={which}", "train.attack=pgd(num_steps=10,keep=last)", "attack.eps=0.1")
    model, variables = _model("mixture")
    attack, (clean, *_) = rt_er._beside(config, model, lambda *_: None), _images()
    x_adv = jax.jit(attack)(variables, jax.random.key(0), clean, LABELS, np.arange(BATCH), 0)
    assert x_adv.shape == (BATCH, 2 if which == "second" else 3, *SHAPE)
    assert np.abs(x_adv - clean[:, None]).max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    lead = _by_group("mixture")["gate"][0].argmax(-1)

    def loss(expert, x):
        own = {part: trees[f"expert{expert}"] for part, trees in variables.items()}
        return -_log_p(np.asarray(_applied(model.experts[0], own, x)))[np.arange(BATCH), LABELS]

    for expert in range(2):
        rows = lead != expert if which == "second" else np.ones(BATCH, bool)
        own, other = x_adv[:, 1 if which == "second" else 1 + expert], x_adv[:, 0 if which == "second" else 2 - expert]
        assert loss(expert, own)[rows].mean() > loss(expert, other)[rows].mean()


def test_a_gate_without_a_gradient_rests():
    """As released; where it learns, or experts are mixed, it is trained."""
    def owned(name, *overrides):
        config = _config(*overrides, model=name)
        data = random_images.data(32)
        system = rt_er.make(config, models.make(config.model, SHAPE, CLASSES), data, meshes.make(), {})
        return [step.owns for step in system.steps], system.describe

    assert owned("mixture", "system.gate_grad=served") == (
        [("expert0", "expert1")], "RT-ER: mixture of 2 Dense, the 1 best of the gate")
    assert owned("mixture")[0] == [("gate", "expert0", "expert1")]
    steps, title = owned("dual", "system.gate_grad=served")
    assert steps == [("robust_expert0", "robust_expert1"), ("standard_expert0", "standard_expert1")]
    assert title.startswith("JTDMoE: dual model of alpha 0.7")


def test_two_mixtures_become_a_dual_model():
    model, variables = _model("dual")
    parts = [dual.of_part(variables, part)["params"] for part in dual.PARTS]
    assert parts[0].keys() == {"gate", "expert0", "expert1"}
    assert model.gather(parts) == variables["params"] == model.gather([variables["params"]])
    with pytest.raises(UserError, match="init_from names 3 runs: expected two mixtures"):
        model.gather([*parts, parts[0]])


@pytest.mark.parametrize("overrides, model, says", [
    ([], "resnet", "model.name is resnet: expected mixture or dual"),
    (["model.gate=uniform", "model.serve=all"], "mixture", "model.gate is uniform"),
    (["model.alpha=1"], "dual", "model.alpha is 1: expected less"),
    (["system.loss=natural"], "dual", "system.loss is natural with model.name=dual"),
    (["system.loss=natural", "system.beta=3"], "mixture", "no effect"),
    (["model.serve=all", "system.gate_grad=served"], "mixture", "no effect"),
    (["train.several=mean"], "mixture", "train.several is mean"), (["system.loss=trades"], "mixture", "madry"),
    (["system.experts=all"], "mixture", "every")])
def test_bad_input_is_said_in_a_line(overrides, model, says):
    with pytest.raises(UserError) as error:
        config = configs.default(system="rt_er", model=model)
        configs.override_all(config, [*(BASE if model != "resnet" else ("model.num_experts=1",)), *overrides])
        configs.check(config)
    assert says in str(error.value) and "\n" not in str(error.value)
