"""What a page weighs, the race, the package's pages, search, cards and numbers."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from playwright.sync_api import Browser, Page, expect
from test_browser import address, browser, watch  # noqa: F401 (fixtures)

from literate import api, front
from literate.source import Book, SourceError

DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def screen(browser: Browser, address: str) -> Iterator[Page]:  # noqa: F811
    context = browser.new_context(viewport=DESKTOP, color_scheme="light", base_url=address, reduced_motion="reduce")
    page = context.new_page()
    visit = watch(page, address)
    yield page
    context.close()
    assert not visit.console and not visit.outside and not visit.missing


def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text("utf-8"), "html.parser")


# ---------------------------------------------------------------- weight


def weight(browser: Browser, address: str) -> tuple[int, list[str]]:  # noqa: F811
    """The gzipped bytes of all that a browser loads for a page that is not scrolled, and the addresses."""
    page = browser.new_context(viewport=DESKTOP).new_page()
    responses = []
    page.on("response", lambda r: responses.append(r))  # playwright marks its handlers, and a builtin bears no mark
    page.goto(address)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(300)
    size = sum(len(gzip.compress(r.body())) for r in responses if r.ok and r.url.startswith("http"))
    page.context.close()
    return size, [r.url for r in responses]


def test_pages_are_light(browser: Browser, address: str, book: Book) -> None:  # noqa: F811
    size, asked = weight(browser, f"{address}/chapters/index.html")
    assert size <= 400_000, f"the front page weighs {size:,} bytes"
    assert not [url for url in asked if "mathjax" in url or "plotly" in url]
    for chapter in book.chapters:
        size, asked = weight(browser, f"{address}/{chapter.docname}.html")
        assert size <= 1_200_000, f"{chapter.stem} weighs {size:,} bytes"


def test_icons_are_a_font_with_every_icon_that_is_named(screen: Page) -> None:
    screen.goto("/chapters/01_steepest_descent.html")
    empty = screen.evaluate("""async () => {
      await document.fonts.ready;
      const bad = [];
      for (const icon of document.querySelectorAll('i[class*="fa-"]')) {
        const style = getComputedStyle(icon, '::before');
        const shown = style.content.replace(/"/g, '');
        const font = `${style.fontWeight} 16px ${style.fontFamily}`;
        const there = shown && shown !== 'none' && (!icon.offsetParent || document.fonts.check(font, shown));
        if (!there) bad.push(icon.className);
      }
      const count = selector => document.querySelectorAll(selector).length;
      return [bad, count('i[class*="fa-"]'), count('svg.svg-inline--fa')];
    }""")
    assert empty[0] == [] and empty[1] > 5 and empty[2] == 0


def test_plotly_waits_until_a_figure_is_near(browser: Browser, address: str, site: Path) -> None:  # noqa: F811
    names = [p.name for p in sorted(site.glob("chapters/*.html")) if 'class="gd-plotly"' in p.read_text("utf-8")]
    assert names
    page = browser.new_context(viewport=DESKTOP).new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/chapters/{names[0]}")
    page.wait_for_load_state("networkidle")
    assert not [url for url in asked if "plotly" in url]
    page.locator(".gd-plotly").last.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.gd-plotly[data-drawn]')", timeout=30_000)
    assert [url for url in asked if "plotly" in url]
    page.context.close()


# ---------------------------------------------------------------- the race


def test_the_race_follows_landscape_start_and_step(screen: Page) -> None:
    screen.goto("/chapters/index.html")
    race = screen.locator(".gd-race")
    expect(race).to_have_attribute("data-ready", "true")

    def standing() -> str:
        return race.locator(".gd-standing tbody").inner_text()

    assert len(race.locator("tbody tr").all()) == 5
    before = standing()
    race.locator(".gd-handle").focus()
    for key in ("ArrowRight", "ArrowDown"):
        screen.keyboard.press(key)
    assert standing() != before, "the keyboard does not move the start"
    before = standing()
    race.locator("input[type=range]").press("ArrowRight")
    assert standing() != before, "the step changes nothing"
    assert race.locator("label").inner_text() == "twice the best step"
    before = standing()
    race.get_by_role("button", name="Round bowl").click()
    expect(race.get_by_role("button", name="Round bowl")).to_have_attribute("aria-pressed", "true")
    assert standing() != before
    # the heroes gain nothing here
    steps = dict(re.findall(r"(.+)\t(\d+) steps?", standing()))
    assert int(steps["Gradient descent"]) <= min(int(steps["K-FAC"]), int(steps["Newton"]), int(steps["Adam"]))
    box = race.locator(".gd-field").bounding_box()
    where = race.locator(".gd-handle").get_attribute("aria-label")
    race.locator(".gd-handle").hover()
    screen.mouse.down()
    screen.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.9, steps=4)
    screen.mouse.up()
    assert race.locator(".gd-handle").get_attribute("aria-label") != where, "dragging does not move the start"


def test_the_race_plays_and_rests_for_who_wants_no_motion(screen: Page, browser: Browser, address: str) -> None:  # noqa: F811
    screen.goto("/chapters/index.html")
    expect(screen.locator(".gd-race[data-ready]")).to_be_visible()
    expect(screen.locator(".gd-play")).to_have_text("Play")  # nothing moves unasked
    page = browser.new_context(viewport=PHONE).new_page()
    page.goto(f"{address}/chapters/index.html")
    expect(page.locator(".gd-play")).to_have_text("Stop")
    expect(page.locator(".gd-play")).to_have_text("Play")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.context.close()


def test_the_stored_race_is_the_one_that_the_package_gives(book: Book) -> None:
    race = front.stored(book)
    for land in race["landscapes"]:
        assert {m["key"] for m in land["methods"]} == {"sgd", "momentum", "adam", "newton", "kfac"}
        for method in land["methods"]:
            assert len(method["runs"]) == len(race["scales"])
            assert all(len(runs) == race["columns"] * race["rows"] for runs in method["runs"])


def test_one_path_of_the_race_is_that_of_torch(book: Book) -> None:
    """Momentum in the valley, run by torch from the first start: the same arrival and the same last corner."""
    torch = pytest.importorskip("torch")
    from literate import race as running

    stored = front.stored(book)
    torch.set_default_dtype(torch.float64)
    try:
        land = next(one for one in running.landscapes() if one.name == "valley")
        kept = next(one for one in stored["landscapes"] if one["name"] == "valley")
        method = next(one for one in kept["methods"] if one["key"] == "momentum")
        beta = float(method["with"].split("=")[1])
        x = torch.nn.Parameter(running.starts(land.frame)[0].clone())
        optimizer = torch.optim.SGD([x], lr=method["step"], momentum=beta)
        path = [x.detach().clone()]
        for _ in range(running.STEPS):
            optimizer.zero_grad()
            land(x).backward()
            optimizer.step()
            path.append(x.detach().clone())
        path = torch.stack(path)
        arrival = int(running.arrivals(path[:, None, None], land)[0, 0])
        assert running.packed(path, arrival, land) == method["runs"][stored["scales"].index(1)][0]
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_stale_race_is_refused(book: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "race.py"
    changed.write_text(front.RACE.read_text("utf-8").replace("NEAR = 0.03", "NEAR = 0.04"), "utf-8")
    monkeypatch.setattr(front, "RACE", changed)
    with pytest.raises(SourceError, match="run `python -m literate race`"):
        front.stored(book)


# ---------------------------------------------------------------- the package's pages


def test_every_module_says_what_is_in_it(book: Book) -> None:
    assert not book.modules.keys() - api.MODULES.keys(), "add a sentence to MODULES in literate/api.py"


def test_a_module_has_a_page_and_the_overview_names_what_is_at_the_top(site: Path, book: Book) -> None:
    overview = soup(site / "chapters/api.html").select_one(".bd-article")
    links = {a["href"] for a in overview.select("a")}
    for module, pairs in book.modules.items():
        assert f"api/{module}.html#module-guided_descent.{module}" in links
        page = soup(site / f"chapters/api/{module}.html")
        headings = [h.code.get_text() for h in page.select("section > h2") if h.code]
        names = [name for _, export in pairs for name in export.names]
        assert headings == names
        assert {f"api/{module}.html#guided_descent.{module}.{name}" for name in book.top(module)} <= links


@pytest.mark.parametrize(
    ("home", "name", "words"),
    [
        ("guided_descent.adaptive", "AdamW", "`exp_avg` out × in; `exp_avg_sq` out × in, 2 a parameter"),
        ("guided_descent.adaptive", "Adafactor", "`row_var` out; `col_var` in"),
        ("guided_descent.sgd", "SGD", "`momentum_buffer` out × in, 1 a parameter (with momentum)"),
        ("guided_descent.newton", "Newton", "none"),
        ("guided_descent.newton", "BFGS", "`inverse_hessian` d × d"),
        ("guided_descent.problems", "Quadratic", ""),
    ],
)
def test_state_is_read_off_the_optimizer(home: str, name: str, words: str) -> None:
    assert api.state(home, name) == words


def test_module_pages_say_state_and_cost(site: Path) -> None:
    facts = {s.h2.code.get_text(): s.select_one(".gd-facts").get_text(" ", strip=True)
             for s in soup(site / "chapters/api/newton.html").select("section section") if s.select_one(".gd-facts")}
    assert "none" in facts["Newton"] and "d³" in facts["Newton"]
    assert "d × d" in facts["BFGS"]


# ---------------------------------------------------------------- search


def results(page: Page, query: str) -> list[tuple[str, str, str]]:
    page.goto(f"/search.html?q={query}")
    expect(page.locator("#search-results li").first).to_be_visible()
    return [tuple(item.locator(part).inner_text() for part in ("a", ".gd-where", "p")) for item in
            page.locator("#search-results li").all()]  # fmt: skip


@pytest.mark.parametrize(
    ("query", "first"),
    [("momentum", "Momentum"), ("damping", "[Dd]amp"), ("K-FAC", "K-FAC"), ("kfac", "K-FAC"), ("sharpness", "."),
     ("Nesterov", "Nesterov")],
)
def test_search_finds_sections_prose_first(screen: Page, query: str, first: str) -> None:
    found = results(screen, query)
    assert re.search(first, found[0][0]), found[0]
    package = [n for n, (_, where, _) in enumerate(found) if where.startswith("package")]
    assert not package or package[0] >= min(3, len(found) - len(package)), "the package's own pages come before prose"
    for _, _, snippet in found:
        assert not re.search(r"\\[a-z]{2,}|\$|plt\.|import |\bdef \b|:::|\{", snippet), snippet


def test_what_is_found_is_a_section(screen: Page, site: Path) -> None:
    results(screen, "Nesterov")
    links = [a.get_attribute("href") for a in screen.locator("#search-results li a").all()]
    assert any("#" in link for link in links)
    for link in links:
        name, _, anchor = link.partition("#")
        assert not anchor or soup(site / name).find(id=anchor)


def test_the_index_holds_no_tex_and_no_code(site: Path) -> None:
    text = (site / "_static/search-index.js").read_text("utf-8")
    entries = json.loads(text.removeprefix("window.guidedDescentSearch=").rstrip(";\n"))
    assert len(entries) > 100
    for entry in entries:
        assert not re.search(r"\\(frac|eta|begin|mathbb|lambda)|plt\.(plot|subplots)", entry["text"]), entry


# ---------------------------------------------------------------- cards, links, numbers


def test_a_citation_shows_its_paper(screen: Page) -> None:
    screen.goto("/chapters/03_momentum.html")
    link = screen.locator('.bd-article a[href*="bibliography.html#"]').first
    link.hover()
    card = screen.locator(".gd-tip")
    expect(card).to_contain_text("Polyak")
    expect(card).to_contain_text("1964")
    assert card.locator("a").get_attribute("href").startswith("https://")
    card.hover()  # its link can be reached
    screen.wait_for_timeout(400)
    expect(card).to_be_visible()
    screen.keyboard.press("Escape")
    expect(card).to_have_count(0)


def test_a_name_of_another_page_shows_what_it_is(screen: Page) -> None:
    screen.goto("/chapters/03_momentum.html")
    link = screen.locator('.gd-export a[href*="api/sgd.html#guided_descent.sgd.SGD"]').first
    link.scroll_into_view_if_needed()
    link.hover()
    expect(screen.locator(".gd-tip")).to_contain_text("Gradient descent with momentum")


def test_chapters_named_in_running_text_are_links(site: Path, book: Book) -> None:
    known = {f"{chapter.number:02d}": chapter.stem for chapter in book.chapters}
    seen = 0
    for path in [*site.glob("chapters/*.html"), *site.glob("chapters/api/*.html")]:
        article = soup(path).select_one(".bd-article")
        for part in article.select("a, pre, code, h1, h2, h3, h4, script, .sig, .toctree-wrapper"):
            if part.name == "a" and (named := re.fullmatch(r"[Cc]hapter[ \xa0](\d\d)", part.get_text())):
                assert f"{known[named[1]]}.html" in part["href"]
                seen += 1
            part.decompose()
        for number in re.findall(r"\b[Cc]hapter[ \xa0](\d\d)\b", article.get_text()):
            assert number not in known or known[number] == path.stem, f"{path.name}: chapter {number} is no link"
    assert seen > 20


def test_chapter_numbers_look_the_same_everywhere(site: Path, book: Book) -> None:
    index = soup(site / "chapters/index.html")
    for chapter in book.chapters:
        number = f"{chapter.number:02d}"
        page = soup(site / f"{chapter.docname}.html")
        assert page.select_one(".bd-article h1 .section-number").get_text().strip() == number
        assert re.match(rf"{number}\s", page.title.get_text().strip())
        for place in (".bd-sidebar-primary a[href]", ".bd-article table a[href]"):
            named = [a.get_text(" ", strip=True) for a in index.select(place) if chapter.stem in a["href"]]
            assert any(re.match(rf"{number}\s", words) for words in named), (place, named)
        for title in page.select(".prev-next-title"):
            assert not re.match(r"\d\s", title.get_text().strip()), title.get_text()


def test_the_race_bears_out_what_the_page_says_of_it(book: Book) -> None:
    race = front.stored(book)
    lands = {land["name"]: {m["key"]: m["runs"] for m in land["methods"]} for land in race["landscapes"]}
    best, twice = race["scales"].index(1), race["scales"].index(2)

    def arrived(land: str, key: str, scale: int) -> int:
        return sum(run[0] <= race["steps"] for run in lands[land][key][scale])

    def mean(land: str, key: str) -> float:
        runs = lands[land][key][best]
        return sum(run[0] for run in runs) / len(runs)

    valley = {key: arrived("valley", key, twice) for key in lands["valley"]}
    assert valley.pop("adam") == 35 and max(valley.values()) <= 2
    assert mean("valley", "newton") == mean("valley", "kfac") == 1.0
    assert mean("valley", "momentum") < 0.4 * mean("valley", "sgd")
    assert max(mean("bend", "newton"), mean("bend", "adam")) < 0.7 * mean("bend", "kfac")
    assert mean("classifier", "sgd") <= 1.05 * mean("classifier", "kfac")
    for key in ("momentum", "adam", "newton"):
        assert arrived("classifier", key, twice) == 35
    assert max(arrived("classifier", "sgd", twice), arrived("classifier", "kfac", twice)) < 10
    assert mean("bowl", "sgd") == mean("bowl", "newton") == 1.0 < mean("bowl", "momentum")
