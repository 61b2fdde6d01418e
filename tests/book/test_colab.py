"""A notebook on a machine that has only torch, numpy, matplotlib and ipykernel, as Colab does."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(ROOT.glob("chapters/[0-9][0-9]_*.ipynb"))


def pinned(name):
    """The requirement as requirements.txt pins it."""
    return re.search(rf"^{name}==.*$", (ROOT / "requirements.txt").read_text(), re.M).group()


@pytest.fixture(scope="session")
def bare_machine(tmp_path_factory):
    """A fresh environment's Python, and the wheel of this tree."""
    folder = tmp_path_factory.mktemp("colab")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", ROOT]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    needs = [pinned(name) for name in ("torch", "numpy", "matplotlib", "ipykernel")]
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *needs], check=True)
    return python, wheel


def freeze(python):
    return subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout


def test_package_imports_without_the_books_extra(bare_machine, tmp_path):
    """`import guided_descent` needs torch and numpy alone."""
    python, wheel = bare_machine
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel], check=True
    )
    code = "import sys, guided_descent as gd; print(gd.GradientDescent, {'matplotlib', 'tqdm'} & set(sys.modules))"
    result = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout == "<class 'guided_descent.problems.GradientDescent'> set()\n", result.stderr


def execute(notebook, python, folder):
    """Run a notebook's cells in that environment's kernel, and return what they printed."""
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[])
    manager = KernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
    )
    try:
        NotebookClient(notebook, km=manager, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        manager.shutdown_kernel(now=True)
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def test_every_notebook_installs_what_it_lacks_and_runs(bare_machine, tmp_path, monkeypatch):
    """One runs whole. Of the others, which nbval runs on the same versions, the install cell and all imports."""
    python, wheel = bare_machine
    monkeypatch.setenv("GUIDED_DESCENT_SOURCE", f"guided-descent[book] @ {wheel.as_uri()}")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    torch_before = [line for line in freeze(python).splitlines() if line.startswith("torch")]
    assert "✓ (eq-" in execute(nbformat.read(NOTEBOOKS[0], as_version=4), python, tmp_path)
    for path in NOTEBOOKS[1:]:
        install, *cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        nodes = (node for cell in cells for node in ast.walk(ast.parse(cell)))
        lines = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "subprocess" in install and any("guided_descent" in line for line in lines), path.name
        subprocess.run([python, "-c", "\n".join([install, *lines])], cwd=tmp_path, check=True)
    installed = freeze(python)
    assert "guided-descent @ file://" in installed or "guided_descent @ file://" in installed
    assert torch_before == [line for line in installed.splitlines() if line.startswith("torch")]
