"""Chapter 07: the operators are the matrices they say they are, and leave the model alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from guided_descent.curvature import (
    GGN,
    LIKELIHOODS,
    EmpiricalFisher,
    Fisher,
    Hessian,
    Jacobian,
    LinearOperator,
)

seeds = st.integers(0, 2**31 - 1)
fast = settings(max_examples=15, deadline=None)


def close(a, b, tol=1e-12):
    scale = max(1.0, float(b.abs().max()))
    return a.shape == b.shape and bool(((a - b).abs() <= tol * scale).all())


def network(seed=0, sizes=(4, 3, 3), dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [x for a, b in zip(sizes, sizes[1:], strict=False) for x in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def batch(seed=0, n=7, inputs=4, classes=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, inputs, generator=g, dtype=dtype)
    return X, torch.randint(classes, (n,), generator=g)


def targets_for(name, y, classes=3):
    return y if name == "categorical" else F.one_hot(y, classes).double()


def dense_functions(model, X):
    """The outputs as a function of one flat vector, and that vector: row-major, in parameter order."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    shapes = [model.get_parameter(n).shape for n in names]
    theta = torch.cat([model.get_parameter(n).detach().reshape(-1) for n in names])

    def f(theta):
        parts = theta.split([s.numel() for s in shapes])
        point = {n: x.view(s) for n, x, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model, point, (X,))

    return f, theta


# --- each operator is its matrix


@fast
@given(seeds, st.sampled_from(["categorical", "gaussian", "bernoulli"]))
def test_dense_hessian_ggn_and_fisher(seed, name):
    model, (X, y) = network(seed), batch(seed)
    t, loss = targets_for(name, y), LIKELIHOODS[name].loss
    f, theta = dense_functions(model, X)
    H = torch.func.hessian(lambda x: loss(f(x), t))(theta)
    assert close(Hessian(model, loss, (X, t)).to_dense(), H)
    J, out = torch.func.jacrev(f)(theta), f(theta)
    B = torch.func.hessian(lambda z: loss(z, t))(out)
    G = torch.einsum("nap,namb,mbq->pq", J, B, J)
    assert close(GGN(model, loss, (X, t)).to_dense(), G)
    assert close(Fisher(model, name, (X, t)).to_dense(), G)


def test_fisher_is_the_expectation_over_the_models_own_labels():
    model, (X, y) = network(1), batch(1)
    f, theta = dense_functions(model, X)
    expected = 0
    for c in range(3):
        per_example = torch.func.jacrev(lambda x, c=c: f(x).log_softmax(1)[:, c])(theta)
        p = f(theta).softmax(1)[:, c]
        expected = expected + (per_example * p[:, None]).T @ per_example / len(X)
    assert close(Fisher(model, "categorical", (X, y)).to_dense(), expected)


@fast
@given(seeds, st.sampled_from(["categorical", "gaussian", "bernoulli"]))
def test_empirical_fisher_is_the_second_moment_of_gradients(seed, name):
    model, (X, y) = network(seed), batch(seed)
    t, loss = targets_for(name, y), LIKELIHOODS[name].loss
    rows = []
    for i in range(len(X)):
        f, theta = dense_functions(model, X[i : i + 1])
        rows.append(torch.func.grad(lambda x, f=f, i=i: loss(f(x), t[i : i + 1]))(theta))
    g = torch.stack(rows)
    assert close(EmpiricalFisher(model, loss, (X, t)).to_dense(), g.T @ g / len(X))


