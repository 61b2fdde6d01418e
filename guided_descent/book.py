# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head ddfc3cba
"""Chapter 23, The machinery."""

__all__ = [
    "COLORS",
    "check",
    "device",
    "interactive",
    "method_of",
    "seed",
    "slider",
    "style",
    "train",
]


# %% 23_machinery sec-check 1 dcbd8dd7
import base64
import io
import os
import random
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from guided_descent.core import check_range


def check(
    label: str, actual: Any, expected: Any, *, tol: float = 1e-12, relation: str = "=="
) -> None:
    """Compare the two sides of a labelled equation, and print a tick.

    Every element must satisfy ``|actual − expected| ≤ tol · max(1, |expected|)``, or
    for an inequality ``actual ≤ expected + tol · max(1, |expected|)``; mirrored for
    ``>=``.

    Args:
        label: The equation's label in the chapter, such as ``"eq-gd-modes"``.
        actual: A number, array or tensor: what was computed one way.
        expected: The other side, of the same shape or a single number.
        tol: Tolerance, positive; relative above one and absolute below.
        relation: ``"=="``, ``"<="`` or ``">="``.

    Raises:
        AssertionError: The relation does not hold, the shapes differ, there is nothing
            to compare, or a value is not finite.
        ValueError: An unknown relation, an order of complex numbers, or a tolerance
            that is not positive and finite.

    Source: appendix "The machinery".
    """
    signs = {"==": "", "<=": "≤ ", ">=": "≥ "}
    if relation not in signs:
        known = ", ".join(map(repr, signs))
        raise ValueError(f"relation={relation!r} is unknown; use one of {known}")
    check_range("tol", tol, "(0, inf)")
    a, e = _array(actual), _array(expected)
    if relation != "==" and (np.iscomplexobj(a) or np.iscomplexobj(e)):
        told = f"relation={relation!r} does not order complex numbers"
        raise ValueError(f"{told}; compare their absolute values")
    if a.size == 0 or not (np.isfinite(a).all() and np.isfinite(e).all()):
        told = f"({label}) compares nothing, or something not finite"
        raise AssertionError(f"{told}: actual {a}, expected {e}")
    if e.ndim and a.shape != e.shape:
        raise AssertionError(f"({label}) compares shapes {a.shape} and {e.shape}")
    gap = {"==": abs(a - e), "<=": a - e, ">=": e - a}[relation]
    if not (gap <= tol * np.maximum(1, abs(e))).all():
        raise AssertionError(
            f"({label}) fails: actual {a} {relation} expected {e}; "
            f"largest gap {np.max(gap):.3g}, tolerance {tol:g}"
        )
    print(f"✓ ({label}) {signs[relation]}within {tol:g}")


def _array(x: Any) -> np.ndarray:
    """In double precision: differences of bfloat16 or unsigned integers mislead."""
    if isinstance(x, Tensor):
        double = torch.promote_types(x.dtype, torch.float64)
        x = x.detach().cpu().to(double).resolve_conj()
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


# %% 23_machinery sec-train 1 bf60007d
def seed(n: int = 0) -> torch.Generator:
    """Seed Python, NumPy and torch, and return a CPU generator with the same seed.

    Args:
        n: The seed, a non-negative integer below 2³².

    Source: appendix "The machinery".
    """
    random.seed(n)
    np.random.seed(n)
    torch.manual_seed(n)
    return torch.Generator().manual_seed(n)


