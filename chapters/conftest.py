"""nbval compares the text of outputs, and an SVG is text; like a PNG, it is a picture, and browsers test those."""

import pytest


def pytest_collectstart(collector: pytest.Collector) -> None:
    if hasattr(collector, "skip_compare"):  # a notebook of nbval's
        collector.skip_compare += ("image/svg+xml",)
