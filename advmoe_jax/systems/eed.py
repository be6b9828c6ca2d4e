"""EED: differently pruned copies of one robust network, chosen to fail on different images, are trained as a team.

Jung & Song, "Two is Better than One: Efficient Ensemble Defense for Robust and Compact Models", CVPR 2025. The paper's
words leave much open; every choice is a field. `init_from` names the pool of pruned runs, and the dense one that they
come from, on which images are attacked that tell who fails. The team is chosen before the first step and kept in
team.json. Masks stay. What stops the team at inference is `model.gate`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from advmoe_jax.attacks import parse
from advmoe_jax.core import shares, units
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.data import pipeline
from advmoe_jax.models.model import Model
from advmoe_jax.models.team import Team
from advmoe_jax.ops import teams
from advmoe_jax.systems import adversarial, adversary, dverge, soe, team_choice, team_loss
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.systems.prune import is_rate
from advmoe_jax.systems.sources import Source, needed
from advmoe_jax.train.system import Inputs, System

KEEPS = "team.json"
_COMPACT = Only("system.gamma above 0", lambda config: config.system.get("gamma", 0) > 0)


def _host(name):
    return Only(f"system.host={name}", lambda config: config.system.get("host") == name)


@dataclasses.dataclass(frozen=True)
class Config(adversarial.Config):
    """Fields of `config.system`."""

    loss: str = setting("madry", "of each member, on images that attack the mean of all", choices=adversarial.LOSSES)
    team_rate: str = setting("4/5", "share of the weights of a dense network that the whole team lacks", read=is_rate)
    member_rate: str = setting("19/20", "share that each member lacks", read=is_rate)
    choose: str = setting("budget_fill", "the most diverse team of as many members as team_rate allows; "
                                         "smallest_above_threshold: the smallest team that is diverse enough, always a "
                                         "pair; or any, which others have to beat", choices=team_choice.RULES)
    rd_threshold: float = setting(0.7, "robust diversity that a team should have; if none has, the best one is taken",
                                  least=0, most=1)
    rd_attack: str = setting("base_transfer", "images that show who fails: attacked on the dense network, on each "
                                              "member itself, or on the mean of the pool", choices=team_choice.ATTACKED)
    rd_by: str = setting("pgd(num_steps=20,step_size=0.25 eps,keep=last)", "by this attack")
    rd_on: str = setting("training", "images that are trained on, or those that choose the best checkpoint",
                         choices=("training", "validation"))
    rd_images: int = setting(512, "the first so many of them", least=1, most=10**7)
    omega: float = setting(10.0, "weight of the loss of what the team gets wrong (eq. 15)", least=0, most=1e6)
    wrong_form: str = setting("largest", "of the most probable wrong class of all members, of each member's, or of any "
                                         "class, as the equation is printed", choices=teams.FORMS)
    gamma: float = setting(4.0, "weight of compactness (eq. 18)", least=0, most=1e6)
    lambda_weights: float = setting(0.7, "in it, of the weights' sizes", least=0, most=1e6, only=_COMPACT)
    weights_form: str = setting("mean", "their mean, or their sum, as the equation is printed", choices=("mean", "sum"),
                                only=_COMPACT)
    lambda_activity: float = setting(0.25, "in it, of the activations that are not zero", least=0, most=1e6,
                                     only=_COMPACT)
    activity_form: str = setting("smooth", "a smooth share of them behind ReLUs; or the number of the members' "
                                           "probabilities, as printed, which has no gradient",
                                 choices=("smooth", "printed"), only=_COMPACT)
    host: str = setting("dverge", "ensemble defence that the members are trained by beside",
                        choices=("none", *team_loss.HOSTS))
    adp_entropy: float = setting(2.0, "ADP's alpha", least=0, most=1e6, only=_host("adp"))
    adp_diversity: float = setting(0.5, "ADP's beta", least=0, most=1e6, only=_host("adp"))
    gal_weight: float = setting(0.5, "GAL's lambda", least=0, most=1e6, only=_host("gal"))
    dverge_weight: float = setting(1.0, "of DVERGE's loss", least=0, most=1e6, only=_host("dverge"))
    dverge_eps: str = setting("0.07", "linf distance of its images", only=_host("dverge"))
    dverge_steps: int = setting(10, "steps to them", least=1, most=1000, only=_host("dverge"))
    soe_weight: float = setting(1.0, "of SoE's loss, on images of train.attack on each member", least=0, most=1e6,
                                only=_host("soe"))
    soe_sigma: float = setting(1.0, "temperature of its soft minimum over the members", above=0, most=1e6,
                               only=_host("soe"))


def check(config) -> None:
    """Raises UserError for what makes no team."""
    needed(config)
    system, model = config.system, config.model
    if model.name != "team":
        raise UserError(f"model.name is {model.name}: expected team with system.name=eed")
    most = team_choice.size_of_team(shares.share(system.team_rate), shares.share(system.member_rate))
    if most < 2:
        raise UserError(f"system.member_rate is {system.member_rate}: expected more, since two members that lack so "
                        f"much do not lack {system.team_rate} together (system.team_rate)")
    wanted = 2 if system.choose == "smallest_above_threshold" else most
    if model.num_members != wanted:
        why = ("system.choose=smallest_above_threshold gives" if system.choose == "smallest_above_threshold" else
               f"team_rate {system.team_rate} and member_rate {system.member_rate} allow")
        raise UserError(f"model.num_members is {model.num_members}: expected {wanted}, as {why}")
    reads = "system.host=soe" if system.host == "soe" else "system.lambda_activity above 0"
    if config.train.remat and (system.host == "soe" or team_loss.reads_activity(system)):
        raise UserError(f"train.remat is true: expected false with {reads}, which reads what layers have computed")
    if system.host == "soe" and system.loss == "natural":
        raise UserError("system.loss is natural: expected another one with system.host=soe, which attacks each member "
                        "by train.attack")
    if system.host == "soe" and not all(spec.about.on_one_network for spec in adversary.named(config, "ce")):
        raise UserError(f"train.attack is {config.train.attack!r}: expected attacks on a single network with "
                        "system.host=soe, which attacks each member")
    if system.host == "dverge":
        units.eps(system.dverge_eps, "linf", "system.dverge_eps")
    parse.on_one_network(system.rd_by, "system.rd_by", "pgd(num_steps=20)", norm=config.attack.norm,
                         eps=config.attack.eps)


def make(cfg, model: Model, data: pipeline.Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source],
         kept: Any = None) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`.

    Args:
        kept: what an earlier start of the run left in team.json, which stands; None: nothing.
    Raises:
        UserError: the pool makes no team.
    """
    if not isinstance(model, Team):
        raise UserError(f"the model is {model.kind}: expected model.name=team with system.name=eed")
    system, chosen, files = cfg.system, {}, {}
    if sources:  # else it is evaluated alone
        found = _chosen(cfg, model, data, mesh, sources, kept)
        names = [found["pool"][i]["name"] for i in found["team"]]
        chosen, files = {name: sources[name] for name in names}, {KEEPS: found}
    per_epoch = pipeline.steps_per_epoch(len(data.rows), cfg.data.batch_size)
    has_heads = system.host == "soe"
    trained = dataclasses.replace(model, taps=team_loss.reads_activity(system), features=has_heads)

    def attacks(team, attack):
        if has_heads:
            return soe.beside(attack, team, cfg)
        return attack if system.host != "dverge" else dverge.beside(
            attack, team, eps=system.dverge_eps, num_steps=system.dverge_steps, per_epoch=per_epoch, seed=cfg.seed)

    host = "" if system.host == "none" else f" with {system.host}"
    heads = dict(begin=lambda state: soe.begin(state, model), part=soe.part()) if has_heads else {}
    built = build(cfg, trained, data, mesh, chosen, (Update("train", model.groups, Inputs("data", "train", "train")),),
                  f"EED, {model.kind} by {system.choose}, {system.loss}{host}", objective=team_loss.objective,
                  attacks=attacks, **heads)
    return dataclasses.replace(built, model=model, files=files)


