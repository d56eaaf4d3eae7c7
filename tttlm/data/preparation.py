"""Text to tokens on disk: the folder, its tokenizer, its manifest, and what a person is told.

Everything that ends up on disk is a function of the source and the configuration. A shard is put in place by one
rename, with the position in the source behind it; after a `kill -9` the next run goes on from the last one.
"""

import errno
import hashlib
import json
import math
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tttlm.data import store
from tttlm.data.config import PrepareConfig
from tttlm.data.integrity import stamp
from tttlm.data.pipeline import TASK_BYTES, Job, encoders, held_out
from tttlm.data.sources import Source, open_source, sample_texts
from tttlm.data.tokenizer import TRAINED, SentencePieceTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from tttlm.data.workers import available_cores
from tttlm.errors import InputError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def prepare(config: PrepareConfig, folder: str | Path, *, wait: bool = False) -> None:
    """Tokenizes a source into a folder; goes on where an earlier run of the same stopped.

    Args:
        config: the source, the tokenizer and how documents are divided.
        folder: made if need be; refused if it holds anything else.
        wait: wait for another process that prepares the same folder, instead of refusing.

    Raises:
        InputError: bad configuration or source, no space left, or the folder is taken. What was there stays.
    """
    config.validate()
    folder = Path(folder)
    source = open_source(config)
    given = None if config.tokenizer == "train" else _given_tokenizer(config)
    _refuse_foreign(folder)
    try:
        with store.locked(folder, wait=wait):
            if not _begin(config, folder, source, given):
                say(f"{folder} is already prepared")
                return
            _run(config, folder, source, given)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise InputError(
            f"no space left for {folder} ({_size(shutil.disk_usage(folder).free)} free); finished shards are kept: "
            "make room and run the same command again"
        ) from error


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def describe(config: PrepareConfig) -> dict[str, Any]:
    """The configuration without what does not show in the result."""
    described = asdict(config)
    del described["workers"]
    return json.loads(json.dumps(described))  # as it comes back from the manifest


def _given_tokenizer(config: PrepareConfig) -> Tokenizer:
    tokenizer = load_tokenizer(config.tokenizer, bos_token=config.bos_token, eos_token=config.eos_token)
    for name in ("bos", "eos"):
        if getattr(config, name) and getattr(tokenizer, f"{name}_id") is None:
            raise InputError(
                f"tokenizer {config.tokenizer} names no {name.upper()}: say which token it is (--{name}-token) "
                f"or do without (--no-{name})"
            )
    return tokenizer


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the prepared data")
    if folder.is_dir() and not (folder / store.BEGUN).exists():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise InputError(f"{folder} holds other files ({others[0]}); choose an empty or a new folder")


def _begin(config: PrepareConfig, folder: Path, source: Source, given: Tokenizer | None) -> bool:
    """Marks the folder as ours; returns False when it is complete already."""
    settings = describe(config)
    for name in ("source", "dataset", "tokenizer"):
        settings.pop(name)  # their content counts, not where it lies
    identity = {
        "format": store.FORMAT,
        "source": source.fingerprint(),
        "tokenizer": given.fingerprint if given else "trained here",
        "settings": settings,
    }
    path = folder / store.BEGUN
    before = store.read_json(path)["identity"] if path.exists() else None
    if before not in (None, identity):
        if (folder / store.part_name(0)).exists():
            raise InputError(
                f"{folder} was begun with another {_difference(before, identity)}; choose another folder or delete it"
            )
        (folder / TRAINED).unlink(missing_ok=True)  # no shard was finished: nothing is lost by beginning anew
        before = None
    if before is None:
        store.write_json(path, {"identity": identity, "config": describe(config)})
    return not (folder / store.MANIFEST).exists()


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
        return f"{fingerprint['files']} files of {fingerprint['bytes']:,} bytes"
    return str(fingerprint)


