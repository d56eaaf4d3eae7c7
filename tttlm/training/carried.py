"""State that training carries from step to step, for the layout in which a document spans many steps.

With `data.layout: documents` an example reads `sequence_length` tokens of a document, and the next step the tokens
after them. The state of every mixer is carried along, so that a document of any length is read with its full context;
the gradient stops at the beginning of the step (truncated backpropagation through time). Where a document begins, the
state is the model's initial one, through which the gradient does flow.
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
    """Whether examples continue from step to step."""
    return config.data.layout == "documents"


def initial_state(config: TrainConfig, model: LanguageModel) -> State | tuple[()]:
    """The state before the first token of every example; () if none is carried."""
    return model.init_state(config.batch_size) if carries_state(config) else ()


def continued_state(model: LanguageModel, carried: State, continues: Bool[Array, "B"] | None) -> State:
    """The state that a step begins with.

    Args:
        model: the model, bound to its current parameters.
        carried: the state after the previous step, without a gradient; leaves are `[repeats, B, ...]`.
        continues: whether an example continues the document of the same index of the batch at the previous step.

    Raises:
        ValueError: the batch has no `continues`, so its layout is not "documents".
    """
    if continues is None:
        raise ValueError("a batch that carries state needs `continues`; the layout 'documents' gives it")

    def chosen(old: Array, new: Array) -> Array:
        goes_on = continues.reshape(1, -1, *[1] * (new.ndim - 2))
        return jnp.where(goes_on, jax.lax.stop_gradient(old).astype(new.dtype), new)

    return jax.tree.map(chosen, carried, model.init_state(len(continues)))


def carried_shardings(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A sharding for every array of a carried state: its examples are sharded as those of the batch."""
    return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*(None, BATCH)[: x.ndim])), state)


def check_carried(config: TrainConfig, mesh: Mesh | AbstractMesh, longest: int) -> None:
    """Refuses configurations that cannot carry state.

    Args:
        longest: tokens of the longest document.

    Raises:
        InputError: a document has more tokens than the cache of a state, or the mesh shards within examples.
    """
    parts = mesh.shape["context"] * mesh.shape["tensor"]
    if parts > 1:
        raise InputError(
            f"data.layout documents carries a state from step to step, which can be sharded over examples only, but "
            f"mesh.context x mesh.tensor is {parts}: use mesh.data and mesh.fsdp"
        )
    needed = -(-longest // config.sequence_length) * config.sequence_length
    for mixer in config.model.pattern:
        if mixer.cache_length is not None and mixer.cache_length < needed:
            raise InputError(
                f"the longest document takes {needed:,} positions with its padding, and {mixer.name} has room for "
                f"{mixer.cache_length:,}: raise its max_length, or use another data.layout"
            )
