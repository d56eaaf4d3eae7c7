"""Rates and gates of a learner, computed from the tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from tttlm.mixers.mamba.layer import step_bias_init
from tttlm.ops.projection import projection
from tttlm.ops.ttt.transforms import factor, one_minus
from tttlm.parts.partition import to_heads


@dataclass(frozen=True)
class TokenGate:
    """The description of a gate of every token and head: `activation(x W + b)`, computed in float32 at least.

    Attributes:
        activation: the elementwise function of the logits; of the logits and `exp(A)` where there is a scale.
        rank: features between two projections; None for one projection.
        bias_init: initialiser of the bias; None for no bias.
        log_scale_init: initialiser of a learned `A` for each head; None for none.
    """

    activation: Callable = jax.nn.sigmoid
    rank: int | None = None
    bias_init: Initializer | None = None
    log_scale_init: Initializer | None = None


class Gate(nnx.Module):
    """A `TokenGate` with its weights: `[B, T, D]` to `[B, T, H, N]`.

    Args:
        gate: the description of the gate.
        hidden_size: size `D` of a token.
        num_heads: number of heads `H`.
        size: number `N` of values of every head.
        dtype: dtype of the projections; None promotes input and parameters.
        param_dtype: dtype of all parameters.
        kernel_init: initialiser of the projections.
        rngs: random number generators of the parameters.
    """

    def __init__(
        self,
        gate: TokenGate,
        hidden_size: int,
        num_heads: int,
        size: int,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        kernel_init: Initializer,
        rngs: nnx.Rngs,
    ):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                dot_general=projection,
                rngs=rngs,
            )

        outputs = num_heads * size
        self.gate, self.num_heads = gate, num_heads
        self.down_proj = None if gate.rank is None else linear(hidden_size, gate.rank)
        self.up_proj = linear(gate.rank or hidden_size, outputs)
        param = lambda init, shape: None if init is None else nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = param(gate.bias_init, (outputs,))
        self.log_scale = param(gate.log_scale_init, (num_heads,))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H N"]:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        logits = to_heads(self.up_proj(x if self.down_proj is None else self.down_proj(x))).astype(dtype)
        if self.bias is not None:
            logits = logits + self.bias[...].astype(dtype)
        logits = logits.reshape(*x.shape[:2], self.num_heads, -1)
        if self.log_scale is None:
            return self.gate.activation(logits)
        return self.gate.activation(logits, jnp.exp(self.log_scale[...].astype(dtype))[:, None])


def softplus_decay(logits: Float[Array, "*S H N"], scale: Float[Array, "H 1"]) -> Float[Array, "*S H N"]:
    """`-exp(A) softplus(logits)`: the logarithm of a gate, as Mamba-2 and Gated DeltaNet have it."""
    return -scale * jax.nn.softplus(logits)


def log_uniform_init(low: float, high: float) -> Initializer:
    """The initialiser of `A`: the logarithm of a uniform number."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
        return jnp.log(jax.random.uniform(key, shape, jnp.float32, max(low, 1e-4), high)).astype(dtype)

    return init


def mamba_decay(*, rank: int | None = None, smallest: float = 0.0, largest: float = 16.0) -> TokenGate:
    """`-exp(A) softplus(x W + b)` with the initial weights of Mamba-2, `exp(A)` between `smallest` and `largest`."""
    return TokenGate(softplus_decay, rank, step_bias_init, log_uniform_init(smallest, largest))


def default_gate(activation: Callable) -> TokenGate:
    """A gate that is initialised close to no decay, for the activation of the learner."""
    keep, forget = nnx.initializers.constant(4.0), nnx.initializers.constant(-4.0)
    if activation is factor:
        return TokenGate(jax.nn.sigmoid, bias_init=keep)
    if activation is one_minus:
        return TokenGate(jax.nn.sigmoid, bias_init=forget)
    if activation is jnp.exp:
        return TokenGate(jax.nn.log_sigmoid, bias_init=keep)
    return TokenGate(factor, bias_init=nnx.initializers.zeros)


@dataclass(frozen=True)
class BoundedDecay:
    """`bound sigmoid(exp(A) logits)`: the logarithm of a gate that is not below `bound`."""

    bound: float

    def __call__(self, logits: Float[Array, "*S H N"], scale: Float[Array, "H 1"]) -> Float[Array, "*S H N"]:
        return self.bound * jax.nn.sigmoid(scale * logits)


def bounded_decay(bound: float, *, rank: int | None = None) -> TokenGate:
    """`BoundedDecay` of `x W + b`, with the initial weights that flash-linear-attention gives it."""
    return TokenGate(BoundedDecay(bound), rank, step_bias_init, nnx.initializers.zeros)


@dataclass(frozen=True)
class LogSigmoidOver:
    """`log sigmoid(logits) / normalizer`."""

    normalizer: float

    def __call__(self, logits: Float[Array, "*S"]) -> Float[Array, "*S"]:
        return jax.nn.log_sigmoid(logits) / self.normalizer


def twice_sigmoid(logits: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """`2 sigmoid(logits)`: rates that can reverse the value stored at a key (arXiv 2411.12537)."""
    return 2 * jax.nn.sigmoid(logits)


@dataclass(frozen=True)
class SigmoidUpTo:
    """`maximum sigmoid(logits)`."""

    maximum: float

    def __call__(self, logits: Float[Array, "*S"]) -> Float[Array, "*S"]:
        return self.maximum * jax.nn.sigmoid(logits)
