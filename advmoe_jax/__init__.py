"""advmoe_jax: robust vision models that are cheap to run, trained, compressed and honestly attacked."""

from advmoe_jax._version import __version__ as __version__
from advmoe_jax.core import xla

xla.set_cpu_flags()
