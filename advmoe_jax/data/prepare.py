"""Prepares a data set for training: `python -m advmoe_jax.data.prepare cifar10 --out DIR`."""

import contextlib
import logging
import pathlib
import tempfile

from etils import epath

from advmoe_jax.core import cli, find, paths
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import raw, records, shards
from advmoe_jax.data.source import (
    META,
    SPLITS,
    read_prepared,
    refuse_foreign,
    refuse_variant,
    remove_unfinished,
    write_prepared,
)


def prepare(name: str, out: str, raw_path: str | None = None, force: bool = False,
            allow_unknown_hash: bool = False) -> epath.Path:
    """Writes OUT/NAME/ from the official files; an intact folder that is there is kept.

    Args:
        name: a data set with official files ("cifar10"), or of images that stay encoded ("imagefolder:flowers").
        out: where prepared data is kept (`config.data.dir`), local or gs://.
        raw_path: the official archive, a .zip of its files, or a folder with either; None downloads it where
            that is possible.
        force: write even if OUT/NAME/ is there.
        allow_unknown_hash: accept other content than the official, with a warning.
    Returns:
        OUT/NAME/.
    Raises:
        UserError: unknown name, files missing, damaged or not the official ones, no network.
    """
    base, _, variant = name.partition(":")
    source = find.module("data", base, defines="dataset", kind="data set")
    if hasattr(source, "raw_images"):
        folder = records.place(name, out)
        found = source.raw_images(pathlib.Path(raw_path), variant, allow_unknown_hash) if raw_path else None
        print(shards.write(name, folder, found, records.command(name, out), force))
        return epath.Path(folder)
    if not hasattr(source, "OFFICIAL"):
        raise UserError(source.how_to_prepare(out, variant))
    refuse_variant(base, variant)
    folder = paths.path(out) / base
    remove_unfinished(folder)
    if (folder / META).is_file() and not force:
        summary = _summary(read_prepared(base, out))
        print(f"{folder} is already prepared: {summary}; --force writes it anew")
        return folder
    refuse_foreign(folder)
    with contextlib.ExitStack() as stack:
        if raw_path is None:
            downloads = (stack.enter_context(tempfile.TemporaryDirectory()) if paths.is_remote(folder)
                         else folder.parent / "downloads")
            raw_path = raw.download(source.OFFICIAL, downloads, allow_unknown_hash)
        dataset = raw.read(source.OFFICIAL, raw_path, allow_unknown_hash)
    write_prepared(dataset, out)
    print(f"{folder}: {_summary(dataset)}")
    return folder


def _summary(dataset):
    height, width, channels = dataset.image_shape
    counts = " and ".join(f"{len(dataset.split(split)):,} {split}" for split in SPLITS)
    return f"{counts} images of {height}x{width}x{channels}, {dataset.num_classes} classes"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for bad input."""
    official = ", ".join(find.names("data", "OFFICIAL", "raw_images"))
    parser = cli.Parser(prog="python -m advmoe_jax.data.prepare", description=(
        "Checks the official files of a data set and writes DIR/NAME/, which training reads."))
    parser.add_argument("name", help=f"the data set: {official}; images of your own: imagefolder:NAME")
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="where prepared data is kept (config.data.dir)")
    parser.add_argument("--raw", metavar="PATH",
                        help="the official archive, a .zip of its files, or a folder that holds "
                             "either; downloaded if not given, where that is possible")
    parser.add_argument("--force", action="store_true", help="write even if DIR/NAME/ is there")
    parser.add_argument("--allow-unknown-hash", action="store_true",
                        help="accept other or fewer files than the official ones, with a warning")

    def run():
        args = parser.parse_args(argv)
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        prepare(args.name, args.out, args.raw, args.force, args.allow_unknown_hash)

    return cli.ending(run)


if __name__ == "__main__":
    cli.leave(main())
