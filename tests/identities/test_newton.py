"""Chapter 06: what Newton's method and its relatives promise, as mathematics and as optimizers."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import guided_descent as gd
from guided_descent.newton import QuasiNewton
from guided_descent.problems import LogisticRegression, Problem, Quadratic, Rosenbrock, random_rotation
from guided_descent.vector import Objective

METHODS = {"Newton": gd.Newton, "NewtonCG": gd.NewtonCG, "BFGS": gd.BFGS, "LBFGS": gd.LBFGS}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
learns = pytest.mark.parametrize("method", [gd.BFGS, gd.LBFGS], ids=["BFGS", "LBFGS"])
differentiates = pytest.mark.parametrize("method", [gd.Newton, gd.NewtonCG], ids=["Newton", "NewtonCG"])
seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def spectrum(*args):
    return torch.logspace(*args, dtype=torch.float64)


def closure_of(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        if not optimizer.differentiates:
            value.backward()
        return value

    return closure


def run(problem, method, steps, start=None, **options):
    x = (problem.start if start is None else start).clone().requires_grad_()
    optimizer, path = method([x], **options), [x.detach().clone()]
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, lambda: problem.loss(x)))
        path.append(x.detach().clone())
    return torch.stack(path), optimizer


class Function(Problem):
    def __init__(self, loss, start):
        self.function, self.start = loss, torch.as_tensor(start, dtype=torch.float64)

    def loss(self, x):
        return self.function(x)


def transformed(problem, T):
    return Function(lambda y: problem.loss(T @ y), torch.linalg.solve(T, problem.start))


# --- Newton ---------------------------------------------------------------------------------------------------------


@few
@given(seeds, st.integers(1, 12), st.floats(0, 6))
def test_newton_solves_a_quadratic_at_once(seed, d, power):
    bowl = Quadratic(spectrum(power, 0, d), random_rotation(d, generator(seed)), randn(d, seed=seed))
    path, _ = run(bowl, gd.Newton, 1)
    torch.testing.assert_close(path[1], bowl.minimizer, rtol=1e-8, atol=1e-8)


@few
@given(seeds)
def test_newton_is_affinely_invariant(seed):
    near = torch.tensor([1.2, 1.3, 1.6, 2.4], dtype=torch.float64)  # where the Hessian is positive
    banana = Rosenbrock(4)
    banana.start = near
    T = randn(4, 4, seed=seed) + 3 * torch.eye(4, dtype=torch.float64)
    if torch.linalg.cond(T) > 100:
        return
    there = transformed(banana, T)
    for line_search_fn in (None, "strong_wolfe"):
        xs, _ = run(banana, gd.Newton, 6, line_search_fn=line_search_fn)
        ys, _ = run(there, gd.Newton, 6, line_search_fn=line_search_fn)
        torch.testing.assert_close(ys @ T.T, xs, rtol=1e-6, atol=1e-6)


@few
@given(seeds)
def test_the_damped_methods_do_not_notice_a_rotation(seed):
    banana, Q = Rosenbrock(4), random_rotation(4, generator(seed))
    there = transformed(banana, Q)
    for method, count, options in ((gd.Newton, 4, {"damping": 0.5}), (gd.NewtonCG, 6, {})):
        xs, _ = run(banana, method, count, **options)
        ys, _ = run(there, method, count, **options)
        torch.testing.assert_close(ys @ Q.T, xs, rtol=1e-6, atol=1e-6)


@few
@given(st.floats(0.02, 1.98))
def test_the_error_is_squared(x):
    path, _ = run(Function(lambda x: (x - x.log()).sum(), [x]), gd.Newton, 5, line_search_fn=None)
    expected = (1 - x) ** (2 ** torch.arange(6, dtype=torch.float64))
    torch.testing.assert_close(1 - path[:, 0], expected, rtol=1e-9, atol=1e-12)


@few
@given(seeds, st.floats(0, 10))
def test_the_factors_along_eigenvectors(seed, damping):
    lam = randn(5, seed=seed) * 3
    lam = torch.where(lam.abs() < 0.1, 1.0, lam)
    Q = random_rotation(5, generator(seed))
    H = Q * lam @ Q.T
    bent = Function(lambda x: x @ H @ x / 2, Q.sum(1))
    path, _ = run(bent, gd.Newton, 3, damping=damping, line_search_fn=None)
    factor = 1 - lam / (lam.abs() + damping)
    torch.testing.assert_close(path @ Q, factor ** torch.arange(4)[:, None], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [gd.Newton, gd.NewtonCG, gd.BFGS, gd.LBFGS])
@pytest.mark.parametrize("start", [1e-2, 1e-5, -1e-5])
def test_a_saddle_is_left(method, start):
    saddle = Function(lambda x: (x[0] ** 2 - x[1] ** 2) / 2 + x[1] ** 4 / 4, [1.0, start])
    path, _ = run(saddle, method, 40)
    target = torch.tensor([0.0, math.copysign(1.0, start)], dtype=torch.float64)
    torch.testing.assert_close(path[-1], target, rtol=1e-6, atol=1e-6)


def test_singular_and_linear_losses_give_finite_steps():
    flat = Function(lambda x: (x[0] + x[1] - 1) ** 2 + 0 * x[2], [3.0, 1.0, 5.0])
    linear = Function(lambda x: 2 * x[0] - x[1], [0.0, 0.0])
    for method in (gd.Newton, gd.NewtonCG):
        path, _ = run(flat, method, 20)
        assert path.isfinite().all() and flat.loss(path[-1]) < 1e-12
        path, _ = run(linear, method, 3)
        assert path.isfinite().all() and linear.loss(path[-1]) < linear.loss(path[0])


def test_an_infinite_trial_is_a_trial_too_long():
    for start in (3.0, 100.0, 1e-4):
        path, _ = run(Function(lambda x: (x - x.log()).sum(), [start]), gd.Newton, 40)
        assert abs(path[-1, 0] - 1) < 1e-8
        path, _ = run(Function(lambda x: (x - x.log()).sum(), [start]), gd.LBFGS, 5)
        assert abs(path[-1, 0] - 1) < 1e-5


# --- the line search ------------------------------------------------------------------------------------------------


def line(function):
    def phi(t):
        t = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        f = function(t)
        (slope,) = torch.autograd.grad(f, t)
        return gd.newton.Trial(float(t), float(f.detach()), float(slope))

    return phi


@settings(max_examples=200, deadline=None)
@given(seeds, st.floats(-4, 4), st.sampled_from([(1e-4, 0.9), (1e-4, 0.1), (0.1, 0.2)]))
def test_both_wolfe_conditions_hold(seed, power, constants):
    a, b, c = randn(3, seed=seed)
    phi = line(lambda t: 0.1 * t**4 + a * t**3 + b * torch.sin(5 * t) * 0.3 + t**2 - (2 + c.abs() + 1.5 * b.abs()) * t)
    start, (c1, c2) = phi(0.0), constants
    found = gd.newton.strong_wolfe(phi, start, 10.0**power, c1=c1, c2=c2)
    assert found.f <= start.f + c1 * found.t * start.slope + 1e-12
    assert abs(found.slope) <= c2 * abs(start.slope)


def test_the_search_backs_out_of_where_there_is_no_loss():
    phi = line(lambda t: t - torch.log(1.5 - t) * 0.1 - 2 * t * (1.4 - t))
    start = phi(0.0)
    for first in (1.0, 10.0, 1e6):
        found = gd.newton.strong_wolfe(phi, start, first)
        assert found.f < start.f and math.isfinite(found.slope) and found.t < 1.5


def test_the_search_ends_with_the_start_where_nothing_is_lower():
    calls = []

    def phi(t):
        calls.append(t)
        return gd.newton.Trial(t, 1.0 + t, -1.0)  # a slope that lies

    start = gd.newton.Trial(0.0, 1.0, -1.0)
    assert gd.newton.strong_wolfe(phi, start, limit=10) == start and len(calls) <= 10


@pytest.mark.parametrize("bad", [{"t": 0.0}, {"c1": 0.0}, {"c2": 1.0}, {"c1": 0.5, "c2": 0.4}])
def test_the_search_refuses(bad):
    with pytest.raises(ValueError, match="outside its range; pass"):
        gd.newton.strong_wolfe(lambda t: gd.newton.Trial(t, 0.0, 0.0), gd.newton.Trial(0.0, 1.0, -1.0), **bad)
    with pytest.raises(ValueError, match="slope at the start is 0; pass a direction that leads downhill"):
        gd.newton.strong_wolfe(lambda t: gd.newton.Trial(t, 0.0, 0.0), gd.newton.Trial(0.0, 1.0, 0.0))


# --- products and conjugate gradients -------------------------------------------------------------------------------


def test_products_and_hessian_are_autodiffs_over_several_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    params = [*model.parameters(), scale, unused, torch.ones(2)]  # the last one is frozen
    inputs = randn(5, 3)
    sizes = [p.numel() for p in params[:-1]]

    def flat_loss(x):
        parts = [part.view(p.shape) for part, p in zip(x.split(sizes), params[:-1], strict=True)]
        names = [name for name, _ in model.named_parameters()]
        out = torch.func.functional_call(model, dict(zip(names, parts[:-2], strict=True)), inputs)
        return (parts[-2] * out).sin().square().sum()

    for maximize, sign in ((False, 1), (True, -1)):
        objective = Objective(
            params, lambda: (scale * model(inputs)).sin().square().sum(), maximize=maximize, differentiates=True
        )
        f, g = objective(graph=True)
        H = torch.func.hessian(flat_loss)(objective.x)
        torch.testing.assert_close(f, sign * float(flat_loss(objective.x)))
        torch.testing.assert_close(g, sign * torch.func.grad(flat_loss)(objective.x))
        torch.testing.assert_close(objective.hessian(), sign * H, rtol=1e-10, atol=1e-10)
        assert torch.equal(objective.hessian(), objective.hessian().T)
        v = randn(len(objective.x))
        torch.testing.assert_close(objective.product(v), sign * H @ v, rtol=1e-10, atol=1e-10)
    assert all(p.grad is None for p in params)


@few
@given(seeds, st.integers(1, 12), st.floats(0, 2))
def test_conjugate_gradients_are_exact_after_d_products(seed, d, power):
    H = Quadratic(spectrum(power, 0, d), random_rotation(d, generator(seed))).H
    g, calls = randn(d, seed=seed), []
    z, _, far = gd.newton.truncated_cg(lambda v: calls.append(v) or H @ v, g)
    torch.testing.assert_close(z, -torch.linalg.solve(H, g), rtol=1e-5, atol=1e-5)
    assert not far and len(calls) <= d


@pytest.mark.parametrize("distinct", [1, 2, 4])
def test_conjugate_gradients_count_distinct_eigenvalues(distinct):
    lam = spectrum(1, 0, distinct).repeat_interleave(8)
    g, calls = randn(len(lam)), []
    z, _, _ = gd.newton.truncated_cg(lambda v: calls.append(v) or lam * v, g, tol=1e-10)
    assert len(calls) == distinct
    torch.testing.assert_close(z, -g / lam, rtol=1e-9, atol=1e-9)


@few
@given(seeds, st.floats(-2, 2))
def test_truncated_cg_stays_in_the_ball_and_beats_the_cauchy_point(seed, power):
    Q, radius = random_rotation(6, generator(seed)), 10.0**power
    H = Q * (randn(6, seed=seed) * 3) @ Q.T
    g = randn(6, seed=seed + 1)
    z, _, far = gd.newton.truncated_cg(lambda v: H @ v, g, radius)
    assert z.norm() <= radius * (1 + 1e-9)
    assert not far or abs(z.norm() / radius - 1) < 1e-9
    curvature, length = float(g @ H @ g), radius / float(g.norm())
    t = length if curvature <= 0 else min(length, float(g @ g) / curvature)

    def model(z):
        return float(g @ z + z @ H @ z / 2)

    assert model(z) <= model(-t * g) + 1e-9


def test_truncated_cg_without_a_radius_stops_at_negative_curvature():
    H = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
    g = torch.tensor([1.0, 0.1], dtype=torch.float64)
    z, _, far = gd.newton.truncated_cg(lambda v: H @ v, g)
    assert not far and g @ z < 0
    for curvature in (-1.0, 0.0):
        z, r, far = gd.newton.truncated_cg(lambda v, c=curvature: c * v, g)
        assert torch.equal(z, -g) and torch.equal(r, (1 - curvature) * g) and not far
    assert not gd.newton.truncated_cg(lambda v: v, torch.zeros(3))[0].any()


@few
@given(seeds, st.floats(-2, 1), st.integers(1, 6))
def test_truncated_cg_knows_its_residual(seed, power, limit):
    """In the interior, on the boundary, and where the curvature is negative."""
    Q, g, calls = random_rotation(6, generator(seed)), randn(6, seed=seed + 1), []
    for spread in (randn(6, seed=seed), randn(6, seed=seed).abs() + 0.1):
        H = Q * spread @ Q.T
        for radius in (10.0**power, math.inf):
            z, r, _ = gd.newton.truncated_cg(lambda v, H=H: calls.append(v) or H @ v, g, radius, limit=limit)
            torch.testing.assert_close(r, H @ z + g, rtol=1e-9, atol=1e-9)
            assert len(calls) <= limit
            calls.clear()


def test_truncated_cg_stops_by_its_tolerance():
    lam, g = spectrum(2, 0, 12), randn(12)
    errors = []
    for k in range(1, 13):
        z, r, _ = gd.newton.truncated_cg(lambda v: lam * v, g, limit=k)
        errors.append(float(r.norm()))
    for k, error in enumerate(errors[:8], 1):
        calls = []
        gd.newton.truncated_cg(lambda v, calls=calls: calls.append(v) or lam * v, g, tol=error * (1 + 1e-9))
        assert len(calls) == next(j for j, e in enumerate(errors, 1) if e <= error) <= k


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_truncated_cg_of_what_is_not_finite_is_nan_at_once(bad):
    g = torch.tensor([1.0, bad, 2.0])
    for tol in (0.0, 0.01 * g.norm()):
        calls = []
        z, _, far = gd.newton.truncated_cg(lambda v, calls=calls: calls.append(v) or v, g, tol=tol, limit=50)
        assert z.isnan().any() and not far and len(calls) <= 1


def test_a_refused_trial_leaves_the_parameters_and_shrinks_the_radius():
    steep = Function(lambda x: (x**4 / 4 - 10 * (-((x - 1) ** 2) * 50).exp()).sum(), [0.8])
    x = steep.start.clone().requires_grad_()
    optimizer, refused, factor = gd.NewtonCG([x], lr=5.0), 0, 1.0
    for _ in range(20):
        before = x.detach().clone()
        loss = optimizer.step(lambda: steep.loss(x))
        after = optimizer.state[x]["factor"]
        if torch.equal(before, x):
            refused += 1
            assert after == factor / 4 or loss < -9
        factor = after
        assert steep.loss(x) <= loss + 1e-12
    assert refused > 0


def promise(far, ratio):
    """A loss whose first trial by ``NewtonCG`` keeps this share of its promise, inside the ball or at its boundary."""
    slope = 2.0 if far else 0.5
    z = -1.0 if far else -0.5
    promised = -(slope * z + z * z / 2)
    c = (1 - ratio) * promised / z**4
    return Function(lambda x: (slope * x + x**2 / 2 + c * x**4).sum(), [0.0]), z


@pytest.mark.parametrize("far", [True, False], ids=["boundary", "inside"])
@pytest.mark.parametrize(
    ("ratio", "moves", "factor"),
    [(-1.0, False, 0.25), (0.14, False, 0.25), (0.16, True, 0.25), (0.24, True, 0.25), (0.26, True, 1.0),
     (0.74, True, 1.0), (0.76, True, 2.0), (1.0, True, 2.0)],
)  # fmt: skip
def test_the_radius_follows_the_promise(far, ratio, moves, factor):
    problem, z = promise(far, ratio)
    path, optimizer = run(problem, gd.NewtonCG, 1)
    assert path[1].item() == pytest.approx(z if moves else 0.0)
    expected = factor if far else min(factor, 1.0)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["factor"] == expected
    if factor == 2.0 and far:
        _, optimizer = run(problem, gd.NewtonCG, 1, max_factor=1.5)
        assert optimizer.state[optimizer.param_groups[0]["params"][0]]["factor"] == 1.5


@pytest.mark.parametrize("max_cg", [None, 1, 3])
def test_newton_cg_multiplies_no_more_often_than_conjugate_gradients(max_cg, monkeypatch):
    calls, product = [], Objective.product
    monkeypatch.setattr(Objective, "product", lambda self, v: calls.append(v) or product(self, v))
    lam = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    bowl = Function(lambda x: (lam * (x - 1) ** 2).sum() / 2, torch.zeros(5))
    g = bowl.gradient(bowl.start)
    size, needed = float(g.norm()), []
    gd.newton.truncated_cg(
        lambda v: needed.append(v) or lam * v, g, 1e3, tol=min(0.5, math.sqrt(size)) * size, limit=max_cg
    )
    run(bowl, gd.NewtonCG, 1, lr=1e3, max_cg=max_cg)
    assert 0 < len(calls) == len(needed) <= (max_cg or 5)


# --- quasi-Newton ---------------------------------------------------------------------------------------------------


def pairs(d, m, seed=0):
    """Steps, and the changes of gradient that a quadratic makes of them."""
    H = Quadratic(spectrum(2, 0, d), random_rotation(d, generator(seed))).H
    steps = randn(m, d, seed=seed)
    return list(steps), list(steps @ H)


@few
@given(seeds, st.integers(1, 8))
def test_the_update_satisfies_the_secant_equation_and_stays_positive(seed, d):
    A = randn(d, d, seed=seed)
    old = A @ A.T + torch.eye(d, dtype=torch.float64)
    old = (old + old.T) / 2  # on some processors A Aᵀ is symmetric up to rounding only
    (s,), (y,) = pairs(d, 1, seed)
    new = gd.newton.bfgs_update(old, s, y)
    rho, eye = 1 / (s @ y), torch.eye(d, dtype=torch.float64)
    left = eye - rho * torch.outer(s, y)
    torch.testing.assert_close(new, left @ old @ left.T + rho * torch.outer(s, s), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new @ y, s, rtol=1e-9, atol=1e-9)
    assert torch.equal(new, new.T) and torch.linalg.eigvalsh(new).min() > 0


@few
@given(seeds, st.integers(1, 8), st.integers(0, 12), st.floats(0.01, 100))
def test_two_loops_are_the_dense_inverse(seed, d, m, scale):
    steps, changes = pairs(d, m, seed)
    inverse = scale * torch.eye(d, dtype=torch.float64)
    for s, y in zip(steps, changes, strict=True):
        inverse = gd.newton.bfgs_update(inverse, s, y)
    g = randn(d, seed=seed + 1)
    expected = inverse @ g
    tol = 1e-8 * float(torch.linalg.cond(inverse) ** 0.5 + expected.norm())
    torch.testing.assert_close(gd.newton.two_loop(g, steps, changes, scale), expected, rtol=tol, atol=tol)


def test_lbfgs_with_a_full_memory_is_bfgs():
    banana = Rosenbrock(6)
    path, optimizer = run(banana, gd.BFGS, 25, max_iter=1)
    points = [(x, banana.gradient(x)) for x in path]
    steps = [b[0] - a[0] for a, b in zip(points, points[1:], strict=False)]
    changes = [b[1] - a[1] for a, b in zip(points, points[1:], strict=False)]
    inverse = optimizer.state[optimizer.param_groups[0]["params"][0]]["inverse_hessian"]
    g = points[-1][1]
    torch.testing.assert_close(gd.newton.two_loop(g, steps, changes), inverse @ g, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(inverse @ changes[-1], steps[-1], rtol=1e-6, atol=1e-9)

    class Plain(gd.BFGS):
        shorten = QuasiNewton.shorten

    class Unscaled(gd.LBFGS):
        def remember(self, s, y, group, state):
            super().remember(s, y, group, state)
            state["H_diag"] = 1.0

    dense, _ = run(banana, Plain, 25, max_iter=1)
    loops, _ = run(banana, Unscaled, 25, max_iter=1, history_size=100)
    torch.testing.assert_close(loops, dense, rtol=1e-6, atol=1e-6)


def test_the_memory_keeps_the_newest_pairs():
    banana = Rosenbrock(6)
    _, long = run(banana, gd.LBFGS, 12, max_iter=1, history_size=4)
    state = long.state[long.param_groups[0]["params"][0]]
    assert len(state["old_stps"]) == len(state["old_dirs"]) == 4 and state["n_iter"] == 12
    s, y = state["old_stps"][-1], state["old_dirs"][-1]
    torch.testing.assert_close(state["H_diag"], (s @ y) / (y @ y))


@learns
def test_many_iterations_in_one_step_are_many_steps(method):
    whole, _ = run(Rosenbrock(4), method, 1, max_iter=10, tolerance_change=0)
    single, _ = run(Rosenbrock(4), method, 10, max_iter=1, tolerance_change=0)
    assert torch.equal(whole[-1], single[-1])


@learns
def test_the_curvature_of_a_pair_comes_from_one_batch(method):
    """Between steps the loss may change at will: a pair never compares two of them."""
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    H = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    optimizer = method([x], max_iter=1)
    for k in range(12):
        shift, before = 100 * randn(3, seed=k), x.detach().clone()
        optimizer.step(closure_of(optimizer, lambda shift=shift: x @ H @ x / 2 + shift @ x))
        state, step = optimizer.state[x], x.detach() - before
        if method is gd.LBFGS:
            torch.testing.assert_close(state["old_stps"][-1] @ H, state["old_dirs"][-1], rtol=1e-6, atol=1e-6)
        else:
            torch.testing.assert_close(state["inverse_hessian"] @ H @ step, step, rtol=1e-6, atol=1e-6)


@learns
def test_a_step_ends_at_max_eval(method):
    x = Rosenbrock(10).start.requires_grad_()
    optimizer = method([x], max_iter=1000, max_eval=15)
    optimizer.step(closure_of(optimizer, lambda: Rosenbrock(10).loss(x)))
    assert 15 <= optimizer.state[x]["func_evals"] <= 15 + 25


# --- optimizers -----------------------------------------------------------------------------------------------------


def tensors(dtype=torch.float64):
    shapes = [(), (3,), (2, 2), (0,), (1, 2, 2)]
    return [randn(*shape, seed=k).to(dtype).requires_grad_() for k, shape in enumerate(shapes)]


def bumpy(params):
    """A smooth loss without symmetry, with a minimum."""
    x = torch.cat([p.flatten() for p in params])
    k = torch.arange(len(x), dtype=x.dtype)
    return (x**4 / 4 + (k + 1) * x**2 / 2 + k.cos() * x).sum() + (x[:-1] * x[1:]).sin().sum()


def steps(optimizer, params, count):
    closure = closure_of(optimizer, lambda: bumpy(params))
    losses = [float(optimizer.step(closure)) for _ in range(count)]
    return losses, [p.detach().clone() for p in params]


def small(method, params, **options):
    """With one iteration a step, so that several steps are worth a comparison."""
    if method in (gd.BFGS, gd.LBFGS):
        options.setdefault("max_iter", 2)
    return method(params, **options)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_loss_falls_over_all_shapes_and_gradients_vanish(method, dtype):
    params = tensors(dtype)
    losses, _ = steps(method(params), params, 30)
    assert losses[-1] < losses[0] and all(p.dtype == dtype for p in params)
    grads = torch.autograd.grad(bumpy(params), params)
    assert max(float(g.abs().max()) for g in grads if g.numel()) < (1e-5 if dtype == torch.float64 else 2e-3)


@every_method
def test_every_call_of_the_closure_is_counted(method):
    params, calls = tensors(), []
    optimizer = small(method, params)
    closure = closure_of(optimizer, lambda: calls.append(1) or bumpy(params))
    for _ in range(4):
        optimizer.step(closure)
    assert optimizer.state[params[0]]["func_evals"] == len(calls)


@every_method
def test_maximize_is_the_mirror_image(method):
    up, down = tensors(), tensors()
    climb, descend = small(method, up, maximize=True), small(method, down)
    for _ in range(4):
        a = climb.step(closure_of(climb, lambda: -bumpy(up)))
        b = descend.step(closure_of(descend, lambda: bumpy(down)))
        assert a == -b
    assert same([p.detach() for p in up], [p.detach() for p in down])


@every_method
def test_a_step_without_a_closure_names_the_remedy(method):
    params = tensors()
    with pytest.raises(TypeError, match=r"use step\(closure\).*(does not call|calls) backward"):
        method(params).step()


@every_method
def test_the_closure_runs_with_gradients_and_its_first_loss_is_returned(method):
    params = tensors()
    optimizer = small(method, params)
    with torch.no_grad():
        loss = optimizer.step(closure_of(optimizer, lambda: bumpy(params)))
    assert float(loss) == float(bumpy(tensors()))
    if method.differentiates:
        assert not loss.requires_grad


@differentiates
def test_a_closure_that_called_backward_is_refused_and_nothing_changes(method):
    params = tensors()
    optimizer = method(params)

    def closure():
        loss = bumpy(params)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"called backward\(\).*let it return the loss and not call backward"):
        optimizer.step(closure)
    assert same([p.detach() for p in params], [p.detach() for p in tensors()]) and not optimizer.state


@differentiates
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda p: bumpy(p).detach(), RuntimeError, "not a detached copy"),
        (lambda p: bumpy(p).item(), TypeError, "a tensor with one element"),
        (lambda p: p[1] * 2, TypeError, "a tensor with one element"),
        (lambda p: None, TypeError, "a tensor with one element"),
    ],
)
def test_a_loss_that_cannot_be_differentiated_is_refused(method, loss, error, message):
    params = tensors()
    optimizer = method(params)
    with pytest.raises(error, match=message):
        optimizer.step(lambda: loss(params))
    assert same([p.detach() for p in params], [p.detach() for p in tensors()]) and not optimizer.state


@differentiates
def test_the_users_gradients_stay_as_they_are(method):
    params = tensors()
    for p in params:
        p.grad = torch.full_like(p, 7.0)
    kept = [p.grad for p in params]
    optimizer = method(params)
    optimizer.step(lambda: bumpy(params))
    assert all(p.grad is g and bool((g == 7).all()) for p, g in zip(params, kept, strict=True))


@learns
@pytest.mark.parametrize("loss", [None, torch.ones(2), (torch.ones(()), 1)], ids=["None", "vector", "tuple"])
def test_what_is_no_loss_is_refused(method, loss):
    params = tensors()
    optimizer = method(params)
    plain = closure_of(optimizer, lambda: bumpy(params))
    with pytest.raises(TypeError, match="closure returned .* let it return the loss, a tensor with one element"):
        optimizer.step(lambda: (plain(), loss)[1])
    assert same([p.detach() for p in params], [p.detach() for p in tensors()]) and not optimizer.state


@differentiates
def test_attention_without_second_derivatives_names_the_remedy(method):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    inputs, targets = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = method(layer.parameters())

    def closure():
        return (layer(inputs) - targets).square().mean()

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.raises(RuntimeError, match=r"no second derivative.*sdpa_kernel\(SDPBackend.MATH\)"):
            optimizer.step(closure)
    assert same([p.detach() for p in layer.parameters()], before)
    with sdpa_kernel(SDPBackend.MATH):
        losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses[-1] < losses[0]


@every_method
@pytest.mark.parametrize("power", [4, 6])
def test_losses_that_underflow_are_no_error(method, power):
    """Near a flat minimum, products of gradients round to zero in single precision."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    options = {"tolerance_grad": 0, "tolerance_change": 0} if method in (gd.BFGS, gd.LBFGS) else {}
    optimizer, losses = method([x], **options), []
    for _ in range(150):
        losses.append(float(optimizer.step(closure_of(optimizer, lambda: (x**power).sum()))))
    assert losses[-1] < 1e-15 and all(b <= a for a, b in zip(losses, losses[1:], strict=False))


