"""LARS, LAMB, CLARS and clipping: closed forms, invariances, per-example norms; fp64."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import guided_descent as gd
from guided_descent.engines import Batch
from guided_descent.large_batch import trust_ratio
from guided_descent.noise import per_example_gradients

D = torch.float64
ENGINES = ["auto", "loop", "foreach", "fused", "compile"]
SHAPES = [(4, 3), (5,), (2, 3, 2), (3, 3)]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def stepped(build, shapes=SHAPES, steps=3, gradient=lambda p, g: g, start=lambda p: p):
    params = [start(random(*shape, seed=i)).requires_grad_() for i, shape in enumerate(shapes)]
    optimizer = build(params)
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = gradient(p.detach(), random(*p.shape, seed=100 + 10 * t + i)).clone()
        optimizer.step()
    return [p.detach() for p in params]


# the ratio


def test_a_zero_norm_has_ratio_one_and_a_batch_has_one_for_each():
    w, u = torch.tensor([0.0, 2.0, 0.0, 3.0]), torch.tensor([5.0, 0.0, 0.0, 4.0])
    close(trust_ratio(w, u, trust=0.1, decay=0.5, eps=0.25), torch.tensor([1.0, 1.0, 1.0, 0.3 / 5.75]))
    found = trust_ratio(Batch(list(w.unbind())), Batch(list(u.unbind())), trust=0.1)
    close(torch.stack(found.tensors), torch.tensor([1.0, 1.0, 1.0, 0.075]))


@pytest.mark.parametrize("engine", ENGINES[:4])
def test_a_layer_at_zero_leaves_it_and_a_zero_gradient_moves_nothing(engine):
    zero, still = torch.zeros(3, 2).requires_grad_(), random(3, 2).requires_grad_()
    zero.grad, still.grad = random(3, 2, seed=1), torch.zeros(3, 2)
    before = still.detach().clone()
    gd.LARS([zero, still], lr=0.1, momentum=0.0, engine=engine).step()
    close(zero.detach(), -0.1 * zero.grad)
    assert torch.equal(still, before)
    zero = torch.zeros(3, 2).requires_grad_()
    zero.grad = random(3, 2, seed=1)
    gd.LAMB([zero], lr=0.1, weight_decay=0.0, eps=0.0, engine=engine).step()
    close(zero.detach(), -0.1 * zero.grad.sign())


# LARS


@given(st.floats(1e-3, 3), st.integers(0, 1000), st.floats(-6, 6))
@settings(max_examples=40, deadline=None)
def test_a_step_is_an_angle(eta, seed, scale):
    w = random(4, 3, seed=seed).to(D)
    g = random(4, 3, seed=seed + 1).to(D)
    g = 10**scale * (g - (g * w).sum() / (w * w).sum() * w)
    p = w.clone().requires_grad_()
    p.grad = g
    gd.LARS([p], lr=eta, momentum=0.0, trust=1.0, engine="loop").step()
    after = p.detach()
    close(after.norm(), (1 + eta**2) ** 0.5 * w.norm(), 1e-10)
    cosine, sine = (after * w).sum(), (after.norm() ** 2 * w.norm() ** 2 - (after * w).sum() ** 2).sqrt()
    assert math.isclose(math.atan2(sine, cosine), math.atan(eta), rel_tol=1e-6)
    r = w.norm()
    q = w - eta * r * g / g.norm()
    close(gd.muon.on_sphere(w, g, r, lr=eta), r * q / q.norm(), 1e-10)
    close(after / (1 + eta**2) ** 0.5, gd.muon.on_sphere(w, g, r, lr=eta), 1e-10)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("engine", ENGINES[:4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_in_formulas(engine, inside, momentum):
    """Vectors by plain SGD; the rate inside the buffer or outside; a schedule tells the two apart."""
    mu, lam, tau, eps = momentum, 0.1, 0.02, 0.3
    params = [random(*s, seed=i).requires_grad_() for i, s in enumerate(SHAPES)]
    x, m = [p.detach().clone() for p in params], [0.0] * len(params)
    options = {"momentum": mu, "weight_decay": lam, "trust": tau, "eps": eps, "lr_in_buffer": inside}
    optimizer = gd.LARS(params, lr=1.0, engine=engine, **options)
    for t, lr in enumerate((0.5, 0.1, 0.3)):
        optimizer.param_groups[0]["lr"] = lr
        for i, p in enumerate(params):
            p.grad = random(*p.shape, seed=50 + 10 * t + i)
            r = tau * x[i].norm() / (p.grad.norm() + lam * x[i].norm() + eps) if p.dim() > 1 else 1.0
            d = r * (p.grad + lam * x[i])
            m[i] = mu * m[i] + (lr * d if inside else d)
            x[i] = x[i] - (m[i] if inside else lr * m[i])
        optimizer.step()
    close([p.detach() for p in params], x)


@pytest.mark.parametrize("cls", [gd.LARS, gd.LAMB])
@pytest.mark.parametrize("engine", ENGINES[:4])
def test_maximize_negates_the_gradient_and_not_the_decay(cls, engine):
    options = {"lr": 0.1, "weight_decay": 0.2, "engine": engine}
    up = stepped(lambda p: cls(p, maximize=True, **options))
    close(up, stepped(lambda p: cls(p, **options), gradient=lambda p, g: -g))


@pytest.mark.parametrize("engine", ENGINES[:4])
def test_all_may_be_adapted(engine):
    options = {"lr": 0.1, "momentum": 0.0, "trust": 0.5, "engine": engine}
    (vector,) = stepped(lambda p: gd.LARS(p, adapt_vectors=True, **options), [(5,)], 1)
    w, g = random(5), random(5, seed=100)
    close(vector, w - 0.05 * w.norm() / g.norm() * g)
    (plain,) = stepped(lambda p: gd.LARS(p, **options), [(5,)], 1)
    close(plain, w - 0.1 * g)


@pytest.mark.parametrize(
    "build", [lambda p: gd.LARS(p, lr=0.1, trust=1.0), lambda p: gd.LAMB(p, lr=0.1, weight_decay=0.0, eps=0.0)]
)
@pytest.mark.parametrize("a", [1e-3, 7.0])
def test_units_of_a_layer_do_not_matter(build, a):
    shapes = [(4, 3), (3, 3)]
    plain = stepped(build, shapes, 10, gradient=lambda p, g: p.sin() + g)
    scaled = stepped(build, shapes, 10, start=lambda p: a * p, gradient=lambda p, g: ((p / a).sin() + g) / a)
    close([x / a for x in scaled], plain, 1e-10)


# LAMB


@pytest.mark.parametrize("engine", ENGINES[:4])
def test_lamb_moves_vectors_as_adamw_and_matrices_by_their_length(engine):
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2, "engine": engine}
    vectors = stepped(lambda p: gd.LAMB(p, **options), [(5,), (3,)])
    close(vectors, stepped(lambda p: gd.AdamW(p, **{**options, "engine": "loop"}), [(5,), (3,)]))
    (w,) = stepped(lambda p: gd.LAMB(p, **options), [(4, 3)], 1)
    before = random(4, 3)
    close((w - before).norm(), 0.1 * before.norm())
    (u,) = stepped(lambda p: gd.AdamW(p, **{**options, "engine": "loop"}), [(4, 3)], 1)
    close((w - before) / (w - before).norm(), (u - before) / (u - before).norm())


@pytest.mark.parametrize("engine", ENGINES[:4])
@pytest.mark.parametrize("clamp", [(0.0, 0.5), (100.0, 200.0), (0.0, math.inf)])
@pytest.mark.parametrize("corrected", [True, False])
def test_lamb_in_formulas(engine, clamp, corrected):
    b1, b2, eps, lam, lr = 0.8, 0.95, 1e-2, 0.1, 0.05
    options = {"lr": lr, "betas": (b1, b2), "eps": eps, "weight_decay": lam, "engine": engine}
    found = stepped(lambda p: gd.LAMB(p, clamp=clamp, bias_correction=corrected, **options), [(4, 3)])
    x, m, v = random(4, 3), 0.0, 0.0
    for t in range(3):
        g = random(4, 3, seed=100 + 10 * t)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        c1, c2 = (1 - b1 ** (t + 1), 1 - b2 ** (t + 1)) if corrected else (1.0, 1.0)
        u = (m / c1) / ((v / c2).sqrt() + eps) + lam * x
        x = x - lr * min(max(x.norm(), clamp[0]), clamp[1]) / u.norm() * u
    close(found, [x])


@pytest.mark.parametrize("clamp", [(2.0, 1.0), (1.0,), (-1.0, 2.0)])
def test_a_bad_clamp_is_refused(clamp):
    with pytest.raises(ValueError, match=r"clamp="):
        gd.LAMB([torch.ones(2, 2, requires_grad=True)], clamp=clamp)
    with pytest.raises(ValueError, match="lr_in_buffer='yes' is unknown"):
        gd.LARS([torch.ones(2, 2, requires_grad=True)], lr_in_buffer="yes")


@pytest.mark.parametrize("cls", [gd.LARS, gd.LAMB])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"adapt_vectors": True}])
def test_engines_agree(cls, options, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    expected = stepped(lambda p: cls(p, lr=0.1, engine="loop", **options), steps=5)
    for engine in ENGINES:
        for lr in (0.1, torch.tensor(0.1)):
            build = functools.partial(cls, lr=lr, engine=engine, **options)
            close(stepped(build, steps=5), expected)


@pytest.mark.parametrize("cls", [gd.LARS, gd.LAMB])
def test_norms_of_half_precision_do_not_overflow(cls):
    for dtype in (torch.float16, torch.bfloat16):
        for engine in ("loop", "foreach"):
            p = torch.full((300, 300), 250.0, dtype=dtype).requires_grad_()
            p.grad = torch.full_like(p, 250.0)  # its norm, 75000, is no half-precision number
            options = {"trust": 1.0} if cls is gd.LARS else {"weight_decay": 0.0}
            cls([p], lr=0.1, engine=engine, **options).step()
            close(p.detach(), torch.full_like(p, 225.0), 0.01)


# per-example norms


class Blocks(nn.Module):
    """Tokens through an embedding, a norm, attention, a convolution and a head."""

    def __init__(self, places=6, kernel=3):
        super().__init__()
        self.table, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.mix, self.conv = nn.MultiheadAttention(4, 2, batch_first=True), nn.Conv1d(4, 3, kernel)
        self.head = nn.Linear(3, 2)

    def forward(self, tokens):
        x = self.norm(self.table(tokens))
        x = x + self.mix(x, x, x, need_weights=False)[0]
        return self.head(self.conv(x.mT).tanh().mean(-1))


def example_norms(model, x, y):
    """The norm of each example's gradient, one row for each parameter, the slow way."""
    rows = []
    for i in range(len(x)):
        model.zero_grad()
        cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        rows.append(torch.stack([p.grad.norm() for p in model.parameters()]))
    model.zero_grad()
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("places", "kernel"), [(3, 2), (12, 3), (4, 4)])
def test_norms_of_every_layer_are_those_of_its_examples(places, kernel):
    torch.manual_seed(0)
    model = Blocks(places, kernel)
    x, y = torch.randint(5, (7, places)), torch.randint(2, (7,))
    norms = example_norms(model, x, y)
    meter = gd.CLARS(model, adapt_vectors=True)
    cross_entropy(model(x), y).backward()
    found = meter.coherence()
    assert len(found) == len(norms)
    for p, nu in zip(model.parameters(), norms.mean(1), strict=True):
        close(found[p] * nu, p.grad.norm(), 1e-10)
        assert found[p] <= 1 + 1e-12


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def data(n=9):
    return random(n, 4, seed=5), torch.randint(3, (n,), generator=torch.Generator().manual_seed(6))


