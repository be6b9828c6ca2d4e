"""Runs a benchmark: python -m advmoe_jax.bench NAME [--json]. Both sides of every ratio are timed in one run."""

import importlib.util
import inspect
import json
from pathlib import Path

import jax

import advmoe_jax
from advmoe_jax.core import cli, files, find, tables, xla
from advmoe_jax.core.errors import UserError


def main(argv=None) -> int:
    """Runs the benchmark that the command line names and returns the exit code."""
    parser = cli.Parser(prog="python -m advmoe_jax.bench", description=__doc__)
    parser.add_argument("name", help=f"one of: {', '.join(find.names('bench', 'measure'))}")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="where to save a plot, of a benchmark that has one")
    parser.add_argument("--workdir", type=Path, help="of a run, for a benchmark that takes its loads")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each side, interleaved; the median counts")
    return cli.ending(lambda: _show(parser.parse_args(argv)))


def _show(flags):
    if flags.rounds < 1:
        raise UserError(f"--rounds is {flags.rounds}: expected 1 or more")
    benchmark = find.module("bench", flags.name, defines="measure", kind="benchmark")
    if flags.plot and not hasattr(benchmark, "draw"):
        raise UserError(f"--plot is {flags.plot}: expected no such flag with {flags.name}, which draws nothing")
    if flags.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'advmoe_jax[quickstart]'")
    inputs = {"workdir": flags.workdir} if flags.workdir else {}
    if flags.workdir and "workdir" not in inspect.signature(benchmark.measure).parameters:
        raise UserError(f"--workdir is {flags.workdir}: expected no such flag with {flags.name}, whose loads are given")
    xla.keep_memory()
    rows = benchmark.measure(flags.rounds, **inputs)
    if flags.plot:
        files.write_figure(flags.plot, benchmark.draw(rows))
    circumstances = {"advmoe_jax": advmoe_jax.__version__, "jax": jax.__version__,
                     "device": jax.devices()[0].device_kind, "rounds": flags.rounds}
    if flags.json:
        print(json.dumps({**circumstances, "rows": rows}, indent=2))
        return
    note = ", ".join(f"{k} {v}" for k, v in circumstances.items())
    tables.show([tables.Table(f"bench {flags.name}", tuple(rows[0]), tuple(
        tuple(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) for row in rows), (note,))])


if __name__ == "__main__":
    cli.leave(main)
