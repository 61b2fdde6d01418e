"""Initialization against torch.nn.init, numbers for numbers."""

import pytest
import torch
from torch import nn

from guided_descent import initialization as init


def source():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("shape", [(4, 4), (7, 3), (3, 7)])
@pytest.mark.parametrize("gain", [1.0, 2**0.5])
def test_orthogonal(shape, gain):
    m, n = shape
    one = nn.Linear(n, m).double()
    init.orthogonal_(one, gain, keep="norm", generator=source())
    expected = nn.init.orthogonal_(torch.empty_like(one.weight), gain, generator=source())
    assert torch.allclose(one.weight, expected, atol=1e-12)


@pytest.mark.parametrize(("phi", "name"), [("relu", "relu"), ("leaky_relu", "leaky_relu")])
def test_kaiming(phi, name):
    for layer in (nn.Linear(30, 20), nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 3, groups=2)):
        layer = layer.double()
        init.gaussian_(layer, phi, generator=source())
        like = torch.empty_like(layer.weight)
        expected = nn.init.kaiming_normal_(like, a=0.01, nonlinearity=name, generator=source())
        assert torch.allclose(layer.weight, expected, atol=1e-12)
        assert not layer.bias.any()


def test_gains():
    for phi, name in (("relu", "relu"), ("linear", "linear"), ("leaky_relu", "leaky_relu")):
        assert init.critical_gain(phi) == pytest.approx(nn.init.calculate_gain(name))
    # torch's 5/3 for tanh is above the critical gain, deep in chaos
    field = init.MeanField("tanh", nn.init.calculate_gain("tanh"))
    assert field.chi(field.fixed_point()) > 1.1
