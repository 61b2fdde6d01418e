"""Chapters to package: every module of `guided_descent`, byte for byte."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from literate import pieces
from literate.files import commit
from literate.myst import SourceError
from literate.source import NOT_REEXPORTED, PACKAGE, Book, Chapter, Export, digest

MARKER = re.compile(r"^( {4})?# %% (.+) ([0-9a-f]{8})$", re.MULTILINE)
BANNER = "# Generated from "
HEAD = "head"


@dataclass(frozen=True)
class Part:
    """A marked stretch of a package file; `line` is the line of its first line of code, `inside` whether of a class."""

    key: str
    hash: str
    code: str
    line: int
    inside: bool = False

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
        line = text.count("\n", 0, start) + 1
        parts.append(Part(mark[2], mark[3], body.strip("\n").rstrip(), line, bool(mark[1])))
    return parts


def intact(text: str) -> bool:
    """Whether the head of a package file and all its markers are as tangle wrote them."""
    banner, *_ = text.partition(f"# %% {HEAD} ")
    head, *cells = split(text) or [Part("", "", "", 1)]
    return head.key == HEAD and head.hash == _head_hash(banner, head.code, cells)


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
    pristine = _join(text.partition(f"# %% {HEAD} ")[0], head.code, cells)
    return None if text == pristine else first_difference(text, pristine)


def first_difference(text: str, other: str) -> int:
    """The first line of `text` that is not so in `other`; markers count only where nothing else differs."""
    pairs = list(enumerate(zip(text.split("\n"), other.split("\n"), strict=False), 1))
    different = [n for n, (a, b) in pairs if a != b]
    return next(
        (n for n in different if not MARKER.match(pairs[n - 1][1][0])), different[0] if different else len(pairs)
    )


def _join(banner: str, head: str, cells: list[Part]) -> str:
    """A package file: banner, head, then each cell under its marker."""
    text = f"{banner}# %% {HEAD} {_head_hash(banner, head, cells)}\n{head}\n"
    for cell in cells:
        gap, indent = ("\n", pieces.INDENT) if cell.inside else ("\n\n", "")
        text += f"{gap}{indent}# %% {cell.key} {cell.hash}\n{cell.code}\n"
    return text


def _head_hash(banner: str, head: str, cells: list[Part]) -> str:
    """Covers all that stands outside the cells, so that a marker which goes missing is noticed."""
    marks = [f"{pieces.INDENT * cell.inside}{cell.key} {cell.hash}" for cell in cells]
    return digest("\n".join([banner, head, *marks]))


def _banner(files: str) -> str:
    return (
        f"{BANNER}{files} by `python -m literate tangle`.\n"
        "# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.\n"
    )


def _module(book: Book, name: str) -> str:
    pairs = book.modules[name]
    chapters = sorted({chapter.stem: chapter for chapter, _ in pairs}.values(), key=lambda chapter: chapter.stem)
    titles = "; ".join(f"{chapter.number:02d}, {chapter.title}" for chapter in chapters)
    names = [name for _, export in pairs for name in export.names]
    head = f'"""Chapter{"s" * (len(chapters) > 1)} {titles}."""\n\n{_all(names)}'
    cells = [Part(key(c, e), e.hash, e.packaged, 0, e.piece is not None) for c, e in pairs]
    text = _join(_banner(", ".join(chapter.file for chapter in chapters)), head, cells)
    try:
        compile(text, name, "exec", dont_inherit=True)
    except SyntaxError as error:
        at = error.lineno or 1
        parts = split(text)[1:]
        number = next((n for n, part in enumerate(parts) if part.line <= at <= part.end), 0)
        chapter, export = pairs[number]
        line = export.line + export.offsets[max(0, at - parts[number].line)]
        raise SourceError(chapter.file, line, f"syntax error in module {name}: {error.msg}; mend the cell") from None
    return text


def _init(book: Book) -> str:
    head = [f'"""{book.config.get("title", PACKAGE)}: the package that the chapters of the book build."""', ""]
    top = {name: _sorted(book.top(name)) for name in sorted(set(book.modules) - NOT_REEXPORTED)}
    for module, names in top.items():
        if not names:  # `gd.module` is there all the same
            head.append(f"from {PACKAGE} import {module} as {module}")
        elif len(names) == 1:
            head.append(f"from {PACKAGE}.{module} import {names[0]}")
        else:
            head += [f"from {PACKAGE}.{module} import (", *(f"    {n}," for n in names), ")"]
    public = [name for names in top.values() for name in names]
    head += ["", f'__version__ = "{book.version}"', "", _all([*public, "__version__"])]
    return _join(_banner("chapters/*.md"), "\n".join(head), [])


def _all(names: list[str]) -> str:
    return "\n".join(["__all__ = [", *(f'    "{name}",' for name in _sorted(names)), "]"])


def _sorted(names: list[str]) -> list[str]:
    """Constants, then classes, then functions, each by name."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[:1].isupper(), name))
