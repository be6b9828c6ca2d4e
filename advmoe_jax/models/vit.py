"""Vision transformer: dense, small-dense and mixture-of-experts. By default it is DeiT-Tiny.

Dosovitskiy et al., ICLR 2021, with pre-norm, a class token and learned positions, as DeiT has it (Touvron et al., ICML
2021); without dropout and stochastic depth. With one expert it is the dense network narrowed by `model_scale`, of which
each head and each MLP keeps that share.

With several, MLPs are routed as in V-MoE (Riquelme et al., NeurIPS 2021, "Every-2"): each token of every second block
takes the expert of the largest score, an MLP of its own, whose output has the expert's share in the softmax of all
scores as a factor. With `routing=layer` scores are a linear function of the token. V-MoE also adds noise to scores in
training and lets an expert drop tokens beyond its capacity; here is neither, and attacked tokens cannot be crowded out.
With the other routings all tokens of an image take the same expert.

The factor gives routers a gradient without any straight-through one: `router_grad=none`, which is V-MoE's. Attacks
through any view have it too: "none" is the gradient of the network as it is, of which only the choices are constants.

B batch, H W height and width, T tokens, C channels, K classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.models import network
from advmoe_jax.models.layers import BLOCK, Choose, Experts, experts_of, scaled_width
from advmoe_jax.models.needs import Needs
from advmoe_jax.models.tokens import Attention, Mlp, Patches, linear, norm, truncated_normal
from advmoe_jax.ops import routing

_IMAGE_ROUTED = Only("model.routing=embedding or global", lambda config: (
    network.ROUTED.holds(config) and config.model.routing != "layer"))


@dataclasses.dataclass(frozen=True)
class Config(network.Config):
    """Fields of `config.model` for a vision transformer."""

    width: int = setting(192, "channels of a token of the dense network, a multiple of the heads", least=1, most=16384)
    depth: int = setting(12, "blocks", least=1, most=200)
    heads: int = setting(3, "of attention", least=1, most=256)
    patch: int = setting(16, "pixels of a patch's side, which divides those of an image; 4 for images of 32", least=1,
                         most=4096)
    mlp_ratio: float = setting(4.0, "hidden channels of an MLP, by those of a token", above=0, most=64)
    moe_every: int = setting(2, "one block in so many has experts, the last of them", least=1, most=200,
                             only=network.ROUTED)
    experts: str = setting("disjoint", "channels of the experts: each has its own", choices=("disjoint",),
                           only=network.ROUTED)
    router_grad: str = setting("none", "gradient of the routers' own loss beside that of the experts' shares; none: of "
                                       "the shares alone", choices=routing.ROUTER_GRADS, only=network.ROUTED)
    router_width: int = setting(16, "hidden width of the routers", least=1, most=65536, only=_IMAGE_ROUTED)


class ViT(nn.Module):
    """The backbone.

    Attributes:
        num_classes: K.
        width: C.
        depth: blocks.
        heads: of attention.
        patch: pixels of a patch's side.
        hidden: channels inside an MLP.
        moe_every: one block in so many is routed.
        experts: of the routed blocks.
    """

    num_classes: int
    width: int
    depth: int
    heads: int
    patch: int
    hidden: int
    moe_every: int
    experts: Experts

    def tokens(self, image_shape: tuple[int, int, int]) -> int:
        """T of images (H, W, channels): patches and the class token."""
        return 1 + image_shape[0] // self.patch * (image_shape[1] // self.patch)

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, channels) images -> (B, K) logits. Nothing depends on `train`."""
        del train
        shape = (1, self.tokens(x.shape[1:]), self.width)
        x = Patches(self.width, self.patch, name="patch_embed")(x).reshape(len(x), -1, self.width)
        first = self.param("cls_token", truncated_normal, (1, 1, self.width), jnp.float32).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.width)), x], 1)
        x += self.param("pos_embed", truncated_normal, shape, jnp.float32).astype(x.dtype)
        for i in range(self.depth):
            is_routed = i % self.moe_every == self.moe_every - 1
            x = Block(self.heads, self.hidden, self.experts, is_routed, name=f"blocks_{i}")(x, choose)
        return linear(self.num_classes, x, "head")(norm(x, "norm")(x[:, 0]))


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside a shortcut."""

    heads: int
    hidden: int
    experts: Experts
    is_routed: bool

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose) -> jax.Array:
        """(B, T, C) -> the same shape."""
        x += Attention(self.heads, name="attn")(norm(x, "norm1")(x))
        x += Mlp(self.hidden, self.experts, self.is_routed, name="mlp")(norm(x, "norm2")(x), choose)
        return checkpoint_name(x, BLOCK)


def check(config) -> None:
    """Raises UserError for fields that do not fit together."""
    _check(config.model)


def _check(cfg):
    if cfg.width % cfg.heads:
        near = max(round(cfg.width / cfg.heads), 1) * cfg.heads
        raise UserError(f"model.width is {cfg.width}: expected a multiple of the {cfg.heads} heads (model.heads), such "
                        f"as {near}")
    if cfg.num_experts > 1 and cfg.moe_every > cfg.depth:
        raise UserError(f"model.moe_every is {cfg.moe_every}: expected at most model.depth, {cfg.depth}, or no block "
                        "has experts")


def backbone(cfg, num_classes: int) -> ViT:
    """Builds the network that `config.model` describes.

    Args:
        cfg: fields width, depth, heads, patch, mlp_ratio, moe_every, num_experts, model_scale, experts, expert_init.
        num_classes: K.
    Raises:
        UserError: the heads do not divide the width, or no block has the experts.
    """
    _check(cfg)
    width = cfg.heads * scaled_width(cfg.width // cfg.heads, cfg.model_scale)
    return ViT(num_classes, width, cfg.depth, cfg.heads, cfg.patch, max(1, int(cfg.mlp_ratio * width)), cfg.moe_every,
               experts_of(cfg))


def needs(cfg) -> Needs:
    """As `models.needs.Needs`."""
    return Needs({"a head (model.width / model.heads)": max(cfg.width // cfg.heads, 1)}, patch=cfg.patch)
