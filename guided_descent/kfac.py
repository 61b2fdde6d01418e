# Generated from chapters/08_kfac.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 4e6f68cb
"""Chapter 08, K-FAC and EKFAC."""

__all__ = [
    "EKFAC",
    "FOOF",
    "KFAC",
    "Reduction",
    "damping_shifts",
    "divide",
    "eigenvalue_correction",
    "gram",
    "inverses_",
    "keep",
    "kronecker_factors",
    "rotate",
    "times",
]


# %% 08_kfac sec-kfac-approximations 1 0f369485
from collections.abc import Callable
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from guided_descent.capture import FisherType, LikelihoodType
from guided_descent.core import Names, Options, check_choice, wide
from guided_descent.layers import Layer
from guided_descent.layerwise import LayerOptimizer, Memory

#: What the user's loss is; see ``KFAC``.
Reduction = Literal["mean", "examples", "sum"] | None


# %% 08_kfac sec-kfac-approximations 2 24c114f5
def gram(x: Tensor, weight: float = 1.0) -> Tensor:
    """``weight · Σ x xᵀ`` over all rows of ``x``, in single precision at least.

    Torch has no product that knows the result to be symmetric. Only blocks on
    and right of the diagonal are multiplied here, 9/16 of a large matrix; the
    others are copied.

    Args:
        x: (…, d).
        weight: Of the sum. Default 1.

    Returns:
        (d, d).

    Source: chapter 08, "Two things that are not true".
    """
    x = x.reshape(-1, x.shape[-1]).to(wide(x.dtype))
    out = x.new_empty(x.shape[1], x.shape[1])
    block = max(128, -(-x.shape[1] // 8))
    for i in range(0, x.shape[1], block):
        j = i + block
        out[i:j, i:].addmm_(x[:, i:j].T, x[:, i:], beta=0, alpha=weight)
        out[j:, i:j] = out[i:j, j:].T
    return out


# %% 08_kfac sec-kfac-approximations 3 afc4bc93
def kronecker_factors(
    a: Tensor, g: Tensor, sharing: str = "expand"
) -> tuple[Tensor, Tensor]:
    """The two factors of a layer: ``F ≈ G ⊗ A``.

    Args:
        a: Inputs, (N, R, d_in): N examples, R places that share the weight.
        g: Output gradients of the examples' losses, (M, N, R, d_out); outer
            products add up over M.
        sharing: ``"expand"`` treats places as examples, ``"reduce"`` sums
            over them first.

    Returns:
        A, (d_in, d_in), and G, (d_out, d_out). Under ``"reduce"`` a factor
        that is nothing but rounding is zero.

    Source: Martens & Grosse (2015), arXiv 1503.05671; Eschenhagen et al.
        (2023), arXiv 2311.00636. Chapter 08, eq-kfac-expand and
        eq-kfac-reduce.
    """
    check_choice("sharing", sharing, ("expand", "reduce"))
    if sharing == "reduce":
        a, g = _summed(a, 1) / a.shape[1], _summed(g, 2)
    N, R = a.shape[:2]
    return gram(a, weight=1 / (N * R)), gram(g, weight=1 / N)


def _summed(x: Tensor, axis: int) -> Tensor:
    """The sum over places; zero where all sums are but the terms' rounding."""
    whole = x.to(wide(x.dtype)).sum(axis, keepdim=True)
    error = 8 * torch.finfo(x.dtype).eps * x.to(whole).norm()
    return whole * (whole.norm() > error)


# %% 08_kfac sec-kfac-damping 1 f5fad243
def rotate(V: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """``leftᵀ V right``; ``right = None`` stands for the identity."""
    V = left.mT @ V
    return V if right is None else V @ right


def divide(V: Tensor, curvature: Tensor, damping: float | Tensor) -> Tensor:
    """``V / (curvature + damping)``, entry by entry.

    Without damping, what has no curvature (down to round-off) stays put.
    """
    total = curvature + damping
    # eigh leaves zero eigenvalues at some roundings of the largest
    eps = torch.finfo(total.dtype).eps * sum(curvature.shape)
    floor = curvature.amax() * eps
    known = total > floor * (total == curvature)
    return torch.where(known, V / total, 0)


def _mean_eigenvalue(factor: Tensor) -> Tensor:
    return (factor.diagonal() if factor.ndim == 2 else factor).mean()


# %% 08_kfac sec-kfac-damping 2 a1a9557f
def damping_shifts(
    A: Tensor, G: Tensor, damping: float | Tensor
) -> tuple[Tensor, Tensor]:
    """What the split adds to the diagonals of A and G.

    Args:
        A: Input factor, (d_in, d_in), or its diagonal alone.
        G: Output factor, the same.
        damping: λ, in [0, ∞).

    Returns:
        ``π √λ`` and ``√λ / π``.

    Source: Martens & Grosse (2015), arXiv 1503.05671. Chapter 08,
    eq-kfac-pi.
    """
    ratio = (_mean_eigenvalue(A) / _mean_eigenvalue(G)).sqrt()
    pi = ratio.nan_to_num(nan=1.0).clamp(1e-8, 1e8)
    root = torch.as_tensor(damping, dtype=pi.dtype, device=pi.device).sqrt()
    return pi * root, root / pi


# %% 08_kfac sec-kfac-bookkeeping 1 0dfe9fd8
class KFAC(LayerOptimizer):
    """K-FAC: natural gradient with a Kronecker product for each layer.

    With A = mean of ``a aᵀ`` over a layer's inputs, G = mean of ``g gᵀ``
    over gradients by its outputs, for drawn targets, and ``lr_max`` the
    largest ``lr`` of all steps so far (and what a scheduler calls
    ``max_lr`` or ``initial_lr``: the largest to come)::

        u = (G ⊗ A + damping · I)⁻¹ ∇L        for each layer
        ν = min(1, √(kl_clip / (lr_max² ⟨u, ∇L⟩)))
        m ← momentum · m + ν u,    w ← w − lr · m

    ``kl_clip`` sets the length of a step at the largest learning rate, and
    ``lr`` scales it from there: half of it is half the step.

    L is the negative log-likelihood that ``likelihood`` names, as a mean
    over rows of outputs: examples, or their tokens or pixels. That it is one
    is checked in the first step, where the gradient shows it (see
    ``reduction``). ``detach()`` an optimizer before building another: its
    hooks would go on to cost time.

    Args:
        model: The module that the training loop calls, as ``model(x)``, in
            ``DistributedDataParallel`` or not. Covered are ``nn.Linear``
            and what multiplies as it does, ``Conv1d/2d/3d``, ``Embedding``,
            ``MultiheadAttention`` and norm layers (diagonal). ``coverage()``
            tells what is; below 80 % of the parameters it warns.
        lr: Step size η, in [0, ∞). Default 0.1.
        momentum: In [0, 1). Default 0.9.
        damping: λ, in units of curvature, in [0, ∞); under
            ``relative_damping`` in units of the layer's mean curvature.
            Default 0.03. Zero needs ``damping_split="exact"``.
        fisher: ``"mc"`` (default), ``"type-2"`` or ``"empirical"`` (which does
            not hold outputs (N, C) against the likelihood).
        likelihood: ``"categorical"`` (default), ``"gaussian"``,
            ``"bernoulli"`` or a callable; see ``Capture``. The user's loss
            is held against it in the first backward pass. A multiple of the
            Gaussian's ½‖f − y‖² multiplies the step (``nn.MSELoss`` of C
            outputs: 2/C), and one of the Bernoulli's, summed over outputs, too
            (``nn.BCEWithLogitsLoss``: 1/C).
        reduction: What the loss is: a ``"mean"`` over rows of outputs (all
            axes but ``class_dim``), a mean over ``"examples"`` of sums over
            their rows (curvature is then that of an example), or a ``"sum"``
            (the step is that of the mean). ``None`` (default): a mean, and an
            error where the gradient shows another, or where it cannot and
            examples have several rows.
        samples: Targets drawn for each row under ``"mc"``. Default 1.
        sharing: ``"expand"`` (default) or ``"reduce"``, for weights that
            are used in several places.
        damping_split: ``"exact"`` (default): in the eigenbasis, which on a
            GPU waits for the device when it is renewed. ``"pi"``: split
            over the factors, with Cholesky, several times cheaper.
        relative_damping: See ``damping``. Default ``False``.
        stat_decay: Weight of the past in running means, in [0, 1).
            Default 0.95.
        factor_update_every: Steps between updates of A and G. Default 1.
        inverse_update_every: Steps between inversions. Default 10.
        kl_clip: Limit c on ``η² ⟨u, ∇L⟩`` at the largest η, in (0, ∞];
            ``math.inf`` turns it off. Default 1e-3.
        weight_decay: Decoupled, ``lr · weight_decay · w``; in [0, ∞).
            Default 0.
        algorithm: The optimizer, by name, that steps parameters in no
            layer, with its own defaults, in groups at the end. Default
            ``"adamw"``.
        seed: Of the drawn targets, with the step count and the rank.
            Default 0.
        output: Where the tensor of the likelihood is in what the model
            returns; see ``Capture``.
        class_dim: Dimension of the classes, or of what makes up a row.
            Default ``None``: where the gradient of the loss sums to zero;
            under other likelihoods the last.
        grad_scaler: The ``torch.amp.GradScaler`` in use; needed under
            ``"empirical"``, and for ``reduction`` to be checked.
        process_group: The processes that average gradients, and so
            statistics. Default: those of ``DistributedDataParallel``.
        params: Parameters or groups, with their own ``lr``, ``momentum``,
            ``damping``, ``stat_decay``, ``kl_clip``, ``weight_decay``. All
            trainable parameters of the model by default. A layer follows
            the group of its weight.
        **options: See ``Options``; ``engine`` is ``"auto"`` or ``"loop"``
            (no batching of factors), ``nonfinite`` is ``"skip"`` by
            default. ``state_dtype`` concerns the momentum alone.

    Raises:
        ValueError: An argument out of range, or unknown; no layer that is
            covered; sharded parameters (use ``DistributedDataParallel``);
            in a backward pass or a step, a loss that is not the
            likelihood's or not reduced as said.
        TypeError: ``model`` is no module; an argument of another type.

    Source: Martens & Grosse (2015), arXiv 1503.05671. Chapter 08,
    eq-kfac-damped, eq-kfac-pi and eq-kfac-clip.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.9,
        damping: float = 0.03,
        fisher: FisherType = "mc",
        likelihood: LikelihoodType = "categorical",
        reduction: Reduction = None,
        samples: int = 1,
        sharing: Literal["expand", "reduce"] = "expand",
        damping_split: Literal["exact", "pi"] = "exact",
        relative_damping: bool = False,
        stat_decay: float = 0.95,
        factor_update_every: int = 1,
        inverse_update_every: int = 10,
        kl_clip: float = 1e-3,
        weight_decay: float = 0.0,
        algorithm: str = "adamw",
        seed: int = 0,
        output: Callable[[Any], Tensor] | None = None,
        class_dim: int | None = None,
        grad_scaler: Any = None,
        process_group: Any = None,
        params: Any = None,
        **options: Unpack[Options],
    ) -> None:
        check_choice("sharing", sharing, ("expand", "reduce"))
        check_choice("damping_split", damping_split, ("exact", "pi"))
        self.sharing, self.relative_damping = sharing, relative_damping
        self.split = damping_split == "pi"
        if self.split:
            self.ranges = self.ranges | {"damping": "(0, inf)"}
        super().__init__(
            model,
            lr=lr,
            momentum=momentum,
            damping=damping,
            stat_decay=stat_decay,
            kl_clip=kl_clip,
            weight_decay=weight_decay,
            algorithm=algorithm,
            factor_update_every=factor_update_every,
            inverse_update_every=inverse_update_every,
            reduction=reduction,
            seed=seed,
            grad_scaler=grad_scaler,
            process_group=process_group,
            params=params,
            capture={
                "fisher": fisher,
                "likelihood": likelihood,
                "samples": samples,
                "output": output,
                "class_dim": class_dim,
            },
            **options,
        )

    # %% 08_kfac sec-kfac-bookkeeping 2 e74e4219
    def precondition(self, m: Memory, g: Tensor, h: Names) -> Tensor:
        if self.split and "F" not in m:
            return m["G_inverse"] @ times(g, m["A_inverse"])
        curvature = m["F"] if "F" in m else self.curvature(m)
        lam = h.damping * (curvature.mean() if self.relative_damping else 1)
        if "F" in m:
            return divide(g, curvature, lam)
        left, right = m["G_vectors"], m.get("A_vectors")
        u = divide(rotate(g, left, right), curvature, lam)
        return rotate(u, left.mT, None if right is None else right.mT)


    def curvature(self, m: Memory) -> Tensor:
        """Eigenvalues of the layer's block, in the factors' eigenbasis."""
        return torch.outer(m["G_values"], m["A_values"])

    # %% 08_kfac sec-kfac-bookkeeping 3 9dca3302
    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        d_out, d_in = layer.shape
        if layer.kind == "scale":
            return {"F": layer.shape}
        table = layer.kind == "embedding"
        return {"A": (d_in,) if table else (d_in, d_in), "G": (d_out, d_out)}


    def statistics(
        self, layer: Layer, a: Tensor, g: Tensor | None
    ) -> Memory:
        if layer.kind == "scale":
            g = g.to(wide(g.dtype))
            columns = [] if layer.weight is None else [(g * a).sum(2)]
            columns += [] if layer.bias is None else [g.sum(2)]
            squares = torch.stack(columns, -1).square().sum(0)
            return {"F": squares.mean(0)}
        if layer.kind == "embedding":
            return {"A": _frequencies(layer, a), "G": gram(g, weight=1 / g.shape[1])}
        A, G = kronecker_factors(a, g, self.sharing)
        if self.relative_damping and self.sharing == "reduce":
            some = (A.trace() > 0) & (G.trace() > 0)
            pairs = zip((A, G), kronecker_factors(a, g), strict=True)
            A, G = (torch.where(some, x, y) for x, y in pairs)
        return {"A": A, "G": G}


    def refresh(
        self, side: str, memories: list[Memory], groups: list[Names]
    ) -> None:
        factors = torch.stack([m[side] for m in memories])
        if self.split:
            pairs = zip(memories, groups, strict=True)
            shifts = torch.stack([self._shift(side, m, h) for m, h in pairs])
            keep(memories, f"{side}_inverse", inverses_(factors, shifts))
        elif factors.ndim == 2:
            keep(memories, f"{side}_values", factors)
        else:
            values, vectors = torch.linalg.eigh(factors)
            keep(memories, f"{side}_values", values.clamp(min=0))
            keep(memories, f"{side}_vectors", vectors)


    def derived(self, side: str) -> set[str]:
        return {f"{side}_inverse" if self.split else f"{side}_values"}


    def _shift(self, side: str, m: Memory, h: Names) -> Tensor:
        """What the split adds to the diagonal of a factor."""
        lam = h.damping
        if self.relative_damping:
            lam = lam * _mean_eigenvalue(m["A"]) * _mean_eigenvalue(m["G"])
        return damping_shifts(m["A"], m["G"], lam)[0 if side == "A" else 1]


# %% 08_kfac sec-kfac-bookkeeping 4 1079d651
def keep(memories: list[Memory], name: str, results: Any) -> None:
    """Remember each layer's own part, apart from the batch."""
    for m, x in zip(memories, results, strict=True):
        m[name] = x.clone() if len(memories) > 1 else x


def times(g: Tensor, inverse: Tensor) -> Tensor:
    """``g A⁻¹``, where the inverse may be a diagonal."""
    return g * inverse if inverse.ndim == 1 else g @ inverse


def _frequencies(layer: Layer, indices: Tensor) -> Tensor:
    """The diagonal input factor of an embedding."""
    dtype = wide(layer.parameters[0].dtype)
    counts = torch.zeros(layer.shape[1], dtype=dtype, device=indices.device)
    ones = counts.new_ones(indices.numel())
    return counts.index_add_(0, indices.flatten(), ones) / indices.numel()


def inverses_(factors: Tensor, shifts: Tensor) -> list[Tensor] | Tensor:
    """Inverses of factors, or of diagonals, after shifting them in place.

    Each shift of a matrix is increased by ``8 · eps · trace``, lest it be lost
    in round-off. The inverse of nothing is nothing.
    """
    if factors.ndim == 2:
        shifted = factors + shifts[:, None]
        return torch.where(shifted == 0, 0, 1 / shifted)
    diagonal = factors.diagonal(dim1=1, dim2=2)
    eps = torch.finfo(factors.dtype).eps
    shifts = (shifts + 8 * eps * diagonal.sum(1))[:, None]
    nothing = shifts == 0
    diagonal.add_(shifts + nothing)
    L = torch.linalg.cholesky_ex(factors)[0]
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    L_inverse = torch.linalg.solve_triangular(L, eye, upper=False)
    return [gram(x) * ~none for x, none in zip(L_inverse, nothing, strict=True)]


# %% 08_kfac sec-kfac-ekfac 1 c939d26d
def eigenvalue_correction(
    a: Tensor, g: Tensor, U_A: Tensor, U_G: Tensor
) -> Tensor:
    """Second moments of the examples' gradients in a Kronecker basis.

    Args:
        a: Inputs, (N, R, d_in): N examples, R places.
        g: Output gradients, (M, N, R, d_out), outer products add up over M.
        U_A: Eigenvectors of A, (d_in, d_in).
        U_G: Eigenvectors of G, (d_out, d_out).

    Returns:
        (d_out, d_in).

    Source: George et al. (2018), arXiv 1806.03884. Chapter 08, eq-ekfac.
    """
    a, g, N = a @ U_A, g @ U_G, len(a)
    if a.shape[1] == 1:
        return g.square().sum((0, 2)).T @ a[:, 0].square() / N
    s = g.new_zeros(g.shape[-1], a.shape[-1])
    chunk = max(1, 2**22 // s.numel())  # examples' gradients at a time
    for A, G in zip(a.split(chunk), g.split(chunk, 1), strict=True):
        per_example = torch.einsum("mnro,nri->mnoi", G, A)
        s += per_example.square().sum((0, 1))
    return s / N


# %% 08_kfac sec-kfac-ekfac 2 60d53377
class EKFAC(KFAC):
    """EKFAC: K-FAC's eigenvectors with the best eigenvalues for them.

    With ``U_A``, ``U_G`` the eigenvectors of K-FAC's factors::

        s = mean of (U_Gᵀ g aᵀ U_A)²
        u = U_G [(U_Gᵀ ∇L U_A) / (s + damping)] U_Aᵀ

    and from there on as ``KFAC``.

    Args:
        model, lr, momentum: As for ``KFAC``.
        damping: As for ``KFAC``; always exact, as the basis is at hand.
        fisher, likelihood, reduction, samples, sharing: As for ``KFAC``.
        relative_damping, stat_decay, factor_update_every: As for ``KFAC``.
        inverse_update_every, kl_clip, weight_decay: As for ``KFAC``.
        algorithm, seed, output, class_dim, grad_scaler: As for ``KFAC``.
        process_group, params: As for ``KFAC``.
        **options: As for ``KFAC``.

    Raises:
        ValueError, TypeError: As for ``KFAC``.

    Source: George et al. (2018), arXiv 1806.03884. Chapter 08, eq-ekfac
    and eq-ekfac-carry.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.9,
        damping: float = 0.03,
        fisher: FisherType = "mc",
        likelihood: LikelihoodType = "categorical",
        reduction: Reduction = None,
        samples: int = 1,
        sharing: Literal["expand", "reduce"] = "expand",
        relative_damping: bool = False,
        stat_decay: float = 0.95,
        factor_update_every: int = 1,
        inverse_update_every: int = 10,
        kl_clip: float = 1e-3,
        weight_decay: float = 0.0,
        algorithm: str = "adamw",
        seed: int = 0,
        output: Callable[[Any], Tensor] | None = None,
        class_dim: int | None = None,
        grad_scaler: Any = None,
        process_group: Any = None,
        params: Any = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            model,
            lr,
            momentum=momentum,
            damping=damping,
            fisher=fisher,
            likelihood=likelihood,
            reduction=reduction,
            samples=samples,
            sharing=sharing,
            damping_split="exact",
            relative_damping=relative_damping,
            stat_decay=stat_decay,
            factor_update_every=factor_update_every,
            inverse_update_every=inverse_update_every,
            kl_clip=kl_clip,
            weight_decay=weight_decay,
            algorithm=algorithm,
            seed=seed,
            output=output,
            class_dim=class_dim,
            grad_scaler=grad_scaler,
            process_group=process_group,
            params=params,
            **options,
        )

    # %% 08_kfac sec-kfac-ekfac 3 720c61ba
    def refresh(
        self, side: str, memories: list[Memory], groups: list[Names]
    ) -> None:
        before = [m.get(f"{side}_vectors") for m in memories]
        super(EKFAC, self).refresh(side, memories, groups)
        for m, U in zip(memories, before, strict=True):
            if {"A_values", "G_values"} <= m.keys():
                start = super(EKFAC, self).curvature(m)
                s = m.get("s", start)
                if "s" in m and U is not None:
                    V = (m[f"{side}_vectors"].mT @ U).square()
                    s = V @ s if side == "G" else s @ V.mT
                m["s"] = torch.where(m["count"] > 1, s, start)

    # %% 08_kfac sec-kfac-ekfac 4 210a9cfa
    def statistics(
        self, layer: Layer, a: Tensor, g: Tensor | None
    ) -> Memory:
        found, m = super(EKFAC, self).statistics(layer, a, g), self._memory(layer)
        if "s" in m:
            g = g.to(wide(g.dtype))
            if "A_vectors" in m:
                U_A, U_G = m["A_vectors"], m["G_vectors"]
                found["s"] = eigenvalue_correction(a.to(g), g, U_A, U_G)
            else:
                found["s"] = _correct_words(a, g, m["A_values"], m["G_vectors"])
        return found


    def derived(self, side: str) -> set[str]:
        return super(EKFAC, self).derived(side) | {"s"}


    def curvature(self, m: Memory) -> Tensor:
        return m["s"]

    # %% 08_kfac sec-kfac-ekfac 5 9f6c9c4b
    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        found = super(EKFAC, self).shapes(layer)
        return found if layer.kind == "scale" else {**found, "s": layer.shape}


    def expected(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Without a basis, at first, nothing is measured in one."""
        found = self.shapes(layer)
        if "s" not in self._memory(layer):
            found.pop("s", None)
        return found


# %% 08_kfac sec-kfac-ekfac 6 e9b62d38
def _correct_words(
    indices: Tensor, g: Tensor, frequencies: Tensor, U_G: Tensor
) -> Tensor:
    """The same for an embedding, whose places are taken one by one."""
    squares = (g @ U_G).square().sum(0).flatten(0, 1).mT
    s = squares.new_zeros(len(squares), len(frequencies))
    return s.index_add_(1, indices.flatten(), squares) / len(indices)


# %% 08_kfac sec-kfac-foof 1 fb30b94a
class FOOF(LayerOptimizer):
    """FOOF: gradient descent on a layer's outputs, by ridge regression.

    With A = mean of ``a aᵀ`` over a layer's inputs::

        u = ∇L (A + damping · I)⁻¹

    and from there on as ``KFAC``; ``kl_clip`` then limits
    ``η² ⟨u, ∇L⟩``, at least the squared change of the layers' outputs. The
    loss need not be a likelihood, and its scale counts, as in gradient descent.

    Args:
        model, lr, momentum: As for ``KFAC``.
        damping: As for ``KFAC``, but positive.
        likelihood: Taken so that methods can be exchanged; without effect.
        sharing, relative_damping, stat_decay: As for ``KFAC``.
        factor_update_every, inverse_update_every: As for ``KFAC``.
        kl_clip, weight_decay: As for ``KFAC``.
        algorithm: As for ``KFAC``; it steps norm layers too, which have no
            input factor.
        output: As for ``KFAC``: only the number of examples is read there.
        process_group, params: As for ``KFAC``.
        **options: As for ``KFAC``.

    Raises:
        ValueError, TypeError: As for ``KFAC``.

    Source: Benzing (2022), arXiv 2201.12250. Chapter 08, eq-foof.
    """

    sides = ("A",)
    ranges = LayerOptimizer.ranges | {"damping": "(0, inf)"}

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.9,
        damping: float = 0.03,
        likelihood: LikelihoodType = "categorical",
        sharing: Literal["expand", "reduce"] = "expand",
        relative_damping: bool = False,
        stat_decay: float = 0.95,
        factor_update_every: int = 1,
        inverse_update_every: int = 10,
        kl_clip: float = 1e-3,
        weight_decay: float = 0.0,
        algorithm: str = "adamw",
        output: Callable[[Any], Tensor] | None = None,
        process_group: Any = None,
        params: Any = None,
        **options: Unpack[Options],
    ) -> None:
        check_choice("sharing", sharing, ("expand", "reduce"))
        self.sharing, self.relative_damping = sharing, relative_damping
        super().__init__(
            model,
            lr=lr,
            momentum=momentum,
            damping=damping,
            stat_decay=stat_decay,
            kl_clip=kl_clip,
            weight_decay=weight_decay,
            algorithm=algorithm,
            factor_update_every=factor_update_every,
            inverse_update_every=inverse_update_every,
            reduction=None,
            seed=0,
            grad_scaler=None,
            process_group=process_group,
            params=params,
            capture={"fisher": "none", "likelihood": likelihood, "output": output},
            **options,
        )

    # %% 08_kfac sec-kfac-foof 2 9f682975
    def refresh(
        self, side: str, memories: list[Memory], groups: list[Names]
    ) -> None:
        units = [_mean_eigenvalue(m["A"]) for m in memories]
        shifts = [
            h.damping * (unit if self.relative_damping else torch.ones_like(unit))
            for h, unit in zip(groups, units, strict=True)
        ]
        factors = torch.stack([m["A"] for m in memories])
        keep(memories, "A_inverse", inverses_(factors, torch.stack(shifts)))


    def derived(self, side: str) -> set[str]:
        return {f"{side}_inverse"}


    def precondition(self, m: Memory, g: Tensor, h: Names) -> Tensor:
        return times(g, m["A_inverse"])

    # %% 08_kfac sec-kfac-foof 3 3c2a4069
    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        d = layer.shape[1]
        if layer.kind == "scale":
            return {}
        return {"A": (d,) if layer.kind == "embedding" else (d, d)}


    def statistics(
        self, layer: Layer, a: Tensor, g: Tensor | None
    ) -> Memory:
        if layer.kind == "embedding":
            return {"A": _frequencies(layer, a)}
        nothing = a.new_zeros(1, *a.shape[:2], 1)
        return {"A": kronecker_factors(a, nothing, self.sharing)[0]}
