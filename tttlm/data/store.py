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
import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
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
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if not wait:
                raise InputError(
                    f"{folder} is being prepared by another process; wait for it, or choose another folder"
                ) from error
            print(f"waiting for the process that prepares {folder}", file=sys.stderr, flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class PartWriter:
    """Writes one shard under a hidden name; `commit` puts it in place."""

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self.final = folder / part_name(number)
        self._folder = folder / f".{part_name(number)}.tmp"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._dtype = dtype
        self._tokens = {split: (self._folder / f"{split}.tokens").open("wb") for split in SPLITS}
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
    """The tokens of one split of a prepared folder, mapped into memory: its shards as one long array.

    Attributes:
        tokens: one array per shard; `starts[i]` is the number of tokens before shard i.
    """

    def __init__(self, folder: str | Path, name: str, manifest: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = manifest or read_manifest(folder)
        self.name = name
        self._dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self._parts = [i for i, part in enumerate(self.manifest["parts"]) if part["splits"][name]["documents"]]
        self.tokens = [self._mapped(part, "tokens", self._dtype) for part in self._parts]
        self.starts = [0, *accumulate(len(tokens) for tokens in self.tokens)]

    def __len__(self) -> int:
        """Tokens in all."""
        return self.starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens from `start` to `stop`, wherever shards end."""
        shard = bisect_right(self.starts, start) - 1
        first = start - self.starts[shard]
        out = self.tokens[shard][first : first + stop - start]
        if len(out) == stop - start:
            return out
        return np.concatenate([out, self.read(start + len(out), stop)])

    def index(self) -> np.ndarray:
        """The document index of all shards (`DOCUMENT`)."""
        return np.concatenate(
            [self._mapped(part, "documents", DOCUMENT) for part in self._parts] or [np.empty(0, DOCUMENT)]
        )

    def names(self) -> Iterator[str]:
        """What each document is called: its file, and the record's number from the second record on."""
        for part in self._parts:
            files = read_json(self.folder / part_name(part) / "part.json")["names"]
            for document in self._mapped(part, "documents", DOCUMENT):
                file, record = files[document["file"]], int(document["record"])
                yield f"{file}:{record + 1}" if record else file

    def _mapped(self, part: int, kind: str, dtype: np.dtype) -> np.ndarray:
        name = f"{self.name}.{kind}"
        path = self.folder / part_name(part) / name
        check_size(path, self.manifest["parts"][part]["files"][name]["bytes"])
        return np.memmap(path, dtype, mode="r").view(np.ndarray)


class Documents:
    """The documents of a split as training pairs: position p of a document is (input, target) p.

    Where documents are stored without a BOS, the first input is the EOS that ends the document before, as it is
    where documents are joined: every token of a document is then a target.

    Attributes:
        positions: pairs of each document, int64 [documents].
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        tokens = split.index()["tokens"].astype(np.int64)
        manifest = split.manifest
        self._entry = manifest["tokenizer"]["eos_id"] if manifest["eos"] and not manifest["bos"] else None
        self._starts = np.cumsum(tokens) - tokens
        self.positions = tokens if self._entry is not None else np.maximum(tokens - 1, 0)

    def pairs(self, document: int, begin: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of positions `begin` to `stop` of a document."""
        start = int(self._starts[document])
        if self._entry is None:
            tokens = self._split.read(start + begin, start + stop + 1)
            return tokens[:-1], tokens[1:]
        targets = self._split.read(start + begin, start + stop)
        before = self._entry if begin == 0 else self._split.read(start + begin - 1, start + begin)[0]
        inputs = np.empty_like(targets)
        inputs[0], inputs[1:] = before, targets[:-1]
        return inputs, targets


def check_size(path: Path, size: int) -> None:
    """Raises InputError where a file is missing or not as long as it was written."""
    try:
        actual = path.stat().st_size
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; copy it again or prepare the folder again") from error
    if actual != size:
        raise InputError(
            f"{path} has {actual} bytes, was written with {size}; copy it again or prepare the folder again"
        )