def device() -> torch.device:
    """The device chapters run on: the current CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    loss: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    batches: Iterable[Any] | None = None,
    scheduler: Any = None,
    record: Callable[[int], dict[str, Any]] | None = None,
    desc: str = "training",
) -> dict[str, Tensor]:
    """Take ``steps`` optimizer steps on ``loss``, and return what happened.

    The loss is handed to the optimizer as a closure, so methods that evaluate it
    several times a step work too, and so do those that differentiate it themselves.
    Values stay on the device until the end: recording costs no synchronisation.

    Args:
        loss: Called as ``loss()``, or as ``loss(batch)`` when there are batches;
            returns a scalar tensor.
        optimizer: Any ``torch.optim.Optimizer``.
        steps: Number of steps, at least one.
        batches: One batch for each step; a step that calls the closure repeatedly sees
            the same one.
        scheduler: Stepped once after each step; one whose ``step`` needs no argument.
        record: Called as ``record(t)`` before step ``t``, with gradients off; the
            values it returns are stacked, under any name but ``"loss"``.
        desc: The text beside the progress bar. ``GUIDED_DESCENT_PROGRESS=0`` in the
            environment hides the bar.

    Returns:
        ``"loss"`` before each step, and one tensor for each recorded name; the first
        axis is time.

    Raises:
        ValueError: ``steps`` is less than one, the batches end early, or ``record``
            uses the name ``"loss"``.

    Source: appendix "The machinery".
    """
    from tqdm import tqdm

    if steps < 1:
        raise ValueError(f"steps={steps} takes no step; pass at least 1")
    history: dict[str, list[Tensor]] = {"loss": []}
    stream = iter(batches) if batches is not None else None
    quiet = os.environ.get("GUIDED_DESCENT_PROGRESS") == "0"
    for t in tqdm(range(steps), desc=desc, leave=False, disable=quiet):
        if record is not None:
            with torch.no_grad():
                for name, value in record(t).items():
                    if name == "loss":
                        told = "record returned the name 'loss', which the loss has"
                        raise ValueError(f"{told}; choose another")
                    value = torch.as_tensor(value).detach().clone()
                    history.setdefault(name, []).append(value)
        try:
            batch = () if stream is None else (next(stream),)
        except StopIteration:
            told = f"batches ended at step {t} of steps={steps}"
            raise ValueError(f"{told}; pass as many batches as steps") from None

        first: list[Tensor] = []

        def closure(batch: Any = batch, first: list[Tensor] = first) -> Tensor:
            optimizer.zero_grad()
            value = loss(*batch)
            if not getattr(optimizer, "differentiates", False):
                value.backward()
            first.append(value.detach())
            return value

        optimizer.step(closure)
        history["loss"].append(first[0])
        if scheduler is not None:
            scheduler.step()
    return {name: torch.stack(values).cpu() for name, values in history.items()}


# %% 23_machinery sec-figures 1 3e558c44
#: The palette of Okabe and Ito: it survives colour blindness and grey print.
COLORS = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "pink": "#CC79A7",
    "yellow": "#E69F00",
    "sky": "#56B4E9",
    "grey": "#6B6B6B",
    "black": "#1A1A1A",
}


def style() -> None:
    """Set the book's figure style: SVG in Okabe and Ito's colours, legible on a phone.

    Source: appendix "The machinery".
    """
    plt.rcParams.update(
        {
            "figure.figsize": (5.2, 3.2),
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.size": 12,
            "axes.titlesize": 12,
            "axes.prop_cycle": plt.cycler(color=list(COLORS.values())),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#E4E4E4",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "svg.fonttype": "path",
            "svg.hashsalt": "guided descent",
        }
    )
    if "ipykernel" in sys.modules:
        from IPython import get_ipython

        if shell := get_ipython():
            plt.close(plt.figure())  # the backend registers its formatter first
            formatters = shell.display_formatter.formatters
            formatters["image/png"].pop(Figure, None)
            formatters["image/svg+xml"].for_type(Figure, _svg)


# %% 23_machinery sec-figures 2 7cfd66af
def _svg(figure: Figure) -> str:
    """The figure as SVG, the same at every run; what is dense in it as pixels."""
    svg = _draw(figure)
    if len(svg) > _LARGEST:
        for artist in figure.findobj(_dense):
            artist.set_rasterized(True)
        svg = _draw(figure)
    panels = _panels(figure)
    return svg.replace("<svg ", f'<svg data-panels="{panels}" ', 1) if panels else svg


_LARGEST = 40_000  # bytes


def _dense(artist: Any) -> bool:
    """Whether an artist is drawn with many points: a map, filled contours, a cloud."""
    if isinstance(artist, Collection):
        points = sum(len(path.vertices) for path in artist.get_paths())
        return max(points, len(artist.get_offsets())) > 400
    marked = isinstance(artist, Line2D) and artist.get_marker() != "None"
    return marked and len(artist.get_xdata()) > 400


def _draw(figure: Figure) -> str:
    """SVG without its preamble and its needless digits, its pixels in 256 colours."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", dpi=120, facecolor="white", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"|^ +', "", svg, flags=re.MULTILINE)
    rounded = partial(re.sub, r"(\.\d\d)\d+", r"\1")
    svg = re.sub(r'\b(d|x|y)="[^"]+"', lambda m: rounded(m[0]), svg)
    packed = partial(re.sub, r"\s*([A-Zz\"])\s*", r"\1")
    svg = re.sub(r'\bd="[^"]+"', lambda m: packed(m[0]), svg)
    return re.sub(r"(?<=data:image/png;base64,)[^\"]+", _fewer_colours, svg)


