"""Tokenizers behind one small interface: SentencePiece models, Hugging Face tokenizer.json files, raw bytes.

`encode` and `encode_blocks` give plain text tokens: control tokens written out in a text ("</s>") are text, nothing
is put in front or behind, nothing is truncated. BOS and EOS are added where documents are stored.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from tttlm.data.cutting import CutRule
from tttlm.errors import InputError

TRAINED = "tokenizer.model"
_FILES = ("tokenizer.model", "tokenizer.json")
_GUARDS = "aoekz0"


class Tokenizer(Protocol):
    """What the rest of the library knows of a tokenizer.

    Attributes:
        vocab_size: ids are below this.
        bos_id, eos_id: the control tokens around a document; None where there is none.
        entry_id: the token a document is entered from, in front of its own; None where it has nothing in front.
        fingerprint: changes with anything that changes what `encode` returns.
        file_name, file_bytes: how it is stored beside the tokens; "" for raw bytes.
        cut_rule: where text may be cut without changing its tokens.
    """

    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    entry_id: int | None
    file_name: str
    file_bytes: bytes
    cut_rule: CutRule

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def encode_blocks(self, blocks: Sequence[tuple[str, bool]]) -> list[np.ndarray]:
        """Tokens of blocks of text; the flag says that a block goes on where `CutRule` allowed a cut."""
        ...


class _Described:
    kind: str
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
    """Encodes blocks through many short pieces, each as if it stood inside a text."""

    cut_rule: CutRule

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    @cached_property
    def _guard(self) -> tuple[str, int]:
        for letter in _GUARDS:
            if self.cut_rule.allows(letter):
                return letter, len(self._encode_batch([letter])[0])
        return "", 0

    def encode(self, text: str) -> list[int]:
        return self.encode_blocks([(text, False)])[0].tolist()

    def encode_blocks(self, blocks: Sequence[tuple[str, bool]]) -> list[np.ndarray]:
        guard, guard_tokens = self._guard
        texts: list[str] = []
        strip: list[int] = []
        ends: list[int] = []
        for text, goes_on in blocks:
            for piece in self.cut_rule.pieces(text) if guard else (text,):
                if goes_on and guard:
                    texts.append(guard + piece)
                    strip.append(guard_tokens)
                else:
                    texts.append(piece)
                    strip.append(0)
                goes_on = True
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

    kind = "sentencepiece"
    file_name = TRAINED

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.file_bytes = model
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._model.get_piece_size()
        # A negative id is SentencePiece's way of saying that the model has none.
        bos_id, eos_id = self._model.bos_id(), self._model.eos_id()
        self.name_controls(bos_id if bos_id >= 0 else None, eos_id if eos_id >= 0 else None)
        pieces = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
        self.cut_rule = CutRule.of_vocabulary(pieces, only_words=False)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])


class HuggingFaceTokenizer(_InPieces):
    """A `tokenizer.json`, run by the `tokenizers` package."""

    kind = "tokenizers"
    file_name = "tokenizer.json"

    def __init__(self, text: bytes, *, bos_id: int | None = None, eos_id: int | None = None) -> None:
        import tokenizers

        self.file_bytes = text
        self._model = tokenizers.Tokenizer.from_str(text.decode())
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.name_controls(bos_id, eos_id)
        self.cut_rule = CutRule.of_vocabulary(vocabulary, only_words=True)

    def id_of(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


class ByteTokenizer(_Described):
    """Every byte of UTF-8 is a token; 256 is BOS and 257 is EOS."""

    kind = "bytes"
    file_name = ""
    file_bytes = b""
    vocab_size = 258
    cut_rule = CutRule(frozenset(), only_words=False)

    def __init__(self) -> None:
        self.name_controls(256, 257)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def encode_blocks(self, blocks: Sequence[tuple[str, bool]]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text, _ in blocks]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def load_tokenizer(spec: str | Path, *, bos_token: str = "", eos_token: str = "") -> Tokenizer:
    """Loads a tokenizer from a file, a folder or a name.

    Args:
        spec: a SentencePiece `.model`, a `tokenizer.json`, a folder with one of these (a prepared folder is one),
            or "bytes".
        bos_token, eos_token: the control tokens of a `tokenizer.json`, where no file beside it names them.

    Raises:
        InputError: there is no such file, it cannot be read as a tokenizer, or it lacks a named control token.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        if (manifest := path / "manifest.json").exists():
            return _of_prepared(path, json.loads(manifest.read_text()))
        found = [path / name for name in _FILES if (path / name).is_file()] or sorted(path.glob("*.model"))[:1]
        if not found:
            raise InputError(f"no tokenizer in {path}: looked for tokenizer.model, tokenizer.json and *.model")
        path = found[0]
    if not path.is_file():
        raise InputError(f"tokenizer {spec} does not exist; name a .model, a tokenizer.json, a folder, or 'bytes'")
    return _from_bytes(path.read_bytes(), path, bos_token, eos_token)


