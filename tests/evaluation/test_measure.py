"""Evaluation on hand-made models: what is counted, and that nothing depends on the batches."""

import dataclasses
import functools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import parse
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.data.split import Arrays
from advmoe_jax.evaluation import black_box, flags, measure, suites, verdicts
from advmoe_jax.models import routing_facts
from advmoe_jax.models.model import Model
from advmoe_jax.ops.statistics import wilson

COUNT, SHAPE, CLASSES = 53, (4, 4, 1), 3


def _linear(weights, view_gain, x):
    """Logits whose gradient, not their value, the view turns or dims; expert 1 where the mean is high."""
    x_seen = jax.lax.stop_gradient(x) + view_gain * (x - jax.lax.stop_gradient(x))
    logits = x_seen.reshape(x.shape[0], -1) @ weights
    ids = jnp.stack([jnp.mean(x, (1, 2, 3)) > 0.5, jnp.zeros(x.shape[0], bool)], 1).astype(jnp.int32)
    return logits, {"expert_ids": ids}


def _nothing(weights, view_gain, x):
    return _linear(weights, view_gain, x)[0], {}


@dataclasses.dataclass(frozen=True)
class _Dense:
    """A models.model.Model of one linear layer, which says nothing of itself."""

    views: tuple[str, ...] = ("none",)
    apply: Callable = _nothing
    kind, about, groups, optim = "linear", "", ("linear",), {"linear": "backbone"}
    surfaces, layers, image_shape, num_classes = {}, (), SHAPE, CLASSES

    def init(self, key):
        return {"params": {"linear": jax.random.normal(key, (16, CLASSES))}, "batch_stats": {"linear": {}}}

    @property
    def shapes(self):
        return jax.eval_shape(self.init, jax.random.key(0))

    def gather(self, parts):
        return dict(parts[0])

    def outputs_fn(self, variables, view="none"):
        gain = {"none": 1.0, "ste_selected": 0.0, "ste_full": -1.0}[view]  # the true, a dead and a wrong gradient
        return jax.tree_util.Partial(self.apply, variables["params"]["linear"], jnp.float32(gain))

    def train_pass(self, variables, x):
        outputs = self.outputs_fn(variables)(x.reshape(-1, *SHAPE))
        logits, aux = jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:2], *leaf.shape[1:]), outputs)
        return logits, aux, variables["batch_stats"]

    def in_training(self, computing):
        return self

    def in_program(self):
        return self

    def metrics(self, passes):
        return {}

    def progress(self, means):
        return ""

    def watch(self, means, batch_size, iterations):
        return ()

    def observe(self, aux):
        return {}

    def facts(self, y, clean, attacked, among):
        return {}

    def fact_tables(self, facts):
        return []

    def costs(self, masks=None, facts=None):
        return {"pathway": 48, "router": 0, "total": 48, "executed": 48, "params": 48}

    def layer_costs(self, masks=None):
        return ()


@dataclasses.dataclass(frozen=True)
class _Routed(_Dense):
    """One whose images take experts, of which it tells."""

    apply: Callable = _linear

    def observe(self, aux):
        return {"experts": aux["expert_ids"]}

    def facts(self, y, clean, attacked, among):
        return routing_facts.facts(clean["experts"], attacked["experts"], among, 2)

    def fact_tables(self, facts):
        return [routing_facts.fact_table(facts)]


@functools.cache
def _case():
    numbers = np.random.default_rng(0)
    weights = jnp.asarray(numbers.standard_normal((16, CLASSES)), jnp.float32)
    images = numbers.integers(0, 256, (COUNT, *SHAPE)).astype(np.uint8)
    logits = images.reshape(COUNT, -1) / 255 @ np.asarray(weights)
    label = np.where(np.arange(COUNT) % 7 == 0, logits.argmin(-1), logits.argmax(-1)).astype(np.int32)
    return weights, Arrays(images, label)


def _run(suite, *, model=_Routed(), batch_size=16, rows=None, seed=0, **more):
    weights, split = _case()
    rows = np.arange(COUNT) if rows is None else rows
    variables = {"params": {"linear": weights}, "batch_stats": {"linear": {}}}
    return measure.run(model, variables, split, rows, suite, mesh=meshes.make(), batch_size=batch_size, seed=seed,
                       **more)


def _found(text, *, model=_Routed(), **more):
    """What a single attack finds, and its record."""
    [suite] = suites.alone(text, "linf", "0.05")
    found = _run(suite, model=model, **more)
    return found, measure.summarize(found, suite, model)


