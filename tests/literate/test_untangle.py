"""Untangle and locate: the way back, and its conflicts."""

from __future__ import annotations

import ast
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHAPTER = "chapters/01_first.md"
MODULE = "guided_descent/maths.py"


def test_nothing_to_do(book):
    before = book.files()
    assert book.run("untangle") == 0
    assert book.out == "nothing to carry back\n"
    assert book.files() == before


def test_edits_go_back(book):
    before = book.read(CHAPTER)
    book.edit(MODULE, "return 2 * x", "y = x + x\n    return y")
    book.edit(MODULE, "LIMIT = 10", "# the edge\nLIMIT = 11\n\nEDGE = LIMIT")
    book.edit("guided_descent/other.py", "double(x) + x", "x + double(x)")
    assert book.run("untangle") == 0
    assert book.out.count("->") == 3
    assert f"{MODULE}:13 -> {CHAPTER}:24" in book.out
    assert book.read(CHAPTER) == (
        before.replace("return 2 * x", "y = x + x\n    return y")
        .replace("LIMIT = 10", "# the edge\nLIMIT = 11\n\nEDGE = LIMIT")
        .replace("double(x) + x", "x + double(x)")
    )
    assert "EDGE" in book.read("guided_descent/__init__.py")
    assert book.run("tangle") == 0
    assert book.out == "the package is up to date\n"


def test_blank_lines_are_no_edit(book):
    before = book.files()
    book.edit(MODULE, "LIMIT = 10\n", "\nLIMIT = 10\n\n\n")
    assert book.run("untangle") == 0
    assert book.files() == before


def test_edit_survives_other_changes_of_the_chapter(book):
    """Prose, another cell, and a new cell above: the edited one is found by its hash."""
    book.edit(MODULE, "LIMIT = 10", "LIMIT = 12")
    book.edit(CHAPTER, "Some prose", "Much\n\nmore prose")
    book.edit(CHAPTER, "return 2 * x", "return x + x")
    book.edit(
        CHAPTER,
        "```{code-cell} python\n#| export\ndef",
        "```{code-cell} python\n#| export\nNEW = 1\n```\n\n```{code-cell} python\n#| export\ndef",
    )
    assert book.run("untangle") == 0, book.err
    for name in (CHAPTER, MODULE):
        text = book.read(name)
        assert "LIMIT = 12" in text and "return x + x" in text and "NEW = 1" in text


def test_conflict(book):
    book.edit(MODULE, "return 2 * x", "return x * 2")
    book.edit(CHAPTER, "return 2 * x", "return x + x")
    book.edit("guided_descent/other.py", "double(x) + x", "x + double(x)")
    assert book.refuses("untangle") == f"{MODULE}:13: conflict: edited here and at {CHAPTER}:24; undo one of the edits"


def test_same_edit_on_both_sides(book):
    for name in (MODULE, CHAPTER):
        book.edit(name, "return 2 * x", "return x * 2")
    assert book.run("untangle") == 0
    assert book.run("tangle") == 0
    assert book.out == "the package is up to date\n"


def test_cell_that_left_the_chapter(book):
    book.edit(MODULE, "LIMIT = 10", "LIMIT = 12")
    book.edit(CHAPTER, "```{code-cell} python\n#| export\nLIMIT = 10\n```\n", "")
    assert book.refuses("untangle").startswith(f"{MODULE}:19: conflict: edited here, and its cell")


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ('    "LIMIT",\n', "", 1, "an edit outside the cells; undo it"),
        ("First things", "Firsts", 1, "an edit outside the cells; undo it"),
        ("# Do not edit", "import os\n# Do not edit", 1, "an edit outside the cells; undo it"),
        ("# Generated", "# Made", 1, "not a generated file"),
        ("return 2 * x", "return 2 *", 15, "syntax error"),
        ("LIMIT = 10\n", "", 19, "the cell is empty"),
        ("LIMIT = 10", 'LIMIT = """\n```\n"""', 19, "the chapter cannot hold this edit"),
        ("LIMIT = 10", "LIMIT = 1\n#| export", 19, "a directive below the first line"),
        ("LIMIT = 10", "double = 1", 19, "double is already exported"),
        ("LIMIT = 10", "LIMIT = 1\n# %% more", 19, "a line that looks like a marker"),
    ],
)
def test_refused(book, old, new, line, message):
    book.edit(MODULE, old, new)
    said = book.refuses("untangle")
    assert message in said
    assert said.startswith(f"{MODULE}:{line}: "), said


