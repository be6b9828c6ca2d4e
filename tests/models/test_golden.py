"""Facts measured on the released AdvMoE code: sizes and MACs of its backbones, and outputs of its ResNet-18 and router
by imported weights.

The weights are a hash of each tensor's PyTorch name, so that they come in through `interop.torch_import`. The MoE
tensors are those of width 64, two experts, r = 0.5; logits are in float32 and hold to 1e-3.
"""

import functools
import json
import math
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXACT, slow_but

from advmoe_jax.core import config, tree
from advmoe_jax.interop import torch_import
from advmoe_jax.models import macs, network
from advmoe_jax.models.layers import scaled_width
from advmoe_jax.ops import routing
from advmoe_jax.ops.dispatch import Choice
from advmoe_jax.report import advmoe_costs
from advmoe_jax.report import macs as report_macs

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "advmoe_nets.json").read_text())
MOE, SMALL_DENSE = GOLDEN["rn18_moe_N2_r.5"], GOLDEN["rn18_ori_r.5"]
CLOSE = dict(rtol=1e-3, atol=1e-3)


@functools.cache
def net(num_experts=2, model_scale=.5, *, name="resnet", size=32, classes=10, **changes):
    cfg = config.default(model=name).model
    cfg.update(dict(num_experts=num_experts, model_scale=model_scale, experts="disjoint", routing="global",
                    dispatch="all") | changes)
    return network.make(cfg, (size, size, 3), classes)


@functools.cache
def abstract(net):
    return jax.eval_shape(net.init, jax.random.key(0))


# Sizes.


PATHWAYS = {
    "ResNet-18, CIFAR-10": {
        (1, 1.): (555_422_720, 11_173_962), (1, .8): (.353, 7_122_360), (1, .5): (139_299_328, 2_797_610),
        (1, .2): (.0214, 444_218), (2, .5): (151_718_400, 5_565_450), (2, .8): (.363, 14_137_814),
        (2, .2): (.0293, 891_937), (5, .5): (151_718_400, 13_832_202), (8, .5): (151_718_400, 22_098_954),
        (10, .5): (151_718_400, 27_610_122), (4, .25): (None, 2_791_338), (10, .1): (None, 1_107_757),
        (10, .8): (.363, 70_183_766)},
    "ResNet-18, CIFAR-100": {(2, .5): (None, 5_588_580)},
    "WRN-28-10, CIFAR-10": {
        (1, 1.): (5_243_328_768, 36_479_194), (1, .8): (3.355, 23_349_606), (1, .5): (1_310_944_384, 9_126_002),
        (1, .2): (.210, 1_463_073), (2, .5): (1_310_944_384, 18_239_602), (2, .8): (3.355, 46_679_398),
        (2, .2): (.210, 2_921_185)},
    "VGG-16, CIFAR-10": {
        (1, 1.): (313_788_928, 15_311_818), (1, .5): (79_071_744, 4_013_034), (2, .5): (79_071_744, 7_690_218)},
    # The released mixture cannot be built: of each block, 6 layers that read 12, 24 or 30 channels and 6 more each.
    "DenseNet-BC-40, CIFAR-10": {
        (1, 1.): (72_365_352, 176_122), (1, .5): (18_257_556, 45_802),
        (2, .5): (18_257_556, 45_802 + sum((6 * c + 15 * 6) * 24 + 6 * 9 * 24 * 6 for c in (12, 24, 30)))},
    "ResNet-18, Tiny-ImageNet": {(1, 1.): (2_221_772_800, None), (1, .5): (.557, None), (2, .5): (.607, None)},
    "WRN-28-10, Tiny-ImageNet": {(1, 1.): (20_973_417_472, None), (1, .5): (5.244, None), (2, .5): (5.244, None)},
    "ResNet-18, ImageNet": {
        (1, 1.): (1_814_073_344, 11_689_512), (1, .5): (483_149_824, 3_055_880), (2, .5): (483_149_824, 5_845_256)},
    # The released small WRN has 16 parameters more: its stem of 8 channels has a norm of 16, and cannot run.
    "WRN-28-10, ImageNet": {
        (1, 1.): (16_086_463_488, 37_115_736), (1, .5): (4_029_151_744, 9_444_784 - 16),
        (2, .5): (4_029_151_744, 18_558_368)}}
