"""Inner models, which learn within a layer, as functions of one token and one head.

An inner model is any hashable callable `model(weights, slow, x)` from `x` `[K]` to a prediction `[V]`. `weights` is a
pytree of fast weights, which the learner updates; `slow` is a pytree of parameters that only the outer training
changes, or None. Both belong to one head here, and have an axis `[H, ...]` in front everywhere else. A model may have

- `init(key, num_heads, inputs, outputs)`, which makes initial fast weights `[H, ...]`;
- `init_slow(num_heads, outputs)`, which makes initial slow parameters `[H, V]`;
- `predict(weights, slow, x)`, where what the loss compares with the target is not what a query reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from tttlm.ops.ttt.model import activation as gelu_tanh
from tttlm.ops.ttt.state import InnerLayer, InnerNorm


class SwiGLUWeights(NamedTuple):
    """The three matrices of `SwiGLU`: gate and up `[H, K, F]`, down `[H, F, V]`."""

    gate: Float[Array, "*H K F"]
    up: Float[Array, "*H K F"]
    down: Float[Array, "*H F V"]


class NormedWeights(NamedTuple):
    """The fast weights of a `Normed` model whose scale is fast: those of its inner model, and `γ` `[H, V]`."""

    inner: Any
    scale: Float[Array, "*H V"]


class RidgeWeights(NamedTuple):
    """The two states of the exact solve: `kk` sums weighted `kᵀk` `[H, K, K]`, `kv` weighted `kᵀv` `[H, K, V]`."""

    kk: Float[Array, "*H K K"]
    kv: Float[Array, "*H K V"]


def gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The exact GELU, with the error function."""
    return jax.nn.gelu(x, approximate=False)


@dataclass(frozen=True)
class MLP:
    """`W_d a(... a(x W_1 + b_1) ...) + b_d`; its fast weights are one `InnerLayer` for every layer.

    Attributes:
        hidden_sizes: sizes of the hidden layers; none for a linear model. `init` alone reads them: the weights that
            come in say how deep the model is.
        use_bias: whether `init` makes biases.
        activation: the elementwise function between two layers.
    """

    hidden_sizes: tuple[int, ...] = ()
    use_bias: bool = False
    activation: Callable = gelu_tanh

    def __call__(self, weights: tuple[InnerLayer, ...], slow: None, x: Float[Array, "K"]) -> Float[Array, "V"]:
        """The prediction of one head for one token."""
        for i, layer in enumerate(weights):
            x = (self.activation(x) if i else x) @ layer.kernel
            x = x if layer.bias is None else x + layer.bias
        return x

    def init(self, key: PRNGKeyArray, num_heads: int, inputs: int, outputs: int) -> tuple[InnerLayer, ...]:
        """Normal kernels of variance `1 / inputs`, biases of zero."""
        layers = []
        for i, (m, n) in enumerate(pairwise((inputs, *self.hidden_sizes, outputs))):
            kernel = jax.random.normal(jax.random.fold_in(key, i), (num_heads, m, n)) / m**0.5
            layers.append(InnerLayer(kernel, jnp.zeros((num_heads, n)) if self.use_bias else None))
        return tuple(layers)


@dataclass(frozen=True)
class DiagonalLinear:
    """A linear model whose every entry predicts on its own: `k_i W_ij` for `v_j`; a query reads `q W`.

    Its half square loss has `diag(k_i²)` where that of a linear model has `kᵀk` (the released Longhorn).
    """

    def __call__(self, weights: tuple[InnerLayer], slow: None, x: Float[Array, "K"]) -> Float[Array, "V"]:
        """The output for a query."""
        return x @ weights[0].kernel

    def predict(self, weights: tuple[InnerLayer], slow: None, x: Float[Array, "K"]) -> Float[Array, "K V"]:
        """The prediction that the loss compares with the target."""
        return x[:, None] * weights[0].kernel

    def init(self, key: PRNGKeyArray, num_heads: int, inputs: int, outputs: int) -> tuple[InnerLayer]:
        """Zeros, as released."""
        return (InnerLayer(jnp.zeros((num_heads, inputs, outputs)), None),)


