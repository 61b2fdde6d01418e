"""Which modules of the package a chapter's stored outputs depend on: read off the code, nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

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
    trees = [(syntax(chapter, cell), cell.line) for cell in chapter.cells if cell.kind == "code"]
    aliases = {alias for tree, _ in trees for alias in _aliases(tree)}
    for tree, line in trees:
        for module in _modules(book, tree, aliases):
            lines.setdefault(module, line)
    todo = list(lines)
    while todo:
        module = todo.pop()
        tree = ast.parse("\n".join(export.code for _, export in book.modules[module]))
        for name in _modules(book, tree, set(_aliases(tree))):
            if name not in lines:
                lines[name] = lines[module]
                todo.append(name)
    return lines


def syntax(chapter: Chapter, cell: Cell) -> ast.Module:
    """A code cell's syntax tree; magics, which `check` reports, count as `pass`."""
    try:
        return ast.parse(cell.source)
    except SyntaxError as error:
        try:
            return ast.parse(MAGIC.sub(r"\1pass", cell.source))
        except SyntaxError:
            line = cell.line + (error.lineno or 1) - 1
            raise SourceError(chapter.file, line, f"syntax error: {error.msg}; mend the cell") from None


def _aliases(tree: ast.Module) -> Iterator[str]:
    """The names under which code imports the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.asname or PACKAGE for a in node.names if a.name == PACKAGE or not a.asname)


def _modules(book: Book, tree: ast.Module, aliases: set[str]) -> Iterator[str]:
    """The modules that code names; a use of the package that cannot be told apart counts as all of them."""
    told: set[ast.AST] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            names = [node.module.split(".")[1]]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith(f"{PACKAGE}.")]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            told.add(node.value)
            names = [node.attr]
        for name in names:
            if name == "*":
                yield from book.modules
            elif name in book.modules:
                yield name
            elif name in book.public:
                yield book.public[name]
    bare = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in aliases and n not in told)
    if any(isinstance(node.ctx, ast.Load) for node in bare):
        yield from book.modules
