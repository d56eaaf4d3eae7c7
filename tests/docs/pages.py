"""The pages of the documentation, and what stands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Reports are written by commands, and name the command that wrote them.
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
    if path.name != "report.md"
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    return [block for language, block in FENCE.findall(text) if language in languages]


def commands(text: str) -> str:
    """All text that may hold commands, with continued lines joined: blocks of no other language, and code in a line."""
    others = re.sub(r"^```(python|yaml)\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [code for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", others)) if code.startswith("python ")]
    fenced = blocks(others, "", "console", "bash")
    indented = re.findall(r"^    (.+)$", FENCE.sub("", others), re.MULTILINE)
    return "\n".join([*fenced, *indented, *inline]).replace("\\\n", " ")
