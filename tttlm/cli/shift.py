"""`python -m tttlm.cli.shift A B`: measures the shift between two folders of text, images or arrays."""

import json
import logging
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from tttlm.cli.arguments import parse, program, run_command
from tttlm.errors import InputError
from tttlm.fields import refuse_unused
from tttlm.ranges import LARGEST, Count, FilePath, OutputPath, Range, Seed
from tttlm.shift.reading import Kind, kind_of, left_out

DESCRIPTION = """Measures the shift between two samples: prints a table, writes shift.json and shift.png.

For example:  python -m tttlm.cli.shift books/ code/ --model runs/quickstart
              python -m tttlm.cli.shift clean/ corrupted/
              python -m tttlm.cli.shift a.npy b.npy --output runs/shift_ab"""
SHOWN = 15


@dataclass(frozen=True)
class ShiftConfig:
    """Configuration of a comparison of two samples."""

    samples: tyro.conf.Positional[tuple[FilePath, ...]] = ()
    """The two samples A and B: folders of text, PNG or .npy files, or single files of these kinds."""
    model: FilePath = ""
    """The folder of a run or of a released model whose features of text are compared."""
    tokenizer: FilePath = ""
    """For text without --model, or a released model without a tokenizer in its folder: a tokenizer file, a folder with
    one, or "bytes"; empty counts words."""
    kind: Literal["auto", "text", "images", "arrays"] = "auto"
    """The kind of samples; auto goes by the names of the files and, for .npy, the number of axes."""
    output: OutputPath = "runs/shift"
    """The folder to write shift.json and shift.png to."""
    max_samples: Annotated[int, Range(least=8, most=LARGEST)] = 5000
    """Largest number of samples of each side, chosen at random."""
    pairs: Annotated[int, Range(least=8, most=LARGEST, also=(0,))] = 2000
    """Largest number of samples of each side for measures whose time grows with the number of pairs; 0 takes all."""
    permutations: Annotated[int, Range(least=19, most=10**6)] = 199
    """Number of permutations of the tests; the smallest p-value is 1 / (1 + permutations)."""
    length: Annotated[int, Range(least=8, most=10**6)] = 256
    """Number of tokens of a stretch of text, which is one sample."""
    per_document: Count = 16
    """Largest number of stretches of a document, evenly spaced."""
    image_size: Annotated[int, Range(least=1, most=1024)] = 16
    """Largest side of an image in pixels; larger images are averaged down."""
    seed: Seed = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class Compared:
    """Both samples after reading: features, and the differences to rank."""

    a: np.ndarray
    b: np.ndarray
    features: str
    measurements: list[Any]
    differences: list[Any]
    unit: str
    notes: list[str]
    pixels: np.ndarray | None = None


def main(arguments: list[str]) -> int:
    config = parse(ShiftConfig, arguments, prog=program("shift"), description=DESCRIPTION)
    if len(config.samples) != 2:
        raise InputError(
            f"name two samples, got {len(config.samples)}, for example: python -m tttlm.cli.shift folder_a folder_b"
        )
    path_a, path_b = (Path(name) for name in config.samples)
    kinds = [kind_of(path) if config.kind == "auto" else config.kind for path in (path_a, path_b)]
    if kinds[0] != kinds[1]:
        raise InputError(f"{path_a} has {kinds[0]} and {path_b} has {kinds[1]}; both samples need the same kind")
    kind: Kind = kinds[0]
    if kind != "text" and (config.model or config.tokenizer):
        raise InputError(f"--model and --tokenizer are for text, but {path_a} has {kind}")
    of_kind = {"text": ("length", "per_document"), "images": ("image_size",)}
    for other, names in of_kind.items():
        if other != kind:
            refuse_unused(config, f"for {kind}", *names)
    output = _writable(config.output)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    compared = compare_text(config, path_a, path_b) if kind == "text" else compare_values(config, kind, path_a, path_b)

    from tttlm.data.finding import printable
    from tttlm.shift.panel import compare_samples
    from tttlm.shift.picture import draw

    measurements = compared.measurements + compare_samples(
        compared.a, compared.b, pairs=config.pairs, permutations=config.permutations, seed=config.seed
    )
    print(f"A: {path_a}, {len(compared.a):,} samples\nB: {path_b}, {len(compared.b):,} samples")
    print(f"features: {compared.a.shape[1]:,}, {compared.features}")
    for path in (path_a, path_b):
        if others := left_out(path, kind):
            named = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
            compared.notes.append(f"{len(others):,} files of {path} are no {kind} and were left out ({named})")
    for note in compared.notes:
        print(f"note: {note}")
    print(_table(measurements))
    record = {
        "a": str(path_a),
        "b": str(path_b),
        "kind": kind,
        "samples": [len(compared.a), len(compared.b)],
        "num_features": compared.a.shape[1],
        "features": compared.features,
        "notes": compared.notes,
        "measures": [
            {"name": m.name, "note": m.note, **({} if m.estimate is None else _finite(asdict(m.estimate)))}
            for m in measurements
        ],
        "differs_most": [asdict(difference) for difference in compared.differences],
        "difference_unit": compared.unit,
        "configuration": asdict(config),
    }
    json_file = output / "shift.json"
    try:
        json_file.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{json_file} cannot be written ({error.strerror}): choose another --output") from None
    # The ends of long names, because file names differ there.
    names = f"A: {printable(path_a.name[-30:])}", f"B: {printable(path_b.name[-30:])}"
    png = draw(
        compared.a,
        compared.b,
        compared.differences,
        output / "shift.png",
        names=names,
        title=compared.features,
        unit=compared.unit,
        pixels=compared.pixels,
    )
    print(f"{json_file}\n{png}")
    return 0


