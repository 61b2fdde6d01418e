"""What every optimizer of the package promises, in one table: a new optimizer adds one row to CASES."""

import copy
import functools
import io
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import guided_descent as gd
from guided_descent.core import ENGINES, Optimizer
from guided_descent.examples import PlainMuon, PlainSOAP
from guided_descent.norms import NormDescent
from guided_descent.problems import GradientDescent

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """One optimizer with some options, the torch.optim class of the same algorithm, and arguments it must refuse."""

    cls: type[Optimizer]
    theirs: type[torch.optim.Optimizer] | None
    options: dict[str, Any] = field(default_factory=dict)
    refused: list[dict[str, Any]] = field(default_factory=list)
    rest: str | None = None  # the algorithm of what is no matrix
    spreads: bool = True  # whether its rule computes with infinities (LAPACK does not)
    lift: float = 1.0  # by what its iteration may lift a rounding
    tolerance: float = 1e-12  # of a comparison with torch (NAdam: torch keeps a product in single precision)

    def build(self, params, **options):
        options = {**self.options, **options}
        return self.cls(self.groups(params), **options)

    def groups(self, params):
        """A group of its own for each parameter that the method leaves to another."""
        if self.rest is None or not isinstance(params, list):
            return params
        groups = [x if isinstance(x, dict) else {"params": [x]} for x in params]
        groups = [x if x["params"][0].dim() > 1 else {**x, "algorithm": self.rest} for x in groups]
        if groups and all("algorithm" in x for x in groups):  # a method for matrices asks for one
            groups.append({"params": [torch.ones(2, 2, device=DEVICE, requires_grad=True)]})
        return groups

    def peer(self, params, **options):
        return self.theirs(params, **{**self.options, **options})


