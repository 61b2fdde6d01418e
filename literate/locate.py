"""From a line of the package to the line of the chapter behind it, and the reverse."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

from literate.myst import SourceError
from literate.source import PACKAGE, Book
from literate.tangle import key, split


def locate(book: Book, place: str) -> str:
    """The other end of `FILE:LINE`."""
    name, _, number = place.rpartition(":")
    if not name or not number.isdigit() or int(number) < 1:
        raise SourceError(name or place, 1, "not a place; write FILE:LINE")
    line = int(number)
    path = Path(name).resolve() if Path(name).exists() else (book.root / name).resolve()
    for module, pairs in book.modules.items():
        target = book.root / PACKAGE / f"{module}.py"
        parts = {part.key: part for part in split(target.read_text("utf-8"))} if target.exists() else {}
        for chapter, export in pairs:
            part = parts.get(key(chapter, export))
            here = path == target and part and part.line <= line <= part.end
            there = path == chapter.path and export.line <= line <= export.line + export.code.count("\n")
            if (here or there) and (part is None or part.code != export.packaged):
                raise SourceError(
                    name, line, "this cell differs between chapter and package; run `tangle` or `untangle`"
                )
            if here:
                return f"{chapter.file}:{export.line + export.offsets[line - part.line]}"
            if there:
                at = bisect_left(export.offsets, line - export.line)  # of a decorator: of the line under it
                return f"{target.relative_to(book.root)}:{part.line + at}"
    if not path.exists():
        raise SourceError(name, line, "no such file; give a file of the package or a chapter")
    raise SourceError(name, line, "this line is in no export cell; give a line of code that a chapter exports")
