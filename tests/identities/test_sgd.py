"""Chapter 03: SGD reduces to gradient descent, scales and turns as it must; its rates are those of its 2×2 systems.

Everywhere the loop, which runs the rule itself; the engines are compared with it elsewhere.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_descent.problems import GradientDescent, Quadratic, random_rotation, trajectory
from guided_descent.sgd import SGD, optimal_momentum, spectral_radius

seeds = st.integers(0, 2**31 - 1)
betas = st.floats(0.01, 0.99)
fast = settings(max_examples=25, deadline=None)


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def a_quadratic(seed, d=4):
    return Quadratic(normal(seed, d).exp().sort(descending=True).values, random_rotation(d), normal(seed + 1, d))


def close(a, b, tol=1e-10):
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)


def on(gradients, **options):
    """Where a fixed sequence of gradients leads."""
    x = torch.zeros_like(gradients[0])
    optimizer = SGD([x], engine="loop", **options)
    for g in gradients:
        x.grad = g
        optimizer.step()
    return x


# --- the rule


@fast
@given(seeds, st.floats(1e-4, 0.2))
def test_without_momentum_it_is_gradient_descent(seed, lr):
    f = a_quadratic(seed)
    plain = trajectory(f, GradientDescent, 20, lr=lr, engine="loop")
    assert close(trajectory(f, lambda p: SGD(p, engine="loop", lr=lr), 20), plain)


@fast
@given(seeds, betas, st.floats(1e-3, 1e3), st.booleans())
def test_lr_and_the_scale_of_gradients_are_one_number(seed, beta, c, nesterov):
    g = normal(seed, 20, 3)
    there = on(list(c * g), lr=0.1, momentum=beta, nesterov=nesterov)
    assert close(there, on(list(g), lr=0.1 * c, momentum=beta, nesterov=nesterov), 1e-9)


@fast
@given(seeds, betas, st.floats(0, 1), st.floats(0.01, 1), st.booleans())
def test_it_is_linear_in_the_gradients_so_rotations_pass_through(seed, beta, tau, decay, nesterov):
    g, Q = list(normal(seed, 20, 4)), random_rotation(4, torch.Generator().manual_seed(seed))
    options = {"momentum": beta, "dampening": 0.0 if nesterov else tau, "nesterov": nesterov, "weight_decay": decay}
    assert close(on([Q @ v for v in g], lr=0.1, **options), Q @ on(g, lr=0.1, **options))


@fast
@given(seeds, betas, st.floats(0, 0.99))
def test_dampening_is_a_smaller_learning_rate_and_a_memory_of_the_first_gradient(seed, beta, tau):
    g = list(normal(seed, 15, 3))
    fading = tau * sum(beta**t for t in range(15)) * g[0]
    expected = (1 - tau) * on(g, lr=0.1, momentum=beta) - 0.1 * fading
    assert close(on(g, lr=0.1, momentum=beta, dampening=tau), expected)


@fast
@given(seeds, betas)
def test_the_first_step_is_that_of_gradient_descent(seed, beta):
    g = [normal(seed, 5)]
    for tau in (0.0, 0.3, 1.0):
        assert close(on(g, lr=0.1, momentum=beta, dampening=tau), -0.1 * g[0], 1e-14)
    assert close(on(g, lr=0.1, momentum=beta, nesterov=True), -0.1 * (1 + beta) * g[0], 1e-14)


@fast
@given(seeds, betas)
def test_nesterov_stores_the_look_ahead_point(seed, beta):
    f = a_quadratic(seed)
    eta = 0.5 / f.L
    y = f.start.clone()
    optimizer = SGD([y], engine="loop", lr=eta, momentum=beta, nesterov=True)
    x = old = f.start
    for _ in range(30):
        ahead = x + beta * (x - old)
        assert close(y, ahead)
        x, old = ahead - eta * f.gradient(ahead), x
        y.grad = f.gradient(y)
        optimizer.step()
        assert close(y + eta * beta * optimizer.state[y]["momentum_buffer"], x)


@fast
@given(seeds, betas)
def test_weight_decay_is_a_quadratic_penalty(seed, beta):
    f = a_quadratic(seed)
    H = f.H + 0.5 * torch.eye(4, dtype=torch.float64)
    penalised = Quadratic(f.spectrum + 0.5, f.basis, torch.linalg.solve(H, f.H @ f.minimizer))
    lr = 0.1 / penalised.L
    a = trajectory(f, lambda p: SGD(p, engine="loop", lr=lr, momentum=beta, weight_decay=0.5), 30)
    assert close(a, trajectory(penalised, lambda p: SGD(p, engine="loop", lr=lr, momentum=beta), 30, start=f.start))


@fast
@given(seeds, st.floats(0.1, 5.0), st.floats(0.01, 0.1))
def test_it_is_a_ball_with_friction_looked_at_every_h_seconds(seed, gamma, h):
    """ẍ = −∇f(x) − γẋ by differences: η = h², β = 1 − γh."""
    f = a_quadratic(seed)
    h = h / math.sqrt(f.L)
    x = trajectory(f, lambda p: SGD(p, engine="loop", lr=h**2, momentum=1 - gamma * h), 30)
    velocity = torch.cat([torch.zeros(1, 4, dtype=x.dtype), x.diff(dim=0)]) / h  # from rest
    acceleration = velocity.diff(dim=0) / h
    assert close(acceleration, -f.gradient(x[:-1]) - gamma * velocity[:-1], 1e-6)


# --- its rates


def companion(step, beta, nesterov):
    shrink = 1 - step
    b, c = ((1 + beta) * shrink, beta * shrink) if nesterov else (beta + shrink, beta)
    return torch.tensor([[b, -c], [1.0, 0.0]], dtype=torch.float64)


@fast
@given(st.floats(0, 6), st.floats(0, 1), st.floats(0.1, 10), st.booleans())
def test_spectral_radius_is_the_largest_eigenvalue(step, beta, lam, nesterov):
    expected = torch.linalg.eigvals(companion(step, beta, nesterov)).abs().max()
    assert close(spectral_radius(step / lam, beta, lam, nesterov), expected, 1e-6)


@fast
@given(st.floats(0.1, 0.9), st.floats(0.1, 1.2), st.booleans())
def test_a_run_shrinks_by_the_spectral_radius(beta, step, nesterov):
    options = {"lr": step / 2, "momentum": beta, "nesterov": nesterov, "engine": "loop"}
    path = trajectory(Quadratic([2.0]), lambda p: SGD(p, **options), 200)
    rho = float(spectral_radius(step / 2, beta, 2.0, nesterov))
    assert float(path[-20:].abs().max() ** (1 / 200)) < rho + 0.05


def test_spectral_radius_broadcasts_and_keeps_the_type():
    lam = torch.linspace(1, 2, 5)
    assert spectral_radius(0.1, 0.9, lam).dtype == torch.float32
    assert spectral_radius(0.1, 0.9, 1).dtype == torch.float64
    assert spectral_radius(torch.rand(3, 1), torch.rand(2, 1, 1), lam).shape == (2, 3, 5)
    assert spectral_radius(0.1, torch.rand(4), 1.0).shape == (4,)


@fast
@given(st.floats(0.01, 10), st.floats(1.0, 1e4))
def test_optimal_momentum_is_optimal(mu, kappa):
    L = mu * kappa
    lr, beta = optimal_momentum(mu, L)
    lam = torch.linspace(mu, L, 200, dtype=torch.float64)
    rate = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    assert abs(float(spectral_radius(lr, beta, lam).max()) - rate) < 1e-6
    eta, momentum = torch.rand(2, 500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(spectral_radius(4 / L * eta, momentum, lam).amax(1).min()) >= rate - 1e-9


@pytest.mark.parametrize("mu, L", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, float("inf")), (float("nan"), 1.0)])
def test_optimal_momentum_refuses(mu, L):
    with pytest.raises(ValueError, match=r"(mu|L)=.*pass a number in"):
        optimal_momentum(mu, L)


def test_optimal_momentum_refuses_words():
    with pytest.raises(TypeError, match="mu='small'"):
        optimal_momentum("small", 1.0)
