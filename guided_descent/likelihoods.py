# Generated from chapters/07_curvature_matrices.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head b578c114
"""Chapter 07, Curvature matrices."""

__all__ = [
    "LIKELIHOODS",
    "Likelihood",
    "check_no_classes",
    "class_axis",
]


# %% 07_curvature_matrices sec-cm-fisher 1 260847d9
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from guided_descent.core import wide


class Likelihood(NamedTuple):
    """What the outputs say about the targets: p(y | f), and its noise.

    ``"categorical"``: cross-entropy of logits. ``"gaussian"``:
    ``½‖f − y‖²``, unit variance. ``"bernoulli"``: binary cross-entropy of
    logits, summed over outputs.

    Source: Martens (2020), arXiv 1412.1193. Chapter 07, eq-cm-fisher.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    """``−log p(targets | f)`` without constants, mean over rows."""
    axis: int
    """Where one row of outputs lies; the other axes count rows."""
    fisher: Callable[[Tensor], Callable[[Tensor], Tensor]]
    """For rows of outputs, the exact product with ``E[s sᵀ]``."""
    root: Callable[[Tensor, int], Tensor]
    """For rows of outputs, column c of a matrix S with ``S Sᵀ = E[s sᵀ]``."""
    score: Callable[[Tensor, torch.Generator | None], Tensor]
    """For rows of outputs, ``s = −∇_f log p(y | f)`` with y drawn."""
    weight: Callable[[Tensor, Tensor], Tensor] | None = None
    """For rows of outputs and of a loss's gradient by them, the least weight
    that ``−log p`` can have in it; exact unless every target is soft."""

    def rows(self, f: Tensor, axis: int | None = None) -> Tensor:
        """Outputs as (rows, outputs of one row)."""
        if f.ndim < 2:
            return f.reshape(-1, 1)
        return f.movedim(self.axis if axis is None else axis, -1).flatten(0, -2)


def _unit(f: Tensor, c: int) -> Tensor:
    return torch.zeros_like(f).index_fill_(-1, torch.tensor(c, device=f.device), 1)


def _categorical_fisher(f: Tensor) -> Callable[[Tensor], Tensor]:
    p = f.softmax(-1)
    return lambda u: p * (u - (p * u).sum(-1, keepdim=True))


def _categorical_root(f: Tensor, c: int) -> Tensor:
    p = f.softmax(-1)
    return p[..., c, None].sqrt() * (p - _unit(f, c))


def _categorical_score(f: Tensor, g: torch.Generator | None) -> Tensor:
    race = f - torch.empty_like(f).exponential_(generator=g).log_()
    p, drawn = f.softmax(-1), race.argmax(-1, keepdim=True)
    return p.scatter_add(-1, drawn, -torch.ones_like(p[..., :1]))


def _categorical_weight(f: Tensor, g: Tensor) -> Tensor:
    p = f.softmax(-1)  # the gradient of c · cross-entropy is c (p − y), y ≥ 0
    g = g - p * g.sum(-1, keepdim=True)  # were f log-probabilities
    return torch.where(p > torch.finfo(p.dtype).tiny, g / p, 0).amax(-1)


def _gaussian_loss(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().sum() / (2 * max(1, f[..., :1].numel()))


def _gaussian_score(f: Tensor, g: torch.Generator | None) -> Tensor:
    return torch.empty_like(f).normal_(generator=g)


def _bernoulli_loss(f: Tensor, y: Tensor) -> Tensor:
    bce = nn.functional.binary_cross_entropy_with_logits
    return bce(f, y, reduction="sum") / max(1, f[..., :1].numel())


def _bernoulli_fisher(f: Tensor) -> Callable[[Tensor], Tensor]:
    p = f.sigmoid()
    return lambda u: p * (1 - p) * u


def _bernoulli_root(f: Tensor, c: int) -> Tensor:
    p = f.sigmoid()
    return _unit(f, c) * (p * (1 - p)).sqrt()


def _bernoulli_score(f: Tensor, g: torch.Generator | None) -> Tensor:
    p = f.sigmoid()
    return p - (torch.empty_like(p).uniform_(generator=g) < p).to(p.dtype)


def _bernoulli_weight(f: Tensor, g: Tensor) -> Tensor:
    p = torch.where(g > 0, f, -f).sigmoid()  # |p − y| is at most this
    return torch.where(p > torch.finfo(p.dtype).tiny, g.abs() / p, 0).amax(-1)


#: The likelihoods behind the usual losses.
LIKELIHOODS: dict[str, Likelihood] = {
    "categorical": Likelihood(
        nn.functional.cross_entropy,
        1,
        _categorical_fisher,
        _categorical_root,
        _categorical_score,
        _categorical_weight,
    ),
    "gaussian": Likelihood(
        _gaussian_loss, -1, lambda f: lambda u: u, _unit, _gaussian_score
    ),
    "bernoulli": Likelihood(
        _bernoulli_loss,
        -1,
        _bernoulli_fisher,
        _bernoulli_root,
        _bernoulli_score,
        _bernoulli_weight,
    ),
}


# %% 07_curvature_matrices sec-cm-fisher 2 b74cb049
def class_axis(f: Tensor, g: Tensor, given: int | None = None) -> int:
    """The axis of the classes: where a cross-entropy's gradient sums to zero.

    A shift of all logits changes no softmax, hence no loss. So it is with
    smoothed and mixed labels, class weights and ignored targets, and with
    every other loss of the softmax alone (a squared error of probabilities,
    say), which is not told from it. Log-probabilities under a negative
    log-likelihood have a gradient of one sign instead. Errors of C
    independent outputs cancel in part, down to ``1 / √C`` of their size:
    less than a third of it is asked for. This reads some numbers back to
    the host.

    Args:
        f: Outputs, (N, …).
        g: The loss's gradient by them; finite and not all zero.
        given: The axis to hold it to, if it is known.

    Returns:
        The axis, at least 1.

    Raises:
        ValueError: No axis is one of classes, or several are about as well.

    Source: chapter 07, "What the model believes".
    """
    axes = list(range(1, f.ndim)) if given is None else [given % f.ndim]
    eps = torch.finfo(g.dtype).eps
    misfits = torch.stack([_misfit(f, g, axis) for axis in axes]).tolist()
    best = max(eps, 10 * min(misfits))
    found = [
        axis
        for axis, misfit in zip(axes, misfits, strict=True)
        if misfit <= min(best, max(eps, min(0.1, 0.3 / f.shape[axis] ** 0.5)))
    ]
    shape = tuple(f.shape)
    if not found:
        where = "any axis" if given is None else f"class_dim={given}"
        raise ValueError(
            "likelihood='categorical' does not fit the loss: its gradient by the "
            f"outputs of shape {shape} does not sum to zero over {where}, as that "
            "of a cross-entropy of logits does over the classes; return logits from "
            "the model, correct class_dim=, or pass the likelihood of the loss: "
            "'gaussian' for squared errors, 'bernoulli' for a binary cross-entropy"
        )
    if len(found) > 1:
        raise ValueError(
            f"the loss's gradient by the outputs of shape {shape} sums to zero over "
            f"each of the axes {found}; pass class_dim= to say which one counts "
            "the classes"
        )
    return found[0]


def _misfit(f: Tensor, g: Tensor, axis: int) -> Tensor:
    """How far a gradient is from a cross-entropy's over an axis, from 0 to 1."""
    f, g = f.to(wide(f.dtype)), g.to(wide(g.dtype))
    whole = g.abs().sum()
    logits = g.sum(axis).abs().sum() / whole
    one_sign = torch.minimum(g.clamp(min=0).sum(), (-g).clamp(min=0).sum()) / whole
    normal = f.logsumexp(axis).abs().amax() < 0.05
    return torch.where(normal, torch.minimum(one_sign, logits), logits)


def check_no_classes(name: str, f: Tensor, g: Tensor) -> None:
    """Refuse a loss that is a cross-entropy of classes, where another was named.

    Args:
        name: ``"gaussian"`` or ``"bernoulli"``.
        f, g: As for ``class_axis``.

    Raises:
        ValueError: The gradient sums to zero over an axis, and the outputs to
            no constant (as probabilities under squared errors do).

    Source: chapter 07, "What the model believes".
    """
    zero = min(1e-3, 100 * torch.finfo(g.dtype).eps)
    f, g = f.to(wide(f.dtype)), g.to(wide(g.dtype))
    for axis in [a for a in range(1, f.ndim) if f.shape[a] > 1]:
        sums = f.sum(axis)
        # Of small outputs the right gradient, too, may sum to almost zero.
        least = (1e-3 * f.abs().amax()).clamp(min=50 * zero)
        free = sums.amax() - sums.amin() > least
        if bool(free & (g.sum(axis).abs().sum() < zero * g.abs().sum())):
            raise ValueError(
                f"likelihood={name!r} does not fit the loss: its gradient by the "
                f"outputs of shape {tuple(f.shape)} sums to zero over axis {axis}, "
                "as a cross-entropy's does; pass likelihood='categorical'"
            )
