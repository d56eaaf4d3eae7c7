"""What a training step reads: one type from the loader to the compiled program."""

from typing import Generic, NamedTuple, TypeVar

ArrayT = TypeVar("ArrayT")


class Batch(NamedTuple, Generic[ArrayT]):
    """One batch of B examples of T tokens: NumPy arrays from the loader, JAX arrays on the mesh. It is a pytree.

    Attributes:
        inputs: token ids, int32 [B, T].
        targets: the token that follows each input, int32 [B, T].
        segment_ids: the document of each token, int32 [B, T], 0 for padding; None if examples are not padded.
        weights: the weight of each target in the loss, float32 [B, T], 0 where there is no target; None counts all.
        continues: whether an example continues the document of the same index of the batch at the previous step,
            bool [B]; None if no state is carried from step to step.
    """

    inputs: ArrayT
    targets: ArrayT
    segment_ids: ArrayT | None = None
    weights: ArrayT | None = None
    continues: ArrayT | None = None
