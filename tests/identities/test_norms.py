"""Norms, duals and best steps by closed form and by ascent; the optimizers that are made of them."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import guided_descent as gd
from guided_descent.core import Optimizer
from guided_descent.norms import NORMS, Conv, Frobenius, Lines, Max, NormDescent, Nuclear, Spectral

F64 = torch.float64
ENGINES = ["loop", "foreach"]
svals = torch.linalg.svdvals


def normal(*shape, at=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(at), dtype=F64).to(dtype)


def polar(G):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


# BOOK's table: each norm of W (m, n), its dual and -lmo, written out with loops and numbers
M, N = 5, 3
TABLE = {
    "max": (lambda W: W.abs().max(), lambda G: G.abs().sum(), torch.sign),
    "frobenius": (lambda W: W.square().sum().sqrt(), lambda G: G.square().sum().sqrt(), lambda G: G / G.norm()),
    "operator": (lambda W: svals(W)[0], lambda G: svals(G).sum(), polar),
    "nuclear": (lambda W: svals(W).sum(), lambda G: svals(G)[0], None),
    "spectral": (
        lambda W: svals(W)[0] * math.sqrt(N / M),
        lambda G: svals(G).sum() * math.sqrt(M / N),
        lambda G: math.sqrt(M / N) * polar(G),
    ),
    "spectral_input": (
        lambda W: svals(W)[0] * math.sqrt(N / M),
        lambda G: svals(G).sum() * math.sqrt(M / N),
        lambda G: math.sqrt(M / N) * polar(G),
    ),
    "sign": (lambda W: N * W.abs().max(), lambda G: G.abs().sum() / N, lambda G: G.sign() / N),
    "row": (
        lambda W: math.sqrt(N) * max(row.norm() for row in W),
        lambda G: sum(row.norm() for row in G) / math.sqrt(N),
        lambda G: torch.stack([row / row.norm() / math.sqrt(N) for row in G]),
    ),
    "column": (
        lambda W: max(column.norm() for column in W.T) / math.sqrt(M),
        lambda G: sum(column.norm() for column in G.T) * math.sqrt(M),
        lambda G: torch.stack([math.sqrt(M) * column / column.norm() for column in G.T], 1),
    ),
    "embedding": (
        lambda W: max(row.norm() for row in W) / math.sqrt(N),
        lambda G: sum(row.norm() for row in G) * math.sqrt(N),
        lambda G: torch.stack([math.sqrt(N) * row / row.norm() for row in G]),
    ),
    "rms": (
        lambda W: W.square().mean().sqrt(),
        lambda G: math.sqrt(M * N) * G.norm(),
        lambda G: G / G.square().mean().sqrt(),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_by_closed_form(name):
    norm, dual, step = TABLE[name]
    for at in range(5):
        W, G = normal(M, N, at=at), normal(M, N, at=100 + at)
        torch.testing.assert_close(NORMS[name].norm(W), torch.as_tensor(norm(W), dtype=F64))
        torch.testing.assert_close(gd.dual_norm(G, name), torch.as_tensor(dual(G), dtype=F64))
        if step:
            torch.testing.assert_close(gd.lmo(G, name), -step(G))


def test_the_table_is_complete():
    assert {*TABLE, "conv"} == {*NORMS}


def test_an_input_layer_never_shrinks_its_step():
    G = normal(2, 8)
    torch.testing.assert_close(gd.lmo(G, "spectral_input"), -polar(G))
    torch.testing.assert_close(gd.lmo(G, "spectral"), -0.5 * polar(G))


def test_convolution():
    G = normal(4, 2, 3, 3)
    scale = math.sqrt(4 / 2) / 9
    flat = G.reshape(4, 18)
    torch.testing.assert_close(gd.lmo(G, "conv"), -scale * polar(flat).view(G.shape))
    torch.testing.assert_close(gd.dual_norm(G, "conv"), scale * svals(flat).sum())
    torch.testing.assert_close(NORMS["conv"].norm(G), svals(flat)[0] / scale)
    with pytest.raises(ValueError, match=r"\(18, 4\).*use norm='spectral'"):
        gd.lmo(flat.T, "conv")


def test_a_bias_is_a_column():
    b = normal(7)
    torch.testing.assert_close(gd.lmo(b, "rms"), -b / b.square().mean().sqrt())
    torch.testing.assert_close(gd.lmo(b, "column"), gd.lmo(b, "rms"))
    assert gd.lmo(torch.tensor(-3.0), "max") == 1 and gd.lmo(torch.tensor(-3.0), "max").shape == ()


def ascent(norm, G, steps=500):
    """The largest ratio that subgradient ascent finds."""
    Z, best = G.clone(), 0.0
    for t in range(steps):
        Z = (Z / norm.norm(Z)).requires_grad_()
        value = (Z * G).sum() / norm.norm(Z)
        best = max(best, value.item())
        (slope,) = torch.autograd.grad(value, Z)
        Z = (Z + 0.5 * 0.985**t * Z.norm() * slope / (slope.norm() + 1e-300)).detach()
    return best


@pytest.mark.parametrize("name", ["max", "frobenius", "operator", "nuclear", "row", "column", "conv"])
def test_the_dual_by_brute_force(name):
    G = normal(3, 2, 2, 2) if name == "conv" else normal(4, 3)
    dual = gd.dual_norm(G, name).item()
    assert 0.98 * dual < ascent(NORMS[name], G) <= dual * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(NORMS)), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.floats(0.01, 100))
def test_the_step_has_length_one_and_keeps_its_promise(name, m, n, at, size):
    G = size * (normal(m, n, 2, 3, at=at) if name == "conv" else normal(m, n, at=at))
    Z, norm = gd.lmo(G, name), NORMS[name]
    torch.testing.assert_close(norm.norm(Z), torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close((Z * G).sum(), -norm.dual(G))
    torch.testing.assert_close(gd.lmo(3.7 * G, name), Z)  # the length of a gradient is forgotten
    torch.testing.assert_close(gd.lmo(-G, name), -Z)
    other = normal(*G.shape, at=at + 1)  # Hölder
    assert (other * G).sum().abs() <= norm.norm(other) * norm.dual(G) * (1 + 1e-12)
    torch.testing.assert_close(norm.norm(-2.5 * other), 2.5 * norm.norm(other))
    assert norm.norm(G + other) <= (norm.norm(G) + norm.norm(other)) * (1 + 1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_zero_asks_for_no_step_and_extremes_for_one(name):
    shape = (3, 4, 2, 2) if name == "conv" else (3, 4)
    assert not gd.lmo(torch.zeros(shape), name).any()
    for dtype, size in [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.float16, 300.0), (torch.bfloat16, 1e30)]:
        G = normal(*shape, dtype=torch.float32)
        large = gd.lmo((G * size).to(dtype), name)
        assert large.dtype == dtype
        torch.testing.assert_close(large.float(), gd.lmo(G, name), rtol=0.03, atol=0.03)
    part = torch.zeros(shape)
    part[0, 0] = 1.0  # a row or column of zeros
    assert gd.lmo(part, name).isfinite().all()
    empty = torch.zeros(0, *shape[1:])
    assert gd.lmo(empty, name).shape == empty.shape


@pytest.mark.parametrize("name", [name for name in NORMS if name != "conv"])
def test_leading_dimensions_are_a_batch(name):
    G = normal(2, 3, 4, 5)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(gd.lmo(G, name)[i, j], gd.lmo(G[i, j], name))
        torch.testing.assert_close(gd.dual_norm(G, name)[i, j], gd.dual_norm(G[i, j], name))
        torch.testing.assert_close(NORMS[name].norm(G)[i, j], NORMS[name].norm(G[i, j]))


def test_a_scale_is_a_unit():
    G = normal(4, 6)
    for make in (Max, Frobenius, Spectral, Nuclear, lambda *s: Lines(-1, *s), lambda *s: Lines(-2, *s)):
        plain, scaled = make(), make(lambda m, n: m / n)
        torch.testing.assert_close(scaled.norm(G), plain.norm(G) * 6 / 4)
        torch.testing.assert_close(scaled.dual(G), plain.dual(G) * 4 / 6)
        torch.testing.assert_close(scaled.lmo(G), plain.lmo(G) * 4 / 6)
    assert isinstance(NORMS["conv"], Conv)
    torch.testing.assert_close(gd.lmo(G, Max()), gd.lmo(G, "max"))


def test_duals_of_duals():
    """Max and sum of entries, spectral and nuclear: each is the other's dual."""
    G = normal(4, 6)
    torch.testing.assert_close(Nuclear().dual(G), Spectral().norm(G))
    torch.testing.assert_close(Spectral().dual(G), Nuclear().norm(G))
    torch.testing.assert_close(Frobenius().dual(G), Frobenius().norm(G))


