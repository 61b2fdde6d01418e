"""Chapter 02: minibatch noise, the noise ball, noise scales and critical batch sizes. Closed forms in float64.

Where a test draws at random, its margin is a number of standard errors of what it draws.
"""

import itertools
import math
from collections import UserDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import guided_descent as gd
from guided_descent.noise import (
    critical_batch_size,
    expected_loss,
    gradient_covariance,
    minibatches,
    noise_ball,
    noise_scale,
    noise_scale_from_batches,
    per_example_gradients,
)
from guided_descent.problems import random_rotation

seeds = st.integers(0, 2**31 - 1)
fast = settings(max_examples=25, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def close(a: object, b: object, tol: float = 1e-12) -> bool:
    a = torch.as_tensor(a, dtype=torch.float64)
    return torch.allclose(a, torch.as_tensor(b, dtype=torch.float64), rtol=tol, atol=tol)


def covariance(G: torch.Tensor) -> torch.Tensor:
    return (G - G.mean(0)).T @ (G - G.mean(0)) / len(G)


def a_valley(seed: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues, eigenvectors, Hessian and a noise covariance."""
    g = generator(seed)
    lam, U, root = 0.1 + normal(g, d).exp(), random_rotation(d, g), normal(g, d, d)
    return lam, U, U * lam @ U.T, root @ root.T


def a_network(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return model, torch.randn(24, 4, dtype=dtype), torch.arange(24) % 3


# --- minibatches


@fast
@given(seeds, st.integers(1, 30), st.data())
def test_shuffled_batches_visit_every_example_once_an_epoch(seed, n, data):
    b = data.draw(st.integers(1, n))
    per_epoch = n // b
    batches = list(minibatches(n, b, 3 * per_epoch, generator(seed)))
    assert all(index.shape == (b,) and index.dtype == torch.int64 for index in batches)
    for epoch in range(3):
        seen = torch.cat(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert len(seen.unique()) == per_epoch * b and seen.min() >= 0 and seen.max() < n


@pytest.mark.parametrize("sampling", ["shuffle", "without", "with"])
def test_minibatches_repeat_with_the_seed_and_leave_the_global_generator_alone(sampling):
    before = torch.get_rng_state()
    one, two = (list(minibatches(10, 4, 7, generator(3), sampling=sampling)) for _ in range(2))
    assert len(one) == 7 and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_without_replacement_repeats_nothing_within_a_batch_but_does_between():
    batches = list(minibatches(6, 4, 40, generator(0), sampling="without"))
    assert all(len(index.unique()) == 4 for index in batches)
    assert any(len(torch.cat(pair).unique()) < 6 for pair in itertools.pairwise(batches))
    assert any(len(index.unique()) < 4 for index in minibatches(6, 4, 40, generator(0), sampling="with"))
    assert next(minibatches(2, 9, 1, generator(0), sampling="with")).shape == (9,)


@pytest.mark.parametrize(
    "arguments",
    [(0, 1, 1), (5, 0, 1), (5, 6, 1), (5, 2, -1)],
)
def test_minibatches_refuse_at_once(arguments):
    with pytest.raises(ValueError, match="batch_size"):
        minibatches(*arguments)
    with pytest.raises(ValueError, match="sampling"):
        minibatches(5, 2, 1, sampling="replacement")


@pytest.mark.parametrize("sampling, factor", [("with", 1.0), ("without", (10 - 4) / (10 - 1))])
def test_the_covariance_of_a_drawn_batch_follows_the_formula(sampling, factor):
    G, draws, b = normal(generator(1), 10, 3), 4000, 4
    means = torch.stack([G[i].mean(0) for i in minibatches(10, b, draws, generator(2), sampling=sampling)])
    error = (means - G.mean(0)).square().sum(1)
    assert abs(error.mean() - factor * covariance(G).trace() / b) < 5 * error.std() / math.sqrt(draws)


# --- per-example gradients


def test_per_example_gradients_are_those_of_a_loop_for_any_chunk():
    model, X, y = a_network()
    expected = []
    for x, t in zip(X, y, strict=True):
        g = torch.autograd.grad(cross_entropy(model(x[None]), t[None]), list(model.parameters()))
        expected.append(torch.cat([part.flatten() for part in g]))
    for chunk in (1, 5, 24, 100):
        assert close(per_example_gradients(cross_entropy, model, (X, y), chunk_size=chunk), torch.stack(expected))
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_are_left_out():
    model, X, y = a_network()
    model[0].weight.requires_grad_(False)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert per_example_gradients(cross_entropy, model, (X, y)).shape == (24, trainable)


@fast
@given(seeds)
def test_gradient_covariance_of_linear_losses_is_that_of_their_coefficients(seed):
    C = normal(generator(seed), 9, 3)
    g, Sigma = gradient_covariance(lambda w, c: w @ c, torch.zeros(3, dtype=torch.float64), (C,))
    assert close(g, C.mean(0)) and close(Sigma, covariance(C))


def test_per_example_gradients_refuse():
    model, X, y = a_network()
    with pytest.raises(ValueError, match="lengths"):
        per_example_gradients(cross_entropy, model, (X, y[:3]))
    with pytest.raises(ValueError, match="lengths"):
        per_example_gradients(cross_entropy, model, (X[:0], y[:0]))
    with pytest.raises(TypeError, match="tuple"):
        per_example_gradients(lambda w, c: w @ c, torch.zeros(4, dtype=torch.float64), X)
    normed = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ValueError, match="'1' normalises"):
        per_example_gradients(cross_entropy, normed, (X, y))
    assert per_example_gradients(cross_entropy, normed.eval(), (X, y)).shape == (24, 21)


# --- noise ball


@fast
@given(seeds, st.integers(1, 5), st.floats(0.01, 0.99))
def test_the_noise_ball_solves_the_lyapunov_equation(seed, d, part):
    lam, _, H, N = a_valley(seed, d)
    lr = part * 2 / float(lam.max())
    ball = noise_ball(H, N, lr)
    shrink = torch.eye(d, dtype=torch.float64) - lr * H
    system = torch.eye(d * d, dtype=torch.float64) - torch.kron(shrink, shrink)
    solved = torch.linalg.solve(system, lr**2 * N.reshape(-1)).reshape(d, d)
    assert close(ball.covariance / ball.covariance.norm(), solved / ball.covariance.norm(), 1e-9)
    assert close(ball.loss, (H @ solved).trace() / 2, 1e-8 * max(1.0, float(ball.loss)))


@fast
@given(seeds, st.integers(1, 5))
def test_a_small_ball_costs_a_quarter_of_lr_times_the_trace_whatever_the_curvature(seed, d):
    _, _, H, N = a_valley(seed, d)
    assert close(noise_ball(H, N, 1e-7).loss / (1e-7 / 4 * N.trace()), 1.0, 1e-5)


@fast
@given(seeds, st.integers(1, 5), st.floats(0.01, 0.9))
def test_a_noisy_run_ends_in_the_ball(seed, d, part):
    lam, U, H, N = a_valley(seed, d)
    lr = part * 2 / float(lam.max())
    slowest = max(0.01, float((1 - lr * lam).abs().max()))
    steps = math.ceil(20 / -math.log(slowest))
    along = (U.T @ N @ U).diagonal()
    losses = expected_loss(lam, along, torch.ones(d, dtype=torch.float64), [lr] * min(steps, 20_000))
    assert close(losses[0], lam.sum() / 2) and close(losses[-1] / noise_ball(H, N, lr).loss, 1.0, 1e-5)


def test_expected_loss_agrees_with_simulated_chains_and_follows_many_step_sizes_at_once():
    lam, noise, chains = torch.tensor([2.0, 0.5]).double(), torch.tensor([1.0, 3.0]).double(), 20_000
    rates = [0.5 / (1 + t / 5) for t in range(30)]
    curve = expected_loss(lam, noise, torch.tensor([1.0, -2.0]).double(), rates)
    e, g = torch.tensor([1.0, -2.0]).double().expand(chains, 2), generator(0)
    for lr in rates:
        e = e - lr * (lam * e + noise.sqrt() * normal(g, chains, 2))
    loss = (lam * e.square()).sum(1) / 2
    assert abs(loss.mean() - curve[-1]) < 5 * loss.std() / math.sqrt(chains)
    both = torch.tensor([[0.1, 0.3], [0.2, 0.1]], dtype=torch.float64)
    many = expected_loss(lam, noise, torch.ones(2).double(), both)
    for run, lrs in enumerate([(0.1, 0.2), (0.3, 0.1)]):
        assert close(many[:, run], expected_loss(lam, noise, torch.ones(2).double(), lrs))
    assert expected_loss(lam, noise, torch.ones(2).double(), []).shape == (1,)


def test_noise_ball_refuses():
    eye = torch.eye(2, dtype=torch.float64)
    for H, N, lr, words in [
        (eye, eye, 2.0, "lr"),
        (eye, eye, 0.0, "lr"),
        (eye, torch.eye(3), 0.1, "noise"),
        (-eye, eye, 0.1, "positive definite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double(), eye, 0.1, "symmetric"),
    ]:
        with pytest.raises(ValueError, match=words):
            noise_ball(H, N, lr)
    with pytest.raises(ValueError, match="same shape"):
        expected_loss(torch.ones(2), torch.ones(3), torch.ones(2), [0.1])


# --- noise scale


@fast
@given(seeds, st.integers(2, 4), st.lists(st.integers(1, 2), min_size=2, max_size=3))
def test_noise_scale_is_unbiased_over_all_outcomes(seed, n, sizes):
    """Every way to fill the batches with n examples, drawn with replacement, counts once."""
    C, w = normal(generator(seed), n, 2), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    cuts = [sum(sizes[:j]) for j in range(len(sizes) + 1)]
    traces, squares = [], []
    for draw in itertools.islice(itertools.product(range(n), repeat=cuts[-1]), 5000):
        batches = [C[list(draw[a:b])] for a, b in itertools.pairwise(cuts)]
        found = noise_scale(lambda rows: (rows @ w).mean(), [w], batches)
        traces.append(found.trace)
        squares.append(found.squared_norm)
    assert n ** cuts[-1] <= 5000
    assert close(torch.stack(traces).mean(), covariance(C).trace(), 1e-10)
    assert close(torch.stack(squares).mean(), C.mean(0).square().sum(), 1e-10)


@fast
@given(seeds, st.sampled_from([(1, 2), (1, 3), (2, 3)]))
def test_two_batch_sizes_give_both_unknowns_exactly_from_expected_norms(seed, sizes):
    C = normal(generator(seed), 4, 3)
    norms = [
        torch.stack([C[list(draw)].mean(0).square().sum() for draw in itertools.product(range(4), repeat=b)])
        for b in sizes
    ]
    found = noise_scale_from_batches(*norms, batch_sizes=sizes)
    trace, square = covariance(C).trace(), C.mean(0).square().sum()
    assert close(torch.stack(found), torch.stack([trace / square, trace, square]), 1e-9)


def test_two_batch_sizes_are_unbiased_over_many_draws():
    g, draws, d, b, B = generator(0), 4000, 50, 4, 32
    mean, spread = torch.full((d,), 0.2, dtype=torch.float64), 1.5
    big = mean[None, None] + normal(g, draws, B // b, d) * spread / math.sqrt(b)
    small, big = big.square().sum(-1), big.mean(1).square().sum(-1)
    each = [noise_scale_from_batches(s, t, batch_sizes=(b, B)) for s, t in zip(small, big, strict=True)]
    for found, truth in [
        (torch.stack([e.trace for e in each]), d * spread**2),
        (torch.stack([e.squared_norm for e in each]), float(mean.square().sum())),
    ]:
        assert abs(found.mean() - truth) < 5 * found.std() / math.sqrt(draws)


@fast
@given(seeds, st.integers(2, 6), st.integers(1, 5))
def test_equal_batches_agree_with_the_two_batch_formula(seed, k, b):
    C, w = normal(generator(seed), k * b, 3), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    rows = C.reshape(k, b, 3)
    found = noise_scale(lambda batch: (batch @ w).mean(), [w], rows)
    small, big = rows.mean(1).square().sum(-1), C.mean(0).square().sum()
    other = noise_scale_from_batches(small, big, batch_sizes=(b, k * b))
    assert close(torch.stack(found[1:]), torch.stack(other[1:]), 1e-9)


@pytest.mark.parametrize("sizes", [[1] * 24, [5, 19], [7, 7, 7, 3]])
def test_a_population_is_taken_at_its_word(sizes):
    model, X, y = a_network()
    data = list(zip(X.split(sizes), y.split(sizes), strict=True))
    found = noise_scale(lambda b: cross_entropy(model(b[0]), b[1]), model.parameters(), data, population=True)
    G = per_example_gradients(cross_entropy, model, (X, y))
    assert close(found.squared_norm, G.mean(0).square().sum(), 1e-10)
    if sizes[0] == 1:
        assert close(found.trace, covariance(G).trace(), 1e-10) and close(found.scale, found.trace / found.squared_norm)


def test_the_kinds_of_batches_and_the_order_do_not_matter():
    model, X, y = a_network()
    pairs = list(zip(X.split(6), y.split(6), strict=True))

    def loss(b):
        return cross_entropy(model(b[0]), b[1])

    base = noise_scale(loss, model.parameters(), pairs)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=6)
    dicts = [UserDict(x=a, more=[c]) for a, c in pairs]
    for other in (
        noise_scale(loss, model.parameters(), reversed(pairs)),
        noise_scale(loss, model.parameters(), loader),
        noise_scale(lambda b: cross_entropy(model(b["x"]), b["more"][0]), model.parameters(), dicts),
        noise_scale(loss, (p for p in model.parameters()), iter(pairs)),
        noise_scale(lambda i: cross_entropy(model(X[i]), y[i]), model.parameters(), torch.arange(24).split(6)),
    ):
        assert close(torch.stack(other), torch.stack(base), 1e-10)


def test_gradients_frozen_and_unused_parameters_are_left_alone():
    model, X, y = a_network()
    model[0].weight.requires_grad_(False)
    model.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]

    def loss(i):
        return cross_entropy(nn.Sequential(*list(model)[:3])(X[i]), y[i])

    assert noise_scale(loss, model.parameters(), torch.arange(24).split(4)).trace > 0
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old) and torch.equal(p.grad, torch.ones_like(p))


def test_half_precision_models_are_measured_in_float32():
    model, X, y = a_network(dtype=torch.float32)

    def loss(m, i):
        return cross_entropy(m(X[i].to(m[0].weight.dtype)), y[i])

    exact = noise_scale(lambda i: loss(model, i), model.parameters(), torch.arange(24).split(4))
    half = model.to(torch.bfloat16)
    found = noise_scale(lambda i: loss(half, i), half.parameters(), torch.arange(24).split(4))
    assert found.trace.dtype == torch.float32 and abs(found.trace / exact.trace - 1) < 0.05


def test_no_signal_is_an_infinite_noise_scale():
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    found = noise_scale(lambda c: (c * w).mean(), [w], torch.tensor([[1.0], [-1.0]]).double())
    assert found.scale == math.inf and found.trace == 2 and found.squared_norm == -1
    assert noise_scale_from_batches(1.0, 0.25, batch_sizes=(1, 4)).scale == math.inf


def test_noise_scales_refuse():
    w = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="at least 2"):
        noise_scale(lambda c: (c * w).mean(), [w], [torch.ones(3)])
    with pytest.raises(ValueError, match="requires a gradient"):
        noise_scale(lambda c: c.mean(), [torch.zeros(1)], [torch.ones(3)] * 2)
    for batch in ("text", 3, [], {}, ["text"]):
        with pytest.raises(TypeError, match="batch holds no tensor"):
            noise_scale(lambda c: w.sum(), [w], [batch])
    for sizes in ((2, 2), (4, 2), (0, 2)):
        with pytest.raises(ValueError, match="batch_sizes"):
            noise_scale_from_batches(1.0, 1.0, batch_sizes=sizes)


# --- critical batch size


@fast
@given(st.floats(0.5, 1e4), st.floats(1.0, 1e7), st.lists(st.integers(0, 14), min_size=2, max_size=8, unique=True))
def test_the_fit_recovers_a_hyperbola(S_min, E_min, exponents):
    b = torch.tensor([2.0**k for k in exponents], dtype=torch.float64)
    S = S_min + E_min / b
    if (S.max() - S.min()) / S.min() < 1e-3:
        return
    fit = critical_batch_size(b, S)
    assert close(fit.size / (E_min / S_min), 1.0, 1e-5)
    E = b * S
    assert close((S / S_min - 1) * (E / E_min - 1), 1.0, 1e-6)
    at = fit.min_steps + fit.min_examples / fit.size
    assert close(at / (2 * fit.min_steps), 1.0) and close(at * fit.size / (2 * fit.min_examples), 1.0)


def test_critical_batch_size_refuses():
    for b, S, words in [
        ([1, 2], [3], "one length"),
        ([2, 2], [3, 3], "different"),
        ([1, -2], [3, 3], "positive"),
        ([1, 2], [0, 3], "positive"),
        ([1, 2], [math.inf, 3], "finite"),
        ([1, 2, 4], [10, 20, 40], "further apart"),
    ]:
        with pytest.raises(ValueError, match=words):
            critical_batch_size(b, S)


def test_the_public_names():
    for name in ("critical_batch_size", "expected_loss", "gradient_covariance", "minibatches", "noise_ball",
                 "noise_scale", "noise_scale_from_batches", "per_example_gradients"):  # fmt: skip
        doc = getattr(gd.noise, name).__doc__
        assert "Chapter 02" in doc or "chapter 02" in doc
