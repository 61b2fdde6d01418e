"""What Muon and Scion promise, and the faults of others that they must not have."""

import ast
import importlib.util
import math
import pathlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_optimizer.optimizer.muon.base import get_adjusted_lr
from torch import nn

import guided_descent as gd
from guided_descent import muon
from guided_descent.muon import _EXPRESS, PRESETS, SCALES, damped, newton_schulz_bounds, newton_schulz_slack, polar

generator = torch.Generator().manual_seed(0)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def spectra(n=16):
    """Twelve spectra that are unkind to an iteration."""
    one, ramp = torch.ones(n), torch.linspace(1, 0, n + 1)[:-1]
    first = (torch.arange(n) == 0).double()
    return [
        one,
        first,
        first + 1e-3,
        first + 1e-6,
        first + 0.1 * one,
        ramp,
        ramp**4,
        torch.logspace(0, -8, n),
        torch.logspace(0, -3, n),
        (torch.arange(n) < 2).double(),
        (torch.arange(n) < n // 2).double(),
        one - 0.5 * first,
    ]


def with_spectrum(S, long):
    n = len(S)
    U, V = (torch.linalg.qr(normal(k, n))[0] for k in (n, long))
    return U * S.double() @ V.T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("long", [16, 40])
def test_no_spectrum_leaves_the_certificate(preset, dtype, long):
    room = {torch.bfloat16: 0.03, torch.float32: 0.02, torch.float64: 1e-6}[dtype]
    top = newton_schulz_bounds(preset)[1]
    for S in spectra():
        X = polar(with_spectrum(S, long), preset, dtype=dtype)
        assert torch.linalg.svdvals(X.double()).max() <= top + room


def test_the_certificate_is_exact():
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    for name, table in PRESETS.items():
        for lo in (0.0, 0.01, 0.3):
            y = x[x >= lo]
            for a, b, c in table:
                y = a * y + b * y**3 + c * y**5
            got = newton_schulz_bounds(name, lo)
            assert got == pytest.approx((float(y.min()), float(y.max())), abs=2e-3), name


def test_presets_without_slack_are_refused():
    p = [nn.Parameter(normal(3, 4))]
    with pytest.raises(ValueError, match=r"blows up.*damped"):
        gd.Muon(p, preset=_EXPRESS[:5])
    gd.Muon(p, preset=damped(_EXPRESS[:5]))
    with pytest.raises(ValueError, match="blows up"):
        gd.Muon(p, preset=damped(_EXPRESS[:5], 1.005))
    gd.Muon(p, preset=damped(_EXPRESS[:5], 1.009))
    assert newton_schulz_slack("polar_express")[0] == pytest.approx(0.0109, abs=1e-3)
    with pytest.raises(TypeError, match="list"):
        gd.Muon(p, preset=[(1.5, -0.5, 0.0)])
    uphill = ((4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959))
    for bad, told in (((), "triples"), (((1.5, -0.5),), "triples"), (uphill, "uphill")):
        with pytest.raises(ValueError, match=told):
            gd.Muon(p, preset=bad)
        with pytest.raises(ValueError, match=told):
            polar(p[0], bad)
    for name, table in PRESETS.items():
        for k, delta in enumerate(newton_schulz_slack(name)):
            high = newton_schulz_bounds(table[:k])[1] if k else 1.0
            top = [newton_schulz_bounds(table[k:], 0.0, high * (1 + x))[1] for x in (delta, 1.001 * delta)]
            low = [newton_schulz_bounds(table[k:], 0.0, high * (1 + x))[0] for x in (delta, 1.001 * delta)]
            assert max(top[0], -low[0]) <= 1.5 < max(top[1], -low[1]) or delta > 0.999
        assert newton_schulz_bounds(name)[0] >= 0 and min(newton_schulz_slack(name)) > 2**-7


#: What each scale is called elsewhere, and what is computed there, for m outputs and n inputs (read in their sources).
NAMESAKES = {
    ("keller", "KellerJordan/Muon"): lambda m, n: max(1, m / n) ** 0.5,
    ("keller", "torch original"): lambda m, n: torch.optim._muon._adjust_lr(1.0, "original", (m, n)),
    ("keller", "pytorch_optimizer"): lambda m, n: get_adjusted_lr(1.0, (m, n), use_adjusted_lr=False),
    ("keller", "timm original"): lambda m, n: timms(m, n, "original"),
    ("keller", "Megatron shape_scaling"): lambda m, n: max(1, m / n) ** 0.5,
    ("moonlight", "Moonlight"): lambda m, n: 0.2 * math.sqrt(max(m, n)),
    ("moonlight", "torch match_rms_adamw"): lambda m, n: torch.optim._muon._adjust_lr(1.0, "match_rms_adamw", (m, n)),
    ("moonlight", "pytorch_optimizer"): lambda m, n: get_adjusted_lr(1.0, (m, n), use_adjusted_lr=True),
    ("moonlight", "timm match_rms_adamw"): lambda m, n: timms(m, n, "match_rms_adamw"),
    ("moonlight", "dion rms_norm"): lambda m, n: 0.2 * math.sqrt(max(m, n)),
    ("scion", "dion spectral_norm"): lambda m, n: math.sqrt(m / n),
    ("scion", "timm rms_to_rms"): lambda m, n: timms(m, n, "rms_to_rms"),
    ("scion", "Megatron unit_rms_norm"): lambda m, n: (m / n) ** 0.5,
    ("spectral", "Megatron spectral"): lambda m, n: max(m, n) ** 0.5,
    ("none", "dion None"): lambda m, n: 1.0,
}


def timms(m, n, name):
    """Timm's own function, where timm is installed; alone, since timm may not import with this torch."""
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed")
    tree = ast.parse((pathlib.Path(found.origin).parent / "optim" / "muon.py").read_text())
    (function,) = [x for x in tree.body if getattr(x, "name", "") == "get_lr_scale"]
    scope = {"torch": torch}
    exec(compile(ast.Module([function], []), "timm", "exec"), scope)
    return scope["get_lr_scale"]((m, n), name)


@pytest.mark.parametrize(("ours", "theirs"), NAMESAKES, ids=[" = ".join(x) for x in NAMESAKES])
def test_scales_are_what_their_namesakes_are(ours, theirs):
    for m, n in ((6, 6), (4, 9), (9, 4), (1024, 16)):
        assert SCALES[ours](m, n) == pytest.approx(NAMESAKES[ours, theirs](m, n), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_no_polynomial_at_all_is_the_frobenius_ball(dtype):
    """Torch's baddbmm writes nothing where both its factors are zero; the Gram form is of b = c = 0 too."""
    for shape in ((4, 24, 48), (4, 48, 24), (2, 8, 9)):
        G = normal(*shape)
        X = polar(G, ((1.0, 0.0, 0.0),), dtype=dtype)
        torch.testing.assert_close(X, G / G.norm(dim=(-2, -1), keepdim=True), atol=3e-3, rtol=0)


def test_what_is_no_ordinary_matrix():
    for preset in ("polar_express", "keller", "cubic"):
        for shape in ((0, 4), (3, 0), (0, 3, 4)):
            assert polar(torch.zeros(shape), preset).shape == shape
        for row in (normal(1, 7), normal(7, 1), normal(1, 1), -torch.ones(1, 1).double()):
            lo, hi = newton_schulz_bounds(preset, 1 - 1e-9, 1)
            X = polar(row, preset)
            assert lo - 1e-6 <= (X * row).sum() / row.norm() <= hi + 1e-6
            torch.testing.assert_close(X / X.norm(), row / row.norm())
        for bad in (torch.inf, -torch.inf, torch.nan):
            G = normal(2, 3, 5)
            G[0, 1, 1] = bad
            X = polar(G, preset)
            assert X[0].isnan().all() and X[1].isfinite().all()
    big = torch.full((3, 4), 3e38)
    tiny = torch.full((3, 4), 2e-38)
    for G in (big, -big, tiny, big.to(torch.bfloat16), big.double() * 1e200):
        X = polar(G)
        assert 0.8 < torch.linalg.matrix_norm(X.double(), 2) < 1.2
        assert (X * G.sign() > 0).all()
    assert polar(1e30 * torch.ones(3, 4), dtype=torch.float16).isfinite().all()
    assert polar(1e300 * torch.ones(3, 4).double(), dtype=torch.float32).isfinite().all()
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        polar(torch.ones(3))
    with pytest.raises(TypeError, match="int64"):
        polar(torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="complex"):
        polar(torch.ones(3, 3, dtype=torch.complex64))


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 10**6), st.floats(1e-20, 1e20), st.sampled_from([*PRESETS]))
@settings(max_examples=60, deadline=None)
def test_rotations_transposes_and_scales(m, n, at, size, preset):
    draw = torch.Generator().manual_seed(at)
    G, A, B = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((m, n), (m, m), (n, n)))
    Q, P = torch.linalg.qr(A)[0], torch.linalg.qr(B)[0]
    X = polar(G, preset)
    torch.testing.assert_close(polar(Q @ G @ P, preset), Q @ X @ P, atol=1e-6, rtol=0)
    torch.testing.assert_close(polar(size * G.T, preset), X.T, atol=1e-6, rtol=0)
    lo, hi = newton_schulz_bounds(preset)
    values = torch.linalg.svdvals(X)
    assert values.max() <= hi + 1e-6
    assert (X * G).sum() >= 0


