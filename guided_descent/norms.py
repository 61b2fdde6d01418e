# Generated from chapters/11_descent_under_a_norm.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 3b539dbb
"""Chapter 11, Descent under a norm."""

__all__ = [
    "NORMS",
    "Conv",
    "Frobenius",
    "Lines",
    "Lion",
    "Max",
    "Norm",
    "NormDescent",
    "NormalizedSGD",
    "Nuclear",
    "Scale",
    "SignSGD",
    "Signum",
    "Spectral",
    "dual_norm",
    "lmo",
]


# %% 11_descent_under_a_norm sec-no-norms 1 2371ae6e
import math
from collections.abc import Callable
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.linalg import matrix_norm, vector_norm

from guided_descent.core import Optimizer, Options, check_choice, wide
from guided_descent.engines import matrixwise
from guided_descent.examples import exact_polar

#: A number for each shape, (outputs, inputs).
Scale = Callable[[int, int], float]


def _unit(X: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Over its length along some dimensions; where that is zero, zero."""
    for order in (torch.inf, 2):  # the largest entry first: squares may overflow
        size = vector_norm(X, order, dim=dim, keepdim=True)
        X = X / torch.where(size == 0, 1, size)
    return X


# %% 11_descent_under_a_norm sec-no-norms 2 a3d9ff19
class Norm:
    """A norm of m×n matrices: ``size(W) / s``, with a scale s of the shape.

    Leading dimensions are a batch; a vector is a column. A subclass has ``size``;
    ``dual_size``, its dual; and ``best``, a matrix of size one with ``⟨best(G), G⟩ =
    dual_size(G)``, zero where G is.

    Args:
        scale: s, of (m, n). Default 1.

    Source: chapter 11, eq-no-dual and eq-no-lmo.
    """

    size: Callable[[Tensor], Tensor]
    dual_size: Callable[[Tensor], Tensor]
    best: Callable[[Tensor], Tensor]

    def __init__(self, scale: Scale = lambda m, n: 1.0) -> None:
        self.scale = scale

    def norm(self, W: Tensor) -> Tensor:
        """How large a weight is."""
        X, s = self.seen(W)
        return self.size(X) / s

    def dual(self, G: Tensor) -> Tensor:
        """The most that ``⟨G, Z⟩`` can be where ``norm(Z) ≤ 1``."""
        X, s = self.seen(G)
        return self.dual_size(X) * s

    @matrixwise
    def lmo(self, G: Tensor) -> Tensor:
        """The matrix with ``norm ≤ 1`` that has the least inner product with G."""
        X, s = self.seen(G)
        Z = self.best(X) if G.numel() else X
        return (Z * -s).reshape(G.shape).to(G.dtype)

    # %% 11_descent_under_a_norm sec-no-norms 3 49c93a31
    def seen(self, X: Tensor) -> tuple[Tensor, float]:
        """The matrix that a tensor is, in single precision at least; its scale."""
        X = (X.reshape(-1, 1) if X.ndim < 2 else X).to(wide(X.dtype))
        return X, self.scale(*X.shape[-2:]) if X.numel() else 1.0


# %% 11_descent_under_a_norm sec-no-norms 4 9acb8e22
class Max(Norm):
    """The largest entry; its dual, the sum of all entries' sizes."""

    def size(self, W: Tensor) -> Tensor:
        return W.abs().amax((-2, -1))

    def dual_size(self, G: Tensor) -> Tensor:
        return G.abs().sum((-2, -1))

    def best(self, G: Tensor) -> Tensor:
        return G.sign()


class Spectral(Norm):
    """The largest singular value; its dual, their sum."""

    def size(self, W: Tensor) -> Tensor:
        return matrix_norm(W, 2)

    def dual_size(self, G: Tensor) -> Tensor:
        return matrix_norm(G, "nuc")

    def best(self, G: Tensor) -> Tensor:
        return exact_polar(G)


# %% 11_descent_under_a_norm sec-no-norms 5 ecc5df81
class Frobenius(Norm):
    """The length as one long vector; it is its own dual."""

    def size(self, W: Tensor) -> Tensor:
        return vector_norm(W, dim=(-2, -1))

    dual_size = size

    def best(self, G: Tensor) -> Tensor:
        return _unit(G, (-2, -1))


class Lines(Norm):
    """The longest row (``dim=-1``) or column (``dim=-2``); its dual, their sum."""

    def __init__(self, dim: int, scale: Scale = lambda m, n: 1.0) -> None:
        super().__init__(scale)
        self.dim = dim

    def size(self, W: Tensor) -> Tensor:
        return vector_norm(W, dim=self.dim).amax(-1)

    def dual_size(self, G: Tensor) -> Tensor:
        return vector_norm(G, dim=self.dim).sum(-1)

    def best(self, G: Tensor) -> Tensor:
        return _unit(G, self.dim)


class Nuclear(Norm):
    """The sum of the singular values; its dual, the largest."""

    def size(self, W: Tensor) -> Tensor:
        return matrix_norm(W, "nuc")

    def dual_size(self, G: Tensor) -> Tensor:
        return matrix_norm(G, 2)

    def best(self, G: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        return U[..., :1] * (S[..., None, :1] > 0) @ Vh[..., :1, :]


class Conv(Spectral):
    """Of a kernel (outputs, inputs, …), seen as (outputs, all of the rest)."""

    def seen(self, X: Tensor) -> tuple[Tensor, float]:
        if X.ndim < 3:
            told = f"a kernel has 3 dimensions or more, and got shape {tuple(X.shape)}"
            raise ValueError(f"{told}; use norm='spectral'")
        m, n, *sides = X.shape
        return X.flatten(1).to(wide(X.dtype)), self.scale(m, n) / math.prod(sides)


# %% 11_descent_under_a_norm sec-no-norms 6 d32525de
#: Norms by name. The first four have no scale; with those of the others a step of
#: norm η changes what a layer puts out by about η, whatever the width.
NORMS: dict[str, Norm] = {
    "max": Max(),
    "frobenius": Frobenius(),
    "operator": Spectral(),
    "nuclear": Nuclear(),
    "spectral": Spectral(lambda m, n: (m / n) ** 0.5),
    "spectral_input": Spectral(lambda m, n: max(1.0, m / n) ** 0.5),
    "conv": Conv(lambda m, n: (m / n) ** 0.5),
    "sign": Max(lambda m, n: 1 / n),
    "row": Lines(-1, lambda m, n: n**-0.5),
    "column": Lines(-2, lambda m, n: m**0.5),
    "embedding": Lines(-1, lambda m, n: n**0.5),
    "rms": Frobenius(lambda m, n: (m * n) ** 0.5),
}


# %% 11_descent_under_a_norm sec-no-norms 7 5a522521
def _norm(norm: str | Norm) -> Norm:
    if isinstance(norm, Norm):
        return norm
    check_choice("norm", norm, NORMS)
    return NORMS[norm]


def lmo(G: Tensor, norm: str | Norm = "spectral") -> Tensor:
    """The step of norm one that a gradient likes best: ``argmin ⟨G, Z⟩``.

    Args:
        G: (m, n), m outputs; a vector (m) is a column, a batch (…, m, n) many
            matrices; for ``"conv"`` a kernel (m, n, …).
        norm: A name of ``NORMS``, or a ``Norm``. Default ``"spectral"``.

    Returns:
        Z, of the shape and type of G, with a minus sign: a step is ``W + lr · Z``.

    Raises:
        ValueError: An unknown name; a matrix for ``"conv"``.

    Source: Pethick et al. (2025), arXiv 2502.07529. Chapter 11, eq-no-lmo.
    """
    return _norm(norm).lmo(G)


def dual_norm(G: Tensor, norm: str | Norm = "spectral") -> Tensor:
    """The most that ``⟨G, Z⟩`` can be, of all Z of norm at most one.

    Args:
        G, norm: As for ``lmo``.

    Returns:
        A number; for a batch, one for each matrix. In single precision at least.

    Source: chapter 11, eq-no-dual.
    """
    return _norm(norm).dual(G)


# %% 11_descent_under_a_norm sec-no-momentum 1 ec248ead
class NormDescent(Optimizer):
    """The template: momentum, and the best step of one norm for it.

    ::

        m ← μ m + (1−μ) g;   u = μ m + (1−μ) g (with nesterov), else m
        x ← (1 − lr · weight_decay) x + lr · lmo(u)

    Every matrix has a ball of its own. ``"max"`` is ``Signum``, ``"frobenius"`` is
    ``NormalizedSGD`` by layers, ``"operator"`` is Muon with an exact polar factor.

    Args:
        params: Tensors, or groups of them; a vector is a column, a kernel is
            flattened to (outputs, rest).
        lr: Length of a step in the norm, in [0, ∞). Default 1e-3.
        norm: A name of ``NORMS``, not ``"conv"``. Default ``"spectral"``.
        momentum: μ, in [0, 1). Default 0.9; 0 keeps no state.
        nesterov: Look ahead. Default ``False``.
        weight_decay: Decoupled, in [0, ∞). Default 0.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range; an unknown norm.

    Source: Pethick et al. (2025), arXiv 2502.07529. Chapter 11, eq-no-template.
    """

    matrices = vectors = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        norm: str = "spectral",
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "norm": norm, "momentum": momentum}
        defaults |= {"nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    # %% 11_descent_under_a_norm sec-no-momentum 2 b370535d
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        m = s.momentum_buffer.lerp_(g, 1 - h.momentum) if h.momentum else g
        u = g.lerp(m, h.momentum) if h.nesterov else m
        if h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        p.add_(NORMS[h.norm].lmo(u), alpha=h.lr)

    # %% 11_descent_under_a_norm sec-no-momentum 3 77ba88e5
    @staticmethod
    def init_state(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)} if h.momentum else {}

    def _check_group(self, group: dict[str, Any]) -> None:
        super(NormDescent, self)._check_group(group)
        if group["norm"] == "conv":
            told = "norm='conv' wants a kernel, and a rule sees it flattened"
            raise ValueError(f"{told}; use 'spectral' with lr over the root of its pixels")
        check_choice("norm", group["norm"], [x for x in NORMS if x != "conv"])
        check_choice("nesterov", group["nesterov"], (False, True))
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov=True with momentum=0; pass momentum > 0")


# %% 11_descent_under_a_norm sec-no-momentum 4 a4288ee5
class Signum(Optimizer):
    """Signum: the sign of the momentum.

    ::

        m ← μ m + (1−μ) g;   u = μ m + (1−μ) g (with nesterov), else m
        x ← (1 − lr · weight_decay) x − lr · sign(u)

    A NaN has no sign: its entry stands still, and so does its momentum for good; an
    infinite one goes on for ever. ``nonfinite="skip"`` or ``"raise"`` prevents both.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: How far every entry goes in a step, in [0, ∞). Default 1e-4.
        momentum: μ, in [0, 1). Default 0.9; 0 keeps no state.
        nesterov: Look ahead; this is ``Lion`` with ``betas=(μ², μ)``. Default
            ``False``.
        weight_decay: Decoupled, in [0, ∞). Default 0.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range; ``nesterov`` without momentum.

    Source: Bernstein et al. (2018), arXiv 1802.04434. Chapter 11, eq-no-signum.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        defaults |= {"weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    # %% 11_descent_under_a_norm sec-no-momentum 5 c4ca79d0
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        m = s.momentum_buffer.lerp_(g, 1 - h.momentum) if h.momentum else g
        u = g.lerp(m, h.momentum) if h.nesterov else m
        if h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        p.add_(u.sign(), alpha=-h.lr)

    # %% 11_descent_under_a_norm sec-no-momentum 6 4acbc0ba
    @staticmethod
    def init_state(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)} if h.momentum else {}

    def _check_group(self, group: dict[str, Any]) -> None:
        super(Signum, self)._check_group(group)
        check_choice("nesterov", group["nesterov"], (False, True))
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov=True with momentum=0; pass momentum > 0")


# %% 11_descent_under_a_norm sec-no-momentum 7 80c23dd9
class SignSGD(Signum):
    """SignSGD: every entry of the gradient counts by its sign alone.

    ``x ← (1 − lr · weight_decay) x − lr · sign(g)``. It keeps no state. A NaN has no
    sign: its entry stands still (see ``nonfinite``).

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: How far every entry goes in a step, in [0, ∞). Default 1e-4.
        weight_decay: Decoupled, in [0, ∞). Default 0.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range.

    Source: Bernstein et al. (2018), arXiv 1802.04434. Chapter 11, eq-no-signum.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, 0.0, False, weight_decay, **options)


