"""Where texts are cut: whatever a tokenizer does before it merges, the tokens are its own; or the text is not cut."""

import functools
import io
import json
import random
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.data.small import make_text
from tttlm.data import cutting
from tttlm.data.cut_rules import byte_letters
from tttlm.data.cutting import NEVER
from tttlm.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

# What a tokenizer may treat as white space, decompose, compose, lower or drop; and what joins words.
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u3000"]
STRANGE = ["\u200b", "\ufeff", "\xad", "▁", "Ġ", "¨", "´", "e\u0301", "\u0301", "İ", "ΑΣ", "ﬁ", "①", "⑴", "ᄀ", "ᅡ"]
WORDS = ["a", "of the", "in the", "Zu", "42", "3.14", "don't", "I'S", "café", "за", "это был", "世界", "。", "…", "xxx"]


def odd_text(seed: int, words: int) -> str:
    rng = random.Random(seed)
    parts = []
    for _ in range(words):
        parts += [rng.choice(WORDS), rng.choices([rng.choice(SPACES), " ", rng.choice(STRANGE), ""], [4, 8, 1, 1])[0]]
    return "".join(parts)


TRAINING = [odd_text(seed, 60) for seed in range(120)]


def bpe(pre: Any, normalizer: Any = None, added: tuple[AddedToken, ...] = (), **model: Any) -> HuggingFaceTokenizer:
    """A tokenizer.json of BPE, trained on texts of the same kind."""
    tokenizer = Tokenizer(models.BPE(**model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        **{name: value for name, value in model.items() if name == "end_of_word_suffix"},
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_tokens(list(added))
    return HuggingFaceTokenizer(tokenizer.to_str().encode())


def byte_level(**settings: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **settings})


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte_level(use_regex=False)])


JSON: dict[str, Any] = {
    "GPT-2": lambda: bpe(byte_level()),
    "GPT-2 with a space in front": lambda: bpe(byte_level(add_prefix_space=True)),
    "Llama 3": lambda: bpe(llama3()),
    "Qwen": lambda: bpe(llama3(), normalizers.NFC()),
    "StarCoder": lambda: bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])),
    "pieces that span words": lambda: bpe(byte_level(use_regex=False)),
    "NFKC": lambda: bpe(byte_level(), normalizers.NFKC()),
    "NFD and lower case": lambda: bpe(byte_level(), normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])),
    "strip": lambda: bpe(byte_level(), normalizers.Strip()),
    "replace": lambda: bpe(byte_level(), normalizers.Replace(Regex(r"\s+"), " ")),
    "replace a word": lambda: bpe(llama3(), normalizers.Replace("the in", "xx")),
    "BERT": lambda: bpe(byte_level(), normalizers.BertNormalizer()),
    "NFC, pieces that span words": lambda: bpe(byte_level(use_regex=False), normalizers.NFC()),
    "another pattern": lambda: bpe(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+ \w+|\s|."), "isolated"), byte_level(use_regex=False)])
    ),
    "metaspace": lambda: bpe(pre_tokenizers.Metaspace(split=False), unk_token="</s>", fuse_unk=True),
    "no pre-tokenizer": lambda: bpe(None),
    "no pre-tokenizer, unknown fused": lambda: bpe(None, unk_token="Ā", fuse_unk=True),
    "ends of words": lambda: bpe(byte_level(), end_of_word_suffix="</w>"),
    "added word": lambda: bpe(byte_level(), added=(AddedToken("of the", normalized=False),)),
    "added token that eats spaces": lambda: bpe(byte_level(), added=(AddedToken("Zu", rstrip=True, lstrip=True),)),
    "added single word": lambda: bpe(byte_level(), added=(AddedToken("42", single_word=True),)),
    "added plain word": lambda: bpe(byte_level(), added=(AddedToken("café"), AddedToken("3.14"))),
}

CUT = {  # those that would be slow, or would not fit in memory, if a book were encoded whole
    *("GPT-2", "GPT-2 with a space in front", "Llama 3", "Qwen", "StarCoder", "pieces that span words"),
    *("no pre-tokenizer", "added plain word"),
}