def test_the_type_to_compute_in_is_chosen_once_by_capability(monkeypatch):
    seen = []
    begin = muon._begin

    def spy(G, **options):
        X, R = begin(G, **options)
        seen.append(X.dtype)
        return X, R

    monkeypatch.setattr(muon, "_begin", spy)
    for half in (True, False):
        monkeypatch.setitem(muon._HALF, "cpu", half)
        seen.clear()
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            polar(normal(4, 20, dtype=dtype))
        low = torch.bfloat16 if half else torch.float32
        assert seen == [low, low, torch.float64]
    seen.clear()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        polar(normal(4, 20), dtype=dtype)
    assert seen == [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("engine", ["loop", "foreach", "compile"])
@pytest.mark.parametrize("kind", ["turned", "sliced", "channels_last", "transposed"])
def test_strides_change_nothing(engine, kind):
    def shaped(x):
        if kind == "turned":
            return x.mT.contiguous().mT
        if kind == "sliced":
            return torch.stack([x, x], -1)[..., 0]
        if kind == "channels_last":
            return x.view(4, 2, 3, 1).contiguous(memory_format=torch.channels_last)
        return x

    ends = []
    for change in (shaped, lambda x: x.view(4, 2, 3, 1) if kind == "channels_last" else x):
        draw = torch.Generator().manual_seed(0)
        p, *gradients = (torch.randn(4, 6, generator=draw, dtype=torch.float64) for _ in range(3))
        p = change(p).detach().requires_grad_()
        group = {"params": [p], "transposed": kind == "transposed"}
        optimizer = gd.Muon([group], engine=engine if change is shaped else "loop", normuon=0.9, weight_decay=0.1)
        for g in gradients:
            p.grad = torch.empty_like(p).copy_(change(g))
            optimizer.step()
        ends.append(p.detach().reshape(4, 6))
    torch.testing.assert_close(*ends, atol=1e-12, rtol=0)


def test_a_sphere_is_the_rate_of_lars_and_a_retraction():
    """LARS: lr · ‖w‖ / ‖u‖, in place of u its polar factor; then back to the norm."""
    p = nn.Parameter(normal(5, 3))
    optimizer = gd.Muon([p], lr=0.2, momentum=0.0, constraint="sphere", scale="moonlight")
    w, radius = p.detach().clone(), p.detach().norm()
    for _ in range(4):
        p.grad = normal(5, 3)
        u = polar(p.grad)
        w = w - 0.2 * (w.norm() / u.norm()) * u
        w = w * (radius / w.norm())
        optimizer.step()
        torch.testing.assert_close(p.detach(), w, atol=1e-12, rtol=0)


def test_the_sign_norm_uses_neither_scale_nor_preset():
    ends = []
    for options in ({}, {"scale": "keller", "preset": "svd"}):
        p = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
        p.grad = torch.ones(3, 4, dtype=torch.float64)
        gd.Scion([p], lr=0.5, radius=2.0, norm="sign", momentum=0.0, **options).step()
        ends.append(p.detach())
    assert torch.equal(*ends)
    torch.testing.assert_close(ends[0], torch.full((3, 4), 0.5 - 0.5 * 2 / 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_large_and_small(dtype):
    G = normal(5, 8)
    assert not polar(torch.zeros(5, 8, dtype=dtype)).any()
    for size in (2.0**13, 2.0**-4) if dtype == torch.float16 else (2.0**100, 2.0**-100):  # powers: no rounding
        X = polar((size * G).to(dtype))
        assert X.isfinite().all()
        torch.testing.assert_close(X.double(), polar(G.to(dtype)).double(), atol=0.05, rtol=0.05)


def test_polar_turns_with_its_argument():
    G, Q, P = normal(6, 9), torch.linalg.qr(normal(6, 6))[0], torch.linalg.qr(normal(9, 9))[0]
    for preset in (*PRESETS, "svd"):
        X = polar(G, preset)
        torch.testing.assert_close(polar(Q @ G @ P, preset), Q @ X @ P, atol=1e-9, rtol=0)
        torch.testing.assert_close(polar(G.T, preset), X.T, atol=1e-9, rtol=0)
        torch.testing.assert_close(polar(7 * G, preset), X, atol=1e-9, rtol=0)
        torch.testing.assert_close(polar(torch.stack([G, -G]), preset), torch.stack([X, -X]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("engine", ["loop", "foreach"])
def test_momentum_and_gradient_stay_what_they_are(dtype, nesterov, engine):
    p = nn.Parameter(normal(4, 6, dtype=dtype))
    p.grad = g = normal(4, 6, dtype=dtype)
    kept, optimizer = g.clone(), gd.Muon([p], nesterov=nesterov, engine=engine)
    optimizer.step()
    assert torch.equal(p.grad, kept)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], torch.zeros_like(g).lerp(g, 1 - 0.95))
    assert list(optimizer.state[p]) == ["momentum_buffer"]


def test_without_momentum_it_is_shampoo_without_memory():
    p, q = (nn.Parameter(torch.zeros(5, 5, dtype=torch.float64)) for _ in range(2))
    p.grad = q.grad = normal(5, 5)
    gd.Muon([p], lr=0.1, momentum=0.0, preset="svd").step()
    gd.Shampoo([q], lr=0.1, betas=(0.0, 0.0), eps=0.0, grafting=None, exponent=-0.25).step()
    torch.testing.assert_close(p, q, atol=1e-8, rtol=0)


def stepped(shape, g, **group):
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    p.grad = g.reshape(shape).clone()
    options = {name: group.pop(name) for name in ("scale", "engine", "normuon") if name in group}
    gd.Muon([{"params": [p], **group}], lr=1.0, momentum=0.0, **options).step()
    return -p.detach()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("engine", ["loop", "foreach"])
def test_parts_heads_experts_transposes_convolutions(scale, engine):
    options = {"scale": scale, "engine": engine}

    def same(x, y):
        return torch.testing.assert_close(x, y, atol=1e-10, rtol=0)

    def one(G):
        return polar(G) * SCALES[scale](*G.shape)

    G = normal(12, 6)
    same(stepped((12, 6), G, split_sizes=[4, 8], **options), torch.cat([one(x) for x in G.split([4, 8])]))
    same(stepped((12, 6), G, num_heads=3, **options), torch.cat([one(x) for x in G.split(4)]))
    both = {"split_sizes": [4, 8], "num_heads": 2}
    same(stepped((12, 6), G, **both, **options), torch.cat([one(x) for x in G.split([2, 2, 4, 4])]))
    same(stepped((12, 6), G, transposed=True, **options), one(G.T).T)
    parts = torch.cat([one(x) for x in G.T.split(2)]).T
    same(stepped((12, 6), G, transposed=True, split_sizes=(2, 2, 2), **options), parts)
    E = normal(3, 4, 6)
    same(stepped((3, 4, 6), E, batched=True, **options), torch.stack([one(x) for x in E]))
    halves = torch.stack([torch.cat([one(y) for y in x.split(2)]) for x in E])
    same(stepped((3, 4, 6), E, batched=True, split_sizes=(2, 2), **options), halves)
    turned = torch.stack([one(x.T).T for x in E])
    same(stepped((3, 4, 6), E, batched=True, transposed=True, **options), turned)
    C = normal(4, 3, 2, 2)
    same(stepped((4, 3, 2, 2), C, **options), one(C.flatten(1)).view_as(C))


def test_normuon_of_transposed_experts_keeps_one_number_for_a_row():
    p = nn.Parameter(normal(3, 4, 6))
    p.grad = normal(3, 4, 6)
    optimizer = gd.Muon([{"params": [p], "batched": True, "transposed": True}], normuon=0.9)
    optimizer.step()
    shapes = [x.shape for name, x in optimizer.state[p].items() if name.startswith("second")]
    assert shapes == [(6, 1)] * 3


def test_sphere():
    p = nn.Parameter(normal(4, 6))
    before = p.detach().clone()
    p.grad = normal(4, 6)
    gd.Muon([p], lr=0.1, momentum=0.0, constraint="sphere").step()
    u, r = polar(p.grad), before.norm()
    wanted = before - 0.1 * r * u / u.norm()
    torch.testing.assert_close(p.detach(), wanted * r / wanted.norm(), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="one is zero"):
        gd.Muon([nn.Parameter(torch.zeros(2, 2))], constraint="sphere")
    with pytest.raises(ValueError, match="weight_decay=0.1"):
        gd.Muon([p], constraint="sphere", weight_decay=0.1)


def test_cautious_decay_never_undoes_a_step():
    p = nn.Parameter(normal(4, 6))
    before, p.grad = p.detach().clone(), normal(4, 6)
    gd.Muon([p], lr=0.1, momentum=0.0, weight_decay=2.0, cautious=True).step()
    u = polar(p.grad)
    wanted = before - 0.1 * u - 0.2 * before * (u * before > 0)
    torch.testing.assert_close(p.detach(), wanted, atol=1e-12, rtol=0)


def test_vectors_and_no_matrix():
    named = [("w", nn.Parameter(normal(3, 3))), ("b", nn.Parameter(normal(3)))]
    for cls in (gd.Muon, gd.Scion):
        with pytest.raises(ValueError, match=r"'b'.*algorithm='adamw'"):
            cls(named)
        with pytest.raises(ValueError, match="got no matrix"):
            cls([{"params": named, "algorithm": "adamw"}])
    with pytest.raises(ValueError, match="num_heads=2 does not divide"):
        gd.Muon([{"params": named[:1], "num_heads": 2}])


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (gd.Muon, "scale", "kellr"),
        (gd.Muon, "preset", "none"),
        (gd.Muon, "constraint", "ball"),
        (gd.Scion, "norm", "l2"),
        (gd.Scion, "lr", 1.5),
    ],
)
def test_choices_are_refused_by_name(cls, name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        cls([nn.Parameter(normal(3, 3))], **{name: value})


def test_scion_is_muon_with_decay():
    gradients = [normal(4, 7) for _ in range(20)]
    ends = []
    for cls, options in (
        (gd.Muon, {"lr": 0.5, "weight_decay": 0.2, "nesterov": False, "scale": "scion"}),
        (gd.Scion, {"lr": 0.1, "radius": 5.0}),
    ):
        p = nn.Parameter(torch.ones(4, 7, dtype=torch.float64))
        optimizer = cls([p], momentum=0.9, **options)
        for p.grad in gradients:
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, atol=1e-12, rtol=0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.qkv = nn.Linear(8, 24)
        self.mlp = nn.Linear(24, 8)
        self.gate = nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)
        self.extra = nn.Parameter(torch.ones(8, 8))
        self.head = nn.Linear(8, 20, bias=False)
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(self.mlp(self.qkv(self.embed(x)).relu()))
        return self.head(x * self.gate(x).sum(-1, keepdim=True))


def routes(groups):
    return {route.name: (route.method, route.reason) for route in groups.routes}


def test_param_groups():
    net, x = Net(), torch.zeros(2, 5, dtype=torch.long)
    net.norm.requires_grad_(False)
    groups = gd.param_groups(net, x, rest={"lr": 3e-4})
    got = routes(groups)
    assert got["head.weight"] == ("adamw", "output layer")  # not the last linear one
    assert got["unused.weight"] == ("matrix", "linear")
    assert got["qkv.weight"] == ("matrix", "linear, fused, 3 parts")
    assert got["gate.weight"] == ("adamw", "router")
    assert got["extra"] == ("adamw", "unrecognised: Net")
    assert got["embed.weight"] == ("adamw", "embedding")
    assert got["norm.weight"] == ("-", "frozen")
    assert "unrecognised: Net" in repr(groups)
    assert routes(gd.param_groups(net))["unused.weight"][1].startswith("output layer (the last")
    assert net.training
    optimizer = gd.Muon(groups, lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    net(x).sum().backward()
    optimizer.step()
    schedule.step()
    rates = {group.get("algorithm"): group["lr"] for group in optimizer.param_groups}
    assert rates == {None: 0.01, "adamw": 1.5e-4}
    net.head.weight = net.embed.weight
    assert routes(gd.param_groups(net, x))["embed.weight"] == ("adamw", "embedding, tied")


def test_a_head_tied_to_a_later_embedding_is_an_embedding():
    net = nn.ModuleDict(
        {
            "head": nn.Linear(4, 6, bias=False),
            "mid": nn.Linear(4, 4),
            "embed": nn.Embedding(6, 4),
            "last": nn.Linear(4, 4),
        }
    )
    net.embed.weight = net.head.weight
    assert routes(gd.param_groups(net))["head.weight"] == ("adamw", "embedding, tied")


def test_nothing_to_route():
    with pytest.raises(ValueError, match="hidden matrix"):
        gd.param_groups(nn.Linear(3, 3), torch.zeros(1, 3))


def test_convolutions():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4, 2)
    )
    got = routes(gd.param_groups(net, torch.zeros(1, 3, 12, 12)))
    kinds = [got[f"{k}.weight"][1] for k in (0, 1, 2, 4)]
    assert kinds == ["patch embedding", "grouped or depthwise convolution", "convolution, flattened", "output layer"]


