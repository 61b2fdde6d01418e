"""Against the `mup` package: what its forward and its optimizer multiply together is what `parametrize` gives."""

import mup as peer
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import guided_descent as gd
from guided_descent.mup import parametrize


def net(n, readout=nn.Linear):
    return nn.Sequential(nn.Linear(64, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), readout(n, 10)).double()


@pytest.mark.parametrize(
    ("ours", "theirs", "lr"), [(gd.Adam, peer.MuAdam, 2**-7), (gd.SGD, peer.MuSGD, 0.1)], ids=["Adam", "SGD"]
)
def test_fifty_steps(ours, theirs, lr):
    """Its head divides by the width ratio, and its weights and rate make up for that."""
    torch.manual_seed(0)
    model, other = net(128), net(128, peer.MuReadout)
    for name, x in other.named_parameters():
        x.data.copy_(dict(model.named_parameters())[name])
    peer.set_base_shapes(other, net(32, peer.MuReadout), delta=net(64, peer.MuReadout), rescale_params=False)
    options = {} if ours is gd.SGD else {"eps": 1e-30}
    groups = parametrize(model, net(32), ours, lr=lr, **options)
    with torch.no_grad():  # the same function to begin with
        other[4].weight.copy_(model[4].weight * 4)
    mine, tool = ours(groups, engine="loop"), theirs(other.parameters(), lr=lr, **options)
    draw = torch.Generator().manual_seed(1)
    for _ in range(50):
        x, y = torch.randn(32, 64, generator=draw, dtype=torch.float64), torch.randint(10, (32,), generator=draw)
        for net_, step in ((model, mine), (other, tool)):
            step.zero_grad()
            cross_entropy(net_(x), y).backward()
            step.step()
    assert torch.allclose(model(x), other(x), rtol=0, atol=1e-10)
