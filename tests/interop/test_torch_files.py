"""Checkpoint files: what is read, what is skipped, and what is refused without running any of it."""

import argparse
import os
import pathlib

import numpy as np
import pytest

from advmoe_jax.core.errors import UserError
from advmoe_jax.interop.torch_files import read_checkpoint

WEIGHTS = {"conv1.weight": np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3), "bn1.num_batches_tracked": np.array(7),
           "fc.weight": np.ones((4, 2), np.float32)}
ROUTER = {"fc.weight": np.zeros((2, 4), np.float32)}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        assert a[name].dtype == b[name].dtype


def prefixed(prefix, state=WEIGHTS):
    return {prefix + name: value for name, value in state.items()}


def refused(path):
    """The message of the UserError: one line, without advice to load unsafely, or escape codes."""
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.isprintable() and str(path) in message
    assert not any(word in message for word in ("weights_only", "allow_pickle", "torch.load", "safe_globals"))
    return message


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.module.", "module._orig_mod.", "model.", "1."])
def test_npz_needs_no_torch(prefix, tmp_path):
    np.savez(tmp_path / "a.npz", **prefixed(prefix))
    found = read_checkpoint(tmp_path / "a.npz")
    assert_equal(found.weights, WEIGHTS)
    assert (found.router, found.mean, found.std, found.ignored) == ({}, None, None, ())


def test_a_prefix_of_some_names_stays(tmp_path):
    np.savez(tmp_path / "a.npz", **prefixed("module."), extra=np.ones(1))
    assert set(read_checkpoint(tmp_path / "a.npz").weights) == {*prefixed("module."), "extra"}


@pytest.mark.parametrize("names", [("mean", "std"), ("mu", "sigma"), ("module.normalize.mean", "module.normalize.std"),
                                   ("0.mean", "0.std"), ("normalizer.new_mean", "normalizer.new_std")])
def test_normalisation_is_told_apart(names, tmp_path):
    mean, std = np.array([.4, .5, .6]), np.array([.2, .3, .4])
    np.savez(tmp_path / "a.npz", **prefixed("model."), **{names[0]: mean, names[1]: std.reshape(1, 3, 1, 1)})
    found = read_checkpoint(tmp_path / "a.npz")
    assert_equal(found.weights, WEIGHTS)
    np.testing.assert_array_equal(found.mean, np.float32(mean))
    np.testing.assert_array_equal(found.std, np.float32(std))


@pytest.mark.parametrize("given", [
    {"mean": [.5]}, {"mean": [.5, .5], "std": [1.]}, {"mean": [.5], "std": [0.]}, {"mean": [np.nan], "std": [1.]},
    {"mean": [.5], "std": [.5], "b.mean": [.4], "b.std": [.5]}])
def test_normalisation_that_cannot_be_used(given, tmp_path):
    np.savez(tmp_path / "a.npz", **WEIGHTS, **given)
    assert f"normalises images by {', '.join(given)}: expected one finite mean" in refused(tmp_path / "a.npz")


def test_files_that_are_no_checkpoints(tmp_path):
    for name in ("a.npz", "a.pth"):
        assert "no checkpoint file" in refused(tmp_path / name)
    np.save(tmp_path / "a.npy", np.ones(2))
    np.savez(tmp_path / "object.npz", a=np.array([None]))
    np.savez(tmp_path / "whole.npz", a=np.ones(1000))
    for content in (b"", b"<html>quota exceeded</html>", (tmp_path / "a.npy").read_bytes(),
                    (tmp_path / "object.npz").read_bytes(), (tmp_path / "whole.npz").read_bytes()[:500]):
        (tmp_path / "a.npz").write_bytes(content)
        assert "cannot be read as a checkpoint: expected an .npz of plain arrays" in refused(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz")
    assert "is empty: expected a state dict" in refused(tmp_path / "a.npz")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def tensors(torch, state=WEIGHTS):
    return {name: torch.nn.Parameter(torch.tensor(value), requires_grad=value.dtype.kind == "f")
            for name, value in state.items()}


@pytest.mark.oracle
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap, ignored", [
    (lambda state: state, ()), (lambda state: {"state_dict": state, "epoch": 3}, ("epoch",)),
    (lambda state: {"net": state, "acc": .5}, ("acc",)), (lambda state: {"model": {"state_dict": state}}, ()),
    (lambda state: {"model_state_dict": state, "ema": {"decay": .9}}, ("ema",)),
    (lambda state: {"state_dict_ema": state}, ())])