VIEWS = ("none", "ste_selected", "ste_full")
THREE = _Routed(VIEWS)
PGD = "pgd(num_steps=5,eps=0.05)"


@pytest.fixture(scope="module")
def three_views():
    return _found(PGD, model=THREE)


def test_models_of_this_file_are_models():
    """Else what is tested here would not be what evaluations do."""
    names = set(Model.__annotations__) | {name for name in vars(Model) if not name.startswith("_")}
    assert [name for name in sorted(names) for model in (_Dense(), _Routed()) if not hasattr(model, name)] == []


def test_every_image_is_counted_once(three_views):
    found, record = three_views
    assert COUNT % 16 and record["n"] == COUNT
    assert found.clean["label"].shape == found.label.shape == (COUNT,) and found.clean["experts"].shape == (COUNT, 2)
    assert [attempt.view for attempt in found.attempts] == list(VIEWS)
    weights, split = _case()
    np.testing.assert_array_equal(found.clean["label"],
                                  (split.images.reshape(COUNT, -1) / 255 @ weights).argmax(-1))
    np.testing.assert_array_equal(found.label, split.labels)
    assert record["sa"] == pytest.approx(1 - np.mean(np.arange(COUNT) % 7 == 0))
    for attempt in found.attempts:
        np.testing.assert_array_equal(attempt.attacked, found.correct)
        for name in found.clean:
            np.testing.assert_array_equal(attempt.after[name][~attempt.attacked], found.clean[name][~found.correct])


@pytest.mark.parametrize("batch_size", [1, 60])
def test_nothing_depends_on_the_batch_size(three_views, batch_size):
    found, _ = _found(PGD, batch_size=batch_size)
    for name in ("label", "experts"):
        np.testing.assert_array_equal(found.clean[name], three_views[0].clean[name])
        np.testing.assert_array_equal(found.attempts[0].after[name], three_views[0].attempts[0].after[name])


def test_a_part_of_the_images_has_the_same_outcomes(three_views):
    """Keys are folded from the index in the data set, not from the position."""
    rows = np.array([40, 3, 17, 22, 9])
    found, _ = _found(PGD, rows=rows)
    np.testing.assert_array_equal(found.attempts[0].after["label"], three_views[0].attempts[0].after["label"][rows])


def test_robust_is_who_is_right_when_clean_and_under_every_view(three_views):
    found, record = three_views
    survives = np.stack([found.correct & (attempt.after["label"] == found.label) for attempt in found.attempts])
    assert record["ra"] == pytest.approx(survives.all(0).mean())
    assert record["ra_by_view"] == pytest.approx(dict(zip(VIEWS, survives.mean(1))))
    assert record["ra"] <= min(record["ra_by_view"].values()) <= max(record["ra_by_view"].values()) <= record["sa"]
    assert 0 < record["ra_by_view"]["none"] < record["ra_by_view"]["ste_selected"], "a dead gradient is a weaker attack"


def test_together_only_survivors_are_attacked_and_the_worst_case_is_the_same(three_views):
    suite = suites.together(PGD, "linf", "0.05")
    found = _run(suite, model=THREE)
    record = measure.summarize(found, suite, THREE)
    assert (record["attack"], record["ra"], record["ra_by_view"]) == ("pgd-5", three_views[1]["ra"], {})
    np.testing.assert_array_equal(found.survivors(), three_views[0].survivors())
    attacked = [attempt["attacked"] for attempt in record["attempts"]]
    assert attacked[0] == found.correct.sum() > attacked[1] >= attacked[2]
    assert [a["attacked"] - a["broken"] for a in record["attempts"]][:2] == attacked[1:]
    assert [a["ra_after"] for a in record["attempts"]][-1] == record["ra"]


def test_an_attack_without_gradients_runs_once():
    found, record = _found("square(num_queries=30)", model=THREE)
    assert [attempt.view for attempt in found.attempts] == ["no gradient"] and record["ra"] < record["sa"]


def test_an_image_that_is_wrong_when_clean_is_not_robust():
    """It is not attacked either: an attack might push it back to its label."""
    found, record = _found("fgsm(eps=0.9)", model=_Routed(("ste_full",)))
    assert 0 < record["sa"] < 1 and record["ra"] <= record["sa"]
    assert not np.any(found.survivors()[~found.correct]) and not np.any(found.attempts[0].attacked[~found.correct])


