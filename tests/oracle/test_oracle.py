"""The attacks against other libraries on the same weights, in small; compare.py is the whole comparison."""

import pytest

pytest.importorskip("torch", reason="needs the oracle extra")
pytest.importorskip("pyautoattack", reason="needs the oracle extra")
pytest.importorskip("foolbox", reason="needs the oracle extra")

import compare  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.slow]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_agreement(norm):
    for label, ours, theirs, agreement, confirmed, size, *_ in compare.compare(norm, 64, 500):
        agreed, asked = (float(number.strip("()")) for number in agreement.split())
        assert agreed >= asked - 100 / 64 * 2, label
        assert float(ours) <= float(theirs) + 2 * 100 / 64, label
        right, broken = map(int, confirmed.split(" of "))
        assert right >= 0.99 * broken and float(size) <= 1 + 1e-4, label


def test_distances():
    for name, norm, ours, theirs, ratio, missed, missed_by_theirs in compare.compare_distances(64):
        most = compare.MINIMAL[name][3]
        assert 1 / most <= float(ratio.split()[0]) <= most, (name, norm)
        assert int(missed) <= int(missed_by_theirs), name


def test_iterates():
    for name, gradients, *shares in compare.compare_iterates(64):
        assert float(gradients.split()[0]) <= 1e-5, name
        assert "dlr" in name or all(float(share.split()[0]) >= 95 for share in shares[:2]), name


def test_the_fast_suite_has_the_verdicts_of_the_standard_one():
    for norm, standard, fast, differ, passes, fewer, *_ in compare.compare_fast(64):
        assert standard == fast and differ == "0", norm
        assert float(fewer) < float(passes), norm


def test_pgd():
    for name, _, _, agreement, equal in compare.compare_pgd(64):
        assert float(agreement.split()[0]) >= 95 and float(equal) >= 90, name


def test_the_released_networks_have_the_sizes_of_the_released_code():
    from advmoe_jax.bench import released
    for num_experts, scale, backbone, router in ((1, 1.0, 11_173_962, 0), (1, 0.5, 2_797_610, 0),
                                                 (2, 0.5, 5_565_450, 269_202)):
        net = released.ResNet18(num_experts, scale)
        assert sum(p.numel() for p in net.parameters()) == backbone + router
        assert router == (sum(p.numel() for p in net.router.parameters()) if net.router else 0)
