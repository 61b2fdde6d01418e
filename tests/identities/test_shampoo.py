"""Chapter 10: what Shampoo, SOAP, KL-Shampoo and PSGD reduce to, are invariant under, and survive."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import guided_descent as gd
from guided_descent import shampoo
from guided_descent.examples import PlainMuon as Muon
from guided_descent.shampoo import eigenbasis, inverse_root, next_basis, preconditioned

seeds = st.integers(0, 2**31 - 1)
fast = settings(max_examples=15, deadline=None)
METHODS = {
    "Shampoo": gd.Shampoo,
    "SOAP": gd.SOAP,
    "KLShampoo": gd.KLShampoo,
    "PSGDKron": gd.PSGDKron,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(seed, n):
    return torch.linalg.qr(normal(seed, n, n))[0]


def run(method, gradients, dtype=torch.float64, **options):
    """Where fixed gradients lead from zero, and the state."""
    p = torch.zeros(gradients[0].shape, dtype=dtype).requires_grad_()
    options = {"lr": 0.1, "weight_decay": 0.0, "engine": "loop", **options}
    optimizer = method([p], **options)
    for g in gradients:
        p.grad = g.to(dtype)
        optimizer.step()
    return p.detach(), optimizer.state[p]


def close(a, b, tol=1e-8):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# --- no memory


@fast
@given(seeds)
def test_without_memory_shampoo_is_orthogonal_or_inverse(seed):
    G = normal(seed, 4, 4)
    U, S, Vh = torch.linalg.svd(G)
    options = {"lr": 1.0, "betas": (0.0, 0.0), "grafting": None, "eps": 0.0, "precondition_every": 1}
    close(-run(gd.Shampoo, [G], **options)[0], U @ Vh, 1e-6)
    close(-run(gd.Shampoo, [G], one_sided="left", **options)[0], U @ Vh, 1e-6)
    close(-run(gd.Shampoo, [G], one_sided="right", **options)[0], U @ Vh, 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inverse = -run(gd.Shampoo, [G], exponent=-0.5, **options)[0]
    close(inverse * S[-1], U / S * S[-1] @ Vh, 1e-6)


def test_muon_without_momentum_is_shampoo_without_memory():
    gradients = [normal(t, 4, 4) for t in range(5)]
    p = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    optimizer = Muon([p], lr=0.1, momentum=0.0, engine="loop")
    for g in gradients:
        p.grad = g
        optimizer.step()
    options = {"betas": (0.0, 0.0), "grafting": None, "eps": 0.0, "precondition_every": 1}
    close(run(gd.Shampoo, gradients, **options)[0], p.detach(), 1e-7)


@fast
@given(seeds, st.sampled_from([(4, 4), (6, 3), (3, 6)]))
def test_the_first_step_of_soap_is_orthogonal(seed, shape):
    G = normal(seed, *shape)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    moved = -run(gd.SOAP, [G], lr=1.0)[0]
    assert (moved - U @ Vh).norm() < 1e-3 * moved.norm()


# --- identity, rotations, scales


@fast
@given(seeds)
def test_soap_in_the_identity_basis_is_adam(seed):
    gradients = [normal(seed + t, 3, 4) for t in range(5)]
    ours = run(gd.SOAP, gradients, max_dim=0, eps=0.0, betas=(0.9, 0.8))[0]
    close(ours, run(gd.Adam, gradients, eps=0.0, betas=(0.9, 0.8))[0], 1e-12)


@fast
@given(seeds, st.sampled_from([{}, {"kl": True}]))
def test_soap_turns_with_the_gradients(seed, options):
    U, V = orthogonal(seed, 4), orthogonal(seed + 1, 4)
    gradients = [normal(seed + t, 4, 4) for t in range(6)]
    straight = run(gd.SOAP, gradients, precondition_every=2, **options)[0]
    turned = run(gd.SOAP, [U @ g @ V.T for g in gradients], precondition_every=2, **options)[0]
    close(turned, U @ straight @ V.T, 1e-3)


@fast
@given(seeds)
def test_shampoo_without_a_graft_and_kl_turn_with_the_gradients(seed):
    U, V = orthogonal(seed, 4), orthogonal(seed + 1, 3)
    gradients = [normal(seed + t, 4, 3) for t in range(6)]
    for method, options in ((gd.Shampoo, {"grafting": None}), (gd.KLShampoo, {})):  # PSGD's bound sees the axes
        straight = run(method, gradients, **options)[0]
        close(run(method, [U @ g @ V.T for g in gradients], **options)[0], U @ straight @ V.T, 1e-7)


@fast
@given(seeds, st.floats(1e-3, 1e3))
def test_the_scale_of_gradients_does_not_matter(seed, c):
    gradients = [normal(seed + t, 4, 3) for t in range(6)]
    scaled = [c * g for g in gradients]
    for method, options in (
        (gd.Shampoo, {"grafting": None}), (gd.KLShampoo, {}), (gd.PSGDKron, {}), (gd.SOAP, {"eps": 1e-30, "kl": True}),
    ):  # fmt: skip
        close(run(method, scaled, **options)[0], run(method, gradients, **options)[0], 1e-6)


@fast
@given(seeds, st.floats(0.1, 10.0))
def test_the_factors_of_kl_scale_with_the_gradients(seed, c):
    gradients = [normal(seed + t, 4, 3) for t in range(6)]
    state, scaled = (run(gd.KLShampoo, [k * g for g in gradients])[1] for k in (1.0, c))
    for side in ("left", "right"):
        close(scaled[side], c * state[side], 1e-6)


def test_small_entries_are_kept_where_no_side_is_turned_and_in_double_precision():
    G = torch.tensor([[1.0, 1e-5], [1e-6, 2.0]], dtype=torch.float64)
    close(-run(gd.SOAP, [G], lr=1.0, max_dim=0, eps=1e-30)[0], torch.ones(2, 2).double(), 1e-9)
    U, V = orthogonal(0, 4), orthogonal(1, 4)
    G = U * torch.tensor([1, 0.1, 1e-5, 1e-6], dtype=torch.float64) @ V.T
    close(-run(gd.SOAP, [G], lr=1.0, eps=1e-30, jitter=0.0)[0], U @ V.T, 1e-2)


# --- the rules


def test_kl_shampoo_learns_what_is_whitened_on_the_other_side():
    gradients, b = [normal(t, 4, 3) for t in range(4)], 0.8
    c = gradients[0].square().mean().sqrt()
    L, R, x, m = c * torch.eye(4).double(), c * torch.eye(3).double(), torch.zeros(4, 3).double(), 0
    old = L, R
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * g
        roots = [inverse_root(A, -0.5, 1e-6 if t > 2 else 0.0) for A in old]
        x = x - 0.1 * roots[0] @ (m / (1 - 0.9**t)) @ roots[1]
        left, right = g @ roots[1] @ roots[1] @ g.T / 3, g.T @ roots[0] @ roots[0] @ g / 4
        L, R = b * L + (1 - b) * left, b * R + (1 - b) * right
        if t > 1:
            old = L, R
    ours, state = run(gd.KLShampoo, gradients, betas=(0.9, b), precondition_every=1)
    close(state["left"], L)
    close(state["right"], R)
    close(ours, x)


def test_kl_soap_learns_the_same_from_its_eigenvalues():
    gradients, b = [normal(t, 4, 3) for t in range(2)], 0.8
    c = gradients[0].square().mean().sqrt()
    L = b * c * torch.eye(4).double() + (1 - b) * gradients[0] @ gradients[0].T / (3 * c)
    R = b * c * torch.eye(3).double() + (1 - b) * gradients[0].T @ gradients[0] / (4 * c)
    g = gradients[1]
    left = b * L + (1 - b) * g @ torch.linalg.inv(R + 1e-6 * R.trace() / 3 * torch.eye(3)) @ g.T / 3
    state = run(gd.SOAP, gradients, betas=(0.9, b), kl=True)[1]
    close(state["left"], left, 1e-6)


def test_kl_soap_renews_its_eigenvalues_with_its_basis():
    _, s = run(gd.SOAP, [normal(t, 4, 3) for t in range(4)], kl=True, precondition_every=1)
    for side in ("left", "right"):
        Q = s[f"{side}_basis"]
        close(s[f"{side}_values"], (Q.T @ s[side] @ Q).diagonal(), 1e-12)


def test_shampoo_takes_the_steps_of_its_docstring():
    gradients = [normal(t, 3, 4) for t in range(3)]
    L, R, x, m = gradients[0] @ gradients[0].T, gradients[0].T @ gradients[0], torch.zeros(3, 4).double(), 0
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * g
        L, R = L + 0.2 * (g @ g.T - L), R + 0.2 * (g.T @ g - R)
        x = x - 0.1 * inverse_root(L, -0.25) @ (m / (1 - 0.9**t)) @ inverse_root(R, -0.25)
    close(run(gd.Shampoo, gradients, betas=(0.9, 0.8), grafting=None, precondition_every=1)[0], x, 1e-10)


def test_what_is_added_is_relative_to_the_mean_eigenvalue():
    A = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    close(inverse_root(A, -0.5, 0.5), torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64) ** -0.5), 1e-14)


@pytest.mark.parametrize("method", [gd.Shampoo, gd.KLShampoo])
def test_roots_are_renewed_when_it_is_their_turn(method):
    power = -0.25 if method is gd.Shampoo else -0.5
    p, fresh = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True), []
    optimizer = method([p], precondition_every=3, engine="loop")
    for t in range(8):
        p.grad = normal(t, 3, 4)
        optimizer.step()
        s = optimizer.state[p]
        fresh.append(all(
            torch.allclose(s[f"{side}_root"], inverse_root(s[side], power), rtol=1e-9) for side in ("left", "right")
        ))  # fmt: skip
    assert fresh[3] and fresh[6] and not any(fresh[t] for t in (2, 4, 5, 7))


def test_psgd_takes_the_steps_of_its_docstring():
    sizes = (1.0, 3.0, 0.2, 0.5)  # the running size of ‖A‖ + c falls behind the newest, and is passed by it
    gradients, mu = [c * normal(t, 4, 3) for t, c in enumerate(sizes)], 0.3
    scale = gradients[0].square().mean().sqrt() ** -0.25
    L, R, x, m = scale * torch.eye(4).double(), scale * torch.eye(3).double(), torch.zeros(4, 3).double(), 0
    sizes = [torch.tensor(0.0)] * 2
    for t, g in enumerate(gradients, 1):
        m, P = 0.9 * m + 0.1 * g, L.T @ L @ g @ R.T @ R
        moved = []
        for k, (Q, A, c) in enumerate(((L, P @ P.T, 3), (R, P.T @ P, 4))):
            now = shampoo._norm(A).squeeze() + c
            sizes[k] = torch.maximum(0.9 * sizes[k] + 0.1 * now, now)
            Y = Q - mu / (2 * sizes[k]) * (A @ Q - c * Q)
            Y = Y - mu / (2 * sizes[k]) * (Y @ A - c * Y)
            moved.append((Y + Y.T) / 2)
        L, R = moved
        u = L.T @ L @ (m / (1 - 0.9**t)) @ R.T @ R
        x = x - 0.1 * u * (1.1 / u.square().mean().sqrt()).clamp(max=1)
    ours, state = run(gd.PSGDKron, gradients, preconditioner_lr=mu)
    close(state["left"], L, 1e-12)
    close(state["right"], R, 1e-12)
    close(ours, x, 1e-12)


def test_the_size_that_psgd_divides_by_is_nearly_the_largest_eigenvalue():
    for seed in range(10):
        A = normal(seed, 6, 6)
        A = A @ A.T
        ratio = shampoo._norm(A).squeeze() / torch.linalg.eigvalsh(A)[-1]
        assert 0.7 < ratio <= 1 + 1e-12


def test_psgd_whitens():
    roots = torch.linspace(0.3, 2, 4).double().diag(), torch.linspace(3, 0.5, 5).double().diag()
    gradients = [roots[0] @ normal(t, 4, 5) @ roots[1] for t in range(800)]
    state = run(gd.PSGDKron, gradients, preconditioner_lr=0.1)[1]
    white = [preconditioned(roots[0] @ normal(9999 + t, 4, 5) @ roots[1], state["left"], state["right"])
             for t in range(2000)]  # fmt: skip
    close(sum(P @ P.T for P in white) / 2000 / 5, torch.eye(4).double(), 0.35)
    for side in ("left", "right"):
        assert torch.equal(state[side], state[side].T)


def test_psgd_steps_are_clipped():
    p, _ = run(gd.PSGDKron, [normal(0, 4, 4), 1e4 * normal(1, 4, 4)], lr=1.0, betas=(0.0, 0.9), clip=0.5)
    q, _ = run(gd.PSGDKron, [normal(0, 4, 4)], lr=1.0, betas=(0.0, 0.9), clip=0.5)
    assert (p - q).square().mean().sqrt() <= 0.5 + 1e-9
    assert (q.square().mean().sqrt() - 0.5).abs() < 1e-9


@pytest.mark.parametrize("grafting", ["adam", "sgd"])
def test_a_graft_has_the_length_of_its_stock(grafting):
    g = [normal(0, 4, 3), normal(1, 4, 3)]
    before, after = run(gd.Shampoo, g[:1], grafting=grafting)[0], run(gd.Shampoo, g, grafting=grafting)[0]
    stock = gd.Adam if grafting == "adam" else None
    if stock:
        expected = run(gd.Adam, g, betas=(0.9, 0.95))[0] - run(gd.Adam, g[:1], betas=(0.9, 0.95))[0]
    else:
        expected = 0.1 * (0.09 * g[0] + 0.1 * g[1]) / (1 - 0.81)
    close((after - before).norm(), expected.norm())


def test_a_step_in_the_unit_of_an_inverse_gradient_is_warned_of():
    p = torch.zeros(3, 3, requires_grad=True)
    with pytest.warns(UserWarning, match="without a graft has the unit of 1/gradient"):
        gd.Shampoo([p], exponent=-0.5, grafting=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gd.Shampoo([p], exponent=-0.5)
        gd.Shampoo([p], grafting=None)
        gd.Shampoo([p], exponent=-0.5, grafting=None, one_sided="left")


def test_what_is_refused():
    p = torch.zeros(3, 3, requires_grad=True)
    for cls, wrong, message in (
        (gd.Shampoo, {"exponent": 0.5}, r"exponent=0.5 is outside .* \[-1, 0\)"),
        (gd.Shampoo, {"grafting": "muon"}, "grafting='muon' is unknown; use one of 'adam', 'sgd', None"),
        (gd.Shampoo, {"one_sided": "top"}, "one_sided='top' is unknown"),
        (gd.SOAP, {"first_step": "jump"}, "first_step='jump' is unknown; use one of 'move', 'skip'"),
        (gd.SOAP, {"kl": "yes"}, "kl='yes' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            cls([p], **wrong)


# --- the basis


@fast
@given(seeds)
def test_a_basis_is_orthogonal_and_ordered(seed):
    A = normal(seed, 5, 5)
    A = A @ A.T
    Q = eigenbasis(A)
    close(Q.T @ Q, torch.eye(5).double(), 1e-12)
    values = (Q.T @ A @ Q).diagonal()
    assert (values.diff() <= 1e-6).all()
    near = Q + 0
    for _ in range(300):
        near, _ = next_basis(A, near)
    close((near.T @ A @ near), (near.T @ A @ near).diagonal().diag(), 1e-3 * float(A.norm()))


def test_v_follows_the_order_of_its_columns_and_m_is_carried_over():
    sizes = torch.tensor([[3, 1, 0.1], [3, 1, 0.1], [0.1, 1, 30]], dtype=torch.float64)
    gradients = [normal(t, 3, 4) * size[:, None] for t, size in enumerate(sizes)]
    options = {"betas": (0.9, 0.5), "precondition_every": 1}
    _, before = run(gd.SOAP, gradients[:2], **options)
    _, after = run(gd.SOAP, gradients, **options)
    Q, P = before["left_basis"], before["right_basis"]
    G = Q.T @ gradients[2] @ P
    m, v = 0.9 * before["exp_avg"] + 0.1 * G, 0.5 * before["exp_avg_sq"] + 0.5 * G**2
    close(after["left_basis"] @ after["exp_avg"] @ after["right_basis"].T, Q @ m @ P.T)
    rows = (Q * (after["left"] @ Q)).sum(0).argsort(descending=True)
    columns = (P * (after["right"] @ P)).sum(0).argsort(descending=True)
    assert not torch.equal(rows, torch.arange(3))
    close(after["exp_avg_sq"], v[rows][:, columns])


@every_method
@pytest.mark.parametrize("shape", [(13, 6), (6, 13), (8, 8)])
def test_rounding_in_a_gradient_stays_small(method, shape):
    gradients = [normal(t, *shape) for t in range(6)]
    noisy = [g + 1e-15 * normal(100 + t, *shape) for t, g in enumerate(gradients)]
    options = {} if method is gd.PSGDKron else {"precondition_every": 1}
    gap = run(method, gradients, **options)[0] - run(method, noisy, **options)[0]
    assert gap.abs().max() < 1e-5


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_degenerate_gradients_are_survived(method, dtype):
    low = normal(0, 8, 1) @ normal(1, 1, 6)
    rows = normal(2, 8, 6) * (torch.arange(8) < 3)[:, None]
    zero = torch.zeros(8, 6, dtype=torch.float64)
    for gradients in ([zero, normal(3, 8, 6), zero], [low] * 5, [rows] * 5, [1e-18 * low] * 3, [zero] * 3):
        p, state = run(method, gradients, dtype, **({} if method is gd.PSGDKron else {"precondition_every": 1}))
        assert p.isfinite().all() and all(x.isfinite().all() for x in state.values())
        assert p.abs().max() < 10
    assert not p.any()


@every_method
def test_bf16_parameters_have_factors_in_single_precision(method):
    state = run(method, [normal(t, 4, 3) for t in range(3)], torch.bfloat16)[1]
    assert state["left"].dtype == torch.float32 and state["exp_avg"].dtype == torch.bfloat16


@every_method
def test_a_vector_goes_by_adam(method):
    gradients = [normal(t, 5) for t in range(5)]
    ours = run(method, gradients, betas=(0.9, 0.95), **({"eps": 0.0} if method is gd.SOAP else {}))[0]
    close(ours, run(gd.Adam, gradients, betas=(0.9, 0.95), eps=0.0 if method is gd.SOAP else 1e-8)[0], 1e-9)


def stubborn(monkeypatch, fails):
    """torch.linalg.eigh that fails so many times; returns the types it was asked with."""
    true, calls = torch.linalg.eigh, []

    def eigh(A):
        calls.append(A.dtype)
        if len(calls) <= fails:
            raise torch.linalg.LinAlgError("did not converge")
        return true(A)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return calls


@pytest.mark.parametrize(("fails", "retried", "failed"), [(1, 1, 0), (2, 2, 0), (3, 2, 1)])
def test_an_eigenproblem_that_fails_is_tried_again_and_given_up_without_an_error(monkeypatch, fails, retried, failed):
    calls = stubborn(monkeypatch, fails)
    before = shampoo.failures.copy()
    root = inverse_root(torch.diag(torch.tensor([1.0, 4.0])), -0.5, 0.0)
    torch.testing.assert_close(root, torch.diag(torch.tensor([1.0, 0.5])))
    assert shampoo.failures["retried"] == before["retried"] + retried
    assert shampoo.failures["failed"] == before["failed"] + failed
    assert calls == [torch.float32, torch.float64, torch.float64][: fails + 1]


@pytest.mark.parametrize("method", [gd.Shampoo, gd.KLShampoo])
@pytest.mark.parametrize("engine", ["loop", "foreach"])
def test_a_root_that_cannot_be_taken_stays_the_last_good_one(monkeypatch, method, engine):
    p, q = (torch.zeros(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = method([p, q], precondition_every=2, engine=engine)
    for t in range(2):
        p.grad, q.grad = normal(t, 4, 4), normal(10 + t, 4, 4)
        optimizer.step()
    good = [optimizer.state[x]["left_root"].clone() for x in (p, q)]
    before = shampoo.failures["failed"]
    stubborn(monkeypatch, 1000)
    for t in range(2, 5):
        p.grad, q.grad = normal(t, 4, 4), normal(10 + t, 4, 4)
        optimizer.step()
    assert shampoo.failures["failed"] > before and p.isfinite().all()
    for x, root in zip((p, q), good, strict=True):
        assert torch.equal(optimizer.state[x]["left_root"], root)
    q = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)  # one that begins now
    fresh = method([q], engine=engine)
    q.grad = normal(0, 4, 4)
    fresh.step()
    assert q.isfinite().all() and q.any()


def test_soap_begins_with_the_axes_if_it_must(monkeypatch):
    stubborn(monkeypatch, 1000)
    p, state = run(gd.SOAP, [normal(t, 4, 4) for t in range(3)])
    assert p.isfinite().all() and torch.equal(state["left_basis"].abs().flip(-1), torch.eye(4).double())


def test_a_nan_that_is_let_through_is_no_error_either():
    options = {"nonfinite": "propagate", "precondition_every": 1}
    for method in (gd.Shampoo, gd.KLShampoo, gd.SOAP):
        run(method, [normal(0, 3, 3), torch.full((3, 3), float("nan"))] * 2, **options)


@every_method
def test_one_group_may_be_one_sided(method):
    words, other = (torch.zeros(9, 4, requires_grad=True) for _ in range(2))
    optimizer = method([{"params": [words], "one_sided": True}, {"params": [other], "one_sided": False}])
    for p in (words, other):
        p.grad = normal(0, 9, 4).float()
    optimizer.step()
    assert optimizer.state[words]["left"].numel() == 0 and optimizer.state[words]["right"].shape == (4, 4)
    assert optimizer.state[other]["left"].shape == (9, 9)
    again = run(method, [normal(0, 9, 4)], one_sided="right")[1], run(method, [normal(0, 9, 4)], one_sided="smaller")[1]
    torch.testing.assert_close(*again)


@pytest.mark.parametrize("shape", [(500, 300), (2, 400, 300)])
def test_a_product_by_halves_is_the_product(shape):
    X, A = normal(0, *shape), normal(1, *shape[:-2], shape[-2], shape[-2])
    A, Y = A + A.mT, normal(2, *shape[:-2], shape[-1], shape[-1])
    Y = Y + Y.mT
    close(shampoo.learn_left(A.clone(), X, 0.3, 0.7), 0.7 * A + 0.3 * X @ X.mT, 1e-11)
    close(shampoo.learn_right(Y.clone(), X, 0.3, 0.7), 0.7 * Y + 0.3 * X.mT @ X, 1e-11)
    number = torch.tensor(0.3, dtype=torch.float64)
    close(shampoo.learn_left(A.clone(), X, number, 1 - number), 0.7 * A + 0.3 * X @ X.mT, 1e-11)


@every_method
def test_blocks_are_matrices_of_their_own_and_one_side_may_be_left_alone(method):
    options = {} if method is gd.PSGDKron else {"precondition_every": 2}
    gradients = [normal(t, 6, 4) for t in range(4)]
    whole = run(method, gradients, block_size=3, **options)[0]
    assert whole.isfinite().all()
    _, state = run(method, gradients, one_sided="right", **options)
    assert state["left"].numel() == 0 and state["right"].shape == (4, 4)
    _, state = run(method, gradients, max_dim=5, **options)
    assert state["left"].numel() == 0 and state["right"].shape == (4, 4)
    _, state = run(method, gradients, one_sided="smaller", **options)
    assert state["left"].numel() == 0


# ---------------------------------------------------------------- gradients that begin at zero, and sides that are long


@pytest.mark.parametrize("engine", ["loop", "foreach"])
@pytest.mark.parametrize(("method", "options"), [
    (gd.Shampoo, {}), (gd.SOAP, {}), (gd.SOAP, {"kl": True}), (gd.KLShampoo, {}), (gd.PSGDKron, {}),
])
def test_a_matrix_whose_first_gradient_is_zero_moves_with_the_second(method, options, engine):
    """As in LoRA, behind a head of zeros, and in what torch's distributed checkpoint does before the first step."""
    p = torch.nn.Parameter(torch.ones(6, 4, dtype=torch.float64))
    optimizer = method([p], lr=1.0, weight_decay=0.0, engine=engine, **options)
    generator = torch.Generator().manual_seed(0)
    for t in range(30):
        before = p.detach().clone()
        p.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64) * (t > 0) * 1e-3
        optimizer.step()
        size = (p.detach() - before).square().mean().sqrt()
        small = 0.0 if method is gd.PSGDKron and t < 20 else 0.1  # PSGD finds the scale step by step
        assert size == 0 if t == 0 else small < size < 3, (t, size)


