"""A class told in pieces: inside its class in the package, each piece at home in its chapter."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guided_descent.book import method_of
from literate.source import Book

CHAPTER, MODULE = "chapters/01_first.md", "guided_descent/maths.py"
TEXT = '''\
(ch-first)=
# First things

(sec-class)=
## A class

```{code-cell} python
#| default_exp maths
```

```{code-cell} python
#| export
class Base:
    def name(self):
        return "base"


class Point(Base):
    """A point."""

    color: str

    def __init__(self, x):
        self.x = x
```

```{code-cell} python
#| export
LIMIT = 10
```

(sec-methods)=
## Its methods

```{code-cell} python
#| export
# twice as far
@method_of(Point)
def double(self):
    """Twice

    as far."""
    return Point(2 * self.x)

# from nowhere
@method_of(Point)
@staticmethod
def origin(
    x=0,
):
    return Point(x)
```

```{code-cell} python
:tags: [hide-input]
#| export
@method_of(Point)
@property
def half(self):
    return self.x / 2
```
'''
INSIDE = '''
    # %% 01_first sec-methods 1 {}
    # twice as far
    def double(self):
        """Twice

        as far."""
        return Point(2 * self.x)

    # from nowhere
    @staticmethod
    def origin(
        x=0,
    ):
        return Point(x)

    # %% 01_first sec-methods 2 {}
    @property
    def half(self):
        return self.x / 2
'''


@pytest.fixture
def told(shelf):
    """A book with a class in pieces, tangled."""
    shelf.write(CHAPTER, shelf.front + TEXT)
    assert shelf.run("tangle") == 0, shelf.err
    return shelf


def test_pieces_stand_inside_the_class(told):
    text = told.read(MODULE)
    inside = INSIDE.format(*re.findall(r"^    # %% .* (\w{8})$", text, re.MULTILINE))
    assert f"        self.x = x\n{inside}\n\n# %% 01_first sec-class 2 " in text
    assert '__all__ = [\n    "LIMIT",\n    "Base",\n    "Point",\n]' in text
    assert "method_of" not in text
    code = "from guided_descent import Point; print(Point.origin(2).double().half, Point(1).name())"
    result = subprocess.run([sys.executable, "-c", code], cwd=told.root, capture_output=True, text=True, check=True)
    assert result.stdout == "2.0 base\n"
    assert told.run("tangle") == 0
    assert told.out == "the package is up to date\n"


def test_both_worlds_are_one(told):
    """The notebook's cells, run as they are, and the package give the same class."""
    notebook, package = {"method_of": method_of, "double": "mine"}, {}
    for _, export in sorted(Book.load().modules["maths"], key=lambda pair: pair[1].line):
        exec(export.code, notebook)
    exec(told.read(MODULE), package)
    for world in (notebook, package):
        Point = world["Point"]
        assert (Point(3).double().x, Point.origin(4).x, Point(3).half, Point(3).name()) == (6, 4, 1.5, "base")
        assert Point.double.__doc__.split() == ["Twice", "as", "far."]
        assert isinstance(vars(Point)["origin"], staticmethod) and isinstance(vars(Point)["half"], property)
    assert notebook["double"] == "mine" and notebook["half"] is None


def test_edits_of_pieces_go_back(told):
    before = told.read(CHAPTER)
    told.edit(MODULE, "return Point(2 * self.x)", "x = self.x\n\n        return Point(x + x)")
    told.edit(MODULE, "    @staticmethod\n    def origin(", "    @staticmethod\n    # why\n    def origin(")
    told.edit(MODULE, "        return self.x / 2", "        return self.x / 2\n\n    def new(self): ...")
    told.edit(MODULE, "        self.x = x", "        self.x = x\n        self.color = None")
    assert told.refuses("tangle").startswith(f"{MODULE}:{told.line(MODULE, 'class Base')}: edited by hand")
    assert told.run("untangle") == 0, told.err
    assert told.out.count("->") == 3
    assert told.read(CHAPTER) == (
        before.replace("return Point(2 * self.x)", "x = self.x\n\n    return Point(x + x)")
        .replace("@staticmethod\ndef origin(", "@staticmethod\n# why\ndef origin(")
        .replace("return self.x / 2", "return self.x / 2\n\n@method_of(Point)\ndef new(self): ...")
        .replace("        self.x = x", "        self.x = x\n        self.color = None")
    )
    assert told.run("tangle") == 0
    assert told.out == "the package is up to date\n"


