"""Averaging against schedulefree 1.4.1 and torch.optim.swa_utils, in fp64."""

import pytest
import schedulefree
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import guided_descent as gd

SHAPES = [(), (5,), (4, 3), (2, 3, 4)]
SGD = [
    {},
    {"momentum": 0.5, "lr": 0.3},
    {"weight_decay": 0.1},
    {"warmup_steps": 20, "r": 2.0, "weight_lr_power": 1.0},
    {"warmup_steps": 7, "weight_decay": 0.01, "weight_lr_power": 0.0},
]
ADAMW = [
    {},
    {"betas": (0.98, 0.9), "eps": 1e-2},
    {"weight_decay": 0.1},
    {"warmup_steps": 20, "r": 1.0, "weight_decay": 0.01},
]


def run(build, steps, engine=None):
    """A noisy quadratic: y and x after some steps, with a look at x on the way."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in SHAPES]
    curvature = [torch.rand(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    optimizer = build(params)
    optimizer.train()
    for _ in range(steps):
        for p, c in zip(params, curvature, strict=True):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = c * p.detach() + 0.1 * noise
        optimizer.step()
    y = [p.detach().clone() for p in params]
    optimizer.eval()
    return y + [p.detach().clone() for p in params]


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("engine", ["loop", "foreach", "fused"])
@pytest.mark.parametrize("options", SGD, ids=str)
def test_schedule_free_sgd(options, engine):
    options = {"lr": 0.1, **options}
    close(
        run(lambda p: gd.ScheduleFreeSGD(p, engine=engine, **options), 200),
        run(lambda p: schedulefree.SGDScheduleFree(p, **options), 200),
        1e-13,
    )


@pytest.mark.parametrize("engine", ["loop", "foreach", "fused"])
@pytest.mark.parametrize("options", ADAMW, ids=str)
def test_schedule_free_adamw(options, engine):
    options = {"lr": 0.01, **options}
    close(
        run(lambda p: gd.ScheduleFreeAdamW(p, engine=engine, **options), 50),
        run(lambda p: schedulefree.AdamWScheduleFree(p, **options), 50),
        1e-13,
    )


@pytest.mark.parametrize("polyak", [False, True])
def test_model_averages_are_torchs(polyak):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    average = get_swa_multi_avg_fn() if polyak else get_ema_multi_avg_fn(0.9)
    theirs = AveragedModel(model, multi_avg_fn=average)
    if not polyak:
        theirs.update_parameters(model)  # it copies the first model it sees; we have it already
    ours = gd.Polyak(model) if polyak else gd.EMA(model, 0.9, warmup=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        ours.update()
        theirs.update_parameters(model)
    with ours.swap():
        tolerance = 1e-8 if polyak else 1e-13  # torch counts in single precision
        close(list(model.parameters()), list(theirs.module.parameters()), tolerance)
