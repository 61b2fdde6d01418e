"""AdaHessian and Sophia against pytorch_optimizer, on the same given estimates: fp64, 60 steps."""

import pytest
import pytorch_optimizer
import torch

from guided_descent.diagonal import AdaHessian, Sophia

SHAPES = [(), (5,), (4, 3), (2, 3, 2, 2)]
STEPS = 60


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in SHAPES]


def given(t, kind):
    generator = torch.Generator().manual_seed(1000 * kind + t)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in SHAPES]


class Told:
    """Takes its gradients and estimates from outside."""

    def tell(self, params, grads, estimates):
        self.told = grads, dict(zip(params, estimates, strict=True))

    def _probed(self, loss, params):
        self.found = {p: e.clone() for p, e in self.told[1].items()} if self.due else {}
        return self.told[0]


class ToldAdaHessian(Told, AdaHessian):
    pass


class ToldSophia(Told, Sophia):
    pass


def compare(ours, theirs, every, tolerance=1e-12):
    a, b = tensors(), tensors()
    ours, theirs = ours(a), theirs(b)
    for t in range(STEPS):
        grads, estimates = given(t, 1), given(t, 2)
        ours.tell(a, grads, estimates)
        ours.step(lambda: torch.zeros(()))
        for p, g in zip(b, grads, strict=True):
            p.grad = g.clone()
        theirs.step(hessian=estimates) if t % every == 0 else theirs.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert not any(torch.equal(p, q) for p, q in zip(a, tensors(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.5, 0.9), "eps": 1e-2},
        {"hessian_power": 0.5, "eps": 1e-2},
        {"weight_decay": 0.1},
    ],
)
def test_adahessian(options):
    """The peer counts every step in the correction of v, so the two agree where every step has an estimate."""
    options = {"lr": 0.01, "eps": 1e-4, **options}
    compare(
        lambda p: ToldAdaHessian(p, average_window=False, engine="loop", **options),
        lambda p: pytorch_optimizer.AdaHessian(p, foreach=False, **options),
        1,
    )


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(("rho", "eps"), [(0.04, 1e-12), (1.0, 1e-3), (10.0, 0.5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sophia(every, rho, eps, weight_decay):
    """The peer clips m/max(h, eps) at p: ours with lr = peer's lr · p and floor eps · p. Its decay is by its own lr."""
    lr = 1e-3
    compare(
        lambda p: ToldSophia(
            p, lr=lr, betas=(0.96, 0.99), rho=rho, eps=eps, weight_decay=weight_decay,
            hessian_update_every=every, engine="loop",
        ),
        lambda p: pytorch_optimizer.SophiaH(
            p, lr=lr / rho, betas=(0.96, 0.99), p=rho, eps=eps / rho, weight_decay=weight_decay * rho,
            update_period=10**9 if every > 1 else 1, foreach=False,
        ),
        every,
    )  # fmt: skip
