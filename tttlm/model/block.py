"""One block: a sequence layer and a feed-forward layer, each after a norm and added to the residual stream."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tttlm.mixers import Mixer
from tttlm.model.config import ModelConfig
from tttlm.ops.documents import SegmentIds, documents
from tttlm.ops.ttt import InnerStatistics
from tttlm.parts.conv import CausalConv
from tttlm.parts.feed_forward import SwiGLU
from tttlm.parts.norm import RMSNorm
from tttlm.parts.partition import with_sharding


class BlockState(NamedTuple):
    """The state that a block carries from token to token.

    Attributes:
        tail: The last inputs of the convolution before the block, `[B, W-1, D]`; None without one.
        mixer: The state of the mixer, which has the id of the document in progress.
    """

    tail: Float[Array, "B P D"] | None
    mixer: Any


class Block(nnx.Module):
    """`h += conv(norm(h))` in the Mamba backbone, `h += mixer(norm(h))`, `h += feed_forward(norm(h))`."""

    def __init__(self, config: ModelConfig, mixer: Mixer, *, rngs: nnx.Rngs):
        dtypes: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.norm_eps, rngs=rngs, **dtypes)

        self.conv_norm = norm() if config.conv_before(mixer) else None
        self.conv = (
            CausalConv(config.hidden_size, config.conv_kernel, init=config.conv_init, rngs=rngs, **dtypes)
            if self.conv_norm
            else None
        )
        self.mixer_norm = norm()
        self.mixer: Any = mixer.build(rngs=rngs)
        self.feed_forward_norm = norm() if config.intermediate_size else None
        init = nnx.initializers.normal(config.initializer_range)
        self.feed_forward = (
            SwiGLU(
                config.hidden_size,
                config.intermediate_size,
                use_bias=config.feed_forward_bias,
                kernel_init=init,
                rngs=rngs,
                **dtypes,
            )
            if config.intermediate_size
            else None
        )
        self.has_inner_model = mixer.has_inner_model
        self.extends_on_boundary = mixer.extends_on_boundary

    def __call__(
        self,
        h: Float[Array, "B T D"],
        state: BlockState | None,
        segment_ids: SegmentIds,
        inner_learning_rate_multiplier: float | Float[Array, ""],
        on_boundary: bool = False,
    ) -> tuple[Float[Array, "B T D"], BlockState | None]:
        """Continues from `state`, or starts at the first token without one; returns the stream and the next state."""
        options: dict[str, Any] = {}
        if self.has_inner_model:
            options["inner_learning_rate_multiplier"] = inner_learning_rate_multiplier
        if self.extends_on_boundary and state is not None:
            options["on_boundary"] = on_boundary
        docs = documents(segment_ids, None if state is None else state.mixer.document)
        h, x, tail = self._mixer_input(h, None if state is None else state.tail, docs)
        if state is None:
            h, after = with_sharding(h + self.mixer(x, docs, **options), "BT"), None
        else:
            y, mixer_state = self.mixer.extend(x, state.mixer, docs, **options)
            h, after = h + y, BlockState(tail, mixer_state)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            h = with_sharding(h + self.feed_forward(self.feed_forward_norm(h)), "BT")
        return h, after

    def inner_statistics(
        self,
        h: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        inner_learning_rate_multiplier: float | Float[Array, ""],
    ) -> InnerStatistics | None:
        """Statistics of the inner model when the block reads `h`; None if the mixer has none."""
        if not self.has_inner_model:
            return None
        _, x, _ = self._mixer_input(h, None, documents(segment_ids))
        return self.mixer.inner_statistics(
            x, segment_ids, inner_learning_rate_multiplier=inner_learning_rate_multiplier
        )

    def _mixer_input(self, h, tail, docs):
        """The stream after the convolution before the block, the mixer's input, and the convolution's next tail."""
        if self.conv is not None and self.conv_norm is not None:
            x = self.conv_norm(h)
            if tail is None:
                h = h + self.conv.along_stream(x, docs=docs)
            else:
                y, tail = self.conv(x, tail, docs=docs)
                h = h + y
            h = with_sharding(h, "BT")
        return h, self.mixer_norm(h), tail

    def init_state(self, batch: int) -> BlockState:
        """The state before the first token."""
        tail = None
        if self.conv is not None:
            tail = self.conv.init_tail(batch, self.conv.dtype or self.conv.kernel.dtype)
        return BlockState(tail, self.mixer.init_state(batch))
