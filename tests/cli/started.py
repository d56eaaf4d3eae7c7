"""Commands that run beside a test, and end with it, even if the test run is killed."""

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from tttlm.comparison.children import end_with_parent
end_with_parent()
from tttlm.cli.{program} import run
run()
"""


def start(program: str, *words: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Starts `python -m tttlm.cli.PROGRAM WORDS`; options are those of `subprocess.Popen`."""
    command = [sys.executable, "-c", CODE.format(program=program), *map(str, words)]
    receives, sends = os.pipe()
    process = subprocess.Popen(command, stdin=receives, text=True, cwd=ROOT, **options)
    os.close(receives)
    weakref.finalize(process, os.close, sends)  # `communicate` would close a pipe of `subprocess`
    return process
