"""Next-token cross-entropy that never holds the logits of a whole batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """-log p(target) in nats, computed in float32 at least."""
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
    """The sum of weighted token losses, in nats; differentiable once, in `hidden` and in what `head` closes over.

    Args:
        head: from features to logits.
        hidden: the features of the last norm.
        targets: the token that each position should predict.
        weights: 0 where the target does not count; None counts every one.
        chunk: tokens of a row whose logits exist at a time, a divisor of T. Their gradient is taken on the spot,
            while the logits are at hand. 0 takes the row whole.
    """
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    length = targets.shape[1]
    if chunk in (0, length):
        return jnp.sum(weights * token_losses(head(hidden), targets))
    if length % chunk:
        raise ValueError(f"the loss is taken in chunks of {chunk} tokens, which do not divide a row of {length}")
    function, table = jax.closure_convert(head, hidden[:, :chunk])
    pieces = tuple(jnp.stack(jnp.split(x, length // chunk, axis=1)) for x in (hidden, targets, weights))
    return _chunked(function, table, *pieces)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    head: Callable[..., Array],
    table: list[Array],
    hidden: Float[Array, "N B C D"],
    targets: Int[Array, "N B C"],
    weights: Float[Array, "N B C"],
) -> Float[Array, ""]:
    def add(total: Array, piece: tuple[Array, ...]) -> tuple[Array, None]:
        return total + _chunk_loss(head, table, *piece), None

    return jax.lax.scan(add, _zero(hidden), (hidden, targets, weights))[0]


def _chunk_loss(head: Callable[..., Array], table: list[Array], hidden: Array, targets: Array, weights: Array) -> Array:
    return jnp.sum(weights * token_losses(head(hidden, *table), targets))


def _zero(hidden: Array) -> Array:
    return jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))


def _forward(head: Callable[..., Array], table: list[Array], hidden: Array, targets: Array, weights: Array) -> Any:
    """The loss and, as the loss is a sum, its gradient for a cotangent of 1."""

    def add(totals: Any, piece: tuple[Array, ...]) -> tuple[Any, Array]:
        loss, (for_table, for_hidden) = jax.value_and_grad(_chunk_loss, argnums=(1, 2))(head, table, *piece)
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, (loss, for_table)), for_hidden

    zeros = [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in table]
    (loss, for_table), for_hidden = jax.lax.scan(add, (_zero(hidden), zeros), (hidden, targets, weights))
    for_table = [total.astype(x.dtype) for total, x in zip(for_table, table, strict=True)]
    return loss, (for_table, for_hidden)


def _backward(head: Callable[..., Array], gradients: Any, cotangent: Array) -> Any:
    for_table, for_hidden = jax.tree.map(lambda x: (cotangent * x).astype(x.dtype), gradients)
    return for_table, for_hidden, None, None


_chunked.defvjp(_forward, _backward)