"""Of each network {(N, r): (pathway, parameters of the backbone)}: exact numbers, or 1e9 MACs as far as they were
written down."""
ROUTERS = {2: 269_202, 4: 269_332, 5: 269_397, 8: 269_592, 10: 269_722}
"""Parameters of the released router."""
EXECUTED = {
    "ResNet-18, CIFAR-10": (.1517, .1923, .3385), "WRN-28-10, CIFAR-10": (1.311, 1.351, 2.662),
    "VGG-16, CIFAR-10": (.0791, .1196, .1975), "DenseNet-BC-40, CIFAR-10": (.0183, .0588, .0751),
    "ResNet-18, Tiny-ImageNet": (.607, .769, 1.354), "WRN-28-10, Tiny-ImageNet": (5.244, 5.406, 10.65),
    "ResNet-18, ImageNet": (.483, 2.470, 2.894), "WRN-28-10, ImageNet": (4.029, 6.016, 10.03)}
"""Of mixtures with N=2 and r=.5, 1e9 MACs of the pathway, with the router, and of all that is computed."""
DEEPER = {34: 21_797_672, 50: 25_557_032, 101: 44_549_160}
"""Parameters of torchvision's ResNets."""


def _are(macs, giga):
    """Whether a count is what was written down: exactly, or to its last digit."""
    return macs == giga if isinstance(giga, int) else macs / 1e9 == pytest.approx(
        giga, abs=.51 * 10.**-len(str(giga).partition(".")[2]))


def _is_large(case):
    """Those of a hundred layers that are routed or narrowed."""
    return case.paper is None and case.network not in PATHWAYS and case.model_scale < 1


@pytest.mark.parametrize("case", slow_but(lambda case: not _is_large(case), advmoe_costs.CASES), ids=lambda case: (
    f"{case.network}-{case.num_experts}-{case.model_scale}"))
def test_what_networks_cost(case):
    """All that `report.macs --all` shows."""
    found, of = next(report_macs.of_cases([case])), (case.num_experts, case.model_scale)
    routed = case.num_experts > 1
    pathway, params = PATHWAYS.get(case.network, {}).get(of, (None, None))
    assert pathway is None or _are(found.macs["pathway"], pathway)
    assert params in (None, found.params - found.router_params)
    assert found.router_params == (ROUTERS[case.num_experts] if routed else 0)
    assert found.macs["total"] == found.macs["pathway"] + found.macs["router"] and found.paper == case.paper
    if not routed:
        assert found.macs["router"] == 0 and found.macs["executed"] == found.macs["pathway"]
        if case.paper and (case.network, case.model_scale) != ("ResNet-18, CIFAR-10", .2):
            unit = 10.**-len(str(case.paper).partition(".")[2])
            assert abs(found.differences["pathway"]) <= max(.03 * case.paper, unit), "the paper's"
    elif case.num_experts == 2 and case.side == 32:
        assert found.macs["router"] == 40_550_528
    if of == (2, .5) and case.network in EXECUTED:
        assert all(map(_are, (found.macs[kind] for kind in ("pathway", "total", "executed")), EXECUTED[case.network]))
    if of == (1, 1.) and case.network not in PATHWAYS:
        assert found.params == DEEPER[case.config().model.depth]
    if routed and case.network not in PATHWAYS:
        small = net(1, .5, **case.fields, size=case.side, classes=case.num_classes)
        assert found.macs["pathway"] == macs.count(small)["pathway"]


def test_every_number_has_its_network():
    counted = {(case.network, case.num_experts, case.model_scale) for case in advmoe_costs.CASES}
    assert {(network, *of) for network, found in PATHWAYS.items() for of in found} <= counted
    assert {(network, 2, .5) for network in EXECUTED} <= counted
    assert len(counted) == len(advmoe_costs.CASES)


def test_parameters_of_the_expert_kernels():
    assert sum(math.prod(spec.kernel) for spec in net().layers if spec.routed) == 5_511_168
    routed = [spec for spec in net(size=224, classes=1000, stem="imagenet").layers if spec.routed]
    assert len(routed) == 19 and sum("shortcut" in spec.path for spec in routed) == 3


