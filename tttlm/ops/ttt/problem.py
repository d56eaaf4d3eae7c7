"""What an implementation is given, after the public function has checked and completed it."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tttlm.ops.documents import Documents, num_positions
from tttlm.ops.ttt.description import Learner
from tttlm.ops.ttt.learner_state import LearnerInputs, LearnerState


class Shapes(NamedTuple):
    """The sizes that an implementation may choose by: of `[B, T, H, K]` queries and `[B, T n, H, V]` values."""

    batch: int
    time: int
    num_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Problem:
    """A stretch of tokens to learn from, and all that is known about them.

    Attributes:
        learner: the description.
        inputs: the tokens, in the dtypes that they came in.
        weights: initial weights of the inner model `[H, ...]`.
        slow: slow parameters of the inner model `[H, ...]`, or None.
        position_scale: `[M]`, or None.
        blank: the state that a document starts from, without a batch axis.
        state: what is carried in.
        docs: the documents of the rows, or None where every row is one.
        at_start: whether every row is known to stand where all clocks are at zero.
        aligned: whether every document is promised to start where all clocks are at zero.
        remat_chunks: how many chunks the backward pass computes again at a time.
    """

    learner: Learner
    inputs: LearnerInputs
    weights: Any
    slow: Any
    position_scale: Float[Array, "M"] | None
    blank: LearnerState
    state: LearnerState
    docs: Documents | None
    at_start: bool
    aligned: bool
    remat_chunks: int

    @property
    def positions(self) -> int | Int[Array, "B"]:
        """How many positions the tokens take, in every row or in each."""
        return num_positions(self.docs, self.inputs.queries.shape[1])

    @property
    def next_offset(self) -> Int[Array, "B"]:
        """Where every row stands in the period of the clocks after the last token."""
        return (self.state.offset + self.positions) % self.learner.clocks.period

    def computed(self, tree: Any) -> Any:
        """`tree` in the dtype of the computation, float32 or float64."""
        dtype = jax.tree.leaves(self.weights)[0].dtype
        return jax.tree.map(lambda a: a.astype(dtype), tree)


@runtime_checkable
class Implementation(Protocol):
    """One way to compute a learner.

    `supports` says in one line why the implementation cannot compute `learner` on `device` ("cpu", "gpu", "tpu") at
    these shapes, or None where it can. Called, it gives the outputs `[B, T, H, V]` and the state after the last token,
    with the document that came in.
    """

    def supports(self, learner: Learner, device: str, shapes: Shapes) -> str | None: ...

    def __call__(self, problem: Problem) -> tuple[Float[Array, "B T H V"], LearnerState]: ...


def select(flag: Any, new: Any, old: Any) -> Any:
    """`new` where `flag` is true, else `old`, leaf by leaf; `flag` has the leading axes of every leaf."""

    def pick(a: Any, b: Any) -> Any:
        return jnp.where(flag.reshape(flag.shape + (1,) * (b.ndim - flag.ndim)), a, b)

    return jax.tree.map(pick, new, old)