def test_monte_carlo_fisher_converges_at_the_root_rate():
    model, data = network(2), batch(2, n=5)
    exact = Fisher(model, "categorical", data).to_dense()
    generator = torch.Generator().manual_seed(0)

    def error(samples):
        made = [Fisher(model, "categorical", data, samples, generator=generator).to_dense() for _ in range(24)]
        return torch.stack([(F - exact).square().sum() for F in made]).mean().sqrt()

    coarse, fine = error(4), error(64)
    assert 3.2 < coarse / fine < 5.0  # √16
    assert fine < 0.2 * exact.norm()


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "categorical"])
def test_monte_carlo_fisher_is_right_on_average(name):
    model, (X, y) = network(3), batch(3, n=4)
    data = X, targets_for(name, y)
    exact = Fisher(model, name, data).to_dense()
    drawn = Fisher(model, name, data, 4000, generator=torch.Generator().manual_seed(1)).to_dense()
    assert (drawn - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (nn.CrossEntropyLoss(), "categorical"),
        (nn.CrossEntropyLoss(reduction="sum"), "categorical"),
        (nn.MSELoss(), "gaussian"),
        (nn.MSELoss(reduction="sum"), "gaussian"),
        (nn.BCEWithLogitsLoss(), "bernoulli"),
        (nn.BCEWithLogitsLoss(reduction="sum"), "bernoulli"),
    ],
    ids=str,
)
def test_a_loss_module_keeps_its_scale(loss, kind):
    model, (X, y) = network(4), batch(4, n=9)
    t = targets_for(kind, y)
    data = [(X[:2], t[:2]), (X[2:], t[2:])]
    assert close(Fisher(model, loss, data).to_dense(), GGN(model, loss, data).to_dense())


def test_mse_is_two_over_c_times_the_gaussian():
    model, (X, y) = network(4), batch(4)
    t = targets_for("gaussian", y)
    plain = GGN(model, LIKELIHOODS["gaussian"].loss, (X, t)).to_dense()
    assert close(GGN(model, nn.MSELoss(), (X, t)).to_dense(), 2 / 3 * plain)


@pytest.mark.parametrize("shape", ["tokens", "flat"])
def test_outputs_of_other_shapes(shape):
    torch.manual_seed(0)
    if shape == "tokens":  # (N, C, T): every token is an example of the likelihood
        model, X = nn.Conv1d(2, 3, 2).double(), torch.randn(4, 2, 6).double()
        y, loss, kind = torch.randint(3, (4, 5)), nn.CrossEntropyLoss(), "categorical"
    else:  # (N,): one output for each example
        model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
        X, y, loss, kind = torch.randn(6, 4).double(), torch.rand(6).round().double(), nn.BCEWithLogitsLoss(), None
    G = GGN(model, loss, (X, y)).to_dense()
    assert close(Fisher(model, loss, (X, y)).to_dense(), G)
    if kind:
        assert close(Fisher(model, kind, (X, y)).to_dense(), G)
    drawn = Fisher(model, loss, (X, y), 3000, generator=torch.Generator().manual_seed(0)).to_dense()
    assert (drawn - G).norm() < 0.1 * G.norm()


# --- identities between them


@fast
@given(seeds)
def test_linear_model_has_no_second_term(seed):
    model, data = network(seed, (4, 3)), batch(seed)
    loss = nn.CrossEntropyLoss()
    assert close(GGN(model, loss, data).to_dense(), Hessian(model, loss, data).to_dense())


def test_linear_block_is_output_side_kron_input_side():
    model = nn.Linear(4, 3, bias=False).double()
    X, y = batch(5)
    G = GGN(model, LIKELIHOODS["gaussian"].loss, (X, targets_for("gaussian", y))).to_dense()
    assert close(G, torch.kron(torch.eye(3).double(), X.T @ X / len(X)))


@fast
@given(seeds)
def test_positive_semidefinite_and_symmetric(seed):
    model, data, loss = network(seed), batch(seed), nn.CrossEntropyLoss()
    for op in (
        GGN(model, loss, data),
        Fisher(model, "categorical", data, 2, generator=torch.Generator().manual_seed(seed)),
        EmpiricalFisher(model, loss, data),
    ):
        A = op.to_dense()
        assert close(A, A.T)
        assert torch.linalg.eigvalsh(A)[0] > -1e-12


def test_jacobian_against_jacrev():
    model, (X, _) = network(6), batch(6)
    f, theta = dense_functions(model, X)
    dense = torch.func.jacrev(f)(theta)
    params = list(model.parameters())
    J, v, u = Jacobian(model(X), params), torch.randn_like(theta), torch.randn(7, 3).double()
    parts = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
    assert close(J.jvp(parts), dense @ v)
    assert close(torch.cat([x.flatten() for x in J.vjp(u)]), torch.einsum("nap,na->p", dense, u))


