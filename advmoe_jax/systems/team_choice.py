"""Which runs of a pool become a team: those that fail on different images.

Robust Diversity selection of EED (Jung & Song, CVPR 2025, section 4.1); its arithmetic is `ops.diversity`. N runs of
the pool, n images, T teams.
"""

import math
import zlib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import parse
from advmoe_jax.attacks.parse import Spec
from advmoe_jax.core import console, masked, rng, tree
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.models.ensemble import Ensemble
from advmoe_jax.models.network import Network
from advmoe_jax.models.team import Team
from advmoe_jax.ops import diversity
from advmoe_jax.systems.sources import Source

RULES = ("budget_fill", "smallest_above_threshold", "random")
ATTACKED = ("base_transfer", "own_whitebox", "pool_average")
_MOST_RANKED = 100_000  # teams whose ranking is kept
_AT_ONCE = 128


def size_of_team(team_rate: Fraction, member_rate: Fraction) -> int:
    """The most members that keep no more weights together than a team that lacks so many, in exact numbers."""
    return math.floor((1 - team_rate) / (1 - member_rate))


def pool_of(sources: Mapping[str, Source]) -> tuple[dict[str, Source], dict[str, Source]]:
    """The runs that are pruned, and the others, which images may be attacked on."""
    pool = {name: source for name, source in sources.items() if jax.tree.leaves(source.masks)}
    return pool, {name: source for name, source in sources.items() if name not in pool}


def check_pool(pool: Mapping[str, Source], member: Network, num_members: int, member_rate: Fraction, data: str) -> None:
    """Raises UserError for runs that make no team."""
    for name, source in pool.items():
        if source.config.data.name != data:
            raise UserError(f"init_from names {name}, a run on {source.config.data.name}: expected runs on {data}")
        if different := tree.first_difference(member.shapes, source.variables):
            path, ours, theirs = different
            raise UserError(f"init_from names {name}, of another architecture: {path} is {theirs} there, members of "
                            f"the team have {ours}")
        shapes = {path: leaf.shape for path, leaf in tree.named_leaves(source.variables["params"]).items()}
        kept = masked.shares(shapes, source.masks)
        sizes = {path: math.prod(shape) for path, shape in shapes.items() if path.endswith("/kernel")}
        left, total = sum(kept.get(path, 1) * size for path, size in sizes.items()), sum(sizes.values())
        units = sum(Fraction(sizes[path], np.size(mask)) for path, mask in tree.named_leaves(source.masks).items()
                    if path in sizes)
        if left > (1 - member_rate) * total + units:  # a layer keeps a whole number of what its mask tells apart
            raise UserError(f"init_from names {name}, which keeps {float(left / total):.4f} of its weights: expected "
                            f"{float(1 - member_rate):g}, by system.member_rate={member_rate}")
    if len(pool) < num_members:
        raise UserError(f"init_from names {len(pool)} pruned runs: expected {num_members} or more, for a team of so "
                        "many (model.num_members)")


def failures(pool: Mapping[str, Source], bases: Mapping[str, Source], member: Network, x: Any, cfg, mesh
             ) -> tuple[np.ndarray, np.ndarray]:
    """Who fails on attacked images, by `system.rd_attack`, and who by an attack of its own: (N, n) bool both.

    Args:
        pool, bases: the runs.
        member: what each of them is.
        x: images and their labels.
        cfg: the whole config.
        mesh: of all devices.
    """
    [spec] = parse.attacks(cfg.system.rd_by, norm=cfg.attack.norm, eps=cfg.attack.eps)
    images, y = x
    models = {name: member.outputs_fn(source.variables) for name, source in (bases | pool).items()}
    own, shared = [], None
    if cfg.system.rd_attack == "base_transfer":
        if len(bases) != 1:
            raise UserError(f"init_from names {len(bases)} runs that are not pruned: expected one, for "
                            "system.rd_attack=base_transfer, or another system.rd_attack")
        shared = _attacked(spec, models[next(iter(bases))], images, y, cfg, mesh)
    elif cfg.system.rd_attack == "pool_average":
        whole = Ensemble(member, len(pool))
        variables = {part: whole.gather([source.variables[part] for source in pool.values()])
                     for part in next(iter(pool.values())).variables}
        shared = _attacked(spec, Team(whole, None).outputs_fn(variables), images, y, cfg, mesh)
    of_own = {name: _attacked(spec, models[name], images, y, cfg, mesh) for name in pool}
    own = np.stack([_fails(models[name], of_own[name], y, mesh) for name in pool])
    return (own if shared is None else np.stack([_fails(models[name], shared, y, mesh) for name in pool])), own


