"""SOAP and Shampoo against pytorch_optimizer: fp64, 50 steps."""

from types import SimpleNamespace

import pytest
import pytorch_optimizer
import torch

import guided_descent as gd

STEPS = 50


def tensors(shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


def compare(ours, theirs, shapes, tolerance):
    a, b = tensors(shapes), tensors(shapes)
    ours, theirs = ours(a), theirs(b)
    for t in range(STEPS):
        generator = torch.Generator().manual_seed(100 + t)
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert not any(torch.equal(p, q) for p, q in zip(a, tensors(shapes), strict=True))


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.9, 0.99)}, {"weight_decay": 0.1, "eps": 1e-3}, {"weight_decay": 0.0, "lr": 0.02}]
)
def test_soap(every, options, monkeypatch):
    """After the step, first gradient skipped, v permuted. The peer's QR is of single precision; here it is not.

    Each has one matrix, since ours takes turns; a vector goes by Adam in both.
    """
    shim = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr("pytorch_optimizer.optimizer.soap.torch", shim)
    compare(
        lambda p: gd.SOAP(p, first_step="skip", precondition_every=every, jitter=0.0, engine="loop", **options),
        lambda p: pytorch_optimizer.SOAP(p, precondition_frequency=every, **options),
        [(6, 6), (7,)],
        1e-9,
    )


def test_soap_with_one_side_too_large(monkeypatch):
    shim = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr("pytorch_optimizer.optimizer.soap.torch", shim)
    compare(
        lambda p: gd.SOAP(p, first_step="skip", precondition_every=1, jitter=0.0, engine="loop", max_dim=4),
        lambda p: pytorch_optimizer.SOAP(p, precondition_frequency=1, max_precondition_dim=4),
        [(4, 9)],
        1e-9,
    )


def test_shampoo():
    """Sums that never forget, roots in every step, no graft; momentum 0, since the peer's momentum is another one."""
    compare(
        lambda p: gd.Shampoo(
            p, lr=0.01, betas=(0.0, 1.0), grafting=None, precondition_every=1, eps=0.0, engine="loop"
        ),
        lambda p: pytorch_optimizer.Shampoo(p, lr=0.01, momentum=0.0, matrix_eps=0.0),
        [(6, 6), (4, 4)],
        1e-10,
    )
