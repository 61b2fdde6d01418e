"""Plain Markdown: everything MyST becomes something Colab and GitHub show."""

from __future__ import annotations

import pytest

from literate.plain import Plain, bibliography
from literate.source import Book, SourceError

SITE = "https://me.github.io/tiny/chapters/"
OTHER = """\
(ch-other)=
# Other *things*

(sec-other)=
## Other section

(sec-marked)=
## On $\\R^n$, `x` and {eq}`eq-other`

$$ y $$ (eq-other)

:::{exercise} Far
:label: ex-other
x
:::

```{glossary}
Hessian
  The matrix of second
  derivatives.

gradient
  First ones.
```
"""
LABELS = """\
(ch-here)=
# Here

(sec-here)=
## This section

$$ z $$ (eq-here)

:::{exercise} Near
:label: ex-here
x
:::

:::{prf:theorem} Main
:label: thm-here
x
:::

```{code-cell} python
---
mystnb: {figure: {name: fig-here, caption: "It **falls**."}}
---
1
```

"""
BIB = """\
@article{one, author={Nesterov, Yurii}, title={T}, year={1983}, doi={10.1/x}}
@article{two, author={Kingma, Diederik P. and Ba, Jimmy}, title={T}, year={2015}, eprint={1412.6980}}
@book{three, author={von A, B and C, D and E, F}, title={T}, year={2004}, url={https://x.y}}
@misc{none, title={Anonymous}, year={2001}}
"""


@pytest.fixture
def render(shelf):
    """Renders MyST that stands at the end of a chapter with one label of each kind."""

    def rendered(text: str) -> str:
        shelf.write("_config.yml", shelf.read("_config.yml") + MACROS)
        shelf.write("chapters/references.bib", BIB)
        shelf.write("chapters/02_other.md", shelf.front + OTHER)
        shelf.write("chapters/01_here.md", shelf.front + LABELS + "+++\n\n" + text)
        book = Book.load(shelf.root)
        cell = book.chapters[0].cells[-1]
        return Plain(book, book.chapters[0]).markdown(cell.source, cell.line)

    return rendered


