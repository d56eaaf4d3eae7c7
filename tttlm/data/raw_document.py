"""A document before it is tokenized, and the interface of its sources."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tttlm.data.finding import Skipped
from tttlm.data.store import FileState

_KEEP_BYTES = 16 << 20


@dataclass
class RawDocument:
    """A document before it is tokenized.

    Attributes:
        file: number of the file within the source.
        record: number of the line or row within the file.
        key: a hash of the content; equal documents have equal keys.
        chunks: its bytes, to be read once; a large file is never in memory as a whole.
        split: "train" or "validation" if the source decides; "" if the key does.
    """

    file: int
    record: int
    key: int
    chunks: Iterator[bytes]
    split: str = ""


# path -> (state, digest) of the files of a source
FileDigests = dict[str, tuple[FileState, str]]


class Source(Protocol):
    """A sequence of documents.

    Attributes:
        names: names of the files, by number; the records of a dataset have one name.
        total: bytes to read; None if unknown.
        read: bytes read so far, counted as in `total`.
        empty: number of documents skipped so far because they have no text.
        skipped: the files and folders that are skipped.
        digests: the digests that `fingerprint` computed, to be passed to it by a later run.
    """

    names: list[str]
    total: int | None
    read: int
    empty: int
    skipped: Skipped
    digests: FileDigests

    def fingerprint(self, digests: FileDigests) -> dict[str, Any]:
        """Identifies the source and its content; files that are unchanged since `digests` are not read again."""
        ...

    def documents(self) -> Iterator[RawDocument]:
        """The documents from the current position on."""
        ...

    def position(self) -> Any:
        """The position of the next document, as a JSON value."""
        ...

    def seek(self, position: Any) -> None:
        """Moves to a position that `position()` returned, also in another process."""
        ...


def keyed(chunks: Iterable[bytes]) -> tuple[int, int, list[bytes] | None]:
    """(key, bytes, content) of a document: 64 bits of a hash of the content, its length, and the content itself.

    The key decides the split of a document, so it is computed before the first token is written. The content of a
    document too large for memory is returned as None, to be read again.
    """
    digest = hashlib.blake2b(digest_size=8)
    kept: list[bytes] | None = []
    size = 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        kept = None if kept is None or size > _KEEP_BYTES else [*kept, chunk]
    return int.from_bytes(digest.digest(), "little"), size, kept
