"""Which names a cell binds at its top level, whatever path its code takes."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from literate.myst import SourceError


def parse(code: str, file: str, line: int) -> ast.Module:
    """The syntax tree of code that starts at `line` of `file`."""
    try:
        return ast.parse(code)
    except SyntaxError as error:
        raise SourceError(file, line + (error.lineno or 1) - 1, f"syntax error: {error.msg}; mend it") from None


def public(code: str, file: str, line: int) -> tuple[str, ...]:
    """The public names that code binds at its top level, imports apart; one that may be left unbound raises."""
    flow = _Flow()
    end = flow.block(parse(code, file, line).body, _State()) or _State()
    names = [name for name in flow.lines if name in end.possible and not name.startswith("_")]
    for name in names:
        if name not in end.sure:
            what = f"{name} may be left unbound; bind it on every path, or begin its name with _"
            raise SourceError(file, line + flow.lines[name] - 1, what)
    return tuple(names)


def undone(code: str) -> dict[str, int]:
    """The names that code deletes without having bound them, each with its line."""
    flow = _Flow()
    flow.block(ast.parse(code).body, _State())
    return flow.undone


@dataclass(frozen=True)
class _State:
    """The names that are bound at some point of the code: on every path to it, and on some path."""

    sure: frozenset[str] = frozenset()
    possible: frozenset[str] = frozenset()

    def bind(self, names: Iterable[str]) -> _State:
        new = frozenset(names)
        return _State(self.sure | new, self.possible | new)

    def delete(self, names: Iterable[str]) -> _State:
        gone = frozenset(names)
        return _State(self.sure - gone, self.possible - gone)


def _join(*states: _State | None) -> _State | None:
    """Where paths meet; `None` is a path that ended in a `raise`."""
    live = [state for state in states if state is not None]
    if not live:
        return None
    sure = frozenset.intersection(*(state.sure for state in live))
    return _State(sure, frozenset.union(*(state.possible for state in live)))


@dataclass
class _Flow:
    """Follows the statements of a cell; `lines` says where each name is first bound other than by an import."""

    lines: dict[str, int] = field(default_factory=dict)
    undone: dict[str, int] = field(default_factory=dict)

    def block(self, body: list[ast.stmt], state: _State) -> _State | None:
        for node in body:
            after = self.statement(node, state)
            if after is None:
                return None
            state = after
        return state

    def statement(self, node: ast.stmt, state: _State) -> _State | None:
        for child in ast.iter_child_nodes(node):
            state = self.walrus(child, state, sure=not isinstance(node, ast.Assert))
        match node:
            case ast.Import() | ast.ImportFrom():
                return state.bind((alias.asname or alias.name).split(".")[0] for alias in node.names)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                return self.bind(node, [node.name], state)
            case ast.Assign(targets=targets):
                return self.bind(node, _named(targets), state)
            case ast.AnnAssign(value=ast.expr(), target=target) | ast.AugAssign(target=target):
                return self.bind(node, _named([target]), state)
            case ast.Delete(targets=targets):
                names = list(_named(targets, ast.Del))
                self.undone |= {name: node.lineno for name in names if name not in state.possible}
                return state.delete(names)
            case ast.Raise():
                return None
            case ast.If():
                return _join(self.block(node.body, state), self.block(node.orelse, state))
            case ast.For() | ast.AsyncFor() | ast.While():
                inside = self.bind(node, _named([node.target] if hasattr(node, "target") else []), state)
                ran = _join(state, self.block(node.body, inside))
                ended = self.block(node.orelse, ran)
                return _join(ran, ended) if any(isinstance(n, ast.Break) for n in ast.walk(node)) else ended
            case ast.With() | ast.AsyncWith():
                inside = self.bind(node, _named([i.optional_vars for i in node.items if i.optional_vars]), state)
                swallows = any("suppress" in ast.unparse(item.context_expr) for item in node.items)
                return _join(self.block(node.body, inside), *([state] if swallows else []))
            case ast.Match():
                return self.cases(node, state)
            case ast.Try() | ast.TryStar():
                return self.attempt(node, state)
        if type(node).__name__ == "TypeAlias":  # Python 3.12
            return self.bind(node, [node.name.id], state)
        return state

    def cases(self, node: ast.Match, state: _State) -> _State | None:
        ends, complete = [], False
        for case in node.cases:
            captures = [getattr(p, "name", None) or getattr(p, "rest", None) for p in ast.walk(case.pattern)]
            ends.append(self.block(case.body, self.bind(case.pattern, filter(None, captures), state)))
            complete |= isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None and case.guard is None
        return _join(*ends, *([] if complete else [state]))

    def attempt(self, node: ast.Try | ast.TryStar, state: _State) -> _State | None:
        tried = self.block(node.body, state)
        ends = [tried and self.block(node.orelse, tried)]
        start = _join(state, tried)  # of a handler, which may have come from anywhere in the body
        start = replace(start, sure=start.sure - set(_named(node.body, ast.Del)))
        for handler in node.handlers:
            end = self.block(handler.body, start)
            ends.append(end.delete([handler.name]) if end and handler.name else end)
        end = _join(*ends)
        last = self.block(node.finalbody, end or state)
        return end and last

    def bind(self, node: ast.AST, names: Iterable[str], state: _State) -> _State:
        names = list(names)
        for name in names:
            self.lines.setdefault(name, node.lineno)
        return state.bind(names)

    def walrus(self, node: ast.AST, state: _State, *, sure: bool) -> _State:
        """What `:=` binds within an expression; in a part that may not be evaluated, perhaps."""
        if isinstance(node, ast.stmt | ast.Lambda | ast.ExceptHandler | ast.match_case):
            return state
        children = list(ast.iter_child_nodes(node))
        match node:  # which of its parts Python always evaluates
            case ast.BoolOp():
                always = node.values[:1]
            case ast.IfExp():
                always = [node.test]
            case ast.Compare():
                always = [node.left, node.comparators[0]]
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                always = []
            case _:
                always = children
        for child in children:
            state = self.walrus(child, state, sure=sure and child in always)
        if isinstance(node, ast.NamedExpr):
            bound = self.bind(node, [node.target.id], state)
            return bound if sure else replace(bound, sure=state.sure)
        return state


def _named(targets: Iterable[ast.AST], context: type[ast.expr_context] = ast.Store) -> Iterator[str]:
    found = (n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
    return (n.id for n in found if isinstance(n.ctx, context))
