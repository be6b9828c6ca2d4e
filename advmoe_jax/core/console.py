"""What a run says to people. Process 0 of a cluster speaks."""

import sys

import jax
import rich.console
import rich.text


def say(text: str) -> None:
    """Prints a line."""
    if jax.process_index() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning to stderr."""
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def alarm(text: str) -> None:
    """Prints a line to stderr, in red in a terminal."""
    if jax.process_index() == 0:
        rich.console.Console(stderr=True, soft_wrap=True, highlight=False).print(rich.text.Text(text, "bold red"))
