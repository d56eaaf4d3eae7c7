"""The results of a comparison with standard errors, read from the folders of its runs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tttlm.comparison.children import read_process
from tttlm.comparison.experiment import Comparison, Entry
from tttlm.comparison.scores import read_score, score_key, text_of
from tttlm.errors import InputError
from tttlm.model import parameter_count
from tttlm.training.config import TrainConfig
from tttlm.training.metrics import Record, read_metrics
from tttlm.training.run_folder import RunFolder


@dataclass(frozen=True)
class Estimate:
    """A mean over documents and its standard error; `error` is None for a single document."""

    mean: float
    error: float | None

    def text(self, sign: str = "") -> str:
        return f"{self.mean:{sign}.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


@dataclass(frozen=True)
class Curve:
    """The loss curve of one run, arrays `[points]`.

    Attributes:
        tokens, flops, seconds: cost up to each point, from the metrics; FLOPs by the model's own formula.
        loss: nats per token.
    """

    tokens: list[float]
    flops: list[float]
    seconds: list[float]
    loss: list[float]


@dataclass(frozen=True)
class Result:
    """The results of one model.

    Attributes:
        name: the name of the model.
        shape: number of layers, hidden size, heads, intermediate size, mixers and the changes made by the matching.
        parameters: number of parameters, including embeddings.
        flops_per_token: FLOPs per token of a forward pass at the training length.
        seeds: seeds of the runs.
        loss: held-out nats per token over the positions within the training length.
        bits_per_byte: the same loss in bits per byte.
        difference: its loss minus that of the reference model, document by document; None for the reference itself.
        by_seed: the loss of each seed.
        by_position: nats per token for each bin of positions.
        tokens_per_second: training speed, the median over steps.
        step_memory: memory of the compiled step in bytes; None if unknown.
        peak_memory: peak memory of the training process in bytes; None if unknown.
        training: FLOPs, tokens and seconds of one run, the mean over seeds.
        held_out, train: a curve for each seed, of the validation split and of the training batches.
    """

    name: str
    shape: dict[str, Any]
    parameters: int
    flops_per_token: float
    seeds: list[int]
    loss: Estimate
    bits_per_byte: Estimate
    difference: Estimate | None
    by_seed: list[float]
    by_position: list[Estimate]
    tokens_per_second: float
    step_memory: int | None
    peak_memory: int | None
    training: dict[str, float]
    held_out: list[Curve]
    train: list[Curve]


@dataclass(frozen=True)
class Results:
    """The results of a comparison, and the text and device they were measured on."""

    models: list[Result]
    bins: list[int]
    trained_length: int
    documents: list[str]
    tokens_scored: int
    device: str
    jax: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_results(comparison: Comparison) -> Results:
    """Reads the results of a comparison whose runs are all trained and scored."""
    scores = {entry.name: [_score(comparison, run) for run in entry.configs] for entry in comparison.entries}
    within = {name: _by_document(of_seeds, comparison.length) for name, of_seeds in scores.items()}
    models = []
    for index, entry in enumerate(comparison.entries):
        base = comparison.entries[0 if comparison.config.against == "first" else max(0, index - 1)].name
        own = within[entry.name].mean(axis=0)
        difference = own - within[base].mean(axis=0) if index else None
        models.append(_result(entry, scores[entry.name], within[entry.name], difference))
    first = next(iter(scores.values()))[0]
    return Results(
        models,
        first["bins"],
        comparison.length,
        first["documents"],
        int(np.sum(first["tokens"])),
        first["device"],
        first["jax"],
    )


def estimate(by_document: Float[np.ndarray, "documents"]) -> Estimate:
    """Mean and standard error over documents, each counted once."""
    count = len(by_document)
    error = float(np.std(by_document, ddof=1) / np.sqrt(count)) if count > 1 else None
    return Estimate(float(np.mean(by_document)), error)


def _score(comparison: Comparison, run: TrainConfig) -> dict[str, Any]:
    score = read_score(Path(run.run), score_key(run, text_of(comparison), comparison.config.positions))
    assert score is not None, f"{run.run} has no score"
    return score


def _by_document(scores: list[dict[str, Any]], length: int) -> Float[np.ndarray, "seeds documents"]:
    """Nats per token over the positions before `length`."""
    rows = []
    for score in scores:
        bins = score["bins"].index(length) if length in score["bins"] else len(score["bins"]) - 1
        nats, tokens = (np.asarray(score[name])[:, :bins].sum(axis=1) for name in ("nats", "tokens"))
        rows.append(nats / tokens)
    return np.stack(rows)


def _by_position(scores: list[dict[str, Any]]) -> list[Estimate]:
    nats = np.mean([score["nats"] for score in scores], axis=0)
    tokens = np.asarray(scores[0]["tokens"])
    of_bin = lambda n, t: estimate(n[t > 0] / t[t > 0]) if t.any() else Estimate(float("nan"), None)
    return [of_bin(n, t) for n, t in zip(nats.T, tokens.T, strict=True)]


def _result(entry: Entry, scores: list[dict[str, Any]], within: np.ndarray, difference: np.ndarray | None) -> Result:
    run = entry.configs[0]
    records = [read_metrics(RunFolder(config.run).metrics) for config in entry.configs]
    for config, lines in zip(entry.configs, records, strict=True):
        if not any("tokens_seen" in line for line in lines):
            raise InputError(f"{RunFolder(config.run).metrics} has no metrics of training to report on")
    speeds: list[Any] = [r["tokens_per_second"] for lines in records for r in lines if "tokens_per_second" in r]
    ends: list[Any] = [[r for r in lines if "tokens_seen" in r][-1] for lines in records]
    bits = within.mean(axis=0) / np.log(2) / np.asarray(scores[0]["bytes_per_token"])
    peaks = [facts.peak_memory for config in entry.configs if (facts := read_process(Path(config.run)))]
    return Result(
        name=entry.name,
        shape=entry.shape,
        parameters=parameter_count(run.model),
        flops_per_token=run.model.flops_per_token(run.sequence_length),
        seeds=[config.seed for config in entry.configs],
        loss=estimate(within.mean(axis=0)),
        bits_per_byte=estimate(bits),
        difference=None if difference is None else estimate(difference),
        by_seed=within.mean(axis=1).tolist(),
        by_position=_by_position(scores),
        tokens_per_second=float(np.median(speeds)) if speeds else float("nan"),
        step_memory=scores[0]["step_memory"],
        peak_memory=max(peaks) if peaks else None,
        training={
            name: float(np.mean([end[key] for end in ends]))
            for name, key in (("tokens", "tokens_seen"), ("flops", "flops"), ("seconds", "seconds"))
        },
        held_out=[_curve(lines, "validation_loss") for lines in records],
        train=[_curve(lines, "loss") for lines in records],
    )


def _curve(records: list[Record], loss: str) -> Curve:
    curve = Curve([], [], [], [])
    spent: dict[str, Any] = {}
    for record in records:
        spent = record if "tokens_seen" in record else spent
        if loss in record and spent:
            curve.tokens.append(float(spent["tokens_seen"]))
            curve.flops.append(float(spent["flops"]))
            curve.seconds.append(float(spent["seconds"]))
            curve.loss.append(float(record[loss]))
    return curve
