"""Muon, NorMuon and Scion against torch and pytorch_optimizer: fp64, 50 steps, their bf16 iterations replaced."""

import importlib

import pytest
import pytorch_optimizer
import torch

import guided_descent as gd
from guided_descent.muon import PRESETS
from tests.parity.test_shampoo import compare

SHAPES = [(6, 6), (4, 9), (9, 4)]
KELLER = {"preset": "keller", "engine": "loop"}


def iteration(G, *args, **kwargs):
    """Keller's five steps in the type of the input, on a copy."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / X.norm(dim=(-2, -1), keepdim=True)
    for a, b, c in PRESETS["keller"]:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


@pytest.fixture(autouse=True)
def double(monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iteration)
    for module in ("muon.base", "muon.muon", "muon.normuon", "scion"):
        loaded = importlib.import_module(f"pytorch_optimizer.optimizer.{module}")
        for name in ("zero_power_via_newton_schulz_5", "zero_power_via_newton_schulz"):
            if hasattr(loaded, name):
                monkeypatch.setattr(loaded, name, iteration)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("theirs", "ours"), [("original", "keller"), ("match_rms_adamw", "moonlight")])
def test_torch(theirs, ours, nesterov):
    options = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    compare(
        lambda p: gd.Muon(p, scale=ours, **KELLER, **options),
        lambda p: torch.optim.Muon(p, adjust_lr_fn=theirs, **options),
        SHAPES,
        1e-12,
    )


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjusted", [True, False])
def test_pytorch_optimizer(adjusted, nesterov):
    options = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    compare(
        lambda p: gd.Muon(p, scale="moonlight" if adjusted else "keller", **KELLER, **options),
        lambda p: pytorch_optimizer.Muon(
            [{"params": p, "use_muon": True}], use_adjusted_lr=adjusted, foreach=False, **options
        ),
        SHAPES,
        1e-12,
    )


def test_normuon():
    options = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
    compare(
        lambda p: gd.Muon(p, normuon=0.95, **KELLER, **options),
        lambda p: pytorch_optimizer.NorMuon(
            [{"params": p, "use_muon": True}],
            beta2=0.95,
            eps=0.0,
            update_scale="preserve_norm",
            use_adjusted_lr=False,
            foreach=False,
            **options,
        ),
        SHAPES,
        1e-12,
    )


@pytest.mark.parametrize("constrained", [True, False])
def test_scion(constrained):
    options = {"norm_kwargs": {"max_scale": False, "normalize": True}}
    compare(
        lambda p: gd.Scion(p, lr=0.01, momentum=0.9, radius=5.0, constrained=constrained, **KELLER),
        lambda p: pytorch_optimizer.SCION(
            p,
            lr=0.01,
            momentum=0.1,
            scale=5.0,
            constraint=constrained,
            foreach=False,
            norm_type=pytorch_optimizer.optimizer.scion.LMONorm.SPECTRAL,
            **options,
        ),
        SHAPES,
        1e-12,
    )