class Experts(nn.Module):
    is_transposed = True

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(normal(3, *s)) for s in ((4, 12), (6, 4)))
        self.gate_up_proj_bias = nn.Parameter(normal(3, 12))


class TopRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(3, 4))


def test_modules_of_every_kind():
    """What benchmarks/routing_architectures.py met in the wild, in small; without an example nothing is a head."""
    apart = Experts()
    apart.is_concatenated = False
    net = nn.ModuleDict(
        {
            "lstm": nn.LSTM(4, 6, proj_size=5),
            "cell": nn.GRUCell(4, 6),
            "plain": nn.RNN(4, 6),
            "back": nn.ConvTranspose2d(4, 6, 3),
            "conv1d": nn.Conv1d(4, 6, 3),
            "row": nn.Linear(4, 1),
            "column": nn.Linear(1, 4),
            "pixel": nn.Conv2d(1, 6, 1),
            "cross": nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            "qkv": nn.Linear(8, 12),
            "Wqkv": nn.Linear(4, 12),
            "gate": nn.Linear(8, 3),
            "up": nn.ModuleDict({"gate": nn.Linear(3, 8)}),
            "choice": TopRouter(),
            "experts": Experts(),
            "expert_parts": apart,
            "two": nn.Bilinear(3, 4, 5),
            "c_attn": type("Conv1D", (TopRouter,), {})(),
            "last": nn.Linear(4, 4),
        }
    )
    net.c_attn.weight = nn.Parameter(normal(4, 12))
    groups = gd.param_groups(net)
    got = routes(groups)
    assert {name: got[name][0] for name in got if not name.endswith("bias") and "bias" not in name} == {
        **dict.fromkeys(("lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_hr_l0"), "matrix"),
        **dict.fromkeys(("cell.weight_ih", "cell.weight_hh", "plain.weight_ih_l0", "plain.weight_hh_l0"), "matrix"),
        **dict.fromkeys(("conv1d.weight", "qkv.weight", "Wqkv.weight", "up.gate.weight", "c_attn.weight"), "matrix"),
        **{f"cross.{x}_proj_weight": "matrix" for x in "qkv"},
        "cross.out_proj.weight": "matrix",
        **{f"{x}.{y}_proj": "matrix" for x in ("experts", "expert_parts") for y in ("gate_up", "down")},
        **dict.fromkeys(("back.weight", "row.weight", "column.weight", "pixel.weight", "gate.weight"), "adamw"),
        **dict.fromkeys(("choice.weight", "two.weight", "last.weight"), "adamw"),
    }
    assert all(got[name] == ("adamw", "bias") for name in got if "bias" in name)
    assert got["back.weight"][1] == "transposed convolution"
    assert got["choice.weight"][1] == got["gate.weight"][1] == "router"
    assert got["row.weight"][1] == got["column.weight"][1] == got["pixel.weight"][1] == "one row or column"
    assert got["qkv.weight"][1] == "linear, fused in unequal parts? then pass split_sizes="
    assert got["two.weight"][1] == "unrecognised: Bilinear"

    def keys(name):
        group = next(x for x in groups if any(own == name for own, _ in x["params"]))
        return {key: value for key, value in group.items() if key != "params"}

    assert keys("lstm.weight_ih_l0") == keys("lstm.weight_hh_l0") == {"split_sizes": (6,) * 4}
    assert keys("cell.weight_hh") == {"split_sizes": (6,) * 3}
    assert keys("plain.weight_ih_l0") == keys("lstm.weight_hr_l0") == keys("qkv.weight") == {}
    assert keys("Wqkv.weight") == {"split_sizes": (4,) * 3}
    assert keys("c_attn.weight") == {"split_sizes": (4,) * 3, "transposed": True}
    assert keys("experts.gate_up_proj") == {"split_sizes": (6, 6), "transposed": True, "batched": True}
    assert keys("experts.down_proj") == {"transposed": True, "batched": True}
    assert keys("expert_parts.gate_up_proj") == {"transposed": True, "batched": True}
    assert keys("last.bias") == {"algorithm": "adamw", "weight_decay": 0.0}
    gd.Muon(groups)  # all of it is legal


