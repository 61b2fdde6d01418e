"""Check: every promise, broken, is found at its line."""

from __future__ import annotations

import base64
import json

import nbformat
import pytest

from literate import notebook
from literate.source import Book

CHAPTER, NOTEBOOK = "chapters/01_first.md", "chapters/01_first.ipynb"


def findings(shelf):
    status = shelf.run("check")
    assert shelf.err == ""
    *rows, last = shelf.out.strip().split("\n")
    assert (status, last) == ((1, f"{len(rows)} to mend") if rows else (0, "chapters, package and notebooks agree"))
    return rows


def store(shelf, outputs):
    """Write the notebook of the chapter as it is, with these outputs for the last cell."""
    book = Book.load(shelf.root)
    chapter = book.chapters[0]
    page = notebook.render(book, chapter)
    count = sum(cell.cell_type == "code" for cell in page.cells)
    found = [[]] * (count - 1) + [[nbformat.from_dict(output) for output in outputs]]
    shelf.write(NOTEBOOK, nbformat.writes(notebook.finish(page, found)) + "\n")


TICK = {"output_type": "stream", "name": "stdout", "text": "✓ (eq-double) within 1e-12\n"}


def shown(mime, content):
    return {"output_type": "display_data", "data": {mime: content}, "metadata": {}}


def test_agreement(woven):
    before = woven.files()
    assert findings(woven) == []
    assert woven.files() == before


def test_a_line_of_88_columns_fits_and_prose_is_free(woven):
    woven.edit(CHAPTER, "assert double(2) == 4", f"assert double(2) == 4\nx = {'1' * 84}")
    woven.edit(CHAPTER, "Some prose", "Some prose " * 20)
    assert not [row for row in findings(woven) if "columns" in row]


@pytest.mark.parametrize(
    ("file", "old", "new", "at", "message"),
    [
        ("guided_descent/maths.py", "2 * x", "x + x", "def double", "edited by hand; run `untangle`"),
        (CHAPTER, "LIMIT = 10", "LIMIT = 11", "LIMIT = 11", "the cell has changed since its output was stored"),
        (
            CHAPTER,
            "Some prose",
            "New prose",
            (NOTEBOOK, 1),
            "the text has changed; run `python -m literate weave 01_first`",
        ),
        (
            NOTEBOOK,
            '1e-12\\n"',
            '1e-13\\n"',
            1,
            "edited by hand; run `python -m literate weave --force 01_first`",
        ),
        (CHAPTER, "{eq}`eq-double`", "{eq}`eq-none`", "{eq}`eq-none`", "no eq is named eq-none"),
        (CHAPTER, "Some prose", "Some {cite}`prose`", "{cite}", "chapters/references.bib has no prose"),
        (CHAPTER, "Some prose", "Some {zzz}`prose`", "{zzz}", "unknown role {zzz}"),
        (
            CHAPTER,
            "assert double(2) == 4",
            f"assert double(2) == 4\nx = {'1' * 85}",
            "x = 1",
            "89 columns of code; break the line, at most 88 fit a page",
        ),
        (CHAPTER, "assert double(2) == 4", "%matplotlib inline", "%matplotlib", "a raw magic, %matplotlib inline"),
        (CHAPTER, "assert double(2) == 4", "if 1:\n    !ls", "!ls", "a raw magic, !ls"),
        (CHAPTER, "assert double(2) == 4", 'check("eq-non", 1, 1)', "eq-non", "no equation is labelled eq-non"),
        (
            CHAPTER,
            "assert double(2) == 4",
            'book.check("sec-double", 1, 1)',
            '"sec-d',
            "no equation is labelled sec-double",
        ),
        (CHAPTER, "assert double(2) == 4", "x = 1\ncheck(x, 1, 1)", "check(x", "check without a literal label"),
        (CHAPTER, "assert double(2) == 4", "double(2) ==", "double(2) ==", "syntax error"),
        ("_toc.yml", "chapters/01_first", "chapters/01_last", 4, "there is no chapters/01_last.md"),
        ("_toc.yml", "- file: chapters/01_first", "", 1, "chapters/01_first is not listed"),
        ("_toc.yml", "- file", "- [file", 5, "bad YAML"),
        (
            "pyproject.toml",
            "1.2.3",
            "1.2.4",
            ("guided_descent/__init__.py", 12),
            "older than the chapters; run `python",
        ),
    ],
)
def test_edit(woven, file, old, new, at, message):
    woven.edit(file, old, new)
    file, at = at if isinstance(at, tuple) else (file, at)
    line = at if isinstance(at, int) else woven.line(file, at)
    rows = findings(woven)
    assert any(row.startswith(f"{file}:{line}: {message}") for row in rows), rows


