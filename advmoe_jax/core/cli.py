"""What the command lines share: usage errors of one line, and endings without a traceback."""

import argparse
import contextlib
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from advmoe_jax.core.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PIPE_CLOSED,
    UserError,
    outcome,
    unknown_name,
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and which knows no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message}; --help shows what there is")

    def overrides(self, rest: Sequence[str]) -> list[str]:
        """Of the words that `parse_known_args` leaves over: the fields of a config, "model.width=32" of
        "--config.model.width=32". Raises UserError for anything else."""
        known = [option for action in self._actions for option in action.option_strings]
        for word, following in itertools.pairwise([*rest, "--"]):
            if not word.startswith("-"):
                raise UserError(f"unexpected {word!r}: expected --config {word}, or --config.FIELD=VALUE in one word")
            if not word.startswith("--config."):
                raise unknown_name("flag", word.partition("=")[0], known)
            if "=" not in word and not following.startswith("--"):
                raise UserError(f"{word} has no value: expected {word}={following}, in one word")
        return [word.removeprefix("--config.") for word in rest]


def ending(action: Callable[[], None]) -> int:
    """Runs a command and returns its exit code, with one line on stderr if it did not end well."""
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it once more
        return EXIT_PIPE_CLOSED
    except (UserError, KeyboardInterrupt, OSError) as error:
        code, line = outcome(error)
        if code == EXIT_BUG:
            raise
        print(line if code == EXIT_INTERRUPTED else f"error: {line}", file=sys.stderr)
        return code
    return EXIT_OK


def leave(main: Callable[[], int]) -> None:
    """Ends the process with the exit code that `main` returns, or 1 and a traceback.

    A process that was stopped or failed ends at once: threads that still write or compute crash an interpreter that
    exits, and jax waits there for the other processes of a cluster, which may be gone.
    """
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = EXIT_BUG
    if code:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit()