def test_missing_marker(book):
    marker = next(row for row in book.read(MODULE).split("\n") if row.startswith("# %% 01_first sec-double 2"))
    book.edit(MODULE, f"{marker}\n", "")
    assert book.refuses("untangle").startswith(f"{MODULE}:1: no marker `# %% 01_first sec-double 2 …`; put it back")


def test_file_of_no_chapter(book):
    book.write("guided_descent/mine.py", "x = 1\n")
    assert book.refuses("untangle").startswith("guided_descent/mine.py:1: not a generated file")


PIECES = [
    "a = 1",
    "",
    "    # deep",
    "b = 'ä → ∇'",
    "def f():\n    return 1",
    "c = '''\n\n\n'''",
    "# %",
    "# x  ",
    "'$$'",
]
lines = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6)


def cell(number: int, pieces: list[str]) -> str:
    """A valid cell whose public names no other cell has."""
    code = "\n".join([f"N{number} = 0", *pieces]).rstrip()
    ast.parse(code)
    for name in ("a =", "b =", "c =", "f()"):
        code = code.replace(name, f"_{number}{name}" if name != "f()" else f"_f{number}()")
    return re.sub(r"^_(\d)(\w)", r"_\2\1", code, flags=re.MULTILINE)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=lines, second=lines)
def test_round_trip(book, first, second):
    """Whatever code is written into a chapter, or into the package, both sides end with it."""
    cells = [cell(number, pieces) for number, pieces in enumerate((first, second))]
    book.write(CHAPTER, book.first.replace("LIMIT = 10", cells[0]))
    assert book.run("tangle", "--force") == 0, book.err
    tangled = book.files()
    book.edit(MODULE, cells[0], cells[1])
    assert book.run("untangle") == 0, book.err
    assert cells[1] in book.read(CHAPTER)
    assert book.run("tangle") == 0
    assert book.out == "the package is up to date\n"
    book.edit(MODULE, cells[1], cells[0])
    assert book.run("untangle") == 0
    again = book.files()
    assert {n: t for n, t in again.items() if n != CHAPTER} == {n: t for n, t in tangled.items() if n != CHAPTER}
    assert again[CHAPTER].decode() == book.first.replace("LIMIT = 10", cells[0])


def test_locate(book):
    for text, module in [
        ("return 2 * x", MODULE),
        ("LIMIT = 10", MODULE),
        ("double(x) + x", "guided_descent/other.py"),
    ]:
        here, there = f"{CHAPTER}:{book.line(CHAPTER, text)}", f"{module}:{book.line(module, text)}"
        assert book.run("locate", here) == 0
        assert book.out == there + "\n"
        assert book.run("locate", there) == 0
        assert book.out == here + "\n"
        assert book.run("locate", f"{book.root}/{there}") == 0


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (f"{CHAPTER}:8", "this line is in no export cell"),
        (f"{CHAPTER}:9999", "this line is in no export cell"),
        (f"{MODULE}:2", "this line is in no export cell"),
        (f"{MODULE}:18", "this line is in no export cell"),
        ("chapters/09_none.md:3", "no such file"),
        (MODULE, "write FILE:LINE"),
        (f"{MODULE}:x", "write FILE:LINE"),
    ],
)
def test_locate_nowhere(book, place, message):
    assert message in book.refuses("locate", place)


def test_locate_in_an_edited_cell(book):
    book.edit(MODULE, "return 2 * x", "return x * 2")
    assert "differs between chapter and package" in book.refuses("locate", f"{MODULE}:15")
