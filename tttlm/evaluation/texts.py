"""The texts of an evaluation: files, folders and globs, each file a document; or the held-out documents of a run."""

import codecs
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from tttlm.data import Document, PrepareConfig, Tokenizer, encode_file
from tttlm.data.finding import find_files, printable
from tttlm.data.text_files import read_text
from tttlm.errors import InputError
from tttlm.evaluation.loss import Chunk
from tttlm.progress import say


class Text(Protocol):
    """A document."""

    @property
    def name(self) -> str:
        """The name of the text."""
        ...

    @property
    def digest(self) -> str:
        """A digest of its content."""
        ...

    def chunks(self, tokenizer: Tokenizer) -> Iterator[Chunk]:
        """Yields its tokens in pieces, after the BOS or EOS in front of it, with the number of their bytes."""
        ...

    @property
    def words(self) -> int:
        """Number of words, separated by white space."""
        ...


@dataclass(frozen=True)
class TextFile:
    """A text file as one document.

    Attributes:
        name: Its path relative to the given folder; with the folder, if another text has the same.
        path: The path of the file.
    """

    name: str
    path: Path

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of its decompressed text."""
        digest = hashlib.sha256()
        for block in read_text(self.path):
            digest.update(block)
        return digest.hexdigest()

    @cached_property
    def words(self) -> int:
        """Number of words, separated by white space."""
        count, rest = 0, b""
        for block in read_text(self.path):
            whole = rest + block
            parts = whole.split()
            # The last word may continue in the next block.
            rest = b"" if whole[-1:].isspace() or not parts else parts.pop()
            count += len(parts)
        return count + bool(rest)

    @cached_property
    def is_utf8(self) -> bool:
        """Whether it is valid UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for block in read_text(self.path):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
        return True

    def chunks(self, tokenizer: Tokenizer) -> Iterator[Chunk]:
        """Yields its tokens in pieces, in memory that does not grow with the file."""
        return encode_file(self.path, tokenizer)


@dataclass(frozen=True)
class StoredText:
    """A held-out document of a prepared folder.

    Attributes:
        name: Its name in the folder.
        document: Its tokens.
        tokenizer: The tokenizer of the folder.
    """

    name: str
    document: Document
    tokenizer: Tokenizer

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of its tokens."""
        return hashlib.sha256(np.asarray(self.document.tokens, np.uint32).tobytes()).hexdigest()

    @cached_property
    def words(self) -> int:
        """Number of words of its text."""
        return len(self.tokenizer.decode(self.document.tokens.tolist()).split())

    def chunks(self, tokenizer: Tokenizer) -> Iterator[Chunk]:
        """Yields its tokens as they are stored, for the tokenizer of the folder.

        Raises:
            InputError: The tokenizer is another one.
        """
        if tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise InputError(
                "held-out tokens of a run can be read by models of the same tokenizer only: name texts with --text"
            )
        yield np.asarray(self.document.tokens), self.document.bytes


def find_texts(names: Sequence[str]) -> list[TextFile]:
    """The text files that are named by files, folders and globs; those that are skipped are named on standard error.

    Raises:
        InputError: There is none, or one is empty or not a plain text file.
    """
    if "" in names:
        raise InputError("a name of --text is empty: name text files, folders or globs")
    files, skipped = find_files(PrepareConfig(source=tuple(names), tokenizer="bytes"))
    for file in files:
        if not file.size:
            skipped.note("empty files", file.name)
    for line in skipped.lines():
        say(line)
    found = [file for file in files if file.format == "text" and file.size]
    same = Counter(file.name for file in found)
    texts = [TextFile(file.name if same[file.name] == 1 else printable(str(file.path)), file.path) for file in found]
    if other := [file.name for file in files if file.format != "text"]:
        raise InputError(f"{other[0]} is not plain text: name text files, one document each, with --text")
    if not texts:
        raise InputError(f"there is no text in {', '.join(map(str, names))}: name text files or a folder of them")
    for text in texts:
        if not any(block.strip() for block in read_text(text.path)):
            raise InputError(f"text file {text.path} is empty; nothing to evaluate")
    return texts


def measure(text: Text, tokenizer: Tokenizer) -> tuple[int, int]:
    """The numbers of predicted tokens (all but the first) and of bytes of a document."""
    tokens = bytes_ = 0
    for part, size in text.chunks(tokenizer):
        tokens, bytes_ = tokens + len(part), bytes_ + size
    return tokens - 1, bytes_
