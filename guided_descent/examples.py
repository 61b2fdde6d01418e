# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 8aeae32b
"""Chapter 23, The machinery."""

__all__ = [
    "PlainMuon",
    "PlainSOAP",
    "exact_polar",
]


# %% 23_machinery sec-matrixwise 2 3c1e26aa
from typing import Any, Unpack

import torch
from torch import Tensor

from guided_descent.core import Optimizer, Options, wide
from guided_descent.engines import matrixwise


@matrixwise
def exact_polar(M: Tensor) -> Tensor:
    """``U Vᵀ`` where ``M = U Σ Vᵀ``, over singular values above rounding."""
    U, S, Vh = torch.linalg.svd(M.to(wide(M.dtype)), full_matrices=False)
    rounding = S[..., :1] * torch.finfo(S.dtype).eps * max(M.shape[-2:])
    return (U * (rounding < S).unsqueeze(-2) @ Vh).to(M.dtype)


# %% 23_machinery sec-matrixwise 3 139b5778
class PlainMuon(Optimizer):
    """Muon in short: ``m ← m + (1−μ)(g − m);  x ← x − lr · polar(m)``.

    An example of a rule for matrices; ``chapter 12`` has the method.

    Args:
        params: Matrices, or groups of them; vectors need ``algorithm="adamw"``.
        lr: Spectral norm of a step, in [0, ∞). Default 0.02.
        momentum: μ, in [0, 1). Default 0.95.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Source: appendix "The machinery", eq-machinery-polar.
    """

    matrices = True

    def __init__(
        self, params: Any, lr: float | Tensor = 2e-2, momentum: float = 0.95,
        **options: Unpack[Options],
    ) -> None:
        options.setdefault("nonfinite", "skip")
        super().__init__(params, {"lr": lr, "momentum": momentum}, **options)

    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)}

    # %% 23_machinery sec-matrixwise 4 35d764b3
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        m = s.momentum_buffer.lerp_(g, 1 - h.momentum)
        p.add_(exact_polar(m), alpha=-h.lr)


# %% 23_machinery sec-turns 2 6843a3a3
@matrixwise
def _eigenbasis(L: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix, as columns, the largest eigenvalue first."""
    return torch.linalg.eigh(L)[1].flip(-1).contiguous()


class PlainSOAP(Optimizer):
    """SOAP in its shortest form: Adam in the eigenbasis of ``L`` and ``R``.

    ``L``, ``R``: running means of ``g gᵀ``, ``gᵀ g`` with weight β₂; m, v: Adam's
    moments of ``Q_Lᵀ g Q_R``. The first gradient sets the basis and moves nothing. An
    example of turns; ``chapter 10`` has the method.

    Args:
        params: Tensors, or groups of them; a vector is a column with a basis on one
            side.
        lr: Step size, in [0, ∞). Default 0.003.
        betas: β₁, β₂, each in [0, 1). Default (0.95, 0.95).
        eps: Added to the root, in [0, ∞). Default 1e-8.
        precondition_every: Steps in which each basis is renewed once. Default 10.
        block_size: Largest side of a block, or ``None``: whole matrices. Default 512.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Source: Vyas et al. (2024), arXiv 2409.11321. Appendix "The machinery".
    """

    matrices = vectors = True
    every, clocks = "precondition_every", ("step",)
    precise = ("left", "right", "left_basis", "right_basis")
    ranges = {"precondition_every": "[1, inf) int", "block_size": "[1, inf) int | None"}

    def __init__(
        self, params: Any, lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95), eps: float = 1e-8,
        precondition_every: int = 10, block_size: int | None = 512,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "block_size": block_size}
        defaults |= {"precondition_every": precondition_every}
        options.setdefault("nonfinite", "skip")
        super().__init__(params, defaults, **options)

    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        g = g.to(wide(g.dtype))
        s = {"step": torch.zeros(()), "left": g @ g.mT, "right": g.mT @ g}
        s |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return s | {f"{side}_basis": _eigenbasis(s[side]) for side in ("left", "right")}

    # %% 23_machinery sec-turns 3 b2fb785b
    @staticmethod
    def clock(h: Any) -> None:
        b1, b2 = h.betas
        t = h.step - 1
        first = 1.0 * (t == 0)  # all weights are then zero
        h.w1, h.w2 = (1 - first) * (1 - b1), (1 - first) * (1 - b2)
        h.rate = h.lr * (1 - first) * (1 - b2**t) ** 0.5 / (1 - b1**t + first)

    # %% 23_machinery sec-turns 4 4d0b84f0
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        G = s.left_basis.mT @ g @ s.right_basis
        m, v = s.exp_avg.lerp_(G, h.w1), s.exp_avg_sq.lerp_(G.square(), h.w2)
        u = m / v.sqrt().add_(h.eps)
        p.add_(s.left_basis @ u @ s.right_basis.mT, alpha=-h.rate)
        s.left.lerp_(g @ g.mT, h.w2)
        s.right.lerp_(g.mT @ g, h.w2)


    @staticmethod
    def refresh(s: Any, h: Any) -> None:
        """A new basis; the first moment is carried over, the second stays as it is."""
        L, R = _eigenbasis(s.left), _eigenbasis(s.right)
        m = s.left_basis @ s.exp_avg @ s.right_basis.mT
        s.exp_avg.copy_(L.mT @ m @ R)
        s.left_basis.copy_(L)
        s.right_basis.copy_(R)