# %% 11_descent_under_a_norm sec-no-momentum 8 d6986c83
class Lion(Optimizer):
    """Lion: the sign of a short mean, while a longer one is kept.

    ::

        u = β₁ m + (1−β₁) g;   x ← (1 − lr · weight_decay) x − lr · sign(u)
        m ← β₂ m + (1−β₂) g

    What a NaN does: see ``Signum``.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: How far every entry goes in a step, in [0, ∞). Default 1e-4.
        betas: β₁, β₂, each in [0, 1). Default (0.9, 0.99).
        weight_decay: λ, decoupled, in [0, ∞): keeps every entry in [−1/λ, 1/λ].
            Default 0.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range.

    Source: Chen et al. (2023), arXiv 2302.06675. Chapter 11, eq-no-lion. State: one
    number for each parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    # %% 11_descent_under_a_norm sec-no-momentum 9 945dad8d
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        u = s.exp_avg.lerp(g, 1 - h.betas[0]).sign_()
        if h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        p.add_(u, alpha=-h.lr)
        s.exp_avg.lerp_(g, 1 - h.betas[1])

    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(p)}


# %% 11_descent_under_a_norm sec-no-momentum 10 59d01876
class NormalizedSGD(Optimizer):
    """Momentum of length one: the direction counts, the size of a gradient does not.

    ``m ← μ m + (1−μ) g;  x ← (1 − lr · weight_decay) x − lr · m / ‖m‖``, and no step
    where m is zero. The length is taken without reading it back to the host.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Euclidean length of a step, in [0, ∞). Default 1e-2.
        momentum: μ, in [0, 1). Default 0.9; 0 keeps no state.
        scope: What has length one: ``"global"``, all tensors of all groups of this
            scope together; ``"layer"``, each tensor. Default ``"global"``.
        weight_decay: Decoupled, in [0, ∞). Default 0.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range; an unknown scope.

    Source: Cutkosky & Mehta (2020), arXiv 2002.03305. Chapter 11, eq-no-nsgd.
    """

    elementwise = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        scope: Literal["global", "layer"] = "global",
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "scope": scope}
        defaults |= {"weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    # %% 11_descent_under_a_norm sec-no-momentum 11 7c51b516
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        m = s.momentum_buffer.lerp_(g, 1 - h.momentum) if h.momentum else g
        length = h.length.to(m.device) if h.scope == "global" else _length(m)
        m = m.to(wide(m.dtype))
        u = m / length.clamp_min(torch.finfo(m.dtype).tiny)
        if h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        p.sub_(u * h.lr)

    # %% 11_descent_under_a_norm sec-no-momentum 13 f973d522
    @staticmethod
    def init_state(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)} if h.momentum else {}

    def directions(self, work: Any, finite: Tensor | None) -> dict[Tensor, Tensor]:
        """None; but the length of the momentum to be is taken, over all groups."""
        lengths = []
        for group, params in work:
            mu, ours = group["momentum"], self._method(group) is self
            for p in params if ours and group["scope"] == "global" else ():
                m = -p.grad if group["maximize"] else p.grad
                if mu:
                    m = m * (1 - mu)
                    if p in self.state:
                        m = m + self.state[p]["momentum_buffer"] * mu
                length = _length(m)
                length = length.full_tensor() if hasattr(m, "placements") else length
                lengths.append(length.to(lengths[0].device if lengths else length.device))
        self._lengths = torch.stack(lengths).norm() if lengths else None
        return {}

    def clock(self, h: Any) -> None:
        """All tensors share the length."""
        if h.scope == "global":
            h.length = self._lengths

    def _check_group(self, group: dict[str, Any]) -> None:
        super(NormalizedSGD, self)._check_group(group)
        check_choice("scope", group["scope"], ("global", "layer"))


# %% 11_descent_under_a_norm sec-no-momentum 12 d84868c5
def _length(x: Tensor) -> Tensor:
    """In double precision where there is: the square of 1e30 must not overflow."""
    single = x.device.type == "mps"
    return vector_norm(x, dtype=torch.float32 if single else torch.float64)
