"""Chapter 05: the population identities, in float64 and for random tasks; invariances; the steps against autodiff."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from guided_descent.feature_learning import (
    Moments,
    SingleIndex,
    alignment,
    alternating_step,
    covariance_root,
    feature_gradient,
    head_gradient,
    kronecker_direction,
    least_squares_head,
    linear_tasks,
    log_spaced,
    orthonormal,
    sgd_step,
    single_index,
    subspace_distance,
    transfer_tasks,
    two_layer_kfac_step,
    two_layer_moments,
    white_moments,
)
from guided_descent.problems import random_rotation

seeds = st.integers(0, 2**31 - 1)
sizes = st.tuples(st.integers(5, 12), st.integers(3, 7), st.integers(1, 3))  # d, out, k
fast = settings(max_examples=25, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def close(a: torch.Tensor, b: object, tol: float = 1e-10) -> bool:
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)


def setting(seed: int, size: tuple[int, int, int], noise: float = 0.0, batch: bool = False):
    """Two tasks, a random model, and the moments of the population or of a batch."""
    g, (d, out, k) = generator(seed), size
    tasks = linear_tasks(2, d=d, out=out, k=k, kappa_x=50, kappa_f=5, noise=noise, generator=g)
    moments = tasks.population()
    if batch:
        moments = tasks.moments(white_moments((2,), n=4 * d, d=d, out=out, generator=g))
    return g, tasks, normal(g, 2, out, k), normal(g, 2, k, d), moments


def outside(G: torch.Tensor) -> torch.Tensor:
    return torch.eye(G.shape[-1], dtype=G.dtype) - G.mT @ G


# --- the linear model: identities


@fast
@given(seeds, sizes)
def test_population_gradient_and_loss(seed, size):
    _, tasks, F, G, population = setting(seed, size)
    gF, gG = torch.func.grad(lambda F, G: tasks.excess_loss(F, G).sum(), argnums=(0, 1))(F, G)
    assert close(feature_gradient(F, G, population), gG)
    assert close(head_gradient(F, G, population), gF)
    misfit = (F @ G - tasks.F @ tasks.G) @ population.xx
    assert close(gG, F.mT @ misfit)
    assert close(tasks.excess_loss(tasks.F, tasks.G), [0, 0])


@fast
@given(seeds, sizes)
def test_the_leak_vanishes_exactly_for_isotropic_inputs(seed, size):
    g, tasks, F, G, population = setting(seed, size)
    away = outside(tasks.G)
    R, inside = F @ G - tasks.F @ tasks.G, tasks.G.mT @ tasks.G
    leak = F.mT @ R @ inside @ population.xx @ away
    shrink = F.mT @ F @ G @ away @ population.xx @ away
    assert close(feature_gradient(F, G, population) @ away, shrink + leak)
    flat = tasks._replace(root=torch.eye(size[0], dtype=torch.float64).expand(2, -1, -1))
    assert close(feature_gradient(F, G, flat.population()) @ away, F.mT @ F @ G @ away)


@fast
@given(seeds, sizes, st.floats(0.01, 1.0), st.booleans())
def test_contraction_without_a_condition_number(seed, size, eta, batch):
    """Also on a finite batch, whose sampling error in x cancels."""
    _, tasks, F, G, moments = setting(seed, size, batch=batch)
    away = outside(tasks.G)
    after = G - eta * kronecker_direction(F, G, moments, damping=0.0)
    scale = float(torch.linalg.cond(F).max()) ** 2
    assert close(after @ away, (1 - eta) * G @ away, 1e-10 * max(1.0, scale / 100))


@fast
@given(seeds, sizes)
def test_orthonormal_rows_change_the_metric_not_the_kernel(seed, size):
    _, tasks, F, G, moments = setting(seed, size)
    after = G - 0.5 * kronecker_direction(F, G, moments, damping=0.0)
    assert close(subspace_distance(orthonormal(after), tasks.G), subspace_distance(after, tasks.G), 1e-8)


@fast
@given(seeds, sizes)
def test_the_direction_is_block_gauss_newton(seed, size):
    g, _, F, G, moments = setting(seed, size, noise=1.0, batch=True)
    direction = kronecker_direction(F, G, moments, damping=0.0)
    root = torch.linalg.cholesky(moments.xx)  # as many inputs with these moments
    for b in range(2):
        J = torch.func.jacrev(lambda G, b=b: F[b] @ G @ root[b])(G[b]).flatten(2).flatten(0, 1)
        block = J.T @ J
        assert close(block, torch.kron(F[b].T @ F[b], moments.xx[b]))
        step = torch.linalg.solve(block, feature_gradient(F, G, moments)[b].flatten())
        assert close(block @ direction[b].flatten(), block @ step, 1e-8)


@fast
@given(seeds, sizes)
def test_change_of_inputs_and_of_features(seed, size):
    """Invertible changes of the input leave K-FAC alone, rotations also the gradient; so does a change of features."""
    g, _, F, G, moments = setting(seed, size, noise=0.1, batch=True)
    d, k = size[0], size[2]
    turn = random_rotation(d, g)
    T = turn @ torch.diag(1 + torch.rand(d, generator=g, dtype=torch.float64))
    plain = kronecker_direction(F, G, moments, damping=0.0)
    scale = plain.abs().max() + 1
    changed = Moments(T @ moments.xx @ T.T, moments.yx @ T.T)
    back = torch.linalg.inv(T)
    new = kronecker_direction(F, G @ back, changed, damping=0.0)
    assert close(new / scale, plain @ back / scale, 1e-7)

    turned = Moments(turn @ moments.xx @ turn.T, moments.yx @ turn.T)
    assert close(feature_gradient(F, G @ turn.T, turned), feature_gradient(F, G, moments) @ turn.T, 1e-9)

    M = random_rotation(k, g) @ torch.diag(1 + torch.rand(k, generator=g, dtype=torch.float64))
    mixed = kronecker_direction(F @ torch.linalg.inv(M), M @ G, moments, damping=0.0)
    assert close(mixed / scale, M @ plain / scale, 1e-7)


def test_the_gradient_is_not_invariant_to_a_stretch():
    g, _, F, G, moments = setting(0, (6, 4, 2), noise=0.1, batch=True)
    T = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    changed = Moments(T @ moments.xx @ T, moments.yx @ T)
    new = feature_gradient(F, G @ torch.linalg.inv(T), changed)
    assert not close(new, feature_gradient(F, G, moments) @ torch.linalg.inv(T), 1e-2)


@fast
@given(seeds, sizes)
def test_sides_compose_and_damping_goes_to_the_gradient(seed, size):
    _, _, F, G, moments = setting(seed, size, batch=True)
    g = feature_gradient(F, G, moments)
    assert close(kronecker_direction(F, G, moments, left=False, right=False), g)
    left = kronecker_direction(F, G, moments, right=False, damping=0.0)
    right = kronecker_direction(F, G, moments, left=False, damping=0.0)
    assert close(F.mT @ F @ left, g, 1e-8) and close(right @ moments.xx, g, 1e-8)
    d = size[0]
    mean = moments.xx.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damped = moments.xx + 0.1 * mean * torch.eye(d, dtype=torch.float64)
    assert close(kronecker_direction(F, G, moments, left=False, damping=0.1) @ damped, g, 1e-9)


@fast
@given(seeds, sizes)
def test_the_head_solves_its_normal_equations(seed, size):
    _, _, _, G, moments = setting(seed, size, noise=1.0, batch=True)
    assert head_gradient(least_squares_head(G, moments, damping=0.0), G, moments).abs().max() < 1e-9


def test_steps_are_what_they_say():
    g, tasks, F, G, first = setting(3, (8, 5, 2), noise=0.1, batch=True)
    second = tasks.moments(white_moments((2,), n=40, d=8, out=5, generator=g))
    newF, newG = sgd_step(F, G, first, second, 0.01)
    assert close(newG, G - 0.01 * feature_gradient(F, G, first))
    assert close(newF, F - 0.01 * head_gradient(F, newG, second))
    newF, newG = alternating_step(F, G, first, second, 0.1, kronecker_direction)
    assert close(newG @ newG.mT, torch.eye(2).expand(2, 2, 2))
    assert close(newG, orthonormal(G - 0.1 * kronecker_direction(F, G, first)))
    assert close(newF, least_squares_head(newG, second))
    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)[:, None, None]  # one for each task
    _, each = alternating_step(F, G, first, second, rates)
    for b, lr in enumerate((0.1, 0.2)):
        _, one = alternating_step(F, G, first, second, lr)
        assert close(each[b], one[b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kfac_ends_at_a_tenth_of_amgd(dtype):
    """A small race: 3 seeds, both at a good step."""
    tasks = linear_tasks(3, d=20, out=6, k=3, kappa_x=100, kappa_f=10, generator=generator(0), dtype=dtype)
    start = orthonormal(tasks.G + 0.2 * torch.randn(tasks.G.shape, generator=generator(1), dtype=dtype))
    draws = white_moments((100, 2, 3), n=128, d=20, out=6, generator=generator(2), dtype=dtype)
    final = {}
    for lr, direction in ((0.25, feature_gradient), (1 / 16, kronecker_direction)):
        G, F = start, None
        for xx, yx in zip(*draws, strict=True):
            first, second = (tasks.moments(Moments(xx[h], yx[h])) for h in (0, 1))
            F = least_squares_head(G, second) if F is None else F
            F, G = alternating_step(F, G, first, second, lr, direction)
        final[direction] = subspace_distance(G, tasks.G)
    assert (final[kronecker_direction] < 0.1 * final[feature_gradient]).all()


# --- generators and metrics


@fast
@given(seeds, st.integers(2, 30), st.floats(1, 1e4))
def test_spectrum_and_root(seed, d, kappa):
    lam = log_spaced(d, kappa)
    assert math.isclose(lam.mean(), 1) and math.isclose(lam[0] / lam[-1], kappa, rel_tol=1e-9)
    ratios = lam[1:] / lam[:-1]
    assert close(ratios, ratios[0].expand_as(ratios))
    basis = random_rotation(d, generator(seed))
    root = covariance_root(lam, basis)
    assert close(root, root.T) and close(root @ root, basis * lam @ basis.T)


@fast
@given(seeds, sizes)
def test_tasks_have_the_chosen_condition_numbers(seed, size):
    d, out, k = size
    tasks = linear_tasks(2, d=d, out=out, k=k, kappa_x=50, kappa_f=5, generator=generator(seed))
    lam, s = torch.linalg.eigvalsh(tasks.population().xx), torch.linalg.svdvals(tasks.F)
    assert close(lam[:, -1] / lam[:, 0], [50, 50], 1e-8) and close(lam.mean(-1), [1, 1])
    assert close(s[:, 0], [1, 1]) and close(s[:, -1], [0.2 if k > 1 else 1] * 2)
    assert close(tasks.G @ tasks.G.mT, torch.eye(k).expand(2, k, k))
    again = linear_tasks(2, d=d, out=out, k=k, generator=generator(seed))
    assert torch.equal(again.G, tasks.G)  # the same bases whatever the condition numbers
    new = transfer_tasks(tasks, kappa_x=3, generator=generator(seed + 1))
    assert torch.equal(new.G, tasks.G) and not close(new.F, tasks.F) and not close(new.root, tasks.root)


@fast
@given(seeds, sizes)
def test_what_a_new_task_misses_is_the_mean_squared_sine(seed, size):
    g, tasks, _, G, _ = setting(seed, size)
    new = transfer_tasks(tasks, noise=0.0, generator=g)
    best = least_squares_head(G, new.population(), damping=0.0)
    missed = new.excess_loss(best, G) / new.excess_loss(0 * best, G)
    cosines = torch.linalg.svdvals(orthonormal(G) @ new.G.mT)
    assert close(missed, (1 - cosines.square()).mean(-1), 1e-8)


def test_a_batch_shared_by_several_runs_is_what_each_alone_gets():
    g, _, _, _, moments = setting(3, (8, 5, 2), noise=0.3, batch=True)
    Fs, Gs = normal(g, 2, 3, 5, 2), normal(g, 2, 3, 2, 8)
    shared = Moments(moments.xx[:, None], moments.yx[:, None])
    for f in (feature_gradient, head_gradient, kronecker_direction):
        together = f(Fs, Gs, shared)
        for j in range(3):
            assert close(together[:, j], f(Fs[:, j], Gs[:, j], moments))
    together = least_squares_head(Gs, shared)
    assert close(together[:, 1], least_squares_head(Gs[:, 1], moments))


def test_moments_are_those_of_examples():
    """The shared white draws against examples written out, and large batches against the population."""
    d, out, n = 6, 4, 50
    tasks = linear_tasks(1, d=d, out=out, k=2, kappa_x=10, noise=0.7, generator=generator(0))
    white = white_moments((1,), n=n, d=d, out=out, generator=generator(5))
    g = generator(5)
    u = 2 * torch.randint(0, 2, (n, d), generator=g).double() - 1
    e = torch.randn(n, out, generator=g, dtype=torch.float64)
    x = u @ tasks.root[0]
    y = x @ (tasks.F @ tasks.G)[0].T + 0.7 * e
    batch = tasks.moments(white)
    assert close(batch.xx[0], x.T @ x / n) and close(batch.yx[0], y.T @ x / n)
    many = tasks.moments(white_moments((1,), n=200_000, d=d, out=out, generator=generator(6)))
    for a, b in zip(many, tasks.population(), strict=True):
        assert (a - b).abs().max() < 0.03


@fast
@given(seeds, st.integers(3, 12), st.integers(1, 3))
def test_subspace_distance(seed, d, k):
    g = generator(seed)
    A, B = normal(g, k, d), normal(g, k, d)
    cosines = torch.linalg.svdvals(orthonormal(A) @ orthonormal(B).T)
    distance = subspace_distance(A, B)
    assert close(distance**2, 1 - cosines[-1] ** 2, 1e-9)
    assert close(distance, subspace_distance(B, A), 1e-7)  # symmetric
    M, Q = normal(g, k, k) + 3 * torch.eye(k), random_rotation(d, g)
    assert close(subspace_distance(M @ A, B), distance, 1e-6)
    assert close(subspace_distance(A @ Q, B @ Q), distance, 1e-7)
    assert float(subspace_distance(A, M @ A)) < 1e-10 * float(torch.linalg.cond(M))


def test_subspace_distance_of_known_planes():
    eye = torch.eye(4, dtype=torch.float64)
    angle = 0.3
    tilted = torch.stack([eye[0], math.cos(angle) * eye[1] + math.sin(angle) * eye[2]])
    assert close(subspace_distance(tilted, eye[:2]), math.sin(angle))
    assert close(subspace_distance(eye[2:], eye[:2]), 1.0)
    tiny = torch.stack([eye[0], eye[1] + 1e-11 * eye[3]])
    assert math.isclose(subspace_distance(tiny, eye[:2]), 1e-11, rel_tol=1e-4)  # no loss near zero


@fast
@given(seeds, st.integers(2, 8))
def test_orthonormal_is_gram_schmidt(seed, d):
    G = normal(generator(seed), d - 1, d)
    Q = orthonormal(G)
    assert close(Q @ Q.T, torch.eye(d - 1))
    assert close(orthonormal(Q), Q, 1e-9)  # an orthonormal basis stays
    R = G @ Q.T
    assert close(R.triu(1), torch.zeros_like(R)) and (R.diagonal() > 0).all()


# --- the single-index model


@fast
@given(seeds, st.integers(2, 10), st.integers(1, 6))
def test_spike(seed, d, width):
    """From pairs ±x the first gradient is −½ a (Qβ)ᵀ exactly, and −½ a βᵀ once Q is divided out."""
    g = generator(seed)
    task = single_index(1, log_spaced(d, 20), generator=g)
    assert close(torch.linalg.vector_norm(task.beta, dim=-1), [1])
    x, _ = (v[0] for v in task.sample(3 * d, g))
    x = torch.cat([x, -x])
    beta, y = task.beta[0], (x @ task.beta[0]).relu()
    W, a = 1e-6 * normal(g, width, d), 1e-6 * normal(g, width)
    gradient = torch.func.grad(lambda W: ((torch.tanh(x @ W.T) @ a - y) ** 2).mean() / 2)(W) / a.norm()
    Q, unit = x.T @ x / len(x), a / a.norm()
    assert close(gradient, -torch.outer(unit, Q @ beta) / 2, 1e-8)
    assert close(gradient @ torch.linalg.inv(Q), -torch.outer(unit, beta) / 2, 1e-6)

    Sigma = task.root[0] @ task.root[0]
    assert close(alignment(torch.outer(unit, Sigma @ beta), beta), task.spike_cosine()[0], 1e-8)
    formula = beta @ Sigma @ beta / (Sigma @ beta).norm()
    longer = SingleIndex(3 * task.beta, task.root)
    assert close(task.spike_cosine()[0], formula) and close(longer.spike_cosine()[0], formula)


def test_single_index_answers_and_noise():
    task = single_index(2, log_spaced(5, 4), noise=2.0, generator=generator(0))
    x, y = task.sample(20_000, generator(1))
    assert x.shape == (2, 20_000, 5) and y.shape == (2, 20_000)
    rest = y - (x @ task.beta[..., None]).squeeze(-1).relu()
    assert (rest.std(1) - 2).abs().max() < 0.05
    cov = x.mT @ x / 20_000
    assert (cov - task.root @ task.root).abs().max() < 0.1
    assert (single_index(1, log_spaced(5, 4), generator=generator(0)).sample(9)[1] >= 0).all()


def test_alignment():
    g = generator(0)
    u, v = normal(g, 4), normal(g, 6)
    assert close(alignment(torch.outer(u, v), -5 * v), 1.0)
    W = torch.outer(u, v) + 0.1 * normal(g, 4, 6)
    beta = normal(g, 6)
    assert close(alignment(torch.stack([W, -W]), beta), alignment(W, beta).expand(2))
    Q = random_rotation(6, g)
    assert close(alignment(W @ Q, beta @ Q), alignment(W, beta))


# --- the two-layer network


@fast
@given(seeds, st.integers(2, 5), st.integers(1, 4), st.integers(1, 3))
def test_two_layer_moments(seed, d, hidden, out):
    g = generator(seed)
    W1, W2, X, Y = normal(g, hidden, d), normal(g, out, hidden), normal(g, 9, d), normal(g, 9, out)
    m = two_layer_moments(W1, W2, X, Y)

    def loss(W1, W2):
        return ((torch.tanh(X @ W1.T) @ W2.T - Y) ** 2).sum() / 18

    g1, g2 = torch.func.grad(loss, argnums=(0, 1))(W1, W2)
    assert close(m.g1, g1) and close(m.g2, g2)

    def blocks(x):
        """The Gauss–Newton blocks of one example, from its Jacobians."""
        J1, J2 = torch.func.jacrev(lambda A, B: B @ torch.tanh(A @ x), argnums=(0, 1))(W1, W2)
        return [J.flatten(1).T @ J.flatten(1) for J in (J1, J2)]

    # One example: exact. Layer two: exact for a batch, its own factor B2 being the identity.
    one = two_layer_moments(W1, W2, X[:1], Y[:1])
    first, second = blocks(X[0])
    assert close(torch.kron(one.B1, one.A1), first)
    assert close(torch.kron(torch.eye(out, dtype=torch.float64), one.A2), second)
    mean = torch.stack([blocks(x)[1] for x in X]).mean(0)
    assert close(torch.kron(torch.eye(out, dtype=torch.float64), m.A2), mean)

    # A batch: the factor B1 is the mean over examples.
    assert close(m.B1, torch.stack([two_layer_moments(W1, W2, X[i : i + 1], Y[:1]).B1 for i in range(9)]).mean(0))


@fast
@given(seeds)
def test_two_layer_step(seed):
    """Linear activation: the step of the linear model. Damping: relative to each factor's mean eigenvalue. Batched."""
    g = generator(seed)
    W1, W2, X, Y = normal(g, 2, 3, 5), normal(g, 2, 4, 3), normal(g, 2, 30, 5), normal(g, 2, 30, 4)
    batch = Moments(X.mT @ X / 30, Y.mT @ X / 30)
    new1, new2 = two_layer_kfac_step(W1, W2, X, Y, 0.3, activation=lambda z: 1.0 * z, damping=0.1)
    assert close(new1, W1 - 0.3 * kronecker_direction(W2, W1, batch, damping=0.1), 1e-8)
    zz = W1 @ batch.xx @ W1.mT
    zz = zz + 0.1 * zz.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(3, dtype=torch.float64)
    assert close(new2, W2 - 0.3 * head_gradient(W2, W1, batch) @ torch.linalg.inv(zz), 1e-8)
    whole = two_layer_kfac_step(W1, W2, X, Y, 0.3)
    for b in range(2):
        alone = two_layer_kfac_step(W1[b], W2[b], X[b], Y[b], 0.3)
        assert close(whole[0][b], alone[0]) and close(whole[1][b], alone[1])


