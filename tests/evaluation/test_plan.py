"""What an evaluation is asked for, what of it is left to do, and what is refused before it begins."""

import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import plan, results, suites

COUNT, SEED = 50, 3


def _config(**fields):
    config = configs.default()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def _asked(**fields):
    return plan.asked(_config(**fields))


def test_training_s_threat_unless_it_says_otherwise():
    [suite] = _asked()
    assert (suite.name, suite.norm, suite.eps, suite.survivors_only) == ("pgd-50", "linf", "8/255", False)
    [suite] = _asked(attack__norm="l2", attack__eps="0.5")
    assert (suite.norm, suite.eps) == ("l2", "0.5")
    [suite] = _asked(eval__norm="l1", eval__eps="12")
    assert (suite.norm, suite.eps) == ("l1", "12")


def test_attacks_alone():
    """Each is a measurement of its own."""
    chosen = _asked(eval__attacks="fgsm pgd(num_steps=2,norm=l2,eps=0.5) square(num_queries=9)")
    assert [(suite.name, suite.norm, suite.eps) for suite in chosen] == [
        ("fgsm", "linf", "8/255"), ("pgd-2", "l2", "0.5"), ("square-9", "linf", "8/255")]
    assert all(len(suite.specs) == 1 and not suite.survivors_only for suite in chosen)


@pytest.mark.parametrize("text, name, survivors_only, count", [
    ("standard", "standard", True, 4), ("union", "union", False, 3), ("fgsm pgd(num_steps=2)", "fgsm+pgd-2", True, 2),
    ("my-own: fgsm pgd(num_steps=2)", "my-own", False, 2), ("mol-adv", "mol-adv", False, 12),
    ("mol-all", "mol-all", False, 16), ("union-8", "union-8", False, 6), ("gated", "gated", False, 7)])
def test_a_suite_in_place_of_attacks(text, name, survivors_only, count):
    [suite] = _asked(eval__suite=text, eval__attacks="square")
    assert (suite.name, suite.survivors_only, len(suite.specs)) == (name, survivors_only, count)


def test_several_eps():
    chosen = _asked(eval__eps="2/255, 4/255,0.1", eval__attacks="fgsm pgd")
    assert [(suite.name, suite.eps) for suite in chosen] == [
        (name, eps) for eps in ("2/255", "4/255", "0.1") for name in ("fgsm", "pgd-50")]
    chosen = _asked(eval__eps="0.5,1", eval__norm="l2", eval__suite="quick")
    assert [(suite.name, suite.norm, suite.eps) for suite in chosen] == [("quick", "l2", "0.5"), ("quick", "l2", "1")]
    chosen = _asked(eval__suite="pgd-50: pgd; standard")
    assert [(suite.name, suite.survivors_only) for suite in chosen] == [("pgd-50", False), ("standard", True)]
    with pytest.raises(UserError, match="did you mean 'standard'"):
        _asked(eval__suite="fast; standart")


@pytest.mark.parametrize("fields", [
    dict(eval__attacks="fgsm pgd(num_steps=7)"), dict(eval__suite="standard", eval__eps="2/255,4/255"),
    dict(eval__suite="fgsm square", eval__norm="l2", eval__eps="0.5"), dict(eval__suite="mine: fgsm fog")])
def test_what_was_asked_asks_for_the_same(fields):
    """Reports make their commands of it."""
    chosen = _asked(**fields)
    for suite in chosen:
        config = configs.default()
        config.update_from_flattened_dict({f"eval.{name}": value for name, value in suite.asked.items()})
        [again] = plan.asked(config)
        assert (again.name, again.settings, again.survivors_only) == (suite.name, suite.settings, suite.survivors_only)


@pytest.mark.parametrize("fields, words", [
    (dict(eval__attacks="pdg"), "unknown attack 'pdg'"), (dict(eval__attacks=""), "no attack is named"),
    (dict(eval__suite="standart"), "unknown suite 'standart'.*did you mean 'standard'"),
    (dict(eval__suite="quick: fgsm"), "has the name 'quick': expected one of letters and hyphens that is no other"),
    (dict(eval__suite=": fgsm"), "has the name ''"), (dict(eval__suite="mine:"), "no attack is named"),
    (dict(eval__attacks="pgd(steps=3)"), "unknown setting of pgd 'steps'"),
    (dict(eval__eps="8"), "eval.eps is '8' for linf"), (dict(eval__eps="4/255,8"), "eval.eps is '8' for linf"),
    (dict(eval__eps="4/255,"), "eval.eps is ''"), (dict(attack__eps="8"), "attack.eps is '8' for linf"),
    (dict(eval__norm="l2"), "eval.norm is l2 and eval.eps is not set: expected an eps in that norm"),
    (dict(attack__norm="l2", attack__eps="0.5", eval__norm="linf"), "eval.norm is linf and eval.eps is not set"),
    (dict(eval__attacks="pgd(norm=l2)"), "pgd has norm=l2 and no eps")])
def test_what_cannot_be_is_refused_in_one_line(fields, words):
    for refused in (plan.check, configs.check):
        with pytest.raises(UserError, match=words) as error:
            refused(_config(**fields))
        assert "\n" not in str(error.value)


