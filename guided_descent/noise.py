# Generated from chapters/02_stochastic_gradients.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 61368e9d
"""Chapter 02, Stochastic gradients."""

__all__ = [
    "CriticalBatch",
    "NoiseBall",
    "NoiseScale",
    "critical_batch_size",
    "expected_loss",
    "gradient_covariance",
    "minibatches",
    "noise_ball",
    "noise_scale",
    "noise_scale_from_batches",
    "per_example_gradients",
]


# %% 02_stochastic_gradients sec-minibatch-noise 1 83196caa
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from guided_descent.core import check_choice, check_range, wide


def minibatches(
    n: int,
    batch_size: int,
    steps: int,
    generator: torch.Generator | None = None,
    *,
    sampling: Literal["shuffle", "without", "with"] = "shuffle",
) -> Iterator[Tensor]:
    """The indices of one minibatch for each step.

    As in ``train(…, batches=minibatches(n, 32, 1000, generator))``.

    Args:
        n: Number of examples, at least 1.
        batch_size: Examples in a batch, at least 1; at most ``n`` unless drawn with
            replacement.
        steps: Number of batches, at least 0.
        generator: Source of randomness; the indices live on its device. Torch's global
            one by default.
        sampling: ``"shuffle"``, the default: every epoch is a fresh order of the
            examples, cut into batches; a last batch that would be short is dropped.
            ``"without"``: each batch is drawn without replacement, independently of the
            others. ``"with"``: every index is drawn independently of all others.

    Yields:
        Int64 tensors of shape ``(batch_size,)``.

    Raises:
        ValueError: An argument out of range.

    Source: chapter 02, eq-noise-with and eq-noise-without.
    """
    check_choice("sampling", sampling, ("shuffle", "without", "with"))
    most = math.inf if sampling == "with" else n
    if n < 1 or steps < 0 or not 1 <= batch_size <= most:
        raise ValueError(
            f"n={n}, batch_size={batch_size}, steps={steps}: "
            "pass n ≥ 1, 1 ≤ batch_size ≤ n, steps ≥ 0"
        )
    device = generator.device if generator is not None else None
    rounds = n // batch_size if sampling == "shuffle" else 1

    # inside, so that the checks above speak at the call and not at the first batch
    def draw() -> Iterator[Tensor]:
        for t in range(steps):
            if sampling == "with":
                size = (batch_size,)
                yield torch.randint(n, size, generator=generator, device=device)
                continue
            k = t % rounds
            if k == 0:
                order = torch.randperm(n, generator=generator, device=device)
            yield order[k * batch_size : (k + 1) * batch_size]

    return draw()


# %% 02_stochastic_gradients sec-minibatch-noise 2 085ece50
def per_example_gradients(
    loss: Callable[..., Tensor],
    params: Tensor | nn.Module,
    examples: Sequence[Tensor],
    *,
    chunk_size: int = 64,
) -> Tensor:
    """The gradient of every example's loss, one row each, without a loop.

    Args:
        loss: For a tensor ``params``: called as ``loss(params, *example)``, returns a
            scalar. For a module: called as ``loss(model(*inputs), target)`` on a batch
            of one, such as ``torch.nn.functional.cross_entropy``.
        params: The point: a tensor, or a module, whose trainable parameters are meant.
            Neither is changed.
        examples: Tensors with one entry per example in their first dimension; for a
            module the last one is the target.
        chunk_size: Examples differentiated at a time, at least 1; bounds the memory for
            activations. Default 64.

    Returns:
        Shape ``(n, d)``, with the d parameters in the order of ``model.parameters()``.

    Raises:
        ValueError: Examples of different lengths, or none; batch norm in training mode,
            which ties examples together.
        TypeError: ``examples`` is a tensor and not a sequence of tensors.

    Source: chapter 02, "What a small batch gets wrong".
    """
    _check_examples(examples)
    point, one = _functional(loss, params)
    options = {"randomness": "different", "chunk_size": chunk_size}
    axes = (None, *(0 for _ in examples))
    g = torch.func.vmap(torch.func.grad(one), axes, **options)(point, *examples)
    return torch.cat([part.flatten(1) for part in g.values()], dim=1)


