"""Decoding gives what the whole forward pass gives, to each prompt what it gives alone, and compiles once."""

import jax
import numpy as np
import pytest

from tests.inference.small import MIXERS, hybrid, ids, logits_of, made
from tttlm.errors import InputError
from tttlm.inference import (
    begin,
    chunks,
    decoding,
    generate,
    load_reading,
    read,
    save_reading,
    stepping,
    stream,
    with_room_for,
)
from tttlm.inference.sampling import Sampling, draw


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


PROMPTS = [ids(n, n).tolist() for n in (21, 3, 44, 16)]


OTHERS = sorted({*MIXERS} - {"ttt_linear", "attention"})


@pytest.mark.long
@pytest.mark.parametrize("mixers", [(), *(pytest.param((name,), marks=pytest.mark.slow) for name in OTHERS)])
def test_greedy_decoding_is_the_argmax_of_the_whole_forward_pass(mixers):
    model, prompt = made(*mixers) if mixers else hybrid(), ids(37)
    found = generate(model, prompt.tolist(), max_tokens=9, temperature=0.0, chunk=16)[0]
    logits = logits_of(model, np.concatenate([prompt, found.tokens]))[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(found.tokens, logits.argmax(axis=1))
    expected = [log_softmax(row)[token] for row, token in zip(logits, found.tokens, strict=True)]
    np.testing.assert_allclose(found.log_probs, expected, atol=2e-4)
    assert found.finish_reason == "length"


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ragged_prompts_give_each_what_it_gives_alone(dtype):
    model = hybrid() if dtype == "float32" else made("ttt_linear", "attention", dtype=dtype)
    for settings in ({"temperature": 0.0}, {"temperature": 0.9, "top_k": 20, "seed": 3}):
        together = generate(model, PROMPTS, max_tokens=8, chunk=16, **settings)
        alone = [generate(model, prompt, max_tokens=8, chunk=16, **settings)[0] for prompt in PROMPTS]
        for a, b in zip(together, alone, strict=True):
            assert a.tokens == b.tokens
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4 if dtype == "float32" else 5e-2)


@pytest.mark.long
def test_samples_of_a_prompt_differ_and_are_those_of_it_alone():
    several = generate(hybrid(), PROMPTS[:2], max_tokens=8, chunk=16, num_samples=2)
    assert [(one.prompt, one.sample) for one in several] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert several[0].tokens != several[1].tokens
    first = generate(hybrid(), PROMPTS[0], max_tokens=8, chunk=16)[0]
    assert several[0].tokens == first.tokens


def test_rows_stop_at_their_own_end():
    """A token that ends some prompts leaves the others as if it were not there."""
    free = generate(hybrid(), PROMPTS, max_tokens=8, temperature=0.0, chunk=16)
    end = free[1].tokens[2]
    ended = generate(hybrid(), PROMPTS, max_tokens=8, temperature=0.0, chunk=16, end_ids=(end,))
    assert ended[1].finish_reason == "end"
    for a, b in zip(free, ended, strict=True):
        until = a.tokens.index(end) + 1 if end in a.tokens else 8
        assert b.tokens == a.tokens[:until]
        assert b.finish_reason == ("end" if end in a.tokens else "length")


def test_decoding_compiles_once_for_all_lengths_and_settings():
    generate(hybrid(), PROMPTS[0], max_tokens=2, chunk=16)
    compiled = lambda: [program._cache_size() for program in (decoding._drawn, stepping._through, stepping._after)]
    before = compiled()
    for length, most, temperature in ((5, 4, 0.0), (17, 1, 0.7), (30, 6, 1.3)):
        generate(
            hybrid(),
            ids(length).tolist(),
            max_tokens=most,
            temperature=temperature,
            top_k=length,
            top_p=0.9,
            min_p=0.01,
            repetition_penalty=1.1,
            seed=length,
            end_ids=(most,),
            chunk=16,
        )
    assert compiled() == before
    generate(hybrid(), [PROMPTS[0]] * 3, max_tokens=1, chunk=16)
    assert compiled() == [count + 1 for count in before]


def test_blocks_apart_compute_what_stacked_ones_do():
    model = made("ttt_linear", num_layers=3)
    stacked, apart = (kind(model, model.init_state(2)) for kind in (stepping.Stacked, stepping.Apart))
    for tokens, lengths in (([3, 4], [1, 1]), ([5, 6], [1, 0]), ([7, 8], [1, 1])):
        a, b = (np.asarray(step(np.array(tokens), np.array(lengths))) for step in (stacked, apart))
        np.testing.assert_allclose(a[: sum(lengths)], b[: sum(lengths)], rtol=1e-5, atol=1e-5)


def test_what_was_read_is_read_on_from_and_forked_and_kept(tmp_path):
    model, book = hybrid(), ids(45)
    whole = generate(model, book.tolist(), max_tokens=6, temperature=0.0, chunk=16)[0]
    reading = begin(model, 1)
    for piece in np.split(book[:40], [7, 8, 30]):
        reading = read(model, reading, [piece], chunk=16)
    file = tmp_path / "book.safetensors"
    save_reading(file, reading, model, "tokenizer")
    for start in (reading, load_reading(file, model, "tokenizer")):
        np.testing.assert_array_equal(start.num_tokens, [40])
        rest = [book[40:].tolist(), [], book[40:].tolist(), []]
        forks = generate(model, rest, reading=start, max_tokens=6, temperature=0.0, chunk=16)
        assert forks[0].tokens == whole.tokens
        np.testing.assert_allclose(forks[0].log_probs, whole.log_probs, atol=1e-4)
        assert forks[1].tokens[0] == logits_of(model, book[:40])[-1].argmax()


