"""PNG plots of runs. L layers, T log lines, E parts of a layer."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from advmoe_jax.core import files
from advmoe_jax.evaluation import results
from advmoe_jax.report import figures
from advmoe_jax.report.figures import COLOURS as _COLOURS
from advmoe_jax.report.figures import GREY as _GREY
from advmoe_jax.report.figures import RA as _RA
from advmoe_jax.report.figures import SA as _SA
from advmoe_jax.report.runs import Run

_GROUPS = 12  # of bars, side by side at most


def write(run: Run) -> tuple[str, ...] | None:
    """Draws what the run has to show into its workdir.

    Returns:
        The names of the files: training.png if it has trained, layers.png if metrics have a value for each layer. None
        without matplotlib.
    """
    train = [record for record in run.metrics if record["split"] == "train"]
    if (figure := figures.new(11, 3.4)) is None:
        return None
    if not _updates(train):
        return ()
    _training(figure, run, train)
    names = ["training.png"]
    files.write_figure(run.folder / names[0], figure)
    if vectors := _vectors(train):
        names.append("layers.png")
        files.write_figure(run.folder / names[1], _layers(run, vectors))
    return tuple(names)


def write_curve(run: Run) -> str | None:
    """Draws robust accuracy over eps, a line for each suite and checkpoint that was measured at several.

    Returns:
        "curve.png", or None where there is nothing to draw, or nothing to draw with.
    """
    lines: dict[tuple, list] = {}
    for entry in run.entries:
        lines.setdefault((entry["checkpoint"], entry["attack"], entry["norm"], entry["n"]), []).append(entry)
    lines = {key: sorted(found, key=lambda e: e["eps_value"]) for key, found in lines.items()
             if key[2] and len({entry["eps_value"] for entry in found}) > 1}
    if not lines:
        return None
    if (figure := figures.new(5.5, 3.6)) is None:
        return None
    axes = figure.subplots()
    for ((checkpoint, attack, norm, n), found), colour in zip(lines.items(), itertools.cycle(_COLOURS)):
        eps = [entry["eps_value"] for entry in found]
        low, high = (100 * np.array([entry["ra_interval"][i] for entry in found]) for i in (0, 1))
        axes.plot(eps, [100 * entry["ra"] for entry in found], "o-", color=colour, markersize=3.5,
                  label=f"{attack}, {norm}, {checkpoint}, {n} images")
        axes.fill_between(eps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="eps", ylabel="robust accuracy (%)", xlim=(0, None), ylim=(0, 100))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    files.write_figure(run.folder / "curve.png", figure)
    return "curve.png"


def write_pictures(run: Run) -> str | None:
    """Draws the images that evaluations kept, a row for each attack and checkpoint, framed by whether they are right.

    Returns:
        "pictures.png", or None where there is nothing to draw, or nothing to draw with.
    """
    kept = {entry["id"]: run.folder / "eval" / entry["id"] / results.PICTURES for entry in run.entries}
    rows = [(f"{entry['attack']}\n{entry['checkpoint']}", files.read_npz(kept[entry["id"]])) for entry in run.entries
            if kept[entry["id"]].exists()]
    if not rows:
        return None
    count = max(len(shown["image"]) for _, shown in rows)
    if (figure := figures.new(1 + 0.8 * count, 0.9 * len(rows))) is None:
        return None
    for panels, (name, shown) in zip(figure.subplots(len(rows), count, squeeze=False), rows):
        panels[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="x-small")
        for axes, image, label, predicted in zip(panels, shown["image"], shown["label"], shown["prediction"]):
            axes.imshow(np.squeeze(image, -1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
            axes.spines[:].set(color=_COLOURS[2] if label == predicted else "#CC0000", linewidth=2)
            axes.set(xticks=(), yticks=())
    files.write_figure(run.folder / "pictures.png", figure)
    return "pictures.png"


def write_team(run: Run, found: dict[str, Any]) -> str | None:
    """Draws the robust diversity of every team of a pool by its size, and the one that was chosen.

    Args:
        run: whose it is.
        found: what its team.json says.
    Returns:
        "team.png", or None without matplotlib.
    """
    sizes, diversity = zip(*((len(members.split()), rd) for members, rd in found["teams"]))
    if (figure := figures.new(5.5, 3.6)) is None:
        return None
    axes = figure.subplots()
    shift = np.random.default_rng(0).uniform(-0.3, 0.3, len(sizes))
    axes.plot(np.array(sizes) + shift, diversity, ".", color=_COLOURS[0], alpha=0.3, markersize=3, label="teams")
    axes.plot([len(found["team"])], [found["diversity"]], "D", color=_COLOURS[1], label="chosen")
    axes.axhline(found["rule"]["rd_threshold"], color=_GREY, linestyle=":", label="threshold")
    axes.set(xlabel="members", ylabel="robust diversity", xticks=sorted(set(sizes)), ylim=(None, 1.02))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    files.write_figure(run.folder / "team.png", figure)
    return "team.png"


def _updates(train: list[dict[str, Any]]) -> list[str]:
    """Names of the updates of an iteration, in their order."""
    return list(dict.fromkeys(key.partition("/")[0] for record in train for key in record if key.endswith("/loss")))


def _series(train: list[dict[str, Any]], name: str, update: str | None = None) -> tuple[np.ndarray, np.ndarray] | None:
    """Epochs (T,) and values (T, ...) of a metric, of the iteration's last update unless one is named."""
    key = f"{update or _updates(train)[-1]}/{name}"
    records = [record for record in train if key in record]
    return (np.array([r["epoch"] for r in records]), np.array([r[key] for r in records])) if records else None


