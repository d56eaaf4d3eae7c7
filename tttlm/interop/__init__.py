"""Released checkpoints in and out: folders of `config.json` and safetensors. Nothing is ever unpickled."""

from tttlm.interop.pretrained import from_pretrained, save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
