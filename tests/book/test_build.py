"""The site is built from the text and the stored outputs, its numbers are the book's, its links lead somewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from literate import notebook
from literate.source import Book

ROOT = Path(__file__).parents[2]
Build = Callable[..., subprocess.CompletedProcess[str]]
CHAPTER = """\
---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
(ch-N)=
# Chapter N

(sec-N-first)=
## First

$$ a = N $$ (eq-N-a)

(sec-N-second)=
## Second

$$ b = N $$ (eq-N-b)

See {eq}`eq-N-a`, {numref}`fig-N`, {numref}`sec-N-second`, {ref}`ex-N`.

```{code-cell} python
---
mystnb:
  image: {alt: "stored"}
  figure: {name: fig-N, caption: "A caption with {eq}`eq-N-b`."}
---
open("ran", "w").close()
```

:::{exercise} Try
:label: ex-N
Do it.
:::
"""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of chapters 2 and 7, whose notebooks hold outputs that no run of their code gives."""
    root = tmp_path_factory.mktemp("small")
    (root / "chapters").mkdir()
    (root / "literate").symlink_to(ROOT / "literate")
    for name in ("_config.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    parts = [{"caption": c, "numbered": True, "chapters": [{"file": f"chapters/{c}"}]} for c in ("02_two", "07_seven")]
    (root / "_toc.yml").write_text(yaml.dump({"format": "jb-book", "root": "chapters/index", "parts": parts}))
    (root / "chapters/index.md").write_text("# A small book\n\n{cite:p}`cauchy`\n\n```{bibliography}\n```\n")
    (root / "chapters/references.bib").write_text("@book{cauchy, author={Cauchy}, title={T}, publisher={P}, year=1}")
    for stem, n in (("02_two", 2), ("07_seven", 7)):
        (root / f"chapters/{stem}.md").write_text(CHAPTER.replace("N", str(n)))
    store(root)
    return root


def store(root: Path) -> None:
    """Write each chapter's notebook with made-up outputs."""
    book = Book.load(root)
    for chapter in book.chapters:
        page = notebook.render(book, chapter)
        figure = nbformat.v4.new_output("display_data", data={"image/png": PNG})
        words = nbformat.v4.new_output("stream", name="stdout", text=f"stored with {chapter.stem}\n")
        nbformat.write(notebook.finish(page, [[], [words, figure]]), chapter.notebook)


def test_outputs_come_from_the_notebook_and_no_code_runs(small: Path, build: Build) -> None:
    result = build(small, small / "out/html")
    assert result.returncode == 0, result.stdout + result.stderr
    page = (small / "out/html/chapters/07_seven.html").read_text("utf-8")
    assert "stored with 07_seven" in page
    assert not list(small.rglob("ran"))
    # chapters keep the number of their file, wherever they stand
    assert check_numbers(Book.load(small), small / "out/html") == 2 * 7


def test_a_stale_output_fails_and_the_old_site_stays(small: Path, build: Build) -> None:
    text = (small / "chapters/07_seven.md").read_text("utf-8")
    site = small / "kept/html"
    site.mkdir(parents=True)
    (site / "index.html").write_text("the old site")
    try:
        (small / "chapters/07_seven.md").write_text(text.replace('open("ran"', 'open("run"'))
        result = build(small, site)
    finally:
        (small / "chapters/07_seven.md").write_text(text)
    line = next(n for n, found in enumerate(text.splitlines(), 1) if "open(" in found)
    assert result.returncode == 1
    assert f"chapters/07_seven.md:{line}: " in result.stderr
    assert "run `python -m literate weave 07_seven`" in result.stderr
    assert (site / "index.html").read_text() == "the old site"
    assert [path.name for path in site.parent.iterdir()] == ["html"]


@pytest.mark.parametrize("pages", [[], ["07_seven"]])
def test_a_draft_shows_a_stale_chapter_without_what_changed(small: Path, build: Build, pages: list[str]) -> None:
    path = small / "chapters/07_seven.md"
    text = path.read_text("utf-8")
    kept = '```{code-cell} python\nprint("kept")\n```\n\n:::{exercise} Try'
    try:
        path.write_text(text.replace(":::{exercise} Try", kept))
        before = Book.load(small)
        page = notebook.render(before, before.chapters[-1])
        words = [nbformat.v4.new_output("stream", name="stdout", text=f"{word}\n") for word in ("changed", "kept")]
        nbformat.write(notebook.finish(page, [[], *([word] for word in words)]), before.chapters[-1].notebook)
        path.write_text(path.read_text("utf-8").replace('open("ran"', 'open("run"') + "\n{ref}`sec-nowhere`\n")
        strict = build(small, small / "strict/html")
        draft = build(small, small / "draft/html", "--draft", *pages)
        shown = (small / "draft/html/chapters/07_seven.html").read_text("utf-8")
    finally:
        path.write_text(text)
        store(small)
    assert strict.returncode == 1 and "chapters/07_seven.md" in strict.stderr
    assert not (small / "strict/html").exists()
    assert draft.returncode == 0, draft.stdout + draft.stderr
    output = [pre.get_text() for pre in BeautifulSoup(shown, "html.parser").select(".cell_output pre")]
    assert output == ["kept\n"]
    assert not list(small.rglob("ran")) and not list(small.rglob("run"))
    assert (small / "draft/html/chapters/02_two.html").exists() == (not pages)
    shutil.rmtree(small / "draft")


def test_a_warning_fails_with_its_line(small: Path, build: Build) -> None:
    page = small / "chapters/index.md"
    text = page.read_text("utf-8")
    try:
        page.write_text(text + "\n{ref}`sec-nowhere`\n")
        result = build(small, small / "warned/html")
    finally:
        page.write_text(text)
    assert result.returncode == 1
    line = text.count("\n") + 2
    assert re.search(rf"chapters/index.md:{line}: .*sec-nowhere", result.stderr), result.stderr
    assert not (small / "warned/html").exists()


def check_numbers(book: Book, site: Path) -> int:
    """Compare the number of each label with the page's; returns how many there were."""
    pages: dict[str, BeautifulSoup] = {}
    count = 0
    for label in book.labels.values():
        if not label.number or label.docname not in pages and not (site / f"{label.docname}.html").exists():
            continue
        if label.docname not in pages:
            pages[label.docname] = BeautifulSoup((site / f"{label.docname}.html").read_text("utf-8"), "html.parser")
        page = pages[label.docname]
        target = page.find(id=f"equation-{label.name}" if label.kind == "eq" else label.name)
        assert target is not None, f"{label.docname}.html has no {label.name}"
        if label.kind == "eq":
            shown = target.select_one(".eqno").get_text().strip("()#¶ \n")
        elif label.kind == "sec":
            section = target if target.name == "section" else target.find_parent("section")
            shown = section.find(re.compile("h[1-6]")).select_one(".section-number").get_text().strip()
        else:
            title = target.select_one(".caption-number, .admonition-title")
            shown = re.search(r"\d+(\.\d+)*", title.get_text())[0]
        assert shown == label.number, f"{label.name}: the page says {shown}, the notebooks say {label.number}"
        count += 1
    return count


def test_numbers_on_the_pages_are_those_in_the_notebooks(site: Path, book: Book) -> None:
    assert check_numbers(book, site) > 20


def test_internal_links_and_anchors_resolve(site: Path) -> None:
    paths = [path for path in site.rglob("*.html") if "_static" not in path.parts]
    pages = {path: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in paths}
    ids = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in pages.items()}
    broken = []
    for path, page in pages.items():
        for tag, attribute in [("a", "href"), ("link", "href"), ("img", "src"), ("script", "src")]:
            for element in page.find_all(tag, {attribute: True}):
                address, anchor = urldefrag(element[attribute])
                if urlparse(address).scheme or address.startswith("//"):
                    continue
                target = (path.parent / unquote(address.partition("?")[0])).resolve() if address else path
                target = target / "index.html" if target.is_dir() else target
                if not target.exists() or (anchor and target in ids and unquote(anchor) not in ids[target]):
                    broken.append(f"{path.relative_to(site)}: {element[attribute]}")
    assert not broken


