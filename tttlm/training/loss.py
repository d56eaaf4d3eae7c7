"""Next-token cross-entropy that never holds the logits of a whole batch; on a mesh each device computes its shard."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tttlm.parts.partition import EmbeddingSharding, all_reduce, each_device, embedding_sharding, num_shards


def token_losses(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """-log p(target) in nats, computed in float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def summed_loss(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"] | None = None,
    chunk: int = 0,
) -> Float[Array, ""]:
    """The sum of weighted token losses, in nats; differentiable once, in `hidden` and `embedding`.

    Logits are `hidden @ embeddingᵀ` of operands in the dtype of `hidden`, accumulated in float32 at least.

    Args:
        hidden: the output of the last norm.
        embedding: the head's embedding, one vector for every token of the vocabulary.
        targets: the token that each position has to predict.
        weights: weight of each target, 0 where it does not count; None counts all.
        chunk: tokens of a sequence whose logits a device holds at a time, a divisor of its shard of T, or more than
            that. Their gradient is computed in the same pass, while the logits are held. 0 takes it in one chunk.

    Raises:
        ValueError: the chunks do not divide a device's shard of a sequence.
    """
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    length = targets.shape[1] // num_shards("T")
    chunk = min(chunk or length, length)
    if length % chunk:
        raise ValueError(f"the loss is taken in chunks of {chunk} tokens, which do not divide a sequence of {length}")
    return _loss(chunk, hidden, embedding, targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(chunk: int, hidden: Array, embedding: Array, targets: Array, weights: Array) -> Float[Array, ""]:
    stored = embedding_sharding(embedding)

    def shard(hidden: Array, embedding: Array, *labels: Array) -> Array:
        embedding = stored.gather(embedding)

        def add(loss: Array, piece: tuple[Array, ...]) -> tuple[Array, None]:
            return loss + _piece_loss(embedding, stored, *piece)[0], None

        pieces = tuple(_split(x, chunk) for x in (hidden, *labels))
        return all_reduce(jax.lax.scan(add, _zero(hidden), pieces)[0], stored.tokens)

    return each_device(shard, ("BT", stored.dims, "BT", "BT"), "")(
        hidden, embedding.astype(hidden.dtype), targets, weights
    )


def _forward(chunk: int, hidden: Array, embedding: Array, targets: Array, weights: Array) -> Any:
    """The loss and, as the loss is a sum, its gradient for a cotangent of 1."""
    stored, dtype = embedding_sharding(embedding), _zero(hidden).dtype

    def shard(hidden: Array, embedding: Array, *labels: Array) -> tuple[Array, Array, Array]:
        embedding = stored.gather(embedding)

        def add(sums: tuple[Array, Array], piece: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            loss, d_logits = _piece_loss(embedding, stored, *piece)
            d_logits = d_logits.astype(hidden.dtype)
            # In this order XLA on CPU transposes the features, not the logits, which are larger.
            d_embedding = jnp.einsum("bcd,bcv->dv", piece[0], d_logits, preferred_element_type=dtype)
            d_hidden = jnp.einsum("bcv,vd->bcd", d_logits, embedding, preferred_element_type=dtype)
            return (sums[0] + loss, sums[1] + d_embedding), all_reduce(d_hidden, stored.vocabulary).astype(hidden.dtype)

        pieces = tuple(_split(x, chunk) for x in (hidden, *labels))
        zeros = (_zero(hidden), jnp.zeros(embedding.shape[::-1], dtype))
        (loss, d_embedding), d_hidden = jax.lax.scan(add, zeros, pieces)
        d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
        # Reduced over devices once, at the end.
        return all_reduce(loss, stored.tokens), d_hidden, stored.reduce_scatter(d_embedding.T)

    loss, d_hidden, d_embedding = each_device(shard, ("BT", stored.dims, "BT", "BT"), ("", "BT", stored.dims))(
        hidden, embedding.astype(hidden.dtype), targets, weights
    )
    return loss, (d_hidden, d_embedding.astype(embedding.dtype))


def _backward(chunk: int, gradients: tuple[Array, Array], cotangent: Array) -> Any:
    d_hidden, d_embedding = jax.tree.map(lambda x: (cotangent * x).astype(x.dtype), gradients)
    return d_hidden, d_embedding, None, None


_loss.defvjp(_forward, _backward)


def _piece_loss(
    embedding: Float[Array, "v D"],
    stored: EmbeddingSharding,
    hidden: Float[Array, "B C D"],
    targets: Int[Array, "B C"],
    weights: Float[Array, "B C"],
) -> tuple[Float[Array, ""], Float[Array, "B C v"]]:
    """The loss of a piece and its gradient with respect to the logits of this device's part of the vocabulary."""
    logits = jnp.einsum("bcd,vd->bcv", hidden, embedding, preferred_element_type=_zero(hidden).dtype)
    hit = targets[..., None] - stored.first_token(embedding) == jnp.arange(embedding.shape[0])
    top = all_reduce(jnp.max(logits, axis=-1, keepdims=True), stored.vocabulary, jax.lax.pmax)
    exponentials = jnp.exp(logits - top)
    partition = all_reduce(jnp.sum(exponentials, axis=-1, keepdims=True), stored.vocabulary)
    chosen = all_reduce(jnp.sum(jnp.where(hit, logits, 0), axis=-1), stored.vocabulary)
    losses = (top + jnp.log(partition))[..., 0] - chosen
    return jnp.sum(weights * losses), weights[..., None] * (exponentials / partition - hit)


def _split(x: Array, chunk: int) -> Array:
    """`[B, T, ...]` to `[N, B, C, ...]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _zero(hidden: Array) -> Array:
    return jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
