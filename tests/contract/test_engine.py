"""What the base class promises to whoever writes a rule."""

import functools

import pytest
import torch

from guided_descent.core import ENGINES, Optimizer
from guided_descent.engines import Batch

ENGINE_NAMES = [name for name in ENGINES if name != "fused"]
every_engine = pytest.mark.parametrize("engine", ENGINE_NAMES)


@pytest.fixture(autouse=True)
def traced_but_not_generated(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()


class Heavy(Optimizer):
    """Momentum that counts: state, a clock and a number computed from it."""

    clocks = ("step",)

    def __init__(self, params, lr=0.1, momentum=0.9, **options):
        super().__init__(params, {"lr": lr, "momentum": momentum}, **options)

    def init_state(self, p, g, h):
        return {"step": torch.zeros(()), "buffer": torch.zeros_like(p)}

    @staticmethod
    def clock(h):
        h.size = h.lr / h.step

    @staticmethod
    def rule(p, g, s, h):
        s.buffer.mul_(h.momentum).add_(g)
        p.add_(s.buffer, alpha=-h.size)


def parameters(count=3):
    return [torch.arange(1.0, 5.0, dtype=torch.float64).reshape(2, 2).mul(k + 1).requires_grad_() for k in range(count)]


def gradients(params, t, without=()):
    for k, p in enumerate(params):
        p.grad = None if k in without else torch.full_like(p, 1.0 + t + k)


def rule_of(function, **attributes):
    """An optimizer without memory, from a rule."""

    def build(params, lr=0.1, **options):
        optimizer = object.__new__(made)
        Optimizer.__init__(optimizer, params, {"lr": lr}, **options)
        return optimizer

    made = type("Made", (Optimizer,), {"rule": staticmethod(function), **attributes})
    return build


@every_engine
def test_a_tensor_that_misses_a_step_keeps_its_clock(engine):
    def run(engine):
        params = parameters()
        optimizer = Heavy(params, engine=engine)
        for t in range(6):
            gradients(params, t, without={t % 3} if t > 1 else ())
            optimizer.step()
        return params, optimizer

    (params, optimizer), (expected, _) = run(engine), run("loop")
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=0)
    assert [optimizer.state[p]["step"].item() for p in params] == [5, 5, 4]
    saved = optimizer.state_dict()["state"]
    assert len({id(state["step"]) for state in saved.values()}) == 3  # torch adds to each in place


@every_engine
def test_a_checkpoint_moves_between_engines(engine):
    params, expected = parameters(), parameters()
    first, whole = Heavy(params, engine="loop"), Heavy(expected, engine="loop")
    for t in range(2):
        gradients(params, t)
        first.step()
    assert len({id(first.state[p]["step"]) for p in params}) == 1  # who begins together shares clocks
    second = Heavy(params, lr=9.0, engine=engine, nonfinite="skip")
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["engine"] == engine and second.param_groups[0]["nonfinite"] == "skip"
    assert second.param_groups[0]["lr"] == 0.1
    assert len({id(state["step"]) for state in second.state.values()}) == 1
    for t in range(2, 4):
        gradients(params, t)
        second.step()
    for t in range(4):
        gradients(expected, t)
        whole.step()
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=0)


def test_a_compiled_optimizer_survives_many_groups_and_optimizers():
    for width in range(1, 13):
        params = [torch.ones(width, requires_grad=True) for _ in range(2)]
        optimizer = Heavy([{"params": [p], "momentum": 0.1 * k} for k, p in enumerate(params)], engine="compile")
        gradients(params, 0)
        optimizer.step()
        assert all(not torch.equal(p, torch.ones(width)) for p in params)


@every_engine
def test_operators_of_a_rule_mean_the_same_in_every_engine(engine):
    def rule(p, g, s, h):
        p -= h.lr * g
        p *= 0.5
        p += 1 / (2 + g**2)
        p /= 1 - g / 100
        p.sub_(g.abs().sqrt(), alpha=0.1)

    def run(engine, **options):
        params = parameters()
        gradients(params, 1)
        rule_of(rule)(params, engine=engine, **options).step()
        return params

    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        torch.testing.assert_close(run(engine, lr=lr), run("loop"), rtol=1e-12, atol=0)


