"""Prepares text as tokens on disk: writes the folder, its tokenizer and its manifest, and prints a summary.

Everything on disk is a function of the source and the configuration. A shard is published by one rename, together with
the position in the source after it; after a `kill -9` the next run resumes from the last one.
"""

import contextlib
import errno
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tttlm.data import store, writing
from tttlm.data.config import PrepareConfig
from tttlm.data.integrity import remember, verified_parts, verify
from tttlm.data.pipeline import TASK_BYTES, Job, encoders, split_of
from tttlm.data.raw_document import FileDigests, Source
from tttlm.data.sources import open_source, sample_texts
from tttlm.data.tokenizer import TRAINED, Tokenizer, facts_of, train_tokenizer
from tttlm.data.tokenizer_files import load_tokenizer
from tttlm.data.workers import available_cores
from tttlm.errors import InputError
from tttlm.progress import say
from tttlm.records import read_record, write_file, write_sealed

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SOURCE_FILES = ".source.json"  # the source's files and their digests: unchanged files are not read again


def prepare(config: PrepareConfig, folder: str | Path, *, wait: bool = False) -> None:
    """Tokenizes a source into a folder; resumes an interrupted run of the same configuration.

    Args:
        config: the source, the tokenizer and the split of documents.
        folder: the output folder; created if it does not exist, refused if it has other files.
        wait: whether to wait for another process that prepares the same folder, instead of raising an error.

    Raises:
        InputError: the configuration or the source cannot be used, the folder is in use, or an operation fails (no
            space, no permission ...). Existing files and finished shards are kept.
    """
    config.validate()
    folder = Path(folder).expanduser()
    with _one_line(folder):
        source = open_source(config)
        given = None if config.tokenizer == "train" else _given_tokenizer(config)
        _refuse_foreign(folder)
        digests = _stored_digests(folder)
        identity = _identity(config, source, given, digests)
        with writing.locked(folder, wait=wait):
            preparation = _begin(config, folder, identity)
            if source.digests != digests:
                _remember_source(folder, source)
            if (folder / store.MANIFEST).exists():
                verify(folder)
                say(f"{folder} is already prepared")
            else:
                _run(config, folder, source, given, preparation)


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Turns errors of the operating system into an `InputError` of one line."""
    kept = "finished shards are kept: run the same command again once this is fixed"
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            free = ""
            with contextlib.suppress(OSError):
                free = f" ({_size(shutil.disk_usage(folder).free)} free)"
            kept = "finished shards are kept: free some space and run the same command again"
            raise InputError(f"no space left for {folder}{free}; {kept}") from error
        at = error.filename if isinstance(error.filename, str) and str(folder) not in error.filename else folder
        why = error.strerror or str(error) or type(error).__name__
        raise InputError(f"{at} cannot be read or written: {why}; {kept}") from error
    except MemoryError as error:
        raise InputError(f"not enough memory to prepare {folder}; {kept}") from error


def describe(config: PrepareConfig) -> dict[str, Any]:
    """The configuration as plain values, without the fields that do not affect the result."""
    described = asdict(config)
    del described["workers"]
    return json.loads(json.dumps(described))  # as it is read from the manifest


def source_changed(config: PrepareConfig, folder: Path) -> str:
    """Compares the files that a prepared folder was made from with those of the source now.

    Returns:
        A description of the difference; "" if there is none, or the source is a dataset or no longer exists.

    Raises:
        InputError: the source exists but cannot be read.
    """
    if config.dataset.name:
        return ""
    try:
        source = open_source(config)
    except InputError:
        return ""  # only the tokens were copied to this machine
    digests = _stored_digests(folder)
    before, now = store.read_manifest(folder).source, source.fingerprint(digests)
    if source.digests != digests:
        _remember_source(folder, source)
    return "" if before == now else f"source (then {_facts(before)}, now {_facts(now)})"


def _given_tokenizer(config: PrepareConfig) -> Tokenizer:
    tokenizer = load_tokenizer(config.tokenizer, bos_token=config.bos_token, eos_token=config.eos_token)
    for name in ("bos", "eos"):
        if getattr(config, name) and getattr(tokenizer, f"{name}_id") is None:
            raise InputError(
                f"tokenizer {config.tokenizer} names no {name.upper()}: name the token (--{name}-token) "
                f"or do without (--no-{name})"
            )
    return tokenizer


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the prepared data")
    if folder.is_dir() and not (folder / store.PREPARATION).exists():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise InputError(f"{folder} has other files ({others[0]}); choose an empty or a new folder")


@dataclass(frozen=True)
class _SourceFiles:
    """Content of `.source.json`: path -> (state, digest)."""

    files: dict[str, tuple[tuple[int, int, int, int], str]]


def _stored_digests(folder: Path) -> FileDigests:
    """The digests of the source's files from an earlier run; empty if they cannot be read."""
    try:
        stored = read_record(folder / _SOURCE_FILES, _SourceFiles, advice="", sealed=True).files
    except InputError:
        return {}
    return {name: (store.FileState(*state), digest) for name, (state, digest) in stored.items()}


