"""What optimizers promise that need more than gradients: a closure to evaluate, or the model itself.

Each is run on a small network, with everything else as in test_contract.py. A new optimizer adds one row to CASES.
"""

import copy
import functools
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import guided_descent as gd
from guided_descent.core import Optimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """An optimizer, what it is built from, and arguments that it must refuse."""

    cls: type[Optimizer]
    build: Callable[..., Optimizer]
    lr: float
    refused: list[dict[str, Any]] = field(default_factory=list)
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    #: Options under which a skipped step leaves no trace: drawn targets and the schedule of inversions go on.
    undone: dict[str, Any] = field(default_factory=dict)
    #: Whether it needs a closure and differentiates itself, where that is not the same for all of its class.
    closure: bool | None = None

    @property
    def needs_closure(self):
        return self.cls.needs_closure if self.closure is None else self.closure

    @property
    def differentiates(self):
        return self.cls.differentiates if self.closure is None else self.closure


def of_parameters(cls, lr, refused, **options):
    return Case(cls, lambda model, **given: cls(model.parameters(), **{**options, **given}), lr, refused)


def sophia(estimator, refused):
    def build(model, **given):
        options = {"estimator": estimator, "weight_decay": 0.0, "hessian_update_every": 2, **given}
        if estimator == "gnb":
            options |= {"model": model, "likelihood": "gaussian"}
        return gd.Sophia(model.parameters(), **options)

    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return Case(gd.Sophia, build, 0.02, refused, dtypes, closure=estimator != "gnb")


def of_model(cls, lr, refused, undone=None):
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return Case(
        cls, lambda model, **given: cls(model, likelihood="gaussian", **given), lr, refused, dtypes, undone or {}
    )


EVERY = {"inverse_update_every": 1}
CASES = {
    "Newton": of_parameters(gd.Newton, 1.0, [{"damping": -1.0}]),
    "NewtonCG": of_parameters(gd.NewtonCG, 1.0, [{"max_cg": 0}, {"max_factor": 0.5}]),
    "BFGS": of_parameters(gd.BFGS, 1.0, [{"max_iter": 0}, {"tolerance_grad": -1.0}]),
    "LBFGS": of_parameters(gd.LBFGS, 1.0, [{"history_size": 0}, {"max_eval": 0}]),
    "NaturalGradient": of_model(gd.NaturalGradient, 0.5, [{"damping": -1.0}, {"max_kl": 0.0}, {"tol": 1.0}]),
    "KFAC": of_model(
        gd.KFAC,
        0.1,
        [{"damping": -1.0}, {"kl_clip": 0.0}, {"stat_decay": 1.0}, {"samples": 0}, {"seed": -1}],
        EVERY | {"fisher": "type-2"},
    ),
    "EKFAC": of_model(gd.EKFAC, 0.1, [{"momentum": 1.0}, {"factor_update_every": 0}], EVERY | {"fisher": "type-2"}),
    "FOOF": of_model(gd.FOOF, 0.1, [{"weight_decay": -1.0}, {"damping": 0.0}], EVERY),
    "CLARS": Case(
        gd.CLARS,
        lambda model, **given: gd.CLARS(model, **{"trust": 1.0, **given}),
        0.02,
        [{"momentum": 1.0}, {"trust": 0.0}, {"weight_decay": -1.0}, {"eps": -1.0}],
        (torch.float64, torch.float32, torch.bfloat16),
    ),
    "AdaHessian": of_parameters(
        gd.AdaHessian, 0.1, [{"hessian_power": 1.5}, {"hessian_update_every": 0}, {"betas": (1.0, 0.9)}], eps=0.1
    ),
    "Sophia-hutchinson": sophia("hutchinson", [{"rho": -1.0}, {"eps": 0.0}, {"samples": 0}]),
    "Sophia-gnb": sophia("gnb", [{"rho": -1.0}, {"seed": -1}, {"hessian_update_every": 1.5}]),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_case_with_a_closure = pytest.mark.parametrize(
    "case", [pytest.param(c, id=n) for n, c in CASES.items() if c.needs_closure]
)
every_case_without = pytest.mark.parametrize(
    "case", [pytest.param(c, id=n) for n, c in CASES.items() if not c.needs_closure]
)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)
    return torch.nn.Sequential(*layers).to(DEVICE, dtype)


