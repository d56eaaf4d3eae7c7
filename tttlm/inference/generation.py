"""Text generation: prompts are read as a batch, each is continued by any number of samples, text is streamed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from tttlm.errors import InputError
from tttlm.inference.decoding import MOST_ENDS, decode
from tttlm.inference.reading import Reading, begin, check_room, check_tokens, read
from tttlm.inference.sampling import Sampling
from tttlm.inference.text import TextStream, TextTokenizer
from tttlm.model import LanguageModel
from tttlm.records import shown

Prompt = str | Sequence[int] | np.ndarray | jax.Array
Reason = Literal["length", "end", "stop"]


@dataclass(frozen=True)
class Generation:
    """A generated sample.

    Attributes:
        prompt: The index of the prompt.
        sample: The index of the sample of that prompt.
        text: The text, without the end token or the stop string; "" without a tokenizer.
        tokens: The sampled tokens, including an EOS.
        log_probs: Log p of each token under the model, in nats: without temperature, penalty or filters.
        finish_reason: Why it ended: "length" (`max_tokens`), "end" (an end token) or "stop" (a stop string).
    """

    prompt: int
    sample: int
    text: str
    tokens: list[int]
    log_probs: list[float]
    finish_reason: Reason


@dataclass(frozen=True)
class Piece:
    """A piece of streamed text.

    Attributes:
        prompt: The index of the prompt.
        sample: The index of the sample of that prompt.
        text: The next characters; may be empty.
        finished: The complete sample, with its last piece.
    """

    prompt: int
    sample: int
    text: str
    finished: Generation | None = None


def generate(
    model: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    tokenizer: TextTokenizer | None = None,
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    end_ids: Sequence[int] | None = None,
    reading: Reading | None = None,
    chunk: int = 512,
) -> list[Generation]:
    """Generates text after prompts; each prompt gives the result that it gives alone.

    >>> generate(model, "Call me", tokenizer, temperature=0.0)[0].text

    Args:
        model: The model, bound to its parameters.
        prompts: Text, or token ids, of one or several prompts. Text is read after the tokenizer's `entry_id` (its BOS
            or EOS), or directly after `reading`.
        tokenizer: The tokenizer of the model; None takes and returns only token ids.
        max_tokens: The largest number of tokens of a sample.
        temperature: See `Sampling`, also for the settings up to `seed`.
        top_k: Number of most likely tokens to sample from; 0 takes all.
        top_p: Sample from the fewest most likely tokens with this total probability.
        min_p: Sample from tokens with at least this fraction of the probability of the most likely one.
        repetition_penalty: A value above 1 makes tokens that occurred before less likely.
        seed: Seed of the sampling.
        num_samples: Number of samples of each prompt.
        stop: Strings that end a sample, or one such string.
        end_ids: Tokens that end a sample; None is the tokenizer's EOS, and () is none.
        reading: The state before the prompts: of one sequence, or of as many as there are prompts.
        chunk: Number of tokens of a prompt that are read at a time.

    Returns:
        The samples of the first prompt, then those of the second, and so on.

    Raises:
        InputError: A prompt is empty and nothing was read before, a token is unknown, or an attention cache is too
            short.
    """
    pieces = stream(
        model,
        prompts,
        tokenizer,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        num_samples=num_samples,
        stop=stop,
        end_ids=end_ids,
        reading=reading,
        chunk=chunk,
    )
    finished = [piece.finished for piece in pieces if piece.finished is not None]
    return sorted(finished, key=lambda one: (one.prompt, one.sample))


def stream(
    model: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    tokenizer: TextTokenizer | None = None,
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    end_ids: Sequence[int] | None = None,
    reading: Reading | None = None,
    chunk: int = 512,
) -> Iterator[Piece]:
    """The same as `generate`, as a stream of pieces; invalid arguments are refused before anything is computed.

    Arguments and errors are as for `generate`.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    for name, count in (("max_tokens", max_tokens), ("num_samples", num_samples), ("chunk", chunk)):
        if not isinstance(count, int | np.integer) or count < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {shown(count)}")
    ids = prompt_ids(model, prompts, tokenizer, continues=reading is not None)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(string, str) and string for string in stop):
        raise InputError(f"stop strings must be text that is not empty, got {shown(stop)}")
    if stop and tokenizer is None:
        raise InputError("stop strings are compared with text, which needs a tokenizer: give one, or use end_ids")
    if end_ids is None:
        end_ids = () if tokenizer is None or tokenizer.eos_id is None else (tokenizer.eos_id,)
    if unknown := [one for one in end_ids if not 0 <= one < model.config.vocab_size]:
        raise InputError(f"end_ids has {shown(unknown[0])}, which is no token of {model.config.vocab_size:,}")
    if len(end_ids) > MOST_ENDS:
        raise InputError(f"at most {MOST_ENDS} tokens can end a sample, got {len(end_ids)}")
    if reading is not None and len(reading) not in (1, len(ids)):
        raise InputError(f"{len(ids)} prompts need a reading of 1 or {len(ids)} sequences, got {len(reading)}")
    before = np.zeros(len(ids), np.int64) if reading is None else reading.num_tokens
    check_room(model, before + np.asarray([len(part) for part in ids]) + max_tokens)
    vocab_size = model.config.vocab_size if tokenizer is None else min(tokenizer.vocab_size, model.config.vocab_size)

    def pieces() -> Iterator[Piece]:
        start = begin(model, len(ids)) if reading is None else reading
        if len(start) < len(ids):
            start = start.take([0] * len(ids))
        forked = read(model, start, ids, chunk=chunk).take(np.repeat(np.arange(len(ids)), num_samples).tolist())
        samples = [_Sample(row // num_samples, row % num_samples, ids, tokenizer, stop) for row in range(len(forked))]
        stopped = np.zeros(len(samples), bool)
        drawn_tokens = decode(
            model,
            forked,
            sampling,
            max_tokens=max_tokens,
            ends=end_ids,
            samples=[one.sample for one in samples],
            vocab_size=vocab_size,
            stopped=stopped,
        )
        for drawn in drawn_tokens:
            for row, one in enumerate(samples):
                if drawn.active[row] and not stopped[row]:
                    check_finite(drawn.log_probs[row])
                    piece = one.push(int(drawn.tokens[row]), float(drawn.log_probs[row]), end_ids, max_tokens)
                    stopped[row] = piece.finished is not None
                    if piece.text or piece.finished:
                        yield piece

    return pieces()


def check_finite(outputs: np.ndarray | jax.Array) -> None:
    """Refuses a model whose outputs are not numbers.

    Raises:
        InputError: One is NaN.
    """
    if np.isnan(outputs).any():
        raise InputError("the model's outputs are not numbers: use an earlier checkpoint")


def prompt_ids(
    model: LanguageModel, prompts: Prompt | Sequence[Prompt], tokenizer: TextTokenizer | None, *, continues: bool
) -> list[np.ndarray]:
    """Token ids of each prompt; those of text begin with the tokenizer's `entry_id` unless it `continues`.

    Raises:
        InputError: There is no prompt, or a prompt is empty, is not UTF-8 or has unknown tokens.
    """
    if isinstance(prompts, jax.Array):
        prompts = np.asarray(prompts)
    if not isinstance(prompts, str | Sequence | np.ndarray):
        raise InputError(f"prompts must be text or token ids, or a list of them, got {shown(prompts)}")
    first = prompts[0] if len(prompts) else ""
    one = isinstance(prompts, str) or not (isinstance(first, str) or np.ndim(first))
    several: Sequence[Prompt] = [prompts] if one else list(prompts)  # type: ignore[list-item,arg-type]
    if not several:
        raise InputError("there is no prompt: give at least one")
    found = []
    for number, prompt in enumerate(several, start=1):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise InputError("prompts of text need a tokenizer; without one give token ids")
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise InputError(f"prompt {number} is not UTF-8 text: {shown(prompt)}") from None
            entry = [] if continues or tokenizer.entry_id is None else [tokenizer.entry_id]
            prompt = [*entry, *tokenizer.encode(prompt)]
        tokens = np.asarray(prompt)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise InputError(f"prompt {number} must be text or a list of token ids, got {shown(prompt)}")
        if not tokens.size and not continues:
            raise InputError(f"prompt {number} is empty, and nothing enters a document here: give some text")
        found.append(tokens.astype(np.int64))
    check_tokens(model, found)
    return found


class _Sample:
    """A sample in progress."""

    def __init__(
        self,
        prompt: int,
        sample: int,
        ids: Sequence[np.ndarray],
        tokenizer: TextTokenizer | None,
        stop: Sequence[str],
    ) -> None:
        self.prompt, self.sample = prompt, sample
        self._text = None if tokenizer is None else TextStream(tokenizer, ids[prompt].tolist(), stop)
        self._parts: list[str] = []
        self._tokens: list[int] = []
        self._log_probs: list[float] = []

    def push(self, token: int, log_prob: float, ends: Sequence[int], max_tokens: int) -> Piece:
        self._tokens.append(token)
        self._log_probs.append(log_prob)
        text, reason = "", None
        if token in ends:
            reason = "end"
        elif self._text is not None:
            text = self._text.push(token)
        if reason is None and len(self._tokens) == max_tokens:
            reason = "length"
        if reason is not None and self._text is not None:
            text += self._text.finish()
        if self._text is not None and self._text.stopped:
            reason = "stop"
        self._parts.append(text)
        if reason is None:
            return Piece(self.prompt, self.sample, text)
        found = "".join(self._parts), self._tokens, self._log_probs
        return Piece(self.prompt, self.sample, text, Generation(self.prompt, self.sample, *found, reason))  # type: ignore[arg-type]
