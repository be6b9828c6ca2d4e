"""This package against PyTorch: forward passes, TRADES iterations, and AdvMoE's against that of its released code.

ResNet-18 at CIFAR shapes, random weights and images. "as released" trains by the same algorithm as the PyTorch side
(configs/paper/advmoe_cifar10_r18_released.py), "as the paper" by that of the paper: a router in every layer, TRADES for
both levels. Needs `pip install advmoe_jax[torch]`.
"""

import functools
import importlib.util
from typing import Any

import jax
import numpy as np

from advmoe_jax.bench import nets, train
from advmoe_jax.bench.timing import interleaved
from advmoe_jax.core.errors import UserError

_FORWARD, _TRAINING = 64, 32  # batches
_RELEASED = dict(
    model__routing="global", model__experts="disjoint", model__router_grad="ste_selected",
    system__router_loss="label_mod", system__order="backbone_first", system__share_batch=True,
    attack__router_weight=1.0, attack__router_grad="ste_selected", attack__step_size="5/255")


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each network: milliseconds on both sides and their ratio."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("bench reference needs PyTorch: pip install 'advmoe_jax[torch]'")
    return _forward(rounds) + _training(rounds)


def _rows(what, theirs, ours, rounds):
    """`ours` are {name: (name of the one of theirs it is compared to, function)}."""
    functions = {("torch", name): f for name, f in theirs.items()} | {
        ("ours", name): f for name, (_, f) in ours.items()}
    ms = interleaved(functions, (), rounds)
    return [{"what": what, "network": name, "torch ms": ms["torch", other], "ours ms": ms["ours", name],
             "torch / ours": ms["torch", other] / ms["ours", name]} for name, (other, _) in ours.items()]


def _torch_nets():
    from advmoe_jax.bench import released
    return {"Dense": released.ResNet18(1, 1.0), "S-Dense": released.ResNet18(1, 0.5), "MoE": released.ResNet18(2, 0.5)}


def _forward(rounds):
    import torch

    x = nets.images(_FORWARD)
    images = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2)).contiguous()

    def in_torch(net):
        with torch.no_grad():
            return net(images)

    def in_jax(**model):
        net, variables = nets.make(**model)
        variables = nets.settled(net, variables)
        return functools.partial(jax.jit(net.apply), variables, x)

    theirs = {name: functools.partial(in_torch, net.eval()) for name, net in _torch_nets().items()}
    ours = {"Dense": ("Dense", in_jax(num_experts=1, model_scale=1.0)),
            "S-Dense": ("S-Dense", in_jax(num_experts=1, model_scale=0.5)),
            "MoE, ResNet-20 router": ("MoE", in_jax(num_experts=2, model_scale=0.5, routing="global"))}
    return _rows(f"forward, batch {_FORWARD}", theirs, ours, rounds)


def _training(rounds):
    import torch

    from advmoe_jax.bench import released

    x, y = torch.rand(_TRAINING, 3, *nets.IMAGE_SHAPE[:2]), torch.randint(0, nets.CLASSES, (_TRAINING,))
    theirs = {name: functools.partial(released.trainer(net.train()), x, y) for name, net in _torch_nets().items()}
    theirs["MoE with logs"] = functools.partial(released.trainer(_torch_nets()["MoE"].train(), logs=True), x, y)
    ours = {"Dense": ("Dense", train.program("at_dense", {})),
            "S-Dense": ("S-Dense", train.program("at_sdense", {})),
            "AdvMoE, as released": ("MoE", train.program("advmoe", _RELEASED)),
            "AdvMoE, as the paper": ("MoE", train.program("advmoe", {})),
            "AdvMoE, as the paper; torch with its passes for logs": ("MoE with logs", train.program("advmoe", {}))}
    ours = {name: (other, functools.partial(run, 1)) for name, (other, run) in ours.items()}
    return _rows(f"iteration, batch {_TRAINING}", theirs, ours, rounds)
