"""TNT (arXiv 2511.07343), from the text of the paper."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flax import nnx

from tttlm.mixers.learners.conventions import Conventions, OutputGate
from tttlm.mixers.learners.gates import SigmoidUpTo, TokenGate
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import ChunkedConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.registry import register
from tttlm.ops.ttt import Learner, published
from tttlm.ranges import Count, PositiveFloat, SizeOrZero


@dataclass(frozen=True)
class TNTConfig(ChunkedConfig):
    """Configuration of the mixer `tnt`; see `TNT`."""

    chunk_size: Count = 64
    """Number of tokens of a chunk of the global memory."""
    local_chunk_size: Count = 16
    """Number of tokens of a chunk of the local memory."""
    local_shard_size: Count = 64
    """Interval in tokens at which the local memory is reset; a multiple of `local_chunk_size`."""
    inner_size: SizeOrZero = 0
    """Hidden size of the memories; 0 for linear memories, which start from zero."""
    inner_learning_rate: PositiveFloat = 0.02
    """Largest rate of a token."""
    projection: Literal["anchor", "reset"] = "anchor"
    """Whether queries of the local memory are projected on the keys of its chunk or of its shard."""


class TNT(PublishedLayer):
    """TNT (arXiv 2511.07343): a global memory that makes one step a chunk, and a local one that is reset every shard.

    Their outputs are summed. Rates are `inner_learning_rate σ(x W + b)`, a projection for each memory.
    """

    Config: ClassVar[type[ChunkedConfig]] = TNTConfig
    expand: ClassVar[tuple[float, float]] = (0.5, 1.0)

    @classmethod
    def recipe(cls, config: TNTConfig, head_dim: int, value_dim: int) -> tuple[tuple[Learner, ...], Conventions]:
        deep = (config.inner_size,) if config.inner_size else ()
        conventions = Conventions(
            conv_kernel=config.conv_kernel,
            gates=Gates(TokenGate(SigmoidUpTo(config.inner_learning_rate), bias_init=nnx.initializers.zeros)),
            learned_start=bool(deep),
            output_gate=OutputGate(),
        )
        local = (config.local_chunk_size,), (config.local_shard_size,)
        return published.tnt(deep, config.chunk_size, *local, projection=config.projection), conventions


@register("tnt")
@dataclass(frozen=True)
class TNTMixer(LearnerMixer[TNTConfig]):
    """TNT."""

    Config: ClassVar[type] = TNTConfig
    layer: ClassVar[type[PublishedLayer]] = TNT