BAD_BETAS = [{"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}]
CASES = {
    "GradientDescent": Case(GradientDescent, torch.optim.SGD),
    "SGD": Case(gd.SGD, torch.optim.SGD, {}, [{"momentum": 1.0}, {"dampening": -0.5}, {"weight_decay": -1.0}]),
    "SGD-momentum": Case(gd.SGD, torch.optim.SGD, {"momentum": 0.9}),
    "SGD-nesterov": Case(gd.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adagrad": Case(gd.Adagrad, torch.optim.Adagrad, {}, [{"lr_decay": -1.0}, {"initial_accumulator_value": -1.0}]),
    "RMSprop": Case(gd.RMSprop, torch.optim.RMSprop, {}, [{"alpha": 1.5}, {"eps": -1.0}, {"momentum": -1.0}]),
    "RMSprop-centered": Case(gd.RMSprop, torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "Adam": Case(gd.Adam, torch.optim.Adam, {}, [*BAD_BETAS, {"eps": -1e-8}, {"weight_decay": -1.0}]),
    "Adam-amsgrad": Case(gd.Adam, torch.optim.Adam, {"amsgrad": True}),
    "NAdam": Case(gd.NAdam, torch.optim.NAdam, {}, [*BAD_BETAS, {"momentum_decay": -1.0}], tolerance=1e-8),
    "AdamW": Case(gd.AdamW, torch.optim.AdamW, {"weight_decay": 0.0}, BAD_BETAS),
    "Adafactor": Case(gd.Adafactor, torch.optim.Adafactor, {}, [{"d": 0.5}, {"beta2_decay": 0.5}]),
    "AdEMAMix": Case(gd.AdEMAMix, None, {}, [{"alpha": -1.0}, {"t_alpha_beta3": 0.0}, {"betas": (0.9, 0.9, 1.0)}]),
    "PlainMuon": Case(PlainMuon, None, {}, [{"momentum": 1.0}], rest="adam", spreads=False),
    "Muon": Case(
        gd.Muon,
        None,
        {},
        [{"momentum": 1.0}, {"weight_decay": -1.0}, {"normuon": 1.0}],
        rest="adam",
        lift=1000.0,
    ),
    "Muon-normuon": Case(
        gd.Muon, None, {"normuon": 0.95, "cautious": True, "weight_decay": 0.1}, rest="adam", lift=1000.0
    ),
    "Muon-sphere": Case(
        gd.Muon, None, {"constraint": "sphere", "preset": "svd"}, rest="adam", lift=10.0, spreads=False
    ),
    "Scion": Case(gd.Scion, None, {}, [{"momentum": 1.0}, {"radius": 0.0}], rest="adam", lift=1000.0),
    "SignSGD": Case(gd.SignSGD, None, {}, [{"weight_decay": -1.0}], spreads=False),  # the sign of infinity is 1
    "Signum": Case(gd.Signum, None, {}, [{"momentum": 1.0}, {"weight_decay": -1.0}], spreads=False),
    "Signum-nesterov": Case(gd.Signum, None, {"nesterov": True}, spreads=False),
    "Lion": Case(gd.Lion, None, {}, [*BAD_BETAS, {"weight_decay": -1.0}], spreads=False),
    "NormalizedSGD": Case(gd.NormalizedSGD, None, {}, [{"momentum": 1.0}, {"weight_decay": -1.0}]),
    "NormalizedSGD-layer": Case(gd.NormalizedSGD, None, {"scope": "layer"}),
    "NormDescent": Case(NormDescent, None, {}, [{"momentum": 1.0}, {"weight_decay": -1.0}], spreads=False),
    "NormDescent-column": Case(NormDescent, None, {"norm": "column", "nesterov": True}, spreads=False),
    "ModularDescent": Case(
        gd.ModularDescent,
        None,
        {},
        [{"momentum": 1.0}, {"weight_decay": -1.0}, {"rate": -1.0}],
        lift=1000.0,
    ),
    "PlainSOAP": Case(
        PlainSOAP,
        None,
        {"eps": 0.1, "precondition_every": 2},
        [*BAD_BETAS, {"precondition_every": 0}, {"block_size": 1.5}],
        spreads=False,
    ),
    "SOAP": Case(
        gd.SOAP,
        None,
        {"eps": 0.1, "precondition_every": 2, "weight_decay": 0.0, "max_dim": 4},  # what is larger has a null space
        [*BAD_BETAS, {"precondition_every": 0}, {"block_size": 1.5}, {"max_dim": -1}, {"jitter": -1.0}],
        spreads=False,
    ),
    "Shampoo": Case(
        gd.Shampoo,
        None,
        {"eps": 0.1, "precondition_every": 2},
        [{"betas": (1.0, 0.9)}, {"betas": (0.9, 1.1)}, {"eps": -1.0}, {"weight_decay": -1.0}],
        spreads=False,
    ),
    "KLShampoo": Case(
        gd.KLShampoo, None, {"eps": 0.1, "precondition_every": 2}, [*BAD_BETAS, {"max_dim": 1.5}], spreads=False
    ),
    "LARS": Case(
        gd.LARS, None, {"momentum": 0.9}, [{"momentum": 1.0}, {"trust": 0.0}, {"eps": -1.0}, {"weight_decay": -1.0}]
    ),
    "LARS-inside": Case(gd.LARS, None, {"trust": 0.5, "lr_in_buffer": True, "adapt_vectors": True}),
    "LAMB": Case(gd.LAMB, None, {"weight_decay": 0.0}, [*BAD_BETAS, {"eps": -1.0}, {"clamp": (-1.0, 2.0)}]),
    "LAMB-clamp": Case(
        gd.LAMB, None, {"weight_decay": 0.0, "clamp": (0.5, 2.0), "bias_correction": False, "adapt_vectors": True}
    ),
    "PSGDKron": Case(gd.PSGDKron, None, {}, [*BAD_BETAS, {"preconditioner_lr": 0.0}, {"clip": 0.0}], spreads=False),
    "ScheduleFreeSGD": Case(
        gd.ScheduleFreeSGD, None, {}, [{"momentum": 1.5}, {"warmup_steps": -1}, {"warmup_steps": 0.5}, {"r": -1.0}]
    ),
    "ScheduleFreeSGD-polyak": Case(gd.ScheduleFreeSGD, None, {"momentum": 0.0, "warmup_steps": 2, "r": 1.0}),
    "ScheduleFreeAdamW": Case(
        gd.ScheduleFreeAdamW, None, {}, [{"betas": (1.5, 0.9)}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"r": -1.0}]
    ),
    "ScheduleFreeAdamW-polyak": Case(gd.ScheduleFreeAdamW, None, {"betas": (0.0, 0.9), "warmup_steps": 2}),
    "GPA": Case(gd.GPA, None, {}, [{"mu_x": 1.0}, {"mu_y": 1.5}, *BAD_BETAS, {"weight_decay": -1.0}]),
    "GPA-plain": Case(gd.GPA, None, {"betas": (0.0, 0.9), "mu_x": 0.9, "mu_y": 0.8}),
    "GPA-sgd": Case(gd.GPA, None, {"base": "sgd", "mu_x": 0.9, "mu_y": 1.0}),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (5,), (3, 4), (2, 3, 4), (2, 3, 2, 2), (0,), (3, 0)]
SOLID = [shape for shape in SHAPES if 0 not in shape]  # torch's Adafactor divides by the size

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_class = pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if "-" not in n])
every_compiled_class = pytest.mark.parametrize(
    "case", [pytest.param(c, id=n) for n, c in CASES.items() if "-" not in n and "compile" in c.cls.engines]
)
every_case_with_a_peer = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if case.theirs and "-" not in name]
)


