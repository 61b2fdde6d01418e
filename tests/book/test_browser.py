"""The pages in a real browser: they draw, move, unfold, find, and are legible in light, dark and on a phone."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from literate.source import Book, shown

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Without preloading, which asks for files that a stylesheet only names.
AXE = {"preload": False, "resultTypes": ["violations"]}
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
# What a reader must not see as text: mathematics and roles that were not rendered.
RAW = r"\$\$|\\\(|\\\[|\\begin\{|\\frac|\{(eq|ref|numref|cite|term)[:\w]*\}|:::"
PROSE = """() => {
  const page = document.querySelector('.bd-article').cloneNode(true);
  page.querySelectorAll('pre, code, script, style, mjx-container, .gd-plotly').forEach(e => e.remove());
  return page.textContent;
}"""
# For axe, which takes seconds a thousand elements: MathJax answers for its own, and code repeats the same few colours.
THIN = """() => {
  document.querySelectorAll('mjx-container').forEach(e => e.remove());
  [...document.querySelectorAll('.bd-article pre')].slice(6).forEach(e => e.remove());
  [...document.querySelectorAll('.bd-article dl.py')].slice(12).forEach(e => e.remove());
}"""
BROKEN_IMAGES = """() => [...document.images].filter(i => !i.complete || !i.naturalWidth ||
  (i.closest('.bd-article') && !i.alt.trim())).map(i => i.src).concat(
  [...document.querySelectorAll('.gd-figure')].filter(f => !f.ariaLabel?.trim()).map(f => f.outerHTML.slice(0, 200)))"""

MEASURE, CONTRAST = (Path(__file__).with_name(name).read_text("utf-8").partition("\n")[2]
                     for name in ("measure.js", "contrast.js"))


@dataclass
class Visit:
    """What was seen on one page: collected in one load, asserted by several tests."""

    console: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    seen: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        message = "no Chromium: install it (Debian, Ubuntu: apt-get install chromium) to test the pages in a browser"
        if os.environ.get("CI") or os.environ.get("GUIDED_DESCENT_REQUIRE_CHROMIUM"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


@pytest.fixture(autouse=True, scope="module")
def patience(browser: Browser) -> None:
    """A loaded machine may be many times slower."""
    new_context = browser.new_context

    def patient(**options: Any) -> BrowserContext:
        context = new_context(**options)
        context.set_default_timeout(SLOWEST)
        return context

    browser.new_context = patient


expect.set_options(timeout=15_000)
SLOWEST = 120_000  # ms


def watch(page: Page, address: str) -> Visit:
    """Record what the page complains of and what it asks for."""
    visit = Visit()
    page.on("console", lambda m: m.type in ("error", "warning") and visit.console.append(f"{m.type}: {m.text}"))
    page.on("pageerror", lambda error: visit.console.append(str(error)))
    page.on("response", lambda r: r.status >= 400 and visit.missing.append(f"{r.status} {r.url}"))

    # Listening only: to intercept requests would switch the cache off.
    inside = (address, "data:", "blob:")
    page.on("request", lambda r: r.url.startswith(inside) or visit.outside.append(r.url))
    return visit


def settle(page: Page) -> None:
    """Wait for the mathematics and the figures."""
    page.evaluate("() => window.MathJax?.startup?.promise?.then(() => true)")
    # Else a figure waits until it is near; what is opened for paper closes again.
    page.evaluate("() => ['beforeprint', 'afterprint'].forEach((name) => dispatchEvent(new Event(name)))")
    page.wait_for_function("() => [...document.querySelectorAll('.bd-article .gd-plotly')].every(p => p.dataset.drawn)")


def violations(page: Page, *rules: str) -> list[str]:
    found = Axe().run(page, options=AXE | ({"runOnly": list(rules)} if rules else {})).response["violations"]
    return [
        f"{v['id']}: {node['html'][:160]} {node['failureSummary'][:200]}"
        for v in found if v["impact"] in ("serious", "critical") for node in v["nodes"][:3]
    ]  # fmt: skip


@pytest.fixture(scope="module")
def visits(browser: Browser, site: Path, address: str) -> dict[str, Visit]:
    """Each page once: opened on a phone, widened to a desktop, turned dark."""
    result = {}
    context = browser.new_context()
    for path in sorted([*site.glob("chapters/*.html"), *site.glob("chapters/api/[ks]*.html")]):
        page = context.new_page()
        page.set_viewport_size(PHONE)
        visit = result[path.stem] = watch(page, address)
        page.goto(f"{address}/{path.relative_to(site)}")
        settle(page)
        visit.seen = {
            "prose": page.evaluate(PROSE),
            "maths": page.locator("mjx-container").count(),
            "unrendered": page.locator(".bd-article .math:not(:has(mjx-container))").count(),
            "errors": page.locator("mjx-merror").count(),
            "images": page.evaluate(BROKEN_IMAGES),
            "phone": page.evaluate("document.documentElement.scrollWidth"),
            "on a phone": page.evaluate(MEASURE),
        }
        page.set_viewport_size(DESKTOP)
        visit.seen["desktop"] = page.evaluate("document.documentElement.scrollWidth")
        visit.seen["on a desktop"] = page.evaluate(MEASURE)
        page.add_style_tag(content="* { transition: none !important; }")  # else a colour is caught half way
        page.evaluate(THIN)
        visit.seen["light"] = violations(page)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("document.documentElement.dataset.theme == 'dark'")
        visit.seen["dark"] = violations(page, "color-contrast")
        page.close()
    context.close()
    return result


def test_nothing_in_the_console(visits: dict[str, Visit]) -> None:
    assert not {name: visit.console for name, visit in visits.items() if visit.console}


def test_no_request_leaves_the_site_and_none_fails(visits: dict[str, Visit]) -> None:
    assert not {name: visit.outside for name, visit in visits.items() if visit.outside}
    assert not {name: visit.missing for name, visit in visits.items() if visit.missing}


def test_mathematics_is_rendered(visits: dict[str, Visit]) -> None:
    assert sum(visit.seen["maths"] for visit in visits.values()) > 50
    for name, visit in visits.items():
        assert visit.seen["errors"] == visit.seen["unrendered"] == 0, name
        assert not re.findall(RAW, visit.seen["prose"]), (name, re.findall(f".*(?:{RAW}).*", visit.seen["prose"])[:3])


def test_images_load_and_have_alternative_text(visits: dict[str, Visit]) -> None:
    assert not {name: visit.seen["images"] for name, visit in visits.items() if visit.seen["images"]}


@pytest.mark.parametrize(("size", "limit"), [("phone", PHONE["width"]), ("desktop", DESKTOP["width"])])
def test_no_horizontal_scroll(visits: dict[str, Visit], size: str, limit: int) -> None:
    assert not {name: visit.seen[size] for name, visit in visits.items() if visit.seen[size] > limit}


# ---------------------------------------------------------------- the rules of a page


def chapters(visits: dict[str, Visit], where: str = "on a desktop") -> dict[str, dict[str, Any]]:
    """What was measured of each chapter's page."""
    return {name: visit.seen[where] for name, visit in visits.items() if re.match(r"\d\d_", name)}


