"""Text comes in whole characters, without what a stop string takes back, and joins to what the tokens decode to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.inference.small import made
from tttlm.data.tokenizer import ByteTokenizer, train_tokenizer
from tttlm.inference import generate, stream
from tttlm.inference.text import TextStream

BYTES = ByteTokenizer()
TRAINED = train_tokenizer(["the red cat sees the blue bird and the green tree, then sleeps. " * 20], 300)


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED])
@given(st.text(max_size=200), st.text(max_size=20))
def test_pieces_join_to_the_text_and_are_whole_characters(tokenizer, text, before):
    made = TextStream(tokenizer, tokenizer.encode(before))
    pieces = [made.push(token) for token in tokenizer.encode(text)]
    assert not any("�" in piece for piece in pieces) or "�" in text
    assert "".join(pieces) + made.finish() == text


def test_a_character_waits_for_all_of_its_bytes():
    made = TextStream(BYTES)
    assert [made.push(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert made.push(0xE2) == ""
    assert made.finish() == "�"


@given(st.lists(st.integers(0, 255), max_size=60))
def test_bytes_that_are_no_text_are_not_held_back_for_ever(data):
    made = TextStream(BYTES)
    pieces = "".join(made.push(byte) for byte in data)
    assert len(BYTES.decode(data)) - len(pieces) <= 3
    assert pieces + made.finish() == BYTES.decode(data)


@pytest.mark.parametrize(
    ("stop", "expected"), [(("END",), "one EN"), (("X", "two"), "one ENE"), (("one",), ""), (("zzz",), None)]
)
def test_a_stop_string_ends_the_text_and_is_not_shown_in_part(stop, expected):
    text = {"END": "one ENEND two"}.get(stop[0], "one ENEtwo ENDX")
    made, pieces = TextStream(BYTES, stop=stop), []
    for byte in text.encode():
        pieces.append(made.push(byte))
        if made.stopped:
            break
    assert "".join(pieces) + made.finish() == (text if expected is None else expected)
    assert made.stopped == (expected is not None)


@pytest.mark.long
def test_a_model_stops_at_a_stop_string_and_streams_what_it_returns():
    model = made("ttt_linear", vocab_size=260)
    free = generate(model, ["ab", "c"], BYTES, max_tokens=24, temperature=1.0, seed=5, end_ids=())
    assert [len(one.tokens) for one in free] == [24, 24]
    stop = free[0].text[4:6]
    pieces = list(stream(model, ["ab", "c"], BYTES, max_tokens=24, temperature=1.0, seed=5, end_ids=(), stop=[stop]))
    ended = {piece.prompt: piece.finished for piece in pieces if piece.finished}
    assert ended[0].finish_reason == "stop"
    assert ended[0].text == free[0].text.partition(stop)[0]
    for prompt in (0, 1):
        assert "".join(piece.text for piece in pieces if piece.prompt == prompt) == ended[prompt].text
    if stop not in free[1].text:
        assert ended[1] == free[1]
