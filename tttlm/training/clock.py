"""Progress and speed of a run: totals that survive a restart, and the time of each step."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Totals:
    """Sums over the steps of the run so far, including those of earlier processes.

    Attributes:
        tokens_seen: targets that counted in the loss of an update.
        flops: floating-point operations by the model's own formula, three times the forward pass.
        seconds: time of training, without compiling, evaluating and restarting.
    """

    tokens_seen: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Clock:
    """Updates `totals` and measures each step.

    Args:
        totals: the totals of the steps before; modified.
        tokens: positions of a batch, including padding.
        flops: floating-point operations of a step.
        peak: peak floating-point operations per second of all devices together; None if unknown.
    """

    def __init__(self, totals: Totals, *, tokens: int, flops: float, peak: float | None) -> None:
        self._totals, self._tokens, self._flops, self._peak = totals, tokens, flops, peak
        self._waited = 0.0
        self._last: float | None = None  # the first step includes compiling, so it is not timed

    @property
    def first(self) -> bool:
        return self._last is None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the loop waits for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """A context whose time does not count as training."""
        start = time.monotonic()
        yield
        if self._last is not None:
            self._last += time.monotonic() - start

    def tick(self, counted: float) -> dict[str, float]:
        """Ends a step and returns its metrics.

        Args:
            counted: targets that counted in its update.
        """
        now, last, waited = time.monotonic(), self._last, self._waited
        self._last, self._waited = now, 0.0
        totals = self._totals
        totals.tokens_seen += round(counted) if math.isfinite(counted) else 0
        totals.flops += self._flops
        if last is None:
            return totals.as_dict()
        seconds = now - last
        totals.seconds += seconds
        mfu = {"mfu": self._flops / seconds / self._peak} if self._peak else {}
        return {"tokens_per_second": self._tokens / seconds, **mfu, "data_wait": waited / seconds, **totals.as_dict()}
