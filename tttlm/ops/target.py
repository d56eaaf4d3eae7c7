"""The device that a computation is traced for, which decides between implementations."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

_TARGET: ContextVar[Any] = ContextVar("target", default=None)


@contextmanager
def traced_for(device: Any) -> Iterator[None]:
    """A context for tracing a computation that will run on `device`, a `jax.Device` of this machine or of another."""
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)


def target_device() -> Any:
    """The `jax.Device` of the innermost `traced_for`, or the default one."""
    return _TARGET.get() or jax.devices()[0]


def target_platform() -> str:
    """The platform of the target device: "cpu", "gpu" or "tpu"."""
    return target_device().platform
