"""Tokenizes text, and checks or inspects the result.

For example:
  python -m tttlm.cli.prepare SOURCE... --output FOLDER [--tokenizer FILE] ...   tokenize; run again to resume
  python -m tttlm.cli.prepare --check FOLDER                                     compare every file with its sha256
  python -m tttlm.cli.prepare inspect FOLDER                                     counts, lengths, samples
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tttlm.cli.arguments import parse, program, run_command
from tttlm.data.config import PrepareConfig
from tttlm.errors import InputError
from tttlm.fields import refuse_unused
from tttlm.ranges import CountOrZero, FilePath, PicturePath

INSPECT = (
    "Prints counts, lengths and samples of a prepared folder, and draws a histogram of the lengths of its documents."
)


@dataclass(frozen=True)
class PrepareArguments(PrepareConfig):
    """The arguments of the command line."""

    output: FilePath = ""
    """The folder that the tokens are written to; an interrupted preparation in it is resumed."""
    check: FilePath = ""
    """A prepared folder to verify instead: every byte is read and compared with its sha256."""


@dataclass(frozen=True)
class InspectArguments:
    """The arguments of `inspect`."""

    folder: FilePath = ""
    """A prepared folder."""
    samples: CountOrZero = 3
    """Number of documents whose beginning is printed."""
    png: PicturePath = ""
    """The picture of the histogram of document lengths; by default lengths.png in the folder."""


def main(arguments: Sequence[str]) -> None:
    """Prepares, checks or inspects a folder.

    Raises:
        InputError: the arguments, or the files that they name, cannot be used.
    """
    words = list(arguments)
    if words[:1] == ["inspect"]:
        _inspect(parse(InspectArguments, _named(words[1:], "--folder"), prog="prepare inspect", description=INSPECT))
        return
    given = parse(PrepareArguments, _named(words, "--source"), prog=program("prepare"), description=__doc__ or "")
    if given.check:
        others = [field.name for field in fields(PrepareArguments) if field.name != "check"]
        refuse_unused(given, "with --check, which prepares nothing", *others)
        _check(given.check)
        return
    config = PrepareConfig(**{field.name: getattr(given, field.name) for field in fields(PrepareConfig)})
    config.validate()
    if not given.output:
        raise InputError("name the output folder: --output FOLDER")
    from tttlm.data.preparation import prepare

    prepare(config, given.output)


def _named(words: list[str], flag: str) -> list[str]:
    """Passes the words before the first flag as the values of `flag`."""
    return [flag, *words] if words and not words[0].startswith("-") else words


def _check(folder: str) -> None:
    from tttlm.data.integrity import verify

    manifest = verify(folder, thorough=True)
    files = sum(len(part.files) for part in manifest.parts) + bool(manifest.tokenizer.file)
    tokens = sum(sums.tokens for sums in manifest.splits.values())
    print(f"{folder} is intact: {files} files, {tokens:,} tokens, every sha256 matches")


def _inspect(given: InspectArguments) -> None:
    from tttlm.data.report import describe_folder, draw_lengths

    if not given.folder:
        raise InputError("name a folder: prepare inspect FOLDER")
    for line in describe_folder(given.folder, samples=given.samples):
        print(line)
    picture = Path(given.png) if given.png else Path(given.folder) / "lengths.png"
    try:
        draw_lengths(given.folder, picture)
    except OSError as error:
        raise InputError(f"the picture cannot be written to {picture} ({error.strerror}); choose with --png") from error
    print(f"\nlengths drawn in {picture}")


def run() -> None:
    """Runs the command with the arguments of this process, and exits with its status."""
    run_command(lambda: main(sys.argv[1:]), kept="finished shards are kept: the same command resumes")


if __name__ == "__main__":
    run()
