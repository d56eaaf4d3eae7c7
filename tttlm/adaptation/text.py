"""Dynamic evaluation under a shift of text: every model is scored on every text, with and without learning."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from tttlm.adaptation.language_model import DynamicConfig, DynamicEvaluation, TextLosses
from tttlm.errors import InputError
from tttlm.model import LanguageModel
from tttlm.plot_style import tidy
from tttlm.progress import progress_bar
from tttlm.ranges import OutputPath, Range
from tttlm.records import read_record, write_file, write_json, write_sealed
from tttlm.shift import Measurement, compare_counts, compare_samples

POINTS = 24  # number of points of a curve


@dataclass(frozen=True)
class TextConfig:
    """Configuration of an experiment on language models of different texts."""

    kind: Literal["text"] = "text"
    """The kind of experiment; `images` compares methods on corrupted images."""
    output: OutputPath = "runs/adapt-text"
    """Folder of the report."""
    runs: tuple[str, ...] = ()
    """Folders of at least two runs; every model is scored on the held-out text of every run."""
    text_bytes: Annotated[int, Range(least=1000)] = 60_000
    """Amount of held-out text of each run; the last document is truncated."""
    adapt: DynamicConfig = field(default_factory=lambda: DynamicConfig(learning_rate=0.05))


class Reader(NamedTuple):
    """A model, and held-out text of its training distribution.

    Attributes:
        name: the name in the report.
        model: the model, with attention caches as long as the longest text.
        encode: a function from text to token ids, with the token in front that precedes a document in training.
        texts: held-out documents.
    """

    name: str
    model: LanguageModel
    encode: Callable[[str], Int[np.ndarray, "T"]]
    texts: Sequence[str]


@dataclass(frozen=True)
class Reading:
    """The scores of one model on one text.

    Attributes:
        model, text: names of the model and of the text.
        bytes: length of the text in UTF-8.
        tokens: tokens that were predicted.
        static, dynamic: bits per byte without and with dynamic evaluation.
        position: tokens read, at the points of the curves.
        static_curve, dynamic_curve: mean loss in nats per token around each position, documents joined.
    """

    model: str
    text: str
    bytes: int
    tokens: int
    static: float
    dynamic: float
    position: list[float]
    static_curve: list[float]
    dynamic_curve: list[float]


def read_all(readers: Sequence[Reader], config: DynamicConfig, kept: Path | None = None) -> list[Reading]:
    """Scores every text with every model.

    Args:
        readers: the models and their texts.
        config: the configuration of dynamic evaluation.
        kept: a folder in which each result is stored at once; an existing result of the same model, text and
            configuration is reused.

    Raises:
        InputError: the folder cannot be written, or a reading in it was altered.
    """
    readings = []
    for reader in readers:
        static, dynamic = (
            DynamicEvaluation(reader.model, settings) for settings in (DynamicConfig(stretch=config.stretch), config)
        )
        for other in readers:
            file = kept / f"{_key(reader, other, config)}.json" if kept else None
            if file and file.exists():
                readings.append(read_record(file, Reading, advice="delete it, and it is computed again", sealed=True))
                continue
            documents = [reader.encode(text) for text in other.texts]
            total = 2 * sum(max(len(document) - 1, 0) for document in documents)
            with progress_bar(total, f"{reader.name} on {other.name}", unit="token") as bar:
                losses = [evaluation(documents, on_tokens=bar.update) for evaluation in (static, dynamic)]
            readings.append(_reading(reader.name, other, *losses))
            if file:
                write_sealed(file, readings[-1])
    return readings


def _key(reader: Reader, other: Reader, config: DynamicConfig) -> str:
    """A digest of the model's parameters, the text and the configuration, which identifies a result."""
    parts = [reader.name, other.name, repr(reader.model.config), repr(config), *other.texts]
    digest = sha256("\0".join(parts).encode())
    for path, parameter in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(reader.model))):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(parameter).tobytes())
    return digest.hexdigest()[:32]


def measure_shifts(readers: Sequence[Reader], stretch: int) -> dict[str, list[Measurement]]:
    """For each model, the shift from its own text to each other text: of token counts, and of features of stretches."""
    shifts = {}
    for reader in readers:
        own_counts, own_features = _counts(reader, reader.texts), _features(reader, reader.texts, stretch)
        for other in readers:
            if other is not reader:
                counts = compare_counts(own_counts, _counts(reader, other.texts), permutations=49)
                features = compare_samples(own_features, _features(reader, other.texts, stretch), permutations=49)
                shifts[f"{reader.name} to {other.name}"] = [*counts, *features]
    return shifts


