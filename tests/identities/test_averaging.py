"""Averaging: closed forms, engines, modes, checkpoints and refusals, in fp64."""

import copy
import io
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import ConstantLR, LambdaLR

import guided_descent as gd

METHODS = {
    "sgd": lambda p, **o: gd.ScheduleFreeSGD(p, **{"lr": 0.3, **o}),
    "adamw": lambda p, **o: gd.ScheduleFreeAdamW(p, **{"lr": 0.05, **o}),
    "gpa": lambda p, **o: gd.GPA(p, **{"lr": 0.05, "mu_x": 0.9, **o}),
    "gpa-plain": lambda p, **o: gd.GPA(p, **{"lr": 0.05, "mu_x": 0.9, "betas": (0.0, 0.9), **o}),
    "gpa-sgd": lambda p, **o: gd.GPA(p, **{"lr": 0.3, "mu_x": 0.9, "base": "sgd", **o}),
    "polyak": lambda p, **o: gd.ScheduleFreeSGD(p, **{"lr": 0.3, "momentum": 0.0, **o}),
    "ema": lambda p, **o: gd.GPA(p, **{"lr": 0.3, "mu_x": 0.9, "mu_y": 0.0, "base": "sgd", **o}),
}
every_method = pytest.mark.parametrize("name", METHODS)
SHAPES = [(), (4,), (3, 2)]


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in SHAPES]


def steps(optimizer, params, times):
    for t in times:
        generator = torch.Generator().manual_seed(t)
        for p in params:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = (p.detach() + noise).to(p.dtype)
        optimizer.step()


def values(params):
    return [p.detach().clone() for p in params]


def same(a, b):
    return all(map(torch.equal, a, b))


