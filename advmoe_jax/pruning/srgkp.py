"""SR-GKP: one-shot pruning of grouped kernels that prefers smooth ones.

Zhong et al., "One Less Reason for Filter Pruning: Gaining Free Adversarial Robustness with Structured Grouped Kernel
Pruning", NeurIPS 2023. Filters are put into groups of like smoothness; in each group the same input channels are kept,
those whose kernels are far apart (eq. 3), by a beam search that prefers smooth ones.

Computed in float64 on the host. I input and O output channels, n groups of g = O / n filters, m kept channels.
"""

import dataclasses
import math

import numpy as np
from scipy.spatial import distance

from advmoe_jax.core import shares
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.core.fields import setting
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("SR-GKP", "NeurIPS 2023", "grouped kernel")
GROUPINGS = ("snaking", "ordering", "random")
SEARCHES = ("beam", "greedy", "least_smooth", "random")
BETAS = ("sticky", "fresh")
FINALS = ("cost", "roughness")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.system` for this method; see `plan`."""

    groups: int = setting(8, "n, groups of filters in a layer", least=1, most=4096)
    beam_width: int = setting(2, "branches of a selection, and selections that a check leaves", least=1, most=64)
    check_step: int = setting(3, "a check comes after so many channels", least=1, most=4096)
    alpha: float = setting(0.9, "weight of the distances in a check; the rest is that of smoothness", least=0, most=1)
    power: int = setting(2, "p of the smoothness", least=1, most=8)
    beta_mode: str = setting("sticky", "weight of the outer distances: as at the first check (released code), or of "
                                       "what is kept so far (paper)", choices=BETAS)
    grouping: str = setting("snaking", "how filters are grouped", choices=GROUPINGS)
    search: str = setting("beam", "how channels are chosen", choices=SEARCHES)
    final: str = setting("cost", "which of the selections found is taken, the one of least", choices=FINALS)
    method_seed: int = setting(0, "of what the method draws", least=0, most=2**32 - 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is kept of a layer.

    Attributes:
        order: (O,) filters by group, within a group ascending: order[t * g:(t + 1) * g] are those of group t.
        kept: of each group the input channels that are kept, ascending.
    """

    order: np.ndarray
    kept: tuple[tuple[int, ...], ...]

    def __iter__(self):
        return iter((self.order, self.kept))


def plan(kernel: np.ndarray, *, groups: int = 8, rate: str | float = "7/16", beam_width: int = 2, check_step: int = 3,
         alpha: float = 0.9, power: int = 2, beta_mode: str = "sticky", grouping: str = "snaking",
         search: str = "beam", final: str = "cost", seed: int = 0) -> Plan:
    """Groups the filters of a layer and chooses what each group keeps.

    Args:
        kernel: (3, 3, I, O), or (1, 1, I, O), whose filters are grouped by their sums and searched greedily.
        groups: n, divides O.
        rate: share of the grouped kernels that is removed, a fraction that leaves a whole number of I.
        beam_width: branches of a selection, and selections that a check leaves.
        check_step: a check comes after so many channels.
        alpha: weight of the distances in a check, 1 - alpha that of smoothness (the paper's CSB).
        power: p of eq. 1.
        beta_mode: weight of the outer distances: "fresh", of the number that is kept so far (the paper); "sticky", as
            it was at the first check (the released code).
        grouping: "snaking", by smoothness back and forth; "ordering", always forth; "random".
        search: "beam"; "greedy", one branch and no checks; "least_smooth", the smoothest kernels alone, which the paper
            shows to be bad; "random".
        final: which of the selections found is taken, that of least "cost" or of least "roughness".
        seed: of what is random.
    Raises:
        UserError: a name or number that cannot be, or a kernel that does not divide.
    """
    for name, value, names in (("grouping", grouping, GROUPINGS), ("search", search, SEARCHES),
                               ("beta_mode", beta_mode, BETAS), ("final", final, FINALS)):
        one_of(name, value, names)
    kernel = np.asarray(kernel, np.float64)
    if kernel.ndim != 4 or kernel.shape[:2] not in ((3, 3), (1, 1)):
        raise UserError(f"kernel is {kernel.shape}: expected (3, 3, I, O) or (1, 1, I, O)")
    channels, filters = kernel.shape[2:]
    if groups < 1 or filters % groups:
        raise UserError(f"groups is {groups}: expected a divisor of the layer's {filters} filters")
    share = shares.share(rate, "rate")
    if not 0 < share < 1:
        raise UserError(f"rate is {rate!r}: expected more than 0 and less than 1")
    keep = shares.exact(channels, 1 - share, f"the kernels that rate {rate} keeps")
    generator = np.random.default_rng(seed)
    rough = roughness(kernel, power) if kernel.shape[0] == 3 else None
    scores = -kernel.sum((0, 1, 2)) if rough is None else rough.sum(0)
    order = np.argsort(_labels(scores, groups, grouping, generator), kind="stable")
    if rough is None:
        rough, search = np.zeros(kernel.shape[2:]), "greedy" if search == "beam" else search
    if search == "greedy":
        beam_width, check_step = 1, channels
    kept = []
    for of_group in order.reshape(groups, -1):
        smooth = rough[:, of_group].sum(1)
        if search == "least_smooth":
            chosen = np.argsort(smooth, kind="stable")[:keep]
        elif search == "random":
            chosen = generator.permutation(channels)[:keep]
        else:
            vectors = kernel[..., of_group].transpose(2, 3, 0, 1).reshape(channels, -1)
            similarity = 1 - distance.cdist(vectors, vectors)
            chosen = _search(similarity, smooth, keep, beam_width, check_step, alpha, beta_mode, final)
        kept.append(tuple(sorted(int(channel) for channel in chosen)))
    return Plan(order, tuple(kept))


def masks(subject: Subject, cfg: Config) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """{path of a layer: mask of its kernel}, and of each layer its filters' order and what each group keeps.

    In a routed layer every expert's filters are planned by themselves, one expert after the other.
    """
    found, plans = {}, {}
    for spec in subject.convs:
        kernel, parts = subject.leaf(f"{spec.path}/kernel"), []
        order, kept = [], []
        for window in subject.windows(spec):
            try:
                layer = plan(kernel[..., window], groups=cfg.groups, rate=subject.rate, beam_width=cfg.beam_width,
                             check_step=cfg.check_step, alpha=cfg.alpha, power=cfg.power, beta_mode=cfg.beta_mode,
                             grouping=cfg.grouping, search=cfg.search, final=cfg.final, seed=cfg.method_seed)
            except UserError as error:
                raise UserError(f"{spec.path}: {error}") from None
            parts.append(mask(layer, spec.kernel[-2]))
            order += [int(filter_) + window.start for filter_ in layer.order]
            kept += map(list, layer.kept)
        found[spec.path] = np.concatenate(parts, -1)
        plans[spec.path] = {"order": order, "kept": kept}
    return found, plans


def mask(layer: Plan, channels: int) -> np.ndarray:
    """(1, 1, I, O) bool, which broadcasts to the kernel, of a plan over I input channels."""
    found = np.zeros((1, 1, channels, len(layer.order)), bool)
    for of_group, kept in zip(layer.order.reshape(len(layer.kept), -1), layer.kept):
        found[0, 0, np.asarray(kept)[:, None], of_group] = True
    return found


def roughness(kernel: np.ndarray, power: int = 2) -> np.ndarray:
    """(I, O) of (3, 3, I, O): eq. 1, differences of the powers of neighbouring weights, each pair counted twice."""
    q = np.asarray(kernel, np.float64)**power
    pairs = (q[1:] - q[:-1], q[:, 1:] - q[:, :-1], q[1:, 1:] - q[:-1, :-1], q[1:, :-1] - q[:-1, 1:])
    return 2 * sum(np.abs(pair).sum((0, 1)) for pair in pairs)


def _labels(scores, groups, grouping, generator):
    """(O,) the group of each filter; groups are of equal size."""
    place = np.empty(len(scores), int)
    ordered = generator.permutation(len(scores)) if grouping == "random" else np.argsort(scores, kind="stable")
    place[ordered] = np.arange(len(scores))
    row, column = np.divmod(place, groups)
    return np.where((row % 2 == 1) & (grouping == "snaking"), groups - 1 - column, column)


def _search(similarity, rough, keep, width, check_step, alpha, beta_mode, final):
    """The channels that the beam search from every start finds best.

    Arrays begin with (I, B): starts, selections of each. All starts advance together.

    Args:
        similarity: (I, I), 1 - distance.
        rough: (I,) of the group's kernels.
        keep: m.
        width, check_step, alpha, beta_mode, final: as `plan`.
    """
    channels = len(similarity)
    members = np.eye(channels, dtype=bool)[:, None]
    sums = similarity[:, None].copy()  # of each channel to those selected
    nearest = similarity[:, None].copy()  # the largest of them
    inner = np.zeros((channels, 1))
    beta = None

    def costs(count):
        factor = math.comb(count, 2) / (channels - count) if count < channels else 0.0
        if beta_mode == "sticky" and beta is not None:
            factor = beta
        return inner - factor * np.where(members, 0, nearest).sum(-1), factor

    for step in range(1, keep):
        found = _smallest(np.where(members, np.inf, sums), min(width, channels - step))
        branches = found.shape[-1]
        found = found.reshape(channels, -1)
        members, sums, nearest, inner = (np.repeat(of, branches, 1) for of in (members, sums, nearest, inner))
        inner += np.take_along_axis(sums, found[..., None], -1)[..., 0]
        np.put_along_axis(members, found[..., None], True, -1)
        added = similarity[found]
        sums += added
        np.maximum(nearest, added, out=nearest)
        if step % check_step == 0:
            cost, factor = costs(step + 1)
            beta = factor if beta is None else beta
            best = _ranked(cost, np.where(members, rough, 0).sum(-1), alpha)[:, :width]
            members, sums, nearest = (np.take_along_axis(of, best[..., None], 1) for of in (members, sums, nearest))
            inner = np.take_along_axis(inner, best, 1)
    value = costs(keep)[0] if final == "cost" else np.where(members, rough, 0).sum(-1)
    return np.flatnonzero(members.reshape(-1, channels)[value.argmin()])


def _smallest(values, count):
    """(..., count) places of the smallest values, of equal ones the first; `values` is overwritten."""
    places = []
    for _ in range(count):
        places.append(values.argmin(-1))
        np.put_along_axis(values, places[-1][..., None], np.inf, -1)
    return np.stack(places, -1)


def _ranked(cost, rough, alpha):
    """(I, B) selections of each start, the best first, by alpha * rank of cost + (1 - alpha) * rank of roughness.

    Each sort is stable on the one before, as in the released code: the worst of all has rank 0.
    """
    ranks = np.arange(cost.shape[1])[None]
    by_cost = np.argsort(-cost, -1, kind="stable")
    by_rough = np.argsort(-np.take_along_axis(rough, by_cost, -1), -1, kind="stable")
    score = alpha * np.take_along_axis(np.broadcast_to(ranks, cost.shape), by_rough, -1) + (1 - alpha) * ranks
    last = np.argsort(-score, -1, kind="stable")
    return np.take_along_axis(np.take_along_axis(by_cost, by_rough, -1), last, -1)
