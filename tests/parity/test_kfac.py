"""K-FAC and EKFAC as matrices, against curvlinops."""

import pytest
import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch import nn

from guided_descent.capture import Capture
from guided_descent.kfac import eigenvalue_correction, kronecker_factors


def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,))
    return model, x, y


def ours(model, x, y, fisher, correct):
    found = {}
    capture = Capture(model, consume=lambda layer, a, g: found.update({layer: (a, g)}), fisher=fisher)
    nn.functional.cross_entropy(model(x), y).backward()
    capture.detach()
    blocks = []
    for layer in capture.layers:
        A, G = kronecker_factors(*found[layer])
        U_A, U_G = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
        U, s = torch.kron(U_G, U_A), eigenvalue_correction(*found[layer], U_A, U_G)
        blocks.append(U * s.flatten() @ U.T if correct else torch.kron(G, A))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator])
def test_matrices_agree_with_curvlinops(fisher, operator):
    model, x, y = setting()
    options = {"fisher_type": fisher, "check_deterministic": False}
    theirs = operator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], **options)
    dense = theirs @ torch.eye(theirs.shape[1], dtype=torch.float64)
    torch.testing.assert_close(ours(model, x, y, fisher, operator is EKFACLinearOperator), dense, rtol=1e-9, atol=1e-12)
