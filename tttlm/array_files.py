"""Named arrays with metadata in safetensors files, and the digest by which a reader finds out that one was altered."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

UNWRITABLE = (OSError, SafetensorError)
UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, KeyError)  # what reading a damaged file raises


def store_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes C-contiguous arrays to a file, which appears under its name when it is complete.

    Raises:
        OSError, SafetensorError: it cannot be written (`UNWRITABLE`).
    """
    partial = path.with_name(f"{path.name}.partial")
    save_file(arrays, partial, metadata)
    partial.replace(path)


def stored_arrays(path: Path) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """Reads the arrays and the metadata of a file.

    Raises:
        OSError, SafetensorError, ValueError, TypeError, KeyError: it cannot be read (`UNREADABLE`).
    """
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  (no dict)


def content_digest(arrays: dict[str, np.ndarray], text: str = "") -> str:
    """A digest of named arrays and of a text beside them."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
