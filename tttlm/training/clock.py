"""How far a run has come and how fast it goes: sums that survive a restart, and what the clock says of each step."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Totals:
    """Sums over the steps that led to where the run is, those of processes that were stopped included.

    Attributes:
        tokens_seen: targets that counted in the loss of an update.
        flops: floating-point operations by the model's own formula, three times the forward pass.
        seconds: time of training; compiling, evaluating and restarting are left out.
    """

    tokens_seen: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Clock:
    """Adds up `totals` and measures each step.

    Args:
        totals: of the steps before; added to.
        tokens: places of a batch, padding included.
        flops: of a step.
        peak: floating-point operations a second that all devices are good for together; None where it is unknown.
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
        """Around waiting for data."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Around what is no training."""
        begun = time.monotonic()
        yield
        if self._last is not None:
            self._last += time.monotonic() - begun

    def tick(self, counted: float) -> dict[str, float]:
        """At the end of a step: what is known of it.

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