def test_what_a_rule_may_not_do_is_said():
    params = parameters()
    gradients(params, 0)

    class Rebinds(Heavy):
        @staticmethod
        def rule(p, g, s, h):
            s.buffer = s.buffer + g

    for engine in ("loop", "foreach"):
        with pytest.raises(TypeError, match="binds s.buffer to something new, which is lost; change it in place"):
            Rebinds(params, engine=engine).step()
    with pytest.raises(AttributeError, match="no .cholesky: torch has no list version"):
        rule_of(lambda p, g, s, h: g.cholesky())(params, engine="foreach").step()
    with pytest.raises(AttributeError, match="__len__|no "):
        len(Batch(params).__len__())


@every_engine
def test_state_that_aliases_the_gradient_is_copied(engine):
    class Alias(Heavy):
        def init_state(self, p, g, h):
            return {"step": torch.zeros(()), "buffer": g, "count": torch.zeros(2, dtype=torch.int64)}

    params = parameters()
    gradients(params, 0)
    before = [p.grad.clone() for p in params]
    optimizer = Alias(params, engine=engine, state_dtype=torch.float32)
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
    state = optimizer.state[params[0]]
    assert state["buffer"].dtype == torch.float32 and state["count"].dtype == torch.int64


@every_engine
def test_a_rule_for_whole_tensors_sees_each_alone(engine):
    def rule(p, g, s, h):
        p.sub_(h.lr * g / g.norm())

    params = parameters()
    gradients(params, 0)
    expected = [p.detach() - 0.1 * p.grad / p.grad.norm() for p in params]
    rule_of(rule, elementwise=False)(params, engine=engine).step()
    torch.testing.assert_close([p.detach() for p in params], expected, rtol=1e-12, atol=0)
    z = torch.ones(2, 2, dtype=torch.complex128, requires_grad=True)
    z.grad = torch.ones_like(z)
    with pytest.raises(ValueError, match=r"a parameter, \(2, 2\): it is complex.*view_as_real"):
        rule_of(rule, elementwise=False)([z], engine=engine).step()


@pytest.mark.parametrize("other", ["raise", "propagate"])
@pytest.mark.parametrize("device", [False, True])
def test_groups_answer_for_their_own_gradients(other, device, monkeypatch):
    if device:  # where the host does not know what is finite
        monkeypatch.setattr("guided_descent.core.known", lambda finite: True if finite is None else None)
    params = parameters(2)
    optimizer = Heavy([{"params": params[:1], "nonfinite": other}, {"params": params[1:], "nonfinite": "skip"}])
    gradients(params, 0)
    params[1].grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(params[0], parameters()[0]) and torch.equal(params[1], parameters()[1])


def test_load_hooks_have_the_last_word():
    params = parameters()
    optimizer = Heavy(params)
    gradients(params, 0)
    optimizer.step()

    def sevens(_, state_dict):
        state = {k: {**v, "buffer": torch.full_like(v["buffer"], 7)} for k, v in state_dict["state"].items()}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(sevens)
    optimizer.load_state_dict(optimizer.state_dict())
    assert all((state["buffer"] == 7).all() for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 is outside its range"),
        ({"momentum": 2.0}, "momentum=2.0 is outside its range"),
        ({"nesterov": True}, "checkpoint has nesterov=True, which Heavy does not know"),
        ({"weight_decay": 0.1}, "checkpoint has weight_decay=0.1, which Heavy does not know"),
    ],
)
def test_a_checkpoint_of_something_else_changes_nothing(change, message):
    params = parameters()
    optimizer = Heavy(params)
    gradients(params, 0)
    optimizer.step()
    saved, before = optimizer.state_dict(), optimizer.state_dict()
    saved["param_groups"] = [{**group, **change} for group in saved["param_groups"]]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": [0.1, 0.2]}, "lr=.* is a list; pass a number"),
        ({"momentum": True}, "momentum=True is a bool"),
        ({"state_dtype": "float32"}, "state_dtype='float32' is no real floating-point type"),
        ({"state_dtype": torch.int8}, "state_dtype=torch.int8 is no real"),
        ({"maximize": "no"}, "maximize='no' is unknown; use one of False, True"),
        ({"engine": ["loop"]}, "engine=.* is unknown; use one of"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore' is unknown"),
        ({"colour": 1}, "Heavy has no colour=; use one of lr, momentum, maximize"),
    ],
)
def test_options_are_validated(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Heavy(parameters(), **arguments)
