"""Chapter 15: schedules are what their formulas say, at every step; they compose, resume and refuse."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

import guided_descent as gd
from guided_descent.schedules import (
    Schedule,
    constant,
    cosine,
    inverse_sqrt,
    linear,
    power_cool,
    tokens,
    warmup,
    wsd,
)

fast = settings(max_examples=25, deadline=None)
lengths = st.integers(1, 60)
ends = st.floats(0.01, 1)
pieces = st.one_of(
    st.builds(warmup, lengths),
    st.builds(constant, lengths),
    st.builds(linear, lengths, ends),
    st.builds(cosine, lengths, ends),
    st.builds(power_cool, lengths, st.floats(0.2, 4), ends),
    st.builds(wsd, lengths, st.floats(0.01, 1), st.sampled_from(["linear", "1-sqrt", "cosine"]), ends),
    st.builds(inverse_sqrt, st.floats(0.1, 100), lengths),
)


def level(schedule: Schedule) -> float:
    return schedule(schedule.steps)


# -- each piece ------------------------------------------------------------------------------------------------------


@fast
@given(lengths, st.floats(0, 1), st.floats(0.2, 4), st.data())
def test_the_formula_of_every_piece(n, end, p, data):
    t = data.draw(st.integers(0, n - 1))
    s = t / n

    def same(schedule, value):
        return math.isclose(schedule(t), value, rel_tol=1e-12, abs_tol=1e-12)

    assert same(warmup(n), (t + 1) / (n + 1))
    assert same(constant(n), 1.0)
    assert same(linear(n, end), end + (1 - end) * (1 - s))
    assert same(power_cool(n, p, end), end + (1 - end) * (1 - s) ** p)
    assert same(cosine(n, end), end + (1 - end) * math.cos(math.pi * s / 2) ** 2)
    assert same(wsd(n, 1.0, "1-sqrt", end), end + (1 - end) * (1 - s**0.5))
    assert same(inverse_sqrt(p), math.sqrt(p / (p + t)))


@pytest.mark.parametrize("make", [linear, cosine, power_cool, lambda n: wsd(n, 1.0, "1-sqrt")])
def test_the_clock_of_a_decay(make):
    """The first step has the full rate, the last is not wasted, and 0 comes after it."""
    schedule = make(10)
    assert schedule(0) == 1 and schedule(9) > 0 and schedule(10) == 0 and schedule.steps == 10
    assert all(schedule(t) > schedule(t + 1) for t in range(10))
    assert linear(10)(9) == pytest.approx(1 / 10, rel=1e-14)


def test_the_clock_of_a_warmup():
    assert [warmup(4)(t) for t in range(6)] == [0.2, 0.4, 0.6, 0.8, 1, 1]
    assert warmup(0) == Schedule() and warmup(0)(0) == 1
    assert warmup(0) >> linear(3) == linear(3)


def test_defaults():
    assert power_cool(10) == power_cool(10, 1.2, 0.0) and wsd(10) == wsd(10, 0.2, "linear", 0.0)
    assert constant()(10**9) == 1 and inverse_sqrt(4)(12) == 0.5


@pytest.mark.parametrize(
    ("schedule", "hold", "cool"),
    [(wsd(10), 8, 2), (wsd(10, 3), 7, 3), (wsd(10, 0.25), 8, 2), (wsd(3, 0.01), 2, 1), (wsd(10, 1.0), 0, 10)],
)
def test_wsd_holds_and_cools(schedule, hold, cool):
    expected = [1.0] * hold + [1 - k / cool for k in range(cool)] + [0.0]
    assert [schedule(t) for t in range(len(expected))] == pytest.approx(expected, abs=1e-15)


# -- composition -----------------------------------------------------------------------------------------------------


@fast
@given(st.lists(pieces, min_size=1, max_size=4))
def test_a_chain_is_its_pieces_scaled_by_the_level_before(parts):
    whole = parts[0]
    for part in parts[1:]:
        whole = whole >> part
    assert whole.steps == sum(part.steps for part in parts)
    t, scale = 0, 1.0
    for part in parts:
        for local in range(part.steps):
            assert whole(t + local) == pytest.approx(scale * part(local), rel=1e-12)
        t, scale = t + part.steps, scale * level(part)
    assert whole(t) == pytest.approx(scale, rel=1e-12) and whole(t + 7) == whole(t)


@fast
@given(pieces, pieces, pieces)
def test_composition_is_associative(a, b, c):
    assert (a >> b) >> c == a >> (b >> c)


@fast
@given(pieces, st.one_of(st.builds(linear, lengths, ends), st.builds(cosine, lengths, ends)))
def test_a_chain_is_continuous(first, second):
    """At a seam the factor does not jump: the later piece starts at the level of the earlier one."""
    whole, n = first >> second, first.steps
    assert whole(n) == pytest.approx(level(first), rel=1e-12)
    assert whole(n - 1e-12) == pytest.approx(whole(n), abs=0.02)  # a power of 0.2 is steep


@fast
@given(st.lists(pieces, min_size=1, max_size=4))
def test_repr_can_be_read_again(parts):
    whole = parts[0]
    for part in parts[1:]:
        whole = whole >> part
    assert eval(repr(whole)) == whole
    assert copy.deepcopy(whole) == pickle.loads(pickle.dumps(whole)) == whole


def test_nothing_follows_zero():
    with pytest.raises(ValueError, match=r"cosine\(5\) follows linear\(5\), which ends at 0.*end > 0"):
        linear(5) >> cosine(5)
    with pytest.raises(TypeError):
        linear(5, 0.1) >> 3


def test_an_endless_piece_has_no_successor_without_a_horizon():
    for first in (constant(), inverse_sqrt(5)):
        schedule = first >> linear(5)
        with pytest.raises(ValueError, match=r"never ends, and linear\(5\) never begins; call .over\(steps\)"):
            schedule(0)
        assert schedule.over(20).steps == 20 and schedule.over(20)(20) == 0


# -- lengths ---------------------------------------------------------------------------------------------------------


@fast
@given(st.integers(50, 5000), st.floats(0.03, 0.5), st.floats(0.03, 0.4))
def test_fractions_fill_the_horizon(T, rise, cool):
    schedule = (warmup(rise) >> wsd(decay=cool)).over(T)
    n = [piece[1] for piece in schedule.pieces]
    assert sum(n) == T and all(isinstance(k, int) for k in n)
    assert abs(n[0] - rise * T) <= 0.5 + 1e-6 and abs(n[2] - cool * T) <= 1
    third = (warmup(1 / 3) >> constant(1 / 3) >> linear(1 / 3)).over(T)
    assert third.steps == T


def test_lengths_of_every_kind():
    assert (warmup(10) >> cosine()).over(100) == warmup(10) >> cosine(90)
    assert (warmup(0.1) >> wsd(0.9, 0.5)).over(100) == warmup(10) >> constant(45) >> linear(45)
    assert wsd(decay=0.2).over(50) == wsd(50, 0.2) and wsd(decay=1.0).over(9) == linear(9)
    assert wsd(decay=30).over(50) == constant(20) >> linear(30)
    assert linear(1).steps == 1 and linear(1.0).over(7) == linear(7)
    assert linear(5).over(5) == linear(5)
    assert tokens(10e9, 2**19) == 19074 and tokens(8, 4) == 2 and tokens(9, 4) == 3
    assert cosine(tokens(10e9, per_step=2**19)).steps == 19074


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: linear(50.0), ValueError, r"T=50\.0 is a float.*pass an int"),
        (lambda: linear(0.0), ValueError, r"T=0\.0 is a float"),
        (lambda: linear(math.nan), ValueError, "T=nan"),
        (lambda: linear(0), ValueError, "T=0 is too small; pass at least 1"),
        (lambda: warmup(-1), ValueError, "n=-1 is too small; pass at least 0"),
        (lambda: warmup(None), TypeError, "n=None"),
        (lambda: linear(True), TypeError, "T=True is not an integer"),
        (lambda: linear("10"), TypeError, "T='10' is not an integer"),
        (lambda: linear(5, end=1.5), ValueError, r"end=1\.5"),
        (lambda: cosine(5, end=-0.1), ValueError, r"end=-0\.1"),
        (lambda: wsd(5, end=2.0), ValueError, r"end=2\.0"),
        (lambda: power_cool(5, 0.0), ValueError, r"power=0\.0"),
        (lambda: inverse_sqrt(0), ValueError, "offset=0"),
        (lambda: wsd(10, 11), ValueError, "decay=11 is longer than T=10"),
        (lambda: wsd(0.5, 3), ValueError, r"decay=3 is in steps and T=0\.5 a fraction"),
        (lambda: wsd(10, None), TypeError, "decay=None"),
        (lambda: wsd(10, shape="sqrt"), ValueError, "shape='sqrt' is unknown; use one of 'linear'"),
        (lambda: tokens(0, 4), ValueError, "total=0"),
        (lambda: tokens(10, 0), ValueError, "per_step=0 is too small"),
        (lambda: linear()(3), ValueError, r"linear\(\) has no length; call \.over"),
        (lambda: warmup(0.1)(3), ValueError, r"warmup\(0\.1\) is a fraction of a horizon; call \.over"),
        (lambda: linear(0.5).steps, ValueError, r"call \.over"),
        (lambda: (warmup(5) >> linear(10)).over(20), ValueError, "takes 15 of horizon=20 steps"),
        (lambda: (warmup(15) >> linear(10)).over(20), ValueError, "takes 25 of horizon=20 steps"),
        (lambda: (warmup(20) >> linear()).over(20), ValueError, r"linear\(\) gets 0 of horizon=20"),
        (lambda: (warmup(0.001) >> linear()).over(20), ValueError, r"warmup\(0\.001\) gets 0 of horizon=20"),
        (lambda: linear().over(0), ValueError, "horizon=0 is too small"),
        (lambda: linear().over(10.0), TypeError, r"horizon=10\.0 is not an integer"),
        (lambda: cosine(end=0.1) >> linear(), ValueError, "both take the rest"),
        (lambda: constant().plot(), ValueError, r"never ends; pass plot\(steps"),
    ],
)
def test_refusals_name_argument_value_and_remedy(make, error, told):
    with pytest.raises(error, match=told):
        make()


def test_past_the_end_of_a_decay_to_zero_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear(5)(5)  # what LambdaLR asks for after the last step
        linear(5, 0.1)(50)
        constant(3)(50)
    with pytest.warns(UserWarning, match=r"linear\(5\) ended at 0 after 5 steps; a later one learns nothing"):
        linear(5)(6)


# -- LambdaLR --------------------------------------------------------------------------------------------------------


def begin(schedule, lr=0.7, groups=1):
    params = [torch.zeros(2, requires_grad=True) for _ in range(groups)]
    optimizer = gd.SGD([{"params": p, "lr": lr / (k + 1)} for k, p in enumerate(params)], momentum=0.5)
    return optimizer, LambdaLR(optimizer, schedule)


def go(run, steps):
    optimizer, scheduler = run
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
    return rates


def through_a_file(*states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


FORMS = {
    "warmup": warmup(30),
    "constant": constant(),
    "linear": linear(60, 0.1),
    "cosine": cosine(60),
    "power": power_cool(60, 2.5),
    "wsd": wsd(60, 0.6, "1-sqrt"),
    "inverse_sqrt": inverse_sqrt(7.5),
    "two": warmup(5) >> linear(55),
    "many": warmup(5) >> constant(10) >> cosine(20, 0.3) >> inverse_sqrt(3, 10) >> wsd(15, 4, "cosine"),
    "resolved": (warmup(0.1) >> wsd(decay=0.3)).over(60),
}
OTHERS = [linear(3), constant(), warmup(2) >> cosine(4, 0.2) >> linear(3)]


@pytest.mark.parametrize("stop", [0, 1, 5, 29, 45])
@pytest.mark.parametrize("schedule", FORMS.values(), ids=FORMS.keys())
def test_resuming_is_exact_whatever_the_new_run_was_built_with(schedule, stop):
    whole = go(begin(schedule), 60)
    for other in [schedule, *OTHERS]:
        run = begin(copy.deepcopy(schedule))
        before = go(run, stop)
        states = through_a_file(run[0].state_dict(), run[1].state_dict())
        again = begin(copy.deepcopy(other), lr=99.0)
        for part, state in zip(again, states, strict=True):
            part.load_state_dict(state)
        assert before + go(again, 60 - stop) == whole
        assert again[1].lr_lambdas[0] == schedule and repr(again[1].lr_lambdas[0]) == repr(schedule)


def test_resuming_restores_what_is_stored_alone():
    """Only plain types go into a checkpoint, and loading does not touch the schedule that was saved."""
    schedule = warmup(5) >> wsd(20)
    run = begin(schedule)
    go(run, 7)
    state = run[1].state_dict()["lr_lambdas"]
    assert state == [{"pieces": schedule.pieces}]
    kinds = {type(x) for piece in schedule.pieces for x in piece}
    assert kinds == {str, int, float}
    other = linear(9)
    begin(other)[1].load_state_dict(run[1].state_dict())
    assert schedule == warmup(5) >> wsd(20)


def test_one_schedule_for_each_group():
    one, two = warmup(3) >> linear(17), cosine(20, 0.1)
    rates = go(begin([one, two], groups=2), 20)
    assert rates == [[0.7 * one(t), 0.35 * two(t)] for t in range(20)]


def test_resuming_by_last_epoch():
    """Without the scheduler's state: the optimizer's, and the step."""
    schedule = warmup(5) >> constant(5) >> cosine(20)
    whole = go(begin(schedule), 30)
    run = begin(schedule)
    go(run, 13)
    optimizer = begin(schedule)[0]
    optimizer.load_state_dict(run[0].state_dict())
    assert go((optimizer, LambdaLR(optimizer, schedule, last_epoch=12)), 17) == whole[13:]


def test_an_unplanned_cooldown():
    run = begin(warmup(5) >> constant())
    go(run, 20)
    states = through_a_file(*(part.state_dict() for part in run))
    again = begin(constant())
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    again[1].lr_lambdas[0] = warmup(5) >> constant(15) >> linear(10)
    # The rate of the next step was set before the schedule changed, and is the same: the new one is continuous.
    assert go(again, 10) == [[0.7 * (1 - k / 10)] for k in range(10)]


def test_a_group_added_later_needs_to_be_told():
    schedule = warmup(5) >> linear(15)
    optimizer, scheduler = begin(schedule)
    go((optimizer, scheduler), 8)
    silent = copy.deepcopy((optimizer, scheduler))
    silent[1].optimizer = silent[0]
    silent[0].add_param_group({"params": torch.zeros(1, requires_grad=True), "lr": 0.1})
    with pytest.raises(ValueError, match="zip"):
        go(silent, 1)
    lr = 0.2  # as the docstring of Schedule says
    now = lr * schedule(scheduler.last_epoch)
    optimizer.add_param_group({"params": torch.zeros(2, requires_grad=True), "lr": now, "initial_lr": lr})
    scheduler.base_lrs.append(lr)
    scheduler.lr_lambdas.append(schedule)
    assert go((optimizer, scheduler), 12) == [[0.7 * schedule(t), lr * schedule(t)] for t in range(8, 20)]
    states = through_a_file(optimizer.state_dict(), scheduler.state_dict())
    again = begin([linear(3), constant()], groups=2)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    assert again[1].lr_lambdas == [schedule, schedule] and again[1].base_lrs == [0.7, lr]


@pytest.mark.parametrize("engine", ["loop", "foreach", "auto"])
def test_a_learning_rate_that_is_a_tensor(engine):
    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = gd.SGD([p], lr=torch.tensor(0.5, dtype=torch.float64), engine=engine)
    schedule = warmup(3) >> cosine(7)
    scheduler, rate = LambdaLR(optimizer, schedule), optimizer.param_groups[0]["lr"]
    for _ in range(10):
        p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    total = -0.5 * sum(schedule(t) for t in range(10))
    assert torch.allclose(p.detach(), torch.full((3,), total, dtype=torch.float64), rtol=1e-12)


# -- what the chapter derives ----------------------------------------------------------------------------------------


def test_plot_draws_every_step():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = plt.figure().add_subplot()
    schedule = warmup(5) >> linear(15)
    assert schedule.plot(ax=ax, label="x") is ax
    x, y = ax.lines[0].get_data()
    assert list(x) == list(range(20)) and list(y) == [schedule(t) for t in range(20)]
    assert ax.lines[0].get_label() == "x"
    inverse_sqrt(10).plot(steps=10_000, ax=ax)
    x, y = ax.lines[1].get_data()
    assert x[0] == 0 and x[-1] == 9999 and len(x) < 500 and y[-1] == inverse_sqrt(10)(9999)
    plt.close("all")


@fast
@given(st.integers(2, 60))
def test_the_straight_line_is_an_average_of_all_points(T):
    """eq-sc-average: the weights of linear decay are equal, and sum to one."""
    drops = [linear(T)(k - 1) - linear(T)(k) for k in range(1, T + 1)]
    assert drops == pytest.approx([1 / T] * T, abs=1e-12)


@pytest.mark.parametrize("T", [1, 2, 10, 100])
def test_the_straight_line_is_the_one_of_the_theorem(T):
    """Zamani & Glineur: steps k = 1 … N of D (N + 1 − k) / (G √(N+1)³), and the bound attained."""
    D, G = 2.0, 3.0
    ours = [D / G * T / (T + 1) ** 1.5 * linear(T)(t) for t in range(T)]
    theirs = [D * (T + 1 - k) / (G * (T + 1) ** 1.5) for k in range(1, T + 1)]
    assert ours == pytest.approx(theirs, rel=1e-12)
    x = torch.zeros(T + 1, dtype=torch.float64)
    for eta in ours:
        x[x.argmax()] -= eta * G
    gap = G * float(x.max()) + G * D / math.sqrt(T + 1)
    assert gap == pytest.approx(D * G / math.sqrt(T + 1))
