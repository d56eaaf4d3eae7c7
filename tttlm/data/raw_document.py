"""A document before it is tokenized, and what every source of such documents offers."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tttlm.data.finding import PassedOver
from tttlm.data.store import FileState

_KEEP_BYTES = 16 << 20


@dataclass
class RawDocument:
    """A document before it is tokenized.

    Attributes:
        file: number of the file within the source.
        record: number of the line or row within the file.
        key: a hash of the content, the same wherever the same bytes are met.
        chunks: its bytes, to be read once; a large file is never held whole.
        split: "train" or "validation" where the source decides; "" where the key does.
    """

    file: int
    record: int
    key: int
    chunks: Iterator[bytes]
    split: str = ""


# path -> (state, digest) of files that were read and recognised before
Known = dict[str, tuple[FileState, str]]


class Source(Protocol):
    """A sequence of documents.

    Attributes:
        names: what the files are called, by number; one name stands for the records of a dataset.
        total: bytes there are to read, None when unknown.
        read: bytes read so far, of the same kind.
        empty: documents passed over so far because there is no text in them.
        passed_over: what was met and is not read.
        known: files that were read and recognised, to be handed to `fingerprint` another time.
    """

    names: list[str]
    total: int | None
    read: int
    empty: int
    passed_over: PassedOver
    known: Known

    def fingerprint(self, known: Known) -> dict[str, Any]:
        """What tells this source from another, its content included; `known` files are not read again."""
        ...

    def documents(self) -> Iterator[RawDocument]:
        """The documents from the present position on."""
        ...

    def position(self) -> Any:
        """Where the next document begins; something JSON can hold."""
        ...

    def seek(self, position: Any) -> None:
        """Goes to a position that `position()` gave earlier, in another process perhaps."""
        ...


def keyed(chunks: Iterable[bytes]) -> tuple[int, int, list[bytes] | None]:
    """(key, bytes, content) of a document: 64 bits of a hash of the content, its length, and the content itself.

    The key decides on which side of the train/validation line a document is, so it has to be known before the first
    token is written. A document too large to be kept comes back as None, to be read again.
    """
    digest = hashlib.blake2b(digest_size=8)
    kept: list[bytes] | None = []
    size = 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        kept = None if kept is None or size > _KEEP_BYTES else [*kept, chunk]
    return int.from_bytes(digest.digest(), "little"), size, kept
