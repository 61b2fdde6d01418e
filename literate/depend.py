"""Which modules of the package a chapter's stored outputs depend on: read off the code, nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from literate.myst import SourceError
from literate.source import PACKAGE, Book, Cell, Chapter, digest, shown

MAGIC = re.compile(r"^(\s*)([%!].*)$", re.MULTILINE)


def fingerprint(book: Book, chapter: Chapter) -> dict[str, object]:
    """What the stored outputs were made from: the code cells and the modules they use."""
    code = "\n\0".join(shown(chapter.cells[index])[0] for index in code_cells(chapter))
    hashes = {name: digest("\n\0".join(e.code for _, e in book.modules[name])) for name in sorted(used(book, chapter))}
    return {"source": digest(code), "modules": hashes}


def code_cells(chapter: Chapter) -> list[int]:
    """The indices of the code cells that readers see."""
    return [n for n, cell in enumerate(chapter.cells) if cell.kind == "code" and shown(cell)[0].strip()]


def used(book: Book, chapter: Chapter) -> dict[str, int]:
    """The modules a chapter uses, directly or through others, with the line of the cell that brings each in."""
    lines: dict[str, int] = {}
    found = [(_mentions(syntax(chapter, cell)), cell.line) for cell in chapter.cells if cell.kind == "code"]
    aliases = frozenset().union(*(mentions.aliases for mentions, _ in found))
    for mentions, line in found:
        for module in mentions.modules(book, aliases):
            lines.setdefault(module, line)
    for module in list(lines):
        for name in _closure(book, {module}) - lines.keys():
            lines[name] = lines[module]
    return lines


def reached(book: Book, code: str) -> set[str]:
    """The modules that a piece of code uses, directly or through others."""
    mentions = _mentions(parsed(code))
    return _closure(book, set(mentions.modules(book, mentions.aliases)))


def _closure(book: Book, modules: set[str]) -> set[str]:
    todo, found = list(modules), set(modules)
    while todo:
        mentions = _mentions(parsed("\n".join(export.code for _, export in book.modules[todo.pop()])))
        new = set(mentions.modules(book, mentions.aliases)) - found
        found |= new
        todo += new
    return found


@cache
def parsed(code: str) -> ast.Module:
    return ast.parse(code)


def syntax(chapter: Chapter, cell: Cell) -> ast.Module:
    """A code cell's syntax tree; magics, which `check` reports, count as `pass`."""
    try:
        return parsed(cell.source)
    except SyntaxError as error:
        try:
            return parsed(MAGIC.sub(r"\1pass", cell.source))
        except SyntaxError:
            line = cell.line + (error.lineno or 1) - 1
            raise SourceError(chapter.file, line, f"syntax error: {error.msg}; mend the cell") from None


def magics(code: str) -> list[tuple[int, str]]:
    """The IPython magics in a cell, each with its line within."""
    try:
        parsed(code)
    except SyntaxError:
        return [(code.count("\n", 0, match.start(2)), match[2]) for match in MAGIC.finditer(code)]
    return []


@dataclass(frozen=True)
class Mentions:
    """How a piece of code names the package."""

    aliases: frozenset[str]  # the names under which it imports the package itself
    imports: tuple[str, ...]  # what it imports from the package
    attributes: tuple[tuple[str, str], ...]  # every `name.attribute`
    bare: frozenset[str]  # every name read otherwise

    def modules(self, book: Book, aliases: frozenset[str]) -> Iterator[str]:
        """The modules mentioned; a use of the package that cannot be told apart counts as all of them."""
        for name in [*self.imports, *(attribute for owner, attribute in self.attributes if owner in aliases)]:
            if name in book.modules:
                yield name
            elif name in book.public:
                yield book.public[name]
        if "*" in self.imports or self.bare & aliases:
            yield from book.modules


@cache
def _mentions(tree: ast.Module) -> Mentions:
    aliases, imports, attributes, owners, bare = set(), [], [], set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.split(".")[0] == PACKAGE]
            imports += [alias.name.split(".")[1] for alias in ours if "." in alias.name]
            aliases |= {alias.asname or PACKAGE for alias in ours if alias.name == PACKAGE or not alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            imports.append(node.module.split(".")[1])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.append((node.value.id, node.attr))
            owners.add(node.value)  # met before the name itself: the walk goes from the outside in
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node not in owners:
            bare.add(node.id)
    return Mentions(frozenset(aliases), tuple(imports), tuple(attributes), frozenset(bare))
