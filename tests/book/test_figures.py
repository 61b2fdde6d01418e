"""Figures: SVG that is the same at every run, small, cut into panels, and recoloured by the page."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from guided_descent import book
from literate.figures import figure

ROOT = Path(__file__).parents[2]
CSS = (ROOT / "literate/assets/site.css").read_text("utf-8")


@pytest.fixture(autouse=True)
def styled() -> Iterator[None]:
    backend = matplotlib.get_backend()
    with matplotlib.rc_context():
        plt.switch_backend("agg")
        book.style()
        yield
        plt.close("all")
    plt.switch_backend(backend)


def lines(**options: object) -> Figure:
    """Two panels of a few lines, the second with its y-axis shared or not."""
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.2), **options)
    for ax in axes:
        ax.plot([0, 1, 2], [1.0, 0.5, 0.25], "o-", color=book.COLORS["blue"], label="loss")
        ax.set_xlabel("step")
        ax.legend()
    axes[0].set_ylabel("loss")
    return fig


def test_a_figure_is_the_same_at_every_run_and_small() -> None:
    first, second = book._svg(lines()), book._svg(lines())
    assert first == second
    assert first.startswith("<svg ") and len(first) < 40_000
    assert not re.search(r"<metadata|<text|\d{4}-\d\d-\d\d", first)  # no date, and letters that look alike everywhere
    assert not re.search(r'\bd="[^"]*\.\d{3}', first)


def test_what_is_dense_becomes_pixels_and_the_letters_stay() -> None:
    fig, ax = plt.subplots()
    ax.scatter(*np.random.default_rng(0).normal(size=(2, 3000)), s=3)
    svg = book._svg(fig)
    (png,) = re.findall(r'base64,([^"]+)"', svg)
    assert base64.b64decode(png).startswith(b"\x89PNG") and plt.imread(io.BytesIO(base64.b64decode(png))).shape[0] > 300
    assert len(svg) < 60_000 < len(re.findall("<use", svg)) * 10_000
    assert "<image" not in book._svg(lines())


def cuts(fig: Figure) -> list[str]:
    return re.findall(r'data-panels="([^"]*)"', book._svg(fig))


def test_panels_are_cut_between_what_they_draw() -> None:
    ((panels,),) = [cuts(lines())]
    left, right = (tuple(map(float, part.split(":"))) for part in panels.split())
    assert left[0] == 0 and left[1] == right[0] and right[1] == pytest.approx(6.4 * 72, abs=0.1)
    fig = lines()
    fig.draw_without_rendering()
    for ax, (a, b) in zip(fig.axes, (left, right), strict=True):
        box = ax.get_tightbbox()
        assert a <= box.x0 * 72 / fig.dpi and box.x1 * 72 / fig.dpi <= b


def test_a_shared_axis_is_repeated_where_its_numbers_are_missing() -> None:
    ((panels,),) = [cuts(lines(sharey=True))]
    first, second = panels.split()
    assert "+" not in first and re.fullmatch(r"[\d.]+:[\d.]+\+0:[\d.]+", second)
    fig = lines(sharey=True)
    fig.draw_without_rendering()
    edge = fig.axes[0].get_window_extent().x0 * 72 / fig.dpi
    assert float(second.rpartition(":")[2]) == pytest.approx(edge, abs=1)


def test_what_belongs_to_the_whole_figure_keeps_it_whole() -> None:
    fig, _ = plt.subplots()
    titled = lines()
    titled.suptitle("Both")
    assert cuts(fig) == cuts(titled) == []


def test_the_page_shows_it_whole_and_in_panels() -> None:
    svg = book._svg(lines(sharey=True))
    shown = figure(svg, "gd-a", '<img alt="Two &quot;panels&quot;" src="../_images/a.svg" />')
    root = ET.fromstring(shown)
    assert root.get("role") == "img" and root.get("aria-label") == 'Two "panels"'
    whole, *panels = list(root)
    assert whole.get("class") == "gd-whole" and [p.get("class") for p in panels] == ["gd-panel"] * 2
    assert [len(p) for p in panels] == [1, 2]  # the second shows the numbers of the first as well
    ids = re.findall(r'\bid="([^"]+)"', shown)
    assert len(ids) == len(set(ids)) and all(name.startswith("gd-a") for name in ids)
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', shown)
    assert {a or b for a, b in used} <= set(ids) and "gd-a" in {a for a, _ in used}
    assert "<style" not in shown
    assert figure(svg, "gd-b", "<img>") != shown


def test_only_the_theme_decides_colours() -> None:
    shown = figure(book._svg(lines()), "gd-a", "<img>")
    styles = " ".join(re.findall(r'style="([^"]*)"', shown))
    assert "var(--gd-0072b2, #0072b2)" in styles and "var(--gd-plate)" in styles and "var(--gd-ink)" in styles
    assert "color-mix(in srgb, var(--gd-ink) 11%, var(--gd-plate))" in styles  # the grid
    assert not re.findall(r"#[0-9a-f]{6}", re.sub(r"var\(--gd-[0-9a-f]{6}, #[0-9a-f]{6}\)", "", styles))


# How the eye sees a colour: linear light, Machado's matrices for each colour blindness, then Lab.
BLIND = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(code: str) -> np.ndarray:
    c = np.array([int(code[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(code: str, blindness: str) -> np.ndarray:
    white = XYZ @ np.ones(3)
    f = np.cbrt(np.clip(XYZ @ np.clip(np.array(BLIND[blindness]) @ linear(code), 0, 1) / white, 0.008856, None))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colours: list[str], blindness: str) -> float:
    """The distance of the two that are hardest to tell apart."""
    seen = [lab(code, blindness) for code in colours]
    return min(np.linalg.norm(a - b) for n, a in enumerate(seen) for b in seen[:n])


def test_the_palette_is_as_distinguishable_in_the_dark() -> None:
    twins = dict(re.findall(r"--gd-([0-9a-f]{6}): (#[0-9a-f]{6});", CSS))
    light = [code.lower() for name, code in book.COLORS.items() if name not in ("grey", "black")]
    assert set(twins) == {code[1:] for code in light}
    dark = [twins[code[1:]] for code in light]
    for blindness in BLIND:
        assert closest(dark, blindness) > min(10, 0.9 * closest(light, blindness)), blindness
    for code in dark:  # against the theme's background
        contrast = (XYZ[1] @ linear(code) + 0.05) / (XYZ[1] @ linear("#121212") + 0.05)
        assert contrast > 4.5, code
