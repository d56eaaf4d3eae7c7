"""Tokenizers behind one small interface: SentencePiece models, Hugging Face tokenizer.json files, raw bytes.

`encode` and `encode_blocks` encode plain text: control tokens spelled out in a text ("</s>") are text, no tokens are
added in front or at the end, nothing is truncated. BOS and EOS are added when documents are stored.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from tttlm.data.cut_rules import rule_of_sentencepiece, rule_of_tokenizer_json
from tttlm.data.cutting import ANYWHERE, CutRule
from tttlm.errors import InputError

Kind = Literal["sentencepiece", "tokenizers", "bytes"]
FileName = Literal["tokenizer.model", "tokenizer.json", ""]

TRAINED: FileName = "tokenizer.model"


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    Attributes:
        kind: "sentencepiece", "tokenizers" or "bytes".
        vocab_size: upper bound (exclusive) of the ids.
        bos_id, eos_id: the control tokens around a document; None if there is none.
        entry_id: the token in front of a document when it is read (its first input); None if there is none.
        fingerprint: changes with anything that changes what `encode` returns.
        file_name, file_bytes: name and content of its file in a prepared folder; "" for raw bytes.
        cut_rule: where text may be cut without changing its tokens.
    """

    kind: Kind
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    entry_id: int | None
    file_name: FileName
    file_bytes: bytes
    cut_rule: CutRule

    @property
    def fingerprint(self) -> str:
        """Identifies the tokenizer and its control tokens."""
        ...

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None if there is no such token."""
        ...

    def name_controls(self, bos_id: int | None, eos_id: int | None) -> None:
        """Sets the control tokens; `entry_id` is then the EOS, or the BOS if there is no EOS."""
        ...

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without control tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes tokens to text; control tokens are dropped."""
        ...

    def encode_blocks(self, blocks: Sequence[tuple[str, bool]]) -> list[np.ndarray]:
        """Encodes blocks of text; the flag says that a block begins at a cut that `CutRule` allowed."""
        ...


@dataclass(frozen=True)
class TokenizerFacts:
    """Metadata that is stored with a tokenizer's file.

    Attributes:
        kind: "sentencepiece", "tokenizers" or "bytes".
        file: the name of its file; "" for bytes, which have none.
        bytes, sha256: length and digest of that file.
        fingerprint: changes with anything that changes tokens or control tokens.
        vocab_size: upper bound (exclusive) of the ids.
        bos_id, eos_id, entry_id: as in `Tokenizer`.
    """

    kind: Kind
    file: FileName
    bytes: int
    sha256: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    entry_id: int | None


def facts_of(tokenizer: Tokenizer) -> TokenizerFacts:
    """The metadata that is stored with a tokenizer's file."""
    return TokenizerFacts(
        kind=tokenizer.kind,
        file=tokenizer.file_name,
        bytes=len(tokenizer.file_bytes),
        sha256=hashlib.sha256(tokenizer.file_bytes).hexdigest(),
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        entry_id=tokenizer.entry_id,
    )


class _Described:
    kind: Kind
    file_bytes: bytes
    bos_id: int | None
    eos_id: int | None
    entry_id: int | None

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.kind} {self.bos_id} {self.eos_id} ".encode() + self.file_bytes).hexdigest()

    def name_controls(self, bos_id: int | None, eos_id: int | None) -> None:
        self.bos_id, self.eos_id = bos_id, eos_id
        self.entry_id = bos_id if eos_id is None else eos_id