# %% 02_stochastic_gradients sec-minibatch-noise 3 eb659f59
def gradient_covariance(
    loss: Callable[..., Tensor],
    params: Tensor | nn.Module,
    examples: Sequence[Tensor],
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The mean g of all examples' gradients, and their covariance Σ (over n).

    Needs memory for n·d and d² numbers; for a large model see ``noise_scale``.

    Args:
        loss, params, examples, chunk_size: As for ``per_example_gradients``.

    Returns:
        g of shape ``(d,)`` and Σ of shape ``(d, d)``.

    Raises:
        ValueError: As ``per_example_gradients``.

    Source: chapter 02, "What a small batch gets wrong".
    """
    G = per_example_gradients(loss, params, examples, chunk_size=chunk_size)
    g = G.mean(dim=0)
    return g, (G - g).T @ (G - g) / len(G)


# %% 02_stochastic_gradients sec-minibatch-noise 4 04800f0c
def _check_examples(examples: Sequence[Tensor]) -> None:
    if isinstance(examples, Tensor):
        raise TypeError(
            "examples is a tensor; pass a tuple of tensors, such as (inputs, targets)"
        )
    if len({len(e) for e in examples}) != 1 or len(examples[0]) == 0:
        raise ValueError(
            f"examples have lengths {[len(e) for e in examples]}; "
            "pass tensors of one length, at least 1"
        )


def _functional(
    loss: Callable[..., Tensor], model: Tensor | nn.Module
) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """The trainable parameters by name, and one example's loss by them."""
    if isinstance(model, Tensor):
        return {"": model.detach()}, lambda values, *e: loss(values[""], *e)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"module {name!r} normalises over the batch, so no example has a loss "
                "of its own; call model.eval() first, or use noise_scale, which needs "
                "batch gradients only"
            )

    def one(values: dict[str, Tensor], *example: Tensor) -> Tensor:
        *inputs, target = (e.unsqueeze(0) for e in example)
        return loss(torch.func.functional_call(model, values, tuple(inputs)), target)

    return {
        name: p.detach() for name, p in model.named_parameters() if p.requires_grad
    }, one


# %% 02_stochastic_gradients sec-noise-ball 1 77bf650b
class NoiseBall(NamedTuple):
    """Where SGD with a constant step comes to rest."""

    covariance: Tensor
    """Stationary covariance V of the parameters around the minimizer, ``(d, d)``."""
    loss: Tensor
    """Expected loss above the minimum, ``½ tr(H V)``."""


# %% 02_stochastic_gradients sec-noise-ball 2 c820e15f
def noise_ball(H: Tensor, noise: Tensor, lr: float) -> NoiseBall:
    """The stationary state of ``x ← x − lr · (H x + ξ)`` with ``Cov ξ = noise``.

    In the eigenbasis of H: ``V_ij = lr · N_ij / (λ_i + λ_j − lr · λ_i λ_j)``.

    Args:
        H: Hessian, symmetric positive definite, ``(d, d)``.
        noise: Covariance N of the gradient that is stepped by, ``(d, d)``: Σ/b for
            batches of b.
        lr: Step size, in (0, 2/λ₁).

    Raises:
        ValueError: Shapes that do not match, H not symmetric positive definite, ``lr``
            outside its range.

    Source: Mandt, Hoffman & Blei (2017), arXiv 1704.04289. Chapter 02, eq-noise-ball
    and eq-noise-floor.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1] or noise.shape != H.shape:
        raise ValueError(
            f"H has shape {tuple(H.shape)} and noise {tuple(noise.shape)}; "
            "pass two (d, d) matrices"
        )
    lam, U = torch.linalg.eigh(H)
    if not (torch.allclose(H, H.T) and lam[0] > 0):
        raise ValueError(
            "H is not symmetric positive definite: "
            f"smallest eigenvalue {float(lam[0]):.3g}"
        )
    check_range("lr", lr, f"(0, {2 / float(lam[-1])})")
    N = U.T @ noise @ U
    V = lr * N / (lam[:, None] + lam - lr * lam[:, None] * lam)
    return NoiseBall(U @ V @ U.T, (lam * V.diagonal()).sum() / 2)


# %% 02_stochastic_gradients sec-noise-ball 3 2ceffaae
def expected_loss(
    spectrum: Tensor, noise: Tensor, start: Tensor, lrs: Iterable[float | Tensor]
) -> Tensor:
    """The expected loss of SGD on a noisy quadratic, without simulation.

    Before the first and after every step.

    Per eigen-direction: ``E e_i² ← (1 − lr·λ_i)² E e_i² + lr² σ_i²``.
    The loss is ``½ Σ λ_i E e_i²``.

    Args:
        spectrum: Eigenvalues λ_i of the Hessian, ``(d,)``.
        noise: Variances σ_i² of the gradient along the eigenvectors, ``(d,)``.
        start: Errors along the eigenvectors at the start, ``(d,)``.
        lrs: The step size of every step. Each may be a tensor of any shape, to follow
            many runs at once.

    Returns:
        Shape ``(steps + 1,)``, or ``(steps + 1, *shape)`` for step sizes of that shape.

    Raises:
        ValueError: ``spectrum``, ``noise`` and ``start`` are not three lists of the
            same length.

    Source: Zhang et al. (2019), arXiv 1907.04164. Chapter 02, eq-noise-path.
    """
    if spectrum.ndim != 1 or not spectrum.shape == noise.shape == start.shape:
        shapes = tuple(spectrum.shape), tuple(noise.shape), tuple(start.shape)
        raise ValueError(
            f"spectrum, noise and start have shapes {shapes}; "
            "pass three of the same shape (d,)"
        )
    lrs = [
        torch.as_tensor(lr, dtype=spectrum.dtype, device=spectrum.device)[..., None]
        for lr in lrs
    ]
    squares = start.square().expand(*(lrs[0].shape[:-1] if lrs else ()), len(start))
    losses = [squares @ spectrum / 2]
    for lr in lrs:
        squares = (1 - lr * spectrum) ** 2 * squares + lr**2 * noise
        losses.append(squares @ spectrum / 2)
    return torch.stack(losses)


# %% 02_stochastic_gradients sec-noise-scale 1 11e232ab
class NoiseScale(NamedTuple):
    """How noisy gradients are. Scalar tensors."""

    scale: Tensor
    """``tr Σ / ‖g‖²``, in examples; infinite where no gradient shows at all."""
    trace: Tensor
    """``tr Σ``, the variance of a single example's gradient."""
    squared_norm: Tensor
    """``‖g‖²``; an unbiased estimate can come out negative."""


