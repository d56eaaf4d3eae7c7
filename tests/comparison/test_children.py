"""A child hears what its parent hears, once, and never outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
