"""Folders of safetensors, whole or sharded: reading one tensor at a time, writing shards with their index."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tttlm.errors import InputError
from tttlm.records import read_record

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 10**8  # bytes, by the format's definition


class Tensors:
    """The tensors of a folder by name; every one that is read is ticked off.

    Raises:
        InputError: naming the file or tensor, for anything missing, truncated or of another shape.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / INDEX).exists():
            names = read_json(folder / INDEX).get("weight_map")
            if not isinstance(names, dict):
                raise InputError(f"{folder / INDEX}: it has no weight_map that says which file holds which tensor")
            if wrong := [name for name, file in names.items() if not isinstance(file, str) or Path(file).name != file]:
                raise InputError(
                    f"{folder / INDEX}: no file of this folder is named for {wrong[0]!r}, but {names[wrong[0]]!r}"
                )
            self._where = {name: folder / file for name, file in names.items()}
        elif (folder / SINGLE).exists():
            self._where = dict.fromkeys(self._open(folder / SINGLE).keys(), folder / SINGLE)
        else:
            pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
            hint = f" ({pickled[0]} is a pickle, which is never opened; convert it to safetensors)" if pickled else ""
            raise InputError(f"{folder}: no {SINGLE} and no {INDEX} here{hint}")
        self._files: dict[Path, Any] = {}
        self.unread = set(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def read_any(self, name: str) -> np.ndarray:
        """The tensor of that name, whatever its shape."""
        path = self._where[name]
        return self.read(name, tuple(self._opened(path).get_slice(name).get_shape()))

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor of that name, which must have that shape."""
        if name not in self._where:
            raise InputError(f"{self.folder}: tensor {name!r} is missing; expected one of shape {list(shape)}")
        path = self._where[name]
        file = self._opened(path)
        try:
            tensor = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: tensor {name!r} cannot be read ({error}); fetch the file again") from None
        except (AttributeError, KeyError, TypeError):  # of a dtype that numpy has no name for
            kind = file.get_slice(name).get_dtype()
            raise InputError(
                f"{path}: tensor {name!r} is of {kind}, which is not read here; convert it to float32 or bfloat16"
            ) from None
        if tensor.shape != shape or tensor.dtype.name not in ("float32", "bfloat16", "float16", "float64"):
            raise InputError(
                f"{path}: tensor {name!r} has shape {list(tensor.shape)} of {tensor.dtype}, but config.json asks for "
                f"{list(shape)} of floating-point numbers"
            )
        self.unread.discard(name)
        return tensor

    def _opened(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = self._open(path)
        return self._files[path]

    @staticmethod
    def _open(path: Path) -> Any:
        if not path.exists():
            raise InputError(f"{path}: this file is missing; the index names it")
        try:
            return safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            what = _what_is_cut(path) or f"no whole safetensors file ({error})"
            raise InputError(f"{path}: {what}; fetch it again") from None


def _what_is_cut(path: Path) -> str | None:
    """Which tensor the end of a truncated file falls into, by its header; None when it is not that."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                return None
            header = json.loads(file.read(length)) if 8 + length <= size else None
        if header is None:
            return f"cut off within its header: it has {size:,} bytes, the header alone takes {8 + length:,}"
        tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
        ends = {name: 8 + length + facts["data_offsets"][1] for name, facts in tensors.items()}
        cut = min((name for name, end in ends.items() if end > size), key=lambda name: ends[name])
        facts = tensors[cut]
        return (
            f"cut off within tensor {cut!r} (shape {facts['shape']} of {facts['dtype']}): it has {size:,} bytes of "
            f"{max(ends.values()):,}"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Callable[[], np.ndarray], int]], shard_bytes: int) -> None:
    """Writes `(name, value, bytes)` in order; more than `shard_bytes` are cut into files with an index beside them."""
    shards: list[list[tuple[str, Callable[[], np.ndarray]]]] = [[]]
    room, total = shard_bytes, 0
    for name, value, size in tensors:
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, value))
        room, total = room - size, total + size
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(files, shards, strict=True):
        save_file({name: value() for name, value in shard}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: there is no such file, or none in it.
    """
    return read_record(path, dict[str, Any], advice="a checkpoint folder holds config.json and safetensors")
