# Generated from chapters/01_steepest_descent.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head da97cb58
"""Chapter 01, Steepest descent."""

__all__ = [
    "GradientDescent",
    "LogisticRegression",
    "Problem",
    "Quadratic",
    "Rosenbrock",
    "backtracking",
    "digits",
    "random_rotation",
    "rotation",
    "steepest_step",
    "trajectory",
]


# %% 01_steepest_descent sec-one-rule 1 c07eb953
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Unpack

import torch
from torch import Tensor

from guided_descent.core import Optimizer, Options, check_range


# %% 01_steepest_descent sec-one-rule 2 31b54bc8
class GradientDescent(Optimizer):
    """Gradient descent, ``x ← x − lr · g``.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η, in units of parameter per unit of gradient; in
            [0, ∞). Default 0.01.
        **options: See ``Options``.

    Raises:
        ValueError: ``lr`` is negative or not finite.
        TypeError: ``lr`` is not a number.

    Source: Cauchy (1847), C. R. Acad. Sci. 25, 536–538. Chapter 01, eq-gd.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr}, **options)

    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        p.sub_(h.lr * g)


# %% 01_steepest_descent sec-one-rule 3 15ed65bc
class Problem(ABC):
    """A function to minimise whose answer is known.

    Attributes:
        start: Where a run begins unless told otherwise.
        minimizer: A point of smallest loss, same shape as ``start``.
        minimum: The loss there.

    Source: chapter 01, "One rule, three fates".
    """

    start: Tensor
    minimizer: Tensor
    minimum: float

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """The value at ``x``: a scalar tensor, differentiable."""

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient at ``x``, same shape as ``x``."""
        return torch.func.grad(self.loss)(x)

    def hessian(self, x: Tensor) -> Tensor:
        """Second derivatives at ``x``: (numel, numel), row-major."""
        H = torch.func.hessian(self.loss)(x)
        return H.reshape(x.numel(), x.numel())


