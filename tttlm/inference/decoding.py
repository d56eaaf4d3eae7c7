"""Decoding: one compiled step samples a token for each sequence and reads it, for any lengths and settings."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tttlm.inference.reading import Reading
from tttlm.inference.sampling import Sampling, draw
from tttlm.model import LanguageModel
from tttlm.model.language_model import State

MOST_ENDS = 8  # largest number of tokens that may end a sequence


class Drawn(NamedTuple):
    """One sampled token of each sequence.

    Attributes:
        tokens: Token ids.
        log_probs: Log p of each under the model, in nats.
        active: False if the sequence had ended before.
    """

    tokens: Int[np.ndarray, "B"]
    log_probs: Float[np.ndarray, "B"]
    active: Bool[np.ndarray, "B"]


class _Carry(NamedTuple):
    state: State
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"]
    num_drawn: Int[Array, "B"]
    active: Bool[Array, "B"]


def decode(
    model: LanguageModel,
    reading: Reading,
    sampling: Sampling,
    *,
    max_tokens: int,
    ends: Sequence[int],
    samples: Sequence[int],
    vocab_size: int,
    stopped: Bool[np.ndarray, "B"],
) -> Iterator[Drawn]:
    """Samples tokens until every sequence has `max_tokens` of them, an end token, or was stopped.

    Args:
        model: The model, bound to its parameters.
        reading: The state after the prompts; its buffers are donated.
        sampling: The sampling settings.
        max_tokens: The largest number of tokens of a sequence.
        ends: Tokens that end a sequence.
        samples: The index of each sequence among the samples of its prompt, for independent random numbers.
        vocab_size: Tokens from this id on are not sampled.
        stopped: Sequences to stop, which the caller sets while it reads; a step in flight is discarded.
    """
    graph, params = nnx.split(model)
    batch = len(reading)
    fixed = {
        "sampling": sampling.values(vocab_size),
        "seed": np.uint32(sampling.seed),
        "samples": np.asarray(samples, np.uint32),
        "most": np.int32(max_tokens),
        "ends": np.pad(np.asarray(ends, np.int32), (0, MOST_ENDS - len(ends)), constant_values=-1),
    }
    none, every = jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool)
    carry = _Carry(reading.state, reading.logits, reading.seen, none, every)
    pending = None
    for _ in range(max_tokens):
        drawn, carry = _step(graph, params, carry, fixed, np.array(stopped))
        if pending is not None:  # results are read one step later, so that reading and computing overlap
            found = Drawn(*map(np.asarray, pending))
            if not found.active.any():
                return
            yield found
            if stopped.all():
                return
        pending = drawn
    if pending is not None and (last := Drawn(*map(np.asarray, pending))).active.any():
        yield last


@partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _step(
    graph: Any, params: Any, carry: _Carry, fixed: dict[str, Any], stopped: Bool[Array, "B"]
) -> tuple[Any, _Carry]:
    model: LanguageModel = nnx.merge(graph, params)
    active = carry.active & ~stopped
    seed = jax.random.key(fixed["seed"])
    of_sample = jax.vmap(jax.random.fold_in, (None, 0))(seed, fixed["samples"])
    keys = jax.vmap(jax.random.fold_in)(of_sample, carry.num_drawn)
    tokens, log_probs = draw(carry.logits, carry.seen, keys, fixed["sampling"])
    count = carry.num_drawn + active
    ended = jnp.any(tokens[:, None] == fixed["ends"], axis=1)
    on = active & ~ended & (count < fixed["most"])
    # A finished sequence reads no more tokens; with a single sequence, decoding ends.
    lengths = None if len(tokens) == 1 else on.astype(jnp.int32)
    h, state = model.extend_features(tokens[:, None], carry.state, lengths=lengths)
    seen = carry.seen.at[jnp.arange(len(tokens)), tokens].set(True)
    return (tokens, log_probs, active), _Carry(state, model.head(h[:, 0]), seen, count, on)
