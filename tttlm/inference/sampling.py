"""Sampling of the next token from logits; every setting is an array, so that changing it does not recompile."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tttlm.fields import check_fields
from tttlm.ranges import CountOrZero, NonNegativeFloat, PositiveFloat, Range, Seed


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. The penalty is applied first, then temperature, `top_k`, `top_p` and `min_p`."""

    temperature: NonNegativeFloat = 1.0
    """Divisor of the logits; 0 takes the most likely token."""
    top_k: CountOrZero = 0
    """Number of most likely tokens to sample from; 0 takes all."""
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    """Sample from the fewest most likely tokens with total probability `top_p` (arXiv 1904.09751)."""
    min_p: Annotated[float, Range(least=0, most=1)] = 0.0
    """Sample from tokens with at least `min_p` times the probability of the most likely one (arXiv 2407.01082)."""
    repetition_penalty: PositiveFloat = 1.0
    """Logits of tokens that were read or sampled before are divided by this if they are positive, and multiplied by it
    if they are negative (arXiv 1909.05858); 1 changes nothing."""
    seed: Seed = 0
    """Seed of the sampling: with the same seed a prompt gives the same text, alone and in a batch."""

    def __post_init__(self) -> None:
        check_fields(self)

    def values(self, vocab_size: int) -> dict[str, Any]:
        """The arrays that `draw` reads; tokens from `vocab_size` on are not sampled."""
        filtered = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(self.top_k or vocab_size),
            "top_p": np.float32(self.top_p),
            "min_p": np.float32(self.min_p),
            "penalty": np.float32(self.repetition_penalty),
            "filtered": np.bool_(filtered),
            "vocab_size": np.int32(vocab_size),
        }


def draw(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], keys: Any, values: dict[str, Any]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Samples a token for each sequence.

    Args:
        logits: Logits of the model.
        seen: Mask of the tokens to which the repetition penalty applies.
        keys: A random key for each sequence.
        values: The result of `Sampling.values`.

    Returns:
        The tokens, and log p of each under the model itself, in nats: without temperature, penalty or filters.
    """
    penalty = values["penalty"]
    penalised = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    known = jnp.arange(logits.shape[1]) < values["vocab_size"]
    limited = jnp.where(known, penalised, -jnp.inf)

    def sampled() -> Array:
        scaled = limited / values["temperature"]
        kept = jax.lax.cond(values["filtered"], lambda: _filtered(scaled, values), lambda: scaled)
        return jax.vmap(jax.random.categorical)(keys, kept)

    tokens = jax.lax.cond(values["temperature"] > 0, sampled, lambda: jnp.argmax(limited, axis=-1))
    tokens = tokens.astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _filtered(logits: Float[Array, "B V"], values: dict[str, Any]) -> Float[Array, "B V"]:
    """`logits`, with minus infinity at tokens that are filtered out."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    ranked = jnp.where(jnp.arange(logits.shape[1]) < values["top_k"], ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    likelier = jnp.cumsum(p, axis=-1) - p  # the total probability of more likely tokens
    kept = (likelier < values["top_p"]) & (p >= values["min_p"] * p[:, :1])
    rows = jnp.arange(len(logits))[:, None]
    return jnp.full_like(logits, -jnp.inf).at[rows, order].set(jnp.where(kept, ranked, -jnp.inf))
