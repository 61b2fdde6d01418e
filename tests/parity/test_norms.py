"""Lion, Signum and SignSGD take their peers' trajectories, in double precision."""

import lion_pytorch
import pytest
import pytorch_optimizer
import torch

import guided_descent as gd

SHAPES = [(5, 4), (3, 7), (6,), (2, 3, 3, 3)]


def follow(ours, theirs, steps=60):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    runs = [[torch.nn.Parameter(x.clone()) for x in start] for _ in range(2)]
    optimizers = [build(params) for build, params in zip((ours, theirs), runs, strict=True)]
    for _ in range(steps):
        for mine, other in zip(*runs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator, dtype=torch.float64)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(*runs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.8), (0.0, 0.9)])
@pytest.mark.parametrize("engine", ["loop", "foreach"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_is_pytorch_optimizers_and_lion_pytorchs(betas, engine, weight_decay):
    options = {"lr": 0.03, "betas": betas, "weight_decay": weight_decay}

    def ours(p):
        return gd.Lion(p, engine=engine, **options)

    follow(ours, lambda p: pytorch_optimizer.Lion(p, weight_decouple=True, **options))
    follow(ours, lambda p: lion_pytorch.Lion(p, **options))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_signum_is_pytorch_optimizers_sign_sgd(momentum, weight_decay):
    options = {"lr": 0.03, "momentum": momentum, "weight_decay": weight_decay}

    def theirs(p):
        return pytorch_optimizer.SignSGD(p, weight_decouple=True, **options)

    follow(lambda p: gd.Signum(p, engine="loop", **options), theirs)
    if not momentum:
        follow(lambda p: gd.SignSGD(p, lr=0.03, weight_decay=weight_decay, engine="loop"), theirs)


def test_momentum_is_the_running_mean_of_torchs_dampened_sgd():
    """Normalised SGD's buffer, against torch's own momentum, which begins with a whole gradient."""
    p, q = (torch.nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    ours = gd.NormalizedSGD([p], lr=0.1, momentum=0.8, scope="layer", engine="loop")
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.8)
    for t in range(50):
        before = p.detach().clone()
        p.grad = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        summed = theirs.state[q]["momentum_buffer"]
        torch.testing.assert_close(before - p.detach(), 0.1 * summed / summed.norm(), rtol=1e-10, atol=1e-12)
