# Generated from chapters/03_momentum.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 1b5e9e0c
"""Chapter 03, Momentum."""

__all__ = [
    "SGD",
    "optimal_momentum",
    "spectral_radius",
]


# %% 03_momentum sec-memory 1 3cb33d3d
from typing import Any, Unpack

import torch
from torch import Tensor

from guided_descent.core import Optimizer, Options, check_range


class SGD(Optimizer):
    """Gradient descent with momentum: heavy ball, or Nesterov's variant.

    With g the gradient plus ``weight_decay · x``, and τ the dampening::

        m ← momentum · m + (1 − τ) · g        (the first time: m ← g)
        x ← x − lr · m                        heavy ball
        x ← x − lr · (g + momentum · m)       Nesterov

    A slope that does not change is walked with the effective step
    ``lr · (1 − τ) / (1 − momentum)``.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η, in units of parameter per unit of gradient; in
            [0, ∞). Default 1e-3.
        momentum: Fraction β of the memory that survives a step, in [0, 1).
            Default 0, which keeps no state.
        dampening: Fraction τ of a new gradient that is left out of the
            memory, in [0, 1]. Default 0.
        weight_decay: Strength of the penalty ``weight_decay/2 · ‖x‖²``, in
            [0, ∞). Default 0.
        nesterov: Look ahead along the memory; needs ``momentum > 0`` and
            ``dampening = 0``. Default ``False``.
        **options: ``maximize``, ``engine``, ``nonfinite`` and
            ``state_dtype``, see ``Options``. Dampening takes its first
            average from a gradient, which ``nonfinite="skip"`` could not
            undo: the two exclude each other.

    Raises:
        ValueError: An argument outside its range; ``nesterov`` without
            momentum or with dampening; dampening with
            ``nonfinite="skip"``.
        TypeError: An argument that is not a number.

    Source: Polyak (1964), doi 10.1016/0041-5553(64)90137-5; Sutskever et
    al. (2013), PMLR 28(3). Chapter 03, eq-heavy-ball, eq-nesterov-torch
    and eq-dampening.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, **options)

    # %% 03_momentum sec-memory 2 a34844d8
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        if h.weight_decay:
            g = (h.weight_decay * p).add_(g)
        if h.momentum:
            m = s.momentum_buffer.mul_(h.momentum)
            m.add_(g, alpha=1 - h.dampening)
            g = (h.momentum * m).add_(g) if h.nesterov else m
        p.add_(g, alpha=-h.lr)

    # %% 03_momentum sec-memory 3 e5f46af4
    @staticmethod
    def init_state(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        if not h.momentum:
            return {}
        if not h.dampening:
            return {"momentum_buffer": torch.zeros_like(p)}
        g = g + h.weight_decay * p  # such that the first average is g:
        return {"momentum_buffer": g * (h.dampening / h.momentum)}

    @staticmethod
    def fused(p: list[Tensor], g: list[Tensor], s: Any, h: Any) -> None:
        torch._fused_sgd_(
            p,
            g,
            s.momentum_buffer if h.momentum else [],
            lr=h.lr,
            momentum=h.momentum,
            dampening=h.dampening,
            weight_decay=h.weight_decay,
            nesterov=h.nesterov,
            maximize=h.maximize,
            is_first_step=False,
            found_inf=h.found_inf,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse options that do not go together, too."""
        super(SGD, self)._check_group(group)
        pure = group["momentum"] and not group["dampening"]
        if group["nesterov"] and not pure:
            raise ValueError(
                f"nesterov=True with momentum={group['momentum']} and "
                f"dampening={group['dampening']}; "
                "pass momentum > 0 and dampening = 0"
            )
        if group["dampening"] and group["nonfinite"] == "skip":
            raise ValueError(
                f"dampening={group['dampening']} with nonfinite='skip'; "
                "pass dampening = 0, or nonfinite='propagate'"
            )


# %% 03_momentum sec-two-by-two 1 901997af
def spectral_radius(
    lr: float | Tensor,
    momentum: float | Tensor,
    lam: float | Tensor,
    nesterov: bool = False,
) -> Tensor:
    """Factor by which ``SGD`` shrinks the error along an eigenvector.

    Per step, in the long run, on a quadratic. The numbers may be tensors
    of shapes that broadcast together; plain numbers mean float64.

    Args:
        lr: Step size η.
        momentum: β.
        lam: Eigenvalue λ of the Hessian.
        nesterov: For Nesterov's variant. Default ``False``.

    Returns:
        The spectral radius of the 2×2 system, of the broadcast shape;
        below 1 where the method converges.

    Source: Polyak (1964), doi 10.1016/0041-5553(64)90137-5. Chapter 03,
    eq-radius and eq-nesterov-roots.
    """
    shrink = 1 - _number(lr) * _number(lam)
    beta = _number(momentum)
    if nesterov:
        b, c = (1 + beta) * shrink, beta * shrink
    else:
        b, c = beta + shrink, beta
    gap = b.square() - 4 * c
    real = (b.abs() + gap.clamp(min=0).sqrt()) / 2
    return torch.where(gap < 0, c.clamp(min=0).sqrt(), real)


# %% 03_momentum sec-two-by-two 2 b32c664d
def _number(x: float | Tensor) -> Tensor:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x
    return torch.as_tensor(x, dtype=torch.float64)


# %% 03_momentum sec-square-root 1 95e1580f
def optimal_momentum(mu: float, L: float) -> tuple[float, float]:
    """The pair with which the heavy ball is fastest on quadratics.

    Args:
        mu: Smallest eigenvalue of the Hessian, in (0, L].
        L: Largest eigenvalue, in (0, ∞).

    Returns:
        ``(lr, momentum)``; the error then shrinks by ``√momentum`` a step
        in the long run.

    Raises:
        ValueError: Not ``0 < mu ≤ L < ∞``.
        TypeError: An argument is not a number.

    Source: Polyak (1964), doi 10.1016/0041-5553(64)90137-5. Chapter 03,
    eq-optimal.
    """
    check_range("L", L, "(0, inf)")
    check_range("mu", mu, f"(0, {float(L)}]")
    low, high = float(mu) ** 0.5, float(L) ** 0.5
    return 4 / (low + high) ** 2, ((high - low) / (high + low)) ** 2
