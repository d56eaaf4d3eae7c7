"""The order in which shifted samples arrive, and the predictions of a method on it.

The functions that make a stream take `shifts`, a mapping from the name of each shift to the same `N` samples under it,
`[N, ...]`, and their `labels` `[N]`. A method gets only inputs; the caller of `run_stream` compares its predictions
with the labels afterwards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from tttlm.adaptation.adapter import Adapter
from tttlm.errors import InputError

Shifts = Mapping[Any, np.ndarray]  # name of a shift -> the same samples under it, [N, ...], in one order


@dataclass(frozen=True)
class Stream:
    """Samples in order of arrival.

    Attributes:
        inputs: samples `[T, ...]`.
        labels: labels `[T]`, for scoring only.
        starts: bool `[T]`, True where a method is reset to its initial parameters.
        shifts: index `[T]` of the shift of each sample, in the order of the mapping.
    """

    inputs: np.ndarray
    labels: Int[np.ndarray, "T"]
    starts: Bool[np.ndarray, "T"]
    shifts: Int[np.ndarray, "T"]

    def __len__(self) -> int:
        return len(self.labels)


def episodic(shifts: Shifts, labels: Int[np.ndarray, "N"]) -> Stream:
    """One shift after another, with a reset at the start of each.

    Args:
        shifts: the name of each shift, and the same `N` samples under it, `[N, ...]`.
        labels: labels of these samples.
    """
    return _joined(shifts, labels, reset_at_each=True)


def continual(shifts: Shifts, labels: Int[np.ndarray, "N"]) -> Stream:
    """One shift after another without a reset, in the order of the mapping; arguments as for `episodic`."""
    return _joined(shifts, labels, reset_at_each=False)


def growing(severities: Shifts, labels: Int[np.ndarray, "N"]) -> Stream:
    """A shift that grows; every sample occurs once.

    Args:
        severities: severities, which are read in ascending order, and the same `N` samples under each, `[N, ...]`.
        labels: labels of these samples.

    Raises:
        InputError: there are fewer samples than severities.
    """
    order = sorted(severities)
    if len(labels) < len(order):
        raise InputError(
            f"{len(labels)} samples cannot be spread over {len(order)} severities: give at least one for each"
        )
    parts = np.array_split(np.arange(len(labels)), len(order))
    names = list(severities)
    inputs = np.concatenate([severities[name][part] for name, part in zip(order, parts, strict=True)])
    which = np.concatenate([np.full(len(part), names.index(name)) for name, part in zip(order, parts, strict=True)])
    return Stream(inputs, np.asarray(labels), _first_only(len(labels)), which)


def mixed(shifts: Shifts, labels: Int[np.ndarray, "N"], *, seed: int = 0) -> Stream:
    """Every sample once, each under a random shift, so that neighbours are independent; arguments as for `episodic`."""
    which = np.random.default_rng(seed).integers(len(shifts), size=len(labels))
    stacked = list(shifts.values())
    inputs = np.stack([stacked[k][i] for i, k in enumerate(which)])
    return Stream(inputs, np.asarray(labels), _first_only(len(labels)), which)


def correlated_labels(
    shifts: Shifts, labels: Int[np.ndarray, "N"], *, concentration: float = 0.1, seed: int = 0
) -> Stream:
    """One shift after another, each in an order in which samples of a class are clustered.

    As in arXiv 2208.05117: time is divided into as many slots as there are classes, and each class is spread over the
    slots by a Dirichlet draw of that concentration; the smaller it is, the larger the clusters.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    slots: list[list[np.ndarray]] = [[] for _ in classes]
    for label in classes:
        own = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(len(classes), concentration)))[:-1] * len(own)
        for slot, part in zip(slots, np.split(own, cuts.round().astype(int)), strict=True):
            slot.append(part)
    order = np.concatenate([part for slot in slots for part in slot])
    return _joined({name: inputs[order] for name, inputs in shifts.items()}, labels[order], reset_at_each=True)


def run_stream(
    method: Adapter, stream: Stream, *, piece: int = 256, on_samples: Callable[[int], Any] = lambda n: None
) -> Float[np.ndarray, "T V"]:
    """The predictions of a method for every sample of a stream, from its initial parameters.

    Args:
        method: the method; it is reset at the beginning and where `stream.starts` is True.
        piece: the largest number of samples per call, rounded down to a multiple of the method's `batch_size`.
        on_samples: called with the number of samples predicted since the last call.
    """
    size = max(piece // method.batch_size, 1) * method.batch_size
    bounds = [0, *(np.flatnonzero(stream.starts[1:]) + 1), len(stream)]
    predictions = []
    for start, end in pairwise(bounds):
        method.reset()
        for here in range(start, end, size):
            part = stream.inputs[here : min(here + size, end)]
            predictions.append(np.asarray(method(part)))
            on_samples(len(part))
    return np.concatenate(predictions)


def errors(predictions: Float[np.ndarray, "T V"], labels: Int[np.ndarray, "T"]) -> Bool[np.ndarray, "T"]:
    """True where the class of the largest logit is not the label."""
    return np.argmax(predictions, axis=-1) != labels


def _joined(shifts: Shifts, labels: Int[np.ndarray, "N"], *, reset_at_each: bool) -> Stream:
    count, number = len(labels), len(shifts)
    for name, inputs in shifts.items():
        if len(inputs) != count:
            raise InputError(f"shift {name!r} has {len(inputs)} samples, there are {count} labels")
    starts = np.tile(_first_only(count), number) if reset_at_each else _first_only(count * number)
    parts: Sequence[np.ndarray] = list(shifts.values())
    return Stream(np.concatenate(parts), np.tile(labels, number), starts, np.repeat(np.arange(number), count))


def _first_only(count: int) -> Bool[np.ndarray, "T"]:
    return np.arange(count) == 0
