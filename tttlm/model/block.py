"""One block: a sequence layer and a feed-forward layer, each behind a norm and added to the stream."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tttlm.layers.conv import CausalConv
from tttlm.layers.feed_forward import SwiGLU
from tttlm.layers.norm import RMSNorm
from tttlm.layers.partition import place
from tttlm.model.config import TTT_MIXERS, ModelConfig
from tttlm.model.mixers import build_mixer
from tttlm.ops.documents import document_in_progress, documents
from tttlm.ops.ttt import InnerStatistics


class ConvState(NamedTuple):
    """Of the convolution before a block: its last inputs, and the id of the document they are of."""

    tail: Float[Array, "B P D"]
    document: Int[Array, "B"]


class BlockState(NamedTuple):
    """What a block carries from token to token; `conv` is None without a convolution before it."""

    conv: ConvState | None
    mixer: Any


class Block(nnx.Module):
    """`h += conv(norm(h))` in the Mamba backbone, `h += mixer(norm(h))`, `h += feed_forward(norm(h))`."""

    def __init__(self, config: ModelConfig, mixer: str, *, rngs: nnx.Rngs):
        dtypes: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.norm_eps, rngs=rngs, **dtypes)

        self.conv_norm = norm() if config.conv_before(mixer) else None
        self.conv = CausalConv(config.hidden_size, config.conv_kernel, rngs=rngs, **dtypes) if self.conv_norm else None
        self.mixer_norm = norm()
        self.mixer: Any = build_mixer(config, mixer, rngs=rngs)
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
        self.is_ttt = mixer in TTT_MIXERS

    def __call__(
        self,
        h: Float[Array, "B T D"],
        state: BlockState | None,
        segment_ids: Int[Array, "B T"] | None,
        inner_learning_rate_multiplier: float | Float[Array, ""],
    ) -> tuple[Float[Array, "B T D"], BlockState | None]:
        """From `state`, or without one from the first token; returns the stream and the next state."""
        options = {"inner_learning_rate_multiplier": inner_learning_rate_multiplier} if self.is_ttt else {}
        h, x, conv_state = self._mixer_input(h, None if state is None else state.conv, segment_ids)
        if state is None:
            h, after = place(h + self.mixer(x, segment_ids, **options), "BT"), None
        else:
            y, mixer_state = self.mixer.extend(x, state.mixer, segment_ids, **options)
            h, after = h + y, BlockState(conv_state, mixer_state)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            h = place(h + self.feed_forward(self.feed_forward_norm(h)), "BT")
        return h, after

    def inner_statistics(
        self,
        h: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None,
        inner_learning_rate_multiplier: float | Float[Array, ""],
    ) -> InnerStatistics | None:
        """Of the TTT layer inside, when the block reads `h`; None where there is another mixer."""
        if not self.is_ttt:
            return None
        _, x, _ = self._mixer_input(h, None, segment_ids)
        return self.mixer.inner_statistics(
            x, segment_ids, inner_learning_rate_multiplier=inner_learning_rate_multiplier
        )

    def _mixer_input(self, h, before, segment_ids):
        """The stream after the convolution before the block, what the mixer reads, and the convolution's next state."""
        state = None
        if self.conv is not None and self.conv_norm is not None:
            carried = jnp.zeros(h.shape[:1], jnp.int32) if before is None else before.document
            docs = None if segment_ids is None else documents(segment_ids, carried)
            x = self.conv_norm(h)
            if before is None:
                h = h + self.conv.along_stream(x, docs)
            else:
                y, tail = self.conv(x, before.tail, docs)
                h, state = h + y, ConvState(tail, document_in_progress(carried, docs))
            h = place(h, "BT")
        return h, self.mixer_norm(h), state

    def init_state(self, batch: int) -> BlockState:
        """The state before the first token."""
        conv = None
        if self.conv is not None:
            tail = self.conv.init_tail(batch, self.conv.dtype or self.conv.kernel.dtype)
            conv = ConvState(tail, jnp.zeros((batch,), jnp.int32))
        return BlockState(conv, self.mixer.init_state(batch))
