"""A hook of MkDocs: formulas become MathML when the site is built, so that no page needs a script for them."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of `$...$` and `$$...$$`.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*(?:\\\((.*?)\\\)|\\\[(.*?)\\\])\s*</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    inline, block = found.group(2), found.group(3)
    formula = html.unescape(inline if block is None else block).strip()
    return convert(formula, display="inline" if block is None else "block")