def test_a_rest_without_padding_is_read_as_in_training(monkeypatch):
    model = made("ttt_linear")
    sizes, run = [], chunks.Chunks.__call__

    def told(self, tokens, **options):
        sizes.append((tokens.shape[1], options["lengths"]))
        return run(self, tokens, **options)

    monkeypatch.setattr(chunks.Chunks, "__call__", told)
    found = read(model, begin(model, 1), [ids(48)], chunk=32)
    assert sizes == [(32, None), (16, None)]
    np.testing.assert_allclose(found.logits[0], logits_of(model, ids(48))[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_saved_state_is_checked_before_it_is_believed(tmp_path):
    model = made("ttt_linear")
    file = tmp_path / "state.safetensors"
    save_reading(file, read(model, begin(model, 1), [ids(9)]), model, "a")
    load_reading(file, model, "a")
    with pytest.raises(InputError, match="read with another tokenizer"):
        load_reading(file, model, "b")
    with pytest.raises(InputError, match="state of another model"):
        load_reading(file, made("ttt_linear", backbone="transformer"), "a")
    content, sound = bytearray(file.read_bytes()), file.read_bytes()
    content[-5] ^= 1
    assert b'"[9]"' in sound  # the number of tokens that were read
    for damaged in (content, sound.replace(b'"[9]"', b'"[8]"')):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged"):
            load_reading(file, model, "a")
    for wrong in (content[:100], b"", b"{}"):
        file.write_bytes(wrong)
        with pytest.raises(InputError, match="cannot be read") as error:
            load_reading(file, model, "a")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="cannot be written"):
        save_reading(tmp_path / "none" / "x", begin(model, 1), model)


@pytest.mark.long
def test_a_saved_cache_of_attention_fits_a_model_with_more_room(tmp_path):
    model, file = made("attention"), tmp_path / "state.safetensors"
    save_reading(file, read(model, begin(model, 1), [ids(9)]), model)
    roomy = with_room_for(model, 200)
    more = generate(roomy, ids(5, 1).tolist(), reading=load_reading(file, roomy), temperature=0.0)[0]
    assert len(more.tokens) == 128
    whole = generate(roomy, np.concatenate([ids(9), ids(5, 1)]).tolist(), temperature=0.0)[0]
    assert more.tokens == whole.tokens
    with pytest.raises(InputError, match="as much room as it was read with"):
        load_reading(file, with_room_for(model, 20))


KEYS = jax.random.split(jax.random.key(0), 2000)


def drawn(logits: np.ndarray, seen=None, **settings) -> np.ndarray:
    """How often each token is drawn."""
    many = np.tile(np.asarray(logits, np.float32), (len(KEYS), 1))
    seen = np.zeros(many.shape, bool) if seen is None else np.tile(seen, (len(KEYS), 1))
    tokens, log_probs = draw(many, seen, KEYS, Sampling(**settings).values(settings.pop("vocab_size", len(logits))))
    np.testing.assert_allclose(log_probs, log_softmax(np.asarray(logits))[np.asarray(tokens)], rtol=1e-5)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / len(KEYS)


P = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, P),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.71}, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        ({"min_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]),  # of 0.4 / 0.85 and 0.3 / 0.85
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_the_settings_say(settings, expected):
    np.testing.assert_allclose(drawn(np.log(P), **settings), expected, atol=0.04)


def test_the_repetition_penalty_makes_what_was_there_less_likely():
    seen = np.array([False, True, False, False, True])
    logits = np.array([0.0, 2.0, 0.0, 0.0, -1.0])
    changed = np.exp([0.0, 1.0, 0.0, 0.0, -2.0])
    np.testing.assert_allclose(drawn(logits, seen, repetition_penalty=2.0), changed / changed.sum(), atol=0.04)


def test_bad_input_is_refused_in_one_line_before_anything_is_computed():
    model = made("attention")
    bad = [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [[]]}, "prompt 1 is empty"),
        ({"prompts": [[1, 50]]}, "token 50 is not in the model's vocabulary of 50"),
        ({"prompts": "text"}, "need a tokenizer"),
        ({"prompts": [1], "stop": ["x"]}, "stop strings .* needs a tokenizer"),
        ({"prompts": [1], "stop": "x"}, "stop strings .* needs a tokenizer"),
        ({"prompts": [1], "stop": [""]}, "text that is not empty"),
        ({"prompts": [1], "chunk": 0}, "chunk must be a whole number of at least 1, got 0"),
        ({"prompts": [1], "num_samples": 1.5}, "num_samples must be a whole number"),
        ({"prompts": [1], "end_ids": [50]}, "end_ids has 50, which is no token of 50"),
        ({"prompts": [[1.5, 2.0]]}, "prompt 1 must be text or a list of token ids"),
        ({"prompts": 5}, "prompts must be text or token ids"),
        ({"prompts": None}, "prompts must be text or token ids"),
        ({"prompts": [1], "max_tokens": 96}, r"97 tokens does not fit the attention cache, which has room for 96"),
        ({"prompts": [1], "max_tokens": 0}, "must be a whole number of at least 1"),
        ({"prompts": [1], "temperature": -1.0}, "temperature"),
        ({"prompts": [1], "top_p": 0.0}, "top_p"),
        ({"prompts": [1], "end_ids": range(9)}, "at most 8"),
    ]
    for arguments, words in bad:
        with pytest.raises(InputError, match=words) as error:
            stream(model, **arguments)  # nothing is asked of it
        assert "\n" not in str(error.value)