@learns
def test_without_a_line_search_lr_is_the_step_length(method):
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer, lengths = method([x], lr=0.05, max_iter=1, line_search_fn=None), []
    for _ in range(6):
        optimizer.step(closure_of(optimizer, lambda: x[0] ** 2 + 10 * x[1] ** 2))
        lengths.append(optimizer.state[x]["t"])
    assert lengths[1:] == [0.05] * 5


@learns
def test_without_a_line_search_a_point_without_a_loss_is_not_entered(method):
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = method([x], lr=10.0, max_iter=5, line_search_fn=None)
    optimizer.step(closure_of(optimizer, lambda: (10 * x - torch.log(x)).sum()))
    assert x.item() == 1.0


@learns
def test_a_closure_that_forgot_backward_is_refused(method):
    params = tensors()
    optimizer = method(params)
    with pytest.raises(RuntimeError, match=r"let it call loss.backward\(\)"):
        optimizer.step(lambda: bumpy(params))
    assert not optimizer.state


@every_method
def test_an_error_in_the_closure_restores_everything(method):
    params, calls = tensors(), []
    optimizer = small(method, params)
    steps(optimizer, params, 2)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    plain = closure_of(optimizer, lambda: bumpy(params))

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert same([p.detach() for p in params], before)
    assert repr(optimizer.state_dict()) == repr(state)