def cases_and_engines(keep=lambda case, engine: True):
    """Every case on every engine that it has, as far as ``keep`` says."""
    return pytest.mark.parametrize(
        ("case", "engine"),
        [
            pytest.param(case, engine, id=f"{name}-{engine}")
            for name, case in CASES.items()
            for engine in ENGINES
            if engine in case.cls.engines and (engine != "fused" or case.cls.fused) and keep(case, engine)
        ],
    )


every_case_and_engine = cases_and_engines()
CLOCKS = {name for case in CASES.values() for name in case.cls.clocks}
compile_for_real = torch.compile


@pytest.fixture(autouse=True)
def traced_but_not_generated(monkeypatch):
    """Compiled steps run through dynamo's graph without code generation: seconds instead of minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(compile_for_real, backend="eager"))
    torch._dynamo.reset()


def valid(engine, *params):
    """Where torch's kernel is not valid for these parameters, what a user gets instead."""
    return "auto" if engine == "fused" and any(map(unfusable, params)) else engine


def unfusable(p):
    """What torch's fused kernels do not take; 16 bits on the CPU they take and get wrong (torch 2.13, SGD)."""
    return not p.is_contiguous() or p.is_complex() or p.dtype.itemsize < 4 and not p.is_cuda


def tensors(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_() for s in shapes]


