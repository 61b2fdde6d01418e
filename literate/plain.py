"""MyST to the plain Markdown that Colab, GitHub and Jupyter all show: no roles, no directives, no labels."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import indent

from pybtex.database import BibliographyData, Entry, parse_file
from pybtex.exceptions import PybtexError

from literate.myst import Directive, SourceError, directive, parse
from literate.source import PACKAGE, Book, Cell, Chapter, Label

# What a line of prose is made of, as far as it concerns us; code spans come first so that they stay as they are.
ATTRIBUTE = r"(?:[.#][\w-]+|[\w-]+=[^\s{}]+)"
ATTRIBUTES = rf"\{{\s*{ATTRIBUTE}(?:\s+{ATTRIBUTE})*\s*\}}"
INLINE = re.compile(
    r"(?P<escape>\\[\\`$*_{}\[\]])"
    r"|(?:\{(?P<role>[\w:.+-]+)\})?(?<!`)(?P<ticks>`+)(?!`)(?P<text>.+?)(?<!`)(?P=ticks)(?!`)"
    r"|(?<!\$)\$(?P<math>(?:\\.|[^\\$])+)\$(?!\$)"
    r"|\]\((?P<page>\w+)\.md(?P<anchor>#[\w-]+)?\)"
    rf"|(?P<attributes>(?<=[\])`$]){ATTRIBUTES}|^[ \t>]*{ATTRIBUTES}[ \t]*$)"
    r"|(?P<substitution>\{\{[^{}]+\}\})",
    re.DOTALL | re.MULTILINE,
)
ADMONITIONS = {
    "note", "tip", "hint", "warning", "important", "caution", "attention", "danger", "error", "seealso", "margin",
    "sidebar", "topic", "admonition",
}  # fmt: skip
INVISIBLE = {"tableofcontents", "toctree", "bibliography", "exercise-end", "solution-end", "index"}
TABLES = {"list-table", "table"}


class Plain:
    """Renders the Markdown of one chapter."""

    def __init__(self, book: Book, chapter: Chapter) -> None:
        self.book, self.chapter = book, chapter
        config = book.config.get("sphinx", {}).get("config", {})
        macros = config.get("mathjax3_config", {}).get("tex", {}).get("macros", {})
        self.macros = {name: text for name, text in macros.items() if isinstance(text, str)}

    # -- blocks

    def markdown(self, source: str, base: int, *, quoted: bool = False) -> str:
        """Plain Markdown for `source`, which starts at line `base` of the chapter."""
        lines = source.split("\n")
        out: list[str] = []
        done = 0
        for token in parse(source, self.chapter.file, base):
            if not token.map or token.map[0] < done or token.nesting:
                continue
            start, end = token.map
            line = base + start
            text = "\n".join(lines[start:end])
            if token.type in ("myst_target", "myst_line_comment", "myst_block_break"):
                new = None
            elif token.type in ("math_block", "math_block_label"):
                new = _prefixed(text, "$$", self.equation(token.content, token.info, quoted or ">" in text))
            elif found := directive(token, self.chapter.file, base):
                new = self.directive(found)
                new = new if new is None else _prefixed(text, token.markup, new)
            elif token.type == "colon_fence":
                raise self.error(line, "a ::: fence without a {name}; name the directive")
            elif token.type == "inline":
                new = self.inline(text, line)
            else:
                continue
            out += lines[done:start] + ([] if new is None else [new])
            done = end
            while new is None and done < len(lines) and not lines[done] and not (out and out[-1]):
                done += 1  # one gap where there were two
        out += lines[done:]
        return "\n".join(out).strip("\n")

    def equation(self, tex: str, label: str, one_line: bool = False) -> str:
        tex = self.expand(tex).strip()
        if label:
            tex += f" \\tag{{{self.label(label, 0).number}}}"
        return f"$$ {' '.join(tex.split())} $$" if one_line else f"$$\n{tex}\n$$"

    def directive(self, found: Directive) -> str | None:
        name, title = found.name, self.inline(found.argument, found.line)
        if name in INVISIBLE:
            return None
        if name == "math":
            return self.equation(found.body or found.argument, found.options.get("label", ""))
        if name in ("code", "code-block"):
            return f"```{found.argument}\n{found.body}\n```"
        if name in ("image", "figure"):
            caption = f"\n\n{self.caption(found.line, found.body)}" if found.body.strip() else ""
            return f"![{found.options.get('alt', '')}]({found.argument}){caption}"
        if name == "glossary":
            entries = re.split(r"^(?=\S)(?!:)", found.body, flags=re.MULTILINE)
            pairs = (entry.strip().partition("\n") for entry in entries if entry.strip())
            return "\n\n".join(
                f"**{term}**: {self.inline(' '.join(text.split()).removeprefix(': '), found.line)}"
                for term, _, text in pairs
            )
        if name == "exercise-start":
            return f"**{self.heading('Exercise', found, title)}**"
        if name == "solution-start":
            return f"**{self.solution(found)}**"
        if name in TABLES:
            body = _pipe_table(found.body) if name == "list-table" else found.body
            number = self.chapter.numbers.get(found.line)
            head = f"**Table {number}.** {title}\n\n" if number else ""
            return head + self.markdown(body, found.body_line)
        fold = "dropdown" in str(found.options.get("class", ""))
        if name in ADMONITIONS:
            if name not in ("admonition", "topic", "sidebar", "margin") and title:  # then the argument is body text
                title, extra = "", title + "\n\n"
            else:
                extra = ""
            heading = title or {"seealso": "See also", "margin": "Aside"}.get(name, name.capitalize())
            body = extra + self.markdown(found.body, found.body_line, quoted=not fold)
            return _details(heading, body) if fold else _quote(f"**{heading}.**\n\n{body}")
        body = self.markdown(found.body, found.body_line, quoted=name.startswith("prf:"))
        if name == "dropdown":
            return _details(title, body)
        if name == "exercise":
            return f"**{self.heading('Exercise', found, title)}**\n\n{body}"
        if name == "solution":
            return _details(self.solution(found), body)
        if name == "prf:proof":
            return _quote(f"*Proof.* {body} ∎")
        if name.startswith("prf:"):
            return _quote(f"**{self.heading(name[4:].capitalize(), found, title)}**\n\n{body}")
        raise self.error(found.line, f"unknown directive {{{name}}}; use one of those in literate/plain.py")

    def heading(self, noun: str, found: Directive, title: str) -> str:
        number = self.chapter.numbers.get(found.line, "")
        return f"{noun} {number}".rstrip() + (f" ({title})" if title else "")

    def solution(self, found: Directive) -> str:
        label = self.label(found.argument, found.line, kinds=("ex",))
        return f"Solution to {label.noun} {label.number}".rstrip()

    def caption(self, line: int, text: str) -> str:
        """The line under a figure that starts at `line` of the chapter."""
        number = self.chapter.numbers.get(line, "")
        return f"**Figure {number}.** {self.inline(' '.join(text.split()), line)}"

    # -- inline

    def inline(self, text: str, line: int) -> str:
        def replace(match: re.Match[str]) -> str:
            at = line + text.count("\n", 0, match.start())
            if match["math"]:
                return f"${self.expand(' '.join(match['math'].split()))}$"
            if match["attributes"]:
                raise self.error(at, f"attributes {match[0].strip()}, which a notebook cannot show; remove them")
            if match["substitution"]:
                raise self.error(at, f"a substitution {match[0]}, which a notebook cannot show; write the text out")
            if match["page"]:
                return f"]({self.page(match['page'], at)}{match['anchor'] or ''})"
            return self.role(match["role"], match["text"].strip(), at) if match["role"] else match[0]

        return INLINE.sub(replace, text)

    def role(self, name: str, text: str, line: int) -> str:
        explicit = re.fullmatch(r"(.+?)\s*<(.+)>", text, re.DOTALL)
        shown, target = (explicit[1], explicit[2]) if explicit else ("", text)
        if name == "eq":
            label = self.label(target, line, kinds=("eq",))
            return self.link(f"({label.number})", label)
        if name in ("ref", "prf:ref", "numref"):
            label = self.label(target, line)
            numbered = f"{label.noun} {label.number}".strip()
            if name == "numref":
                if not label.number:
                    raise self.error(line, f"{target} has no number; use {{ref}}")
                shown = re.sub(r"%s|\{number\}", label.number, shown).replace("{name}", self.inline(label.title, line))
            titled = name == "ref" and label.kind in ("sec", "fig")
            return self.link(shown or (self.inline(label.title, line) if titled else numbered), label)
        if name in ("cite", "cite:p", "cite:t"):
            cited = [self.citation(key.strip(), line, textual=name == "cite:t") for key in text.split(",")]
            return ", ".join(cited) if name == "cite:t" else f"({'; '.join(cited)})"
        if name == "doc":
            stem = target.rpartition("/")[2].removesuffix(".md")
            title = next((c.title for c in [*self.book.chapters, *self.book.pages] if c.stem == stem), "")
            return f"[{shown or _unlinked(self.inline(title, line))}]({self.page(stem, line)})"
        if name == "term":
            if target not in self.book.terms:
                raise self.error(line, f"no glossary has the term {target}; add it or mend the role")
            return shown or target
        if name.startswith("py:"):
            target = target.removeprefix("~")
            module = target.removeprefix(f"{PACKAGE}.").partition(".")[0]
            anchor = target if target.count(".") > 1 else f"module-{target}"
            page = f"{self.book.site}chapters/api/{module}.html#{anchor}"
            return f"[`{shown or target.rpartition('.')[2]}`]({page})"
        if name == "math":
            return f"${self.expand(text)}$"
        raise self.error(line, f"unknown role {{{name}}}; use one of those in literate/plain.py")

    def label(self, name: str, line: int, kinds: tuple[str, ...] = ()) -> Label:
        label = self.book.labels.get(name)
        if label is None or (kinds and label.kind not in kinds):
            raise self.error(line, f"no {' or '.join(kinds) or 'label'} is named {name}; mend the reference")
        return label

    def link(self, text: str, label: Label) -> str:
        if label.docname == self.chapter.docname:
            return text
        anchor = f"equation-{label.name}" if label.kind == "eq" else label.name
        return f"[{_unlinked(text)}]({self.book.site}{label.docname}.html#{anchor})"

    def page(self, stem: str, line: int) -> str:
        if all(chapter.stem != stem for chapter in [*self.book.chapters, *self.book.pages]):
            raise self.error(line, f"no page is named {stem}; mend the link")
        return f"{self.book.site}chapters/{stem}.html"

    def citation(self, key: str, line: int, *, textual: bool) -> str:
        entry = bibliography(self.book).entries.get(key)
        if entry is None:
            raise self.error(line, f"chapters/references.bib has no {key}; add the entry or mend the key")
        authors = [" ".join([*p.prelast_names, *p.last_names]).strip("{}") for p in entry.persons.get("author", [])]
        who = {0: entry.fields.get("title", key), 1: authors[0] if authors else "", 2: " and ".join(authors)}
        names = who.get(len(authors)) or f"{authors[0]} et al."
        year = entry.fields.get("year", "n.d.")
        text = f"{names} ({year})" if textual else f"{names}, {year}"
        url = _url(entry)
        return f"[{text}]({url})" if url else text

    def expand(self, tex: str) -> str:
        """TeX with the macros of `_config.yml` replaced, which only the site knows."""
        for name, text in self.macros.items():
            tex = re.sub(rf"\\{name}(?![A-Za-z])", lambda _, text=text: text, tex)
        return tex

    def error(self, line: int, message: str) -> SourceError:
        return SourceError(self.chapter.file, line, message)


_bibliographies: dict[tuple[Path, int], BibliographyData] = {}


def bibliography(book: Book) -> BibliographyData:
    """The entries of `chapters/references.bib`."""
    path = book.root / "chapters" / "references.bib"
    if not path.exists():
        return BibliographyData()
    stamp = (path, path.stat().st_mtime_ns)
    if stamp not in _bibliographies:
        try:
            _bibliographies[stamp] = parse_file(str(path), "bibtex")
        except PybtexError as error:
            line = getattr(error, "lineno", None) or 1
            raise SourceError("chapters/references.bib", line, f"bad BibTeX: {error}; mend the entry") from None
    return _bibliographies[stamp]


def solution_cells(chapter: Chapter) -> set[int]:
    """The code cells between `{solution-start}` and `{solution-end}`, whose source a notebook hides."""
    hidden: set[int] = set()
    inside = False
    for index, cell in enumerate(chapter.cells):
        if cell.kind == "markdown":
            for gate in re.findall(r"^(?:`{3,}|:{3,})\{solution-(start|end)\}", cell.source, re.MULTILINE):
                inside = gate == "start"
        elif inside:
            hidden.add(index)
    return hidden


def figure_caption(plain: Plain, cell: Cell) -> str | None:
    """The Markdown that follows a code cell whose output is a figure."""
    caption = cell.metadata.get("mystnb", {}).get("figure", {}).get("caption")
    return plain.caption(cell.line, str(caption)) if caption else None


def added(chapter: Chapter) -> str:
    """The section that closes a chapter: what it added to the package."""
    rows = [
        f"| {{py:obj}}`{name} <{PACKAGE}.{export.module}.{name}>` | {export.summary(name)} |"
        for export in chapter.exports
        for name in export.names
    ]
    return "\n".join(["## What this chapter added to the package", "", "| Name | What it is |", "|---|---|", *rows])


def _unlinked(text: str) -> str:
    """Markdown without its links: the text of one cannot hold another."""
    return re.sub(r"\[([^\[\]]*)\]\([^()\s]*\)", r"\1", text)


def _url(entry: Entry) -> str:
    fields = entry.fields
    if "doi" in fields:
        return f"https://doi.org/{fields['doi']}"
    if "eprint" in fields:
        return f"https://arxiv.org/abs/{fields['eprint']}"
    return fields.get("url", "")


def _quote(text: str) -> str:
    return indent(text, "> ", lambda line: True).replace("> \n", ">\n")


def _details(title: str, body: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"


def _prefixed(old: str, markup: str, new: str) -> str:
    """`new` under the indentation, list marker or `>` that stood before the block it replaces."""
    first = old[: old.index(markup)]
    rest = re.sub(r"[^\s>]", " ", first)
    return first + new.replace("\n", f"\n{rest}") if first else new


def _pipe_table(body: str) -> str:
    rows = re.split(r"^\* ", body, flags=re.MULTILINE)[1:]
    cells = [[" ".join(cell.split()) for cell in re.split(r"^(?:  )?- ", row, flags=re.MULTILINE)[1:]] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([*lines[:1], "|" + "---|" * len(cells[0] if cells else []), *lines[1:]])