MACROS = (
    r"sphinx: {config: {mathjax3_config: {tex: {macros: {R: '\mathbb{R}', argmin: '\operatorname{argmin}'}}}}}" + "\n"
)
INLINE = [
    ("see {eq}`eq-here`", "see (1.1)"),
    ("see {eq}`eq-other`", f"see [(2.1)]({SITE}02_other.html#equation-eq-other)"),
    ("{ref}`sec-here`", "This section"),
    ("{ref}`this one <sec-here>`", "this one"),
    ("{ref}`sec-other`", f"[Other section]({SITE}02_other.html#sec-other)"),
    ("{ref}`ex-here`", "Exercise 1.1"),
    ("{ref}`sec-marked`", f"[On $\\mathbb{{R}}^n$, `x` and (2.1)]({SITE}02_other.html#sec-marked)"),
    ("{numref}`fig-here`", "Figure 1.1"),
    ("{numref}`Fig. %s <fig-here>`", "Fig. 1.1"),
    ("{numref}`Fig. {number}, {name} <fig-here>`", "Fig. 1.1, It **falls**."),
    ("{numref}`sec-here`", "Section 1.1"),
    ("{prf:ref}`thm-here`", "Theorem 1.1"),
    ("{cite}`one`", "([Nesterov, 1983](https://doi.org/10.1/x))"),
    ("{cite:p}`one,two`", "([Nesterov, 1983](https://doi.org/10.1/x); [Kingma and Ba, 2015](https://arxiv.org/abs/1412.6980))"),
    ("{cite:t}`three`", "[von A et al. (2004)](https://x.y)"),
    ("{cite}`none`", "(Anonymous, 2001)"),
    ("{doc}`02_other`", f"[Other *things*]({SITE}02_other.html)"),
    ("{doc}`next <02_other>`", f"[next]({SITE}02_other.html)"),
    ("[next](02_other.md#sec-other)", f"[next]({SITE}02_other.html#sec-other)"),
    ("{term}`Hessian`", "Hessian"),
    ("{term}`Hessians <Hessian>`", "Hessians"),
    ("{math}`x^2`", "$x^2$"),
    ("{py:class}`guided_descent.sgd.SGD`", f"[`SGD`]({SITE}api/sgd.html#guided_descent.sgd.SGD)"),
    ("in $\\R^n$, not $\\Rank$", "in $\\mathbb{R}^n$, not $\\Rank$"),
    ("a\n$x\n< y$", "a\n$x < y$"),
    ("`[a]{.b} {{ c }}` and $x_{.5}{{y}}$ stay", "`[a]{.b} {{ c }}` and $x_{.5}{{y}}$ stay"),
    ("`{eq}` and ``{eq}`x` `` stay", "`{eq}` and ``{eq}`x` `` stay"),
    ("a \\$5 and `$\\R$`", "a \\$5 and `$\\R$`"),
    ("- item {eq}`eq-here`\n  more\n\n  1. {ref}`sec-here`", "- item (1.1)\n  more\n\n  1. This section"),
    ("| a | {eq}`eq-here` |\n|---|---|\n| `{x}` | {eq}`eq-here` |", "| a | (1.1) |\n|---|---|\n| `{x}` | (1.1) |"),
    ("> quoted {eq}`eq-here`", "> quoted (1.1)"),
    ("### About {eq}`eq-here`", "### About (1.1)"),
]  # fmt: skip
BLOCKS = [
    ("(sec-x)=\n### Head\n\ntext", "### Head\n\ntext"),
    ("one\n\n% a comment\n\ntwo", "one\n\ntwo"),
    ("```python\n{eq}`x`\n\n\n\n$\\R$\n```", "```python\n{eq}`x`\n\n\n\n$\\R$\n```"),
    ("    {eq}`x` in indented code", "    {eq}`x` in indented code"),
    ("$$\n\\argmin x\n$$ (eq-x)", "$$\n\\operatorname{argmin} x \\tag{1.2}\n$$"),
    ("$$ x $$", "$$\nx\n$$"),
    ("- a\n\n  $$\n  x\n  $$ (eq-x)\n\n  b", "- a\n\n  $$\n  x \\tag{1.2}\n  $$\n\n  b"),
    ("> a\n>\n> $$\n> x\n> y\n> $$\n>\n> b", "> a\n>\n> $$ x y $$\n>\n> b"),
    ("```{math}\n:label: eq-x\nx\n```", "$$\nx \\tag{1.2}\n$$"),
    (":::{note}\nMind {eq}`eq-here`.\n\n$$\na\nb\n$$\n:::", "> **Note.**\n>\n> Mind (1.1).\n>\n> $$ a b $$"),
    ("```{admonition} A *title*\n:class: tip\nBody.\n```", "> **A *title*.**\n>\n> Body."),
    (":::{warning} At once.\nMore.\n:::", "> **Warning.**\n>\n> At once.\n>\n> More."),
    ("```{seealso}\nThat.\n```", "> **See also.**\n>\n> That."),
    (":::{tip}\n:class: dropdown\nBody.\n:::", "<details>\n<summary>Tip</summary>\n\nBody.\n\n</details>"),
    (":::{dropdown} More\nBody.\n:::", "<details>\n<summary>More</summary>\n\nBody.\n\n</details>"),
    ("````{note}\n```{tip}\nIn.\n```\n````", "> **Note.**\n>\n> > **Tip.**\n> >\n> > In."),
    (":::{exercise} Why\n:label: ex-x\nShow {eq}`eq-here`.\n:::", "**Exercise 1.2 (Why)**\n\nShow (1.1)."),
    (
        ":::{solution} ex-here\n:class: dropdown\nSo.\n\n$$\na\nb\n$$\n:::",
        "<details>\n<summary>Solution to Exercise 1.1</summary>\n\nSo.\n\n$$\na\nb\n$$\n\n</details>",
    ),
    ("```{exercise-start} Gated\n```\n\nBody.\n\n```{exercise-end}\n```", "**Exercise 1.2 (Gated)**\n\nBody."),
    ("```{solution-start} ex-here\n```\n\nBody.\n\n```{solution-end}\n```", "**Solution to Exercise 1.1**\n\nBody."),
    (":::{prf:lemma}\nIf.\n:::", "> **Lemma 1.1**\n>\n> If."),
    (":::{prf:proof}\nBecause.\n:::", "> *Proof.* Because. ∎"),
    ("```{glossary}\nHeat\n  It is {eq}`eq-here`.\n\nCold\n  Not.\n```", "**Heat**: It is (1.1).\n\n**Cold**: Not."),
    ("```{figure} a.png\n:alt: A\n\nIt is {eq}`eq-here`.\n```", "![A](a.png)\n\n**Figure 1.2.** It is (1.1)."),
    ("```{image} a.png\n:alt: A\n```", "![A](a.png)"),
    ("```{list-table} T\n* - a\n  - b\n* - c\n  - d\n```", "**Table 1.1.** T\n\n| a | b |\n|---|---|\n| c | d |"),
    ("```{table} T\n| a |\n|---|\n| b |\n```", "**Table 1.1.** T\n\n| a |\n|---|\n| b |"),
    ("```{code-block} python\nx = 1\n```", "```python\nx = 1\n```"),
    ("a\n\n```{tableofcontents}\n```\n\nb", "a\n\nb"),
    ("- a\n\n  ```{note}\n  In a list.\n  ```", "- a\n\n  > **Note.**\n  >\n  > In a list."),
]  # fmt: skip
WRONG = [
    ("see {eq}`eq-none`", 0, "no eq is named eq-none"),
    ("one\n\ntwo\n{eq}`sec-here`", 3, "no eq is named sec-here"),
    ("{ref}`sec-none`", 0, "no label is named sec-none"),
    ("{cite}`four`", 0, "chapters/references.bib has no four"),
    ("{doc}`09_none`", 0, "no page is named 09_none"),
    ("[x](09_none.md)", 0, "no page is named 09_none"),
    ("{term}`none`", 0, "no glossary has the term none"),
    ("{zzz}`x`", 0, "unknown role {zzz}"),
    ("a\n[text]{.class} b", 1, "attributes {.class}, which a notebook cannot show; remove them"),
    ("`x`{.python}", 0, "attributes {.python}"),
    ("![a](b.png){width=50% .x}", 0, "attributes {width=50% .x}"),
    ("a\n\n{.class #id}\nb", 2, "attributes {.class #id}"),
    ("a {{ name }} b", 0, "a substitution {{ name }}, which a notebook cannot show; write the text out"),
    ("a\n\n```{zzz}\nx\n```", 2, "unknown directive {zzz}"),
    (":::{note}\n\nDeep {eq}`eq-none`.\n:::", 2, "no eq is named eq-none"),
    (":::{solution} ex-none\nx\n:::", 0, "no ex is named ex-none"),
    (":::\nx\n:::", 0, "a ::: fence without a {name}"),
    ("```{note}\n---\na: [\n---\nx\n```", 2, "bad YAML"),
]


@pytest.mark.parametrize(("text", "wanted"), INLINE + BLOCKS)
def test_rendering(render, text, wanted):
    assert render(text) == wanted


@pytest.mark.parametrize(("text", "offset", "message"), WRONG)
def test_wrong(render, shelf, text, offset, message):
    with pytest.raises(SourceError, match="01_here.md") as error:
        render(text)
    start = shelf.line("chapters/01_here.md", "+++") + 2
    assert message in str(error.value)
    assert error.value.line == start + offset


def test_bad_bibliography(shelf):
    shelf.write("chapters/references.bib", "@article{a,\n  title = {x},\n  year 2000}\n")
    with pytest.raises(SourceError, match=r"chapters/references.bib:\d+: bad BibTeX"):
        bibliography(Book.load(shelf.root))