def write_text_report(
    readings: Sequence[Reading], shifts: dict[str, list[Measurement]], config: TextConfig, command: str, folder: Path
) -> Path:
    """Writes `report.md`, `report.json` and `losses.png`; returns the first.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _draw(readings, folder / "losses.png")
        plain = {key: [asdict(each) for each in measured] for key, measured in shifts.items()}
        facts = {"command": command, "config": asdict(config), "readings": [asdict(r) for r in readings]}
        write_json(folder / "report.json", {**facts, "shifts": plain})
        write_file(folder / "report.md", ("\n".join(_lines(readings, shifts, config, command)) + "\n").encode())
    except OSError as error:
        raise InputError(f"the report cannot be written to {folder}: {error.strerror or error}") from None
    return folder / "report.md"


def reading_table(readings: Sequence[Reading]) -> list[str]:
    """Bits per byte of every model on every text, as lines of Markdown."""
    return [
        "| model of | reads | bytes | bits per byte | with dynamic evaluation | gain |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r.model} | {r.text} | {r.bytes:,} | {r.static:.3f} | {r.dynamic:.3f} | {r.static - r.dynamic:+.3f} |"
            for r in readings
        ),
    ]


def _reading(model: str, text: Reader, static: TextLosses, dynamic: TextLosses) -> Reading:
    size = sum(len(each.encode()) for each in text.texts)
    curves = [np.array_split(np.concatenate(losses.losses), POINTS) for losses in (static, dynamic)]
    ends = np.cumsum([len(part) for part in curves[0]])
    return Reading(
        model=model,
        text=text.name,
        bytes=size,
        tokens=static.tokens,
        static=static.nats / np.log(2) / size,
        dynamic=dynamic.nats / np.log(2) / size,
        position=[float(end - len(part) / 2) for end, part in zip(ends, curves[0], strict=True)],
        static_curve=[float(part.mean()) for part in curves[0]],
        dynamic_curve=[float(part.mean()) for part in curves[1]],
    )


def _counts(reader: Reader, texts: Sequence[str]) -> Int[np.ndarray, "documents V"]:
    size = reader.model.config.vocab_size
    return np.stack([np.bincount(reader.encode(text)[1:], minlength=size) for text in texts])


def _features(reader: Reader, texts: Sequence[str], stretch: int) -> Float[np.ndarray, "N D"]:
    """The mean features of each complete stretch of tokens, each read from the initial state."""
    parts = [reader.encode(text)[1:] for text in texts]
    rows = [part[: len(part) // stretch * stretch].reshape(-1, stretch) for part in parts]
    tokens = np.concatenate(rows)[:500].astype(np.int32)
    if len(tokens) < 8:
        raise InputError(
            f"the text of {reader.name} has {len(tokens)} complete stretches of {stretch} tokens, eight are needed: "
            "raise text_bytes, or lower adapt.stretch"
        )
    pooled = nnx.jit(lambda model, tokens: jnp.mean(model.features(tokens), axis=1))
    return np.concatenate([np.asarray(pooled(reader.model, tokens[i : i + 1])) for i in range(len(tokens))])


def _draw(readings: Sequence[Reading], png: Path) -> None:
    models = list(dict.fromkeys(r.model for r in readings))
    texts = list(dict.fromkeys(r.text for r in readings))
    figure = Figure(figsize=(5.5 * len(texts), 3.4 * len(models)), layout="constrained")
    panels: Any = figure.subplots(len(models), len(texts), squeeze=False)
    for reading in readings:
        axes = panels[models.index(reading.model)][texts.index(reading.text)]
        axes.plot(reading.position, reading.static_curve, color="#000000", label="static parameters")
        axes.plot(reading.position, reading.dynamic_curve, color="#d55e00", label="dynamic evaluation")
        axes.set_title(f"model of {reading.model} reads {reading.text}", fontsize=9)
        axes.set(xlabel="tokens read, documents joined", ylabel="nats per token")
        tidy(axes)
    panels[0][0].legend(frameon=False)
    figure.savefig(png, dpi=130)


def _lines(
    readings: Sequence[Reading], shifts: dict[str, list[Measurement]], config: TextConfig, command: str
) -> list[str]:
    names = list(dict.fromkeys(m.name for measured in shifts.values() for m in measured))
    values = {key: {m.name: m.estimate for m in measured} for key, measured in shifts.items()}
    shown = lambda estimate: "-" if estimate is None else f"{estimate.value:.4g}"
    adapt = config.adapt
    return [
        "# Dynamic evaluation under a shift of text",
        "",
        "```console",
        f"$ {command}",
        "```",
        "",
        f"Held-out text of each run, read by the model of each. *Dynamic evaluation* takes {adapt.steps} step of "
        f"{adapt.optimizer} (learning rate {adapt.learning_rate:g}, {adapt.learns} parameters) on every stretch of "
        f"{adapt.stretch} tokens after it was scored, reset: {adapt.reset}.",
        "",
        *reading_table(readings),
        "",
        "![losses](losses.png)",
        "",
        "## How far apart are the texts?",
        "",
        "Counts of the model's tokens, and its features averaged over stretches.",
        "",
        "| measure | " + " | ".join(shifts) + " |",
        "|---|" + "---|" * len(shifts),
        *(
            " | ".join([f"| {name.replace('|', '/')}", *(shown(values[key].get(name)) for key in shifts)]) + " |"
            for name in names
        ),
    ]
