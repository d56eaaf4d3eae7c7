"""The parts of published layers other than their learners: feature maps, convolutions, gates, norms."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tttlm.mixers.learners.memory import Gates
from tttlm.ops.ttt.transforms import norm


def unit(x: Float[Array, "*S K"]) -> Float[Array, "*S K"]:
    """`x / sqrt(|x|² + 1e-6)`, as flash-linear-attention normalises queries and keys; in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def unit_by_norm(x: Float[Array, "*S K"]) -> Float[Array, "*S K"]:
    """`x / (|x| + 1e-5)`, as LaCT normalises queries and keys; in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide / (norm(wide, -1) + 1e-5)).astype(x.dtype)


@dataclass(frozen=True)
class OutputGate:
    """The gate of the outputs, `activation(x W + b)`.

    Attributes:
        activation: the elementwise function.
        rank: features between two projections; None for one projection.
        use_bias: whether there is a bias.
        per_head: whether all channels of a head have the same gate.
    """

    activation: Callable = jax.nn.silu
    rank: int | None = None
    use_bias: bool = False
    per_head: bool = False


@dataclass(frozen=True)
class Conventions:
    """The parts of a layer other than its learner.

    Attributes:
        conv_kernel: number of taps of causal convolutions of queries, keys and values; 0 for none.
        conv_values: whether values have a convolution too.
        activation: the elementwise function of queries and keys; None for none.
        value_activation: the elementwise function of values; None for none.
        feature_map: function of every query and key `[..., K]`, which may change their size; None for none.
        rope_theta: base of rotary embeddings by the position within the document; None for none.
        rope_dim: number of channels that are rotated together; None for all of a key.
        gates: descriptions of rates and gates.
        learned_start: whether the initial inner weights are parameters; otherwise they are zero.
        skip: whether values are added to the outputs, times a learned factor for each channel.
        output_norm: whether every head's output has an RMS norm, with one scale for all heads.
        output_gate: the gate of the outputs; None for none.
    """

    conv_kernel: int = 4
    conv_values: bool = True
    activation: Callable | None = jax.nn.silu
    value_activation: Callable | None = jax.nn.silu
    feature_map: Callable | None = unit
    rope_theta: float | None = None
    rope_dim: int | None = None
    gates: Gates = field(default_factory=Gates)
    learned_start: bool = False
    skip: bool = False
    output_norm: bool = True
    output_gate: OutputGate | None = None