def test_layers_describe_the_parameters():
    for ours in (net(), net(1, .2), net(size=224, classes=1000, stem="imagenet")):
        shapes = {path: leaf.shape for path, leaf in tree.named_leaves(abstract(ours)["params"]).items()}
        assert {path: shape for path, shape in shapes.items() if path.endswith("kernel")} == {
            f"{spec.path}/kernel": spec.kernel for spec in ours.layers}
        assert {path.removesuffix("/scale"): shape for path, shape in shapes.items() if path.endswith("scale")} == {
            spec.norm: (spec.width,) for spec in ours.layers if spec.norm}


@pytest.mark.parametrize("layer, kernel, stride", [
    ("layer1.0.conv1", (64, 64, 3, 3), 1), ("layer1.0.conv2", (64, 32, 3, 3), 1),
    ("layer2.0.conv1", (128, 32, 3, 3), 2), ("layer2.0.conv2", (128, 64, 3, 3), 1),
    ("layer3.0.conv1", (256, 64, 3, 3), 2), ("layer4.0.conv1", (512, 128, 3, 3), 2),
    ("layer4.1.conv2", (512, 256, 3, 3), 1), ("layer1.0.shortcut.0", (32, 64, 1, 1), 1), ("linear", (10, 256), 1)])
def test_kernels_of_the_moe(layer, kernel, stride):
    names = torch_import.layer_names(net())
    spec = next(spec for spec in net().layers if names[spec.path] == layer and spec.path.startswith("backbone/"))
    assert (to_torch(spec.kernel), spec.stride) == (kernel, stride)


@pytest.mark.parametrize("model_scale, widths", [
    (.1, (6, 12, 25, 51)), (.2, (12, 25, 51, 102)), (.3, (19, 38, 76, 153)), (.4, (25, 51, 102, 204)),
    (.5, (32, 64, 128, 256)), (.6, (38, 76, 153, 307)), (.7, (44, 89, 179, 358)), (.8, (51, 102, 204, 409)),
    (.9, (57, 115, 230, 460)), (1., (64, 128, 256, 512))])
def test_widths(model_scale, widths):
    assert tuple(scaled_width(channels, model_scale) for channels in (64, 128, 256, 512)) == widths
    first_of_stage = [spec for spec in net(2, model_scale).layers
                      if spec.path.startswith("backbone/") and spec.path.endswith("_0/conv1")]
    assert tuple(spec.width for spec in first_of_stage) == widths


@pytest.mark.parametrize("name, routed, fields", [
    ("wide_resnet", 27, {}), ("densenet", 36, {}), ("vgg", 12, dict(form="released"))])
def test_mixtures_of_the_other_backbones(name, routed, fields):
    """What is routed; and a pathway is the small dense network."""
    ours = net(name=name, **fields)
    assert sum(spec.routed for spec in ours.layers) == routed
    backbone = [spec for spec in ours.layers if spec.path.startswith("backbone/")]
    assert [(spec.path, spec.width, spec.macs) for spec in backbone] == [
        (spec.path, spec.width, spec.macs) for spec in net(1, name=name, **fields).layers]
    if name == "vgg":
        assert sum(math.prod(spec.kernel) for spec in backbone if spec.routed) == 7_354_368


# Outputs by hashed weights.


def to_torch(kernel):
    """HWIO -> OIHW, (I, O) -> (O, I)."""
    return tuple(kernel[axis] for axis in ((1, 0) if len(kernel) == 2 else (3, 2, 0, 1)))


def hashed(name, shape):
    """Uniform in [-0.5, 0.5) by a hash of the name and the row-major index."""
    h = (np.arange(math.prod(shape), dtype=np.uint64) + zlib.crc32(name.encode())) % 2**32
    h = h * 2654435761 % 2**32
    h ^= h >> 16
    h = h * 2246822519 % 2**32
    h ^= h >> 13
    return (h / 2**32 - .5).reshape(shape)


def hashed_state_dict(net):
    """The released code's state dict of `net`, with the router in the model and in every routed convolution."""
    state, router, names = {}, {}, torch_import.layer_names(net)
    for spec in net.layers:
        part = router if spec.path.startswith("router/") else state
        shape, layer = to_torch(spec.kernel), names[spec.path]
        part[f"{layer}.weight"] = math.sqrt(24 / math.prod(shape[1:])) * hashed(f"{layer}.weight", shape)
        if len(shape) == 2:
            part[f"{layer}.bias"] = np.zeros(shape[0])
        if spec.norm:
            norm, ones = torch_import.norm_name(layer), np.ones(spec.width)
            part |= {f"{norm}.weight": ones, f"{norm}.bias": 0 * ones, f"{norm}.running_mean": 0 * ones,
                     f"{norm}.running_var": ones, f"{norm}.num_batches_tracked": np.zeros((), np.int64)}
    for prefix in ("", *(f"{names[spec.path]}." for spec in net.layers if spec.routed)):
        state |= {f"{prefix}router.{name}": value for name, value in router.items()}
    return state


