"""Prepared data on disk: the format of a folder, and reading it by memory mapping (`writing` writes it).

folder/
  prepare.json              source, tokenizer and configuration; a run with the same ones may resume
  tokenizer.model | .json   the tokenizer itself
  part-00000/               a shard, published by one rename when it is complete
    train.tokens            token ids, little-endian uint16 or uint32
    train.documents         one `DOCUMENT` record each
    validation.tokens, validation.documents
    part.json               counts, and the position in the source after it
  manifest.json             written last: counts and the sha256 of every file; it makes the folder complete
"""

import contextlib
import errno
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tttlm.data.tokenizer import TokenizerFacts
from tttlm.errors import InputError
from tttlm.records import read_record

FORMAT = 3
SPLITS = ("train", "validation")
DOCUMENT = np.dtype(
    [("tokens", "<u8"), ("bytes", "<u8"), ("key", "<u8"), ("record", "<u8"), ("file", "<u4")]
)  # file: index in part.json's list of names
MANIFEST = "manifest.json"
PREPARATION = "prepare.json"
PART = "part.json"
_ADVICE = "copy it again or prepare the folder again"


@dataclass(frozen=True)
class FileFacts:
    """Length and digest of a file of a prepared folder when it was written.

    Attributes:
        bytes: its length.
        sha256: the digest of its content.
    """

    bytes: int
    sha256: str


class FileState(NamedTuple):
    """Metadata of a file; every change of its content changes one of these.

    Attributes:
        bytes: its length.
        modified, changed: `st_mtime_ns` and `st_ctime_ns`.
        inode: its inode number.
    """

    bytes: int
    modified: int
    changed: int
    inode: int


