"""Decoding: one compiled step samples a token for each sequence and reads it, for any lengths and settings."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tttlm.inference.reading import Reading
from tttlm.inference.sampling import Sampling, draw
from tttlm.inference.stepping import stepping
from tttlm.model import LanguageModel

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
    batch = len(reading)
    fixed = {
        "sampling": sampling.values(vocab_size),
        "seed": np.uint32(sampling.seed),
        "samples": np.asarray(samples, np.uint32),
        "most": np.int32(max_tokens),
        "ends": np.pad(np.asarray(ends, np.int32), (0, MOST_ENDS - len(ends)), constant_values=-1),
    }
    none, every = jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool)
    step, logits, carry = stepping(model, reading.state), reading.logits, _Carry(reading.seen, none, every)
    pending = None
    for _ in range(max_tokens):
        drawn, carry = _drawn(logits, carry, fixed, np.array(stopped))
        # A finished sequence reads no more tokens; with a single sequence, decoding ends.
        logits = step(drawn[0], None if batch == 1 else carry.active.astype(jnp.int32))
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


@partial(jax.jit, donate_argnums=(1,))
def _drawn(
    logits: Float[Array, "B V"], carry: _Carry, fixed: dict[str, Any], stopped: Bool[Array, "B"]
) -> tuple[Any, _Carry]:
    active = carry.active & ~stopped
    seed = jax.random.key(fixed["seed"])
    of_sample = jax.vmap(jax.random.fold_in, (None, 0))(seed, fixed["samples"])
    keys = jax.vmap(jax.random.fold_in)(of_sample, carry.num_drawn)
    tokens, log_probs = draw(logits, carry.seen, keys, fixed["sampling"])
    count = carry.num_drawn + active
    ended = jnp.any(tokens[:, None] == fixed["ends"], axis=1)
    on = active & ~ended & (count < fixed["most"])
    seen = carry.seen.at[jnp.arange(len(tokens)), tokens].set(True)
    return (tokens, log_probs, active), _Carry(seen, count, on)
