"""Batches: every token where it belongs, the same for any number of processes, found from the step alone."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from tests.data.small import small_config
from tttlm.data import Batch, DataConfig, encode_file, held_out_documents, load_tokenizer, open_data, prepare, store
from tttlm.data.order import Order, proportional_counts, shuffled
from tttlm.data.packing import best_fit
from tttlm.data.prefetch import DevicePrefetch
from tttlm.errors import InputError

LAYOUTS = ["windows", "packed", "documents"]


def opened(folder: Path | str, layout: str = "windows", **changes):
    arguments = {"split": "train", "batch_size": 4, "sequence_length": 32, "align": 8, **changes}
    return open_data(DataConfig(path=str(folder), layout=layout), **arguments)


def stream(folder: Path, split: str = "train") -> np.ndarray:
    tokens = store.Split(folder, split)
    return tokens.read(0, len(tokens)).astype(np.int32)


def documents(folder: Path, split: str = "train") -> list[list[int]]:
    return [document.tokens.tolist() for document in held_out_documents(folder, split)]


def epoch_rows(loader) -> Batch[np.ndarray]:
    """Every row of the first epoch (of layouts whose rows may come in any order)."""
    source = loader.batches._sources[0]
    return source.take(range(len(source)))


def joined(parts: Iterable[Batch[np.ndarray]]) -> Batch[np.ndarray]:
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def same(a: Batch[np.ndarray], b: Batch[np.ndarray]) -> bool:
    there = [one is not None for one in a] == [one is not None for one in b]
    return there and all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


# What stands in a batch


def test_windows_are_the_joined_documents_cut_without_gaps(prepared):
    rows = epoch_rows(opened(prepared))
    tokens = stream(prepared)
    count = (len(tokens) - 1) // 32
    np.testing.assert_array_equal(rows.inputs.ravel(), tokens[: 32 * count])
    np.testing.assert_array_equal(rows.targets.ravel(), tokens[1 : 32 * count + 1])
    assert count > 100
    assert len(store.read_manifest(prepared).parts) > 3  # so that windows reach across shards


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_int32_and_weights_float32(prepared, layout):
    batch = opened(prepared, layout)[3]
    assert (batch.segment_ids is None) == (batch.weights is None) == (layout == "windows")
    assert (batch.continues is None) == (layout != "documents")
    for name, array in batch._asdict().items():
        if array is not None:
            assert array.shape == ((4,) if name == "continues" else (4, 32))
            assert array.dtype == {"weights": np.float32, "continues": np.bool_}.get(name, np.int32)
            assert array.flags.c_contiguous


def pieces_of(rows: Batch[np.ndarray]) -> list[tuple[int, list[int], list[int]]]:
    """(where it starts in the row, inputs, targets) of everything that has a segment of its own."""
    found = []
    for inputs, targets, segments, weights in zip(*rows[:4], strict=True):
        np.testing.assert_array_equal(weights, segments > 0)
        assert not inputs[segments == 0].any()
        assert not targets[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            (here,) = np.nonzero(segments == segment)
            np.testing.assert_array_equal(here, np.arange(here[0], here[0] + len(here)))
            found.append((int(here[0]), inputs[here].tolist(), targets[here].tolist()))
    return found


@pytest.mark.parametrize("align", [1, 8, 32])
def test_packed_examples_have_every_document_once_and_start_it_on_a_mini_batch(prepared, align):
    pieces = pieces_of(epoch_rows(opened(prepared, "packed", align=align)))
    expected = []
    for tokens in documents(prepared):  # a document longer than a row is cut into rows
        expected += [(tokens[i : i + 33][:-1], tokens[i : i + 33][1:]) for i in range(0, len(tokens) - 1, 32)]
    assert sorted((inputs, targets) for _, inputs, targets in pieces) == sorted(expected)
    assert all(start % align == 0 for start, _, _ in pieces)
    assert max(start for start, _, _ in pieces) > 0 or align == 32


@settings(max_examples=200, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 40))
def test_packing_is_best_fit_largest_first(data, capacity):
    sizes = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), np.int64)
    bins, places, count = best_fit(sizes, capacity)
    used = np.zeros((count, capacity), int)
    for size, row, place in zip(sizes, bins, places, strict=True):
        assert place + size <= capacity
        used[row, place : place + size] += 1
    assert used.max(initial=0) <= 1  # nothing lies over anything else
    room: list[int] = []  # the same one by one: each into the fullest bin that has room
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [i for i, free in enumerate(room) if free >= size]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= size
        else:
            room.append(capacity - size)
    assert sorted(capacity - used.sum(1)) == sorted(room)


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        (lambda rng: rng.lognormal(6.4, 1.0, 20_000), 0.97),  # as of the web: median 600, mean 1,000 tokens
        (lambda rng: rng.uniform(60_000, 500_000, 60), 0.97),  # novels
        (lambda rng: rng.lognormal(6.4, 1.0, 300), 0.97),
    ],
)
@pytest.mark.parametrize("row", [2048, 8192])
def test_packing_uses_97_of_100_positions(lengths, wanted, row):
    sizes = np.maximum(lengths(np.random.default_rng(0)), 2).astype(np.int64)
    rest = sizes[sizes % row > 0] % row
    _, _, count = best_fit(-(-rest // 16), row // 16)
    rows = int((sizes // row).sum()) + count
    assert sizes.sum() / (rows * row) >= wanted


def test_each_index_of_the_batch_reads_documents_in_order_one_after_another(prepared):
    loader = opened(prepared, "documents", split="validation", batch_size=3)
    read: list[list[int]] = []
    for row in range(3):
        last = 0
        for step in range(loader.steps_per_epoch):
            batch = jax.tree.map(lambda array, row=row: array[row], loader[step])
            (real,) = np.nonzero(batch.weights)
            if not len(real):
                continue
            (segment,) = set(batch.segment_ids[real].tolist())
            assert batch.continues == (segment == last)
            if segment != last:
                assert segment > last
                last = segment
                read.append([int(batch.inputs[0])])
            assert read[-1][-1] == batch.inputs[0]  # goes on where the step before ended
            np.testing.assert_array_equal(batch.inputs[real][1:], batch.targets[real][:-1])
            read[-1] += batch.targets[real].tolist()
    assert sorted(read) == sorted(documents(prepared, "validation"))


def test_documents_are_read_again_each_epoch(prepared):
    """The carried state is told apart by the segment, so no two documents in a row may have the same."""
    loader = opened(prepared, "documents", batch_size=40)
    steps = loader.steps_per_epoch
    for row in range(40):
        before, after = loader[0].segment_ids[row], loader[steps].segment_ids[row]
        assert set(before[before > 0]).isdisjoint(after[after > 0])


# Order


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_batch(prepared, layout, processes):
    whole = opened(prepared, layout, seed=3)
    parts = [opened(prepared, layout, seed=3, process_index=i, process_count=processes) for i in range(processes)]
    for step in (0, 7, 1_000):
        assert same(joined(part[step] for part in parts), whole[step])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_the_same_after_a_restart_whatever_was_read_before(prepared, layout):
    first, second = opened(prepared, layout, seed=1), opened(prepared, layout, seed=1)
    ahead = second.iterate(start_step=57)
    for step in range(57, 61):
        assert same(next(ahead), first[step])
    assert same(second[3], first[3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_seed_is_another_order(prepared, layout):
    assert not same(opened(prepared, layout, seed=0)[0], opened(prepared, layout, seed=1)[0])


def test_an_epoch_has_every_example_once_and_the_next_has_them_in_another_order():
    order = Order([101], [1.0], seed=5)
    first, second = ([order[i][1] for i in range(e * 101, e * 101 + 101)] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(101))
    assert first != second
    assert first != sorted(first)


def test_epochs_of_different_seeds_are_different():
    orders = [[Order([50], [1.0], seed)[e * 50 + i][1] for i in range(50)] for seed in range(4) for e in range(4)]
    assert len({tuple(order) for order in orders}) == 16


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3_000), seed=st.text(max_size=3))
def test_a_shuffle_is_a_permutation(size, seed):
    assert sorted(shuffled(i, size, seed) for i in range(size)) == list(range(size))


def test_a_shuffle_is_uniform():
    counts = np.zeros((10, 10), int)
    for seed in range(5_000):
        for i in range(10):
            counts[i, shuffled(i, 10, str(seed))] += 1
    # Chi-squared of 9 x 9 degrees of freedom: 81 on average, above 150 once in 200,000 times.
    assert ((counts - 500) ** 2 / 500).sum() < 150


def test_neighbours_do_not_stay_neighbours_in_a_large_epoch():
    places = np.array([shuffled(i, 10**9, "x") for i in range(4_000)])
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.08
    assert abs(places.mean() / 1e9 - 0.5) < 0.03


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_a_mixture_has_each_source_by_its_weight_and_each_example_once_an_epoch(weights, seed):
    sizes = [7 * (i + 1) for i in range(len(weights))]
    order = Order(sizes, weights, seed)
    drawn = [order[i] for i in range(4096)]
    share = np.bincount([source for source, _ in drawn], minlength=len(weights)) / 4096
    np.testing.assert_allclose(share, np.array(weights) / sum(weights), atol=1.01 * len(weights) / 4096)
    for source, size in enumerate(sizes):
        rows = [row for of, row in drawn if of == source]
        for epoch in range(len(rows) // size):
            assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(weights=st.lists(st.floats(5e-324, 1.7e308), min_size=1, max_size=20), total=st.integers(20, 5000))
def test_proportional_counts_have_the_right_sum_and_no_zero(weights, total):
    counts = proportional_counts(weights, total)
    assert counts.sum() == total
    assert counts.min() >= 1


@pytest.fixture(scope="module")
def second(text_folder, sentencepiece_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("second") / "data"
    prepare(small_config(str(text_folder / "0[3-5]*.txt"), sentencepiece_file), folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixtures_have_every_layout(prepared, second, layout):
    config = DataConfig(mixture={str(prepared): 3.0, str(second): 1.0}, layout=layout)
    arguments = {"split": "train", "sequence_length": 32, "align": 8}
    loader = open_data(config, batch_size=8, **arguments)
    halves = [open_data(config, batch_size=8, process_index=i, process_count=2, **arguments) for i in range(2)]
    for step in (0, 5):
        batch = loader[step]
        assert batch.inputs.shape == (8, 32)
        assert same(joined(half[step] for half in halves), batch)
    own = {row.tobytes() for row in epoch_rows(opened(prepared)).inputs}
    if layout == "windows":
        rows = [row.tobytes() in own for step in range(20) for row in loader[step].inputs]
        assert 0.7 < np.mean(rows) < 1.0


# Documents and files for evaluation


def test_a_held_out_document_begins_with_the_separator_and_counts_its_bytes(prepared, text_folder, texts):
    tokenizer = load_tokenizer(prepared)
    found = [*held_out_documents(prepared), *held_out_documents(prepared, "train")]
    assert len(found) == len(texts)
    for document in found:
        path = text_folder / document.name
        assert document.tokens[0] == tokenizer.entry_id == tokenizer.eos_id
        assert document.tokens[1:-1].tolist() == tokenizer.encode(path.read_text())
        assert document.tokens[-1] == tokenizer.eos_id
        assert document.bytes == path.stat().st_size


def test_the_pieces_of_an_encoded_file_join_to_its_tokens(prepared, text_folder, monkeypatch):
    from tttlm.data import cutting

    monkeypatch.setattr(cutting, "BLOCK_BYTES", 300)
    tokenizer = load_tokenizer(prepared)
    path = max(text_folder.iterdir(), key=lambda p: p.stat().st_size)
    pieces = list(encode_file(path, tokenizer))
    assert len(pieces) > 5
    assert np.concatenate([t for t, _ in pieces]).tolist() == [tokenizer.eos_id, *tokenizer.encode(path.read_text())]
    assert sum(size for _, size in pieces) == path.stat().st_size


def test_a_stored_bos_is_the_first_input_of_a_document(tmp_path, text_folder, sentencepiece_file):
    prepare(small_config(text_folder, sentencepiece_file, bos=True), tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data")
    document = next(held_out_documents(tmp_path / "data"))
    (tokens, _), *_ = encode_file(text_folder / document.name, tokenizer)
    assert document.tokens[0] == tokens[0] == tokenizer.entry_id == tokenizer.bos_id
    assert document.tokens[1] != tokenizer.bos_id
    packed = epoch_rows(opened(tmp_path / "data", "packed", sequence_length=4096))
    starts = [inputs[0] for _, inputs, _ in pieces_of(packed)]
    assert set(starts) == {tokenizer.bos_id}


# What has changed, and what cannot be used


def test_the_fingerprint_changes_with_data_tokenizer_and_layout(prepared, second, tmp_path, text_folder):
    prepare(small_config(text_folder, "bytes"), tmp_path / "bytes")
    loaders = [
        opened(prepared),
        opened(prepared, sequence_length=64),
        opened(prepared, "packed"),
        opened(prepared, "packed", align=16),
        opened(prepared, "documents"),
        opened(second),
        opened(tmp_path / "bytes"),
    ]
    assert len({loader.fingerprint for loader in loaders}) == len(loaders)
    shutil.copytree(prepared, tmp_path / "elsewhere")
    assert opened(tmp_path / "elsewhere").fingerprint == loaders[0].fingerprint


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("part-00001/train.tokens", lambda b: b[:-2], r"part-00001/train.tokens has \d+ bytes, was written with"),
        ("part-00001/train.tokens", lambda b: b[:40] + b"\1\0" + b[42:], "part-00001/train.tokens was altered"),
        ("part-00000/train.documents", lambda b: b[:-4] + b"\1\1\1\1", "train.documents was altered"),
        ("tokenizer.model", lambda b: b + b"\0", "tokenizer.model has"),
        ("tokenizer.model", lambda b: b[:-1] + b"\7", "tokenizer.model was altered"),
        ("manifest.json", lambda b: b[:100], "manifest.json: is not JSON"),
        ("manifest.json", lambda b: b.replace(b'"format": 3', b'"format": 9'), "has format 9"),
        ("manifest.json", lambda b: b.replace(b'"bos": false', b'"bos": true'), "manifest.json: was altered"),
        ("part-00000/part.json", lambda b: b.replace(b"000.txt", b"001.txt"), "part.json was altered"),
    ],
)
def test_what_was_altered_is_named_when_the_data_is_opened(altered, name, edit, said):
    with pytest.raises(InputError, match=said) as caught:
        opened(altered(name, edit))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "part-00002")
    with pytest.raises(InputError, match=r"part-00002/[\w.]+ is missing"):
        opened(tmp_path / "copy")


def test_intact_data_is_hashed_once_and_not_each_time_it_is_opened(prepared, tmp_path, monkeypatch):
    from tttlm.data import integrity

    shutil.copytree(prepared, tmp_path / "copy", copy_function=shutil.copyfile)
    hashed = []
    read = integrity.facts_of_file
    monkeypatch.setattr(integrity, "facts_of_file", lambda path: (hashed.append(path), read(path))[1])
    opened(tmp_path / "copy")
    assert len(hashed) > 4
    hashed.clear()
    opened(tmp_path / "copy")
    assert not hashed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": "test"}, "'train' or 'validation'"),
        ({"sequence_length": 20, "align": 16}, "multiple of the mini-batch size 16"),
        ({"batch_size": 3, "process_count": 2}, "cannot be divided evenly"),
        ({"sequence_length": 10**7, "align": 1}, "fewer than one example"),
        ({"vocab_size": 512}, "set it to at least 600"),
    ],
)
def test_impossible_batch_shapes_are_refused(prepared, changes, said):
    with pytest.raises(InputError, match=said):
        opened(prepared, **changes)


def test_missing_data_is_refused_with_the_command_that_prepares_it(tmp_path, prepared, text_folder, sentencepiece_file):
    with pytest.raises(InputError, match=r"does not exist; make it with"):
        opened(tmp_path / "nothing")
    shutil.copytree(prepared, tmp_path / "unfinished")
    (tmp_path / "unfinished" / store.MANIFEST).unlink()
    with pytest.raises(InputError, match=r"is not finished; run the same prepare command again"):
        opened(tmp_path / "unfinished")
    prepare(small_config(text_folder, sentencepiece_file, held_out=0.0), tmp_path / "all")
    with pytest.raises(InputError, match="no validation documents"):
        opened(tmp_path / "all", split="validation")


def test_missing_data_is_prepared_if_the_configuration_names_a_source(tmp_path, text_folder, sentencepiece_file):
    made = DataConfig(path=str(tmp_path / "data"), prepare=small_config(text_folder, sentencepiece_file))
    arguments = {"batch_size": 2, "sequence_length": 32}
    first = open_data(made, split="train", **arguments)
    assert open_data(made, split="train", **arguments).fingerprint == first.fingerprint
    other = DataConfig(path=made.path, prepare=small_config(text_folder, sentencepiece_file, held_out=0.5))
    with pytest.raises(InputError, match=r"was prepared with held_out 0.2, the configuration says 0.5"):
        open_data(other, split="train", **arguments)


def test_processes_that_start_together_prepare_once(tmp_path, text_folder, sentencepiece_file):
    config = DataConfig(path=str(tmp_path / "data"), prepare=small_config(text_folder, sentencepiece_file))
    code = f"""
