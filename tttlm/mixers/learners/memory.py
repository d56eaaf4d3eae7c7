"""One learner of a layer with its gates, initial weights and slow parameters."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from tttlm.errors import InputError
from tttlm.mixers.learners.gates import Gate, TokenGate, default_gate
from tttlm.ops.documents import Documents
from tttlm.ops.ttt import Learner, LearnerInputs, LearnerState, Ridge, init_learner_state, learn
from tttlm.ops.ttt.cost import initial_weights, rates_per_write
from tttlm.ops.ttt.learner_state import blank
from tttlm.ops.ttt.models import DiagonalLinear
from tttlm.ops.ttt.transforms import factor
from tttlm.parts.partition import each_device

SMALLEST_RIDGE = 0.25  # of `λ = softplus(.) + 0.25`, which starts at 1 (arXiv 2506.05233)


@dataclass(frozen=True)
class Gates:
    """Descriptions of the rates and gates of a learner; None for the default of the learner.

    Attributes:
        rate: learning rates of the gradients; a number is the rate of every token.
        momentum: input of the momentum gate.
        decay: input of the decay gate.
        step_size: factor of the transformed step.
    """

    rate: TokenGate | float | None = None
    momentum: TokenGate | None = None
    decay: TokenGate | None = None
    step_size: TokenGate | None = None


class Tokens(NamedTuple):
    """The inputs of all learners of a layer: queries, and the key, value and optional error key of every write."""

    queries: Float[Array, "B T H K"]
    keys: Float[Array, "B Tn H K"]
    values: Float[Array, "B Tn H V"]
    error_keys: Float[Array, "B Tn H K"] | None


class Memory(nnx.Module):
    """A learner, its gates and its initial weights.

    What the layer calls is private or a property, because `nnx.tabulate` lists calls of public methods, and fails at
    states and inputs that are named tuples within a list.

    Args:
        learner: the description.
        hidden_size: size `D` of a token.
        num_heads: number of heads `H`.
        key_dim: size `K` of a key.
        value_dim: size `V` of a value.
        gates: descriptions of rates and gates.
        learned_start: whether the initial weights are parameters; otherwise they are zero.
        dtype: dtype of the projections of gates; None promotes input and parameters.
        param_dtype: dtype of all parameters.
        kernel_init: initialiser of the projections of gates.
        rngs: random number generators of the parameters.

    Raises:
        InputError: a model with hidden layers would start from zeros, or has no `init`.
    """

    def __init__(
        self,
        learner: Learner,
        hidden_size: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        gates: Gates,
        learned_start: bool,
        dtype: Dtype | None,
        param_dtype: Dtype,
        kernel_init: Initializer,
        rngs: nnx.Rngs,
    ):
        self.learner, self.num_heads, self.key_dim, self.value_dim = learner, num_heads, key_dim, value_dim
        self.param_dtype = param_dtype
        steps = None if isinstance(learner.optimizer, Ridge) else learner.optimizer
        if not hasattr(learner.model, "init"):
            raise InputError("the inner model must have init(key, num_heads, inputs, outputs) to be used in a layer")
        if not (learned_start or steps is None or learner.linear or isinstance(learner.model, DiagonalLinear)):
            raise InputError("an inner model with hidden layers cannot learn from zeros: it needs learned_start")

        def gate(given: TokenGate | None, activation: Any, size: int) -> Gate:
            return Gate(
                default_gate(activation) if given is None else given,
                hidden_size,
                num_heads,
                size,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                rngs=rngs,
            )

        def coefficient(given: TokenGate | None, one: Any) -> Gate | None:
            return None if one is None else gate(given, one.activation, key_dim if one.per_channel else 1)

        rate = TokenGate() if gates.rate is None else gates.rate
        size = rates_per_write(learner, num_heads, key_dim, value_dim)
        self.num_rates = num_heads * size * learner.clocks.writes_per_token
        if isinstance(rate, TokenGate):
            self.rate: Gate | float | None = gate(rate, None, self.num_rates // num_heads) if size else None
        else:
            self.rate = rate
        self.decay = coefficient(gates.decay, learner.optimizer.decay)
        self.momentum = None if steps is None else coefficient(gates.momentum, steps.momentum)
        self.step_size = gate(gates.step_size, factor, 1) if steps is not None and steps.step_size else None

        param = lambda a: nnx.Param(a.astype(param_dtype))
        leaves: list[Array] = []
        if learned_start and steps is not None:
            leaves = jax.tree.leaves(learner.model.init(rngs.params(), num_heads, key_dim, value_dim))
        self.kernels = nnx.List(param(a) for a in leaves if a.ndim == 3)
        self.vectors = nnx.List(param(a) for a in leaves if a.ndim == 2)
        slow: list[Array] = []
        if steps is None:
            slow = [jnp.full((num_heads, key_dim), jnp.log(jnp.expm1(1 - SMALLEST_RIDGE)))]
        elif hasattr(learner.model, "init_slow"):
            slow = jax.tree.leaves(learner.model.init_slow(num_heads, value_dim))
        self.slow = nnx.List(param(a) for a in slow)
        scaled = steps is not None and steps.position_scale
        self.position_scale = nnx.Param(jnp.zeros((learner.clocks.anchor or 1,), param_dtype)) if scaled else None

    @property
    def weights(self) -> Any:
        """The initial weights `[H, ...]`."""
        shapes = initial_weights(self.learner, self.num_heads, self.key_dim, self.value_dim)
        if not self.kernels and not self.vectors:
            return jax.tree.map(lambda a: jnp.zeros(a.shape, self.param_dtype), shapes)
        kernels, vectors = iter(self.kernels), iter(self.vectors)
        return jax.tree.map(lambda a: next(kernels if a.ndim == 3 else vectors)[...], shapes)

    @property
    def slow_parameters(self) -> Any:
        """The parameters that only the outer training changes."""
        if isinstance(self.learner.optimizer, Ridge):
            raw = self.slow[0][...]
            return jax.nn.softplus(raw.astype(jnp.promote_types(raw.dtype, jnp.float32))) + SMALLEST_RIDGE
        if not self.slow:
            return None
        structure = jax.tree.structure(jax.eval_shape(lambda: self.learner.model.init_slow(1, 1)))
        return jax.tree.unflatten(structure, [a[...] for a in self.slow])

    @property
    def scale_of_positions(self) -> Float[Array, "M"] | None:
        """`max(0, 1/(p + 1) + learned)`, as the released TTT models have it."""
        if self.position_scale is None:
            return None
        scale = self.position_scale[...]
        scale = scale.astype(jnp.promote_types(scale.dtype, jnp.float32))
        return jnp.maximum(0, scale + 1 / jnp.arange(1, scale.size + 1, dtype=scale.dtype))

    def _init_state(self, batch: int) -> LearnerState:
        """The state before the first token, for `batch` sequences."""
        return init_learner_state(self.learner, self.weights, batch, self.key_dim, self.value_dim)

    def _inputs(self, x: Float[Array, "B T D"], tokens: Tokens, multiplier: float | Float[Array, ""]) -> LearnerInputs:
        """The inputs of the learner; `multiplier` multiplies the rates."""
        optimizer = self.learner.optimizer

        def one(gate: Gate | None, coefficient: Any) -> Array | None:  # [B, T, H], or [B, T, H, K] of channels
            return None if gate is None else gate(x) if coefficient.per_channel else gate(x)[..., 0]

        return LearnerInputs(
            tokens.queries,
            tokens.keys,
            tokens.values,
            self._rates(x, multiplier),
            momentum=one(self.momentum, getattr(optimizer, "momentum", None)),
            decay=one(self.decay, optimizer.decay),
            step_size=None if self.step_size is None else self.step_size(x)[..., 0],
            error_keys=tokens.error_keys,
        )

    def _rates(self, x: Array, multiplier: float | Array) -> Any:
        if self.rate is None:
            return None
        (batch, time, _), learner, writes = x.shape, self.learner, self.learner.clocks.writes_per_token
        of_tokens = (
            self.rate(x)
            if isinstance(self.rate, Gate)
            else jnp.full((batch, time, self.num_rates), self.rate, jnp.promote_types(x.dtype, jnp.float32))
        )
        rates = multiplier * of_tokens.reshape(batch, time, self.num_heads, writes, -1)
        rates = rates.swapaxes(2, 3).reshape(batch, time * writes, self.num_heads, -1)  # [B, T n, H, ...]
        kind = "token" if isinstance(learner.optimizer, Ridge) else learner.optimizer.rate
        if kind == "matrix":
            weights = initial_weights(learner, self.num_heads, self.key_dim, self.value_dim)
            leaves, structure = jax.tree.flatten(weights)
            return jax.tree.unflatten(structure, [rates[..., i] for i in range(len(leaves))])
        return rates if kind == "value" or learner.window > 1 else rates[..., 0]

    def _learn(
        self,
        inputs: LearnerInputs,
        state: LearnerState | None,
        docs: Documents | None,
        *,
        aligned: bool,
        on_boundary: bool,
        remat_chunks: int,
        implementation: str | None,
    ) -> tuple[Float[Array, "B T H V"], LearnerState]:
        """Runs the learner, each device on its own heads; see `tttlm.ops.ttt.learn`."""
        weights, slow = self.weights, self.slow_parameters

        def run(inputs, weights, slow, scale, state, docs):
            return learn(
                self.learner,
                inputs,
                weights,
                slow=slow,
                position_scale=scale,
                state=state,
                segment_ids=docs,
                aligned=aligned,
                on_boundary=on_boundary,
                remat_chunks=remat_chunks,
                implementation=implementation,
            )

        shapes = jax.eval_shape(lambda: blank(self.learner, weights, self.key_dim, self.value_dim))
        of_heads: Any = jax.tree.map(lambda _: "BH", shapes._replace(offset=None, document=None))
        of_state = of_heads._replace(offset="B", document="B")
        dims: Any = jax.tree.map(lambda _: "B_H", inputs)
        ins = (dims, "H", "H", "_", of_state, "B")
        given = (inputs, weights, slow, self.scale_of_positions, state, docs)
        return each_device(run, ins, ("B_H", of_state))(*given)