@learns
def test_a_line_search_that_fails_restores_the_parameters(method):
    params = tensors()
    optimizer = method(params)

    def closure():  # whose gradient points the wrong way
        optimizer.zero_grad()
        loss = bumpy(params)
        (-loss).backward()
        return loss

    optimizer.step(closure)
    assert same([p.detach() for p in params], [p.detach() for p in tensors()])


@every_method
def test_nonfinite_options(method):
    for value in (math.nan, math.inf):
        for options in ({}, {"nonfinite": "raise"}, {"nonfinite": "propagate"}):
            params = tensors()
            optimizer = small(method, params, **options)
            steps(optimizer, params, 1)
            before, state = [p.detach().clone() for p in params], repr(optimizer.state_dict()["state"])
            closure = closure_of(optimizer, lambda params=params, value=value: bumpy(params) * value)
            if options.get("nonfinite") == "raise":
                with pytest.raises(FloatingPointError, match="not finite .* use nonfinite='skip'"):
                    optimizer.step(closure)
            else:
                optimizer.step(closure)
            if options.get("nonfinite") == "propagate":
                assert not params[1].isfinite().all() and optimizer.skipped_steps == 0
            else:
                assert same([p.detach() for p in params], before)
                assert repr(optimizer.state_dict()["state"]) == state
                assert optimizer.skipped_steps == (not options)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("search", ["strong_wolfe", None])
