"""Chapters to package: every module of `guided_descent`, byte for byte."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from literate.files import commit
from literate.myst import SourceError
from literate.source import PACKAGE, Book, Chapter, digest

MARKER = re.compile(r"^# %% (.+) ([0-9a-f]{8})$", re.MULTILINE)
BANNER = "# Generated from "
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
    def edited(self) -> bool:
        return digest(self.code) != self.hash


def split(text: str) -> list[Part]:
    """The marked parts of a package file; what stands before the first marker belongs to none."""
    marks = list(MARKER.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    parts = []
    for mark, end in zip(marks, ends, strict=True):
        body = text[mark.end() : end]
        start = mark.end() + len(body) - len(body.lstrip("\n"))
        parts.append(Part(mark[1], mark[2], body.strip("\n"), text.count("\n", 0, start) + 1))
    return parts


def key(chapter: Chapter, section: str, ordinal: int) -> str:
    return f"{chapter.stem} {section} {ordinal}"


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
    if not text.startswith(BANNER):
        return 1
    parts = split(text)
    for part in parts:
        if part.edited:
            return part.line
    pristine = _join(text.partition("\n# %% ")[0], [(part.key, part.code) for part in parts])
    pairs = zip(text.split("\n"), pristine.split("\n"), strict=False)
    return None if text == pristine else next((n for n, (a, b) in enumerate(pairs, 1) if a != b), 1)


def _join(banner: str, parts: list[tuple[str, str]]) -> str:
    """A package file: banner, then each part under its marker."""
    blocks = [f"# %% {name} {digest(code)}\n{code}\n" for name, code in parts]
    return f"{banner}\n" + "\n\n".join(blocks)


def _banner(files: str) -> str:
    return (
        f"{BANNER}{files} by `python -m literate tangle`.\n"
        "# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`."
    )


def _module(book: Book, name: str) -> str:
    pairs = book.modules[name]
    chapters = list({chapter.stem: chapter for chapter, _ in pairs}.values())
    titles = "; ".join(f"{chapter.number:02d}, {chapter.title}" for chapter in chapters)
    names = [name for _, export in pairs for name in export.names]
    head = f'"""Chapter{"s" * (len(chapters) > 1)} {titles}."""\n\n{_all(names)}'
    cells = [(key(chapter, export.section, export.ordinal), export.code) for chapter, export in pairs]
    text = _join(_banner(", ".join(chapter.file for chapter in chapters)), [("head", head), *cells])
    try:
        compile(text, name, "exec", dont_inherit=True)
    except SyntaxError as error:
        chapter, line = locate_part(book, text, error.lineno or 1)
        raise SourceError(chapter.file, line, f"syntax error in module {name}: {error.msg}; mend the cell") from None
    return text


def locate_part(book: Book, text: str, line: int) -> tuple[Chapter, int]:
    """The chapter and its line behind a line of a package file; LookupError when there is none."""
    cells = {key(c, e.section, e.ordinal): (c, e) for pairs in book.modules.values() for c, e in pairs}
    for part in split(text):
        if part.line <= line <= part.line + part.code.count("\n") and part.key in cells:
            chapter, export = cells[part.key]
            return chapter, export.line + line - part.line
    raise LookupError(line)


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
    return _join(_banner("chapters/*.md"), [("head", "\n".join(head))])


def _all(names: list[str]) -> str:
    return "\n".join(["__all__ = [", *(f'    "{name}",' for name in _sorted(names)), "]"])


def _sorted(names: list[str]) -> list[str]:
    """Constants, then classes, then functions, each by name."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[:1].isupper(), name))