def listed(visits: dict[str, Visit], what: str, where: str = "on a desktop") -> str:
    """A line for each fault of a kind: page, and what the measurement said."""
    return "\n".join(f"{name}: {fault}" for name, seen in chapters(visits, where).items() for fault in seen[what])


def test_ideas_come_before_code(visits: dict[str, Visit]) -> None:
    more = [f"{name}: code {seen['code']} px, prose {seen['prose']} px"
            for name, seen in chapters(visits).items() if seen["code"] > seen["prose"]]
    assert not more, "more visible code than prose:\n" + "\n".join(more)


def test_no_visible_cell_is_long(visits: dict[str, Visit]) -> None:
    assert not (found := listed(visits, "long_cells")), "more than 30 visible lines:\n" + found


def test_a_figure_comes_early(visits: dict[str, Visit]) -> None:
    late = [f"{name}: {seen['first_figure']} px" for name, seen in chapters(visits).items()
            if name != "23_machinery" and not (seen["first_figure"] and seen["first_figure"] <= 2000)]
    assert not late, "the first figure is more than 2,000 px below the top:\n" + "\n".join(late)


def test_no_code_scrolls_on_a_desktop(visits: dict[str, Visit]) -> None:
    assert not (found := listed(visits, "wide_cells")), "cells that scroll at 1440 px:\n" + found


