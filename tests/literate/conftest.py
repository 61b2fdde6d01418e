"""Tiny books in a temporary folder, and the tool run on them as the command line runs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from literate.__main__ import main

FRONT = """\
---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
"""
FIRST = (
    FRONT
    + """\
(ch-first)=
# First things

Some prose about {eq}`eq-double`.

(sec-double)=
## Doubling

$$
f(x) = 2x
$$ (eq-double)

```{code-cell} python
#| default_exp maths
```

```{code-cell} python
#| export
def double(x: float) -> float:
    \"\"\"Twice :math:`x`.\"\"\"
    return 2 * x
```

```{code-cell} python
#| export
LIMIT = 10
```

(sec-triple)=
## Tripling

```{code-cell} python
#| export other

from guided_descent.maths import double


def triple(x: float) -> float:
    \"\"\"Three times.\"\"\"
    return double(x) + x
```

```{code-cell} python
assert double(2) == 4
print("✓ (eq-double) within 1e-12")
```
"""
)


@dataclass
class Shelf:
    """A book in a folder, and the results of running the tool on it."""

    root: Path
    capsys: pytest.CaptureFixture[str] | None
    out: str = ""
    err: str = ""
    first: str = FIRST
    front: str = FRONT

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        return path

    def read(self, name: str) -> str:
        return (self.root / name).read_text("utf-8")

    def edit(self, name: str, old: str, new: str) -> None:
        text = self.read(name)
        assert text.count(old) == 1, f"{old!r} is in {name} {text.count(old)} times"
        self.write(name, text.replace(old, new))

    def line(self, name: str, text: str) -> int:
        """The line of a file that holds `text`."""
        return next(n for n, row in enumerate(self.read(name).split("\n"), 1) if text in row)

    def run(self, *arguments: str) -> int:
        status = main(arguments)
        self.out, self.err = self.capsys.readouterr()
        return status

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.root)): p.read_bytes() for p in sorted(self.root.rglob("*")) if p.is_file()}

    def refuses(self, *arguments: str) -> str:
        """Run what must fail as malformed: exit 2, one line, every file as it was. Returns the line."""
        before = self.files()
        assert self.run(*arguments) == 2
        assert self.files() == before
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        return self.err.strip()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shelf:
    """A folder with the book's configuration and no chapter."""
    return make_shelf(tmp_path, monkeypatch.chdir, capsys)


def make_shelf(root: Path, chdir: Callable[[Path], None], capsys: pytest.CaptureFixture[str] | None) -> Shelf:
    shelf = Shelf(root, capsys)
    shelf.write("_config.yml", "title: Tiny\nrepository: {url: https://github.com/me/tiny, branch: main}\n")
    shelf.write("_toc.yml", "format: jb-book\nroot: chapters/index\nchapters:\n- file: chapters/01_first\n")
    shelf.write("pyproject.toml", '[project]\nname = "guided-descent"\nversion = "1.2.3"\n')
    shelf.write("chapters/index.md", "# Tiny\n")
    chdir(root)
    return shelf


@pytest.fixture
def book(shelf: Shelf) -> Shelf:
    """A book of one chapter, tangled."""
    shelf.write("chapters/01_first.md", FIRST)
    assert shelf.run("tangle") == 0
    return shelf


@pytest.fixture(scope="session")
def woven_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the book of one chapter, tangled and woven once for all tests."""
    root = tmp_path_factory.mktemp("woven")
    with pytest.MonkeyPatch.context() as patch:
        make_shelf(root, patch.chdir, None).write("chapters/01_first.md", FIRST)
        assert main(["weave"]) == 0
    return root


@pytest.fixture
def woven(shelf: Shelf, woven_files: Path) -> Shelf:
    """A book of one chapter, tangled and woven."""
    shutil.copytree(woven_files, shelf.root, dirs_exist_ok=True)
    return shelf