def test_unknown_names_are_refused():
    for call in (gd.lmo, gd.dual_norm):
        with pytest.raises(ValueError, match="norm='l1' is unknown; use one of 'max'"):
            call(normal(2, 2), "l1")
    with pytest.raises(ValueError, match="norm='l1' is unknown"):
        NormDescent([normal(2, 2).requires_grad_()], norm="l1")
    with pytest.raises(ValueError, match="flattened; use 'spectral'"):
        NormDescent([normal(2, 2).requires_grad_()], norm="conv")
    with pytest.raises(ValueError, match="scope='all' is unknown; use one of 'global', 'layer'"):
        gd.NormalizedSGD([normal(2, 2).requires_grad_()], scope="all")
    for method in (gd.Signum, NormDescent):
        with pytest.raises(ValueError, match="nesterov=True with momentum=0; pass momentum > 0"):
            method([normal(2, 2).requires_grad_()], momentum=0.0, nesterov=True)
    with pytest.raises(TypeError, match="SignSGD has no momentum="):
        gd.SignSGD([normal(2, 2).requires_grad_()], momentum=0.9)


# ---- optimizers

SHAPES = [(4, 3), (5,), (2, 3, 2, 2)]


def run(build, steps=60, gradient=None):
    params = [torch.nn.Parameter(normal(*shape, at=7)) for shape in SHAPES]
    optimizer = build(params)
    for t in range(steps):
        for k, p in enumerate(params):
            p.grad = normal(*p.shape, at=1000 * k + t)
        optimizer.step()
    return [p.detach() for p in params]


