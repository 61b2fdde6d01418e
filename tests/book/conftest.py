"""One build of the site for all tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from literate.source import Book

ROOT = Path(__file__).parents[2]


def run_build(root: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Build the site of the book in `root` with this tree's tool."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "literate.site", "--out", str(out), *options]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site: the one that GUIDED_DESCENT_SITE names, else a fresh build shared by all workers."""
    if given := os.environ.get("GUIDED_DESCENT_SITE"):
        return Path(given).resolve()
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "site" / "html"
    with FileLock(shared / "site.lock"):
        if not out.exists():
            result = run_build(ROOT, out)
            assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.fixture(scope="session")
def build() -> Callable[..., subprocess.CompletedProcess[str]]:
    return run_build


@pytest.fixture(scope="session")
def book() -> Book:
    return Book.load(ROOT)