def test_kl_shampoo_begins_with_the_first_gradient_that_is_not_zero():
    g = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = gd.KLShampoo([p], betas=(0.0, 0.9), precondition_every=100)
    for grad in (0 * g, g):
        p.grad = grad
        optimizer.step()
    size, state = g.square().mean().sqrt(), optimizer.state[p]
    torch.testing.assert_close(state["left"], 0.9 * size * torch.eye(6).double() + 0.1 * g @ g.T / size / 4)
    torch.testing.assert_close(state["right"], 0.9 * size * torch.eye(4).double() + 0.1 * g.T @ g / size / 6)


def test_kl_shampoo_bounds_a_step_after_a_jump():
    p = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = gd.KLShampoo([p], lr=1.0)
    for scale in (1e-6, 1.0, 1e4):
        before = p.detach().clone()
        p.grad = scale * torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
        optimizer.step()
        assert (p.detach() - before).square().mean().sqrt() <= 1.1 + 1e-5


@pytest.mark.parametrize("method", [gd.Shampoo, gd.SOAP, gd.KLShampoo, gd.PSGDKron])
def test_a_side_without_a_preconditioner_is_not_cut(method):
    """A vocabulary of 300: one matrix for its columns, none for its rows, and nothing at all beyond max_dim."""
    for options, sizes in ((dict(one_sided=True), {8}), (dict(max_dim=100), {8}), (dict(max_dim=4), set())):
        p = torch.nn.Parameter(torch.zeros(300, 8))
        optimizer = method([p], block_size=64, **options)
        p.grad = torch.randn(300, 8, generator=torch.Generator().manual_seed(3))
        optimizer.step()
        square = [x for name, x in optimizer.state[p].items() if name.startswith(("left", "right"))]
        found = {x.shape[0] for x in square if x.numel() > 1}
        assert found <= {8} and found == sizes, (options, found)


def test_without_a_matrix_there_is_a_warning():
    with pytest.warns(UserWarning, match="SOAP got no matrix"):
        gd.SOAP([torch.nn.Parameter(torch.zeros(10))])