def test_every_public_name_has_an_entry_that_leads_back(site: Path, book: Book) -> None:
    for module, pairs in book.modules.items():
        page = BeautifulSoup((site / f"chapters/api/{module}.html").read_text("utf-8"), "html.parser")
        for chapter, export in pairs:
            for name in export.names:
                entry = page.find("dt", id=f"guided_descent.{module}.{name}")
                assert entry, f"no entry for {module}.{name}"
                links = [a["href"] for a in entry.parent.select(".gd-derived a")]
                assert any(link.startswith(f"../{chapter.stem}.html#") for link in links), f"{name} leads nowhere"


def test_chapters_show_badges_and_end_with_what_they_added(site: Path, book: Book) -> None:
    for chapter in book.chapters:
        page = BeautifulSoup((site / f"{chapter.docname}.html").read_text("utf-8"), "html.parser")
        assert len(page.select(".gd-export")) == len([e for e in chapter.exports if e.names or e.piece])
        names = {name for export in chapter.exports for name in export.names}
        last = page.select(".bd-article h2")[-1]
        assert "What this chapter added" in last.get_text()
        assert {code.get_text() for code in last.parent.select("td:first-child code")} == names


def test_pages_carry_version_and_licences(site: Path, book: Book) -> None:
    for path in site.glob("chapters/*.html"):
        footer = BeautifulSoup(path.read_text("utf-8"), "html.parser").select_one(".gd-footer").get_text()
        assert f"Version {book.version}" in footer
        assert "MIT" in footer and "CC BY 4.0" in footer


def test_the_download_is_the_plain_notebook(site: Path, book: Book) -> None:
    for chapter in book.chapters:
        offered = (site / f"_sources/{chapter.docname}.ipynb").read_text("utf-8")
        assert json.loads(offered) == json.loads(chapter.notebook.read_text("utf-8"))


def test_buttons_lead_to_colab_and_to_the_source(site: Path, book: Book) -> None:
    owner_and_name = "/".join(book.repository.split("/")[-2:])
    for chapter in book.chapters:
        page = BeautifulSoup((site / f"{chapter.docname}.html").read_text("utf-8"), "html.parser")
        links = {a["href"] for a in page.select(".article-header-buttons a")}
        assert f"https://colab.research.google.com/github/{owner_and_name}/blob/colab/{chapter.docname}.ipynb" in links
        assert f"{book.repository}/edit/main/{chapter.docname}.md" in links
        assert book.repository in links
