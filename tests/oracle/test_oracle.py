"""The attacks against pyautoattack on the same weights, in small; compare.py is the whole comparison."""

import pytest

pytest.importorskip("torch", reason="needs the oracle extra")
pytest.importorskip("pyautoattack", reason="needs the oracle extra")

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