def set_gradients(params, t):
    """A fixed sequence of gradients, independent of the parameters."""
    generator = torch.Generator().manual_seed(1000 + t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def steps(optimizer, params, times):
    for t in times:
        set_gradients(params, t)
        optimizer.step()
    return [p.detach().clone() for p in params]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a, b, rtol=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


@every_case_and_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_engine_shape_and_dtype_follows_the_loop(case, engine, dtype):
    params, reference = tensors(dtype), tensors(dtype)
    moved = steps(case.build(params, lr=0.1, engine=valid(engine, *params)), params, range(3))
    # A kernel rounds to 16 bits once a step, the loop after every operation.
    roundings = 16 if case.cls.fused and dtype.itemsize == 2 else 4
    expected = steps(case.build(reference, lr=0.1, engine="loop"), reference, range(3))
    close(
        moved, expected, torch.finfo(dtype).eps * roundings * (case.lift if dtype.itemsize > 2 else min(case.lift, 4))
    )
    assert all(p.dtype == dtype for p in params)
    assert not same([p for p in moved if p.numel()], [p.detach() for p in tensors(dtype) if p.numel()])


@cases_and_engines(lambda case, engine: case.theirs)  # AdEMAMix: see tests/parity
def test_follows_torch(case, engine):
    ours, theirs = tensors(shapes=SOLID), tensors(shapes=SOLID)
    close(
        steps(case.build(ours, lr=0.1, engine=engine), ours, range(100)),
        steps(case.peer(theirs, lr=0.1), theirs, range(100)),
        case.tolerance,
    )


@every_case_and_engine
def test_non_contiguous_parameters(case, engine):
    base = torch.arange(12.0, dtype=torch.float64, device=DEVICE).reshape(3, 4)
    plain, strided = base.clone().t().contiguous().requires_grad_(), base.clone().t().requires_grad_()
    assert not strided.is_contiguous()
    a = steps(case.build([plain], lr=0.1, engine=engine), [plain], range(3))
    close(a, steps(case.build([strided], lr=0.1, engine=valid(engine, strided)), [strided], range(3)))


# Others refuse: see test_engine.py.
@cases_and_engines(lambda case, engine: case.cls.elementwise and not case.cls.matrices)
def test_complex_parameters_are_pairs_of_reals(case, engine):
    real = torch.randn(3, 2, dtype=torch.float64, device=DEVICE).requires_grad_()
    z = torch.view_as_complex(real.detach().clone()).requires_grad_()
    a, b = case.build([real], lr=0.1, engine=engine), case.build([z], lr=0.1, engine=valid(engine, z))
    for t in range(3):
        set_gradients([real], t)
        z.grad = torch.view_as_complex(real.grad.clone())
        a.step()
        b.step()
    close([torch.view_as_real(z.detach())], [real.detach()])


@every_case_and_engine
def test_maximize_climbs(case, engine):
    up, down = tensors(), tensors()
    climb, descend = case.build(up, lr=0.1, maximize=True, engine=engine), case.build(down, lr=0.1, engine=engine)
    for t in range(3):
        set_gradients(up, t)
        set_gradients(down, t)
        for p in down:
            p.grad.neg_()
        climb.step()
        descend.step()
    assert same(up, down)


@every_case_and_engine
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_never_modified(case, engine, maximize):
    params = tensors()
    optimizer = case.build(params, lr=0.1, maximize=maximize, engine=engine)
    for t in range(3):
        set_gradients(params, t)
        before, ids = [p.grad.clone() for p in params], [id(p.grad) for p in params]
        optimizer.step()
        assert same(before, [p.grad for p in params]) and ids == [id(p.grad) for p in params]


@every_case_and_engine
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_learning_rate_is_the_same_number_and_stays_it(case, engine, shape):
    lr = torch.full(shape, 0.1, dtype=torch.float64, device=DEVICE)
    a, b = tensors(), tensors()
    close(
        steps(case.build(a, lr=lr, engine=engine), a, range(5)),
        steps(case.build(b, lr=0.1, engine=engine), b, range(5)),
    )
    assert not same(a, tensors()) and lr.unique().item() == 0.1


@cases_and_engines(lambda case, engine: engine != "compile")  # fullgraph=True: a read would not compile
def test_no_host_synchronisation(case, engine):
    clocks = []

    class NoItem(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                assert id(args[0]) in clocks, "a step read a value back to the host"  # clocks live there
            return function(*args, **(kwargs or {}))

    params = tensors()
    optimizer = case.build(params, lr=torch.tensor(0.1), engine=engine)
    steps(optimizer, params, range(1))
    set_gradients(params, 1)
    clocks.extend(id(x) for state in optimizer.state.values() for name, x in state.items() if name in CLOCKS)
    steps_kept = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert all(step.device.type == "cpu" or engine == "fused" for step in steps_kept)
    with NoItem():
        optimizer.step()


@every_case
def test_closure_has_gradients_and_its_loss_is_returned(case):
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = case.build([x], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
        optimizer.step(closure)  # SOAP's first step only looks
    assert x.square().sum() < 3.0


@every_case
def test_frozen_missing_and_zero_gradients(case):
    frozen, missing, zero, live = (torch.ones(2, dtype=torch.float64, requires_grad=k > 0) for k in range(4))
    optimizer = case.build([frozen, missing, zero, live], lr=0.1)
    optimizer.step()
    zero.grad, live.grad = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    optimizer.step()
    optimizer.step()
    one = torch.ones(2, dtype=torch.float64)
    assert same([frozen, missing, zero], [one] * 3) and not torch.equal(live, one)


@every_case
def test_groups_have_their_own_learning_rate_and_inherit_the_rest(case):
    a, b = tensors(shapes=[(3, 2)]), tensors(shapes=[(3, 2)])
    optimizer = case.build([{"params": a, "lr": 0.0}], lr=0.1, maximize=True)
    optimizer.add_param_group({"params": b})
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.1] and all(
        g["maximize"] for g in optimizer.param_groups
    )
    steps(optimizer, a + b, range(2))
    assert same(a, tensors(shapes=[(3, 2)])) and not same(b, tensors(shapes=[(3, 2)]))


@every_case
def test_bad_group_changes_nothing(case):
    params = tensors(shapes=[(3, 2), (2, 2)])
    optimizer = case.build(params[:1], lr=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    for group in ({"params": params[1:], "lr": -1.0}, {"params": params[1:], "engine": "warp"}):
        with pytest.raises(ValueError, match="lr=-1.0 .* pass|engine='warp' .* use"):
            optimizer.add_param_group(group)
    assert optimizer.state_dict() == before


@every_class
def test_named_parameters(case):
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(2))).to(DEVICE)
    optimizer = case.build(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "1.weight"]
    steps(optimizer, list(model.parameters()), range(2))
    case.build(model.named_parameters(), lr=0.1).load_state_dict(optimizer.state_dict())


@every_case_and_engine
def test_stop_save_load_go_on_is_the_run_that_never_stopped(case, engine):
    whole = tensors()
    expected = steps(case.build(whole, lr=0.1, engine=engine), whole, range(6))
    params = tensors()
    optimizer = case.build(params, lr=0.1, engine=engine)
    steps(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = [p.requires_grad_() for p in saved["params"]]
    resumed = case.build(fresh, lr=0.7, engine=engine)
    resumed.load_state_dict(saved["optimizer"])
    assert same(steps(resumed, fresh, range(3, 6)), expected)


@every_case
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "pickle"])
def test_deepcopy_and_pickle_go_on_as_the_original(case, duplicate, scheduled):
    params = tensors()
    optimizer = case.build(params, lr=0.1)
    if scheduled:  # it hangs a method on the instance
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.note = optimizer._note = "kept"
    steps(optimizer, params, range(3))
    params_too, twin = duplicate((params, optimizer))
    assert twin.note == twin._note == "kept" and twin.defaults == optimizer.defaults
    assert same(steps(optimizer, params, range(3, 6)), steps(twin, params_too, range(3, 6)))