def images_of(data: pipeline.Data, on: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first so many images in [0, 1] that are trained on, or that choose the best checkpoint, and their labels.

    Raises:
        UserError: those that choose are test images.
    """
    if on == "validation" and data.select is data.test:
        raise UserError("system.rd_on is 'validation', and train.select_on=test holds out no images: expected "
                        "system.rd_on=training")
    split, rows = (data.train, data.rows) if on == "training" else (data.select, data.select_rows)
    return pipeline.images_of(split, rows[:count])


def _batches(mesh, *arrays):
    """Rows of arrays on the devices, so many at once, and which of them are no padding."""
    size = -(-min(_AT_ONCE, len(arrays[0])) // mesh.size) * mesh.size
    for rows, is_row in pipeline.padded_batches(np.arange(len(arrays[0])), size):
        placed = pipeline.on_devices(mesh, {
            str(i): array[pipeline.of_this_process(rows)] for i, array in enumerate(arrays)})
        yield rows, is_row, *placed.values()


def _attacked(spec: Spec, outputs_fn, images, y, cfg, mesh) -> np.ndarray:
    key, found = rng.key(cfg.seed, "team"), []
    takes = spec.function(outputs_fn)
    for rows, is_row, x, label in _batches(mesh, images, y):
        keys = rng.per_example(key, jnp.asarray(rows))
        found.append(meshes.fetch(spec.run(takes, keys, x, label))[is_row])
    return np.concatenate(found)


@jax.jit
def _answers(outputs_fn, x):
    return jnp.argmax(outputs_fn(x)[0], -1)


def _fails(outputs_fn, images, y, mesh) -> np.ndarray:
    return np.concatenate([meshes.fetch(_answers(outputs_fn, x))[is_row]
                           for _, is_row, x in _batches(mesh, images)]) != y


def choose(fails: np.ndarray, robust: np.ndarray, size: int, system: Any, seed: int) -> dict[str, Any]:
    """The team, and the ranking that it comes from, as JSON.

    Robust Diversity ranks; of equal teams the one whose members are more robust comes first, then the first.
    "budget_fill" takes the best of all teams of `size`. "smallest_above_threshold", the paper's words, takes the
    smallest team of the budget with `rd_threshold`: always a pair, as no larger team is more diverse than its best
    pair. "random" takes any of `size`.

    Args:
        fails: (N, n) bool.
        robust: (N,) accuracies under own attacks.
        size: of the team.
        system: fields choose, rd_threshold.
        seed: of "random".
    Returns:
        {"team": numbers of the members, the most robust first, "diversity", "falls_back", "teams": [["0 2 5", RD]]},
        teams by falling rank.
    """
    count = len(fails)
    sizes = range(2, size + 1) if 2**count <= _MOST_RANKED else sorted({2, size})
    teams = diversity.teams_of(count, sizes)
    rd = diversity.robust_diversity(fails, teams)
    strength = (teams @ robust) / teams.sum(1)
    order = np.lexsort((np.arange(len(teams)), -strength, -rd))
    candidates = order[teams[order].sum(1) == size]
    if system.choose == "smallest_above_threshold":
        enough = [i for i in order if rd[i] >= system.rd_threshold]
        candidates = sorted(enough, key=lambda i: teams[i].sum()) or order
    elif system.choose == "random":
        candidates = [np.random.default_rng([seed, zlib.crc32(b"team")]).choice(np.sort(candidates))]
    best = candidates[0]
    members = sorted(np.flatnonzero(teams[best]).tolist(), key=lambda i: (-robust[i], i))
    return {"team": members, "diversity": float(rd[best]), "falls_back": bool(rd[best] < system.rd_threshold),
            "teams": [[" ".join(map(str, np.flatnonzero(teams[i]))), round(float(rd[i]), 6)]
                      for i in order[:_MOST_RANKED]]}


def tell(found: Mapping[str, Any], threshold: float) -> None:
    """Says who was chosen, and if no team is diverse enough."""
    names = [found["pool"][i]["name"] for i in found["team"]]
    console.say(f"team: {', '.join(names)}, robust diversity {found['diversity']:.3f}")
    if found["falls_back"]:
        console.warn(f"no team has robust diversity {threshold:g} or more (system.rd_threshold): the one chosen has "
                     f"{found['diversity']:.3f}")
