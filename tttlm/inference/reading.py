"""Reading of prompts in chunks, by the same code as in training, and the state after them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tttlm.errors import InputError
from tttlm.inference.chunks import Chunks
from tttlm.model import LanguageModel
from tttlm.model.language_model import State

SMALLEST = 16  # tokens of the shortest chunk that is compiled


@dataclass(frozen=True)
class Reading:
    """The state after the tokens that a model has read, for each sequence of a batch.

    Attributes:
        state: The state of the model; leaves are `[repeats, B, ...]`.
        logits: Logits of the next token; zeros before the first one.
        seen: Mask of the tokens of the vocabulary that were read, for the repetition penalty.
        num_tokens: Number of tokens that were read.
    """

    state: State
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"]
    num_tokens: Int[np.ndarray, "B"]

    def __len__(self) -> int:
        return len(self.num_tokens)

    def take(self, index: Sequence[int]) -> "Reading":
        """The sequences at these indices of the batch, which may repeat: this forks a reading."""
        at = np.asarray(index, np.int32)
        state, logits, seen = _take((self.state, self.logits, self.seen), at)
        return Reading(state, logits, seen, self.num_tokens[at])


def begin(model: LanguageModel, batch: int) -> Reading:
    """The state before the first token, for `batch` sequences."""
    graph, params = nnx.split(model)
    state, logits, seen = _begin(graph, params, batch)
    return Reading(state, logits, seen, np.zeros(batch, np.int64))


def read(
    model: LanguageModel,
    reading: Reading,
    tokens: Sequence[Int[np.ndarray, "T"] | Sequence[int]],
    *,
    chunk: int = 512,
    on_tokens: Callable[[int], Any] = lambda count: None,
) -> Reading:
    """Reads tokens, `chunk` of each sequence at a time; sequences may have different numbers of tokens.

    While every sequence has a complete chunk left they are read as in training. The rest is read in chunks of powers
    of two, with padding where a sequence has fewer tokens, so that few programs are compiled for any lengths; a chunk
    that needs no padding is read as in training too.

    Args:
        model: The model, bound to its parameters.
        reading: The state before; it is not changed.
        tokens: Token ids for each sequence.
        chunk: Number of tokens of a chunk, rounded up to a multiple of the model's mini-batch size.
        on_tokens: Called with the number of tokens that were read since the last call.

    Raises:
        InputError: A token is not in the vocabulary, or an attention cache is too short.
    """
    parts = [np.asarray(part, np.int64).reshape(-1) for part in tokens]
    check_tokens(model, parts)
    check_room(model, reading.num_tokens + [len(part) for part in parts])
    align = model.config.alignment
    chunk = -(-chunk // align) * align
    graph, params = nnx.split(model)
    chunks, logits, seen = Chunks(model, reading.state), reading.logits, jnp.copy(reading.seen)  # decoding donates
    done = np.zeros(len(parts), np.int64)
    total = np.asarray([len(part) for part in parts])
    while (left := total - done).any():
        within = np.where(left > 0, (reading.num_tokens + done) % align, 0)
        whole = bool(left.min() >= chunk and not within.any())
        if whole:
            size, lengths = chunk, np.full(len(parts), chunk)
        elif within.any():  # first up to the next boundary, after which chunks cost less
            lengths = np.minimum(left, -within % align)
            size = _size(int(lengths.max()), chunk)
        else:
            size = _size(int(left.max()), chunk)
            lengths = np.minimum(left, size)
            whole = bool(lengths.min() == size and size % align == 0)
        padded = np.zeros((len(parts), size), np.int32)
        for row, (part, at, length) in enumerate(zip(parts, done, lengths, strict=True)):
            padded[row, :length] = part[at : at + length]
        of_rows = None if whole else lengths.astype(np.int32)
        h = chunks(padded, lengths=of_rows, on_boundary=whole)
        logits, seen = _after_chunk(graph, params, h, logits, seen, padded, of_rows)
        done += lengths
        on_tokens(int(lengths.sum()))
    return Reading(chunks.state, logits, seen, reading.num_tokens + total)


def with_room_for(model: LanguageModel, tokens: int) -> LanguageModel:
    """The model with attention caches for so many tokens; the same model if its state has a fixed size."""
    if model.config.cache_length is None:
        return model
    config = model.config.with_cache_length(tokens)
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, nnx.state(model))


def check_room(model: LanguageModel, num_tokens: Int[np.ndarray, "B"]) -> None:
    """Refuses sequences that are longer than an attention cache.

    Raises:
        InputError: A sequence is longer.
    """
    room, most = model.config.cache_length, int(max(num_tokens, default=0))
    if room is not None and most > room:
        raise InputError(
            f"a sequence of {most:,} tokens does not fit the attention cache, which has room for {room:,}: raise "
            "max_length, or give less"
        )


def check_tokens(model: LanguageModel, parts: Sequence[Int[np.ndarray, "T"]]) -> None:
    """Refuses tokens that are not in the vocabulary of the model.

    Raises:
        InputError: There is such a token.
    """
    size = model.config.vocab_size
    for part in parts:
        if len(part) and not (part.min() >= 0 and part.max() < size):
            wrong = int(part.max()) if part.max() >= size else int(part.min())
            raise InputError(
                f"token {wrong} is not in the model's vocabulary of {size:,}: is the tokenizer that of another model?"
            )


def _size(tokens: int, chunk: int) -> int:
    """The smallest power of two, of at least `SMALLEST`, for so many tokens; at most `chunk`."""
    return min(chunk, max(SMALLEST, 1 << (tokens - 1).bit_length()))


@jax.jit
def _take(parts: tuple[State, Array, Array], at: Int[Array, "N"]) -> tuple[State, Array, Array]:
    state, logits, seen = parts
    return jax.tree.map(lambda a: a[:, at], state), logits[at], seen[at]


@partial(jax.jit, static_argnums=(0, 2))
def _begin(graph: Any, params: Any, batch: int) -> tuple[State, Array, Array]:
    model = nnx.merge(graph, params)
    shape = (batch, model.config.vocab_size)
    dtype = jnp.promote_types(model.norm.dtype, jnp.float32)
    return model.init_state(batch), jnp.zeros(shape, dtype), jnp.zeros(shape, bool)


@partial(jax.jit, static_argnums=(0,))
def _after_chunk(
    graph: Any,
    params: Any,
    h: Float[Array, "B T D"],
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B V"], Bool[Array, "B V"]]:
    """The next logits, and the tokens seen; without `lengths` it is complete for every sequence."""
    model: LanguageModel = nnx.merge(graph, params)
    rows, time = jnp.arange(tokens.shape[0])[:, None], tokens.shape[1]
    if lengths is None:
        return model.head(h[:, -1]), seen.at[rows, tokens].set(True)
    last = jnp.take_along_axis(h, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = jnp.where(lengths[:, None] > 0, model.head(last), logits)
    taken = jnp.where(jnp.arange(time) < lengths[:, None], tokens, model.config.vocab_size)
    return logits, seen.at[rows, taken].set(True, mode="drop")
