"""Chapter 03: SGD follows torch.optim.SGD to 1e-12 in float64, for every option, in every engine."""

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from guided_descent.sgd import SGD

OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "momentum, decay": {"momentum": 0.9, "weight_decay": 0.1},
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "dampening, decay": {"momentum": 0.8, "dampening": 0.8, "weight_decay": 0.1},
    "full dampening": {"momentum": 0.5, "dampening": 1.0},
    "dampening without momentum": {"dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov, decay, maximize": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    "dampening, decay, maximize": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
}
SHAPES = [(), (7,), (4, 5), (2, 3, 2, 2), (0, 3)]
ENGINES = ["loop", "foreach", "fused", "auto"]

every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
every_engine = pytest.mark.parametrize("engine", ENGINES)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in SHAPES]


def run(optimizer, params, times, scheduler=None):
    """A fixed sequence of gradients, independent of the parameters."""
    for t in times:
        generator = torch.Generator().manual_seed(1000 + t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def agree(ours, theirs, tol=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tol, atol=tol)


@every_option
@every_engine
def test_a_hundred_steps(options, engine):
    ours, theirs = tensors(), tensors()
    run(SGD(ours, lr=0.03, engine=engine, **options), ours, range(100))
    run(torch.optim.SGD(theirs, lr=0.03, **options), theirs, range(100))
    agree(ours, theirs)


@every_option
@every_engine
def test_a_learning_rate_that_is_a_tensor(options, engine):
    ours, theirs = tensors(), tensors()
    lr = torch.tensor(0.03, dtype=torch.float64)
    run(SGD(ours, lr=lr, engine=engine, **options), ours, range(100))
    run(torch.optim.SGD(theirs, lr=0.03, **options), theirs, range(100))
    agree(ours, theirs)
    assert lr == 0.03


@every_option
def test_the_rule_can_be_traced(options, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_(f, **{**kwargs, "backend": "eager"}))
    torch._dynamo.reset()
    ours, theirs = tensors()[:4], tensors()[:4]
    run(SGD(ours, lr=0.03, engine="compile", **options), ours, range(20))
    run(torch.optim.SGD(theirs, lr=0.03, **options), theirs, range(20))
    agree(ours, theirs)


@every_option
@every_engine
def test_skipping_without_a_reason_changes_nothing(options, engine):
    if options.get("dampening"):
        with pytest.raises(ValueError, match="dampening.*nonfinite='skip'"):
            SGD(tensors(), nonfinite="skip", **options)
        return
    ours, theirs = tensors(), tensors()
    run(SGD(ours, lr=0.03, engine=engine, nonfinite="skip", **options), ours, range(100))
    run(torch.optim.SGD(theirs, lr=0.03, **options), theirs, range(100))
    agree(ours, theirs)


@every_engine
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_skipped_step_did_not_happen(engine, nesterov):
    ours, theirs = tensors(), tensors()
    a = SGD(ours, lr=0.03, momentum=0.9, nesterov=nesterov, nonfinite="skip", engine=engine)
    b = torch.optim.SGD(theirs, lr=0.03, momentum=0.9, nesterov=nesterov)
    for t in range(10):
        for bad in (float("nan"), float("inf")):
            for p in ours:
                p.grad = torch.full_like(p, bad)
            a.step()
        run(a, ours, [t])
        run(b, theirs, [t])
    agree(ours, theirs)
    assert a.skipped_steps == 20


@every_option
@every_engine
def test_checkpoints_travel_both_ways(options, engine):
    ours, theirs, reference = tensors(), tensors(), tensors()
    run(torch.optim.SGD(reference, lr=0.03, **options), reference, range(40))

    there = torch.optim.SGD(theirs, lr=0.03, **options)
    run(there, theirs, range(20))
    here = SGD(ours, lr=0.5, engine=engine)
    here.load_state_dict(there.state_dict())
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    run(here, ours, range(20, 30))

    back = torch.optim.SGD(theirs, lr=0.5)
    back.load_state_dict(here.state_dict())
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
    run(back, theirs, range(30, 40))
    agree(theirs, reference)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_is_that_of_torch(momentum):
    params = tensors()
    optimizer = SGD(params, momentum=momentum)
    run(optimizer, params, range(2))
    keys = {name for state in optimizer.state_dict()["state"].values() for name in state}
    assert keys == ({"momentum_buffer"} if momentum else set())


@every_engine
@pytest.mark.parametrize("options", [{}, {"dampening": 0.3}, {"nesterov": True}], ids=str)
def test_one_cycle_moves_momentum_too(options, engine):
    params = tensors(), tensors()
    for x, method in zip(params, (lambda p, **k: SGD(p, engine=engine, **k), torch.optim.SGD), strict=True):
        optimizer = method(x, lr=0.03, momentum=0.9, **options)
        scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=101, cycle_momentum=True)
        seen = set()
        for t in range(100):
            run(optimizer, x, [t], scheduler)
            seen.add(round(optimizer.param_groups[0]["momentum"], 3))
        assert min(seen) < 0.86 and max(seen) > 0.94
    agree(*params)


@every_engine
def test_momentum_switched_on_in_the_middle(engine):
    params = tensors(), tensors()
    for x, method in zip(params, (lambda p, **k: SGD(p, engine=engine, **k), torch.optim.SGD), strict=True):
        optimizer = method(x, lr=0.03, weight_decay=0.1)
        for t, (momentum, dampening) in enumerate([(0.0, 0.0), (0.9, 0.5), (0.8, 0.5), (0.0, 0.5), (0.9, 0.0)]):
            optimizer.param_groups[0].update(momentum=momentum, dampening=dampening)
            run(optimizer, x, range(10 * t, 10 * t + 10))
    agree(*params)


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"nesterov": True, "dampening": 0.1},
    ],
    ids=str,
)
def test_nesterov_needs_momentum_and_no_dampening(options):
    with pytest.raises(ValueError, match="nesterov=True.*momentum.*dampening"):
        SGD(tensors(), **options)
    with pytest.raises(ValueError):
        torch.optim.SGD(tensors(), **options)


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    first, second = tensors(), tensors()
    optimizer = SGD(first, momentum=0.9, nesterov=True)
    with pytest.raises(ValueError, match="nesterov=True with momentum=0.0"):
        optimizer.add_param_group({"params": second, "momentum": 0.0})
    with pytest.raises(ValueError, match="momentum=1.5"):
        optimizer.add_param_group({"params": second, "momentum": 1.5})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": second, "nesterov": False, "momentum": 0.0})


def test_a_checkpoint_is_checked_like_a_group():
    """Options that exclude each other are refused wherever they come from, and nothing changes."""
    x = torch.ones(2, requires_grad=True)
    for own, foreign, message in [
        ({}, {"nesterov": True}, "nesterov=True with momentum=0"),
        ({"nonfinite": "skip"}, {"momentum": 0.9, "dampening": 0.1}, "dampening=0.1 with nonfinite='skip'"),
    ]:
        optimizer = SGD([x], **own)
        before = optimizer.state_dict()
        bad = {"state": {}, "param_groups": [{**before["param_groups"][0], **foreign}]}
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert optimizer.state_dict() == before
