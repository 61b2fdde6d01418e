"""Ticks of a cell: one line, grouped by tolerance, without repeats."""

from literate.ticks import FIRST, LINE, explained, parted


def test_ticks_of_a_cell_are_one_line() -> None:
    ticks = [f"✓ (eq-{x}" for x in ("a) within 1e-12", "b) within 1e-12", "a) ≤ within 1e-09", "a) within 1e-12")]
    assert parted("\n".join(["a table", ticks[0], "  1  2", *ticks[1:]])) == (
        "a table\n  1  2\n",
        ":::{div} gd-check\n✓ {eq}`eq-a` {eq}`eq-b` within 1e-12 · {eq}`eq-a` ≤ within 1e-09\n:::",
    )
    assert parted("words\n") == ("words\n", "")
    assert parted("✓ (eq-a) within 1\n")[0] == ""


def test_every_tick_says_what_it_means_and_the_first_in_words() -> None:
    page = f"{LINE}(1.1) within 1</p>\n</div>" * 2
    for first in (True, False):
        shown = explained(page, first)
        assert shown.count('<span title="The code computed the two sides') == 2 and LINE not in shown
        assert shown.count(FIRST) == first
    assert explained(page, True).index(FIRST) < explained(page, True).rindex("(1.1)")
