"""Chapter 01: the test problems are what they say, and gradient descent does what the equations say. All in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_descent.problems import (
    GradientDescent,
    LogisticRegression,
    Problem,
    Quadratic,
    Rosenbrock,
    backtracking,
    digits,
    random_rotation,
    rotation,
    steepest_step,
    trajectory,
)

seeds = st.integers(0, 2**31 - 1)
fast = settings(max_examples=25, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def a_quadratic(seed: int, d: int) -> Quadratic:
    g = generator(seed)
    spectrum = normal(g, d).exp().sort(descending=True).values
    return Quadratic(spectrum, random_rotation(d, g), normal(g, d))


def a_regression(seed: int, bias: bool = True) -> LogisticRegression:
    g = generator(seed)
    y = torch.arange(20) % 3
    return LogisticRegression(normal(g, 20, 4) + y[:, None], y, l2=0.01, bias=bias)


def close(a: torch.Tensor, b: object, tol: float = 1e-12) -> bool:
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)


# --- problems


@fast
@given(seeds, st.integers(1, 8))
def test_quadratic_derivatives_constants_and_optimum(seed, d):
    q = a_quadratic(seed, d)
    x = normal(generator(seed), d)
    assert close(q.gradient(x), Problem.gradient(q, x))
    assert close(q.hessian(x), Problem.hessian(q, x))
    lam = torch.linalg.eigvalsh(q.H)
    assert close(lam.flip(0), q.spectrum)
    assert close(torch.stack([lam[-1], lam[0], lam[-1] / lam[0]]), [q.L, q.mu, q.kappa], 1e-9)
    assert close(q.loss(q.minimizer), q.minimum) and q.gradient(q.minimizer).norm() == 0
    assert close(q.basis.T @ (q.start - q.minimizer), torch.ones(d))


def test_quadratic_takes_batches():
    q, x = a_quadratic(0, 3), normal(generator(1), 4, 5, 3)
    assert q.loss(x).shape == (4, 5) and q.gradient(x).shape == x.shape
    assert close(q.loss(x)[2, 3], q.loss(x[2, 3])) and close(q.gradient(x)[2, 3], q.gradient(x[2, 3]))


def test_quadratic_follows_the_dtype_of_its_spectrum():
    q = Quadratic(torch.tensor([2.0, 1.0]), rotation(0.3))
    assert q.H.dtype == q.start.dtype == q.loss(q.start).dtype == torch.float32


@fast
@given(seeds, st.integers(1, 8))
def test_random_rotation_is_orthogonal(seed, d):
    q = random_rotation(d, generator(seed))
    assert close(q.T @ q, torch.eye(d, dtype=torch.float64))


def test_random_rotation_is_uniform():
    """The first column of a Haar matrix has mean 0 and covariance I/d; QR without the sign fix has neither."""
    g = generator(0)
    q = torch.stack([random_rotation(3, g) for _ in range(4000)])
    assert q.mean(0).abs().max() < 0.04
    assert (q[:, :, 0].T @ q[:, :, 0] / 4000 - torch.eye(3) / 3).abs().max() < 0.03


def test_rotation_turns_counterclockwise():
    east = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert close(rotation(math.pi / 2) @ east, torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("dim", [2, 3, 4, 7])
def test_rosenbrock(dim):
    r = Rosenbrock(dim)
    assert r.loss(r.minimizer) == r.minimum == 0 and r.gradient(r.minimizer).norm() == 0
    assert (torch.linalg.eigvalsh(r.hessian(r.minimizer)) > 0).all()
    assert r.start.shape == (dim,) and r.start[:2].tolist() == [-1.2, 1.0]
    assert close(r.loss(torch.stack([r.start, r.minimizer])), torch.stack([r.loss(r.start), r.loss(r.minimizer)]))


def test_rosenbrock_by_hand():
    r = Rosenbrock()
    assert close(r.loss(r.start), 24.2) and close(r.gradient(r.start), [-215.6, -88.0])
    assert close(r.hessian(r.minimizer), [[802.0, -400.0], [-400.0, 200.0]])


def second_minimum(dim):
    r, x = Rosenbrock(dim), torch.ones(dim, dtype=torch.float64)
    x[0] = -1
    for _ in range(30):
        x = x - torch.linalg.solve(r.hessian(x), r.gradient(x))
    assert r.gradient(x).norm() < 1e-9 and (torch.linalg.eigvalsh(r.hessian(x)) > 0).all() and r.loss(x) > 3
    return x


def test_rosenbrock_has_the_second_minimum_its_docstring_gives():
    """Coordinates in four dimensions, as printed there; above, ever closer to (−1, 1, …, 1)."""
    found = [second_minimum(dim) for dim in (4, 5, 6, 7)]
    assert [round(v, 3) for v in found[0].tolist()] == [-0.776, 0.613, 0.382, 0.146]
    corners = [torch.tensor([-1.0] + [1.0] * (len(x) - 1), dtype=x.dtype) for x in found]
    gaps = [float((x - corner).abs().max()) for x, corner in zip(found, corners, strict=True)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.1


@fast
@given(seeds, st.booleans())
def test_logistic_regression_derivatives_and_constants(seed, bias):
    problem = a_regression(seed, bias)
    W = normal(generator(seed), *problem.start.shape)
    assert close(problem.gradient(W), Problem.gradient(problem, W))
    assert close(problem.hessian(W), Problem.hessian(problem, W))
    lam = torch.linalg.eigvalsh(problem.hessian(W))
    assert close(lam[0], problem.mu, 1e-9) and lam[-1] <= problem.L


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_logistic_regression_optimum(seed):
    problem = a_regression(seed)
    W = problem.minimizer
    allowed = 100 * torch.finfo(W.dtype).eps * max(1.0, problem.L) * max(1.0, float(W.norm()))
    assert problem.gradient(W).norm() <= allowed and W is problem.minimizer
    assert close(problem.loss(W), problem.minimum)
    assert problem.minimum < problem.loss(W + 1e-3 * normal(generator(seed), *W.shape))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logistic_regression_converges_at_any_scale(scale, dtype):
    y = torch.arange(20) % 3
    X = scale * (normal(generator(0), 20, 4) + y[:, None]).to(dtype)
    problem = LogisticRegression(X, y, l2=0.01 * max(1.0, scale**2))
    W = problem.minimizer
    allowed = 100 * torch.finfo(dtype).eps * max(1.0, problem.L) * max(1.0, float(W.norm()))
    assert W.dtype == dtype and problem.gradient(W).norm() <= allowed


def test_logistic_regression_says_when_newton_fails():
    class Crawling(LogisticRegression):
        def hessian(self, W):
            return 1e6 * torch.eye(W.numel(), dtype=W.dtype)

    with pytest.raises(RuntimeError, match="Newton's method ends with"):
        _ = Crawling(X + 0.0, Y).minimizer


def test_the_smoothness_of_softmax_regression_cannot_be_improved():
    problem = LogisticRegression(normal(generator(2), 20, 4), torch.arange(20) % 5)
    W = torch.zeros_like(problem.start)
    W[2:, -1] = -60
    assert close(torch.linalg.eigvalsh(problem.hessian(W))[-1], problem.L)


def test_logistic_regression_agrees_with_cross_entropy():
    problem = a_regression(3)
    W = normal(generator(4), *problem.start.shape)
    logits = torch.nn.functional.linear(problem.inputs[:, :-1], W[:, :-1], W[:, -1])
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(20) % 3) + 0.005 * W.square().sum()
    assert close(problem.loss(W), expected)


def test_digits():
    X, y = digits()
    assert X.shape == (1797, 64) and X.dtype == torch.float64 and y.dtype == torch.int64
    assert X.min() == 0 and X.max() == 1 and sorted(set(y.tolist())) == list(range(10))
    centred, _ = digits(center=True)
    assert close(centred, X - X.mean(0)) and digits(dtype=torch.float32)[0].dtype == torch.float32
    scaled, _ = digits(center=True, scale=True)
    live = X.std(0) > 0
    assert torch.isfinite(scaled).all() and close(scaled[:, live].std(0), torch.ones(int(live.sum())))


# --- steepest descent


@fast
@given(seeds, st.integers(2, 6), st.sampled_from(["euclidean", "max", "sum", "quadratic"]), st.floats(0.01, 10))
def test_no_step_beats_the_steepest(seed, d, name, lr):
    rng = generator(seed)
    g, A = normal(rng, d), normal(rng, d, d)
    P = A @ A.T + 0.1 * torch.eye(d, dtype=torch.float64)
    lengths = {
        "euclidean": lambda v: v.norm(dim=-1),
        "max": lambda v: v.abs().amax(-1),
        "sum": lambda v: v.abs().sum(-1),
        "quadratic": lambda v: ((v @ P) * v).sum(-1).sqrt(),
    }

    def model(v):
        return v @ g + lengths[name](v) ** 2 / (2 * lr)

    best = steepest_step(g, lr, P if name == "quadratic" else name)
    scale = 10.0 ** -torch.arange(12, dtype=torch.float64).repeat(50)[:, None]
    others = best + scale * best.norm() * normal(rng, 600, d)
    assert (model(others) >= model(best) - 1e-12 * (1 + model(best).abs())).all()


@fast
@given(seeds, st.integers(1, 6), st.sampled_from(["euclidean", "max"]))
def test_the_descent_lemma_under_a_norm(seed, d, norm):
    q = a_quadratic(seed, d)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * d).reshape(-1, d)
    L = q.L if norm == "euclidean" else float((signs @ q.H).abs().sum(1).max())
    x = normal(generator(seed), d)
    g = q.gradient(x)
    dual = g.norm() if norm == "euclidean" else g.abs().sum()
    gain = q.loss(x) - q.loss(x + steepest_step(g, 1 / L, norm))
    assert gain >= dual**2 / (2 * L) * (1 - 1e-9) - 1e-12


@fast
@given(seeds, st.integers(1, 6))
def test_right_metric_ends_in_one_step(seed, d):
    q = a_quadratic(seed, d)
    assert close(q.start + steepest_step(q.gradient(q.start), 1.0, q.H), q.minimizer, 1e-9)


# --- gradient descent


@fast
@given(seeds, st.integers(1, 6), st.floats(0, 0.3))
def test_gradient_descent_is_sgd(seed, d, lr):
    q = a_quadratic(seed, d)
    ours = trajectory(q, GradientDescent, 20, lr=lr, engine="loop")
    theirs = trajectory(q, torch.optim.SGD, 20, lr=lr)
    assert close(ours, theirs) and ours.shape == (21, d) and torch.equal(ours[0], q.start)


@fast
@given(seeds, st.integers(1, 6), st.floats(0.05, 1.2))
def test_modes_decay_alone(seed, d, part):
    q = a_quadratic(seed, d)
    lr = part * 2 / q.L
    error = (trajectory(q, GradientDescent, 15, lr=lr) - q.minimizer) @ q.basis
    assert close(error, (1 - lr * q.spectrum) ** torch.arange(16)[:, None], 1e-9)


@fast
@given(seeds, st.floats(1.1, 1e4))
def test_the_rate_is_attained_at_every_step(seed, kappa):
    q = Quadratic([kappa, math.sqrt(kappa), 1.0], random_rotation(3, generator(seed)))
    worst = q.basis[:, 0] + q.basis[:, 2]
    path = trajectory(q, GradientDescent, 20, lr=2 / (kappa + 1), start=worst).norm(dim=1)
    assert close(path[1:] / path[:-1], torch.full((20,), (kappa - 1) / (kappa + 1), dtype=torch.float64), 1e-9)


@fast
@given(seeds, st.floats(0.1, 1.9))
def test_a_strongly_convex_problem_contracts_as_a_quadratic_does(seed, part):
    """Softmax regression is no quadratic; its bounds L and mu stand for the ends of a spectrum."""
    f = a_regression(seed)
    lr = part / f.L
    rho = max(abs(1 - lr * f.mu), abs(1 - lr * f.L))
    start = f.minimizer + normal(generator(seed), *f.start.shape)
    path = trajectory(f, GradientDescent, 5, lr=lr, start=start, engine="loop") - f.minimizer
    distance = path.flatten(1).norm(dim=1)
    assert (distance[1:] <= rho * distance[:-1] + 1e-9).all()


def test_trajectory_leaves_the_problem_alone():
    q = a_quadratic(5, 3)
    start = q.start.clone()
    trajectory(q, GradientDescent, 3)
    assert torch.equal(q.start, start) and trajectory(q, GradientDescent, 0).shape == (1, 3)


# --- line search


@fast
@given(seeds, st.floats(0.01, 0.9), st.floats(0.1, 0.9), st.floats(0.1, 100))
def test_backtracking(seed, c, shrink, lr):
    q = a_quadratic(seed, 4)
    g = q.gradient(q.start)
    t = backtracking(q.loss, q.start, -g, g, lr=lr, c=c, shrink=shrink)
    slack = 1e-14 * (1 + q.loss(q.start))
    assert q.loss(q.start - t * g) <= q.loss(q.start) - c * t * g @ g + slack
    assert t >= min(lr, 2 * (1 - c) * shrink / q.L) * (1 - 1e-9)
    assert t == lr or not q.loss(q.start - t / shrink * g) <= q.loss(q.start) - c * t / shrink * g @ g - slack


def test_backtracking_steps_back_from_what_is_not_a_number():
    x = torch.tensor([1.0], dtype=torch.float64)
    t = backtracking(lambda x: -x.log().sum() + x.sum() ** 2, x, torch.tensor([-4.0]), torch.tensor([1.0]))
    assert t == 0.125 or 0 < t < 0.25


def test_backtracking_ends_at_the_minimum():
    q = a_quadratic(1, 4)
    x = q.minimizer + 1e-12
    g = q.gradient(x)
    assert backtracking(lambda x: 1 + q.loss(x), x, -g, g) > 0


# --- bad input

X, Y = torch.eye(4, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
x3, bad_basis = torch.ones(3, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
indefinite = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Quadratic([]), ValueError, "spectrum has shape"),
        (lambda: Quadratic([1.0, 2.0]), ValueError, "largest first"),
        (lambda: Quadratic([1.0, 0.0]), ValueError, "positive"),
        (lambda: Quadratic([math.inf, 1.0]), ValueError, "finite"),
        (lambda: Quadratic(torch.tensor([2, 1])), TypeError, "spectrum has dtype torch.int64"),
        (lambda: Quadratic([2.0, 1.0], bad_basis), ValueError, "basis is not orthogonal"),
        (lambda: Quadratic([2.0, 1.0], torch.eye(3)), ValueError, r"basis has shape \(3, 3\); pass shape \(2, 2\)"),
        (lambda: Quadratic([2.0, 1.0], minimizer=x3), ValueError, "minimizer has shape"),
        (lambda: random_rotation(0), ValueError, "d=0"),
        (lambda: Rosenbrock(1), ValueError, "dim=1"),
        (lambda: Rosenbrock(2, steepness=0.0), ValueError, "steepness=0.0"),
        (lambda: trajectory(Rosenbrock(), GradientDescent, -1), ValueError, "steps=-1"),
        (lambda: steepest_step(x3, 0.1, "taxi"), ValueError, "norm='taxi'"),
        (lambda: steepest_step(x3, 0.0), ValueError, "lr=0.0"),
        (lambda: steepest_step(x3, 0.1, bad_basis), ValueError, r"norm has shape \(2, 2\)"),
        (lambda: steepest_step(x3, 0.1, indefinite), ValueError, "positive definite"),
        (lambda: steepest_step(x3, 0.1, torch.eye(3).triu() + torch.ones(3, 3).triu(1)), ValueError, "symmetric"),
        (lambda: backtracking(torch.sum, x3, x3, x3), ValueError, "descent direction"),
        (lambda: backtracking(torch.sum, x3, -x3, x3, c=1.0), ValueError, "c=1.0"),
        (lambda: backtracking(torch.sum, x3, -x3, x3, shrink=1.5), ValueError, "shrink=1.5"),
        (lambda: backtracking(torch.sum, x3, -x3, x3, lr=-1.0), ValueError, "lr=-1.0"),
        (lambda: backtracking(torch.sum, x3, -x3, x3, limit=0), ValueError, "limit=0"),
        (lambda: backtracking(lambda x: x.sum() / 0, x3, -x3, x3), ValueError, r"loss\(x\) = inf"),
        (lambda: backtracking(lambda x: -x.sum(), x3, -x3, x3, limit=5), RuntimeError, "gradient"),
        (lambda: LogisticRegression(X, Y, l2=0.0), ValueError, "l2=0.0"),
        (lambda: LogisticRegression(X, Y[:3]), ValueError, "X has shape"),
        (lambda: LogisticRegression(X.long(), Y), TypeError, "X has dtype torch.int64"),
        (lambda: LogisticRegression(X, Y.double()), TypeError, "y has dtype"),
        (lambda: LogisticRegression(X, Y * 0), ValueError, "two classes"),
        (lambda: LogisticRegression(X, Y - 1), ValueError, "y holds classes -1"),
        (lambda: LogisticRegression(X / 0, Y), ValueError, "not finite"),
        (lambda: GradientDescent([x3.clone().requires_grad_()], lr=-1.0), ValueError, "lr=-1.0"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(call, error, words):
    with pytest.raises(error, match=words):
        call()