@every_case_with_a_peer
def test_torch_checkpoint_loads(case):
    theirs, ours = tensors(shapes=SOLID), tensors(shapes=SOLID)
    peer = case.peer(theirs, lr=0.1)
    steps(peer, theirs, range(3))
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    optimizer = case.build(ours, lr=0.9)
    optimizer.load_state_dict(peer.state_dict())
    close(steps(optimizer, ours, range(3, 6)), steps(peer, theirs, range(3, 6)), case.tolerance)


@every_case
def test_checkpoint_without_the_newer_keys_loads(case):
    params = tensors()
    optimizer = case.build(params, lr=0.1)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["engine"], group["maximize"]
    optimizer.load_state_dict(state)
    steps(optimizer, params, range(1))
    assert optimizer.param_groups[0]["engine"] == "auto" and not optimizer.param_groups[0]["maximize"]


@every_class
def test_hooks_run(case):
    params, calls = tensors(), []
    optimizer = case.build(params, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    steps(optimizer, params, range(1))
    optimizer.state_dict()
    assert calls == ["pre", "post", "state"]


SCHEDULERS = {
    "LambdaLR": dict(lr_lambda=lambda t: 0.5**t),
    "MultiplicativeLR": dict(lr_lambda=lambda t: 0.5),
    "StepLR": dict(step_size=1, gamma=0.5),
    "MultiStepLR": dict(milestones=[1, 2], gamma=0.5),
    "ConstantLR": dict(),
    "LinearLR": dict(),
    "ExponentialLR": dict(gamma=0.5),
    "CosineAnnealingLR": dict(T_max=3),
    "CosineAnnealingWarmRestarts": dict(T_0=2),
    "PolynomialLR": dict(total_iters=3),
    "CyclicLR": dict(base_lr=0.01, max_lr=0.1, cycle_momentum=False),
    "OneCycleLR": dict(max_lr=0.1, total_steps=9, cycle_momentum=False),
}


@every_case_with_a_peer
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_every_scheduler_drives_it_as_it_drives_torch(case, name, tensor_lr):
    def run(build):
        params = tensors(shapes=SOLID)
        optimizer = build(params, lr=torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1)
        scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULERS[name])
        for t in range(4):
            steps(optimizer, params, [t])
            scheduler.step()
        return params

    close(run(case.build), run(case.peer), case.tolerance)


