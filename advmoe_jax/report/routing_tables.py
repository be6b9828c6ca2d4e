"""What a look into the routing of runs found, as tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from advmoe_jax.core import tables
from advmoe_jax.core.tables import Table
from advmoe_jax.report import routed
from advmoe_jax.report.pathways import CATEGORIES

TITLES = dict(zip(CATEGORIES, ("(1) neither", "(2) router alone", "(3) pathway alone", "(4) both")))
_DISSECTION = (
    "Percent of the images. An attack has broken the router where any layer takes another expert than for the clean "
    "image, and the pathway where the answer is wrong, as it counts to be where the clean image is misclassified. RA "
    "is (1) + (2), the router's robustness (1) + (3). Flips: of a choice, mean over the layers. The last two columns "
    "put the two sides together: the share that is right where the attacked image takes the clean one's route, and "
    "where the clean image takes the attacked one's.")
_ATTACKS = (
    f"The whole network is attacked with its router held constant and through it by each straight-through gradient; "
    f"'{routed.WORST}' takes for each image the one that breaks most. '{routed.ROUTER.capitalize()}' only asks for "
    f"other experts, whatever the answer; '{routed.EXPERTS}' raises the loss on the clean image's route, and is judged "
    "on the route that its image takes.")
_ROUTES = (
    "Percent of the images that are right when clean (SA) and attacked (RA) where they take a route whatever the "
    f"router says. '{routed.OWN.capitalize()}': the router's choice, attacked as a whole. "
    f"'{routed.HELD.capitalize()}': the clean image's. 'Expert e': in all layers. '{routed.COMMON.capitalize()}': the "
    f"pathway that most clean images take, for all. '{routed.RANDOM.capitalize()}': each image's own draw. Attacks "
    "know the route; 'transferred': they were made for the whole network.")
_PATHWAYS = (
    "Distinct: pathways that some image takes. Effective: so many equally frequent ones would have the same entropy. "
    "Attacked images are the worst of the attacks on the whole network.")
_LAYERS = ("Load: share of the images that each expert gets. Entropy: of the load, 1 is even and 0 is one expert for "
           "all. Flips: share of the images that take another expert, whatever they were when clean.")
_IOU = (
    "Intersection over union of the channels of an image's pathway and those that the sparse run keeps, of all routed "
    "layers together. Chance: what masks of as many channels, drawn at random, tend to. Common: the area that the "
    "densities of clean and attacked images share, 1 where they are the same.")


def of(found: Mapping[str, Any]) -> list[Table]:
    """Tables of what `routing.measure` gave."""
    where = f"{found['images']} test images of {found['data']}"
    shown = [_dissection(found, where), _routes(found, where), _pathways(found, where)]
    shown += [_layers(found, name, run) for name, run in found["runs"].items()]
    return shown + ([_iou(found)] if found["against"] else [])


def _dissection(found, where) -> Table:
    rows = []
    for name, run in found["runs"].items():
        for attack, of_attack in run["attacks"].items():
            shares = [of_attack[category] / found["images"] for category in CATEGORIES]
            shares += [of_attack["ra"], of_attack["router_robust"], np.mean(of_attack["flip_rate"]),
                       of_attack["on_clean_route"], of_attack["on_attacked_route"]]
            rows.append((name, attack, *map(tables.percent, shares)))
    columns = ("run", "attack", *TITLES.values(), "RA", "router robust", "flips", "attacked on clean route",
               "clean on attacked route")
    return Table(f"Dissection of attacks, {where}", columns, rows, (_DISSECTION, _ATTACKS, f"Attack: {found['attack']}."
                                                                    ))


def _routes(found, where) -> Table:
    rows = [(name, route, *(tables.percent(of_route[column]) for column in ("sa", "ra", "transferred")))
            for name, run in found["runs"].items() for route, of_route in run["routes"].items()]
    return Table(f"What routes are worth, {where}", ("run", "route", "SA", "RA", "RA, transferred"), rows, (_ROUTES,))


def _pathways(found, where) -> Table:
    rows = [(name, images, str(of_images["distinct"]), f"{of_images['possible']:,}",
             tables.decimals(of_images["effective"]), tables.percent(of_images["common_share"]),
             tables.decimals(np.mean(of_images["load_entropy"])))
            for name, run in found["runs"].items() for images, of_images in run["pathways"].items()]
    return Table(f"Pathways, {where}", ("run", "images", "distinct", "of", "effective", "take the most common, %",
                                        "entropy of loads, mean"), rows, (_PATHWAYS,))


def _layers(found, name, run) -> Table:
    clean, attacked = run["pathways"]["clean"], run["pathways"]["attacked"]
    flips = [run["attacks"][attack]["flip_rate"] for attack in (routed.WORST, routed.ROUTER)]

    def loads(shares):
        return " / ".join(map(tables.percent, shares))

    layers = found["layers"] if len(clean["load"]) == len(found["layers"]) else ["all"]
    rows = [(layer, loads(before), loads(after), *map(tables.decimals, entropies), *map(tables.percent, of_layer))
            for layer, before, after, *entropies, of_layer in zip(
                layers, clean["load"], attacked["load"], clean["load_entropy"], attacked["load_entropy"], zip(*flips))]
    return Table(f"Routed layers of {name}", (
        "layer", "load %, clean", "load %, attacked", "entropy, clean", "entropy, attacked",
        f"flips %, {routed.WORST}", f"flips %, {routed.ROUTER}"), rows, (_LAYERS,))


def _iou(found) -> Table:
    rows = [(name, images, *(f"{of_images[part]:.3f}" for part in ("mean", "deviation", "least", "most")),
             str(of_images["values"]), f"{run['iou']['chance']:.3f}", f"{run['iou']['common']:.3f}")
            for name, run in found["runs"].items() for images, of_images in (
                (images, run["iou"][images]) for images in ("clean", "attacked"))]
    return Table(f"Pathways against the mask of {found['against']}", (
        "run", "images", "IoU, mean", "deviation", "least", "most", "different values", "chance", "common"), rows,
        (_IOU,))
