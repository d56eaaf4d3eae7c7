"""Streaming a text gives the loss of the whole text, whatever the batch size and the chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tttlm.errors import InputError
from tttlm.evaluation.loss import Score, stream_score
from tttlm.model import AttentionConfig, LanguageModel, ModelConfig
from tttlm.training.loss import token_losses


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = ModelConfig(vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, remat="none")
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    # Larger weights than at the start, so that what a layer has learned from its document shows in the loss.
    nnx.update(model, jax.tree.map(lambda x: x * 8, nnx.state(model, nnx.Param)))
    return model


def documents() -> list[list[tuple[np.ndarray, int]]]:
    """Of 1 to 90 tokens, in pieces of all sizes, empty ones included; a byte a token."""
    rng = np.random.default_rng(0)
    result = []
    for length in (40, 1, 90, 17, 64, 2, 33):
        tokens = rng.integers(0, 50, length).astype(np.uint16)
        pieces = np.split(tokens, np.sort(rng.integers(0, length + 1, 3)))
        result.append([(piece, len(piece)) for piece in pieces])
    return result


@pytest.fixture(scope="module")
def alone(model) -> tuple[float, int]:
    """The summed loss of every document run by itself, and the tokens that were predicted."""
    nats, count = 0.0, 0
    forward = nnx.jit(lambda model, tokens: model(tokens))
    for document in documents():
        tokens = np.concatenate([piece for piece, _ in document]).astype(np.int32)
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(tokens)] = tokens
        losses = token_losses(forward(model, jnp.asarray(padded)), jnp.roll(padded, -1, axis=1))
        nats += float(losses[0, : len(tokens) - 1].sum())
        count += len(tokens) - 1
    return nats, count


@pytest.mark.long
@pytest.mark.parametrize(("batch_size", "chunk"), [(3, 16)])
def test_batch_size_and_chunk_do_not_change_the_score(model, alone, batch_size, chunk):
    told: list[int] = []
    score = stream_score(model, documents(), batch_size=batch_size, chunk=chunk, on_progress=told.append)
    assert score.tokens == alone[1]
    assert score.bytes == sum(told) == 247
    assert score.nats == pytest.approx(alone[0], rel=1e-5)


@pytest.fixture(scope="module")
def attention() -> LanguageModel:
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=16,
        mixers=("attention", "sliding_attention"),
        attention=AttentionConfig(max_length=96, sliding_window=9),
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x * 8, nnx.state(model, nnx.Param)))
    return model


@pytest.mark.long
@pytest.mark.parametrize(("batch_size", "chunk"), [(3, 32)])
def test_attention_needs_room_for_one_document_not_for_all_of_a_stream(attention, batch_size, chunk):
    nats = 0.0
    for document in documents():
        tokens = jnp.asarray(np.concatenate([piece for piece, _ in document]).astype(np.int32))[None]
        if tokens.shape[1] > 1:
            nats += float(token_losses(attention(tokens[:, :-1]), tokens[:, 1:]).sum())
    score = stream_score(attention, documents(), batch_size=batch_size, chunk=chunk)
    assert score.nats == pytest.approx(nats, rel=1e-5)


def test_a_document_longer_than_the_cache_is_refused_in_one_line(attention):
    text = np.zeros(120, np.uint16)
    with pytest.raises(InputError, match=r"more than the 96 tokens that attention has room for") as error:
        stream_score(attention, [[(text, 120)]], batch_size=1, chunk=32)
    assert "\n" not in str(error.value)


def test_the_state_is_carried_within_a_document_and_not_into_the_next(model):
    """The same text is cheaper the second time within one document, and costs the same as a document of its own."""
    text = np.tile(np.arange(50, dtype=np.uint16), 2)
    once = stream_score(model, [[(text[:51], 51)]], batch_size=1, chunk=32)
    twice = stream_score(model, [[(text[:51], 51)]] * 2, batch_size=1, chunk=32)
    joined = stream_score(model, [[(text, 100)]], batch_size=1, chunk=32)
    assert twice.nats == pytest.approx(2 * once.nats, rel=1e-6)
    assert abs(joined.nats - twice.nats) > 1e-3


def test_a_score_speaks_of_nats_tokens_and_bytes():
    score = Score(nats=200 * np.log(2), tokens=100, bytes=400)
    assert score.loss == pytest.approx(2 * np.log(2))
    assert score.perplexity == pytest.approx(4)
    assert score.bits_per_byte == pytest.approx(0.5)
