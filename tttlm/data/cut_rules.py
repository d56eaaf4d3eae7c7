"""Derives from a tokenizer's own files where a text may be cut; nowhere, unless a cut is proven to change no token.

A cut is in front of a space or a newline. Two conditions have to hold. The steps before merging (normaliser,
pre-tokenizer) must give the same result on each side as on the uncut text; only those known to do so are accepted, and
with any other a text is encoded in one piece. And no merge may cross the cut: either a pre-tokenizer always ends a word
there, or no piece of the vocabulary joins the two characters.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from tttlm.data.cutting import NEVER, CutRule

# Regular expressions of released tokenizers in which white space always ends a word of letters and digits,
# and which have no look-behind.
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD_PATTERNS = (
    rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",  # GPT-2
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",  # GPT-4, Llama 3
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",  # Qwen 2
)
_SPACE = "▁"


def rule_of_sentencepiece(model: bytes) -> CutRule:
    """The rule of a SentencePiece model: BPE without a table of replacements; no cuts for any other.

    A Unigram model sums rounded scores over the text, so its tokens depend on all of it.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:  # it needs protobuf
        return NEVER
    format: Any = sentencepiece_model_pb2  # its classes are created at import
    proto = format.ModelProto()
    proto.ParseFromString(model)
    normalizer, trainer, piece_type = proto.normalizer_spec, proto.trainer_spec, format.ModelProto.SentencePiece
    plain = (
        trainer.model_type == format.TrainerSpec.BPE
        and not normalizer.precompiled_charsmap
        and normalizer.escape_whitespaces
        and not trainer.treat_whitespace_as_suffix
    )
    if not plain:
        return NEVER
    pieces = {piece.piece for piece in proto.pieces}
    all_bytes = sum(piece.type == piece_type.BYTE for piece in proto.pieces) == 256
    # Consecutive unknown characters become one token, which must not cross a cut.
    before = "".join(space for space, piece in ((" ", _SPACE), ("\n", "\n")) if all_bytes or piece in pieces)
    return _guarded(CutRule(before=before, joined=_joined(pieces, {" ": _SPACE, "\n": "\n"})))


def rule_of_tokenizer_json(description: dict[str, Any]) -> CutRule:
    """The rule of a `tokenizer.json`: BPE with known normalisers and pre-tokenizers; no cuts for any other."""
    model = description.get("model") or {}
    plain = (
        model.get("type", "BPE") == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(_takes_no_space(token) for token in description.get("added_tokens") or () if not token.get("special"))
    )
    if not plain:
        return NEVER
    normalizers = _steps(description.get("normalizer"), "normalizers")
    steps = _steps(description.get("pre_tokenizer"), "pretokenizers")
    if steps and all(map(_keeps_word_ends, steps)) and any(map(_ends_words, steps)):
        if all(step.get("type") == "NFC" for step in normalizers):
            return _guarded(CutRule(before=" \n", only_words=True))
        return NEVER
    # Without words, merges may span the text: then no piece may join the two characters, as the vocabulary spells them.
    vocabulary = set(model.get("vocab") or ())
    if [step.get("type") for step in steps] == ["ByteLevel"] and not normalizers:
        letters = byte_letters()
        spaces = {" ": letters[0x20], "\n": letters[0x0A]}
        rule = CutRule(before=" \n", joined=_joined(vocabulary, spaces), byte_letters=letters)
        return _guarded(rule) if set(letters) <= vocabulary else NEVER
    if not steps and all(map(_writes_spaces, normalizers)):
        written = any(step.get("type") == "Replace" for step in normalizers)
        spaces = {" ": _SPACE if written else " ", "\n": "\n"}
        before = "".join(space for space, letter in spaces.items() if letter in vocabulary)
        return _guarded(CutRule(before=before, joined=_joined(vocabulary, spaces)))
    return NEVER


def byte_letters() -> str:
    """The 256 letters by which byte-level vocabularies spell the bytes 0 to 255 (as GPT-2 does)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return "".join(letters[byte] for byte in range(256))


def _guarded(rule: CutRule) -> CutRule:
    """The rule, or no cuts if no letter may be put in front of a piece."""
    return rule if rule.before and rule.guard else NEVER


def _joined(pieces: Iterable[str], spaces: dict[str, str]) -> frozenset[str]:
    """Characters that some piece has in front of a space or newline, as the vocabulary spells it."""
    written = set(spaces.values())
    return frozenset(a for piece in pieces for a, b in pairwise(piece) if b in written)


def _takes_no_space(token: dict[str, Any]) -> bool:
    """Whether an added token neither contains nor strips white space."""
    content = token.get("content", "")
    return not (
        any(token.get(name) for name in ("lstrip", "rstrip", "single_word"))
        or any(character.isspace() or character == _SPACE for character in content)
    )


def _steps(description: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if not description:
        return []
    if description.get("type") == "Sequence":
        return [step for inner in description.get(name) or () for step in _steps(inner, name)]
    return [description]


def _pattern(step: dict[str, Any]) -> Any:
    pattern = step.get("pattern")
    return pattern if isinstance(pattern, dict) else {}


def _is_word_split(step: dict[str, Any]) -> bool:
    plain = step.get("behavior") == "Isolated" and not step.get("invert")
    return step.get("type") == "Split" and plain and _pattern(step).get("Regex") in _WORD_PATTERNS


def _keeps_word_ends(step: dict[str, Any]) -> bool:
    return step.get("type") in ("ByteLevel", "Digits") or _is_word_split(step)


def _ends_words(step: dict[str, Any]) -> bool:
    return _is_word_split(step) or (step.get("type") == "ByteLevel" and step.get("use_regex", True))


def _writes_spaces(step: dict[str, Any]) -> bool:
    """Whether a normaliser only writes spaces as `▁`, or puts one in front of the text."""
    replaces = step.get("type") == "Replace" and _pattern(step) == {"String": " "} and step.get("content") == _SPACE
    return replaces or (step.get("type") == "Prepend" and step.get("prepend") == _SPACE)