def trained(backward, steps=3, build=lambda model: gd.CLARS(model, lr=0.2, trust=0.5, weight_decay=0.1)):
    model = network()
    optimizer = build(model)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def plain(model):
    x, y = data()
    cross_entropy(model(x), y).backward()


def test_the_rule_of_clars_with_per_example_gradients():
    model, (x, y) = network(), data()
    params = [p.detach().clone() for p in model.parameters()]
    rows = per_example_gradients(cross_entropy, model, (x, y)).split([p.numel() for p in params], 1)
    expected = []
    for p, g in zip(params, rows, strict=True):
        r = 0.5 * p.norm() / (g.norm(dim=1).mean() + 0.1 * p.norm()) if p.dim() > 1 else 1.0
        expected.append(p - 0.2 * r * (g.mean(0).view_as(p) + 0.1 * p))
    close(trained(plain, 1), expected)


def test_one_example_and_equal_examples_make_it_lars():
    x, y = data(1)
    for k in (1, 4):

        def same(model, k=k):
            cross_entropy(model(x.expand(k, 4)), y.expand(k)).backward()

        options = {"lr": 0.2, "trust": 0.5, "weight_decay": 0.1, "eps": 0.3, "lr_in_buffer": True}
        a = trained(same, build=functools.partial(gd.CLARS, **options))
        b = trained(same, build=lambda model, o=options: gd.LARS(model.parameters(), **o))
        close(a, b)


