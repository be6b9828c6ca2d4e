"""A PyTorch checkpoint as a finished run, which can be evaluated, and which other runs can start from."""

import pathlib

from ml_collections import ConfigDict

from advmoe_jax.core import cli, console, find
from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.data.source import sha256
from advmoe_jax.interop import archs, finished, torch_import
from advmoe_jax.interop.torch_files import Checkpoint, read_checkpoint
from advmoe_jax.models import cifar_resnet, network, normalisation

_FLAGS = "--mean", "--std"


def import_run(arch: str, weights: str, out: str, *, shortcut_pad: str | None = None, mean: str | None = None,
               std: str | None = None, data: str | None = None) -> ConfigDict:
    """Makes `out` the workdir of a run whose best and last checkpoint, of step 0, is what a file holds.

    Args:
        arch: one of `archs.names()`.
        weights: what torch.save wrote, which needs PyTorch, or an .npz of its tensors, which does not.
        out: a folder that is new or empty; it is there whole, or not at all (in a bucket: not finished).
        shortcut_pad: of CIFAR ResNets, one of models.cifar_resnet.PADS; None: both.
        mean, std: of images in [0, 1], a number for each channel, "" for no normalisation; None: what the file says, or
            what is usual for the architecture.
        data: name of a data set; None: what the architecture is for.
    Returns:
        The config of the run.
    Raises:
        UserError: a name that there is not, a folder that holds something, a file that cannot be read, or tensors of
            another architecture; nothing is written.
    """
    one_of("--arch", arch, archs.names())
    where = finished.free(out)
    _check_flags(arch, shortcut_pad, mean, std, data)
    stored = read_checkpoint(weights)
    found = archs.read(arch, stored, shortcut_pad or "both")
    given = (mean, std) if mean is not None else _normalisation(stored, found)
    config = _config(arch, found, *given, data or found.data)
    net = network.make(config.model, (found.image_size, found.image_size, 3), found.num_classes)
    variables = torch_import.to_variables(net, stored.weights, stored.router)
    source = {"arch": arch, "file": pathlib.Path(weights).name, "sha256": sha256(weights)}
    finished.write(where, config, variables, {"imported": source})
    if stored.ignored:
        console.say(f"{weights} also holds {', '.join(stored.ignored)}: not used")
    normalised = f"normalised by mean {given[0]} and std {given[1]}" if given[0] else "not normalised"
    console.say(f"{out}: {arch}, {found.num_classes} classes, data {config.data.name}, images {normalised}; a finished "
                "run for --mode evaluate and init_from")
    return config


def _check_flags(arch: str, shortcut_pad: str | None, mean: str | None, std: str | None, data: str | None) -> None:
    if shortcut_pad is not None:
        one_of("--shortcut-pad", shortcut_pad, cifar_resnet.PADS)
        if not archs.has_shortcut_pad(arch):
            raise UserError(f"--shortcut-pad is for ResNets of CIFAR: expected no such flag with --arch {arch}")
    for flag, given, other in zip(_FLAGS, (mean, std), (std, mean)):
        if given is not None and other is None:
            raise UserError(f"{flag} is given alone: expected both {' and '.join(_FLAGS)}, or neither")
    normalisation.check(mean or "", std or "", _FLAGS)
    if data is not None:
        find.module("data", data.partition(":")[0], defines="dataset", kind="--data")


def _normalisation(stored: Checkpoint, found: archs.Found) -> tuple[str, str]:
    """Texts for model.mean and model.std: of the file, else of the architecture."""
    if stored.mean is None:
        return found.mean, found.std
    mean, std = (" ".join(str(number) for number in numbers) for numbers in (stored.mean, stored.std))
    return mean, std


def _config(arch: str, found: archs.Found, mean: str, std: str, data: str) -> ConfigDict:
    """The config of the run, checked."""
    _check_classes(found.num_classes, data)
    fields = found.fields | {"mean": mean, "std": std}
    config = configs.default(data=data, model=fields["name"], system="standard")
    config.name, config.system.loss = arch, "natural"
    config.model.update(fields)
    configs.check(config)
    return config


def _check_classes(num_classes: int, data: str) -> None:
    """Raises UserError if the classes of a data set are known, and others than those of the weights."""
    official = getattr(find.module("data", data.partition(":")[0], defines="dataset"), "OFFICIAL", None)
    known = len(official.class_names) if official else num_classes
    if known != num_classes:
        raise UserError(f"the weights are for {num_classes} classes, and {data} has {known}: expected --data with the "
                        f"name of a data set of {num_classes} classes")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for bad input."""
    parser = cli.Parser(prog="python -m advmoe_jax.interop.torch_import", description=(
        "Makes a finished run of a PyTorch checkpoint: main --mode evaluate --workdir WORKDIR --config.data.dir=DATA "
        "measures it, and --config.init_from=WORKDIR starts another run from it."))
    parser.add_argument("--arch", required=True, help=", ".join(archs.names()))
    parser.add_argument("--weights", required=True, metavar="FILE",
                        help="what torch.save wrote (.th, .pth, .pt), or an .npz of its tensors")
    parser.add_argument("--out", required=True, metavar="WORKDIR", help="a folder that is new or empty")
    parser.add_argument("--shortcut-pad", metavar="PLACE", help=(
        "where shortcuts of CIFAR ResNets add empty channels: both sides, as akamaster's (the default), or end, as "
        "SR-GKP's"))
    parser.add_argument("--mean", metavar="NUMBERS", help=(
        "what the model subtracts from images in [0, 1], '0.485 0.456 0.406'; '' for nothing; by default what the file "
        "says, else what is usual for the architecture"))
    parser.add_argument("--std", metavar="NUMBERS", help="what it then divides them by")
    parser.add_argument("--data", metavar="NAME", help="data set; by default the one that the architecture is for")

    def run():
        args = parser.parse_args(argv)
        import_run(args.arch, args.weights, args.out, shortcut_pad=args.shortcut_pad, mean=args.mean, std=args.std,
                   data=args.data)

    return cli.ending(run)
