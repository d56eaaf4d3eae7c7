"""Memory and peak FLOP/s of accelerators, for plans and for model FLOPs utilisation."""

import os
import re
from dataclasses import dataclass
from typing import Any

GIB = 2**30
GB = 10**9


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Attributes:
        name: its name in this library, as in `--plan v5e:4x8`.
        kind: a regular expression for the beginning of JAX's `device_kind`.
        memory: memory of one JAX device in bytes.
        peak_flops: dense bfloat16 floating-point operations per second of one JAX device.
    """

    name: str
    kind: str
    memory: int
    peak_flops: float


# TPUs: the "system architecture" pages of Cloud TPU's documentation, one for each version. NVIDIA: the data sheets of
# the SXM modules, whose GB are taken as 10^9 bytes, the smaller reading, and whose tensor-core figures are halved
# where they are stated with sparsity.
DEVICES = (
    Device("v4", r"TPU v4$", 32 * GIB, 275e12),
    Device("v5e", r"TPU v5 ?(lite|e)", 16 * GIB, 197e12),
    Device("v5p", r"TPU v5p?$", 95 * GIB, 459e12),
    Device("v6e", r"TPU v6 ?(lite|e)", 32 * GIB, 918e12),
    Device("a100", r"NVIDIA A100-SXM\S*-80GB", 80 * GB, 312e12),
    Device("h100", r"NVIDIA H100 80GB HBM3", 80 * GB, 989e12),
    Device("h200", r"NVIDIA H200$", 141 * GB, 989e12),
)


def memory_of(device: Any, on_this_host: int) -> int | None:
    """Bytes of memory of a `jax.Device` of this process; None if unknown.

    Args:
        device: the device.
        on_this_host: devices of this process. CPU devices have the memory of the machine in common.
    """
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // on_this_host
        except (ValueError, OSError, AttributeError):  # no such question on this system
            return None
    known = device_of_kind(device.device_kind)
    return (device.memory_stats() or {}).get("bytes_limit") or (known.memory if known else None)


def device_of_kind(kind: str) -> Device | None:
    """The device that JAX calls `kind`, such as "TPU v5 lite" or "NVIDIA H200"; None if its figures are unknown."""
    return next((device for device in DEVICES if re.match(device.kind, kind)), None)
