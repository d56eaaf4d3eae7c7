"""Dynamic evaluation of language models: score a stretch of tokens, then learn from it (arXiv 1709.07432).

It is TTT-Online for text, whose self-supervised loss is the main loss itself: the tokens are labels once they have been
read. It works for every mixer. The state of the sequence layers, including the inner model of a TTT layer, is carried
from stretch to stretch while the outer parameters learn; gradients stop at the start of a stretch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from tttlm.adaptation.adapter import split, towards
from tttlm.errors import InputError
from tttlm.model import LanguageModel
from tttlm.ranges import Count, NonNegativeFloat, Range, Seed, Size
from tttlm.training.loss import token_losses


@dataclass(frozen=True)
class DynamicConfig:
    """Configuration of dynamic evaluation: how a language model learns from text after it was scored on it."""

    learning_rate: NonNegativeFloat = 0.0
    """Learning rate; 0 does not learn."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """The optimiser: plain gradient descent, or Adam."""
    learns: Literal["all", "norms", "feed_forward", "lora"] = "all"
    """The parameters that learn: all, norms, feed-forward layers, or low-rank additions to every projection (LoRA)."""
    rank: Size = 4
    """Rank of the low-rank additions with `learns: lora`."""
    stretch: Size = 64
    """Length in tokens of a stretch, the part of a text that is scored before the model learns from it."""
    steps: Count = 1
    """Number of gradient steps on each stretch."""
    clip: NonNegativeFloat = 1.0
    """Largest global norm of a gradient; 0 does not clip."""
    decay: Annotated[float, Range(least=0, most=1)] = 0.0
    """Fraction by which parameters move back towards the initial ones after each step."""
    reset: Literal["document", "never"] = "document"
    """When parameters are reset to the initial ones: at the start of a document, or never."""
    seed: Seed = 0
    """Seed of the initial values of low-rank additions."""


@dataclass(frozen=True)
class TextLosses:
    """The losses of a model on documents, token by token.

    Attributes:
        losses: for each document, -log p in nats of each token after the first, float32 `[T - 1]`.
    """

    losses: tuple[Float[np.ndarray, "T"], ...]

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return sum(len(losses) for losses in self.losses)

    @property
    def nats(self) -> float:
        """The summed -log p of all tokens."""
        return float(sum(losses.sum(dtype=np.float64) for losses in self.losses))

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / max(self.tokens, 1)


class DynamicEvaluation:
    """A language model that learns from each stretch of a text after it was scored on it.

    >>> static = DynamicEvaluation(model, DynamicConfig())                     # without learning
    >>> dynamic = DynamicEvaluation(model, DynamicConfig(learning_rate=1e-2))
    >>> static(documents).loss - dynamic(documents).loss                       # the gain of learning

    It is compiled once. The model is not changed.

    Args:
        model: any language model of this library.
        config: see `DynamicConfig`.

    Raises:
        InputError: the model has no parameters of the kind `config.learns`.
    """

    def __init__(self, model: LanguageModel, config: DynamicConfig):
        self._model, self._config = model, config
        learned, self._bind = _learned(model, config)
        self._optimizer = _optimizer(config)
        self._first = learned, self._optimizer.init(learned)
        self._read = jax.jit(self._read_stretch)

    def __call__(
        self, documents: Iterable[Int[np.ndarray, "T"]], *, on_tokens: Callable[[int], Any] = lambda tokens: None
    ) -> TextLosses:
        """The loss of every token given all before it in its document.

        The first token of a document (its BOS, for instance) is not predicted. Each call starts from the initial
        parameters.

        Args:
            documents: token ids of each document, int `[T]`, read in order, one at a time.
            on_tokens: called with the number of tokens that were scored since the last call.

        Raises:
            InputError: a token is not in the vocabulary, or a document is longer than an attention cache.
        """
        carried, start, length = self._first, self._model.init_state(1), self._config.stretch
        all_losses = []
        for document in documents:
            tokens = np.asarray(document, np.int32)
            _check(tokens, self._model, length)
            if self._config.reset == "document":
                carried = self._first
            state, losses = start, []
            for here in range(0, len(tokens) - 1, length):
                part = tokens[here : here + length + 1]
                count = len(part) - 1
                padded = np.pad(part, (0, length - count))
                stretch, state, carried = self._read(carried, state, padded, np.arange(length) < count, here == 0)
                losses.append(np.asarray(stretch)[:count])
                on_tokens(count)
            all_losses.append(np.concatenate(losses) if losses else np.zeros(0, np.float32))
        return TextLosses(tuple(all_losses))

    def _read_stretch(self, carried: Any, state: Any, tokens: Array, real: Array, begins: Array) -> Any:
        """Reads one stretch: the losses of its tokens, the state after it, and the parameters learned from it."""
        losses, after = self._scored(carried[0], state, tokens, begins)
        if not self._config.learning_rate:
            return losses, after, carried

        def loss(learned: Any) -> Array:
            scored, _ = self._scored(learned, state, tokens, begins)
            return jnp.sum(jnp.where(real, scored, 0)) / jnp.sum(real)

        def step(carried: Any, _: None) -> Any:
            learned, opt_state = carried
            updates, opt_state = self._optimizer.update(jax.grad(loss)(learned), opt_state, learned)
            learned = towards(self._first[0], optax.apply_updates(learned, updates), self._config.decay)
            return (learned, opt_state), None

        return losses, after, jax.lax.scan(step, carried, None, length=self._config.steps)[0]

    def _scored(self, learned: Any, state: Any, tokens: Array, begins: Array) -> Any:
        model = self._bind(learned)
        # The initial inner weights of a TTT layer are parameters, which learn from the first stretch.
        state = jax.tree.map(lambda new, old: jnp.where(begins, new, old), model.init_state(1), state)
        logits, state = model.extend(tokens[None, :-1], state)
        return token_losses(logits[0], tokens[1:]), state


def _optimizer(config: DynamicConfig) -> optax.GradientTransformation:
    rule = optax.adam if config.optimizer == "adam" else optax.sgd
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*clip, rule(config.learning_rate))


def _learned(model: LanguageModel, config: DynamicConfig) -> tuple[Any, Callable[[Any], Any]]:
    """The parameters that learn, and a function that returns the model with them."""
    if config.learns != "lora":
        graph, learned, rest = split(model, _FILTERS[config.learns])
        if config.learns != "all" and not jax.tree.leaves(learned):
            raise InputError(f"the model has no parameters of the kind {config.learns!r}: name another `learns`")
        return learned, lambda learned: nnx.merge(graph, learned, rest, copy=True)
    graph, projections, rest = split(model, _is_projection)
    leaves, tree = jax.tree.flatten(projections)
    keys = jax.random.split(jax.random.key(config.seed), len(leaves))
    # Low-rank adaptation (arXiv 2106.09685): kernel + a b, with b initialised to zero.
    pairs = [
        (
            jax.random.normal(key, (*kernel.shape[:-1], config.rank), kernel.dtype) / np.sqrt(kernel.shape[-2]),
            jnp.zeros((*kernel.shape[:-2], config.rank, kernel.shape[-1]), kernel.dtype),
        )
        for key, kernel in zip(keys, leaves, strict=True)
    ]

    def bind(pairs: Any) -> Any:
        added = [kernel + a @ b for kernel, (a, b) in zip(leaves, pairs, strict=True)]
        return nnx.merge(graph, jax.tree.unflatten(tree, added), rest, copy=True)

    return pairs, bind


def _is_projection(path: tuple[Any, ...], value: Any) -> bool:
    return len(path) > 1 and path[-1] == "kernel" and str(path[-2]).endswith("_proj")


_FILTERS: dict[str, Any] = {
    "all": nnx.Param,
    "norms": lambda path, value: len(path) > 1 and str(path[-2]).endswith("norm"),
    "feed_forward": nnx.PathContains("feed_forward"),
}


def _check(tokens: Int[np.ndarray, "T"], model: LanguageModel, stretch: int) -> None:
    vocabulary = model.config.vocab_size
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        wrong = tokens.max() if tokens.max() >= vocabulary else tokens.min()
        raise InputError(
            f"token {wrong} is not in the model's vocabulary of {vocabulary:,}: is the tokenizer that of another model?"
        )
    needed = -(-(len(tokens) - 1) // stretch) * stretch
    room = model.config.cache_length
    if room is not None and needed > room:
        raise InputError(
            f"a document has {needed:,} tokens, the cache of attention has {room:,}: raise attention.max_length"
        )
