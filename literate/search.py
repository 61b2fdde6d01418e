"""The search: sections are what it finds, and prose is what it reads. Formulas, code and outputs are left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes

from literate.api import OVERVIEW

BIBLIOGRAPHY = "chapters/bibliography"
SILENT = (nodes.literal_block, nodes.math_block, nodes.raw, nodes.comment, nodes.image, nodes.target, nodes.title,
          addnodes.desc_signature, addnodes.toctree)  # fmt: skip
GREEK = dict(zip(
    "alpha beta gamma delta epsilon varepsilon eta theta kappa lambda mu nu xi pi rho sigma tau phi varphi chi psi "
    "omega Delta Theta Lambda Sigma Phi Omega".split(), "αβγδεεηθκλμνξπρστφφχψωΔΘΛΣΦΩ", strict=True))  # fmt: skip
Entry = dict[str, Any]


def sections(docname: str, doctree: nodes.document) -> list[Entry]:
    """The sections of a page, each with its own prose."""
    kind = "package" if docname.startswith(OVERVIEW) else "papers" if docname == BIBLIOGRAPHY else ""
    found = []
    for section in doctree.findall(nodes.section):
        title = next(iter(section.findall(nodes.title)), None)
        if title is None:
            continue
        head = not isinstance(section.parent, nodes.section)
        text = re.sub(r"\s+([.,;:)])", r"\1", " ".join(" ".join(prose(section)).split()))
        text = re.sub(r"(?<=[_^])\{([^{}]*)\}", r"\1", text)  # the indices of a docstring's formulas
        if text or head:
            found.append({"page": docname, "anchor": "" if head else section["ids"][0], "kind": kind,
                          "title": words(title), "text": text})  # fmt: skip
    return found


def prose(section: nodes.Element) -> Iterator[str]:
    """The text of a section without its subsections."""
    for child in section.children:
        if isinstance(child, (nodes.section, *SILENT)) or hidden(child):
            continue
        if isinstance(child, nodes.TextElement):
            yield "".join(pieces(child))
        elif isinstance(child, nodes.Element):
            yield from prose(child)


def hidden(node: nodes.Node) -> bool:
    """Code cells with their outputs, except for figures, whose captions are prose; the machinery's quiet lines."""
    classes = set(node.get("classes", [])) if isinstance(node, nodes.Element) else set()
    return bool(classes & {"cell_input", "gd-check", "gd-export", "gd-derived", "gd-facts", "stdout", "stderr"})


def pieces(node: nodes.Node) -> Iterator[str]:
    """The words of a paragraph; of its formulas, what can be read aloud."""
    if isinstance(node, nodes.Text):
        yield re.sub(r"\$([^$]+)\$", lambda m: spoken(m[1]), node.astext())  # a title of the bibliography
    elif isinstance(node, nodes.math):
        yield spoken(node.astext())
    elif not isinstance(node, SILENT):
        for child in node.children:
            yield from pieces(child)


def words(title: nodes.Element) -> str:
    return " ".join("".join(part for child in title.children for part in pieces(child)).split())


def spoken(tex: str) -> str:
    tex = re.sub(r"\\([A-Za-z]+)", lambda m: GREEK.get(m[1], m[0]), tex.strip())
    return tex if re.fullmatch(r"[\w\s=+.,/()<>−-]*", tex) and "_" not in tex else "…"


def collect(app: Any, doctree: nodes.document, docname: str) -> None:
    title = app.env.titles[docname].astext()
    numbered = re.match(r"chapters/(\d\d)_", docname)
    for entry in sections(docname, doctree):
        app.env.book_search.append({**entry, "in": f"{numbered[1]} {title}" if numbered else title})


def begin(app: Any) -> None:
    app.env.book_search = []
    app.builder.search = False  # not Sphinx's, which finds pages and shows TeX


def search_page(app: Any) -> list[tuple[str, dict[str, Any], str]]:
    return [("search", {"title": app.config.html_title}, "search.html")]


def write(app: Any, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    entries = json.dumps(app.env.book_search, ensure_ascii=False, separators=(",", ":"))
    (Path(app.outdir) / "_static/search-index.js").write_text(f"window.guidedDescentSearch={entries};\n", "utf-8")


def setup(app: Any) -> None:
    app.connect("builder-inited", begin)
    app.connect("doctree-resolved", collect, priority=900)
    app.connect("html-collect-pages", search_page)
    app.connect("build-finished", write)