IMPORT = "import guided_descent as gd"


def test_changed_module_is_traced_through_modules(woven):
    """`other` uses `maths`; a chapter that uses `other` alone is stale when `maths` changes."""
    first, second = ("```{code-cell} python\n" + code + "\n```\n" for code in (IMPORT, "gd.triple(2)"))
    woven.write("chapters/02_b.md", f"{woven.front}(ch-b)=\n# B\n\n{first}\n{second}")
    woven.edit("_toc.yml", "chapters/01_first\n", "chapters/01_first\n- file: chapters/02_b\n")
    assert woven.run("weave", "02") == 0
    assert findings(woven) == []
    woven.edit(CHAPTER, "return 2 * x", "return x + x")
    woven.run("tangle")
    line = woven.line("chapters/02_b.md", "gd.triple")
    stale = f"chapters/02_b.md:{line}: module maths, which this uses, has changed since the outputs were stored"
    assert any(row.startswith(stale) for row in findings(woven))
    woven.edit(CHAPTER, "return x + x", "return 2 * x")
    woven.edit(CHAPTER, "LIMIT = 10", "LIMIT = 10  # new")
    assert any(row.startswith(stale) for row in findings(woven))


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import guided_descent as gd\ngd.LIMIT", {"maths"}),
        ("import guided_descent as gd\ngd.other.triple", {"maths", "other"}),
        ("import guided_descent.maths\nguided_descent.maths.LIMIT", {"maths"}),
        ("from guided_descent import LIMIT as x", {"maths"}),
        ("from guided_descent import other", {"maths", "other"}),
        ("from guided_descent.other import triple", {"maths", "other"}),
        ("import guided_descent as gd\ngetattr(gd, 'x')", {"maths", "other"}),
        ("from guided_descent import *", {"maths", "other"}),
        ("import guided_descent as gd\ngd.__version__", set()),
        ("x = 1", set()),
    ],
)
def test_modules_used(shelf, code, modules):
    from literate.depend import used

    shelf.write(CHAPTER, shelf.first)
    shelf.write("chapters/02_b.md", f"{shelf.front}# B\n\n```{{code-cell}} python\n{code}\n```\n")
    book = Book.load(shelf.root)
    assert set(used(book, book.chapters[1])) == modules


def test_missing_files(woven):
    for name in (NOTEBOOK, "guided_descent/other.py"):
        (woven.root / name).unlink()
    woven.write("guided_descent/mine.py", "x = 1")
    woven.write("chapters/09_gone.ipynb", "{}")
    assert findings(woven) == [
        f"{CHAPTER}:1: no notebook; run `python -m literate weave 01_first`",
        "chapters/09_gone.ipynb:1: a notebook without its .md; remove it",
        "guided_descent/mine.py:1: no chapter exports to this file; move its code to an export cell, or remove it",
        "guided_descent/other.py:1: missing; run `python -m literate tangle`",
    ]


