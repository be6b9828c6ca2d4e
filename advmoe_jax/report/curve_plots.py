"""PNG figures over several runs, of what `curves.measure` gave."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from advmoe_jax.report import figures

_MARKERS = "osD^vPX"
_ACROSS = 3  # panels beside each other
_DENSE = 1.0  # model scale
_HEIGHT = 3.8  # inches, at least
_MOST_TICKS = 10
_MOST_LINEAR = 20  # times as large as the least are MACs on a linear axis


def write(out: epath.Path, found: Mapping[str, Any]) -> tuple[str, ...]:
    """Draws what there is; figures of an earlier call that are not drawn again are removed.

    Returns:
        The names of the files; none without matplotlib.
    """
    makers = {"eps": _eps, "scale": _scale, "overview": _overview, "trajectory": _trajectory}
    return figures.write(out, {f"{name}.png": make(found) if found[name] else None for name, make in makers.items()})


def _looks():
    """A colour and a marker for each line, no two of them alike in the first 56."""
    return zip(itertools.cycle(figures.COLOURS), itertools.cycle(_MARKERS))


def _means(points: Mapping[float, list[float]]) -> tuple[list[float], list[float], list[float] | None]:
    """Places, means in percent, and deviations where any place has several runs."""
    means = [100 * float(np.mean(of)) for of in points.values()]
    deviations = [100 * float(np.std(of, ddof=1)) if len(of) > 1 else 0.0 for of in points.values()]
    return list(points), means, deviations if any(deviations) else None


def _panels(across: int, width: float, names: int):
    """A figure of a row of panels of RA, as high as the names at its right need; (None, None) without matplotlib."""
    if (figure := figures.new(width, max(_HEIGHT, 0.6 + 0.2 * names))) is None:
        return None, None
    panels = figure.subplots(1, across, squeeze=False)[0]
    for axes in panels:
        axes.set_ylabel("robust accuracy (%)")
        figures.bare(axes)
    return figure, panels


def _named(figure, title: str, handles: Mapping[str, Any], is_told: bool):
    """The figure with a title, with names at its right, and with what hollow marks are, if there are any."""
    figure.suptitle(title, fontsize="medium")
    if is_told:
        handles = {**handles, "hollow: the paper's": figure.axes[0].plot(
            [], [], "o", color=figures.GREY, markerfacecolor="white", markersize=7, linestyle="")[0]}
    figure.legend(list(handles.values()), list(handles), frameon=False, fontsize="small", loc="outside right upper")
    return figure


def _hollow(axes, x, y, colour, marker):
    axes.plot(x, y, marker, color=colour, markerfacecolor="white", markersize=8, linestyle="")


def _eps(found):
    """RA over eps, a line for each method; in grey levels where all are whole ones."""
    every = sorted({eps for points in found["eps"].values() for eps in points})
    levels = 255 * np.array(every)
    unit, name = (255, "eps (/255)") if np.allclose(levels, np.round(levels)) else (1, "eps (of images in [0, 1])")
    figure, panels = _panels(1, 7.2, len(found["eps"]))
    if figure is None:
        return None
    handles = {}
    for (label, points), (colour, marker) in zip(found["eps"].items(), _looks()):
        x, y, error = _means(points)
        handles[label] = panels[0].errorbar(unit * np.array(x), y, error, color=colour, marker=marker, markersize=4,
                                            capsize=2)
    ticks = {"xticks": unit * np.array(every)} if len(every) <= _MOST_TICKS else {}
    panels[0].set(xlabel=name, ylim=(0, None), **ticks)
    return _named(figure, found["attack"], handles, False)


def _scale(found):
    """RA over model scale; a method that was measured at r = 1 alone is a dashed line; a paper's numbers are hollow."""
    figure, panels = _panels(1, 7.2, len(found["scale"]) + 1)
    if figure is None:
        return None
    handles, axes, theirs = {}, panels[0], found["paper"]["scale"]
    for (line, points), (colour, marker) in zip(found["scale"].items(), _looks()):
        x, y, error = _means(points)
        if x == [_DENSE]:
            handles[line] = axes.axhline(y[0], color=colour, linestyle="--")
        else:
            handles[line] = axes.errorbar(x, y, error, color=colour, marker=marker, markersize=4, capsize=2)
        of_paper = theirs.get(line, {})
        _hollow(axes, list(of_paper), [100 * ra for ra in of_paper.values()], colour, marker)
    axes.set_xlabel("model scale r")
    return _named(figure, f"{found['attack']}, eps {found['at']}", handles, bool(theirs))


def _overview(found):
    """RA and SA over the multiply-accumulates of an image: a mark for each method, those that differ in model scale
    alone being joined; a paper's RA is hollow."""
    lines: dict[str, dict[str, Any]] = {}
    for label, of in found["overview"].items():
        lines.setdefault(of["line"], {})[label] = of
    figure, panels = _panels(2, 10, len(lines) + 1)
    if figure is None:
        return None
    handles, theirs, macs = {}, found["paper"]["overview"], [of["macs"] for of in found["overview"].values()]
    for axes, kind, name in zip(panels, ("ra", "sa"), ("robust", "standard")):
        for (line, of_line), (colour, marker) in zip(lines.items(), _looks()):
            x, y, error = _means(_by_macs(of_line, kind))
            handles[line] = axes.errorbar(x, y, error, color=colour, marker=marker, markersize=7, capsize=2,
                                          linewidth=0.8)
            told = {of["macs"] / 1e6: 100 * theirs[label] for label, of in of_line.items()
                    if kind == "ra" and label in theirs}
            _hollow(axes, list(told), list(told.values()), colour, marker)
        axes.set(xlabel="MACs of an image, pathway and router (millions)", ylabel=f"{name} accuracy (%)",
                 **({"xscale": "log"} if max(macs) > _MOST_LINEAR * min(macs) else {"xlim": (0, None)}))
    return _named(figure, f"{found['attack']}, eps {found['at']}", handles, bool(theirs))


def _by_macs(of_line: Mapping[str, Mapping[str, Any]], kind: str) -> dict[float, list[float]]:
    """{millions of MACs: rates}, rising."""
    found: dict[float, list[float]] = {}
    for of in sorted(of_line.values(), key=lambda of: of["macs"]):
        found.setdefault(of["macs"] / 1e6, []).extend(of[kind])
    return found


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
