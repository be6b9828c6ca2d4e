"""The dissection of a robust mixture on digits: standard training, then the router alone, then the backbone alone.

Zhang et al., ICCV 2023, section 3 and figures 3 to 5: of a mixture that was trained naturally first the router is
trained robustly (theta-bar), and then the backbone (theta-double-bar), each by TRADES with the other part frozen.

Command:  python -m advmoe_jax.main --config configs/digits_dissection.py
          python -m advmoe_jax.report.routing --out runs/fig4 --workdir runs/digits_dissection/{router,backbone}
          at the paper's size: --config configs/paper/advmoe_tables.py:fig3
Hardware: 2 CPU cores.
Time:     6 minutes.
Expected: one seed, best checkpoint, PGD-50 at eps 0.1, 500 test images: standard mixture SA 98.0 RA 24.2; theta-bar
          97.4, 22.6; theta-double-bar 84.8, 38.0. Robust routers alone give nothing here. The paper reports,
          on CIFAR-10 with r=0.5, an RA of 0 for the standard mixture and 37.64 for theta-bar.
"""

import digits_r18

from advmoe_jax.core.recipe import Recipe


def phase(config, loss, trains, init_from=""):
    """A mixture's config as one of the phases: what is trained, by which loss, from which run."""
    config.system.loss, config.system.trains, config.init_from = loss, trains, init_from
    return config


def _run(*of):
    return phase(digits_r18.get_config("at_moe"), *of)


def get_recipe():
    runs = {"standard": _run("natural", "all"), "router": _run("trades", "router", "standard"),
            "backbone": _run("trades", "backbone", "router")}
    rows = {"standard mixture": ("standard",), "theta-bar: then the router alone": ("router",),
            "theta-double-bar: then the backbone alone": ("backbone",)}
    return Recipe(runs, "What robust routers and robust experts give, digits", rows, notes=(
        "The paper's own numbers are of CIFAR-10 and not comparable: RA 0 for the standard mixture, 37.64 for "
        "theta-bar (r=0.5).",))
