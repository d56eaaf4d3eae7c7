"""Batches from prepared folders: the batch of step n is a function of the seed and n, on any number of processes."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tttlm.data.batch import Batch
from tttlm.data.config import DataConfig
from tttlm.data.document_batches import DocumentBatches
from tttlm.data.generated import GeneratedBatches
from tttlm.data.integrity import verify
from tttlm.data.order import Order
from tttlm.data.packing import Packed
from tttlm.data.store import MANIFEST, Documents, Manifest, Split, read_manifest, reading
from tttlm.data.tokenizer import Tokenizer
from tttlm.data.tokenizer_files import load_tokenizer
from tttlm.data.windows import Windows
from tttlm.errors import InputError


class Examples(Protocol):
    """One epoch of examples that can be read in any order."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Batch[np.ndarray]:
        """Reads the examples of these indices as a batch."""
        ...


class Batches(Protocol):
    """An endless sequence of batches.

    Attributes:
        steps_per_epoch: steps after which every example has been read (rounded down, at least 1).
    """

    steps_per_epoch: int

    def batch(self, step: int, examples: range) -> Batch[np.ndarray]:
        """Reads the examples of these indices of the batch of a step."""
        ...


@dataclass(frozen=True)
class Loader:
    """Batches by step; of each batch, the examples of this process.

    Attributes:
        vocab_size: upper bound (exclusive) of the token ids.
        fingerprint: changes with the tokens, the tokenizer and the layout.
        steps_per_epoch: steps after which every example has been read (rounded down, at least 1).
        tokenizer: the tokenizer that the tokens were made with.
        fill: fraction of positions that hold a token; less than 1 if examples are padded.
        batches: the batches over all processes.
        examples: the indices within a batch that this process reads.
    """

    vocab_size: int
    fingerprint: str
    steps_per_epoch: int
    tokenizer: Tokenizer
    fill: float
    batches: Batches
    examples: range

    def __getitem__(self, step: int) -> Batch[np.ndarray]:
        """Reads this process's part of the batch of a step.

        The layout "windows" gives only `inputs` and `targets`; "packed" adds `segment_ids` and `weights`, "documents"
        also `continues`. Generated sequences have `weights` besides `inputs` and `targets`.

        Raises:
            IndexError: the step is negative.
        """
        if step < 0:
            raise IndexError(f"steps are counted from 0, there is no step {step}")
        return self.batches.batch(step, self.examples)

    def iterate(self, start_step: int = 0, *, threads: int = 1, ahead: int = 4) -> Iterator[Batch[np.ndarray]]:
        """Yields batches from `start_step` on without end; `threads` threads prepare `ahead` batches in advance."""
        import grain

        steps = grain.MapDataset.source(_Steps(self, start_step))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))


@dataclass(frozen=True)
class _Steps:
    """The steps as a grain data source. An element is a batch, because grain's overhead per element is larger than the
    time to read an example."""

    loader: Loader
    start: int

    def __len__(self) -> int:
        return sys.maxsize - self.start

    def __getitem__(self, index: Any) -> Batch[np.ndarray]:
        return self.loader[self.start + int(index)]


def open_data(
    config: DataConfig,
    *,
    split: str,
    batch_size: int,
    sequence_length: int,
    seed: int = 0,
    align: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    vocab_size: int | None = None,
) -> Loader:
    """Opens prepared data, and prepares it first if it does not exist and the configuration names a source.

    Args:
        config: the folder or mixture of folders, and the layout.
        split: "train" or "validation".
        batch_size: examples of a batch, over all processes.
        sequence_length: tokens of an example.
        seed: seed of the order of examples, which are reshuffled each epoch.
        align: mini-batch size; packed documents start at its multiples.
        process_index, process_count: a batch has `process_count` equal parts, of which this process reads one.
        vocab_size: vocabulary size of the model, to compare with the tokenizer's; None skips the check.

    Raises:
        InputError: the data is missing, unfinished, damaged, too small, was made with another tokenizer, or has ids
            that the model's vocabulary lacks.
    """
    config.validate()
    with reading(config.path):
        return _open(config, split, batch_size, sequence_length, seed, align, process_index, process_count, vocab_size)


def _open(
    config: DataConfig,
    split: str,
    batch_size: int,
    sequence_length: int,
    seed: int,
    align: int,
    process_index: int,
    process_count: int,
    vocab_size: int | None,
) -> Loader:
    if split not in ("train", "validation"):
        raise InputError(f"split is 'train' or 'validation', not {split!r}")
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"a batch of {batch_size} examples cannot be divided evenly over {process_count} processes: "
            "change batch_size"
        )
    if sequence_length < 1 or sequence_length % align:
        raise InputError(
            f"sequence_length {sequence_length} must be a positive multiple of the mini-batch size {align}"
        )
    if config.generated.tasks:
        return _open_generated(config, split, batch_size, sequence_length, seed, process_index, process_count)
    folders = _folders(config, split)
    manifests = [verify(folder) for folder in folders]
    tokenizer = _one_tokenizer(config, list(folders), manifests)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the tokens of {next(iter(folders))} go up to {tokenizer.vocab_size - 1}, the model has a vocab_size of "
            f"{vocab_size}; set it to at least {tokenizer.vocab_size}"
        )
    splits = [_split(folder, split, manifest) for folder, manifest in zip(folders, manifests, strict=True)]
    weights = list(folders.values())
    batches, fill = _batches(config.layout, splits, weights, batch_size, sequence_length, align, seed)
    prints = [manifest.fingerprint for manifest in manifests]
    cut = (config.layout, sequence_length, align if config.layout == "packed" else 1, split, prints, weights)
    return Loader(
        vocab_size=tokenizer.vocab_size,
        fingerprint=sha256(repr(cut).encode()).hexdigest(),
        steps_per_epoch=batches.steps_per_epoch,
        tokenizer=tokenizer,
        fill=fill,
        batches=batches,
        examples=_part(batch_size, process_index, process_count),
    )


