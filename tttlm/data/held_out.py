"""Documents for evaluation: held-out ones of a prepared folder, or any text file, as streams of tokens and bytes.

The first input of a document is the token in front of it in training (BOS if documents are stored with one, else the
EOS of the previous document), so that every token of the document is predicted and bits per byte count all its bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tttlm.data.integrity import verify
from tttlm.data.store import Split
from tttlm.data.text_files import read_text
from tttlm.data.tokenizer import Tokenizer
from tttlm.data.workers import encode_task
from tttlm.errors import InputError


@dataclass(frozen=True)
class Document:
    """A document to evaluate on.

    Attributes:
        tokens: uint array [T]; the first one is the BOS or EOS in front of the document, not part of its text.
        bytes: length of the document's text in UTF-8.
        name: its file, and the number of the record if the file has several.
    """

    tokens: np.ndarray
    bytes: int
    name: str


def held_out_documents(path: str | Path, split: str = "validation") -> Iterator[Document]:
    """Yields the documents of one split of a prepared folder, in the order of the source.

    Raises:
        InputError: the folder is not complete, a file of it was altered, or it has no documents in that split.
    """
    manifest = verify(path)
    stored = Split(path, split, manifest)
    documents, names = stored.index(), stored.names()
    if not len(documents):
        raise InputError(f"{path} has no {split} documents; prepare it again with another --held_out")
    # A stored BOS is already in front.
    entry = manifest.tokenizer.eos_id if manifest.eos and not manifest.bos else None
    prefix = np.array([] if entry is None else [entry], np.dtype(manifest.dtype))
    start = 0
    for document, name in zip(documents, names, strict=True):
        stop = start + int(document["tokens"])
        tokens = stored.read(start, stop)
        yield Document(np.concatenate([prefix, tokens]), int(document["bytes"]), name)
        start = stop


def encode_file(path: str | Path, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """Encodes a text file of any length in pieces: yields `(uint32 tokens [T], bytes of text)`.

    Memory is constant if the tokenizer allows cuts (see `tttlm.data.cut_rules`), else it grows with the file.

    Concatenated, the tokens are `tokenizer.entry_id` followed by those of `tokenizer.encode` for the complete text.
    Invalid UTF-8 is read as U+FFFD; .gz, .zst, .xz and .bz2 are decompressed.

    Raises:
        InputError: the file does not exist, is damaged, has no text, or has too much text without an allowed cut.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"text file {path} does not exist")
    prefix = np.array([] if tokenizer.entry_id is None else [tokenizer.entry_id], np.uint32)
    continues, empty = False, True
    for block in tokenizer.cut_rule.blocks(read_text(path), f"text file {path}"):
        (encoded,) = encode_task(tokenizer, "uint32", [(block, continues)])
        yield np.concatenate([prefix, encoded.tokens]) if empty else encoded.tokens, len(block)
        continues, empty = True, False
    if empty:
        raise InputError(f"text file {path} is empty; nothing to evaluate")
