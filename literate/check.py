"""Whether package, notebooks and chapters agree, and keep the promises a reader relies on."""

from __future__ import annotations

import ast
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from literate import front, notebook, pieces
from literate.depend import code_cells, magics, syntax
from literate.myst import SourceError, directive, parse
from literate.plain import Plain, figure_caption
from literate.source import PACKAGE, Book, Cell, Chapter
from literate.tangle import BANNER, first_difference, hand_edit, package

IMAGES = ("image/png", "image/jpeg", "image/svg+xml")
LARGEST_IMAGE = 40_000  # bytes
WIDEST = 88  # columns of a code cell: no box on a page scrolls
NOT_COMPARED = {"nbval-ignore-output", "nbval-skip"}


@dataclass(frozen=True, order=True)
class Finding:
    """Something to mend: where, what and how."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def check(book: Book) -> list[Finding]:
    """Everything that is not as it should be, in order of file and line."""
    checked: set[str] = set()
    findings = [*_package(book), *_contents(book)]
    try:
        front.stored(book) if front.shown(book) else None
    except SourceError as error:
        findings.append(Finding(error.file, error.line, error.message))
    for chapter in book.chapters:
        findings += _text(book, chapter)
        findings += _code(book, chapter)
        stored = None
        try:
            stored = notebook.read(chapter)
            findings += _notebook(book, chapter, stored)
        except SourceError as error:
            findings.append(Finding(error.file, error.line, error.message))
        if stored is None:
            checked |= chapter.labels.keys()  # nothing more to say about a chapter without a notebook
            continue
        outputs = dict(zip(code_cells(chapter), notebook.outputs(stored)[1:], strict=False))
        checked |= {tick["label"] for found in outputs.values() for tick in notebook.TICK.finditer(_stdout(found))}
        for index, found in outputs.items():
            findings += _output(chapter, chapter.cells[index], found)
    for label in book.labels.values():
        if label.kind == "eq" and label.name not in checked:
            what = (
                f'equation {label.name} is checked in no stored output; add check("{label.name}", …) or drop the label'
            )
            findings.append(Finding(f"{label.docname}.md", label.line, what))
    return sorted(set(findings))


def _package(book: Book) -> Iterator[Finding]:
    wanted = package(book)
    for path in sorted({*wanted, *(book.root / PACKAGE).glob("*.py")}):
        name = str(path.relative_to(book.root))
        if not path.exists():
            yield Finding(name, 1, "missing; run `python -m literate tangle`")
        elif path not in wanted and not path.read_text("utf-8").startswith(BANNER):
            yield Finding(name, 1, "no chapter exports to this file; move its code to an export cell, or remove it")
        elif line := hand_edit(path, wanted.get(path)):
            yield Finding(name, line, "edited by hand; run `untangle` to keep the edit, `tangle --force` to drop it")
        elif path not in wanted:
            yield Finding(name, 1, "no chapter exports to this module any more; run `python -m literate tangle`")
        elif (text := path.read_text("utf-8")) != wanted[path]:
            line = first_difference(text, wanted[path])
            yield Finding(name, line, "older than the chapters; run `python -m literate tangle`")


def _contents(book: Book) -> Iterator[Finding]:
    """Chapters, notebooks and the table of contents name each other."""
    text = (book.root / "_toc.yml").read_text("utf-8") if (book.root / "_toc.yml").exists() else ""
    try:
        listed = set(_files(yaml.safe_load(text)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        yield Finding("_toc.yml", mark.line + 1 if mark else 1, "bad YAML; mend it")
        return
    known = {page.docname for page in [*book.chapters, *book.pages]}
    for missing in sorted({chapter.docname for chapter in book.chapters} - listed):
        yield Finding("_toc.yml", 1, f"{missing} is not listed; add `- file: {missing}`")
    for extra in sorted(listed - known):
        line = next((n for n, row in enumerate(text.split("\n"), 1) if extra in row), 1)
        yield Finding("_toc.yml", line, f"there is no {extra}.md; remove the entry or write the page")
    for path in sorted(book.root.glob("chapters/*.ipynb")):
        if not path.with_suffix(".md").exists():
            yield Finding(f"chapters/{path.name}", 1, "a notebook without its .md; remove it")


def _files(value: Any) -> Iterator[str]:
    """Every `file:` and `root:` in a table of contents."""
    if isinstance(value, dict):
        yield from (str(v).removesuffix(".md") for k, v in value.items() if k in ("file", "root"))
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _files(item)


def _text(book: Book, chapter: Chapter) -> Iterator[Finding]:
    """References and citations resolve; pictures have an alt text."""
    plain = Plain(book, chapter)
    for cell in chapter.cells:
        try:
            if cell.kind == "code":
                figure_caption(plain, cell)
                continue
            plain.markdown(cell.source, cell.line)
        except SourceError as error:
            yield Finding(error.file, error.line, error.message)
        for token in parse(cell.source, chapter.file, cell.line):
            found = directive(token, chapter.file, cell.line)
            if found and found.name in ("figure", "image") and not found.options.get("alt"):
                yield Finding(chapter.file, found.line, "the picture has no alt text; add `:alt:`")


def _code(book: Book, chapter: Chapter) -> Iterator[Finding]:
    """No long lines, no magics; methods reach the package; checks name equations; what is not compared asserts."""
    exported = {export.cell for export in chapter.exports}
    for index, cell in enumerate(chapter.cells):
        if cell.kind != "code":
            continue
        for offset, text in enumerate(cell.source.split("\n")):
            if len(text) > WIDEST:
                what = f"{len(text)} columns of code; break the line, at most {WIDEST} fit a page"
                yield Finding(chapter.file, cell.line + offset, what)
        try:
            tree = syntax(chapter, cell)
        except SourceError as error:
            yield Finding(error.file, error.line, error.message)
            continue
        for offset, text in magics(cell.source):
            yield Finding(
                chapter.file, cell.line + offset, f"a raw magic, {text[:30]}; write Python, nbval hides failures"
            )
        for mark in (mark for node in tree.body for mark in pieces.decorated(node) if index not in exported):
            owner = ast.unparse(mark).rpartition("(")[2].strip("()")
            if owner in book.public:
                line = cell.line + mark.lineno - 1
                yield Finding(chapter.file, line, f"a method of {owner} that the package lacks; add `#| export`")
        asserts = False
        for node in ast.walk(tree):
            name = _called(node)
            asserts |= isinstance(node, ast.Assert) or name == "check" or name.startswith("assert")
            if name != "check":
                continue
            line, label = cell.line + node.lineno - 1, node.args[0] if node.args else None
            if not isinstance(label, ast.Constant):
                yield Finding(chapter.file, line, "check without a literal label; write the equation's label out")
            elif label.value not in book.labels or book.labels[label.value].kind != "eq":
                yield Finding(chapter.file, line, f"no equation is labelled {label.value}; mend the label")
        tags = set(cell.metadata.get("tags", []))
        if not asserts and (tags & NOT_COMPARED or "NBVAL_IGNORE_OUTPUT" in cell.source or "NBVAL_SKIP" in cell.source):
            yield Finding(
                chapter.file, cell.line, "the cell neither asserts nor is compared; assert what the text claims"
            )


def _called(node: ast.AST) -> str:
    """The name of the function that a node calls; of methods only `assert…` and `book.check` count."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Name):
        return node.func.id
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value
        home = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        return node.func.attr if node.func.attr.startswith("assert") or home == "book" else ""
    return ""


