"""SIGTERM is answered in time, also where Python cannot run a handler, unless there is something to save."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tttlm.training.interrupts import catch_interrupts

# A call of the C library that no signal ends: a shell sends the signal, and then reads from standard input.
COMMAND = """
import ctypes, signal, sys, time
from tttlm import termination
from tttlm.cli.faults import run_command

termination.GRACE = 0.3

def command():
    if {what!r} == "saves":
        handler = termination.Handler(lambda number, frame: sys.exit(7))
        handler.patient = True
        signal.signal(signal.SIGTERM, handler)
    if {what!r} == "notes":
        signal.signal(signal.SIGTERM, termination.Handler(lambda number, frame: None, only_notes=True))
        print("sent", flush=True)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)
    ctypes.CDLL(None).system(b"kill -TERM $PPID; echo sent; read line")

run_command(command, kept="all is kept")
"""


@pytest.mark.parametrize("what", ["calls", "notes", "saves"])
def test_a_long_call_of_a_library_does_not_make_a_process_deaf(what):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(what=what)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout.readline() == "sent\n"
    if what == "saves":  # waits for the end of the call, however long it takes
        time.sleep(1)
        assert process.poll() is None
        _, said = process.communicate("\n", timeout=30)
        assert (process.returncode, said) == (7, "")
    else:
        assert process.wait(timeout=30) == 75
        assert process.communicate(timeout=30)[1] == "stopped within a long computation; all is kept\n"


def test_training_waits_only_once_it_has_something_to_save():
    with catch_interrupts() as interrupts:
        assert not interrupts.stop()
        assert not interrupts.handler.patient  # the first step is compiled
        assert not interrupts.stop()
        assert interrupts.handler.patient
        os.kill(os.getpid(), signal.SIGTERM)
        assert not interrupts.handler.answered  # a noted signal is not answered before the step has ended
        assert interrupts.stop()
        assert interrupts.handler.answered
