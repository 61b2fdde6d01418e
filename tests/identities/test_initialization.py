"""Initialization: means in closed form, what each function keeps, and what it leaves alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guided_descent as gd
from guided_descent import initialization as init
from guided_descent.initialization import MeanField

BASE = torch.float64
settings.register_profile("init", deadline=None, max_examples=25)
settings.load_profile("init")


def source(number=0):
    return torch.Generator().manual_seed(number)


def mlp(*sizes, bias=True, act=nn.ReLU):
    layers = []
    for i, j in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(i, j, bias=bias), act()]
    return nn.Sequential(*layers[:-1]).double()


def values(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# Mean field


@given(q=st.floats(0.01, 20), c=st.floats(-1, 1), w=st.floats(0.1, 3), b=st.floats(0, 2))
def test_erf_in_closed_form(q, c, w, b):
    field = MeanField("erf", w, b)
    share = 2 * q / (1 + 2 * q)
    length = w**2 * 2 / math.pi * math.asin(share) + b**2
    product = w**2 * 2 / math.pi * math.asin(c * share) + b**2
    assert field.length(q) == pytest.approx(length, abs=1e-11)
    assert field.cosine(c, q) * length == pytest.approx(product, abs=1e-11)
    assert field.chi(q) == pytest.approx(w**2 * 4 / math.pi / math.sqrt(1 + 4 * q), rel=1e-11)


@given(q=st.floats(0.01, 5), c=st.floats(-0.99, 0.99))
def test_the_quadrature_knows_a_polynomial(q, c):
    """x + x²: E φφ = c q + q²(1 + 2c²), E φ'² = 1 + 4q."""
    field = MeanField(lambda x: x + x.square(), 1.5, 0.2)
    assert field.length(q) == pytest.approx(2.25 * (q + 3 * q * q) + 0.04, rel=1e-11)
    assert field.chi(q) == pytest.approx(2.25 * (1 + 4 * q), rel=1e-11)
    product = 2.25 * (c * q + q * q * (1 + 2 * c * c)) + 0.04
    assert field.cosine(c, q) * field.length(q) == pytest.approx(product, rel=1e-11)


@given(slope=st.floats(-1, 1), c=st.floats(-1, 1), q=st.floats(0.1, 3))
def test_straight_pieces_by_an_angle_integral(slope, c, q):
    turn = torch.arange(20_000, dtype=BASE) * (2 * math.pi / 20_000)

    def phi(x):
        return torch.where(x > 0, x, slope * x)

    values = phi(turn.cos()) * phi((turn - math.acos(c)).cos())
    init.BENT["of the test"] = slope
    try:
        field = MeanField("of the test", 1.2, 0.3)
    finally:
        del init.BENT["of the test"]
    expected = 1.44 * 2 * q * float(values.mean()) + 0.09
    assert field.cosine(c, q) * field.length(q) == pytest.approx(expected, abs=1e-5)
    assert field.chi(q) == pytest.approx(1.44 * (1 + slope**2) / 2)
    assert field.length(q) == pytest.approx(1.44 * (1 + slope**2) / 2 * q + 0.09)


@given(q=st.floats(0.01, 10), phi=st.sampled_from(["tanh", "erf"]))
def test_a_critical_point_is_critical(q, phi):
    square, bias = init.critical_point(q, phi)
    field = MeanField(phi, math.sqrt(square), math.sqrt(bias), nodes=801)
    assert field.chi(q) == pytest.approx(1, abs=1e-9)
    assert field.length(q) == pytest.approx(q, rel=1e-9)
    assert field.fixed_point() == pytest.approx(q, rel=1e-6)


def test_known_critical_gains():
    assert init.critical_gain("tanh") == pytest.approx(1, abs=1e-12)
    assert init.critical_gain("erf") == pytest.approx(math.sqrt(math.pi) / 2, abs=1e-12)
    assert init.critical_gain("relu") == pytest.approx(math.sqrt(2), abs=1e-12)
    assert init.critical_gain("abs") == pytest.approx(1, abs=1e-12)
    assert init.critical_gain(lambda x: torch.sin(2 * x)) == pytest.approx(0.5, abs=1e-12)
    for bias, gain in ((0.05, 1.1225), (0.3, 1.3956), (1.0, 1.8555)):
        assert init.critical_gain("tanh", bias) == pytest.approx(gain, abs=2e-4)


