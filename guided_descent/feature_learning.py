# Generated from chapters/05_anisotropy.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 85c792c0
"""Chapter 05, Anisotropy."""

__all__ = [
    "LinearTask",
    "Moments",
    "SingleIndex",
    "TwoLayerMoments",
    "alignment",
    "alternating_step",
    "covariance_root",
    "feature_gradient",
    "head_gradient",
    "kronecker_direction",
    "least_squares_head",
    "linear_tasks",
    "log_spaced",
    "orthonormal",
    "sgd_step",
    "single_index",
    "subspace_distance",
    "transfer_tasks",
    "two_layer_kfac_step",
    "two_layer_moments",
    "white_moments",
]


# %% 05_anisotropy sec-aniso-task 1 dbed5655
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from guided_descent.core import check_range
from guided_descent.problems import random_rotation


# %% 05_anisotropy sec-aniso-task 2 6891e8a9
def orthonormal(G: Tensor) -> Tensor:
    """Orthonormal basis of the row space, ``R⁻ᵀ G`` with ``Gᵀ = Q R``.

    The diagonal of R is positive, so the basis is unique and moves
    continuously with G.

    Args:
        G: Features as rows, ``(…, k, d)``, ``k ≤ d``, of full rank.

    Returns:
        Same shape, with ``Q Qᵀ = I``. A row that is exactly dependent on
        those before it becomes zero.

    Raises:
        ValueError: G has more rows than columns.

    Source: Golub & Van Loan, section 5.2. Chapter 05, eq-al-distance.
    """
    if G.shape[-2] > G.shape[-1]:
        raise ValueError(
            f"G has shape {tuple(G.shape)}; pass features as rows, at most "
            "as many as their length"
        )
    q, r = torch.linalg.qr(G.mT)
    sign = r.diagonal(dim1=-2, dim2=-1).sign()
    return (q * sign[..., None, :]).mT


# %% 05_anisotropy sec-aniso-task 3 58d8ada4
def subspace_distance(G: Tensor, G_star: Tensor) -> Tensor:
    """Sine of the largest principal angle between two row spaces.

    Args:
        G: Learned features, ``(…, k, d)``.
        G_star: True features, ``(…, k, d)``; leading dimensions broadcast.

    Returns:
        Numbers in [0, 1], shape ``(…)``: 0 for the same space, 1 also if
        a row of G is zero.

    Raises:
        ValueError: The two do not have the same last two dimensions, or
            more rows than columns.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05,
    eq-al-distance.
    """
    if G.shape[-2:] != G_star.shape[-2:]:
        raise ValueError(
            f"G has shape {tuple(G.shape)}, G_star {tuple(G_star.shape)}; "
            "pass features of the same number and length"
        )
    Q, S = orthonormal(G), orthonormal(G_star)
    outside = S - S @ Q.mT @ Q  # symmetric; so a lost row of G counts
    gram = torch.linalg.eigvalsh(outside @ outside.mT)  # small: k × k
    return gram[..., -1].clamp(min=0).sqrt()


# %% 05_anisotropy sec-aniso-task 4 890f3181
class Moments(NamedTuple):
    """All that a squared loss sees of a batch.

    Source: chapter 05, "A task whose features are known".
    """

    xx: Tensor
    """``Q``, the mean of ``x xᵀ``, shape ``(…, d, d)``."""
    yx: Tensor
    """The mean of ``y xᵀ``, shape ``(…, out, d)``."""