def compare_values(config: ShiftConfig, kind: Kind, path_a: Path, path_b: Path) -> Compared:
    """Arrays or pixels as features, and the features that differ most."""
    from tttlm.shift.panel import feature_differences
    from tttlm.shift.picture import Difference
    from tttlm.shift.reading import read_arrays, read_images, shrink_images
    from tttlm.shift.samples import features_of

    read = read_arrays if kind == "arrays" else read_images
    values = [read(path, config.max_samples, config.seed + i) for i, path in enumerate((path_a, path_b))]
    if kind == "images" and {sample.shape[-1] for sample in values} == {1, 3}:  # greyscale and colour
        values = [np.broadcast_to(sample, (*sample.shape[:-1], 3)) for sample in values]
    original, other = (sample.shape[1:] for sample in values)
    if original != other:
        what = "features" if kind == "arrays" else "pixels"
        sides = ["x".join(map(str, shape)) for shape in (original, other)]
        raise InputError(f"{path_a} has {sides[0]} {what} and {path_b} has {sides[1]}; both samples need the same")
    described = "as in the files"
    if kind == "images":
        values = [shrink_images(sample, config.image_size) for sample in values]
        described = "pixels"
        if values[0].shape[1:] != original:
            described += f", averaged down from {original[0]}x{original[1]}"
    shape = values[0].shape[1:]
    a, b = (
        features_of(sample.reshape(len(sample), -1), name=str(path))
        for sample, path in zip(values, (path_a, path_b), strict=True)
    )
    measured = feature_differences(a, b)
    # The difference is infinite for features that are constant in each sample, but not equal.
    sizes = np.minimum(measured, 2 * np.max(measured[np.isfinite(measured)], initial=1.0))
    rises = b.mean(0) > a.mean(0)

    def name(i: int) -> str:
        if kind == "arrays":
            return f"feature {i}"
        row, column, channel = np.unravel_index(i, shape)
        return f"pixel ({row}, {column})" + ("" if shape[2] == 1 else f" {('red', 'green', 'blue')[int(channel)]}")

    largest = np.argsort(-sizes, kind="stable")[:SHOWN]
    return Compared(
        a,
        b,
        described,
        [],
        [Difference(name(int(i)), float(sizes[i]), bool(rises[i])) for i in largest],
        "Wasserstein-1 distance in standard deviations",
        [],
        None if kind == "arrays" else sizes.reshape(shape).max(-1),
    )


