"""The gated feed-forward block of Llama and TTT models."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from tttlm.ops.projection import projection
from tttlm.parts.partition import with_sharding


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (arXiv 2002.05202).

    Args:
        hidden_size: size `D` of inputs and outputs.
        intermediate_size: size `F` of the hidden layer.
        use_bias: whether the three projections have biases.
        dtype, param_dtype, kernel_init, rngs: as in `nnx.Linear`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                dot_general=projection,
                rngs=rngs,
            )

        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = (with_sharding(proj(x), "BTF") for proj in (self.gate_proj, self.up_proj))
        return self.down_proj(jax.nn.silu(gate) * up)
