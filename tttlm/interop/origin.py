"""The origin of a model that was read: token ids, positions and tokenizer files, which are written again with it."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tttlm.errors import InputError
from tttlm.interop.architecture import Architecture
from tttlm.interop.checkpoint import Checkpoint
from tttlm.model import ModelConfig

FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.json", "chat_template.jinja", "generation_config.json"),
)
"""Files that are copied with a model."""
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id")
_POSITIONS = ("max_position_embeddings", "max_sequence_length")
# Fields that a family writes in several ways, or omits if they are the default: ours are written.
_IN_OTHER_WORDS = ("rope_parameters", "rope_scaling", "rope_theta", "time_step_limit", "torch_dtype", "dtype")


@dataclass(frozen=True)
class Origin:
    """The folder that a model was read from.

    Attributes:
        folder: The folder.
        architecture: The name of its family and layout.
        text: Its configuration file, as JSON.
    """

    folder: str
    architecture: str
    text: str

    @property
    def values(self) -> dict[str, Any]:
        """The values of its configuration file."""
        return json.loads(self.text)


def origin_of(checkpoint: Checkpoint) -> Origin:
    """The origin of a model that is read from a checkpoint."""
    return Origin(str(checkpoint.folder), checkpoint.architecture.name, json.dumps(checkpoint.values))


def kept_values(origin: Origin | None, architecture: Architecture, config: ModelConfig) -> dict[str, Any]:
    """The values of a model's configuration file: those of its origin, updated by our configuration.

    If the model is unchanged, all values of the origin are kept. If it was changed, or is written in another layout,
    token ids and positions are kept.

    Raises:
        InputError: the family has no such model.
    """
    ours = architecture.values(config)
    came = {} if origin is None else origin.values
    if origin is not None and origin.architecture == architecture.name:
        described = architecture.config(came)
        same: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype, "remat": config.remat}
        if replace(described, **same) == config:
            values = came
        else:
            values = {name: value for name, value in came.items() if name not in _IN_OTHER_WORDS} | ours
    else:
        values = ours | {name: came[name] for name in _TOKENS if name in came}
        positions = next((came[name] for name in _POSITIONS if came.get(name) is not None), None)
        name = "max_sequence_length" if architecture.layout == "official_jax" else "max_position_embeddings"
        if positions is not None and architecture.layout != "mamba_ssm":
            values.setdefault(name, positions)
    if architecture.layout == "huggingface":
        values = values | {"dtype" if came.get("dtype") else "torch_dtype": config.param_dtype}
    return values


def copy_files(origin: Origin | None, folder: Path) -> list[str]:
    """Copies the files of the origin; existing files are not replaced.

    Returns:
        The names of the files.

    Raises:
        InputError: the folder of the origin no longer exists.
    """
    if origin is None:
        return []
    source = Path(origin.folder)
    check_there(origin)
    names = [name for name in FILES if (source / name).is_file() and not (folder / name).exists()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def check_there(origin: Origin | None) -> None:
    """Refuses to write a model if the folder of its origin no longer exists.

    Raises:
        InputError: the folder does not exist.
    """
    if origin is not None and not Path(origin.folder).is_dir():
        raise InputError(
            f"{origin.folder}, from which this model was read and from which the tokenizer's files would be copied, is "
            "not there: put it back, or set model.origin = None to write the model without them"
        )
