"""Chapters to plain, executed notebooks; only what is stale runs."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from tqdm import tqdm

from literate import notebook
from literate.depend import code_cells
from literate.files import commit
from literate.locate import locate
from literate.myst import SourceError
from literate.source import PACKAGE, Book, Chapter, shown

SLOW = 60  # seconds
CELL_TIMEOUT = 900  # seconds: for hangs
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Woven:
    """What became of a chapter."""

    chapter: Chapter
    what: str  # "executed", "rendered", "current" or "failed"
    seconds: float = 0.0
    failure: str = ""


class CellFailure(Exception):
    """A cell that did not run: its line in the chapter, and the traceback."""


def select(book: Book, names: list[str]) -> list[Chapter]:
    """The chapters that names, numbers or paths stand for; all without any."""
    chosen = []
    for name in names:
        stem = os.path.basename(name).removesuffix(".md").removesuffix(".ipynb")
        found = [c for c in book.chapters if c.stem == stem or f"{c.number:02d}" == stem.zfill(2) or c.stem[3:] == stem]
        if not found:
            raise SourceError("chapters", 1, f"no chapter {name}; there are {', '.join(c.stem for c in book.chapters)}")
        chosen += found
    return chosen or book.chapters


def weave(
    book: Book, chapters: list[Chapter], *, everything: bool = False, jobs: int = 0, force: bool = False
) -> list[Woven]:
    """Render every chapter, execute the stale ones, and write each notebook as it is done."""
    pages = {chapter.stem: notebook.render(book, chapter) for chapter in chapters}
    stored = {}
    for chapter in chapters:
        try:
            stored[chapter.stem] = notebook.read(chapter)
        except SourceError:
            if not force:
                raise
            stored[chapter.stem] = None
    for chapter in chapters:
        old = stored[chapter.stem]
        if old is not None and notebook.edited(old) and not force:
            name = chapter.file.replace(".md", ".ipynb")
            raise SourceError(name, 1, "edited by hand; carry the edit into the .md, then run `weave --force`")
    results: dict[str, Woven] = {}
    todo = []
    for chapter in chapters:
        old = stored[chapter.stem]
        if everything or notebook.stale(book, chapter, old) or notebook.edited(old):
            todo.append(chapter)
            continue
        written = _write(book, chapter, notebook.finish(pages[chapter.stem], notebook.outputs(old)))
        results[chapter.stem] = Woven(chapter, "rendered" if written else "current")

    def run(chapter: Chapter) -> Woven:
        page = pages[chapter.stem]
        start = time.perf_counter()
        try:
            outputs = execute(book, chapter, page, progress)
            _write(book, chapter, notebook.finish(page, outputs))
        except (CellFailure, SourceError) as error:
            return Woven(chapter, "failed", time.perf_counter() - start, str(error))
        except Exception as error:  # a kernel that does not start, say: the other chapters go on
            return Woven(chapter, "failed", time.perf_counter() - start, f"{chapter.file}:1: {error!r}; rerun")
        finally:
            progress.done(chapter.stem)
        return Woven(chapter, "executed", time.perf_counter() - start)

    total = sum(cell.cell_type == "code" for chapter in todo for cell in pages[chapter.stem].cells)
    with Progress(total) as progress, ThreadPoolExecutor(max(1, min(jobs or os.cpu_count() or 1, len(todo)))) as pool:
        try:
            results |= {result.chapter.stem: result for result in pool.map(run, todo)}
        except BaseException:  # Ctrl-C: let each kernel end its cell, start nothing more
            progress.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[chapter.stem] for chapter in chapters]


def _write(book: Book, chapter: Chapter, page: NotebookNode) -> bool:
    return bool(commit(book.root, {chapter.notebook: nbformat.writes(page) + "\n"}))


def execute(
    book: Book, chapter: Chapter, page: NotebookNode, progress: Callable[[str, int, int], None]
) -> list[list[Any]]:
    """Run the code cells of a notebook in a fresh kernel and return their outputs."""
    lines = [1, *(shown(chapter.cells[index])[1] for index in code_cells(chapter))]
    client = NotebookClient(
        page,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(chapter.path.parent)}},
        extra_arguments=["--HistoryManager.enabled=False", "--IPKernelApp.log_level=ERROR"],
    )
    code = [(index, cell) for index, cell in enumerate(page.cells) if cell.cell_type == "code"]
    with client.setup_kernel(env=_environment(book)):
        for number, (index, cell) in enumerate(code, 1):
            progress(chapter.stem, number, len(code))
            try:
                client.execute_cell(cell, index, execution_count=number)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                text = ANSI.sub("", getattr(error, "traceback", "") or str(error)).strip()
                inside = re.findall(rf"Cell In\[{number}\], line (\d+)", text)
                place = f"{chapter.file}:{lines[number - 1] + (int(inside[-1]) - 1 if inside else 0)}"
                if number == 1:
                    place = _behind(book, text) or f"{chapter.file}:1"
                last = text.splitlines()[-1] if text else type(error).__name__
                raise CellFailure(f"{place}: cell {number} of {len(code)} failed: {last}\n{text}") from None
    return [cell.outputs for _, cell in code]


def _behind(book: Book, traceback: str) -> str | None:
    """The chapter line behind the innermost line of the package in a traceback: setup fails where the package does."""
    places = re.findall(rf"{PACKAGE}/\w+\.py:\d+", traceback)
    try:
        return locate(book, places[-1]) if places else None
    except SourceError:
        return None


def _environment(book: Book) -> dict[str, str]:
    """The kernel's environment: this tree's package, one quiet thread, no progress bars."""
    path = os.pathsep.join(filter(None, [str(book.root), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "GUIDED_DESCENT_PROGRESS": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


class Progress:
    """One bar over all cells, naming chapter and cell; a line a chapter where there is no terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.lock, self.stopped = total, threading.Lock(), False
        self.now: dict[str, str] = {}

    def __enter__(self) -> Progress:
        self.bar = tqdm(total=self.total, unit="cell", disable=not (self.total and sys.stderr.isatty()), leave=False)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def __call__(self, stem: str, number: int, of: int) -> None:
        if self.stopped:
            raise CellFailure(f"{stem}: interrupted before cell {number}")
        with self.lock:
            self.now[stem] = f"{stem} {number}/{of}"
            self.bar.set_description_str(", ".join(self.now.values()), refresh=False)
            self.bar.update()
            if self.bar.disable and number == 1:
                print(f"{stem}: running {of} cells", file=sys.stderr, flush=True)

    def done(self, stem: str) -> None:
        with self.lock:
            self.now.pop(stem, None)


def summary(results: list[Woven]) -> str:
    """A line a chapter, with the seconds it took."""
    lines = []
    for result in results:
        time_taken = f" in {result.seconds:.1f} s" if result.seconds else ""
        slow = f"  (more than {SLOW} s: make it smaller)" if result.seconds > SLOW else ""
        lines.append(f"{result.chapter.stem}: {result.what}{time_taken}{slow}")
    return "\n".join(lines)
