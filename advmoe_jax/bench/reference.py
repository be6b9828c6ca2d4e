"""This package against PyTorch: forward passes, TRADES iterations, and AdvMoE's against that of its released code.

ResNet-18 at CIFAR shapes, random weights and images. "released losses" has the router, losses and order of the PyTorch
side (configs/paper/advmoe_cifar10_r18_released.py, which says what still differs), "as the paper" those of the paper: a
router in every layer, TRADES for both levels. The dense networks also run with the channels last in PyTorch's memory.
Needs `pip install advmoe_jax[torch]`.
"""

import functools
import importlib.util
from typing import Any

import jax
import numpy as np

from advmoe_jax.bench import nets, train
from advmoe_jax.bench.timing import interleaved
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import macs

_FORWARD, _TRAINING = 64, 32  # batches
_LAST = ", channels last"
_DENSE = [(name, name + layout) for name in ("Dense", "S-Dense") for layout in ("", _LAST)]
_RELEASED = dict(
    model__routing="global", model__experts="disjoint", model__router_grad="ste_selected",
    system__router_loss="label_mod", system__order="backbone_first", system__share_batch=True,
    attack__router_weight=1.0, attack__router_grad="ste_selected",
    train__attack="pgd(num_steps=2,step_size=5/255,start=gaussian,keep=last)")


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each network: milliseconds on both sides, their ratio, and that of the MACs: PyTorch computes every
    expert."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("bench reference needs PyTorch: pip install 'advmoe_jax[torch]'")
    return _forward(rounds) + _training(rounds)


def _rows(what, batch, theirs, ours, pairs, rounds):
    """A row for each pair (name of ours, name of theirs); every function is timed once a round. Ours have their MACs
    beside them, for each image."""
    from advmoe_jax.bench import released
    ms = interleaved({("torch", name): f for name, f in theirs.items()} | {
        ("ours", name): f for name, (f, _) in ours.items()}, (), rounds)
    counts = {name: released.macs(f) / batch for name, f in theirs.items()}
    rows = []
    for name, other in pairs:
        theirs, own = ms["torch", other], ms["ours", name]
        rows.append({"what": f"{what}, batch {batch}", "ours": name, "torch": other, "torch ms": theirs, "ours ms": own,
                     "torch / ours": theirs / own, "by MACs": counts[other] / ours[name][1]})
    return rows


def _torch_nets():
    """The networks, those without experts also with the channels last in memory."""
    import torch

    from advmoe_jax.bench import released
    sizes = {"Dense": (1, 1.0), "S-Dense": (1, 0.5)}
    return {name: released.ResNet18(*size) for name, size in sizes.items()} | {
        f"{name}{_LAST}": released.ResNet18(*size).to(memory_format=torch.channels_last)
        for name, size in sizes.items()} | {"MoE": released.ResNet18(2, 0.5)}


def _laid_out(name, x):
    import torch
    return x.contiguous(memory_format=torch.channels_last if name.endswith(_LAST) else torch.contiguous_format)


def _forward(rounds):
    import torch

    x = nets.images(_FORWARD)
    images = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))

    def in_torch(net, images):
        with torch.no_grad():
            return net(images)

    def in_jax(**model):
        net, variables = nets.make(**model)
        variables = nets.settled(net, variables)
        return functools.partial(jax.jit(net.apply), variables, x), macs.count(net)["total"]

    theirs = {name: functools.partial(in_torch, net.eval(), _laid_out(name, images))
              for name, net in _torch_nets().items()}
    ours = {"Dense": in_jax(num_experts=1, model_scale=1.0), "S-Dense": in_jax(num_experts=1, model_scale=0.5),
            "MoE, ResNet-20 router": in_jax(num_experts=2, model_scale=0.5, routing="global")}
    return _rows("forward", _FORWARD, theirs, ours, [*_DENSE, ("MoE, ResNet-20 router", "MoE")], rounds)


def _training(rounds):
    import torch

    from advmoe_jax.bench import released

    x, y = torch.rand(_TRAINING, 3, *nets.IMAGE_SHAPE[:2]), torch.randint(0, nets.CLASSES, (_TRAINING,))
    theirs = {name: functools.partial(released.trainer(net.train()), _laid_out(name, x), y)
              for name, net in _torch_nets().items()}
    theirs["MoE, with its passes for logs"] = functools.partial(
        released.trainer(_torch_nets()["MoE"].train(), logs=True), x, y)
    ours = {"Dense": ("at_dense", {}), "S-Dense": ("at_sdense", {}), "AdvMoE, released losses": ("advmoe", _RELEASED),
            "AdvMoE, as the paper": ("advmoe", {})}
    pairs = [*_DENSE, *((name, other) for name in ("AdvMoE, released losses", "AdvMoE, as the paper")
                        for other in ("MoE", "MoE, with its passes for logs"))]
    ours = {name: (functools.partial(train.program(*what), 1), train.count(*what)) for name, what in ours.items()}
    return _rows("iteration", _TRAINING, theirs, ours, pairs, rounds)