def test_locate(told):
    for text in ("# twice as far", "def double", "return Point(2", "# from nowhere", "    x=0,", "@property", "/ 2"):
        here = f"{CHAPTER}:{told.line(CHAPTER, text)}"
        there = f"{MODULE}:{told.line(MODULE, text)}"
        for one, other in ((here, there), (there, here)):
            assert told.run("locate", one) == 0, told.err
            assert told.out == other + "\n"
    lines = told.read(CHAPTER).split("\n")
    second = [n for n, row in enumerate(lines, 1) if row.startswith("@method_of")][1]
    assert told.run("locate", f"{CHAPTER}:{second}") == 0
    assert told.out == f"{MODULE}:{told.line(MODULE, '@staticmethod')}\n"


def test_check_finds_edits_and_methods_that_are_not_exported(told):
    told.edit(MODULE, "return self.x / 2", "return 0.5 * self.x")
    text = told.read(CHAPTER).replace("#| export\n@method_of(Point)\n@property", "@method_of(Point)\n@property")
    told.write(CHAPTER, text)
    assert told.run("check") == 1
    assert f"{MODULE}:{told.line(MODULE, '@property')}: edited by hand" in told.out
    line = told.line(CHAPTER, "@property") - 1
    assert f"{CHAPTER}:{line}: a method of Point that the package lacks; add `#| export`" in told.out


@pytest.mark.parametrize(
    ("old", "new", "message", "at"),
    [
        ("return self.x / 2\n", "return self.x /\n", "syntax error", "self.x /"),
        ("return self.x / 2\n", "return self.x / 2\n\nX = 1\n", "not indented as a method of Point", "X = 1"),
        ("return self.x / 2\n", "return self.x / 2\n\n    X = 1\n", "no method among those of Point", "X = 1"),
        ("        as far.", "as far.", "not indented as a method of Point", "as far."),
        ("        self.x = x\n", "        self.x = x\n\n\nX = 1\n", "Point does not end its cell", "class Base"),
        ("    def double(self)", "    def half(self)", "Point.half is already defined", "# twice"),
        ("return self.x / 2", "return super().x / 2", "super() finds no class", "@property"),
    ],
)
def test_edits_that_no_piece_can_hold(told, old, new, message, at):
    told.edit(MODULE, old, new)
    said = told.refuses("untangle")
    assert message in said
    assert said.startswith(f"{MODULE}:{told.line(MODULE, at)}: "), said


def test_a_piece_of_a_later_chapter(told):
    cell = "```{code-cell} python\n#| export maths\n@method_of(Point)\ndef far(self):\n    return 9\n```\n"
    told.write("chapters/02_b.md", f"{told.front}(ch-b)=\n# B\n\n{cell}")
    assert told.run("tangle") == 0, told.err
    text = told.read(MODULE)
    assert '"""Chapters 01, First things; 02, B."""' in text
    places = [text.index(part) for part in ("def half", "    # %% 02_b ch-b 1 ", "def far", "LIMIT = 10")]
    assert places == sorted(places)


def test_hash_of_a_piece_is_that_of_its_text_in_the_package(told):
    """A marker that moves to another class, or out of one, is noticed."""
    text = told.read(MODULE)
    told.write(MODULE, text.replace("    # %% 01_first sec-methods 2", "# %% 01_first sec-methods 2"))
    assert told.refuses("tangle").startswith(f"{MODULE}:1: edited by hand")


