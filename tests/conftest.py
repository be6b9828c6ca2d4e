"""Four CPU devices, strict jax, and one compilation cache for all tests of a machine."""

import gc
import importlib.machinery
import os
import pathlib
import sys
import tempfile
import types

import fsspec
import jax
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

# Compiling is most of what small tests cost; the processes that tests start inherit this.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
if jax.lib.__version__.startswith("0.10."):  # XLA aborts on a flag that it does not know
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

from advmoe_jax.models import resnet  # the package sets XLA_FLAGS before a backend starts

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "advmoe_jax_tests_cache"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # for the processes that tests start
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items):
    """Files that start processes come first, the longest of them before all: no worker should end alone with them."""
    top = [item for item in items if item.path.parent == pathlib.Path(__file__).parent]
    others = [item for item in items if item not in top]
    items[:] = sorted(top, key=lambda item: item.path.name, reverse=True) + others


@pytest.fixture(scope="module")
def tiny_resnet():
    """model.depth=4: a ResNet of one block. Most of what runs cost here is compiling their layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.DEPTHS, "4", (1,))
        yield


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Every compiled program holds memory maps, of which a process may only have so many: at the limit jax crashes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def bucket(monkeypatch):
    """gs:// is in memory, and gcsfs seems to be installed."""
    class Bucket(MemoryFileSystem):
        protocol = ("gcs", "gs")
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + os.fspath(path).removeprefix("gs://").strip("/")

    in_memory = Bucket(global_store=False)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: {"gcs": in_memory}.get(name) or
                        fsspec.filesystem(name))
    gcsfs = types.ModuleType("gcsfs")
    gcsfs.__spec__ = importlib.machinery.ModuleSpec("gcsfs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", gcsfs)
    return in_memory