# %% 02_stochastic_gradients sec-noise-scale 2 9f3d0f95
def noise_scale_from_batches(
    small: float | Tensor, big: float | Tensor, *, batch_sizes: tuple[float, float]
) -> NoiseScale:
    """The simple noise scale from squared gradient norms at two batch sizes.

    ``tr Σ = (‖g_small‖² − ‖g_big‖²) / (1/b_small − 1/b_big)`` and ``‖g‖² = (b_big
    ‖g_big‖² − b_small ‖g_small‖²) / (b_big − b_small)``, averaged before they are
    divided.

    Args:
        small: Squared norms of gradients of small batches: one number, or a tensor of
            any shape, which is averaged.
        big: The same for big batches; the numbers need not match.
        batch_sizes: Examples per small and per big batch, ``0 < b_small < b_big``.

    Raises:
        ValueError: Batch sizes out of order.

    Source: McCandlish et al. (2018), arXiv 1812.06162, appendix A.1. Chapter 02,
    eq-two-batches.
    """
    b, B = batch_sizes
    if not 0 < b < B:
        raise ValueError(
            f"batch_sizes={batch_sizes}; pass (small, big) with 0 < small < big"
        )
    small, big = (
        (x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)).mean()
        for x in (small, big)
    )
    return _noise_scale(
        (small - big) / (1 / b - 1 / B), (B * big - b * small) / (B - b)
    )


