"""LARS, LAMB and clipping against pytorch_optimizer, and timm where it is installed: fp64, 50 steps."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import pytorch_optimizer
import torch

import guided_descent as gd
from tests.parity.test_shampoo import compare

SHAPES = [(6, 6), (4, 9), (3, 2, 2, 2)]


@pytest.fixture
def timm(monkeypatch):
    """Parts of timm by their files: its own import wants a torchvision that fits."""
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed")
    root = Path(found.origin).parent
    for name in ("timm", "timm.optim", "timm.utils"):
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    return lambda name: importlib.import_module(f"timm.{name}")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_of_pytorch_optimizer(weight_decay):
    """It leaves vectors alone, as ours; without decay, since it never decays them."""
    options = {"lr": 0.3, "momentum": 0.9, "weight_decay": weight_decay}
    compare(
        lambda p: gd.LARS(p, trust=0.02, engine="loop", **options),
        lambda p: pytorch_optimizer.LARS(p, trust_coefficient=0.02, foreach=False, **options),
        [*SHAPES, (5,)] if not weight_decay else SHAPES,
        1e-12,
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_of_pytorch_optimizer(weight_decay):
    """φ at most 10; its bias correction comes after the ratio, and is switched off; eps, added twice, is tiny."""
    options = {"lr": 0.02, "weight_decay": weight_decay, "eps": 1e-13}
    compare(
        lambda p: gd.LAMB(p, clamp=(0.0, 10.0), bias_correction=False, engine="loop", **options),
        lambda p: pytorch_optimizer.Lamb(p, weight_decouple=False, adam_debias=True, foreach=False, **options),
        [(6, 6), (4, 9), (12, 12)],
        1e-10,
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_lars_of_timm(timm, weight_decay, eps):
    options = {"lr": 0.3, "momentum": 0.9, "weight_decay": weight_decay, "eps": eps}
    compare(
        lambda p: gd.LARS(p, trust=0.02, adapt_vectors=True, engine="loop", **options),
        lambda p: timm("optim.lars").Lars(p, trust_coeff=0.02, always_adapt=True, foreach=False, **options),
        [*SHAPES, (5,)],
        1e-12,
    )


@pytest.mark.parametrize("corrected", [True, False])
def test_lamb_of_timm(timm, corrected):
    """Its default clips gradients silently to a total norm of one: switched off."""
    options = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95), "bias_correction": corrected}
    compare(
        lambda p: gd.LAMB(p, adapt_vectors=True, engine="loop", **options),
        lambda p: timm("optim.lamb").Lamb(p, max_grad_norm=None, always_adapt=True, foreach=False, **options),
        [*SHAPES, (5,)],
        1e-12,
    )


def test_adaptive_clipping_of_timm(timm):
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for shape in [*SHAPES, (5,)]:
        ours, g = draw(shape).requires_grad_(), draw(shape)
        theirs = ours.detach().clone().requires_grad_()
        ours.grad, theirs.grad = g.clone(), g.clone()
        gd.adaptive_clip_([ours], 0.3)
        timm("utils.agc").adaptive_clip_grad([theirs], 0.3)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-14, atol=0)
        assert not torch.equal(ours.grad, g)
