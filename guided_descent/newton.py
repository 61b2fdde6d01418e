# Generated from chapters/06_newton.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head c61853b2
"""Chapter 06, Newton and quasi-Newton."""

__all__ = [
    "BFGS",
    "LBFGS",
    "Newton",
    "NewtonCG",
    "QuasiNewton",
    "Trial",
    "bfgs_update",
    "strong_wolfe",
    "truncated_cg",
    "two_loop",
]


# %% 06_newton sec-newton-step 1 2f33be0c
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from guided_descent.core import Options, check_range
from guided_descent.vector import Objective, VectorOptimizer


# %% 06_newton sec-newton-step 2 f34841e2
class Newton(VectorOptimizer):
    """Newton's method, damped, with a line search.

    With H = V diag(λ) Vᵀ the Hessian and g the gradient::

        d ← −V (|λ| + damping)⁻¹ Vᵀ g
        x ← x + t d       t from a strong Wolfe line search, lr first

    Where H is positive definite and ``damping = 0`` this is −H⁻¹ g. The
    absolute value turns a saddle from an attractor into a repeller.
    Eigenvalues below round-off, ``d · eps · max |λ|``, are raised to it.

    Memory d² and work d³ a step, with d the number of parameters; and d
    times the memory of a backward pass, for d products at once. The
    closure returns the loss and does not call ``backward``; the Hessian
    needs operations with second derivatives that ``torch.vmap`` can batch.

    Args:
        params: Parameters or one group of them; frozen ones are left out.
        lr: First trial step length t, in [0, ∞). Default 1: Newton's step.
        damping: Added to every ``|λ|``, in [0, ∞). Default 0.
        line_search_fn: ``"strong_wolfe"`` (default), or ``None`` to take
            the step ``lr`` as it is.
        **options: ``maximize``, ``engine``, ``nonfinite``, see
            ``VectorOptimizer``.

    Raises:
        ValueError: An argument out of range, or see ``VectorOptimizer``.
        TypeError: An argument that is not a number.

    Source: Nocedal & Wright (2006), section 3.4; Dauphin et al. (2014),
    arXiv 1406.2572. Chapter 06, eq-newton-full-step and eq-saddle-free.
    """

    differentiates = twice = True
    ranges = {"damping": "[0, inf)"}

    def __init__(
        self, params: Any, lr: float | Tensor = 1.0, damping: float = 0.0,
        line_search_fn: str | None = "strong_wolfe", **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "damping": damping, "line_search_fn": line_search_fn}
        super().__init__(params, defaults, **options)

    # %% 06_newton sec-newton-step 3 35274063
    def search(
        self, objective: Objective, f: float, g: Tensor, group: dict, state: dict
    ) -> Tensor:
        H = objective.hessian()
        if not H.isfinite().all():
            return self._not_finite(objective.x, g, group)
        lam, V = torch.linalg.eigh(H)
        size = lam.abs()
        tiny = len(lam) * torch.finfo(lam.dtype).eps * size.max()
        size = torch.where(tiny > 0, size.maximum(tiny), 1.0)  # 1: linear
        d = -V @ (V.T @ g / (size + group["damping"]))
        state["n_iter"] += 1
        t = float(group["lr"])
        if group["line_search_fn"] is not None:
            t = _along(objective, objective.x, d, f, g, t).t
        return objective.x + t * d


# %% 06_newton sec-wolfe 1 c6455747
class Trial(NamedTuple):
    """A point on a line: step length, loss, slope, and gradient if known.

    Source: chapter 06, eq-wolfe.
    """

    t: float
    f: float
    slope: float
    g: Any = None


