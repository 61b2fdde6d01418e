"""MyST Markdown as block tokens and directives, with exact line numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin


class SourceError(Exception):
    """Malformed input: where it is, what is wrong and how to mend it."""

    def __init__(self, file: str | Path, line: int, message: str) -> None:
        self.file, self.line, self.message = str(file), line, message
        super().__init__(f"{file}:{line}: {message}")


@dataclass(frozen=True)
class Directive:
    """A fenced directive: ```` ```{name} argument ```` with options and body, lines 1-based."""

    name: str
    argument: str
    options: dict[str, str]
    body: str
    line: int
    body_line: int


@cache
def _parser() -> MarkdownIt:
    return (
        MarkdownIt("commonmark")
        .enable("table")
        .use(front_matter_plugin)
        .use(myst_block_plugin)
        .use(colon_fence_plugin)
        .use(dollarmath_plugin, allow_labels=True)
        .use(amsmath_plugin)
        .disable("inline", True)
    )


@cache
def _tokens(text: str) -> list[Token]:
    return _parser().parse(text)


def parse(text: str, file: str, line: int = 1) -> list[Token]:
    """Block tokens of `text`, which starts at `line` of `file`; unclosed blocks raise."""
    tokens = _tokens(text)
    lines = text.splitlines()
    for token in tokens:
        if token.type in ("fence", "colon_fence"):
            start, end = token.map
            last = lines[end - 1].strip(" \t>")
            if end - start < 2 or set(last) != {token.markup[0]} or len(last) < len(token.markup):
                raise SourceError(file, line + start, f"unclosed fence; close it with {token.markup}")
            nested = re.search(r"^\s*(`{3,}|~{3,})\{code-cell\}", token.content, re.MULTILINE)
            if nested and token.type == "fence" and len(nested[1]) >= len(token.markup):
                raise SourceError(file, line + start, f"unclosed fence; close it with {token.markup}")
            if nested and token.info.startswith("{"):
                remedy = "use the gated form, {solution-start} … {solution-end}"
                raise SourceError(file, line + start, f"a code cell inside a directive; {remedy}")
        elif token.type == "amsmath":
            name = re.search(r"\{(\w+\*?)\}", token.content)[1]
            remedy = "write $$ … $$ (eq-…) around {aligned} or {gathered}"
            what = f"a bare {{{name}}}, which only the page would number; {remedy}"
            raise SourceError(file, line + token.map[0], what)
        elif token.type == "inline" and re.search(r"^\s*\$\$\s*$", token.content, re.MULTILINE):
            raise SourceError(
                file,
                line + token.map[0],
                "displayed mathematics that does not stand alone; close the $$ and put blank lines around it",
            )
    return tokens


def directive(token: Token, file: str, line: int = 1) -> Directive | None:
    """The directive a fence token holds, if it holds one."""
    match = re.match(r"\{([^}]+)\}\s*(.*)", token.info)
    if token.type not in ("fence", "colon_fence") or not match:
        return None
    start = line + token.map[0]
    body = token.content.split("\n")
    options: dict[str, str] = {}
    skip = 0
    if body[0].startswith("---"):
        skip = next((i for i, text in enumerate(body[1:], 1) if text.startswith("---")), len(body) - 1) + 1
        options = read_yaml("\n".join(body[1 : skip - 1]), file, start + 2)
    else:
        while option := re.match(r":([\w-]+):(?:\s+(.*))?$", body[skip].strip()):
            options[option[1]] = (option[2] or "").strip()
            skip += 1
    while skip < len(body) - 1 and not body[skip].strip():
        skip += 1
    text = "\n".join(body[skip:]).rstrip()
    return Directive(match[1], match[2].strip(), options, text, start, start + 1 + skip)


def read_yaml(text: str, file: str, line: int) -> dict:
    """A YAML mapping that starts at `line` of `file`."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "cannot be read"
        raise SourceError(file, line + (mark.line if mark else 0), f"bad YAML: {problem}; mend the block") from None
    if value is not None and not isinstance(value, dict):
        raise SourceError(file, line, "bad YAML: not a mapping; write `key: value` lines")
    return value or {}
