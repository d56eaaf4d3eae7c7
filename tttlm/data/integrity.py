"""Whether a prepared folder is still what was written."""

from pathlib import Path
from typing import Any

from tttlm.data.store import MANIFEST, check_size, part_name, read_json, read_manifest, sha256, write_json
from tttlm.errors import InputError
from tttlm.progress import progress_bar

_STAMP = ".verified.json"  # size and time of change of each file when its sha256 was last right


def verify(folder: str | Path, *, thorough: bool = False) -> dict[str, Any]:
    """Checks a prepared folder and returns its manifest.

    Every file must have its length. Its sha256 is computed where it changed since that was last found right (or was
    copied here), and for all files when `thorough`.

    Raises:
        InputError: the folder is not complete, or a file is missing, truncated or altered; names it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    wanted = _files(manifest)
    for name, facts in wanted.items():
        check_size(folder / name, facts["bytes"])
    known = {} if thorough else _stamped(folder)
    changed = [name for name in wanted if known.get(name) != _state(folder / name)]
    total = sum(wanted[name]["bytes"] for name in changed)
    if changed:
        with progress_bar(total, f"checking {folder}", unit="B", disable=total < 1 << 30) as bar:
            for name in changed:
                if sha256(folder / name) != wanted[name]["sha256"]:
                    raise InputError(
                        f"{folder / name} was altered (its sha256 is not that of {MANIFEST}); "
                        "copy it again or prepare the folder again"
                    )
                bar.update(wanted[name]["bytes"])
        stamp(folder, manifest)
    return manifest


def stamp(folder: Path, manifest: dict[str, Any]) -> None:
    """Notes that all files are right as they are now, where the folder may be written to."""
    try:
        write_json(folder / _STAMP, {name: _state(folder / name) for name in _files(manifest)})
    except OSError:
        return


def _files(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    files = {
        f"{part_name(number)}/{name}": facts
        for number, part in enumerate(manifest["parts"])
        for name, facts in part["files"].items()
    }
    tokenizer = manifest["tokenizer"]
    return files | ({tokenizer["file"]: tokenizer} if tokenizer["file"] else {})


def _stamped(folder: Path) -> dict[str, list[int]]:
    try:
        return read_json(folder / _STAMP)
    except (OSError, ValueError):
        return {}


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
