"""The chapters as they are written: cells, export cells, labels and their numbers."""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import keyword
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from jupytext.myst import MystMetadataParsingError, myst_to_notebook, read_fenced_cell
from markdown_it.token import Token
from nbformat import ValidationError
from nbformat.v4 import new_code_cell

from literate import names, pieces
from literate.myst import SourceError, directive, parse, read_yaml

__all__ = ["Book", "Cell", "Chapter", "Export", "Label", "SourceError", "read_chapter", "strip_directives"]

PACKAGE = "guided_descent"
# `book` needs what only the [book] extra installs.
NOT_REEXPORTED = {"book"}
PYTHON = {"", "python", "python3", "ipython", "ipython3"}
CHAPTERS = "[0-9][0-9]_*.md"
ODD_BREAK = re.compile("[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
OPTIONS = "write `tags: [a, b]` and `mystnb: {image: {alt: …}, figure: {caption: …}}`"
# The directives whose body is MyST again, and may hold labels.
CONTAINERS = {
    "admonition", "note", "tip", "hint", "warning", "important", "caution", "attention", "danger", "error",
    "seealso", "margin", "sidebar", "dropdown", "topic", "exercise", "solution", "table",
}  # fmt: skip
TABLES = {"table", "list-table", "csv-table"}


@dataclass(frozen=True)
class Cell:
    """A cell of a chapter; `line` is the line of the file that holds the first line of `source`."""

    kind: str
    source: str
    line: int
    metadata: dict[str, Any]
    section: str | None


@dataclass(frozen=True)
class Export:
    """A cell that goes into the package, without its directive line.

    `code` is what the chapter holds and `packaged` what the package holds: another text where the cell is a piece of a
    class.
    """

    module: str
    section: str
    ordinal: int
    code: str
    names: tuple[str, ...]
    line: int
    cell: int
    piece: pieces.Piece | None = None

    @property
    def packaged(self) -> str:
        return self.piece.code if self.piece else self.code

    @property
    def hash(self) -> str:
        return digest(self.packaged)

    @property
    def offsets(self) -> Sequence[int]:
        """The line of `code` behind each line of `packaged`, both from 0."""
        return self.piece.offsets if self.piece else range(self.code.count("\n") + 1)

    def summary(self, name: str) -> str:
        """The first line of a definition's docstring, or of the `#:` comment above a constant, as Markdown."""
        above = re.search(rf"((?:^#: .*\n)+){re.escape(name)}\b", self.code, re.MULTILINE)
        if above:
            return above[1].partition("\n")[0].removeprefix("#: ").replace("|", r"\|")
        for node in ast.walk(ast.parse(self.code)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                line = (ast.get_docstring(node) or "").partition("\n")[0]
                return re.sub(r":math:`([^`]*)`", r"$\1$", line).replace("|", r"\|")
        return ""


@dataclass(frozen=True)
class Label:
    """Something a reference can point at; `noun` is what a sentence calls it ("Figure")."""

    name: str
    kind: str
    number: str
    title: str
    docname: str
    line: int
    noun: str = ""


@dataclass
class Chapter:
    """One `.md` file of the book; pages without a number (index, notation) are chapters too."""

    path: Path
    file: str
    stem: str
    number: int | None
    title: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    exports: list[Export] = field(default_factory=list)
    top_level: tuple[str, ...] | None = None  # what the package shows at its top; all public names without a list
    labels: dict[str, Label] = field(default_factory=dict)
    terms: set[str] = field(default_factory=set)
    numbers: dict[int, str] = field(default_factory=dict)  # of what starts at a line, labelled or not

    @property
    def docname(self) -> str:
        return f"chapters/{self.stem}"

    @property
    def notebook(self) -> Path:
        return self.path.with_suffix(".ipynb")


@dataclass
class Book:
    """All chapters, with the tables that need all of them."""

    root: Path
    config: dict[str, Any]
    chapters: list[Chapter]
    pages: list[Chapter]
    labels: dict[str, Label]
    modules: dict[str, list[tuple[Chapter, Export]]]

    @classmethod
    def load(cls, root: str | Path = ".", texts: Mapping[Path, str] = MappingProxyType({})) -> Book:
        """Read the book whose `_config.yml` is in `root` or the nearest folder above it.

        `texts` stand in for files: what the book would be with them.
        """
        root = find_root(Path(root))
        config = read_yaml((root / "_config.yml").read_text("utf-8"), "_config.yml", 1)
        if not config.get("repository", {}).get("url"):
            raise SourceError("_config.yml", 1, "no repository url; add `repository: {url: …}`")
        chapters = [read_chapter(path, texts.get(path)) for path in sorted(root.glob(f"chapters/{CHAPTERS}"))]
        known = {chapter.path for chapter in chapters}
        pages = [read_chapter(path) for path in sorted(root.glob("chapters/*.md")) if path not in known]
        book = cls(root, config, chapters, pages, {}, {})
        for chapter in [*chapters, *pages]:
            for label in chapter.labels.values():
                if (first := book.labels.setdefault(label.name, label)) is not label:
                    where = f"{first.docname}.md:{first.line}"
                    raise SourceError(chapter.file, label.line, f"label {label.name} is also at {where}; rename one")
        for chapter in chapters:
            for export in chapter.exports:
                book.modules.setdefault(export.module, []).append((chapter, export))
        book._check_names()
        book.modules = {name: pieces.arrange(pairs, book.public) for name, pairs in book.modules.items()}
        return book

    def _check_names(self) -> None:
        homes: dict[str, str] = {}
        for chapter, export in (pair for pairs in self.modules.values() for pair in pairs):
            for name in export.names:
                where = f"{chapter.file}:{export.line}"
                if name in self.modules:
                    raise SourceError(chapter.file, export.line, f"{name} is also the name of a module; rename one")
                if (first := homes.setdefault(name, where)) != where:
                    raise SourceError(
                        chapter.file, export.line, f"{name} is already exported at {first}; rename or remove one"
                    )
            for name, line in names.undone(export.code).items():
                if self.public.get(name) == export.module:
                    at = export.line + line - 1
                    raise SourceError(chapter.file, at, f"{name} is a public name that this deletes; begin it with _")

    @property
    def repository(self) -> str:
        return self.config["repository"]["url"].rstrip("/")

    @property
    def site(self) -> str:
        """The address of the published book, with a slash at its end."""
        owner, name = self.repository.split("/")[-2:]
        return f"https://{owner}.github.io/{name}/"

    @cached_property
    def project(self) -> dict[str, Any]:
        """The [project] table of `pyproject.toml`."""
        try:
            return tomllib.loads((self.root / "pyproject.toml").read_text("utf-8"))["project"]
        except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
            raise SourceError("pyproject.toml", 1, f"cannot be used ({error}); give a [project] table") from None

    @property
    def version(self) -> str:
        if "version" not in self.project:
            raise SourceError("pyproject.toml", 1, "no version; give `version` under [project]")
        return self.project["version"]

    @cached_property
    def terms(self) -> set[str]:
        return {term for chapter in [*self.chapters, *self.pages] for term in chapter.terms}

    @cached_property
    def public(self) -> dict[str, str]:
        """The module in which each public name lives."""
        return {name: module for module, pairs in self.modules.items() for _, e in pairs for name in e.names}

    def top(self, module: str) -> list[str]:
        """The names of a module that the package shows at its top."""
        pairs = self.modules[module] if module not in NOT_REEXPORTED else []
        return [name for c, e in pairs for name in e.names if c.top_level is None or name in c.top_level]


def find_root(start: Path) -> Path:
    """The nearest folder at or above `start` that holds `_config.yml`."""
    for folder in [start.resolve(), *start.resolve().parents]:
        if (folder / "_config.yml").is_file():
            return folder
    raise SourceError("_config.yml", 1, "not in this folder or above it; run inside the book")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def strip_directives(source: str) -> str:
    """A cell as readers see it: without its `#| …` line."""
    first, _, rest = source.partition("\n")
    return rest.lstrip("\n") if first.startswith("#|") else source


def shown(cell: Cell) -> tuple[str, int]:
    """A code cell as readers see it, and the line of the file that holds its first line."""
    source = strip_directives(cell.source)
    return source, cell.line + cell.source.count("\n") - source.count("\n")


def read_chapter(path: str | Path, text: str | None = None) -> Chapter:
    """Read one `.md` file; `text` stands in for what it holds."""
    path = Path(path)
    file = f"{path.parent.name}/{path.name}"
    number = re.match(r"(\d\d)_", path.name)
    chapter = Chapter(path, file, path.stem, int(number[1]) if number else None)
    try:
        text = path.read_bytes().decode("utf-8") if text is None else text
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(file, 1, f"cannot be read ({error}); save it as UTF-8 text") from None
    if text.startswith("\ufeff"):
        raise SourceError(file, 1, "a byte order mark; save as UTF-8 without one")
    if odd := ODD_BREAK.search(text):
        raise SourceError(
            file, text.count("\n", 0, odd.start()) + 1, "a line break other than \\n; save with Unix lines"
        )
    chapter.metadata = _front_matter(text, file, required=number is not None)
    _Labels(chapter).read(_cells(text, file))
    if not chapter.title:
        raise SourceError(file, 1, "no title; start the page with a `# Title` heading")
    if number:
        chapter.exports = list(_exports(chapter))
        chapter.top_level = _top_level(chapter, text)
    return chapter


def _front_matter(text: str, file: str, *, required: bool) -> dict[str, Any]:
    block = re.match(r"---\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    if block:
        metadata = read_yaml(block[1], file, 2)
        kernel = metadata.get("kernelspec")
        language = str(kernel.get("language", "")) if isinstance(kernel, dict) else ""
        if language.lower() not in PYTHON:
            line = text[: text.index("kernelspec")].count("\n") + 1
            raise SourceError(file, line, f"a kernel for {language}; only Python runs here, write `language: python`")
        return metadata
    if text.startswith("---\n"):
        raise SourceError(file, 1, "unclosed front matter; close it with ---")
    if required:
        raise SourceError(file, 1, "no front matter; start with the `jupytext` and `kernelspec` block")
    return {}


def _top_level(chapter: Chapter, text: str) -> tuple[str, ...] | None:
    """The front matter's list of exported names that `__init__` re-exports."""
    if "top_level" not in chapter.metadata:
        return None
    found, line = chapter.metadata["top_level"], text[: text.index("top_level")].count("\n") + 1
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise SourceError(chapter.file, line, "top_level is no list of names; write `top_level: [SGD, …]`")
    homes = {name: export.module for export in chapter.exports for name in export.names}
    rows = list(enumerate(text.split("\n")[line - 1 :], line))
    for name in found:
        at = next((n for n, row in rows if re.search(rf"\b{re.escape(name)}\b", row)), line)
        if found.count(name) > 1:
            raise SourceError(chapter.file, at, f"top_level lists {name} twice; remove one")
        if name not in homes:
            raise SourceError(chapter.file, at, f"top_level lists {name}, which this chapter does not export; mend it")
        if homes[name] in NOT_REEXPORTED:
            where = f"module {homes[name]}, which the top level leaves out"
            raise SourceError(chapter.file, at, f"top_level lists {name} of {where}; remove it")
    return tuple(found)


def _cells(text: str, file: str) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Kind, source, line and metadata of each cell, as jupytext reads them."""
    tokens = parse(text, file)
    fences = [t for t in tokens if t.type == "fence" and t.level == 0 and t.info.startswith("{code-cell}")]
    for token in tokens:
        if token.type not in ("fence", "colon_fence") or not re.match(r"\{(code|raw)-cell\}", token.info):
            continue
        at, language = token.map[0] + 1, token.info.partition("}")[2].strip()
        if token.info.startswith("{raw-cell}"):
            raise SourceError(file, at, "a raw cell, which neither page nor notebook shows; write Markdown or code")
        if token.type == "colon_fence":
            raise SourceError(file, at, "a code cell between :::, which no notebook knows; fence it with ```")
        if token.level:
            raise SourceError(file, at, "a code cell inside a list or quote; move it out")
        if language not in PYTHON:
            raise SourceError(file, at, f"a code cell in {language}; only Python runs here, write {{code-cell}} python")
    # without the front matter, which has been read, and whose `kernelspec` jupytext wants complete
    text = re.sub(r"\A---\n.*?^---\s*?$", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    lines = text.split("\n")
    try:
        notebook = myst_to_notebook(text, add_source_map=True)
    except (MystMetadataParsingError, yaml.YAMLError) as error:
        at = re.search(r"at line (\d+)", str(error))
        fence = int(at[1]) if at else 1
        cause = error.__context__ or error
        mark = getattr(cause, "problem_mark", None)
        line = fence + 1 + lines[fence].startswith("---") + (mark.line if mark else 0)
        problem = getattr(cause, "problem", None) or "cannot be read"
        raise SourceError(file, line, f"bad YAML in a cell's options: {problem}; mend the block") from None
    except ValidationError:
        wrong = next(fence for fence in fences if not _valid(fence))
        raise SourceError(file, wrong.map[0] + 1, f"bad cell options; {OPTIONS}") from None
    ends = [fence.map[1] for fence in fences]
    for cell, start in zip(notebook.cells, notebook.metadata["source_map"], strict=True):
        if cell.cell_type == "code":
            line = ends.pop(0) - len(cell.source.splitlines())
            line -= len(cell.source) - len(cell.source.rstrip("\n"))
        else:
            line = next(n for n, text in enumerate(lines[start:], start + 1) if text.strip())
        if cell.cell_type == "code" and (magic := re.match(r"%%\s*\w+", strip_directives(cell.source))):
            at = line + cell.source[: cell.source.index(magic[0])].count("\n")
            raise SourceError(file, at, f"a cell magic, {magic[0]}; write Python, nbval hides failures")
        metadata = json.loads(json.dumps(cell.metadata, default=str))
        mystnb = metadata.get("mystnb", {})
        mappings = [mystnb, *(mystnb.get(key, {}) for key in ("figure", "image") if isinstance(mystnb, dict))]
        if not all(isinstance(mapping, dict) for mapping in mappings):
            raise SourceError(file, line, f"bad cell options; {OPTIONS}")
        yield cell.cell_type, cell.source, line, metadata


def _valid(fence: Token) -> bool:
    try:
        new_code_cell(metadata=read_fenced_cell(fence, 0, "Code")[0])
    except ValidationError:
        return False
    return True


class _Labels:
    """Collects a chapter's cells and labels, and numbers them in order as Sphinx does."""

    def __init__(self, chapter: Chapter) -> None:
        self.chapter = chapter
        self.counts: dict[str, int] = defaultdict(int)
        self.headings = [0] * 6
        self.section: str | None = None

    def read(self, cells: Iterator[tuple[str, str, int, dict[str, Any]]]) -> None:
        for kind, source, line, metadata in cells:
            if kind == "markdown":
                self.markdown(source, line)
            elif figure := metadata.get("mystnb", {}).get("figure"):
                if caption := str(figure.get("caption", "")):
                    self.numbered(figure.get("name"), "fig", "Figure", caption, line)
            self.chapter.cells.append(Cell(kind, source, line, metadata, self.section))

    def count(self, noun: str) -> str:
        self.counts[noun] += 1
        chapter = self.chapter.number
        return str(self.counts[noun]) if chapter is None else f"{chapter}.{self.counts[noun]}"

    def add(self, name: str, kind: str, number: str, title: str, line: int, noun: str) -> None:
        if first := self.chapter.labels.get(name):
            raise SourceError(self.chapter.file, line, f"label {name} is also at line {first.line}; rename one")
        self.chapter.labels[name] = Label(name, kind, number, title, self.chapter.docname, line, noun)

    def markdown(self, source: str, base: int, *, nested: bool = False) -> None:
        targets: list[tuple[str, int]] = []
        tokens = parse(source, self.chapter.file, base)
        for i, token in enumerate(tokens):
            if token.type == "myst_target":
                targets.append((token.content, base + token.map[0]))
                continue
            line = base + token.map[0] if token.map else base
            if token.type == "heading_open" and not nested:
                self.heading(int(token.tag[1]), tokens[i + 1].content, line, targets)
            elif token.nesting >= 0:
                for name, at in targets:
                    self.add(name, "target", "", "", at, "")
            targets = []
            if token.type == "math_block_label":
                self.add(token.info, "eq", self.count("Equation"), "", line, "Equation")
            elif found := directive(token, self.chapter.file, base):
                self.directive(found)

    def heading(self, level: int, title: str, line: int, targets: list[tuple[str, int]]) -> None:
        if level == 1 and self.chapter.title:
            raise SourceError(self.chapter.file, line, "a second title; start sections with ##")
        if level == 1:
            self.chapter.title = title
        else:
            self.headings[level - 1] += 1
            self.headings[level:] = [0] * (6 - level)
        chapter = self.chapter.number
        path = [] if chapter is None else [chapter, *self.headings[1:level]]
        number = f"{chapter:02d}" if len(path) == 1 else ".".join(map(str, path))
        for name, line in targets:
            self.add(name, "sec", number, title, line, "Section")
        if targets or level < 3:
            self.section = targets[-1][0] if targets else None

    def directive(self, found: Any) -> None:
        name, options, argument = found.name, found.options, found.argument
        label = options.get("label") or options.get("name")
        if name == "math":
            if label:
                self.add(label, "eq", self.count("Equation"), "", found.line, "Equation")
        elif name == "figure" and found.body.strip():
            caption = found.body.strip().split("\n\n")[0]
            self.numbered(label, "fig", "Figure", caption, found.line)
        elif name in TABLES and argument:
            self.numbered(label, "tab", "Table", argument, found.line)
        elif name in ("exercise", "exercise-start") and "nonumber" not in options:
            self.numbered(label, "ex", "Exercise", argument, found.line)
        elif name.startswith("prf:") and name != "prf:proof" and "nonumber" not in options:
            self.numbered(label, "prf", name[4:].capitalize(), argument, found.line)
        elif name == "glossary":
            entries = re.findall(r"^(\S.*)\n(?=\s|:)", found.body + "\n", re.MULTILINE)
            self.chapter.terms.update(term.strip() for term in entries if not term.startswith(":"))
        if name in CONTAINERS or name.startswith("prf:"):
            self.markdown(found.body, found.body_line, nested=True)

    def numbered(self, label: str | None, kind: str, noun: str, title: str, line: int) -> None:
        number = self.chapter.numbers[line] = self.count(noun)
        if label:
            self.add(label, kind, number, title, line, noun)


def _exports(chapter: Chapter) -> Iterator[Export]:
    """The export cells of a chapter, every directive checked."""
    module = ""
    ordinals: dict[str, int] = defaultdict(int)
    for index, cell in enumerate(chapter.cells):
        if cell.kind != "code":
            continue
        for offset, text in enumerate(cell.source.split("\n")[1:], 1):
            if text.startswith("#|"):
                raise SourceError(
                    chapter.file, cell.line + offset, "a directive below the first line; move it to the top of its cell"
                )
        first, _, rest = cell.source.partition("\n")
        if not first.startswith("#|"):
            continue
        word, *arguments = first[2:].split() or [""]
        _check_directive(chapter.file, cell.line, word, arguments)
        if word == "default_exp":
            module = arguments[0]
            if rest.strip():
                raise SourceError(chapter.file, cell.line, "code in a default_exp cell; move it to a cell of its own")
            continue
        home = arguments[0] if arguments else module
        if not home:
            raise SourceError(
                chapter.file, cell.line, "`#| export` before any default_exp; add a `#| default_exp NAME` cell above"
            )
        if cell.section is None:
            raise SourceError(
                chapter.file, cell.line, "an export cell in a section without a label; put `(sec-…)=` above its heading"
            )
        code = rest.strip("\n").rstrip()
        line = cell.line + 1 + (len(rest) - len(rest.lstrip("\n")))
        if not code:
            raise SourceError(chapter.file, cell.line, "an empty export cell; add its code or remove it")
        if marker := re.search(r"^ *# %% ", code, re.MULTILINE):
            at = line + code.count("\n", 0, marker.start())
            raise SourceError(chapter.file, at, "a line that looks like a marker; write its `# %% ` otherwise")
        ordinals[cell.section] += 1
        piece = pieces.read(code, chapter.file, line)
        bound = () if piece else names.public(code, chapter.file, line)
        yield Export(home, cell.section, ordinals[cell.section], code, bound, line, index, piece)


def _check_directive(file: str, line: int, word: str, arguments: list[str]) -> None:
    if word not in ("export", "default_exp"):
        close = difflib.get_close_matches(word, ["export", "default_exp"], 1, 0.4)
        hint = f"did you mean `#| {close[0]}`?" if close else "use `#| export` or `#| default_exp NAME`"
        raise SourceError(file, line, f"unknown directive `#| {word}`; {hint}")
    if len(arguments) > 1 or (word == "default_exp" and not arguments):
        raise SourceError(file, line, f"`#| {word}` takes one module name; write `#| {word} NAME`")
    for name in arguments:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
            raise SourceError(file, line, f"{name} is no module name; use lower-case letters, digits and _")
