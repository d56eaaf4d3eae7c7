"""Mamba-2: Mamba with one decay for every head, so that a chunk of tokens is computed as a matrix product."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from tttlm.errors import InputError
from tttlm.mixers.mamba.layer import default_kernel_init, step_bias_init
from tttlm.ops.documents import Documents, document_in_progress
from tttlm.ops.projection import projection
from tttlm.ops.ssm import IMPLEMENTATIONS, ssd
from tttlm.parts.conv import CausalConv
from tttlm.parts.partition import each_device, project, repeat_groups, to_heads, to_stream, with_sharding
from tttlm.parts.sequence_layer import (
    Precision,
    SequenceLayer,
    at_least_one,
    check_implementation,
    checked_precision,
)


class Mamba2State(NamedTuple):
    """The state of a Mamba-2 layer.

    Attributes:
        ssm: the state matrix of every head; float32 (float64 when computed in it).
        tail: the last inputs of the convolution.
        document: id of the document in progress.
    """

    ssm: Float[Array, "B H P N"]
    tail: Float[Array, "B W C"]
    document: Int[Array, "B"]


class GatedRMSNorm(nnx.Module):
    """`RMSNorm(x * silu(gate))` over each of `groups` parts of the last axis, computed in float32 at least."""

    def __init__(self, hidden_size: int, *, num_groups: int, eps: float, param_dtype: Dtype):
        self.scale = nnx.Param(jnp.ones((hidden_size,), param_dtype))
        self.num_groups, self.eps = num_groups, eps

    def __call__(self, x: Float[Array, "B T E"], gate: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        y = x.astype(dtype) * jax.nn.silu(gate.astype(dtype))
        parts = y.reshape(*y.shape[:-1], self.num_groups, -1)
        parts = parts * jax.lax.rsqrt(jnp.mean(jnp.square(parts), axis=-1, keepdims=True) + self.eps)
        return (parts.reshape(y.shape) * self.scale[...].astype(dtype)).astype(gate.dtype)


class Mamba2(SequenceLayer[Mamba2State]):
    """Mamba-2 (arXiv 2405.21060, section 7), in the layout and with the initial weights of its released models.

    >>> layer = Mamba2(64, head_dim=16, state_size=32, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 50, 64))).shape
    (2, 50, 64)

    Args:
        hidden_size: size `D` of inputs and outputs.
        state_size: size `N` of the input and output vectors.
        head_dim: size `P` of a head; there are `H = E / P`.
        expand: `E / D`, channels per feature of the model.
        num_groups: number `G` of input and output vectors, which groups of heads have in common.
        norm_groups: number of parts that are normalised separately before the projection out. One in
            `Mamba2ForCausalLM`; its authors' code has as many as `num_groups`.
        conv_kernel: number of taps of the convolution.
        dt_limit: range to which step sizes are clipped.
        norm_eps: epsilon of the norm.
        use_bias: whether the projections in and out have biases.
        conv_bias: whether the convolution has a bias.
        chunk_size: chunk size of `tttlm.ops.ssm.ssd`; the outputs do not depend on it.
        dtype: dtype of projections and convolution; None promotes input and parameters. Step sizes,
            decays and states are float32 at least.
        param_dtype: dtype of all parameters.
        precision: precision of the layer's matrix products, a name of `jax.default_matmul_precision`; None for that of
            the caller.
        kernel_init: initialiser of the projections.
        out_kernel_init: initialiser of the projection out; None for `kernel_init`. The released models divide it by
            `sqrt(layers)`.
        implementation: implementation of `tttlm.ops.ssm.ssd`.
        rngs: random number generators of the parameters.

    Raises:
        InputError: head dimension, groups and channels do not match, a size is below 1 or the
            implementation is unknown.

    With chunks of `L` tokens, a token costs projections of `D x (2E + 2GN + H)` and `E x D`, and products of `L x GN`,
    `L x E` and twice `E x N`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        num_groups: int = 1,
        norm_groups: int = 1,
        conv_kernel: int = 4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        norm_eps: float = 1e-5,
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
        at_least_one(hidden_size=hidden_size, state_size=state_size, head_dim=head_dim, expand=expand)
        at_least_one(num_groups=num_groups, norm_groups=norm_groups, conv_kernel=conv_kernel, chunk_size=chunk_size)
        check_implementation(implementation, IMPLEMENTATIONS)
        inner = expand * hidden_size
        num_heads = inner // head_dim
        if inner % head_dim or num_heads % num_groups or inner % norm_groups:
            raise InputError(
                f"head_dim and norm_groups must divide the {inner} channels, and num_groups the heads; "
                f"got head_dim {head_dim}, norm_groups {norm_groups}, num_groups {num_groups}"
            )
        self.hidden_size, self.inner, self.num_heads, self.num_groups, self.state_size = (
            hidden_size,
            inner,
            num_heads,
            num_groups,
            state_size,
        )
        self.dt_limit = dt_limit
        self.chunk_size, self.implementation = chunk_size, implementation
        self.dtype, self.param_dtype = dtype, param_dtype
        self.precision = checked_precision(precision)

        linear = partial(
            nnx.Linear,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            dot_general=projection,
            rngs=rngs,
        )
        channels = inner + 2 * num_groups * state_size
        self.in_proj = linear(hidden_size, inner + channels + num_heads, kernel_init=kernel_init)
        self.conv = CausalConv(
            channels, conv_kernel, use_bias=conv_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.dt_bias = nnx.Param(step_bias_init(rngs.params(), (num_heads,), param_dtype))
        rates = jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, 1, 16)
        self.A_log = nnx.Param(jnp.log(rates).astype(param_dtype))
        self.D = nnx.Param(jnp.ones((num_heads,), param_dtype))
        self.norm = GatedRMSNorm(inner, num_groups=norm_groups, eps=norm_eps, param_dtype=param_dtype)
        self.out_proj = linear(inner, hidden_size, kernel_init=out_kernel_init or kernel_init)

    def _extend(
        self, x: Float[Array, "B T D"], state: Mamba2State, docs: Documents | None
    ) -> tuple[Float[Array, "B T D"], Mamba2State]:
        batch, time = x.shape[:2]
        inner, of_groups = self.inner, 2 * self.num_groups * self.state_size
        gate, x, BC, dt = project(self.in_proj, x, (inner, inner, of_groups, self.num_heads))
        x, tail_x = self.conv(to_heads(x), state.tail[..., :inner], docs=docs, channels=slice(inner))
        BC, tail_BC = self.conv(with_sharding(BC, "B"), state.tail[..., inner:], docs=docs, channels=slice(inner, None))
        x = jax.nn.silu(x).reshape(batch, time, self.num_heads, -1)
        B, C = jnp.split(jax.nn.silu(BC).reshape(batch, time, 2 * self.num_groups, -1), 2, axis=2)
        dtype = state.ssm.dtype
        dt = jax.nn.softplus(to_heads(dt).astype(dtype) + self.dt_bias[...].astype(dtype))

        def scan(x, dt, A, B, C, state, docs):
            return ssd(
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

        y, ssm = each_device(scan, ("B_H", "B_H", "H", "B_H", "B_H", "BH", "B"), ("B_H", "BH"))(
            x,
            jnp.clip(dt, *self.dt_limit),
            -jnp.exp(self.A_log[...].astype(dtype)),
            repeat_groups(B, self.num_heads),
            repeat_groups(C, self.num_heads),
            state.ssm,
            docs,
        )
        y = y + self.D[...].astype(dtype)[:, None] * x
        y = self.out_proj(self.norm(to_stream(y.reshape(batch, time, inner)), gate))
        tail = jnp.concatenate([tail_x, tail_BC], axis=-1)
        return y, Mamba2State(ssm, tail, document_in_progress(state.document, docs))

    def _init_state(self, batch: int) -> Mamba2State:
        dtype = self.dtype or self.param_dtype
        shape = (batch, self.num_heads, self.inner // self.num_heads, self.state_size)
        return Mamba2State(
            jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)),
            self.conv.init_tail(batch, dtype),
            jnp.zeros((batch,), jnp.int32),
        )
