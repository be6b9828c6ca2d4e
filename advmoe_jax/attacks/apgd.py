"""Auto-PGD: PGD that chooses its step size (Croce & Hein, ICML 2020, algorithm 1; l1: Croce & Hein, ICML 2021).

x images (B, H, W, C) in [0, 1], d = H * W * C, K classes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import build, driver, objectives, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import balls

_MOMENTUM = 0.75  # share of the step in an update, the rest goes to the last movement
_L1_SHRINK, _L1_SMALLEST, _L1_JUDGED = 1.5, 10.0, 0.04  # the last is the share of the steps between judgements
_L1_PHASES = ((3, 0.3), (2, 0.3), (1, 0.4))  # budgets in eps, and shares of the steps
ABOUT = About(balls.NORMS)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of APGD; the defaults are AutoAttack's."""

    norm: str = settings.norm(ABOUT)
    eps: str | float = settings.eps()
    num_steps: int = settings.count(100, "steps in each restart")
    restarts: int = settings.count(1, "random starts, for each target")
    loss: str | objectives.Objective = settings.loss("ce", "dlr", "margin")
    targets: int = settings.count(0, "classes that are aimed at one after the other, by falling clean logit, at most "
                                     "K - 1; 0 for none", least=0)
    rho: float = setting(0.75, "share of steps that must raise the loss, or the step size is halved", least=0, most=1)
    eot: int = settings.count(0, "0 for a deterministic model; else the gradient is the mean of that many passes of "
                                 "logits_fn(x, keys), keys (B,)", least=0, most=1000)
    largest_first: bool = setting(True, "l1 only: 30 % of the steps at 3 eps and 30 % at 2 eps come first")
    quirks: bool = setting(False, "whether the first increase counts against a loss of 0, as in the reference code")
    early_stop: bool = settings.early_stop()
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "apgd-ce", "apgd-t", with another number of steps than 100 "apgd-ce-20"."""
    loss = "custom" if isinstance(config.loss, objectives.Objective) else config.loss
    name = "apgd-t" if config.targets else f"apgd-{loss}"
    return name if config.num_steps == 100 else f"{name}-{config.num_steps}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does.

    x_adv is the last misclassified iterate, or without one the iterate of the highest loss. Images that are
    misclassified when clean come back as they are.
    """
    config = settings.read("apgd", config)
    if config.targets and config.loss not in objectives.TARGETED:
        loss = "an objective of its own" if isinstance(config.loss, objectives.Objective) else config.loss
        raise UserError(f"apgd has targets={config.targets} with loss={loss}: "
                        f"expected one of {', '.join(objectives.TARGETED)}")
    objective = objectives.TARGETED[config.loss] if config.targets else objectives.get(config.loss)
    success = objectives.misclassified if config.targets else objective.success
    phases = [(1, config.num_steps)]
    if config.norm == "l1" and config.largest_first:
        counts = [math.ceil(share * config.num_steps) for _, share in _L1_PHASES[:2]]
        phases = [(factor, n) for (factor, _), n in zip(_L1_PHASES, [*counts, config.num_steps - sum(counts)])]

    is_l1, last = config.norm == "l1", len(phases) - 1
    programs = [Program(config.norm, objective, 0 if is_l1 else steps, config.rho, config.eot, config.quirks,
                        stops=config.early_stop and i == last) for i, (_, steps) in enumerate(phases)]

    def attack(logits_fn, key, x, y):
        inputs = build.inputs_of(logits_fn, key, x, y, config.eot > 0, objectives.takes(config.loss))

        def one(inputs, _):
            rows = dict(inputs.rows)
            if config.targets:
                rows["y"] = rows["y"], rows.pop("target")
            for i, (program, (factor, steps)) in enumerate(zip(programs, phases)):
                scalars = dict(eps=factor * config.eps)
                if is_l1:
                    rows.setdefault("init", rows["x"])
                    scalars |= dict(every=max(int(_L1_JUDGED * steps), 1), is_first=i == 0, is_only=last == 0)
                candidate = driver.run(program, inputs._replace(rows=rows, scalars=scalars), steps + 1, config.driver)
                best = candidate.pop("best")
                rows = rows | {"init": best} if is_l1 else rows
            return candidate

        return build.over_targets(one, inputs, config.targets, config.restarts, config.eot > 0, success)

    return attack


def checkpoints(num_steps: int) -> list[tuple[int, int]]:
    """(step, steps since the last one) after which the step size may change, for linf and l2."""
    gap, least, less = (max(int(share * num_steps), 1) for share in (0.22, 0.06, 0.03))
    due, step = [], gap
    while step <= num_steps:
        due.append((step, gap))
        gap = max(gap - less, least)
        step += gap
    return due


