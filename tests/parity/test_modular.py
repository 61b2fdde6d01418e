"""The modular norm against the package ``modula`` of its authors: masses, sensitivities, and how long the steps are."""

import modula.abstract
import modula.atom
import modula.bond
import pytest
import torch
from modula.vector import Vector
from torch import nn

from guided_descent.examples import exact_polar
from guided_descent.modular import Bond, Linear, ModularDescent

IDENTITY = {"theirs": modula.bond.Identity, "ours": lambda: Bond(nn.Identity())}


def linear(whose, out, inputs, mass):
    if whose == "ours":
        return Linear(out, inputs, mass)
    return modula.atom.Linear(out, inputs, mass)


NETWORKS = {
    "chain": lambda w: linear(w, 4, 6, 2.0) @ linear(w, 6, 5, 1.0) @ linear(w, 5, 5, 0.5),
    "factors": lambda w: 3.0 * linear(w, 4, 6, 2.0) @ (0.5 * linear(w, 6, 5, 1.0)),
    "beside": lambda w: linear(w, 4, 5, 2.0) + 2.0 * linear(w, 4, 5, 1.0),
    "residual": lambda w: (0.75 * IDENTITY[w]() + 0.25 * (2.0 * linear(w, 5, 5, 3.0))) @ linear(w, 5, 5, 1.0),
    "nested": lambda w: (
        linear(w, 4, 5, 1.0) @ (linear(w, 5, 5, 2.0) + 3.0 * linear(w, 5, 5, 1.0)) @ (2.0 * linear(w, 5, 6, 4.0))
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_masses_sensitivities_and_rates(name):
    theirs, ours = NETWORKS[name]("theirs"), NETWORKS[name]("ours")
    assert (theirs.mass, theirs.sensitivity) == pytest.approx((ours.mass, ours.sensitivity), rel=1e-14)
    weights = theirs.initialize("cpu")
    shapes = [tuple(w.shape) for w in weights]
    assert shapes == [tuple(atom.weight.shape) for atom in ours.atoms]
    with torch.no_grad():
        change = Vector([torch.randn(shape) for shape in shapes])
        for _ in range(200):  # their power iteration
            theirs.normalize(change, 0.7)
    # Their weights are orthogonal ones times √(out/in) in the forward pass.
    scaled = [w * (w.shape[0] / w.shape[1]) ** 0.5 for w in change]
    lengths = [float(atom.norm([w])) for atom, w in zip(ours.atoms, scaled, strict=True)]
    assert lengths == pytest.approx(ours.rates(0.7), rel=1e-3)
    assert float(ours.norm(scaled)) == pytest.approx(0.7, rel=1e-3)


def test_fifty_steps_of_the_same_directions():
    """Their tensors, ours: polar factors, made as long as their ``normalize`` makes them."""
    torch.manual_seed(0)
    theirs, ours = NETWORKS["nested"]("theirs"), NETWORKS["nested"]("ours").double()
    theirs.initialize("cpu")
    w = [atom.weight.detach().clone() for atom in ours.atoms]
    optimizer = ModularDescent(ours, 0.1, momentum=0.0, nesterov=False, preset="svd", engine="loop")
    target = torch.randn(7, 4, dtype=torch.float64)
    x = torch.randn(7, 6, dtype=torch.float64)
    for _ in range(50):
        optimizer.zero_grad()
        (ours(x) - target).square().mean().backward()
        with torch.no_grad():
            step = Vector([exact_polar(atom.weight.grad) for atom in ours.atoms])
            for module in leaves(theirs):  # for their power iteration
                module.u = torch.randn_like(module.u, dtype=torch.float64)
                module.v = torch.empty_like(module.v, dtype=torch.float64)
            theirs.normalize(step, 0.1)
            for mine, d in zip(w, step, strict=True):
                mine -= (d.shape[0] / d.shape[1]) ** 0.5 * d
        optimizer.step()
    for mine, atom in zip(w, ours.atoms, strict=True):
        torch.testing.assert_close(mine, atom.weight.detach(), rtol=1e-9, atol=1e-9)


def leaves(module):
    if not module.children:
        return [module] if hasattr(module, "u") else []
    return [leaf for child in module.children for leaf in leaves(child)]