# --- the operator's interface

OPERATORS = {
    "Hessian": lambda m, d, **k: Hessian(m, nn.CrossEntropyLoss(), d, **k),
    "GGN": lambda m, d, **k: GGN(m, nn.CrossEntropyLoss(), d, **k),
    "Fisher": lambda m, d, **k: Fisher(m, nn.CrossEntropyLoss(), d, **k),
    "MC": lambda m, d, **k: Fisher(m, "categorical", d, 3, generator=torch.Generator().manual_seed(0), **k),
    "EmpiricalFisher": lambda m, d, **k: EmpiricalFisher(m, nn.CrossEntropyLoss(), d, **k),
}
every_operator = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())


@every_operator
def test_products_agree(make):
    model, (X, y) = network(), batch()
    op = make(model, (X, y))
    A, n = op.to_dense(), len(op)
    assert A.shape == op.shape == (n, n) and A.dtype == op.dtype
    V = torch.randn(n, 5).double()
    assert close(op @ V, A @ V) and close(op @ V[:, 0], A @ V[:, 0])
    assert close(op.matmat(V[:, :1]), A @ V[:, :1]) and (op @ V[:, :0]).shape == (n, 0)
    parts = op.split(V[:, 1].contiguous())
    assert [p.shape for p in parts] == [p.shape for p in model.parameters()]
    assert close(op.join(op @ parts), A @ V[:, 1])
    op.chunk_size = 4
    assert close(op.to_dense(), A) and close(op.diagonal(), A.diagonal()) and close(op.trace(), A.trace())
    S = op.to_scipy()
    assert S.shape == op.shape and S.dtype == V.numpy().dtype
    assert close(torch.as_tensor(S @ V.numpy()), A @ V) and close(torch.as_tensor(S @ V[:, 0].numpy()), A @ V[:, 0])
    assert close(torch.as_tensor(S.rmatvec(V[:, 0].numpy())), A @ V[:, 0])


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "MC"])
@pytest.mark.parametrize("cache", [True, False, None])
def test_batches_make_the_mean_over_all_examples(name, cache):
    make = OPERATORS[name]
    model, (X, y) = network(), batch()
    whole = make(model, (X, y)).to_dense()
    parts = make(model, ((X[a:b], y[a:b]) for a, b in ((0, 2), (2, 3), (3, 7))), cache=cache)
    assert close(parts.to_dense(), whole) and close(parts.to_dense(), whole)


def test_draws_are_kept_without_a_cache():
    model, (X, y) = network(), batch()
    data = [(X[:3], y[:3]), (X[3:], y[3:])]
    kept, fresh = OPERATORS["MC"](model, data, cache=True), OPERATORS["MC"](model, data, cache=False)
    assert close(kept.to_dense(), fresh.to_dense()) and close(fresh.to_dense(), fresh.to_dense())


@every_operator
def test_selected_frozen_and_tied_parameters(make):
    model, data = network(), batch()
    A = make(model, data).to_dense()
    block = make(model, data, params=[model[2].weight, model[0].bias])
    order = torch.cat([torch.arange(15, 24), torch.arange(12, 15)])
    assert close(block.to_dense(), A[order][:, order])
    model[0].weight.requires_grad_(False)
    assert close(make(model, data).to_dense(), A[12:, 12:])

    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    X, y = batch()
    separate = copy.deepcopy(tied)
    tied[2].weight = tied[0].weight
    separate[2].weight.data.copy_(tied[0].weight)
    S, T = make(separate, (X, y)), make(tied, (X, y))
    if make is OPERATORS["Hessian"] or make is OPERATORS["GGN"]:
        E = torch.zeros(len(S), len(T)).double()  # how the separate parameters follow from the tied ones
        E[:16, :16] = E[20:36, :16] = torch.eye(16)
        E[16:20, 16:20] = E[36:40, 20:24] = torch.eye(4)
        assert close(T.to_dense(), E.T @ S.to_dense() @ E)
    assert len(T) == 24


