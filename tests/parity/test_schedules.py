"""Chapter 15: every piece that PyTorch or transformers has gives their factors, at every step."""

import math
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)

from guided_descent.schedules import constant, cosine, inverse_sqrt, linear, power_cool, warmup, wsd


def rates(build, steps, lr=1.0):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, found = build(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


PEERS = {
    "LinearLR": (linear(40, 0.25), lambda o: LinearLR(o, 1.0, 0.25, 40), 60),
    "LinearLR to zero": (linear(40), lambda o: LinearLR(o, 1.0, 0.0, 40), 41),
    "LinearLR warmup": (warmup(19), lambda o: LinearLR(o, 1 / 20, 1.0, 19), 30),
    "CosineAnnealingLR": (cosine(40), lambda o: CosineAnnealingLR(o, 40), 41),
    "CosineAnnealingLR to an end": (cosine(40, 0.3), lambda o: CosineAnnealingLR(o, 40, eta_min=0.3), 41),
    "PolynomialLR": (power_cool(40, 2.5), lambda o: PolynomialLR(o, 40, 2.5), 41),
    "ConstantLR": (constant(), lambda o: ConstantLR(o, 1.0), 20),
    "SequentialLR": (
        warmup(9) >> constant(11) >> cosine(20, 0.1),
        lambda o: SequentialLR(
            o, [LinearLR(o, 0.1, 1, 9), ConstantLR(o, 1.0), CosineAnnealingLR(o, 20, eta_min=0.1)], [9, 20]
        ),
        41,
    ),
    # OneCycleLR's clock ends one step earlier: its peak is at pct_start · total − 1, its end at total − 1.
    "OneCycleLR, linear": (
        warmup(20) >> linear(30, 1 / 2100),
        lambda o: OneCycleLR(
            o, 1.0, total_steps=51, pct_start=21 / 51, anneal_strategy="linear", div_factor=21, final_div_factor=100
        ),
        51,
    ),
}


@pytest.mark.parametrize(("schedule", "peer", "steps"), PEERS.values(), ids=PEERS.keys())
def test_torch(schedule, peer, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rates(lambda o: LambdaLR(o, schedule), steps) == pytest.approx(rates(peer, steps), rel=1e-12, abs=1e-14)


def test_the_cosine_half_of_onecycle():
    cycle = rates(lambda o: OneCycleLR(o, 1.0, total_steps=51, pct_start=21 / 51, final_div_factor=100), 51)
    down = cosine(30, end=1 / 2500)
    assert [down(t) for t in range(31)] == pytest.approx(cycle[20:], rel=1e-12)


# transformers.optimization. Its warm-up is t/n: the first step is lost, the rest is warmup(n − 1) shifted by one.


def linear_with_warmup(t, n, T):
    return t / max(1, n) if t < n else max(0.0, (T - t) / max(1, T - n))


def cosine_with_warmup(t, n, T, cycles=0.5):
    if t < n:
        return t / max(1, n)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * cycles * 2 * (t - n) / max(1, T - n))))


def inverse_sqrt_with_warmup(t, n, timescale):
    return t / max(1, n) if t < n else 1 / math.sqrt((t + timescale - n) / timescale)


def polynomial_with_warmup(t, n, T, end, power):
    if t < n:
        return t / max(1, n)
    return end if t > T else (1 - end) * (1 - (t - n) / (T - n)) ** power + end


def wsd_with_warmup(t, n, stable, decay, low):
    if t < n:
        return t / max(1, n)
    if t < n + stable:
        return 1.0
    s = (t - n - stable) / max(1, decay)
    return (1 - low) * (1 + math.cos(math.pi * s)) / 2 + low if s < 1 else low


@pytest.mark.parametrize("n", [1, 10])
def test_transformers(n):
    after = range(n, 60)

    def same(schedule, theirs):
        return [schedule(t) for t in after] == pytest.approx([theirs(t) for t in after], abs=1e-14)

    rise = warmup(n)
    assert same(rise >> linear(50 - n + 10), lambda t: linear_with_warmup(t, n, 60))
    assert same(rise >> cosine(60 - n), lambda t: cosine_with_warmup(t, n, 60))
    assert same(rise >> inverse_sqrt(17), lambda t: inverse_sqrt_with_warmup(t, n, 17))
    assert same(rise >> power_cool(50 - n, 3.0, 0.1), lambda t: polynomial_with_warmup(t, n, 50, 0.1, 3.0))
    plan = rise >> wsd(40, 12, "cosine", 0.05)
    assert same(plan, lambda t: wsd_with_warmup(t, n, 28, 12, 0.05))
    assert [warmup(n - 1)(t - 1) for t in range(1, n)] == pytest.approx([t / n for t in range(1, n)])


def test_torchs_chain_resumes_wrongly_by_last_epoch_and_ours_rightly():
    """pytorch/pytorch issue 162591, in torch 2.13. If this fails, torch has mended it: say so in chapter 15."""

    def chain(o, last=-1):
        return SequentialLR(o, [LinearLR(o, 0.1, 1, 5), CosineAnnealingLR(o, 20)], [5], last_epoch=last)

    def resumed(build):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        optimizer.param_groups[0] |= {"lr": whole[10], "initial_lr": 1.0}
        scheduler = build(optimizer, 9)
        return optimizer.param_groups[0]["lr"], scheduler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = rates(chain, 25)
        assert abs(resumed(chain)[0] - whole[10]) > 0.5
        ours = warmup(9) >> cosine(16)
        whole = rates(lambda o: LambdaLR(o, ours), 25)
        rate, scheduler = resumed(lambda o, last: LambdaLR(o, ours, last_epoch=last))
        assert rate == whole[10] == ours(10)
        for t in range(11, 25):
            scheduler.optimizer.step()
            scheduler.step()
            assert scheduler.get_last_lr() == [whole[t]]
