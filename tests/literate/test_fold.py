"""A shown cell keeps all its text, and hides docstrings, imports and `__init__` behind buttons."""

import html
import re

from bs4 import BeautifulSoup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from literate.fold import folded, folds

CODE = '''\
import math
from typing import (
    Any,
)

import torch


class Ball(Base):
    """A ball that rolls.

    It has a memory: ``a < b & c``.
    """

    slots = 1

    def __init__(
        self,
        lr: float,
    ) -> None:
        """Folded with the rest.

        Once, not twice.
        """

        def later():
            """Folded with it.

            Once, not twice.
            """

        self.lr = lr

    @staticmethod
    def rule(p, g):
        """One line."""
        p.add_(g)

    def clock(self):
        """Two lines,
        which stay."""
        return math.inf


def last():
    """
    Starts below.

    Ends here.
    """
'''


def page(code: str, before: str = "") -> str:
    """A cell as myst-nb writes it."""
    inside = highlight(code, PythonLexer(), HtmlFormatter())
    cell = '<div class="cell_input docutils container">\n<div class="highlight-python notranslate">'
    return f"{before}{cell}{inside}</div>\n</div>"


def text(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)[1]))


def visible(page: str) -> list[str]:
    """What a reader sees before a click; ⟦…⟧ is a button."""
    soup = BeautifulSoup(page, "html.parser")
    for button in soup.select(".gd-toggle"):
        assert button["aria-expanded"] == "false" and button.parent.select_one(f"#{button['aria-controls']}.gd-rest")
        button.replace_with(f"⟦{button['data-shown']}⟧" + ("\n" if "gd-own" in button.parent["class"] else ""))
    for rest in soup.select(".gd-rest"):
        rest.decompose()
    return soup.select_one("pre").get_text().rstrip("\n").split("\n")


def test_docstring_imports_and_init_take_one_line_each() -> None:
    assert visible(folded(page(CODE))) == [
        "⟦import math, typing, torch⟧",
        "",
        "class Ball(Base):",
        '    """A ball that rolls.⟦⋯⟧',
        "",
        "    slots = 1",
        "",
        "    def __init__(⟦⋯⟧",
        "",
        "    @staticmethod",
        "    def rule(p, g):",
        '        """One line."""',
        "        p.add_(g)",
        "",
        "    def clock(self):",
        '        """Two lines,',
        '        which stay."""',
        "        return math.inf",
        "",
        "",
        "def last():",
        '    """',
        "    Starts below.⟦⋯⟧",
    ]


def test_no_character_of_the_code_is_lost() -> None:
    assert text(folded(page(CODE))) == text(page(CODE)) == CODE
    bare = "import a\nimport b\nimport c"
    assert text(folded(page(bare))) == bare + "\n"
    assert visible(folded(page(bare))) == ["⟦import a, b, c⟧"]


def test_the_html_stays_well_formed() -> None:
    tags = [m for m in re.findall(r"<(/?)(\w+)", folded(page(CODE)))]
    stack: list[str] = []
    for closing, name in tags:
        if closing:
            assert stack.pop() == name
        else:
            stack.append(name)
    assert not stack
    ids = re.findall(r'id="([^"]+)"', folded(page(CODE) + page(CODE)))
    assert len(ids) == len(set(ids)) == 8


def test_short_imports_and_those_that_do_not_lead_stay() -> None:
    assert not folds("import a\nimport b\n\nx = 1\n")
    assert not folds("x = 1\nimport a\nimport b\nimport c\n")
    assert [(f.first, f.last) for f in folds("import a\nimport b\nimport c\n\n\n\nx = 1\n")] == [(0, 4)]


def test_a_long_import_block_is_named_in_short() -> None:
    names = [f"module_{n}" for n in range(9)]
    (fold,) = folds("\n".join(f"import {name}" for name in names))
    assert fold.shown == "import module_0, module_1, module_2, module_3, module_4, …"


def test_a_cell_behind_a_summary_and_one_that_is_no_python_stay_as_they_are() -> None:
    hidden = page(CODE, before="<summary>Show</summary>\n")
    assert folded(hidden) == hidden
    broken = page("import a\nimport b\nimport c\nx = = 1\n")
    assert folded(broken) == broken
