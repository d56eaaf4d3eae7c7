"""State that training carries from step to step, for the layout in which a document goes on over many steps.

With `data.layout: documents` an example reads `sequence_length` tokens of a document, and the next step the tokens
after them. The state of every mixer goes on with it, so that a document is read whole however long it is; the gradient
ends at the beginning of the step (truncated backpropagation through time). Where a document begins, the state is the
model's initial one, through which the gradient does flow.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from tttlm.errors import InputError
from tttlm.model import LanguageModel
from tttlm.model.language_model import State
from tttlm.parts.partition import BATCH
from tttlm.training.config import TrainConfig


def carries_state(config: TrainConfig) -> bool:
    """Whether examples go on from step to step."""
    return config.data.layout == "documents"


def initial_state(config: TrainConfig, model: LanguageModel) -> State | tuple[()]:
    """The state before the first step: that before the first token, or nothing where none is carried."""
    return model.init_state(config.batch_size) if carries_state(config) else ()


def continued_state(model: LanguageModel, carried: State, continues: Bool[Array, "B"] | None) -> State:
    """The state that a step begins with.

    Args:
        model: bound to its parameters of now.
        carried: the state after the step before, without a gradient; leaves are `[repeats, B, ...]`.
        continues: whether the example goes on with the document that the one before it at the same position read.

    Raises:
        ValueError: the batch does not say what continues, so its layout is not "documents".
    """
    if continues is None:
        raise ValueError("a batch that carries state needs `continues`; the layout 'documents' gives it")

    def chosen(old: Array, new: Array) -> Array:
        goes_on = continues.reshape(1, -1, *[1] * (new.ndim - 2))
        return jnp.where(goes_on, jax.lax.stop_gradient(old).astype(new.dtype), new)

    return jax.tree.map(chosen, carried, model.init_state(len(continues)))


def carried_shardings(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A sharding for every array of a carried state: its examples are where those of the batch are."""
    return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*(None, BATCH)[: x.ndim])), state)


def check_carried(config: TrainConfig, mesh: Mesh | AbstractMesh, longest: int) -> None:
    """Refuses what a carried state cannot do.

    Args:
        longest: tokens of the longest document.

    Raises:
        InputError: a document has more tokens than a state has room for, or the mesh takes examples apart.
    """
    parts = mesh.shape["context"] * mesh.shape["tensor"]
    if parts > 1:
        raise InputError(
            f"data.layout documents carries a state from step to step, which is sharded over examples only, and "
            f"mesh.context x mesh.tensor is {parts}: use mesh.data and mesh.fsdp"
        )
    needed = -(-longest // config.sequence_length) * config.sequence_length
    for mixer in config.model.pattern:
        if mixer.cache_length is not None and mixer.cache_length < needed:
            raise InputError(
                f"the longest document takes {needed:,} positions with its padding, and {mixer.name} has room for "
                f"{mixer.cache_length:,}: raise its max_length, or use another data.layout"
            )
