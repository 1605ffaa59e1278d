"""Whether a second language reaches what a page shows.

The language is made of the sources: each word of a text of ours stands in marks, and what is filled in does not. So
letters without marks are either data, which the test names, or were written past the translator.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page

from tests.lanes import TOP

LOCALE = "de_DE"
PLURALS = "nplurals=2; plural=(n != 1);"
SOURCES = TOP / "labextension" / "src"
TEXT = r"""\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)"|`((?:[^`\\$]|\\.)*)`)"""
ONE = re.compile(rf"trans\s*\.\s*__\({TEXT}")
MANY = re.compile(rf"trans\s*\.\s*_n\({TEXT},{TEXT}")
CALL = re.compile(r"trans\s*\.\s*_(?:_|n)\(")
MARKED = re.compile(r"⟦[^⟦⟧]*⟧")
WORD = re.compile(r"[^\W\d_]{2,}")

UNITS = frozenset(("KiB", "MiB", "GiB", "TiB", "ms", "min"))

SHOWN = """roots => {
  const found = [];
  for (const root of roots.flatMap(one => [...document.querySelectorAll(one)])) {
    for (const element of [root, ...root.querySelectorAll('*')]) {
      if (element.closest('svg, [aria-hidden=true]') !== null) continue;
      const { fontFamily } = getComputedStyle(element);
      for (const name of ['aria-label', 'title', 'placeholder', 'alt']) {
        found.push(element.getAttribute(name) ?? '');
      }
      if (!/mono|courier/i.test(fontFamily.split(',')[0]) && element.tagName !== 'CODE') {
        found.push(...[...element.childNodes].filter(one => one.nodeType === Node.TEXT_NODE).map(one => one.data));
      }
    }
  }
  return found;
}"""
"""What code is set in stays as it is."""


def install(folder: Path) -> dict[str, str]:
    """Make a language pack, as JupyterLab's are; the environment in which a server finds it."""
    package = folder / "warmcell_test_language"
    data = package / "locale" / LOCALE / "LC_MESSAGES"
    data.mkdir(parents=True)
    (package / "__init__.py").touch()
    about = folder / "warmcell_test_language-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: warmcell-test-language\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[jupyterlab.languagepack]\n{LOCALE} = warmcell_test_language\n")
    head = {"domain": "warmcell", "language": LOCALE.replace("_", "-"), "plural_forms": PLURALS, "version": "1"}
    (data / "warmcell.json").write_text(json.dumps({"": head, **dict(messages())}))
    return {"PYTHONPATH": str(folder)}


def messages() -> Iterator[tuple[str, list[str]]]:
    """Each text of the page, and how it is said in that language."""
    for path in sorted(SOURCES.rglob("*.ts*")):
        text = path.read_text()
        found = [*ONE.finditer(text), *MANY.finditer(text)]
        assert len(found) == len(CALL.findall(text)), (
            f"{path} has a text that is no literal, so nobody can translate it"
        )
        for one in found:
            said = [re.sub(r"\\(.)", r"\1", group) for group in one.groups() if group is not None]
            yield said[0], [marked(each) for each in said]


def marked(text: str) -> str:
    """A text with all but its places for data in marks."""
    return "".join(part if re.fullmatch(r"%\d", part) else f"⟦{part}⟧" for part in re.split(r"(%\d)", text) if part)


def assert_translated(page: Page, *selectors: str, data: str = "") -> None:
    """All words in what these selectors match are of that language; `data` is a pattern of what is not the page's."""
    for selector in selectors:
        shown = [one for one in page.evaluate(SHOWN, [selector]) if one.strip()]
        assert any("⟦" in one for one in shown), f"{selector} says nothing in that language: {shown}"
        left = [(one, re.sub(data, " ", MARKED.sub(" ", one)) if data else MARKED.sub(" ", one)) for one in shown]
        past = [one for one, rest in left if set(WORD.findall(rest)) - UNITS]
        assert not past, f"{selector} has words that went past the translator: {past}"