def test_stop_save_load_go_on_is_the_run_that_never_stopped(method, dtype, search):
    options = {} if method is gd.NewtonCG else {"line_search_fn": search, "lr": 0.5 if search else 0.05}
    whole = tensors(dtype)
    _, expected = steps(small(method, whole, **options), whole, 6)
    params = tensors(dtype)
    optimizer = small(method, params, **options)
    steps(optimizer, params, 3)
    saved = through_a_file({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    steps(optimizer, params, 1)  # what was saved is not touched by what follows
    fresh = [p.requires_grad_() for p in saved["params"]]
    resumed = small(method, fresh, **{**options, "lr": 0.9})
    resumed.load_state_dict(saved["optimizer"])
    assert same(steps(resumed, fresh, 3)[1], expected) and all(x.isfinite().all() for x in expected)


@every_method
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "pickle"])
def test_deepcopy_and_pickle_go_on_as_the_original(method, duplicate):
    params = tensors()
    optimizer = small(method, params)
    steps(optimizer, params, 3)
    params_too, twin = duplicate((params, optimizer))
    assert same(steps(optimizer, params, 3)[1], steps(twin, params_too, 3)[1])


@every_method
def test_the_state_dict_is_a_picture_of_its_moment(method):
    params = tensors()
    optimizer = small(method, params)
    steps(optimizer, params, 3)
    state = optimizer.state_dict()
    before = repr(state)
    steps(optimizer, params, 3)
    assert repr(state) == before


