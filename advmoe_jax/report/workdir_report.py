"""WORKDIR/report.md: everything that one run says about itself, with plots beside it."""

import sys
from typing import Any

from advmoe_jax.core import files, tables
from advmoe_jax.core.tables import Table
from advmoe_jax.report import commands, plots, runs
from advmoe_jax.report.runs import Run

_DEFINITION = ("Robust accuracy (RA) = worst case per example over the gradients attacked through; images "
               "misclassified when clean count as broken. SA is the accuracy on clean images. Both in percent, with "
               "Wilson 95 % intervals.")
_COLUMNS = ("The columns after RA are the accuracies under one gradient each. Of a routed network: with the router "
            "held constant, and through it by each straight-through estimate. Of a mixture: through its gate, with the "
            "gate held constant, and through the experts that are not served.")
_ATTEMPTS = ("Robust accuracy = worst case per example. The attacks of a suite, in order: images that they were given, "
             "that they broke, and the robust accuracy after them.")
_MORE = {"ra": "RA alone %", "accuracy": "accuracy %"}
_OF_ALL = "Accuracy: as SR-GKP's tables have it, with images that were wrong when clean and are right after the attack."
_VIEWS = {"none": "router constant"}


def write(run: Run) -> None:
    """Writes report.md and its plots into the workdir, and prints the tables of results."""
    written = plots.write(run)
    if written is None:
        print("no plots: matplotlib is not installed; pip install 'advmoe_jax[quickstart]' brings it", file=sys.stderr)
    accuracy = accuracy_tables(run)
    parts = [_head(run)]
    if accuracy:
        views = " " + _COLUMNS if len(run.entries[0]["ra_by_view"]) > 1 else ""
        parts += ["## Accuracy\n", f"{_DEFINITION}{views}\n", *map(tables.markdown, accuracy)]
        attempts = attempt_tables(run)
        if attempts:
            parts += [f"{_ATTEMPTS}\n", *map(tables.markdown, attempts)]
        if curve := plots.write_curve(run):
            parts.append(f"![{curve}]({curve})\n")
        parts.append(tables.markdown(macs_table(run), 2))
    for title, shown in fact_tables(run).items():
        parts += [f"## {title}\n", *map(tables.markdown, shown)]
    if written:
        chosen = run.config.train
        parts += ["## Training\n", f"The best checkpoint is chosen by {chosen.select_attack} on up to "
                  f"{chosen.select_examples} "
                  f"{chosen.select_on} images; training accuracies are of the training attack, on batch statistics.\n",
                  *(f"![{name}]({name})\n" for name in written)]
    parts += ["## Reproduce\n", "config.json beside this file holds every field.\n",
              "\n".join(("```", commands.train(run), *commands.evaluate(run), "```")) + "\n"]
    files.write_text(run.folder / "report.md", "\n".join(parts))
    tables.show((*accuracy, macs_table(run)) if accuracy else (), as_text=False)
    print(f"report: {run.folder / 'report.md'}" + ("" if accuracy else " (not evaluated yet)"))


def _head(run: Run) -> str:
    config = run.config
    if not run.entries:
        return f"# {config.name}\n\nNot evaluated yet. Config {config.name}, training seed {config.seed}.\n"
    lines = [f"# {run.entries[0]['method']}",
             f"Config {config.name}, data {config.data.name}, training seed {config.seed}; "
             f"evaluated in {runs.circumstances(run.entries)}.",
             *(f"> {warning}" for warning in runs.warnings(run.entries, notes=True))]
    return "\n\n".join(lines) + "\n"


def accuracy_tables(run: Run) -> list[Table]:
    """One table for each attack, set of images and seed, with a row for each checkpoint."""
    return [_accuracy(entries) for entries in _by(run, lambda e: (runs.attack_key(e), e["seed"]))]


def _accuracy(entries: list[dict[str, Any]]) -> Table:
    views = tuple(entries[0]["ra_by_view"]) if len(entries[0]["ra_by_view"]) > 1 else ()
    shown = runs.shows_adaptive(entries)
    rows = [(
        e["checkpoint"], str(e["step"]), str(e["n"]), tables.with_interval(e["sa"], e["sa_interval"]),
        tables.with_interval(e["ra"], e["ra_interval"]), *([runs.adaptive([e])] if shown else []),
        *(tables.percent(e["ra_by_view"][v]) for v in views))
        for e in entries]
    columns = ("checkpoint", "step", "n", "SA %", "RA %", *([runs.ADAPTIVE] if shown else []),
               *(_VIEWS.get(view, view) for view in views))
    return Table(runs.attack_title(entries[0]), columns, rows, (runs.attack_settings(entries),))


def attempt_tables(run: Run) -> list[Table]:
    """A table for each suite of several attacks, with a row for each attack and gradient."""
    found = []
    for entry in run.entries:
        if len({attempt["attack"] for attempt in entry["attempts"]}) > 1:
            more = {column: name for name, column in _MORE.items() if any(name in a for a in entry["attempts"])}
            rows = [(a["attack"], _VIEWS.get(a["view"], a["view"]), str(a["attacked"]), str(a["broken"]),
                     tables.percent(a["ra_after"]), f"{a['seconds']:.1f}",
                     *(tables.percent(a[name]) if name in a else "" for name in more.values()))
                    for a in entry["attempts"]]
            found.append(Table(f"{runs.attack_title(entry)}, {entry['checkpoint']} checkpoint",
                               ("attack", "gradient", "images", "broken", "RA after %", "s", *more), rows,
                               (_OF_ALL,) if "accuracy %" in more else ()))
    return found


def macs_table(run: Run) -> Table:
    """What one image costs: pathway, router, total and executed."""
    macs = run.entries[0]["macs"]
    names = ("pathway", "router", "total", "executed")
    return Table("MACs per image, millions", names, [tuple(tables.millions(macs[name]) for name in names)],
                 ("Pathway: one expert a layer. Executed: what is computed, with model.dispatch=all every expert.",))


def fact_tables(run: Run) -> dict[str, list[Table]]:
    """What the model says of itself, {title: a table for each checkpoint and set of images}."""
    shown: dict[str, list[Table]] = {}
    for entries in _by(run, lambda e: (e["checkpoint"], e["n"])):
        first = entries[0]
        where = f"{first['checkpoint']} checkpoint (step {first['step']}), {first['n']} test images"
        for of_entries in zip(*([Table(**stored) for stored in entry["fact_tables"]] for entry in entries)):
            shown.setdefault(of_entries[0].title, []).append(_beside(where, entries, of_entries))
    return shown


def _beside(where: str, entries: list[dict[str, Any]], shown: tuple[Table, ...]) -> Table:
    """Tables of several evaluations as one: columns that they agree in once, the others for each."""
    columns, cells = [], []
    for number, name in enumerate(shown[0].columns):
        of_each = [[row[number] for row in table.rows] for table in shown]
        if all(column == of_each[0] for column in of_each) and name not in shown[0].varying:
            columns.append(name)
            cells.append(of_each[0])
        else:
            columns += [f"{name}, {e['attack']} {e['norm']} {e['eps']}" for e in entries]
            cells += of_each
    return Table(where, tuple(columns), list(zip(*cells)), shown[0].notes)


def _by(run: Run, key) -> list[list[dict[str, Any]]]:
    groups: dict[Any, list] = {}
    for entry in run.entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())