@every_class
def test_reduce_on_plateau(case):
    optimizer = case.build(tensors(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    before = [group["lr"] for group in optimizer.param_groups]
    for loss in (1.0, 1.0, 1.0):
        scheduler.step(loss)
    assert [group["lr"] for group in optimizer.param_groups] == [lr / 4 for lr in before]


@every_class
def test_gradient_scaler_unscales_and_skips_an_overflow(case):
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    y = torch.ones(3, device=DEVICE, requires_grad=True)
    scaled, plain = case.build([x], lr=0.1), case.build([y], lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    for factor in (1.0, float("inf"), 1.0):
        scaled.zero_grad()
        plain.zero_grad()
        scaler.scale(x.square().sum() * factor).backward()
        scaler.step(scaled)
        scaler.update()
        if factor == 1.0:
            y.square().sum().backward()
            plain.step()
    close([x.detach()], [y.detach()], 1e-6)


@every_case_and_engine
@pytest.mark.parametrize("device", [False, True])
def test_a_skipped_step_never_happened(case, engine, device, monkeypatch):
    if device:  # the flag is there and the host does not know it, as on a GPU
        if not case.spreads:
            return  # LAPACK refuses what is not finite
        monkeypatch.setattr("guided_descent.core.known", lambda finite: True if finite is None else None)
    params, reference = tensors(), tensors()
    careful = case.build(params, lr=0.1, engine=engine, nonfinite="skip")
    plain = case.build(reference, lr=0.1, engine=engine)
    for t in range(4):
        set_gradients(params, t)
        if t in (0, 2):
            params[3].grad.view(-1)[1] = float("nan") if t else float("inf")
        else:
            set_gradients(reference, t)
            plain.step()
        careful.step()
    assert careful.skipped_steps == 2
    close([p.detach() for p in params], [p.detach() for p in reference])
    for p, q in zip(params, reference, strict=True):
        for name, value in plain.state[q].items():
            close([careful.state[p][name]], [value])


@every_case_and_engine
def test_nonfinite_raise_changes_nothing_and_propagate_is_torch(case, engine):
    params, theirs = tensors(shapes=SOLID), tensors(shapes=SOLID)
    optimizer = case.build(params, lr=0.1, engine=engine, nonfinite="propagate")
    strict = case.build(params, lr=0.1, engine=engine, nonfinite="raise")
    for group in (params, theirs):
        set_gradients(group, 0)
        group[3].grad[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"shape \(3, 4\) is not finite .* use nonfinite='skip'"):
        strict.step()
    assert same(params, tensors(shapes=SOLID)) and not strict.state and strict.skipped_steps == 0
    if not case.spreads:
        return
    optimizer.step()
    assert not params[3].isfinite().all()
    if case.theirs:
        case.peer(theirs, lr=0.1).step()
        for p, q in zip(params, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=case.tolerance, atol=case.tolerance, equal_nan=True)


@every_case_and_engine
@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_state_dtype_is_kept_and_survives_a_checkpoint(case, engine, dtype, state_dtype):
    if engine == "fused" and (dtype == torch.bfloat16 or case.cls.clocks or case.options):  # or there is no state
        with pytest.raises(
            ValueError, match="engine='fused' is not valid .*(state_dtype=|on the CPU).* use engine='auto'"
        ):
            params = tensors(dtype)
            steps(case.build(params, lr=0.1, engine=engine, state_dtype=state_dtype), params, range(1))
        return
    params = tensors(dtype)
    optimizer = case.build(params, lr=0.1, engine=engine, state_dtype=state_dtype)
    steps(optimizer, params, range(2))
    own = [(name.partition(".")[0], x) for state in optimizer.state.values() for name, x in state.items()]
    assert {x.dtype for name, x in own if name not in CLOCKS | set(case.cls.precise)} <= {state_dtype}
    assert {x.dtype for name, x in own if name in case.cls.precise} <= {torch.float32}
    assert all(p.dtype == dtype for p in params)
    twins = [p.detach().clone().requires_grad_() for p in params]
    twin = case.build(twins, lr=0.1, engine=engine, state_dtype=state_dtype)
    twin.load_state_dict(optimizer.state_dict())
    assert same(steps(twin, twins, range(2, 4)), steps(optimizer, params, range(2, 4)))


@every_compiled_class
def test_a_learning_rate_change_never_recompiles(case):
    params = tensors()
    optimizer = case.build(params, lr=0.1, engine="compile")
    steps(optimizer, params, range(2))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for t in range(2, 14):
        optimizer.param_groups[0]["lr"] = 0.1 / t
        steps(optimizer, params, [t])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@every_compiled_class
def test_generated_code_is_the_same_step_under_a_schedule(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", compile_for_real)
    close(scheduled(case, "compile", [(3, 4), (5,)]), scheduled(case, "loop", [(3, 4), (5,)]))


def scheduled(case, engine, shapes=SHAPES):
    params = tensors(shapes=shapes)
    optimizer = case.build(params, lr=0.1, engine=engine)
    for t in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / 3**t
        steps(optimizer, params, [t])
    return params


@every_case_and_engine
def test_a_schedule_acts_on_every_engine(case, engine):
    close(scheduled(case, engine), scheduled(case, "loop"))
    constant = tensors()
    steps(case.build(constant, lr=0.1, engine="loop"), constant, range(3))
    assert not same(scheduled(case, engine), constant)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@every_case_and_engine
def test_a_layout_changed_in_mid_run_changes_no_numbers(case, engine):
    params, reference = tensors(shapes=[(4, 3, 2, 2), (3, 4)]), tensors(shapes=[(4, 3, 2, 2), (3, 4)])
    optimizer = case.build(params, lr=0.1, engine=engine)
    expected = steps(case.build(reference, lr=0.1, engine="loop"), reference, range(5))
    steps(optimizer, params, range(2))
    params[0].data = channels_last(params[0].data)
    params[0].grad = None
    for t in range(2, 5):
        set_gradients(params, t)
        params[0].grad = channels_last(params[0].grad)
        optimizer.step()
    close(params, expected)
    like = [x for x in optimizer.state[params[0]].values() if x.shape == params[0].shape]
    assert all(x.stride() == params[0].stride() for x in like)


def contents(optimizer, params):
    """All that a refused step or load must leave as it is."""
    return copy.deepcopy([[p.detach() for p in params], optimizer.state_dict()["state"]])


@every_case_and_engine
def test_an_enlarged_parameter_is_refused_before_anything_changes(case, engine):
    params = tensors(shapes=[(3, 2), (4, 3), (2, 2)])
    optimizer = case.build(params, lr=0.1, engine=engine)
    steps(optimizer, params, range(2))
    with torch.no_grad():
        params[1].data = torch.zeros(6, 3, dtype=torch.float64, device=DEVICE)
    before = contents(optimizer, params)
    with pytest.raises(ValueError, match=r"\(6, 3\): it has a gradient of shape \(4, 3\); clear that with zero_grad"):
        optimizer.step()
    params[1].grad = None
    set_gradients(params, 2)
    if optimizer.state[params[1]]:
        misfit = r"\(6, 3\): its state '\w+' has shape .* delete optimizer.state\[p\]"
        with pytest.raises(ValueError, match=misfit):
            optimizer.step()
        torch.testing.assert_close(contents(optimizer, params), before, rtol=0, atol=0)
        del optimizer.state[params[1]]
    steps(optimizer, params, range(2, 4))  # SOAP's first step only looks
    assert params[1].shape == (6, 3) and params[1].any()


@every_case
def test_a_checkpoint_of_other_shapes_is_refused_before_anything_changes(case):
    theirs, ours = tensors(shapes=[(3, 3), (2, 6)]), tensors(shapes=[(3, 3), (3, 4)])
    other, optimizer = case.build(theirs, lr=0.1), case.build(ours, lr=0.1)
    steps(other, theirs, range(2))
    steps(optimizer, ours, range(1))
    if not other.state:
        return
    before = contents(optimizer, ours)
    with pytest.raises(ValueError, match=r"checkpoint does not fit .*\(3, 4\): its state '\w+' has shape .* has to be"):
        optimizer.load_state_dict(other.state_dict())
    torch.testing.assert_close(contents(optimizer, ours), before, rtol=0, atol=0)


@every_case
def test_what_others_put_into_state_is_carried_along(case):
    params = tensors()
    optimizer = case.build(params, lr=0.1)
    optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.state.update(note=1))
    steps(optimizer, params, range(1))
    saved = optimizer.state_dict()
    assert saved["state"]["note"] == 1
    case.build(tensors(), lr=0.1).load_state_dict(saved)
    steps(optimizer, params, range(1))


@every_compiled_class
def test_fused_is_refused_where_it_is_not_valid(case):
    params = [torch.ones(2, dtype=torch.complex128, requires_grad=True)]
    optimizer = case.build(params, lr=0.1, engine="fused")
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match="engine='fused' is not valid for .*; use engine='auto'|complex.*view_as_real"):
        optimizer.step()
    assert same([p.detach() for p in params], [torch.ones(2, dtype=torch.complex128)]) and not optimizer.state


@every_case
def test_sparse_gradient_is_refused_before_anything_changes(case):
    params = tensors(shapes=[(3,), (4, 2)])
    optimizer = case.build(params, lr=0.1)
    set_gradients(params, 0)
    params[1].grad = params[1].grad.to_sparse()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"\(4, 2\): its gradient has layout torch.sparse_coo; use a dense gradient"):
        optimizer.step()
    assert same(before, params) and not optimizer.state


@every_case
def test_bad_arguments_are_refused_by_name_with_a_remedy(case):
    for arguments in [{"lr": -1.0}, {"lr": float("nan")}, {"lr": "fast"}, {"lr": None}, *case.refused]:
        (name, value), *_ = arguments.items()
        with pytest.raises((ValueError, TypeError), match=rf"{name}=.* pass an? (number|integer) in "):
            case.build(tensors(), **arguments)
    with pytest.raises(ValueError, match=r"lr has shape \(2,\); pass a number"):
        case.build(tensors(), lr=torch.ones(2))
    for word in ("foreach", "fused", "capturable", "differentiable"):
        with pytest.raises(TypeError, match=rf"no {word}=True; use engine="):
            case.build(tensors(), **{word: True})
    with pytest.raises(ValueError, match="engine='warp' is unknown; use one of 'auto', 'loop'"):
        case.build(tensors(), engine="warp")
    with pytest.raises(ValueError, match="empty parameter list"):
        case.build([])
