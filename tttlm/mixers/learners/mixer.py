"""The common base of layers of published learners, and of their mixers."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from tttlm.errors import InputError
from tttlm.mixers.learners.conventions import Conventions
from tttlm.mixers.learners.layer import TTT, default_kernel_init
from tttlm.mixers.registry import AxisRule, Mixer
from tttlm.ops.ttt import Learner, Shapes, check_choice
from tttlm.ops.ttt.cost import flops_per_token
from tttlm.parts.partition import CONV_KERNEL, FEATURES, FROM_FEATURES, TO_FEATURES
from tttlm.parts.sequence_layer import Precision
from tttlm.ranges import Count, Size, SizeOrZero


@dataclass(frozen=True)
class ImplementationConfig:
    """How a learner is computed, which changes no result."""

    remat_chunks: Count = 1
    """The backward pass stores the state before every so many chunks and recomputes those between: a larger number
    saves memory and takes time."""
    implementation: str | None = None
    """Implementation of `tttlm.ops.ttt.learn`; None: the fastest exact one."""


@dataclass(frozen=True)
class LearnerConfig(ImplementationConfig):
    """The configuration fields common to layers of published learners with heads."""

    head_dim: Size | None = None
    """Size of a query and key; None: hidden_size / num_heads, times the factor of the layer's paper."""
    value_dim: Size | None = None
    """Size of a value; None: hidden_size / num_heads, times the factor of the layer's paper."""
    conv_kernel: SizeOrZero = 4
    """Number of taps of the convolutions of queries, keys and values; 0 for none."""


@dataclass(frozen=True)
class ChunkedConfig(LearnerConfig):
    """Configuration of layers whose learner makes steps, or takes gradients, once per chunk."""

    chunk_size: Count = 16
    """Number of tokens of a chunk."""


C = TypeVar("C", bound=ImplementationConfig)


