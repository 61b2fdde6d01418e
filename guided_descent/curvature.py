# Generated from chapters/07_curvature_matrices.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 8943209c
"""Chapter 07, Curvature matrices."""

__all__ = [
    "GGN",
    "CurvatureOperator",
    "EmpiricalFisher",
    "Estimate",
    "Fisher",
    "Hessian",
    "Jacobian",
    "LinearOperator",
    "NaturalGradient",
    "OutputCurvature",
    "Ritz",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hutchpp_trace",
    "lanczos",
    "rademacher",
    "spectral_density",
]


# %% 07_curvature_matrices sec-cm-operator 1 265cdba7
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from guided_descent.core import Options, check_choice, check_range, wide
from guided_descent.likelihoods import LIKELIHOODS, Likelihood
from guided_descent.newton import truncated_cg
from guided_descent.vector import Objective, VectorOptimizer, flat, pull, unflat


# %% 07_curvature_matrices sec-cm-operator 2 80ba9f06
class LinearOperator(ABC):
    """A symmetric matrix that is known by its products alone.

    ``A @ V`` works for a vector ``(P,)`` and for columns ``(P, K)``. A
    subclass says what the matrix is a sum of, in ``_terms``.

    Attributes:
        shape: ``(P, P)``.
        dtype, device: Of the vectors it multiplies.
        chunk_size: How many columns are multiplied at once; more are
            faster and take more memory. Default 32.

    Source: chapter 07, "A matrix that is never written down".
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    chunk_size: int = 32

    @abstractmethod
    def _terms(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Functions of a vector ``(P,)``, whose sum is the product."""

    def matvec(self, v: Tensor) -> Tensor:
        """``A v`` for a vector of shape ``(P,)``."""
        self._check(v, 1)
        return sum(term(v) for term in self._terms())

    def matmat(self, V: Tensor) -> Tensor:
        """``A V`` for columns of shape ``(P, K)``, by ``torch.vmap``."""
        self._check(V, 2)
        if not V.shape[1]:
            return V.clone()
        rows, size = V.T.contiguous(), self.chunk_size
        every = (torch.vmap(f, chunk_size=size)(rows) for f in self._terms())
        return sum(every).T

    def __matmul__(self, V: Tensor) -> Tensor:
        return self.matvec(V) if V.ndim == 1 else self.matmat(V)

    def to_dense(self) -> Tensor:
        """The matrix itself, ``(P, P)``: P products."""
        return self.matmat(torch.eye(len(self), **self._like))

    def diagonal(self) -> Tensor:
        """The exact diagonal, ``(P,)``: P products, in small memory."""
        parts, n, k = [], len(self), self.chunk_size
        for start in range(0, n, k):
            E = torch.zeros(n, min(k, n - start), **self._like)
            E.diagonal(-start).fill_(1)
            parts.append((self @ E).diagonal(-start))
        return torch.cat(parts)

    def trace(self) -> Tensor:
        """The exact trace: P products."""
        return self.diagonal().sum()

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` of the same products.

        Raises:
            ImportError: SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator as Scipy
        except ImportError:
            raise ImportError("to_scipy() needs SciPy: pip install scipy") from None

        def product(V: Any) -> Any:
            V = torch.as_tensor(V.copy()).to(**self._like)
            return (self @ V).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        same = {"matvec": product, "rmatvec": product}
        return Scipy(self.shape, **same, matmat=product, dtype=dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def _like(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device}

    def _check(self, V: Tensor, ndim: int) -> None:
        if V.ndim != ndim or len(V) != len(self):
            raise ValueError(
                f"an operand of shape {tuple(V.shape)} does not fit an "
                f"operator of shape {self.shape}; pass ({len(self)},) or "
                f"({len(self)}, K)"
            )
        if V.dtype != self.dtype:
            raise TypeError(
                f"an operand of {V.dtype} does not fit an operator of "
                f"{self.dtype}; convert it with .to({self.dtype})"
            )


# %% 07_curvature_matrices sec-cm-operator 3 4f7026f4
class CurvatureOperator(LinearOperator):
    """A curvature matrix of a model's loss on data, at one point.

    Parameters are counted in the order of ``params``, each flattened row
    by row (row-major), so a linear layer's block is B ⊗ A with B on the
    output side and A on the input side. The matrix belongs to the mean
    over all examples, ``Σ_b (n_b / n) · loss(batch b)``; with
    ``loss.reduction == "sum"``, to the sum.

    The point is a copy of the model's parameters and buffers as they are
    now: training on changes nothing here, and nothing here changes the
    model (its gradients, buffers and mode; its forward hooks do run). With
    dropout, call ``model.eval()`` first: it would draw anew at every
    evaluation, and without a cache no two products had the same matrix.

    Args:
        model: Maps inputs to a tensor of outputs, examples first.
        loss: ``loss(outputs, targets)``, a scalar: the mean over the
            examples of a batch.
        data: One batch ``(inputs, targets)``, or an iterable of them. They
            are held; examples are counted by ``len(targets)``.
        params: Some of the model's parameters. Default: all that are not
            frozen. Tied ones count once.
        cache: Keep every batch's graph from one product to the next, which
            saves the forward pass and takes its memory; the model is then
            evaluated once per batch. Default: if there is one batch.

    Raises:
        TypeError: ``model`` is no module, or ``loss`` cannot be called.
        ValueError: No data, no parameters, one that is not the model's,
            or different dtypes; at the first product, a loss that is not a
            scalar or outputs that do not depend on the parameters.

    Source: Schraudolph (2002), doi 10.1162/08997660260028683. Chapter 07.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Any], Tensor],
        data: Any,
        *,
        params: Iterable[nn.Parameter] | None = None,
        cache: bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} is no module; pass an nn.Module")
        if not callable(loss):
            raise TypeError(
                f"loss={loss!r} cannot be called; pass loss(outputs, targets)"
            )
        self.model, self.loss = model, loss
        self.data = _batches(data)
        self._examples = sum(len(y) for _, y in self.data)
        self._mean = getattr(loss, "reduction", "mean") != "sum"
        one = len(self.data) == 1
        self._cache = {} if (one if cache is None else cache) else None
        self._point, self._params = _snapshot(model, params)
        first = self._params[0]
        self.dtype, self.device = first.dtype, first.device
        self.shape = (sum(p.numel() for p in self._params),) * 2

    def split(self, v: Tensor) -> list[Tensor]:
        """A vector ``(P,)`` as tensors of the parameters' shapes."""
        return unflat(v, self._params)

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes as one vector ``(P,)``."""
        return flat(tensors)

    def __matmul__(self, V: Tensor | list[Tensor]) -> Any:
        """``A @ V``; a list shaped as the parameters gives such a list."""
        if isinstance(V, Tensor):
            return super().__matmul__(V)
        return self.split(self.matvec(self.join(V)))

    def _terms(self) -> Iterator[Callable[[Tensor], Tensor]]:
        for i, (X, y) in enumerate(self.data):
            if self._cache is None:
                yield self._term(i, X, y)
            else:
                if i not in self._cache:
                    self._cache[i] = self._term(i, X, y)
                yield self._cache[i]

    @abstractmethod
    def _term(self, i: int, X: Any, y: Any) -> Callable[[Tensor], Tensor]:
        """The product with the part of batch ``i``."""

    def _share(self, y: Any) -> float:
        """The weight of a batch's loss in the whole."""
        return len(y) / self._examples if self._mean else 1.0

    def _outputs(self, X: Any) -> Tensor:
        """The model at the point, with a graph."""
        point = {n: x.clone() if b else x for n, (x, b) in self._point.items()}
        return _evaluate(self.model, point, X)

    def _scalar(self, f: Tensor, y: Any) -> Tensor:
        value = self.loss(f, y)
        if value.ndim:
            raise ValueError(
                f"loss returned shape {tuple(value.shape)}; return a scalar, "
                "the mean over the batch"
            )
        return value


def _evaluate(model: nn.Module, point: dict[str, Tensor], X: Any) -> Tensor:
    # Only this attention kernel can be differentiated twice.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.functional_call(model, point, (X,))


def _batches(data: Any) -> list[tuple[Any, Tensor]]:
    """One batch or many, as a list of pairs."""

    def is_batch(x: Any) -> bool:
        pair = isinstance(x, tuple | list) and len(x) == 2
        return pair and isinstance(x[1], Tensor) and x[1].ndim > 0

    batches = [data] if is_batch(data) else list(data)
    if not batches or not all(is_batch(x) and len(x[1]) for x in batches):
        raise ValueError(
            "data holds no batch, an empty one, or something else; pass "
            "(inputs, targets) or an iterable of such pairs"
        )
    return [(X, y) for X, y in batches]


def _snapshot(
    model: nn.Module, params: Iterable[nn.Parameter] | None
) -> tuple[dict[str, tuple[Tensor, bool]], list[Tensor]]:
    """All tensors of a model by name, and the chosen parameters, copied."""
    named = dict(model.named_parameters())
    known = {id(p): name for name, p in named.items()}
    free = [p for p in named.values() if p.requires_grad]
    chosen = free if params is None else list(params)
    chosen = list({id(p): p for p in chosen}.values())
    if not chosen or any(id(p) not in known for p in chosen):
        raise ValueError(
            f"params holds {len(chosen)} tensors, none or one that is not a "
            "parameter of the model; pass some of model.parameters()"
        )
    if len(kinds := {p.dtype for p in chosen}) > 1:
        raise ValueError(
            f"params have dtypes {sorted(map(str, kinds))}; "
            "convert the model to one, or pass those of one dtype"
        )
    point = {name: (p.detach().clone(), False) for name, p in named.items()}
    for name, buffer in model.named_buffers():
        point[name] = buffer.detach().clone(), True
    mine = [point[known[id(p)]][0].requires_grad_() for p in chosen]
    return point, mine


def _gradient(
    y: Tensor, x: list[Tensor], u: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``(∂y/∂x)ᵀ u``, which can be differentiated once more; u = 1 by default."""
    graph = {"create_graph": True, "materialize_grads": True}
    return torch.autograd.grad(y, x, u, **graph)


# %% 07_curvature_matrices sec-cm-operator 4 86a342a5
class Hessian(CurvatureOperator):
    """The Hessian of the loss, ``∇² L``.

    Args:
        model, loss, data, params, cache: See ``CurvatureOperator``.

    Raises:
        TypeError, ValueError: See ``CurvatureOperator``.

    Source: Pearlmutter (1994), doi 10.1162/neco.1994.6.1.147. Chapter 07,
    eq-cm-hvp.
    """

    def _term(self, i: int, X: Any, y: Any) -> Callable[[Tensor], Tensor]:
        with torch.enable_grad():
            L = self._share(y) * self._scalar(self._outputs(X), y)
            slope = _gradient(L, self._params)

        def product(v: Tensor) -> Tensor:
            return self.join(pull(slope, self._params, self.split(v)))

        return product


# %% 07_curvature_matrices sec-cm-ggn 1 66ed0468
class Jacobian:
    """The Jacobian J of outputs in parameters, as two products.

    The outputs' graph is used again and again: neither product evaluates
    the model. ``Jᵀu`` is a backward pass. It is linear in u, so a backward
    pass through *it*, from v to u, is ``J v``.

    Args:
        f: Outputs with a graph, of any shape.
        params: The parameters, leaves of that graph.

    Raises:
        ValueError: The outputs do not depend on the parameters.

    Source: chapter 07, eq-cm-jvp.
    """

    def __init__(self, f: Tensor, params: list[Tensor]) -> None:
        if not f.requires_grad:
            raise ValueError(
                "the outputs do not depend on the parameters, or were "
                "computed without gradients; leave no_grad and detach out"
            )
        self.f, self.params = f, params
        self.u = torch.zeros_like(f, requires_grad=True)
        self.JTu = _gradient(f, params, self.u)

    def jvp(self, v: Iterable[Tensor]) -> Tensor:
        """``J v``, in the shape of the outputs."""
        return pull(self.JTu, [self.u], v)[0]

    def vjp(self, u: Tensor) -> tuple[Tensor, ...]:
        """``Jᵀ u``, in the shapes of the parameters."""
        return pull([self.f], self.params, [u])


# %% 07_curvature_matrices sec-cm-ggn 2 48448ba9
class OutputCurvature(CurvatureOperator):
    """A curvature matrix ``Jᵀ B J``: B acts on the model's outputs.

    The product is a walk: to the outputs, ``J v``; through B, which knows
    the loss but no parameters; and back.

    Args:
        model, loss, data, params, cache: See ``CurvatureOperator``.

    Raises:
        TypeError, ValueError: See ``CurvatureOperator``.

    Source: Schraudolph (2002), doi 10.1162/08997660260028683. Chapter 07,
    eq-cm-split.
    """

    def _term(self, i: int, X: Any, y: Any) -> Callable[[Tensor], Tensor]:
        with torch.enable_grad():
            J = Jacobian(self._rows(self._outputs(X)), self._params)
        B = self._middle(i, J.f.detach(), y)

        def product(v: Tensor) -> Tensor:
            return self.join(J.vjp(B(J.jvp(self.split(v)))))

        return product

    def _rows(self, f: Tensor) -> Tensor:
        """The outputs in the shape that ``_middle`` wants."""
        return f

    @abstractmethod
    def _middle(self, i: int, f: Tensor, y: Any) -> Callable[[Tensor], Tensor]:
        """``u → B u`` for batch ``i`` with outputs ``f``."""


# %% 07_curvature_matrices sec-cm-ggn 3 20353657
class GGN(OutputCurvature):
    """The generalised Gauss–Newton matrix, ``Jᵀ (∇²_f L) J``.

    What is left of the Hessian when the model is replaced by its tangent:
    positive semi-definite whenever the loss is convex in the outputs.

    Args:
        model, loss, data, params, cache: See ``CurvatureOperator``.

    Raises:
        TypeError, ValueError: See ``CurvatureOperator``.

    Source: Schraudolph (2002), doi 10.1162/08997660260028683. Chapter 07,
    eq-cm-split.
    """

    def _middle(self, i: int, f: Tensor, y: Any) -> Callable[[Tensor], Tensor]:
        f.requires_grad_()
        with torch.enable_grad():
            slope = _gradient(self._share(y) * self._scalar(f, y), [f])
        return lambda u: pull(slope, [f], [u])[0]


# %% 07_curvature_matrices sec-cm-fisher 3 9052e55e
def _likelihood_of(loss: Any) -> tuple[Likelihood, float, bool]:
    """A loss module's likelihood, a factor, and whether it divides by C."""
    mean = getattr(loss, "reduction", None) == "mean"
    plain = getattr(loss, "weight", None) is None
    plain &= getattr(loss, "pos_weight", None) is None
    plain &= not getattr(loss, "label_smoothing", 0)
    if plain and type(loss) is nn.CrossEntropyLoss:
        return LIKELIHOODS["categorical"], 1.0, False
    if type(loss) is nn.MSELoss:  # 2/C times ½‖f − y‖²
        return LIKELIHOODS["gaussian"], 2.0, mean
    if plain and type(loss) is nn.BCEWithLogitsLoss:
        return LIKELIHOODS["bernoulli"], 1.0, mean
    check_choice("likelihood", loss, LIKELIHOODS)
    return LIKELIHOODS[loss], 1.0, False


# %% 07_curvature_matrices sec-cm-fisher 4 8e62f2b4
class Fisher(OutputCurvature):
    """The Fisher information, ``E_y[∇log p · ∇log pᵀ]``, y from the model.

    ``B = E[s sᵀ]`` in each example, with ``s = −∇_f log p(y | f)``: exactly
    (type-2), or as a mean over drawn labels (Monte Carlo). The targets of
    the data are not looked at, but for their number; those that a loss
    would ignore (``ignore_index``) count like all others.

    Args:
        model, data, params, cache: See ``CurvatureOperator``.
        likelihood: ``"categorical"``, ``"gaussian"`` or ``"bernoulli"``
            (see ``Likelihood``, the mean over examples); or
            ``nn.CrossEntropyLoss``, ``nn.MSELoss`` or
            ``nn.BCEWithLogitsLoss``, whose scale is then kept: with C
            outputs, MSE's "mean" is 2/C times the Gaussian, binary
            cross-entropy's 1/C times the Bernoulli.
        samples: Labels drawn for each example, once for all products; at
            least 1. Default ``None``: the exact expectation.
        generator: For the draws, on the model's device. Default: torch's.

    Raises:
        TypeError: See ``CurvatureOperator``; ``samples`` is no integer.
        ValueError: See ``CurvatureOperator``; an unknown likelihood, or a
            loss with class weights or smoothing; ``samples`` below 1; at
            the first product, classes that are not on axis 1.

    Source: Amari (1998), doi 10.1162/089976698300017746; Martens (2020),
    arXiv 1412.1193. Chapter 07, eq-cm-fisher.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        data: Any,
        samples: int | None = None,
        *,
        generator: torch.Generator | None = None,
        params: Iterable[nn.Parameter] | None = None,
        cache: bool | None = None,
    ) -> None:
        check_range("samples", samples, "[1, inf) int | None")
        self.likelihood, *self._scale = _likelihood_of(likelihood)
        loss = likelihood if callable(likelihood) else self.likelihood.loss
        super().__init__(model, loss, data, params=params, cache=cache)
        self.samples, self.generator = samples, generator
        self._drawn: dict[int, list[Tensor]] = {}

    def _rows(self, f: Tensor) -> Tensor:
        return self.likelihood.rows(f)

    # %% 07_curvature_matrices sec-cm-fisher 5 80812eba
    def _middle(self, i: int, f: Tensor, y: Any) -> Callable[[Tensor], Tensor]:
        c = self._weight(f, y)
        if self.samples is None:
            exact = self.likelihood.fisher(f)
            return lambda u: c * exact(u)
        s = self._draws(i, f)  # (samples, examples, outputs)
        c = c / self.samples
        return lambda u: c * (s * (s * u).sum(-1, keepdim=True)).sum(0)

    # %% 07_curvature_matrices sec-cm-fisher 6 097267cf
    def _weight(self, f: Tensor, y: Any) -> float:
        """The weight of one row of outputs in the whole."""
        labels = self.likelihood is LIKELIHOODS["categorical"]
        if labels and not y.is_floating_point() and y.numel() != len(f):
            raise ValueError(
                f"{y.numel()} targets do not fit {len(f)} predictions of "
                f"{f.shape[1]} classes; the model's outputs need the classes "
                "on axis 1: use movedim(-1, 1), or flatten the other axes"
            )
        factor, per_output = self._scale
        c = factor * self._share(y) / (len(f) if self._mean else 1)
        return c / f.shape[-1] if per_output else c


    def _draws(self, i: int, f: Tensor) -> Tensor:
        """Scores of drawn labels, the same for all products."""
        if i not in self._drawn:
            draw = partial(self.likelihood.score, f, self.generator)
            self._drawn[i] = [draw() for _ in range(self.samples)]
        return torch.stack(self._drawn[i])


# %% 07_curvature_matrices sec-cm-empirical 1 48f2fbfe
class EmpiricalFisher(OutputCurvature):
    """``(1/n) Σ gᵢ gᵢᵀ`` of the gradients on the data's own targets.

    An example is what lies at one index of the outputs' first axis, and
    its loss must depend on its own outputs alone. Gradients are those of
    the loss as it is scaled.

    Args:
        model, loss, data, params, cache: See ``CurvatureOperator``.

    Raises:
        TypeError, ValueError: See ``CurvatureOperator``.

    Source: Kunstner et al. (2019), arXiv 1905.12558. Chapter 07,
    eq-cm-empirical-ls.
    """

    def _middle(self, i: int, f: Tensor, y: Any) -> Callable[[Tensor], Tensor]:
        f.requires_grad_()
        with torch.enable_grad():
            (s,) = torch.autograd.grad(self._scalar(f, y), f)
        s = s.flatten(1) if f.ndim > 1 else s[:, None]
        c = self._share(y) * len(f) if self._mean else 1.0

        def product(u: Tensor) -> Tensor:
            inner = (s * u.reshape(s.shape)).sum(-1, keepdim=True)
            return (c * s * inner).reshape(u.shape)

        return product


# %% 07_curvature_matrices sec-cm-natural 1 94846100
class NaturalGradient(VectorOptimizer):
    """Natural gradient: steepest descent where distance is KL divergence.

    With F the Fisher matrix on the closure's batch and g its gradient::

        Δ ← −lr · (F + damping · I)⁻¹ g        (conjugate gradients)
        x ← x + min(1, √(max_kl / ½ΔᵀF Δ)) · Δ  (trust region)

    F is exact (type-2) and never formed: a product costs about two
    backward passes. With a Gaussian this is Gauss–Newton.

    Args:
        model: The network; the parameters that are not frozen are trained.
        likelihood: What its outputs mean: ``"categorical"`` (logits, classes
            on axis 1), ``"gaussian"`` (unit variance) or ``"bernoulli"``
            (logits). The loss should be that of ``LIKELIHOODS``, the mean
            over the batch; a multiple of it multiplies lr (``nn.MSELoss``
            of C outputs: 2/C). Ignored targets count in F.
        lr: Share η of the step that is taken, in [0, ∞). Default 1.
        damping: λ, in the units of F, in [0, ∞). Default 0.01.
        max_kl: Largest KL divergence that a step may cause, by its second
            order, in nats an example, in (0, ∞]. Default 0.1.
        iterations: Most products a step, at least 1. Default 50.
        tol: Conjugate gradients stop when the residual has this share of
            the gradient's norm, in [0, 1). Default 0.01.
        **options: ``maximize`` and ``nonfinite``, see ``Options``.

    Its closure returns the loss and does not call ``backward``. The model's
    outputs are taken from a forward hook while the closure runs; several
    calls count as one batch. ``.grad`` is neither read nor written. Each
    iteration of conjugate gradients reads two numbers back to the host.

    Raises:
        TypeError: ``model`` is no module; outputs that are not one tensor.
        ValueError: An argument outside its range; a closure that does not call
            the model; at the first step, a loss that is no loss of classes on
            axis 1, for ``"categorical"``.
        See ``VectorOptimizer.step`` for the others.

    Source: Amari (1998), doi 10.1162/089976698300017746; Martens (2010),
    ICML. Chapter 07, eq-cm-natural-step.
    """

    differentiates = True
    compares = twice = False
    _checked = False
    ranges = {
        "damping": "[0, inf)",
        "max_kl": "(0, inf]",
        "iterations": "[1, inf) int",
        "tol": "[0, 1)",
    }

    def __init__(
        self, model: nn.Module, likelihood: str = "categorical",
        lr: float | Tensor = 1.0, damping: float = 1e-2, max_kl: float = 0.1,
        iterations: int = 50, tol: float = 0.01, **options: Unpack[Options],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} is no module; pass an nn.Module")
        defaults = {
            "lr": lr, "likelihood": likelihood, "damping": damping,
            "max_kl": max_kl, "iterations": iterations, "tol": tol,
        }
        options = {"nonfinite": "propagate", **options}
        super().__init__(model.parameters(), defaults, **options)
        self.model = model

    # %% 07_curvature_matrices sec-cm-natural 2 ffc8985e
    def search(
        self, objective: Objective, f: float, g: Tensor, group: dict, state: dict
    ) -> Tensor:
        g, F = self._metric(objective, g, group)
        d, _, _ = truncated_cg(
            lambda v: F(v) + group["damping"] * v,
            g,
            tol=group["tol"] * g.norm(),
            limit=group["iterations"],
        )
        step = float(group["lr"]) * d
        kl = (step @ F(step) / 2).clamp(min=0)
        state["n_iter"] += 1
        return objective.x + (group["max_kl"] / kl).sqrt().clamp(max=1) * step

    # %% 07_curvature_matrices sec-cm-natural 3 7f47e0ee
    def _metric(
        self, objective: Objective, g: Tensor, group: dict
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The gradient, and the Fisher matrix where it was taken."""
        if not self.outputs:
            raise ValueError(
                "the closure did not call the model with gradients on; "
                "compute the loss with the model given to NaturalGradient"
            )
        if group["likelihood"] == "categorical" and not self._checked:
            self._check_classes()
        kind = LIKELIHOODS[group["likelihood"]]
        return g.to(wide(g.dtype)), self._fisher(objective.params, kind)


    def _fisher(
        self, params: list[Tensor], kind: Likelihood
    ) -> Callable[[Tensor], Tensor]:
        """``v → F v`` on the outputs of the closure's calls."""
        with torch.enable_grad():
            rows = [kind.rows(f) for f in self.outputs]
            parts = [(Jacobian(f, params), kind.fisher(f.detach())) for f in rows]

        def product(v: Tensor) -> Tensor:
            vs = [x.to(p.dtype) for x, p in zip(unflat(v, params), params, strict=True)]
            Fv = sum(flat(J.vjp(B(J.jvp(vs)))).to(v.dtype) for J, B in parts)
            return Fv / sum(len(f) for f in rows)

        return product


    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:
        """Take one step, with an eye on the model's outputs.

        Args:
            closure: Computes the loss with the model and returns it. It does
                not call ``backward``.

        Returns:
            The loss before the step.
        """
        self.outputs: list[Tensor] = []
        self.slopes: dict[int, Tensor] = {}
        hook = self.model.register_forward_hook(self._keep)
        try:  # only this attention kernel can be differentiated twice
            with sdpa_kernel(SDPBackend.MATH):
                return super(NaturalGradient, self).step(closure)
        finally:
            hook.remove()
            del self.outputs, self.slopes


    def _keep(self, module: nn.Module, args: Any, f: Any) -> None:
        """Note an output of the model, and later the loss's gradient there."""
        if not isinstance(f, Tensor):
            raise TypeError(
                f"the model returned a {type(f).__name__}; "
                "NaturalGradient needs one tensor of outputs"
            )
        if f.requires_grad:
            f.register_hook(partial(self.slopes.__setitem__, len(self.outputs)))
            self.outputs.append(f)


    def _check_classes(self) -> None:
        """A loss of softmax(f) does not feel a shift of f: Σ ∂L/∂f = 0."""
        for k, s in self.slopes.items():
            if s.ndim > 1 and s.sum(1).abs().sum() > 0.1 * s.abs().sum():
                raise ValueError(
                    "likelihood='categorical' does not fit the closure's loss of "
                    f"outputs of shape {tuple(self.outputs[k].shape)}: it needs "
                    "logits with the classes on axis 1; use movedim(-1, 1) "
                    "in the model, or another likelihood"
                )
        self._checked = True


    def _check_group(self, group: dict[str, Any]) -> None:
        super(NaturalGradient, self)._check_group(group)
        check_choice("likelihood", group["likelihood"], LIKELIHOODS)


# %% 07_curvature_matrices sec-cm-trace 1 c4526833
class Estimate(NamedTuple):
    """A random estimate and its standard error."""

    value: Tensor
    """The estimate."""
    error: Tensor
    """One standard deviation of it, estimated from the probes."""


def rademacher(
    A: Any, samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """Random signs, −1 or 1 with probability one half.

    Args:
        A: The matrix that they will probe, ``(P, P)``: a ``LinearOperator``
            or a tensor. They have its dtype and device.
        samples: Number of columns.
        generator: On the matrix's device. Default: torch's.

    Returns:
        Columns ``(P, samples)``.

    Source: Hutchinson (1989), doi 10.1080/03610918908812806. Chapter 07,
    eq-cm-hutchinson.
    """
    bits = torch.empty(A.shape[0], samples, dtype=A.dtype, device=A.device)
    return bits.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _mean(x: Tensor) -> Estimate:
    return Estimate(x.mean(-1), x.std(-1) / x.shape[-1] ** 0.5)


# %% 07_curvature_matrices sec-cm-trace 2 07f31528
def hutchinson_trace(
    A: Any, samples: int = 100, *, generator: torch.Generator | None = None
) -> Estimate:
    """The trace as the mean of ``zᵀA z`` over random signs z.

    Args:
        A: A ``LinearOperator`` or a symmetric tensor, ``(P, P)``.
        samples: Number of probes, each one product; at least 2.
        generator: On the matrix's device. Default: torch's.

    Raises:
        TypeError, ValueError: ``samples`` is no integer of at least 2.

    Source: Hutchinson (1989), doi 10.1080/03610918908812806. Chapter 07,
    eq-cm-hutchinson.
    """
    check_range("samples", samples, "[2, inf) int")
    Z = rademacher(A, samples, generator)
    return _mean((Z * (A @ Z)).sum(0))


def hutchinson_diagonal(
    A: Any, samples: int = 100, *, generator: torch.Generator | None = None
) -> Estimate:
    """The diagonal as the mean of ``z ∘ A z`` over random signs z.

    Args:
        A: A ``LinearOperator`` or a symmetric tensor, ``(P, P)``.
        samples: Number of probes, each one product; at least 2.
        generator: On the matrix's device. Default: torch's.

    Raises:
        TypeError, ValueError: ``samples`` is no integer of at least 2.

    Source: Bekas et al. (2007), doi 10.1016/j.apnum.2007.01.003. Chapter
    07, eq-cm-diagonal.
    """
    check_range("samples", samples, "[2, inf) int")
    Z = rademacher(A, samples, generator)
    return _mean(Z * (A @ Z))


# %% 07_curvature_matrices sec-cm-trace 3 b5d90894
def hutchpp_trace(
    A: Any, products: int = 99, *, generator: torch.Generator | None = None
) -> Estimate:
    """The trace by Hutch++: exactly on a random subspace, probed beside it.

    A third of the products finds the range of A, a third its trace there,
    and a third probes what is left. Exact if A has no larger rank.

    Args:
        A: A ``LinearOperator`` or a symmetric tensor, ``(P, P)``.
        products: Number of products with A, at least 6.
        generator: On the matrix's device. Default: torch's.

    Raises:
        TypeError, ValueError: ``products`` is no integer of at least 6.

    Source: Meyer et al. (2021), arXiv 2010.09649. Chapter 07,
    eq-cm-hutchpp.
    """
    check_range("products", products, "[6, inf) int")
    k = products // 3
    Q, _ = torch.linalg.qr(A @ rademacher(A, k, generator))
    Z = rademacher(A, products - 2 * k, generator)
    Z = Z - Q @ (Q.T @ Z)
    rest = _mean((Z * (A @ Z)).sum(0))
    return Estimate((Q * (A @ Q)).sum() + rest.value, rest.error)


# %% 07_curvature_matrices sec-cm-spectrum 1 768b2a7a
class Ritz(NamedTuple):
    """What Lanczos learns of a spectrum."""

    values: Tensor
    """Ritz values θ, ``(k,)``, ascending."""
    vectors: Tensor
    """Ritz vectors, orthonormal columns ``(P, k)``."""
    errors: Tensor
    """``‖A y − θ y‖``, ``(k,)``: an eigenvalue is that near."""
    weights: Tensor
    """Squared components of the start in the Ritz vectors, ``(k,)``."""


def _tridiagonal(alpha: list[Tensor], beta: list[Tensor]) -> tuple[Tensor, Tensor]:
    a, b = torch.stack(alpha), torch.stack(beta)[:-1]
    T = torch.diag(a) + torch.diag(b, 1) + torch.diag(b, -1)
    return torch.linalg.eigh(T)


def _first(A: Any, start: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """The first Lanczos vector, of length one."""
    n = A.shape[0]
    if start is None:
        start = torch.empty(n, dtype=A.dtype, device=A.device)
        start.normal_(generator=generator)
    length = start.norm()
    if start.shape != (n,) or not 0 < length < torch.inf:
        raise ValueError(
            f"start has shape {tuple(start.shape)} and norm {length:g}; pass "
            f"a finite vector of shape ({n},) that is not zero"
        )
    return start / length


# %% 07_curvature_matrices sec-cm-spectrum 2 ccbdd38a
def lanczos(
    A: Any,
    steps: int,
    *,
    start: Tensor | None = None,
    top: int = 0,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Ritz:
    """Eigenvalues from products, the extreme ones first.

    Lanczos with full reorthogonalisation. It takes the memory of ``steps``
    vectors at once. It ends early when the Krylov space is invariant. Two
    numbers are read back to the host in each step, more under ``top``.

    Args:
        A: A ``LinearOperator`` or a symmetric tensor, ``(P, P)``.
        steps: Number of products, at least 1; more than P are not used.
        start: First vector ``(P,)``, not zero. Default: a Gaussian one.
        top: End early when the errors of the ``top`` largest Ritz values
            are below ``tol`` times the largest absolute one. Default 0:
            never.
        tol: See ``top``; in (0, ∞). Default 1e-6.
        generator: On the matrix's device. Default: torch's.

    Returns:
        Ritz values and vectors, errors and weights.

    Raises:
        TypeError, ValueError: ``steps`` is no integer of at least 1, ``tol`` not
            positive, or ``start`` of the wrong shape or without a direction.

    Source: Lanczos (1950), doi 10.6028/jres.045.026. Chapter 07,
    eq-cm-lanczos.
    """
    check_range("steps", steps, "[1, inf) int")
    check_range("tol", tol, "(0, inf)")
    first = _first(A, start, generator)
    V = first.new_empty(min(steps, len(first)), len(first))
    V[0] = first
    alpha, beta, largest = [], [], 0.0
    for k in range(1, len(V) + 1):
        v, seen = V[k - 1], V[:k]
        w = A @ v
        alpha.append(w @ v)
        for _ in range(2):  # once is not enough
            w = w - seen.T @ (seen @ w)
        beta.append(w.norm())
        rest = float(beta[-1])
        largest = max(largest, float(alpha[-1].abs()), rest)
        if k == len(V) or rest <= 10 * torch.finfo(A.dtype).eps * largest:
            break
        if top and k >= top:
            theta, S = _tridiagonal(alpha, beta)
            error = (beta[-1] * S[-1].abs())[-top:].max()
            if error <= tol * theta.abs().max():
                break
        V[k] = w / beta[-1]
    theta, S = _tridiagonal(alpha, beta)
    errors = beta[-1] * S[-1].abs()
    return Ritz(theta, V[:k].T @ S, errors, S[0].square())


# %% 07_curvature_matrices sec-cm-spectrum 3 c22ea8b9
def spectral_density(
    A: Any,
    grid: Tensor,
    *,
    width: float,
    steps: int = 60,
    probes: int = 4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The density of the eigenvalues, each a Gaussian bump.

    The mean over random starts of the Ritz values' weighted bumps
    (stochastic Lanczos quadrature). It integrates to one.

    Args:
        A: A ``LinearOperator`` or a symmetric tensor, ``(P, P)``.
        grid: Where to evaluate it, of any shape.
        width: Standard deviation of a bump, in units of eigenvalues; in
            (0, ∞).
        steps: Lanczos steps for each start. Default 60.
        probes: Number of starts, at least 1. Default 4.
        generator: On the matrix's device. Default: torch's.

    Returns:
        The density, of the grid's shape.

    Raises:
        TypeError, ValueError: An argument outside its range, or of another kind.

    Source: Ubaru et al. (2017), doi 10.1137/16M1104974; Ghorbani et al.
    (2019), arXiv 1901.10159. Chapter 07, eq-cm-quadrature.
    """
    check_range("width", width, "(0, inf)")
    check_range("probes", probes, "[1, inf) int")
    total = torch.zeros_like(grid)
    for _ in range(probes):
        ritz = lanczos(A, steps, generator=generator)
        z = (grid[..., None] - ritz.values.to(grid)) / width
        total += (-z.square() / 2).exp() @ ritz.weights.to(grid)
    return total / (probes * width * (2 * torch.pi) ** 0.5)
