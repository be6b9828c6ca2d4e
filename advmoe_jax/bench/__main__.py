"""Runs a benchmark: python -m advmoe_jax.bench NAME [--json]. Both sides of every ratio are timed in one run."""

import argparse
import json
import sys

import jax

import advmoe_jax
from advmoe_jax.core import find, tables
from advmoe_jax.core.errors import UserError


def main(argv=None) -> int:
    """Runs the benchmark that the command line names and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m advmoe_jax.bench", description=__doc__)
    parser.add_argument("name", help=f"one of: {', '.join(find.names('bench', 'measure'))}")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each side, interleaved; the median counts")
    flags = parser.parse_args(argv)
    try:
        rows = find.module("bench", flags.name, defines="measure", kind="benchmark").measure(flags.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    circumstances = {"advmoe_jax": advmoe_jax.__version__, "jax": jax.__version__,
                     "device": jax.devices()[0].device_kind, "rounds": flags.rounds}
    if flags.json:
        print(json.dumps({**circumstances, "rows": rows}, indent=2))
    else:
        note = ", ".join(f"{k} {v}" for k, v in circumstances.items())
        columns = tuple(rows[0])
        tables.show([tables.Table(f"bench {flags.name}", columns, tuple(
            tuple(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) for row in rows), (note,))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
