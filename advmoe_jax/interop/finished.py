"""Finished runs that no training made: the workdir of variables that come from elsewhere."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from advmoe_jax.core import config as configs
from advmoe_jax.core import files, paths, status
from advmoe_jax.core.errors import UserError
from advmoe_jax.train import checkpoint as checkpoints
from advmoe_jax.train import state as states


def free(out: str, name: str = "--out") -> epath.Path:
    """The folder, which holds nothing. Raises UserError if it does, or cannot be made; `name` is that of the flag."""
    where = paths.path(out)
    if where.exists() and not where.is_dir():
        raise UserError(f"{name} {out} is a file: expected a folder that is new or empty")
    if where.exists() and (held := sorted(path.name for path in where.iterdir())):
        raise UserError(f"{name} {out} holds {held[0]}: expected a folder that is new or empty")
    if not paths.is_remote(where):
        standing = next(folder for folder in where.absolute().parents if folder.exists())
        if not standing.is_dir():
            raise UserError(f"{name} {out}: {standing} is a file: expected a folder that is new or empty")
    return where


def write(where: epath.Path, config: ConfigDict, variables: dict[str, Any], meta: dict[str, Any],
          masks: dict[str, Any] | None = None) -> None:
    """Makes a folder the workdir of a run whose best and last checkpoint, of step 0, holds these variables.

    Args:
        where: what `free` gave; it is there whole, or not at all (in a bucket: not finished).
        config: of the run.
        variables: of its model.
        meta: {name: what JSON holds}, kept beside the checkpoints: where they come from.
        masks: {group: tree} of what is pruned; None: nothing is.
    """
    state = states.fresh(variables, {}, masks)
    with appearing(where) as folder:
        with checkpoints.opened(folder, about={"config": configs.to_json(config)}) as saved:
            for which in ("best", "last"):
                saved.save(which, 0, state, meta)
        configs.write(config, folder / "config.json")
        status.write(folder, "trained")  # last: without it nobody starts from the run


@contextlib.contextmanager
def appearing(where: epath.Path) -> Iterator[epath.Path]:
    """A folder beside the one that is wanted, which takes its name in the end, or goes away. In a bucket, where
    nothing can be renamed at once, it is the wanted one."""
    if paths.is_remote(where):
        yield where
        return
    where = where.absolute()
    is_first = not where.parent.exists()
    with files.room(where):
        where.parent.mkdir(parents=True, exist_ok=True)
        temporary = epath.Path(tempfile.mkdtemp(prefix=f".{where.name}.", suffix=".part", dir=where.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, where)
    except BaseException:
        files.remove_folder(temporary)
        if is_first:
            with contextlib.suppress(OSError):  # others may have put something there
                where.parent.rmdir()
        raise
