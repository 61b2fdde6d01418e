"""Edits made in the package, carried back to the chapter cells they came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from literate import pieces
from literate.files import commit
from literate.myst import SourceError
from literate.source import PACKAGE, Book, Chapter, Export
from literate.tangle import BANNER, Part, intact, key, package, split


@dataclass(frozen=True)
class Edit:
    """A package cell that differs from the chapter cell it came from."""

    file: Path
    line: int
    code: str
    chapter: Chapter
    export: Export


def untangle(book: Book) -> list[Edit]:
    """Write the cells edited in the package into their chapters, and tangle afresh. A conflict changes nothing.

    A marker holds the hash of its cell as it was tangled: a chapter cell that still has that hash takes the edit.
    """
    found = [edit for path in sorted((book.root / PACKAGE).glob("*.py")) for edit in edits(book, path)]
    texts: dict[Path, str] = {}
    for edit in sorted(found, key=lambda edit: -edit.export.line):  # from below, so that lines above keep their numbers
        path, start = edit.chapter.path, edit.export.line - 1
        lines = texts.get(path, path.read_text("utf-8")).split("\n")
        lines[start : start + edit.export.code.count("\n") + 1] = edit.code.split("\n")
        texts[path] = "\n".join(lines)
    try:
        after = Book.load(book.root, texts)
    except SourceError as error:
        near = [edit for edit in found if edit.chapter.file == error.file and edit.export.line <= error.line] or found
        edit = max(near, key=lambda edit: edit.export.line)
        raise SourceError(edit.file, edit.line, f"the chapter cannot hold this edit ({error.message})") from None
    for edit in found:
        if all(export.code != edit.code for _, export in after.modules.get(edit.export.module, [])):
            raise SourceError(edit.file, edit.line, "the chapter cannot hold this edit; does it hold a code fence?")
    commit(book.root, {**texts, **package(after)})
    return found


def edits(book: Book, path: Path) -> Iterator[Edit]:
    """The edits in one package file; whatever cannot be carried back raises."""
    file = path.relative_to(book.root)
    text = path.read_text("utf-8")
    if not text.startswith(BANNER):
        if BANNER in text:
            raise SourceError(file, 1, "text above the banner; remove it, or run `tangle --force` to restore the file")
        raise SourceError(file, 1, "not a generated file; move its code to an export cell of a chapter, and remove it")
    parts = split(text)
    home = book.modules.get(path.stem, [])
    gone = {key(c, e) for c, e in home} - {part.key for part in parts}
    if not intact(text):
        if gone:
            raise SourceError(file, 1, f"no marker `# %% {sorted(gone)[0]} …`; put it back, or run `tangle --force`")
        raise SourceError(file, 1, "an edit outside the cells; undo it, or run `tangle --force` to restore the file")
    for part in parts[1:]:
        if part.edited:
            yield from _edit(home, file, part)


def _edit(home: list[tuple[Chapter, Export]], file: Path, part: Part) -> Iterator[Edit]:
    same = [(c, e) for c, e in home if key(c, e) == part.key]
    chapter, export = (
        next((p for p in same if p[1].hash == part.hash), None)
        or next((p for p in home if p[1].hash == part.hash), None)
        or next(iter(same), (None, None))
    )
    if chapter is None:
        raise SourceError(file, part.line, f"conflict: edited here, and its cell {part.key} is gone from the chapter")
    if export.packaged == part.code:
        return
    if export.hash != part.hash:
        where = f"{chapter.file}:{export.line}"
        raise SourceError(file, part.line, f"conflict: edited here and at {where}; undo one of the edits")
    if not part.code:
        raise SourceError(file, part.line, f"the cell is empty; remove it in {chapter.file}:{export.line} instead")
    code = pieces.restore(part.code, export.piece and export.piece.owner, str(file), part.line)
    yield Edit(file, part.line, code, chapter, export)
