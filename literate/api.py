"""The package's pages: an overview, and one page a module, written when the site is built."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

from literate.files import commit
from literate.source import PACKAGE, Book, Chapter, Export

OVERVIEW = "chapters/api"


def write_stubs(book: Book) -> None:
    """A page is a file: one line for each module, in a folder that git ignores. The text is added as it is read."""
    folder = book.root / OVERVIEW
    wanted: dict[Path, str | None] = {folder / f"{name}.md": f"# `{name}`\n" for name in book.modules}
    commit(book.root, {path: None for path in folder.glob("*.md") if path not in wanted} | wanted)


def contents(book: Book) -> dict[str, Any]:
    """The entry of the table of contents."""
    return {"file": OVERVIEW, "sections": [{"file": f"{OVERVIEW}/{name}"} for name in sorted(book.modules)]}


def page(book: Book, docname: str) -> str:
    """What is added to the text of a page: nothing where it is none of the package's."""
    if docname == OVERVIEW:
        return overview(book)
    folder, _, name = docname.rpartition("/")
    return module(book, name) if folder == OVERVIEW and name in book.modules else ""


def overview(book: Book) -> str:
    rows = ["| module | from | public names |", "|---|---|---|"]
    for name, pairs in sorted(book.modules.items()):
        names = " · ".join(link(name, public, book.top(name)) for _, export in pairs for public in export.names)
        rows.append(f"| {{py:mod}}`{name} <{PACKAGE}.{name}>` | {origin(pairs)} | {names} |")
    return "\n".join(["", "", *rows, ""])


def link(module: str, name: str, top: list[str]) -> str:
    entry = f"{{py:obj}}`{name} <{PACKAGE}.{module}.{name}>`"
    return f"**{entry}**" if name in top else entry


def origin(pairs: list[tuple[Chapter, Export]]) -> str:
    return ", ".join(dict.fromkeys(f"{{doc}}`/{chapter.docname}`" for chapter, _ in pairs))


def module(book: Book, name: str) -> str:
    """The page of a module: what is in it, at a glance; then an entry for each name, under its own heading."""
    home, pairs = f"{PACKAGE}.{name}", book.modules[name]
    exports = {public: export for _, export in pairs for public in export.names}
    facts = {public: state(home, public) for public in exports}
    with_state = any(facts.values())
    more = with_state * 1
    rows = ["| name | what it is for |" + more * " state |", "|---|---|" + more * "---|"]
    for public, export in exports.items():
        row = f"| {link(name, public, [])} | {export.summary(public)} |"
        rows.append(row + (f" {facts[public]} |" if with_state else ""))
    out = ["", f"From {origin(pairs)}.", "", "```{eval-rst}", f".. py:module:: {home}", "```", "", *rows]
    if with_state:
        out += ["", "State is what is kept between two steps for a layer of *out* × *in* weights, read off the "
                "optimizer after three steps; single numbers are left out, *d* is the number of parameters."]
    for public, export in exports.items():
        kind = re.search(rf"^(class|def) {public}\b", export.code, re.MULTILINE)
        out += ["", f"## `{public}`", ""]
        lines = [f"**State**: {facts[public]}"] if facts[public] else []
        if facts[public] and (words := cost(home, public)):
            lines.append(f"**Cost**: {words}")
        if lines:
            out += [":::{div} gd-facts", "<br>".join(lines), ":::", ""]
        directive = {"class": "autoclass", "def": "autofunction"}[kind[1]] if kind else "autodata"
        out += ["```{eval-rst}", f".. {directive}:: {home}.{public}"]
        out += ["   :members:", "   :show-inheritance:"] if directive == "autoclass" else []
        out += ["```"]
    return "\n".join([*out, ""])


def cost(home: str, name: str) -> str:
    """The sentences of a docstring that say what a step takes."""
    text = inspect.getdoc(getattr(importlib.import_module(home), name)) or ""
    prose = re.split(r"^Args:", text, maxsplit=1, flags=re.MULTILINE)[0]
    prose = re.sub(r"::\n\n(?: {4}.*\n|\n)+", ".\n\n", prose + "\n")
    sentences = re.split(r"(?<=[.;])\s+(?=[A-Z])", " ".join(prose.split("\n\n", 1)[-1].split()))
    return " ".join(s for s in sentences if re.search(r"\bMemory\b|\bwork d|\bcosts about\b", s)).replace("``", "`")


# ---------------------------------------------------------------- state, asked of the package itself

OUT, IN = 5, 7  # of the layer whose optimizer is asked: any two numbers that cannot be confused


@cache
def state(home: str, name: str) -> str:
    """What an optimizer keeps for a matrix of weights between two steps; nothing for what is no optimizer."""
    import torch

    from guided_descent.core import Optimizer

    kind = getattr(importlib.import_module(home), name, None)
    if not (inspect.isclass(kind) and issubclass(kind, Optimizer)) or "__init__" not in vars(kind):
        return ""
    layer = torch.nn.Linear(IN, OUT, bias=False, dtype=torch.float64)
    x, y = torch.randn(11, IN, dtype=torch.float64), torch.randn(11, OUT, dtype=torch.float64)
    accepted, options, note = inspect.signature(kind.__init__).parameters, {}, ""
    if "momentum" in accepted and accepted["momentum"].default == 0:
        options, note = {"momentum": 0.9}, " (with momentum)"
    if "likelihood" in accepted:
        options["likelihood"] = "gaussian"
    if "defaults" in accepted:
        return ""  # a base class
    loss = torch.nn.MSELoss(reduction="sum")
    whole = layer if "model" in accepted else layer.parameters()
    extra = (lambda out, target: loss(out, target) / 2,) if "loss" in accepted else ()
    try:
        method = kind(whole, *extra, **options)
        for _ in range(3):
            def closure(method: Any = method) -> Any:
                method.zero_grad()
                value = (layer(x) - y).square().sum(1).mean() / 2
                if not method.differentiates:
                    value.backward()
                return value

            method.step(closure) if method.needs_closure else (closure(), method.step())
    except (TypeError, ValueError, RuntimeError):
        return ""
    found: dict[str, bool] = {}  # whether it is one number a parameter
    for kept in method.state.values():
        for key, value in tensors(kept):
            size = shape(tuple(value.shape))
            if size:
                found[f"`{key}` {size}"] = size == "out × in" and not isinstance(kept.get(key), list)
    words = "; ".join(found) or "none"
    each = f", {len(found)} a parameter" if found and all(found.values()) else ""
    return words + each + (note if found else "")


def tensors(kept: Any, name: str = "") -> list[tuple[str, Any]]:
    import torch

    if isinstance(kept, torch.Tensor):
        return [(name, kept)]
    if isinstance(kept, dict):
        return [pair for key, value in kept.items() for pair in tensors(value, str(key))]
    if isinstance(kept, list | tuple):
        return [pair for value in kept for pair in tensors(value, name)]
    return []


def shape(size: tuple[int, ...]) -> str:
    """The shape in words: for weights of `out × in`."""
    words = {1: "1", OUT: "out", IN: "in", OUT * IN: "d"}
    if not size or set(size) == {1}:
        return ""
    return " × ".join(words.get(n, str(n)) for n in size if n != 1)
