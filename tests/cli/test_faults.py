"""Whatever the system, a parser or a library raises becomes one line and the status that the table promises."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tttlm.cli.faults import BAD_INPUT, FAULT, INTERRUPTED, READER_LEFT, TERMINATED, Terminated, describe
from tttlm.errors import CannotWrite, InputError

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, time
from tttlm.cli.faults import run_command
from tttlm.errors import InputError

def command():
    {body}

run_command(command, kept="all is kept")
"""


def run(body: str, shell: str = "{}", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of its own in a process, within a line of bash."""
    line = shell.format('"$PYTHON" -c "$PROGRAM"')
    values = {"PYTHON": sys.executable, "PROGRAM": PROGRAM.format(body=body), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=120, env={**os.environ, **values}
    )


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


THEIRS = ("ENOENT", "EACCES", "EPERM", "EROFS", "EEXIST", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP")
MACHINES = ("ENOSPC", "EDQUOT", "EMFILE", "ENFILE", "ENOMEM", "EIO", "EBUSY", "ESTALE", "ECONNREFUSED", "ETIMEDOUT")


@pytest.mark.parametrize("name", [*THEIRS, *MACHINES])
def test_an_error_of_the_system_names_the_file_the_reason_and_what_was_kept(name):
    number = getattr(errno, name)
    error = OSError(number, os.strerror(number), "some/file")
    for shape in (raised(error), raised(chained(error))):
        line, status = describe(shape, "all is kept")
        assert status == (BAD_INPUT if name in THEIRS else FAULT)
        assert line.startswith(f"error: some/file: {os.strerror(number)}")
        assert "\n" not in line
        assert ("all is kept" in line) == (name in MACHINES)


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "ENOSPC", "EDQUOT", "EMFILE", "EIO"])
def test_the_status_is_that_of_the_cause_where_a_room_has_its_own_words_for_it(name):
    def write() -> None:
        try:
            raise OSError(getattr(errno, name), "refused", "out")
        except OSError:
            raise InputError("out cannot be written") from None

    with pytest.raises(InputError) as caught:
        write()
    assert describe(caught.value, "kept") == ("error: out cannot be written", BAD_INPUT if name in THEIRS else FAULT)


def chained(error: OSError) -> RuntimeError:
    """As a library passes on what the system raised."""
    wrapped = RuntimeError("it did not work")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize(
    ("error", "says", "status"),
    [
        (InputError("x must be 1,\ngot \x1b[2J"), "error: x must be 1, got \\x1b[2J", BAD_INPUT),
        (KeyboardInterrupt(), "stopped; all is kept", INTERRUPTED),
        (Terminated(), "stopped by SIGTERM; all is kept", TERMINATED),
        (CannotWrite("step 3: no space"), "error: step 3: no space", FAULT),
        (MemoryError(), "error: out of memory: use a smaller batch, chunk, length or model; all is kept", FAULT),
        (RuntimeError("INTERNAL: Out of memory allocating 5 bytes"), "error: out of memory (INTERNAL: Out of", FAULT),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "error: out of memory (RESOURCE_EXHAUSTED", FAULT),
        (RecursionError(), "error: the input is nested too deeply", BAD_INPUT),
        (ModuleNotFoundError("No", name="grain.python"), "pip install 'tttlm[train]'", BAD_INPUT),
        (ModuleNotFoundError("No module", name="nowhere"), "error: ModuleNotFoundError: No module", FAULT),
        (KeyError("x"), "error: KeyError: 'x'; all is kept", FAULT),
        (ValueError("a" * 9999), "aaa...", FAULT),
    ],
)
def test_what_a_library_raises_is_one_short_line(error, says, status):
    line, came = describe(raised(error), "all is kept")
    assert says in line
    assert came == status
    assert "\n" not in line
    assert len(line) < 1100


@pytest.mark.parametrize(
    ("body", "shell", "status", "says"),
    [
        ("print('done')", "{}", 0, ""),
        ("return 3", "{}", 3, ""),
        ("for i in range(10**5): print(i)", "{} | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}", READER_LEFT, ""),
        ("print('much ' * 10**5); sys.exit(0)", "{} | head -c 1; exit ${{PIPESTATUS[0]}}", READER_LEFT, ""),
        ("print('x')", "{} >/dev/full", FAULT, "error: the system refused: No space left on device: free some space"),
        ("print('x')", "{} >&-", 0, ""),
        ("raise InputError('no')", "{} 2>/dev/full", BAD_INPUT, ""),
        ("print('caf\\udce9 \\u00b1')", "LC_ALL=C PYTHONIOENCODING=ascii {}", 0, ""),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", "{}", TERMINATED, "stopped by SIGTERM; all is kept"),
        (  # a shell gives what it runs in the background no Ctrl-C
            "signal.signal(signal.SIGINT, signal.default_int_handler); "
            "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
            "{}",
            INTERRUPTED,
            "stopped; all is kept",
        ),
        ("open('/dev/null/x')", "{}", BAD_INPUT, "error: /dev/null/x: Not a directory: a part of the path is a file"),
        ("open('x' * 300)", "{}", BAD_INPUT, "File name too long: choose a shorter name"),
        ("[open('/dev/null') for _ in range(99)]", "ulimit -n 40; {}", FAULT, "Too many open files: raise the limit"),
        ("bytearray(10**15)", "{}", FAULT, "error: out of memory"),
    ],
)
def test_a_command_ends_with_one_line_and_its_status(body, shell, status, says):
    done = run(body, shell)
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == bool(says)
    assert "Traceback" not in done.stderr


def test_a_platform_that_is_not_there_is_one_line():
    for platform in ("abacus", "rocm"):
        done = run("import jax; jax.devices()", JAX_PLATFORMS=platform)
        assert done.returncode == BAD_INPUT
        assert f"JAX cannot use the platform '{platform}'" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_the_whole_trace_is_there_for_who_asks():
    assert "Traceback" in run("{}['x']", TTTLM_TRACEBACK="1").stderr


def test_a_command_without_its_extra_says_what_to_install():
    block = "import sys; sys.modules['tyro'] = None; import importlib.util as u; find = u.find_spec; "
    block += "u.find_spec = lambda name, package=None: None if name == 'tyro' else find(name, package); "
    done = subprocess.run(
        [sys.executable, "-c", block + "import tttlm.cli.train"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == BAD_INPUT
    assert done.stderr == "error: this needs the package tyro, which is not installed: pip install 'tttlm[train]'\n"


def test_a_command_runs_in_a_thread_that_is_not_the_main_one():
    code = "import threading; from tttlm.cli.faults import run_command; "
    code += "t = threading.Thread(target=run_command, args=[lambda: print('ran')]); t.start(); t.join()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.stdout, done.stderr) == ("ran\n", "")
