"""What figures of reports share. Without matplotlib there are none."""

from typing import Any

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


def bare(axes: Any, grid: str = "both") -> None:
    """Takes away the frame's upper and right side; draws a faint grid along "x", "y" or "both", or none where ""."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(alpha=0.25, linewidth=0.6, axis=grid)
