"""State dicts that are exported load into plain PyTorch modules, which then compute the same."""

import jax
import numpy as np
import pytest
from exporting import config_of, random_variables

from advmoe_jax.core import config as configs
from advmoe_jax.core import paths, tensor_files, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.interop import export, import_run, torch_files, torch_import
from advmoe_jax.interop.exports import torch as torch_format
from advmoe_jax.models import network
from advmoe_jax.train.state import Trained

pytestmark = pytest.mark.usefixtures("tiny_resnet")


def _network(name, size=8, **fields):
    cfg = configs.default(model=name).model
    cfg.update(dict(num_experts=1, model_scale=1.0, width=4) | fields)
    net = network.make(cfg, (size, size, 3), 10)
    return net, random_variables(net)


ROUTED = dict(num_experts=2, model_scale=.5, router_width=4)


@pytest.mark.parametrize("fields", [dict(depth=10), dict(depth=10, routing="global", experts="disjoint") | ROUTED])
def test_it_is_what_the_import_reads(fields, tmp_path):
    """The router too, in the model and in every routed convolution."""
    net, variables = _network("resnet", **fields)
    state = torch_import.to_state_dict(net, variables)
    path = tmp_path / "model.safetensors"
    tensor_files.write(path, state, dict(zip(torch_files.NORMALISED_BY, ("0.5, 0.25 0.5", "0.25 0.5 1"))))
    read = torch_files.read_checkpoint(path)
    assert read.mean.tolist() == [.5, .25, .5] and read.std.tolist() == [.25, .5, 1]
    found = torch_import.to_variables(net, read.weights)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert sum(name.endswith("router.fc.bias") for name in state) == (9 if net.is_routed else 0)


def test_what_was_exported_is_imported(tmp_path):
    """Its images are not normalised, although those of its architecture usually are."""
    config = config_of("dense", "model.name=cifar_resnet", "model.depth=20", "model.width=1", "export.format=torch")
    net = network.make(config.model, (32, 32, 3), 10)
    use = torch_format.write(export.Export(config, tmp_path, net, Trained(random_variables(net), {}), "best", 0),
                             paths.path(tmp_path))
    assert "module.load_state_dict(load_file" in use and "it takes images (B, C, H, W) in [0, 1].\n" in use
    config = import_run.import_run("resnet20", str(tmp_path / torch_format.FILE), str(tmp_path / "run"))
    assert (config.model.mean, config.model.std) == ("", "")


@pytest.mark.parametrize("fields, said", [
    ({}, "has no PyTorch name: expected a network whose layers all have one; of the routers only that"),
    (dict(routing="global", num_experts=3),
     "stores 4 channels for 3 experts of 2: expected model.experts=disjoint, as in the released AdvMoE code")])
def test_what_has_no_form_there(fields, said):
    net, variables = _network("resnet", **dict(depth=10) | ROUTED | fields)
    with pytest.raises(UserError, match=said):
        torch_import.to_state_dict(net, variables)


def _modules():
    """Plain modules as torchvision, kuangliu and akamaster write them."""
    torch = pytest.importorskip("torch")
    from torch import nn
    from torch.nn import functional as F

    def conv(i, o, k, stride=1, **more):
        return nn.Conv2d(i, o, k, stride, k // 2, bias=False, **more)

    class Block(nn.Module):
        def __init__(self, i, inner, outer, stride, projection, pads=False):
            super().__init__()
            shapes = ([(i, inner, 1, 1), (inner, inner, 3, stride), (inner, outer, 1, 1)] if outer > inner else
                      [(i, inner, 3, stride), (inner, outer, 3, 1)])
            for n, shape in enumerate(shapes, 1):
                setattr(self, f"conv{n}", conv(*shape))
                setattr(self, f"bn{n}", nn.BatchNorm2d(shape[1]))
            self.count, self.stride, self.missing, self.projection = len(shapes), stride, outer - i, projection
            if not pads and (stride > 1 or i != outer):
                setattr(self, projection, nn.Sequential(conv(i, outer, 1, stride), nn.BatchNorm2d(outer)))

        def forward(self, x):
            y = x
            for n in range(1, self.count + 1):
                y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y))
                y = F.relu(y) if n < self.count else y
            if hasattr(self, self.projection):
                x = getattr(self, self.projection)(x)
            elif self.missing:
                x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.missing // 2, self.missing // 2))
            return F.relu(x + y)

    class ResNet(nn.Module):
        def __init__(self, sizes, width, times=1, imagenet=False, pads=False):
            super().__init__()
            self.imagenet, self.head, i = imagenet, "fc" if imagenet else "linear", width
            self.conv1 = conv(3, width, 7 if imagenet else 3, 2 if imagenet else 1)
            self.bn1 = nn.BatchNorm2d(width)
            for n, size in enumerate(sizes):
                blocks = []
                for j in range(size):
                    inner = width * 2**n
                    blocks.append(Block(i, inner, times * inner, 2 if n and not j else 1,
                                        "downsample" if imagenet else "shortcut", pads))
                    i = times * inner
                setattr(self, f"layer{n + 1}", nn.Sequential(*blocks))
            self.stages = len(sizes)
            setattr(self, self.head, nn.Linear(i, 10))

        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
            for n in range(self.stages):
                x = getattr(self, f"layer{n + 1}")(x)
            return getattr(self, self.head)(x.mean((2, 3)))

    class VGG(nn.Module):
        def __init__(self, plan):
            super().__init__()
            layers, i = [], 3
            for o in plan:
                if o == "M":
                    layers.append(nn.MaxPool2d(2))
                else:
                    layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
                    i = o
            self.features, self.classifier = nn.Sequential(*layers, nn.AvgPool2d(1)), nn.Linear(i, 10)

        def forward(self, x):
            return self.classifier(self.features(x).flatten(1))

    return torch, ResNet, VGG


CASES = {
    "cifar_resnet": (dict(name="cifar_resnet", depth=20, shortcut_pad="both"),
                     lambda resnet, vgg: resnet((3, 3, 3), 4, pads=True)),
    "cifar": (dict(name="resnet", depth=18), lambda resnet, vgg: resnet((2, 2, 2, 2), 4)),
    "torchvision": (dict(name="resnet", depth=18, stem="imagenet", size=32),
                    lambda resnet, vgg: resnet((2, 2, 2, 2), 4, imagenet=True)),
    "bottlenecks": (dict(name="resnet", depth=50, stem="imagenet", size=32),
                    lambda resnet, vgg: resnet((3, 4, 6, 3), 4, 4, imagenet=True)),
    "vgg": (dict(name="vgg", depth=11, size=32),
            lambda resnet, vgg: vgg([4, "M", 8, "M", 16, 16, "M", 32, 32, "M", 32, 32, "M"]))}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_plain_modules_agree(case, tmp_path):
    torch, *classes = _modules()
    from safetensors.torch import load_file

    fields, build = CASES[case]
    net, variables = _network(**fields)
    tensor_files.write(tmp_path / "m.safetensors", torch_import.to_state_dict(net, variables), {})
    module = build(*classes).eval()
    module.load_state_dict(load_file(tmp_path / "m.safetensors"))
    x = np.random.default_rng(0).uniform(size=(3, *net.image_shape)).astype(np.float32)
    ours = np.asarray(jax.jit(net.apply)(variables, x)[0])
    with torch.no_grad():
        theirs = module(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    assert np.abs(ours).max() > .1 and tree.size(variables["params"]) == sum(p.numel() for p in module.parameters())
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5 * np.abs(ours).max())
