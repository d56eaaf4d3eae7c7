"""Reading and writing of released checkpoints: folders, streams and repositories of the hub, without unpickling."""

from tttlm.interop.checkpoint import is_pretrained
from tttlm.interop.pretrained import from_pretrained, save_pretrained
from tttlm.interop.publish import push_to_hub
from tttlm.interop.warm_start import WarmStart, pretrained_config, warm_start

__all__ = [
    "WarmStart",
    "from_pretrained",
    "is_pretrained",
    "pretrained_config",
    "push_to_hub",
    "save_pretrained",
    "warm_start",
]
