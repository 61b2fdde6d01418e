"""Adaptive methods against torch.optim and, for AdEMAMix, against pytorch_optimizer: fp64, 100 steps, every option."""

from functools import partial

import pytest
import pytorch_optimizer
import torch

import guided_descent as gd

SHAPES = [(), (1,), (5,), (4, 3), (2, 3, 4), (2, 3, 2, 2)]
STEPS = 100


def ademamix(params, lr=1e-3, **options):
    """The peer, with our conventions.

    Its weight decay is an L2 penalty unless ``weight_decouple=True``; it is then scaled by the learning rate
    (``fixed_decay=False``), as ours. It has one argument for both warm-ups, counts steps from one, leaves the slow mean
    uncorrected and adds eps to the corrected root, all as ours.
    """
    return pytorch_optimizer.AdEMAMix(params, lr=lr, weight_decouple=True, foreach=False, **options)


TOLERANCE = {"NAdam": 1e-9}  # torch keeps mu_product in single precision
CASES = {
    "Adagrad": (
        gd.Adagrad,
        torch.optim.Adagrad,
        [{}, {"lr_decay": 0.01}, {"weight_decay": 0.1}, {"initial_accumulator_value": 0.5}, {"eps": 1e-2}],
    ),
    "RMSprop": (
        gd.RMSprop,
        torch.optim.RMSprop,
        [
            {},
            {"alpha": 0.9, "eps": 1e-2},
            {"weight_decay": 0.1},
            {"momentum": 0.9},
            {"centered": True},
            {"centered": True, "momentum": 0.5, "weight_decay": 0.1},
        ],
    ),
    "Adam": (
        gd.Adam,
        torch.optim.Adam,
        [
            {},
            {"betas": (0.5, 0.9), "eps": 1e-2},
            {"betas": (0.0, 0.0), "eps": 1e-2},
            {"weight_decay": 0.1},
            {"amsgrad": True},
            {"amsgrad": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
        ],
    ),
    "AdamW": (gd.AdamW, torch.optim.AdamW, [{}, {"weight_decay": 0.5}, {"weight_decay": 0.0, "amsgrad": True}]),
    "NAdam": (
        gd.NAdam,
        torch.optim.NAdam,
        [
            {},
            {"betas": (0.5, 0.9), "eps": 1e-2},
            {"momentum_decay": 0.1},
            {"momentum_decay": 0.0},
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "decoupled_weight_decay": True},
        ],
    ),
    "Adafactor": (
        gd.Adafactor,
        torch.optim.Adafactor,
        [{}, {"beta2_decay": -0.5}, {"eps": (1e-2, 0.1)}, {"eps": (None, 10.0)}, {"d": 2.0}, {"weight_decay": 0.1}],
    ),
    "AdEMAMix": (
        gd.AdEMAMix,
        ademamix,
        [
            {},
            {"betas": (0.8, 0.9, 0.99), "eps": 1e-2},
            {"alpha": 2.0, "weight_decay": 0.1},
            {"t_alpha_beta3": 50},
            {"t_alpha_beta3": 400.0, "betas": (0.5, 0.99, 0.999)},
        ],
    ),
}
EVERY = [
    pytest.param(name, options, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'defaults'}")
    for name, (_, _, rows) in CASES.items()
    for options in rows
]
every_case = pytest.mark.parametrize("name", CASES)
every_option = pytest.mark.parametrize(("name", "options"), EVERY)


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in SHAPES]


def run(build, steps=range(STEPS), params=None):
    """The parameters after steps on a fixed sequence of gradients, of sizes from 1e-3 to 1e3."""
    params = tensors() if params is None else params
    optimizer = build(params)
    advance(optimizer, params, steps)
    return [p.detach() for p in params], optimizer


def advance(optimizer, params, steps):
    for t in steps:
        generator = torch.Generator().manual_seed(1000 + t)
        for i, p in enumerate(params):
            p.grad = 10.0 ** (i - 2) * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()


def close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@every_option
@pytest.mark.parametrize("maximize", [False, True])
def test_loop_follows_the_peer(name, options, maximize):
    ours, theirs, _ = CASES[name]
    expected, _ = run(partial(theirs, lr=0.01, maximize=maximize, **options))
    actual, _ = run(partial(ours, lr=0.01, maximize=maximize, engine="loop", **options))
    close(actual, expected, TOLERANCE.get(name, 1e-12))


@every_option
@pytest.mark.parametrize("engine", ["foreach", "auto"])
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_every_engine_follows_the_loop(name, options, engine, tensor_lr, nonfinite):
    ours, _, _ = CASES[name]
    lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
    expected, _ = run(partial(ours, lr=0.01, engine="loop", **options), range(10))
    actual, _ = run(partial(ours, lr=lr, engine=engine, nonfinite=nonfinite, **options), range(10))
    close(actual, expected, 1e-12)
    assert not tensor_lr or lr.item() == 0.01


