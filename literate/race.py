"""The race on the front page: five optimizers of the package on four landscapes, from many starts, at many steps.

`python -m literate race` runs it (some minutes) and writes `chapters/race.json`; `weave` does so when that file is no
longer what this file and the modules it uses would give. The page itself computes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from literate import front
from literate.files import commit
from literate.source import Book

STEPS = 100  # of every run
COLUMNS, ROWS = 7, 5  # of the grid of starts
WIDE, HIGH = 70, 50  # points at which the page knows the height
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of each method's best step
TUNED_ON = slice(None, None, 5)  # every fifth start
NEAR = 0.03  # to have arrived is to stay this near the minimum, as a part of the frame's diagonal
UNITS = 1000  # a frame's width and height in the units of the store
LOOSE = 4.0  # how far a drawn path may be from the true one, in those units


# ---------------------------------------------------------------- landscapes: losses of networks with two weights


@dataclass(frozen=True)
class Landscape:
    """A network of two weights, its data, and the part of the plane that the page shows."""

    name: str
    title: str
    words: str  # what there is to see
    frame: tuple[float, float, float, float]  # left, right, bottom, top
    goal: tuple[float, float]
    inputs: Any
    targets: Any
    output: Callable[[Any, Any], Any]  # of weights (..., 2) and inputs, the outputs (..., N)
    network: Callable[[], Any]  # the same as a module
    loss: Callable[[Any, Any], Any]  # of outputs and targets, one number for each pair
    factors: Callable[[Any], list[tuple[slice, Any, Any]]]  # of weights, each layer's part of them, A and G
    likelihood: str = "gaussian"
    axes: tuple[str, str] = ("first weight", "second weight")
    start: int = 28  # where the page begins: the upper left of the grid

    def __call__(self, w: Any) -> Any:
        return self.loss(self.output(w, self.inputs), self.targets).mean(-1)


def landscapes() -> list[Landscape]:
    import torch
    from torch import nn
    from torch.nn.functional import binary_cross_entropy_with_logits, softplus

    class TwoLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x: Any) -> Any:
            return self.last(torch.tanh(self.first(x)))

    def inputs(condition: float, angle: float) -> Any:
        """Two inputs whose mean square is a matrix of that condition number, turned by that angle."""
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return math.sqrt(2) * condition**-0.25 * torch.diag(torch.tensor([condition, 1.0]).sqrt()) @ turn.T

    def square(output: Any, target: Any) -> Any:
        return (output - target).square() / 2

    def entropy(output: Any, target: Any) -> Any:
        floor = softplus(logit) - target * logit
        return binary_cross_entropy_with_logits(output, target.expand_as(output), reduction="none") - floor

    goal, flat = (1.2, 0.4), (-3.5, 3.5, -2.5, 2.5)
    round_inputs, long_inputs = inputs(1.0, 0.0), inputs(100.0, 0.5)
    line, answer = torch.linspace(-2, 2, 16), (2.0, 1.0)
    scores, rule = torch.linspace(-3, 3, 16), (2.0, -1.0)
    logit = rule[0] * scores + rule[1]

    def linear(w: Any, x: Any) -> Any:
        return w @ x.T

    def one_layer(x: Any) -> Callable[[Any], Any]:
        return lambda w: [(slice(0, 2), (x.T @ x / len(x)).expand(*w.shape, 2), torch.ones(w.shape[:-1]))]

    def two_layers(w: Any) -> Any:
        hidden = torch.tanh(w[..., :1] * line)
        through = (w[..., 1:] * (1 - hidden.square())).square().mean(-1)
        first = (slice(0, 1), line.square().mean().expand(*w.shape[:-1], 1, 1), through)
        return [first, (slice(1, 2), hidden.square().mean(-1)[..., None, None], torch.ones(w.shape[:-1]))]

    def sigmoid_layer(w: Any) -> Any:
        p = torch.sigmoid(w[..., :1] * scores + w[..., 1:])
        inputs = torch.stack([scores, torch.ones_like(scores)], -1)
        return [(slice(0, 2), (inputs.T @ inputs / len(inputs)).expand(*w.shape, 2), (p * (1 - p)).mean(-1))]

    one = partial(nn.Linear, 2, 1, bias=False)
    return [
        Landscape(
            "valley", "Narrow valley",
            "The steep walls forbid a long step, the floor needs one. A memory shortens the way, curvature removes the "
            "trouble: one step. Take twice the best step, and only Adam still arrives.",
            flat, goal, long_inputs,
            long_inputs @ torch.tensor(goal), linear, one, square, one_layer(long_inputs), start=33,
        ),
        Landscape(
            "bend", "Two layers",
            "Two layers of one weight each: a saddle on the left, a bent valley on the right. K-FAC sees each layer "
            "alone, and here the layers need each other: Newton and Adam are well ahead of it.",
            (-0.9, 4.0, -1.0, 2.5), answer, line, answer[1] * torch.tanh(answer[0] * line),
            lambda w, x: w[..., 1:] * torch.tanh(w[..., :1] * x), TwoLayers, square, two_layers, start=3,
        ),
        Landscape(
            "classifier", "Classifier",
            "Gradient descent, at its best step, is as quick as K-FAC. Take twice that step: both lose their way from "
            "nearly everywhere, while momentum, Adam and Newton forgive it.", (-5.0, 9.0, -6.0, 4.0), rule, scores,
            torch.sigmoid(logit), lambda w, x: w[..., :1] * x + w[..., 1:], partial(nn.Linear, 1, 1), entropy,
            sigmoid_layer, "bernoulli", ("weight", "bias"),
        ),
        Landscape(
            "bowl", "Round bowl", "Nothing to repair: plain gradient descent arrives in one step, as Newton and K-FAC "
            "do at many times the work. Memory only makes it late.", flat, goal, round_inputs,
            round_inputs @ torch.tensor(goal), linear, one, square, one_layer(round_inputs),
        ),
    ]  # fmt: skip


def starts(frame: tuple[float, float, float, float]) -> Any:
    """The grid of starts, row by row from below."""
    import torch

    left, right, bottom, top = frame
    xs = left + (right - left) * (torch.arange(COLUMNS) + 0.5) / COLUMNS
    ys = bottom + (top - bottom) * (torch.arange(ROWS) + 0.5) / ROWS
    return torch.stack([xs.repeat(ROWS), ys.repeat_interleave(COLUMNS)], -1)


# ---------------------------------------------------------------- runs: paths of shape (steps + 1, settings, starts, 2)


def elementwise(build: Callable[[Any], Any], land: Landscape, begin: Any, rates: list[float]) -> Any:
    """All starts at all rates at once: to these methods every number is a world of its own."""
    import torch

    points = [torch.nn.Parameter(begin.clone()) for _ in rates]
    method = build([{"params": [p], "lr": rate} for p, rate in zip(points, rates, strict=True)])
    path = [torch.stack([p.detach().clone() for p in points])]
    for _ in range(STEPS):
        method.zero_grad()
        land(torch.stack(points)).sum().backward()
        method.step()
        path.append(torch.stack([p.detach().clone() for p in points]))
    return torch.stack(path)


def newton(land: Landscape, begin: Any, rates: list[float], damping: float) -> Any:
    """All starts as one vector: its Hessian is block-diagonal, and a damped step treats each block alone."""
    import torch

    import guided_descent as gd

    def run(rate: float) -> Any:
        x = torch.nn.Parameter(begin.clone())
        method = gd.Newton([x], lr=rate, damping=damping, line_search_fn=None)
        path = [x.detach().clone()]
        for _ in range(STEPS):
            method.step(lambda: land(x).sum())
            path.append(x.detach().clone())
            if not (path[-1] - path[-2]).abs().max() > 1e-6:  # arrived, stuck, or no number
                break
        return torch.stack(path + [path[-1]] * (STEPS + 1 - len(path)))

    return torch.stack([run(rate) for rate in rates], 1)


def kfac(land: Landscape, begin: Any, rates: list[float], damping: float) -> Any:
    """All starts at all rates at once, by the package's equation for a step; `held` compares it with the package."""
    import torch

    rate = torch.tensor(rates).reshape(-1, 1, 1)
    w = begin.expand(len(rates), *begin.shape).clone()
    path = [w]
    for _ in range(STEPS):
        w = w.detach().requires_grad_()
        (g,) = torch.autograd.grad(land(w).sum(), w)
        w, step = w.detach(), torch.zeros_like(w)
        for part, A, G in land.factors(w):
            curvature = G[..., None, None] * A + damping * torch.eye(A.shape[-1])
            step[..., part] = torch.linalg.solve(curvature.nan_to_num(1.0), g[..., part])
        w = w - rate * step
        path.append(w)
    return torch.stack(path)


