"""Chunks are read alike by a scan over stacked blocks and block by block, which copies no cache."""

import jax
import numpy as np

from tests.inference.small import hybrid, ids, made
from tttlm.inference import begin, chunks, read, with_room_for
from tttlm.inference.chunks import Chunks


def outputs(model, monkeypatch, *, apart: bool) -> list:
    """Of every way to read a chunk, and the state behind them."""
    monkeypatch.setattr(chunks, "on_one_cpu", lambda tree: apart)
    before = begin(model, 2).state
    reader = Chunks(model, before)
    tokens = ids(32).reshape(2, 16).astype(np.int32)
    segments = np.repeat([[1, 2], [1, 1]], 8, axis=1).astype(np.int32)
    found = [
        reader(tokens, on_boundary=True),
        reader(tokens, segments, on_boundary=True),
        reader(tokens, lengths=np.array([16, 3], np.int32))[:, :3],
    ]
    reader.start_again(np.array([False, True]))
    found += [reader(tokens), reader.state]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    return jax.tree.map(np.asarray, found)


def test_blocks_apart_compute_what_stacked_ones_do(monkeypatch):
    model = made("attention", num_layers=2)
    stacked, apart = (outputs(model, monkeypatch, apart=apart) for apart in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), stacked, apart)
    first = Chunks(model, begin(model, 2).state)(ids(32).reshape(2, 16).astype(np.int32))
    np.testing.assert_allclose(apart[3][1], first[1], rtol=1e-4, atol=1e-4)  # it was started again
    assert np.abs(apart[3][0] - first[0]).max() > 0.01


def test_a_reading_that_read_nothing_more_has_buffers_of_its_own():
    model = made("ttt_linear", num_layers=2)
    before = begin(model, 1)
    after = read(model, before, [[]])
    pointers = lambda reading: [a.unsafe_buffer_pointer() for a in jax.tree.leaves((reading.state, reading.seen))]
    assert not {*pointers(before)} & {*pointers(after)}


def test_a_chunk_copies_no_cache():
    """What it needs besides the cache does not grow with its room."""

    def temporary_bytes(room: int) -> int:
        model = with_room_for(hybrid(), room)
        reader = Chunks(model, begin(model, 1).state)
        h = jax.ShapeDtypeStruct((1, 512, model.config.hidden_size), np.float32)
        arguments = reader._of_repeat, reader._stack, 0, reader._states[0], h, None, True
        return chunks._through_one.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    cache = 4 * 2**16 * hybrid().config.hidden_size  # keys, in float32
    assert temporary_bytes(2**16) - temporary_bytes(2**12) < cache / 4
