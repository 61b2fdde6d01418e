"""Weave: what runs, what is stored, and what a failure leaves behind."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import nbformat
import pytest

CHAPTER, NOTEBOOK = "chapters/01_first.md", "chapters/01_first.ipynb"


def cells(shelf, kind="code", notebook=NOTEBOOK):
    return [c for c in nbformat.reads(shelf.read(notebook), 4).cells if c.cell_type == kind]


def test_plain_notebook(woven):
    code, text = cells(woven), "\n".join(cell.source for cell in cells(woven, "markdown"))
    assert [cell.source.split("\n")[0] for cell in code[1:]] == [
        "def double(x: float) -> float:",
        "LIMIT = 10",
        "from guided_descent.maths import double",
        "assert double(2) == 4",
    ]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4, 5]
    assert [cell.outputs for cell in code[:-1]] == [[], [], [], []]
    assert code[-1].outputs[0].text == "✓ (eq-double) within 1e-12\n"
    assert "{" not in text.replace("\\tag{1.1}", "") and "(sec-" not in text and "#|" not in woven.read(NOTEBOOK)
    assert "\\tag{1.1}" in text and "about (1.1)" in text
    assert "colab.research.google.com/github/me/tiny/blob/colab/chapters/01_first.ipynb" in text
    assert (
        "| [`triple`](https://me.github.io/tiny/chapters/api/other.html#guided_descent.other.triple) | Three times. |"
        in text
    )
    assert 'REVISION = \\"main\\"' in woven.read(NOTEBOOK)
    nbformat.validate(nbformat.reads(woven.read(NOTEBOOK), 4))


def test_execution_leaves_no_trace_of_time_or_place(woven):
    before = woven.read(NOTEBOOK)
    assert woven.run("weave", "--all") == 0
    assert "01_first: executed in" in woven.out
    assert woven.read(NOTEBOOK) == before
    assert str(woven.root) not in before


def test_current_runs_nothing(woven, monkeypatch):
    monkeypatch.setattr("literate.weave.execute", None)
    before = woven.files()
    assert woven.run("weave") == 0
    assert woven.out == "01_first: current\n"
    assert woven.files() == before


def test_prose_alone_renders_with_the_stored_outputs(woven, monkeypatch):
    monkeypatch.setattr("literate.weave.execute", None)
    woven.edit(CHAPTER, "Some prose", "Other prose")
    outputs = [cell.outputs for cell in cells(woven)]
    assert woven.run("weave", "first") == 0
    assert woven.out == "01_first: rendered\n"
    assert [cell.outputs for cell in cells(woven)] == outputs
    assert "Other prose" in woven.read(NOTEBOOK)


@pytest.mark.parametrize(
    ("old", "new"),
    [("LIMIT = 10", "LIMIT = 11"), ("return 2 * x", "return x + x"), ('print("✓', 'print("✓ ✓')],
)
def test_stale(woven, monkeypatch, old, new):
    ran = []
    monkeypatch.setattr(
        "literate.weave.execute", lambda book, chapter, page, progress: ran.append(chapter.stem) or [[]] * 5
    )
    woven.edit(CHAPTER, old, new)
    assert woven.run("weave") == 0
    assert ran == ["01_first"]


def test_failing_cell(woven):
    """The line of the .md, the traceback, exit 1; the old notebook stays and other chapters are done."""
    woven.edit(CHAPTER, "double(2) == 4\n", "double(2) == 4\n\nassert LIMIT < 5, 'far too large'\n")
    woven.write("chapters/02_second.md", f"{woven.front}(ch-b)=\n# B\n\n```{{code-cell}} python\n1 + 1\n```\n")
    before = woven.read(NOTEBOOK)
    assert woven.run("weave", "--jobs", "2") == 1
    line = woven.line(CHAPTER, "assert LIMIT")
    assert f"{CHAPTER}:{line}: cell 5 of 5 failed: AssertionError: far too large" in woven.err
    assert "Traceback" in woven.err and "\x1b" not in woven.err
    assert "01_first: failed" in woven.out and "02_second: executed" in woven.out
    assert woven.read(NOTEBOOK) == before
    assert cells(woven, notebook="chapters/02_second.ipynb")[1].outputs[0].data["text/plain"] == "2"


def test_kernel_that_dies(woven):
    woven.edit(CHAPTER, "assert double(2) == 4", "__import__('os')._exit(1)")
    before = woven.read(NOTEBOOK)
    assert woven.run("weave") == 1
    assert f"{CHAPTER}:{woven.line(CHAPTER, '_exit')}: cell 5 of 5 failed: Kernel died" in woven.err
    assert woven.read(NOTEBOOK) == before


def test_package_that_does_not_import(woven):
    """The setup cell imports the package: the line is that of the cell which broke it."""
    woven.edit(CHAPTER, "LIMIT = 10\n", "LIMIT = 10\nassert LIMIT < 5\n")
    assert woven.run("weave") == 1
    assert f"{CHAPTER}:{woven.line(CHAPTER, 'assert LIMIT')}: cell 1 of 5 failed: AssertionError" in woven.err


def test_streams_are_joined_and_figures_captioned(book):
    cell = """