def trajectory(
    problem: Problem,
    optimizer: Callable[..., torch.optim.Optimizer],
    steps: int,
    *,
    start: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """Run an optimizer on a problem and return every point it visits.

    Args:
        problem: What to minimise.
        optimizer: An optimizer class, or a function that builds one.
        steps: Number of steps, at least 0.
        start: First point; ``problem.start`` by default.
        **hyperparameters: For the optimizer, such as ``lr=0.1``.

    Returns:
        Shape ``(steps + 1, *start.shape)``; row 0 is the start.

    Raises:
        ValueError: ``steps`` is negative.

    Source: chapter 01, "One rule, three fates".
    """
    if steps < 0:
        raise ValueError(f"steps={steps} is negative; pass 0 or more")
    start = problem.start if start is None else start
    x = torch.nn.Parameter(start.detach().clone())
    method = optimizer([x], **hyperparameters)
    path = [x.detach().clone()]

    def closure() -> Tensor:
        method.zero_grad()
        loss = problem.loss(x)
        loss.backward()
        return loss

    for _ in range(steps):
        method.step(closure)
        path.append(x.detach().clone())
    return torch.stack(path)


# %% 01_steepest_descent sec-one-rule 4 7d1fd96a
class Quadratic(Problem):
    """``½ (x − x⋆)ᵀ H (x − x⋆)`` with chosen eigenvalues and eigenvectors.

    Args:
        spectrum: Eigenvalues of H, positive, largest first; shape ``(d,)``.
            A floating-point tensor sets dtype and device; a list of numbers
            means float64 on the CPU.
        basis: Orthogonal matrix ``(d, d)`` whose columns are the
            eigenvectors; the axes by default.
        minimizer: ``x⋆``, shape ``(d,)``; the origin by default.

    Attributes:
        H: The Hessian, ``(d, d)``.
        spectrum, basis: As given.
        L, mu, kappa: Largest eigenvalue, smallest, and their ratio.
        start: Error 1 along every eigenvector.

    Raises:
        ValueError: Eigenvalues not positive, finite and descending; a
            basis that is not orthogonal; shapes that do not match.
        TypeError: A spectrum that is a tensor, but not of floating point.

    Source: Nocedal & Wright (2006), section 3.3. Chapter 01, "One rule,
        three fates".
    """

    def __init__(
        self,
        spectrum: Sequence[float] | Tensor,
        basis: Tensor | None = None,
        minimizer: Tensor | None = None,
    ) -> None:
        self.spectrum = lam = _check_spectrum(spectrum)
        self.basis = _check_basis(basis, lam)
        self.H = self.basis * lam @ self.basis.T
        self.minimizer = _check_minimizer(minimizer, lam)
        self.minimum = 0.0
        self.start = self.minimizer + self.basis.sum(dim=1)
        self.L, self.mu = float(lam[0]), float(lam[-1])
        self.kappa = self.L / self.mu

    # %% 01_steepest_descent sec-one-rule 5 107ea606
    def loss(self, x: Tensor) -> Tensor:
        """The value at ``x``; a batch ``(…, d)`` gives a batch ``(…)``."""
        e = x - self.minimizer
        return ((e @ self.H) * e).sum(-1) / 2

    def gradient(self, x: Tensor) -> Tensor:
        """``H (x − x⋆)``, also for a batch ``(…, d)``."""
        return (x - self.minimizer) @ self.H

    def hessian(self, x: Tensor | None = None) -> Tensor:
        """``H``, the same everywhere."""
        return self.H


# %% 01_steepest_descent sec-one-rule 6 7d9b2f84
def rotation(angle: float) -> Tensor:
    """The 2×2 rotation by ``angle`` radians, counterclockwise; float64."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def random_rotation(
    d: int, generator: torch.Generator | None = None
) -> Tensor:
    """A rotation, possibly with a reflection: Haar on O(d), in float64.

    Args:
        d: Dimension, at least 1.
        generator: Source of randomness, on the CPU; torch's global one by
            default.

    Returns:
        An orthogonal matrix, shape ``(d, d)``.

    Raises:
        ValueError: ``d`` is less than 1.

    Source: Mezzadri (2007), arXiv math-ph/0609050. Chapter 01, "One rule,
        three fates".
    """
    if d < 1:
        raise ValueError(f"d={d} is not a dimension; pass 1 or more")
    q, r = torch.linalg.qr(
        torch.randn(d, d, dtype=torch.float64, generator=generator)
    )
    return q * r.diagonal().sign()


# %% 01_steepest_descent sec-one-rule 7 cbea413f
def _check_shape(name: str, value: Tensor, like: Tensor) -> Tensor:
    if value.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; "
            f"pass shape {tuple(like.shape)}"
        )
    return value.to(like)


def _check_spectrum(spectrum: Sequence[float] | Tensor) -> Tensor:
    if not isinstance(spectrum, Tensor):
        spectrum = torch.tensor(spectrum, dtype=torch.float64)
    if not spectrum.is_floating_point():
        raise TypeError(
            f"spectrum has dtype {spectrum.dtype}; "
            "pass a floating-point tensor, such as spectrum.double()"
        )
    if spectrum.ndim != 1 or len(spectrum) == 0:
        raise ValueError(
            f"spectrum has shape {tuple(spectrum.shape)}; "
            "pass a list of at least one eigenvalue"
        )
    valid = torch.isfinite(spectrum) & (spectrum > 0)
    if not (valid.all() and (spectrum[:-1] >= spectrum[1:]).all()):
        raise ValueError(
            f"spectrum={spectrum.tolist()}; "
            "pass positive, finite eigenvalues, largest first"
        )
    return spectrum


def _check_minimizer(minimizer: Tensor | None, lam: Tensor) -> Tensor:
    if minimizer is None:
        return torch.zeros_like(lam)
    return _check_shape("minimizer", minimizer, lam)


def _check_basis(basis: Tensor | None, lam: Tensor) -> Tensor:
    eye = torch.diag(torch.ones_like(lam))
    if basis is None:
        return eye
    basis = _check_shape("basis", basis, eye)
    error = float((basis.T @ basis - eye).abs().max())
    if not error < 100 * len(lam) * torch.finfo(lam.dtype).eps:
        raise ValueError(
            f"basis is not orthogonal: BᵀB is {error:.1g} off "
            "the identity; pass one from torch.linalg.qr"
        )
    return basis


# %% 01_steepest_descent sec-which-norm 1 6f33e6d8
def steepest_step(
    g: Tensor, lr: float, norm: str | Tensor = "euclidean"
) -> Tensor:
    """The step that minimises ``⟨g, Δ⟩ + ‖Δ‖² / (2 lr)``.

    Args:
        g: Gradient, shape ``(d,)``.
        lr: Step size η, in (0, ∞).
        norm: ``"euclidean"`` (default), ``"max"``, ``"sum"``, or a
            symmetric positive definite matrix P of shape ``(d, d)`` for
            ``‖Δ‖ = √(ΔᵀPΔ)``.

    Returns:
        Δ, shape ``(d,)``. Under ``"sum"`` ties go to the first coordinate.

    Raises:
        ValueError: An unknown norm, a matrix of the wrong shape, or one
            that is not symmetric positive definite.

    Source: Bernstein & Newhouse (2024), arXiv 2409.20325. Chapter 01,
        eq-steepest.
    """
    check_range("lr", lr, "(0, inf)")
    if isinstance(norm, Tensor):
        factor = _check_metric(norm, g)
        return -lr * torch.cholesky_solve(g[:, None], factor)[:, 0]
    if norm == "euclidean":
        return -lr * g
    if norm == "max":
        return -lr * g.abs().sum() * g.sign()
    if norm == "sum":
        largest = torch.nn.functional.one_hot(g.abs().argmax(), len(g))
        return -lr * g * largest
    raise ValueError(
        f"norm={norm!r} is unknown; use 'euclidean', 'max', 'sum' or P"
    )


# %% 01_steepest_descent sec-which-norm 2 16d3ceb4
def _check_metric(P: Tensor, g: Tensor) -> Tensor:
    """The Cholesky factor of P, if P can measure vectors like g."""
    shape = (g.numel(), g.numel())
    if P.shape != shape:
        raise ValueError(
            f"norm has shape {tuple(P.shape)}; pass {shape} to match g"
        )
    factor, failed = torch.linalg.cholesky_ex(P)
    if failed or not torch.allclose(P, P.T):
        raise ValueError(
            "norm is not symmetric positive definite; "
            "pass P = Pᵀ with positive eigenvalues"
        )
    return factor


# %% 01_steepest_descent sec-line-search 1 1ea2f123
@torch.no_grad()
def backtracking(
    loss: Callable[[Tensor], Tensor], x: Tensor, d: Tensor, g: Tensor, *,
    lr: float = 1.0, c: float = 1e-4, shrink: float = 0.5, limit: int = 100,
) -> float:
    """Line search: the first step that lowers the loss enough.

    Returns the first η of ``lr, shrink·lr, shrink²·lr, …`` that satisfies
    ``loss(x + η d) ≤ loss(x) + c η ⟨g, d⟩``.

    Differences below the round-off of ``loss(x)`` count as equal, so the
    search also ends near a minimum, where the decrease is below round-off.
    A trial whose loss is not a number is refused like one too large.

    Args:
        loss: The function, called without gradients.
        x: Current point, any shape.
        d: Descent direction, same shape.
        g: Gradient at ``x``, same shape.
        lr: First step tried, in (0, ∞). Default 1.
        c: Fraction of the promised decrease to insist on, in (0, 1).
            Default 1e-4.
        shrink: Factor β between trials, in (0, 1). Default 0.5.
        limit: Number of trials, at least 1. Default 100.

    Returns:
        The step size.

    Raises:
        ValueError: An argument out of range, ``d`` does not point downhill,
            or ``loss(x)`` is not finite.
        RuntimeError: No trial was accepted: ``g`` is not the gradient of
            ``loss``, or ``limit`` is too low for so large an ``lr``.

    Source: Armijo (1966), doi 10.2140/pjm.1966.16.1; Nocedal & Wright
        (2006), algorithm 3.1. Chapter 01, eq-armijo.
    """
    slope, f = float((g * d).sum()), float(loss(x))
    _check_search(lr, c, shrink, limit, slope, f)
    rounding = 4 * torch.finfo(x.dtype).eps * abs(f)
    for k in range(limit):
        eta = lr * shrink**k
        if float(loss(x + eta * d)) <= f + c * eta * slope + rounding:
            return eta
    raise RuntimeError(
        f"no step down to {eta:.3g} lowers the loss; "
        "make sure that g is its gradient, or raise limit"
    )


# %% 01_steepest_descent sec-line-search 2 7830a079
def _check_search(
    lr: float, c: float, shrink: float, limit: int, slope: float, f: float
) -> None:
    for name, value in {"c": c, "shrink": shrink}.items():
        check_range(name, value, "(0, 1)")
    check_range("lr", lr, "(0, inf)")
    if limit < 1:
        raise ValueError(f"limit={limit} allows no trial; pass 1 or more")
    if not slope < 0:
        raise ValueError(
            f"d has slope ⟨g, d⟩ = {slope:g}; "
            "pass a descent direction, such as -g (where g is not 0)"
        )
    if not math.isfinite(f):
        raise ValueError(f"loss(x) = {f}; start where the loss is finite")


# %% 01_steepest_descent sec-beyond-quadratics 1 aba3fc30
class Rosenbrock(Problem):
    """Rosenbrock's curved valley.

    The loss is ``Σ_i steepness·(x_{i+1} − x_i²)² + (1 − x_i)²``; with more
    than two variables it is a later extension of his.
    The global minimum is 0, at (1, …, 1). At the default steepness, in four
    to seven dimensions, there is also a local one: at (−0.776, 0.613,
    0.382, 0.146) in four, and ever closer to (−1, 1, …, 1) above.

    Args:
        dim: Dimension, at least 2. Default 2.
        steepness: Curvature across the valley, in (0, ∞). Default 100.

    Attributes:
        start: (−1.2, 1, −1.2, 1, …), the customary one, in float64.

    Raises:
        ValueError: An argument out of range.

    Source: Rosenbrock (1960), doi 10.1093/comjnl/3.3.175. Chapter 01, "When
        the function is not a quadratic".
    """

    def __init__(self, dim: int = 2, steepness: float = 100.0) -> None:
        if dim < 2:
            raise ValueError(f"dim={dim} is no valley; pass 2 or more")
        check_range("steepness", steepness, "(0, inf)")
        self.steepness = steepness
        self.minimizer = torch.ones(dim, dtype=torch.float64)
        self.minimum = 0.0
        pair = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        self.start = pair.repeat((dim + 1) // 2)[:dim]

    def loss(self, x: Tensor) -> Tensor:
        """The value at ``x``; a batch ``(…, dim)`` gives ``(…)``."""
        here, after = x[..., :-1], x[..., 1:]
        across, along = after - here**2, 1 - here
        return (self.steepness * across**2 + along**2).sum(-1)


# %% 01_steepest_descent sec-digits 1 45d5bbee
class LogisticRegression(Problem):
    """Softmax regression, with its optimum to the precision of the dtype.

    The loss is the mean cross-entropy plus ``l2/2 · ‖W‖²``.

    Args:
        X: Inputs, ``(n, d)``, floating point; they set dtype and device.
        y: Classes 0 … K−1, integers of shape ``(n,)``.
        l2: Regularisation γ, in (0, ∞); it covers the bias too.
            Default 1e-3.
        bias: Append a constant 1 to every input. Default True.

    Attributes:
        inputs: ``(n, d + 1)`` with bias, else ``(n, d)``. The parameter W
            has one row per class, one column per input.
        start: W = 0.
        minimizer, minimum: The optimum, computed on first use to the
            precision of the dtype.
        L, mu: Bounds on the Hessian's eigenvalues that hold everywhere;
            ``mu`` is attained.

    Raises:
        ValueError: Shapes that do not match, fewer than two classes, values
            that are not finite, ``l2`` ≤ 0.
        TypeError: ``X`` is not of floating point, or ``y`` not of integer
            type.

    Source: Böhning (1992), doi 10.1007/BF00048682. Chapter 01,
        eq-softmax-gradient to eq-softmax-smoothness.
    """

    def __init__(
        self, X: Tensor, y: Tensor, *, l2: float = 1e-3, bias: bool = True
    ) -> None:
        check_range("l2", l2, "(0, inf)")
        classes = _check_classes(X, y)
        ones = X.new_ones(len(X), int(bias))
        self.inputs = torch.cat([X, ones], dim=1)
        self.targets = torch.nn.functional.one_hot(y, classes).to(X.dtype)
        self.l2 = l2
        self.start = X.new_zeros(classes, self.inputs.shape[1])
        second_moment = self.inputs.T @ self.inputs / len(X)
        self.L = float(torch.linalg.eigvalsh(second_moment)[-1]) / 2 + l2
        self.mu = l2

    @cached_property
    def minimizer(self) -> Tensor:
        """The optimum, by Newton's method with backtracking.

        Raises:
            RuntimeError: Newton's method did not converge.
        """
        W, eps = self.start, torch.finfo(self.start.dtype).eps
        for _ in range(100):
            g = self.gradient(W)
            scale = max(1.0, self.L) * max(1.0, float(W.norm()))
            if g.norm() <= 100 * eps * scale:
                return W
            step = torch.linalg.solve(self.hessian(W), g.flatten())
            d = -step.reshape(W.shape)
            W = W + backtracking(self.loss, W, d, g) * d
        raise RuntimeError(
            f"Newton's method ends with ‖∇f‖ = {float(g.norm()):.1g} after "
            "100 steps; scale X, raise l2, or pass float64"
        )

    @cached_property
    def minimum(self) -> float:
        """The loss at the optimum."""
        return float(self.loss(self.minimizer))

    # %% 01_steepest_descent sec-digits 2 a3be6ac5
    def loss(self, W: Tensor) -> Tensor:
        """Mean cross-entropy plus the penalty; one row of W per class."""
        log_p = (self.inputs @ W.T).log_softmax(dim=1)
        fit = -(self.targets * log_p).sum() / len(log_p)
        return fit + self.l2 / 2 * (W * W).sum()

    def gradient(self, W: Tensor) -> Tensor:
        """``(p − y)ᵀ X / n + l2 · W``."""
        p = (self.inputs @ W.T).softmax(dim=1)
        return (p - self.targets).T @ self.inputs / len(p) + self.l2 * W

    def hessian(self, W: Tensor) -> Tensor:
        """``Σ (diag p − p pᵀ) ⊗ a aᵀ / n + l2 · I``, W row by row."""
        p = (self.inputs @ W.T).softmax(dim=1)
        S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        a, eye = self.inputs, torch.eye(W.numel()).to(W)
        H = torch.einsum("nkl,ni,nj->kilj", S, a, a) / len(p)
        return H.reshape(eye.shape) + self.l2 * eye


# %% 01_steepest_descent sec-digits 3 90217cf0
def digits(
    *,
    center: bool = False,
    scale: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1797 handwritten digits, 8×8 pixels.

    Args:
        center: Subtract each pixel's mean. Default False.
        scale: Divide each pixel by its standard deviation (pixels that
            never change are left alone). Default False.
        dtype: Of the images. Default float64.

    Returns:
        Images ``(1797, 64)``, in [0, 1] unless centred or scaled, and
        classes ``(1797,)``, int64.

    Raises:
        ImportError: Scikit-learn is not installed.

    Source: Alpaydin & Kaynak (1998), doi 10.24432/C50P49. Chapter 01, "A
        real problem".
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            "digits() needs scikit-learn: pip install scikit-learn"
        ) from None
    X, y = map(torch.as_tensor, load_digits(return_X_y=True))
    X = X.to(torch.float64) / 16
    deviation = X.std(dim=0)
    if center:
        X = X - X.mean(dim=0)
    if scale:
        X = X / torch.where(deviation > 0, deviation, 1.0)
    return X.to(dtype), y.long()


def _check_classes(X: Tensor, y: Tensor) -> int:
    """The number of classes, if X and y are a classification problem."""
    if X.ndim != 2 or y.shape != X.shape[:1] or len(y) == 0:
        raise ValueError(
            f"X has shape {tuple(X.shape)} and y {tuple(y.shape)}; "
            "pass (n, d) and (n,), with n ≥ 1"
        )
    if not X.is_floating_point():
        raise TypeError(
            f"X has dtype {X.dtype}; "
            "pass a floating-point tensor, such as X.double()"
        )
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(
            f"y has dtype {y.dtype}; pass integer classes, such as y.long()"
        )
    if not torch.isfinite(X).all():
        raise ValueError(
            "X holds values that are not finite; remove or replace them"
        )
    if y.min() < 0 or y.max() < 1:
        raise ValueError(
            f"y holds classes {int(y.min())} to {int(y.max())}; "
            "pass 0 to K−1, with at least two classes"
        )
    return int(y.max()) + 1
