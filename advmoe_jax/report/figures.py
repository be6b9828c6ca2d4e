"""What figures of reports share. Without matplotlib there are none."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from advmoe_jax.core import files

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
SA, RA, GREY = *COLOURS[:2], "#777777"


def new(width: float, height: float) -> Any | None:
    """An empty figure of so many inches, laid out by itself; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def write(out: epath.Path, drawn: Mapping[str, Any | None]) -> tuple[str, ...]:
    """Writes figures into a folder. What is None was not drawn; of an earlier call it is removed.

    Args:
        out: the folder.
        drawn: {"eps.png": figure}.
    Returns:
        The names of the files.
    """
    for name, figure in drawn.items():
        if figure is None:
            (out / name).unlink(missing_ok=True)
        else:
            files.write_figure(out / name, figure)
    return tuple(name for name, figure in drawn.items() if figure is not None)


def bare(axes: Any, grid: str = "both") -> None:
    """Takes away the frame's upper and right side; draws a faint grid along "x", "y" or "both", or none where ""."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(alpha=0.25, linewidth=0.6, axis=grid)