@functools.cache
def images():
    return jnp.asarray(hashed("input", (4, 3, 32, 32)).transpose(0, 2, 3, 1) + .5, jnp.float32)


@functools.cache
def moe():
    """The network and its hashed variables."""
    return net(), torch_import.to_variables(net(), hashed_state_dict(net()))


@functools.cache
def _apply(net):
    return jax.jit(net.apply, compiler_options=EXACT)


def moe_fixed(ids, x=None):
    ours, variables = moe()
    return _apply(ours)(variables, images() if x is None else x, routing.fixed(jnp.asarray(ids)))


def test_hashed_weights():
    np.testing.assert_allclose(hashed("conv1.weight", (4,)), GOLDEN["hash_conv1_first4"], rtol=1e-6)
    np.testing.assert_allclose(images()[0, 0, :4, 0], GOLDEN["x_first4"], rtol=1e-6)


def test_checkpoint_of_the_released_code_holds_17_routers():
    state = hashed_state_dict(net())
    assert len(state) == 2100
    assert sum(name.endswith("router.fc.bias") for name in state) == 17


@pytest.mark.parametrize("ids, name", [([0, 0, 0, 0], "expert0"), ([1, 1, 1, 1], "expert1"), ([0, 1, 0, 1], "mixed")])
def test_logits_of_the_moe(ids, name):
    logits, aux = moe_fixed(ids)
    np.testing.assert_allclose(logits, MOE[name], **CLOSE)
    np.testing.assert_allclose(aux["router_logits"][:, 0], GOLDEN["router_eval_scores"], **CLOSE)
    np.testing.assert_array_equal(aux["expert_ids"][:, 0], ids)


