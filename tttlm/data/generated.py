"""Generated sequences with answers in them: the same generators make training batches and evaluation tasks."""

import hashlib
import sys
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from tttlm.data.batch import Batch
from tttlm.data.config import GeneratedConfig
from tttlm.errors import InputError


@dataclass(frozen=True)
class Instance:
    """One sequence with answers in it.

    Attributes:
        tokens: The sequence, including answers; the first token is not predicted.
        answers: (start, stop) of each answer: `tokens[start:stop]`.
    """

    tokens: Int[np.ndarray, "T"]
    answers: tuple[tuple[int, int], ...]


def mqar(num_pairs: int, vocab_size: int, rng: np.random.Generator, *, length: int = 0) -> Instance:
    """Multi-query associative recall (arXiv 2312.04927): pairs of a key and a value, then every key again, in turn.

    Args:
        num_pairs: Number of pairs; keys are from the first half of the vocabulary, values from the second.
        vocab_size: Number of tokens to draw from; token 0 is the first token and the filler.
        rng: Random generator of keys, values and order.
        length: Number of tokens of the sequence, filled between pairs and questions; 0 adds no filler.

    Raises:
        InputError: There are fewer keys, or the pairs do not fit in the length.
    """
    half = vocab_size // 2
    if num_pairs >= half:
        raise InputError(
            f"{num_pairs} pairs need more than {2 * num_pairs} tokens of vocabulary, there are {vocab_size}: "
            "lower the length"
        )
    keys = rng.choice(np.arange(1, half), num_pairs, replace=False)
    values = rng.integers(half, vocab_size, num_pairs)
    order = rng.permutation(num_pairs)
    pairs = np.stack([keys, values], axis=1)
    fill = length - 1 - 4 * num_pairs if length else 0
    if fill < 0:
        raise InputError(
            f"{num_pairs} pairs and their questions take {1 + 4 * num_pairs} tokens, got a length of {length}"
        )
    tokens = np.concatenate([[0], pairs.ravel(), np.zeros(fill, np.int64), pairs[order].ravel()])
    first = 1 + 2 * num_pairs + fill
    return Instance(tokens.astype(np.int64), tuple((first + 2 * n + 1, first + 2 * n + 2) for n in range(num_pairs)))


def copy(num_tokens: int, vocab_size: int, rng: np.random.Generator) -> Instance:
    """Token 0, random tokens, token 0, and the same tokens again, which are the answer.

    Args:
        num_tokens: Number of tokens to copy.
        vocab_size: Number of tokens to draw from.
        rng: Random generator of the tokens, which are distinct if there are enough.
    """
    if num_tokens < vocab_size:
        said = rng.choice(np.arange(1, vocab_size), num_tokens, replace=False)
    else:
        said = rng.integers(1, vocab_size, num_tokens)
    tokens = np.concatenate([[0], said, [0], said]).astype(np.int64)
    return Instance(tokens, ((num_tokens + 2, len(tokens)),))


def size_of(task: str, length: int, vocab_size: int) -> int:
    """The number of pairs of mqar, or of tokens of copy, in a sequence of at most `length` tokens: as many as fit."""
    if task == "mqar":
        return max(1, min((length - 1) // 4, vocab_size // 2 - 1))
    return max(2, (length - 2) // 2)


def generate(task: str, length: int, vocab_size: int, rng: np.random.Generator) -> Instance:
    """A sequence of a task with as many pairs or tokens as fit.

    Args:
        task: "mqar" or "copy".
        length: Largest number of tokens of the sequence.
        vocab_size: Number of tokens to draw from.
        rng: Random generator of the sequence.
    """
    make = mqar if task == "mqar" else copy
    return make(size_of(task, length, vocab_size), vocab_size, rng)


class GeneratedBatches:
    """Batches of generated sequences, padded at their ends; only the tokens of answers have weight in the loss.

    Every sequence is of a random task and length, and a function of the seed, the split, the step and its index.

    Args:
        config: The tasks and lengths.
        sequence_length: Tokens of an example, T.
        vocab_size: Number of tokens to draw from.
        seed: Seed of the sequences.
        split: "train" or "validation"; the sequences of validation do not depend on the seed.

    Attributes:
        steps_per_epoch: The largest number, because sequences do not repeat.

    Raises:
        InputError: An example is shorter than a sequence.
    """

    steps_per_epoch = sys.maxsize

    def __init__(
        self, config: GeneratedConfig, *, sequence_length: int, vocab_size: int, seed: int, split: str
    ) -> None:
        if (longest := max(config.lengths)) > sequence_length + 1:
            raise InputError(
                f"data.generated.lengths go up to {longest} tokens, which takes a sequence_length of {longest - 1}, "
                f"got {sequence_length}"
            )
        self._config, self._length, self._vocab_size = config, sequence_length, vocab_size
        self._seed = (1, seed) if split == "train" else (0,)
        self.fingerprint = hashlib.sha256(repr((config, sequence_length, vocab_size, split)).encode()).hexdigest()

    def batch(self, step: int, examples: range) -> Batch[np.ndarray]:
        """Makes the examples of these indices of the batch of a step."""
        shape = (len(examples), self._length)
        inputs, targets = (np.zeros(shape, np.int32) for _ in range(2))
        weights = np.zeros(shape, np.float32)
        for i, index in enumerate(examples):
            rng = np.random.default_rng((*self._seed, step, index))
            task = self._config.tasks[rng.integers(len(self._config.tasks))]
            length = self._config.lengths[rng.integers(len(self._config.lengths))]
            made = generate(task, length, self._vocab_size, rng)
            predicted = len(made.tokens) - 1
            inputs[i, :predicted], targets[i, :predicted] = made.tokens[:-1], made.tokens[1:]
            for start, stop in made.answers:
                weights[i, start - 1 : stop - 1] = 1.0
        return Batch(inputs, targets, None, weights)
