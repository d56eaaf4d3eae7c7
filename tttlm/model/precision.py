"""Checks that this process computes in the precision that a model needs."""

import jax

from tttlm.errors import InputError
from tttlm.model.config import ModelConfig


def check_precision(config: ModelConfig) -> None:
    """Refuses float64 where JAX would silently compute in float32.

    Raises:
        InputError: the model has float64 and JAX has it disabled.
    """
    for name in ("dtype", "param_dtype"):
        if getattr(config, name) == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
            raise InputError(
                f"model.{name} is float64, which JAX has disabled: set JAX_ENABLE_X64=1 in the environment, "
                "or choose float32"
            )