def test_mixed_routes_are_the_forced_routes_of_each_image():
    one_by_one = np.where(np.array([[0], [1], [1], [0]]), moe_fixed([1, 1, 1, 1])[0], moe_fixed([0, 0, 0, 0])[0])
    np.testing.assert_allclose(moe_fixed([0, 1, 1, 0])[0], one_by_one, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_released_code_to_the_scores():
    ours, variables = moe()
    backbone = {collection: groups["backbone"] for collection, groups in variables.items()}

    @jax.jit
    @jax.grad
    def gradient(scores):
        gate, _ = routing.gates(scores, routing.hard("ste_selected"), 0)
        return jnp.sum(ours.module.backbone.apply(backbone, images(), lambda _: Choice(gate), False)[:, 0])

    found = gradient(jnp.array([[1., 0.], [0., 1.], [1., 0.], [0., 1.]]))
    np.testing.assert_allclose(found, MOE["ste"], **CLOSE)
    np.testing.assert_array_equal(found == 0, np.array(MOE["ste"]) == 0)


def test_router_in_training():
    ours, variables = moe()
    router = {collection: groups["router"] for collection, groups in variables.items()}
    scores, updated = jax.jit(lambda variables, x: ours.module.router.apply(
        variables, x, True, method="scores_image", mutable=["batch_stats"]))(router, images())
    np.testing.assert_allclose(scores[:, 0], GOLDEN["router_train_scores"], **CLOSE)
    running = updated["batch_stats"]["bn1"]
    np.testing.assert_allclose(running["mean"][:3], GOLDEN["router_bn1_rm"], **CLOSE)
    n = 4 * 32 * 32
    unbiased = .9 + (running["var"] - .9) * n / (n - 1)
    np.testing.assert_allclose(unbiased[:3], GOLDEN["router_bn1_rv"], rtol=1e-5)


def test_logits_of_the_small_dense_network():
    ours = net(1)
    variables = torch_import.to_variables(ours, hashed_state_dict(ours))
    np.testing.assert_allclose(_apply(ours)(variables, images())[0], SMALL_DENSE["logits"], **CLOSE)


# Invariants, on a small network.


def tiny(num_experts=2, **changes):
    return net(num_experts, size=8, depth=10, width=8, **(dict(routing="layer") | changes))


@functools.cache
def tiny_variables(net):
    """Random variables, random BatchNorm too; made without `init`, which is slow to compile."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return noise * math.sqrt(2 / math.prod(leaf.shape[:-1]))
        return .1 * noise + (path[-1].key in ("scale", "var"))

    return jax.tree_util.tree_map_with_path(fill, abstract(net))


@functools.cache
def tiny_images():
    return jnp.asarray(np.random.default_rng(1).uniform(size=(6, 8, 8, 3)) * np.linspace(.1, 1, 6)[:, None, None, None],
                       jnp.float32)


@pytest.mark.parametrize("kind", network.routers.ROUTINGS)
def test_images_take_both_experts_in_some_layer(kind):
    ids = _apply(tiny(routing=kind))(tiny_variables(tiny(routing=kind)), tiny_images())[1]["expert_ids"]
    assert np.any(np.std(ids, axis=0) > 0)


def test_shared_and_disjoint_experts_are_the_same_where_they_fill_the_channels():
    shared, disjoint = tiny(experts="shared"), tiny()
    assert abstract(shared) == abstract(disjoint) and shared.layers == disjoint.layers
    assert abstract(net(experts="shared")) == abstract(net())
    for a, b in zip(jax.tree.leaves(_apply(shared)(tiny_variables(disjoint), tiny_images())),
                    jax.tree.leaves(_apply(disjoint)(tiny_variables(disjoint), tiny_images()))):
        np.testing.assert_array_equal(a, b)


def test_shared_experts_overlap_elsewhere():
    specs = {spec.path: spec.kernel for spec in net(5, experts="shared").layers if spec.routed}
    assert specs["backbone/layer1_0/conv1"] == (3, 3, 64, 64)
    assert specs["backbone/layer4_1/conv2"] == (3, 3, 256, 512)


@pytest.mark.parametrize("changes", [dict(experts="shared"), dict(routing="global"), dict(routing="embedding")])
def test_one_expert_is_the_small_dense_network(changes):
    ours, plain = tiny(1, **changes), tiny(1)
    assert ours.layers == plain.layers and ours.groups == ("backbone",) and not any(s.routed for s in ours.layers)
    logits, aux = _apply(ours)(tiny_variables(plain), tiny_images())
    np.testing.assert_array_equal(logits, _apply(plain)(tiny_variables(plain), tiny_images())[0])
    assert aux == {}


@pytest.mark.parametrize("kind", network.routers.ROUTINGS)
def test_order_of_the_batch_does_not_matter(kind):
    ours, order = tiny(routing=kind), np.array([3, 0, 5, 1, 4, 2])
    variables, x = tiny_variables(ours), tiny_images()
    for a, b in zip(jax.tree.leaves(_apply(ours)(variables, x)), jax.tree.leaves(_apply(ours)(variables, x[order]))):
        np.testing.assert_allclose(a[order], b, rtol=1e-5, atol=1e-6)


def test_a_batch_of_mixed_routes_is_each_image_by_itself():
    ours, x = tiny(), tiny_images()
    ids = jnp.asarray(np.random.default_rng(2).integers(2, size=(6, 8)), jnp.int32)
    logits, aux = _apply(ours)(tiny_variables(ours), x, routing.fixed(ids))
    np.testing.assert_array_equal(aux["expert_ids"], ids)
    for i in range(6):
        alone = _apply(ours)(tiny_variables(ours), x[i:i + 1], routing.fixed(ids[i:i + 1]))[0]
        np.testing.assert_allclose(logits[i:i + 1], alone, rtol=1e-5, atol=1e-6)


def test_a_hard_route_is_the_fixed_route_of_its_own_choices():
    ours, x = tiny(), tiny_images()
    logits, aux = _apply(ours)(tiny_variables(ours), x)
    np.testing.assert_array_equal(
        logits, _apply(ours)(tiny_variables(ours), x, routing.fixed(aux["expert_ids"]))[0])


def test_router_gradients_do_not_change_values():
    ours = tiny()
    plain, *others = (_apply(ours)(tiny_variables(ours), tiny_images(), routing.hard(grad))
                      for grad in routing.ROUTER_GRADS)
    for other in others:
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other)):
            np.testing.assert_array_equal(a, b)