def test_sums_passes_and_maximize():
    x, y = data(8)

    def free(model, **options):
        return gd.CLARS(model, lr=0.2, trust=0.5, adapt_vectors=True, **options)

    mean = trained(lambda model: cross_entropy(model(x), y).backward(), build=free)
    close(trained(lambda model: cross_entropy(model(x), y, reduction="sum").backward(), build=free), mean)
    down = trained(plain)

    def up(model):
        return gd.CLARS(model, lr=0.2, trust=0.5, weight_decay=0.1, maximize=True)

    def negative(model):
        return (-cross_entropy(model(data()[0]), data()[1])).backward()

    close(trained(negative, build=up), down)

    def halves(model):
        for part in (slice(0, 4), slice(4, 8)):
            (cross_entropy(model(x[part]), y[part]) / 2).backward()

    close(trained(halves, build=free), mean)


def test_what_was_discarded_counts_no_longer():
    def twice(model):
        x, y = data(4)
        (9 * cross_entropy(model(x), y)).backward()
        model.zero_grad()  # not the optimizer's
        plain(model)

    close(trained(twice), trained(plain))

    def looked(model):
        with torch.no_grad():
            model(data(3)[0])
        plain(model)
        model(data(3)[0])

    close(trained(looked), trained(plain))


def test_gradients_set_to_zero_leave_nothing_behind():
    model = network()
    optimizer = gd.CLARS(model, lr=0.2, trust=0.5, weight_decay=0.1)
    for _ in range(3):
        model.zero_grad(set_to_none=False)  # not None, and not by the optimizer
        plain(model)
        optimizer.step()
    close([p.detach() for p in model.parameters()], trained(plain))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_gradient_scaler(told, unscaled):
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    options = {"grad_scaler": scaler} if told else {}
    optimizer = gd.CLARS(model, lr=0.2, trust=0.5, weight_decay=0.1, **options)
    for t in range(4):
        optimizer.zero_grad()
        x, y = data()
        scaler.scale(cross_entropy(model(x), y) * (math.inf if t == 1 else 1)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        if unscaled and not told and t != 1:
            with pytest.raises(RuntimeError, match="build it with grad_scaler="):
                scaler.step(optimizer)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            return
        scaler.step(optimizer)
        if t == 1:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        scaler.update()
    close([p.detach() for p in model.parameters()], trained(plain), 1e-9)


def test_a_group_may_go_by_another_algorithm_and_be_added_later():
    model = network()
    head = list(model[2].parameters())
    optimizer = gd.CLARS(model, lr=0.2, params=[{"params": head, "algorithm": "sgd", "lr": 0.1}])
    optimizer.add_param_group({"params": list(model[0].parameters())})
    before = model[2].weight.detach().clone()
    plain(model)
    optimizer.step()
    close(model[2].weight.detach(), before - 0.1 * model[2].weight.grad)
    close(model[0].weight.detach(), trained(plain, 1, lambda m: gd.CLARS(m, lr=0.2))[0])


def test_refusals():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.odd = nn.Linear(4, 3), nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            return self.inner(x) @ self.odd

    with pytest.raises(ValueError, match=r"'odd', \(3, 3\), lies in no layer .* algorithm='adamw'"):
        gd.CLARS(Odd())
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"is an embedding and more; put it into a group"):
        gd.CLARS(tied)
    with pytest.raises(TypeError, match=r"pass the nn.Module"):
        gd.CLARS(network().parameters())
    with pytest.raises(ValueError, match="compiled, where CLARS sees no layer"):
        gd.CLARS(torch.compile(network()))
    model = network()
    optimizer = gd.CLARS(model)
    x, y = data()
    cross_entropy(nn.functional.linear(x, model[0].weight), y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="saw no pass of it .* call the model, as model"):
        optimizer.step()
    close(dict(model.state_dict()), dict(before), 1e-300)


