"""The language model: embedding, stacked blocks, a norm and a head, under the contract of the layers inside."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tttlm.model.block import Block, BlockState
from tttlm.model.config import ModelConfig
from tttlm.model.precision import check_precision
from tttlm.ops.documents import documents, num_positions
from tttlm.ops.ttt import InnerStatistics
from tttlm.parts.norm import RMSNorm
from tttlm.parts.padding import padding
from tttlm.parts.partition import lookup, with_sharding

State = tuple[BlockState, ...]

# What the backward pass may keep of a block instead of computing it again.
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
    """A causal language model of any mixers, with one contract for all of them.

    >>> model = LanguageModel(ModelConfig(hidden_size=64, num_heads=4), rngs=nnx.Rngs(0))
    >>> logits = model(tokens)                                         # [B, T] -> [B, T, V]
    >>> logits, state = model.extend(tokens, model.init_state(batch))  # the same, and go on from there

    Repeats of the pattern of mixers are stacked: their parameters, and the leaves of a state, have a leading axis
    `[repeats, ...]` and are run through by one `jax.lax.scan`. Logits are float32 at least.

    Args:
        config: see `ModelConfig`.
        rngs: for the parameters.

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
        """Logits of the next token at every place.

        Args:
            tokens: ids in `[0, V)`.
            segment_ids: documents of a sequence, 0 for padding that takes a position; nothing of one document reaches
                another.
            lengths: how many tokens each sequence has; what is behind them is neither read nor written and takes no
                position, so that every sequence gives what it gives alone.
            mask: the same for padding anywhere, True at tokens.
            inner_learning_rate_multiplier: warms up the inner learning rate of mixers with an inner model.
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
        """What the head reads: the stream after the last norm."""
        return self._run(tokens, None, segment_ids, lengths, mask, inner_learning_rate_multiplier)[0]

    def head(self, features: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits of features."""
        dtype = jnp.promote_types(features.dtype, jnp.float32)
        return jnp.einsum("...d,vd->...v", features, self.table.astype(features.dtype), preferred_element_type=dtype)

    @property
    def table(self) -> Float[Array, "V D"]:
        """What the head takes the inner product of features with, one row for every token of the vocabulary."""
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
        """Logits of tokens that go on from `state`, and the next state; arguments as for a call.

        `on_boundary` is a promise that every sequence has had a multiple of `config.alignment` tokens, and saves mixers
        with mini-batches what it costs to start within one.

        Raises:
            InputError: an attention cache has no room for them. Where this is compiled and offsets are not known, the
                logits of tokens past its room are NaN instead.
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
        on_boundary: bool = False,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, "B T D"], State]:
        """What the head reads of tokens that go on from `state`, and the next state; arguments as for `extend`.

        The backward pass computes again what `config.remat` says.
        """
        multiplier = inner_learning_rate_multiplier
        return self._run(tokens, state, segment_ids, lengths, None, multiplier, remat=True, on_boundary=on_boundary)

    def check_room(self, state: State, tokens: int | Int[Array, "B"]) -> None:
        """Refuses more tokens than a state has room for.

        Raises:
            InputError: there is no room, and the tokens in the state are known, which they are not while compiling.
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
        """What the inner models do while `tokens` are read: for every mixer of the pattern, leaves `[repeats, ...]`.

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
        """The stream before the first block."""
        return lookup(self.embed.embedding[...], tokens, self.norm.dtype)

    def init_state(self, batch: int) -> State:
        """The state before the first token of `batch` rows; leaves are `[repeats, batch, ...]`."""
        return nnx.vmap(lambda pattern: pattern.init_state(batch), in_axes=0, out_axes=0)(self.stack)

    def _run(self, tokens, state, segment_ids, lengths, mask, multiplier, *, remat=False, on_boundary=False):
        given = padding(tokens.shape, lengths, mask)
        carried = None if state is None else state[0].mixer.document[0]  # that of all blocks
        if given is None:
            docs = documents(segment_ids, carried)
        else:
            tokens, docs = given.to_front(tokens), given.documents(segment_ids, carried)
        # Every device knows where documents start in its sequences.
        docs = jax.tree.map(lambda a: with_sharding(a, "B"), docs)
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


def parameter_count(config: ModelConfig, *, embeddings: bool = True) -> int:
    """How many parameters the model has, with or without those of embedding and head."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    matrices = 1 if config.tie_embeddings else 2
    return count if embeddings else count - matrices * config.vocab_size * config.hidden_size
