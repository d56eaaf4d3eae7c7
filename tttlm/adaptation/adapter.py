"""A model that learns from its inputs before (or after) it predicts them: the loop of all methods in this package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool

from tttlm.adaptation.saved_state import read_state, write_state
from tttlm.errors import InputError

Objective = Callable[[Any, Any, Array], Array]
"""A loss without labels: `objective(model, inputs, rng)` with inputs `[batch_size, ...]` and a PRNG key, a scalar."""
Reset = Literal["sample", "document", "never"]
Order = Literal["learn_first", "predict_first"]


class AdapterState(NamedTuple):
    """The state that an adapter carries from call to call: parameters that learn, optimiser state, position."""

    params: Any
    opt_state: Any
    position: Array  # int32 []: number of units since the start, which seeds the random numbers of the next one


class Adapter:
    """A Flax NNX model whose parameters take a few self-supervised gradient steps on an input before it predicts it.

    >>> adapter = Adapter(model, rotation_objective, learns=self_supervised_branch, optimizer=optax.sgd(1e-3), steps=10)
    >>> logits = adapter(images)  # [B, ...] -> [B, V], each image with parameters of its own
    >>> adapter.reset()           # the initial state, bit for bit

    This is Test-Time Training (arXiv 1909.13231) with `reset="sample"` and TTT-Online with `reset="never"`. It uses no
    labels: a prediction depends on its own input and, if the state is carried, on earlier inputs. However a stream is
    cut into calls (at multiples of `batch_size`), the predictions are the same. A function is compiled once for each
    shape of `inputs`.

    A unit is the `batch_size` samples that the model adapts to together. With `reset="sample"`, `parallel` units are
    adapted at a time by `jax.vmap`, each on its own copy of the parameters that learn. Memory is then `parallel` times
    (`bytes_per_unit` + activations of the objective for one unit). Other policies hold one copy.

    Args:
        model: any NNX model; its current parameters are the initial ones. It is not changed.
        objective: `objective(model, inputs, rng)`, the loss to minimise; None never learns.
        learns: an `nnx` filter of the variables that learn; all others are fixed.
        optimizer: an optax optimiser; its state is reset with the parameters.
        steps: number of gradient steps on each unit.
        reset: when parameters are reset to the initial ones: before each unit ("sample"), at the start of a document
            ("document"), or "never".
        batch_size: number of samples of a unit; 1 in the paper, more for methods that need the statistics of a batch.
            The last unit of a call may be smaller.
        order: whether a unit is predicted after learning from it, or before (as TENT does).
        predict: `predict(model, inputs)`; the default calls the model.
        decay: fraction by which parameters move back towards the initial ones after each step.
        parallel: number of units adapted at a time if `reset="sample"`. 1 is best on a CPU.
        seed: seed of the random numbers of the objective.

    Raises:
        InputError: the filter selects nothing, a number is out of range, or the updates would never be used.
    """

    def __init__(
        self,
        model: nnx.Module,
        objective: Objective | None,
        *,
        learns: Any = nnx.Param,
        optimizer: optax.GradientTransformation | None = None,
        steps: int = 1,
        reset: Reset = "sample",
        batch_size: int = 1,
        order: Order = "learn_first",
        predict: Callable[[Any, Any], Any] = lambda model, inputs: model(inputs),
        decay: float = 0.0,
        parallel: int = 1,
        seed: int = 0,
    ):
        for name, value, choices in (
            ("reset", reset, ("sample", "document", "never")),
            ("order", order, ("learn_first", "predict_first")),
        ):
            if value not in choices:
                raise InputError(f"{name} is one of {', '.join(choices)}, got {value!r}")
        if min(batch_size, parallel) < 1 or steps < 0 or not 0 <= decay <= 1:
            raise InputError(
                "batch_size and parallel are at least 1, steps at least 0, decay between 0 and 1; "
                f"got batch_size {batch_size}, parallel {parallel}, steps {steps}, decay {decay}"
            )
        if reset == "sample" and order == "predict_first" and objective is not None:
            raise InputError("order 'predict_first' with reset 'sample' never uses what it learns: use another reset")
        self._graph, first, self._rest = split(model, learns)
        if objective is not None and not jax.tree.leaves(first):
            raise InputError("the filter 'learns' selects no variable of the model: give one that does, as nnx.Param")
        self._objective, self._predict = objective, predict
        self._optimizer = optimizer or optax.sgd(1e-3)
        self._steps = 0 if objective is None else steps
        self._policy, self._predict_first = reset, order == "predict_first"
        self._decay, self._parallel = decay, parallel
        self._key = jax.random.key(seed)
        self.batch_size = batch_size
        self._first = AdapterState(first, self._optimizer.init(first), jnp.zeros((), jnp.int32))
        self.state = self._first
        self._run = jax.jit(self._each_alone if reset == "sample" else self._one_after_another)

    def __call__(self, inputs: Any, starts: Bool[np.ndarray, "B"] | None = None) -> Any:
        """Adapts to `inputs` and predicts them; the state is kept by the reset policy.

        Args:
            inputs: an array `[B, ...]`, or a pytree of them, in the order of arrival.
            starts: bool `[B]`, True where a sample is the first of its document; for `reset="document"` only. Samples
                before the first True belong to the document of the previous call.

        Returns:
            The results of `predict` for all samples, `[B, ...]`.

        Raises:
            InputError: there are no inputs, or a document starts inside a unit.
        """
        leaves = jax.tree.leaves(inputs)
        if not leaves or not len(leaves[0]):
            raise InputError("the inputs are empty: give at least one sample")
        count, size = len(leaves[0]), self.batch_size
        begins = self._unit_starts(count, starts)
        even = count // size * size
        predictions = []
        for part, unit in ((slice(0, even), size), (slice(even, count), count - even)):
            if part.stop > part.start:
                units = _in_units(inputs, part, unit)
                begin = begins[part.start // size : -(-part.stop // size)]
                predicted, self.state = self._run(self._first, self._rest, self.state, units, begin)
                predictions.append(predicted)
        return jax.tree.map(lambda *x: jnp.concatenate([part.reshape(-1, *part.shape[2:]) for part in x]), *predictions)

    def reset(self) -> None:
        """Resets parameters, optimiser state and random numbers to the initial ones, bit for bit."""
        self.state = self._first

    @property
    def model(self) -> Any:
        """A copy of the model with its current adapted parameters."""
        return nnx.merge(self._graph, self.state.params, self._rest, copy=True)

    @property
    def bytes_per_unit(self) -> int:
        """Bytes that a unit adapted in parallel needs for its parameters, their gradient and the optimiser state."""
        sizes = [x.nbytes for x in jax.tree.leaves(self._first.params)]
        return 2 * sum(sizes) + sum(x.nbytes for x in jax.tree.leaves(self._first.opt_state))

    def save(self, path: str | Path) -> None:
        """Writes the state (parameters, optimiser, position) to a safetensors file, which `load` reads."""
        write_state(Path(path), self.state)

    def load(self, path: str | Path) -> None:
        """Restores a state that `save` wrote.

        Raises:
            InputError: the file cannot be read, or is the state of another model, filter or optimiser.
        """
        self.state = read_state(Path(path), self._first)

    def _unit_starts(self, count: int, starts: Any) -> np.ndarray:
        units = -(-count // self.batch_size)
        if starts is None:
            return np.zeros(units, bool)
        starts = np.asarray(starts, bool)
        if starts.shape != (count,):
            raise InputError(f"'starts' has one value for each of the {count} samples, got shape {starts.shape}")
        if wrong := [int(i) for i in np.flatnonzero(starts) if i % self.batch_size]:
            raise InputError(
                f"sample {wrong[0]} starts a document inside a unit of batch_size = {self.batch_size} samples: "
                "use a batch_size that divides the documents, such as 1"
            )
        return starts[:: self.batch_size]

    def _each_alone(self, first: AdapterState, rest: Any, state: AdapterState, units: Any, begins: Array) -> Any:
        positions = state.position + jnp.arange(len(begins))

        def alone(unit: Any) -> Any:
            inputs, position = unit
            return self._adapt(first, rest, first._replace(position=position), inputs)[1]

        predictions = jax.lax.map(alone, (units, positions), batch_size=self._parallel if self._parallel > 1 else None)
        return predictions, state._replace(position=state.position + len(begins))

    def _one_after_another(self, first: AdapterState, rest: Any, state: AdapterState, units: Any, begins: Array) -> Any:
        def unit(state: AdapterState, arriving: Any) -> Any:
            inputs, begin = arriving
            if self._policy == "document":
                again = first._replace(position=state.position)
                state = jax.tree.map(lambda new, old: jnp.where(begin, new, old), again, state)
            return self._adapt(first, rest, state, inputs)

        state, predictions = jax.lax.scan(unit, state, (units, begins))
        return predictions, state

    def _adapt(self, first: AdapterState, rest: Any, state: AdapterState, inputs: Any) -> tuple[AdapterState, Any]:
        """Adapts to one unit: the state after it, and its predictions."""
        before = self._predicted(state.params, rest, inputs) if self._predict_first else None
        keys = jax.random.split(jax.random.fold_in(self._key, state.position), max(self._steps, 1))

        def step(carry: Any, key: Array) -> Any:
            params, opt_state = carry
            gradient = jax.grad(lambda params: self._loss(params, rest, inputs, key))(params)
            updates, opt_state = self._optimizer.update(gradient, opt_state, params)
            return (towards(first.params, optax.apply_updates(params, updates), self._decay), opt_state), None

        params, opt_state = state.params, state.opt_state
        if self._steps:
            (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), keys)
        after = AdapterState(params, opt_state, state.position + 1)
        return after, before if self._predict_first else self._predicted(params, rest, inputs)

    def _loss(self, params: Any, rest: Any, inputs: Any, key: Array) -> Array:
        assert self._objective is not None
        return self._objective(nnx.merge(self._graph, params, rest, copy=True), inputs, key)

    def _predicted(self, params: Any, rest: Any, inputs: Any) -> Any:
        return self._predict(nnx.merge(self._graph, params, rest, copy=True), inputs)


def split(model: nnx.Module, learns: Any) -> tuple[Any, Any, Any]:
    """The structure of a model, the variables that an `nnx` filter selects, and all others; for `nnx.merge`."""
    graph, *states = nnx.split(model, learns, ...)
    return graph, states[0], states[1]


def _in_units(inputs: Any, part: slice, unit: int) -> Any:
    return jax.tree.map(lambda x: jnp.reshape(x[part], (-1, unit, *x.shape[1:])), inputs)


def towards(first: Any, params: Any, fraction: float) -> Any:
    """Parameters moved back by a fraction towards the initial ones, as in dynamic evaluation (arXiv 1709.07432)."""
    if not fraction:
        return params
    return jax.tree.map(lambda start, now: now + fraction * (start - now), first, params)
