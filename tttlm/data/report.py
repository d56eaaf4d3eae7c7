"""Summary of a prepared folder: counts, lengths of documents (also as a picture), a few samples."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tttlm.data.finding import printable
from tttlm.data.integrity import verify
from tttlm.data.store import SPLITS, Manifest, Split
from tttlm.data.tokenizer_files import load_tokenizer

_BAR = 40


def describe_folder(folder: str | Path, *, samples: int = 3) -> Iterator[str]:
    """Yields the lines that describe a prepared folder.

    Raises:
        InputError: the folder is not complete, or a file of it was altered.
    """
    manifest = verify(folder)
    tokenizer, counts = manifest.tokenizer, manifest.counts
    yield f"{folder}"
    yield f"source      {_source(manifest)}"
    controls = ", ".join(
        _control(name, getattr(manifest, name), getattr(tokenizer, f"{name}_id")) for name in ("bos", "eos")
    )
    made_with = f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, {controls}, sha256 {tokenizer.sha256[:12]}"
    yield f"tokenizer   {made_with}"
    shards = len(manifest.parts)
    stored = f"{manifest.dtype}, {shards} shard{'s' * (shards > 1)}, fingerprint {manifest.fingerprint[:12]}"
    yield f"tokens      {stored}"
    if counts.empty or counts.invalid_utf8:
        yield (
            f"irregular   {counts.empty:,} empty (skipped), {counts.invalid_utf8:,} with invalid UTF-8 "
            f"({manifest.config['invalid_utf8']})"
        )
    splits = {name: Split(folder, name, manifest) for name in SPLITS}
    indices = {name: split.index() for name, split in splits.items()}
    yield ""
    heads = (("", "<12"), ("documents", ">12"), ("tokens", ">16"), ("bytes", ">16"), ("bytes/token", ">13"))
    yield "".join(f"{head:{form}}" for head, form in (*heads, ("median document", ">17"), ("longest", ">12")))
    for name, index in indices.items():
        yield _row(name, index)
    keys = np.concatenate([index["key"] for index in indices.values()])
    if twice := len(keys) - len(np.unique(keys)):
        yield f"{twice:,} documents are copies of others (always in the same split)"
    yield ""
    yield from _bars(np.concatenate([index["tokens"] for index in indices.values()]))
    model = load_tokenizer(folder)
    for name, split in splits.items():
        for document, title, start in _picked(split, indices[name], samples if name == "train" else min(samples, 1)):
            tokens = split.read(start, start + min(int(document["tokens"]), 60))
            yield f"\n{name}: {title} ({int(document['tokens']):,} tokens) begins"
            yield f"  {model.decode(tokens.tolist())!r}"


def draw_lengths(folder: str | Path, picture: str | Path) -> None:
    """Draws histograms of the lengths of documents, by documents and by tokens, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = {name: Split(folder, name).index()["tokens"].astype(float) for name in SPLITS}
    longest = max((values.max() for values in lengths.values() if len(values)), default=1.0)
    shortest = min((values.min() for values in lengths.values() if len(values)), default=1.0)
    edges = np.geomspace(max(shortest, 1), longest * 1.001 + 1, 49)
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for name, values in lengths.items():
        if not len(values):
            continue
        label = f"{name}: {len(values):,} documents, {values.sum():,.0f} tokens"
        percent = np.full(len(values), 100 / len(values))
        above.stairs(np.histogram(values, edges, weights=percent)[0], edges, linewidth=1.5, label=label)
        below.stairs(np.histogram(values, edges, weights=100 * values / values.sum())[0], edges, linewidth=1.5)
    above.set(xscale="log", ylabel="% of documents", title=f"Lengths of documents in {Path(folder).name}")
    above.legend(loc="upper left", fontsize="small", frameon=False)
    above.margins(y=0.25)
    below.set(xlabel="tokens of a document", ylabel="% of tokens")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def _source(manifest: Manifest) -> str:
    source, config = manifest.source, manifest.config
    if "files" in source:
        return f"{', '.join(map(printable, config['source']))} ({source['files']:,} files, {source['bytes']:,} bytes)"
    return f"dataset {source['dataset']} {source['config']} {source['split']}".replace("  ", " ")


def _control(name: str, stored: bool, token: int | None) -> str:
    return f"{name.upper()} {token} at each document" if stored else f"no {name.upper()}"


def _row(name: str, index: np.ndarray) -> str:
    if not len(index):
        return f"{name:<12}{0:>12}"
    tokens, size = int(index["tokens"].sum()), int(index["bytes"].sum())
    return (
        f"{name:<12}{len(index):>12,}{tokens:>16,}{size:>16,}{size / max(tokens, 1):>13.2f}"
        f"{int(np.median(index['tokens'])):>17,}{int(index['tokens'].max()):>12,}"
    )


def _bars(lengths: np.ndarray) -> Iterator[str]:
    """A histogram over powers of two."""
    powers = np.floor(np.log2(np.maximum(lengths, 1).astype(float))).astype(int)
    counts = np.bincount(powers)
    yield "tokens of a document"
    for power in range(int(powers.min()), len(counts)):
        bar = "█" * round(_BAR * counts[power] / counts.max()) or ("▏" if counts[power] else "")
        yield f"{2**power:>12,} – {2 ** (power + 1) - 1:<12,} {counts[power]:>10,} {bar}"


def _picked(split: Split, index: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, str, int]]:
    """Documents spread evenly over a split: (record of the index, name, offset of its tokens)."""
    chosen = set(np.linspace(0, len(index) - 1, count + 2).astype(int)[1:-1].tolist()) if len(index) else set()
    starts = np.cumsum(index["tokens"]) - index["tokens"]
    for number, title in enumerate(split.names()):
        if number in chosen:
            yield index[number], title, int(starts[number])