@pytest.mark.parametrize("text", [
    "fgsm(eps=0)", "pgd(eps=0,num_steps=5)", "fgsm(eps=0,norm=l2)", "fgsm(eps=0,norm=l1)"])
def test_eps_0_is_the_clean_accuracy(text):
    found, record = _found(text)
    np.testing.assert_array_equal(found.attempts[0].after["label"], found.clean["label"])
    assert record["ra"] == record["sa"] and record["largest_norm"] == 0
    assert record["ra_interval"] == record["sa_interval"] == wilson(round(record["sa"] * COUNT), COUNT)
    assert record["facts"]["flip_rate"] == [0, 0]


def test_a_stopped_run_goes_on_from_its_log(three_views):
    """Killed after any batch, it ends with the same, and attacks nothing twice."""
    suite = suites.together(f"{PGD} fgsm", "linf", "0.05")
    whole = verdicts.Memory()
    expected = _run(suite, model=THREE, log=whole)
    assert len(whole) > 6
    for kept in (1, len(whole) // 2, len(whole) - 1, len(whole)):
        log = verdicts.Memory(whole[:kept])
        found = _run(suite, model=THREE, log=log)
        np.testing.assert_array_equal(found.survivors(), expected.survivors())
        assert len(log) == len(whole)
        for (record, arrays), (again, same) in zip(whole, log):
            assert {**record, "seconds": 0} == {**again, "seconds": 0}
            np.testing.assert_array_equal(arrays["x_adv"], same["x_adv"])
    assert _run(suite, model=THREE).survivors().tolist() == expected.survivors().tolist()


def test_adversarial_images_are_those_of_the_first_attempt_that_broke_them():
    suite = suites.together(f"fgsm {PGD}", "linf", "0.05")
    log = verdicts.Memory()
    found = _run(suite, log=log)
    kept = verdicts.adversarial(found, log)
    broken = found.correct & ~found.survivors()
    np.testing.assert_array_equal(kept["index"], np.flatnonzero(broken))
    weights, split = _case()
    predicted = (kept["x_adv"].reshape(len(kept["index"]), -1) @ weights).argmax(-1)
    assert np.all(predicted != split.labels[broken])
    x = split.images[broken] / np.float32(255)
    assert np.all(np.abs(kept["x_adv"] - x) <= 0.05 + 1e-6) and len(kept["index"]) > 3


def test_a_batch_that_does_not_fit_is_halved():
    sizes = []

    def greedy(logits_fn, key, x, y):
        sizes.append(x.shape[0])
        if x.shape[0] > 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return jnp.clip(x + 0.01, 0, 1)

    config = parse.attack("fgsm", eps=0.05).config
    found = _run(suites.Suite("greedy", (parse.Spec("greedy", config, greedy, "greedy"),), True), batch_size=32)
    assert sizes[:3] == [32, 16, 8] and max(sizes[3:]) <= 8
    assert len(found.survivors()) == COUNT


def test_what_did_not_fit_once_is_not_tried_again(monkeypatch):
    """From the clean pass on; what is too large for one image a device is an error."""
    sizes, predict = [], verdicts._predict

    def greedy(outputs_fn, x, y, limit=8):
        sizes.append(x.shape[0])
        if x.shape[0] > limit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return predict(outputs_fn, x, y)

    monkeypatch.setattr(verdicts, "_predict", greedy)
    _run(suites.together("fgsm pgd(num_steps=2)", "linf", "0.05"), batch_size=32)
    assert sizes[:3] == [32, 16, 8] and max(sizes[3:]) == 8
    monkeypatch.setattr(verdicts, "_predict", functools.partial(greedy, limit=0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        _run(suites.together("fgsm", "linf", "0.05"), batch_size=32)


def test_noise_of_a_fixed_strength_has_no_budget():
    for text in ("gaussian_noise(sigma=0.2,draws=2)", "salt_pepper(amount=1/4,draws=1)"):
        found, record = _found(text)
        assert 0.05 < np.max(found.attempts[0].after["linf"]) and 0 < record["ra"] < record["sa"]


def test_columns_of_a_suite(three_views):
    """Each attack's own accuracy, and through each view that of all its attacks."""
    suite = suites.Suite("two", suites.together(f"fgsm {PGD}", "linf", "0.05").specs, False)
    found = _run(suite, model=THREE)
    record = measure.summarize(found, suite, THREE)
    for attempt, told in zip(found.attempts, record["attempts"], strict=True):
        assert told["ra"] == found.survivors([attempt]).mean()
    for view in VIEWS:
        both = [attempt for attempt in found.attempts if attempt.view == view]
        assert len(both) == 2 and record["ra_by_view"][view] == found.survivors(both).mean()
    assert record["ra"] == found.survivors().mean() <= min(record["ra_by_view"].values())
    for of, spec in zip(record["by_attack"], suite.specs, strict=True):
        rate = found.survivors([attempt for attempt in found.attempts if attempt.spec is spec]).mean()
        assert of == {"attack": spec.label, "norm": "linf", "eps": "0.05", "ra": rate} and record["ra"] <= rate


def test_unions_are_worst_cases_on_the_same_images():
    """Of PGD in several norms, and of all: no larger than any of their rows."""
    suite = suites.together("three: pgd(num_steps=2) fgsm(norm=l2,eps=0.3) pgd(norm=l2,eps=0.3,num_steps=2)", "linf",
                            "0.05")
    found = _run(suite, model=_Dense())
    record = measure.summarize(found, suite, _Dense())
    both = [found.attempts[0], found.attempts[2]]
    assert record["unions"] == {"all PGD": found.survivors(both).mean()}
    rates = [of["ra"] for of in record["by_attack"]]
    assert record["ra"] <= record["unions"]["all PGD"] <= min(rates[0], rates[2]) <= record["sa"]
    together = measure.summarize(found, suites.Suite("a", suite.specs, True), _Dense())
    assert together["by_attack"] == [] and together["unions"] == {}


def test_suites_of_one_command_watch_each_other():
    """PGD through a dead gradient finds nothing; Square beside it does, and the accuracy cannot be trusted."""
    gradient, blind = suites.alone("pgd(num_steps=2) square(num_queries=60)", "linf", "0.2")
    model = _Routed(("ste_selected",))
    found = _run(gradient, model=model)
    assert not measure.summarize(found, gradient, model)["unreliable"]
    second = _run(blind, model=model)
    assert not measure.summarize(second, blind, model)["unreliable"]
    record = measure.summarize(second, blind, model, earlier=found.attempts)
    assert "black_box_wins" in _said(record) and record["unreliable"]


def test_expert_load(three_views):
    found, record = three_views
    facts = record["facts"]
    load = np.array(facts["load"])
    assert load.shape == (2, 2) and np.allclose(load.sum(-1), 1)
    high = np.mean(_case()[1].images.reshape(COUNT, -1) / 255, 1) > 0.5
    np.testing.assert_allclose(load, [[1 - high.mean(), high.mean()], [1, 0]], atol=1e-6)
    assert 0 < facts["load_entropy"][0] <= 1 and facts["load_entropy"][1] == pytest.approx(0, abs=1e-6)
    worst = min(found.attempts, key=lambda attempt: found.survivors([attempt]).mean())
    flips = (worst.after["experts"] != found.clean["experts"])[found.correct].mean(0)
    np.testing.assert_allclose(facts["flip_rate"], flips)
    assert [(table["title"], len(table["rows"])) for table in record["fact_tables"]] == [("Routing", 2)]
    assert json.loads(json.dumps(record)) | {"fact_tables": None} == record | {
        "fact_tables": None, "sa_interval": list(record["sa_interval"]), "ra_interval": list(record["ra_interval"])}


def test_a_dense_network_has_no_load():
    found, record = _found("fgsm(eps=0.05)", model=_Dense())
    assert "experts" not in found.clean and "experts" not in found.attempts[0].after
    assert record["facts"] == {} and record["fact_tables"] == []


def test_record_says_what_was_measured(three_views):
    _, record = three_views
    assert (record["attack"], record["norm"], record["eps"], record["eps_value"]) == ("pgd-5", "linf", "0.05", 0.05)
    assert record["settings"]["num_steps"] == "5"
    assert 0 < record["largest_norm"] <= 0.05 * (1 + 1e-4)
    correct = round(record["sa"] * COUNT)
    for attempt in record["attempts"]:  # an iterate is looked at before each of the 5 steps and after the last
        assert attempt["attacked"] == correct and attempt["forward"] == attempt["backward"] == 6 * correct
        assert attempt["executed_forward"] == 6 * 16 * -(-correct // 16)


def _nan(weights, view_gain, x):
    logits, aux = _linear(weights, view_gain, x)
    return jnp.where(jnp.mean(x, (1, 2, 3), keepdims=True)[..., 0, 0] > 0.5, jnp.nan, logits), aux


def _said(record):
    return {flag["name"]: flag["reason"] for flag in record["flags"] if flag["unreliable"]}


def _nan_scores(weights, view_gain, x):
    """Of the router, once an image is attacked; the logits are as they were."""
    logits, aux = _linear(weights, view_gain, x)
    scores = jnp.where((jnp.abs(255 * x - jnp.round(255 * x)) > 1e-3).any((1, 2, 3))[:, None], jnp.nan, logits)
    return logits, aux | {"router_logits": scores}


def test_what_is_not_finite_is_named():
    """Scores of a router too, which then takes its first expert; of the weights; and the values of another view."""
    found, record = _found("fgsm(eps=0.05)", model=_Routed(apply=_nan_scores))
    assert record["unreliable"] and _said(record)["not_finite"] == (
        f"logits or router scores are NaN or infinite on {found.correct.sum()} images, fgsm (none): expected none")
    assert record["ra"] == _found("fgsm(eps=0.05)")[1]["ra"]
    weights, split = _case()
    variables = {"params": {"linear": weights.at[0, 0].set(jnp.nan)}, "batch_stats": {"linear": {}}}
    [flag] = flags.of_weights(variables)
    assert "1 tensors" in flag.reason and "params/linear" in flag.reason
    views = {"same": lambda x: x, "other": lambda x: jnp.where(x > 2, jnp.nan, x)}
    [flag] = flags.of_views(jax.tree_util.Partial(lambda x: x), {
        name: jax.tree_util.Partial(view) for name, view in views.items()}, jnp.asarray([[1., 2., 3.]]))
    assert "gradient other the model" in flag.reason


def test_a_second_look_counts_and_columns_stay(three_views):
    """A dead gradient breaks nothing, Square does; the columns are those of the suite."""
    [suite] = suites.alone("pgd(num_steps=2)", "linf", "0.2")
    model = _Routed(("ste_selected",))
    found = _run(suite, model=model, checks=black_box.checks(suite.specs))
    record = measure.summarize(found, suite, model)
    first, second = record["attempts"]
    assert (first["attack"], second["attack"], second["view"]) == ("pgd-2", "square-300", "no gradient")
    assert second["attacked"] == verdicts.MOST_CHECKED < first["attacked"] - first["broken"]
    assert record["ra_by_view"] == {"ste_selected": first["ra"]} and "ra" not in second
    assert record["ra"] == pytest.approx(first["ra"] - second["broken"] / COUNT) and record["unreliable"]
    assert f"broke {second['broken']} of 32" in _said(record)["black_box_wins"]
    unchecked = measure.summarize(_run(suite, model=model), suite, model)
    assert unchecked["ra"] == first["ra"] and [flag["name"] for flag in unchecked["flags"]] == ["not_checked"]


def test_nan_logits_are_wrong():
    found, record = _found("fgsm(eps=0)", model=_Routed(apply=_nan))
    assert "clean" in _said(record)["not_finite"]
    high = np.mean(_case()[1].images.reshape(COUNT, -1) / 255, 1) > 0.5
    assert 0.2 < high.mean() < 0.8
    np.testing.assert_array_equal(found.clean["label"] == -1, high)
    assert record["sa"] == pytest.approx(np.mean((np.arange(COUNT) % 7 != 0) & ~high))


@pytest.mark.parametrize("norm, leave", [
    pytest.param("linf", lambda x: jnp.clip(x + 0.2, 0, 1), id="linf"),
    pytest.param("l2", lambda x: jnp.clip(x + 0.1, 0, 1), id="l2"),
    pytest.param("l1", lambda x: jnp.clip(x + 0.05, 0, 1), id="l1"),
    pytest.param("linf", lambda x: x - 0.05, id="below 0"), pytest.param("linf", lambda x: x + 0.05, id="above 1"),
    pytest.param("linf", lambda x: x * jnp.nan, id="nan"),
    pytest.param("linf", lambda x: x.at[3].mul(jnp.nan), id="one nan")])
def test_an_attack_that_leaves_its_budget_is_refused(norm, leave):
    config = parse.attack("fgsm", norm=norm, eps=0.1).config
    spec = parse.Spec("cheat", config, lambda fn, key, x, y: leave(x), "cheat")
    with pytest.raises(UserError, match="cheat left its budget.*discarded"):
        _run(suites.Suite("cheat", (spec,), True))


@pytest.mark.parametrize("successes, n, low, high", [
    (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (81, 263, 0.25529, 0.36621),
    (0, 0, 0.0, 1.0)])
def test_wilson_interval(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)
