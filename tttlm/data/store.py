"""Prepared data on disk: what a folder holds, how a shard is written in one stroke, how it is mapped into memory.

folder/
  prepare.json              what it is being made from; the same source and tokenizer may go on with it
  tokenizer.model | .json   the tokenizer itself
  part-00000/               a shard, put in place by one rename when it is whole
    train.tokens            token ids, little-endian uint16 or uint32
    train.documents         one `DOCUMENT` record each
    validation.tokens, validation.documents
    part.json               counts, and where the source goes on after it
  manifest.json             written last: counts and the sha256 of every file; with it the folder is complete
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tttlm.errors import InputError

FORMAT = 1
SPLITS = ("train", "validation")
DOCUMENT = np.dtype(
    [("tokens", "<u8"), ("bytes", "<u8"), ("key", "<u8"), ("record", "<u8"), ("file", "<u4")]
)  # file: number in part.json's list of names
SUMS = ("documents", "tokens", "bytes")  # of each split
COUNTS = ("empty", "invalid_utf8", "forced_cuts")  # of documents that were not plain
MANIFEST = "manifest.json"
BEGUN = "prepare.json"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file so that it is there whole or not at all."""
    write_file(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_file(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the folder for one writer; the lock goes with the process, however that ends.

    Raises:
        InputError: another process holds it and `wait` is not set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise InputError(
                f"{folder} is being prepared by another process; wait for it, or choose another folder"
            ) from error
        yield


class PartWriter:
    """Writes one shard under a hidden name; `commit` puts it in place."""

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self.final = folder / part_name(number)
        self._folder = folder / f".{part_name(number)}.tmp"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._dtype = dtype
        self._tokens = {split: open(self._folder / f"{split}.tokens", "wb") for split in SPLITS}
        self._documents: dict[str, list[tuple[int, int, int, int, int]]] = {split: [] for split in SPLITS}
        self._names: dict[str, int] = {}

    def write(self, split: str, tokens: np.ndarray) -> None:
        self._tokens[split].write(np.ascontiguousarray(tokens, self._dtype).data)

    def place(self, split: str) -> int:
        """Bytes of tokens so far, to go back to by `cut`."""
        return self._tokens[split].tell()

    def cut(self, split: str, place: int) -> None:
        """Forgets the tokens written after `place`."""
        self._tokens[split].seek(place)
        self._tokens[split].truncate()

    def end_document(self, split: str, tokens: int, size: int, key: int, name: str, record: int) -> None:
        file = self._names.setdefault(name, len(self._names))
        self._documents[split].append((tokens, size, key, record, file))

    def commit(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Puts the shard in place; returns its part.json."""
        counts, files = {}, {}
        for split in SPLITS:
            documents = np.array(self._documents[split], DOCUMENT)
            counts[split] = {
                "documents": len(documents),
                "tokens": int(documents["tokens"].sum()),
                "bytes": int(documents["bytes"].sum()),
            }
            stream = self._tokens[split]
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            with open(self._folder / f"{split}.documents", "wb") as index:
                index.write(documents.tobytes())
                index.flush()
                os.fsync(index.fileno())
            for name in (f"{split}.tokens", f"{split}.documents"):
                path = self._folder / name
                files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        part = {"splits": counts, "files": files, "names": list(self._names), **facts}
        write_json(self._folder / "part.json", part)
        os.rename(self._folder, self.final)
        sync_folder(self.final.parent)
        return part

    def discard(self) -> None:
        for stream in self._tokens.values():
            stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def read_parts(folder: Path) -> list[dict[str, Any]]:
    """The part.json of every shard in place, in order."""
    parts: list[dict[str, Any]] = []
    while (path := folder / part_name(len(parts)) / "part.json").exists():
        parts.append(json.loads(path.read_text()))
    return parts


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a complete folder.

    Raises:
        InputError: there is none, it is of another version, or it cannot be read.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        if (folder / BEGUN).exists():
            raise InputError(f"{folder} is not finished; run the same prepare command again to go on") from error
        what = "holds no prepared data" if folder.is_dir() else "does not exist"
        raise InputError(f"{folder} {what}; make it with `python -m tttlm.cli.prepare`") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / MANIFEST} cannot be read ({error}); prepare the folder again") from error
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{folder} is of format {manifest.get('format')}, this version reads {FORMAT}; prepare it again"
        )
    return manifest


class Split:
    """One split of a prepared folder, mapped into memory: all its tokens and documents, in order.

    Attributes:
        tokens: one array per shard; `starts[i]` is the number of tokens before shard i.
        documents: the document index of all shards (`DOCUMENT`).
        ends: where each document ends, counted in tokens from the beginning.
    """

    def __init__(self, folder: str | Path, split: str, manifest: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = manifest or read_manifest(folder)
        self.split = split
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self.tokens, self._documents = [], []
        for number, part in enumerate(self.manifest["parts"]):
            if not part["splits"][split]["documents"]:
                continue
            for array, kind, name in (
                (self.tokens, dtype, f"{split}.tokens"),
                (self._documents, DOCUMENT, f"{split}.documents"),
            ):
                path = self.folder / part_name(number) / name
                array.append(_mapped(path, kind, part["files"][name]["bytes"]))
        self.starts = np.concatenate([[0], np.cumsum([len(t) for t in self.tokens])]).astype(np.int64)

    def __len__(self) -> int:
        """Tokens in all."""
        return int(self.starts[-1])

    @property
    def documents(self) -> np.ndarray:
        return np.concatenate(self._documents) if self._documents else np.empty(0, DOCUMENT)

    @property
    def ends(self) -> np.ndarray:
        return np.cumsum(self.documents["tokens"].astype(np.int64))

    def names(self) -> Iterator[str]:
        """What each document is called: its file, and the record's number where the file has several."""
        for number, part in enumerate(self.manifest["parts"]):
            if part["splits"][self.split]["documents"]:
                files = read_json(self.folder / part_name(number) / "part.json")["names"]
                documents = np.fromfile(self.folder / part_name(number) / f"{self.split}.documents", DOCUMENT)
                for document in documents:
                    file, record = files[document["file"]], int(document["record"])
                    yield f"{file}:{record + 1}" if record else file

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens from `start` to `stop`, wherever shards end."""
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        first = start - int(self.starts[shard])
        out = self.tokens[shard][first : first + stop - start]
        if len(out) == stop - start:
            return out
        return np.concatenate([out, self.read(start + len(out), stop)])


def _mapped(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    try:
        actual = path.stat().st_size
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; copy it again or prepare the folder again") from error
    if actual != size:
        raise InputError(
            f"{path} has {actual} bytes, the manifest says {size}; copy it again or prepare the folder again"
        )
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)