def test_a_frozen_head_is_a_head():
    """As under LoRA: the walk stops at what is not trained too, and leaves it frozen."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).requires_grad_(False)
    net[0].requires_grad_(True)
    net.register_buffer("count", torch.zeros(1, dtype=torch.long))
    got = routes(gd.param_groups(net, torch.zeros(1, 4)))
    assert got["0.weight"] == ("matrix", "linear") and got["2.weight"] == ("-", "frozen")
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, False]
    assert net.training


def test_outputs_of_every_kind_lead_to_the_head():
    class Odd(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.body, self.head, self.aside, self.kind = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4), kind
            self.eval()
            self.body.train()

        def forward(self, x, scale=1.0):
            h = self.body(x).tanh() * scale
            y = torch.nn.functional.linear(h, self.head.weight.to(torch.bfloat16).to(x.dtype))
            return self.kind(y, self.aside(h))

    kinds = (
        lambda y, z: {"logits_a": y, "hidden": z},
        lambda y, z: (y, [None, 3]),
        lambda y, z: [{"states": y}],
        lambda y, z: y.view(-1).sum(),
    )
    for kind in kinds:
        for example in (torch.zeros(2, 4), (torch.zeros(2, 4), 2.0), {"x": torch.zeros(2, 4)}):
            net = Odd(kind)
            assert routes(gd.param_groups(net, example))["head.weight"] == ("adamw", "output layer")
            assert routes(gd.param_groups(net, example))["body.weight"] == ("matrix", "linear")
            if kind is kinds[0]:  # logits alone, where there are any
                assert routes(gd.param_groups(net, example))["aside.weight"] == ("matrix", "linear")
            assert (net.training, net.body.training, net.head.training) == (False, True, False)
    both = Odd(lambda y, z: (y, z))
    assert [x.reason for x in gd.param_groups(both, torch.zeros(2, 4)).routes].count("output layer") == 2


def test_looking_for_the_head_leaves_statistics_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    gd.param_groups(net, torch.ones(1, 4))  # in training mode a batch of one is an error
    assert not net[1].running_mean.any() and net[1].num_batches_tracked == 0


def test_rates_and_rest_reach_their_groups(capsys):
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    groups = gd.param_groups(net, torch.zeros(1, 4), lr=0.3, rest={"algorithm": "sgd", "lr": 0.1}, verbose=True)
    assert "output layer" in capsys.readouterr().out
    assert [x["lr"] for x in groups] == [0.3, 0.1, 0.1]
    assert [route.method for route in groups.routes] == ["matrix", "sgd", "sgd", "sgd"]


def test_one_optimizer_is_two():
    nets = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = normal(4, 6).float()
    one = [gd.Muon(gd.param_groups(nets[0], x, rest={"lr": 0.01}))]
    weights = [nets[1][0].weight, nets[1][2].weight]
    rest = [p for p in nets[1].parameters() if all(p is not w for w in weights)]
    flat, deep = ([p for p in rest if (p.dim() > 1) == keep] for keep in (False, True))
    two = [gd.Muon(weights), gd.AdamW([{"params": deep}, {"params": flat, "weight_decay": 0.0}], lr=0.01)]
    for _ in range(5):
        for net, optimizers in zip(nets, (one, two), strict=True):
            net.zero_grad()
            net(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (3, 4, 7)])
def test_the_gram_form_has_a_domain(shape):
    """Wide enough, and round-off times the square of the slope below .1."""

    def small(preset, dtype, shape=shape):
        G = normal(*shape, dtype=dtype)
        return muon._begin(G, table=PRESETS[preset], dtype=dtype)[1].numel() > 0

    assert small("polar_express", torch.float32) and small("keller", torch.float32)
    assert small("polar_express_8", torch.float64)
    assert not small("polar_express_8", torch.float32) and not small("deepseek", torch.float32)
    assert not any(small(preset, torch.bfloat16) for preset in PRESETS)
    assert not small("polar_express", torch.float64, (4, 6)) and small("polar_express", torch.float64, (4, 7))


def test_gram_is_the_iteration():
    for preset, table in PRESETS.items():
        G = normal(8, 30)
        X = G / G.norm()
        for a, b, c in table:
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        torch.testing.assert_close(polar(G, preset), X, atol=1e-5, rtol=0)
    assert math.prod(a for a, _, _ in PRESETS["polar_express"]) == pytest.approx(976, abs=1)