HALF = "@method_of(Point)\n@property\ndef half(self):\n    return self.x / 2"
MARK = "@method_of(Point)\n"
BODY = '    """A point."""\n\n    color: str\n\n    def __init__(self, x):\n        self.x = x'
MALFORMED = {
    "unknown class": (HALF, HALF.replace("Point", "Pint"), "def half", "no cell above exports a class Pint to module"),
    "no class": (HALF, HALF.replace("Point", "LIMIT"), "def half", "no cell above exports a class LIMIT"),
    "another module": ("#| export\n" + HALF, "#| export other\n" + HALF, "def half", "a class of module maths"),
    "twice in a cell": ("def origin", "def double", "def double(\n", "Point.double is already defined at"),
    "twice": ("def half", "def double", "def double(self):\n    return self.x", "Point.double is already defined at"),
    "in the class": ("def half", "def __init__", "def __init__(self):", "Point.__init__ is already defined at"),
    "something else": (HALF, HALF + "\n\nX = 1", "X = 1", "a cell with methods of Point holds something else"),
    "an import": (HALF, "import math\n\n" + HALF, "import math", "holds something else"),
    "a class": ("@property\ndef half(self):\n    return self.x / 2", "class A: ...", "class A", "no function"),
    "two arguments": ("(Point)\n@property", "(Point, 1)\n@property", "@method_of(Point, 1)", "cannot be read"),
    "a string": ("(Point)\n@property", '("Point")\n@property', '@method_of("Point")', "cannot be read"),
    "an attribute": ("(Point)\n@property", "(gd.Point)\n@property", "@method_of(gd.Point)", "cannot be read"),
    "no argument": ("(Point)\n@property", "\n@property", "@method_of\n@property", "cannot be read"),
    "by its module": ("@method_of(Point)\n@property", "@b.method_of(Point)\n@property", "@b.method", "cannot be read"),
    "a comment": ("(Point)\n@property", "(Point)  # x\n@property", "@method_of(Point)  # x", "cannot be read"),
    "not outermost": ("@method_of(Point)\n@property", "@property\n@method_of(Point)", MARK + "def half", "not above"),
    "marked twice": ("@property\n", "@method_of(Point)\n", "@method_of(Point)\n@method_of", "not above"),
    "nested": (HALF, "if True:\n" + textwrap.indent(HALF, "    "), "    @method_of", "at the top level"),
    "comment between": ("(Point)\n@property", "(Point)\n# x\n@property", "def half", "a comment between decorators"),
    "two classes": ("(Point)\n@staticmethod", "(Base)\n@staticmethod", "@method_of(Base)", "and of Base"),
    "super": ("self.x / 2", "super().x", "super().x", "write super(Point, self)"),
    "super inside": ("self.x / 2", "(lambda: super().x)()", "(lambda", "write super(Point, self)"),
    "__class__": ("self.x / 2", "__class__", "return __class__", "write Point"),
    "private": ("self.x / 2", "self.__x", "self.__x", "__x means another name inside a class"),
    "private method": ("def half", "def __half", "def __half", "__half means another name"),
    "__eq__": ("@property\ndef half", "def __eq__", "def __eq__", "__eq__ is looked for when Point is made"),
    "annotation": ("def half(self)", "def half(self) -> Point", "def half", "Point has another meaning, or none yet"),
    "default": ("def half(self)", "def half(self, f=double)", "def half", "double has another meaning"),
    "decorator": ("@property", "@double", "def half", "double has another meaning"),
    "string": ("self.x / 2", '"""a\n    b"""', 'return """a', "a string over several lines"),
    "f-string": ("self.x / 2", 'f"""{self}\n    b"""', 'return f"""', "a string over several lines"),
    "continued string": ("self.x / 2", '"a\\\n    b"', 'return "a', "a string over several lines"),
    "not the last": ("        self.x = x\n", "        self.x = x\n\nX = 1\n", "def double", "does not end its cell"),
    "one line": (":\n" + BODY, ": x = 1", "def double", "does not stand below it, four spaces in"),
    "other indentation": (BODY, "  x = 1", "def double", "does not stand below it, four spaces in"),
    "marker": ("self.x / 2", "self.x / 2\n    # %% part", "    # %% part", "a line that looks like a marker"),
    "syntax": ("self.x / 2", "self.x /", "return self.x /", "syntax error"),
    "syntax of a module": ("def half(self):", "def half(self):\n    nonlocal y", "nonlocal", "error in module"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(told, case):
    old, new, at, message = MALFORMED[case]
    text = told.read(CHAPTER)
    assert text.count(old) == 1, text.count(old)
    text = text.replace(old, new)
    told.write(CHAPTER, text)
    said = told.refuses("tangle")
    assert said.startswith(f"{CHAPTER}:{text[: text.index(at)].count(chr(10)) + 1}: "), said
    assert message in said


def test_class_below_its_piece(told):
    text = told.read(CHAPTER)
    cell = f"```{{code-cell}} python\n:tags: [hide-input]\n#| export\n{HALF}\n```\n"
    first = "```{code-cell} python\n#| export\nclass Base"
    told.write(CHAPTER, text.replace(cell, "").replace(first, f"{cell}\n{first}"))
    assert "no cell above exports a class Point" in told.refuses("tangle")


def test_what_both_worlds_share_is_fine(told):
    body = '''@property
def half(self):
    """Half.

      Of x, said in
    lines.
    """
    class Inner:
        """Has a
        docstring."""
        def f(self):
            return super().__init__()
    text = ("a"
        "b" + \\
        "c")
    return super(Point, self).name() + text + self.__dict__["x"] * "d"'''
    told.edit(CHAPTER, "@property\ndef half(self):\n    return self.x / 2", body)
    assert told.run("tangle") == 0, told.err
    told.edit(MODULE, "LIMIT = 10", "LIMIT = 11")
    assert told.run("untangle") == 0, told.err
    assert body in told.read(CHAPTER)


PARTS = [
    "x = 1", "", "    ", "      ", "# at the left", "    # deep", "# %", '"""A line."""', "@staticmethod",
    "'''One\n\n      two\nthree\n    '''",
    "y = (\n1,\n  )", "z = 'ä → ∇'", "if True:\n    pass  # why", "s = 'a' \\\n  'b'", "t = '''a\nb'''",
    "def g():\n    return 1",
]  # fmt: skip
functions = st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=5), min_size=1, max_size=3)


