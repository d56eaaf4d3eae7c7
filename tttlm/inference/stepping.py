"""One token of each sequence through the model: by a scan over stacked blocks, or block by block.

On a CPU, a scan copies the weights of every block before it uses them, which costs more than reading them. Blocks that
are apart are not copied; they are a second copy of the weights as long as there is decoding.
"""

from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tttlm.model import LanguageModel
from tttlm.model.language_model import State, placed
from tttlm.ops.documents import Documents


class Stacked:
    """Steps of a model by the scan over its stacked blocks.

    Args:
        model: The model, bound to its parameters.
        state: The state before the first step; its buffers are donated.

    Attributes:
        state: What the next step continues from; that of another sequence may be put in its place.
    """

    def __init__(self, model: LanguageModel, state: State) -> None:
        self._graph, self._params = nnx.split(model)
        self.state = state

    def __call__(self, tokens: Int[Array, "B"], lengths: Int[Array, "B"] | None) -> Float[Array, "B V"]:
        """Logits after reading one token of each sequence; a sequence of length 0 does not read it."""
        logits, self.state = _step(self._graph, self._params, self.state, tokens, lengths)
        return logits


class Apart:
    """Steps of a model block by block, by a program that all blocks share; otherwise as `Stacked`."""

    def __init__(self, model: LanguageModel, state: State) -> None:
        self._graph, self._params = nnx.split(model)
        self._of_repeat, stack = nnx.split(model.stack)
        self._blocks = unstacked(stack, model.config.repeats)
        self.state = list(unstacked(state, model.config.repeats))

    def __call__(self, tokens: Int[Array, "B"], lengths: Int[Array, "B"] | None) -> Float[Array, "B V"]:
        """Logits after reading one token of each sequence; a sequence of length 0 does not read it."""
        document = jnp.copy(self.state[0][0].mixer.document)  # the state's own is donated to the first block
        h, docs = before_blocks(self._graph, self._params, tokens[:, None], document, None, lengths)
        for i, block in enumerate(self._blocks):
            h, self.state[i] = _through(self._of_repeat, block, self.state[i], h, docs)
        return _after(self._graph, self._params, h)


def stepping(model: LanguageModel, state: State) -> Stacked | Apart:
    """Block by block on a single CPU device, by the scan elsewhere."""
    return Apart(model, state) if on_one_cpu(state) else Stacked(model, state)


def on_one_cpu(tree: Any) -> bool:
    """Whether all arrays are on a single CPU device."""
    devices = {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


@partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _step(
    graph: Any, params: Any, state: State, tokens: Int[Array, "B"], lengths: Int[Array, "B"] | None
) -> tuple[Float[Array, "B V"], State]:
    model: LanguageModel = nnx.merge(graph, params)
    h, state = model.extend_features(tokens[:, None], state, lengths=lengths)
    return model.head(h[:, 0]), state


@partial(jax.jit, static_argnums=(1,))
def unstacked(tree: Any, repeats: int) -> tuple[Any, ...]:
    """A copy of a stack of blocks, or of their states, in parts."""
    return tuple(jax.tree.map(itemgetter(i), tree) for i in range(repeats))


@partial(jax.jit, static_argnums=(0,))
def before_blocks(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    document: Int[Array, "B"],
    segment_ids: Int[Array, "B T"] | None,
    lengths: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B T D"], Documents | None]:
    """The inputs of the first block, and the documents for all blocks; `document` is the one in progress."""
    _, tokens, docs = placed(tokens, document, segment_ids, lengths)
    return nnx.merge(graph, params).embedded(tokens), docs


@partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _through(
    of_repeat: Any, params: Any, state: State, h: Float[Array, "B 1 D"], docs: Documents | None
) -> tuple[Float[Array, "B 1 D"], State]:
    return nnx.merge(of_repeat, params)(h, state, docs, 1.0)


@partial(jax.jit, static_argnums=(0,))
def _after(graph: Any, params: Any, h: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
    model: LanguageModel = nnx.merge(graph, params)
    return model.head(model.norm(h)[:, 0])
