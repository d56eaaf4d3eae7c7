"""The arguments of an implementation, after the public function has checked and completed them."""

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
    """Tokens to learn from, and everything that an implementation needs.

    Attributes:
        learner: the description.
        inputs: the tokens, in the dtypes of the caller.
        weights: initial weights of the inner model `[H, ...]`.
        slow: slow parameters of the inner model `[H, ...]`, or None.
        position_scale: `[M]`, or None.
        blank: the state that a document starts from, without a batch axis.
        state: the state before the first token.
        docs: the documents of the sequences, or None if every sequence is one document.
        at_start: whether all clocks of every sequence are at zero before the first token.
        aligned: whether all clocks are at zero at the start of every document.
        remat_chunks: number of chunks that the backward pass recomputes at a time.
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
        """The number of positions of the tokens, equal for all sequences or one for each."""
        return num_positions(self.docs, self.inputs.queries.shape[1])

    @property
    def next_offset(self) -> Int[Array, "B"]:
        """The offset of every sequence in the period of the clocks after the last token."""
        return (self.state.offset + self.positions) % self.learner.clocks.period

    def computed(self, tree: Any) -> Any:
        """`tree` in the dtype of the computation, float32 or float64."""
        dtype = jax.tree.leaves(self.weights)[0].dtype
        return jax.tree.map(lambda a: a.astype(dtype), tree)


@runtime_checkable
class Implementation(Protocol):
    """An implementation of learners, one of `IMPLEMENTATIONS`."""

    def supports(self, learner: Learner, device: str, shapes: Shapes) -> str | None:
        """One line that says why it cannot compute `learner` on `device` ("cpu", "gpu" or "tpu") at these shapes; None
        if it can."""
        ...

    def __call__(self, problem: Problem) -> tuple[Float[Array, "B T H V"], LearnerState]:
        """The outputs `[B, T, H, V]`, and the state after the last token, with the document of the state before."""
        ...


def select(flag: Any, new: Any, old: Any) -> Any:
    """`new` where `flag` is true, else `old`, leaf by leaf; `flag` has the leading axes of every leaf."""

    def pick(a: Any, b: Any) -> Any:
        return jnp.where(flag.reshape(flag.shape + (1,) * (b.ndim - flag.ndim)), a, b)

    return jax.tree.map(pick, new, old)
