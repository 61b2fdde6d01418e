"""The helpers that check the book have to be checked too."""

import abc

import numpy as np
import pytest
import torch

from guided_descent.book import check, interactive, method_of, seed, slider, train
from guided_descent.problems import GradientDescent
from literate.notebook import PLOTLY, TICK


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
    said = capsys.readouterr().out
    assert said == f"✓ (eq-x) {sign}within 1e-12\n"
    assert TICK.fullmatch(said.strip())["label"] == "eq-x"  # what `literate` looks for


@pytest.mark.parametrize(
    ("actual", "expected", "relation"),
    [
        (1.0, 1.001, "=="),
        (2.0, 1.0, "<="),
        (1.0, 2.0, ">="),
        (float("nan"), 1.0, "=="),
        (1.0, float("nan"), "<="),
        (5.0, float("inf"), "<="),
        (-float("inf"), 0.0, "<="),
        ([1.0, float("inf")], 0.0, ">="),
        (float("inf"), float("inf"), "=="),
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
    figure = shown[0][PLOTLY]
    assert [trace["visible"] for trace in figure["data"]] == [False, False, True, True, False, False]
    assert figure["data"][0]["y"] == [0.3333, None] and figure["layout"]["yaxis"]["range"] == [-1, 1]
    for k, step in enumerate(figure["layout"]["sliders"][0]["steps"]):
        assert step["args"] == ["visible", [j // 2 == k for j in range(6)]]
    with pytest.raises(ValueError, match="active=3 is not one of the 3 frames"):
        slider(frames, name="k", xlabel="x", ylabel="y", active=3)


def test_interactive_shows_plotlys_own_format(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append((bundle, raw)))
    interactive({"data": [], "layout": {}}, "Nothing")
    assert shown == [({PLOTLY: {"data": [], "layout": {}}, "text/plain": "Nothing"}, True)]


class Base(abc.ABC):
    @abc.abstractmethod
    def area(self): ...

    def name(self):
        return "base"


def square():
    """A class whose methods are attached to it."""

    class Square(Base):
        side = 2

    @method_of(Square)
    def area(self):
        return self.side**2

    @method_of(Square)
    @staticmethod
    def corners():
        return 4

    @method_of(Square)
    @classmethod
    def unit(cls):
        return cls.side

    @method_of(Square)
    @property
    def name(self):
        return "square of " + super(Square, self).name()

    return Square, (area, corners, unit, name)


def test_method_of_makes_methods():
    Square, left = square()
    assert (Square().area(), Square.corners(), Square().corners(), Square.unit()) == (4, 4, 4, 2)
    assert Square().name == "square of base" and "corners" in vars(Square) and not hasattr(Base, "corners")
    assert left == (None,) * 4


def test_method_of_leaves_names_as_they_were():
    """As in a notebook: no global of the method's name, and a builtin or function of that name stays."""
    scope = {"method_of": method_of, "C": type("C", (), {}), "check": check}
    for _ in range(2):  # a cell that is run again
        exec("@method_of(C)\ndef sum(self): return 1\n@method_of(C)\ndef check(self): return 2", scope)
        exec("@method_of(C)\ndef new(self): return 3", scope)
    assert scope["sum"] is sum and scope["check"] is check and scope["new"] is None
    assert (scope["C"]().sum(), scope["C"]().check(), scope["C"]().new()) == (1, 2, 3)


def test_method_of_refuses_what_is_no_method():
    with pytest.raises(TypeError, match="pass the class that gets the method"):
        method_of("SGD")
    for member in (3, Base, None):
        with pytest.raises(TypeError, match="put it above a function"):
            method_of(Base)(member)
