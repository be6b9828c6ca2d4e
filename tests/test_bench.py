"""Every benchmark runs, on tiny networks, and its ratios are those of its times."""

import pathlib
import types

import jax
import numpy as np
import pytest

import advmoe_jax
from advmoe_jax.bench import __main__ as bench
from advmoe_jax.bench import compile as compiling
from advmoe_jax.bench import edge, ensemble, growth, layers, nets, pruning, reference, routing, train
from advmoe_jax.core import config
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import conv
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.train.log import Metrics


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(nets, "MODEL", {"model.width": 8, "model.depth": 10, "model.router_width": 4})
    monkeypatch.setattr(nets, "IMAGE_SHAPE", (8, 8, 3))


def test_a_load_is_what_was_asked_for():
    found = nets.load(40, np.stack([nets.first_takes(0.7, 4), [0.25, 0.5, 0.25, 0]]))
    counts = [[(choice == e).sum() for e in range(4)] for choice in found.T]
    assert found.shape == (40, 2) and counts == [[28, 4, 4, 4], [10, 20, 10, 0]]


def test_loads_of_a_run(tmp_path):
    shares = [[[0.5, 0.5], [0.9, 0.1]], [[0.25, 0.75], [0.6, 0.4]]]
    log = Metrics(tmp_path / "metrics.jsonl")
    for step, load in enumerate(shares):
        log.write(step, "train", {"lower/load": np.array(load), "lower/loss": 1.0})
    log.write(2, "validation", {"sa": 0.5, "ra": 0.25})
    np.testing.assert_allclose(nets.trained(tmp_path), shares[-1])


def test_a_run_whose_loads_fit_no_case_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(nets, "trained", lambda _: np.full((5, 3), 1 / 3))
    with pytest.raises(UserError, match=r"\(5, 3\): expected those of a case"):
        routing.measure(1, tmp_path)


@pytest.mark.parametrize("arguments, words", [
    (["routing", "--workdir", "nowhere"], ["--workdir is nowhere", "metrics.jsonl"]),
    (["layers", "--workdir", "."], ["--workdir is .", "layers"]),
    (["layers", "--plot", "a.png"], ["--plot is a.png", "layers"])])
def test_refused(arguments, words, capsys):
    assert bench.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and all(word in told for word in words)


@pytest.mark.slow
def test_settled_routers_use_both_experts():
    net, variables = nets.make(num_experts=2, model_scale=0.5, routing="global")
    ids = net.apply(nets.settled(net, variables), nets.images(32))[1]["expert_ids"]
    assert 0.2 < ids.mean() < 0.8


def test_layers(monkeypatch):
    monkeypatch.setattr(layers, "_SHAPES", ((4, 8),))
    monkeypatch.setattr(layers, "_CASES", layers._CASES[:1])
    [row] = layers.measure(1)
    assert row["forward: all / blocks"] == row["forward: all ms"] / row["forward: blocks ms"]


@pytest.mark.slow
def test_ensemble(monkeypatch):
    monkeypatch.setattr(nets, "MODEL", {"model.width": 4, "model.depth": 10})
    monkeypatch.setattr(ensemble, "_BATCH", 16)
    rows = {row["what"]: row for row in ensemble.measure(1)}
    assert rows["all members"]["time / all"] == 1 and len(rows) == 2 + len(ensemble._SHARES)
    asked = [row["members asked"] for what, row in rows.items() if what.startswith("asked")]
    assert asked == sorted(asked) and asked[0] == 1 and 1 < asked[-1] <= 4
    assert all(row["asked / all"] == row["members asked"] / 4 for row in rows.values())


@pytest.mark.slow
def test_pruning(monkeypatch):
    for name in ("_SEARCHED", "_TIMED"):
        monkeypatch.setattr(pruning, name, {"ResNet-8": dict(name="cifar_resnet", depth=8, width=16)})
    monkeypatch.setattr(pruning, "_BATCH", 4)
    search, dense, *others = pruning.measure(1)
    assert search["what"] == "search, ResNet-8" and search["ms"] > 0
    assert dense["by MACs"] == 1 < others[0]["by MACs"] < 16 / 9
    assert all(row["dense / this"] == dense["ms"] / row["ms"] for row in others)


@pytest.mark.slow
def test_compile(monkeypatch):
    for name, value in dict(_MODEL={"model.depth": 10, "model.width": 8}, _SHAPE=(8, 8, 3), _BATCH=8,
                            _CASES={"AdvMoE": ("advmoe", {})}).items():
        monkeypatch.setattr(compiling, name, value)
    rows = compiling.measure(1)
    assert [row["program"] for row in rows] == ["attack", "lower", "upper"]
    assert all(row["GiB in all"] > row["GiB of temporaries"] > 0 and row["compiling s"] > 0 for row in rows)
    assert jax.config.jax_enable_compilation_cache