@dataclass(frozen=True)
class Sums:
    """Totals of a split."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Counts:
    """Counts of irregular documents.

    Attributes:
        empty: documents skipped because they have no text.
        invalid_utf8: documents with invalid UTF-8, repaired or skipped as configured.
    """

    empty: int = 0
    invalid_utf8: int = 0


@dataclass(frozen=True)
class Part:
    """Content of `part.json`, the facts of a shard.

    Attributes:
        number: index of the shard, from 0.
        identity: `Preparation.digest` of the folder.
        splits: totals of each split.
        files: the shard's other files.
        names: names of the files its documents come from; the document index refers to them by number.
        position: the position in the source after it.
        counts: counts of its irregular documents.
    """

    number: int
    identity: str
    splits: dict[str, Sums]
    files: dict[str, FileFacts]
    names: list[str]
    position: Any
    counts: Counts


@dataclass(frozen=True)
class PartFacts:
    """A shard in the manifest: the totals of its splits, and all of its files."""

    splits: dict[str, Sums]
    files: dict[str, FileFacts]


@dataclass(frozen=True)
class Preparation:
    """Content of `prepare.json`: the identity of the source, tokenizer and settings, and the full configuration."""

    format: int
    identity: dict[str, Any]
    config: dict[str, Any]

    @property
    def digest(self) -> str:
        """A digest of the identity, stored in every shard."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`, the facts of a complete folder.

    Attributes:
        format: `FORMAT`.
        config: the configuration it was prepared with.
        source: the identity of the source.
        tokenizer: the tokenizer that the tokens were made with.
        bos, eos: whether documents are stored with BOS and EOS.
        dtype: dtype of the token ids, "uint16" or "uint32".
        splits, counts: totals over all shards.
        fingerprint: changes with the tokens and the tokenizer.
        parts: the shards.
    """

    format: int
    config: dict[str, Any]
    source: dict[str, Any]
    tokenizer: TokenizerFacts
    bos: bool
    eos: bool
    dtype: Literal["uint16", "uint32"]
    splits: dict[str, Sums]
    counts: Counts
    fingerprint: str
    parts: list[PartFacts]


@contextlib.contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Turns errors of the operating system while a prepared folder is read into one line.

    Raises:
        InputError: names the file and the reason.
    """
    try:
        yield
    except OSError as error:
        at = error.filename if isinstance(error.filename, (str, Path)) else folder
        hint = "; raise the limit of open files (ulimit -n)" if error.errno == errno.EMFILE else ""
        raise InputError(f"{at} cannot be read: {error.strerror or error}{hint}") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_state(path: Path) -> FileState:
    status = path.stat()
    return FileState(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def facts_of_file(path: Path) -> tuple[FileFacts, FileState]:
    """Computes the length and digest of a file, and returns them with its state while it was read."""
    state = file_state(path)
    return FileFacts(state.bytes, sha256(path)), state


def read_part(folder: Path, number: int, advice: str = _ADVICE) -> Part:
    """Reads the part.json of a shard.

    Raises:
        InputError: the file is missing, altered, or of another shard.
    """
    path = folder / part_name(number) / PART
    part = read_record(
        path, Part, advice=advice, sealed=True, max_bytes=1 << 30
    )  # it has the name of every source file
    if part.number != number:
        raise InputError(f"{path} belongs to shard {part.number}; {advice}")
    return part


def count_parts(folder: Path) -> int:
    """Counts the finished shards, including missing ones before the last."""
    numbers = [int(path.name[5:]) for path in folder.glob("part-*") if re.fullmatch("part-[0-9]{5,9}", path.name)]
    return max(numbers, default=-1) + 1


def read_preparation(folder: Path) -> Preparation:
    """Reads prepare.json.

    Raises:
        InputError: the file cannot be read, or has another format.
    """
    advice = "choose another folder, or delete this one"
    return read_record(folder / PREPARATION, Preparation, advice=advice, format=FORMAT, sealed=True)


def read_manifest(folder: str | Path) -> Manifest:
    """Reads the manifest of a complete folder.

    Raises:
        InputError: there is none, it has another format, or it was altered.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        if (folder / PREPARATION).exists():
            raise InputError(f"{folder} is not finished; run the same prepare command again to resume")
        what = "holds no prepared data" if folder.is_dir() else "does not exist"
        raise InputError(f"{folder} {what}; make it with `python -m tttlm.cli.prepare`")
    return read_record(folder / MANIFEST, Manifest, advice="prepare the folder again", format=FORMAT, sealed=True)


class Split:
    """The memory-mapped tokens of one split of a prepared folder: its shards as one long array.

    Attributes:
        tokens: one array per shard; `starts[i]` is the number of tokens before shard i.
    """

    def __init__(self, folder: str | Path, name: str, manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = manifest or read_manifest(folder)
        self.name = name
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._parts = [i for i, part in enumerate(self.manifest.parts) if part.splits[name].documents]
        self.tokens = [self._mapped(part, "tokens", self._dtype) for part in self._parts]
        self.starts = [0, *accumulate(len(tokens) for tokens in self.tokens)]

    def __len__(self) -> int:
        """The number of tokens."""
        return self.starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads the tokens from `start` to `stop`, across shards."""
        shard = bisect_right(self.starts, start) - 1
        first = start - self.starts[shard]
        out = self.tokens[shard][first : first + stop - start]
        if len(out) == stop - start:
            return out
        return np.concatenate([out, self.read(start + len(out), stop)])

    def index(self) -> np.ndarray:
        """Reads the document index of all shards (`DOCUMENT`)."""
        return np.concatenate(
            [self._mapped(part, "documents", DOCUMENT) for part in self._parts] or [np.empty(0, DOCUMENT)]
        )

    def names(self) -> Iterator[str]:
        """Yields the name of each document: its file, and the record's number from the second record on."""
        for part in self._parts:
            files = read_part(self.folder, part).names
            for document in self._mapped(part, "documents", DOCUMENT):
                file, record = files[document["file"]], int(document["record"])
                yield f"{file}:{record + 1}" if record else file

    def _mapped(self, part: int, kind: str, dtype: np.dtype) -> np.ndarray:
        name = f"{self.name}.{kind}"
        path = self.folder / part_name(part) / name
        check_size(path, self.manifest.parts[part].files[name].bytes)
        with reading(path):
            return np.memmap(path, dtype, mode="r").view(np.ndarray)


class Documents:
    """The documents of a split as training pairs: position p of a document is (input, target) p.

    If documents are stored without a BOS, the first input is the EOS of the previous document, as in joined documents,
    so that every token of a document is a target.

    Attributes:
        positions: number of pairs of each document, int64 [documents].
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        tokens = split.index()["tokens"].astype(np.int64)
        manifest = split.manifest
        self._entry = manifest.tokenizer.eos_id if manifest.eos and not manifest.bos else None
        self._starts = np.cumsum(tokens) - tokens
        self.positions = tokens if self._entry is not None else np.maximum(tokens - 1, 0)

    def pairs(self, document: int, begin: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads the inputs and targets of positions `begin` to `stop` of a document."""
        start = int(self._starts[document])
        if self._entry is None:
            tokens = self._split.read(start + begin, start + stop + 1)
            return tokens[:-1], tokens[1:]
        targets = self._split.read(start + begin, start + stop)
        before = self._entry if begin == 0 else self._split.read(start + begin - 1, start + begin)[0]
        inputs = np.empty_like(targets)
        inputs[0], inputs[1:] = before, targets[:-1]
        return inputs, targets


def check_size(path: Path, size: int, advice: str = _ADVICE) -> None:
    """Raises `InputError` if a file is missing or its length is not `size` bytes."""
    with reading(path):
        if not path.exists():
            raise InputError(f"{path} is missing; {advice}")
        actual = path.stat().st_size
    if actual != size:
        raise InputError(f"{path} has {actual} bytes, was written with {size}; {advice}")
