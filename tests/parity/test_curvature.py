"""Chapter 07 against curvlinops, BackPACK and SciPy."""

import backpack
import curvlinops
import pytest
import torch
from backpack import extensions
from scipy.sparse import eye
from scipy.sparse.linalg import aslinearoperator, cg, eigsh
from torch import nn

from guided_descent.curvature import GGN, EmpiricalFisher, Fisher, Hessian, NaturalGradient, lanczos

TOLERANCE = 1e-12


def setting(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X = torch.randn(11, 6).double()
    y = {
        "classes": torch.randint(3, (11,)),
        "numbers": torch.randn(11, 3).double(),
        "bits": torch.rand(11, 3).round().double(),
    }[kind]
    return model, [(X[:4], y[:4]), (X[4:], y[4:])]


LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), "classes"),
    "cross-entropy-sum": (nn.CrossEntropyLoss(reduction="sum"), "classes"),
    "mse": (nn.MSELoss(), "numbers"),
    "mse-sum": (nn.MSELoss(reduction="sum"), "numbers"),
    "bce": (nn.BCEWithLogitsLoss(), "bits"),
}
every_loss = pytest.mark.parametrize(("loss", "kind"), LOSSES.values(), ids=LOSSES.keys())


def same(a, b, tol=TOLERANCE):
    assert a.shape == b.shape and (a - b).abs().max() <= tol * max(1, float(b.abs().max()))


@every_loss
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Hessian, curvlinops.HessianLinearOperator),
        (GGN, curvlinops.GGNLinearOperator),
        (EmpiricalFisher, curvlinops.EFLinearOperator),
    ],
    ids=["hessian", "ggn", "empirical"],
)
def test_curvlinops(ours, theirs, loss, kind):
    model, data = setting(kind)
    A, B = ours(model, loss, data), theirs(model, loss, list(model.parameters()), data)
    # For a mean over examples and C outputs curvlinops squares the gradients of C times an example's loss, over C.
    factor = 3.0 if ours is EmpiricalFisher and kind != "classes" and loss.reduction == "mean" else 1.0
    V = torch.randn(len(A), 4).double()
    same(factor * (A @ V), B @ V)
    same(factor * (A @ V[:, 0]), B @ V[:, 0])


@every_loss
def test_monte_carlo_has_the_mean_of_curvlinops(loss, kind):
    model, data = setting(kind)
    ours = Fisher(model, loss, data, 4000, generator=torch.Generator().manual_seed(0)).to_dense()
    B = curvlinops.FisherMCLinearOperator(model, loss, list(model.parameters()), data, mc_samples=4000)
    theirs = B @ torch.eye(len(ours)).double()
    assert (ours - theirs).norm() < 0.06 * theirs.norm()


@pytest.mark.parametrize(("loss", "kind"), [LOSSES["cross-entropy"], LOSSES["mse"]], ids=["cross-entropy", "mse"])
def test_backpack_diagonals(loss, kind):
    model, data = setting(kind)
    X, y = (torch.cat(part) for part in zip(*data, strict=True))
    ggn, hessian = GGN(model, loss, (X, y)).diagonal(), Hessian(model, loss, (X, y)).diagonal()
    copy = backpack.extend(setting(kind)[0])
    value = backpack.extend(type(loss)())(copy(X), y)
    with backpack.backpack(extensions.DiagGGNExact(), extensions.DiagHessian()):
        value.backward()
    same(ggn, torch.cat([p.diag_ggn_exact.flatten() for p in copy.parameters()]))
    same(hessian, torch.cat([p.diag_h.flatten() for p in copy.parameters()]))


def test_backpack_sum_of_squared_gradients_is_the_empirical_diagonal():
    model, data = setting("classes")
    X, y = (torch.cat(part) for part in zip(*data, strict=True))
    ours = EmpiricalFisher(model, nn.CrossEntropyLoss(), (X, y)).diagonal()
    copy = backpack.extend(model)
    value = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))(copy(X), y)
    with backpack.backpack(extensions.SumGradSquared()):
        value.backward()
    same(ours, torch.cat([p.sum_grad_squared.flatten() for p in copy.parameters()]) / len(X))


def test_lanczos_finds_scipys_eigenvalues():
    model, data = setting("classes")
    H = Hessian(model, nn.CrossEntropyLoss(), data)
    theirs = torch.as_tensor(eigsh(H.to_scipy(), k=3, which="LA", return_eigenvectors=False)).sort().values
    same(lanczos(H, 200, top=3, tol=1e-10).values[-3:], theirs, 1e-9)


def test_natural_gradient_takes_scipys_step():
    model, data = setting("classes")
    X, y = (torch.cat(part) for part in zip(*data, strict=True))
    loss = nn.CrossEntropyLoss()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    g = torch.cat([p.flatten() for p in torch.autograd.grad(loss(model(X), y), list(model.parameters()))])
    F = curvlinops.GGNLinearOperator(model, loss, list(model.parameters()), [(X, y)]).to_scipy()
    d, _ = cg(F + 0.1 * aslinearoperator(eye(len(g))), g.numpy(), rtol=1e-13, maxiter=500)
    optimizer = NaturalGradient(model, damping=0.1, iterations=500, tol=1e-13, max_kl=float("inf"))
    optimizer.step(lambda: loss(model(X), y))
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    same(before - after, torch.as_tensor(d), 1e-9)
