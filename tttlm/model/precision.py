"""Whether this process computes in the precision that a model asks for."""

import jax

from tttlm.errors import InputError
from tttlm.model.config import ModelConfig


def check_precision(config: ModelConfig) -> None:
    """Refuses float64 where JAX would compute in float32 instead, without a word.

    Raises:
        InputError: the model asks for float64 and JAX has it switched off.
    """
    for name in ("dtype", "param_dtype"):
        if getattr(config, name) == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
            raise InputError(
                f"model.{name} is float64, which JAX has switched off: set JAX_ENABLE_X64=1 in the environment, "
                "or choose float32"
            )
