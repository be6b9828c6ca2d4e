"""PNG figures of what a look into the routing of runs found. K classes, L routed choices, E experts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from advmoe_jax.report import figures, routed
from advmoe_jax.report.pathways import CATEGORIES
from advmoe_jax.report.routing_tables import TITLES

_BROKEN = dict(zip(CATEGORIES, ("#009E73", "#F0E442", "#E69F00", "#D55E00")))
_LEAST_TOLD = 0.05  # of the images, for a number inside a bar
_ACROSS = 5  # maps beside each other
_MOST_NAMED = 40  # rows of a map that have names


def write(out: epath.Path, found: Mapping[str, Any]) -> tuple[str, ...]:
    """Draws what `routing.measure` gave; figures of an earlier call that are not drawn again are removed.

    Returns:
        The names of the files; none without matplotlib.
    """
    return figures.write(out, {
        "dissection.png": _dissection(found), "routes.png": _routes(found), "layers.png": _layers(found),
        "classes.png": _classes(found), "iou.png": _iou(found) if found["against"] else None})


def _dissection(found):
    """Stacked bars: a panel for each run, a bar for each attack."""
    runs = found["runs"]
    lines = max(len(run["attacks"]) for run in runs.values())
    if (figure := figures.new(8, 0.9 + len(runs) * (0.45 + 0.32 * lines))) is None:
        return None
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, run) in zip(panels, runs.items()):
        start = np.zeros(len(run["attacks"]))
        for category in CATEGORIES:
            shares = np.array([of[category] for of in run["attacks"].values()]) / found["images"]
            axes.barh(np.arange(len(start)), 100 * shares, left=100 * start, height=0.8, color=_BROKEN[category],
                      label=TITLES[category])
            for row, (share, left) in enumerate(zip(shares, start)):
                if share >= _LEAST_TOLD:
                    axes.text(100 * (left + share / 2), row, f"{100 * share:.1f}", ha="center", va="center",
                              fontsize="small")
            start = start + shares
        axes.set(title=name, yticks=np.arange(len(start)), yticklabels=list(run["attacks"]), xlim=(0, 100),
                 ylim=(len(start) - 0.5, -0.5))
        figures.bare(axes, "")
    panels[-1].set_xlabel(f"share of {found['images']} test images (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", ncols=len(CATEGORIES),
                  title="What the attack has broken", title_fontsize="small", loc="outside upper center")
    return figure


def _routes(found):
    """Bars of SA and RA: a panel for each run, a pair for each route."""
    runs = found["runs"]
    names = list(next(iter(runs.values()))["routes"])
    if (figure := figures.new(2 + 3.4 * len(runs), 1.2 + 0.4 * len(names))) is None:
        return None
    panels, place = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0], np.arange(len(names))
    for axes, (name, run) in zip(panels, runs.items()):
        rates = {part: [100 * of[part] for of in run["routes"].values()] for part in ("sa", "ra", "transferred")}
        axes.barh(place - 0.2, rates["sa"], height=0.38, color=figures.SA, label="SA")
        axes.barh(place + 0.2, rates["ra"], height=0.38, color=figures.RA, label="RA, attacked on this route")
        axes.plot(rates["transferred"], place + 0.2, "D", color=figures.COLOURS[-1], markersize=4, clip_on=False,
                  linestyle="", label="RA, attacked as a whole network")
        axes.set(title=name, xlabel="accuracy (%)", xlim=(0, 100), yticks=place, yticklabels=names,
                 ylim=(len(names) - 0.5, -0.5))
        figures.bare(axes, "x")
    panels[0].set_ylabel("route that images take")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", ncols=3,
                  loc="outside upper center")
    return figure


def _layers(found):
    """For each run maps of the load of each layer and expert, clean and attacked, and the flips of each layer."""
    runs = found["runs"]
    layers = _layer_names(found)
    width = 1 + 0.16 * found["experts"]
    if (figure := figures.new(5.4 + 2 * width, 0.9 + len(runs) * (0.8 + 0.2 * len(layers)))) is None:
        return None
    lines = figure.subplots(len(runs), 3, squeeze=False, width_ratios=(width, width, 2.6))
    for line, (name, run) in zip(lines, runs.items()):
        for axes, images in zip(line, ("clean", "attacked")):
            shown = _map(axes, run["pathways"][images]["load"], layers if images == "clean" else [],
                         [str(e) for e in range(found["experts"])])
            axes.set(title=f"{name}: load,\n{images} images", xlabel="expert")
        line[0].set_ylabel("layer")
        place = np.arange(len(layers))
        for number, attack in enumerate((routed.WORST, routed.ROUTER)):
            line[2].barh(place + 0.4 * number - 0.2, 100 * np.array(run["attacks"][attack]["flip_rate"]), height=0.38,
                         color=figures.COLOURS[number], label={routed.WORST: "whole network"}.get(attack, attack))
        line[2].set(title=f"{name}: other expert\nthan when clean", xlabel="share of images (%)", xlim=(0, 100),
                    yticks=place, yticklabels=[], ylim=(len(layers) - 0.5, -0.5))
        line[2].tick_params("y", length=0)
        figures.bare(line[2], "x")
    figure.colorbar(shown, ax=lines[:, :2], label="share of images (%)", location="left", shrink=0.8)
    figure.legend(*lines[0, 2].get_legend_handles_labels(), frameon=False, fontsize="small", ncols=2,
                  title="attacked:", title_fontsize="small", loc="outside lower right")
    return figure


def _classes(found):
    """For each run maps of the share that each expert gets of the clean images of a class: a map for each expert, whose
    columns are layers; where there is one choice for all layers one map, whose columns are experts."""
    runs, layers, classes = found["runs"], _layer_names(found), found["classes"]
    count = found["experts"] if len(layers) > 1 else 1
    columns = layers if len(layers) > 1 else [f"expert {e}" for e in range(found["experts"])]
    across = min(count, _ACROSS)
    below = math.ceil(count / across)
    size = 0.5 + 0.19 * min(len(classes), _MOST_NAMED)
    if (figure := figures.new(2.4 + across * (0.3 + 0.22 * len(columns)), len(runs) * (0.5 + below * (1.4 + size)))
            ) is None:
        return None
    every = figure.subfigures(len(runs), 1, squeeze=False)[:, 0]
    for part, (name, run) in zip(every, runs.items()):
        panels = part.subplots(below, across, squeeze=False)
        shares = np.array(run["pathways"]["clean"]["by_class"])  # (K, L, E)
        maps = np.moveaxis(shares, 2, 0) if len(layers) > 1 else shares[:, 0][None]
        for number, axes in enumerate(panels.ravel()):
            if number >= count:
                axes.set_visible(False)
                continue
            shown = _map(axes, maps[number], classes if number % across == 0 else [], columns)
            axes.set_title(f"expert {number}" if len(layers) > 1 else "", fontsize="medium")
        for axes in panels[:, 0]:
            axes.set_ylabel("class")
        part.suptitle(name)
        part.colorbar(shown, ax=panels, label="share of the class's\nclean images (%)")
    return figure


def _iou(found):
    """Densities of the scores of clean and attacked images, and where chance is: a panel for each run."""
    runs = {name: run["iou"] for name, run in found["runs"].items()}
    if (figure := figures.new(1 + 3.8 * len(runs), 3.6)) is None:
        return None
    panels = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, iou) in zip(panels, runs.items()):
        edges = iou["start"] + iou["step"] * np.arange(len(iou["clean"]["counts"]) + 1)
        for images, colour in (("clean", figures.SA), ("attacked", figures.RA)):
            counts = np.array(iou[images]["counts"])
            axes.stairs(counts / counts.sum() / iou["step"], edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(counts / counts.sum() / iou["step"], edges, color=colour, label=f"{images} images")
        axes.axvline(iou["chance"], color=figures.GREY, linestyle=":", label="chance")
        axes.set(title=name, xlabel="IoU with the sparse mask")
        figures.bare(axes)
    panels[0].set_ylabel("density")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", ncols=3,
                  loc="outside upper center")
    return figure


def _layer_names(found: Mapping[str, Any]) -> list[str]:
    """Of the choices: of the routed layers, or of all together."""
    choices = len(next(iter(found["runs"].values()))["pathways"]["clean"]["load"])
    return found["layers"] if choices == len(found["layers"]) else ["all layers"]


def _map(axes, values: Any, rows: Sequence[str], columns: Sequence[str]):
    """A map of shares in percent; rows have names if there are not too many."""
    shown = axes.imshow(100 * np.asarray(values), cmap="cividis", vmin=0, vmax=100, aspect="auto",
                        interpolation="nearest")
    named = rows if len(rows) <= _MOST_NAMED else []
    axes.set_yticks(np.arange(len(named)), named, fontsize="x-small")
    axes.set_xticks(np.arange(len(columns)), columns, fontsize="x-small",
                    rotation=90 if max(map(len, columns)) > 2 else 0)
    return shown
