"""Ideas before code: in a shown cell, docstrings, imports and `__init__` take one line until a reader asks for more.

Works on the highlighted HTML of a page, whose text is the cell's, line for line, and whose lines close their spans
(Pygments sees to it), so lines can be wrapped. All of the code stays in the page: it is copied, printed, and shown
where there is no JavaScript.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile

# A cell behind a summary is folded already: one click shows it all.
CELL = re.compile(
    r'(?P<summary></summary>\s*)?(?P<head><div class="cell_input[^>]*>\s*<div class="highlight-[^>]*>'
    r'<div class="highlight"><pre>(?:<span></span>)?)(?P<code>.*?)(?P<tail></pre>)',
    re.DOTALL,
)
LONGEST = 60  # characters of the line that stands for an import block


@dataclass(frozen=True, order=True)
class Fold:
    """Lines `first` to `last` of a cell, from 0, hidden behind a button with the text `shown`, which means `what`.

    A block of its own has the button in place of its first line, else the button stands behind the line before it.
    """

    first: int
    last: int
    what: str
    shown: str
    own: bool = False


def folded(page: str) -> str:
    """A page's HTML, with its code cells folded."""
    ids = (f"gd-fold-{n}" for n in count(1))

    def replace(match: re.Match[str]) -> str:
        if match["summary"]:
            return match[0]
        lines = match["code"].split("\n")
        for fold in folds(html.unescape(re.sub(r"<[^>]+>", "", match["code"]))):
            lines = wrapped(lines, fold, next(ids))
        return match["head"] + "\n".join(line for line in lines if line is not None) + match["tail"]

    return CELL.sub(replace, page)


def wrapped(lines: list[str | None], fold: Fold, name: str) -> list[str | None]:
    """The lines with those of a fold as one; the others keep their places, so that several folds can follow."""
    inside = lines[fold.first : fold.last + 1]
    hidden = fold.last + 1 - fold.first
    button = (
        f'<button type="button" class="gd-toggle" aria-expanded="false" aria-controls="{name}" '
        f'aria-label="{fold.what}, {hidden} lines" data-shown="{html.escape(fold.shown)}"></button>'
    )
    rest = "\n".join(inside)
    nothing = [None] * len(inside)
    if fold.own:  # a block, which ends with its line break
        after = lines[fold.last + 1] if fold.last + 1 < len(lines) else ""
        block = f'<span class="gd-fold gd-own">{button}<span class="gd-rest" id="{name}">{rest}\n</span></span>{after}'
        return [*lines[: fold.first], *nothing, block, *lines[fold.last + 2 :]]
    tail = f'<span class="gd-fold">{button}<span class="gd-rest" id="{name}">\n{rest}</span></span>'
    line = f"{lines[fold.first - 1]}{tail}"
    return [*lines[: fold.first - 1], line, *nothing, *lines[fold.last + 1 :]]


def folds(code: str) -> list[Fold]:
    """What of a cell to fold: ranges of lines that do not overlap, in order; nothing where the code does not parse."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []
    rows = code.split("\n")
    found = sorted([*imports(tree, rows), *definitions(tree)])
    return [fold for n, fold in enumerate(found) if not any(other.last >= fold.first for other in found[:n])]


def imports(tree: ast.Module, rows: list[str]) -> Iterator[Fold]:
    """The leading import block, where it has three lines or more, with all but one of the empty lines after it."""
    leading = list(takewhile(lambda node: isinstance(node, ast.Import | ast.ImportFrom), tree.body))
    if not leading or leading[-1].end_lineno - leading[0].lineno < 2:
        return
    modules = [name for node in leading for name in ([node.module or "."] if isinstance(node, ast.ImportFrom)
                                                     else [alias.name for alias in node.names])]
    text = f"import {', '.join(dict.fromkeys(modules))}"
    text = text if len(text) <= LONGEST else text[:LONGEST].rpartition(",")[0] + ", …"
    end = leading[-1].end_lineno
    while not any(rows[end : end + 2]) and end + 2 < len(rows):
        end += 1
    yield Fold(leading[0].lineno - 1, end - 1, "Imports", text, own=True)


def definitions(tree: ast.Module) -> Iterator[Fold]:
    """The tail of each docstring, and all but the first line of each `__init__`, where it is two lines or more."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        what, start, end = "", 0, 0
        if node.name == "__init__":
            what, start, end = "The rest of __init__", node.lineno, node.end_lineno
        elif ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            empty = ast.get_docstring(node, clean=False).startswith(("\n", "\\\n"))
            what, start, end = f"The docstring of {node.name}", text.lineno + empty, text.end_lineno
        if end - start >= 2:
            yield Fold(start, end - 1, what, "⋯")
