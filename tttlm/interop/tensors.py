"""Folders of safetensors, whole or sharded: reading one tensor at a time, writing shards with their index."""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from tttlm.errors import InputError
from tttlm.records import parse_json, read_record

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}(-of-\d{5}\.safetensors)")
LARGEST_HEADER = 10**8  # bytes, by the format's definition


# Names of the format for dtypes, and numpy's; those that a parameter may have, and those that are refused with a shape.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OTHERS = {
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BOOL": "bool",
    "C64": "complex64",
}


class Tensor(NamedTuple):
    """Where a tensor is in a file.

    Attributes:
        path: The file.
        shape: Its shape.
        dtype: The name of its dtype, of numpy where numpy has one.
        pieces: Pairs of a byte offset and a number of bytes; together they are the values in row-major order.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[int, int], ...]


class Tensors:
    """The tensors of a folder by name, read one at a time.

    A tensor is read from the file into memory of its own, without a memory map whose pages would stay.
    """

    def __init__(self, folder: Path, where: dict[str, Tensor], source: str = "config.json") -> None:
        self.folder, self.source = folder, source
        self._where = where

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name]

    def read_any(self, name: str) -> np.ndarray:
        """The tensor of that name, whatever its shape."""
        return self.read(name, self._where[name].shape)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuses a tensor that is missing, of another shape, or of no dtype for parameters.

        Raises:
            InputError: names the tensor.
        """
        if name not in self._where:
            raise InputError(f"{self.folder}: tensor {name!r} is missing; expected one of shape {list(shape)}")
        tensor = self._where[name]
        if tensor.dtype not in (*DTYPES.values(), *_OTHERS.values()):
            raise InputError(
                f"{tensor.path}: tensor {name!r} is of {tensor.dtype}, which is not read here; convert it to "
                "float32 or bfloat16"
            )
        if tensor.shape != shape or tensor.dtype not in DTYPES.values():
            raise InputError(
                f"{tensor.path}: tensor {name!r} has shape {list(tensor.shape)} of {tensor.dtype}, but {self.source} "
                f"asks for {list(shape)} of floating-point numbers"
            )

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor of that name, which must have that shape.

        Raises:
            InputError: it is missing, of another shape, of no dtype for parameters, or cannot be read.
        """
        self.check(name, shape)
        tensor = self._where[name]
        data = np.empty(math.prod(shape), jnp.dtype(tensor.dtype))
        view, done = memoryview(data.view(np.uint8)), 0
        try:
            with open(tensor.path, "rb", buffering=0) as file:
                for offset, size in tensor.pieces:
                    file.seek(offset)
                    end = done + size
                    while done < end and (count := file.readinto(view[done:end])):
                        done += count
                    if done < end:
                        raise OSError(0, "the file ends too early")
        except OSError as error:
            todo = "try again once it can be" if error.errno else "fetch the file again"
            raise InputError(f"{tensor.path}: tensor {name!r} cannot be read ({error.strerror}); {todo}") from None
        return data.reshape(shape)


def safetensors(folder: Path) -> Tensors:
    """The tensors of a folder with `model.safetensors`, or `model-*.safetensors` and their index.

    A folder with both is read as its `model.safetensors`, as `transformers` does.

    Raises:
        InputError: names the file, for anything missing or truncated, and for a tensor that the index passes over.
    """
    if (folder / SINGLE).exists():
        return Tensors(folder, _header(folder / SINGLE))
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict):
            raise InputError(f"{folder / INDEX}: it has no weight_map that says which file holds which tensor")
        if wrong := [name for name, file in names.items() if not isinstance(file, str) or Path(file).name != file]:
            raise InputError(
                f"{folder / INDEX}: tensor {wrong[0]!r} is said to be in {names[wrong[0]]!r}, "
                "which is no file name in this folder"
            )
        files = {file: _header(folder / file) for file in dict.fromkeys(names.values())}
        where = {}
        for name, file in names.items():
            if name not in files[file]:
                raise InputError(f"{folder / file}: tensor {name!r} is not in it, where the index says it is")
            where[name] = files[file][name]
        for file, header in files.items():
            if other := [name for name in header if names.get(name) != file]:
                said = f"names {names[other[0]]} for it" if other[0] in names else "does not name it"
                raise InputError(f"{folder / file}: tensor {other[0]!r} is in it, but {INDEX} {said}; fetch both again")
        ends = {shard[1] for file in files if (shard := _SHARD.fullmatch(file))}
        of_this_set = [path for end in ends for path in folder.glob(f"model-?????{end}")]
        if left_out := sorted({path.name for path in of_this_set} - files.keys()):
            raise InputError(f"{folder / left_out[0]}: {INDEX} names no tensor of it; fetch both again")
        return Tensors(folder, where)
    pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
    hint = (
        f" ({pickled[0]} is a pickle, which is never opened; convert it to safetensors: "
        "safetensors.torch.save_file(state_dict, 'model.safetensors'))"
    )
    raise InputError(f"{folder}: no {SINGLE} and no {INDEX} here{hint if pickled else ''}")


def _header(path: Path) -> dict[str, Tensor]:
    """Where the tensors of a file are; the library has checked by then that they fill it."""
    if not path.is_file():
        what = "is no regular file" if path.exists() else "this file is missing; the index names it"
        raise InputError(f"{path}: {what}")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); try again once it can be") from None
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length).decode())
    except (SafetensorError, OSError, ValueError) as error:
        what = _what_is_cut(path) or f"no whole safetensors file ({error})"
        raise InputError(f"{path}: {what}; fetch it again") from None
    found = {}
    for name, facts in header.items():
        if name != "__metadata__":
            begin, end = facts["data_offsets"]
            dtype = (DTYPES | _OTHERS).get(facts["dtype"], facts["dtype"])
            found[name] = Tensor(path, tuple(facts["shape"]), dtype, ((8 + length + begin, end - begin),))
    return found


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


class Written(NamedTuple):
    """A tensor that is to be written: its values are made when it is its turn."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def made(self) -> np.ndarray:
        """The values, contiguous."""
        value = np.ascontiguousarray(self.value()).reshape(self.shape)
        if value.dtype != self.dtype:
            raise AssertionError(f"{self.name} is of {value.dtype}, not what was said: {self.dtype}")
        return value


def write_safetensors(folder: Path, tensors: Iterable[Written], shard_bytes: int) -> None:
    """Writes tensors one at a time; more than `shard_bytes` are cut into files with an index beside them.

    A file appears under its name when it is whole.
    """
    shards: list[list[Written]] = [[]]
    room, total = shard_bytes, 0
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room, total = room - tensor.nbytes, total + tensor.nbytes
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard)
    if len(shards) > 1:
        where = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, tensors: list[Written]) -> None:
    # As in the library's own files, tensors of wider dtypes come first, so that each begins at a multiple of its width.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    names = {numpy: name for name, numpy in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        facts = {"dtype": names[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[tensor.name] = facts
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with unfinished(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            write_values(file, tensor.made())


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_values(file: BinaryIO, values: np.ndarray) -> None:
    """Writes the values of a contiguous array without a further copy of them."""
    file.write(values.reshape(-1).view(np.uint8).data)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: there is no such file, or none in it.
    """
    return read_record(path, dict[str, Any], advice="a checkpoint folder holds config.json and safetensors")
