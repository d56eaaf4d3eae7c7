"""The layout "windows": documents joined in the order they are stored, cut into examples of T tokens."""

from collections.abc import Sequence

import numpy as np

from tttlm.data.batch import Batch
from tttlm.data.store import Split
from tttlm.errors import InputError


class Windows:
    """Example i has tokens `[i T, (i + 1) T]`, the last of which is only a target (and the next example's first input).

    Args:
        split: the tokens.
        length: tokens of an example, T.

    Raises:
        InputError: there are fewer tokens than one example has.
    """

    def __init__(self, split: Split, length: int) -> None:
        self._split, self._length = split, length
        if len(split) <= length:
            raise InputError(
                f"{split.folder} has {len(split):,} {split.name} tokens, fewer than one example of {length} + 1; "
                f"give more text{', hold out more of it' * (split.name == 'validation')} or a shorter sequence_length"
            )

    def __len__(self) -> int:
        return (len(self._split) - 1) // self._length

    def take(self, indices: Sequence[int]) -> Batch[np.ndarray]:
        """Reads examples as a batch of inputs and targets only."""
        tokens = np.empty((len(indices), self._length + 1), np.int32)
        for example, index in zip(tokens, indices, strict=True):
            start = index * self._length
            example[:] = self._split.read(start, start + self._length + 1)
        return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy())