from tttlm.data.config import *
from tttlm.data import open_data
print(open_data({config!r}, split="train", batch_size=2, sequence_length=32).fingerprint)
"""
    command = [sys.executable, "-c", code]
    together = [
        subprocess.Popen(
            command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in together]
    assert [process.returncode for process in together] == [0, 0], said
    assert len({out for out, _ in said}) == 1
    assert sum("train:" in error for _, error in said) == 1


def test_another_tokenizer_than_the_one_named_is_refused(prepared, tmp_path, text_folder, sentencepiece_file):
    prepare(small_config(text_folder, "bytes"), tmp_path / "bytes")
    arguments = {"split": "train", "batch_size": 2, "sequence_length": 32}
    open_data(DataConfig(path=str(prepared), tokenizer=str(sentencepiece_file)), **arguments)
    with pytest.raises(InputError, match="was not made with tokenizer bytes"):
        open_data(DataConfig(path=str(prepared), tokenizer="bytes"), **arguments)
    with pytest.raises(InputError, match="another tokenizer than"):
        open_data(DataConfig(mixture={str(prepared): 1.0, str(tmp_path / "bytes"): 1.0}), **arguments)


def test_validation_can_come_from_another_folder(prepared, second):
    arguments = {"split": "validation", "batch_size": 2, "sequence_length": 32}
    apart = open_data(DataConfig(path=str(prepared), validation_path=str(second)), **arguments)
    assert same(apart[0], open_data(DataConfig(path=str(second)), **arguments)[0])


# Ahead of the loop


def test_batches_come_in_order_and_waiting_is_measured():
    def slow(count: int):
        for i in range(count):
            time.sleep(0.02)
            yield i

    batches = DevicePrefetch(slow(8), place=lambda batch: batch * 10, size=2)
    assert next(batches) == 0
    assert batches.wait_seconds == 0.0  # filling up before the first step is no waiting
    assert list(batches) == [10, 20, 30, 40, 50, 60, 70]
    assert 0.1 < batches.wait_seconds < 0.5
    assert batches.wait_share() > 0.5

    quick = DevicePrefetch(iter(range(5)), place=lambda batch: batch)
    for _ in quick:
        time.sleep(0.01)
    assert quick.wait_share() < 0.05


def test_transfers_are_started_before_they_are_needed():
    started = []
    batches = DevicePrefetch(iter(range(9)), place=lambda b: (started.append(b), b)[1], size=3)
    assert next(batches) == 0
    assert started == [0, 1, 2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_process_reads_only_its_examples(prepared, layout, monkeypatch):
    read = store.Split.read
    amounts = []
    for processes in (1, 4):
        loader = opened(prepared, layout, batch_size=8, process_count=processes)
        tokens = 0

        def counted(split, start, stop):
            nonlocal tokens
            tokens += stop - start
            return read(split, start, stop)

        with monkeypatch.context() as patch:
            patch.setattr(store.Split, "read", counted)
            for step in range(10):
                loader[step]
        amounts.append(tokens)
    assert 0 < amounts[1] < 0.5 * amounts[0]
