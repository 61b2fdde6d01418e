"""A class told in pieces: `@method_of(SGD)` cells, which stand inside the class body in the package."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from literate.myst import SourceError
from literate.names import parse

INDENT = "    "
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
WRITE = "write `@method_of(NAME)` alone on the line above a function, NAME being its class"
# What Python, or a decorator of the class, looks at when it makes the class: attached later it has no effect.
MAKING = {"__new__", "__init_subclass__", "__class_getitem__", "__eq__", "__post_init__"}


@dataclass(frozen=True)
class Piece:
    """An export cell of decorated functions: the class they belong to, and the cell as the package holds it."""

    owner: str
    methods: tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]
    code: str
    offsets: tuple[int, ...]  # the line of the cell behind each line of `code`


def decorated(node: ast.AST) -> list[ast.expr]:
    """The decorators of a definition that name `method_of`, however they write it."""
    return [found for found in getattr(node, "decorator_list", []) if re.search(r"\bmethod_of\b", ast.unparse(found))]


def read(code: str, file: str, line: int) -> Piece | None:
    """The piece that an export cell, which starts at `line` of `file`, holds; every malformed one raises."""
    tree = parse(code, file, line)

    def error(node: Any, message: str) -> SourceError:
        return SourceError(file, line + node.lineno - 1, message)

    found = [(node, marks) for node in ast.walk(tree) if (marks := decorated(node))]
    if not found:
        return None
    lines = code.split("\n")
    owner, dropped, methods = "", set(), []
    for node, marks in found:
        mark = marks[0]
        if len(marks) > 1 or node.decorator_list[0] is not mark or node not in tree.body:
            raise error(mark, f"`method_of` not above all other decorators, once, at the top level; {WRITE}")
        written = re.fullmatch(r"@method_of\((\w+)\)", lines[mark.lineno - 1])
        if not written:
            raise error(mark, f"`{lines[mark.lineno - 1].strip()}` cannot be read; {WRITE}")
        if not isinstance(node, FUNCTIONS):
            raise error(node, f"`@method_of` over something that is no function; {WRITE}")
        owner = owner or written[1]
        if written[1] != owner:
            raise error(mark, f"methods of {owner} and of {written[1]} in one cell; give each class a cell of its own")
        methods.append(node)
        dropped.add(mark.lineno - 1)
        _same_in_both_worlds(node, owner, error)
    for node in tree.body:
        if not decorated(node):
            raise error(node, f"a cell with methods of {owner} holds something else; move it to a cell of its own")
    kept = tuple(n for n in range(len(lines)) if n not in dropped)
    piece = Piece(owner, tuple(methods), "\n".join(_indented(lines[n]) for n in kept), kept)
    if changed := _changed(piece.code, ast.parse(code)):
        remedy = "write it in one line, or as a constant outside the class"
        raise error(changed, f"a string over several lines, which indentation in the class would change; {remedy}")
    if restore(piece.code, owner, file, line) != code:
        raise error(tree.body[0], f"a comment between decorators; {WRITE}")
    return piece


def _same_in_both_worlds(function: Any, owner: str, error: Callable[[Any, str], SourceError]) -> None:
    """Refuse what means one thing in a class body and another in a function that is attached to the class."""
    if function.name in MAKING:
        raise error(function, f"{function.name} is looked for when {owner} is made; write it in the class's own cell")
    todo: list[ast.AST] = [function]
    while todo:
        node = todo.pop()
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
        if private := [name for name in names if isinstance(name, str) and re.fullmatch(r"__\w*[^\W_]_?", name)]:
            raise error(node, f"{private[0]} means another name inside a class; give it one underscore")
        if isinstance(node, ast.Call) and ast.unparse(node) == "super()":
            raise error(node, f"super() finds no class in a notebook's function; write super({owner}, self)")
        if isinstance(node, ast.Name) and node.id == "__class__":
            raise error(node, f"__class__ finds no class in a notebook's function; write {owner}")
        todo += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.ClassDef)]


def _indented(text: str) -> str:
    return INDENT + text if text.strip() else text


def _changed(body: str, tree: ast.Module) -> ast.AST | None:
    """The first string that is another one inside a class; docstrings are compared as they are shown."""
    inside = ast.parse(f"class _:\n{body}").body[0]
    for node in [n for root in (tree, inside) for n in ast.walk(root)]:
        if isinstance(node, FUNCTIONS | ast.ClassDef) and ast.get_docstring(node) is not None and node is not inside:
            node.body[0].value.value = inspect.cleandoc(node.body[0].value.value)
    for function in tree.body:
        function.decorator_list = function.decorator_list[1:]
    for old, new in zip(tree.body, inside.body, strict=True):
        for a, b in zip(ast.walk(old), ast.walk(new), strict=True):
            if isinstance(a, ast.Constant) and a.value != b.value:
                return a
    return None


def dedent(code: str, owner: str, file: str, line: int) -> str:
    """A piece of the package, which starts at `line` of `file`, without the indentation of its class."""
    lines = code.split("\n")
    for number, text in enumerate(lines):
        if text.strip() and not text.startswith(INDENT):
            raise SourceError(file, line + number, f"not indented as a method of {owner}; indent it, or move it out")
    return "\n".join(text.removeprefix(INDENT) if text.strip() else text for text in lines)


def restore(code: str, owner: str | None, file: str, line: int) -> str:
    """Code of the package as the chapter writes it: of a class `owner`, each function under its `@method_of`."""
    code = dedent(code, owner, file, line) if owner else code
    tree = parse(code, file, line)
    lines = code.split("\n")
    for node in reversed(tree.body) if owner else ():
        if not isinstance(node, FUNCTIONS):
            message = f"something that is no method among those of {owner}; move it to the class's own cell"
            raise SourceError(file, line + node.lineno - 1, message)
        first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
        lines.insert(first - 1, f"@method_of({owner})")
    return "\n".join(lines)


def arrange(pairs: list[tuple[Any, Any]], modules: dict[str, str]) -> list[tuple[Any, Any]]:
    """The (chapter, export) pairs of a module as the package holds them: the pieces of a class after its cell.

    `modules` names the module of every public name of the book.
    """
    followers: dict[int, list[tuple[Any, Any]]] = {}
    inside: dict[int, dict[str, str]] = {}
    for position, (chapter, export) in enumerate(pairs):
        if export.piece is None:
            continue
        owner = export.piece.owner
        first = export.line + export.piece.methods[0].lineno - 1
        above = [n for n in range(position) if owner in _classes(pairs[n][1])]
        if not above and modules.get(owner, export.module) != export.module:
            message = f"{owner} is a class of module {modules[owner]}; export this cell to that module"
            raise SourceError(chapter.file, first, message)
        if not above:
            message = f"no cell above exports a class {owner} to module {export.module}; mend the name or the order"
            raise SourceError(chapter.file, first, message)
        home, cell = pairs[above[0]]
        names = inside.setdefault(above[0], _bound(owner, home, cell, chapter.file, first))
        for method in export.piece.methods:
            line = export.line + method.lineno - 1
            if method.name in names:
                message = f"{owner}.{method.name} is already defined at {names[method.name]}; rename or remove one"
                raise SourceError(chapter.file, line, message)
            for name in _needed_at_once(method):
                if name in {owner, *names}:
                    message = f"{name} has another meaning, or none yet, in the body of {owner}; quote it or rename it"
                    raise SourceError(chapter.file, line, message)
            names[method.name] = f"{chapter.file}:{line}"
        followers.setdefault(above[0], []).append((chapter, export))
    order = []
    for position, (chapter, export) in enumerate(pairs):
        if export.piece is None:
            order += [(chapter, export), *followers.get(position, [])]
    return order


def _classes(export: Any) -> list[str]:
    return [] if export.piece else [n.name for n in ast.parse(export.code).body if isinstance(n, ast.ClassDef)]


def _bound(owner: str, home: Any, cell: Any, file: str, line: int) -> dict[str, str]:
    """The names in the body of a class that is told in pieces, each with its place; the class must take them."""
    tree = ast.parse(cell.code)
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner)
    place = f"{home.file}:{cell.line + node.lineno - 1}"
    if node is not tree.body[-1]:
        raise SourceError(file, line, f"{owner} does not end its cell ({place}); move what follows it to another cell")
    if node.body[0].lineno == node.lineno or node.body[0].col_offset != len(INDENT):
        raise SourceError(file, line, f"the body of {owner} ({place}) does not stand below it, four spaces in; mend it")
    names = {}
    for statement in node.body:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        found = [n.id for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name)]
        if isinstance(statement, FUNCTIONS | ast.ClassDef):
            found = [statement.name]
        elif isinstance(statement, ast.AnnAssign) and statement.value is None:
            found = []  # a declaration of what a piece may define
        names |= {name: f"{home.file}:{cell.line + statement.lineno - 1}" for name in found}
    return names


def _needed_at_once(method: Any) -> list[str]:
    """The names that are looked up where a method is defined: in its decorators, defaults and annotations."""
    parts = [*method.decorator_list[1:], method.args, *([method.returns] if method.returns else [])]
    return [node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name)]
