"""Text written by a model: sampled token by token through `extend`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tttlm.model import LanguageModel


def sample(
    model: LanguageModel,
    prompt: Sequence[int],
    length: int,
    *,
    temperature: float = 0.8,
    seed: int = 0,
    pieces: int | None = None,
) -> list[int]:
    """`length` tokens that go on from `prompt` (at least one token).

    Args:
        model: bound to its parameters.
        temperature: what the logits are divided by; 0 takes the likeliest token.
        seed: of the draws; the same seed gives the same text.
        pieces: how many tokens the tokenizer knows; none from there on is drawn, where the model has more. None draws
            any.
    """
    if not prompt:
        raise ValueError("sampling goes on from at least one token; give it the document start")
    graph, params = nnx.split(model)
    forced = np.zeros(len(prompt) + length, np.int32)
    forced[: len(prompt)] = prompt
    known = np.arange(len(forced)) < len(prompt)
    state = model.init_state(1)
    model.check_room(state, len(forced))
    known_pieces = model.config.vocab_size if pieces is None else min(pieces, model.config.vocab_size)
    tokens = _sample(graph, params, state, forced, known, jax.random.key(seed), float(temperature), known_pieces)
    return np.asarray(tokens)[len(prompt) - 1 : -1].tolist()


@partial(jax.jit, static_argnums=(0, 6, 7))
def _sample(
    graph: Any,
    params: Any,
    state: Any,
    forced: jax.Array,
    known: jax.Array,
    key: jax.Array,
    temperature: float,
    pieces: int,
) -> jax.Array:
    """For every place, the token drawn to follow it; places that are `known` read the prompt instead of a draw."""
    model = nnx.merge(graph, params)

    def write(carry: tuple[jax.Array, Any], place: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        drawn, state = carry
        forced, known, key = place
        token = jnp.where(known, forced, drawn)
        logits, state = model.extend(token[None, None], state)
        logits = logits[0, 0, :pieces]
        following = jax.random.categorical(key, logits / temperature) if temperature else jnp.argmax(logits)
        following = following.astype(jnp.int32)
        return (following, state), following

    keys = jax.random.split(key, forced.shape[0])
    _, following = jax.lax.scan(write, (forced[0], state), (forced, known, keys))
    return following