def test_wrappers(torch, tmp_path, wrap, ignored, legacy):
    torch.save(wrap(prefixed("module.", tensors(torch))), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(tmp_path / "a.pth")
    assert_equal(found.weights, WEIGHTS)
    assert found.ignored == ignored


@pytest.mark.oracle
def test_what_people_keep_beside_weights_is_skipped(torch, tmp_path):
    beside = {
        "optimizer": {"param_groups": [{"lr": np.float64(.1), "params": [0]}]}, "best_acc": np.float32(.5),
        "epoch": np.int64(3), "dtype": np.dtype("float32"), "type": np.float16, "curve": np.arange(3), "t": torch.half,
        "args": argparse.Namespace(lr=np.float32(.1), out=pathlib.Path("runs")), "names": np.array(["a", None], object)}
    torch.save({"state_dict": tensors(torch), "router": prefixed("module.", tensors(torch, ROUTER)), **beside},
               tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert_equal(found.weights, WEIGHTS)
    assert_equal(found.router, ROUTER)
    assert found.ignored == tuple(beside)


@pytest.mark.oracle
def test_a_scalar_as_numpy_1_called_it(torch, tmp_path):
    path = tmp_path / "a.pth"  # a legacy file, which has no checksums
    torch.save({"state_dict": tensors(torch), "lr": np.float64(.1)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    assert_equal(read_checkpoint(path).weights, WEIGHTS)


class Planted:

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.oracle
@pytest.mark.parametrize("legacy", [False, True])
def test_what_could_run_is_refused_by_name_and_does_not(torch, tmp_path, legacy):
    for content, name in ((Planted(tmp_path / "boom"), "posix.mkdir"), (np.random.default_rng, "default_rng"),
                          (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"), (eval, "eval")):
        torch.save({"state_dict": tensors(torch), "x": content}, tmp_path / "a.pth",
                   _use_new_zipfile_serialization=not legacy)
        message = refused(tmp_path / "a.pth")
        assert f"{name}, which weights do not need and which could run code; nothing was loaded" in message
    assert not (tmp_path / "boom").exists()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_files_of_something_else(torch, tmp_path):
    path, cyclic = tmp_path / "a.pth", {}
    cyclic["model"] = cyclic
    quantised = torch.quantize_per_tensor(torch.ones(2), .1, 0, torch.qint8)
    for content, message in (([1], "holds a list"), ({"epoch": 3}, "'epoch' that is no named tensor"), ({}, "is empty"),
                             ({0: torch.ones(2)}, "an entry 0 that is no"), (cyclic, "nests 'model' more than 4 times"),
                             ({"a": torch.ones(2).to_sparse()}, "tensor a of"), ({"a": quantised}, "torch.qint8"),
                             ({"a": torch.ones(2, device="meta")}, "on meta: expected a dense one of plain numbers")):
        torch.save(content, path)
        assert message in refused(path)
    torch.save(tensors(torch), path)
    data = path.read_bytes()
    for content in (b"", data[:len(data) // 2], b"<!DOCTYPE html><html>quota exceeded</html>", b"conv1\nfc\n"):
        path.write_bytes(content)
        assert "nothing was loaded" in refused(path) if content[:1] == b"c" else "cannot be read as" in refused(path)


@pytest.mark.oracle
def test_half_precision_becomes_float32(torch, tmp_path):
    torch.save({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").weights["a"].dtype == np.float32