def held(land: Landscape, begin: Any, rate: float, damping: float) -> None:
    """Raise where the paths above are not those of `gd.KFAC`: three starts, eight steps."""
    import torch
    from torch import nn

    import guided_descent as gd

    few = begin[[0, 10, 24]]
    ours = kfac(land, few, [rate], damping)[:9, 0]
    for number, w in enumerate(few):
        model = land.network()
        nn.utils.vector_to_parameters(w.clone(), model.parameters())
        method = gd.KFAC(
            model, lr=rate, momentum=0, damping=damping, fisher="type-2", likelihood=land.likelihood, stat_decay=0,
            inverse_update_every=1, kl_clip=math.inf, class_dim=-1, reduction="mean",
        )  # fmt: skip
        x = land.inputs if land.inputs.dim() == 2 else land.inputs[:, None]
        for step in range(1, 9):
            method.zero_grad()
            land.loss(model(x)[:, 0], land.targets).mean().backward()
            method.step()
            theirs = nn.utils.parameters_to_vector(model.parameters()).detach()
            if not torch.allclose(ours[step, number], theirs, rtol=1e-8, atol=1e-8):
                raise AssertionError(f"{land.name}, step {step}: K-FAC at {theirs}, the race at {ours[step, number]}")
        method.detach()


def contestants() -> Iterator[tuple[str, str, str, list[float], list[tuple[str, Callable[..., Any]]]]]:
    """Key, name, chapter, the grid of step sizes, and the choices of what else there is to tune."""
    import guided_descent as gd

    def first_order(optimizer: Any, **options: Any) -> Callable[..., Any]:
        return partial(elementwise, lambda groups: optimizer(groups, engine="loop", **options))

    wide = [2.0 ** (k / 2) for k in range(-8, 13)]
    short = [0.25, 0.35, 0.5, 0.7, 1.0]
    memories, dampings = (0.5, 0.8, 0.9), (1e-3, 1e-2, 1e-1)
    yield "sgd", "Gradient descent", "01", wide, [("", first_order(gd.SGD))]
    yield "momentum", "Momentum", "03", wide, [(f"β = {b}", first_order(gd.SGD, momentum=b)) for b in memories]
    yield "adam", "Adam", "04", wide, [(f"β₁ = {b}", first_order(gd.Adam, betas=(b, 0.999))) for b in memories]
    yield "newton", "Newton", "06", short, [(f"damping {d:g}", partial(newton, damping=d)) for d in dampings]
    yield "kfac", "K-FAC", "08", short, [(f"damping {d:g}", partial(kfac, damping=d)) for d in dampings]


