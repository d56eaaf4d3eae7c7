"""A child hears what its parent hears, once, and never outlives it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tttlm.comparison.children import run_children

ROOT = Path(__file__).parents[2]
CHILD = """
import signal, sys, time
from tttlm.comparison.children import end_with_parent
end_with_parent()
heard = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: heard.append(number))
open(sys.argv[1], "w").write("ready")
while not heard:
    time.sleep(0.01)
time.sleep(0.3)
open(sys.argv[1], "w").write(f"{len(heard)} {heard[0]}")
sys.exit(7)
"""
PARENT = """
import os, sys
from tttlm.comparison.children import run_child
print(run_child(["-c", sys.argv[1], sys.argv[2]], os.environ)[0])
"""


def start(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    note = folder / "note"
    words = [sys.executable, "-c", PARENT, CHILD, str(note)]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    while not (note.exists() and note.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    return parent, note


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole_group", [False, True])  # a signal to the parent alone, and Ctrl-C in a terminal
def test_a_signal_reaches_the_child_once_and_its_status_comes_back(tmp_path, number, whole_group):
    parent, note = start(tmp_path)
    (os.killpg if whole_group else os.kill)(parent.pid, number)
    out, _ = parent.communicate(timeout=60)
    assert out.strip() == "7"
    assert note.read_text() == f"1 {int(number)}"


def test_a_killed_parent_leaves_no_orphan(tmp_path):
    parent, _ = start(tmp_path)
    (child,) = map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while time.monotonic() < end and _runs(child):
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


def test_so_many_run_at_a_time_and_each_gives_its_own_status(tmp_path):
    note = "import os, sys, time; n = int(sys.argv[1]); open(sys.argv[2] + f'/{n}', 'w').close(); "
    wait = "\nwhile n < 2 and not os.path.exists(sys.argv[2] + f'/{1 - n}'): time.sleep(0.01)\nsys.exit(n)"
    # The first two wait for each other, so that they end only if they run at the same time.
    commands = (["-c", note + wait, str(n), str(tmp_path)] for n in range(3))
    ended = {number: (status, peak) for number, status, peak in run_children(commands, os.environ, jobs=2)}
    assert {number: status for number, (status, _) in ended.items()} == {0: 0, 1: 1, 2: 2}
    assert all(peak > 1e6 for _, peak in ended.values())


def own_children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def has_ended(child: str) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def signal_after(first: list[str], *more: list[str]) -> Iterator[list[str]]:
    """Commands; SIGTERM comes when the first child has ended and nobody has waited for it."""
    others = own_children()
    yield first
    while not any(map(has_ended, own_children() - others)):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    yield from more


def test_a_signal_between_two_children_is_lost_by_neither():
    commands = signal_after(["-c", ""], ["-c", "import time; time.sleep(60)"])
    assert {n: status for n, status, _ in run_children(commands, os.environ, jobs=2)} == {0: 0, 1: -signal.SIGTERM}
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        assert [status for _, status, _ in run_children(signal_after(["-c", ""]), os.environ, jobs=2)] == [0]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_what_still_runs_is_stopped_when_nobody_waits_for_it(tmp_path):
    sleep = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)"
    file = tmp_path / "started"
    quick = f"import os, time\nwhile not os.path.exists({str(file)!r}): time.sleep(0.01)"
    ended = run_children([["-c", sleep, str(file)], ["-c", quick]], os.environ, jobs=2)
    started = time.monotonic()
    assert next(ended)[:2] == (1, 0)
    ended.close()
    assert time.monotonic() - started < 30
