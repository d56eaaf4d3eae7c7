"""Cuts a long text into pieces whose concatenated tokens are the tokens of the text.

A tokenizer merges neighbours. Where none of its pieces has a given character followed by white space, no merge can join
the two, and both sides can be encoded independently (`CutRule`; `cut_rules` derives the rule of a tokenizer). Other
differences at the start of a piece (a prefix space, a first-word rule) are avoided by putting one letter in front and
removing its tokens afterwards; see `Tokenizer`.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

PIECE_CHARACTERS = 2_048  # short pieces stay in the processor's cache: 2-3 times as fast as a book in one piece
BLOCK_BYTES = 1 << 19  # the block that a worker gets at a time
FORCED_BYTES = 1 << 24  # a segment this long without an allowed cut is cut nevertheless, and counted

_GUARDS = "aoekz0"
_SPACES = frozenset(" \n▁")


@dataclass(frozen=True)
class CutRule:
    """Where a cut is allowed: in front of a space or newline, unless some piece of the vocabulary joins it to the
    character before it.

    Attributes:
        before: the white space in front of which cuts are allowed; "" if a text must not be cut.
        joined: characters that some piece has in front of white space.
        only_words: whether cuts are allowed only after letters and digits, where the pre-tokenizer ends a word.
        byte_letters: the letters by which the vocabulary spells the bytes 0 to 255; "" if it is made of characters.
    """

    before: str = " \n"
    joined: frozenset[str] = frozenset()
    only_words: bool = False
    byte_letters: str = ""

    @cached_property
    def guard(self) -> str:
        """A letter that may be put in front of a piece; "" if there is none."""
        return next((letter for letter in _GUARDS if self.allows(letter)), "")

    def allows(self, last: str) -> bool:
        """Whether a cut is allowed between the character `last` and the white space of `before`."""
        if not self.before or last in _SPACES:
            return False
        if self.only_words:
            return is_old_letter(last)
        if self.byte_letters:
            last = self.byte_letters[last.encode("utf-8", "replace")[-1]]
        return last not in self.joined

    @cached_property
    def _space(self) -> re.Pattern[str]:
        return re.compile(f"[{re.escape(self.before)}]")

    def pieces(self, text: str) -> Iterator[str]:
        """Cuts text into pieces of about `PIECE_CHARACTERS`; they are longer where no cut is allowed."""
        start = 0
        while self.before and len(text) - start > PIECE_CHARACTERS:
            cut = self._after(text, start + PIECE_CHARACTERS)
            if cut == len(text):
                break
            yield text[start:cut]
            start = cut
        yield text[start:] if start else text

    def _after(self, text: str, position: int) -> int:
        for space in self._space.finditer(text, position):
            if self.allows(text[space.start() - 1]):
                return space.start()
        return len(text)

    def last_cut(self, data: bytes | bytearray, least: int = 1) -> int:
        """The last offset in UTF-8 `data`, from `least` on, where it may be cut; 0 if there is none."""
        space, newline = (data.rfind(c.encode(), least) if c in self.before else -1 for c in " \n")
        while (end := max(space, newline)) > 0:
            before = bytes(data[max(0, end - 4) : end]).decode("utf-8", "ignore")[-1:]
            # No cut after invalid UTF-8: it may decode differently when joined.
            if before and data.endswith(before.encode(), 0, end) and self.allows(before):
                return end
            if space > newline:
                space = data.rfind(b" ", least, space)
            else:
                newline = data.rfind(b"\n", least, newline)
        return 0

    def blocks(self, chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
        """Regroups a document's bytes into blocks that can be encoded independently, in bounded memory.

        Yields: (block, forced); `forced` if `FORCED_BYTES` had no allowed cut.
        """
        buffer = bytearray()
        tried = 1  # no cut is allowed before this offset
        for chunk in chunks:
            buffer += chunk
            while len(buffer) > BLOCK_BYTES:
                cut, forced = self.last_cut(buffer[: BLOCK_BYTES + 1], tried), False
                if not cut:
                    cut = self.last_cut(buffer[:FORCED_BYTES], tried)
                    if not cut:
                        tried = min(len(buffer), FORCED_BYTES)
                        if len(buffer) < FORCED_BYTES + 4:
                            break
                        cut, forced = FORCED_BYTES, True
                        while buffer[cut] & 0xC0 == 0x80 and cut > FORCED_BYTES - 4:
                            cut -= 1  # not inside a character
                yield bytes(buffer[:cut]), forced
                del buffer[:cut]
                tried = 1
        if buffer:
            yield bytes(buffer), False


NEVER = CutRule(before="")


def is_old_letter(character: str) -> bool:
    """Whether a character is a letter or digit since Unicode 3.2 or earlier, so that all Unicode versions agree."""
    return character.isalnum() and unicodedata.ucd_3_2_0.category(character)[0] in "LN"
