"""What `train.criteria` asks for, and how its accuracies are counted."""

import numpy as np
import pytest

from advmoe_jax.attacks import parse
from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import criteria, verdicts


def _config(text):
    config = configs.default(data="digits", system="standard")
    configs.override_all(config, ["model.num_experts=1", "system.loss=natural", f"train.criteria={text}"])
    return config


def test_names_tell_budgets_apart():
    suite = criteria.asked(_config("normalized pgd(eps=0.5/255,num_steps=10) pgd(eps=1/255,num_steps=10) fgsm"))
    assert [criteria.name(spec) for spec in suite.specs] == [
        "fgsm-0.01sd", "pgd-10 linf 0.5/255", "pgd-10 linf 1/255", "fgsm linf 8/255"]
    assert not suite.survivors_only and criteria.asked(_config(" ")) is None


@pytest.mark.parametrize("text, said", [
    ("fgms", "train.criteria: unknown attack 'fgms'"), ("fgsm fgsm(eps=8/255)", "names fgsm linf 8/255 twice"),
    ("pgd(num_steps=0)", "train.criteria: num_steps of pgd is 0")])
def test_what_cannot_be_measured_is_refused_before_anything_is_done(text, said):
    with pytest.raises(UserError) as failure:
        configs.check(_config(text))
    assert said in str(failure.value) and "expected" in str(failure.value) and "\n" not in str(failure.value)


def _attempt(text, labels, view="none"):
    [spec] = parse.attacks(text)
    return verdicts.Attempt(spec, view, np.ones(4, bool), {"label": np.array(labels)}, 0.0, {})


def test_images_that_become_right_count_for_attacks_that_say_so():
    clean = np.array([0, 0, 0, 1])  # of label 0: the last is wrong
    attempts = (_attempt("fgsm", [0, 0, 1, 0]), _attempt("normalized", [0, 0, 1, 0]))
    found = verdicts.Found(np.arange(4), np.zeros(4, int), {"label": clean}, attempts)
    assert criteria.accuracies(found) == {"fgsm linf 8/255": 0.5, "fgsm-0.01sd": 0.75}


def test_an_attack_through_several_gradients_is_the_worst_of_them():
    attempts = tuple(_attempt(text, labels, view) for text in ("fgsm", "normalized") for view, labels in (
        ("none", [0, 0, 0, 1]), ("ste_full", [1, 0, 0, 0])))
    found = verdicts.Found(np.arange(4), np.zeros(4, int), {"label": np.zeros(4, int)}, attempts)
    assert criteria.accuracies(found) == {"fgsm linf 8/255": 0.5, "fgsm-0.01sd": 0.5}


def test_the_first_images_are_kept_as_an_attack_shows_them_that_changes_all():
    """In the order of the images, whatever batches they came in; of other attacks there are none."""
    [frequency], [fgsm] = parse.attacks("frequency(mean=0.5)"), parse.attacks("fgsm")
    index = np.arange(20, 32)
    after = {"label": index % 3}
    log = verdicts.Memory()
    for number, part in ((0, index), (1, index[6:]), (1, index[:6])):
        log.add({"attempt": number}, {"index": part, "x_adv": np.full((len(part), 2, 2, 1), number) * part[
            :, None, None, None]})
    attempts = tuple(verdicts.Attempt(spec, "none", index > 0, after, 0.0, {}) for spec in (fgsm, frequency))
    found = verdicts.Found(index, index * 0, after, attempts)
    kept = verdicts.pictures(found, log)
    assert kept["index"].tolist() == kept["image"][:, 0, 0, 0].tolist() == list(range(20, 28))
    assert kept["prediction"].tolist() == (index % 3)[:8].tolist() and not kept["label"].any()
    assert verdicts.pictures(verdicts.Found(index, index * 0, after, attempts[:1]), log) == {}