def alike(one, other, tolerance=1e-13):
    for x, y in zip(run(one), run(other), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.99), st.floats(0, 0.5))
def test_nesterovs_signum_is_lion(mu, decay):
    options = {"lr": 0.05, "weight_decay": decay, "engine": "loop"}
    alike(
        lambda p: gd.Signum(p, momentum=mu, nesterov=True, **options),
        lambda p: gd.Lion(p, betas=(mu**2, mu), **options),
    )
    alike(lambda p: gd.Signum(p, momentum=mu, **options), lambda p: gd.Lion(p, betas=(mu, mu), **options))


def test_members_of_the_template():
    options = {"lr": 0.05, "engine": "loop", "weight_decay": 0.2}
    for mu in (0.0, 0.9):

        def template(norm, mu=mu):
            return lambda p: NormDescent(p, norm=norm, momentum=mu, **options)

        alike(template("max"), lambda p, mu=mu: gd.Signum(p, momentum=mu, **options))
        alike(template("frobenius"), lambda p, mu=mu: gd.NormalizedSGD(p, momentum=mu, scope="layer", **options))
    alike(template("max"), lambda p: gd.Signum(p, momentum=0.9, **options))
    alike(
        lambda p: NormDescent(p, norm="max", nesterov=True, **options), lambda p: gd.Signum(p, nesterov=True, **options)
    )
    alike(lambda p: gd.Signum(p, momentum=0.0, **options), lambda p: gd.SignSGD(p, **options))


