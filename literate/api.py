"""The package's pages: an overview, and one page a module, written when the site is built."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
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


#: What a module holds, for a reader who looks for something.
MODULES = {
    "adaptive": "a step size for each number, from its own past: Adam and its relatives",
    "averaging": "averages of weights, and methods built on them",
    "book": "what the chapters use: checks, seeds, training loops, figures",
    "capture": "what a layer sees: its inputs and the gradients at its outputs",
    "core": "the base of every optimizer: options, ranges, state, checkpoints",
    "curvature": "curvature matrices as operators; spectra, traces and diagonals from products",
    "diagonal": "methods that divide by an estimated diagonal of curvature",
    "engines": "how a rule runs: one tensor at a time, lists, matrices stacked, compiled",
    "examples": "small optimizers that show how the base is used",
    "feature_learning": "problems whose true features are known, and layer-wise steps on them",
    "initialization": "first weights: mean field theory, and schemes for a model that exists",
    "kfac": "Kronecker-factored curvature, layer by layer",
    "large_batch": "layer-wise rates and clipping: LARS, LAMB, CLARS",
    "layers": "which layers a model has, and how their weights are matrices",
    "layerwise": "the base of methods that precondition layer by layer",
    "likelihoods": "the losses that are negative log-likelihoods, and how to draw from them",
    "modular": "norms of whole networks, by composition",
    "mup": "learning rates that hold at every width, and the two tests of it",
    "muon": "the polar factor with a certificate; Muon and Scion",
    "newton": "Newton and quasi-Newton methods, line searches, conjugate gradients",
    "noise": "the noise in a gradient: its scale, the critical batch size, the noise ball",
    "norms": "norms, their duals and the unit step each allows; sign methods",
    "problems": "test problems with known minima, and gradient descent",
    "routing": "which parameter is stepped by which method",
    "schedules": "learning rates that change with time",
    "sgd": "gradient descent with momentum",
    "shampoo": "a preconditioner for each side of a matrix: Shampoo, SOAP and their kin",
    "vector": "methods that treat all parameters as one vector",
}


def overview(book: Book) -> str:
    """What is at the top, and what each module holds."""
    rows = ["| name | what it is for | chapter |", "|---|---|---|"]
    for name, pairs in sorted(book.modules.items()):
        for chapter, export in pairs:
            for public in export.names:
                if public in book.top(name):
                    rows.append(f"| {link(name, public, 'gd.')} | {export.summary(public)} | {numbered(chapter)} |")
    modules = ["| module | what is in it | chapter |", "|---|---|---|"]
    for name, pairs in sorted(book.modules.items()):
        modules.append(f"| {{py:mod}}`{name} <{PACKAGE}.{name}>` | {MODULES[name]} | {origin(pairs, numbered)} |")
    return "\n".join(["", "", "## At the top", "", *rows, "", "## Modules", "", *modules, ""])


def link(module: str, name: str, prefix: str = "") -> str:
    return f"{{py:obj}}`{prefix}{name} <{PACKAGE}.{module}.{name}>`"


def numbered(chapter: Chapter) -> str:
    return f"{{doc}}`{chapter.number:02d} </{chapter.docname}>`"


def titled(chapter: Chapter) -> str:
    return f"{{doc}}`/{chapter.docname}`"


def origin(pairs: list[tuple[Chapter, Export]], named: Callable[[Chapter], str] = titled) -> str:
    return ", ".join(dict.fromkeys(named(chapter) for chapter, _ in pairs))


def module(book: Book, name: str) -> str:
    """The page of a module: what is in it, at a glance; then an entry for each name, under its own heading."""
    home, pairs = f"{PACKAGE}.{name}", book.modules[name]
    exports = {public: export for _, export in pairs for public in export.names}
    facts = {public: state(home, public) for public in exports}
    with_state = any(facts.values())
    more = with_state * 1
    rows = ["| name | what it is for |" + more * " state |", "|---|---|" + more * "---|"]
    for public, export in exports.items():
        row = f"| {link(name, public)} | {export.summary(public)} |"
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