# clipping


@given(st.floats(0.01, 100), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_clipping_by_norm_is_torchs_without_its_slack(limit, seed):
    ours = [random(4, 3, seed=seed).to(D).requires_grad_(), torch.zeros(2, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    ours[0].grad, theirs[0].grad = (random(4, 3, seed=seed + 1).to(D) for _ in "ab")
    before = ours[0].grad.clone()
    total = gd.clip_by_norm_(iter(ours), limit)
    close(total, torch.nn.utils.clip_grad_norm_(theirs, limit))
    close(ours[0].grad, theirs[0].grad, 1e-3)
    if total <= limit:
        assert torch.equal(ours[0].grad, before)
    else:
        close(ours[0].grad.norm(), torch.tensor(limit, dtype=D))


def test_clipping_leaves_what_is_not_finite_and_refuses_what_is_sparse():
    for bad in (math.inf, math.nan):
        p = torch.ones(2, 2).requires_grad_()
        p.grad = torch.tensor([[1.0, bad], [2.0, 3.0]])
        before = p.grad.clone()
        gd.clip_by_norm_(p, 1.0)
        torch.testing.assert_close(p.grad, before, rtol=0, atol=0, equal_nan=True)
        gd.adaptive_clip_(p, 1e-3)
        torch.testing.assert_close(p.grad[0], before[0], rtol=0, atol=0, equal_nan=True)
        close(p.grad[1].norm(), torch.tensor(1e-3 * 2**0.5))
    p = torch.ones(2, 2).requires_grad_()
    p.grad = torch.ones(2, 2).to_sparse()
    for clip in (lambda: gd.clip_by_norm_([p], 1.0), lambda: gd.adaptive_clip_([p])):
        with pytest.raises(ValueError, match=r"\(2, 2\) has a gradient of layout .* use a dense"):
            clip()
    for call, name in ((lambda: gd.clip_by_norm_([p], 0.0), "max_norm"), (lambda: gd.adaptive_clip_([p], -1), "clipp")):
        with pytest.raises(ValueError, match=rf"{name}.* pass a number in \(0, inf\)"):
            call()
    assert gd.clip_by_norm_([], 1.0) == 0
    half = torch.ones(300, 300, dtype=torch.float16).requires_grad_()
    half.grad = torch.full_like(half, 250.0)
    assert gd.clip_by_norm_(half, 300.0).item() == pytest.approx(75000, rel=1e-3)
    close(half.grad, torch.full_like(half, 1.0), 1e-2)


def test_adaptive_clipping_row_by_row():
    w, b, k = (random(*s).requires_grad_() for s in ((3, 4), (5,), (3, 2, 2, 2)))
    w.grad, b.grad, k.grad = random(3, 4, seed=1), random(5, seed=2), random(3, 2, 2, 2, seed=3)
    with torch.no_grad():
        w[2] = 0
    before = [p.grad.clone() for p in (w, b, k)]
    gd.adaptive_clip_([w, b, k], 0.1, eps=0.02)
    for p, g in zip((w, b, k), before, strict=True):
        pairs = (
            zip(p.detach().flatten(1), g.flatten(1), p.grad.flatten(1), strict=True)
            if p.dim() > 1
            else [(p.detach(), g, p.grad)]
        )
        for row, given_row, found in pairs:
            limit = 0.1 * max(row.norm(), 0.02)
            close(found, given_row * min(1.0, limit / given_row.norm()))
