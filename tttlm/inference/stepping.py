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
from tttlm.ops.documents import SegmentIds


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
        self._blocks = _unstacked(stack, model.config.repeats)
        self.state = list(_unstacked(state, model.config.repeats))

    def __call__(self, tokens: Int[Array, "B"], lengths: Int[Array, "B"] | None) -> Float[Array, "B V"]:
        """Logits after reading one token of each sequence; a sequence of length 0 does not read it."""
        document = jnp.copy(self.state[0][0].mixer.document)  # the state's own is donated to the first block
        h, docs = _before(self._graph, self._params, tokens, document, lengths)
        for i, block in enumerate(self._blocks):
            h, self.state[i] = _through(self._of_repeat, block, self.state[i], h, docs)
        return _after(self._graph, self._params, h)


def stepping(model: LanguageModel, state: State) -> Stacked | Apart:
    """Block by block on a single CPU device, by the scan elsewhere."""
    devices = {device for leaf in jax.tree.leaves(state) for device in leaf.devices()}
    alone = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return Apart(model, state) if alone else Stacked(model, state)


@partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _step(
    graph: Any, params: Any, state: State, tokens: Int[Array, "B"], lengths: Int[Array, "B"] | None
) -> tuple[Float[Array, "B V"], State]:
    model: LanguageModel = nnx.merge(graph, params)
    h, state = model.extend_features(tokens[:, None], state, lengths=lengths)
    return model.head(h[:, 0]), state


@partial(jax.jit, static_argnums=(1,))
def _unstacked(tree: Any, repeats: int) -> tuple[Any, ...]:
    return tuple(jax.tree.map(itemgetter(i), tree) for i in range(repeats))


@partial(jax.jit, static_argnums=(0,))
def _before(
    graph: Any, params: Any, tokens: Int[Array, "B"], document: Int[Array, "B"], lengths: Int[Array, "B"] | None
) -> tuple[Float[Array, "B 1 D"], SegmentIds]:
    _, tokens, docs = placed(tokens[:, None], document, lengths=lengths)
    return nnx.merge(graph, params).embedded(tokens), docs


@partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _through(
    of_repeat: Any, params: Any, state: State, h: Float[Array, "B 1 D"], docs: SegmentIds
) -> tuple[Float[Array, "B 1 D"], State]:
    return nnx.merge(of_repeat, params)(h, state, docs, 1.0)


@partial(jax.jit, static_argnums=(0,))
def _after(graph: Any, params: Any, h: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
    model: LanguageModel = nnx.merge(graph, params)
    return model.head(model.norm(h)[:, 0])
