"""How the next token is drawn from logits; every setting is a value, so that none makes a program compile again."""

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
    """How tokens are drawn. The penalty comes first, then temperature, `top_k`, `top_p` and `min_p`."""

    temperature: NonNegativeFloat = 1.0
    """What logits are divided by; 0 takes the likeliest token."""
    top_k: CountOrZero = 0
    """Draw among the `top_k` likeliest tokens; 0 among all."""
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    """Draw among the fewest likeliest tokens whose probabilities add up to `top_p` (arXiv 1904.09751)."""
    min_p: Annotated[float, Range(least=0, most=1)] = 0.0
    """Draw among tokens with at least `min_p` times the probability of the likeliest one (arXiv 2407.01082)."""
    repetition_penalty: PositiveFloat = 1.0
    """Logits of tokens that were read or drawn before are divided by this where they are positive, and multiplied
    where they are negative (arXiv 1909.05858); 1 changes nothing."""
    seed: Seed = 0
    """Seed of the draws: the same seed gives a prompt the same text, alone and in a batch."""

    def __post_init__(self) -> None:
        check_fields(self, "sampling.")

    def values(self, vocab_size: int) -> dict[str, Any]:
        """What `draw` reads; no token from `vocab_size` on is drawn."""
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
    """Draws a token for each sequence.

    Args:
        logits: Logits of the model.
        seen: Tokens that the repetition penalty holds for.
        keys: A random key for each sequence.
        values: What `Sampling.values` gives.

    Returns:
        the tokens, and log p of each under the model itself, in nats: without temperature, penalty or filters.
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
    """`logits`, minus infinity at tokens that are not to be drawn."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    ranked = jnp.where(jnp.arange(logits.shape[1]) < values["top_k"], ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    likelier = jnp.cumsum(p, axis=-1) - p  # the probability of all that come before
    kept = (likelier < values["top_p"]) & (p >= values["min_p"] * p[:, :1])
    rows = jnp.arange(len(logits))[:, None]
    return jnp.full_like(logits, -jnp.inf).at[rows, order].set(jnp.where(kept, ranked, -jnp.inf))