def _fewer_colours(png: re.Match[str]) -> str:
    from PIL import Image

    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png[0]))).convert("RGBA")
    octree = Image.Quantize.FASTOCTREE
    image.quantize(256, method=octree).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _panels(figure: Figure) -> str:
    """Where panels side by side may be cut apart: in points, ``left:right`` of each.

    ``+left:right`` follows a panel whose numbers stand beside the first one: the strip
    that holds them. Empty where nothing can be cut.
    """
    renderer = figure.canvas.get_renderer()
    columns: dict[int, list[Any]] = {}
    for axes in figure.axes:
        spec = axes.get_subplotspec()
        top = spec.get_topmost_subplotspec() if spec else None
        column = top.colspan.start if top else max(columns, default=0)
        columns.setdefault(column, []).append(axes)
    if len(columns) < 2 or figure.texts or figure.legends or figure.get_suptitle():
        return ""
    scale = 72 / figure.dpi
    boxes = [[a.get_tightbbox(renderer) for a in columns[k]] for k in sorted(columns)]
    left = [scale * min(box.x0 for box in column) for column in boxes]
    right = [scale * max(box.x1 for box in column) for column in boxes]
    if any(b < a for a, b in zip(right, left[1:], strict=False)):
        return ""
    width = 72 * figure.get_figwidth()
    cuts = [0, *((a + b) / 2 for a, b in zip(right, left[1:], strict=False)), width]
    first = columns[min(columns)][0]
    strip = f"+0:{scale * first.get_window_extent(renderer).x0:.1f}"
    found = []
    for column, a, b in zip(sorted(columns), cuts, cuts[1:], strict=False):
        axes = columns[column][0]
        shared = axes is not first and first.get_shared_y_axes().joined(first, axes)
        bare = shared and not axes.yaxis.get_tick_params().get("labelleft", True)
        found.append(f"{a:.1f}:{b:.1f}{strip if bare else ''}")
    return " ".join(found)


