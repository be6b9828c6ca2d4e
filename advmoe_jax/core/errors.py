"""Errors that a person caused and can mend: one line, an exit code, no traceback."""

import difflib
import errno
from collections.abc import Iterable
from typing import Any

EXIT_OK = 0
EXIT_BUG = 1
EXIT_BAD_INPUT = 2
EXIT_UNRELIABLE = 3
EXIT_NON_FINITE = 4
EXIT_NO_SPACE = 74
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk, or a quota, that is full."""


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, what was expected, the nearest right name."""

    exit_code = EXIT_BAD_INPUT


class UnreliableError(UserError):
    """An evaluation gave signs that it cannot be trusted; its results are written."""

    exit_code = EXIT_UNRELIABLE


class NonFiniteError(UserError):
    """Training met a NaN or an infinity."""

    exit_code = EXIT_NON_FINITE


class NoSpace(UserError):
    """A disk is full; nothing that was saved is lost, and the same command continues when there is room."""

    exit_code = EXIT_NO_SPACE


class Preempted(UserError):
    """The process was asked to stop; its state is saved and the same command continues."""

    exit_code = EXIT_PREEMPTED


def first_line(error: BaseException) -> str:
    """What an error says first, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and the line that a person reads of it."""
    line = first_line(error)
    if isinstance(error, UserError):
        return error.exit_code, line
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted; the same command continues from what is saved"
    if isinstance(error, OSError) and error.errno is not None:  # of the system; a library's have no number
        return (EXIT_NO_SPACE if error.errno in FULL else EXIT_BAD_INPUT,
                f"{error.filename or 'standard output or a file'}: {error.strerror}")
    return EXIT_BUG, line


def shown(value: Any) -> str:
    """A value in one short line, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a config file's own classes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that does not exist, with the nearest names that do.

    Args:
        kind: what the name was meant to be ("attack", "model.routing").
        name: what was given.
        known: every valid name.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {name!r}: expected one of {', '.join(known)}{hint}")


def one_of(kind: str, name: str, known: Iterable[str]) -> str:
    """Returns `name` if it is among `known`, else raises `unknown_name`."""
    known = tuple(known)
    if name not in known:
        raise unknown_name(kind, name, known)
    return name