def test_the_half_stable_points_of_the_textbook():
    """Roberts, Yaida & Hanin, section 5.3.4: SWISH and GELU."""
    square, bias = init.critical_point(14.32017, "silu")
    assert (bias, square) == pytest.approx((0.55514317, 1.98800468), abs=2e-4)
    low, high = 3.0, 4.0
    for _ in range(60):
        q = (low + high) / 2
        low, high = (low, q) if init._is_stable(MeanField("gelu"), q) else (q, high)
    square, bias = init.critical_point(q, "gelu")
    assert (bias, square) == pytest.approx((0.17292093, 1.98305826), abs=2e-4)


@pytest.mark.parametrize("phi", ["gelu", "silu"])
def test_no_stable_gain_says_which_there_is(phi):
    with pytest.raises(ValueError, match="sigma_b=0.0 has no critical gain.*pass sigma_b=") as told:
        init.critical_gain(phi)
    offered = float(str(told.value).split("pass sigma_b=")[1].split(",")[0])
    gain = init.critical_gain(phi, offered + 0.01)
    field = MeanField(phi, gain, offered + 0.01, nodes=1601)
    assert field.chi(field.fixed_point()) == pytest.approx(1, abs=1e-3)


def test_fixed_points():
    assert MeanField("tanh", 0.8).fixed_point() == 0
    assert MeanField("relu", 2.0).fixed_point() == math.inf
    assert MeanField("relu", 1.0, 0.5).fixed_point() == pytest.approx(0.5)
    assert MeanField(lambda x: x, 1.1, 0.1).fixed_point() == math.inf
    q = MeanField("tanh", 1.5, 0.2).fixed_point()
    assert MeanField("tanh", 1.5, 0.2).length(q) == pytest.approx(q, rel=1e-12)
    with pytest.raises(ValueError, match="keeps every length"):
        MeanField("relu", math.sqrt(2)).fixed_point()


def test_a_run_is_its_maps():
    field = MeanField("tanh", 1.4, 0.1)
    run = field.run(3, 0.7, 0.2)
    assert run["q"][1] == pytest.approx(field.length(0.7))
    assert run["c"][1] == pytest.approx(field.cosine(0.2, 0.7))
    q, c = float(run["q"][1]), float(run["c"][1])
    assert run["c"][2] == pytest.approx(field.cosine(c, q))
    assert run["gradient"][2] == pytest.approx(math.sqrt(field.chi(0.7) * field.chi(q)))
    assert run["gradient"][0] == 1 and len(run["q"]) == 3


def test_a_kink_is_refused():
    steep = MeanField(lambda x: torch.tanh(100 * x))
    for call in (
        lambda: MeanField(torch.relu).chi(1.0),
        lambda: MeanField(torch.relu).cosine(0.3, 1.0),
        lambda: steep.length(1.0),
        lambda: steep.chi(1.0),
    ):
        with pytest.raises(ValueError, match="pass a smooth phi, a name of BENT, or nodes=801"):
            call()
    MeanField(lambda x: torch.tanh(3 * x), nodes=2001).length(1.0)


# Lyapunov exponents


def test_lyapunov_of_linear_maps():
    A = torch.diag(torch.tensor([3.0, 0.5], dtype=BASE))
    x = torch.randn(4, 2, dtype=BASE, generator=source())
    found = init.lyapunov([lambda x: x @ A] * 400, x, generator=source(1))
    assert found == pytest.approx(math.log(3), abs=0.01)
    turn = init.haar(5, 5, x, source(2))
    x = torch.randn(3, 5, dtype=BASE)
    assert init.lyapunov([lambda x: 0.7 * x @ turn] * 9, x) == pytest.approx(math.log(0.7))
    assert init.lyapunov([lambda x: x, lambda x: 0 * x], x) == -math.inf


def test_lyapunov_takes_a_sequential_and_images():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 4))
    before = values(model)
    found = init.lyapunov(model, torch.randn(3, 1, 8, 8), generator=source())
    assert math.isfinite(found) and same(model, before)
    assert all(p.grad is None for p in model.parameters())


# Matrices


@given(m=st.integers(1, 9), n=st.integers(1, 9), gain=st.floats(0.1, 3))
def test_orthogonal_shapes(m, n, gain):
    for keep, factor in (("rms", max(1, m / n) ** 0.5), ("norm", 1.0)):
        one = nn.Linear(n, m).double()
        init.orthogonal_(one, gain, keep=keep, generator=source())
        W = one.weight.detach() / (gain * factor)
        gram = W @ W.T if m < n else W.T @ W
        assert torch.allclose(gram, torch.eye(min(m, n), dtype=BASE), atol=1e-9)
        assert not one.bias.any()
        if keep == "rms":
            assert one.weight.square().sum().item() == pytest.approx(m * gain**2)


