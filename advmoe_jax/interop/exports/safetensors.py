"""Safetensors: the weights by the names that they have here, which other runs start from."""

from etils import epath

from advmoe_jax.interop import export
from advmoe_jax.interop.export import Export
from advmoe_jax.train import weights


def write(of: Export, folder: epath.Path) -> str:
    """Writes the weights; gives the card's words."""
    export.write_run(of, folder)
    return f"""`{weights.FILE}` holds the variables of the model that `config.json` describes, by their paths with dots:

```python
from safetensors.numpy import load_file

weights = load_file("{weights.FILE}")  # {{"{next(iter(weights.flat(of.trained.variables)))}": ...}}
```

In a folder with this one's files, `python -m advmoe_jax.main --mode evaluate --workdir FOLDER` attacks the model, and
`--config.init_from=FOLDER` starts a run from it.
"""
