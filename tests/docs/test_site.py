"""The site: built without a warning, every page in its menu, nothing in it that asks the network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT

# What a browser would fetch, or run: not the links that a reader may follow.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|prefetch|modulepreload|icon))[^>]*\bhref=["']?(?:https?:)?//"""
    r"""|@import\s+["'](?:https?:)?//|url\(["']?(?:https?:)?//""",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


@pytest.mark.long
def test_it_is_built_without_a_warning_and_every_page_is_in_the_menu(built):
    site, log = built
    assert "WARNING" not in log
    assert "not included in the" not in log
    menu = (site / "index.html").read_text()
    pages = [page.relative_to(DOCS) for page in DOCS.rglob("*.md")]
    assert len(pages) > 30
    for page in pages:
        target = page.with_name("index.html" if page.name == "README.md" else f"{page.stem}.html")
        assert (site / target).is_file()
        assert f'href="{target}"' in menu or str(target) == "index.html", page


def test_nothing_is_fetched_from_the_network(built):
    site, _ = built
    files = [file for file in site.rglob("*") if file.suffix in (".html", ".css")]
    assert len(files) > 30
    for file in files:
        found = FETCHED.search(file.read_text())
        assert not found, (file, found)
    for foreign in ('<script src="https://cdn.example/x.js">', '<link href="//f.example/a.css" rel="stylesheet">'):
        assert FETCHED.search(foreign)


def test_formulas_need_no_script(built):
    page = (built[0] / "ttt-layer.html").read_text()
    assert page.count("<math ") > 10
    assert "\\(" not in page
    assert "\\[" not in page
    assert not (built[0] / "scripts").exists()


def test_the_reference_has_the_public_names_with_their_parameters(built):
    import tttlm

    page = (built[0] / "reference" / "tttlm.html").read_text()
    for name in tttlm.__all__:
        assert re.search(rf'id="tttlm\.{name}"', page), name
    assert "mini_batch_size" in (built[0] / "reference" / "layers.html").read_text()
