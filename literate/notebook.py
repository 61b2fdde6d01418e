"""A chapter as a plain notebook, and whether the outputs stored in one are still its chapter's."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from literate.depend import code_cells, fingerprint, used
from literate.myst import SourceError
from literate.plain import Plain, added, figure_caption, solution_cells
from literate.source import Book, Cell, Chapter, digest, shown

KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py", "mimetype": "text/x-python", "name": "python", "pygments_lexer": "ipython3",
    },
}  # fmt: skip
COLAB = "https://colab.research.google.com"
PUBLISHED = "colab"  # the branch that carries the notebooks with REVISION filled in
SETUP = Path(__file__).parent / "assets/setup.py"
#: What `guided_descent.book.check` prints, and the type of what `guided_descent.book.interactive` shows.
TICK = re.compile(r"✓ \((?P<label>[\w:-]+)\) (?P<text>.*)")
PLOTLY = "application/vnd.plotly.v1+json"


def render(book: Book, chapter: Chapter) -> NotebookNode:
    """The plain notebook of a chapter, without outputs."""
    plain = Plain(book, chapter)
    hidden = solution_cells(chapter)
    visible = set(code_cells(chapter))
    page = f"{book.site}{chapter.docname}.html"
    owner, name = book.repository.split("/")[-2:]
    colab = f"{COLAB}/github/{owner}/{name}/blob/{PUBLISHED}/{chapter.docname}.ipynb"
    setup = SETUP.read_text("utf-8").strip()
    for slot, text in {"VERSION": book.version, "REPOSITORY": book.repository, "MODULES": _imports(book)}.items():
        setup = setup.replace(f"@{slot}@", text)
    cells = [
        _markdown(f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({colab})\n\nThis chapter [as a page]({page})."),
        _code(setup, {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["hide-input"]}),
    ]
    for index, cell in enumerate(chapter.cells):
        if cell.kind == "markdown":
            if text := plain.markdown(cell.source, cell.line):
                cells.append(_markdown(text))
        elif index in visible:
            cells.append(_code(shown(cell)[0], _metadata(cell, hide=index in hidden)))
            if caption := figure_caption(plain, cell):
                cells.append(_markdown(caption))
    if any(export.names for export in chapter.exports):
        cells.append(_markdown(plain.markdown(added(chapter), chapter.cells[-1].line)))
    seen: Counter[str] = Counter()
    for cell in cells:
        name = digest(f"{cell.cell_type}\n{cell.source}")
        seen[name] += 1
        cell["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    metadata = {**KERNEL, "guided_descent": fingerprint(book, chapter)}
    return nbformat.from_dict({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def finish(notebook: NotebookNode, outputs: list[list[Any]]) -> NotebookNode:
    """The notebook with the outputs of its code cells."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, (cell, found) in enumerate(zip(code, outputs, strict=True), 1):
        cell.execution_count = number
        cell.outputs = _merged(found)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    notebook.metadata.guided_descent["cells"] = _cells_digest(notebook)
    return notebook


def read(chapter: Chapter) -> NotebookNode | None:
    """The stored notebook of a chapter, if there is one."""
    if not chapter.notebook.exists():
        return None
    try:
        notebook = nbformat.v4.reads(chapter.notebook.read_text("utf-8"))
        nbformat.validate(notebook)
        return notebook
    except Exception as error:  # nbformat raises whatever its JSON and schema readers raise
        reason = str(error).partition("\n")[0][:80]
        name = chapter.file.replace(".md", ".ipynb")
        raise SourceError(name, 1, f"not a notebook ({reason}); remove it and run `weave`") from None


def edited(notebook: NotebookNode) -> bool:
    """Whether a stored notebook is not as weave wrote it."""
    return notebook.metadata.get("guided_descent", {}).get("cells") != _cells_digest(notebook)