@pytest.mark.slow
def test_growth(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "_BATCHES", (8,))
    monkeypatch.setattr(growth, "_EXPERTS", (2,))
    monkeypatch.setattr(growth, "_BATCH", 8)
    path = tmp_path / "growth.png"
    assert bench.main(["growth", "--rounds", "1", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_routing(monkeypatch, tmp_path):
    monkeypatch.setattr(routing, "_CASES", [(what, model, 8) for what, model, _ in routing._CASES[::4]])
    monkeypatch.setattr(nets, "trained", lambda _: np.full((8, 2), 0.5))
    rows = routing.measure(1, tmp_path)
    assert [row["load of the first"] for row in rows] == ["50 %", "90 %", "50 %", "90 %", "trained, 50 to 50 %"]
    assert all(row["dense / auto"] == row["dense ms"] / row[f"{row['auto is']} ms"] for row in rows)


@pytest.mark.slow
def test_train(monkeypatch):
    monkeypatch.setattr(train, "_BATCH", 8)
    few = {name: train._CONTENDERS[name] for name in ("AT(Dense)", "AdvMoE, blocks, all three")}
    monkeypatch.setattr(train, "_CONTENDERS", few)
    rows = {row["what"]: row for row in train.measure(1)}
    assert rows["AT(Dense)"]["this / AT(Dense)"] == 1 and rows.keys() == few.keys()
    assert all(row["compile s, warm"] < row["compile s, cold"] for row in rows.values())


def test_the_released_algorithm_is_that_of_the_paper_s_config():
    path = pathlib.Path(advmoe_jax.__file__).parents[1] / "configs/paper/advmoe_cifar10_r18_released.py"
    released = config.load(str(path))
    for name, value in reference._RELEASED.items():
        field = released
        for part in name.split("__"):
            field = field[part]
        assert field == value, name


@pytest.mark.slow
def test_reference(monkeypatch):
    pytest.importorskip("torch", reason="needs the torch extra")
    monkeypatch.setattr(train, "_BATCH", 8)
    monkeypatch.setattr(reference, "_TRAINING", 8)
    monkeypatch.setattr(reference, "_FORWARD", 8)
    rows = reference.measure(1)
    assert len(rows) == 13 and all(row["torch / ours"] == row["torch ms"] / row["ours ms"] for row in rows)


@pytest.mark.parametrize("logs, backbone, router", [(False, 2, 4), (True, 4, 6)])
def test_the_torch_side_updates_batch_norm_as_often_as_the_released_code(logs, backbone, router):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from advmoe_jax.bench import released

    net = released.ResNet18(2, 0.125).train()
    released.trainer(net, logs)(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    assert (net.bn.num_batches_tracked, net.router.bn.num_batches_tracked) == (backbone, router)


def test_macs_on_both_sides(monkeypatch):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from advmoe_jax.bench import released

    monkeypatch.setattr(nets, "MODEL", {"model.width": 64, "model.depth": 18})
    monkeypatch.setattr(nets, "IMAGE_SHAPE", (32, 32, 3))
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    for num_experts, scale, method in ((1, 1.0, "at_dense"), (1, 0.5, "at_sdense"), (2, 0.5, None)):
        theirs = released.ResNet18(num_experts, scale)
        forward = released.macs(lambda: theirs(x)) / len(x)
        ours = nets.design(num_experts=num_experts, model_scale=scale, routing="global", experts="disjoint")
        assert forward == sum(spec.stored_macs for spec in ours.layers)
        if method is not None:
            step = released.trainer(theirs)
            count = released.macs(lambda: step(x, y)) / len(x)
            assert count == pytest.approx(train.count(method, {}), rel=2e-3)  # but for the stem's gradient to images


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("unit, form", [("column", "smaller product"), ("block(4,1)", "gathered columns"),
                                        ("filter", "left out")])
def test_what_is_left_of_a_convolution_computes_what_its_zeros_do(unit, form, stride):
    """With channels that the layer before does not write, where filters are gone."""
    numbers = np.random.default_rng(0)
    kernel = numbers.normal(size=(3, 3, 8, 12)).astype(np.float32)
    mask = np.asarray(selecting.select({"a": np.abs(kernel)}, "1/4", unit=unit, norm="l2")["a"])
    x = numbers.normal(size=(2, 6, 6, 8)).astype(np.float32)
    if form == "left out":
        before = np.arange(8).reshape(1, 1, 1, 8) % 2 == 0
        x = x * before[0]
        spec = types.SimpleNamespace(path="a", inputs=("b",), kernel=kernel.shape)
        compute, share = edge._left_out(spec, {"a": mask, "b": before})
        assert share == 1 / 8
    else:
        compute, share = (edge._columns(np.broadcast_to(mask, kernel.shape)) if unit == "column" else
                          edge._gathered(np.broadcast_to(mask, kernel.shape), 4))
        assert 1 / 4 <= share < 1 and (unit != "column" or share == 1 / 4)
    left = jax.jit(compute, static_argnums=2)(x, kernel * mask, stride)
    np.testing.assert_allclose(left, conv.conv2d(x, kernel * mask, stride), rtol=1e-4, atol=1e-4)
