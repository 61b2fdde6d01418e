"""Figures as a page shows them: SVG inside the page, so that its ink follows the theme and its panels stack on a phone.

What `guided_descent.book.style` stores is an SVG on a white plate, right for any notebook. On the site white is the
page's background, black its ink, a grey a mixture of both, and a colour of the palette has a lighter twin in the dark
(site.css names them). Letters are paths, so a figure looks the same everywhere.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

IMAGE = re.compile(r'<img\b[^>]*?\bsrc="(?:\.\./)*_images/(?P<file>[^"]+\.svg)"[^>]*>')
PIXELS = 1.4  # for a point, so that 12-point letters are as large as the page's


def inlined(page: str, app: Any) -> str:
    """A page's HTML, with the SVG images of its cells inside it."""
    sources = {name: Path(app.srcdir, source) for source, name in app.builder.images.items()}

    def replace(match: re.Match[str]) -> str:
        source = sources[match["file"]]
        return figure(source.read_text("utf-8"), f"gd-{source.stem[:12]}", match[0])

    return IMAGE.sub(replace, page)


def figure(svg: str, name: str, image: str) -> str:
    """An element that shows `svg`, whole or panel by panel, with the alternative text of `image`."""
    root, body = re.search(r"<svg\b([^>]*)>(.*)</svg>", svg, re.DOTALL).groups()
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', root).groups())
    panels = re.search(r'data-panels="([^"]*)"', root)
    body = recoloured(re.sub(r"<style\b.*?</style>", "", body, flags=re.DOTALL))
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", body)  # ids of other figures are the same
    body = body.replace("xlink:href", "href")
    parts = [f'<svg class="gd-whole" viewBox="0 0 {width:g} {height:g}" style="width:{width * PIXELS:.0f}px" '
             f'aria-hidden="true"><g id="{name}">{body}</g></svg>']
    for part in panels[1].split() if panels else ():
        strips = [tuple(map(float, strip.split(":"))) for strip in part.split("+")[::-1]]  # numbers first
        parts.append(panel(strips, height, name))
    alt = re.search(r'\balt="([^"]*)"', image)
    label = alt[1] if alt else ""
    kind = "gd-figure gd-stacks" if panels else "gd-figure"
    return f'<div class="{kind}" role="img" aria-label="{html.escape(html.unescape(label))}">{"".join(parts)}</div>'


def panel(strips: list[tuple[float, float]], height: float, name: str) -> str:
    """Strips of a figure, each from left to right, side by side."""
    inside, at = "", 0.0
    for left, right in strips:
        inside += (f'<svg x="{at:.1f}" width="{right - left:.1f}" height="{height:g}" '
                   f'viewBox="{left:g} 0 {right - left:.1f} {height:g}"><use href="#{name}"/></svg>')
        at += right - left
    return (f'<svg class="gd-panel" viewBox="0 0 {at:.1f} {height:g}" style="width:{at * PIXELS:.0f}px" '
            f'aria-hidden="true">{inside}</svg>')


def recoloured(svg: str) -> str:
    """SVG whose colours the theme decides."""

    def colour(match: re.Match[str]) -> str:
        code = match[0].lower()
        red, green, blue = (int(code[n : n + 2], 16) for n in (1, 3, 5))
        if not red == green == blue:
            return f"var(--gd-{code[1:]}, {code})"
        ink = 100 - round(red / 2.55)
        ends = {0: "var(--gd-plate)", 100: "var(--gd-ink)"}
        return ends.get(ink) or f"color-mix(in srgb, var(--gd-ink) {ink}%, var(--gd-plate))"

    return re.sub(r'style="[^"]*"', lambda m: re.sub(r"#[0-9a-fA-F]{6}\b", colour, m[0]), svg)
