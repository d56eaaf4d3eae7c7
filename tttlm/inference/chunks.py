"""Chunks of tokens through a model: by a scan over its stacked blocks, or block by block.

A scan takes the state of a block out of the stack and puts the next one back, which for a cache of attention copies all
its room for every chunk. On a CPU such states are apart, and each is updated where it is. Models with small states take
the scan, which allocates what all blocks need once.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tttlm.inference.stepping import before_blocks, on_one_cpu, unstacked
from tttlm.model import LanguageModel
from tttlm.model.language_model import State
from tttlm.ops.documents import Documents


class Chunks:
    """Reads a batch of sequences chunk by chunk.

    Args:
        model: The model, bound to its parameters.
        state: The state before the first chunk; it is copied.
    """

    def __init__(self, model: LanguageModel, state: State) -> None:
        self._graph, self._params = nnx.split(model)
        self._of_repeat, self._stack = nnx.split(model.stack)
        self._repeats = model.config.repeats
        self._apart = model.config.cache_length is not None and on_one_cpu(state)
        self._states = self._parts(state)

    @property
    def state(self) -> State:
        """The state after what was read, a copy; leaves are `[repeats, B, ...]`."""
        return _stacked(self._states) if self._apart else _copy(self._states[0])

    def __call__(
        self,
        tokens: Int[np.ndarray, "B T"],
        segment_ids: Int[np.ndarray, "B T"] | None = None,
        *,
        lengths: Int[np.ndarray, "B"] | None = None,
        on_boundary: bool = False,
    ) -> Float[Array, "B T D"]:
        """The inputs of the head for the next tokens; arguments as for `LanguageModel.extend`."""
        if not self._apart:
            arguments = self._graph, self._params, self._states[0], tokens, segment_ids, lengths, on_boundary
            h, self._states[0] = _through_all(*arguments)
            return h
        document = jnp.copy(self._states[0][0].mixer.document)  # the state's own is donated to the first block
        h, docs = before_blocks(self._graph, self._params, tokens, document, segment_ids, lengths)
        for i, state in enumerate(self._states):
            h, self._states[i] = _through_one(self._of_repeat, self._stack, i, state, h, docs, on_boundary)
        return _normed(self._graph, self._params, h)

    def start_again(self, sequences: Bool[np.ndarray, "B"]) -> None:
        """Puts these sequences of the batch back to the state before the first token."""
        first = self._parts(_init_state(self._graph, self._params, len(sequences)))
        axis = 0 if self._apart else 1
        self._states = [_replaced(old, new, sequences, axis) for old, new in zip(self._states, first, strict=True)]

    def _parts(self, state: State) -> list[State]:
        return list(unstacked(state, self._repeats)) if self._apart else [_copy(state)]


@jax.jit
def _copy(state: State) -> State:
    return jax.tree.map(jnp.copy, state)


@jax.jit
def _stacked(states: list[State]) -> State:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *states)


@partial(jax.jit, static_argnums=(0, 2))
def _init_state(graph: Any, params: Any, batch: int) -> State:
    return nnx.merge(graph, params).init_state(batch)


@partial(jax.jit, static_argnums=(3,), donate_argnums=(0,))
def _replaced(old: State, new: State, sequences: Bool[Array, "B"], axis: int) -> State:
    def of_leaf(old: Array, new: Array) -> Array:
        return jnp.where(jnp.expand_dims(sequences, [i for i in range(old.ndim) if i != axis]), new, old)

    return jax.tree.map(of_leaf, old, new)


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=(2,))
def _through_all(
    graph: Any,
    params: Any,
    state: State,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    lengths: Int[Array, "B"] | None,
    on_boundary: bool,
) -> tuple[Float[Array, "B T D"], State]:
    model: LanguageModel = nnx.merge(graph, params)
    return model.extend_features(tokens, state, segment_ids, lengths=lengths, on_boundary=on_boundary)


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=(3,))
def _through_one(
    of_repeat: Any,
    stack: Any,
    index: Int[Array, ""],
    state: State,
    h: Float[Array, "B T D"],
    docs: Documents | None,
    on_boundary: bool,
) -> tuple[Float[Array, "B T D"], State]:
    params = jax.tree.map(lambda a: a[index], stack)  # a copy, far cheaper than a chunk
    return nnx.merge(of_repeat, params)(h, state, docs, 1.0, on_boundary)


@partial(jax.jit, static_argnums=(0,))
def _normed(graph: Any, params: Any, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return nnx.merge(graph, params).norm(h)
