"""The command lines (docs/commands.md). Each parses its arguments and calls the library."""

import sys

from tttlm.extras import missing

if advice := missing("tyro", "yaml"):
    print(f"error: {advice}", file=sys.stderr)
    raise SystemExit(2)
