# Generated from chapters/10_shampoo_soap.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 4ba7833e
"""Chapter 10, Shampoo and SOAP."""

__all__ = [
    "SOAP",
    "KLShampoo",
    "MatrixOptimizer",
    "OneSided",
    "PSGDKron",
    "Shampoo",
    "begun",
    "both_roots",
    "clipped",
    "divide_left",
    "divide_right",
    "eigenbasis",
    "failures",
    "fitted",
    "graft",
    "into_basis",
    "inverse_root",
    "learn_left",
    "learn_right",
    "next_basis",
    "out_of_basis",
    "permute",
    "preconditioned",
    "quad_step",
    "values_in",
    "whitened",
]


# %% 10_shampoo_soap sec-sh-adagrad 1 513bd702
import warnings
from collections import Counter
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from guided_descent.core import Optimizer, Options, check_choice, check_range, wide
from guided_descent.engines import matrixwise

#: Sides of a matrix that get a preconditioner, where not both do.
OneSided = Literal["left", "right", "smaller"] | bool | None
#: Eigenproblems that did not converge: how often one was tried again in double
#: precision ("retried"), and how often given up ("failed"). Then a root stays
#: the last good one; a first root is the diagonal's, a first basis the axes.
failures: Counter[str] = Counter()


# %% 10_shampoo_soap sec-sh-adagrad 2 4264cbf9
def _mean_diagonal(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def _nudge(A: Tensor, jitter: float, least: float) -> Tensor:
    """How much is added to eigenvalues: relative to their mean."""
    return _mean_diagonal(A) * (max(jitter, least) if jitter else 0.0)


def _eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, and never an error.

    Of a matrix that fails twice the eigenvalues are NaN and the vectors the axes.
    """
    if A.is_meta:
        return A.new_empty(A.shape[:-1]), torch.empty_like(A)
    try:
        return torch.linalg.eigh(A)
    except RuntimeError:
        pass
    pairs = [_eigh_again(X) for X in A.reshape(-1, *A.shape[-2:])]
    values, vectors = (torch.stack(x).to(A) for x in zip(*pairs, strict=True))
    return values.view(A.shape[:-1]), vectors.view(A.shape)


def _eigh_again(A: Tensor) -> tuple[Tensor, Tensor]:
    """Of one matrix, in double precision and with a nudge."""
    eye, A = torch.eye(len(A), dtype=torch.float64, device=A.device), A.double()
    for nudge in (0.0, 1e-9):
        failures["retried"] += 1
        try:
            return torch.linalg.eigh(A + nudge * _mean_diagonal(A) * eye)
        except RuntimeError:
            pass
    failures["failed"] += 1
    return torch.full_like(A[0], torch.nan), eye


# %% 10_shampoo_soap sec-sh-adagrad 3 63870117
@matrixwise
def inverse_root(
    A: Tensor, power: float = -0.5, eps: float = 1e-6, last: Tensor | None = None
) -> Tensor:
    """``(A + eps · tr(A)/n · I)^power`` of a positive semi-definite matrix.

    Args:
        A: (…, n, n); with n = 0 it is returned.
        power: Usually −1/4 or −1/2.
        eps: Added before the power is taken, relative to the mean eigenvalue.
            Of a zero matrix the result is zero.
        last: What to return if LAPACK fails twice; ``None``: the diagonal's root.

    Source: chapter 10, eq-sh-step.
    """
    if not A.numel():
        return A
    values, Q = _eigh(A)
    failed = values.isnan()
    values = torch.where(failed, A.diagonal(dim1=-2, dim2=-1), values)
    size = _mean_diagonal(A)[..., 0]
    floor = torch.finfo(A.dtype).eps * size * A.shape[-1]
    values = torch.maximum(values.clamp(min=0) + eps * size, floor)
    values = torch.where(size > 0, values, torch.inf)
    root = Q * (values**power).unsqueeze(-2) @ Q.mT
    return root if last is None else torch.where(failed.unsqueeze(-1), last, root)


# %% 10_shampoo_soap sec-sh-limits 1 f3dba46e
class MatrixOptimizer(Optimizer):
    """What the methods of this chapter share: which sides of a matrix they see.

    A tensor of more than two dimensions is flattened to (first, rest). A matrix
    larger than ``block_size`` is cut into balanced blocks, each a matrix of its
    own. A vector is stepped by Adam, inside the same group.

    Source: chapter 10.
    """

    matrices = vectors = True
    clocks: tuple[str, ...] = ("step",)
    ranges = {
        "precondition_every": "[1, inf) int",
        "block_size": "[1, inf) int | None",
        "max_dim": "[0, inf) int",
    }

    def __init__(
        self, params: Any, defaults: dict[str, Any], **options: Unpack[Options]
    ) -> None:
        options.setdefault("nonfinite", "skip")
        super().__init__(params, defaults, **options)
        groups = [x for x in self.param_groups if "algorithm" not in x]
        shapes = [p.dim() for x in groups for p in x["params"]]
        if shapes and max(shapes) < 2:
            warnings.warn(
                f"{type(self).__name__} got no matrix, and steps all by Adam; "
                "parameters that FSDP1 or ZeRO has flattened have lost their shape, "
                "use DDP",
                stacklevel=3,
            )

    def block(self, rows: int, columns: int, group: dict) -> tuple[int, int]:
        """A side without a preconditioner is not cut: there is nothing to save."""
        size = group["block_size"] or max(rows, columns)
        sides = _sides(rows, columns, group["one_sided"], group["max_dim"])
        whole = zip((rows, columns), sides, strict=True)
        height, width = (size if wanted else side for side, wanted in whole)
        return height, width

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse what is none of the choices, too."""
        super()._check_group(group)
        if "one_sided" in self.defaults:
            sides = (None, "left", "right", "smaller", False, True)
            check_choice("one_sided", group["one_sided"], sides)


def _sides(m: int, n: int, only: OneSided, limit: int) -> tuple[bool, bool]:
    """Which sides get a preconditioner: small enough, and asked for."""
    if only == "smaller" or only is True:
        only = "left" if m <= n else "right"
    return only != "right" and m <= limit, only != "left" and n <= limit


def _moments(p: Tensor) -> dict[str, Tensor]:
    names = ("exp_avg", "exp_avg_sq")
    return {"step": torch.zeros(()), **{n: torch.zeros_like(p) for n in names}}


def _is_vector(s: Any) -> bool:
    return not hasattr(s, "left")


# %% 10_shampoo_soap sec-sh-limits 2 5687a065
@matrixwise
def into_basis(X: Tensor, Q_L: Tensor, Q_R: Tensor) -> Tensor:
    """``Q_Lᵀ X Q_R``; an empty basis leaves its side alone."""
    X = Q_L.mT @ X if Q_L.numel() else X
    return X @ Q_R if Q_R.numel() else X


@matrixwise
def out_of_basis(X: Tensor, Q_L: Tensor, Q_R: Tensor) -> Tensor:
    """``Q_L X Q_Rᵀ``; an empty basis leaves its side alone."""
    X = Q_L @ X if Q_L.numel() else X
    return X @ Q_R.mT if Q_R.numel() else X


@matrixwise
def permute(X: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows and columns in a new order; an empty order is the old one."""
    X = X.gather(-2, rows.unsqueeze(-1).expand_as(X)) if rows.numel() else X
    return X.gather(-1, columns.unsqueeze(-2).expand_as(X)) if columns.numel() else X


@matrixwise
def learn_left(A: Tensor, X: Tensor, weight: Any, keep: Any) -> Tensor:
    """``keep · A + weight · X Xᵀ``, written into A, or A where it is empty."""
    return _add_gram(A, X, weight, keep) if A.numel() else A


@matrixwise
def learn_right(A: Tensor, X: Tensor, weight: Any, keep: Any) -> Tensor:
    """``keep · A + weight · Xᵀ X``, written into A, or A where it is empty."""
    return _add_gram(A, X.mT, weight, keep) if A.numel() else A


#: A symmetric product with more rows than this is computed by halves, one
#: corner for both.
_ROWS = 192


def _add_gram(A: Tensor, X: Tensor, weight: Any, keep: Any) -> Tensor:
    n = X.shape[-2]
    if n > _ROWS:
        top, rest = slice(None, n // 2), slice(n // 2, None)
        for part in (top, rest):
            _add_gram(A[..., part, part], X[..., part, :], weight, keep)
        corner = A[..., rest, top]
        _add_product(corner, X[..., rest, :], X[..., top, :].mT, weight, keep)
        A[..., top, rest].copy_(corner.mT)
        return A
    return _add_product(A, X, X.mT, weight, keep)


def _add_product(A: Tensor, X: Tensor, Y: Tensor, weight: Any, keep: Any) -> Tensor:
    if isinstance(weight, Tensor) or isinstance(keep, Tensor):
        return A.mul_(keep).add_(weight * (X @ Y))
    product = A.addmm_ if A.ndim == 2 else A.baddbmm_
    return product(X, Y, beta=keep, alpha=weight)


# %% 10_shampoo_soap sec-sh-limits 3 4078edd2
class Shampoo(MatrixOptimizer):
    """Shampoo: the gradient between inverse roots of two running means.

    ::

        m ← m + (1−β₁)(g − m)
        L ← L + (1−β₂)(g gᵀ − L);   R ← R + (1−β₂)(gᵀ g − R)
        u = L^a m̂ R^a,   and then as long as Adam's step (``grafting``)
        x ← (1 − lr · weight_decay) x − lr · u

    Args:
        params: Parameters or groups of them, of any shape; vectors by Adam. A
            group with ``algorithm="adamw"`` has AdamW's defaults, its ``lr`` too.
        lr: Step size, in [0, ∞). Under Adam's graft three to five times
            Adam's. Default 3e-3.
        betas: β₁ in [0, 1), and β₂ in [0, 1]. β₂ = 1 sums without forgetting,
            as the first paper did. Default (0.9, 0.95).
        eps: Added to L and R before the root, relative to their mean
            eigenvalue; in [0, ∞). Default 1e-6.
        weight_decay: Decoupled, in [0, ∞). Default 0.
        exponent: a, negative. ``None`` (the default): −1/(2k) for k sides, the
            paper's. −0.5 is the better one under a graft.
        grafting: ``"adam"`` (the default) or ``"sgd"``: whose length a step
            has, block by block; ``None``: its own.
        precondition_every: Steps in which each root is taken once, after the
            step, in turns. With 1 it is taken before, from the latest L and R.
            Default 10.
        block_size: Largest side of a block; ``None``: no blocks. Default 1024.
        one_sided: ``"left"``, ``"right"`` or ``"smaller"``, for which ``True``
            is short; ``None`` (the default): both sides. A group may say it,
            for an embedding ``{"params": …, "one_sided": True}``.
        max_dim: A longer side of the whole matrix gets the identity, and is not cut.
            Default 10000.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Raises:
        ValueError: An argument outside its range.

    Warns:
        UserWarning: Exponents that add up to −1 without a graft: such a step
            has the unit of 1/g, and grows where the gradient shrinks.

    Source: Gupta et al. (2018), arXiv 1802.09568; Anil et al. (2020), arXiv
    2002.09018. Chapter 10, eq-sh-step and eq-sh-graft. State for an m×n
    matrix: 2mn + 2m² + 2n² numbers.
    """

    every = "precondition_every"
    precise = ("left", "right", "left_root", "right_root")
    ranges = {**MatrixOptimizer.ranges, "betas": ("[0, 1)", "[0, 1]")}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        exponent: float | None = None,
        grafting: Literal["adam", "sgd"] | None = "adam",
        precondition_every: int = 10,
        block_size: int | None = 1024,
        one_sided: OneSided = None,
        max_dim: int = 10000,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "exponent": exponent,
            "grafting": grafting,
            "precondition_every": precondition_every,
            "block_size": block_size,
            "one_sided": one_sided,
            "max_dim": max_dim,
        }
        super().__init__(params, defaults, **options)

    # %% 10_shampoo_soap sec-sh-limits 4 8164a7f6
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        m = s.exp_avg.lerp_(g, 1 - h.betas[0])
        v = s.exp_avg_sq.mul_(h.betas[1]).addcmul_(g, g, value=h.w2)
        u = adam = m * h.c1 / (v.sqrt() / h.c2).add_(1e-8)
        if not _is_vector(s):
            s.left.copy_(learn_left(s.left, g, h.w2, h.betas[1]))
            s.right.copy_(learn_right(s.right, g, h.w2, h.betas[1]))
            if h.precondition_every == 1:
                _take_roots(s, h)
            u = into_basis(m * h.c1, s.left_root, s.right_root)
            if h.grafting:
                u = graft(u, adam if h.grafting == "adam" else m * h.c1)
        p.mul_(h.decay).add_(u, alpha=-h.lr)

    # %% 10_shampoo_soap sec-sh-limits 6 659bafb1
    @staticmethod
    def refresh(s: Any, h: Any) -> None:
        if not _is_vector(s) and h.precondition_every > 1:
            _take_roots(s, h)

    # %% 10_shampoo_soap sec-sh-limits 7 e60b555a
    @staticmethod
    def clock(h: Any) -> None:
        """L and R begin as the first gradient's, v at zero with Adam's correction."""
        b1, b2 = h.betas
        h.w2 = 1 - b2 if b2 < 1 else 1.0
        h.c1 = 1 / (1 - b1**h.step)
        h.c2 = (1 - b2**h.step) ** 0.5 if b2 < 1 else 1.0
        h.decay = 1 - h.lr * h.weight_decay


    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        s, g = _moments(p), g.to(wide(g.dtype))
        if p.shape[1] == 1:
            return s
        left, right = _sides(*p.shape, h.one_sided, h.max_dim)
        L = g @ g.mT if left else g.new_zeros(0, 0)
        R = g.mT @ g if right else g.new_zeros(0, 0)
        roots = both_roots(L, R, exponent=h.exponent, eps=h.eps)
        mean = float(h.betas[1] < 1)
        s |= {"left": L * mean, "right": R * mean}
        return s | {"left_root": roots[0], "right_root": roots[1]}


    def _check_group(self, group: dict[str, Any]) -> None:
        super(Shampoo, self)._check_group(group)
        check_choice("grafting", group["grafting"], ("adam", "sgd", None))
        power = group["exponent"]
        if power is not None:
            check_range("exponent", power, "[-1, 0)")
        power = power or 0.0
        two = not group["one_sided"] and power <= -0.5
        one = group["one_sided"] and power <= -1
        if group["grafting"] is None and (two or one):
            warnings.warn(
                f"exponent={power} without a graft has the unit of 1/gradient: a step "
                "grows where gradients shrink; pass grafting='adam', or a smaller exponent",
                stacklevel=2,
            )


# %% 10_shampoo_soap sec-sh-limits 5 5115d2d8
@matrixwise
def graft(u: Tensor, like: Tensor) -> Tensor:
    """u with the length of another matrix, and that matrix where u is zero.

    Source: chapter 10, eq-sh-graft.
    """
    length, wanted = (torch.linalg.matrix_norm(X, keepdim=True) for X in (u, like))
    return torch.where(length > 0, u * (wanted / length), like)


@matrixwise
def both_roots(
    L: Tensor,
    R: Tensor,
    *last: Tensor,
    exponent: float | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """The inverse roots of L and R, by default of order 2k for k sides."""
    sides = bool(L.numel()) + bool(R.numel())
    power = -0.5 / max(sides, 1) if exponent is None else exponent
    pairs = zip((L, R), last or (None, None), strict=True)
    return tuple(inverse_root(A, power, eps, old) for A, old in pairs)


def _take_roots(s: Any, h: Any) -> None:
    last = s.left_root, s.right_root
    L, R = both_roots(s.left, s.right, *last, exponent=h.exponent, eps=h.eps)
    s.left_root.copy_(L)
    s.right_root.copy_(R)


# %% 10_shampoo_soap sec-sh-soap 1 68562a0d
class SOAP(MatrixOptimizer):
    """SOAP: Adam in the eigenbasis of Shampoo's two matrices.

    With ``G = Q_Lᵀ g Q_R`` and Adam's moments of G::

        m ← m + (1−β₁)(G − m);   v ← v + (1−β₂)(G² − v)
        x ← (1 − lr · weight_decay) (x − lr · Q_L (m̂ / √v̂) Q_Rᵀ)
        L ← L + (1−β₂)(g gᵀ − L);   R ← R + (1−β₂)(gᵀ g − R)

    and then, once in ``precondition_every`` steps, ``Q ← qr(A Q)`` for each of
    L and R. The renewal comes *after* the step. m is carried into the new
    basis, v follows the order of its columns.

    Args:
        params: Parameters or groups of them, of any shape; vectors by Adam. A
            group with ``algorithm="adamw"`` has AdamW's defaults, its ``lr`` too.
        lr: Step size, in [0, ∞); as for Adam. Default 3e-3.
        betas: β₁, β₂, each in [0, 1). Default (0.95, 0.95).
        eps: Added to the root of v, in [0, ∞). Default 1e-8.
        weight_decay: Decoupled, in [0, ∞). Default 0.01.
        precondition_every: Steps in which each basis is renewed once; the
            matrices take turns. Default 10.
        block_size: Largest side of a block, at least 1; ``None``: no blocks.
            Default 1024.
        one_sided: ``"left"``, ``"right"`` or ``"smaller"``, for which ``True``
            is short: only that side is turned. ``None`` (the default): both. A
            group may say it, for an embedding ``{"params": …, "one_sided": True}``.
        max_dim: A longer side of the whole matrix gets the identity, and is not cut.
            Default 10000.
        first_step: ``"move"`` (the default): the first step goes along U Vᵀ
            where ``g = U S Vᵀ``, without what is rounding. ``"skip"``: the
            first gradient sets the basis and moves nothing, as in the official
            code.
        kl: Use the statistics of ``KLShampoo``. Default ``False``.
        jitter: See ``eigenbasis``. Default 1e-9.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Raises:
        ValueError: An argument outside its range.

    Source: Vyas et al. (2024), arXiv 2409.11321. Chapter 10, eq-sh-soap and
    eq-sh-refresh. State for an m×n matrix: 2mn + 2m² + 2n² numbers.
    """

    every = "precondition_every"
    precise = ("left", "right", "left_basis", "right_basis")
    precise += ("left_values", "right_values")
    ranges = {**MatrixOptimizer.ranges, "jitter": "[0, 1)"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_every: int = 10,
        block_size: int | None = 1024,
        one_sided: OneSided = None,
        max_dim: int = 10000,
        first_step: Literal["move", "skip"] = "move",
        kl: bool = False,
        jitter: float = 1e-9,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_every": precondition_every,
            "block_size": block_size,
            "one_sided": one_sided,
            "max_dim": max_dim,
            "first_step": first_step,
            "kl": kl,
            "jitter": jitter,
        }
        super().__init__(params, defaults, **options)

    # %% 10_shampoo_soap sec-sh-soap 2 add2bffd
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        sides = () if _is_vector(s) else (s.left_basis, s.right_basis)
        G = into_basis(g, *sides) if sides else g
        m = s.exp_avg.lerp_(G, h.w1)
        v = s.exp_avg_sq.mul_(1 - h.w2).addcmul_(G, G, value=h.w2)
        u = m / v.sqrt().add_(h.eps)
        u = out_of_basis(u, *sides) if sides else u
        p.add_(u, alpha=-h.rate).mul_(h.decay)
        if sides:
            left, right = _whitened(g, G, s) if h.kl else (g, g)
            s.left.copy_(learn_left(s.left, left, h.w2, 1 - h.w2))
            s.right.copy_(learn_right(s.right, right, h.w2, 1 - h.w2))

    # %% 10_shampoo_soap sec-sh-soap 5 570507a8
    @staticmethod
    def refresh(s: Any, h: Any) -> None:
        if _is_vector(s):
            return
        L, i = next_basis(s.left, s.left_basis, h.jitter)
        R, j = next_basis(s.right, s.right_basis, h.jitter)
        m = out_of_basis(s.exp_avg, s.left_basis, s.right_basis)
        s.exp_avg.copy_(into_basis(m, L, R))
        s.exp_avg_sq.copy_(permute(s.exp_avg_sq, i, j))
        s.left_basis.copy_(L)
        s.right_basis.copy_(R)
        if h.kl:
            s.left_values.copy_(values_in(s.left, L))
            s.right_values.copy_(values_in(s.right, R))

    # %% 10_shampoo_soap sec-sh-soap 6 aefd85cd
    @staticmethod
    def clock(h: Any) -> None:
        """The first gradient is in the state already: its weights are zero."""
        b1, b2 = h.betas
        first = 1.0 * (h.step == 1)
        skip = float(h.first_step == "skip")
        t = h.step - skip
        go = 1 - first * skip
        h.w1, h.w2 = (1 - first) * (1 - b1), (1 - first) * (1 - b2)
        h.rate = go * h.lr * (1 - b2**t) ** 0.5 / (1 - b1**t + (1 - go))
        h.decay = 1 - go * h.lr * h.weight_decay


    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        s, G = _moments(p), g.to(wide(g.dtype))
        if p.shape[1] > 1:
            made = _first_factors(p, G, h)
            s |= made
            for side in ("left", "right"):
                basis = eigenbasis(made[side], h.jitter)
                s[f"{side}_basis"] = basis
                if h.kl:
                    s[f"{side}_values"] = values_in(made[side], basis)
            sides = s["left_basis"], s["right_basis"]
            if any(Q.numel() for Q in sides):
                G = into_basis(G, *sides)
                noise = max(torch.finfo(G.dtype).eps, h.jitter) ** 0.5
                G = torch.where(G.abs() < noise * G.abs().amax(), 0, G)
        if h.first_step == "move":
            s["exp_avg"], s["exp_avg_sq"] = (1 - h.betas[0]) * G, (1 - h.betas[1]) * G**2
        return s

    # %% 10_shampoo_soap sec-sh-soap 8 57277d04
    def _check_group(self, group: dict[str, Any]) -> None:
        super(SOAP, self)._check_group(group)
        check_choice("first_step", group["first_step"], ("move", "skip"))
        check_choice("kl", group["kl"], (False, True))


# %% 10_shampoo_soap sec-sh-soap 3 c2a15c04
@matrixwise
def eigenbasis(A: Tensor, jitter: float = 1e-9) -> Tensor:
    """Eigenvectors of a positive semi-definite matrix, the largest value first.

    Where eigenvalues coincide, above all in a null space, a nudge decides, not
    round-off: ``jitter`` times the mean eigenvalue, on a ladder.

    Args:
        A: (…, n, n).
        jitter: Of the nudge; at least 8 roundings of the type, or 0 for none.

    Source: chapter 10, eq-sh-basis.
    """
    n = A.shape[-1]
    if not n:
        return A
    least = 8 * torch.finfo(A.dtype).eps
    ladder = torch.arange(n, 0, -1, dtype=A.dtype, device=A.device) / n
    _, Q = _eigh(A + _nudge(A, jitter, least) * ladder.diag())
    return Q.flip(-1).contiguous()


# %% 10_shampoo_soap sec-sh-soap 4 1150c427
@matrixwise
def next_basis(A: Tensor, Q: Tensor, jitter: float = 1e-9) -> tuple[Tensor, Tensor]:
    """One step of subspace iteration: Q sorted by its eigenvalues, then qr(A Q).

    Args:
        A: (…, n, n), positive semi-definite.
        Q: The basis before, orthogonal columns.
        jitter: Added to A, relative to the mean eigenvalue; at least the root
            of a rounding, or 0 for none.

    Returns:
        The new basis, and which old column each new one comes from, (…, n).

    Source: Vyas et al. (2024), arXiv 2409.11321. Chapter 10, eq-sh-refresh.
    """
    if not A.numel():
        return A, A.new_empty(A.shape[:-1]).long()
    Y = A @ Q
    Y = Y + _nudge(A, jitter, torch.finfo(A.dtype).eps ** 0.5) * Q
    order = (Y * Q).sum(-2).argsort(-1, descending=True)
    Q, R = torch.linalg.qr(Y.gather(-1, order.unsqueeze(-2).expand_as(Y)))
    signs = R.diagonal(dim1=-2, dim2=-1).sign()
    return Q * torch.where(signs == 0, 1, signs).unsqueeze(-2), order


# %% 10_shampoo_soap sec-sh-soap 7 45783ef4
def _first_factors(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
    """L and R after the first gradient; of a side that is left alone, empty."""
    left, right = _sides(*p.shape, h.one_sided, h.max_dim)
    (m, n), weight = p.shape, 1 - h.betas[1]
    L = g @ g.mT if left else g.new_zeros(0, 0)
    R = g.mT @ g if right else g.new_zeros(0, 0)
    if not h.kl:
        return {"left": weight * L, "right": weight * R}
    size = g.square().mean().sqrt()
    safe = torch.where(size > 0, size, 1)
    L, R = weight * L / (n * safe), weight * R / (m * safe)
    for A in (L, R):
        A.diagonal().add_((1 - weight) * size)
    return {"left": L, "right": R}


# %% 10_shampoo_soap sec-sh-soap 9 81d7dcc4
@matrixwise
def values_in(A: Tensor, Q: Tensor) -> Tensor:
    """The diagonal of ``Qᵀ A Q``."""
    return ((A @ Q) * Q).sum(-2)


def _whitened(g: Tensor, G: Tensor, s: Any) -> tuple[Tensor, Tensor]:
    """What L and R learn from under ``kl``: g, whitened on the other side."""
    left = divide_right(g, G, s.left_basis, s.right_values)
    right = divide_left(g, G, s.right_basis, s.left_values)
    return left, right


@matrixwise
def divide_right(g: Tensor, G: Tensor, Q: Tensor, values: Tensor) -> Tensor:
    """``g R^{-1/2} / √n`` up to a rotation on the right."""
    if not values.numel():
        return g / g.shape[-1] ** 0.5
    X = G * _inverse_roots(values).unsqueeze(-2) / g.shape[-1] ** 0.5
    return Q @ X if Q.numel() else X


@matrixwise
def divide_left(g: Tensor, G: Tensor, Q: Tensor, values: Tensor) -> Tensor:
    """``L^{-1/2} g / √m`` up to a rotation on the left."""
    if not values.numel():
        return g / g.shape[-2] ** 0.5
    X = G * _inverse_roots(values).unsqueeze(-1) / g.shape[-2] ** 0.5
    return X @ Q.mT if Q.numel() else X


def _inverse_roots(values: Tensor) -> Tensor:
    mean = values.mean(-1, keepdim=True)
    safe = values.clamp(min=0) + 1e-6 * mean
    return torch.where(mean > 0, safe, 1) ** -0.5  # before the first gradient: I


# %% 10_shampoo_soap sec-sh-kl 1 16b07b14
class KLShampoo(MatrixOptimizer):
    """KL-Shampoo: each side learns from gradients whitened on the other.

    For m×n matrices, with the inverses of before::

        L ← L + (1−β₂)(g R⁻¹ gᵀ / n − L);   R ← R + (1−β₂)(gᵀ L⁻¹ g / m − R)
        x ← (1 − lr · weight_decay) x − lr · clip(L^{-1/2} m̂ R^{-1/2})

    At first L = R = c·I with c the root mean square of the first gradient that is
    not zero. Gradients that grow by orders of magnitude are clipped until L and R
    have followed, which takes some 1/(1−β₂) steps.

    Args:
        params: Parameters or groups of them, of any shape; vectors by Adam. A
            group with ``algorithm="adamw"`` has AdamW's defaults, its ``lr`` too.
        lr: Step size, in [0, ∞); as for Adam. Default 3e-3.
        betas: β₁, β₂, each in [0, 1). Default (0.9, 0.95).
        eps: Added to L and R before the root, relative to their mean
            eigenvalue; in [0, ∞). Default 1e-6.
        weight_decay: Decoupled, in [0, ∞). Default 0.
        precondition_every: Steps in which each root is taken once, in turns.
            Default 10.
        clip: Largest root mean square of a step over ``lr``, in (0, ∞).
            Default 1.1.
        block_size, one_sided, max_dim: As for ``Shampoo``.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Source: Lin et al. (2025), arXiv 2509.03378. Chapter 10, eq-sh-kl. State
    for an m×n matrix: mn + 2m² + 2n² numbers.
    """

    every = "precondition_every"
    precise = ("left", "right", "left_root", "right_root")
    ranges = {**MatrixOptimizer.ranges, "clip": "(0, inf)"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        precondition_every: int = 10,
        clip: float = 1.1,
        block_size: int | None = 1024,
        one_sided: OneSided = None,
        max_dim: int = 10000,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_every": precondition_every,
            "clip": clip,
            "block_size": block_size,
            "one_sided": one_sided,
            "max_dim": max_dim,
        }
        super().__init__(params, defaults, **options)

    # %% 10_shampoo_soap sec-sh-kl 2 becdb439
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        m = s.exp_avg.lerp_(g, 1 - h.betas[0]) * h.c1
        if _is_vector(s):
            v = s.exp_avg_sq.lerp_(g.square(), 1 - h.betas[1])
            u = m / (v.sqrt() / h.c2).add_(1e-8)
        else:
            _begin(s, g)
            u = clipped(into_basis(m, s.left_root, s.right_root), limit=h.clip)
            left, right = whitened(g, s.left_root, s.right_root)
            s.left.copy_(learn_left(s.left, left, 1 - h.betas[1], h.betas[1]))
            s.right.copy_(learn_right(s.right, right, 1 - h.betas[1], h.betas[1]))
        p.mul_(h.decay).add_(u, alpha=-h.lr)

    # %% 10_shampoo_soap sec-sh-kl 4 7cb4b662
    @staticmethod
    def refresh(s: Any, h: Any) -> None:
        if not _is_vector(s):
            s.left_root.copy_(inverse_root(s.left, -0.5, h.eps, s.left_root))
            s.right_root.copy_(inverse_root(s.right, -0.5, h.eps, s.right_root))


    @staticmethod
    def clock(h: Any) -> None:
        h.c1, h.c2 = 1 / (1 - h.betas[0] ** h.step), (1 - h.betas[1] ** h.step) ** 0.5
        h.decay = 1 - h.lr * h.weight_decay


    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        s, g = _moments(p), g.to(wide(g.dtype))
        if p.shape[1] == 1:
            return s
        del s["exp_avg_sq"]
        size = g.square().mean().sqrt()
        sides = _sides(*p.shape, h.one_sided, h.max_dim)
        for side, n, wanted in zip(("left", "right"), p.shape, sides, strict=True):
            eye = torch.eye(n * wanted, dtype=g.dtype, device=g.device)
            s[side] = size * eye
            s[f"{side}_root"] = torch.where(size > 0, size**-0.5, 0) * eye
        return s


# %% 10_shampoo_soap sec-sh-kl 3 f586b489
@matrixwise
def whitened(g: Tensor, L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """``g R^{-1/2} / √n`` and ``L^{-1/2} g / √m``, from the inverse roots."""
    m, n = g.shape[-2:]
    left = g @ R if R.numel() else g
    right = L @ g if L.numel() else g
    return left / n**0.5, right / m**0.5


@matrixwise
def begun(A: Tensor, root: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A and its inverse root, of the size of g where all gradients before were zero."""
    if not A.numel():
        return A, root
    size = g.square().mean((-2, -1), keepdim=True).sqrt()
    fresh = (_mean_diagonal(A) == 0) & (size > 0)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.where(fresh, size * eye, A), torch.where(fresh, size**-0.5 * eye, root)


def _begin(s: Any, g: Tensor) -> None:
    for pair in ((s.left, s.left_root), (s.right, s.right_root)):
        for x, new in zip(pair, begun(*pair, g), strict=True):
            x.copy_(new)


@matrixwise
def clipped(u: Tensor, limit: float) -> Tensor:
    """u with a root mean square of at most ``limit``."""
    size = u.square().mean((-2, -1), keepdim=True).sqrt()
    return u * torch.where(size > limit, limit / size, 1)


def _norm(A: Tensor, steps: int = 4) -> Tensor:
    """The largest eigenvalue of a positive semi-definite matrix, from below."""
    norms = A.norm(dim=-1)
    v = A.take_along_dim(norms.argmax(-1)[..., None, None], -2).mT
    for _ in range(steps):
        size = torch.linalg.matrix_norm(v, keepdim=True)
        v = A @ torch.where(size > 0, v / size, 0)
    return torch.linalg.matrix_norm(v, keepdim=True)


# %% 10_shampoo_soap sec-sh-psgd 1 29c7a195
class PSGDKron(MatrixOptimizer):
    """PSGD with two Kronecker factors, fitted without inverses or roots.

    With ``P = (Q_LᵀQ_L) g (Q_RᵀQ_R)``, ``A = P Pᵀ`` and c = n for the left
    factor of an m×n matrix, and ``A = PᵀP`` and c = m for the right one::

        ℓ ← max(0.9 ℓ + 0.1 s, s),   s = ‖A‖ + c
        Y = Q − μ/(2ℓ) (A Q − c Q);   Y ← Y − μ/(2ℓ) (Y A − c Y)
        Q ← (Y + Yᵀ) / 2
        x ← (1 − lr · weight_decay) x − lr · clip((Q_LᵀQ_L) m̂ (Q_RᵀQ_R))

    Args:
        params: Parameters or groups of them, of any shape; vectors by Adam. A
            group with ``algorithm="adamw"`` has AdamW's defaults, its ``lr`` too.
        lr: Step size, in [0, ∞); as for Adam. Default 3e-3.
        betas: β₁ of the momentum, and β₂ of Adam for vectors, each in [0, 1).
            Default (0.9, 0.95).
        preconditioner_lr: μ, in (0, 1]. Default 0.5.
        clip: Largest root mean square of a step over ``lr``, in (0, ∞).
            Default 1.1.
        weight_decay: Decoupled, in [0, ∞). Default 0.
        block_size, one_sided, max_dim: As for ``Shampoo``.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Source: Li (2018), arXiv 1512.04202; Li (2024), arXiv 2402.11858. Chapter
    10, eq-sh-psgd.
    """

    precise = ("left", "right", "left_norm", "right_norm")
    ranges = {**MatrixOptimizer.ranges, "preconditioner_lr": "(0, 1]"}
    ranges |= {"clip": "(0, inf)"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        preconditioner_lr: float = 0.5,
        clip: float = 1.1,
        weight_decay: float = 0.0,
        block_size: int | None = 1024,
        one_sided: OneSided = None,
        max_dim: int = 10000,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "preconditioner_lr": preconditioner_lr,
            "clip": clip,
            "weight_decay": weight_decay,
            "block_size": block_size,
            "one_sided": one_sided,
            "max_dim": max_dim,
        }
        super().__init__(params, defaults, **options)

    # %% 10_shampoo_soap sec-sh-psgd 3 471469a7
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        m = s.exp_avg.lerp_(g, 1 - h.betas[0]) * h.c1
        if _is_vector(s):
            v = s.exp_avg_sq.lerp_(g.square(), 1 - h.betas[1])
            u = m / (v.sqrt() / h.c2).add_(1e-8)
        else:
            names = ("left", "right", "left_norm", "right_norm")
            before = [getattr(s, name) for name in names]
            after = fitted(g, *before, mu=h.preconditioner_lr)
            for x, new in zip(before, after, strict=True):
                x.copy_(new)
            u = clipped(preconditioned(m, s.left, s.right), limit=h.clip)
        p.mul_(h.decay).add_(u, alpha=-h.lr)

    # %% 10_shampoo_soap sec-sh-psgd 5 1d33086f
    @staticmethod
    def clock(h: Any) -> None:
        h.c1, h.c2 = 1 / (1 - h.betas[0] ** h.step), (1 - h.betas[1] ** h.step) ** 0.5
        h.decay = 1 - h.lr * h.weight_decay


    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        s, g = _moments(p), g.to(wide(g.dtype))
        if p.shape[1] == 1:
            return s
        del s["exp_avg_sq"]
        wanted, size = _sides(*p.shape, h.one_sided, h.max_dim), g.square().mean().sqrt()
        power = -0.5 / max(sum(wanted), 1)
        scale = torch.where(size > 0, size, 1) ** power
        for side, n, one in zip(("left", "right"), p.shape, wanted, strict=True):
            s[side] = scale * torch.eye(n * one, dtype=g.dtype, device=g.device)
            # torch 2.13 loses what a compiled graph writes to a tensor without dimensions
            s[f"{side}_norm"] = g.new_zeros(1, 1)
        return s


# %% 10_shampoo_soap sec-sh-psgd 2 9969c478
def quad_step(
    A: Tensor, Q: Tensor, size: Tensor, c: float, mu: float
) -> tuple[Tensor, Tensor]:
    """Move Q towards ``A = c I``, symmetric; and the running size of ‖A‖ + c."""
    now = _norm(A) + c
    size = torch.maximum(0.9 * size + 0.1 * now, now)
    step = mu / (2 * size)
    Y = Q - step * (A @ Q - c * Q)
    Y = Y - step * (Y @ A - c * Y)
    return (Y + Y.mT) / 2, size


# %% 10_shampoo_soap sec-sh-psgd 4 0a438159
@matrixwise
def preconditioned(X: Tensor, Q_L: Tensor, Q_R: Tensor) -> Tensor:
    """``(Q_LᵀQ_L) X (Q_RᵀQ_R)``; an empty factor leaves its side alone."""
    X = Q_L.mT @ (Q_L @ X) if Q_L.numel() else X
    return X @ Q_R.mT @ Q_R if Q_R.numel() else X


@matrixwise
def fitted(
    g: Tensor, Q_L: Tensor, Q_R: Tensor, left: Tensor, right: Tensor, mu: float
) -> tuple[Tensor, ...]:
    """Both factors of PSGD after one gradient, and their bounds."""
    m, n = g.shape[-2:]
    P = preconditioned(g, Q_L, Q_R)
    if Q_L.numel():
        Q_L, left = quad_step(P @ P.mT, Q_L, left, n, mu)
    if Q_R.numel():
        Q_R, right = quad_step(P.mT @ P, Q_R, right, m, mu)
    return Q_L, Q_R, left, right
