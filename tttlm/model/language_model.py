"""The language model: embedding, stacked blocks, a norm and a head, with the interface of the layers inside."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tttlm.model.block import Block, BlockState
from tttlm.model.config import ModelConfig
from tttlm.model.precision import check_precision
from tttlm.ops.documents import Documents, documents, num_positions
from tttlm.ops.ttt import InnerStatistics
from tttlm.parts.norm import RMSNorm
from tttlm.parts.padding import Padding, padding
from tttlm.parts.partition import lookup, with_sharding

State = tuple[BlockState, ...]

# What the backward pass may store of a block instead of recomputing it.
REMAT_POLICIES: dict[str, Any] = {
    "block": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Pattern(nnx.Module):
    """One repeat of the pattern of mixers: a block for each."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List(Block(config, mixer, rngs=rngs) for mixer in config.pattern)

    def __call__(self, h, states, segment_ids, multiplier, on_boundary=False):
        after = []
        for i, block in enumerate(self.blocks):
            h, state = block(h, None if states is None else states[i], segment_ids, multiplier, on_boundary)
            after.append(state)
        return h, None if states is None else tuple(after)

    def init_state(self, batch: int) -> State:
        return tuple(block.init_state(batch) for block in self.blocks)


class LanguageModel(nnx.Module):
    """A causal language model of any mixers, with the same interface for all of them.

    >>> model = LanguageModel(ModelConfig(hidden_size=64, num_heads=4), rngs=nnx.Rngs(0))
    >>> logits = model(tokens)                                         # [B, T] -> [B, T, V]
    >>> logits, state = model.extend(tokens, model.init_state(batch))  # the same logits, and the state after them

    Repeats of the pattern of mixers are stacked: their parameters, and the leaves of a state, have a leading axis
    `[repeats, ...]`, over which one `jax.lax.scan` runs. Logits are float32 at least.

    Args:
        config: see `ModelConfig`.
        rngs: random number generators of the parameters.

    Attributes:
        origin: What a model that was read from a released folder came with, see `tttlm.interop`; None for others.
    """

    origin: Any = None

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        check_precision(config)
        dtypes: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}
        init = nnx.initializers.normal(config.initializer_range)

        def table() -> nnx.Embed:
            return nnx.Embed(config.vocab_size, config.hidden_size, embedding_init=init, rngs=rngs, **dtypes)

        self.config = config
        self.embed = table()
        self.lm_head = None if config.tie_embeddings else table()
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, rngs=rngs, **dtypes)

        @nnx.split_rngs(splits=config.repeats)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Pattern:
            return Pattern(config, rngs=rngs)

        self.stack = stacked(rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        lengths: Int[Array, "B"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position.

        Args:
            tokens: ids in `[0, V)`.
            segment_ids: ids of the documents in a sequence, 0 for padding that counts as a position; nothing of one
                document reaches another.
            lengths: number of tokens of each sequence; padding after them is neither read nor written and does not
                count as a position, so that every sequence has the outputs that it has alone.
            mask: the same for padding anywhere, True at tokens.
            inner_learning_rate_multiplier: multiplier of the inner learning rate of mixers with an inner model, for its
                warm-up.
        """
        multiplier = inner_learning_rate_multiplier
        return self.head(self._run(tokens, None, segment_ids, lengths, mask, multiplier)[0])

    def features(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        lengths: Int[Array, "B"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> Float[Array, "B T D"]:
        """The inputs of the head: the hidden states after the last norm; arguments as for a call."""
        return self._run(tokens, None, segment_ids, lengths, mask, inner_learning_rate_multiplier)[0]

    def head(self, features: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits of the results of `features`, in float32 at least."""
        dtype = jnp.promote_types(features.dtype, jnp.float32)
        return jnp.einsum(
            "...d,vd->...v", features, self.output_embedding.astype(features.dtype), preferred_element_type=dtype
        )

    @property
    def output_embedding(self) -> Float[Array, "V D"]:
        """The embedding of the head, one vector for every token of the vocabulary; that of the inputs if it is tied."""
        return (self.embed if self.lm_head is None else self.lm_head).embedding[...]

    def extend(
        self,
        tokens: Int[Array, "B T"],
        state: State,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        lengths: Int[Array, "B"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        on_boundary: bool = False,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, "B T V"], State]:
        """Logits of tokens that continue from `state`, and the next state; arguments as for a call.

        `on_boundary` asserts that every sequence has had a multiple of `config.alignment` tokens, which saves mixers
        with mini-batches the cost of starting within one.

        Raises:
            InputError: the tokens do not fit in an attention cache. Within `jax.jit`, where offsets are unknown, the
                logits of tokens beyond the cache are NaN instead.
        """
        multiplier = inner_learning_rate_multiplier
        h, state = self._run(tokens, state, segment_ids, lengths, mask, multiplier, on_boundary=on_boundary)
        return self.head(h), state

    def extend_features(
        self,
        tokens: Int[Array, "B T"],
        state: State,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        lengths: Int[Array, "B"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        on_boundary: bool = False,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, "B T D"], State]:
        """The inputs of the head for tokens that continue from `state`, and the next state; arguments as for `extend`.

        The backward pass recomputes activations as configured by `config.remat`.
        """
        multiplier = inner_learning_rate_multiplier
        return self._run(tokens, state, segment_ids, lengths, mask, multiplier, remat=True, on_boundary=on_boundary)

    def check_room(self, state: State, tokens: int | Int[Array, "B"]) -> None:
        """Refuses more tokens than fit in the cache of a state.

        Raises:
            InputError: they do not fit. Within `jax.jit`, where the tokens in the state are unknown, nothing is raised.
        """
        for mixer, block in zip(self.config.pattern, state, strict=True):
            mixer.check_room(block.mixer, tokens)

    def inner_statistics(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> tuple[InnerStatistics | None, ...]:
        """Statistics of the inner models while `tokens` are read: for every mixer of the pattern, leaves `[repeats,
        ...]`.

        None for a mixer without an inner model. Arguments as for a call; see `tttlm.ops.ttt.InnerStatistics`.
        """
        graph, parameters = nnx.split(self.stack)
        multiplier = inner_learning_rate_multiplier

        def step(h, parameters):
            found = []
            for block in nnx.merge(graph, parameters).blocks:
                found.append(block.inner_statistics(h, segment_ids, multiplier))
                h, _ = block(h, None, segment_ids, multiplier)
            return h, tuple(found)

        return jax.lax.scan(step, self.embedded(tokens), parameters)[1]

    def embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The embeddings of the tokens, which are the inputs of the first block."""
        return lookup(self.embed.embedding[...], tokens, self.norm.dtype)

    def init_state(self, batch: int) -> State:
        """The state before the first token of `batch` sequences; leaves are `[repeats, batch, ...]`."""
        return nnx.vmap(lambda pattern: pattern.init_state(batch), in_axes=0, out_axes=0)(self.stack)

    def _run(self, tokens, state, segment_ids, lengths, mask, multiplier, *, remat=False, on_boundary=False):
        carried = None if state is None else state[0].mixer.document[0]  # equal in all blocks
        given, tokens, docs = placed(tokens, carried, segment_ids, lengths, mask)
        if state is not None:
            self.check_room(state, num_positions(docs, tokens.shape[1]))
        graph, parameters = nnx.split(self.stack)

        def step(h, xs):
            parameters, state = xs
            return nnx.merge(graph, parameters)(h, state, docs, multiplier, on_boundary)

        if self.config.remat != "none" and (state is None or remat):
            step = jax.checkpoint(step, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        h, state = jax.lax.scan(step, self.embedded(tokens), (parameters, state))
        h = self.norm(h)
        return h if given is None else given.back(h), state


def placed(
    tokens: Int[Array, "B T"],
    carried: Int[Array, "B"] | None,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
) -> tuple[Padding | None, Int[Array, "B T"], Documents | None]:
    """The padding if there is any, the tokens in front of it, and their documents, which are the same for all blocks.

    `carried` is the document in progress in the state; the other arguments are those of the model.
    """
    given = padding(tokens.shape, lengths, mask)
    if given is None:
        docs = documents(segment_ids, carried)
    else:
        tokens, docs = given.to_front(tokens), given.documents(segment_ids, carried)
    # Every device has the starts of documents of its own sequences.
    return given, tokens, jax.tree.map(lambda a: with_sharding(a, "B"), docs)


def parameter_count(config: ModelConfig, *, embeddings: bool = True) -> int:
    """The number of parameters of the model, with or without those of embedding and head."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    matrices = 1 if config.tie_embeddings else 2
    return count if embeddings else count - matrices * config.vocab_size * config.hidden_size