def _run(config: PrepareConfig, folder: Path, source: Source, given: Tokenizer | None) -> None:
    begin = time.perf_counter()
    tokenizer = _stored_tokenizer(config, folder, given)
    made = time.perf_counter() - begin
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    parts = store.read_parts(folder)
    if parts:
        say(f"going on after {len(parts)} finished shard{'s' * (len(parts) > 1)}")
        source.seek(parts[-1]["position"])
    count = config.workers or available_cores()
    if source.total is not None and source.total - source.read < 8 * TASK_BYTES:
        count = 1  # done before other processes have started
    job = Job(config, folder, source, tokenizer, dtype, parts)
    with encoders(tokenizer, dtype, count) as pool:
        job.run(pool, 2 * count + 2)
    manifest = _manifest(config, folder, tokenizer, dtype, job.parts)
    store.write_json(folder / store.MANIFEST, manifest)
    stamp(folder, manifest)
    _report(folder, manifest, job, made, count)


def _stored_tokenizer(config: PrepareConfig, folder: Path, given: Tokenizer | None) -> Tokenizer:
    """The tokenizer, with a copy of it in the folder."""
    if given:
        if given.file_name:
            store.write_file(folder / given.file_name, given.file_bytes)
        return given
    path = folder / TRAINED
    if path.exists():
        return SentencePieceTokenizer(path.read_bytes())
    begin = time.perf_counter()
    sample = list(
        sample_texts(open_source(config), int(config.sample_mb * 1e6), lambda key: held_out(key, config.held_out))
    )
    if not any(sample):
        raise InputError("no text to train a tokenizer on: every document is empty or held out")
    tokenizer = train_tokenizer(sample, config.vocab_size)
    store.write_file(path, tokenizer.file_bytes)
    size = sum(len(text) for text in sample)
    say(f"trained a tokenizer of {config.vocab_size:,} pieces on {_size(size)} in {time.perf_counter() - begin:.1f} s")
    return tokenizer


def _manifest(
    config: PrepareConfig, folder: Path, tokenizer: Tokenizer, dtype: str, parts: list[dict[str, Any]]
) -> dict[str, Any]:
    if not sum(part["splits"][split]["documents"] for part in parts for split in store.SPLITS):
        raise InputError(f"nothing was prepared: no document of {_named(config)} has text that could be used")
    begun = store.read_json(folder / store.BEGUN)
    files = [[part["files"][name]["sha256"] for name in sorted(part["files"])] for part in parts]
    return {
        "format": store.FORMAT,
        "config": begun["config"],
        "source": begun["identity"]["source"],
        "tokenizer": {
            "kind": tokenizer.kind,
            "file": tokenizer.file_name,
            "bytes": len(tokenizer.file_bytes),
            "sha256": hashlib.sha256(tokenizer.file_bytes).hexdigest(),
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "bos": config.bos,
        "eos": config.eos,
        "dtype": dtype,
        "splits": {
            split: {name: sum(part["splits"][split][name] for part in parts) for name in store.SUMS}
            for split in store.SPLITS
        },
        "counts": {name: sum(part["counts"][name] for part in parts) for name in store.COUNTS},
        "fingerprint": hashlib.sha256(f"{tokenizer.fingerprint} {dtype} {files}".encode()).hexdigest(),
        "parts": [{"splits": part["splits"], "files": part["files"]} for part in parts],
    }


def _named(config: PrepareConfig) -> str:
    return ", ".join(config.source) or config.dataset.name


def _report(folder: Path, manifest: dict[str, Any], job: Job, made: float, count: int) -> None:
    for split in store.SPLITS:
        sums = manifest["splits"][split]
        say(
            f"{split:>10}: {sums['documents']:,} documents, {sums['tokens']:,} tokens, {_size(sums['bytes'])}"
            + (f" ({sums['bytes'] / sums['tokens']:.2f} bytes a token)" if sums["tokens"] else "")
        )
    counts = manifest["counts"]
    if counts["empty"]:
        say(f"passed over: {counts['empty']:,} documents without text")
    if counts["invalid_utf8"]:
        what = "left out" if job.config.invalid_utf8 == "skip" else "mended with U+FFFD"
        say(f"not UTF-8:   {counts['invalid_utf8']:,} documents, {what}")
    if counts["forced_cuts"]:
        say(f"cut in the middle of a word: {counts['forced_cuts']:,} times (1 MiB without a space)")
    for split, empty in (("validation", job.config.held_out), ("train", 1.0 - job.config.held_out)):
        if empty and not manifest["splits"][split]["documents"]:
            say(f"note: no document fell to {split}; change --held-out, or give more documents")
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
