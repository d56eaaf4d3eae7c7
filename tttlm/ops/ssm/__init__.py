"""State-space models: a linear recurrence whose decay and input depend on the token.

`selective_scan` is the recurrence of Mamba, `ssd` that of Mamba-2; `reference` has the definition of each.
"""

from tttlm.ops.ssm.reference import IMPLEMENTATIONS
from tttlm.ops.ssm.selective_scan import selective_scan
from tttlm.ops.ssm.ssd import ssd, ssd_chunk

__all__ = ["IMPLEMENTATIONS", "selective_scan", "ssd", "ssd_chunk"]