def _remember_source(folder: Path, source: Source) -> None:
    digests = {name: ((*state,), digest) for name, (state, digest) in source.digests.items()}
    with contextlib.suppress(OSError):
        write_sealed(folder / _SOURCE_FILES, _SourceFiles(digests))


def _identity(config: PrepareConfig, source: Source, given: Tokenizer | None, digests: FileDigests) -> dict[str, Any]:
    """Everything that determines the content of a prepared folder."""
    settings = describe(config)
    for name in ("source", "dataset", "tokenizer"):
        settings.pop(name)  # their content counts, not their path
    identity = {
        "source": source.fingerprint(digests),
        "tokenizer": given.fingerprint if given else "trained here",
        "settings": settings,
    }
    return json.loads(json.dumps(identity))


def _begin(config: PrepareConfig, folder: Path, identity: dict[str, Any]) -> store.Preparation:
    """Writes prepare.json, or compares an existing one with this preparation."""
    now = store.Preparation(store.FORMAT, identity, describe(config))
    if (folder / store.PREPARATION).exists():
        before = store.read_preparation(folder)
        if before.identity == identity:
            return before
        if store.count_parts(folder) or (folder / store.MANIFEST).exists():
            raise InputError(
                f"{folder} was started with another {_difference(before.identity, identity)}; "
                "choose another folder or delete it"
            )
        (folder / TRAINED).unlink(missing_ok=True)  # no shard was finished: starting again loses nothing
    write_sealed(folder / store.PREPARATION, now)
    return now


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    if before.get("source") != now["source"]:
        return f"source (then {_facts(before.get('source'))}, now {_facts(now['source'])})"
    if before.get("tokenizer") != now["tokenizer"]:
        return "tokenizer"
    old, new = before.get("settings", {}), now["settings"]
    changed = [f"{k} (then {old.get(k)}, now {new[k]})" for k in new if old.get(k) != new[k]]
    return ", ".join(changed) or "version of this library"


def _facts(fingerprint: Any) -> str:
    if isinstance(fingerprint, dict) and "files" in fingerprint:
        digest = str(fingerprint.get("sha256"))[:8]
        return f"{fingerprint['files']} files of {fingerprint['bytes']:,} bytes, digest {digest}"
    if isinstance(fingerprint, dict) and "dataset" in fingerprint:
        named = " ".join(str(fingerprint[name]) for name in ("dataset", "config", "split", "revision")).split()
        return f"dataset {' '.join(named)}, digest {str(fingerprint.get('sha256'))[:8]}"
    return str(fingerprint)[:100]


def _run(
    config: PrepareConfig, folder: Path, source: Source, given: Tokenizer | None, preparation: store.Preparation
) -> None:
    begin = time.perf_counter()
    parts = verified_parts(folder, preparation)
    tokenizer = _stored_tokenizer(config, folder, given, resumed=bool(parts))
    made = time.perf_counter() - begin
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    if parts:
        say(f"resuming after {len(parts)} finished shard{'s' * (len(parts) > 1)}")
        source.seek(parts[-1][0].position)
    count = config.workers or available_cores()
    if source.total is not None and source.total - source.read < 8 * TASK_BYTES:
        count = 1  # faster than starting other processes
    job = Job(config, folder, source, tokenizer, dtype, len(parts), preparation.digest)
    with encoders(tokenizer, dtype, count) as pool:
        job.run(pool, 2 * count + 2)
    parts += job.parts
    states = {f"{store.part_name(i)}/{name}": state for i, part in enumerate(parts) for name, state in part[2].items()}
    if tokenizer.file_name:
        states[tokenizer.file_name] = store.file_state(folder / tokenizer.file_name)
    manifest = _manifest(
        config, preparation, tokenizer, dtype, [part for part, _, _ in parts], [its for _, its, _ in parts]
    )
    write_sealed(folder / store.MANIFEST, manifest)
    remember(folder, manifest, states)
    _report(folder, manifest, job, made, count)