def test_haar_prefers_no_direction():
    like = torch.zeros(1, dtype=BASE)
    Q = torch.stack([init.haar(3, 3, like, source(k)) for k in range(1500)])
    assert Q.mean(0).abs().max() < 0.06
    assert (Q.square().mean(0) - 1 / 3).abs().max() < 0.04
    assert abs(torch.linalg.det(Q).mean()) < 0.1


def test_fused_and_grouped_weights_are_several_matrices():
    attention = nn.MultiheadAttention(8, 2).double()
    report = init.orthogonal_(attention, generator=source())
    for W in attention.in_proj_weight.detach().split(8):
        assert torch.allclose(W @ W.T, torch.eye(8, dtype=BASE), atol=1e-9)
    assert {x.name for x in report if x.done} == {
        "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias",
    }  # fmt: skip
    conv = nn.Conv2d(8, 4, 3, groups=2).double()
    init.orthogonal_(conv, generator=source())
    for W in conv.weight.detach().flatten(1).split(2):
        assert torch.allclose(W @ W.T, torch.eye(2, dtype=BASE), atol=1e-9)


def test_delta_convolutions_keep_norms():
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular").double()
    init.orthogonal_(conv, 1.3, conv="delta", generator=source())
    x = torch.randn(2, 4, 6, 6, dtype=BASE, generator=source(1))
    assert float(conv(x).norm()) == pytest.approx(1.3 * float(x.norm()))
    taps = conv.weight.detach().square().sum((0, 1))
    assert taps[1, 1] > 0 and float(taps.sum()) == pytest.approx(float(taps[1, 1]))
    wide = nn.Conv1d(2, 8, 5).double()
    init.orthogonal_(wide, conv="delta", generator=source())
    assert float(wide.weight.square().sum()) == pytest.approx(8)
    even = nn.Sequential(nn.Linear(3, 3), nn.Conv2d(4, 4, 2))
    before = values(even)
    with pytest.raises(ValueError, match="window .2, 2. has no centre; pass conv='flat'"):
        init.orthogonal_(even, conv="delta")
    assert same(even, before)


def test_gaussian_has_its_variances():
    model = nn.Sequential(nn.Conv2d(8, 300, 5), nn.Flatten(), nn.Linear(400, 500)).double()
    report = init.gaussian_(model, "relu", 0.3, generator=source())
    assert float(model[0].weight.var()) * 200 == pytest.approx(2, rel=0.02)
    assert float(model[2].weight.var()) * 400 == pytest.approx(2, rel=0.02)
    assert float(model[2].bias.std()) == pytest.approx(0.3, rel=0.1)
    assert "normal ×0.1" in repr(report) and "normal ×0.3" in repr(report)


def test_channels_last_is_written_through():
    conv = nn.Conv2d(4, 6, 3).double().to(memory_format=torch.channels_last)
    init.orthogonal_(conv, generator=source())
    W = conv.weight.detach().flatten(1)
    assert torch.allclose(W @ W.T, torch.eye(6, dtype=BASE), atol=1e-9)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_and_a_seed():
    one, two = (mlp(4, 6, 3).bfloat16() for _ in range(2))
    init.orthogonal_(one, generator=source(5))
    init.orthogonal_(two, generator=source(5))
    assert same(one, values(two))
    assert one[0].weight.dtype == torch.bfloat16


# Models of others


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.hidden = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.LayerNorm(4)
        self.spectral = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.up = nn.ConvTranspose1d(4, 4, 3)
        self.cell = nn.LSTM(4, 4)
        self.own = nn.Parameter(torch.randn(3, 4))
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("function", [init.gaussian_, init.orthogonal_])
def test_what_is_left_alone_is_said(function):
    model = Odd()
    before, names = values(model), dict(model.named_parameters())
    report = function(model, generator=source())
    assert {x.name for x in report if x.done} == {"hidden.weight", "hidden.bias"}
    left = {x.name: x.reason for x in report if not x.done}
    changed = {k for k, v in values(model).items() if not torch.equal(v, before[k])}
    assert changed == {"hidden.weight", "hidden.bias"}
    assert left.keys() | {"hidden.weight", "hidden.bias"} == names.keys()
    for name, word in {
        "embedding.weight": "tied to an output layer",
        "frozen.weight": "frozen",
        "norm.weight": "norm",
        "spectral.parametrizations.weight.original0": "parametrized",
        "up.weight": "transposed",
        "cell.weight_ih_l0": "recurrent",
        "own": "unrecognized: Odd",
    }.items():
        assert word in left[name], name
    assert "left alone" in repr(report) and "hidden.weight" in repr(report)