def test_notebook_without_outputs(woven):
    stored = json.loads(woven.read(NOTEBOOK))
    for cell in stored["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    woven.write(NOTEBOOK, json.dumps(stored))
    line = woven.line(CHAPTER, "def double")
    assert f"{CHAPTER}:{line}: the cell has no stored output; run `python -m literate weave 01_first`" in findings(
        woven
    )
    woven.write(NOTEBOOK, "{")
    assert findings(woven)[0].startswith(f"{NOTEBOOK}:1: not a notebook")


def test_equation_without_a_check(woven):
    woven.edit(CHAPTER, 'print("✓ (eq-double) within 1e-12")\n', "")
    store(woven, [])
    line = woven.line(CHAPTER, "(eq-double)") - 2
    what = 'equation eq-double is checked in no stored output; add check("eq-double", …) or drop the label'
    assert findings(woven) == [f"{CHAPTER}:{line}: {what}"]


PNG = base64.b64encode(b"x" * 100).decode()
FIGURE = "---\nmystnb:\n  image: {alt: A}\n  figure: {caption: C}\n---\nassert double"


@pytest.mark.parametrize("mime", ["image/png", "image/svg+xml", notebook.PLOTLY])
def test_figures(woven, mime):
    content = {"data": [], "layout": {}} if mime.endswith("json") else PNG
    store(woven, [TICK, shown(mime, content)])
    line = woven.line(CHAPTER, "assert double")
    assert findings(woven) == [
        f"{CHAPTER}:{line}: the figure has no alt text; add `mystnb: {{image: {{alt: …}}}}`",
        f"{CHAPTER}:{line}: the figure has no caption; add `mystnb: {{figure: {{caption: …}}}}`",
    ]
    woven.edit(CHAPTER, "assert double", FIGURE)
    store(woven, [TICK, shown(mime, content)])
    assert findings(woven) == []
    woven.edit(CHAPTER, "  image: {alt: A}\n", "")
    store(woven, [TICK, shown(mime, content)])
    assert [row.split("; ")[0] for row in findings(woven)] == [f"{CHAPTER}:{line + 4}: the figure has no alt text"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (shown("image/png", base64.b64encode(b"x" * 41_000).decode()), "an image of 41 kB"),
        ({"output_type": "stream", "name": "stderr", "text": "Warning"}, "stderr (a warning?) in the stored output"),
        ({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}, "an error in the stored output"),
        (TICK, "a caption but no figure in the stored output"),
    ],
)
def test_outputs(woven, output, message):
    woven.edit(CHAPTER, "assert double", FIGURE)
    store(
        woven,
        [TICK, output, *([] if output is TICK or "image/png" in output.get("data", {}) else [shown("image/png", PNG)])],
    )
    (row,) = findings(woven)
    assert row.startswith(f"{CHAPTER}:{woven.line(CHAPTER, 'assert double')}: {message}")


@pytest.mark.parametrize(
    ("code", "fine"),
    [
        ("double(1)", False),
        ("assert double(1)", True),
        ('check("eq-double", 1, 1)', True),
        ("torch.testing.assert_close(1, 1)", True),
        ("# assert it", False),
    ],
)
def test_cell_that_is_not_compared_asserts(woven, code, fine):
    woven.edit(CHAPTER, "assert double(2) == 4", f":tags: [nbval-ignore-output]\n{code}")
    store(woven, [TICK])
    line = woven.line(CHAPTER, ":tags:") + 1
    wanted = f"{CHAPTER}:{line}: the cell neither asserts nor is compared; assert what the text claims"
    assert findings(woven) == ([] if fine else [wanted])


def test_picture_without_alt_text(woven):
    woven.edit(CHAPTER, "Some prose", "```{figure} a.png\nC.\n```\n\nSome prose")
    store(woven, [TICK])
    assert findings(woven) == [f"{CHAPTER}:9: the picture has no alt text; add `:alt:`"]


def test_stored_outputs_are_for_the_site(woven):
    """What the site shows: outputs by cell; stale or edited ones are an error with file and line."""
    book = Book.load(woven.root)
    found = notebook.stored_outputs(book, book.chapters[0])
    assert [len(outputs) for outputs in found.values()] == [0, 0, 0, 1]
    assert all(book.chapters[0].cells[index].kind == "code" for index in found)
    woven.edit(CHAPTER, "LIMIT = 10", "LIMIT = 11")
    book = Book.load(woven.root)
    with pytest.raises(notebook.SourceError, match=rf"{CHAPTER}:{woven.line(CHAPTER, 'LIMIT')}: the cell has changed"):
        notebook.stored_outputs(book, book.chapters[0])