def white_moments(
    batches: tuple[int, ...],
    *,
    n: int = 512,
    d: int = 100,
    out: int = 15,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Moments:
    """Moments of batches with inputs ±1 and answers of pure N(0, 1) noise.

    Args:
        batches: Leading shape: how many batches.
        n: Examples in a batch. Default 512.
        d: Length of an input. Default 100.
        out: Length of an answer. Default 15.
        generator: Source of randomness; torch's global one by default.
        dtype: Of the result. Default float64.

    Returns:
        ``xx`` of shape ``(*batches, d, d)``, ``yx`` ``(*batches, out, d)``.

    Raises:
        ValueError: ``n`` is less than 1.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05, "A task
    whose features are known".
    """
    if n < 1:
        raise ValueError(f"n={n} examples make no batch; pass 1 or more")
    xx = torch.empty(*batches, d, d, dtype=dtype)
    yx = torch.empty(*batches, out, d, dtype=dtype)
    pairs = zip(xx.view(-1, d, d), yx.view(-1, out, d), strict=True)
    for q, noise in pairs:
        u = torch.randint(0, 2, (n, d), generator=generator).to(dtype)
        e = torch.randn(n, out, generator=generator, dtype=dtype)
        u = 2 * u - 1
        q.copy_(u.T @ u / n)
        noise.copy_(e.T @ u / n)
    return Moments(xx, yx)


# %% 05_anisotropy sec-aniso-task 5 0a0f6505
def log_spaced(d: int, kappa: float) -> Tensor:
    """Eigenvalues evenly spaced on a log scale, with a mean of 1.

    Args:
        d: How many, at least 1.
        kappa: Ratio of the largest to the smallest, in [1, ∞).

    Returns:
        Shape ``(d,)``, largest first.

    Raises:
        ValueError: ``kappa`` is less than 1.

    Source: chapter 05, "A task whose features are known".
    """
    check_range("kappa", kappa, "[1, inf)")
    spectrum = torch.logspace(0, -math.log10(kappa), d, dtype=torch.float64)
    return spectrum / spectrum.mean()


def covariance_root(spectrum: Tensor, basis: Tensor) -> Tensor:
    """``Σ^{1/2} = U diag(√λ) Uᵀ``.

    Args:
        spectrum: Eigenvalues λ of Σ, not negative, ``(d,)``.
        basis: Eigenvectors as the columns of U, ``(…, d, d)``.

    Returns:
        Shape ``(…, d, d)``.

    Source: chapter 05, "A task whose features are known".
    """
    return (basis * spectrum.sqrt()) @ basis.mT


class LinearTask(NamedTuple):
    """``y = F⋆ G⋆ x + noise · N(0, I)``, one task for each seed.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05, "A task
    whose features are known".
    """

    F: Tensor
    """True head, ``(…, out, k)``."""
    G: Tensor
    """True features, ``(…, k, d)``, with orthonormal rows."""
    root: Tensor
    """``Σ^{1/2}`` of the inputs, ``(…, d, d)``."""
    noise: float
    """Standard deviation σ of the answers."""

    def moments(self, white: Moments) -> Moments:
        """What white batches become as batches of this task."""
        xx = self.root @ white.xx @ self.root
        noise = self.noise * white.yx @ self.root
        return Moments(xx, self.F @ self.G @ xx + noise)

    def population(self) -> Moments:
        """The moments of infinitely many examples."""
        Sigma = self.root @ self.root
        return Moments(Sigma, self.F @ self.G @ Sigma)

    def excess_loss(self, F: Tensor, G: Tensor) -> Tensor:
        """``½ E‖(F G − F⋆ G⋆) x‖²``, shape ``(…)``."""
        E = (F @ G - self.F @ self.G) @ self.root
        return E.square().sum((-2, -1)) / 2


def linear_tasks(
    seeds: int,
    *,
    d: int = 100,
    out: int = 15,
    k: int = 8,
    kappa_x: float = 1.0,
    kappa_f: float = 1.0,
    noise: float = 0.01,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> LinearTask:
    """Random tasks with chosen condition numbers, seeds first.

    The same state of the generator gives the same bases, whatever the
    condition numbers.

    Args:
        seeds: How many tasks, at least 1.
        d, out, k: Length of an input, of an answer; number of features.
            Defaults 100, 15, 8; ``k ≤ min(d, out)``.
        kappa_x: Condition number of the inputs' covariance, in [1, ∞).
        kappa_f: Ratio of the extreme singular values of ``F⋆``, in [1, ∞);
            the largest is 1.
        noise: σ, in [0, ∞). Default 0.01.
        generator: Source of randomness; torch's global one by default.
        dtype: Of the task. Default float64.

    Raises:
        ValueError: A number out of range.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05, "A task
    whose features are known".
    """
    if not 1 <= k <= min(d, out):
        raise ValueError(f"k={k} features; pass 1 to min(d, out)")
    if seeds < 1:
        raise ValueError(f"seeds={seeds} make no task; pass 1 or more")
    check_range("noise", noise, "[0, inf)")
    basis, left, right, true = (
        torch.stack([random_rotation(n, generator) for _ in range(seeds)])
        for n in (d, out, k, d)
    )
    s = log_spaced(k, kappa_f)
    F = left[..., :k] * (s / s[0]) @ right
    root = covariance_root(log_spaced(d, kappa_x), basis)
    G = true[..., :k, :]
    return LinearTask(F.to(dtype), G.to(dtype), root.to(dtype), noise)


def transfer_tasks(
    tasks: LinearTask,
    *,
    kappa_x: float = 1.0,
    kappa_f: float = 1.0,
    noise: float = 0.01,
    generator: torch.Generator | None = None,
) -> LinearTask:
    """New tasks with the same features: a new head, a new covariance.

    Args:
        tasks: The tasks that were trained on.
        kappa_x, kappa_f, noise, generator: As in ``linear_tasks``.

    Raises:
        ValueError: A number out of range.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05, "What good
    features are good for".
    """
    (seeds, out, k), d = tasks.F.shape, tasks.G.shape[-1]
    new = linear_tasks(
        seeds, d=d, out=out, k=k, kappa_x=kappa_x, kappa_f=kappa_f,
        noise=noise, generator=generator, dtype=tasks.G.dtype
    )
    return new._replace(G=tasks.G)


# %% 05_anisotropy sec-aniso-failure 1 23fb73fa
def _damped(M: Tensor, damping: float) -> Tensor:
    """``M + damping · (tr M / d) · I``."""
    check_range("damping", damping, "[0, inf)")
    mean = M.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return M + damping * mean * eye


def _times(A: Tensor, M: Tensor) -> Tensor:
    """``A @ M``; an M that many A share is not copied for each of them."""
    return torch.einsum("...kd,...de->...ke", A, M)


# %% 05_anisotropy sec-aniso-failure 2 348581b0
def feature_gradient(F: Tensor, G: Tensor, batch: Moments) -> Tensor:
    """``Fᵀ (F G Q − mean y xᵀ)``, the gradient of half the squared error.

    Args:
        F: Head, ``(…, out, k)``.
        G: Features, ``(…, k, d)``.
        batch: Its moments; leading dimensions broadcast.

    Returns:
        Shape of G.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05,
    eq-al-gradients.
    """
    return F.mT @ (F @ _times(G, batch.xx) - batch.yx)


def head_gradient(F: Tensor, G: Tensor, batch: Moments) -> Tensor:
    """``(F G Q − mean y xᵀ) Gᵀ``; see ``feature_gradient``."""
    return (F @ _times(G, batch.xx) - batch.yx) @ G.mT


# %% 05_anisotropy sec-aniso-failure 3 7aeb8945
def least_squares_head(
    G: Tensor, batch: Moments, damping: float = 1e-6
) -> Tensor:
    """The head that fits a batch best, ``mean(y zᵀ) (mean(z zᵀ) + λI)⁻¹``.

    Args:
        G: Features, ``(…, k, d)``; ``z = G x``.
        batch: Its moments.
        damping: λ in units of the mean eigenvalue of ``mean(z zᵀ)``, in
            [0, ∞). Default 1e-6.

    Returns:
        F, shape ``(…, out, k)``.

    Raises:
        ValueError: ``damping`` out of range.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05, "The
    features SGD learns".
    """
    zz = _damped(_times(G, batch.xx) @ G.mT, damping)
    return torch.linalg.solve(zz, _times(G, batch.yx.mT)).mT


def sgd_step(
    F: Tensor, G: Tensor, first: Moments, second: Moments, lr: float | Tensor
) -> tuple[Tensor, Tensor]:
    """A gradient step on G, then one on F from the other half of the batch.

    Args:
        F, G: Head ``(…, out, k)`` and features ``(…, k, d)``.
        first, second: Moments of the two halves.
        lr: Step size η; a tensor broadcasts against the leading dimensions,
            as ``(…, 1, 1)``.

    Returns:
        The new ``(F, G)``.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05,
    eq-al-gradients.
    """
    G = G - lr * feature_gradient(F, G, first)
    return F - lr * head_gradient(F, G, second), G


def alternating_step(
    F: Tensor, G: Tensor, first: Moments, second: Moments, lr: float | Tensor,
    direction: Callable[[Tensor, Tensor, Moments], Tensor] = feature_gradient,
) -> tuple[Tensor, Tensor]:
    """A step on G, orthonormal rows, then the best head::

        G ← orthonormal(G − lr · direction(F, G, first))
        F ← least_squares_head(G, second)

    Args:
        F, G, first, second, lr: As in ``sgd_step``.
        direction: From ``(F, G, batch)`` to the shape of G. By default the
            gradient, which makes it AMGD.

    Returns:
        The new ``(F, G)``.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05, "The
    features SGD learns".
    """
    G = orthonormal(G - lr * direction(F, G, first))
    return least_squares_head(G, second), G


# %% 05_anisotropy sec-aniso-repair 1 5c32441f
def kronecker_direction(
    F: Tensor, G: Tensor, batch: Moments, *,
    left: bool = True, right: bool = True, damping: float = 1e-6,
) -> Tensor:
    """Layer-wise preconditioned gradient, ``P⁻¹ ∇_G L (Q + λI)⁻¹``.

    ``P = FᵀF`` and ``Q = mean(x xᵀ)``. As ``direction`` of
    ``alternating_step`` it is K-FAC for this model. On a GPU the solves
    wait for the device.

    Args:
        F: Head, ``(…, out, k)``.
        G: Features, ``(…, k, d)``.
        batch: Its moments.
        left: Divide by P. Default True.
        right: Divide by Q. Default True.
        damping: λ in units of the mean eigenvalue, for P and for Q, in
            [0, ∞). Default 1e-6.

    Returns:
        Shape of G.

    Raises:
        ValueError: ``damping`` out of range.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05,
    eq-al-whitened.
    """
    g = feature_gradient(F, G, batch)
    if left:
        g = torch.linalg.inv(_damped(F.mT @ F, damping)) @ g
    if right:
        g = _times(g, torch.linalg.inv(_damped(batch.xx, damping)))
    return g


# %% 05_anisotropy sec-aniso-spike 1 2c8bfc12
def alignment(W: Tensor, beta: Tensor) -> Tensor:
    """Cosine, without sign, between W's top right singular vector and β.

    Says little about a matrix whose singular values are all equal.

    Args:
        W: ``(…, out, d)``.
        beta: ``(…, d)``, of any length but zero.

    Returns:
        Numbers in [0, 1], shape ``(…)``.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05,
    eq-al-cosine.
    """
    top = torch.linalg.svd(W, full_matrices=False).Vh[..., 0, :]
    cosine = (top * beta).sum(-1) / torch.linalg.vector_norm(beta, dim=-1)
    return cosine.abs()


class SingleIndex(NamedTuple):
    """``y = max(0, βᵀx) + noise · N(0, 1)`` with ``x ~ N(0, Σ)``.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05, "One step
    of a network".
    """

    beta: Tensor
    """The one feature, ``(…, d)``."""
    root: Tensor
    """``Σ^{1/2}`` of the inputs, ``(…, d, d)``."""
    noise: float = 0.0
    """Standard deviation σ of the answers."""

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """n examples for each seed: x ``(…, n, d)``, y ``(…, n)``."""
        shape = (*self.beta.shape[:-1], n, self.beta.shape[-1])
        normal = partial(
            torch.randn, generator=generator,
            dtype=self.beta.dtype, device=self.beta.device,
        )
        x = normal(shape) @ self.root
        y = (x @ self.beta[..., None]).squeeze(-1).relu()
        return x, y + self.noise * normal(y.shape)

    def spike_cosine(self) -> Tensor:
        """Where one gradient step points, ``βᵀΣβ / (‖Σβ‖ ‖β‖)``."""
        tilted = (self.root @ self.root @ self.beta[..., None]).squeeze(-1)
        length = torch.linalg.vector_norm
        scale = length(tilted, dim=-1) * length(self.beta, dim=-1)
        return (tilted * self.beta).sum(-1) / scale


def single_index(
    seeds: int,
    spectrum: Tensor,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> SingleIndex:
    """Random single-index tasks: β of length 1, Σ in a random basis.

    Args:
        seeds: How many.
        spectrum: Eigenvalues of Σ, positive, ``(d,)``; sets the dtype.
        noise: σ, in [0, ∞). Default 0.
        generator: Source of randomness; torch's global one by default.

    Raises:
        ValueError: ``noise`` out of range, or an eigenvalue not positive.

    Source: Zhang et al. (2025), arXiv 2502.01763. Chapter 05, "One step
    of a network".
    """
    check_range("noise", noise, "[0, inf)")
    check_range("smallest eigenvalue of spectrum", float(spectrum.min()),
                "(0, inf)")
    d, dtype = len(spectrum), spectrum.dtype
    bases = [random_rotation(d, generator).to(dtype) for _ in range(seeds)]
    beta = torch.randn(seeds, d, generator=generator, dtype=dtype)
    beta = beta / torch.linalg.vector_norm(beta, dim=-1, keepdim=True)
    root = covariance_root(spectrum, torch.stack(bases))
    return SingleIndex(beta, root, noise)


# %% 05_anisotropy sec-aniso-digits 1 dae56545
class TwoLayerMoments(NamedTuple):
    """Gradients and Kronecker factors of a two-layer network.

    Source: Martens & Grosse (2015), arXiv 1503.05671. Chapter 05,
    eq-al-two-layer.
    """

    g1: Tensor
    """Gradient of half the mean squared error for the first layer."""
    g2: Tensor
    """The same for the second layer."""
    A1: Tensor
    """Second moment of the inputs."""
    A2: Tensor
    """Second moment of the hidden units."""
    B1: Tensor
    """Second moment of the gradient at the hidden layer, for answers drawn
    from the model; the one at the output, B2, is the identity."""


def two_layer_moments(
    W1: Tensor, W2: Tensor, X: Tensor, Y: Tensor,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
) -> TwoLayerMoments:
    """What K-FAC needs for ``ŷ = W2 φ(W1 x)``, in closed form.

    Args:
        W1: ``(…, hidden, d)``.
        W2: ``(…, out, hidden)``.
        X: Inputs as rows, ``(…, n, d)``.
        Y: Answers, ``(…, n, out)``.
        activation: φ, elementwise. Default tanh.

    Raises:
        ValueError: Y does not have one row of answers for each input.

    Source: Martens & Grosse (2015), arXiv 1503.05671. Chapter 05,
    eq-al-two-layer.
    """
    n, out = X.shape[-2], W2.shape[-2]
    if Y.shape[-2:] != (n, out):
        raise ValueError(
            f"Y has shape {tuple(Y.shape)}, not (…, {n}, {out}); pass one "
            "row for each input, for classes torch.nn.functional.one_hot"
        )
    z = X @ W1.mT
    a, pull = torch.func.vjp(activation, z)
    (slope,) = pull(torch.ones_like(z))
    error = a @ W2.mT - Y
    delta = (error @ W2) * slope
    return TwoLayerMoments(
        g1=delta.mT @ X / n,
        g2=error.mT @ a / n,
        A1=X.mT @ X / n,
        A2=a.mT @ a / n,
        B1=(W2.mT @ W2) * (slope.mT @ slope) / n,
    )


def two_layer_kfac_step(
    W1: Tensor, W2: Tensor, X: Tensor, Y: Tensor, lr: float | Tensor,
    *, activation: Callable[[Tensor], Tensor] = torch.tanh,
    damping: float = 1e-2,
) -> tuple[Tensor, Tensor]:
    """One K-FAC step on both layers of ``ŷ = W2 φ(W1 x)``::

        W1 ← W1 − lr · (B1 + λI)⁻¹ g1 (A1 + λI)⁻¹
        W2 ← W2 − lr · g2 (A2 + λI)⁻¹

    Autograd follows the step: pass weights without ``requires_grad``, or
    call it under ``torch.no_grad()``. On a GPU the solves wait for the
    device.

    Args:
        W1, W2, X, Y, activation: As in ``two_layer_moments``.
        lr: Step size η; a tensor broadcasts, as ``(…, 1, 1)``.
        damping: λ in units of each factor's mean eigenvalue, in [0, ∞).
            Default 1e-2.

    Returns:
        The new ``(W1, W2)``.

    Raises:
        ValueError: ``damping`` out of range; Y of the wrong shape.
        torch.linalg.LinAlgError: A factor is zero, as for ``W2 = 0``; start
            from random weights.

    Source: Martens & Grosse (2015), arXiv 1503.05671. Chapter 05,
    eq-al-two-layer.
    """
    check_range("damping", damping, "[0, inf)")
    m = two_layer_moments(W1, W2, X, Y, activation)
    A1, A2, B1 = (_damped(M, damping) for M in (m.A1, m.A2, m.B1))
    d1 = torch.linalg.solve(B1, torch.linalg.solve(A1, m.g1.mT).mT)
    return W1 - lr * d1, W2 - lr * torch.linalg.solve(A2, m.g2.mT).mT
