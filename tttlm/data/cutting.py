"""Where a long text may be cut so that the pieces, encoded one by one, give the tokens of the whole.

A tokenizer merges neighbours. Where none of its pieces holds a given character followed by white space, no merge
can reach across that place, and the two sides are encoded independently (`CutRule`). What else would differ at the
beginning of a piece (a prefix space, a first-word rule) is avoided by putting one letter in front and taking its
tokens off again; see `Tokenizer`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

PIECE_CHARACTERS = 2_048  # short pieces stay in the processor's cache: 2-3 times the speed of a whole book at once
BLOCK_BYTES = 1 << 19  # what one worker is handed at a time
FORCED_BYTES = 1 << 20  # a stretch this long without any place to cut is cut all the same, and counted

_SPACE = re.compile(r"[ \n]")
_SPACES = frozenset(" \n▁ĠĊ")  # also as vocabularies write them


@dataclass(frozen=True)
class CutRule:
    """A cut is allowed between a character and a space or newline, unless some piece of the vocabulary joins them.

    Attributes:
        joined: characters that some piece has in front of white space.
        only_words: allow cuts only after letters and digits, where every usual pre-tokenizer ends a word.
    """

    joined: frozenset[str]
    only_words: bool

    @classmethod
    def of_vocabulary(cls, pieces: Iterable[str], *, only_words: bool) -> "CutRule":
        joined = {a for piece in pieces for a, b in pairwise(piece) if b in _SPACES and a not in _SPACES}
        return cls(frozenset(joined), only_words)

    def allows(self, before: str) -> bool:
        """Whether a cut may stand between `before` and a space or newline."""
        if before in _SPACES or before in self.joined:
            return False
        return before.isalnum() if self.only_words else True

    def pieces(self, text: str) -> Iterator[str]:
        """Cuts text into pieces of about `PIECE_CHARACTERS`; without a place to cut they are longer."""
        start = 0
        while len(text) - start > PIECE_CHARACTERS:
            cut = self._after(text, start + PIECE_CHARACTERS)
            if cut == len(text):
                break
            yield text[start:cut]
            start = cut
        yield text[start:] if start else text

    def _after(self, text: str, position: int) -> int:
        for space in _SPACE.finditer(text, position):
            if self.allows(text[space.start() - 1]):
                return space.start()
        return len(text)

    def last_cut(self, data: bytes | bytearray) -> int:
        """The last place in UTF-8 `data` where it may be cut, 0 where there is none."""
        space, newline = data.rfind(b" ", 1), data.rfind(b"\n", 1)
        while (end := max(space, newline)) > 0:
            before = bytes(data[max(0, end - 4) : end]).decode("utf-8", "ignore")[-1:]
            # What is no valid UTF-8 just before the space is no place to cut: it may decode otherwise when joined.
            if before and data.endswith(before.encode(), 0, end) and self.allows(before):
                return end
            if space > newline:
                space = data.rfind(b" ", 1, space)
            else:
                newline = data.rfind(b"\n", 1, newline)
        return 0

    def blocks(self, chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
        """Regroups a document's bytes into blocks that may be encoded by themselves, in bounded memory.

        Yields: (block, forced); `forced` where no place to cut was found in `FORCED_BYTES`.
        """
        buffer = bytearray()
        for chunk in chunks:
            buffer += chunk
            while len(buffer) > BLOCK_BYTES:
                cut, forced = self.last_cut(buffer[: BLOCK_BYTES + 1]), False
                if not cut:
                    cut = self.last_cut(buffer[:FORCED_BYTES])
                    if not cut:
                        if len(buffer) < FORCED_BYTES + 4:
                            break
                        cut, forced = FORCED_BYTES, True
                        while buffer[cut] & 0xC0 == 0x80 and cut > FORCED_BYTES - 4:
                            cut -= 1  # not inside a character
                yield bytes(buffer[:cut]), forced
                del buffer[:cut]
        if buffer:
            yield bytes(buffer), False