def strong_wolfe(
    phi: Callable[[float], Trial],
    start: Trial,
    t: float = 1.0,
    *,
    c1: float = 1e-4,
    c2: float = 0.9,
    limit: int = 25,
    rounding: float = 0.0,
) -> Trial:
    """Find a step that lowers the loss enough and flattens the slope.

    Both hold for what is returned, unless ``limit`` ran out::

        phi(t) ≤ phi(0) + c1 t phi'(0)        |phi'(t)| ≤ c2 |phi'(0)|

    Args:
        phi: The loss along the line; a loss that is not a number counts as
            too large.
        start: The trial at ``t = 0``, with a negative slope.
        t: First step tried, in (0, ∞). Default 1.
        c1: Fraction of the promised decrease to insist on, in (0, 1).
            Default 1e-4.
        c2: Fraction of the slope that may remain, in (c1, 1). Default 0.9.
        limit: Number of trials, at least 1. Default 25.
        rounding: Differences in loss that count as none. Default 0.

    Returns:
        The accepted trial; else the lowest one found, perhaps ``start``.

    Raises:
        ValueError: An argument out of range, or a start that does not lead
            downhill.

    Source: Nocedal & Wright (2006), algorithms 3.5 and 3.6. Chapter 06,
        eq-wolfe.
    """
    check_range("t", t, "(0, inf)")
    check_range("c1", c1, "(0, 1)")
    check_range("c2", c2, f"({c1}, 1)")
    if not start.slope < 0:
        raise ValueError(
            f"the slope at the start is {start.slope:g}; "
            "pass a direction that leads downhill"
        )

    def enough(a: Trial) -> bool:
        line = start.f + c1 * a.t * start.slope
        return a.f <= line + rounding and math.isfinite(a.slope)

    low, new, high, stuck = start, phi(t), None, False
    for _ in range(limit - 1):
        if not enough(new) or (low.t > 0 and new.f > low.f + rounding):
            high = new
        elif abs(new.slope) <= c2 * -start.slope:
            return new
        else:
            ahead = math.inf if high is None else high.t
            if new.slope * (ahead - low.t) >= 0:
                high = low
            low, before = new, low
        if high is None:  # still downhill: go on, at most ten times as far
            t = _cubic(before, low)
            near, far = 2.01 * low.t - 1.01 * before.t, 10 * low.t
            t = min(max(t, near), far) if math.isfinite(t) else far
        else:
            t, stuck = _inside(low, high, stuck)
            if t in (low.t, high.t):
                break
        new = phi(t)
    best = new if enough(new) and new.f <= low.f else low
    return best if best.f < start.f else start


# %% 06_newton sec-wolfe 2 05a21679
def _cubic(a: Trial, b: Trial) -> float:
    """Where the cubic with the losses and slopes of two trials is lowest."""
    chord = (b.f - a.f) / (b.t - a.t)
    theta = a.slope + b.slope - 3 * chord
    square = theta * theta - a.slope * b.slope
    if not 0 <= square < math.inf:
        return math.nan
    gamma = math.copysign(math.sqrt(square), b.t - a.t)
    bottom = b.slope - a.slope + 2 * gamma
    if bottom == 0:
        return math.nan
    return b.t - (b.t - a.t) * (b.slope + gamma - theta) / bottom


def _inside(low: Trial, high: Trial, stuck: bool) -> tuple[float, bool]:
    """A point between two, and whether it lies close to one of them."""
    left, right = sorted((low.t, high.t))
    t, margin = _cubic(low, high), 0.1 * (right - left)
    if not math.isfinite(t):
        return (left + right) / 2, False
    if min(t - left, right - t) >= margin:
        return t, False
    if not stuck and left < t < right:
        return t, True
    return (left + margin if t < (left + right) / 2 else right - margin), False


def _along(
    objective: Objective, x: Tensor, d: Tensor, f: float, g: Tensor, t: float
) -> Trial:
    """``strong_wolfe`` from x along d."""

    def phi(t: float) -> Trial:
        f, g = objective(x + t * d)
        return Trial(t, f, float(g @ d), g)

    start = Trial(0.0, f, float(g @ d), g)
    if not start.slope < 0:
        return start
    return strong_wolfe(phi, start, t, rounding=_rounding(f, g))


def _rounding(f: float, g: Tensor) -> float:
    """Differences in the loss that may be round-off."""
    return 4 * torch.finfo(g.dtype).eps * abs(f)