def compare_text(config: ShiftConfig, path_a: Path, path_b: Path) -> Compared:
    """Features of stretches of text, the divergences of token counts, and the tokens that differ most."""
    from tttlm.shift.panel import compare_counts, compare_predictions
    from tttlm.shift.picture import Difference
    from tttlm.shift.reading import Words, read_stretches
    from tttlm.shift.tokens import count_tokens, frequency_features, read_by_model, token_differences

    model, tokenizer = _load(config)
    words = Words()
    encode = words.encode if tokenizer is None else lambda text: np.array(tokenizer.encode(text), np.uint32)
    a, b = (
        read_stretches(
            path,
            encode,
            length=config.length,
            per_document=config.per_document,
            samples=config.max_samples,
            seed=config.seed + i,
        )
        for i, path in enumerate((path_a, path_b))
    )
    counted = count_tokens(a, b)
    kinds = "words" if tokenizer is None else "tokens"
    confidence = []
    if model is None:
        ids = counted.ids[:200]
        features = [frequency_features(sample, ids) for sample in (a, b)]
        described = f"square roots of the frequencies of the {len(ids)} most common {kinds}"
    else:
        top = max(int(tokens.max()) for sample in (a, b) for tokens in sample.tokens)
        if top >= model.config.vocab_size:
            raise InputError(
                f"the tokenizer gives token {top}, but {config.model} has {model.config.vocab_size:,} tokens: "
                "name its own tokenizer with --tokenizer"
            )
        read = [read_by_model(model, sample, length=config.length) for sample in (a, b)]
        features = [of_sample for of_sample, _ in read]
        confidence = compare_predictions(read[0][1], read[1][1], seed=config.seed)
        described = f"mean over {config.length} tokens of the last hidden state of {Path(config.model).name[-40:]}"
    notes = []
    documents = [len(np.unique(sample.documents)) for sample in (a, b)]
    if documents != [len(a.tokens), len(b.tokens)]:
        notes.append(
            f"samples are stretches of {config.length} {kinds} from {documents[0]:,} and {documents[1]:,} documents; "
            "those of one document are not independent, so their intervals are too narrow and p-values too small"
        )
    for path, sample in ((path_a, a), (path_b, b)):
        if sample.invalid:
            notes.append(f"{sample.invalid:,} documents of {path} have invalid UTF-8, which was read as U+FFFD")
    unit = "by document" if counted.by_document else "by stretch, with the same restriction"
    notes.append(f"intervals and p-values of token counts are {unit}")
    if confidence:
        notes.append("confidence and accuracy are of the last token of each stretch, which the model predicts")
    names = words.names() if tokenizer is None else None
    sizes, rises = token_differences(counted)
    largest = np.argsort(-sizes, kind="stable")[:SHOWN]

    def name(column: int) -> str:
        token = int(counted.ids[column])
        return repr(names[token] if names is not None else tokenizer.decode([token]))

    return Compared(
        features[0],
        features[1],
        described,
        [*compare_counts(counted.a, counted.b, permutations=config.permutations, seed=config.seed), *confidence],
        [Difference(name(int(i)), float(sizes[i]), bool(rises[i] > 0)) for i in largest],
        "contribution to the Jensen-Shannon divergence of token counts (nats)",
        notes,
    )


def _load(config: ShiftConfig) -> tuple[Any, Any]:
    """The language model and the tokenizer, each None if it is not given."""
    from tttlm.data import load_tokenizer

    if not config.model:
        return None, load_tokenizer(config.tokenizer) if config.tokenizer else None
    folder = Path(config.model)
    if (folder / "config.yaml").is_file():
        if config.tokenizer:
            raise InputError(f"{folder} has its own tokenizer; remove --tokenizer")
        from tttlm.evaluation.run import load_run

        run = load_run(folder)
        return run.model, run.tokenizer()
    from tttlm.interop import from_pretrained, is_pretrained

    if is_pretrained(folder):
        tokenizer = load_tokenizer(config.tokenizer or folder)
        return from_pretrained(folder), tokenizer
    raise InputError(
        f"{folder} is not a model: a run has a config.yaml, a released model a config.json, and it has neither"
    )


def _writable(folder: str) -> Path:
    """Creates the output folder before measuring, so that an unwritable folder is refused early."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".shift.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--output {folder} cannot be written ({error.strerror}): choose another") from None
    return path


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces infinite numbers, which JSON does not have, by words."""
    return {k: v if v is None or math.isfinite(v) else str(v) for k, v in values.items()}


def _table(measurements: list[Any]) -> str:
    width = max(len(m.name) for m in measurements)
    lines = [f"{'measure':{width}}  {'estimate':>10}  {'95% interval':>22}  {'p-value':>8}"]
    for m in measurements:
        if m.estimate is None:
            lines.append(f"{m.name:{width}}  {'-':>10}  {m.note}")
            continue
        e = m.estimate
        interval = "" if e.low is None else f"[{e.low:.4g}, {e.high:.4g}]"
        p_value = "" if e.p_value is None else "<0.0001" if e.p_value < 1e-4 else f"{e.p_value:.4f}"
        lines.append(f"{m.name:{width}}  {e.value:10.4g}  {interval:>22}  {p_value:>8}  {m.note}".rstrip())
    return "\n".join(lines)


def run() -> None:
    run_command(lambda: main(sys.argv[1:]), kept="nothing was written")


if __name__ == "__main__":
    run()
