"""Next-token cross-entropy that never holds the logits of a whole batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """-log p(target) in nats, computed in float32."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def summed_loss(
    head: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"] | None = None,
    chunk: int = 0,
) -> Float[Array, ""]:
    """The sum of weighted token losses, in nats.

    Args:
        head: from features to logits.
        hidden: the features of the last norm.
        targets: the token that each position should predict.
        weights: 0 where the target does not count; None counts every one.
        chunk: tokens of a row whose logits exist at a time, a divisor of T. Their logits are computed again for the
            gradient instead of kept. 0 takes the row whole.
    """

    def part(hidden: Float[Array, "B C D"], targets: Int[Array, "B C"], weights: Float[Array, "B C"]) -> Array:
        return jnp.sum(weights * token_losses(head(hidden), targets))

    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    length = targets.shape[1]
    if chunk in (0, length):
        return part(hidden, targets, weights)
    if length % chunk:
        raise ValueError(f"the loss is taken in chunks of {chunk} tokens, which do not divide a row of {length}")
    pieces = [jnp.stack(jnp.split(x, length // chunk, axis=1)) for x in (hidden, targets, weights)]

    def add(total: Array, piece: tuple[Array, ...]) -> tuple[Array, None]:
        return total + jax.checkpoint(part)(*piece), None

    start = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    total, _ = jax.lax.scan(add, start, tuple(pieces))
    return total