def _stored_tokenizer(config: PrepareConfig, folder: Path, given: Tokenizer | None, *, resumed: bool) -> Tokenizer:
    """The tokenizer, after storing a copy of it in the folder."""
    if given:
        if given.file_name:
            write_file(folder / given.file_name, given.file_bytes)
        return given
    path = folder / TRAINED
    if path.exists():
        stored = load_tokenizer(path)
        facts = read_record(
            folder / _TRAINED_FACTS, _Trained, advice=f"delete {folder} and prepare it again", sealed=True
        )
        if stored.fingerprint != facts.fingerprint:
            raise InputError(f"{path} was altered; delete {folder} and prepare it again")
        return stored
    if resumed:
        raise InputError(f"{path}, with which the finished shards were made, is missing; restore it")
    begin = time.perf_counter()
    sample = list(
        sample_texts(
            open_source(config),
            int(config.sample_mb * 1e6),
            lambda document: split_of(document, config.held_out) != "train",
        )
    )
    if not any(sample):
        raise InputError("no text to train a tokenizer on: every document is empty or held out")
    tokenizer = train_tokenizer(sample, config.vocab_size)
    write_sealed(folder / _TRAINED_FACTS, _Trained(tokenizer.fingerprint))
    write_file(path, tokenizer.file_bytes)
    size = sum(len(text) for text in sample)
    say(f"trained a tokenizer of {config.vocab_size:,} pieces on {_size(size)} in {time.perf_counter() - begin:.1f} s")
    return tokenizer


_TRAINED_FACTS = ".trained.json"


@dataclass(frozen=True)
class _Trained:
    """Content of `.trained.json`: the tokenizer that was trained for this folder."""

    fingerprint: str


def _manifest(
    config: PrepareConfig,
    preparation: store.Preparation,
    tokenizer: Tokenizer,
    dtype: Any,
    parts: list[store.Part],
    facts: list[store.PartFacts],
) -> store.Manifest:
    sums = {
        split: store.Sums(
            *(sum(getattr(part.splits[split], name) for part in parts) for name in ("documents", "tokens", "bytes"))
        )
        for split in store.SPLITS
    }
    if not sum(of.documents for of in sums.values()):
        raise InputError(f"nothing was prepared: no document of {_named(config)} has text that could be used")
    digests = [[part.files[name].sha256 for name in sorted(part.files)] for part in parts]
    entry_id = tokenizer.bos_id if config.bos else tokenizer.eos_id if config.eos else None
    return store.Manifest(
        format=store.FORMAT,
        config=preparation.config,
        source=preparation.identity["source"],
        tokenizer=replace(facts_of(tokenizer), entry_id=entry_id),
        bos=config.bos,
        eos=config.eos,
        dtype=dtype,
        splits=sums,
        counts=store.Counts(*(sum(getattr(part.counts, name) for part in parts) for name in ("empty", "invalid_utf8"))),
        fingerprint=hashlib.sha256(f"{tokenizer.fingerprint} {dtype} {digests}".encode()).hexdigest(),
        parts=facts,
    )


def _named(config: PrepareConfig) -> str:
    return ", ".join(config.source) or config.dataset.name


def _report(folder: Path, manifest: store.Manifest, job: Job, made: float, count: int) -> None:
    for split in store.SPLITS:
        sums = manifest.splits[split]
        say(
            f"{split:>10}: {sums.documents:,} documents, {sums.tokens:,} tokens, {_size(sums.bytes)}"
            + (f" ({sums.bytes / sums.tokens:.2f} bytes a token)" if sums.tokens else "")
        )
    counts = manifest.counts
    if counts.empty:
        say(f"skipped: {counts.empty:,} documents without text")
    for line in job.source.skipped.lines():
        say(line)
    if counts.invalid_utf8:
        what = "skipped" if job.config.invalid_utf8 == "skip" else "repaired with U+FFFD"
        say(f"not UTF-8:   {counts.invalid_utf8:,} documents, {what}")
    for split, empty in (("validation", job.config.held_out), ("train", 1.0 - job.config.held_out)):
        if empty and not manifest.splits[split].documents:
            say(f"note: the {split} split has no documents; change --held_out, or give more documents")
    total = sum(job.seconds.values())
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in job.seconds.items())
    speed = job.bytes_done / total / 1e6 if total else 0.0
    say(f"{folder}: {total + made:.1f} s at {speed:.1f} MB/s ({count} processes; {parts}; tokenizer {made:.1f} s)")


def _size(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} bytes"
    units = ["kB", "MB", "GB", "TB"]
    power = min(int(math.log10(count)) // 3, len(units))
    return f"{count / 1000**power:.1f} {units[power - 1]}"