# %% 23_machinery sec-figures 3 92ee2c9b
def slider(
    frames: dict[str, list[dict[str, Any]]],
    *,
    name: str,
    xlabel: str,
    ylabel: str,
    active: int = 0,
    title: str = "",
    logx: bool = False,
    logy: bool = False,
    xrange: tuple[float, float] | None = None,
    yrange: tuple[float, float] | None = None,
    aspect: float | None = None,
    height: int = 420,
) -> None:
    """Show curves that a slider moves through.

    Args:
        frames: For each position of the slider, its label and the plotly traces (``x``,
            ``y``, ``name``, …) to draw.
        name: What the slider changes, such as ``"η"``.
        xlabel: Label of the horizontal axis.
        ylabel: Label of the vertical axis.
        active: Position to start from, counted from zero.
        title: Title of the figure.
        logx: Logarithmic horizontal axis; then ``xrange`` is positive.
        logy: Logarithmic vertical axis; then ``yrange`` is positive.
        xrange: Fixed limits of the horizontal axis, else chosen from the data.
        yrange: Fixed limits of the vertical axis.
        aspect: Units of y for one unit of x on the screen; ``1`` for equal axes.
        height: Height in pixels.

    Raises:
        ValueError: There are no frames, or ``active`` is not one of them.

    Source: appendix "The machinery".
    """
    if not 0 <= active < len(frames):
        told = f"active={active} is not one of the {len(frames)} frames"
        raise ValueError(f"{told}; pass 0 to {len(frames) - 1}")
    owner = [k for k, traces in enumerate(frames.values()) for _ in traces]
    shown = [[k == frame for k in owner] for frame in range(len(frames))]
    traces = [trace for some in frames.values() for trace in some]
    data = [
        {**x, "x": _rounded(x["x"]), "y": _rounded(x["y"]), "visible": visible}
        for x, visible in zip(traces, shown[active], strict=True)
    ]
    steps = [
        {"label": label, "method": "restyle", "args": ["visible", visible]}
        for label, visible in zip(frames, shown, strict=True)
    ]
    equal = {"scaleanchor": "x", "scaleratio": aspect} if aspect else {}
    bar = {"currentvalue": {"prefix": f"{name} = "}, "pad": {"t": 45}}
    layout = {
        "title": {"text": title},
        "height": height,
        "margin": {"l": 60, "r": 15, "t": 50 if title else 30, "b": 50},
        "xaxis": _axis(xlabel, logx, xrange),
        "yaxis": _axis(ylabel, logy, yrange) | equal,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "colorway": list(COLORS.values()),
        "sliders": [{"active": active, "steps": steps, **bar}],
    }
    text = f"Interactive figure: a slider for {name}"
    interactive({"data": data, "layout": layout}, text)


def interactive(figure: dict[str, Any], text: str) -> None:
    """Show a plotly figure, given as a dictionary of ``data`` and ``layout``.

    Args:
        figure: What plotly would write as JSON.
        text: What a reader without plotly sees.

    Source: appendix "The machinery".
    """
    from IPython.display import display

    bundle = {"application/vnd.plotly.v1+json": figure, "text/plain": text}
    if "google.colab" in sys.modules:
        import plotly.io

        options = {"include_plotlyjs": "cdn", "full_html": False}
        bundle["text/html"] = plotly.io.to_html(figure, **options)
    display(bundle, raw=True)


def _rounded(values: Any) -> list[float | None]:
    """Four significant digits are plenty; what is not finite leaves a gap."""
    numbers = np.asarray(values, dtype=float).ravel()
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in numbers]


def _axis(label: str, log: bool, limits: tuple[float, float] | None) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": label}, "exponentformat": "power"}
    axis["type"] = "log" if log else "linear"
    if limits:
        axis["range"] = [float(np.log10(v)) if log else v for v in limits]
    return axis


# %% 23_machinery sec-pieces 1 e4415938
import abc
import builtins


def method_of(cls: type) -> Callable[[Any], Any]:
    """Add a function to a class, as a method: a chapter tells a class in pieces.

    Outermost over a function, a ``staticmethod``, ``classmethod`` or ``property``::

        @method_of(SGD)
        @staticmethod
        def rule(p, g, s, h): ...

    Args:
        cls: The class, which an earlier cell defines.

    Returns:
        A decorator. The method's name keeps the meaning that it had outside the class.

    Raises:
        TypeError: ``cls`` is no class, or what is decorated is no function.

    Source: appendix "The machinery".
    """
    if not isinstance(cls, type):
        raise TypeError(f"method_of({cls!r}): pass the class that gets the method")

    def attach(member: Any) -> Any:
        name = getattr(getattr(member, "fget", member), "__name__", None)
        if name is None or isinstance(member, type):
            told = f"method_of({cls.__name__}) over {member!r}"
            raise TypeError(f"{told}; put it above a function")
        setattr(cls, name, member)
        abc.update_abstractmethods(cls)
        return sys._getframe(1).f_globals.get(name, vars(builtins).get(name))

    return attach