# %% 06_newton sec-cg 1 9ac78f5f
def truncated_cg(
    product: Callable[[Tensor], Tensor],
    g: Tensor,
    radius: float = math.inf,
    tol: float = 0.0,
    limit: int | None = None,
) -> tuple[Tensor, Tensor, bool]:
    """Minimise ``⟨g, z⟩ + ½ ⟨z, H z⟩`` over ``‖z‖ ≤ radius``, nearly.

    Conjugate gradients from 0, cut off where they leave the ball or find a
    direction along which H curves downwards; then they go to the boundary.

    Args:
        product: The map ``v → H v``, H symmetric.
        g: Gradient, shape ``(d,)``.
        radius: In (0, ∞]. Default ∞.
        tol: Stop once ``‖H z + g‖ ≤ tol``. Default 0.
        limit: Most products with H. Default ``d``, enough in exact arithmetic.

    Returns:
        z, shape ``(d,)``; the residual ``H z + g``, so that the minimum is
        ``½ ⟨z, g + residual⟩``; and whether z lies on the boundary. With an
        infinite radius downward curvature ends the search where it is, or at −g
        in the first step. Where g is not finite z is NaN.

    Source: Hestenes & Stiefel (1952), doi 10.6028/jres.049.044; Steihaug (1983),
        doi 10.1137/0720042. Chapter 06, eq-cg.
    """
    z, r, p = 0 * g, g, -g
    for _ in range(len(g) if limit is None else limit):
        if not r.norm() > tol:
            break
        Hp, rr = product(p), r @ r
        curvature = p @ Hp
        if curvature <= 0 and math.isinf(radius):
            return (z, r, False) if z.any() else (p, r + Hp, False)
        step = rr / curvature
        if curvature <= 0 or (z + step * p).norm() >= radius:
            step = _to_boundary(z, p, radius)
            return z + step * p, r + step * Hp, True
        z, r = z + step * p, r + step * Hp
        p = r @ r / rr * p - r
    return z, r, False


# %% 06_newton sec-cg 2 b7112fb9
def _to_boundary(z: Tensor, p: Tensor, radius: float) -> Tensor:
    """How far from z the ray along p leaves the ball."""
    pp, zp, gap = p @ p, z @ p, radius**2 - z @ z
    root = (zp * zp + pp * gap).sqrt()
    return gap / (zp + root) if zp > 0 else (root - zp) / pp


# %% 06_newton sec-trust-region 1 bfa1cbf3
class NewtonCG(VectorOptimizer):
    """Newton's method without a Hessian: conjugate gradients in a ball.

    With m(z) = ⟨g, z⟩ + ½ ⟨z, H z⟩ the model of the loss around x::

        z ← argmin m(z) over ‖z‖ ≤ r, by truncated conjugate gradients
        ρ ← (f(x) − f(x + z)) / −m(z)          what came of the promise
        x ← x + z where ρ > 0.15, else stay;   r ← r/4, r or 2r by ρ

    A step is one trial: it evaluates the closure twice, and multiplies by H up
    to ``max_cg`` times, at about two gradients each. A refused trial leaves the
    parameters as they were. The closure returns the loss and does not call
    ``backward``.

    Args:
        params: Parameters or one group of them; frozen ones are left out.
        lr: First trial step length: the radius is lr times a factor that
            starts at 1 and is remembered. In [0, ∞). Default 1.
        max_cg: Most products in conjugate gradients, at least 1. ``None``
            (default) means the number of parameters.
        max_factor: Largest factor of lr, in [1, ∞). Default 1000.
        **options: ``maximize``, ``engine``, ``nonfinite``, see
            ``VectorOptimizer``.

    Raises:
        ValueError: An argument out of range, or see ``VectorOptimizer``.
        TypeError: An argument that is not a number.

    Source: Steihaug (1983), doi 10.1137/0720042; Nocedal & Wright (2006),
    algorithms 4.1 and 7.2; Martens (2010). Chapter 06, eq-cg
    and eq-trust-region.
    """

    differentiates = twice = True
    ranges = {"max_cg": "[1, inf) int | None", "max_factor": "[1, inf)"}

    def __init__(
        self, params: Any, lr: float | Tensor = 1.0, max_cg: int | None = None,
        max_factor: float = 1000.0, **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "max_cg": max_cg, "max_factor": max_factor}
        super().__init__(params, defaults, **options)

    # %% 06_newton sec-trust-region 2 f6652e3e
    def search(
        self, objective: Objective, f: float, g: Tensor, group: dict, state: dict
    ) -> Tensor:
        x, size = objective.x, float(g.norm())
        factor = state.get("factor", 1.0)
        z, r, far = truncated_cg(
            objective.product,
            g,
            radius=float(group["lr"]) * factor,
            tol=min(0.5, math.sqrt(size)) * size,
            limit=group["max_cg"],
        )
        promised = -float(z @ (g + r)) / 2
        noise, gain = _rounding(f, g), f - objective(x + z)[0]
        rho = -1.0  # a promise of nothing is not to be trusted
        if promised > 0:
            rho = (gain + noise) / (promised + noise)
        if not rho >= 0.25:
            factor = factor / 4
        elif rho > 0.75 and far:
            factor = min(2 * factor, group["max_factor"])
        state.update(factor=factor, n_iter=state["n_iter"] + 1)
        return x + z if rho > 0.15 else x


