"""The results of an evaluation: `results.json` (its schema is in docs/evaluation.md) and CSV."""

import csv
import io
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class ModelRecord:
    """A model that was evaluated.

    Attributes:
        name: Its name in the results: the distinguishing end of its path.
        path: Its folder.
        step: The step of its checkpoint; None for a released model.
        fingerprint: Changes with its configuration and parameters.
        tokenizer: The fingerprint of its tokenizer.
        parameters: Number of parameters, including embeddings.
        mixers: The pattern of its sequence layers.
        trained_length: Sequence length in tokens of its training; None if unknown.
        changed: Differences from training, in words.
    """

    name: str
    path: str
    step: int | None
    fingerprint: str
    tokenizer: str
    parameters: int
    mixers: list[str]
    trained_length: int | None
    changed: list[str]


@dataclass(frozen=True)
class LossRecord:
    """The loss of a model on one text, or on all.

    Attributes:
        model: Its name.
        text: The name of the text; "all" for the sum over several.
        bytes, words, tokens: Numbers of bytes, words and predicted tokens of the text.
        nats: Summed -log p.
        loss: Nats per token.
        perplexity: exp of that.
        word_perplexity: exp of nats per word.
        bits_per_byte: Nats per byte over log 2.
    """

    model: str
    text: str
    bytes: int
    words: int
    tokens: int
    nats: float
    loss: float
    perplexity: float
    word_perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class CurveRecord:
    """Numbers by position, of one protocol.

    Attributes:
        kind: "loss" (nats per token), "difference" (`model` minus `against`, a model) or "gain" (loss with resets minus
            loss without; `against` is the protocol with resets).
        model: The model.
        against: See `kind`; "" for a loss.
        protocol: "windows n", "stream" or "reset every n".
        bins: Starts of the bins of positions, and the end of the last; position 0 has one token of context.
        documents: Number of documents.
        tokens: Number of tokens of each bin.
        mean: Mean of each bin; None if it has no tokens.
        low, high: Ends of the 95% interval; None for a single document.
    """

    kind: str
    model: str
    against: str
    protocol: str
    bins: list[int]
    documents: int
    tokens: list[int]
    mean: list[float | None]
    low: list[float | None] | None
    high: list[float | None] | None


@dataclass(frozen=True)
class RecallRecord:
    """The recall of a model in one task, at one length and depth.

    Attributes:
        model: The model.
        task: The task.
        length: Number of tokens of a sequence.
        depth: Relative position of the needle; None for tasks without one.
        pairs: Number of pairs of mqar, of tokens of copy; None for the others.
        samples: Number of sequences.
        answers: Number of answers.
        exact_match: Correct answers in percent.
        token_accuracy: Correct tokens of answers in percent.
        nats_per_answer: Mean -log p of an answer.
    """

    model: str
    task: str
    length: int
    depth: float | None
    pairs: int | None
    samples: int
    answers: int
    exact_match: float
    token_accuracy: float
    nats_per_answer: float


@dataclass(frozen=True)
class Results:
    """All results of an evaluation.

    Attributes:
        models: The models.
        texts: Name, bytes, words and digest of each text.
        settings: The configuration.
        notes: Remarks on the results.
        loss, positions, recall: The results of each task.
        format: Version of the file format.
    """

    models: list[ModelRecord]
    texts: list[dict[str, Any]]
    settings: dict[str, Any]
    notes: list[str]
    loss: list[LossRecord] = field(default_factory=list)
    positions: list[CurveRecord] = field(default_factory=list)
    recall: list[RecallRecord] = field(default_factory=list)
    format: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        """The results as plain values, as in `results.json`."""
        return {"format": self.format, **{k: v for k, v in asdict(self).items() if k != "format"}}

    def as_csv(self) -> str:
        """The results as CSV, one number per line with its model, task, part, metric and interval."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            ["model", "task", "part", "text", "position", "length", "depth", "metric", "value", "low", "high"]
        )
        for one in self.loss:
            for metric in ("loss", "perplexity", "word_perplexity", "bits_per_byte"):
                writer.writerow([one.model, "loss", "", one.text, "", "", "", metric, getattr(one, metric), "", ""])
        for curve in self.positions:
            part = curve.protocol + (f" against {curve.against}" if curve.against else "")
            for i, mean in enumerate(curve.mean):
                ends = ["" if side is None else side[i] for side in (curve.low, curve.high)]
                writer.writerow([curve.model, "positions", part, "", curve.bins[i], "", "", curve.kind, mean, *ends])
        for cell in self.recall:
            for metric in ("exact_match", "token_accuracy", "nats_per_answer"):
                place = ["" if cell.depth is None else cell.depth, metric, getattr(cell, metric), "", ""]
                writer.writerow([cell.model, "recall", cell.task, "", "", cell.length, *place])
        return out.getvalue()
