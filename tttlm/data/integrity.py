"""Checks that a prepared folder is unchanged since it was written."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from tttlm.data.store import (
    MANIFEST,
    PART,
    FileFacts,
    FileState,
    Manifest,
    Part,
    PartFacts,
    Preparation,
    check_size,
    count_parts,
    facts_of_file,
    file_state,
    part_name,
    read_manifest,
    read_part,
    reading,
)
from tttlm.errors import InputError
from tttlm.progress import progress_bar
from tttlm.records import read_record, write_sealed

_VERIFIED = ".verified.json"
_SHOW_BAR = 1 << 30  # bytes above which a progress bar is shown


@dataclass(frozen=True)
class Verified:
    """Content of `.verified.json`: the files of a folder that were verified, and their states at that time.

    Attributes:
        fingerprint: fingerprint of the manifest that they were compared with.
        files: name -> (length, times of change in ns, inode).
    """

    fingerprint: str
    files: dict[str, tuple[int, int, int, int]]


def verify(folder: str | Path, *, thorough: bool = False) -> Manifest:
    """Checks a prepared folder and returns its manifest.

    The length of every file is compared. Its sha256 is computed if the file changed (or was copied) since it was last
    verified, and for all files if `thorough`.

    Raises:
        InputError: the folder is not complete, or a file is missing, truncated or altered; names it.
    """
    with reading(folder):
        return _verified(Path(folder), thorough)


def _verified(folder: Path, thorough: bool) -> Manifest:
    manifest = read_manifest(folder)
    files = _files(manifest)
    for name, facts in files.items():
        check_size(folder / name, facts.bytes)
    verified = {} if thorough else _verified_states(folder, manifest)
    states = {name: file_state(folder / name) for name in files}
    if changed := {name: facts for name, facts in files.items() if verified.get(name) != states[name]}:
        states |= _read_all(folder, changed, "copy it again or prepare the folder again")
        remember(folder, manifest, states)
    return manifest


def remember(folder: Path, manifest: Manifest, states: dict[str, FileState]) -> None:
    """Records that all files are verified in these states, if the folder is writable."""
    files = {name: (*state,) for name, state in states.items()}
    with contextlib.suppress(OSError):
        write_sealed(folder / _VERIFIED, Verified(manifest.fingerprint, files))


def verified_parts(folder: Path, preparation: Preparation) -> list[tuple[Part, PartFacts, dict[str, FileState]]]:
    """Verifies the shards that an earlier run finished, by the sha256 of every file.

    Raises:
        InputError: a shard is missing, altered, or of another preparation; names it.
    """
    parts = []
    for number in range(count_parts(folder)):
        name = part_name(number)
        advice = f"delete {name} and every later part, and run the same command again"
        part = read_part(folder, number, advice)
        if part.identity != preparation.digest:
            raise InputError(f"{folder / name} belongs to another preparation; {advice}")
        own, state = facts_of_file(folder / name / PART)
        wanted = {f"{name}/{file}": facts for file, facts in part.files.items()}
        for file, facts in wanted.items():
            check_size(folder / file, facts.bytes, advice)
        states = {Path(file).name: actual for file, actual in _read_all(folder, wanted, advice).items()}
        parts.append((part, PartFacts(part.splits, {**part.files, PART: own}), {**states, PART: state}))
    return parts


def _read_all(folder: Path, files: dict[str, FileFacts], advice: str) -> dict[str, FileState]:
    """Compares the digest of every file; returns the state that each had while it was read."""
    states = {}
    total = sum(facts.bytes for facts in files.values())
    with progress_bar(total, f"checking {folder}", unit="B", disable=total < _SHOW_BAR) as bar:
        for name, facts in files.items():
            with reading(folder / name):
                actual, states[name] = facts_of_file(folder / name)
            if actual != facts:
                raise InputError(f"{folder / name} was altered (its sha256 is not that of {MANIFEST}); {advice}")
            bar.update(facts.bytes)
    return states


def _files(manifest: Manifest) -> dict[str, FileFacts]:
    files = {
        f"{part_name(number)}/{name}": facts
        for number, part in enumerate(manifest.parts)
        for name, facts in part.files.items()
    }
    tokenizer = manifest.tokenizer
    return files | ({tokenizer.file: FileFacts(tokenizer.bytes, tokenizer.sha256)} if tokenizer.file else {})


def _verified_states(folder: Path, manifest: Manifest) -> dict[str, FileState]:
    """The states of verified files; empty if `.verified.json` is of another folder or unreadable."""
    try:
        verified = read_record(folder / _VERIFIED, Verified, advice="", sealed=True)
    except InputError:
        return {}
    if verified.fingerprint != manifest.fingerprint:
        return {}
    return {name: FileState(*state) for name, state in verified.files.items()}
