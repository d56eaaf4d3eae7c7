"""What the library asks of a mixer, and the register where every mixer is found by its name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from tttlm.errors import InputError
from tttlm.fields import shown

S = TypeVar("S")
AxisRule = tuple[str, tuple[str, ...]]


@runtime_checkable
class ModelShape(Protocol):
    """What a mixer may know of the model around it; `tttlm.model.ModelConfig` is one."""

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
    """One kind of sequence layer within one model: how it is built, what it costs, how it is sharded, what it needs.

    A subclass is registered by name (see `register`), and is all that model, training, planning and evaluation know
    of its layer. It must say how to build the layer and how many FLOPs a token costs; every other answer has a default.

    Attributes:
        name: The name in `model.mixers`.
        model: The model that the layer is in.
        settings: The mixer's own configuration.
    """

    name: str
    model: ModelShape
    settings: S

    Settings: ClassVar[type]
    """The frozen dataclass of the mixer's own configuration."""
    section: ClassVar[str] = ""
    """The key of that configuration; mixers may share one. Empty for the name of the mixer."""
    parameter_rules: ClassVar[tuple[AxisRule, ...]] = ()
    """Which mesh axes shard the dimensions of which parameter: pairs of a regular expression that is searched in the
    path of a parameter within the layer, such as `q_proj/kernel`, and of axes for each dimension, such as
    `("fsdp context", "tensor")`. The first that is found holds. A matrix that none finds is stored sharded over `fsdp`
    and `context` where it divides."""
    changes_no_result: ClassVar[tuple[str, ...]] = ()
    """Fields of the configuration that a run may be resumed with other values of."""
    has_inner_model: ClassVar[bool] = False
    """Whether the layer learns at test time: its calls take `inner_learning_rate_multiplier`, and its method
    `inner_statistics` measures what was learned."""
    extends_on_boundary: ClassVar[bool] = False
    """Whether the layer's `extend` takes `on_boundary`, a promise that every sequence has had a multiple of `alignment`
    tokens, and is faster for it."""
    inner_warmup_start: ClassVar[float] = 1.0
    """What the inner learning rate is multiplied by at the first training step, where nothing else is asked for."""
    replaces_feed_forward: ClassVar[bool] = False
    """Whether published models of this mixer have twice as many blocks, and no feed-forward layers."""

    @abstractmethod
    def build(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """The layer. It has the contract of `tttlm.layers`, and its state an attribute `document`."""

    @abstractmethod
    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of the forward pass, as a mean over the tokens of a sequence of that length.

        A multiply-add of a matrix product counts as two; element-wise work is left out.
        """

    def check(self) -> None:
        """Refuses configurations that cannot work.

        Raises:
            InputError: in one line, what is wrong, what came and what to do.
        """

    @property
    def sharded(self) -> tuple[str, int]:
        """What `tensor` x `context` devices divide among themselves within the layer, and how many of it there are."""
        return "heads", self.model.num_heads

    @property
    def alignment(self) -> int:
        """Tokens on whose multiples packed documents start, so that they give what they give alone."""
        return 1

    @property
    def conv_before_block(self) -> bool:
        """Whether blocks of this mixer begin with a convolution, where the model does not say so itself."""
        return False

    @property
    def cache_length(self) -> int | None:
        """Tokens that the state has room for; None where it has one size however many tokens come."""
        return None

    def with_cache_length(self, tokens: int) -> S:
        """The configuration with room for that many tokens, for mixers with a `cache_length`."""
        return self.settings

    def check_room(self, state: Any, tokens: int | jax.Array) -> None:
        """Refuses to extend `state` by more tokens than it has room for.

        Raises:
            InputError: there is no room, and the tokens in the state are known, which they are not while compiling.
        """

    def with_inner(self, *, mini_batch_size: int | None = None, learning_rate_multiplier: float = 1.0) -> S:
        """The configuration with other mini-batches of the inner model (None: as they are), or another inner rate.

        Mixers that cannot be changed so give their configuration as it is.
        """
        return self.settings

    def resized(self, path: str, value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A parameter of the layer, for a configuration of `with_inner` in which it has another shape.

        Args:
            path: its path within the layer.
            value: the parameter, with the axis of stacked blocks in front.
            shape: the shape wanted.

        Raises:
            InputError: it cannot be had.
        """
        raise InputError(f"{self.name}: {path} is {value.shape}, and cannot be made {shape}")

    @property
    def hidden_size_unit(self) -> int:
        """The model's hidden size can be any multiple of this without another head dimension."""
        return 1

    @property
    def keeps_num_heads(self) -> bool:
        """Whether the model keeps its number of heads when its hidden size changes."""
        return False

    def with_num_heads(self, num_heads: int) -> S:
        """The configuration for a model with another number of heads."""
        return self.settings

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
    """A class decorator: configurations can name the mixer `name` in `model.mixers` from here on.

    >>> @register("average")
    ... class AverageMixer(Mixer[AverageSettings]): ...

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
        InputError: none is registered under it.
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