@every_method
def test_the_learning_rate_as_a_tensor_and_from_a_scheduler(method):
    runs = []
    for lr in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        params = tensors()
        optimizer = small(method, params, lr=lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for _ in range(3):
            steps(optimizer, params, 1)
            scheduler.step()
        runs.append([p.detach() for p in params])
        assert float(optimizer.param_groups[0]["lr"]) == 0.0625
    assert same(*runs)
    params = tensors()
    steps(small(method, params, lr=0.0), params, 2)
    assert same([p.detach() for p in params], [p.detach() for p in tensors()])


@every_method
def test_lr_is_the_first_trial(method):
    x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    tried = []
    optimizer = small(method, [x], lr=0.25)

    def closure():
        tried.append(float(x.detach()))
        optimizer.zero_grad()
        loss = x.square().sum() / 2
        if not optimizer.differentiates:
            loss.backward()
        return loss

    optimizer.step(closure)
    # Newton's step is −3; NewtonCG's radius is 0.25; the very first of the others has length lr·min(1, 1/‖g‖₁)·‖g‖.
    assert tried[1] == pytest.approx(3 - (0.75 if method is gd.Newton else 0.25))


@every_method
def test_frozen_unused_and_late_parameters(method):
    free, frozen, unused = (torch.ones(2, dtype=torch.float64, requires_grad=k != 1) for k in range(3))
    frozen.grad = torch.full_like(frozen, 5.0)
    optimizer = small(method, [frozen, free, unused])

    def loss():
        return ((free - 3) ** 2).sum() + ((frozen * free - 1) ** 2).sum()

    for _ in range(5):
        optimizer.step(closure_of(optimizer, loss))
    one = torch.ones(2, dtype=torch.float64)
    assert same([frozen, unused.detach()], [one, one]) and loss() < 5
    frozen.requires_grad_()  # now there is more to learn, and an old memory of another size
    for _ in range(25):
        optimizer.step(closure_of(optimizer, loss))
    assert loss() < 1e-8
    frozen.requires_grad_(False)
    free.requires_grad_(False)
    unused.requires_grad_(False)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"nothing to train, every parameter is frozen; call requires_grad_\(\)"):
        optimizer.step(loss)
    assert repr(optimizer.state_dict()) == repr(before)