def close(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def definition(y, gradient, lr, beta, weight, decay=0.0, at="y", adam=None, count=20, warmup=0):
    """y and x by keeping three sequences."""
    x = z = y
    m = v = torch.zeros_like(y)
    for t in range(1, count + 1):
        g = gradient(y, t)
        if adam:
            b1, b2, eps = adam
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            g = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
        u = g + decay * (y if at == "y" else z)
        z = z - lr * (min(1, t / warmup) if warmup else 1) * u
        c = weight(t)
        x = (1 - c) * x + c * z
        y = beta * x + (1 - beta) * z
    return y, x


def gradients(y, t):
    generator = torch.Generator().manual_seed(t)
    return y + torch.randn(y.shape, generator=generator, dtype=y.dtype)


def modes(optimizer, p, count=20):
    for t in range(1, count + 1):
        p.grad = gradients(p.detach(), t)
        optimizer.step()
    y = p.detach().clone()
    optimizer.eval()
    return y, p.detach().clone()


@pytest.mark.parametrize("engine", ["loop", "foreach", "fused"])
@pytest.mark.parametrize("at", ["y", "z"])
@given(
    beta=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    decay=st.sampled_from([0.0, 0.2]),
    r=st.sampled_from([0.0, 2.0]),
    power=st.sampled_from([0.0, 2.0]),
    warmup=st.sampled_from([0, 5]),
    maximize=st.booleans(),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_schedule_free_is_its_definition(engine, at, beta, decay, r, power, warmup, maximize):
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    options = {"weight_decay": decay, "r": r, "weight_lr_power": power, "warmup_steps": warmup}
    options |= {"decay_at": at, "engine": engine, "maximize": maximize}
    w = [t**r * (0.3 * (min(1, t / warmup) if warmup else 1)) ** power for t in range(1, 21)]
    weight = lambda t: w[t - 1] / sum(w[:t])  # noqa: E731
    sign = -1 if maximize else 1
    told = lambda y, t: sign * gradients(y, t)  # noqa: E731
    p = start.clone().requires_grad_()
    found = modes(gd.ScheduleFreeSGD([p], 0.3, beta, **options), p)
    close(found, definition(start, told, 0.3, beta, weight, decay, at, warmup=warmup))
    p = start.clone().requires_grad_()
    found = modes(gd.ScheduleFreeAdamW([p], 0.3, (beta, 0.9), 1e-3, **options), p)
    close(found, definition(start, told, 0.3, beta, weight, decay, at, (0.0, 0.9, 1e-3), warmup=warmup))


@pytest.mark.parametrize("engine", ["loop", "foreach", "fused"])
@pytest.mark.parametrize("at", ["y", "z"])
@pytest.mark.parametrize("mu_y", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("beta1", [0.0, 0.8])
@pytest.mark.parametrize("maximize", [False, True])
def test_gpa_is_its_definition(engine, at, mu_y, beta1, maximize):
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    sign = -1 if maximize else 1
    told = lambda y, t: sign * gradients(y, t)  # noqa: E731
    options = {"weight_decay": 0.2, "decay_at": at, "engine": engine, "maximize": maximize}
    p = start.clone().requires_grad_()
    found = modes(gd.GPA([p], 0.1, 0.9, mu_y, (beta1, 0.9), 1e-3, **options), p)
    close(found, definition(start, told, 0.1, mu_y, lambda t: 0.1, 0.2, at, (beta1, 0.9, 1e-3)))
    p = start.clone().requires_grad_()
    found = modes(gd.GPA([p], 0.1, 0.9, mu_y, base="sgd", **options), p)
    close(found, definition(start, told, 0.1, mu_y, lambda t: 0.1, 0.2, at))


@pytest.mark.parametrize("engine", ["loop", "fused"])
@pytest.mark.parametrize("maximize", [False, True])
@every_method
def test_gradients_stay_bit_by_bit(name, engine, maximize):
    params = parameters()
    optimizer = METHODS[name](params, engine=engine, maximize=maximize, weight_decay=0.1)
    for t in range(3):
        for p in params:
            p.grad = p.detach() + t
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert same(before, [p.grad for p in params])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_method
def test_evaluation_changes_no_bit_of_training(name, dtype):
    params, others = parameters(dtype), parameters(dtype)
    watched, alone = METHODS[name](params), METHODS[name](others)
    for t in range(6):
        steps(watched, params, [t])
        steps(alone, others, [t])
        for method in ("eval", "eval", "train", "train")[: 4 if t % 2 else 0]:
            getattr(watched, method)()
    assert same(values(params), values(others)) and not any("y" in s for s in watched.state.values())


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@every_method
def test_a_checkpoint_of_either_mode_goes_on_exactly(name, mode, state_dtype):
    params = parameters(torch.float32)
    whole = METHODS[name](params, state_dtype=state_dtype)
    steps(whole, params, range(4))
    getattr(whole, mode)()
    file = io.BytesIO()
    torch.save([values(params), whole.state_dict()], file)
    file.seek(0)
    saved, state = torch.load(file, weights_only=True)
    fresh = [p.requires_grad_() for p in saved]
    resumed = METHODS[name](fresh, state_dtype=state_dtype)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["train_mode"] == (mode == "train")
    if mode == "eval":
        with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) before step"):
            resumed.step()
    for optimizer, p in ((whole, params), (resumed, fresh)):
        optimizer.train()
        steps(optimizer, p, range(4, 8))
        optimizer.eval()
    assert same(values(params), values(fresh))


@every_method
def test_a_step_in_evaluation_is_refused_and_changes_nothing(name):
    params = parameters()
    optimizer = METHODS[name](params)
    steps(optimizer, params, range(2))
    optimizer.eval()
    before, state = values(params), copy.deepcopy(optimizer.state_dict()["state"])
    called = []
    with pytest.raises(RuntimeError, match="is in evaluation"):
        optimizer.step(lambda: called.append(1))
    assert same(before, values(params)) and not called
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


def test_a_group_that_is_added_in_evaluation_waits_for_training():
    params = parameters()
    optimizer = METHODS["adamw"](params[:2])
    steps(optimizer, params[:2], range(2))
    optimizer.eval()
    optimizer.add_param_group({"params": params[2:]})
    assert [g["train_mode"] for g in optimizer.param_groups] == [False, False]
    optimizer.train()
    steps(optimizer, params, range(2, 4))


def test_a_group_of_another_algorithm_is_left_alone():
    params = parameters()
    optimizer = METHODS["adamw"]([{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}])
    steps(optimizer, params, range(3))
    before = values(params)
    optimizer.eval()
    assert torch.equal(params[2], before[2]) and not torch.equal(params[1], before[1])
    optimizer.train()
    assert same(values(params), before)


def scheduled(name, schedule, tensor=False):
    params = parameters()
    lr = torch.tensor(0.05) if tensor else 0.05
    optimizer = METHODS[name](params, lr=lr)
    scheduler = schedule(optimizer)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for t in range(6):
            steps(optimizer, params, [t])
            scheduler.step()
    return [str(w.message) for w in seen if "averages in place of a schedule" in str(w.message)]


@pytest.mark.parametrize("tensor", [False, True])
def test_a_decaying_schedule_is_warned_of_once(tensor):
    falls = lambda o: LambdaLR(o, lambda t: 0.5**t)  # noqa: E731
    rises = lambda o: ConstantLR(o, factor=0.5, total_iters=3)  # noqa: E731
    assert len(scheduled("adamw", falls, tensor)) == len(scheduled("sgd", falls, tensor)) == 1
    assert "from 0.05 to 0.025" in scheduled("adamw", falls, tensor)[0]
    assert scheduled("adamw", rises, tensor) == scheduled("gpa", falls, tensor) == []


def test_zero_learning_rate_weighs_nothing():
    params = parameters()
    optimizer = METHODS["adamw"](params, lr=0.0)
    before = values(params)
    steps(optimizer, params, range(2))
    optimizer.eval()
    assert same(before, values(params))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"decay_at": "x"}, "decay_at='x' is unknown"), ({"warmup_steps": 1.5}, "pass an integer in")],
)
def test_refusals(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        METHODS["adamw"](parameters(), **arguments)


def test_unknown_base():
    with pytest.raises(ValueError, match="base='lion' is unknown; use one of 'adamw', 'sgd'"):
        gd.GPA(parameters(), base="lion")


# Averages of a model


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


AVERAGES = {
    "EMA": lambda m: gd.EMA(m, 0.9),
    "Polyak": lambda m: gd.Polyak(m, 2),
    "LAWA": lambda m: gd.LAWA(m, 3, every=2),
}
every_average = pytest.mark.parametrize("name", AVERAGES)


def go(model, average, times):
    history = []
    for t in times:
        torch.manual_seed(t)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(5, 3).to(next(model.parameters()).dtype))
        average.update()
        history.append(copy.deepcopy(model.state_dict()))
    return history


