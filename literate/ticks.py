"""The ticks of a cell as one quiet line, `✓ (2.9) (2.10) within 1e-12`, which says what it means to who asks."""

from __future__ import annotations

import re

from literate.notebook import TICK

MEANING = (
    "The code computed the two sides of this equation independently; "
    "they agree, or stand in the order of the sign, to this tolerance."
)
FIRST = (
    "This tick ends a test: the cell above computed the two sides of the equation independently, by different code, "
    "and they agree to this tolerance. Had they not, there would be no page."
)
LINE = '<div class="gd-check docutils">\n<p>✓ '


def parted(text: str) -> tuple[str, str]:
    """What a cell printed, without its ticks, and the ticks as one line of MyST; either may be empty."""
    words, found = [], {}
    for line in text.splitlines():
        if tick := TICK.fullmatch(line):
            found.setdefault(tick["text"], {})[tick["label"]] = None
        else:
            words.append(line)
    groups = [f"{' '.join(f'{{eq}}`{label}`' for label in labels)} {text}" for text, labels in found.items()]
    line = f":::{{div}} gd-check\n✓ {' · '.join(groups)}\n:::" if groups else ""
    return "".join(f"{word}\n" for word in words), line


def explained(page: str, first: bool) -> str:
    """A page's HTML: every tick says on hover what it means, and the first of the book says it in words."""
    if first:
        end = re.compile(rf"({re.escape(LINE)}.*?</p>)", re.DOTALL)
        page = end.sub(lambda m: f'{m[1]}\n<p class="gd-check-meaning">{FIRST}</p>', page, count=1)
    return page.replace(LINE, LINE.replace("✓", f'<span title="{MEANING}">✓</span>'))