def _open_generated(
    config: DataConfig,
    split: str,
    batch_size: int,
    sequence_length: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> Loader:
    tokenizer = load_tokenizer("bytes")
    batches = GeneratedBatches(
        config.generated,
        sequence_length=sequence_length,
        vocab_size=tokenizer.vocab_size,
        seed=seed,
        split=split,
    )
    return Loader(
        vocab_size=tokenizer.vocab_size,
        fingerprint=batches.fingerprint,
        steps_per_epoch=batches.steps_per_epoch,
        tokenizer=tokenizer,
        fill=1.0,
        batches=batches,
        examples=_part(batch_size, process_index, process_count),
    )


def _part(batch_size: int, process_index: int, process_count: int) -> range:
    """The indices within a batch that a process reads."""
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)


class ShuffledExamples:
    """Batches of shuffled examples: sources mixed by weight, each reshuffled every epoch."""

    def __init__(self, sources: Sequence[Examples], order: Order, batch_size: int) -> None:
        self._sources, self._order, self._batch_size = sources, order, batch_size
        self.steps_per_epoch = max(1, sum(map(len, sources)) // batch_size)

    def batch(self, step: int, examples: range) -> Batch[np.ndarray]:
        picked = [self._order[step * self._batch_size + position] for position in examples]
        if len(self._sources) == 1:
            return self._sources[0].take([index for _, index in picked])
        positions = [[i for i, (of, _) in enumerate(picked) if of == number] for number in range(len(self._sources))]
        taken = [
            source.take([picked[i][1] for i in of_source])
            for source, of_source in zip(self._sources, positions, strict=True)
            if of_source
        ]
        by_position = np.argsort(np.concatenate([np.array(of_source, np.int64) for of_source in positions]))
        joined: Any = [a[0] if a[0] is None else np.concatenate(a)[by_position] for a in zip(*taken, strict=True)]
        return Batch(*joined)


def _batches(
    layout: str,
    splits: list[Split],
    weights: list[float],
    batch_size: int,
    length: int,
    align: int,
    seed: int,
) -> tuple[Batches, float]:
    name = splits[0].name
    if layout == "documents":
        if batch_size < len(splits):
            raise InputError(
                f"a batch of {batch_size} cannot hold a document of each of {len(splits)} sources; "
                f"raise batch_size to at least {len(splits)}, or choose another layout"
            )
        documents = [Documents(split) for split in splits]
        batches = DocumentBatches(documents, weights, length, batch_size, seed if name == "train" else None)
        positions = batches.steps_per_epoch * batch_size * length
        return batches, sum(int(d.positions.sum()) for d in documents) / positions
    examples: list[Examples] = []
    fill = 1.0
    if layout == "packed":
        packed = [Packed(Documents(split), length, align, seed) for split in splits]
        examples.extend(packed)
        fill = float(np.average([p.fill for p in packed], weights=weights))
    else:
        examples.extend(Windows(split, length) for split in splits)
    order = Order([len(of) for of in examples], weights, seed, name)
    return ShuffledExamples(examples, order, batch_size), fill


def _split(folder: Path, name: str, manifest: Manifest) -> Split:
    split = Split(folder, name, manifest)
    if len(split) < 2:
        raise InputError(f"{folder} has no {name} documents; prepare it again with another --held_out")
    return split


def _folders(config: DataConfig, split: str) -> dict[Path, float]:
    """The folders and their weights, prepared first if configured."""
    if split == "validation" and config.validation_path:
        return {Path(config.validation_path): 1.0}
    if config.mixture:
        return {Path(path): weight for path, weight in config.mixture.items()}
    path = Path(config.path)
    if config.prepare.given:
        from tttlm.data.preparation import describe, prepare, source_changed

        if not (path / MANIFEST).exists():
            prepare(config.prepare, path, wait=True)
        elif changed := source_changed(config.prepare, path):
            raise InputError(f"{path} was prepared from another {changed}; name another path, or delete that folder")
        made, wanted = read_manifest(path).config, describe(config.prepare)
        if differing := [name for name in wanted if made.get(name) != wanted[name]]:
            name = differing[0]
            raise InputError(
                f"{path} was prepared with {name} {made.get(name)!r}, the configuration says {wanted[name]!r}; "
                "name another path, or delete that folder"
            )
    return {path: 1.0}


def _one_tokenizer(config: DataConfig, folders: list[Path], manifests: list[Manifest]) -> Tokenizer:
    facts = [manifest.tokenizer for manifest in manifests]
    for folder, its in zip(folders, facts, strict=True):
        if its.fingerprint != facts[0].fingerprint:
            raise InputError(f"{folder} was made with another tokenizer than {folders[0]}; prepare both with the same")
    if config.tokenizer:  # its control tokens may differ: they belong to the folder
        wanted = load_tokenizer(config.tokenizer)
        if (wanted.kind, sha256(wanted.file_bytes).hexdigest()) != (facts[0].kind, facts[0].sha256):
            raise InputError(
                f"{folders[0]} was not made with tokenizer {config.tokenizer}; prepare it again with that one"
            )
    return load_tokenizer(folders[0])