def weights(name, t):
    """What the average after t steps is, by name of the step."""
    if name == "Polyak":
        return {k: 1 / (t - 2) for k in range(3, t + 1)}
    if name == "LAWA":
        last = [k for k in range(1, t + 1) if k % 2 == 0][-3:]
        return dict.fromkeys(last, 1 / len(last))
    found = {}
    for k in range(1, t + 1):
        c = max(0.1, 10 / (k + 9))
        found = {i: (1 - c) * w for i, w in found.items()} | {k: c}
    return found


@every_average
@given(t=st.integers(3, 25))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_an_average_is_what_it_says_and_buffers_are_copied(name, t):
    model = network(torch.float64)
    average = AVERAGES[name](model)
    history = go(model, average, range(t))
    own = copy.deepcopy(model.state_dict())
    with average.swap() as lent:
        assert lent is model
        inside = copy.deepcopy(model.state_dict())
    for key, value in inside.items():
        mean = sum(w * history[k - 1][key] for k, w in weights(name, t).items())
        expected = mean if "running" not in key and "num" not in key else own[key]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert same(own.values(), model.state_dict().values())


@every_average
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swap_gives_back_every_bit_even_after_an_exception(name, dtype):
    model = network(dtype)
    average = AVERAGES[name](model)
    go(model, average, range(5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), average.swap():
        assert all(p.dtype == dtype for p in model.parameters())
        model(torch.randn(5, 3).to(dtype))  # moves the running statistics
        raise KeyError
    assert same(before.values(), model.state_dict().values())
    assert all(p.dtype == dtype for p in model.parameters())
    average.update()
    with average.swap():
        with pytest.raises(RuntimeError, match=r"swap\(\) inside swap\(\)"), average.swap():
            pass
        with pytest.raises(RuntimeError, match=r"update\(\) inside swap\(\)"):
            average.update()


@every_average
def test_a_checkpoint_of_an_average_goes_on_exactly(name):
    model = network()
    average = AVERAGES[name](model)
    go(model, average, range(7))
    file = io.BytesIO()
    torch.save([model.state_dict(), average.state_dict()], file)
    file.seek(0)
    saved, state = torch.load(file, weights_only=True)
    other = network()
    other.load_state_dict(saved)
    resumed = AVERAGES[name](other)
    go(other, resumed, range(2))  # it has been elsewhere
    other.load_state_dict(saved)
    resumed.load_state_dict(state)
    go(model, average, range(7, 12))
    go(other, resumed, range(7, 12))
    with average.swap(), resumed.swap():
        assert same(model.state_dict().values(), other.state_dict().values())


@every_average
def test_another_model_is_refused_by_name(name):
    model = network()
    average = AVERAGES[name](model)
    go(model, average, range(3))
    bad = copy.deepcopy(average.state_dict())
    bad["average"]["0.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(1,\), its average \(4, 3\)"):
        average.load_state_dict(bad)
    model[0].weight.data = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(5, 3\).*build a new"):
        average.update()
    model[0] = nn.Linear(3, 4, bias=False)
    with pytest.raises(ValueError, match="gained or lost '0.bias'"), average.swap():
        pass
    with pytest.raises(TypeError, match="pass the model"):
        AVERAGES[name](list(model.parameters()))


def test_sixteen_bits_do_not_stall():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    average = gd.EMA(model, 0.999, warmup=0)
    start = model.weight.item()
    with torch.no_grad():
        model.weight.add_(1)
    for _ in range(1000):
        average.update()
    with average.swap():
        moved = model.weight.item() - start
    assert abs(moved - (1 - math.exp(-1))) < 0.02


def test_tied_complex_and_frozen_parameters():
    model = nn.Module()
    model.z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.again = model.z
    model.frozen = nn.Parameter(torch.arange(3), requires_grad=False)
    average = gd.Polyak(model)
    for k in (1, 2):
        with torch.no_grad():
            model.z.fill_(k * (1 + 1j))
            model.frozen.fill_(k)
        average.update()
    with average.swap():
        assert torch.allclose(model.again, torch.full((2,), 1.5 + 1.5j)) and model.frozen.tolist() == [2] * 3


@given(mu=st.floats(0.0, 0.99), a=st.floats(-0.9, 0.9))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_variance_of_an_exponential_average(mu, a):
    """By the covariance that one step leaves as it is."""
    A = torch.tensor([[mu, (1 - mu) * a], [0.0, a]], dtype=torch.float64)
    b = torch.tensor([1 - mu, 1.0], dtype=torch.float64)
    V = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - torch.kron(A, A), torch.outer(b, b).flatten())
    ratio = (1 - mu) / (1 + mu) * (1 + a * mu) / (1 - a * mu)
    assert math.isclose(V[0] / V[3], ratio, rel_tol=1e-9)


