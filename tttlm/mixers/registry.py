"""The interface of a mixer, and the registry of mixers by name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from tttlm.errors import InputError
from tttlm.records import shown

S = TypeVar("S")
AxisRule = tuple[str, tuple[str, ...]]


@runtime_checkable
class ModelShape(Protocol):
    """The fields of a model's configuration that a mixer uses; `tttlm.model.ModelConfig` has them."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def backbone(self) -> str: ...
    @property
    def conv_kernel(self) -> int: ...
    @property
    def conv_init(self) -> Literal["pytorch", "lecun_normal"]: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def initializer_range(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def param_dtype(self) -> str: ...


@dataclass(frozen=True)
class Mixer(ABC, Generic[S]):
    """A kind of sequence layer within a model: its construction, cost, sharding and requirements.

    A subclass is registered by name (see `register`). Model, training, planning and evaluation use the layer only
    through it. It must implement `build` and `flops_per_token`; everything else has a default.

    Attributes:
        name: The name in `model.mixers`.
        model: The model that the layer is in.
        config: The mixer's own configuration.
    """

    name: str
    model: ModelShape
    config: S

    Config: ClassVar[type]
    """The frozen dataclass of the mixer's own configuration."""
    section: ClassVar[str] = ""
    """The key of that configuration, which several mixers may have in common. Empty takes the name of the mixer."""
    parameter_rules: ClassVar[tuple[AxisRule, ...]] = ()
    """Sharding rules of the layer's parameters: pairs of a regular expression that is searched in the path of a
    parameter within the layer, such as `q_proj/kernel`, and of mesh axes for each dimension, such as
    `("fsdp context", "tensor")`. The first match applies. A matrix without a match is stored sharded over `fsdp` and
    `context` if they divide a dimension."""
    changes_no_result: ClassVar[tuple[str, ...]] = ()
    """Fields of the configuration that may differ when a run is resumed."""
    has_inner_model: ClassVar[bool] = False
    """Whether the layer learns at test time: its calls take `inner_learning_rate_multiplier`, and its method
    `inner_statistics` measures what was learned."""
    extends_on_boundary: ClassVar[bool] = False
    """Whether the layer's `extend` takes `on_boundary`, which asserts that every sequence has had a multiple of
    `alignment` tokens, and is faster with it."""
    inner_warmup_start: ClassVar[float] = 1.0
    """The default multiplier of the inner learning rate at the first training step."""
    replaces_feed_forward: ClassVar[bool] = False
    """Whether published models of this mixer have twice as many blocks, and no feed-forward layers."""

    @abstractmethod
    def build(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the layer. It has the interface of `tttlm.layers`, and its state has an attribute `document`."""

    @abstractmethod
    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations per token of the forward pass, the mean over a sequence of that length.

        A multiply-add of a matrix product counts as two; element-wise operations are not counted.
        """

    def check(self) -> None:
        """Refuses invalid configurations.

        Raises:
            InputError: says what is wrong, which values were given and what to do.
        """

    @property
    def sharded(self) -> tuple[str, int]:
        """What is sharded over `tensor` x `context` within the layer ("heads", for instance), and its number."""
        return "heads", self.model.num_heads

    @property
    def alignment(self) -> int:
        """Packed documents start at multiples of this many tokens, so that their outputs are those they have alone."""
        return 1

    @property
    def conv_before_block(self) -> bool:
        """Whether blocks of this mixer begin with a convolution by default."""
        return False

    @property
    def cache_length(self) -> int | None:
        """The largest number of tokens of a state with a cache; None if the state has a fixed size."""
        return None

    def with_cache_length(self, tokens: int) -> S:
        """The configuration with a cache for that many tokens, for mixers with a `cache_length`."""
        return self.config

    def check_room(self, state: Any, tokens: int | jax.Array) -> None:
        """Refuses to extend `state` by more tokens than fit in its cache.

        Raises:
            InputError: they do not fit. Within `jax.jit`, where the tokens in the state are unknown, nothing is raised.
        """

    def with_inner(self, *, mini_batch_size: int | None = None, learning_rate_multiplier: float = 1.0) -> S:
        """The configuration with another size of inner mini-batches (None: unchanged) or another inner learning rate.

        Mixers without inner mini-batches return their configuration unchanged.
        """
        return self.config

    def resized(self, path: str, value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A parameter of the layer, for a configuration of `with_inner` in which it has another shape.

        Args:
            path: the path of the parameter within the layer.
            value: the parameter, with the axis of stacked blocks in front.
            shape: the required shape.

        Raises:
            InputError: the parameter cannot be resized.
        """
        raise InputError(f"{self.name}: {path} is {value.shape}, and cannot be made {shape}")

    @property
    def hidden_size_unit(self) -> int:
        """The model's hidden size can be any multiple of this with the same head dimension."""
        return 1

    @property
    def keeps_num_heads(self) -> bool:
        """Whether the model keeps its number of heads when its hidden size changes."""
        return False

    def with_num_heads(self, num_heads: int) -> S:
        """The configuration for a model with another number of heads."""
        return self.config

    def state_bytes(self) -> int:
        """Bytes of the state of one sequence."""

        def state() -> Any:
            layer: Any = self.build(rngs=nnx.Rngs(0))
            return layer.init_state(1)

        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(nnx.eval_shape(state)))

    @property
    def dtypes(self) -> dict[str, Any]:
        """`dtype` and `param_dtype` of the model, as arguments of a layer."""
        return {"dtype": jnp.dtype(self.model.dtype), "param_dtype": jnp.dtype(self.model.param_dtype)}

    @property
    def kernel_init(self) -> nnx.Initializer:
        """The model's initialiser of projections: normal with the standard deviation `initializer_range`."""
        return nnx.initializers.normal(self.model.initializer_range)


_MIXERS: dict[str, type[Mixer]] = {}
M = TypeVar("M", bound=type[Mixer])


def register(name: str) -> Callable[[M], M]:
    """A class decorator that registers a mixer under `name`, for `model.mixers`.

    >>> @register("average")
    ... class AverageMixer(Mixer[AverageConfig]): ...

    Raises:
        ValueError: another mixer has that name.
    """

    def add(mixer: M) -> M:
        if _MIXERS.get(name, mixer) is not mixer:
            raise ValueError(f"a mixer named {name!r} is registered already: {_MIXERS[name].__qualname__}")
        _MIXERS[name] = mixer
        return mixer

    return add


def registered(name: str) -> type[Mixer]:
    """The mixer of that name.

    Raises:
        InputError: no mixer of that name is registered.
    """
    if name not in _MIXERS:
        raise InputError(f"model.mixers: there is no mixer {shown(name)}; registered are {', '.join(sorted(_MIXERS))}")
    return _MIXERS[name]


def section_of(name: str) -> str:
    """The key of a mixer's configuration in the model's."""
    return registered(name).section or name


def mixer_names() -> tuple[str, ...]:
    """The names of all registered mixers."""
    return tuple(_MIXERS)