# %% 02_stochastic_gradients sec-noise-scale 3 9ff536b5
def noise_scale(
    loss: Callable[[Any], Tensor],
    params: Iterable[Tensor],
    batches: Iterable[Any],
    *,
    population: bool = False,
) -> NoiseScale:
    """The simple noise scale of a model, from the spread of batch gradients.

    ``tr Σ = Σ_j b_j ‖ĝ_j − ḡ‖² / (k − 1)`` over k batches, ``‖g‖² = ‖ḡ‖² − tr Σ / m``
    over their m examples.

    Costs one backward pass per batch and memory for two gradients. ``.grad`` is neither
    read nor written; no synchronisation with the device. What is random in the model,
    such as dropout, counts as noise.

    Args:
        loss: Called as ``loss(batch)``, returns the mean loss over the batch's
            examples, as for ``book.train``.
        params: The parameters, such as ``model.parameters()``; frozen ones are left
            out.
        batches: At least two batches, such as a ``DataLoader``; of independently drawn
            examples, any sizes. A batch is a tensor, or a (nested) tuple, list or
            mapping whose first tensor has one row per example.
        population: The batches hold every example there is, once: report Σ divided by
            m, and ‖ḡ‖² as it is. By default they are a sample, and both numbers are
            unbiased estimates for what it was drawn from.

    Raises:
        ValueError: Fewer than two batches, or no parameter that requires a gradient.
        TypeError: A batch without a tensor.

    Source: McCandlish et al. (2018), arXiv 1812.06162, appendix A. Chapter 02,
    eq-between-batches.
    """
    params = [p for p in params if p.requires_grad]
    if not params:
        raise ValueError("params holds no tensor that requires a gradient")
    mean = [torch.zeros_like(p, dtype=wide(p.dtype)) for p in params]
    spread, m, k = mean[0].new_zeros(()), 0, 0
    for batch in batches:
        b = _examples(batch)
        options = {"allow_unused": True, "materialize_grads": True}
        gradient = torch.autograd.grad(loss(batch), params, **options)
        m, k = m + b, k + 1
        for average, g in zip(mean, gradient, strict=True):
            shift = g - average
            average.add_(shift, alpha=b / m)
            spread += b * (m - b) / m * shift.square().sum().to(spread)
    if k < 2:
        raise ValueError(f"{k} batches show no spread; pass at least 2")
    trace, square = spread / (k - 1), sum(average.square().sum() for average in mean)
    if population:
        return _noise_scale(trace * (m - 1) / m, square)
    return _noise_scale(trace, square - trace / m)


# %% 02_stochastic_gradients sec-noise-scale 4 1cc6795b
def _noise_scale(trace: Tensor, squared_norm: Tensor) -> NoiseScale:
    return NoiseScale(
        torch.where(squared_norm > 0, trace / squared_norm, math.inf),
        trace,
        squared_norm,
    )


def _examples(batch: Any) -> int:
    """Rows of the first tensor in a batch."""
    while not isinstance(batch, Tensor):
        if (
            not isinstance(batch, Mapping | Sequence)
            or isinstance(batch, str)
            or not len(batch)
        ):
            kind = type(batch).__name__
            raise TypeError(
                f"batch holds no tensor but a {kind} first; "
                "pass tensors, or tuples, lists, dicts of them"
            )
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch)


# %% 02_stochastic_gradients sec-critical-batch 1 4f26c8e3
class CriticalBatch(NamedTuple):
    """The trade of steps against examples, ``(S/S_min − 1)(M/M_min − 1) = 1``."""

    size: float
    """``M_min / S_min``: twice the fewest steps and twice the fewest examples."""
    min_steps: float
    """Steps to the goal with unlimited batches."""
    min_examples: float
    """Examples to the goal with the smallest batches."""


# %% 02_stochastic_gradients sec-critical-batch 2 7edb48ac
def critical_batch_size(
    batch_sizes: Sequence[float] | Tensor, steps: Sequence[float] | Tensor
) -> CriticalBatch:
    """Fit the hyperbola of steps and examples to runs that reached the same loss.

    Least squares on ``S_min / S + M_min / (b S) = 1``, so that relative errors count.

    Args:
        batch_sizes: Batch size b of each run; at least two different ones.
        steps: Steps S that it took to the common goal, each with its own best step
            size; positive. Leave out runs that never got there.

    Raises:
        ValueError: Lists of different length, fewer than two batch sizes, numbers that
            are not positive and finite, or runs that lie on no such hyperbola.

    Source: McCandlish et al. (2018), arXiv 1812.06162. Chapter 02, eq-steps and
    eq-hyperbola.
    """
    b, S = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (batch_sizes, steps))
    usable = b.ndim == 1 and b.shape == S.shape and len(b.unique()) > 1
    if (
        not usable
        or not (torch.stack([b, S]) > 0).all()
        or not torch.stack([b, S]).isfinite().all()
    ):
        raise ValueError(
            f"batch_sizes={b.tolist()}, steps={S.tolist()}; pass two lists of one "
            "length, all positive and finite, with at least two different batch sizes"
        )
    S_min, M_min = torch.linalg.lstsq(
        torch.stack([1 / S, 1 / (b * S)], dim=1), torch.ones_like(S)
    ).solution.tolist()
    if not (S_min > 0 and M_min > 0):
        raise ValueError(
            f"the best fit has S_min={S_min:.3g}, M_min={M_min:.3g}; "
            "try batch sizes further apart"
        )
    return CriticalBatch(M_min / S_min, S_min, M_min)
