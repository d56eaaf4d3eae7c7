"""What all tests share: shapes are checked at run time, examples are the same in every run, float64 on request."""

import os
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Compiled programs are kept from run to run: most of what the tests wait for is compilation.
_cache = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# The programs are tiny: compiling them well takes longer than running them badly.
_flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # a third of the time of what newer versions compile with
    _flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", _flags)

# The shapes in the signatures of the mathematics and the layers are checked at every call.
install_import_hook(["tttlm.ops", "tttlm.parts", "tttlm.mixers"], "beartype.beartype")

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=12,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],  # ours change nothing between examples
)
hypothesis.settings.load_profile("default")


def pytest_make_parametrize_id(val, argname):
    """Names what is packed by its argument: archives hold the time, and every worker must collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def x64():
    """Computes in float64 for as long as the test runs."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def parity() -> Path:
    """Tiny checkpoints as they are released, each with what its reference implementation computes from it."""
    return Path(__file__).parent / "fixtures" / "parity"
