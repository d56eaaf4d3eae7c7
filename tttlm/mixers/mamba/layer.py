"""Mamba: a sequence layer whose state is a vector with input-dependent decay and input."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from tttlm.ops.documents import Documents, document_in_progress
from tttlm.ops.projection import projection
from tttlm.ops.ssm import IMPLEMENTATIONS, selective_scan
from tttlm.parts.conv import CausalConv
from tttlm.parts.partition import each_device, project, project_heads, to_heads, to_stream, with_sharding
from tttlm.parts.sequence_layer import (
    Precision,
    SequenceLayer,
    at_least_one,
    check_implementation,
    checked_precision,
)

# Uniform in +-1/sqrt(inputs), as in PyTorch's Linear and the released models.
default_kernel_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def out_kernel_init(num_layers: int) -> Initializer:
    """The initialiser of the authors' code: PyTorch's default, for the projection out divided by the root of depth."""
    return nnx.initializers.variance_scaling(1 / (3 * num_layers), "fan_in", "uniform")


def step_bias_init(
    key: Array, shape: tuple[int, ...], dtype: Dtype, *, smallest: float = 1e-3, largest: float = 0.1
) -> Float[Array, "..."]:
    """Biases whose softplus, the step size, is log-uniform between `smallest` and `largest`."""
    low, high = math.log(smallest), math.log(largest)
    step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high)), 1e-4)
    return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)  # the inverse of softplus


class MambaState(NamedTuple):
    """The state of a Mamba layer.

    Attributes:
        ssm: the `N` states of every channel; float32 (float64 when computed in it).
        tail: the last inputs of the convolution.
        document: id of the document in progress.
    """

    ssm: Float[Array, "B N E"]
    tail: Float[Array, "B P E"]
    document: Int[Array, "B"]


class Mamba(SequenceLayer[MambaState]):
    """Mamba (arXiv 2312.00752, section 3.4), in the layout and with the initial weights of its released models.

    >>> layer = Mamba(64, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 50, 64))).shape
    (2, 50, 64)

    Args:
        hidden_size: size `D` of inputs and outputs.
        state_size: number of states `N` of every channel.
        expand: `E / D`, channels per feature of the model.
        conv_kernel: number of taps of the convolution.
        dt_rank: size `R` of the bottleneck before the step sizes; None for `ceil(D / 16)`.
        use_bias: whether the projections in and out have biases.
        conv_bias: whether the convolution has a bias.
        chunk_size: chunk size of `tttlm.ops.ssm.selective_scan`.
        dtype: dtype of projections and convolution; None promotes input and parameters. Step sizes,
            decays and states are float32 at least.
        param_dtype: dtype of all parameters.
        precision: precision of the layer's matrix products, a name of `jax.default_matmul_precision`; None for that of
            the caller.
        kernel_init: initialiser of all projections but that of the step sizes.
        out_kernel_init: initialiser of the projection out; None for `kernel_init`. The released models divide it by
            `sqrt(layers)`.
        implementation: implementation of `tttlm.ops.ssm.selective_scan`.
        rngs: random number generators of the parameters.

    Raises:
        InputError: a size is below 1 or the implementation is unknown.

    A token costs projections of `D x 2E`, `E x (R + 2N)`, `R x E` and `E x D`, and `3 E N` multiply-adds for decay,
    input and output of the states.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        dt_rank: int | None = None,
        use_bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Precision = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        at_least_one(hidden_size=hidden_size, state_size=state_size, expand=expand, conv_kernel=conv_kernel)
        at_least_one(dt_rank=dt_rank, chunk_size=chunk_size)
        check_implementation(implementation, IMPLEMENTATIONS)
        inner = expand * hidden_size
        self.hidden_size = hidden_size
        self.state_size = state_size
        self.dt_rank = math.ceil(hidden_size / 16) if dt_rank is None else dt_rank
        self.chunk_size, self.implementation = chunk_size, implementation
        self.dtype, self.param_dtype = dtype, param_dtype
        self.precision = checked_precision(precision)

        linear = partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            dot_general=projection,
            rngs=rngs,
        )
        self.in_proj = linear(hidden_size, 2 * inner, use_bias=use_bias, kernel_init=kernel_init)
        self.conv = CausalConv(inner, conv_kernel, use_bias=conv_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.x_proj = linear(inner, self.dt_rank + 2 * state_size, use_bias=False, kernel_init=kernel_init)
        self.dt_proj = linear(self.dt_rank, inner, use_bias=False, kernel_init=default_kernel_init)
        # Added in float32: rounded to bfloat16, a bias around -5 would have an error of more than a percent.
        self.dt_bias = nnx.Param(step_bias_init(rngs.params(), (inner,), param_dtype))
        rates = jnp.broadcast_to(jnp.arange(1, state_size + 1, dtype=jnp.float32), (inner, state_size))
        self.A_log = nnx.Param(jnp.log(rates).astype(param_dtype))
        self.D = nnx.Param(jnp.ones((inner,), param_dtype))
        self.out_proj = linear(inner, hidden_size, use_bias=use_bias, kernel_init=out_kernel_init or kernel_init)

    def _extend(
        self, x: Float[Array, "B T D"], state: MambaState, docs: Documents | None
    ) -> tuple[Float[Array, "B T D"], MambaState]:
        x, gate = project(self.in_proj, x, (self.D.shape[0],) * 2)
        x, tail = self.conv(to_heads(x), state.tail, docs=docs)
        x = jax.nn.silu(x)
        parts = with_sharding(project_heads(self.x_proj, x, "H_"), "B")
        dt, B, C = jnp.split(parts, (self.dt_rank, self.dt_rank + self.state_size), axis=-1)
        dtype = state.ssm.dtype
        dt = with_sharding(project_heads(self.dt_proj, dt, "_H"), "B_H").astype(dtype) + self.dt_bias[...].astype(dtype)

        def scan(x, dt, A, B, C, state, docs):
            return selective_scan(
                x,
                dt,
                A,
                B,
                C,
                state=state,
                docs=docs,
                chunk_size=self.chunk_size,
                implementation=self.implementation,
            )

        y, ssm = each_device(scan, ("B_H", "B_H", "H", "B", "B", "B_H", "B"), ("B_H", "B_H"))(
            x, jax.nn.softplus(dt), -jnp.exp(self.A_log[...].astype(dtype)), B, C, state.ssm, docs
        )
        y = to_stream((y + self.D[...].astype(dtype) * x).astype(x.dtype))
        y = self.out_proj(y * jax.nn.silu(gate))
        return y, MambaState(ssm, tail, document_in_progress(state.document, docs))

    def _init_state(self, batch: int) -> MambaState:
        dtype = self.dtype or self.param_dtype
        return MambaState(
            jnp.zeros((batch, self.state_size, self.D.shape[0]), jnp.promote_types(dtype, jnp.float32)),
            self.conv.init_tail(batch, dtype),
            jnp.zeros((batch,), jnp.int32),
        )
