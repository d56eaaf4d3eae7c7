"""The layout "windows": documents joined in the order they are stored, cut into rows of T tokens."""

import numpy as np

from tttlm.data.store import Split
from tttlm.errors import InputError


class Windows:
    """Row i reads tokens `[i T, (i + 1) T]`, the last of which is only a target (and the next row's first input)."""

    def __init__(self, split: Split, length: int) -> None:
        self._split, self._length = split, length
        if len(split) <= length:
            raise InputError(
                f"{split.folder} has {len(split):,} {split.split} tokens, fewer than a row of {length} + 1; "
                "give more text or a shorter sequence_length"
            )

    def __len__(self) -> int:
        return (len(self._split) - 1) // self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = int(index) * self._length
        tokens = self._split.read(start, start + self._length + 1).astype(np.int32)
        return {"inputs": tokens[:-1], "targets": tokens[1:]}