# --- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_spaced(3, 0.5), "kappa"),
        (lambda: linear_tasks(0), "seeds=0"),
        (lambda: linear_tasks(1, d=4, out=3, k=4), "k=4"),
        (lambda: linear_tasks(1, kappa_f=0.0), "kappa"),
        (lambda: linear_tasks(1, noise=-1.0), "noise=-1.0"),
        (lambda: white_moments((1,), n=0), "n=0"),
        (lambda: single_index(1, log_spaced(3, 2), noise=math.inf), "noise=inf"),
        (lambda: single_index(1, -torch.ones(3)), "eigenvalue"),
        (lambda: subspace_distance(torch.eye(3)[:2], torch.eye(3)[:1]), "G_star"),
        (lambda: orthonormal(torch.ones(3, 2)), "at most"),
        (lambda: two_layer_moments(torch.eye(3), torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2])), "one_hot"),
        (lambda: least_squares_head(torch.eye(2), Moments(torch.eye(2), torch.eye(2)), damping=-1.0), "damping=-1.0"),
        (lambda: two_layer_kfac_step(*[torch.eye(2)] * 4, 0.1, damping=math.nan), "damping=nan"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- mistakes, devices, parameters


def test_a_lost_feature_counts():
    """A row of zeros finds nothing, so the distance is 1 and not that of the other rows."""
    g = generator(0)
    true = orthonormal(normal(g, 3, 8))
    lost = torch.cat([true[:2], torch.zeros(1, 8, dtype=torch.float64)])
    assert close(subspace_distance(lost, true), 1.0)
    assert close(subspace_distance(torch.zeros(2, 3, 8, dtype=torch.float64), true), [1.0, 1.0])


class Ops(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_is_made_on_another_device():
    """Checked on the meta device: all results stay there, and no tensor is copied over."""
    empty = torch.empty
    F, G, xx, yx = (empty(2, *s, device="meta") for s in ((4, 3), (3, 6), (6, 6), (4, 6)))
    beta, X, Y = empty(2, 6, device="meta"), empty(2, 9, 6, device="meta"), empty(2, 9, 4, device="meta")
    with Ops() as ops:
        out = [kronecker_direction(F, G, Moments(xx, yx)), least_squares_head(G, Moments(xx, yx))]
        out += two_layer_kfac_step(G, F, X, Y, 0.1)
        out += SingleIndex(beta, xx, noise=1.0).sample(9)
    assert all(t.device.type == "meta" for t in out)
    assert "solve" in str(ops.names) and "_to_copy" not in ops.names


def test_a_step_on_parameters():
    """With no_grad the step of nn.Parameters is plain, and their memory does not grow with a graph."""
    g = generator(0)
    W1, W2, X, Y = normal(g, 4, 6), normal(g, 3, 4), normal(g, 9, 6), normal(g, 9, 3)
    plain = two_layer_kfac_step(W1, W2, X, Y, 0.1)
    with torch.no_grad():
        new = two_layer_kfac_step(torch.nn.Parameter(W1), torch.nn.Parameter(W2), X, Y, 0.1)
    assert close(new[0], plain[0]) and close(new[1], plain[1])
    assert not new[0].requires_grad and not new[1].requires_grad