@every_method
def test_what_is_refused_before_anything_changes(method):
    params = tensors()
    for bad, error, message in [
        ({"lr": -1.0}, ValueError, "lr=-1.0 is outside its range; pass"),
        ({"engine": "foreach"}, ValueError, "has no engine='foreach'; use one of 'auto', 'loop'"),
        ({"engine": "compile"}, ValueError, "use one of 'auto', 'loop'"),
        ({"state_dtype": torch.float32}, ValueError, "state_dtype=torch.float32 is not valid"),
        ({"nonfinite": "hope"}, ValueError, "nonfinite='hope'"),
        ({"foreach": True}, TypeError, "has no foreach=True"),
    ]:
        with pytest.raises(error, match=message):
            method(params, **bad)
    with pytest.raises(ValueError, match="one vector; pass one group"):
        method([{"params": params[:1]}, {"params": params[1:]}])
    optimizer = method(params[:1])
    with pytest.raises(ValueError, match="one vector; pass one group"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1
    for p, message in [
        (torch.ones(2, dtype=torch.complex128, requires_grad=True), "that is complex; pass torch.view_as_real"),
        (torch.ones(2, dtype=torch.bfloat16, requires_grad=True), "bfloat16, too coarse .* float32"),
        (torch.ones(2, dtype=torch.float16, requires_grad=True), "float16, too coarse .* float32"),
        (torch.ones(2, dtype=torch.float32, requires_grad=True), "use one type and one device"),
    ]:
        with pytest.raises(ValueError, match=message):
            method([params[1], p])


@pytest.mark.parametrize(
    ("method", "bad"),
    [
        (gd.Newton, {"damping": -1.0}),
        (gd.Newton, {"line_search_fn": "armijo"}),
        (gd.NewtonCG, {"max_cg": 0}),
        (gd.NewtonCG, {"max_cg": 2.5}),
        (gd.NewtonCG, {"max_factor": 0.5}),
        (gd.BFGS, {"max_iter": 0}),
        (gd.BFGS, {"max_iter": 1.5}),
        (gd.BFGS, {"max_eval": 0}),
        (gd.BFGS, {"initial_scale": 0.0}),
        (gd.LBFGS, {"history_size": 0}),
        (gd.LBFGS, {"tolerance_grad": -1.0}),
        (gd.LBFGS, {"tolerance_change": -1.0}),
        (gd.LBFGS, {"line_search_fn": "wolfe"}),
    ],
)
def test_every_argument_has_a_range(method, bad):
    (name,) = bad
    with pytest.raises((ValueError, TypeError), match=f"{name}=.*(pass|use)"):
        method(tensors(), **bad)


@every_method
def test_a_sparse_gradient_is_refused(method):
    table = torch.nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    optimizer = method(table.parameters())
    before = table.weight.detach().clone()
    with pytest.raises((ValueError, RuntimeError), match="sparse"):
        optimizer.step(closure_of(optimizer, lambda: table(torch.tensor([1, 2])).square().sum()))
    assert torch.equal(table.weight, before)


@every_method
def test_hooks_names_and_strides(method):
    model, calls = torch.nn.Linear(2, 2).double(), []
    optimizer = small(method, model.named_parameters())
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    inputs = randn(5, 2)
    optimizer.step(closure_of(optimizer, lambda: (model(inputs) - 1).square().sum()))
    assert calls == ["pre", "post"] and optimizer.param_groups[0]["param_names"] == ["weight", "bias"]

    ends = []
    for x in (randn(3, 2).t(), randn(3, 2).t().contiguous()):
        x.requires_grad_()
        optimizer = small(method, [x])
        for _ in range(3):
            optimizer.step(closure_of(optimizer, lambda x=x: (x**4 / 4 + x.cos()).sum() + x[0] @ x[1]))
        ends.append(x.detach())
    torch.testing.assert_close(*ends)


@every_method
def test_a_network_in_single_precision(method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    inputs = torch.randn(40, 2)
    target = (inputs[:, :1] * inputs[:, 1:]).sin()
    optimizer = method(model.parameters())

    def loss():
        return (model(inputs) - target).square().mean()

    for _ in range(60):
        optimizer.step(closure_of(optimizer, loss))
    assert loss() < 0.02


@every_method
def test_logistic_regression_ends_at_its_optimum(method):
    problem = LogisticRegression(randn(60, 4), torch.arange(60) % 3, l2=1e-2)
    options = {"tolerance_grad": 1e-10, "tolerance_change": 0} if method in (gd.BFGS, gd.LBFGS) else {}
    path, _ = run(problem, method, 15, **options)
    torch.testing.assert_close(path[-1], problem.minimizer, rtol=1e-7, atol=1e-7)


# --- a memory and the parameters it is of -----------------------------------------------------------------------------


def of_shapes(*shapes):
    return [randn(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]


def picture(params, optimizer):
    return [p.detach().clone() for p in params], repr(optimizer.state_dict())


@every_method
@pytest.mark.parametrize("others", [[(2, 6), (5,)], [(5,), (3, 4)], [(3, 4), (7,)]], ids=str)
def test_a_checkpoint_of_other_shapes_is_refused_before_anything_changes(method, others):
    params, theirs = of_shapes((3, 4), (5,)), of_shapes(*others)
    optimizer, other = small(method, params, lr=0.5), small(method, theirs)
    steps(optimizer, params, 2)
    steps(other, theirs, 2)
    values, state = picture(params, optimizer)
    for target in (optimizer, small(method, params, lr=0.5)):
        before = repr(target.state_dict())
        with pytest.raises(ValueError, match=r"parameter [01] has shape \(.*\), and had \(.*\)"):
            target.load_state_dict(other.state_dict())
        assert repr(target.state_dict()) == before
    assert same([p.detach() for p in params], values) and repr(optimizer.state_dict()) == state


@learns
def test_vectors_of_another_length_are_refused_by_name(method):
    params = of_shapes((3, 4), (5,))
    optimizer = small(method, params)
    steps(optimizer, params, 3)
    saved = optimizer.state_dict()
    name = "inverse_hessian" if method is gd.BFGS else "old_dirs"
    kept = saved["state"][0][name]
    saved["state"][0][name] = kept[:-1] if method is gd.BFGS else [*kept[:-1], kept[-1][:-1]]
    before = repr(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"{name} has shape \(16,.*\) for 17 parameters"):
        optimizer.load_state_dict(saved)
    assert repr(optimizer.state_dict()) == before


def test_a_checkpoint_of_torchs_of_another_length_is_refused():
    theirs, params = of_shapes((3, 4), (5,)), of_shapes((3, 4))
    peer = torch.optim.LBFGS(theirs, max_iter=3)
    peer.step(closure_of_torch(peer, lambda: bumpy(theirs)))
    saved = peer.state_dict()
    saved["param_groups"][0]["params"] = [0]
    optimizer = gd.LBFGS(params)
    with pytest.raises(ValueError, match=r"has shape \(17,\) for 12 parameters"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


def closure_of_torch(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


@every_method
def test_a_parameter_that_has_grown_is_refused_before_anything_changes(method):
    params, calls = of_shapes((3, 4), (5,)), []
    optimizer = small(method, params)
    steps(optimizer, params, 2)
    for new, message in (((4, 4), "parameter 0 has shape"), ((2, 6), "parameter 0 has shape")):
        params[0].data = randn(*new)
        params[0].grad = None
        values, state = picture(params, optimizer)
        with pytest.raises(ValueError, match=rf"{method.__name__}'s memory .* {message} .*\(3, 4\); make a new"):
            optimizer.step(closure_of(optimizer, lambda: calls.append(1) or bumpy(params)))
        assert same([p.detach() for p in params], values) and repr(optimizer.state_dict()) == state and not calls
    steps(small(method, params), params, 2)


@learns
def test_the_memory_of_other_parameters_is_forgotten(method):
    params, options = of_shapes((3,), (3,)), {"line_search_fn": None, "lr": 0.05}
    optimizer = small(method, params, **options)
    for frozen in (None, 0, 1):  # then as many numbers, and other ones
        for k, p in enumerate(params):
            p.requires_grad_(k != frozen)
        fresh = [p.detach().clone().requires_grad_(p.requires_grad) for p in params]
        expected = steps(small(method, fresh, **options), fresh, 3)[1]
        assert same(steps(optimizer, params, 3)[1], expected)


@every_method
def test_a_frozen_part_may_be_of_any_type(method):
    frozen = torch.ones(3, dtype=torch.bfloat16)
    free = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = method([free, frozen])
    for _ in range(5):
        optimizer.step(closure_of(optimizer, lambda: (free - frozen.double()).square().sum()))
    torch.testing.assert_close(free.detach(), torch.ones_like(free))
    frozen.requires_grad_()
    with pytest.raises(ValueError, match="bfloat16, too coarse"):
        optimizer.step(closure_of(optimizer, lambda: (free - frozen.double()).square().sum()))


@every_method
def test_a_sharded_parameter_is_refused(method):
    from torch import distributed
    from torch.distributed.tensor import DeviceMesh, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        whole = torch.ones(4, 2)
        shard = distribute_tensor(whole, DeviceMesh("cpu", [0])).requires_grad_()
        with pytest.raises(ValueError, match=r"\(4, 2\) that is sharded \(a DTensor\).*an elementwise method"):
            method([shard])
    finally:
        distributed.destroy_process_group()
