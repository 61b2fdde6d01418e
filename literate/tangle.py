"""Chapters to package: every module of `guided_descent`, byte for byte."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from literate.files import commit
from literate.myst import SourceError
from literate.source import PACKAGE, Book, Chapter, Export, digest

MARKER = re.compile(r"^# %% (.+) ([0-9a-f]{8})$", re.MULTILINE)
BANNER = "# Generated from "
HEAD = "head"
# `book` needs what only the [book] extra installs.
NOT_REEXPORTED = {"book"}


@dataclass(frozen=True)
class Part:
    """A marked stretch of a package file; `line` is the line of its first line of code."""

    key: str
    hash: str
    code: str
    line: int

    @property
    def end(self) -> int:
        return self.line + self.code.count("\n")

    @property
    def edited(self) -> bool:
        return digest(self.code) != self.hash


def split(text: str) -> list[Part]:
    """The marked parts of a package file; the first is its head."""
    marks = list(MARKER.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    parts = []
    for mark, end in zip(marks, ends, strict=True):
        body = text[mark.end() : end]
        start = mark.end() + (len(body) - len(body.lstrip("\n")) if body.strip() else 1)
        parts.append(Part(mark[1], mark[2], body.strip("\n").rstrip(), text.count("\n", 0, start) + 1))
    return parts


def intact(text: str) -> bool:
    """Whether the head of a package file and all its markers are as tangle wrote them."""
    banner, *_ = text.partition(f"# %% {HEAD} ")
    head, *cells = split(text) or [Part("", "", "", 1)]
    return head.key == HEAD and head.hash == _head_hash(banner, head.code, [(cell.key, cell.hash) for cell in cells])


def key(chapter: Chapter, export: Export) -> str:
    return f"{chapter.stem} {export.section} {export.ordinal}"


def package(book: Book) -> dict[Path, str]:
    """The text of every file of the package."""
    folder = book.root / PACKAGE
    files = {folder / f"{name}.py": _module(book, name) for name in sorted(book.modules)}
    if files:
        files[folder / "__init__.py"] = _init(book)
    return files


def tangle(book: Book, *, force: bool = False) -> list[Path]:
    """Write the package; files of modules that are gone are removed. Returns what changed."""
    files: dict[Path, str | None] = dict(package(book))
    for path in sorted((book.root / PACKAGE).glob("*.py")):
        if path in files or path.read_text("utf-8").startswith(BANNER):
            files.setdefault(path, None)
            if not force and (line := hand_edit(path, files[path])):
                where = path.relative_to(book.root)
                raise SourceError(where, line, "edited by hand; run `untangle` to keep the edit, `--force` to drop it")
    return commit(book.root, files)


def hand_edit(path: Path, wanted: str | None) -> int | None:
    """The line where a package file is not what tangle wrote, if there is one."""
    text = path.read_text("utf-8")
    if text == wanted:
        return None
    if not text.startswith(BANNER) or not intact(text):
        return 1
    head, *cells = split(text)
    for cell in cells:
        if cell.edited:
            return cell.line
    pristine = _join(text.partition(f"# %% {HEAD} ")[0], head.code, [(cell.key, cell.code) for cell in cells])
    return None if text == pristine else first_difference(text, pristine)


def first_difference(text: str, other: str) -> int:
    """The first line of `text` that is not so in `other`; markers count only where nothing else differs."""
    pairs = list(enumerate(zip(text.split("\n"), other.split("\n"), strict=False), 1))
    different = [n for n, (a, b) in pairs if a != b]
    return next(
        (n for n in different if not MARKER.match(pairs[n - 1][1][0])), different[0] if different else len(pairs)
    )


def _join(banner: str, head: str, cells: list[tuple[str, str]]) -> str:
    """A package file: banner, head, then each cell under its marker."""
    hashes = [(name, digest(code)) for name, code in cells]
    blocks = [f"# %% {name} {value}\n{code}\n" for (name, value), (_, code) in zip(hashes, cells, strict=True)]
    top = f"{banner}# %% {HEAD} {_head_hash(banner, head, hashes)}\n{head}\n"
    return "\n\n".join([top, *blocks])


def _head_hash(banner: str, head: str, cells: list[tuple[str, str]]) -> str:
    """Covers all that stands outside the cells, so that a marker which goes missing is noticed."""
    return digest("\n".join([banner, head, *(" ".join(cell) for cell in cells)]))


def _banner(files: str) -> str:
    return (
        f"{BANNER}{files} by `python -m literate tangle`.\n"
        "# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.\n"
    )


def _module(book: Book, name: str) -> str:
    pairs = book.modules[name]
    chapters = list({chapter.stem: chapter for chapter, _ in pairs}.values())
    titles = "; ".join(f"{chapter.number:02d}, {chapter.title}" for chapter in chapters)
    names = [name for _, export in pairs for name in export.names]
    head = f'"""Chapter{"s" * (len(chapters) > 1)} {titles}."""\n\n{_all(names)}'
    cells = [(key(chapter, export), export.code) for chapter, export in pairs]
    text = _join(_banner(", ".join(chapter.file for chapter in chapters)), head, cells)
    try:
        compile(text, name, "exec", dont_inherit=True)
    except SyntaxError as error:
        at = error.lineno or 1
        part = next((n for n, part in enumerate(split(text)[1:]) if part.line <= at <= part.end), 0)
        chapter, export = pairs[part]
        line = export.line + at - split(text)[part + 1].line
        raise SourceError(chapter.file, line, f"syntax error in module {name}: {error.msg}; mend the cell") from None
    return text


def _init(book: Book) -> str:
    head = [f'"""{book.config.get("title", PACKAGE)}: the package that the chapters of the book build."""', ""]
    for name in sorted(set(book.modules) - NOT_REEXPORTED):
        names = _sorted([name for _, export in book.modules[name] for name in export.names])
        if len(names) == 1:
            head.append(f"from {PACKAGE}.{name} import {names[0]}")
        elif names:
            head += [f"from {PACKAGE}.{name} import (", *(f"    {n}," for n in names), ")"]
    public = [name for name, module in book.public.items() if module not in NOT_REEXPORTED]
    head += ["", f'__version__ = "{book.version}"', "", _all([*public, "__version__"])]
    return _join(_banner("chapters/*.md"), "\n".join(head), [])


def _all(names: list[str]) -> str:
    return "\n".join(["__all__ = [", *(f'    "{name}",' for name in _sorted(names)), "]"])


def _sorted(names: list[str]) -> list[str]:
    """Constants, then classes, then functions, each by name."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[:1].isupper(), name))
