"""Transfers batches to the device ahead of the step that reads them, and measures how long the loop waits for data."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any


class DevicePrefetch:
    """Keeps `size` batches in transfer to the device while it computes.

        batches = DevicePrefetch(loader.iterate(start), lambda batch: jax.device_put(batch, sharding))
        for step, batch in zip(range(start, steps), batches): ...
        print(batches.wait_share())

    Args:
        batches: host batches, best made in the background (`Loader.iterate`).
        place: starts the transfer of a batch without waiting for it; `jax.device_put` by default.
        size: number of batches on the device, without the one in use.

    Attributes:
        wait_seconds: time in seconds that the loop waited for data, without filling the queue before the first step.
    """

    def __init__(self, batches: Iterator[Any], place: Callable[[Any], Any] | None = None, size: int = 2) -> None:
        if place is None:
            import jax

            place = jax.device_put
        self._batches, self._place, self._size = iter(batches), place, max(1, size)
        self._ready: deque[Any] = deque()
        self.wait_seconds = 0.0
        self._begin: float | None = None

    def __iter__(self) -> "DevicePrefetch":
        return self

    def __next__(self) -> Any:
        entered = time.perf_counter()
        while len(self._ready) < self._size:
            try:
                self._ready.append(self._place(next(self._batches)))
            except StopIteration:
                break
        left = time.perf_counter()
        if self._begin is None:
            self._begin = left  # filling the queue before the first step is start-up, not waiting
        else:
            self.wait_seconds += left - entered
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    def wait_share(self) -> float:
        """Fraction of the time since the first batch that was spent waiting for data, from 0 to 1."""
        if self._begin is None:
            return 0.0
        return self.wait_seconds / max(time.perf_counter() - self._begin, 1e-9)
