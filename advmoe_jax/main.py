"""Trains, evaluates, reports and exports robust vision models.

  python -m advmoe_jax.main --config configs/digits_r18.py             train, attack, report
  python -m advmoe_jax.main --config configs/digits_r18.py:at_dense    what it is compared to: at_dense,
                                                                       at_sdense, at_moe, natural
  python -m advmoe_jax.main --mode evaluate --workdir runs/digits_r18 --config.eval.suite=standard      AutoAttack
  python -m advmoe_jax.main --mode report --workdir "runs/digits_*"    one table of several runs
  python -m advmoe_jax.main --mode export --workdir runs/digits_r18 --config.export.format=stablehlo     or safetensors,
                                                                       torch, onnx
  python -m advmoe_jax.main --config configs/digits_table.py           the runs of a recipe, by one such command or
                                                                       several at once; --list shows how far they are

Any field of the config can be set: --config.model.width=32 --config.attack.eps=8/255. The same command continues a
run that was stopped. Exit codes: 0; 2 bad input; 3 unreliable evaluation, with --strict; 4 non-finite training; 74
no space left on a disk, run me again when there is; 75 stopped by SIGTERM, or another process is gone: run me again;
130 Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence

from advmoe_jax.core import cli

MODES = ("train", "evaluate", "report", "export")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads the command line: the flags, and the config overrides as "model.width=32"."""
    parser = cli.Parser(
        prog="python -m advmoe_jax.main", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config FILE[:ARGUMENT] [--mode MODE] [--workdir DIR] [--config.FIELD=VALUE ...]")
    parser.add_argument("--config", default="", help="config file, with an argument behind a colon")
    parser.add_argument("--mode", default="train", choices=MODES, help="train unless given")
    parser.add_argument("--workdir", default="", help="of the run or recipe; runs/<config name> unless given")
    parser.add_argument("--checkpoint", default="", help="best, last, ema or a step, for evaluate and export; unless "
                                                         "given, those that have names, and best")
    parser.add_argument("--only", default="", metavar="PATTERN", help="runs of a recipe: 'at_*,advmoe-s0'")
    parser.add_argument("--wait", action="store_true", help="of a recipe: take over what other processes leave")
    parser.add_argument("--list", action="store_true", help="show the runs of a recipe: state, needs, time")
    parser.add_argument("--list-fields", action="store_true", help="show the fields of the config")
    parser.add_argument("--strict", action="store_true", help="exit code 3 if an evaluation cannot be trusted")
    parser.add_argument("--coordinator", default="", metavar="HOST:PORT",
                        help="process 0 of a run of several; auto on TPU, under Slurm or Open MPI 4")
    parser.add_argument("--num_processes", type=int, metavar="N", help="processes of the run; Slurm, Open MPI know it")
    parser.add_argument("--process_id", type=int, metavar="I", help="which of them this is, from 0; they know it too")
    parser.add_argument("--join_timeout", type=int, default=300, metavar="S", help="seconds to wait for them; 300")
    flags, rest = parser.parse_known_args(argv)
    return flags, parser.overrides(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code."""
    def run():
        flags, overrides = parse(sys.argv[1:] if argv is None else argv)
        from advmoe_jax import modes  # jax is imported from here on, and --help stays quick

        modes.start(flags, overrides)

    return cli.ending(run)


if __name__ == "__main__":
    cli.leave(main)