def _training(figure, run: Run, train: list[dict[str, Any]]) -> None:
    losses, accuracies = figure.subplots(1, 2)
    updates = _updates(train)
    for update, colour in zip(updates, _COLOURS[2:]):
        losses.plot(*_series(train, "loss", update), color=colour, label=f"{update} update")
    losses.set(ylabel="training loss (nats per image)", title="Loss")
    select = [record for record in run.metrics if record["split"] != "train"]
    for name, colour in (("sa", _SA), ("ra", _RA)):
        series = _series(train, name)
        if series is not None:
            accuracies.plot(series[0], 100 * series[1], color=colour, alpha=0.45, label=f"training {name.upper()}")
        if select:
            accuracies.plot([r["step"] * run.epochs_per_step for r in select], [100 * r[name] for r in select], "o-",
                            color=colour, markersize=3.5, clip_on=False, label=f"{select[0]['split']} {name.upper()}")
    accuracies.set(ylabel="accuracy (%)", title="Standard (SA) and robust accuracy (RA)", ylim=(0, None))
    best = {entry["step"] for entry in run.entries if entry["checkpoint"] == "best"}
    if len(best) == 1:
        accuracies.axvline(best.pop() * run.epochs_per_step, color=_GREY, linestyle=":", label="best checkpoint")
    for axes in (losses, accuracies):
        axes.set(xlabel="epoch", xlim=(0, train[-1]["epoch"]))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    losses.legend(frameon=False, fontsize="small", loc="upper right")
    accuracies.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _vectors(train: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{metric: (epochs (T,), values (T, L))} of the metrics of the last update that have a value for each layer."""
    update = _updates(train)[-1]
    names = dict.fromkeys(key.partition("/")[2] for record in train for key in record if key.startswith(f"{update}/"))
    series = {name: _series(train, name) for name in names}
    return {name: (epochs, values) for name, (epochs, values) in series.items() if values.ndim == 2}


def _layers(run: Run, vectors: dict[str, tuple[np.ndarray, np.ndarray]]):
    """A map over epochs and layers of each metric, and stacked bars of facts that divide the images of each layer."""
    final = next((entry for entry in reversed(run.entries) if any(_divides(v) for v in entry["facts"].values())), None)
    shares = {name: np.array(v) for name, v in final["facts"].items() if _divides(v)} if final else {}
    num_layers = next(iter(vectors.values()))[1].shape[1]
    count = len(vectors) + len(shares)
    figure = figures.new(4.2 * count, 2 + 0.17 * num_layers)
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, (name, (epochs, values)) in zip(panels, vectors.items()):
        edges = np.concatenate([[0], epochs]), np.arange(num_layers + 1) - 0.5
        mesh = axes.pcolormesh(*edges, values.T, cmap="cividis", vmin=0, vmax=1)
        figure.colorbar(mesh, ax=axes, pad=0.02)
        axes.set(title=name.replace("_", " "), xlabel="epoch")
    for axes, (name, values) in zip(panels[len(vectors):], shares.items()):
        _stacked(axes, f"{name}, {final['checkpoint']} checkpoint", values)
    panels[0].set(ylabel="layer or expert", yticks=np.arange(0, num_layers, 1 + num_layers // 20),
                  ylim=(num_layers - 0.5, -0.5))
    return figure


def _divides(value: Any) -> bool:
    """Whether a fact is shares (L, E) that are 1 in each row together."""
    return np.ndim(value) == 2 and bool(np.allclose(np.sum(value, 1), 1, atol=1e-4))


def _stacked(axes, title: str, shares: np.ndarray) -> None:
    start = np.zeros(len(shares))
    for number, share in enumerate(100 * shares.T):
        axes.barh(np.arange(len(shares)), share, left=start, height=0.8, color=_COLOURS[number % len(_COLOURS)],
                  label=str(number))
        start = start + share
    even = 100 / shares.shape[1] * np.arange(1, shares.shape[1])
    axes.vlines(even, -0.5, len(shares) - 0.5, colors="white", linestyles=":", linewidth=1)
    axes.set(title=title, xlabel="share of clean test images (%)", xlim=(0, 100))
    axes.figure.legend(frameon=False, fontsize="small", ncols=min(4, shares.shape[1]), loc="outside lower right")


def write_rows(path, labels: list[str], rates: list[tuple[float, float]], paper: list[float | None]) -> bool:
    """Draws robust accuracies as bars, mean and deviation in percent, with a paper's own as marks.

    Returns:
        Whether there is anything to draw with.
    """
    if (figure := figures.new(6.5, 1 + 0.35 * len(labels))) is None:
        return False
    axes, place = figure.subplots(), np.arange(len(labels))
    means, deviations = np.array(rates).T
    axes.barh(place, means, xerr=deviations, height=0.7, color=_RA, ecolor=_GREY, capsize=2)
    told = [(i, value) for i, value in enumerate(paper) if value is not None]
    if told:
        axes.plot([value for _, value in told], [i for i, _ in told], "D", color=_COLOURS[-1], label="paper")
        axes.legend(frameon=False, fontsize="small")
    axes.set(yticks=place, yticklabels=labels, xlabel="robust accuracy (%)", xlim=(0, 100),
             ylim=(len(labels) - 0.5, -0.5))
    axes.spines[["top", "right"]].set_visible(False)
    files.write_figure(path, figure)
    return True


def write_superscores(path, labels: list[str], scores: list[Mapping[str, float]]) -> bool:
    """Draws the superscores of each label as a group of bars, one for each criterion, in one line or more.

    Args:
        path: of the PNG.
        labels: of the groups.
        scores: {criterion: fraction} of each, of the same criteria.
    Returns:
        Whether there is anything to draw with.
    """
    names, lines = list(scores[0]), -(-len(labels) // _GROUPS)
    groups = -(-len(labels) // lines)  # in a line, about as many in each
    if (figure := figures.new(1.5 + max(5.0, 0.28 * len(names) * groups), 3.5 * lines + 0.5)) is None:
        return False
    width, colours = 0.84 / len(names), list(itertools.islice(itertools.cycle(_COLOURS), len(names)))
    for line, axes in enumerate(figure.subplots(lines, squeeze=False)[:, 0]):
        shown = slice(line * groups, (line + 1) * groups)
        place = np.arange(len(labels[shown]))
        for number, (name, colour) in enumerate(zip(names, colours)):
            heights = [100 * of[name] for of in scores[shown]]
            bars = axes.bar(place + (number - (len(names) - 1) / 2) * width, heights, width, color=colour,
                            label="" if line else name)
            axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=5, rotation=90, padding=2)
        axes.set(xticks=place, xlim=(-0.6, groups - 0.4), ylabel="accuracy (%), best of each", ylim=(0, 112),
                 yticks=range(0, 101, 20))
        axes.set_xticklabels(labels[shown], rotation=40, ha="right", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize="small", ncols=len(names), loc="outside upper center")
    files.write_figure(path, figure)
    return True


def write_matrix(path, rows: Sequence[str], columns: Sequence[str], rates: np.ndarray,
                 label: str = "accuracy (%)", is_log: bool = False) -> bool:
    """Draws numbers in percent as a heat map, NaN where nothing was measured.

    Args:
        path: of the PNG.
        rows, columns: names.
        rates: (rows, columns).
        label: what they are.
        is_log: whether colours are by logarithms, from 0.1 % on.
    Returns:
        Whether there is anything to draw with.
    """
    if (figure := figures.new(3 + 0.55 * len(columns), 2 + 0.28 * len(rows))) is None:
        return False
    from matplotlib.colors import LogNorm, Normalize

    axes = figure.subplots()
    scale = LogNorm(0.1, 100, clip=True) if is_log else Normalize(0, 100)
    shown = axes.imshow(rates, cmap="cividis", norm=scale, aspect="auto")
    for i, row in enumerate(rates):
        for j, value in enumerate(row):
            if np.isfinite(value):
                axes.text(j, i, f"{value:.{int(is_log and value < 10)}f}", ha="center", va="center", fontsize="small",
                          color="black" if scale(value) > 0.55 else "white")
    axes.set(xticks=np.arange(len(columns)), yticks=np.arange(len(rows)), yticklabels=rows)
    axes.set_xticklabels(columns, rotation=45, ha="right")
    figure.colorbar(shown, ax=axes, label=label)
    files.write_figure(path, figure)
    return True


def nodes(found: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> Any | None:
    """Draws how much each node of each layer matters: a map for every score, down, and run, across.

    Nodes are in one order in all maps, by falling importance in the first: where another map has the same it fades from
    left to right as the first one does.

    Args:
        found: {run: {score: {layer: a number for each node, the largest 1}}}.
    Returns:
        The figure; None without matplotlib.
    """
    scores, width = list(next(iter(found.values()))), 240
    first = found[next(iter(found))][scores[0]]
    order = {layer: np.argsort(-np.array(of), kind="stable") for layer, of in first.items()}
    if (figure := figures.new(1.6 + 2.6 * len(found), 0.9 + len(scores) * (0.5 + 0.13 * len(first)))) is None:
        return None
    panels = figure.subplots(len(scores), len(found), sharex=True, sharey=True, squeeze=False)
    for line, score in zip(panels, scores):
        for axes, (run, by_score) in zip(line, found.items()):
            values = [np.array(of)[order[layer]] for layer, of in by_score[score].items()]
            sampled = [of[np.arange(width) * len(of) // width] for of in values]
            shown = axes.imshow(sampled, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
                                extent=(0, 100, len(values) - 0.5, -0.5))
            axes.set_title(f"{score}, {run}", fontsize="medium")
        line[0].set_yticks(np.arange(len(first)), first, fontsize="x-small")
    figure.supxlabel(f"nodes of a layer (%), by falling importance in {scores[0]}, {next(iter(found))}",
                     fontsize="medium")
    figure.colorbar(shown, ax=panels, label="importance, largest of the layer 1", aspect=60, pad=0.01)
    return figure


def ranks(alike: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> Any | None:
    """Draws over the layers how alike two things rank weights.

    Args:
        alike: {row: {panel: {pair: {layer: correlation of ranks}}}}; rows without pairs are left out.
    Returns:
        The figure; None where there is nothing to draw, or nothing to draw with.
    """
    rows = {row: panels for row, panels in alike.items() if any(panels.values())}
    if not rows:
        return None
    layers = list(next(iter(next(iter(next(iter(rows.values())).values())).values())))
    columns = max(map(len, rows.values()))
    if (figure := figures.new(2.2 + columns * (1.6 + 0.1 * len(layers)), 0.8 + 2.6 * len(rows))) is None:
        return None
    for below, (row, panels) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows.items()):
        found = below.subplots(1, columns, sharey=True, squeeze=False)[0]
        for axes, (panel, pairs) in zip(found, panels.items()):
            for (pair, of), colour in zip(pairs.items(), itertools.cycle(_COLOURS)):
                axes.plot(range(len(layers)), list(of.values()), "o-", color=colour, markersize=3, label=pair)
            axes.axhline(0, color=_GREY, linewidth=0.6)
            axes.set(title=panel, ylim=(min(-0.25, *(v for of in pairs.values() for v in of.values())) - 0.03, 1.05))
            axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize="x-small")
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in found[len(panels):]:
            axes.set_visible(False)
        found[0].set_ylabel(f"correlation of ranks, {row}")
        handles, labels = found[0].get_legend_handles_labels()
        below.legend(handles, labels, frameon=False, fontsize="small", loc="outside right upper")
    return figure
