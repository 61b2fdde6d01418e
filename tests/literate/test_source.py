"""Reading chapters: numbers, lines, and every malformed input with its file and line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from literate.source import Book, strip_directives

CHAPTER = "chapters/01_first.md"

NUMBERS = """\
(ch-n)=
# Numbers

(sec-a)=
## A

$$
1
$$

$$ 2 $$ (eq-a)

:::{note}
Inside:

$$
3
$$ (eq-b)
:::

### Deeper

(sec-b)=
## B

```{math}
:label: eq-c
x
```

```{code-cell} python
---
mystnb:
  figure: {caption: "No name."}
---
1
```

```{code-cell} python
---
mystnb:
  image: {alt: "a"}
  figure: {name: fig-a, caption: "One *concludes*."}
---

plot()
```

````{prf:theorem} Main
:label: thm-a

$$
4
$$ (eq-d)
````

```{prf:lemma}
:label: lem-a
text
```

```{figure} x.png
:name: fig-b
:alt: x

Drawn.
```

:::{exercise} First
:label: ex-a
Do.
:::

:::{exercise}
Unlabelled.
:::

```{exercise-start} Third
:label: ex-c
```

Body with

$$ 5 $$ (eq-e)

```{exercise-end}
```

```{list-table} T
:name: tab-a

* - a
```

````{margin}
```{note}
$$ 6 $$ (eq-f)
```
````