def _chosen(cfg, team: Team, data: pipeline.Data, mesh, sources: Mapping[str, Source], kept: Any) -> dict[str, Any]:
    """What team.json says: the pool, the team and the ranking."""
    system, (pool, bases) = cfg.system, team_choice.pool_of(sources)
    rule = {name: system[name] for name in ("team_rate", "member_rate", "choose", "rd_threshold", "rd_attack", "rd_by",
                                            "rd_on", "rd_images")}
    rule |= {"eps": cfg.attack.eps, "norm": cfg.attack.norm, "seed": cfg.seed, "num_members": team.num_members}
    team_choice.check_pool(pool, team.member, team.num_members, shares.share(system.member_rate), cfg.data.name)
    names = [epath.Path(name).name for name in pool]
    if isinstance(kept, dict) and kept.get("rule") == rule and [of["run"] for of in kept["pool"]] == names:
        kept["pool"] = [of | {"name": name} for of, name in zip(kept["pool"], pool)]
        return kept
    images = team_choice.images_of(data, system.rd_on, system.rd_images)
    fails, own = team_choice.failures(pool, bases, team.member, images, cfg, mesh)
    robust = 1 - own.mean(1)
    found = {"rule": rule, "pool": [
        {"name": name, "run": run, "step": source.step, "fails": float(rate), "own_ra": float(ra)}
        for (name, source), run, rate, ra in zip(pool.items(), names, fails.mean(1), robust)]}
    found |= team_choice.choose(fails, robust, team.num_members, system, cfg.seed)
    team_choice.tell(found, system.rd_threshold)
    return found
