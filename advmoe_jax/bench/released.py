"""The networks and the training iteration of the released code of AdvMoE, written for PyTorch, as a contender.

As OPTML-Group/Robust-MoE-CNN trains a CIFAR ResNet-18: every expert of a routed convolution is computed, a mask of the
one choice of a ResNet-20 router drops all but one; one batch, the backbone's step first, then the router's with an
attack of its own. Images (B, 3, H, W), scores (B, E).
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _python_dispatch, flop_counter

_EPS, _STEP_SIZE, _STEPS, _BETA = 8 / 255, 5 / 255, 2, 6.0


class RoutedConv(nn.Conv2d):
    """A convolution with the filters of all experts, of which each image keeps those of one."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int, num_experts: int):
        super().__init__(inputs, num_experts * width, kernel, stride, kernel // 2, bias=False)
        self.width = width

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """gate: (B, E) one-hot, or None with a single expert."""
        y = super().forward(x)
        if gate is None:
            return y
        mask = gate.repeat_interleave(self.width, 1)
        return (y * mask[:, :, None, None])[mask > 0].view(len(y), self.width, *y.shape[2:])


class _Block(nn.Module):
    def __init__(self, inputs, width, stride, num_experts):
        super().__init__()
        self.conv1 = RoutedConv(inputs, width, 3, stride, num_experts)
        self.conv2 = RoutedConv(width, width, 3, 1, num_experts)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 and inputs == width else nn.Sequential(
            nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x, gate):
        y = functional.relu(self.bn1(self.conv1(x, gate)))
        return functional.relu(self.bn2(self.conv2(y, gate)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Dense (one expert, scale 1), S-Dense (one expert) or a mixture with a router."""

    def __init__(self, num_experts: int, scale: float, num_classes: int = 10):
        super().__init__()
        self.router = Router(num_experts) if num_experts > 1 else None
        inputs = 64 if num_experts > 1 else int(64 * scale)
        self.stem, self.bn = nn.Conv2d(3, inputs, 3, padding=1, bias=False), nn.BatchNorm2d(inputs)
        blocks = []
        for stage, channels in enumerate((64, 128, 256, 512)):
            for block in range(2):
                width = int(channels * scale)
                blocks.append(_Block(inputs, width, 2 if stage and not block else 1, num_experts))
                inputs = width
        self.blocks, self.fc = nn.ModuleList(blocks), nn.Linear(inputs, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, K) logits."""
        gate = None if self.router is None else _straight_through(self.router(x))
        y = functional.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            y = block(y, gate)
        return self.fc(y.mean((2, 3)))


class Router(nn.Module):
    """ResNet-20 on the image; its shortcuts drop pixels and add empty channels."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.convs, self.bns, self.strides = nn.ModuleList(), nn.ModuleList(), []
        inputs = 16
        for stage, width in enumerate((16, 32, 64)):
            for block in range(3):
                self.strides.append(2 if stage and not block else 1)
                for size, stride in ((inputs, self.strides[-1]), (width, 1)):
                    self.convs.append(nn.Conv2d(size, width, 3, stride, 1, bias=False))
                    self.bns.append(nn.BatchNorm2d(width))
                inputs = width
        self.fc = nn.Linear(inputs, num_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, E) scores."""
        x = functional.relu(self.bn(self.stem(x)))
        for n, stride in enumerate(self.strides):
            y = functional.relu(self.bns[2 * n](self.convs[2 * n](x)))
            y = self.bns[2 * n + 1](self.convs[2 * n + 1](y))
            added = (y.shape[1] - x.shape[1]) // 2
            x = functional.relu(y + functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, added, added)))
        return self.fc(x.mean((2, 3)))


def _straight_through(scores):
    hard = functional.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)
    return hard + scores - scores.detach()


def _kl(clean, adversarial):
    return functional.kl_div(functional.log_softmax(adversarial, 1), functional.softmax(clean, 1), reduction="sum")


def _attack(x, targets):
    """PGD on the sum of KL(target || scores) of some models in evaluation mode. `targets` are (model, its target)."""
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(_STEPS):
        x_adv.requires_grad_()
        [grad] = torch.autograd.grad(sum(_kl(target, model(x_adv)) for model, target in targets), x_adv)
        x_adv = (x_adv.detach() + _STEP_SIZE * grad.sign()).clamp(x - _EPS, x + _EPS).clamp(0, 1)
    return x_adv


def _descend(optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def trainer(model: ResNet18, logs: bool = False):
    """`step(x, y)`: one iteration of TRADES, and of the router's training by label modulo N where there is a router.

    The learning rate is 0, so that a model can be timed for long. With `logs` also the two forward passes of the model
    on clean images that the released code makes for its logs or for nothing: BatchNorm is then updated as often as
    there, 4 times in the backbone and 6 times in the router.
    """
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4)

    router = model.router
    routing = set() if router is None else set(router.parameters())
    backbone_sgd = sgd([p for p in model.parameters() if p not in routing])
    router_sgd = None if router is None else sgd(router.parameters())

    def attack(x, scores):
        model.eval()
        with torch.no_grad():
            targets = [(model, model(x))]
        x_adv = _attack(x, targets if router is None else [*targets, (router, scores.detach())])
        model.train()
        return x_adv

    def step(x, y):
        scores = None if router is None else router(x)
        x_adv = attack(x, scores)
        clean, adversarial = model(x), model(x_adv)
        loss = functional.cross_entropy(clean, y) + _BETA * _kl(clean, adversarial) / len(x)
        _descend(backbone_sgd, loss)
        if router is not None:
            x_adv = attack(x, scores)
            attacked = router(x_adv)
            loss = functional.cross_entropy(scores, y % scores.shape[1]) + _kl(scores, attacked) / len(x)
            _descend(router_sgd, _BETA * loss)
        if logs:
            model(x), model(x)

    return step


def macs(run: Callable[[], object]) -> float:
    """Multiply-accumulates of `run()`, as PyTorch counts them: half its floating-point operations."""
    with _Counter() as counter:
        run()
    return counter.flops / 2


class _Counter(_python_dispatch.TorchDispatchMode):
    """PyTorch's FlopCounterMode without its hooks on modules, with which `autograd.grad` fails."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        count = flop_counter.flop_registry.get(function._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=found)
        return found
