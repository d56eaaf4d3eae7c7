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

from tttlm.errors import InputError

PIECE_CHARACTERS = 2_048  # short pieces stay in the processor's cache: 2-3 times as fast as a book in one piece
BLOCK_BYTES = 1 << 19  # the block that a worker gets at a time
WHOLE_BYTES = 1 << 27  # a segment without an allowed cut is encoded as a whole, which takes some 30 times its bytes

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
        anywhere: whether a cut is allowed between any two characters, because every byte is a token.
    """

    before: str = " \n"
    joined: frozenset[str] = frozenset()
    only_words: bool = False
    byte_letters: str = ""
    anywhere: bool = False

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
        if self.anywhere:
            return next((end for end in range(len(data) - 1, least - 1, -1) if _character_before(data, end)), 0)
        space, newline = (data.rfind(c.encode(), least) if c in self.before else -1 for c in " \n")
        while (end := max(space, newline)) > 0:
            before = _character_before(data, end)
            if before and self.allows(before):
                return end
            if space > newline:
                space = data.rfind(b" ", least, space)
            else:
                newline = data.rfind(b"\n", least, newline)
        return 0

    def blocks(self, chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
        """Regroups the bytes of the document `name` into blocks that can be encoded independently.

        Raises:
            InputError: more than `WHOLE_BYTES` had no allowed cut.
        """
        buffer = bytearray()
        tried = 1  # no cut is allowed before this offset
        for chunk in chunks:
            buffer += chunk
            while len(buffer) > BLOCK_BYTES:
                cut = self.last_cut(buffer[: BLOCK_BYTES + 1], tried) or self.last_cut(buffer, tried)
                if not cut:
                    if len(buffer) > WHOLE_BYTES:
                        raise InputError(
                            f"{name} has more than {WHOLE_BYTES >> 20} MiB in a row where its tokenizer has no cut, "
                            "too much to encode as a whole; split the file, or use another tokenizer (docs/data.md)"
                        )
                    tried = len(buffer)
                    break
                yield bytes(buffer[:cut])
                del buffer[:cut]
                tried = 1
        if buffer:
            yield bytes(buffer)


NEVER = CutRule(before="")
ANYWHERE = CutRule(anywhere=True)


def _character_before(data: bytes | bytearray, end: int) -> str:
    """The character that ends at a byte offset; "" if none does: invalid UTF-8 may decode differently when joined."""
    before = bytes(data[max(0, end - 4) : end]).decode("utf-8", "ignore")[-1:]
    return before if data.endswith(before.encode(), 0, end) else ""


def is_old_letter(character: str) -> bool:
    """Whether a character is a letter or digit since Unicode 3.2 or earlier, so that all Unicode versions agree."""
    return character.isalnum() and unicodedata.ucd_3_2_0.category(character)[0] in "LN"