def written(bodies: list[list[str]]) -> str | None:
    """A piece of `Point` whose functions have these bodies, if that is valid Python."""
    cells = []
    for number, body in enumerate(bodies):
        lines = textwrap.indent("\n".join(["v = 0", *body] if number else body), "    ")
        cells.append(f"# no {number}\n@method_of(Point)\n@staticmethod\ndef f{number}():\n{lines}\n    return {number}")
    code = "\n\n".join(cells)
    try:
        ast.parse(code)
    except SyntaxError:
        return None
    return code


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bodies=functions)
def test_round_trip(told, bodies):
    """Any piece is refused, or stands in the package with the same meaning and comes back to the letter."""
    code = written(bodies)
    if code is None:
        return
    chapter = told.front + TEXT.replace(HALF, code)
    told.write(CHAPTER, chapter)
    if told.run("tangle", "--force") == 2:
        assert "a string over several lines" in told.err, told.err
        return
    before = told.files()
    told.edit(MODULE, "return 0\n", "return 7\n")
    assert told.run("untangle") == 0, told.err
    assert told.read(CHAPTER) == chapter.replace("return 0\n", "return 7\n")
    told.edit(MODULE, "return 7\n", "return 0\n")
    assert told.run("untangle") == 0
    assert told.files() == before
    world = {}
    exec(told.read(MODULE), world)
    assert [getattr(world["Point"], f"f{n}")() for n in range(len(bodies))] == list(range(len(bodies)))
    line = told.line(CHAPTER, "# no 0")
    for number in range(line, line + code.count("\n") + 1):
        assert told.run("locate", f"{CHAPTER}:{number}") == 0, told.err
