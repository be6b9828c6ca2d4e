"""WORKDIR/report.md: everything that one run says about itself, with plots beside it."""

import json
import sys
from collections.abc import Iterable
from typing import Any

from advmoe_jax.core import files, tables
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.tables import Table
from advmoe_jax.report import commands, criteria, plots, runs
from advmoe_jax.report.runs import Run

_DEFINITION = ("Robust accuracy (RA) = worst case per example over the gradients attacked through; images "
               "misclassified when clean count as broken. SA is the accuracy on clean images. Both in percent, with "
               "Wilson 95 % intervals.")
_COLUMNS = ("The columns after RA are the accuracies under one gradient each: with the router held constant, and "
            "through it by each straight-through estimate.")
_OF_VIEWS = "The columns after RA are the accuracies under one gradient each, all on the answers that users get."
_ATTEMPTS = ("Robust accuracy = worst case per example. The attacks of a suite, in order: images that they were given, "
             "that they broke, and the robust accuracy after them.")
_MORE = {"ra": "RA alone %", "accuracy": "accuracy %"}
_OF_ALL = "Accuracy: on what the attack makes of all images, also of those that are wrong when clean."
_PICTURES = "The first test images as these attacks show them; those in a red frame are misclassified."
_VIEWS, _PLAIN = {"none": "router constant"}, {"none": "plain"}


def write(run: Run) -> None:
    """Writes report.md and its plots into the workdir, and prints the tables of results."""
    written = plots.write(run)
    if written is None:
        print("no plots: matplotlib is not installed; pip install 'advmoe_jax[quickstart]' brings it", file=sys.stderr)
    accuracy = accuracy_tables(run)
    parts = [_head(run)]
    if accuracy:
        found = run.entries[0]["ra_by_view"]
        views = f" {_COLUMNS if _of_router(found) else _OF_VIEWS}" if len(found) > 1 else ""
        parts += ["## Accuracy\n", f"{_DEFINITION}{views}\n", *map(tables.markdown, accuracy)]
        attempts = attempt_tables(run)
        if attempts:
            parts += [f"{_ATTEMPTS}\n", *map(tables.markdown, attempts)]
        if curve := plots.write_curve(run):
            parts.append(f"![{curve}]({curve})\n")
        if strip := plots.write_pictures(run):
            parts += [f"{_PICTURES}\n", f"![{strip}]({strip})\n"]
        parts.append(tables.markdown(macs_table(run), 2))
    if of_criteria := criteria.run_table(run):
        parts += ["## Criteria\n", tables.markdown(of_criteria)]
    for title, shown in fact_tables(run).items():
        parts += [f"## {title}\n", *map(tables.markdown, shown)]
    parts += _team(run)
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


def _team(run: Run) -> list[str]:
    """Of a run that left a team.json, the pool and who was chosen."""
    try:
        found = json.loads((run.folder / "team.json").read_text())
        rule, pool, rank = found["rule"], found["pool"], {of: place for place, of in enumerate(found["team"])}
        rows = [(of["run"], str(rank.get(i, "")), tables.percent(of["fails"]), tables.percent(of["own_ra"]))
                for i, of in enumerate(pool)]
    except OSError:
        return []
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{run.folder / 'team.json'} is damaged: expected what a run of system.name=eed writes; move "
                        "it away to report without it") from None
    note = (f"Chosen by {rule['choose']}: robust diversity {found['diversity']:.3f}"
            f"{', below the threshold, which no team reaches' if found['falls_back'] else ''}. Failures are on "
            f"{rule['rd_images']} {rule['rd_on']} images by {rule['rd_attack']}: they are no robustness. Members are "
            "asked by falling accuracy under an attack of their own, the last column.")
    drawn = plots.write_team(run, found)
    return ["## Team\n", tables.markdown(Table("Pool", ("run", "member", "fails, %", "own RA %"), rows, (note,))),
            *([f"![{drawn}]({drawn})\n"] if drawn else [])]


def _head(run: Run) -> str:
    config = run.config
    if not run.entries:
        return (f"# {runs.named(config.name, run)}\n\nNot evaluated yet. Config {config.name}, training seed "
                f"{config.seed}.\n")
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
    shown, all_images = runs.shows_adaptive(entries), any(_of_all(e) is not None for e in entries)
    rows = [(
        e["checkpoint"], str(e["step"]), str(e["n"]), tables.with_interval(e["sa"], e["sa_interval"]),
        tables.with_interval(e["ra"], e["ra_interval"]), *([runs.adaptive([e])] if shown else []),
        *([tables.percent(_of_all(e))] if all_images else ()), *(tables.percent(e["ra_by_view"][v]) for v in views))
        for e in entries]
    names = _VIEWS if _of_router(views) else _PLAIN
    columns = ("checkpoint", "step", "n", "SA %", "RA %", *([runs.ADAPTIVE] if shown else []),
               *(["accuracy %"] if all_images else ()), *(names.get(view, view) for view in views))
    return Table(runs.attack_title(entries[0]), columns, rows,
                 (runs.attack_settings(entries), *([_OF_ALL] if all_images else ())))


def _of_all(entry: dict[str, Any]) -> float | None:
    """The accuracy on all images of a measurement by one attack through one gradient, if it counts them all."""
    found = [attempt.get("accuracy") for attempt in entry["attempts"]]
    return found[0] if len(found) == 1 else None


def _of_router(views: Iterable[str]) -> bool:
    """Whether gradients differ by what goes through a router."""
    return any(view.startswith("ste") for view in views)


def attempt_tables(run: Run) -> list[Table]:
    """A table for each suite of several attacks, with a row for each attack and gradient."""
    found = []
    for entry in run.entries:
        if len({attempt["attack"] for attempt in entry["attempts"]}) > 1:
            more = {column: name for name, column in _MORE.items() if any(name in a for a in entry["attempts"])}
            names = _VIEWS if _of_router(a["view"] for a in entry["attempts"]) else _PLAIN
            rows = [(a["attack"], names.get(a["view"], a["view"]), str(a["attacked"]), str(a["broken"]),
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
