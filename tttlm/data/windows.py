"""The layout "windows": documents joined in the order they are stored, cut into rows of T tokens."""

from collections.abc import Sequence

import numpy as np

from tttlm.data.store import Split
from tttlm.errors import InputError


class Windows:
    """Row i reads tokens `[i T, (i + 1) T]`, the last of which is only a target (and the next row's first input)."""

    def __init__(self, split: Split, length: int) -> None:
        self._split, self._length = split, length
        if len(split) <= length:
            raise InputError(
                f"{split.folder} has {len(split):,} {split.name} tokens, fewer than a row of {length} + 1; "
                "give more text or a shorter sequence_length"
            )

    def __len__(self) -> int:
        return (len(self._split) - 1) // self._length

    def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """`inputs` and `targets`, int32 [rows, T]."""
        tokens = np.empty((len(indices), self._length + 1), np.int32)
        for row, index in zip(tokens, indices, strict=True):
            start = index * self._length
            row[:] = self._split.read(start, start + self._length + 1)
        return {"inputs": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()}