class PublishedLayer(TTT):
    """A layer with the learner and the conventions of a paper, which a subclass defines in `recipe`.

    Args:
        hidden_size: size `D` of inputs and outputs.
        num_heads: number of heads `H`, each with a learner of its own.
        config: the layer's configuration, of its class `Config`; None for its defaults.
        norm_eps: epsilon of the norm of the outputs.
        aligned: asserts that every document starts when all clocks of the learner are at zero.
        dtype: dtype of projections, convolutions and norms; None promotes input and parameters. Learners compute in
            float32 at least.
        param_dtype: dtype of all parameters.
        precision: precision of the layer's matrix products, a name of `jax.default_matmul_precision`; None for that of
            the caller.
        kernel_init: initialiser of all projections.
        rngs: random number generators of the parameters.

    Raises:
        InputError: the heads do not divide the hidden size.
    """

    Config: ClassVar[type[ImplementationConfig]] = LearnerConfig
    """The class of the configuration."""
    heads: ClassVar[int | None] = None
    """Number of heads of the layer in every model; None for the model's."""
    expand: ClassVar[tuple[float, float]] = (1.0, 1.0)
    """Default sizes of a key and of a value, as multiples of hidden_size / num_heads."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        config: ImplementationConfig | None = None,
        *,
        norm_eps: float = 1e-6,
        aligned: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Precision = None,
        kernel_init: Initializer = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        config = self.Config() if config is None else config
        head_dim, value_dim = self.head_sizes(hidden_size, num_heads, config)
        learner, conventions = self.recipe(config, head_dim, value_dim)
        super().__init__(
            hidden_size,
            num_heads,
            learner=learner,
            conventions=conventions,
            head_dim=head_dim,
            value_dim=value_dim,
            norm_eps=norm_eps,
            aligned=aligned,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            remat_chunks=config.remat_chunks,
            implementation=config.implementation,
            rngs=rngs,
        )
        self._add_parameters(config)

    def _add_parameters(self, config: Any) -> None:
        """Creates the parameters that only this layer has."""

    @classmethod
    def head_sizes(cls, hidden_size: int, num_heads: int, config: Any) -> tuple[int, int]:
        """Sizes of a key and of a value."""
        given, sizes = (config.head_dim, config.value_dim), []
        for size, expand in zip(given, cls.expand, strict=True):
            if size is None:
                size = round(hidden_size * expand / num_heads)
                if not size or abs(size * num_heads - hidden_size * expand) > 1e-6:
                    raise InputError(
                        f"num_heads must divide {expand:g} times hidden_size, or head_dim and value_dim be given; "
                        f"got hidden_size {hidden_size} and num_heads {num_heads}"
                    )
            sizes.append(size)
        return sizes[0], sizes[1]

    @classmethod
    def recipe(cls, config: Any, head_dim: int, value_dim: int) -> tuple[Learner | tuple[Learner, ...], Conventions]:
        """The learner, and the other parts of the layer."""
        raise NotImplementedError


@dataclass(frozen=True)
class LearnerMixer(Mixer[C]):
    """A published learner in a language model: a subclass names its layer."""

    layer: ClassVar[type[PublishedLayer]]
    """The layer."""
    has_inner_model: ClassVar[bool] = True
    extends_on_boundary: ClassVar[bool] = True
    changes_no_result: ClassVar[tuple[str, ...]] = ("remat_chunks",)
    parameter_rules: ClassVar[tuple[AxisRule, ...]] = (
        (r"kernels/\d+$", ("tensor context", "fsdp", "")),  # H I O
        (r"(vectors|slow)/\d+$", ("tensor context", "fsdp")),  # H O, H K
        (r"(^|/)(bias|log_scale|skip)$", FEATURES),  # H N, H, H V
        (r"conv_[qkv]/kernel$", CONV_KERNEL),
        (r"o_proj/kernel$", FROM_FEATURES),
        (r"(down_proj|g_down)/kernel$", ("fsdp context", "")),  # D R
        (r"([qkvg]_proj|up_proj)/kernel$", TO_FEATURES),
    )

    def build(self, *, rngs: nnx.Rngs) -> PublishedLayer:
        return self.layer(
            self.model.hidden_size,
            self.num_heads,
            self.config,
            norm_eps=self.model.norm_eps,
            kernel_init=self.kernel_init,
            rngs=rngs,
            **self.dtypes,
        )

    @property
    def num_heads(self) -> int:
        """Number of heads of the layer."""
        return self.layer.heads or self.model.num_heads

    @property
    def sharded(self) -> tuple[str, int]:
        return "heads", self.num_heads

    @property
    def learners(self) -> tuple[Learner, ...]:
        """The learners of the layer."""
        learner, _ = self.layer.recipe(self.config, *self._sizes)
        return (learner,) if isinstance(learner, Learner) else learner

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.layer.head_sizes(self.model.hidden_size, self.num_heads, self.config)

    def check(self) -> None:
        shapes = Shapes(1, 2, self.num_heads, *self._sizes)
        try:
            for learner in self.learners:
                check_choice(learner, shapes, self.config.implementation)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from None

    def flops_per_token(self, sequence_length: int) -> float:
        sizes = _features(self), self._sizes[1]
        inner = sum(flops_per_token(one, *sizes, sequence_length, self.config.implementation) for one in self.learners)
        return _outer_flops(self) + self.num_heads * inner

    @property
    def alignment(self) -> int:
        return math.lcm(*(learner.clocks.period for learner in self.learners))

    @property
    def hidden_size_unit(self) -> int:
        return self.model.hidden_size // self.model.num_heads


@cache
def _layer(mixer: LearnerMixer) -> PublishedLayer:
    """The layer without values; alone, where a mixer builds it with attention."""
    return nnx.eval_shape(lambda: LearnerMixer.build(mixer, rngs=nnx.Rngs(0)))


def _features(mixer: LearnerMixer) -> int:
    """The size of a key as the learners get it."""
    return _layer(mixer).memories[0].key_dim


def _outer_flops(mixer: LearnerMixer) -> float:
    """The cost of a token without the learners: a multiply-add for every weight of a projection or convolution."""
    parameters = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(_layer(mixer), nnx.Param)))
    return sum(2.0 * a.size for path, a in parameters if jax.tree_util.keystr(path[-1:], simple=True) == "kernel")
