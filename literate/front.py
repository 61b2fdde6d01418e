"""The race as the front page has it: the stored runs, whether they are current, and the scripts that carry them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from literate.depend import reached
from literate.myst import SourceError
from literate.source import Book, digest

RACE = Path(__file__).with_name("race.py")
STORE = "chapters/race.json"


def current(book: Book) -> str:
    """What the store depends on: the race and every module that it uses."""
    code = RACE.read_text("utf-8")
    modules = reached(book, code)
    text = [code, *(e.code for m in sorted(modules) for _, e in book.modules[m])]
    return digest("\n\0".join(text))


def stored(book: Book) -> dict[str, Any]:
    """The stored race; SourceError where it is not what the package gives today."""
    path, remedy = book.root / STORE, "run `python -m literate race`"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise SourceError(STORE, 1, f"no race for the front page; {remedy}") from None
    if found.get("source") != current(book):
        raise SourceError(STORE, 1, f"the race, or the package that ran it, has changed since; {remedy}")
    return found


def stale(book: Book) -> str:
    """Why the stored race cannot be shown, if so."""
    try:
        stored(book)
    except SourceError as error:
        return str(error)
    return ""


def shown(book: Book) -> bool:
    """Whether the front page has the race."""
    index = book.root / "chapters/index.md"
    return index.exists() and "gd-race" in index.read_text("utf-8")


def publish(book: Book, static: Path, *, draft: bool) -> None:
    """One script for each landscape beside the pages; a script, unlike a fetch, also loads from file://."""
    if not shown(book):
        return
    if draft and not (book.root / STORE).exists():
        return
    race = json.loads((book.root / STORE).read_text("utf-8")) if draft else stored(book)
    common = {key: race[key] for key in ("steps", "columns", "rows", "scales", "near", "units", "wide", "high")}
    pages = {f"{chapter.number:02d}": f"{chapter.stem}.html" for chapter in book.chapters}
    (static / "race").mkdir()
    for land in race["landscapes"]:
        for method in land["methods"]:
            method["page"] = pages.get(method["chapter"], "#")
        text = json.dumps(common | land, ensure_ascii=False, separators=(",", ":"))
        (static / f"race/{land['name']}.js").write_text(f'guidedDescentRace("{land["name"]}",{text});\n', "utf-8")
