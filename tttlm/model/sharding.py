"""Rules from the parameters of a language model to the mesh axes that shard their dimensions."""

import re

from tttlm.model.config import ModelConfig
from tttlm.parts.partition import CONV_KERNEL, FEATURES, FROM_FEATURES, TO_FEATURES

# Rules for parameters outside mixers. The first one whose pattern matches the path applies; the axis of stacked blocks
# is not counted and is never sharded.
RULES = (
    (r"embedding$", ("tensor", "fsdp context")),  # V D
    (r"conv/kernel$", CONV_KERNEL),
    (r"(conv|(gate|up)_proj)/bias$", FEATURES),
    (r"down_proj/kernel$", FROM_FEATURES),
    (r"(gate|up)_proj/kernel$", TO_FEATURES),
)
STACKED = re.compile(r"(^|/)stack/")
_IN_MIXER = re.compile(r"(?:^|/)blocks/(\d+)/mixer/(.+)$")


def parameter_axes(model: ModelConfig, path: str, ndim: int) -> tuple[str, ...]:
    """The mesh axes of each dimension of a parameter, without the axis of stacked blocks.

    Args:
        model: The model; each of its mixers has rules for its own parameters.
        path: The path of the parameter, or the path of an array of the optimiser that ends with it.
        ndim: The number of dimensions, without the axis of stacked blocks.
    """
    rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES
    if inside := _IN_MIXER.search(path):
        rules, path = model.pattern[int(inside[1])].parameter_rules, inside[2]
    stored = ("fsdp context",) if ndim > 1 else ()
    return next((axes for pattern, axes in rules if re.search(pattern, path)), stored)