def test_a_shared_layer_is_changed_once():
    one = nn.Linear(3, 3)
    model = nn.Sequential(one, nn.ReLU(), one)
    report = init.gaussian_(model, generator=source())
    assert [x.name for x in report] == ["0.weight", "0.bias"]
    init.emergence_(nn.Sequential(one, nn.Linear(3, 3)), 2.0)


EVERY = {
    "gaussian_": init.gaussian_,
    "orthogonal_": init.orthogonal_,
    "lsuv_": lambda model, **more: init.lsuv_(model, torch.ones(2, 3), **more),
    "depth_scaled_": lambda model: init.depth_scaled_(model, branches=[model]),
    "emergence_": init.emergence_,
}


@pytest.mark.parametrize("name", EVERY)
def test_models_that_cannot_be_initialized_are_refused(name):
    function = EVERY[name]
    with pytest.raises(TypeError, match="model is a list; pass an nn.Module"):
        function([nn.Linear(3, 3)])
    with pytest.raises(ValueError, match="has no shape yet; run the model once"):
        function(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2)))
    with pytest.raises(ValueError, match="0.weight is on the meta device"):
        function(nn.Sequential(nn.Linear(3, 3, device="meta")))
    with pytest.raises(ValueError, match="no trainable linear or convolutional weight"):
        function(nn.Sequential(nn.LayerNorm(3)))
    if name not in ("depth_scaled_", "emergence_"):
        with pytest.raises(TypeError, match="generator=3 is a int; pass torch.Generator"):
            function(nn.Linear(3, 3), generator=3)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: init.gaussian_(m, -1.0), "gain=-1.0 is outside"),
        (lambda m: init.gaussian_(m, "gelu"), "phi='gelu' with sigma_b=0.0"),
        (lambda m: init.gaussian_(m, "rulu"), "phi='rulu' is unknown"),
        (lambda m: init.gaussian_(m, 1.0, -0.1), "sigma_b=-0.1 is outside"),
        (lambda m: init.orthogonal_(m, keep="mean"), "keep='mean' is unknown"),
        (lambda m: init.orthogonal_(m, conv="flet"), "conv='flet' is unknown"),
        (lambda m: init.lsuv_(m, torch.ones(2, 3).double(), target=0.0), "target=0"),
        (lambda m: init.depth_scaled_(m, "half", [m]), "how='half' is unknown"),
        (lambda m: init.depth_scaled_(m), "branches=None: model has no layer"),
        (lambda m: init.depth_scaled_(m, branches=[]), "branches=.. is empty"),
        (lambda m: init.depth_scaled_(m, branches=["9"]), "no module '9'"),
        (lambda m: init.depth_scaled_(m, branches=["0", "0"]), "shares modules"),
        (lambda m: init.depth_scaled_(m, branches=["1"]), "has no weight to scale"),
        (lambda m: init.depth_scaled_(m, branches=[nn.Linear(2, 2)]), "no module of model"),
        (lambda m: init.depth_scaled_(m, "fixup", ["0"]), "which has one layer"),
        (lambda m: init.depth_scaled_(m, "zero", ["0"], head="2"), "head='2' with how='zero'"),
        (lambda m: init.depth_scaled_(m, "fixup", [m], head="1"), "head is no linear layer"),
        (lambda m: init.emergence_(m, 0.0), "alpha=0.0 is outside"),
        (lambda m: init.emergence_(m, 2.0, ["0"]), "has 1 layer to scale"),
        (lambda m: init.emergence_(m, 2.0, ["0", "0"]), "comes twice"),
        (lambda m: init.emergence_(m, 2.0, ["0", "1"]), "no trainable linear"),
    ],
)
def test_wrong_arguments_change_nothing(call, told):
    model = mlp(3, 4, 2)
    before = values(model)
    with pytest.raises(ValueError, match=told):
        call(model)
    assert same(model, before)