@dataclass(frozen=True)
class SwiGLU:
    """`(silu(x W_gate) ∘ (x W_up)) W_down`, without biases (arXiv 2505.23884).

    Attributes:
        intermediate_size: columns of `W_gate` and `W_up` as `init` makes them.
    """

    intermediate_size: int

    def __call__(self, weights: SwiGLUWeights, slow: None, x: Float[Array, "K"]) -> Float[Array, "V"]:
        """The prediction of one head for one token."""
        return (jax.nn.silu(x @ weights.gate) * (x @ weights.up)) @ weights.down

    def init(self, key: PRNGKeyArray, num_heads: int, inputs: int, outputs: int) -> SwiGLUWeights:
        """Normal kernels of variance `1 / inputs`."""
        size, keys = self.intermediate_size, jax.random.split(key, 3)
        shapes = ((inputs, size), (inputs, size), (size, outputs))
        return SwiGLUWeights(
            *(jax.random.normal(k, (num_heads, *s)) / s[0] ** 0.5 for k, s in zip(keys, shapes, strict=True))
        )


@dataclass(frozen=True)
class Residual:
    """`x + inner(x)`.

    Attributes:
        inner: the model inside, whose outputs are as many as its inputs.
    """

    inner: Any

    def __call__(self, weights: Any, slow: Any, x: Float[Array, "K"]) -> Float[Array, "K"]:
        """The prediction of one head for one token."""
        return x + self.inner(weights, slow, x)

    def init(self, key: PRNGKeyArray, num_heads: int, inputs: int, outputs: int) -> Any:
        """The weights of the model inside."""
        return self.inner.init(key, num_heads, inputs, outputs)

    def init_slow(self, num_heads: int, outputs: int) -> Any:
        """The slow parameters of the model inside."""
        return self.inner.init_slow(num_heads, outputs) if hasattr(self.inner, "init_slow") else None


@dataclass(frozen=True)
class Normed:
    """A LayerNorm (biased variance) after a model without slow parameters.

    Attributes:
        inner: the model whose prediction is normalised.
        fast_scale: whether the norm is `LN(z) (1 + γ)` with fast `γ` (weights `NormedWeights`, no slow parameters) or
            `scale LN(z) + bias` with both learned by the outer training only (slow parameters `InnerNorm`).
        eps: epsilon inside the root.
    """

    inner: Any
    fast_scale: bool = False
    eps: float = 1e-6

    def __call__(self, weights: Any, slow: InnerNorm | None, x: Float[Array, "K"]) -> Float[Array, "V"]:
        """The prediction of one head for one token."""
        z = self.inner(weights.inner if self.fast_scale else weights, None, x)
        z = z - jnp.mean(z)
        z = z * jax.lax.rsqrt(jnp.mean(z * z) + self.eps)
        if self.fast_scale:
            return z * (1 + weights.scale)
        return z if slow is None else slow.scale * z + slow.bias

    def init(self, key: PRNGKeyArray, num_heads: int, inputs: int, outputs: int) -> Any:
        """The weights of the model inside, and `γ` of zero where it is fast."""
        inner = self.inner.init(key, num_heads, inputs, outputs)
        return NormedWeights(inner, jnp.zeros((num_heads, outputs))) if self.fast_scale else inner

    def init_slow(self, num_heads: int, outputs: int) -> InnerNorm | None:
        """Scale of one and bias of zero, where they are slow."""
        shape = (num_heads, outputs)
        return None if self.fast_scale else InnerNorm(jnp.ones(shape), jnp.zeros(shape))


def prediction(model: Any) -> Callable:
    """What the loss compares with the target: the model's `predict` where it has one, else the model itself."""
    return getattr(model, "predict", model)