def arrivals(path: Any, land: Landscape) -> Any:
    """The step from which on a path stays near the minimum; STEPS + 1 if it does not. Shape (settings, starts)."""
    import torch

    left, right, bottom, top = land.frame
    radius = NEAR * math.hypot(right - left, top - bottom)
    away = ~((path - torch.tensor(land.goal)).norm(dim=-1) <= radius)
    steps = torch.arange(len(path)).reshape(-1, 1, 1)
    return torch.where(away, steps, -1).amax(0) + 1


# ---------------------------------------------------------------- the store


def corners(points: list[tuple[float, float]]) -> list[int]:
    """The steps of a path between which straight lines at even pace stay within LOOSE of it."""
    keep, todo = {0, len(points) - 1}, [(0, len(points) - 1)]
    while todo:
        a, b = todo.pop()
        (ax, ay), (bx, by) = points[a], points[b]
        worst, where = LOOSE, None
        for t in range(a + 1, b):
            s = (t - a) / (b - a)
            off = math.hypot(points[t][0] - ax - s * (bx - ax), points[t][1] - ay - s * (by - ay))
            if off > worst:
                worst, where = off, t
        if where is not None:
            keep.add(where)
            todo += [(a, where), (where, b)]
    return sorted(keep)


def packed(path: Any, arrival: int, land: Landscape) -> list[int]:
    """Arrival, then for each corner the steps since the last one and the move, in units of the frame."""
    left, right, bottom, top = land.frame
    points = []
    for x, y in path[: min(arrival + 15, STEPS) + 1].tolist():
        at = ((x - left) / (right - left) * UNITS, (y - bottom) / (top - bottom) * UNITS)
        if not all(math.isfinite(v) for v in at):
            break
        points.append(tuple(round(max(-UNITS, min(2 * UNITS, v))) for v in at))
    out, last = [arrival], (0, 0, 0)
    for t in corners(points):
        x, y = points[t]
        out += [t - last[0], x - last[1], y - last[2]]
        last = (t, x, y)
    return out


