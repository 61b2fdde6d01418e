"""Tangle: deterministic, deaf to prose, safe."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from literate import files

CORE = "guided_descent/maths.py"


def test_output(book):
    assert book.read(CORE) == (
        "# Generated from chapters/01_first.md by `python -m literate tangle`.\n"
        "# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.\n"
        f"{book.read(CORE).splitlines()[2]}\n"
        '"""Chapter 01, First things."""\n\n__all__ = [\n    "LIMIT",\n    "double",\n]\n\n\n'
        "# %% 01_first sec-double 1 dd4f2a82\n"
        'def double(x: float) -> float:\n    """Twice :math:`x`."""\n    return 2 * x\n\n\n'
        "# %% 01_first sec-double 2 a5ea3904\nLIMIT = 10\n"
    )
    assert "from guided_descent.maths import (\n    LIMIT,\n    double,\n)" in book.read("guided_descent/__init__.py")
    assert '__version__ = "1.2.3"' in book.read("guided_descent/__init__.py")


def test_result_imports_and_passes_ruff(book):
    code = "import guided_descent as gd; print(gd.triple(2), gd.LIMIT, gd.__version__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=book.root, capture_output=True, text=True, check=True)
    assert result.stdout == "6 10 1.2.3\n"
    rules = ["--isolated", "--select=E,F,I,B,UP,W,RUF022", "--ignore=E402", "--line-length=120"]
    subprocess.run([sys.executable, "-m", "ruff", "check", *rules, "guided_descent"], cwd=book.root, check=True)


def test_again_changes_nothing(book):
    before = {path: path.stat().st_mtime_ns for path in book.root.rglob("*")}
    assert book.run("tangle") == 0
    assert book.out == "the package is up to date\n"
    assert {path: path.stat().st_mtime_ns for path in book.root.rglob("*")} == before


def test_prose_leaves_the_package_alone(book):
    before = {name: text for name, text in book.files().items() if name.startswith("guided")}
    book.edit("chapters/01_first.md", "Some prose", "Longer\n\nprose, with a picture,\n\n- and a list\n\nand")
    book.run("tangle")
    assert {name: text for name, text in book.files().items() if name.startswith("guided")} == before


def test_book_module_is_not_reexported(book):
    book.edit("chapters/01_first.md", "#| export other", "#| export book")
    book.run("tangle")
    assert "triple" not in book.read("guided_descent/__init__.py")
    assert '"triple"' in book.read("guided_descent/book.py")


def test_module_that_is_gone_is_removed(book):
    book.edit("chapters/01_first.md", "#| export other", "#| export")
    assert book.run("tangle") == 0
    assert "removed guided_descent/other.py" in book.out
    assert not (book.root / "guided_descent/other.py").exists()


@pytest.mark.parametrize(
    ("old", "new", "at"),
    [
        ("return 2 * x", "return x + x", "def double"),
        ("LIMIT = 10\n", "LIMIT = 10\n\n\n\nMORE = 1\n", "LIMIT = 10"),
        ("LIMIT = 10\n", "LIMIT = 10\n\n\n", 20),
        ('    "LIMIT",\n', "", 1),
        ("Chapter 01", "Chapter 1", 1),
        ("# Generated from", "# Written from", 1),
        ("# %% 01_first sec-double 2 ", "# %% 01_first sec-double 3 ", 1),
    ],
)
def test_hand_edit_is_kept(book, old, new, at):
    book.edit(CORE, old, new)
    line = at if isinstance(at, int) else book.line(CORE, at)
    assert (
        book.refuses("tangle")
        == f"{CORE}:{line}: edited by hand; run `untangle` to keep the edit, `--force` to drop it"
    )
    assert book.run("tangle", "--force") == 0
    assert book.run("tangle") == 0
    assert book.out == "the package is up to date\n"


def test_removed_cell_is_a_hand_edit(book):
    text = book.read(CORE)
    book.write(CORE, text[: text.index("\n\n# %% 01_first sec-double 2")])
    assert book.refuses("tangle").startswith(f"{CORE}:1: edited by hand")


def test_edited_module_is_not_removed_silently(book):
    book.edit("chapters/01_first.md", "#| export other", "#| export")
    book.edit("guided_descent/other.py", "double(x) + x", "3 * x")
    assert book.refuses("tangle").startswith("guided_descent/other.py:12: edited by hand")


def change_everything(book):
    book.edit("chapters/01_first.md", "return 2 * x", "return x + x")
    book.edit("chapters/01_first.md", "double(x) + x", "3 * x")
    book.edit("chapters/01_first.md", "LIMIT = 10", "LIMIT = EDGE = 10")


@pytest.mark.parametrize("fail_at", [1, 2, 3])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails(book, monkeypatch, fail_at, error):
    change_everything(book)
    calls = 0
    replace = os.replace

    def failing(*arguments):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise error
        replace(*arguments)

    monkeypatch.setattr(files.os, "replace", failing)
    if isinstance(error, OSError):
        line = book.refuses("tangle")
        assert line.startswith("guided_descent/") and "No space left on device" in line
    else:
        before = book.files()
        assert book.run("tangle") == 130
        assert book.files() == before
    monkeypatch.undo()
    os.chdir(book.root)
    assert book.run("tangle") == 0
    assert "EDGE" in book.read("guided_descent/__init__.py")


def test_killed_midway(book):
    """A process that dies between two renames leaves old and new files; a rerun completes."""
    change_everything(book)
    code = (
        "import os\nfrom literate import files\nfrom literate.__main__ import main\nput, n = files._put, []\n"
        "def dying(path, data):\n    n.append(path)\n    os._exit(9) if len(n) == 3 else put(path, data)\n"
        "files._put = dying\nmain(['tangle'])\n"
    )
    old = book.files()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=book.root, env=environment)
    assert result.returncode == 9
    halfway = book.files()
    assert book.run("tangle") == 0
    new = book.files()
    assert all(halfway[name] in (old[name], new[name]) for name in old)
    assert halfway != old
    assert "EDGE" in book.read("guided_descent/__init__.py")
    assert not [name for name in new if name.endswith(".tmp")]


def test_folder_that_cannot_be_written(shelf):
    shelf.write("chapters/01_first.md", shelf.first)
    shelf.write("guided_descent", "a file where the folder should be")
    assert shelf.refuses("tangle").startswith("guided_descent/maths.py:1: cannot be written")


def test_read_only_folder(book):
    change_everything(book)
    folder = book.root / "guided_descent"
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):  # the superuser writes anywhere: show at least that nothing is in the way
            assert book.run("tangle") == 0
        else:
            assert "cannot be written" in book.refuses("tangle")
    finally:
        folder.chmod(0o755)
