"""One routed network asked and attacked: as a whole, its router alone, and along routes that are held.

m images, B of them at a time, L routed choices, E experts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import driver, parts
from advmoe_jax.attacks.parse import Spec
from advmoe_jax.core import console, rng
from advmoe_jax.data import pipeline
from advmoe_jax.evaluation import verdicts
from advmoe_jax.models.model import Variables
from advmoe_jax.ops import routing
from advmoe_jax.report import overlap, pathways
from advmoe_jax.report.overlap import Overlap
from advmoe_jax.report.pathways import Answers
from advmoe_jax.report.trained import Trained

PLAIN, WORST, ROUTER, EXPERTS = "router constant", "worst of these", "router alone", "experts alone"
OWN, HELD, COMMON, RANDOM = "its own", "its own, held", "most common", "random"


def measured(run: Trained, spec: Spec, rows: np.ndarray, shared: Overlap | None) -> dict[str, Any]:
    """What a routed network does with test images, and what attacks on it and on its parts do.

    Args:
        run: of a network with the surface "routed".
        spec: PGD, with a loss of labels. Keys are those of an evaluation, so that its images are the same.
        rows: (m,) test images.
        shared: its experts beside a sparse network; None: there is none.
    Returns:
        {"sa"; "attacks": {attack: as `pathways.dissection`, with "on_clean_route", the share that is right where the
        attacked image takes the route of the clean one, and "on_attacked_route", the other way round}; "routes":
        {route: {"sa", "ra", and "transferred": right on what was made for the whole network}}; "pathways": {"clean" and
        "attacked": as `pathways.statistics`}; "iou": as `overlap.distribution`, with "chance"; or None}.
    """
    asked = _Network(run, spec, jax.device_put(run.variables), verdicts.Fitting(
        min(run.config.eval.batch_size, len(rows))))
    y, num_experts = run.dataset.test.labels[rows], run.config.model.num_experts
    clean = Answers(**asked.over(rows, lambda x, y, at: {"": asked.answers(x)})[""])
    common = pathways.statistics(clean.experts, y, num_experts, run.model.num_classes)["common"]
    keys = rng.per_example(rng.key(run.config.eval.seed, "random routes"), jnp.asarray(rows))
    drawn = jax.vmap(lambda key: jax.random.randint(key, clean.experts.shape[1:], 0, num_experts))(keys)
    routes = {HELD: clean.experts} | {f"expert {e}": np.full_like(clean.experts, e) for e in range(num_experts)} | {
        COMMON: np.broadcast_to(common, clean.experts.shape), RANDOM: np.asarray(drawn)}
    found = asked.over(rows, lambda x, y, at: asked.attacked(x, y, at, clean, routes))
    attacked = {name: Answers(of["labels"], of["experts"]) for name, of in found.items() if "experts" in of}
    right = clean.labels == y

    def share(labels):
        """Of the images that are right there, and when clean on the network's own routes."""
        return float(np.mean(right & (labels == y)))

    attacks = {name: pathways.dissection(y, clean, of) | {part: share(found[name][part]) for part in (
        "on_clean_route", "on_attacked_route")} for name, of in attacked.items()}
    told = {OWN: {"sa": float(right.mean()), "ra": attacks[WORST]["ra"], "transferred": attacks[WORST]["ra"]}}
    for name in routes:
        stands = found[name]["clean"] == y
        told[name] = {"sa": float(stands.mean())} | {
            what: float(np.mean(stands & (found[name][of] == y))) for what, of in (
                ("ra", "attacked"), ("transferred", "transferred"))}
    scores = shared and overlap.distribution(shared.iou(clean.experts), shared.iou(attacked[WORST].experts))
    return {"sa": told[OWN]["sa"], "attacks": attacks, "routes": told, "pathways": {
        name: pathways.statistics(of.experts, y, num_experts, run.model.num_classes)
        for name, of in (("clean", clean), ("attacked", attacked[WORST]))},
        "iou": scores and scores | {"chance": shared.chance}}


