"""Prepared folders to batches: the batch of step n is a function of the seed and n alone, on any number of processes."""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tttlm.data.config import DataConfig
from tttlm.data.store import MANIFEST, Split, read_manifest
from tttlm.data.tokenizer import Tokenizer, load_tokenizer
from tttlm.data.windows import Windows
from tttlm.errors import InputError

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


class Rows(Protocol):
    """One epoch of rows; each a dict of arrays [T]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


@dataclass(frozen=True)
class Loader:
    """Batches by step.

    Attributes:
        vocab_size: token ids are below this.
        fingerprint: changes when the tokens, the tokenizer or how they are cut change.
        steps_per_epoch: steps after which every row was seen once (rounded down, at least 1).
        tokenizer: what the tokens were made with.
        batch_size: rows of the whole batch; this process gives `batch_size / process_count` of them.
    """

    vocab_size: int
    fingerprint: str
    steps_per_epoch: int
    tokenizer: Tokenizer
    batch_size: int
    rows: Any  # infinite and indexable: row r of step n is rows[n * batch_size + r]
    first_row: int
    local_rows: int

    def __getitem__(self, step: int) -> Batch:
        """This process's rows of a step: `inputs`, `targets` int32 [B, T] and what the layout adds."""
        if step < 0:
            raise IndexError(f"steps are counted from 0, there is no step {step}")
        first = step * self.batch_size + self.first_row
        rows = [self.rows[i] for i in range(first, first + self.local_rows)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def iterate(self, start_step: int = 0, *, threads: int = 1, ahead: int = 4) -> Iterator[Batch]:
        """Batches from `start_step` on, without end, made `ahead` of time by background threads."""
        import grain

        steps = grain.MapDataset.source(_Steps(self, start_step))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        return iter(steps.to_iter_dataset(options, allow_nones=False))


@dataclass(frozen=True)
class _Steps:
    """The steps as a grain data source."""

    loader: Loader
    start: int

    def __len__(self) -> int:
        return sys.maxsize - self.start

    def __getitem__(self, index: Any) -> Batch:
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
) -> Loader:
    """Opens prepared data (preparing it first where the configuration says from what).

    Args:
        config: the folder or mixture of folders, and the layout.
        split: "train" or "validation".
        batch_size: rows of the whole batch, over all processes.
        sequence_length: tokens of a row.
        seed: of the order of rows, reshuffled each epoch.
        align: mini-batch size; packed documents start on its multiples.
        process_index, process_count: this process gives its share of the rows, in order.

    Raises:
        InputError: the data is missing, unfinished, damaged, too small, or was made with another tokenizer.
    """
    config.check()
    if split not in ("train", "validation"):
        raise InputError(f"split is 'train' or 'validation', not {split!r}")
    if batch_size % process_count:
        raise InputError(f"a batch of {batch_size} rows cannot be shared evenly by {process_count} processes")
    if sequence_length < 1 or sequence_length % align:
        raise InputError(
            f"sequence_length {sequence_length} must be a positive multiple of the mini-batch size {align}"
        )
    folders = _folders(config, split)
    manifests = [read_manifest(folder) for folder in folders]
    tokenizer = _one_tokenizer(config, list(folders), manifests)
    sources = [
        _rows(config, folder, m, split, sequence_length, align) for folder, m in zip(folders, manifests, strict=True)
    ]
    local = batch_size // process_count
    cut = (
        config.layout,
        sequence_length,
        align,
        split,
        [(m["fingerprint"], w) for m, w in zip(manifests, folders.values(), strict=True)],
    )
    return Loader(
        vocab_size=tokenizer.vocab_size,
        fingerprint=hashlib.sha256(repr(cut).encode()).hexdigest(),
        steps_per_epoch=max(1, sum(len(rows) for rows in sources) // batch_size),
        tokenizer=tokenizer,
        batch_size=batch_size,
        rows=_endless(sources, list(folders.values()), _seed(seed, split)),
        first_row=process_index * local,
        local_rows=local,
    )


def _folders(config: DataConfig, split: str) -> dict[Path, float]:
    if split == "validation" and config.validation_path:
        return {Path(config.validation_path): 1.0}
    if config.mixture:
        return {Path(path): weight for path, weight in config.mixture.items()}
    path = Path(config.path)
    if config.prepare.given and not (path / MANIFEST).exists():
        from tttlm.data.prepare import prepare

        prepare(config.prepare, path, wait=True)
    return {path: 1.0}


def _one_tokenizer(config: DataConfig, folders: list[Path], manifests: list[dict]) -> Tokenizer:
    prints = {manifest["tokenizer"]["fingerprint"] for manifest in manifests}
    if len(prints) > 1:
        raise InputError(
            f"{folders[0]} and another folder of the mixture have different tokenizers; prepare them with one"
        )
    tokenizer = load_tokenizer(folders[0])
    if config.tokenizer:
        wanted = load_tokenizer(config.tokenizer)
        if wanted.fingerprint not in prints:
            raise InputError(
                f"{folders[0]} was not made with tokenizer {config.tokenizer}; prepare it again, or name its own"
            )
    return tokenizer


def _rows(config: DataConfig, folder: Path, manifest: dict, split: str, length: int, align: int) -> Rows:
    stored = Split(folder, split, manifest)
    if not len(stored):
        raise InputError(f"{folder} has no {split} documents; prepare it again with another --held-out")
    if config.layout == "windows":
        return Windows(stored, length)
    raise NotImplementedError(config.layout)


def _endless(sources: list[Rows], weights: list[float], seed: int) -> "grain.MapDataset":
    """Every source shuffled anew each epoch, and mixed by weight."""
    import grain

    datasets = [
        grain.MapDataset.source(rows).shuffle(seed=(seed + 7919 * i) % 2**32).repeat() for i, rows in enumerate(sources)
    ]
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)


def _seed(seed: int, split: str) -> int:
    """Spreads seeds out: grain counts its own up by one each epoch, and 0 and 1 are not to share epochs."""
    return int.from_bytes(hashlib.sha256(f"{split} {seed}".encode()).digest()[:4], "little")