@pytest.mark.parametrize("where", ["on a desktop", "on a phone"])
def test_every_equation_fits(visits: dict[str, Visit], where: str) -> None:
    assert not (found := listed(visits, "wide_equations", where)), f"equations that are cut {where}:\n" + found


def test_mathematics_has_one_size_near_the_text(visits: dict[str, Visit]) -> None:
    for where in ("on a desktop", "on a phone"):
        for name, seen in chapters(visits, where).items():
            sizes = [size for size in seen["maths"].values() if size]
            assert not sizes or (max(sizes) == min(sizes) and 16 <= sizes[0] <= 20), (name, where, seen["maths"])


def test_figures_are_drawn_in_lines_with_letters_of_the_text(visits: dict[str, Visit]) -> None:
    pixels = listed(visits, "pictures")
    assert not pixels, "figures that are no SVG:\n" + pixels
    bounds = {"on a desktop": (11, 21), "on a phone": (11, 21)}
    odd = [f"{name}: {one['figure']} {one['least']:.1f} to {one['most']:.1f} px {where}"
           for where, (least, most) in bounds.items() for name, seen in chapters(visits, where).items()
           for one in seen["letters"] if one["least"] < least - 0.05 or one["most"] > most]
    assert not odd, "letters too small or too large:\n" + "\n".join(odd)


@pytest.mark.parametrize("where", ["on a desktop", "on a phone"])
def test_what_unfolds_has_its_button_beside_its_title(visits: dict[str, Visit], where: str) -> None:
    assert not (found := listed(visits, "buttons", where)), f"buttons over text or outside their box {where}:\n" + found


def test_axe_reports_nothing_serious_in_light_and_dark(visits: dict[str, Visit]) -> None:
    for theme in ("light", "dark"):
        assert not {name: visit.seen[theme] for name, visit in visits.items() if visit.seen[theme]}


@pytest.fixture(scope="module")
def desk(browser: Browser, address: str) -> Iterator[Page]:
    """One page on a desktop, for what a reader does with it."""
    context = browser.new_context(viewport=DESKTOP, color_scheme="light", base_url=address)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    visit = watch(page, address)
    yield page
    context.close()
    assert not visit.console and not visit.outside and not visit.missing


def open_page(page: Page, address: str) -> None:
    """Go to a page, unless an earlier test left it open: a chapter takes seconds to draw."""
    if not page.url.endswith(address):
        page.goto(address)
        settle(page)


def pages_with(site: Path, text: str) -> list[str]:
    return [path.name for path in sorted(site.glob("chapters/*.html")) if text in path.read_text("utf-8")]


def test_sliders_move_their_figures(desk: Page, site: Path) -> None:
    names = pages_with(site, 'class="gd-plotly"')
    assert names
    for name in reversed(names):  # the first stays open for the tests that follow
        open_page(desk, f"/chapters/{name}")
        for plot in desk.locator(".bd-article .gd-plotly").all():
            shown = "plot => JSON.stringify(plot.data.map(t => [t.visible ?? true, t.x, t.y]))"
            before = plot.evaluate(shown)
            slider = plot.locator("xpath=following-sibling::div[contains(@class, 'gd-slider')][1]/input")
            words = slider.get_attribute("aria-valuetext")
            slider.focus()
            slider.press("ArrowRight")
            assert plot.evaluate(shown) != before, f"{name}: the slider moves nothing"
            assert slider.get_attribute("aria-valuetext") != words


def test_the_strongest_curve_is_the_strongest_in_the_dark(browser: Browser, site: Path, address: str) -> None:
    seen = 0
    for name in pages_with(site, 'class="gd-plotly"'):
        found = {}
        for scheme in ("light", "dark"):
            page = browser.new_context(viewport=DESKTOP, color_scheme=scheme).new_page()
            page.goto(f"{address}/chapters/{name}")
            settle(page)
            found[scheme] = page.evaluate(CONTRAST)
            page.context.close()
        for light, dark in zip(found["light"], found["dark"], strict=True):
            for a, b in zip(light, dark, strict=True):
                seen += 1
                assert b > 3 or a < 3, f"{name}: a curve of contrast {a:.1f} on white has {b:.1f} in the dark"
                assert b < 2.5 or a > 1.5, f"{name}: a curve of contrast {a:.1f} on white has {b:.1f} in the dark"
    assert seen > 5