def tokenizer_from_state(state: dict) -> Tokenizer:
    """Makes the tokenizer that `tokenizer_state` described, in another process."""
    if state["kind"] == "bytes":
        return ByteTokenizer()
    if state["kind"] == "sentencepiece":
        return SentencePieceTokenizer(state["file_bytes"])
    return HuggingFaceTokenizer(state["file_bytes"], bos_id=state["bos_id"], eos_id=state["eos_id"])


def tokenizer_state(tokenizer: Tokenizer) -> dict:
    names = ("kind", "file_bytes", "bos_id", "eos_id")
    return {name: getattr(tokenizer, name) for name in names}


def _of_prepared(folder: Path, manifest: dict) -> Tokenizer:
    facts = manifest["tokenizer"]
    try:
        data = (folder / facts["file"]).read_bytes() if facts["file"] else b""
    except OSError as error:
        raise InputError(f"{folder / facts['file']} is missing; put it back or prepare the folder again") from error
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise InputError(
            f"{folder / facts['file']} is not the tokenizer these tokens were made with; put that back or prepare again"
        )
    tokenizer = tokenizer_from_state({**facts, "file_bytes": data})
    tokenizer.entry_id = tokenizer.bos_id if manifest["bos"] else tokenizer.eos_id if manifest["eos"] else None
    return tokenizer


def _from_bytes(data: bytes, path: Path, bos_token: str, eos_token: str) -> Tokenizer:
    if path.suffix != ".json":
        try:
            return SentencePieceTokenizer(data)
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"{path} is no SentencePiece model ({str(error).splitlines()[0]})") from error
    try:
        tokenizer = HuggingFaceTokenizer(data)
    except Exception as error:  # the package raises bare Exception
        raise InputError(f"{path} is no tokenizer.json that `tokenizers` reads ({error})") from error
    named = _control_tokens(path.parent)
    for given in filter(None, (bos_token, eos_token)):
        if tokenizer.id_of(given) is None:
            raise InputError(f"{path} has no token {given!r}")
    tokenizer.name_controls(
        tokenizer.id_of(bos_token or named.get("bos_token", "")),
        tokenizer.id_of(eos_token or named.get("eos_token", "")),
    )
    return tokenizer


def _control_tokens(folder: Path) -> dict[str, str]:
    """What the files that come with a tokenizer.json say about its BOS and EOS."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            said = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        for key in ("bos_token", "eos_token"):
            value = said.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[key] = value
    return tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains SentencePiece BPE: byte fallback, digits split, text kept as it is, so decoding gives back every byte.

    Args:
        texts: the sample; cut into short stretches here, newlines kept, so that ends of lines join into pieces.
        vocab_size: pieces, the 256 bytes and 3 control tokens included.

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
            num_threads=8,  # written into the model, so not a property of the machine
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