def _notebook(book: Book, chapter: Chapter, stored: Any) -> Iterator[Finding]:
    """The stored notebook is what weave would write now."""
    name = chapter.file.replace(".md", ".ipynb")
    if problem := notebook.stale(book, chapter, stored):
        yield Finding(chapter.file, *problem)
    elif notebook.edited(stored):
        yield Finding(name, 1, f"edited by hand; run `python -m literate weave --force {chapter.stem}`")
    else:
        if notebook.finish(notebook.render(book, chapter), notebook.outputs(stored)) != stored:
            yield Finding(name, 1, f"the text has changed; run `python -m literate weave {chapter.stem}`")


def _output(chapter: Chapter, cell: Cell, outputs: list[Any]) -> Iterator[Finding]:
    """What a stored output may and must be."""
    data = [output.get("data", {}) for output in outputs]
    figures = [mime for found in data for mime in found if mime in IMAGES or mime == notebook.PLOTLY]
    options = cell.metadata.get("mystnb", {})
    if figures and not options.get("image", {}).get("alt"):
        yield Finding(chapter.file, cell.line, "the figure has no alt text; add `mystnb: {image: {alt: …}}`")
    if figures and not options.get("figure", {}).get("caption"):
        yield Finding(chapter.file, cell.line, "the figure has no caption; add `mystnb: {figure: {caption: …}}`")
    if not figures and options.get("figure"):
        yield Finding(chapter.file, cell.line, "a caption but no figure in the stored output; show one or drop it")
    for mime, content in ((m, c) for found in data for m, c in found.items() if m in IMAGES):
        # as a page is sent: text is compressed
        size = len(gzip.compress(content.encode())) if mime == "image/svg+xml" else len(content) * 3 // 4
        if size > LARGEST_IMAGE:
            yield Finding(chapter.file, cell.line, f"an image of {size // 1000} kB; draw less or lower its resolution")
    if any(output.output_type == "error" for output in outputs):
        yield Finding(chapter.file, cell.line, "an error in the stored output; catch it and show what it says")
    if any(output.output_type == "stream" and output.name == "stderr" for output in outputs):
        yield Finding(chapter.file, cell.line, "stderr (a warning?) in the stored output; remove its cause")


def _stdout(outputs: list[Any]) -> str:
    return "\n".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