def test_spectral_is_muon_and_scion():
    def matrices(method):
        p = torch.nn.Parameter(normal(6, 4))
        optimizer = method([p])
        for t in range(30):
            p.grad = normal(6, 4, at=t)
            optimizer.step()
        return p.detach()

    options = {"lr": 0.05, "momentum": 0.9, "engine": "loop"}
    for norm, scale in (("operator", "none"), ("spectral", "scion"), ("spectral_input", "keller")):
        ours = matrices(lambda p, norm=norm: NormDescent(p, norm=norm, nesterov=True, weight_decay=0.1, **options))
        muon = matrices(lambda p, scale=scale: gd.Muon(p, scale=scale, preset="svd", weight_decay=0.1, **options))
        torch.testing.assert_close(ours, muon, rtol=1e-12, atol=1e-12)
    for norm in ("spectral", "sign"):
        ours = matrices(lambda p, norm=norm: NormDescent(p, norm=norm, **options))
        scion = {"norm": norm, "radius": 1.0, "constrained": False, "preset": "svd"}
        scion = matrices(lambda p, scion=scion: gd.Scion(p, **options, **scion))
        torch.testing.assert_close(ours, scion, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mu", [0.0, 0.8])
def test_normalized_steps_have_length_lr(scope, engine, mu):
    shapes = [*SHAPES, (), (0,)]
    params = [torch.nn.Parameter(normal(*shape)) for shape in shapes]
    first, second = {"params": params[:2]}, {"params": params[2:], "momentum": mu / 2}
    optimizer = gd.NormalizedSGD([first, second], lr=0.1, momentum=mu, scope=scope, engine=engine)
    memory = [torch.zeros_like(p) for p in params]
    for t in range(4):
        before = [p.detach().clone() for p in params]
        for k, p in enumerate(params):
            p.grad = 10.0**k * normal(*p.shape, at=10 * t + k)
            weight = mu if k < 2 else mu / 2
            memory[k] = weight * memory[k] + (1 - weight) * p.grad
        optimizer.step()
        total = torch.stack([m.norm() for m in memory]).norm()
        for p, old, m in zip(params, before, memory, strict=True):
            length = total if scope == "global" else m.norm()
            expected = old - 0.1 * m / length if m.numel() else old
            torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_normalized_zero_tiny_and_huge(scope, dtype):
    for size in (0.0, 1.0, 1e-6, 3e4):
        p = torch.nn.Parameter(torch.zeros(300, dtype=dtype))
        p.grad = torch.full((300,), size, dtype=dtype)
        gd.NormalizedSGD([p], lr=1.0, scope=scope, engine="loop").step()
        expected = torch.full((300,), -(300**-0.5) if size else 0.0)
        torch.testing.assert_close(p.detach().float(), expected, rtol=0.02, atol=0)
    if dtype.itemsize >= 4:
        for size in (1e-30, 1e30):
            p = torch.nn.Parameter(torch.zeros(300, dtype=dtype))
            p.grad = torch.full((300,), size, dtype=dtype)
            gd.NormalizedSGD([p], lr=1.0, scope=scope, engine="loop").step()
            torch.testing.assert_close(p.detach().norm().float(), torch.tensor(1.0))


def test_normalized_scopes_mix_and_maximize_climbs():
    params = [torch.nn.Parameter(normal(3, at=k)) for k in range(3)]
    groups = [{"params": params[:1], "scope": "layer"}, {"params": params[1:]}]
    for maximize in (False, True):
        optimizer = gd.NormalizedSGD(groups, lr=0.5, momentum=0.9, maximize=maximize)
        for t in range(3):  # the length is that of a memory with the right sign, too
            before = [p.detach().clone() for p in params]
            for k, p in enumerate(params):
                p.grad = normal(3, at=10 * t + k)
            optimizer.step()
            steps = [p.detach() - old for p, old in zip(params, before, strict=True)]
            assert math.isclose(steps[0].norm(), 0.5) and math.isclose(torch.stack(steps[1:]).norm(), 0.5)
            sign = 1 if maximize else -1
            assert t or all(sign * (s @ p.grad) > 0 for s, p in zip(steps, params, strict=True))


class Reads(TorchDispatchMode):
    """Counts what a host has to wait for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_step_reads_nothing_back(scope):
    params = [torch.nn.Parameter(normal(*shape)) for shape in SHAPES]
    optimizer = gd.NormalizedSGD(params, lr=torch.tensor(0.1), scope=scope, engine="loop")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with Reads() as reads:
        optimizer.step()
    assert reads.count == 0


@pytest.mark.parametrize("method", [gd.SignSGD, gd.Signum, gd.Lion], ids=lambda x: x.__name__)
def test_signs_do_not_see_the_size_of_gradients(method):
    def ends(size):
        p = torch.nn.Parameter(torch.zeros(20, dtype=F64))
        optimizer = method([p], lr=0.1, engine="loop")
        for t in range(30):
            p.grad = size * normal(20, at=t)
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(ends(1.0), ends(2.0**-40), rtol=0, atol=0)
    assert torch.equal((ends(1.0) / 0.1).round().abs() % 2, torch.zeros(20, dtype=F64))  # 30 signs


@pytest.mark.parametrize("method", [gd.SignSGD, gd.Signum, gd.Lion], ids=lambda x: x.__name__)
def test_what_is_not_finite_stays_where_it_is_said_to(method):
    """A NaN stands still and an infinity has a sign; skip leaves no trace of either."""
    for nonfinite in ("propagate", "skip"):
        p = torch.nn.Parameter(torch.zeros(3))
        optimizer = method([p], lr=0.1, engine="loop", nonfinite=nonfinite)
        p.grad = torch.tensor([float("nan"), float("inf"), 1.0])
        optimizer.step()
        expected = [0.0, -0.1, -0.1] if nonfinite == "propagate" else [0.0, 0.0, 0.0]
        torch.testing.assert_close(p.detach(), torch.tensor(expected))
        p.grad = -torch.ones(3)
        optimizer.step()
        if nonfinite == "skip":
            torch.testing.assert_close(p.detach(), torch.full((3,), 0.1))


@pytest.mark.parametrize("build", [gd.Lion, gd.Signum, NormDescent], ids=lambda x: x.__name__)
def test_decay_is_a_ball(build):
    norm = NORMS["spectral" if build is NormDescent else "max"]
    for at in range(3):
        p = torch.nn.Parameter(5 * normal(4, 3, at=at))
        optimizer = build([p], lr=0.1, weight_decay=2.0, engine="loop")
        start = norm.norm(p.detach())
        for t in range(1, 80):
            p.grad = normal(4, 3, at=100 * at + t)
            optimizer.step()
            bound = 0.5 + 0.8**t * (start - 0.5)
            assert norm.norm(p.detach()) <= bound * (1 + 1e-12)
        assert norm.norm(p.detach()) > 0.05


@pytest.mark.parametrize("build", [gd.Signum, gd.Lion, gd.SignSGD, gd.NormalizedSGD, NormDescent])
def test_state(build):
    p = torch.nn.Parameter(normal(4, 3))
    p.grad = normal(4, 3, at=1)
    optimizer: Optimizer = build([p])
    optimizer.step()
    state = {name: x.shape for name, x in optimizer.state[p].items()}
    expected = {gd.SignSGD: {}, gd.Lion: {"exp_avg": (4, 3)}}
    assert state == expected.get(build, {"momentum_buffer": (4, 3)})
    copied = copy.deepcopy(optimizer)
    q = copied.param_groups[0]["params"][0]
    for x, o in ((p, optimizer), (q, copied)):
        x.grad = normal(4, 3, at=2)
        o.step()
    assert torch.equal(p, q)


def test_the_memory_moves_after_lions_step():
    """The first step sees the gradient alone, and the memory keeps 1 − β₂ of it."""
    p = torch.nn.Parameter(torch.zeros(2, dtype=F64))
    optimizer = gd.Lion([p], lr=1.0, betas=(0.5, 0.75), engine="loop")
    p.grad = torch.tensor([4.0, -4.0], dtype=F64)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.tensor([1.0, -1.0], dtype=F64))
    p.grad = torch.tensor([-0.9, -1.1], dtype=F64)  # .5 · 1 − .5 · .9 > 0
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-2.0, 2.0], dtype=F64))


# ---- what the chapter proves


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(0, 99))
def test_curvature_of_the_cube_is_at_least_the_trace(d, at):
    X = normal(d, d, at=at)
    H = X @ X.T
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * d)
    values = ((corners @ H) * corners).sum(1)
    torch.testing.assert_close(values.mean(), H.trace())
    assert values.max() >= H.trace() * (1 - 1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(0, 99))
def test_von_neumann(n, at):
    A, B = (X @ X.T for X in (normal(n, n, at=at), normal(n, n, at=at + 100)))
    best = (torch.linalg.eigvalsh(A) * torch.linalg.eigvalsh(B)).sum()
    for k in range(20):
        Z = gd.lmo(normal(n, n, at=k), "operator")
        assert (Z * (B @ Z @ A)).sum() <= best * (1 + 1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99))
def test_frequencies_that_columns_do_not_see(at):
    G, D = normal(4, 3, at=at), torch.rand(3, generator=torch.Generator().manual_seed(at), dtype=F64) + 0.01
    for name in ("max", "column", "sign"):
        torch.testing.assert_close(gd.lmo(G * D, name), gd.lmo(G, name))
    torch.testing.assert_close(gd.lmo((G * D).T, "embedding"), gd.lmo(G.T, "embedding"))


def test_the_length_counts_no_gradient_of_another_algorithm():
    w, b = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = gd.NormalizedSGD([{"params": [w], "lr": 0.1}, {"params": [b], "algorithm": "adamw"}])
    for _ in range(3):
        before = w.detach().clone()
        w.grad, b.grad = torch.ones_like(w), 100 * torch.ones_like(b)
        optimizer.step()
        assert (w - before).norm().item() == pytest.approx(0.1)