@every_option
def test_compiled_rule_follows_the_loop(name, options, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    ours, _, _ = CASES[name]
    expected, _ = run(partial(ours, lr=0.01, engine="loop", **options), range(5))
    actual, _ = run(partial(ours, lr=0.01, engine="compile", **options), range(5))
    close(actual, expected, 1e-12)


@pytest.mark.parametrize("name", ["Adagrad", "Adam", "AdamW"])
def test_fused_is_what_auto_takes_where_torch_has_the_kernel(name):
    ours, _, _ = CASES[name]
    assert ours.fused is not None
    close(run(partial(ours, lr=0.01, engine="fused"))[0], run(partial(ours, lr=0.01, engine="auto"))[0], 0.0)


@pytest.mark.parametrize("name", ["RMSprop", "NAdam", "Adafactor", "AdEMAMix"])
def test_fused_is_refused_where_torch_has_none(name):
    ours, _, _ = CASES[name]
    with pytest.raises(ValueError, match="engine='fused' is not valid .* torch has no kernel"):
        run(partial(ours, lr=0.01, engine="fused"), range(1))


@pytest.mark.parametrize(("name", "options"), [case for case in EVERY if case.values[0] != "AdEMAMix"])
def test_a_checkpoint_of_torch_goes_on(name, options):
    ours, theirs, _ = CASES[name]
    _, peer = run(partial(theirs, lr=0.01, **options), range(20))
    theirs_now = peer.param_groups[0]["params"]
    params = [p.detach().clone().requires_grad_() for p in theirs_now]
    resumed = ours(params, lr=0.5)
    resumed.load_state_dict(peer.state_dict())
    advance(peer, theirs_now, range(20, 40))
    advance(resumed, params, range(20, 40))
    close(params, theirs_now, TOLERANCE.get(name, 1e-12))
    named = {key for state in peer.state_dict()["state"].values() for key in state}
    assert named == {key for state in resumed.state_dict()["state"].values() for key in state}


def test_an_adam_checkpoint_goes_on_as_adamw_as_in_torch():
    _, adam = run(partial(torch.optim.Adam, lr=0.01, weight_decay=0.1), range(3))
    adamw = gd.AdamW(tensors())
    adamw.load_state_dict(adam.state_dict())
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True and adamw.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("Adafactor", "AdEMAMix")])
@pytest.mark.parametrize("engine", ["loop", "foreach"])
def test_complex_parameters_follow_torch(name, engine):
    ours, theirs, rows = CASES[name]

    def go(build):
        z = torch.randn(4, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        optimizer = build([z])
        for t in range(30):
            z.grad = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(t + 1))
            optimizer.step()
        return [torch.view_as_real(z.detach())]

    for options in rows:
        expected = go(partial(theirs, lr=0.01, foreach=False, **options))
        close(go(partial(ours, lr=0.01, engine=engine, **options)), expected, TOLERANCE.get(name, 1e-12))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", ["loop", "foreach"])
def test_low_precision_stays_near_torch(name, dtype, engine):
    ours, theirs, _ = CASES[name]
    expected, _ = run(partial(theirs, lr=0.01), range(5), tensors(dtype))
    actual, optimizer = run(partial(ours, lr=0.01, engine=engine), range(5), tensors(dtype))
    close(actual, expected, 4 * torch.finfo(dtype).eps)
    assert all(p.dtype == dtype for p in actual)


@every_case
def test_zero_gradients_and_empty_tensors_leave_no_trace(name):
    ours, _, _ = CASES[name]
    for shape in [(), (3,), (0,), (3, 0), (2, 3)]:
        x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        optimizer = ours([x], lr=0.1, weight_decay=0.0)
        for _ in range(3):
            x.grad = torch.zeros_like(x)
            optimizer.step()
        assert torch.equal(x.detach(), torch.ones_like(x))
        assert all(value.isfinite().all() for value in optimizer.state[x].values())


def test_centered_rmsprop_survives_round_off():
    x = torch.zeros(1000, requires_grad=True)
    optimizer = gd.RMSprop([x], centered=True)
    gradient = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for _ in range(3000):  # a constant gradient has no variance: v − m² is zero up to round-off, of either sign
        x.grad = gradient.clone()
        optimizer.step()
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: gd.Adagrad(p, lr_decay=-1.0), r"lr_decay=-1.0 is outside its range; pass a number in \[0, inf\)"),
        (lambda p: gd.Adagrad(p, initial_accumulator_value=-1.0), r"initial_accumulator_value=-1.0 .* \[0, inf\)"),
        (lambda p: gd.RMSprop(p, alpha=1.0), r"alpha=1.0 is outside its range; pass a number in \[0, 1\)"),
        (lambda p: gd.Adam(p, betas=(0.9, 1.0)), r"betas=1.0 is outside its range; pass a number in \[0, 1\)"),
        (lambda p: gd.NAdam(p, momentum_decay=-1.0), r"momentum_decay=-1.0 .* \[0, inf\)"),
        (lambda p: gd.Adafactor(p, d=0.5), r"d=0.5 is outside its range; pass a number in \[1, inf\)"),
        (lambda p: gd.Adafactor(p, beta2_decay=0.5), r"beta2_decay=0.5 .* \(-inf, 0\]"),
        (lambda p: gd.Adafactor(p, eps=(None, -1.0)), r"eps=-1.0 .* \[0, inf\)"),
        (lambda p: gd.Adafactor(p, eps=(None, None)), r"eps=None is a NoneType; pass a number in \[0, inf\)"),
        (lambda p: gd.Adam(p, betas=(0.9,)), r"betas=\(0.9,\) has another form"),
        (lambda p: gd.AdEMAMix(p, betas=(0.9, 0.999)), r"betas=\(0.9, 0.999\) has another form"),
        (lambda p: gd.AdEMAMix(p, alpha=-1.0), r"alpha=-1.0 .* \[0, inf\)"),
        (lambda p: gd.AdEMAMix(p, t_alpha_beta3=0), r"t_alpha_beta3=0.0 .* \(0, inf\)"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(tensors())


def test_adafactor_refuses_complex_parameters_before_anything_changes():
    x, z = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.complex64, requires_grad=True)
    x.grad, z.grad = torch.ones_like(x), torch.ones_like(z)
    optimizer = gd.Adafactor([{"params": [x]}, {"params": [z]}])
    with pytest.raises(ValueError, match=r"a parameter, \(2,\): it is complex.* pass torch.view_as_real"):
        optimizer.step()
    assert torch.equal(x.detach(), torch.ones(2)) and not optimizer.state