def test_arguments_of_the_wrong_kind():
    model = mlp(3, 4, 2)
    for call, told in (
        (lambda: init.depth_scaled_(model, branches="0"), "pass a list of modules"),
        (lambda: init.emergence_(model, 2.0, "0"), "pass a list of modules"),
        (lambda: init.lyapunov([3], torch.ones(1, 1)), "cannot be called"),
        (lambda: init.lyapunov(nn.Linear(2, 2), torch.ones(1, 2)), "one module"),
        (lambda: MeanField(3), "pass a name or a function"),
    ):
        with pytest.raises(TypeError, match=told):
            call()
    for call, told in (
        (lambda: init.lyapunov([], torch.ones(1, 1)), "is empty"),
        (lambda: init.lyapunov([abs], torch.ones(3)), "is no batch"),
        (lambda: init.critical_gain("relu", 0.1), "pass sigma_b=0"),
        (lambda: MeanField("tanh", nodes=3), "nodes=3"),
    ):
        with pytest.raises(ValueError, match=told):
            call()
    with pytest.raises(FloatingPointError, match="not finite"):
        init.lyapunov([lambda x: x * math.inf], torch.ones(2, 2))


# LSUV


def test_lsuv_gives_each_output_its_variance():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(144, 20), nn.GELU(), nn.Linear(20, 5),
    ).double()  # fmt: skip
    x = torch.randn(50, 1, 8, 8, dtype=BASE, generator=source())
    model[1].eval()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    init.lsuv_(model, x, target=2.0, generator=source(1))
    assert model.training and model[3].training and not model[1].training
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    h = x
    for layer in model.eval():
        h = layer(h)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            assert h.var().item() == pytest.approx(2.0, rel=1e-9)
            assert not layer.bias.any()
    W = model[5].weight.detach()
    gram = W @ W.T
    assert torch.allclose(gram, gram[0, 0] * torch.eye(20, dtype=BASE), atol=1e-9)
    assert not model[0]._forward_hooks


def test_lsuv_keeps_directions_if_asked():
    model = mlp(3, 5, 2)
    before = values(model)
    init.lsuv_(model, torch.randn(9, 3, dtype=BASE), orthogonal=False)
    ratio = model[2].weight / before["2.weight"]
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio))


def test_lsuv_of_shared_idle_and_silent_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)
            self.after, self.silent = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.after(self.twice(torch.tanh(self.twice(x))))
            return h + self.silent(0 * h)

    model = Model().double()
    idle = model.idle.weight.detach().clone()
    x = torch.randn(20, 3, dtype=BASE)
    report = {x.name: x for x in init.lsuv_(model, {"x": x}, generator=source())}
    assert model.twice(x).var().item() == pytest.approx(1)
    assert model(x).var().item() == pytest.approx(1)
    assert report["idle.weight"].reason == "its module did not run"
    assert not report["idle.weight"].done and torch.equal(model.idle.weight, idle)
    assert "does not vary" in report["silent.weight"].reason


def test_lsuv_undoes_itself_on_failure():
    model = mlp(3, 5, 2)
    before = values(model)
    with pytest.raises(RuntimeError):
        init.lsuv_(model, torch.ones(2, 7, dtype=BASE))
    with pytest.raises(FloatingPointError, match="the output of 0 is not finite"):
        init.lsuv_(model, torch.full((4, 3), math.inf, dtype=BASE))
    assert same(model, before) and not model[0]._forward_hooks and model.training
    with pytest.raises(ValueError, match="no linear or convolutional layer of model ran"):
        init.lsuv_(nn.MultiheadAttention(4, 1), tuple(torch.ones(3, 1, 2, 4)))


# Depth


class Block(nn.Module):
    def __init__(self, norm=False, width=6, layers=2):
        super().__init__()
        inside = []
        for _ in range(layers):
            inside += [nn.ReLU(), nn.Linear(width, width)]
        self.branch = nn.Sequential(*inside, *([nn.LayerNorm(width)] if norm else []))

    def forward(self, x):
        return x + self.branch(x)


def residual(blocks=4, **more):
    return nn.Sequential(*[Block(**more) for _ in range(blocks)], nn.Linear(6, 3)).double()


def branches(model):
    return [block.branch for block in model[:-1]]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("how", "alpha"), [("sqrt", 0.5), ("zero", 0.0)])
