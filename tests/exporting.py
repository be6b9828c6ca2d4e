"""Runs to export: finished, of tiny models whose logits differ from image to image."""

import jax
import numpy as np

from advmoe_jax.core import config as configs
from advmoe_jax.core import tree
from advmoe_jax.interop import finished
from advmoe_jax.models import model as models

SHAPE, CLASSES = (8, 8, 1), 10  # of digits
DENSE = ("model.num_experts=1", "model.model_scale=1")
KINDS = {
    "dense": DENSE, "routed": ("model.router_width=4",),
    "global": ("model.router_width=4", "model.routing=global", "model.experts=disjoint"),
    "compact": ("model.name=compact", *DENSE, "model.depth=8", "model.width=16", "model.groups=4", "model.rate=1/2"),
    "ensemble": ("model.name=ensemble", *DENSE, "model.num_members=2"),
    "team": ("model.name=team", *DENSE, "model.num_members=2", "model.dispatch_members=sequential"),
    "mixture": ("model.name=mixture", *DENSE, "model.num_members=2"),
    "top": ("model.name=mixture", *DENSE, "model.num_members=3", "model.serve=top-1", "model.widths=4, 4, 8")}


def config_of(kind, *words):
    """The config of a run; needs the fixture tiny_resnet."""
    config = configs.default(data="digits", system="standard")
    configs.override_all(config, [
        "model.width=4", "system.loss=natural", "attack.eps=0.2", "eval.attacks=pgd(num_steps=2)", "eval.n=40",
        "eval.batch_size=20", "eval.black_box=false", *(() if kind == "compact" else ("model.depth=4",)),
        *KINDS[kind], *words])
    configs.check(config)
    config.name = f"tiny_{kind}"
    return config


def random_variables(model, seed=0):
    """Variables of which each matters: norms are not those of an untrained network, logits have a size."""
    draws = np.random.default_rng(seed)

    def drawn(path, leaf):
        name = tree.path_name(path)
        if not np.issubdtype(leaf.dtype, np.floating):
            return np.asarray(fresh[name])
        if name.endswith(("scale", "var")):
            return draws.uniform(.5, 1.5, leaf.shape).astype(leaf.dtype)
        spread = 2 / np.sqrt(np.prod(leaf.shape[:-1])) if name.endswith("kernel") else .1
        return (spread * draws.standard_normal(leaf.shape)).astype(leaf.dtype)

    integers = [name for name, leaf in tree.named_leaves(model.shapes).items() if leaf.dtype == np.int32]
    fresh = tree.named_leaves(jax.jit(model.init)(jax.random.key(0))) if integers else {}
    return jax.tree_util.tree_map_with_path(drawn, model.shapes)


def run_of(workdir, kind, *words):
    """Makes a finished run; gives its config, model and variables."""
    config = config_of(kind, *words)
    model = models.make(config.model, SHAPE, CLASSES)
    variables = random_variables(model)
    finished.write(finished.free(str(workdir)), config, variables, {})
    return config, model, variables


def images(count):
    """Noise over four patches of one brightness each."""
    patches, noise = (np.random.default_rng(1).uniform(size=(count, side, side, 1)) for side in (2, 8))
    return np.float32(.8 * patches.repeat(4, 1).repeat(4, 2) + .2 * noise)