def test_figures_follow_the_theme(desk: Page, site: Path) -> None:
    name = pages_with(site, 'class="gd-plotly"')[0]
    open_page(desk, f"/chapters/{name}")
    axis = desk.locator(".bd-article .gd-plotly .xtick text").first
    light = axis.evaluate("e => getComputedStyle(e).fill")
    for _ in range(3):  # auto, light, dark
        if desk.locator("html[data-theme=dark]").count():
            break
        desk.locator(".theme-switch-button:visible").first.click()
    expect(desk.locator("html")).to_have_attribute("data-theme", "dark")
    expect(axis).not_to_have_css("fill", light)
    background = desk.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 64


def test_solutions_unfold(desk: Page, site: Path) -> None:
    names = pages_with(site, "solution dropdown admonition")
    assert names
    open_page(desk, f"/chapters/{names[0]}")
    solution = desk.locator(".solution.dropdown").first
    content = solution.locator("section p").first
    expect(content).to_be_hidden()
    solution.locator(".toggle-button").click()
    expect(content).to_be_visible()


def test_code_is_copied_whole_folded_or_not(desk: Page, site: Path, book: Book) -> None:
    name = pages_with(site, "gd-toggle")[0]
    open_page(desk, f"/chapters/{name}")
    cell = desk.locator("div.cell_input:visible").filter(has=desk.locator(".gd-toggle")).first
    expect(cell.locator(".gd-rest").first).to_be_hidden()
    cell.hover()
    cell.locator("button.copybtn").click()
    desk.wait_for_function("() => navigator.clipboard.readText().then(text => text.length > 0)")
    copied = desk.evaluate("navigator.clipboard.readText()").strip()
    chapter = next(c for c in book.chapters if c.stem == name.removesuffix(".html"))
    assert copied in [shown(c)[0].strip() for c in chapter.cells if c.kind == "code"]


def test_folded_code_opens_in_place(desk: Page, site: Path) -> None:
    open_page(desk, f"/chapters/{pages_with(site, 'gd-toggle')[0]}")
    toggle = desk.locator(".gd-toggle:visible").first
    rest = toggle.locator("xpath=following-sibling::*[contains(@class, 'gd-rest')]")
    lines = int(re.search(r"(\d+) lines", toggle.get_attribute("aria-label"))[1])
    cell = toggle.locator("xpath=ancestor::pre")
    height = cell.bounding_box()["height"]
    toggle.focus()
    toggle.press("Enter")
    expect(rest).to_be_visible()
    expect(toggle).to_have_attribute("aria-expanded", "true")
    line = cell.evaluate("e => parseFloat(getComputedStyle(e).lineHeight)")
    assert abs(cell.bounding_box()["height"] - height - lines * line) < 1.5 * line
    toggle.click()
    expect(rest).to_be_hidden()
    assert cell.bounding_box()["height"] == height


def test_folded_code_is_whole_on_paper_and_without_scripts(browser: Browser, site: Path, address: str) -> None:
    name = pages_with(site, "gd-toggle")[0]
    for scripts in (True, False):
        page = browser.new_context(viewport=DESKTOP, java_script_enabled=scripts).new_page()
        page.goto(f"{address}/chapters/{name}")
        folded = page.locator("div.cell_input:visible").filter(has=page.locator(".gd-rest"))
        expect(folded.locator(".gd-rest").first).to_be_visible(visible=not scripts)
        page.emulate_media(media="print")
        for part in folded.first.locator(".gd-rest").all():
            expect(part).to_be_visible()
        expect(folded.locator(".gd-toggle").first).to_be_hidden()
        page.context.close()


def test_hovering_a_reference_shows_it(desk: Page, site: Path) -> None:
    name = pages_with(site, 'href="#equation-')[0]
    open_page(desk, f"/chapters/{name}")
    desk.locator('.bd-article p a[href^="#equation-"]').first.hover()
    expect(desk.locator(".gd-tip mjx-container").first).to_be_visible()
    desk.keyboard.press("Escape")
    expect(desk.locator(".gd-tip")).to_have_count(0)


def test_search_finds(desk: Page) -> None:
    desk.goto("/search.html?q=Lipschitz")
    expect(desk.locator("#search-results .search a, #search-results ul.search a").first).to_be_visible()