def batch(t, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + t)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    return x.to(DEVICE, dtype), y.to(DEVICE, dtype)


class Run:
    """A model, its optimizer, and steps on a fixed sequence of batches."""

    def __init__(self, case, model=None, dtype=torch.float64, sign=1.0, **options):
        self.dtype, self.sign = dtype, sign
        self.model = network(dtype) if model is None else model
        self.optimizer = case.build(self.model, **{"lr": case.lr, **options})

    def closure(self, t, poison=1.0):
        x, y = batch(t, self.dtype)

        def closure():
            self.optimizer.zero_grad()
            loss = self.sign * poison * 0.5 * (self.model(x) - y).square().sum(1).mean()
            if not self.optimizer.differentiates:
                loss.backward()
            return loss

        return closure

    def step(self, t, poison=1.0):
        closure = self.closure(t, poison)
        if self.optimizer.needs_closure:
            return self.optimizer.step(closure)
        loss = closure()
        self.optimizer.step()
        return loss

    def steps(self, times):
        for t in times:
            self.step(t)
        return self.values()

    def values(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def loss(self, t):
        x, y = batch(t, self.dtype)
        with torch.no_grad():
            return 0.5 * (self.model(x) - y).square().sum(1).mean().item()


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def flat(state):
    """Everything that a state dictionary holds, tensors as lists, to compare two of them."""
    if isinstance(state, dict):
        return {str(k): flat(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return [flat(x) for x in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


@every_case
def test_descends_and_keeps_the_dtype(case):
    for dtype in case.dtypes:
        run = Run(case, dtype=dtype)
        before = run.loss(0)
        for _ in range(10):
            run.step(0)
        assert run.loss(0) < 0.9 * before, dtype
        assert all(p.dtype == dtype for p in run.model.parameters())


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if len(c.cls.engines) == 2])
def test_auto_is_the_loop_and_other_engines_are_refused(case):
    assert same(Run(case).steps(range(3)), Run(case, engine="loop").steps(range(3)))
    for engine in ("foreach", "fused", "compile"):
        with pytest.raises(ValueError, match=f"no engine='{engine}'; use one of 'auto', 'loop'"):
            Run(case, engine=engine)


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if len(c.cls.engines) > 2])
@pytest.mark.parametrize("engine", ["foreach", "compile"])
def test_every_engine_follows_the_loop(case, engine, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    expected = Run(case, engine="loop").steps(range(5))
    for a, b in zip(Run(case, engine=engine).steps(range(5)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_case
def test_the_loss_is_returned_and_gradients_are_on_within(case):
    run = Run(case)
    expected = run.loss(0)
    with torch.no_grad():
        if case.needs_closure:
            assert float(run.optimizer.step(run.closure(0))) == pytest.approx(expected, rel=1e-12)
        else:
            assert float(run.optimizer.step(torch.enable_grad()(run.closure(0)))) == pytest.approx(expected, rel=1e-12)
    assert not same(run.values(), [p.detach() for p in network().parameters()])


@every_case_with_a_closure
def test_a_missing_closure_is_named(case):
    run = Run(case)
    with pytest.raises((TypeError, ValueError), match="closure"):
        run.optimizer.step()
    assert same(run.values(), [p.detach() for p in network().parameters()])


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if c.differentiates])
def test_a_closure_that_calls_backward_is_told_not_to(case):
    run = Run(case)
    closure = run.closure(0)

    def wrong():
        loss = closure()
        loss.backward()
        return loss

    with pytest.raises((RuntimeError, ValueError), match=r"closure.*backward"):
        run.optimizer.step(wrong)
    assert same(run.values(), [p.detach() for p in network().parameters()])


@every_case
def test_gradients_are_never_modified(case):
    run, seen = Run(case), []
    closure = run.closure(0)

    def watched():
        loss = closure()
        seen[:] = [(p.grad, None if p.grad is None else p.grad.clone()) for p in run.model.parameters()]
        return loss

    if case.needs_closure:
        run.optimizer.step(watched)
    else:
        watched()
        run.optimizer.step()
    for p, (grad, value) in zip(run.model.parameters(), seen, strict=True):
        assert p.grad is grad and (grad is None or torch.equal(grad, value))


@every_case
def test_maximize_climbs_as_the_negated_loss_descends(case):
    up, down = Run(case, maximize=True, sign=-1.0), Run(case)
    for a, b in zip(up.steps(range(4)), down.steps(range(4)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@every_case
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_learning_rate_is_the_same_number_and_stays_it(case, shape):
    lr = torch.full(shape, case.lr, dtype=torch.float64, device=DEVICE)
    for a, b in zip(Run(case, lr=lr).steps(range(4)), Run(case).steps(range(4)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert lr.unique().item() == case.lr


@every_case
def test_frozen_and_unused_parameters_stay(case):
    model = network()
    model[0].bias.requires_grad_(False)
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(2, device=DEVICE, dtype=torch.float64)))
    frozen = model[0].bias.detach().clone()
    run = Run(case, model=model)
    before = run.loss(0)
    for _ in range(5):
        run.step(0)
    assert torch.equal(model[0].bias, frozen) and model.unused.eq(1).all() and run.loss(0) < before


@every_case
def test_stop_save_load_go_on_is_the_run_that_never_stopped(case):
    expected = Run(case).steps(range(8))
    run = Run(case)
    run.steps(range(5))
    file = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Run(case, lr=0.7 * case.lr)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    assert same(resumed.steps(range(5, 8)), expected)


@every_case
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "pickle"])
def test_deepcopy_and_pickle_go_on_as_the_original(case, duplicate):
    run = Run(case)
    torch.optim.lr_scheduler.StepLR(run.optimizer, 1)  # it hangs a method on the instance
    run.steps(range(3))
    twin = duplicate(run)
    assert same(run.steps(range(3, 6)), twin.steps(range(3, 6)))
    assert not same(twin.values(), [p.detach() for p in network().parameters()])


@every_case
def test_a_skipped_step_never_happened(case):
    careful, plain = Run(case, nonfinite="skip", **case.undone), Run(case, **case.undone)
    for t in range(5):
        if t in (0, 3):
            careful.step(t, poison=float("nan") if t else float("inf"))
        else:
            careful.step(t)
            plain.step(t)
    assert careful.optimizer.skipped_steps == 2
    for a, b in zip(careful.values(), plain.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@every_case
def test_nonfinite_raise_changes_nothing(case):
    run = Run(case, nonfinite="raise")
    run.steps(range(2))
    before, state = run.values(), flat(copy.deepcopy(run.optimizer.state_dict()["state"]))
    with pytest.raises(FloatingPointError, match="nonfinite='raise'"):
        run.step(2, poison=float("inf"))
    assert same(run.values(), before) and flat(run.optimizer.state_dict()["state"]) == state


@every_case
def test_a_scheduler_drives_the_learning_rate(case):
    run = Run(case)
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda t: 0.0 if t else 1.0)
    run.step(0)
    scheduler.step()
    before = run.values()
    run.step(1)
    assert same(run.values(), before) and run.optimizer.param_groups[0]["lr"] == 0


@every_case
def test_hooks_run(case):
    run, calls = Run(case), []
    run.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    run.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    run.step(0)
    assert calls == ["pre", "post"]


@every_case
def test_at_a_minimum_it_stays(case):
    """All gradients zero, at the first step: nothing to divide by."""
    model = network()
    with torch.no_grad():
        for p in model[3].parameters():
            p.zero_()
    run = Run(case, model=model)
    x, _ = batch(0)

    def closure():
        run.optimizer.zero_grad()
        loss = 0.5 * model(x).square().sum(1).mean()
        if not run.optimizer.differentiates:
            loss.backward()
        return loss

    before = run.values()
    for _ in range(2):
        if case.needs_closure:
            run.optimizer.step(closure)
        else:
            closure()
            run.optimizer.step()
    assert same(run.values(), before)


@every_case
def test_bad_arguments_are_refused_by_name_with_a_remedy(case):
    for arguments in [{"lr": -1.0}, {"lr": float("nan")}, {"lr": "fast"}, *case.refused]:
        (name, value), *_ = arguments.items()
        with pytest.raises((ValueError, TypeError), match=rf"{name}=.* pass (a number|an integer) in "):
            Run(case, **arguments)
    for word in ("foreach", "fused"):
        with pytest.raises(TypeError, match=rf"no {word}=True; use engine="):
            Run(case, **{word: True})
    with pytest.raises(ValueError, match="nonfinite='hide' is unknown; use one of"):
        Run(case, nonfinite="hide")


@every_case_without
def test_no_host_synchronisation(case):
    class NoItem(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "a step read a value back to the host"
            return function(*args, **(kwargs or {}))

    run = Run(case, lr=torch.tensor(case.lr))
    run.steps(range(2))
    with NoItem():
        run.step(2)


@every_case_without
def test_gradient_scaler_unscales_and_skips_an_overflow(case):
    scaled, plain = Run(case, dtype=torch.float32), Run(case, dtype=torch.float32)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    plain.step(0)
    for t, factor in enumerate((1.0, float("inf"), 1.0)):
        before = scaled.values()
        x, y = batch(t, torch.float32)
        scaled.optimizer.zero_grad()
        loss = 0.5 * (scaled.model(x) - y).square().sum(1).mean() * factor
        scaler.scale(loss).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
        assert same(scaled.values(), before) == (factor != 1.0) and all(v.isfinite().all() for v in scaled.values())
        if t == 0:
            for a, b in zip(scaled.values(), plain.values(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_case_without
def test_a_plain_no_grad_or_eval_pass_changes_nothing(case):
    run, plain = Run(case), Run(case)
    for t in range(3):
        x, _ = batch(t + 10)
        with torch.no_grad():
            run.model(x)
        run.model.eval()
        run.model(x)
        run.model.train()
        run.step(t)
        plain.step(t)
    assert same(run.values(), plain.values())


def test_the_import_loads_no_compiler():
    """Torch's first optimizer does, in seconds; a copy needs one, the import does not."""
    code = "import sys, guided_descent; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: gd.AdamW(m.parameters(), decoupled_weight_decay=False), "no decoupled_weight_decay=; use Adam$"),
        (lambda m: gd.EKFAC(m, damping_split="pi"), "EKFAC has no damping_split=; use KFAC$"),
        (lambda m: gd.FOOF(m, seed=1), "FOOF has no seed=; use one of lr, momentum, "),
        (lambda m: gd.AdamW(m.parameters(), fused=True), "AdamW has no fused=True; use engine='fused'"),
        (lambda m: gd.AdamW(m.parameters(), fused=False), "AdamW has no fused=False; use engine='loop'"),
        (lambda m: gd.AdamW(m.parameters(), foreach=True), "AdamW has no foreach=True; use engine='foreach'"),
        (lambda m: gd.KFAC(m, fused=True), "KFAC has no fused=True; use engine='loop'"),
    ],
)
def test_a_keyword_of_another_method_is_said_with_the_remedy(build, message):
    with pytest.raises(TypeError, match=message):
        build(network())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("damping_split", "pi", "'damping_split' is set for the whole optimizer, not for a group; pass it to KFAC"),
        ("inverse_update_every", 3, "'inverse_update_every' is set for the whole optimizer, not for a group"),
        ("fused", True, "KFAC has no fused=True; use engine='loop'"),
    ],
)
def test_a_group_holds_no_key_that_would_be_ignored(key, value, message):
    model = network()
    with pytest.raises(TypeError, match=message):
        gd.KFAC(model, params=[{"params": model.parameters(), key: value}])
    optimizer = gd.KFAC(model, params=[{"params": model[0].parameters()}])
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group({"params": model[3].parameters(), key: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("word", ["foreach", "fused", "capturable"])
def test_a_group_names_its_engine_in_no_word_of_torchs(word):
    with pytest.raises(TypeError, match=f"AdamW has no {word}=True; use engine="):
        gd.AdamW([{"params": network().parameters(), word: True}])
    theirs = torch.optim.AdamW(network().parameters()).param_groups  # all of them None or False
    gd.AdamW([{**group, "name": "trunk", "lr_scale": 0.5} for group in theirs])


def test_a_checkpoint_of_another_optimizer_is_said_to_be_one():
    model = network()
    saved = gd.AdamW(model.parameters()).state_dict()
    for optimizer in (gd.SGD(model.parameters()), gd.KFAC(model)):
        with pytest.raises(ValueError, match="does not know: saved by another optimizer; begin anew"):
            optimizer.load_state_dict(saved)