@every_operator
def test_nothing_in_the_model_changes(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = batch()
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        op = make(model, data)
        first = op.to_dense()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
    assert model.training and all(p.requires_grad for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1.0).step()  # training on does not move the operator
    assert torch.equal(op.to_dense(), first)


def test_the_model_is_evaluated_once():
    model, data = network(), batch()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    op = GGN(model, nn.CrossEntropyLoss(), data)
    for _ in range(3):
        op.matvec(torch.ones(len(op)).double())
    op.to_dense()
    assert len(calls) == 1


@every_operator
def test_single_precision(make):
    model, (X, y) = network(), batch()
    exact = make(model, (X, y)).to_dense()
    op = make(model.float(), (X.float(), y))
    assert op.dtype == torch.float32
    if make is not OPERATORS["MC"]:
        assert close(op.to_dense().double(), exact, 1e-5)


def test_attention_and_embeddings_can_be_differentiated_twice():
    torch.manual_seed(0)

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5)

        def forward(self, X):
            x = self.norm(self.embed(X))
            x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
            return self.head(x).movedim(-1, 1)

    model, X = Tiny().double(), torch.randint(5, (3, 4))
    y, loss = torch.randint(5, (3, 4)), nn.CrossEntropyLoss()
    f, theta = dense_functions(model, X)
    with sdpa_kernel(SDPBackend.MATH):
        # torch.func.hessian, forward over reverse, is wrong by 0.3 here in torch 2.13; differences agree with jacrev
        g = torch.func.grad(lambda x: loss(f(x), y))
        H = torch.func.jacrev(g)(theta)
        v = torch.randn_like(theta)
        difference = (g(theta + 1e-5 * v) - g(theta - 1e-5 * v)) / 2e-5
    assert close(Hessian(model, loss, (X, y)).to_dense(), H) and close(H @ v, difference, 1e-8)
    assert close(GGN(model, loss, (X, y)).to_dense(), Fisher(model, loss, (X, y)).to_dense())


def test_a_loss_that_is_linear_in_the_outputs_has_no_gauss_newton_part():
    model, data = network(), batch()
    assert not GGN(model, lambda f, y: f.mean(), data).to_dense().any()
    assert Hessian(model, lambda f, y: f.mean(), data).to_dense().any()
    assert not Hessian(network(0, (4, 3)), lambda f, y: f.mean(), data).to_dense().any()


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"model": lambda x: x}, TypeError, "nn.Module"),
        ({"loss": 3}, TypeError, "loss="),
        ({"data": []}, ValueError, "data"),
        ({"data": (torch.ones(0, 4), torch.ones(0))}, ValueError, "data"),
        ({"data": [torch.ones(2, 4)]}, ValueError, "data"),
        ({"params": []}, ValueError, "params"),
        ({"params": [nn.Parameter(torch.ones(2))]}, ValueError, "params"),
    ],
)
def test_refusals(arguments, error, word):
    given_ = {"model": network(), "loss": nn.CrossEntropyLoss(), "data": batch(), **arguments}
    with pytest.raises(error, match=word):
        GGN(**given_)


def test_more_refusals():
    model, (X, y) = network(), batch()
    mixed = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match="dtypes"):
        GGN(mixed, nn.CrossEntropyLoss(), (X, y))
    op = GGN(model, nn.CrossEntropyLoss(), (X, y))
    with pytest.raises(ValueError, match="shape"):
        op @ torch.ones(3).double()
    with pytest.raises(TypeError, match="float64"):
        op @ torch.ones(len(op))
    with pytest.raises(ValueError, match="scalar"):
        GGN(model, nn.CrossEntropyLoss(reduction="none"), (X, y)).to_dense()
    with pytest.raises(ValueError, match="do not depend"):
        Jacobian(model(X).detach(), list(model.parameters()))
    for bad in ("poisson", nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(weight=torch.ones(3))):
        with pytest.raises(ValueError, match="categorical"):
            Fisher(model, bad, (X, y))
    with pytest.raises(ValueError, match="samples=0"):
        Fisher(model, "categorical", (X, y), 0)
    with pytest.raises(TypeError, match="samples"):
        Fisher(model, "categorical", (X, y), 0.5)
    assert isinstance(op, LinearOperator)
