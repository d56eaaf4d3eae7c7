"""The results of an experiment: errors over seeds, shifts with drops in accuracy, agreement of gradients with gains."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import optax
from jaxtyping import Float
from scipy import stats

from tttlm.adaptation.experiment import CLEAN, Condition, Experiment
from tttlm.adaptation.streams import errors
from tttlm.progress import progress_bar
from tttlm.records import read_record, write_sealed
from tttlm.shift import (
    average_thresholded_confidence,
    compare_samples,
    confidence_drop,
    difference_of_confidences,
    entropy_rise,
)

PERMUTATIONS = 49  # few, because the report ranks estimates and does not use p-values


@dataclass(frozen=True)
class Rank:
    """Spearman's rank correlation of two quantities over `count` pairs, with its p-value.

    Attributes:
        correlation: between -1 and 1; NaN if a quantity is constant.
        p_value: p-value of no association, from the t distribution; pairs of the same images are not independent, so it
            is a lower bound.
        count: number of pairs.
    """

    correlation: float
    p_value: float
    count: int


@dataclass(frozen=True)
class Results:
    """The numbers of a report.

    Attributes:
        conditions: names of the test sets, `clean` first.
        errors: for each method, error in percent `[seeds, conditions]`.
        shifts: for each measure, its values `[conditions - 1]`, averaged over seeds; NaN if it could not be computed.
        drops: accuracy on clean images minus that under each shift, in percent, of the model whose features the
            measures use, averaged over the same seeds `[conditions - 1]`.
        shift_ranks: for each measure, its rank correlation with the drops.
        cosines: mean cosine of main and self-supervised gradient `[seeds, conditions]`.
        gains: decrease of the main loss by TTT on the same images, in nats, mean `[seeds, conditions]`.
        alignment_rank: rank correlation of mean cosine and mean gain, over seeds and conditions.
        alignment_rank_images: the same over images.
        image_cosines, image_gains: cosine and gain of each image, `[images]`.
    """

    conditions: list[str]
    errors: dict[str, Float[np.ndarray, "seeds conditions"]]
    shifts: dict[str, Float[np.ndarray, "shifts"]]
    drops: Float[np.ndarray, "shifts"]
    shift_ranks: dict[str, Rank]
    cosines: Float[np.ndarray, "seeds conditions"]
    gains: Float[np.ndarray, "seeds conditions"]
    alignment_rank: Rank
    alignment_rank_images: Rank
    image_cosines: Float[np.ndarray, "images"]
    image_gains: Float[np.ndarray, "images"]


def collect(experiment: Experiment) -> Results:
    """Reads the stored results of an experiment, and computes missing ones."""
    config, conditions = experiment.config, experiment.conditions
    aligned = np.array([[experiment.alignment(seed, c)[1] for c in conditions] for seed in config.seeds])
    gained = np.array([[_gains(experiment, seed, c) for c in conditions] for seed in config.seeds])
    shifts, drops = _shifts(experiment)
    ranks = {name: rank(values, drops) for name, values in shifts.items()}
    return Results(
        conditions=[str(c) for c in conditions],
        errors=all_errors(experiment),
        shifts=shifts,
        drops=drops,
        shift_ranks=dict(sorted(ranks.items(), key=lambda item: -np.nan_to_num(item[1].correlation, nan=-2))),
        cosines=aligned.mean(axis=2),
        gains=gained.mean(axis=2),
        alignment_rank=rank(aligned.mean(axis=2), gained.mean(axis=2)),
        alignment_rank_images=rank(aligned, gained),
        image_cosines=aligned.ravel(),
        image_gains=gained.ravel(),
    )


def all_errors(experiment: Experiment) -> dict[str, Float[np.ndarray, "seeds conditions"]]:
    """The error of each method in percent."""
    return {
        method: np.array(
            [[_error(experiment, seed, method, c) for c in experiment.conditions] for seed in experiment.config.seeds]
        )
        for method in experiment.methods
    }


def rank(one: Any, other: Any) -> Rank:
    """Spearman's rank correlation of two arrays of equal size, without pairs that have a NaN."""
    one, other = np.ravel(one), np.ravel(other)
    finite = np.isfinite(one) & np.isfinite(other)
    one, other = one[finite], other[finite]
    if len(one) < 3 or np.all(one == one[0]) or np.all(other == other[0]):
        return Rank(float("nan"), float("nan"), len(one))
    result = stats.spearmanr(one, other)
    return Rank(float(result.statistic), float(result.pvalue), len(one))


def _error(experiment: Experiment, seed: int, method: str, condition: Condition) -> float:
    labels = experiment.shifted(condition).labels
    return 100 * float(errors(experiment.logits(seed, method, condition), labels).mean())


def _gains(experiment: Experiment, seed: int, condition: Condition) -> Float[np.ndarray, "N"]:
    labels = experiment.shifted(condition).labels
    before, after = (
        optax.softmax_cross_entropy_with_integer_labels(experiment.logits(seed, method, condition), labels)
        for method in ("joint", "ttt")
    )
    return np.asarray(before - after)[: experiment.config.alignment_images]


def _shifts(experiment: Experiment) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every measure for every shift, and the drop in accuracy under each shift."""
    shifts = [c for c in experiment.conditions if c.corruption != CLEAN]
    seeds = experiment.config.seeds[: experiment.config.shift_seeds]
    rows: list[list[dict[str, float | None]]] = [[] for _ in seeds]
    with progress_bar(len(seeds) * len(shifts), "measuring shifts", unit="set") as bar:
        for row, seed in zip(rows, seeds, strict=True):
            for condition in shifts:
                row.append(_measured(experiment, seed, condition))
                bar.update(1)
    names = list(dict.fromkeys(name for row in rows for measured in row for name in measured))
    value = lambda name: [[m.get(name) if m.get(name) is not None else np.nan for m in row] for row in rows]
    errors_of = lambda c: np.mean([_error(experiment, seed, "none", c) for seed in seeds])
    drops = np.array([errors_of(c) - errors_of(experiment.conditions[0]) for c in shifts])
    return {name: np.array(value(name), float).mean(axis=0) for name in names}, drops


def _measured(experiment: Experiment, seed: int, condition: Condition) -> dict[str, float | None]:
    """The measures between unshifted images that were not trained on and those of a condition; stored in a file."""
    file = experiment.folder / f"seed{seed}" / "shift" / f"{condition}.json"
    if file.exists():
        return read_record(file, dict[str, float | None], advice="delete it, and it is measured again", sealed=True)
    source, target = experiment.reference, experiment.shifted(condition)
    source_logits, target_logits = (experiment.plain_logits(seed, images) for images in (source, target))
    measured = compare_samples(
        experiment.features(seed, source), experiment.features(seed, target), permutations=PERMUTATIONS, seed=seed
    )
    values = {m.name: None if m.estimate is None else m.estimate.value for m in measured}
    accuracy = float(np.mean(np.argmax(source_logits, -1) == source.labels))
    predicted = {
        "accuracy lost, by thresholded confidence": average_thresholded_confidence,
        "accuracy lost, by difference of confidences": difference_of_confidences,
    }
    values |= {name: accuracy - f(source_logits, source.labels, target_logits).value for name, f in predicted.items()}
    values["drop of confidence"] = confidence_drop(source_logits, target_logits).value
    values["rise of entropy"] = entropy_rise(source_logits, target_logits).value
    file.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(file, values)
    return values
