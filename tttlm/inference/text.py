"""Incremental decoding of tokens to text: complete characters only, without the beginning of a stop string."""

from collections.abc import Sequence
from typing import Protocol

WINDOW = 64  # number of tokens that are decoded together
KEPT = 16
REPLACEMENT = "\ufffd"  # decoders write it for an incomplete character


class TextTokenizer(Protocol):
    """The interface of a tokenizer for generation; those of `tttlm.data` have it.

    Attributes:
        vocab_size: Upper bound (exclusive) of the ids.
        eos_id: The token at the end of a document; None if there is none.
        entry_id: The token in front of a document; None if there is none.
        fingerprint: Changes with anything that changes tokens.
    """

    vocab_size: int
    eos_id: int | None
    entry_id: int | None

    @property
    def fingerprint(self) -> str:
        """Identifies the tokenizer."""
        ...

    def encode(self, text: str) -> list[int]:
        """Encodes a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes tokens."""
        ...


class TextStream:
    """Decodes a stream of tokens to text.

    Args:
        tokenizer: The tokenizer of the tokens.
        before: Tokens before the first one, which affect spaces; they are not part of the text.
        stop: Strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: TextTokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(before)[-KEPT:]
        self._decoded = len(self._tokenizer.decode(self._ids))
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is final now, which may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        certain = len(text)
        while certain > max(self._decoded, len(text) - 3) and text[certain - 1] == REPLACEMENT:
            certain -= 1
        new, self._decoded = text[self._decoded : certain], max(certain, self._decoded)
        if len(self._ids) > WINDOW and certain == len(text):
            self._ids = self._ids[-KEPT:]
            self._decoded = len(self._tokenizer.decode(self._ids))
        return self._checked(new)

    def finish(self) -> str:
        """Returns the remaining text after the last token."""
        rest = self._checked(self._tokenizer.decode(self._ids)[self._decoded :])
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _checked(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max(
            (n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