def stale(book: Book, chapter: Chapter, notebook: NotebookNode | None) -> tuple[int, str] | None:
    """Why stored outputs cannot be used, with the line of the chapter: the code or a module it uses has changed."""
    remedy = f"run `python -m literate weave {chapter.stem}`"
    if notebook is None:
        return 1, f"no notebook; {remedy}"
    cells = [chapter.cells[index] for index in code_cells(chapter)]
    stored = [cell for cell in notebook.cells if cell.cell_type == "code"][1:]
    for cell, old in zip(cells, stored, strict=False):
        source, line = shown(cell)
        if source != old.source:
            return line, f"the cell has changed since its output was stored; {remedy}"
        if old.execution_count is None:
            return line, f"the cell has no stored output; {remedy}"
    if len(cells) != len(stored):
        line = cells[len(stored)].line if len(cells) > len(stored) else 1
        return line, f"the notebook has {len(stored)} code cells, the chapter {len(cells)}; {remedy}"
    was, now = notebook.metadata.get("guided_descent", {}), fingerprint(book, chapter)
    if was.get("source") != now["source"]:
        return 1, f"the notebook was not made from these cells; {remedy}"
    for name in sorted({*was.get("modules", {}), *now["modules"]}):
        if was.get("modules", {}).get(name) != now["modules"].get(name):
            line = used(book, chapter).get(name, 1)
            return line, f"module {name}, which this uses, has changed since the outputs were stored; {remedy}"
    return None


def stored_outputs(book: Book, chapter: Chapter) -> dict[int, list[Any]]:
    """The outputs of each code cell, by its index in `chapter.cells`; SourceError where they are not current."""
    notebook = read(chapter)
    if problem := stale(book, chapter, notebook):
        raise SourceError(chapter.file, *problem)
    if edited(notebook):
        name = chapter.file.replace(".md", ".ipynb")
        raise SourceError(name, 1, f"edited by hand; run `python -m literate weave --force {chapter.stem}`")
    return dict(zip(code_cells(chapter), outputs(notebook)[1:], strict=True))


def draft_outputs(chapter: Chapter) -> dict[int, list[Any]]:
    """The same where some are not current: what was stored for a cell of the same source, else nothing."""
    notebook = read(chapter)
    stored = {cell.source: cell.outputs for cell in (notebook.cells if notebook else ()) if cell.cell_type == "code"}
    return {index: stored.get(shown(chapter.cells[index])[0], []) for index in code_cells(chapter)}


def outputs(notebook: NotebookNode) -> list[list[Any]]:
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def _imports(book: Book) -> str:
    """What has to import: the package and its dependencies, those of the [book] extra included."""
    project = book.project
    wanted = [*project.get("dependencies", []), *project.get("optional-dependencies", {}).get("book", [])]
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in wanted}
    return " ".join(
        sorted({"guided_descent", *("sklearn" if n == "scikit-learn" else n.replace("-", "_") for n in names)})
    )


def _metadata(cell: Cell, *, hide: bool) -> dict[str, Any]:
    tags = list(cell.metadata.get("tags", []))
    if hide:
        return {"jupyter": {"source_hidden": True}, "tags": list(dict.fromkeys([*tags, "hide-input"]))}
    return {"tags": tags} if tags else {}


def _markdown(source: str) -> NotebookNode:
    return nbformat.from_dict({"cell_type": "markdown", "id": "", "metadata": {}, "source": source})


def _code(source: str, metadata: dict[str, Any]) -> NotebookNode:
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "",
        "metadata": metadata,
        "outputs": [],
        "source": source,
    }
    return nbformat.from_dict(cell)


def _merged(outputs: list[Any]) -> list[Any]:
    """Outputs with neighbouring pieces of one stream joined; where a kernel cuts them is chance."""
    merged: list[Any] = []
    for output in outputs:
        if merged and output.output_type == "stream" == merged[-1].output_type and output.name == merged[-1].name:
            merged[-1] = nbformat.from_dict({**merged[-1], "text": merged[-1].text + output.text})
        else:
            merged.append(output)
    return merged


def _cells_digest(notebook: NotebookNode) -> str:
    return hashlib.sha256(json.dumps(notebook.cells, sort_keys=True).encode()).hexdigest()[:16]