@dataclasses.dataclass(frozen=True)
class Program:
    """One run as a `driver.Program`; step i looks at iterate i, judges the step size, and moves.

    For l1 the number of steps is in the scalar "every", so that phases share a program; "is_first" says whether they
    start at random or at the row "init", and "is_only" whether there is one phase.
    """

    norm: str
    objective: objectives.Objective
    num_steps: int
    rho: float
    eot: int
    quirks: bool
    stops: bool

    @property
    def cost(self):
        return (max(self.eot, 1),) * 2

    def start(self, inputs: driver.Inputs) -> driver.Carry:
        rows, eps = inputs.rows, inputs.scalars["eps"]
        x = rows["x"]
        x_adv = _random_start(rows["keys"], x, eps, self.norm)
        if self.norm == "l1":
            x_adv = jnp.where(inputs.scalars["is_first"], x_adv, balls.project(rows["init"], x, eps, self.norm))
        zero, no = jnp.zeros(x.shape[0], x.dtype), jnp.zeros(x.shape[0], bool)
        carry = dict(
            x=x_adv, previous=x_adv, best=x_adv, best_grad=jnp.zeros_like(x), best_loss=zero - jnp.inf,
            broken_x=x, broken=no, step_size=zero + (eps if self.norm == "l1" else 2 * eps))
        if self.norm == "l1":
            moved = balls.moved(x_adv, x)
            size = x[0].size
            is_only = inputs.scalars["is_only"]
            return carry | dict(kept=jnp.where(is_only, zero + 0.2, moved / size / 1.5),
                                moved=jnp.where(is_only, zero + size, moved))
        return carry | dict(loss=zero, increases=zero, checked_loss=zero, reduced=~no)

    def step(self, inputs: driver.Inputs, carry: driver.Carry, i: jax.Array) -> driver.Carry:
        carry = dict(carry)
        loss, grad, broken = self._look(inputs, carry["x"], i)
        carry["broken_x"] = driver.select(broken, carry["x"], carry["broken_x"])
        carry["broken"] |= broken
        better = loss > carry["best_loss"]
        carry |= driver.select(better, dict(best=carry["x"], best_grad=grad, best_loss=loss), {
            name: carry[name] for name in ("best", "best_grad", "best_loss")})
        back = self._judge(inputs, carry, loss, i)
        carry["x"], grad = driver.select(back, (carry["best"], carry["best_grad"]), (carry["x"], grad))
        moved = self._move(inputs, carry, grad, i)
        return carry | dict(previous=carry["x"], x=moved)

    def done(self, carry: driver.Carry) -> jax.Array:
        return carry["broken"]

    def finish(self, inputs: driver.Inputs, carry: driver.Carry) -> dict[str, jax.Array]:
        return dict(x=driver.select(carry["broken"], carry["broken_x"], carry["best"]), loss=carry["best_loss"],
                    broken=carry["broken"], best=carry["best"])

    def _look(self, inputs, x, i):
        """Loss (B,), its gradient, and whether the rows are misclassified; means over draws with `eot`."""
        keys = rng.fold_in(inputs.rows["keys"], i + 1)
        draws = [(rng.fold_in(keys, n),) for n in range(self.eot)] or [()]
        looks = [objectives.gradient(self.objective, inputs.logits_fn, x, inputs.rows["y"], *draw) for draw in draws]
        loss, grad, broken = jax.tree.map(
            lambda *leaves: sum(leaf.astype(x.dtype) for leaf in leaves) / len(leaves), *looks)
        return loss, jnp.nan_to_num(grad), broken > 0.5

    def _judge(self, inputs, carry, loss, i):
        """Adapts the step size in `carry` itself; gives the rows (B,) that return to their best iterate."""
        eps = inputs.scalars["eps"]
        if self.norm == "l1":
            due = (i > 0) & (i % inputs.scalars["every"] == 0)
            x = inputs.rows["x"]
            moved = balls.moved(carry["best"], x)
            sparser = moved < 0.95 * carry["moved"]
            size = jnp.where(sparser, eps, jnp.maximum(carry["step_size"] / _L1_SHRINK, eps / _L1_SMALLEST))
            carry |= driver.select(
                jnp.broadcast_to(due, loss.shape), dict(step_size=size, kept=moved / x[0].size / 1.5, moved=moved),
                {name: carry[name] for name in ("step_size", "kept", "moved")})
            return due & sparser
        gap, due = self._table()
        gap, due = jnp.asarray(gap)[i], jnp.asarray(due)[i]
        before = jnp.where(i == 1, 0, carry["loss"]) if self.quirks else carry["loss"]
        carry["increases"] += ((loss > before) & (i > 0)).astype(loss.dtype)
        carry["loss"] = loss
        carry["checked_loss"] = jnp.where(i == 0, loss, carry["checked_loss"])
        stalls = carry["increases"] <= self.rho * gap
        stays = ~carry["reduced"] & (carry["best_loss"] <= carry["checked_loss"])
        reduce = due & (stalls | stays)
        carry["step_size"] = jnp.where(reduce, carry["step_size"] / 2, carry["step_size"])
        carry["reduced"] = jnp.where(due, reduce, carry["reduced"])
        carry["checked_loss"] = jnp.where(due, carry["best_loss"], carry["checked_loss"])
        carry["increases"] = jnp.where(due, 0, carry["increases"])
        return reduce

    def _table(self):
        gap, due = np.ones(self.num_steps + 1, np.float32), np.zeros(self.num_steps + 1, bool)
        for step, since in checkpoints(self.num_steps):
            gap[step], due[step] = since, True
        return gap, due

    def _move(self, inputs, carry, grad, i):
        x, eps = inputs.rows["x"], inputs.scalars["eps"]
        size = carry["step_size"][:, None, None, None]
        if self.norm == "l1":
            direction = balls.sparse_sign(grad, carry["kept"])
            return balls.project(carry["x"] + size * direction, x, eps, "l1")
        direction = jnp.sign(grad) if self.norm == "linf" else balls.normalized(grad)
        z = balls.project(carry["x"] + size * direction, x, eps, self.norm)
        share = jnp.where(i == 0, 1, _MOMENTUM)
        return balls.project(carry["x"] + share * (z - carry["x"]) + (1 - share) * (carry["x"] - carry["previous"]),
                             x, eps, self.norm)


def _random_start(keys, x, eps, norm):
    """linf: uniform noise stretched to the ball's surface; l2: on the sphere; l1: projected Gaussian noise."""
    noise = build.noise(keys, x, norm)
    if norm == "l1":
        return balls.project(x + noise, x, eps, "l1")
    noise = noise / balls.norm(noise, "linf")[:, None, None, None] if norm == "linf" else balls.normalized(noise)
    return balls.project(x + eps * noise, x, eps, norm)