@dataclasses.dataclass(frozen=True)
class _Network:
    """A routed network that is asked, and attacked with a budget, so many images at a time."""

    run: Trained
    spec: Spec
    variables: Variables
    fits: verdicts.Fitting

    @property
    def routed_fn(self) -> jax.tree_util.Partial:
        return self.run.model.surfaces["routed"](self.variables)

    def over(self, rows: np.ndarray, work: Callable[..., Mapping[str, Mapping[str, Any]]]
             ) -> dict[str, dict[str, np.ndarray]]:
        """What work(x, y, rows of test images, the last of them padding) gives of all images, as arrays."""
        def part(rows, size):
            at = driver.filled(rows, driver.bucket(len(rows), size))
            with driver.real_rows(len(rows), size):
                made = work(*pipeline.images_of(self.run.dataset.test, at), at)
            return {name: {what: np.asarray(array)[:len(rows)] for what, array in found.items()}
                    for name, found in made.items()}

        first, *more = self.fits.batches(rows, part)
        return {name: {what: np.concatenate([array, *(of[name][what] for of in more)]) for what, array in found.items()}
                for name, found in first.items()}

    def answers(self, x: Any, route: Any = None) -> dict[str, jax.Array]:
        """{"labels": (B,), "experts": (B, L)}, on the network's own routes or on those given (B, L)."""
        return _answers(self.routed_fn, jnp.asarray(x), routing.hard() if route is None else routing.fixed(route))

    def attacked(self, x: np.ndarray, y: np.ndarray, at: np.ndarray, clean: Answers, routes: Mapping[str, np.ndarray]
                 ) -> dict[str, dict[str, Any]]:
        """What became of images: {attack: as `answers`, and labels "on_clean_route" and "on_attacked_route"}, and
        {route: labels of the "clean" image, the "attacked" one, and of what was made for the whole network,
        "transferred"}."""
        of, key = self.spec.config, jax.random.key(self.run.config.eval.seed)
        before = Answers(clean.labels[at], clean.experts[at])
        keys = rng.per_example(verdicts.attack_key(key, self.spec.name), jnp.asarray(at))
        made = {view: self.spec.run(self.spec.function(self.run.model.outputs_fn(self.variables, view)), keys, x, y)
                for view in self.run.model.views}
        made = {PLAIN if view == "none" else view: images for view, images in made.items()}
        answered = [Answers(**jax.device_get(self.answers(images))) for images in made.values()]
        chosen = pathways.worst(y, before, answered)
        made[WORST] = jnp.stack(list(made.values()))[chosen, np.arange(len(x))]
        made[ROUTER] = parts.on_router(of)(self.routed_fn, keys, x, before.experts)
        on_routes = {name: parts.on_routes(of)(self.routed_fn, keys, x, y, route[at]) for name, route in routes.items()}
        made[EXPERTS] = on_routes[HELD]
        found = {name: self._both_ways(x, images, before.experts) for name, images in made.items()}
        for name, route in routes.items():
            seen = {"clean": x, "attacked": on_routes[name], "transferred": made[WORST]}
            found[name] = {what: self.answers(images, route[at])["labels"] for what, images in seen.items()}
        console.say(f"{self.run.name}: attacked images {at[0]} to {at.max()}")
        return found

    def _both_ways(self, x, attacked, experts):
        own = self.answers(attacked)
        return dict(own) | {"on_clean_route": self.answers(attacked, experts)["labels"],
                            "on_attacked_route": self.answers(x, own["experts"])["labels"]}


@jax.jit
def _answers(routed_fn, x, route):
    with jax.default_matmul_precision("float32"):  # an accelerator's own default is coarser
        logits, aux = routed_fn(x, route)
    labels = jnp.where(jnp.any(jnp.isnan(logits), -1), -1, jnp.argmax(logits, -1))
    return {"labels": labels, "experts": aux["expert_ids"]}