(sec-c)=
### C
"""


@pytest.fixture
def numbers(shelf):
    shelf.write("chapters/07_numbers.md", shelf.front + NUMBERS)
    return Book.load(shelf.root)


def test_numbers(numbers):
    found = {label.name: (label.kind, label.noun, label.number) for label in numbers.labels.values()}
    assert found == {
        "ch-n": ("sec", "Section", "07"),
        "sec-a": ("sec", "Section", "7.1"),
        "sec-b": ("sec", "Section", "7.2"),
        "sec-c": ("sec", "Section", "7.2.1"),
        **{f"eq-{name}": ("eq", "Equation", f"7.{n}") for n, name in enumerate("abcdef", 1)},
        "fig-a": ("fig", "Figure", "7.2"),
        "fig-b": ("fig", "Figure", "7.3"),
        "thm-a": ("prf", "Theorem", "7.1"),
        "lem-a": ("prf", "Lemma", "7.1"),
        "ex-a": ("ex", "Exercise", "7.1"),
        "ex-c": ("ex", "Exercise", "7.3"),
        "tab-a": ("tab", "Table", "7.1"),
    }
    assert numbers.labels["fig-a"].title == "One *concludes*."
    assert numbers.labels["sec-b"].title == "B"
    assert numbers.labels["ex-a"].title == "First"


def test_lines(numbers, shelf):
    lines = shelf.read("chapters/07_numbers.md").split("\n")
    for cell in numbers.chapters[0].cells:
        assert lines[cell.line - 1] == cell.source.split("\n")[0]
    for label in numbers.labels.values():
        around = "\n".join(lines[max(0, label.line - 8) : label.line + 6])
        assert label.name in around


def test_sections(numbers):
    sections = [cell.section for cell in numbers.chapters[0].cells if cell.kind == "code"]
    assert sections == ["sec-b", "sec-b"]


def test_exports(book):
    chapter = Book.load().chapters[0]
    found = [(e.module, e.section, e.ordinal, e.names, e.code.split("\n")[0]) for e in chapter.exports]
    assert found == [
        ("maths", "sec-double", 1, ("double",), "def double(x: float) -> float:"),
        ("maths", "sec-double", 2, ("LIMIT",), "LIMIT = 10"),
        ("other", "sec-triple", 1, ("triple",), "from guided_descent.maths import double"),
    ]
    lines = book.read(CHAPTER).split("\n")
    assert all(lines[e.line - 1] == e.code.split("\n")[0] for e in chapter.exports)


def test_strip_directives():
    assert strip_directives("#| export\n\nx = 1") == "x = 1"
    assert strip_directives("x = 1\n# y") == "x = 1\n# y"
    assert strip_directives("#| default_exp a") == ""


def test_site(book):
    assert Book.load().site == "https://me.github.io/tiny/"


EXPORT = "```{code-cell} python\n#| export\nLIMIT = 10\n```"
MALFORMED = {
    "front matter": ("kernelspec: {", "kernelspec: [", "display_name", "bad YAML"),
    "front matter open": ("---\n(ch-first)", "(ch-first)", "---", "unclosed front matter"),
    "no front matter": ("---\njupytext", "jupytext", "jupytext:", "no front matter"),
    "front matter a list": ("jupytext:\n  text", "- text", "kernelspec", "bad YAML"),
    "cell options": ("#| export\nLIMIT", "---\ntags: [a\n---\nLIMIT", "---\nLIMIT", "bad YAML"),
    "cell options short": ("#| export\nLIMIT", ":tags: [a\nLIMIT", ":tags", "bad YAML"),
    "tags": ("#| export\nLIMIT", ":tags: hide-input\nLIMIT", "```{code-cell} python\n:tags", "bad cell options"),
    "figure": ("#| export\nLIMIT", "---\nmystnb: {figure: name}\n---\nLIMIT", "LIMIT", "bad cell options"),
    "unclosed cell": ("return 2 * x\n```", "return 2 * x\n", "```{code-cell} python\n#| export\ndef", "unclosed fence"),
    "unclosed fence": ("Some prose", "```python\nSome prose", "```python\nSome", "unclosed fence"),
    "unclosed last": ('12")\n```', '12")', "```{code-cell} python\nassert", "unclosed fence"),
    "unclosed colon": ("(sec-triple)=", ":::{note}\n(sec-triple)=", ":::{note}", "unclosed fence; close it with :::"),
    "unclosed math": ("2x\n$$ (eq-double)", "2x\n", "$$", "displayed mathematics"),
    "nested cell": (EXPORT, f"````{{note}}\n{EXPORT}\n````", "````{note}", "a code cell inside a directive"),
    "cell in a list": (EXPORT, "- " + EXPORT.replace("\n", "\n  "), "- ```", "a code cell inside a list"),
    "syntax": ("return 2 * x", "return 2 *", "return 2 *", "syntax error: invalid syntax"),
    "syntax of a module": ("LIMIT = 10", "x = 1\nreturn x", "return x", "syntax error in module maths"),
    "future import": ("LIMIT = 10", "from __future__ import annotations", "from __future__", "syntax error in module"),
    "twice": ("LIMIT = 10", "def double(): ...", "def double(): ...", f"double is already exported at {CHAPTER}:24"),
    "twice across": ("def triple", "def double", "from guided_descent.maths", "double is already exported"),
    "module name": ("LIMIT = 10", "other = 10", "other = 10", "other is also the name of a module"),
    "before default": ("#| default_exp maths", "pass", "#| export\ndef", "`#| export` before any default_exp"),
    "misspelt": ("#| export\nLIMIT", "#| exprot\nLIMIT", "#| exprot", "did you mean `#| export`?"),
    "misspelt default": ("default_exp", "defualt_exp", "#| defualt", "did you mean `#| default_exp`?"),
    "strange": ("#| export\nLIMIT", "#| zzz\nLIMIT", "#| zzz", "use `#| export` or `#| default_exp NAME`"),
    "empty directive": ("#| export\nLIMIT", "#|\nLIMIT", "#|\nLIMIT", "unknown directive"),
    "two arguments": ("#| export other", "#| export other more", "#| export other", "takes one module name"),
    "no argument": ("#| default_exp maths", "#| default_exp", "#| default_exp", "takes one module name"),
    "bad module": ("#| export other", "#| export Other.x", "#| export Other", "Other.x is no module name"),
    "keyword module": ("#| export other", "#| export class", "#| export class", "class is no module name"),
    "directive below": ("LIMIT = 10", "LIMIT = 10\n#| export", "#| export\n```", "a directive below the first line"),
    "empty export": ("LIMIT = 10\n", "\n", "#| export\n\n", "an empty export cell"),
    "code with default": ("_exp maths", "_exp maths\nx = 1", "#| default_exp", "code in a default_exp cell"),
    "no label": ("(sec-triple)=\n", "", "#| export other", "an export cell in a section without a label"),
    "marker": ("LIMIT = 10", "LIMIT = 10\n# %% part", "# %% part", "a line that looks like a marker"),
    "label twice": ("(sec-triple)=", "(sec-double)=", "(sec-double)=\n## Tripling", "is also at line 11"),
    "label twice in the book": ("(sec-triple)=", "(ch-second)=", "(ch-second)=", "label ch-second is also at"),
    "no title": ("# First things", "First things", 1, "no title"),
    "byte order mark": ("---\njupytext", "\ufeff---\njupytext", 1, "a byte order mark; save as UTF-8 without one"),
    "kernel": ("language: python", "language: julia", "kernelspec", "a kernel for julia; only Python runs here"),
    "language": ("python\nassert", "r\nassert", "```{code-cell} r", "a code cell in r; only Python runs here"),
    "colon cell": ("```{code-cell} python\nassert double(2) == 4\nprint(\"✓ (eq-double) within 1e-12\")\n```",
                   ":::{code-cell} python\nassert 1\n:::", ":::{code-cell}", "a code cell between :::"),
    "raw cell": ("```{code-cell} python\nassert", "```{raw-cell}\nassert", "```{raw-cell}", "a raw cell"),
    "cell magic": ("assert double(2) == 4", "%%time\nassert double(2)", "%%time", "a cell magic, %%time; write Python"),
    "exported magic": ("LIMIT = 10", "%%bash\nls", "%%bash", "a cell magic, %%bash; write Python"),
    "two titles": ("## Tripling", "# Tripling", "# Tripling", "a second title; start sections with ##"),
    "amsmath": ("Some prose", "\\begin{align*}\nx\n\\end{align*}\n\nSome", "\\begin", "a bare {align*}, which only"),
    "unbound": ("LIMIT = 10", "if 1 > 0:\n    LIMIT = 10", "    LIMIT", "LIMIT may be left unbound; bind it on every"),
    "deleted elsewhere": ("LIMIT = 10", "LIMIT = 10\ndel double", "del double", "double is a public name"),
    "line break": ("Some prose", "Some\x0cprose", "Some\x0c", "a line break other than"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("verb", ["tangle", "weave", "untangle", "check"])
def test_malformed(book, case, verb):
    old, new, at, message = MALFORMED[case]
    book.write("chapters/00_second.md", book.front + "(ch-second)=\n# Second\n")
    text = book.read(CHAPTER)
    assert old in text
    text = text.replace(old, new, 1)
    book.write(CHAPTER, text)
    line = at if isinstance(at, int) else text[: text.index(at)].count("\n") + 1
    said = book.refuses(verb)
    assert said.startswith(f"{CHAPTER}:{line}: "), said
    assert message in said


def test_other_files(book):
    book.write("_config.yml", "title: [")
    assert book.refuses("tangle").startswith("_config.yml:1: bad YAML")
    book.write("_config.yml", "title: x")
    assert book.refuses("tangle").startswith("_config.yml:1: no repository url")
    (book.root / "_config.yml").unlink()
    assert book.refuses("tangle").startswith("_config.yml:1: not in this folder or above it")


def test_version_is_needed(book):
    book.write("pyproject.toml", "[project]\nname = 'x'")
    assert book.refuses("tangle").startswith("pyproject.toml:1: no version")
    book.write("pyproject.toml", "[project")
    assert book.refuses("tangle").startswith("pyproject.toml:1: cannot be used")


def test_bytes_that_are_no_text(book):
    (book.root / CHAPTER).write_bytes(b"---\n\xff")
    assert book.refuses("check").startswith(f"{CHAPTER}:1: cannot be read")


def test_runs_from_a_folder_below(book, monkeypatch):
    monkeypatch.chdir(book.root / "chapters")
    assert book.run("tangle") == 0


def test_examples_of_markdown_are_left_alone(shelf):
    text = "(ch-a)=\n# A\n\n````md\n```{code-cell} python\n#| exprot\n```\n````\n"
    shelf.write(CHAPTER, shelf.front + text)
    assert [cell.kind for cell in Book.load(shelf.root).chapters[0].cells] == ["markdown"]


@pytest.mark.parametrize(
    "kernel",
    ["{name: python3}", "{display_name: x}", "{language: python}", "python3", "{name: 3, language: Python}", "[]", ""],
)
def test_incomplete_kernelspec(book, kernel):
    """Nothing here depends on it: the notebook's kernel is always Python's."""
    book.edit(CHAPTER, "{display_name: Python 3, language: python, name: python3}", kernel)
    for verb in ("tangle", "untangle"):
        assert book.run(verb) == 0, book.err
    assert book.run("check") == 1
    assert book.out.splitlines()[-1] == "1 to mend"


TOP = "---\n(ch-first)"


def listed(book, line):
    book.edit(CHAPTER, TOP, f"{line}\n{TOP}")


@pytest.mark.parametrize(
    ("line", "top"),
    [
        ("top_level: [double]", {"double"}),
        ("top_level:\n- triple\n- LIMIT", {"triple", "LIMIT"}),
        ("top_level: []", set()),
        ("", {"double", "triple", "LIMIT"}),
    ],
)
def test_top_level(book, line, top):
    """What a user types after `gd.`; modules and their `__all__` stay as they are."""
    modules = {name: book.read(f"guided_descent/{name}.py") for name in ("maths", "other")}
    if line:
        listed(book, line)
    assert book.run("tangle") == 0, book.err
    assert {name: book.read(f"guided_descent/{name}.py") for name in modules} == modules
    code = "import guided_descent as gd; print(sorted(gd.__all__), gd.other.triple(1), gd.maths.LIMIT)"
    result = subprocess.run([sys.executable, "-c", code], cwd=book.root, capture_output=True, text=True, check=True)
    assert result.stdout == f"{sorted([*top, '__version__'])} 3 10\n"
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F", "guided_descent"]
    subprocess.run(ruff, cwd=book.root, check=True)


@pytest.mark.parametrize(
    ("line", "at", "message"),
    [
        ("top_level: [doubel]", "top_level", "top_level lists doubel, which this chapter does not export"),
        ("top_level:\n- triple\n- g.h", "- g.h", "top_level lists g.h, which this chapter does not export"),
        ("top_level:\n- triple\n- triple", "- triple", "top_level lists triple twice"),
        ("top_level: double", "top_level", "top_level is no list of names"),
        ("top_level: [1]", "top_level", "top_level is no list of names"),
        ("top_level:", "top_level", "top_level is no list of names"),
    ],
)
def test_top_level_that_cannot_be(book, line, at, message):
    listed(book, line)
    said = book.refuses("tangle")
    assert said.startswith(f"{CHAPTER}:{book.line(CHAPTER, at)}: {message}"), said


def test_book_module_is_never_at_the_top(book):
    book.edit(CHAPTER, "#| export other", "#| export book")
    listed(book, "top_level: [triple]")
    assert "top_level lists triple of module book" in book.refuses("tangle")