@every_method
def test_fused_with_numbers_on_the_device(name, monkeypatch):
    """As on a GPU, where they are tensors and nobody reads them."""
    monkeypatch.setattr("guided_descent.averaging._number", lambda x: x)
    params, others = parameters(torch.float32), parameters(torch.float32)
    for engine, own in (("fused", params), ("loop", others)):
        steps(METHODS[name](own, weight_decay=0.1, engine=engine), own, range(5))
    close(values(params), values(others), 1e-5)


@pytest.mark.parametrize("name", ["ScheduleFreeSGD", "ScheduleFreeAdamW", "GPA"])
def test_a_flat_distributed_checkpoint_of_evaluation_goes_on(name):
    """torch drops y, which a fresh state has not; it follows from x and z."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    models = [nn.Linear(3, 2).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (getattr(gd, name)(m.parameters(), lr=0.05) for m in models)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.eye(3, dtype=torch.float64)).square().sum().backward()
        optimizer.step()

    for _ in range(5):
        step(models[0], first)
    first.eval()
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], first, options=flat))
    shipped = copy.deepcopy(models[0].state_dict())
    set_optimizer_state_dict(models[1], second, saved, options=flat)
    models[1].load_state_dict(shipped)
    for model, optimizer in zip(models, (first, second), strict=True):
        optimizer.train()
        step(model, optimizer)
    close(list(models[1].parameters()), list(models[0].parameters()))


def test_averages_see_through_wrappers_and_say_what_they_are_not():
    model = network()
    wrapped = torch.compile(model, backend="eager")
    gd.EMA(model).load_state_dict(gd.EMA(wrapped).state_dict())
    average = gd.LAWA(model, 2, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    for _ in range(2):
        average.update()
    name, p = next(iter(model.named_parameters()))
    assert torch.equal(average.state_dict()["average"][name], p)
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(ValueError, match="not of this kind, LAWA"):
        average.load_state_dict(gd.EMA(model).state_dict())
    with pytest.raises(ValueError, match="not of this kind, EMA"):
        gd.EMA(model).load_state_dict(model.state_dict())
    assert torch.equal(before["average"][name], average.state_dict()["average"][name])
    with pytest.raises(ValueError, match="on the meta device"):
        gd.EMA(copy.deepcopy(model).to("meta"))
    moved = copy.deepcopy(model)
    kept = gd.EMA(moved)
    moved.to("meta")  # stands for another device
    kept.update()
    assert all(x.is_meta for x in kept.average.values())



def test_the_schedule_of_another_algorithm_is_not_warned_of():
    w, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [w]}, {"params": [b], "algorithm": "adamw"}]
    optimizer = gd.ScheduleFreeAdamW(groups)
    scheduler = LambdaLR(optimizer, [lambda t: 1.0, lambda t: 0.5**t])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            w.grad = b.grad = torch.ones(3)
            optimizer.step()
            scheduler.step()