# %% 06_newton sec-secant 1 26cdd5d9
def bfgs_update(inverse: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The inverse Hessian after a step s that changed the gradient by y.

    With ``ρ = 1 / ⟨s, y⟩``::

        B⁻¹ ← (I − ρ s yᵀ) B⁻¹ (I − ρ y sᵀ) + ρ s sᵀ

    Args:
        inverse: B⁻¹, symmetric positive definite, ``(d, d)``.
        s: Step, shape ``(d,)``.
        y: Change of the gradient, shape ``(d,)``, with ``⟨s, y⟩ > 0``.

    Returns:
        The new matrix, symmetric positive definite; it maps y to s.

    Source: Broyden; Fletcher; Goldfarb; Shanno (all 1970); Nocedal & Wright
        (2006), eq. 6.17. Chapter 06, eq-bfgs.
    """
    rho, By = 1 / (s @ y), inverse @ y
    across = torch.outer(s, By)
    length = rho * (1 + rho * (y @ By))
    return inverse - rho * (across + across.T) + length * torch.outer(s, s)


# %% 06_newton sec-secant 2 80cd5351
class QuasiNewton(VectorOptimizer):
    """The base of methods that learn curvature from gradients alone.

    A subclass says how it turns a gradient into ``−B⁻¹ g`` (``direction``)
    and how it learns from a step ``s`` that changed the gradient by ``y``
    (``remember``); ``memory`` names the state that ``forget`` throws away.

    Source: chapter 06, eq-secant.
    """

    memory: tuple[str, ...] = ()
    ranges = {
        "max_iter": "[1, inf) int",
        "max_eval": "[1, inf) int | None",
        "history_size": "[1, inf) int",
        "tolerance_grad": "[0, inf)",
        "tolerance_change": "[0, inf)",
        "initial_scale": "(0, inf) | None",
    }

    def direction(self, g: Tensor, state: dict) -> Tensor:
        """``−B⁻¹ g``, with the memory that there is."""
        return -g

    def remember(self, s: Tensor, y: Tensor, group: dict, state: dict) -> None:
        """Learn from a step with ``⟨s, y⟩ > 0``."""

    def first_trial(self, g: Tensor, state: dict) -> float:
        """The first t to try, for ``lr = 1``."""
        begun = self.memory[0] in state
        return 1.0 if begun else min(1.0, 1 / float(g.abs().sum()))

    def shorten(self, t: float, f: float, slope: float, state: dict) -> float:
        """``t``, or a shorter first trial for a line search."""
        return t

    def search(
        self, objective: Objective, f: float, g: Tensor, group: dict, state: dict
    ) -> Tensor:
        x, lr = objective.x, float(group["lr"])
        if "prev_flat_grad" in state:  # of a step without a line search
            y = g - state.pop("prev_flat_grad")
            self._learn(state.pop("t") * state.pop("d"), y, group, state)
        for left in reversed(range(group["max_iter"])):
            if g.abs().max() <= group["tolerance_grad"]:
                break
            begun = self.memory[0] in state
            d = self.direction(g, state)
            t = lr * self.first_trial(g, state)
            if group["line_search_fn"] is not None:
                t = self.shorten(t, f, float(g @ d), state)
                new = _along(objective, x, d, f, g, t)
            elif left:
                after = objective(x + t * d)
                if not math.isfinite(after[0] + float(after[1].sum())):
                    break
                new = Trial(t, after[0], 0.0, after[1])
            else:  # the next step will see where this one leads
                state.update(d=d, t=t, prev_flat_grad=g)
                new = Trial(t, math.nan, 0.0, g)
            if new.t == 0:  # nothing along d is lower: begin again, with −g
                if not begun:
                    break
                self.forget(state)
                continue
            s, change = new.t * d, abs(new.f - f)
            state.update(prev_loss=f, n_iter=state["n_iter"] + 1)
            self._learn(s, new.g - g, group, state)
            x, f, g = x + s, new.f, new.g
            spent = objective.calls >= (group["max_eval"] or math.inf)
            still = min(change, float(s.abs().max()))
            if spent or still < group["tolerance_change"]:
                break
        return x

    def _learn(self, s: Tensor, y: Tensor, group: dict, state: dict) -> None:
        """Remember a pair, if its curvature is more than round-off."""
        if s @ y > torch.finfo(s.dtype).eps * (y @ y):
            self.remember(s, y, group, state)

    def forget(self, state: dict) -> None:
        for name in (*self.memory, "prev_flat_grad", "d", "t"):
            state.pop(name, None)


# %% 06_newton sec-secant 3 b15088f0
class BFGS(QuasiNewton):
    """BFGS: the inverse Hessian, learnt from gradients.

    After a step s that changed the gradient by y, with ρ = 1 / ⟨s, y⟩::

        B⁻¹ ← (I − ρ s yᵀ) B⁻¹ (I − ρ y sᵀ) + ρ s sᵀ
        x ← x − t B⁻¹ g        t from a strong Wolfe line search

    Memory and work d² an iteration, with d the number of parameters. Every
    pair (s, y) is measured within one call of ``step``, on the same closure.

    Args:
        params: Parameters or one group of them; frozen ones are left out.
        lr: First trial step length t, in [0, ∞). With the line search it
            is shortened where that would ask for a larger decrease than
            twice the last one; the very first is ``lr · min(1, 1/‖g‖₁)``.
            Default 1.
        max_iter: Iterations a step, at least 1. Default 20.
        max_eval: A step ends once it has called the closure so often; at
            least 1. Default ``None``, no limit.
        tolerance_grad: A step ends where no entry of the gradient is
            larger, in [0, ∞). Default 1e-7.
        tolerance_change: A step ends where loss or parameters change by
            less, in [0, ∞). Default 1e-9.
        initial_scale: B⁻¹ begins as this times I, in (0, ∞). ``None`` takes
            ⟨s, y⟩ / ⟨y, y⟩ of the first pair, whatever the units of the
            loss. Default 1.
        line_search_fn: ``"strong_wolfe"`` (default), or ``None`` to take
            the first trial step as it is.
        **options: ``maximize``, ``engine``, ``nonfinite``, see
            ``VectorOptimizer``.

    Raises:
        ValueError: An argument out of range, or see ``VectorOptimizer``.
        TypeError: An argument of the wrong type.

    Source: Broyden, Fletcher, Goldfarb, Shanno (1970); Nocedal & Wright
    (2006), algorithm 6.1. Chapter 06, eq-bfgs.
    """

    memory = ("inverse_hessian",)

    def __init__(
        self, params: Any, lr: float | Tensor = 1.0, max_iter: int = 20,
        max_eval: int | None = None, tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9, initial_scale: float | None = 1.0,
        line_search_fn: str | None = "strong_wolfe", **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "max_iter": max_iter, "max_eval": max_eval,
            "tolerance_grad": tolerance_grad, "tolerance_change": tolerance_change,
            "initial_scale": initial_scale, "line_search_fn": line_search_fn,
        }
        super().__init__(params, defaults, **options)

    # %% 06_newton sec-secant 4 dc6c8ee7
    def direction(self, g: Tensor, state: dict) -> Tensor:
        inverse = state.get("inverse_hessian")
        return -g if inverse is None else -inverse @ g

    def remember(self, s: Tensor, y: Tensor, group: dict, state: dict) -> None:
        inverse = state.get("inverse_hessian")
        if inverse is None:
            scale = group["initial_scale"] or (s @ y) / (y @ y)
            inverse = scale * torch.ones_like(s).diag()
        state["inverse_hessian"] = bfgs_update(inverse, s, y)

    # %% 06_newton sec-secant 5 ee730802
    def shorten(self, t: float, f: float, slope: float, state: dict) -> float:
        drop = state.get("prev_loss", f) - f
        short = -2.02 * drop / slope if slope < 0 else t
        return short if 0 < short < t else t


# %% 06_newton sec-lbfgs 1 cea96575
def two_loop(
    g: Tensor, steps: list[Tensor], changes: list[Tensor], scale: float | Tensor = 1.0
) -> Tensor:
    """``B⁻¹ g`` for what BFGS makes of ``scale · I`` and pairs (s, y).

    Args:
        g: A vector, shape ``(d,)``.
        steps: s₁ … s_m, oldest first, each of shape ``(d,)``.
        changes: y₁ … y_m, with ``⟨s, y⟩ > 0``.
        scale: θ, the matrix to begin with is θ I. Default 1.

    Returns:
        Shape ``(d,)``; 5 m d multiplications, and no matrix.

    Source: Nocedal (1980), doi 10.1090/S0025-5718-1980-0572855-7. Chapter
        06, eq-two-loop.
    """
    pairs = [(s, y, 1 / (s @ y)) for s, y in zip(steps, changes, strict=True)]
    q, weights = g, []
    for s, y, rho in reversed(pairs):
        weights.append(rho * (s @ q))
        q = q - weights[-1] * y
    q = scale * q
    for (s, y, rho), a in zip(pairs, reversed(weights), strict=True):
        q = q + (a - rho * (y @ q)) * s
    return q


# %% 06_newton sec-lbfgs 2 a0a2dcf3
class LBFGS(QuasiNewton):
    """L-BFGS: BFGS from its last ``history_size`` pairs, without a matrix.

    With θ = ⟨s, y⟩ / ⟨y, y⟩ of the newest pair (s, y)::

        B⁻¹ ← BFGS's update of θ I by the pairs, oldest first
        x ← x − t B⁻¹ g        t from a strong Wolfe line search

    Memory 2 d · history_size. The closure is that of ``torch.optim.LBFGS``,
    whose arguments and checkpoints this takes, and whose defaults it has
    but for two: the line search is on, and ``max_eval`` is off. Every pair (s, y) is
    measured within one call of ``step``, on the same closure. (Without a
    line search the last pair of a step is completed by the next, as in
    torch.)

    Args:
        params: Parameters or one group of them; frozen ones are left out.
        lr: First trial step length t, in [0, ∞); the very first is
            ``lr · min(1, 1/‖g‖₁)``, as in torch. Default 1.
        max_iter: Iterations a step, at least 1. Default 20.
        max_eval: A step ends once it has called the closure so often; at
            least 1. Default ``None``, no limit.
        tolerance_grad: A step ends where no entry of the gradient is
            larger, in [0, ∞). Default 1e-7.
        tolerance_change: A step ends where loss or parameters change by
            less, in [0, ∞). Default 1e-9.
        history_size: Pairs that are kept, at least 1. Default 100.
        line_search_fn: ``"strong_wolfe"`` (default), or ``None`` to take
            the first trial step as it is.
        **options: ``maximize``, ``engine``, ``nonfinite``, see
            ``VectorOptimizer``.

    Raises:
        ValueError: An argument out of range, or see ``VectorOptimizer``.
        TypeError: An argument of the wrong type.

    Source: Liu & Nocedal (1989), doi 10.1007/BF01589116. Chapter 06,
    eq-two-loop.
    """

    memory = ("old_stps", "old_dirs", "H_diag")

    def __init__(
        self, params: Any, lr: float | Tensor = 1.0, max_iter: int = 20,
        max_eval: int | None = None, tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9, history_size: int = 100,
        line_search_fn: str | None = "strong_wolfe", **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr, "max_iter": max_iter, "max_eval": max_eval,
            "tolerance_grad": tolerance_grad, "tolerance_change": tolerance_change,
            "history_size": history_size, "line_search_fn": line_search_fn,
        }
        super().__init__(params, defaults, **options)

    # %% 06_newton sec-lbfgs 3 2bdc4f24
    def direction(self, g: Tensor, state: dict) -> Tensor:
        if not state.get("old_stps"):
            return -g
        pairs = state["old_stps"], state["old_dirs"]
        return -two_loop(g, *pairs, state["H_diag"])

    def remember(self, s: Tensor, y: Tensor, group: dict, state: dict) -> None:
        keep = slice(-group["history_size"], None)
        state["old_stps"] = [*state.get("old_stps", []), s][keep]
        state["old_dirs"] = [*state.get("old_dirs", []), y][keep]
        state["H_diag"] = (s @ y) / (y @ y)
