"""The interface of sequence layers, and the code common to all of them.

A layer computes sequences `[B, T, D]` with their tokens in front, their documents, and a state. Everything else that a
caller may pass is handled here: leading dimensions, padding, ids, empty sequences, other dtypes, any mesh.
"""

import functools
import math
import reprlib
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from tttlm.errors import InputError
from tttlm.ops.documents import Documents
from tttlm.ops.ttt import InnerStatistics
from tttlm.parts.explicit_axes import any_mesh
from tttlm.parts.padding import read_sequences

S = TypeVar("S")
F = TypeVar("F", bound=Callable[..., Any])
Precision = str | jax.lax.Precision | None


def own_promotion(method: F) -> F:
    """Decorates a method that broadcasts and promotes by JAX's own rules.

    `jax_numpy_rank_promotion` and `jax_numpy_dtype_promotion` are there to find mistakes in a caller's own code.
    Matrix products have the precision of the layer, those of its projections too.
    """

    @functools.wraps(method)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            if self.precision is None:  # that of the caller
                return method(self, *arguments, **options)
            with jax.default_matmul_precision(self.precision):
                return method(self, *arguments, **options)

    return run  # type: ignore[return-value]


class SequenceLayer(nnx.Module, Generic[S]):
    """A layer from `[..., T, D]` to `[..., T, D]` that carries a state `S` from token to token.

    A subclass sets `hidden_size`, `dtype`, `param_dtype` and, if not None, `precision`, and implements `_extend` and
    `_init_state`; also `_whole` if complete sequences are computed differently. A state has an attribute `document`;
    its first axis is the batch.
    """

    hidden_size: int
    dtype: Dtype | None
    param_dtype: Dtype
    precision: str | None = None

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        segment_ids: Int[Array, "*B T"] | Documents | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
    ) -> Float[Array, "*B T D"]:
        """The layer on complete sequences.

        Args:
            x: The sequences, with any leading dimensions.
            segment_ids: Ids of the documents in a sequence, 0 for padding that counts as a position (see
                `tttlm.ops.documents`).
            lengths: Number of tokens of each sequence. Padding after them is neither read nor written and does not
                count as a position: every sequence has the outputs that it has alone. Outputs at padding are 0.
            mask: The same for padding anywhere, True at tokens.

        Raises:
            InputError: An argument has a wrong shape or dtype.
        """
        return self._read(x, None, segment_ids, lengths, mask)[0]

    def extend(
        self,
        x: Float[Array, "*B T D"],
        state: S,
        segment_ids: Int[Array, "*B T"] | Documents | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
    ) -> tuple[Float[Array, "*B T D"], S]:
        """Continues from `state` and returns the next one; however a sequence is cut, the outputs are the same.

        Arguments are as for a call. Shapes and dtypes of a state never change.

        Raises:
            InputError: An argument has a wrong shape or dtype, or the state has another batch size.
        """
        return self._read(x, state, segment_ids, lengths, mask)

    @own_promotion
    def init_state(self, batch: int | tuple[int, ...]) -> S:
        """The state before the first token, for `batch` sequences or for leading dimensions of that shape."""
        if not isinstance(batch, tuple):
            return self._init_state(batch)
        return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), self._init_state(math.prod(batch)))

    def _init_state(self, batch: int) -> S:
        raise NotImplementedError

    def _extend(self, *arguments: Any, **options: Any) -> tuple[Array, S]:
        """`(x, state, docs, **options)`: the outputs of `[B, T, D]`, tokens in front, and the next state."""
        raise NotImplementedError

    def _whole(self, *arguments: Any, **options: Any) -> Array:
        """`(x, docs, **options)`: the outputs of complete sequences."""
        x, docs = arguments
        return self._extend(x, self._init_state(x.shape[0]), docs, **options)[0]

    @own_promotion
    def _read(
        self,
        x: Any,
        state: Any,
        segment_ids: Any,
        lengths: Any,
        mask: Any,
        *,
        per_token: Any = None,
        per_pair: Any = None,
        **options: Any,
    ) -> tuple[Array, Any]:
        """The outputs and the next state, or None without a state.

        Options are passed to `_extend` and `_whole`, those in `per_token` `[..., T]` and in `per_pair` `[..., T, T]`
        with the tokens moved to the front.
        """
        x = jnp.asarray(x)
        if x.ndim < 2 or x.shape[-1] != self.hidden_size or not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"x must be floats [..., T, {self.hidden_size}], got {x.dtype} {x.shape}")
        leading, shape = x.shape[:-2], x.shape[:-1]
        if state is not None and state.document.shape != leading:
            came = state.document.shape
            raise InputError(f"state must be of leading dimensions {leading} to go with x {x.shape}, got {came}")

        def checked(name: str, a: Any, needed: tuple[int, ...]) -> Any:
            if a is None:
                return None
            a = a if isinstance(a, Documents) else jnp.asarray(a)
            came = a.index.shape if isinstance(a, Documents) else a.shape
            if came != needed:
                raise InputError(f"{name} must have shape {needed} to go with x {x.shape}, got {came}")
            return a

        per_token = {name: checked(name, a, shape) for name, a in (per_token or {}).items()}
        per_pair = {name: checked(name, a, (*shape, shape[-1])) for name, a in (per_pair or {}).items()}
        segment_ids, mask = checked("segment_ids", segment_ids, shape), checked("mask", mask, shape)
        lengths = checked("lengths", lengths, leading)
        given = (segment_ids, lengths, mask, per_token, per_pair)
        dtype = self.dtype or jnp.result_type(x.dtype, self.param_dtype)
        if 0 in shape:  # nothing to read
            return jnp.zeros(x.shape, dtype), state
        return self._flat(x.astype(dtype), state, given, options)

    @any_mesh
    def _flat(self, x: Array, state: Any, given: Any, options: dict[str, Any]) -> tuple[Array, Any]:
        leading = x.shape[:-2]
        flatten = lambda a: a if len(leading) == 1 else a.reshape(-1, *a.shape[len(leading) :])
        whole = flatten(x)
        segment_ids, lengths, mask, per_token, per_pair = jax.tree.map(flatten, given)
        before = jax.tree.map(flatten, state)
        if x.dtype == jnp.float64:  # computed in it, and stored in the dtype of the state
            before = jax.tree.map(lambda a: a.astype(x.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, before)
        carried = None if state is None else before.document
        whole, docs, front, finish = read_sequences(whole, segment_ids, carried, lengths, mask)
        both = lambda a: jnp.swapaxes(front(jnp.swapaxes(front(a), 1, 2)), 1, 2)
        options = options | jax.tree.map(front, per_token) | jax.tree.map(both, per_pair)
        if state is None:
            return finish(self._whole(whole, docs, **options)).reshape(x.shape), None
        y, after = self._extend(whole, before, docs, **options)
        after = jax.tree.map(lambda new, old: new.reshape(old.shape).astype(old.dtype), after, state)
        return finish(y).reshape(x.shape), after


class LearningLayer(SequenceLayer[S]):
    """A sequence layer with an inner model that learns at test time."""

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        segment_ids: Int[Array, "*B T"] | Documents | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> Float[Array, "*B T D"]:
        """The layer from its initial state.

        Args:
            x: The sequences, with any leading dimensions.
            segment_ids: Ids of the documents in a sequence, 0 for padding that counts as a position (see
                `tttlm.ops.documents`). A document that starts with a mini-batch has the outputs that it has alone.
            lengths: Number of tokens of each sequence. Padding after them is neither read nor written and does not
                count as a position: every sequence has the outputs that it has alone. Outputs at padding are 0.
            mask: The same for padding anywhere, True at tokens.
            inner_learning_rate_multiplier: Multiplier of the inner learning rates, for their warm-up in training;
                0 reads the inner model out without learning.

        Raises:
            InputError: An argument has a wrong shape or dtype.
        """
        return self._read(x, None, segment_ids, lengths, mask, multiplier=inner_learning_rate_multiplier)[0]

    @own_promotion
    def inner_statistics(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> InnerStatistics:
        """Statistics of learning and drift of the inner model on `x` `[B, T, D]`; arguments as for a call.

        Of several learners it is the mean.
        """
        return self._inner_statistics(x, segment_ids, inner_learning_rate_multiplier)

    def _inner_statistics(self, x: Any, segment_ids: Any, multiplier: Any) -> InnerStatistics:
        raise NotImplementedError(f"{type(self).__name__} does not measure its inner model")

    def extend(
        self,
        x: Float[Array, "*B T D"],
        state: S,
        segment_ids: Int[Array, "*B T"] | Documents | None = None,
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Bool[Array, "*B T"] | None = None,
        on_boundary: bool = False,
        inner_learning_rate_multiplier: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, "*B T D"], S]:
        """Continues from `state` and returns the next one; however a sequence is cut, the outputs are the same.

        Arguments are as for a call. `on_boundary` asserts that every sequence is at the start of a mini-batch, which
        saves the cost of starting within one. Shapes and dtypes of a state never change.

        Raises:
            InputError: An argument has a wrong shape or dtype, or the state has another batch size.
        """
        options = {"multiplier": inner_learning_rate_multiplier, "on_boundary": on_boundary}
        return self._read(x, state, segment_ids, lengths, mask, **options)

    def _whole(self, *arguments: Any, **options: Any) -> Array:
        """Without a state to begin with, `learn` starts all sequences on a mini-batch boundary."""
        x, docs = arguments
        return self._extend(x, None, docs, **options)[0]


def at_least_one(**counts: int | None) -> None:
    """Refuses counts below 1, by the names of their arguments; None is a default and is accepted.

    Raises:
        InputError: A count is below 1.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name} must be at least 1, got {count}")


def checked_precision(precision: Precision) -> str | None:
    """The precision as a name that `jax.default_matmul_precision` takes; None leaves it to the caller's.

    Raises:
        InputError: There is no such precision.
    """
    name = precision.name.lower() if isinstance(precision, jax.lax.Precision) else precision
    try:
        with jax.default_matmul_precision(name):
            return name
    except (ValueError, TypeError):
        raise InputError(
            "precision must be None or a name of jax.default_matmul_precision, as 'highest' or 'tensorfloat32'; "
            f"got {reprlib.repr(precision)}"
        ) from None


def checked_positions(positions: Any) -> Array | None:
    """Positions of any integer dtype as int32.

    Raises:
        InputError: They are not integers.
    """
    if positions is None:
        return None
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise InputError(f"positions must be integers, got {positions.dtype} {positions.shape}")
    return positions.astype(jnp.int32)


def check_implementation(name: str | None, names: Iterable[str]) -> None:
    """Refuses the name of an implementation that does not exist; None picks one.

    Raises:
        InputError: There is no implementation of that name.
    """
    if name is not None and name not in (names := tuple(names)):
        raise InputError(f"implementation must be None or one of {', '.join(names)}; got {reprlib.repr(name)}")
