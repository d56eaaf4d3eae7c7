"""Tokenizers: what they give is exactly what the tokenizer itself gives, however a text is cut."""

import io
import json
import shutil
from contextlib import suppress
from pathlib import Path

import hypothesis.strategies as st
import pytest
import sentencepiece
from hypothesis import given, settings

from tests.data.small import WORDS, make_text, sentencepiece_of, small_config
from tttlm.data import DataConfig, cutting, held_out_documents, load_tokenizer, open_data, prepare
from tttlm.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, train_tokenizer
from tttlm.data.tokenizer_files import tokenizer_from_state, tokenizer_state
from tttlm.errors import InputError

# How GPT-2 and how Llama 3 cut a text into words before they merge.
REGEX_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
REGEX_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

texts_with_space = st.lists(
    st.one_of(
        st.sampled_from(WORDS),
        st.sampled_from(
            [" ", "  ", "\n", ".\n", "。\n", "\n\n", "\t", "\r\n", " \n", "▁", "e\u0301", "\u200b", "\u3000", "\0", "¨"]
        ),
    ),
    max_size=60,
).map("".join)


def byte_level(regex: str) -> bytes:
    """A byte-level BPE tokenizer.json, as GPT-2's."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Split(tokenizers.Regex(regex), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(seed, 1_000) for seed in range(4)], trainer)
    return tokenizer.to_str().encode()


def metaspace() -> bytes:
    """Converted SentencePiece, as Llama 2's tokenizer.json: no pre-tokenizer, a space put in front of the text."""
    tokenizers = pytest.importorskip("tokenizers")
    words = [word for word in WORDS if word.isascii()]
    characters = sorted({c for word in words for c in word} | {"▁", "\n"})
    merges = []
    pieces = [*characters]
    for word in words[:20]:
        for end in range(2, len("▁" + word) + 1):
            piece = ("▁" + word)[:end]
            if piece not in pieces:
                merges.append((piece[:-1], piece[-1]))
                pieces.append(piece)
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def tokenizers_of_every_kind(sentencepiece_model: SentencePieceTokenizer) -> dict:
    found = {
        "trained here": sentencepiece_model,
        "as Llama": sentencepiece_of("bpe", "identity", prefix=True, trim=False),
        "as T5": sentencepiece_of("unigram", "nmt_nfkc", prefix=True, trim=True),
        "bytes": load_tokenizer("bytes"),
    }
    with suppress(pytest.skip.Exception):  # without `tokenizers` the others are tested all the same
        found |= {
            "as GPT-2": HuggingFaceTokenizer(byte_level(REGEX_GPT2)),
            "as Llama 3": HuggingFaceTokenizer(byte_level(REGEX_LLAMA3)),
            "as Llama 2": HuggingFaceTokenizer(metaspace()),
        }
    return found


def whole(tokenizer, text: str) -> list[int]:
    """The tokenizer's own answer, without any cutting of ours."""
    if tokenizer.kind == "sentencepiece":
        return tokenizer._model.encode(text)
    if tokenizer.kind == "tokenizers":
        return tokenizer._model.encode(text, add_special_tokens=False).ids
    return list(text.encode())


@settings(max_examples=150, deadline=None)
@given(text=texts_with_space, piece=st.integers(1, 40))
def test_a_text_cut_into_pieces_has_the_tokens_of_the_whole(tokenizers_of_every_kind, text, piece) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "PIECE_CHARACTERS", piece)
        for name, tokenizer in tokenizers_of_every_kind.items():
            assert tokenizer.encode(text) == whole(tokenizer, text), name


@settings(max_examples=100, deadline=None)
@given(text=texts_with_space, block=st.integers(8, 60), chunk=st.integers(1, 50))
def test_a_document_read_in_chunks_has_the_tokens_of_the_whole(tokenizers_of_every_kind, text, block, chunk) -> None:
    data = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "BLOCK_BYTES", block)
        for name, tokenizer in tokenizers_of_every_kind.items():
            tokens, goes_on = [], False
            chunks = (data[i : i + chunk] for i in range(0, len(data), chunk))
            for piece in tokenizer.cut_rule.blocks(chunks, "a text"):
                tokens += tokenizer.encode_blocks([(piece.decode(), goes_on)])[0].tolist()
                goes_on = True
            assert tokens == whole(tokenizer, text), name


def test_long_texts_really_are_cut(tokenizers_of_every_kind) -> None:
    text = make_text(3, 3_000)
    for name, tokenizer in tokenizers_of_every_kind.items():
        pieces = list(tokenizer.cut_rule.pieces(text))
        if name == "as T5":  # scores that are summed over the text and rounded: there is no place to cut
            assert pieces == [text]
            continue
        assert "".join(pieces) == text
        assert len(pieces) > 4
        assert max(map(len, pieces)) < 2 * cutting.PIECE_CHARACTERS


