"""Whether a prepared folder is still what was written."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from tttlm.data.store import (
    MANIFEST,
    PART,
    Begun,
    FileFacts,
    FileState,
    Manifest,
    Part,
    PartFacts,
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
_SHOW_BAR = 1 << 30  # bytes to read from which on a person sees how far it is


@dataclass(frozen=True)
class Verified:
    """What `.verified.json` says: which files of a folder were read and found right, and their states then.

    Attributes:
        fingerprint: of the manifest that they were compared with.
        files: name -> (length, times of change in ns, inode).
    """

    fingerprint: str
    files: dict[str, tuple[int, int, int, int]]


def verify(folder: str | Path, *, thorough: bool = False) -> Manifest:
    """Checks a prepared folder and returns its manifest.

    Every file must have its length. Its sha256 is computed where the file changed since that was last found right (or
    was copied here), and for all files when `thorough`.

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
    known = {} if thorough else _known(folder, manifest)
    states = {name: file_state(folder / name) for name in files}
    if changed := {name: facts for name, facts in files.items() if known.get(name) != states[name]}:
        states |= _read_all(folder, changed, "copy it again or prepare the folder again")
        remember(folder, manifest, states)
    return manifest


def remember(folder: Path, manifest: Manifest, states: dict[str, FileState]) -> None:
    """Notes that all files are right in these states, where the folder may be written to."""
    files = {name: (*state,) for name, state in states.items()}
    with contextlib.suppress(OSError):
        write_sealed(folder / _VERIFIED, Verified(manifest.fingerprint, files))


def verified_parts(folder: Path, begun: Begun) -> list[tuple[Part, PartFacts, dict[str, FileState]]]:
    """Reads the shards that an earlier run put in place, each file to its end.

    Raises:
        InputError: a shard is missing among them, altered, or of another preparation; names it.
    """
    parts = []
    for number in range(count_parts(folder)):
        name = part_name(number)
        advice = f"delete {name} and every later part, and run the same command again"
        part = read_part(folder, number, advice)
        if part.identity != begun.digest:
            raise InputError(f"{folder / name} belongs to another preparation; {advice}")
        own, state = facts_of_file(folder / name / PART)
        wanted = {f"{name}/{file}": facts for file, facts in part.files.items()}
        for file, facts in wanted.items():
            check_size(folder / file, facts.bytes, advice)
        states = {Path(file).name: found for file, found in _read_all(folder, wanted, advice).items()}
        parts.append((part, PartFacts(part.splits, {**part.files, PART: own}), {**states, PART: state}))
    return parts


def _read_all(folder: Path, files: dict[str, FileFacts], advice: str) -> dict[str, FileState]:
    """Compares the digest of every file; returns the state of each while it was read."""
    states = {}
    total = sum(facts.bytes for facts in files.values())
    with progress_bar(total, f"checking {folder}", unit="B", disable=total < _SHOW_BAR) as bar:
        for name, facts in files.items():
            with reading(folder / name):
                found, states[name] = facts_of_file(folder / name)
            if found != facts:
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


def _known(folder: Path, manifest: Manifest) -> dict[str, FileState]:
    """The states of files that were found right; none where that was noted of another folder or is unreadable."""
    try:
        verified = read_record(folder / _VERIFIED, Verified, advice="", sealed=True)
    except InputError:
        return {}
    if verified.fingerprint != manifest.fingerprint:
        return {}
    return {name: FileState(*state) for name, state in verified.files.items()}
