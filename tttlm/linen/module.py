"""One Linen module for every layer of `tttlm.layers`."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

from tttlm.linen.parameters import filled, to_linen


class SequenceModule(nn.Module):
    """A layer of `tttlm.layers` as a Linen module, with the same interface.

    >>> layer = tttlm.linen.TTTLinear(64, 4)
    >>> variables = layer.init(jax.random.key(0), x)
    >>> state = layer.apply(variables, 2, method="init_state")
    >>> y, state = layer.apply(variables, x, state, method="extend")

    Attributes:
        layer: The class of the NNX layer.
        arguments: The positional arguments of its constructor.
        options: The keyword arguments of its constructor, except `rngs`.
    """

    layer: Callable[..., nnx.Module]
    arguments: tuple[Any, ...] = ()
    options: FrozenDict[str, Any] = FrozenDict()

    def __call__(self, x: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
        """Applies the layer; arguments and result are those of the NNX layer."""
        return self._run("__call__", x, *arguments, **options)

    def extend(self, x: jax.Array, state: Any, *arguments: Any, **options: Any) -> tuple[jax.Array, Any]:
        """Continues from `state` and returns the next one; arguments are as for the NNX layer."""
        return self._run("extend", x, state, *arguments, **options)

    def init_state(self, batch: int | tuple[int, ...]) -> Any:
        """The state before the first token. It depends on the parameters if initial inner weights are learned."""
        return self._run("init_state", batch)

    def _build(self, key: jax.Array) -> nnx.Module:
        return self.layer(*self.arguments, **self.options, rngs=nnx.Rngs(key))

    @nn.compact
    def _run(self, method: str, *arguments: Any, **options: Any) -> Any:
        if self.is_initializing() and not self.variables.get("params"):
            for name, value in to_linen(self._build(self.make_rng("params"))).items():
                self.put_variable("params", name, value)
        abstract = nnx.eval_shape(lambda: self._build(jax.random.key(0)))
        return getattr(filled(abstract, self.variables["params"]), method)(*arguments, **options)


def linen_layer(layer: Callable[..., nnx.Module]) -> Callable[..., SequenceModule]:
    """Returns a function that makes the Linen module of an NNX layer.

    The function takes the arguments of the layer, except `rngs`, and `name`, the name of the Linen module.

    >>> both = linen_layer(lambda rngs: Bidirectional(TTTLinear(64, 4, rngs=rngs)))
    >>> module = both(name="both")

    Args:
        layer: A class of `tttlm.layers`, or a function of `rngs` and other arguments that makes such a layer.
    """
    signature = inspect.signature(layer.__init__ if isinstance(layer, type) else layer)  # type: ignore[misc]
    kept = [p for p in signature.parameters.values() if p.name not in ("self", "rngs")]
    name = inspect.Parameter("name", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None)

    def make(*arguments: Any, name: str | None = None, **options: Any) -> SequenceModule:
        return SequenceModule(layer, arguments, FrozenDict(options), name=name)

    make.__name__ = make.__qualname__ = getattr(layer, "__name__", "layer")
    make.__doc__ = layer.__doc__
    make.__signature__ = signature.replace(parameters=[*kept, name])  # type: ignore[attr-defined]
    return make
