"""PNG figures over several runs, of what `curves.measure` gave."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from advmoe_jax.core import files
from advmoe_jax.report import figures

_MARKERS = "osD^vPX"
_ACROSS = 3  # panels beside each other
_DENSE = 1.0  # model scale


def write(out: epath.Path, found: Mapping[str, Any]) -> tuple[str, ...]:
    """Draws what there is; figures of an earlier call that are not drawn again are removed.

    Returns:
        The names of the files; none without matplotlib.
    """
    drawn = []
    for name, make in {"eps": _eps, "scale": _scale, "overview": _overview, "trajectory": _trajectory}.items():
        figure = make(found) if found[name] else None
        if figure is None:
            (out / f"{name}.png").unlink(missing_ok=True)
        else:
            files.write_figure(out / f"{name}.png", figure)
            drawn.append(f"{name}.png")
    return tuple(drawn)


def _looks():
    """A colour and a marker for each line, no two of them alike in the first 56."""
    return zip(itertools.cycle(figures.COLOURS), itertools.cycle(_MARKERS))


def _means(points: Mapping[float, list[float]]) -> tuple[list[float], list[float], list[float] | None]:
    """Places, means in percent, and deviations where any place has several runs."""
    means = [100 * float(np.mean(of)) for of in points.values()]
    deviations = [100 * float(np.std(of, ddof=1)) if len(of) > 1 else 0.0 for of in points.values()]
    return list(points), means, deviations if any(deviations) else None


def _axes(label: str):
    if (figure := figures.new(7.2, 3.8)) is None:
        return None, None
    axes = figure.subplots()
    axes.set(xlabel=label, ylabel="robust accuracy (%)")
    figures.bare(axes)
    return figure, axes


def _legend(figure):
    figure.legend(frameon=False, fontsize="small", loc="outside right upper")
    return figure


def _eps(found):
    """RA over eps, a line for each method; in grey levels where all are whole ones."""
    levels = 255 * np.array([eps for points in found["eps"].values() for eps in points])
    unit, name = (255, "eps (/255)") if np.allclose(levels, np.round(levels)) else (1, "eps (of images in [0, 1])")
    figure, axes = _axes(name)
    if figure is None:
        return None
    for (label, points), (colour, marker) in zip(found["eps"].items(), _looks()):
        x, y, error = _means(points)
        axes.errorbar(unit * np.array(x), y, error, color=colour, marker=marker, markersize=4, capsize=2, label=label)
    axes.set(title=found["attack"], ylim=(0, None))
    axes.title.set_fontsize("medium")
    return _legend(figure)


def _scale(found):
    """RA over model scale; a method that was measured at r = 1 alone is a dashed line; a paper's numbers are hollow."""
    figure, axes = _axes("model scale r")
    if figure is None:
        return None
    for (line, points), (colour, marker) in zip(found["scale"].items(), _looks()):
        x, y, error = _means(points)
        if x == [_DENSE]:
            axes.axhline(y[0], color=colour, linestyle="--", label=line)
        else:
            axes.errorbar(x, y, error, color=colour, marker=marker, markersize=4, capsize=2, label=line)
        if theirs := found["paper"]["scale"].get(line):
            axes.plot(list(theirs), [100 * ra for ra in theirs.values()], marker, color=colour, markerfacecolor="white",
                      markersize=7, linestyle="", label=f"{line}, paper's")
    axes.set(title=f"{found['attack']}, eps {found['at']}")
    axes.title.set_fontsize("medium")
    return _legend(figure)


def _overview(found):
    """RA and SA over the multiply-accumulates of an image: a mark for each method; a paper's RA is hollow."""
    if (figure := figures.new(10, 3.8)) is None:
        return None
    panels = figure.subplots(1, 2)
    for axes, kind, name in zip(panels, ("ra", "sa"), ("robust", "standard")):
        for (label, of), (colour, marker) in zip(found["overview"].items(), _looks()):
            rates = 100 * np.array(of[kind])
            error = np.std(rates, ddof=1) if len(rates) > 1 else None
            axes.errorbar(of["macs"] / 1e6, rates.mean(), error, color=colour, marker=marker, markersize=8, capsize=2,
                          linestyle="", label=label if kind == "ra" else None)
            theirs = found["paper"]["overview"].get(label)
            if kind == "ra" and theirs is not None:
                axes.plot(of["macs"] / 1e6, 100 * theirs, marker, color=colour, markerfacecolor="white", markersize=8,
                          linestyle="", label=f"{label}, paper's")
        axes.set(xlabel="MACs of an image, pathway and router (millions)", ylabel=f"{name} accuracy (%)",
                 xlim=(0, None))
        figures.bare(axes)
    figure.suptitle(f"{found['attack']}, eps {found['at']}", fontsize="medium")
    return _legend(figure)


def _trajectory(found):
    """SA and RA over epochs: a panel for each method, a pair of lines for each of its runs."""
    shown = found["trajectory"]
    across = min(len(shown), _ACROSS)
    below = math.ceil(len(shown) / across)
    if (figure := figures.new(1 + 3.4 * across, 0.8 + 2.5 * below)) is None:
        return None
    panels = figure.subplots(below, across, sharey=True, squeeze=False).ravel()
    for axes, (label, of_label) in zip(panels, shown.items()):
        for number, of in enumerate(of_label):
            for kind, colour in (("sa", figures.SA), ("ra", figures.RA)):
                axes.plot(of["epochs"], [100 * rate for rate in of[kind]], ".-", color=colour, linewidth=1,
                          label=f"{kind.upper()}, {of['on']} images" if not number else None)
        axes.set(xlabel="epoch", xlim=(0, None), ylim=(0, 100))
        axes.set_title(label, fontsize="medium", wrap=True)
        figures.bare(axes)
    for axes in panels[len(shown):]:
        axes.set_visible(False)
    for axes in panels[::across]:
        axes.set_ylabel("accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", ncols=2,
                  loc="outside upper center")
    return figure