```{code-cell} python
---
tags: [nbval-ignore-output]
mystnb: {image: {alt: "x"}, figure: {caption: "It falls, see {eq}`eq-double`."}}
---
import sys
for i in range(3):
    print(i, flush=True)
```

```{exercise-start} Now you
:label: ex-a
```
```{exercise-end}
```

```{solution-start} ex-a
```

```{code-cell} python
LIMIT == 10
```

```{solution-end}
```
"""
    book.write(CHAPTER, book.read(CHAPTER) + cell)
    assert book.run("weave") == 0
    *_, loop, solution = cells(book)
    assert [output.text for output in loop.outputs] == ["0\n1\n2\n"]
    assert loop.metadata == {"tags": ["nbval-ignore-output"]}
    assert solution.metadata == {"jupyter": {"source_hidden": True}, "tags": ["hide-input"]}
    text = [c.source for c in cells(book, "markdown")]
    assert "**Figure 1.1.** It falls, see (1.1)." in text
    assert any(source.startswith("**Exercise 1.1 (Now you)**") for source in text)
    ids = [c["id"] for c in nbformat.reads(book.read(NOTEBOOK), 4).cells]
    assert len(set(ids)) == len(ids)


def test_edited_notebook_is_kept(woven):
    notebook = json.loads(woven.read(NOTEBOOK))
    notebook["cells"][-2]["outputs"] = []
    woven.write(NOTEBOOK, json.dumps(notebook))
    assert woven.refuses("weave").startswith(f"{NOTEBOOK}:1: edited by hand; carry the edit into the .md")
    woven.write(NOTEBOOK, "{")
    assert woven.refuses("weave").startswith(f"{NOTEBOOK}:1: not a notebook")
    assert woven.run("weave", "--force") == 0
    assert woven.run("check") == 0, woven.out


def test_notebook_that_cannot_be_written(woven, monkeypatch):
    woven.edit(CHAPTER, "Some prose", "Other prose")
    before = woven.files()

    def failing(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("literate.files.os.replace", failing)
    assert woven.run("weave") == 2
    assert f"{NOTEBOOK}:1: cannot be written (No space left on device)" in woven.err
    monkeypatch.undo()
    os.chdir(woven.root)
    assert woven.files() == before


def test_no_such_chapter(book):
    assert book.refuses("weave", "09").startswith("chapters:1: no chapter 09; there are 01_first")


def test_weave_tangles_first(woven):
    woven.edit("guided_descent/maths.py", "2 * x", "x + x")
    assert woven.refuses("weave").startswith("guided_descent/maths.py:13: edited by hand")


PIP = """
import subprocess
subprocess.run = lambda command, check: print(*command[3:6], command[7], open(command[6]).read())
"""


def setup_cell(shelf, code, **environment):
    """Run the notebook's first code cell with a pip that only says what it was asked for."""
    result = subprocess.run(
        [sys.executable, "-c", f"{PIP}{code}\n{cells(shelf)[0].source}"],
        cwd=shelf.root / "chapters",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_setup_does_nothing_when_all_is_there(woven):
    assert setup_cell(woven, "", PYTHONPATH=str(woven.root)) == ""


MISSING = "import sys\nsys.modules['guided_descent'] = None"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (None, "guided-descent[book] @ git+https://github.com/me/tiny@main"),
        ("https://x.y/z.whl", "guided-descent[book] @ https://x.y/z.whl"),
        ("../pyproject.toml", "guided-descent[book] @ file://{root}/pyproject.toml"),
        ("guided-descent[book] @ git+https://x.y/z@1", "guided-descent[book] @ git+https://x.y/z@1"),
    ],
)
def test_setup_installs(woven, source, wanted):
    torch = importlib.metadata.version("torch")
    said = setup_cell(woven, MISSING, **({"GUIDED_DESCENT_SOURCE": source} if source else {}))
    assert said == f"install -q -c {wanted.format(root=woven.root)} torch=={torch}\n"