def test_a_branch_is_scaled_where_it_ends(norm, how, alpha):
    model = residual(norm=norm)
    for p in model.parameters():
        nn.init.normal_(p, generator=source())
    x = torch.randn(5, 6, dtype=BASE, generator=source(1))
    before = [branch(x).detach() for branch in branches(model)]
    report = init.depth_scaled_(model, how, branches(model))
    for branch, old in zip(branches(model), before, strict=True):
        assert torch.allclose(branch(x), alpha * old)
    assert len([x for x in report if x.done]) == 8
    named = {x.name for x in report}
    assert named == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("layers", [2, 3])
def test_fixup(layers):
    model = residual(layers=layers)
    before = values(model)
    init.depth_scaled_(model, "fixup", [f"{k}.branch" for k in range(4)], head="4")
    for branch in branches(model):
        *inner, last = [x for x in branch if isinstance(x, nn.Linear)]
        assert not last.weight.any() and not last.bias.any()
        assert not any(x.bias.any() for x in inner)
    factor = 4 ** (-1 / (2 * layers - 2))
    for k in range(layers - 1):
        name = f"0.branch.{2 * k + 1}.weight"
        assert torch.allclose(values(model)[name], factor * before[name])
    assert not model[4].weight.any() and not model[4].bias.any()
    with pytest.raises(ValueError, match="which has a norm layer; pass how='zero'"):
        init.depth_scaled_(model2 := residual(norm=True), "fixup", branches(model2))


def test_transformer_layers_are_known():
    layer = nn.TransformerDecoderLayer(8, 2, 16)
    model = nn.TransformerDecoder(layer, 3)
    before = values(model)
    report = init.depth_scaled_(model)
    scaled = {x.name for x in report if x.done}
    assert len(scaled) == 3 * 3 * 2
    for name, x in values(model).items():
        assert torch.allclose(x, before[name] * (1 / 3 if name in scaled else 1))
    assert "layers.2.multihead_attn.out_proj.weight" in scaled
    assert "layers.0.linear2.bias" in scaled


# Emergence


@given(alpha=st.floats(0.3, 3), depth=st.integers(2, 6))
def test_the_function_is_unchanged(alpha, depth):
    assert math.prod(init.emergence_factors(depth, alpha)) == pytest.approx(1)
    model = mlp(*[5] * (depth + 1))
    x = torch.randn(4, 5, dtype=BASE)
    before = model(x).detach()
    report = init.emergence_(model, alpha)
    assert torch.allclose(model(x), before, atol=1e-9)
    first, last = (model[0].weight, model[-1].weight)
    assert f"×{alpha ** -((depth - 1) / 2):.3g}" == report[0].done
    assert first is not last


def train(model, groups, steps=20):
    x = torch.randn(30, 5, dtype=BASE, generator=source(3))
    optimizer = groups(list(model.parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("make", "power"),
    [(lambda g: gd.SGD(g, 0.01, 0.9), 2), (lambda g: gd.Adam(g, 0.01, eps=0.0), 1),
     (lambda g: gd.Muon(g, 0.01, weight_decay=0.0), 1)],
)  # fmt: skip
def test_it_is_a_learning_rate(make, power):
    factors = init.emergence_factors(3, 1.5)
    old, new = (mlp(5, 5, 5, 5, bias=False) for _ in range(2))
    init.gaussian_(old, "relu", generator=source(7))
    new.load_state_dict(old.state_dict())
    init.emergence_(new, 1.5)
    rate = make([torch.zeros(2, 2, requires_grad=True)]).param_groups[0]["lr"]
    reached = train(new, make)

    def divided(ps):
        rates = [rate / s**power for s in factors]
        return make([{"params": [p], "lr": r} for p, r in zip(ps, rates, strict=True)])

    for a, b, s in zip(reached, train(old, divided), factors, strict=True):
        assert torch.allclose(a / s, b, atol=1e-8)


def test_chosen_layers_alone():
    model = mlp(3, 3, 3, 3)
    before = values(model)
    report = init.emergence_(model, 4.0, ["0", model[4]])
    assert torch.allclose(model[0].weight, before["0.weight"] / 2)
    assert torch.equal(model[2].weight, before["2.weight"])
    assert torch.allclose(model[4].weight, before["4.weight"] * 2)
    assert [x.reason for x in report if x.name == "2.weight"] == ["not chosen"]


def test_the_top_level_shows_the_module():
    assert gd.initialization is init and not hasattr(gd, "orthogonal_")
