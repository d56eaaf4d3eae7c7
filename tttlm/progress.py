"""Progress on standard error: a bar with speed and time left, also readable in a log file."""

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(
    total: float | None, description: str, unit: str = "it", *, initial: float = 0, disable: bool = False
) -> Iterator[tqdm]:
    """Shows a progress bar with rate and time left on standard error.

    Args:
        total: number of units; None if unknown (then no time left is shown).
        description: label in front of the bar.
        unit: the unit that is counted ("B" is shown as kB, MB, ...).
        initial: number of units that an earlier process has done.
        disable: whether nothing is shown.

    In a terminal the bar is redrawn; in a file or pipe it writes one line every 10 seconds.
    """
    live = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        file=sys.stderr if live else _Lines(),
        mininterval=0.2 if live else 10.0,
        dynamic_ncols=live,
        ncols=None if live else 100,
        smoothing=0.1,
        initial=initial,
        disable=disable,
    ) as bar:
        yield bar


def say(line: str) -> None:
    """Prints a line on standard error; a closed standard error is ignored."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class _Lines:
    """Turns tqdm's redraws (carriage returns) into lines of their own."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n \x1b[A")
        if line:
            say(line)

    def flush(self) -> None:
        pass
