"""The helpers that check the book have to be checked too."""

import numpy as np
import pytest
import torch

from guided_descent.book import check, seed, slider, train
from guided_descent.problems import GradientDescent


@pytest.mark.parametrize(
    ("actual", "expected", "relation"),
    [
        (1.0, 1.0 + 1e-13, "=="),
        (torch.ones(3, dtype=torch.bfloat16), 1, "=="),
        (torch.tensor([True, False]), [1, 0], "=="),
        (np.uint8(1), np.uint8(2), "<="),
        (3.0, 2.0, ">="),
        (1j, 1j, "=="),
        ([1e9], [1e9 + 1e-4], "=="),
    ],
)
def test_check_prints_a_tick(actual, expected, relation, capsys):
    check("eq-x", actual, expected, relation=relation)
    sign = {"==": "", "<=": "≤ ", ">=": "≥ "}[relation]
    assert capsys.readouterr().out == f"✓ (eq-x) {sign}within 1e-12\n"


@pytest.mark.parametrize(
    ("actual", "expected", "relation"),
    [
        (1.0, 1.001, "=="),
        (2.0, 1.0, "<="),
        (1.0, 2.0, ">="),
        (float("nan"), 1.0, "=="),
        (1.0, float("nan"), "<="),
        (5.0, float("inf"), "<="),
        ([], [], "=="),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "=="),
        ([1.0, 2.0], [1.0], "=="),
    ],
)
def test_check_refuses(actual, expected, relation):
    with pytest.raises(AssertionError, match="eq-x"):
        check("eq-x", actual, expected, relation=relation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"relation": "<"}, "relation='<' is unknown"), ({"tol": float("inf")}, "tol=inf"), ({"tol": 0.0}, "tol=0.0")],
)
def test_check_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        check("eq-x", 1.0, 1.0, **arguments)
    with pytest.raises(ValueError, match="does not order complex numbers"):
        check("eq-x", 1j, 1j, relation="<=")


def test_train_is_the_loop_written_out():
    def problem():
        x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        return x, GradientDescent([x], lr=0.1)

    x, optimizer = problem()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    batches = torch.arange(6.0, dtype=torch.float64)
    history = train(
        lambda b: (b * x).square().sum(),
        optimizer,
        6,
        batches=iter(batches),
        scheduler=scheduler,
        record=lambda t: {"x": x, "t": t},
    )
    y, by_hand = problem()
    scheduler = torch.optim.lr_scheduler.StepLR(by_hand, 2, 0.5)
    for t, b in enumerate(batches):
        assert torch.equal(history["x"][t], y) and history["t"][t] == t
        by_hand.zero_grad()
        loss = (b * y).square().sum()
        loss.backward()
        by_hand.step()
        scheduler.step()
        assert history["loss"][t] == loss
    assert torch.equal(x, y)


def test_train_refuses_what_cannot_be_right():
    x = torch.ones(1, requires_grad=True)
    optimizer = GradientDescent([x])
    with pytest.raises(ValueError, match="steps=0 takes no step"):
        train(lambda: x.sum(), optimizer, 0)
    with pytest.raises(ValueError, match="batches ended at step 1 of steps=2"):
        train(lambda b: x.sum() * b, optimizer, 2, batches=[1.0])
    with pytest.raises(ValueError, match="record returned the name 'loss'"):
        train(lambda: x.sum(), optimizer, 1, record=lambda t: {"loss": 0.0})


def test_seed_makes_all_three_repeat():
    import random

    def draw():
        generator = seed(3)
        return random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=generator).item()

    assert draw() == draw()


def test_slider_shows_one_frame_at_a_time(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    frames = {k: [{"x": [1.0, 2.0], "y": [1 / 3, float("nan")]}] * 2 for k in ("a", "b", "c")}
    slider(frames, name="k", xlabel="x", ylabel="y", active=1, logy=True, yrange=(0.1, 10))
    figure = shown[0]["application/vnd.plotly.v1+json"]
    assert [trace["visible"] for trace in figure["data"]] == [False, False, True, True, False, False]
    assert figure["data"][0]["y"] == [0.3333, None] and figure["layout"]["yaxis"]["range"] == [-1, 1]
    for k, step in enumerate(figure["layout"]["sliders"][0]["steps"]):
        assert step["args"] == ["visible", [j // 2 == k for j in range(6)]]
    with pytest.raises(ValueError, match="active=3 is not one of the 3 frames"):
        slider(frames, name="k", xlabel="x", ylabel="y", active=3)