def test_a_text_without_an_allowed_cut_is_encoded_as_a_whole_or_refused(
    tokenizers_of_every_kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "BLOCK_BYTES", 10)
    monkeypatch.setattr(cutting, "WHOLE_BYTES", 200)
    tokenizer = tokenizers_of_every_kind["as T5"]  # allows no cut
    for length, chunk in ((190, 7), (200, 200)):
        data = ("word " * 40).encode()[:length]
        assert list(tokenizer.cut_rule.blocks([data[:chunk], data[chunk:]], "a text")) == [data]
    with pytest.raises(InputError, match=r"^book\.txt has .* has no cut.*; split the file"):
        list(tokenizer.cut_rule.blocks([b"word " * 41], "book.txt"))


@settings(max_examples=50, deadline=None)
@given(data=st.one_of(st.binary(max_size=80), st.text(max_size=40).map(str.encode)), chunk=st.integers(1, 30))
def test_bytes_are_cut_between_any_two_characters(data: bytes, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "BLOCK_BYTES", 10)
        chunks = (data[i : i + chunk] for i in range(0, len(data), chunk))
        blocks = list(load_tokenizer("bytes").cut_rule.blocks(chunks, "a text"))
    assert b"".join(blocks) == data
    assert "".join(block.decode("utf-8", "replace") for block in blocks) == data.decode("utf-8", "replace")
    if b"\xef\xbf\xbd" not in data.decode("utf-8", "replace").encode():  # valid: no block is longer than the bound
        assert max(map(len, blocks), default=0) <= 10


def test_a_trained_tokenizer_is_lossless(sentencepiece_model: SentencePieceTokenizer) -> None:
    for text in (make_text(50, 300), "  indented\n\n\ttabs \r\n", "\u0000\u200b unseen ☃", " "):
        assert sentencepiece_model.decode(sentencepiece_model.encode(text)) == text


def test_training_again_gives_the_same_tokenizer(sentencepiece_model: SentencePieceTokenizer) -> None:
    again = train_tokenizer((make_text(seed, 2_000) for seed in range(8)), 600)
    assert again.file_bytes == sentencepiece_model.file_bytes


def test_digits_are_single_tokens(sentencepiece_model: SentencePieceTokenizer) -> None:
    assert [sentencepiece_model.decode([i]) for i in sentencepiece_model.encode("1917")] == ["1", "9", "1", "7"]


def test_a_sample_too_small_for_the_vocabulary_says_so() -> None:
    with pytest.raises(InputError, match=r"5000 pieces .* smaller vocab_size"):
        train_tokenizer(["a short sample"], 5_000)


def test_control_tokens_written_out_in_a_text_are_text(tokenizers_of_every_kind) -> None:
    for name, text in (("trained here", "</s>"), ("as GPT-2", "<|endoftext|>")):
        if tokenizer := tokenizers_of_every_kind.get(name):
            tokens = tokenizer.encode(f"a {text} b")
            assert tokenizer.decode(tokens) == f"a {text} b"
            assert len(tokens) > 5


def test_a_tokenizer_json_is_used_without_its_truncation_and_padding(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer.from_str(byte_level(REGEX_GPT2).decode())
    text = make_text(4, 100)
    plain.enable_truncation(5)
    plain.enable_padding(length=64)
    (tmp_path / "tokenizer.json").write_text(plain.to_str())
    tokens = load_tokenizer(tmp_path).encode(text)
    assert len(tokens) > 64
    assert load_tokenizer(tmp_path).decode(tokens) == text


def test_a_tokenizer_json_takes_its_control_tokens_from_its_folder_or_the_caller(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level(REGEX_GPT2))
    assert load_tokenizer(tmp_path).eos_id is None
    assert load_tokenizer(tmp_path, eos_token="<|endoftext|>").eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    assert load_tokenizer(tmp_path).eos_id == 0
    with pytest.raises(InputError, match="no token '</s>'"):
        load_tokenizer(tmp_path, eos_token="</s>")


def test_a_tokenizer_is_the_same_in_another_process(tokenizers_of_every_kind) -> None:
    text = make_text(9, 200)
    for tokenizer in tokenizers_of_every_kind.values():
        copy = tokenizer_from_state(tokenizer_state(tokenizer))
        assert copy.encode(text) == tokenizer.encode(text)
        assert copy.fingerprint == tokenizer.fingerprint


def test_the_fingerprint_tells_tokenizers_apart(tokenizers_of_every_kind) -> None:
    prints = {tokenizer.fingerprint for tokenizer in tokenizers_of_every_kind.values()}
    assert len(prints) == len(tokenizers_of_every_kind)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.model", None, "does not exist"),
        ("broken.model", b"not a model", "no SentencePiece model"),
        ("tokenizer.json", b"{}", "no tokenizer.json"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "it has no tokens"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}', "beyond 2"),
        ("tokenizer.json", b'{"model":' * 10_000, "no tokenizer.json"),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if name.endswith(".json"):
        pytest.importorskip("tokenizers")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)


