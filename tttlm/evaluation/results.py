"""The results of an evaluation as they are written: `results.json` (docs/evaluation.md has its schema) and CSV."""

import csv
import io
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class ModelRecord:
    """A model that was evaluated.

    Attributes:
        name: What it is called in the results: the end of its path that tells models apart.
        path: Its folder.
        step: The step of its checkpoint; None for a released model.
        fingerprint: Changes with its configuration and parameters.
        tokenizer: The fingerprint of its tokenizer.
        parameters: How many it has, embeddings included.
        mixers: The pattern of its sequence layers.
        trained_length: Tokens of the sequences it was trained on; None where that is not known.
        changed: What is another way than it was trained, in words; empty where nothing is.
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
        bytes, words, tokens: Of the text; tokens are those that were predicted.
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
        kind: "loss" (nats per token), "difference" (of `model` minus `against`, a model) or "gain" (of resetting, minus
            reading on; `against` is the protocol that resets).
        model: The model.
        against: See `kind`; "" for a loss.
        protocol: "windows n", "stream" or "reset every n".
        bins: Where bins of positions begin, and the end; position 0 sees one token.
        documents: How many documents.
        tokens: How many tokens each bin has.
        mean: Of each bin; None where there are no tokens.
        low, high: Of the 95% interval; None for a single document.
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
    """What a model recalled of one task, at one length and depth.

    Attributes:
        model: The model.
        task: The task.
        length: Tokens of a sequence.
        depth: Where the needle was; None for tasks without one.
        pairs: Of mqar the pairs, of copy the tokens to copy; None for the others.
        samples: Sequences.
        answers: Answers that were asked for.
        exact_match: Answers that were right, in percent.
        token_accuracy: Tokens of answers that were right, in percent.
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
    """All of an evaluation.

    Attributes:
        models: What was evaluated.
        texts: Name, bytes, words and digest of each text.
        settings: The configuration.
        notes: What a reader has to know.
        loss, positions, recall: The numbers.
        format: Of this file.
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
        """Plain values, as they are in `results.json`."""
        return {"format": self.format, **{k: v for k, v in asdict(self).items() if k != "format"}}

    def as_csv(self) -> str:
        """One number a line: model, task, what of it, metric, value, and the interval where there is one."""
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