def test_a_norm_that_is_training_s_needs_no_eps():
    plan.check(_config(attack__norm="l2", attack__eps="0.5", eval__norm="l2"))


CHOSEN = suites.alone("fgsm pgd(num_steps=2)", "linf", "0.1")


def _jobs(steps, known=(), chosen=CHOSEN, n=COUNT, seed=SEED):
    checkpoints = [plan.Checkpoint(step, tuple(names)) for step, names in steps.items()]
    return plan.jobs(chosen, checkpoints, known, n=n, seed=seed)


def _measured(checkpoint, step, suite, unreliable=False, n=COUNT, seed=SEED):
    """An entry of results.json."""
    record = {"checkpoint": checkpoint, "step": step, "attack": suite.name, "norm": suite.norm, "eps": suite.eps,
              "settings": suite.settings, "n": n, "seed": seed, "unreliable": unreliable}
    return {"id": results.entry_id(record)} | record


def test_a_job_for_each_suite_and_checkpoint():
    jobs = _jobs({30: ["best"], 40: ["last"]})
    assert [(job.checkpoint.step, job.checkpoint.names, job.suite.name) for job in jobs] == [
        (30, ("best",), "fgsm"), (30, ("best",), "pgd-2"), (40, ("last",), "fgsm"), (40, ("last",), "pgd-2")]
    assert not any(job.is_measured or job.was_reliable for job in jobs)
    assert len({job.entry for job in jobs}) == 4 and all(job.entry.startswith(job.checkpoint.names[0]) for job in jobs)


def test_best_and_last_of_one_step_are_one_job():
    """The same weights would else be attacked twice."""
    jobs = _jobs({40: ["best", "last"]})
    assert [(job.checkpoint.step, job.checkpoint.names, job.suite.name) for job in jobs] == [
        (40, ("best", "last"), "fgsm"), (40, ("best", "last"), "pgd-2")]
    assert jobs[0].entry == _measured("best", 40, CHOSEN[0])["id"]
    assert jobs[0].what == "the best and last checkpoint (step 40)"


def test_known_ones_are_told():
    known = [_measured("best", 30, CHOSEN[0]), _measured("last", 40, CHOSEN[1], unreliable=True)]
    jobs = _jobs({30: ["best"], 40: ["last"]}, known)
    assert [(job.is_measured, job.was_reliable) for job in jobs] == [
        (True, True), (False, False), (False, False), (True, False)]


@pytest.mark.parametrize("change", [dict(step=31), dict(n=COUNT + 1), dict(seed=SEED + 1)])
def test_another_step_set_of_images_or_seed_is_not_known(change):
    """A run that went on has other weights behind the same name."""
    known = [_measured("best", **({"step": 30, "suite": CHOSEN[0]} | change))]
    assert not any(job.is_measured for job in _jobs({30: ["best"]}, known))


@pytest.mark.parametrize("text, eps", [
    ("fgsm(norm=l2,eps=0.1)", "0.1"), ("fgsm", "0.2"), ("pgd(num_steps=2,restarts=2)", "0.1")])
def test_another_attack_is_not_known(text, eps):
    known = [_measured("best", 30, suite) for suite in CHOSEN]
    [job] = _jobs({30: ["best"]}, known, suites.alone(text, "linf", eps))
    assert not job.is_measured
    [job] = _jobs({30: ["best"]}, known, CHOSEN[:1])
    assert job.is_measured


def test_a_job_is_known_when_all_its_names_are():
    """Best has become last since: last has no row in the report yet."""
    known = [_measured("best", 40, CHOSEN[0])]
    [job] = _jobs({40: ["best", "last"]}, known, CHOSEN[:1])
    assert not job.is_measured
    [job] = _jobs({40: ["best", "last"]}, [*known, _measured("last", 40, CHOSEN[0])], CHOSEN[:1])
    assert job.is_measured and job.was_reliable


def test_the_rows_of_mol():
    """Table A5 of the paper, and fog that clips; all PGD is the worst of three."""
    suite = suites.together("mol-all", "linf", "8/255")
    assert [(spec.label, spec.settings.get("norm", "")) for spec in suite.specs] == [
        ("pgd-20", "l1"), ("gaussian-noise", "l1"), ("salt-pepper", "l1"), ("pgd-20", "l2"), ("fgsm", "l2"),
        ("ddn-100", "l2"), ("deepfool-100", "l2"), ("rays", "l2"), ("pgd-20", "linf"), ("fgsm", "linf"),
        ("deepfool-100", "linf"), ("rays", "linf"), ("fog", ""), ("snow", ""), ("rotation", ""), ("fog-clip", "")]
    assert {norm: eps for spec in suite.specs for norm, eps in spec.budgets.items()} == {
        "l1": 16, "l2": 1, "linf": pytest.approx(8 / 255)}
    assert [(name, len(specs)) for name, specs in suite.unions.items()] == [("all PGD", 3)]
    assert not suites.together("union", "linf", "8/255").unions, "it is the union itself"