# Control tokens that a person or a file names


def model_without_eos(*symbols: str) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_text(1, 2_000).splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        bos_id=-1,
        eos_id=-1,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    return out.getvalue()


def test_the_controls_of_a_sentencepiece_model_can_be_named(tmp_path: Path, sentencepiece_file: Path) -> None:
    (tmp_path / "own.model").write_bytes(model_without_eos("<|endoftext|>", "<|begin|>"))
    tokenizer = load_tokenizer(tmp_path / "own.model")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    named = load_tokenizer(tmp_path / "own.model", bos_token="<|begin|>", eos_token="<|endoftext|>")
    ids = [named.id_of(token) for token in ("<|begin|>", "<|endoftext|>")]
    assert [named.bos_id, named.eos_id] == ids
    assert None not in ids
    assert named.fingerprint != tokenizer.fingerprint
    copy = tokenizer_from_state(tokenizer_state(named))
    assert (copy.bos_id, copy.eos_id, copy.fingerprint) == (named.bos_id, named.eos_id, named.fingerprint)
    with pytest.raises(InputError, match=r"has no token '<\|no such\|>'"):
        load_tokenizer(sentencepiece_file, eos_token="<|no such|>")


def test_documents_end_with_the_token_that_was_named_and_are_read_back_so(tmp_path: Path, text_folder: Path) -> None:
    (tmp_path / "own.model").write_bytes(model_without_eos("<|endoftext|>"))
    config = small_config(text_folder, tmp_path / "own.model", eos_token="<|endoftext|>")
    prepare(config, tmp_path / "data")
    eos = load_tokenizer(tmp_path / "own.model").id_of("<|endoftext|>")
    assert load_tokenizer(tmp_path / "data").eos_id == eos
    assert {int(document.tokens[-1]) for document in held_out_documents(tmp_path / "data")} == {eos}
    again = small_config(text_folder, tmp_path / "data")  # the folder's own tokenizer, with its controls
    prepare(again, tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").eos_id == eos
    loader = DataConfig(path=str(tmp_path / "data"), tokenizer=str(tmp_path / "own.model"))
    assert open_data(loader, split="train", batch_size=1, sequence_length=8).tokenizer.eos_id == eos


@pytest.mark.parametrize("tokenizer", ["bytes", "train"])
def test_a_control_that_would_not_be_used_is_refused(tmp_path: Path, text_folder: Path, tokenizer: str) -> None:
    for name in ("bos_token", "eos_token"):
        with pytest.raises(InputError, match="'</s>' was named"):
            prepare(small_config(text_folder, tokenizer, **{name: "</s>"}), tmp_path / "data")


def test_of_two_tokenizers_in_a_folder_the_json_is_read(tmp_path: Path, sentencepiece_file: Path) -> None:
    shutil.copy(sentencepiece_file, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).kind == "sentencepiece"
    (tmp_path / "tokenizer.json").write_bytes(byte_level(REGEX_GPT2))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.kind, tokenizer.eos_id) == ("tokenizers", tokenizer.id_of("<|endoftext|>"))
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as tiktoken's
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_the_control_tokens_named_in_the_folder_of_a_sentencepiece_model_are_used(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_without_eos("<|im_end|>", "<|endoftext|>"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": None}))
    assert load_tokenizer(tmp_path).eos_id == load_tokenizer(tmp_path / "tokenizer.model").id_of("<|endoftext|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert load_tokenizer(tmp_path).eos_id == load_tokenizer(tmp_path).id_of("<|im_end|>")


def test_several_models_in_a_folder_are_not_chosen_from(tmp_path: Path, sentencepiece_file: Path) -> None:
    for name in ("a.model", "b.model"):
        shutil.copy(sentencepiece_file, tmp_path / name)
    with pytest.raises(InputError, match=r"has a\.model and b\.model; name the file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"", b"[", b"[]", b'{"eos_token": 3}', b"\xff", b'{"a":' * 50_000, b'{"a":1,"a":2}'])
def test_a_damaged_file_in_the_folder_of_a_tokenizer_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level(REGEX_GPT2))
    (tmp_path / "tokenizer_config.json").write_bytes(data)
    with pytest.raises(InputError, match=r"tokenizer_config\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
