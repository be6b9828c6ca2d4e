"""PyTorch: a state dict by the names of torchvision, kuangliu, akamaster or the released AdvMoE code.

It is a safetensors file, which `safetensors.torch.load_file` reads, and PyTorch is not needed to write it.
"""

from etils import epath

from advmoe_jax.core import tensor_files
from advmoe_jax.core.errors import UserError
from advmoe_jax.interop import torch_files, torch_import
from advmoe_jax.interop.export import Export
from advmoe_jax.models.network import Network

FILE = "pytorch_model.safetensors"


def write(of: Export, folder: epath.Path) -> str:
    """Writes the state dict; gives the card's words."""
    if not isinstance(of.model, Network):
        raise UserError(f"export.format=torch is for one network, and the model is {of.model.kind}: expected "
                        "export.format=stablehlo, onnx or safetensors")
    state, own = torch_import.to_state_dict(of.model, of.trained.variables), of.config.model
    tensor_files.write(folder / FILE, state, dict(zip(torch_files.NORMALISED_BY, (own.mean, own.std))))
    normalised = f", normalised by mean `{own.mean}` and standard deviation `{own.std}`" if own.mean else ""
    first = next(iter(state))
    return f"""```python
from safetensors.torch import load_file

module.load_state_dict(load_file("{FILE}"))  # {{"{first}": {tuple(state[first].shape)}, ...}}
```

The module is the plain one of that name: it takes images (B, C, H, W) in [0, 1]{normalised}.
"""