def heights(land: Landscape, columns: int = WIDE, rows: int = HIGH) -> list[int]:
    """The loss over the frame, row by row from below, as a level from 0 to 99 on a scale of its fourth root."""
    import torch

    left, right, bottom, top = land.frame
    x, y = torch.meshgrid(torch.linspace(left, right, columns), torch.linspace(bottom, top, rows), indexing="xy")
    level = land(torch.stack([x, y], -1).reshape(-1, 2)).clamp(min=0) ** 0.25
    return (99 * level / level.max()).round().int().tolist()


def run(book: Book) -> None:
    """Tune, race, and write the store."""
    import torch

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        out = []
        for land in landscapes():
            begin, entries = starts(land.frame), []
            held(land, begin, 0.5, 1e-2)
            for key, name, chapter, grid, choices in contestants():
                tried = []
                for words, method in choices:
                    scores = arrivals(method(land, begin[TUNED_ON], grid), land).double().mean(1).tolist()
                    tried += [(score, rate, words, method) for score, rate in zip(scores, grid, strict=True)]
                score, rate, words, method = min(tried, key=lambda found: found[0])
                paths = method(land, begin, [rate * scale for scale in SCALES])
                when = arrivals(paths, land).tolist()
                mean = sum(when[SCALES.index(1.0)]) / len(begin)
                said = f"{land.name:11} {name:17} step {rate:.3g} {words}: {score:.1f} steps, {mean:.1f} from all"
                print(said, flush=True)
                runs = [[packed(paths[:, i, j], when[i][j], land) for j in range(len(begin))]
                        for i in range(len(SCALES))]
                about = {"key": key, "name": name, "chapter": chapter, "step": rate, "with": words}
                entries.append({**about, "runs": runs})
            out.append({
                "name": land.name, "title": land.title, "words": land.words, "frame": land.frame, "goal": land.goal,
                "axes": land.axes, "start": land.start, "heights": heights(land), "methods": entries,
            })  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    race = {
        "source": front.current(book), "steps": STEPS, "columns": COLUMNS, "rows": ROWS, "scales": SCALES, "near": NEAR,
        "units": UNITS, "wide": WIDE, "high": HIGH, "landscapes": out,
    }  # fmt: skip
    commit(book.root, {book.root / front.STORE: json.dumps(race, ensure_ascii=False, separators=(",", ":")) + "\n"})
