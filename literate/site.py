"""The site: a Sphinx extension for Jupyter Book, and `python -m literate.site`, which builds it.

A page shows the chapter's `.md` with the outputs stored in its `.ipynb`, so building runs no chapter code and shows
exactly what nbval verified. Stored outputs that are stale fail the build before anything is read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from sphinx import addnodes
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.errors import ExtensionError
from sphinx.util import inspect

from literate import api, front, search
from literate.figures import inlined
from literate.fold import folded
from literate.notebook import PLOTLY, PUBLISHED, TICK, draft_outputs, stored_outputs
from literate.plain import added
from literate.source import PACKAGE, Book, Chapter, Export, Label, SourceError, shown
from literate.ticks import explained, parted
from literate.weight import copy_mathjax, keep_used_icons

ASSETS = Path(__file__).parent / "assets"
ROOT_PAGE = "chapters/index"
# Plotly figures met while reading: name -> JSON. They become scripts of their own, fetched when the page needs them:
# the page stays light, and a script (unlike a fetch) also loads from file://.
figures: dict[str, str] = {}
CHAPTER = re.compile(r"\b[Cc]hapters?[ \xa0]\d\d(?:(?:, | and | to |–)\d\d)*\b")


@cache
def book(root: str) -> Book:
    return Book.load(root)


def refuse_stale(app: Any) -> None:
    """Before anything is read: no page shows an output that its code no longer gives."""
    this, found = book(str(app.srcdir)), []
    if app.config.draft:
        return
    for chapter in this.chapters:
        try:
            stored_outputs(this, chapter)
        except SourceError as error:
            found.append(str(error))
    if front.shown(this) and (problem := front.stale(this)):
        found.append(problem)
    if found:
        raise ExtensionError("\n".join(["stored outputs that are not current", *found]))


# ---------------------------------------------------------------- a chapter, as a notebook for myst-nb


def read(text: str, root: str, stem: str, draft: bool) -> nbformat.NotebookNode:
    """The reader myst-nb calls for `chapters/{stem}.md`; `text` is that file, which the book has read already."""
    this = book(root)
    chapter = next(c for c in this.chapters if c.stem == stem)
    outputs = draft_outputs(chapter) if draft else stored_outputs(this, chapter)
    exports = {export.cell: export for export in chapter.exports}
    page: list[tuple[nbformat.NotebookNode, int]] = []
    for index, cell in enumerate(chapter.cells):
        if cell.kind != "code":
            page.append((new_markdown_cell(cell.source), cell.line))
            continue
        if index in exports and (exports[index].names or exports[index].piece):
            page.append((new_markdown_cell(badge(exports[index])), cell.line))
        if index in outputs:  # else a cell of directives alone
            source, line = shown(cell)
            names = ((output, f"{stem}-{index}-{n}") for n, output in enumerate(outputs[index]))
            seen = [new for output, name in names for new in present(output, cell.metadata, name)]
            page.append((new_code_cell(source, metadata=cell.metadata, outputs=seen), line))
    if chapter.exports:
        page.append((new_markdown_cell(added(chapter)), page[-1][1]))
    metadata = {k: v for k, v in chapter.metadata.items() if k not in ("jupytext", "top_level")}
    metadata["language_info"] = {"name": "python"}  # else: "No source code lexer found"
    metadata["source_map"] = [line - 1 for _, line in page]  # warnings then name lines of the .md
    return new_notebook(cells=[cell for cell, _ in page], metadata=metadata)


def present(output: Any, metadata: dict[str, Any], name: str) -> list[Any]:
    """A stored output as the page shows it: checks as one quiet line, Plotly figures as an element that loads them."""
    if output.output_type == "stream" and output.name == "stdout" and TICK.search(output.text):
        words, ticks = parted(output.text)
        said = [new_output("stream", name="stdout", text=words)] if words.strip() else []
        return [*said, *([new_output("display_data", data={"text/markdown": ticks})] if ticks else [])]
    if PLOTLY in output.get("data", {}):
        figure = output.data[PLOTLY]
        figures[name] = json.dumps(figure, separators=(",", ":"), ensure_ascii=False)
        alt = metadata.get("mystnb", {}).get("image", {}).get("alt", "Interactive figure")
        height = figure.get("layout", {}).get("height", 420)
        html = (f'<div class="gd-plotly" role="group" data-figure="{name}" style="min-height:{height}px" '
                f'aria-label="{alt.replace(chr(34), "&quot;")}"></div>')
        return [new_output("display_data", data={"text/html": html})]
    return [output]


def badge(export: Export) -> str:
    home = f"{PACKAGE}.{export.module}"
    if export.piece:
        methods = ", ".join(f"`{method.name}`" for method in export.piece.methods)
        owner = export.piece.owner
        return f":::{{div}} gd-export\nadded to {{py:obj}}`{owner} <{home}.{owner}>`: {methods}\n:::"
    names = ", ".join(f"{{py:obj}}`{name} <{home}.{name}>`" for name in export.names)
    return f":::{{div}} gd-export\nexported to {{py:mod}}`{home}`: {names}\n:::"


# ---------------------------------------------------------------- numbers


def number_chapters(app: Any, env: Any) -> list[str]:
    """Give each chapter the number in its file name, and other pages none.

    Sphinx counts the pages of a toctree; the book's numbers are permanent and chapters may be missing in between.
    Runs after Sphinx has numbered sections, and then has it number equations, figures and exercises once more.
    """
    for docname, numbers in env.toc_secnumbers.items():
        stem = re.search(r"/(\d\d)_", docname)

        def mend(number: Any, stem: Any = stem) -> Any:
            return type(number)([int(stem[1]), *number[1:]]) if stem and number else None

        env.toc_secnumbers[docname] = {anchor: mend(n) for anchor, n in numbers.items() if mend(n)}
        for node in [*env.tocs[docname].findall(nodes.reference), env.titles[docname]]:
            node["secnumber"] = mend(node.get("secnumber"))
    numbered = TocTreeCollector().assign_figure_numbers(env)
    # then as the text writes it, chapter 03: in titles, sidebar and next page; equations and figures stay (3.1)
    for docname, numbers in env.toc_secnumbers.items():
        env.toc_secnumbers[docname] = {anchor: two_digits(n) for anchor, n in numbers.items()}
        for node in [*env.tocs[docname].findall(nodes.reference), env.titles[docname]]:
            node["secnumber"] = two_digits(node.get("secnumber"))
    return numbered


def two_digits(number: Any) -> Any:
    return type(number)([f"{number[0]:02d}"]) if number and len(number) == 1 else number


def link_chapters(app: Any, doctree: nodes.document) -> None:
    """`chapter 07` in running text, also in a docstring, is a link."""
    pages = {f"{c.number:02d}": c.docname for c in book(str(app.srcdir)).chapters}
    closed = (nodes.reference, addnodes.pending_xref, nodes.title, nodes.literal, nodes.literal_block, nodes.raw,
              nodes.math, nodes.math_block, nodes.comment, addnodes.desc_signature)  # fmt: skip
    for text in list(doctree.findall(nodes.Text)):
        words, above = text.astext(), text.parent
        if not CHAPTER.search(words):
            continue
        while above and not isinstance(above, closed):
            above = above.parent
        if above is not None:
            continue
        new: list[nodes.Node] = []
        done = 0
        for match in CHAPTER.finditer(words):
            for number in re.finditer(r"\d\d", match[0]):
                start, end = match.start() + number.start(), match.start() + number.end()
                if number[0] not in pages or pages[number[0]] == app.env.docname:
                    continue
                alone = len(re.findall(r"\d\d", match[0])) == 1
                start = match.start() if alone else start
                link = addnodes.pending_xref(
                    "", nodes.inline("", words[start:end]), refdomain="std", reftype="doc", refexplicit=True,
                    reftarget=f"/{pages[number[0]]}", refdoc=app.env.docname, refwarn=False,
                )  # fmt: skip
                new += [nodes.Text(words[done:start]), link]
                done = end
        if new:
            text.parent.replace(text, [*new, nodes.Text(words[done:])])


# ---------------------------------------------------------------- from the API page back to the derivation


def api_page(app: Any, docname: str, source: list[str]) -> None:
    """Add what the package says of itself to its pages."""
    source[0] += api.page(book(str(app.srcdir)), docname)


def signature(app: Any, what: str, name: str, obj: Any, options: Any, arguments: str, returns: str) -> Any:
    """Show how a class is made by its `__init__`, where autodoc shows the `*args` of a metaclass."""
    if what == "class" and "__call__" in vars(type(obj)):
        found = inspect.signature(obj.__init__, bound_method=True)
        return inspect.stringify_signature(found, show_annotation=False), returns
    return None


def shorten_types(app: Any, domain: str, objtype: str, content: Any) -> None:
    """Say `Tensor` for `~torch.Tensor` beside a `Literal`, where Sphinx gives up and prints the tilde."""
    for text in list(content.findall(nodes.Text)):
        if "Literal[" in text and "~" in text:
            text.parent.replace(text, nodes.Text(re.sub(r"~(\w+\.)+", "", text)))


def link_back(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """End a docstring with the section that derives it and the equations nearest to its cell."""
    if what == "module":
        lines.clear()  # the page says it already
    if what == "data" and lines and lines[0] in (type(obj).__doc__ or ""):
        lines.clear()  # what `dict` says of itself
    lines[:] = equation_links("\n".join(lines), book(str(app.srcdir))).split("\n")
    module, _, public = name.removeprefix(f"{PACKAGE}.").partition(".")
    for chapter, export in book(str(app.srcdir)).modules.get(module, []):
        if public in export.names:
            label = chapter.labels[export.section]
            where = f"{label.noun} {label.number}, :ref:`{label.name}`".strip()
            equations = " and ".join(f":eq:`{e.name}`" for e in nearest(chapter, export, label))
            sentence = f"Derived in {where}: {equations}." if equations else f"Derived in {where}."
            lines += ["", ".. container:: gd-derived", "", f"   {sentence}", ""]


def equation_links(text: str, this: Book) -> str:
    """A docstring whose `Source:` is one paragraph, and where `eq-x` is a link to that equation."""

    def link(match: re.Match[str]) -> str:
        return f":eq:`{match[0]}`" if match[0] in this.labels else match[0]

    text = re.sub(r"^Source: .*(?:\n +\S.*)+", lambda m: re.sub(r"\n +", " ", m[0]), text, flags=re.MULTILINE)
    return re.sub(r'(?<![`\w"-])eq(-[a-z0-9]+)+', link, text)


def nearest(chapter: Chapter, export: Export, section: Label) -> list[Label]:
    """The last two labelled equations before an export cell, or the first after it, within its section."""
    starts = [label.line for label in chapter.labels.values() if label.kind == "sec" and label.line > section.line]
    inside = [label for label in chapter.labels.values()
              if label.kind == "eq" and section.line < label.line < min(starts, default=sys.maxsize)]
    return [label for label in inside if label.line < export.line][-2:] or inside[:1]


# ---------------------------------------------------------------- what every page carries


def configure(app: Any, config: Any) -> None:
    """Hand each chapter to `read`; add the footer and our own style."""
    this = book(str(app.srcdir))
    # After myst-nb has seen this setting, which would make source suffixes of these names.
    config.nb_custom_formats = {
        f"{c.stem}.md": [f"{__name__}.read", {"root": str(app.srcdir), "stem": c.stem, "draft": config.draft}, False]
        for c in this.chapters
    }
    config.html_static_path.append(str(ASSETS))
    config.templates_path.append(str(ASSETS.parent / "templates"))
    config.html_theme_options |= {
        "extra_footer": footer(this),
        "logo": {"text": config.html_title, "alt_text": ""},  # the text beside it says it
        "search_bar_text": "Search the book",
        "show_toc_level": 2,
    }


def footer(this: Book) -> str:
    commit, dirty = git(this.root, "rev-parse", "--short=10", "HEAD"), git(this.root, "status", "--porcelain", "-uno")
    at = f' · commit <a href="{this.repository}/commit/{commit}">{commit}</a>' if commit else ""
    changes = " with uncommitted changes" if commit and dirty else ""
    blob = f"{this.repository}/blob/{this.config['repository']['branch']}"
    return (f'<p class="gd-footer">Version {this.version}{at}{changes}<br>Code: <a href="{blob}/LICENSE">MIT</a>. '
            'Text and figures: <a href="https://creativecommons.org/licenses/by/4.0/">CC BY 4.0</a>.</p>')


def git(root: Path, *arguments: str) -> str:
    """What git says, or nothing where there is no git, or no repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def adjust_page(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Colab opens the branch that carries the published notebooks; edits go to the branch that carries the text."""
    # docutils' role for a reference is deprecated, and a list has to hold list items; sphinx-exercise repeats an id
    body = context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"')
    body = re.sub(r'<section id="(\w+-content)">', r'<section class="\1">', body)
    first = book(str(app.srcdir)).chapters[:1]
    body = explained(body, first=any(chapter.docname == pagename for chapter in first))
    context["body"] = inlined(folded(body), app)
    if 'class="math' not in body:
        context["script_files"] = [file for file in context["script_files"] if not about_mathematics(file)]
    for group in context.get("header_buttons", []):
        if pagename.startswith(f"{api.OVERVIEW}/") and "buttons" in group:
            group["buttons"] = [b for b in group["buttons"] if b.get("text") != "Suggest edit"]
        for button in group.get("buttons", []):
            if button.get("text") == "Colab":
                branch = book(str(app.srcdir)).config["repository"]["branch"]
                button["url"] = button["url"].replace(f"/blob/{branch}/", f"/blob/{PUBLISHED}/")


def about_mathematics(file: Any) -> bool:
    return "mathjax/" in (file.filename or "") or "window.MathJax" in file.attributes.get("body", "")


def finish(app: Any, error: Exception | None) -> None:
    """Put MathJax, Plotly, the figures and the plain notebooks beside the pages."""
    if error or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    copy_mathjax(package_folder("sphinx-mathjax-offline") / "static/mathjax", static, app.config.mathjax3_config)
    keep_used_icons(Path(app.outdir))
    front.publish(book(str(app.srcdir)), static, draft=app.config.draft)
    if figures:
        shutil.copy2(package_folder("plotly") / "package_data/plotly.min.js", static)
        (static / "figures").mkdir()
        for name, data in figures.items():
            (static / f"figures/{name}.js").write_text(f"guidedDescentFigures[{name!r}]={data};\n", "utf-8")
    for chapter in book(str(app.srcdir)).chapters:  # what the download button offers
        shutil.copy2(chapter.notebook, Path(app.outdir) / f"_sources/{chapter.docname}.ipynb")


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    if not spec or not spec.origin:
        raise ExtensionError(f"{name} is not installed; run `pip install -r requirements.txt`")
    return Path(spec.origin).parent


def setup(app: Any) -> dict[str, Any]:
    app.add_config_value("comments_config", {}, "env")  # Jupyter Book sets it for an extension that we do not load
    app.add_config_value("draft", False, "env")  # show what is stored, stale or not
    app.connect("config-inited", configure, priority=900)
    app.connect("builder-inited", refuse_stale)
    app.connect("source-read", api_page)
    app.connect("doctree-read", link_chapters)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", link_back, priority=900)  # after napoleon
    app.connect("object-description-transform", shorten_types, priority=900)  # after autodoc's type hints
    app.connect("env-get-updated", number_chapters, priority=900)
    app.connect("html-page-context", adjust_page, priority=900)
    app.connect("build-finished", finish)
    search.setup(app)
    app.add_css_file("site.css", priority=900)
    app.add_css_file("web.css", priority=901)
    app.add_js_file("site.js", loading_method="defer")
    app.add_js_file("tips.js", loading_method="defer")
    return {"parallel_read_safe": False, "parallel_write_safe": False}


# ---------------------------------------------------------------- python -m literate.site


class Tee:
    """Keeps what is written, and passes on the lines that match."""

    def __init__(self, stream: Any, only: str) -> None:
        self.stream, self.only, self.kept, self.line = stream, only, "", ""

    def write(self, text: str) -> int:
        self.kept += text
        self.line += text
        if self.line.endswith(("\n", "\r")):
            if re.search(self.only, self.line):
                self.stream.write(self.line)
            self.line = ""
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def build(root: Path, out: Path, draft: list[str] | None = None) -> int:
    """Build the site afresh beside `out`, and put it there when there was no warning, or it is a draft of pages."""
    from jupyter_book.sphinx import build_sphinx

    start, this = time.perf_counter(), Book.load(root)
    api.write_stubs(this)
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".site-", dir=out.parent))
    toc = root / "_toc.yml"
    if draft:
        toc = stage / "_toc.yml"
        pages = [api.contents(this) if name == "api" else {"file": f"chapters/{name}"} for name in draft]
        part = {"caption": "Draft", "numbered": True, "chapters": pages}
        toc.write_text(json.dumps({"format": "jb-book", "root": ROOT_PAGE, "parts": [part]}))  # JSON is YAML
    try:
        with (
            contextlib.redirect_stdout(Tee(sys.stdout, only=r"\[ *\d+%\]")),
            contextlib.redirect_stderr(Tee(sys.stderr, only="(?!)")) as errors,
        ):
            status = build_sphinx(
                root, stage / "html", path_config=root / "_config.yml", noconfig=True, freshenv=True,
                warningiserror=draft is None, keep_going=True,
                confoverrides={"external_toc_path": str(toc), "latex_individualpages": False,
                               "draft": draft is not None},
            )
        if status != 0:
            said = re.sub(r"\x1b\[[\d;]*m", "", errors.kept).replace(f"{root}/", "").strip()
            print(f"\nThe site was not built; {out} is as it was. What to mend:\n\n{said}", file=sys.stderr)
            return 1
        if out.exists():
            out.rename(stage / "old")
        (stage / "html").rename(out)
    finally:
        shutil.rmtree(stage)
    print(f"\nOpened as a file it lacks its icons; `python -m http.server -d {os.path.relpath(out)}` shows it whole.")
    print(f"Built in {time.perf_counter() - start:.0f} s: {out / 'index.html'}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m literate.site", description="Build the site; warnings are errors.")
    parser.add_argument("--out", type=Path, help="where the site goes (default: _build/html)")
    parser.add_argument("--draft", nargs="*", metavar="PAGE", help="show stale outputs; warnings are no errors; "
                        "with names, as 03_momentum, only these pages beside the front page")
    arguments = parser.parse_args()
    out = arguments.out
    try:
        root = Book.load().root
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    return build(root, (out or root / "_build/html").resolve(), arguments.draft)


if __name__ == "__main__":
    sys.exit(main())