def sentencepiece_model(**settings: Any) -> SentencePieceTokenizer:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TRAINING for line in text.replace("\0", "").splitlines()),
        model_writer=out,
        **{"model_type": "bpe", "vocab_size": 500, "hard_vocab_limit": False, "minloglevel": 2, **settings},
    )
    return SentencePieceTokenizer(out.getvalue())


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
MODELS: dict[str, Any] = {
    "identity": lambda: sentencepiece_model(**PLAIN),
    "identity, spaces joined": lambda: sentencepiece_model(**{**PLAIN, "remove_extra_whitespaces": True}),
    "identity, unknown characters": lambda: sentencepiece_model(**{**PLAIN, "byte_fallback": False}),
    "across words": lambda: sentencepiece_model(**{**PLAIN, "split_by_whitespace": False}),
    "named symbols": lambda: sentencepiece_model(**{**PLAIN, "user_defined_symbols": ["of the", "\n\n", "a ", " a"]}),
    "space behind": lambda: sentencepiece_model(**{**PLAIN, "treat_whitespace_as_suffix": True}),
    "nmt_nfkc": lambda: sentencepiece_model(normalization_rule_name="nmt_nfkc"),
    "nfkc_cf": lambda: sentencepiece_model(normalization_rule_name="nfkc_cf", remove_extra_whitespaces=False),
    "unigram": lambda: sentencepiece_model(**{**PLAIN, "model_type": "unigram", "vocab_size": 400}),
    "characters": lambda: sentencepiece_model(**{**PLAIN, "model_type": "char"}),
}
CUT_MODELS = {"identity", "identity, spaces joined"}


@functools.cache
def made(name: str) -> Any:
    """The tokenizer of a name in the tables above."""
    return {**JSON, **MODELS}[name]()


def own_answer(tokenizer: Any, text: str) -> list[int]:
    """The tokenizer's own answer to the whole text."""
    if tokenizer.kind == "sentencepiece":
        return tokenizer._model.encode(text)
    return tokenizer._model.encode(text, add_special_tokens=False).ids


def cut_answer(tokenizer: Any, text: str, block: int) -> list[int]:
    """The tokens of the text as `prepare` makes them: in blocks, and in pieces of these."""
    found, goes_on = [], False
    for data in tokenizer.cut_rule.blocks([text.encode()], "a text"):
        found += tokenizer.encode_blocks([(data.decode(), goes_on)])[0].tolist()
        goes_on = True
    return found


@pytest.mark.parametrize("name", [*JSON, *MODELS])
def test_the_tokens_are_the_tokenizers_own_whatever_it_does_before_it_merges(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = made(name)
    for seed in range(12):
        text = odd_text(1_000 + seed, 120)
        own = own_answer(tokenizer, text)
        for piece in (1, 40):
            monkeypatch.setattr(cutting, "PIECE_CHARACTERS", piece)
            monkeypatch.setattr(cutting, "BLOCK_BYTES", 4 * piece + 8)
            assert cut_answer(tokenizer, text, piece) == own, (name, seed, piece)


@pytest.mark.parametrize("name", [*JSON, *MODELS])
def test_only_proven_cuts_are_made(name: str) -> None:
    tokenizer = made(name)
    assert (tokenizer.cut_rule != NEVER) == (name in CUT | CUT_MODELS) or name in {
        *("identity, unknown characters", "across words", "named symbols", "no pre-tokenizer, unknown fused"),
        "metaspace",
    }


def test_a_long_text_is_encoded_in_one_piece_if_its_tokenizer_allows_no_cut() -> None:
    tokenizer = made("nmt_nfkc")
    text = make_text(5, 30_000)
    assert cut_answer(tokenizer, text, 0) == own_answer(tokenizer, text)


def test_byte_letters_are_those_that_byte_level_vocabularies_use() -> None:
    letters = byte_letters()
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    for text in ("é a", "\n", "я\t世"):
        ((written, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert written == "".join(letters[byte] for byte in text.encode())


def test_an_unknown_kind_of_tokenizer_json_allows_no_cut() -> None:
    description = json.loads(bpe(byte_level()).file_bytes)
    description["pre_tokenizer"] = {"type": "Whitespace"}
    tokenizer = HuggingFaceTokenizer(json.dumps(description).encode())
    assert tokenizer.cut_rule == NEVER
