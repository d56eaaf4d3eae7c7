"""Loads tokenizers from files, folders and names, stores them in folders, and sends them to other processes."""

import hashlib
from pathlib import Path
from typing import Any

from tttlm.data.store import MANIFEST, read_manifest
from tttlm.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerFacts,
    facts_of,
)
from tttlm.errors import InputError
from tttlm.records import parse_json, read_record, read_text, write_file, write_sealed

FACTS = "tokenizer_facts.json"  # written by `save_tokenizer`
_MAX_BYTES = 1 << 29  # limit of a tokenizer's file; the largest released ones have 35 MB


def load_tokenizer(spec: str | Path, *, bos_token: str = "", eos_token: str = "") -> Tokenizer:
    """Loads a tokenizer from a file, a folder or a name.

    Args:
        spec: a SentencePiece `.model`, a `tokenizer.json`, a folder (a prepared one, one that `save_tokenizer` wrote,
            that of a run, or one of a released model), or "bytes". A released folder that holds both files is read as
            its `tokenizer.json`, as `transformers` does.
        bos_token, eos_token: the control tokens, if the tokenizer's files name none or others. By default they are
            those that `tokenizer_config.json` or `special_tokens_map.json` in the same folder name, else those of the
            SentencePiece model.

    Raises:
        InputError: the file does not exist, is not a tokenizer, or lacks a named control token.
    """
    if str(spec) == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        path = Path(spec).expanduser()
        tokenizer = _of_folder(path) if path.is_dir() else _of_file(path, beside=path.suffix == ".json")
    for given in filter(None, (bos_token, eos_token)):
        if tokenizer.id_of(given) is None:
            raise InputError(f"tokenizer {spec} has no token {given!r}; name one that it has")
    if bos_token or eos_token:
        tokenizer.name_controls(
            tokenizer.id_of(bos_token) if bos_token else tokenizer.bos_id,
            tokenizer.id_of(eos_token) if eos_token else tokenizer.eos_id,
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Stores a tokenizer in a folder of its own, from which `load_tokenizer` loads the same one.

    Args:
        tokenizer: the tokenizer; its control tokens and `entry_id` are stored with it.
        folder: created if it does not exist; gets `tokenizer_facts.json` and, except for bytes, the tokenizer's file.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.file_name:
        write_file(folder / tokenizer.file_name, tokenizer.file_bytes)
    write_sealed(folder / FACTS, facts_of(tokenizer))


def tokenizer_from_state(state: dict[str, Any]) -> Tokenizer:
    """Restores, in another process, the tokenizer that `tokenizer_state` described."""
    tokenizer: Tokenizer
    if state["kind"] == "bytes":
        tokenizer = ByteTokenizer()
    elif state["kind"] == "sentencepiece":
        tokenizer = SentencePieceTokenizer(state["file_bytes"])
    else:
        tokenizer = HuggingFaceTokenizer(state["file_bytes"])
    tokenizer.name_controls(state["bos_id"], state["eos_id"])
    return tokenizer


def tokenizer_state(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer as plain values that can be sent to another process."""
    names = ("kind", "file_bytes", "bos_id", "eos_id")
    return {name: getattr(tokenizer, name) for name in names}


def _of_folder(folder: Path) -> Tokenizer:
    if (folder / FACTS).exists():
        advice = "copy the folder again"
        return _as_described(folder, read_record(folder / FACTS, TokenizerFacts, advice=advice, sealed=True))
    if (folder / MANIFEST).exists():
        return _as_described(folder, read_manifest(folder).tokenizer)
    if (file := folder / HuggingFaceTokenizer.file_name).is_file():
        return _of_file(file, beside=True)
    models = sorted(folder.glob("*.model"))
    named = [path for path in models if path.name == SentencePieceTokenizer.file_name] or models
    if len(named) > 1:
        raise InputError(f"{folder} has {named[0].name} and {named[1].name}; name the file that is the tokenizer")
    if not named and (folder / "tokenizer").is_dir():  # the folder of a run
        return _of_folder(folder / "tokenizer")
    if not named:
        raise InputError(f"no tokenizer in {folder}: looked for tokenizer.json, tokenizer.model and *.model")
    return _of_file(named[0], beside=True)


def _as_described(folder: Path, facts: TokenizerFacts) -> Tokenizer:
    data = _read(folder / facts.file) if facts.file else b""
    if hashlib.sha256(data).hexdigest() != facts.sha256:
        raise InputError(f"{folder / facts.file} is not the tokenizer that was stored; copy it again")
    tokenizer = _parsed(folder / facts.file, data) if facts.file else ByteTokenizer()
    tokenizer.name_controls(facts.bos_id, facts.eos_id)
    tokenizer.entry_id = facts.entry_id
    return tokenizer


def _of_file(path: Path, *, beside: bool) -> Tokenizer:
    """Reads one file; `beside` says whether files in the same folder may name the control tokens."""
    if not path.is_file():
        raise InputError(f"tokenizer {path} does not exist; name a .model, a tokenizer.json, a folder, or 'bytes'")
    tokenizer = _parsed(path, _read(path))
    if beside:
        controls = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        controls |= {name: tokenizer.id_of(token) for name, token in _control_tokens(path.parent).items()}
        tokenizer.name_controls(controls["bos_token"], controls["eos_token"])
    return tokenizer


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; restore it or prepare the folder again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path} is not a tokenizer: it is longer than {_MAX_BYTES:,} bytes")
    return data


def _parsed(path: Path, data: bytes) -> Tokenizer:
    as_json = data.lstrip()[:1] == b"{" or path.suffix == ".json"
    what = "tokenizer.json that `tokenizers` reads" if as_json else "SentencePiece model"
    try:
        return HuggingFaceTokenizer(data) if as_json else SentencePieceTokenizer(data)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the packages raise bare Exception, and Rust panics as BaseException
        raise InputError(f"{path} is no {what} ({(str(error).splitlines() or ['unreadable'])[0][:200]})") from None


def _control_tokens(folder: Path) -> dict[str, str]:
    """The BOS and EOS that the files of a released tokenizer name."""
    tokens: dict[str, str] = {}
    advice = "repair or remove it"
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        text = read_text(folder / name, advice=advice)
        try:
            parsed = parse_json(text)
            if not isinstance(parsed, dict):
                raise ValueError("holds no object")
        except ValueError as error:
            raise InputError(f"{folder / name}: {error}; {advice}") from None
        for key in ("bos_token", "eos_token"):
            value = parsed.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[key] = value
            elif value is not None:
                raise InputError(f"{folder / name}: '{key}' names no token; {advice}")
    return tokens
