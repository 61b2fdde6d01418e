"""The public names of a cell: bound on every path, or refused."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from literate.names import public, undone
from literate.source import SourceError


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("A, (b, *c) = 1, (2, 3)\n_d = 4", "A b c"),
        ("x: int\ny: int = 1", "y"),
        ("x = 1\ndel x\ny = 2", "y"),
        ("x = 1\ndel x\nx = 2", "x"),
        ("if c:\n    x = 1\nelse:\n    def x(): pass", "x"),
        ("if c:\n    x = 1\nelse:\n    raise OSError", "x"),
        ("try:\n    from a import x\nexcept ImportError:\n    x = None", "x"),
        ("try:\n    x = 1\nexcept E as e:\n    raise\nelse:\n    y = 1\nfinally:\n    z = 1", "x y z"),
        ("try:\n    x = 1\nexcept* OSError:\n    x = 2", "x"),
        ("with a as x, b as (y, z):\n    w = 1", "x y z w"),
        ("match c:\n    case 1:\n        x = 1\n    case _:\n        x = 2", "x"),
        ("match c:\n    case x:\n        y = x", "x y"),
        ("for _i in a:\n    pass\nelse:\n    x = 1", "x"),
        ("while (x := f()) > 1:\n    pass", "x"),
        ("print(x := 1, [y := 2])", "x y"),
        ("if (x := f()) and x > 1:\n    pass", "x"),
        ("f = lambda: (x := 1)", "f"),
        ("import a\nfrom b import c", ""),
        ("class A:\n    b = 1\n    def c(self): ...\nasync def d(): ...", "A d"),
        ("x = []\nx += [1]\nx.y = x[0] = 2", "x"),
    ],
)
def test_names(code, names):
    assert public(code, "f", 1) == tuple(names.split())


@pytest.mark.parametrize(
    ("code", "name", "line"),
    [
        ("if c:\n    x = 1", "x", 2),
        ("if c:\n    x = 1\nelif d:\n    x = 2", "x", 2),
        ("for x in a:\n    pass", "x", 1),
        ("for _i in a:\n    x = 1", "x", 2),
        ("while c:\n    x = 1", "x", 2),
        ("for _i in a:\n    break\nelse:\n    x = 1", "x", 4),
        ("try:\n    import g\nexcept E:\n    h = 0", "h", 4),
        ("try:\n    x = 1\nexcept E:\n    pass", "x", 2),
        ("try:\n    x = f()\nexcept* E:\n    pass", "x", 2),
        ("match c:\n    case 1:\n        x = 1", "x", 3),
        ("match c:\n    case [x, *_]:\n        pass", "x", 2),
        ("match c:\n    case x if x:\n        pass", "x", 2),
        ("with suppress(OSError):\n    x = 1", "x", 2),
        ("a = 1\nif a or (x := 2):\n    pass", "x", 2),
        ("a = 1 if 2 else (x := 3)", "x", 1),
        ("_ = [x := y for y in z]", "x", 1),
        ("x = 1\nif c:\n    del x", "x", 1),
        ("assert (x := 1)", "x", 1),
        ("x = 1\ntry:\n    del x\n    x = f()\nexcept E:\n    pass", "x", 1),
        ("x = 1\ntry:\n    del x\nexcept E:\n    pass\nelse:\n    x = 2", "x", 1),
    ],
)
def test_names_that_may_be_unbound(code, name, line):
    with pytest.raises(SourceError, match=f"f:{line + 10}: {name} may be left unbound; bind it on every path"):
        public(code, "f", 11)
    assert name not in public(re.sub(rf"\b{name}\b", f"_{name}", code), "f", 1)


def test_undone():
    assert undone("x = 1\ndel x\ndel y\ndel x") == {"y": 3, "x": 4}


SIMPLE = ["a = 1", "b = 2", "del a", "import a", "(b := 3)", "a: int", "def a(): pass", "raise E", "c() and (b := 1)"]
FORMS = [
    "if c():\n{}\nelse:\n{}", "if c():\n{}", "for b in range(c()):\n{}", "for _i in range(c()):\n{}\nelse:\n{}",
    "try:\n    raise_some()\n{}\nexcept E:\n{}", "try:\n{}\nfinally:\n{}",
    "match c():\n    case 0:\n{}\n    case a:\n{}",
    "try:\n{}\n    raise_some()\nexcept E as b:\n{}\nelse:\n    a = 1", "with suppress(E):\n    raise_some()\n{}",
]  # fmt: skip


def compound(blocks):
    def build(form, parts):
        deep = "        " if form.startswith("match") else "    "
        bodies = iter(["\n".join(deep + row for row in "\n".join(part).split("\n")) for part in parts])
        return re.sub(r"\{\}", lambda _: next(bodies), form)

    return st.builds(build, st.sampled_from(FORMS), st.lists(blocks, min_size=2, max_size=2))


statements = st.recursive(
    st.sampled_from(SIMPLE), lambda inner: compound(st.lists(inner, min_size=1, max_size=3)), max_leaves=6
)


class E(Exception):
    pass


@settings(max_examples=300, deadline=None)
@given(st.lists(statements, min_size=1, max_size=4))
def test_every_run_binds_them(parts):
    """Code is run with every outcome of its conditions: whatever ends well has bound exactly the public names."""
    code = "\n".join(parts).replace("import a", "import os as a")
    try:
        names = set(public(code, "f", 1))
    except SourceError:
        return
    for outcome in itertools.product([0, 1], repeat=4):
        bits = itertools.cycle(outcome)

        def raise_some(bits=bits):
            if next(bits):
                raise E

        world = {"c": lambda bits=bits: next(bits), "E": E, "raise_some": raise_some}
        world["suppress"] = __import__("contextlib").suppress
        try:
            exec(code, world)
        except (E, NameError):
            continue
        assert names <= world.keys(), (code, outcome)