class _InPieces(_Described):
    """Encodes blocks in many short pieces, each as if it were inside a text."""

    cut_rule: CutRule

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        return self.encode_blocks([(text, False)])[0].tolist()

    @cached_property
    def _guard_tokens(self) -> int:
        return len(self._encode_batch([self.cut_rule.guard])[0]) if self.cut_rule.guard else 0

    def encode_blocks(self, blocks: Sequence[tuple[str, bool]]) -> list[np.ndarray]:
        guard = self.cut_rule.guard
        guard_tokens = self._guard_tokens
        texts: list[str] = []
        strip: list[int] = []
        ends: list[int] = []
        for text, continues in blocks:
            for piece in self.cut_rule.pieces(text):
                if continues:
                    texts.append(guard + piece)
                    strip.append(guard_tokens)
                else:
                    texts.append(piece)
                    strip.append(0)
                continues = True
            ends.append(len(texts))
        ids = self._encode_batch(texts)
        out, begin = [], 0
        for end in ends:
            out.append(_joined(ids[begin:end], strip[begin:end]))
            begin = end
        return out


def _joined(ids: list[list[int]], strip: list[int]) -> np.ndarray:
    flat: list[int] = []
    for part, skip in zip(ids, strip, strict=True):
        flat += part[skip:] if skip else part
    return np.array(flat, np.uint32)


class SentencePieceTokenizer(_InPieces):
    """A SentencePiece model (`.model`), BPE or Unigram."""

    kind: Kind = "sentencepiece"
    file_name = TRAINED

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.file_bytes = model
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._model.get_piece_size()
        # SentencePiece returns a negative id if the model has none.
        bos_id, eos_id = self._model.bos_id(), self._model.eos_id()
        self.name_controls(bos_id if bos_id >= 0 else None, eos_id if eos_id >= 0 else None)
        self.cut_rule = rule_of_sentencepiece(model)

    def id_of(self, token: str) -> int | None:
        number = self._model.piece_to_id(token)  # the id of <unk> if there is no such piece
        return number if self._model.id_to_piece(number) == token else None

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])


class HuggingFaceTokenizer(_InPieces):
    """A `tokenizer.json`, run by the `tokenizers` package."""

    kind: Kind = "tokenizers"
    file_name: FileName = "tokenizer.json"

    def __init__(self, text: bytes) -> None:
        import tokenizers

        self.file_bytes = text
        self._model = tokenizers.Tokenizer.from_str(text.decode())
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        if not vocabulary or max(vocabulary.values()) >= 1 << 31:
            raise ValueError("it has no tokens, or ids beyond 2**31")
        self.vocab_size = max(vocabulary.values()) + 1
        self.name_controls(None, None)
        self.cut_rule = rule_of_tokenizer_json(json.loads(text))

    def id_of(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


class ByteTokenizer(_Described):
    """A tokenizer without a vocabulary: every byte of UTF-8 is a token; 256 is BOS and 257 is EOS."""

    kind: Kind = "bytes"
    file_name: FileName = ""
    file_bytes = b""
    vocab_size = 258
    cut_rule = ANYWHERE

    def __init__(self) -> None:
        self.name_controls(256, 257)

    def id_of(self, token: str) -> int | None:
        return None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def encode_blocks(self, blocks: Sequence[tuple[str, bool]]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text, _ in blocks]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a SentencePiece BPE with byte fallback, split digits and no normalisation, so that decoding is lossless.

    Args:
        texts: the sample; it is cut into short texts that keep their newlines, so that pieces may contain newlines.
        vocab_size: number of pieces, including the 256 bytes and 3 control tokens.

    Raises:
        InputError: the sample is too small for that many pieces.
    """
    import sentencepiece

    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for text in texts for piece in _stretches(text)),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9999,
            max_sentence_length=1 << 20,
            num_threads=8,  # stored in the model, so it must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        why = f"there are at most {most[1]} in it" if most else str(error).strip().splitlines()[-1]
        raise InputError(
            f"a tokenizer of {vocab_size} pieces cannot be trained on this sample: {why}; "
            "ask for a smaller vocab_size or give more text"
        ) from error
    return SentencePieceTokenizer(out.getvalue())


def _stretches(text: str) -> Iterable[str]:
    return (text[i : i + 4_000].replace("\0", " ") for i in range(0, len(text), 4_000))
