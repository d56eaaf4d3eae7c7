"""Released checkpoints in and out: folders, streams and repositories of the hub. Nothing is ever unpickled."""

from tttlm.interop.pretrained import from_pretrained, save_pretrained
from tttlm.interop.publish import push_to_hub

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
