# Generated from chapters/09_diagonal_curvature.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 7008bad7
"""Chapter 09, Diagonal curvature."""

__all__ = [
    "AdaHessian",
    "Diagonal",
    "DiagonalOptimizer",
    "Sophia",
]


# %% 09_diagonal_curvature sec-dc-machinery 1 792dc1c4
from collections.abc import Callable, Iterator
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, distributed, nn

from guided_descent.capture import _SAMPLING, Capture, LikelihoodType
from guided_descent.capture import _mapped, _Root, _RootTap
from guided_descent.core import Names, Optimizer, Options
from guided_descent.core import check_choice, known, wide

#: Parameters with a number for each of their entries.
Diagonal = dict[Tensor, Tensor]


class DiagonalOptimizer(Optimizer):
    """What AdaHessian and Sophia share: estimates of the Hessian's diagonal.

    A subclass has a rule, a state named in ``precise`` that remembers
    estimates, and ``learn``, which moves that state. Estimates are made once
    in ``hessian_update_every`` steps.

    ``estimator="hutchinson"`` differentiates twice: ``step`` takes a closure
    that returns the loss and does not call ``backward``. The loss of several
    batches is their sum. ``.grad`` is not touched. On several processes,
    gradients and products are averaged here, over ``process_group``.

    ``estimator="gnb"`` watches ``model``. In a step that is due, labels are
    drawn from its output, and their gradients ride ahead of the user's own
    ``backward``. Batches add up until the step, and only rows count whose
    loss has a gradient: ignored labels do not.

    Args:
        params: Parameters or groups of them, as in ``torch.optim``.
        defaults: The method's hyperparameters, among them
            ``hessian_update_every`` and ``samples``.
        estimator: ``"hutchinson"`` or ``"gnb"``.
        seed: Of probes and labels; they follow from it and the step.
        model: The module to watch, for ``"gnb"``.
        process_group: Processes that train together. ``None``: those of
            ``DistributedDataParallel``, or all.
        **options: ``likelihood``, ``output`` and ``class_dim``, see
            ``Capture``; ``reduction``, see ``Sophia``; and ``Options``.

    Source: chapter 09.
    """

    ranges = {
        "hessian_update_every": "[1, inf) int",
        "samples": "[1, inf) int",
        "seed": "[0, 2147483648) int",
    }
    needs_closure = differentiates = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        estimator: str = "hutchinson",
        model: nn.Module | None = None,
        likelihood: LikelihoodType = "categorical",
        reduction: str = "mean",
        output: Callable[[Any], Tensor] | None = None,
        class_dim: int | None = None,
        process_group: Any = None,
        **options: Unpack[Options],
    ) -> None:
        kind = type(self).__name__
        check_choice("estimator", estimator, ("hutchinson", "gnb"))
        check_choice("reduction", reduction, ("mean", "examples", "sum"))
        if (estimator == "gnb") != isinstance(model, nn.Module):
            raise ValueError(
                f"{kind}(estimator={estimator!r}, model={type(model).__name__}): "
                "pass model= with estimator='gnb', and only with it"
            )
        self.estimator, self.reduction = estimator, reduction
        self.needs_closure = self.differentiates = estimator == "hutchinson"
        self.process_group = process_group
        self.found: Diagonal = {}
        options.setdefault("nonfinite", "skip")
        super().__init__(params, {**defaults, "steps": 0}, **options)
        self.capture: Capture | None = None
        if model is not None:
            self.capture = _Drawing(
                model,
                consume=self._draw,
                likelihood=likelihood,
                samples=self._own[0]["samples"],
                parameters=[],
                output=output,
                class_dim=class_dim,
            )
            self.capture.entered = self._enter
        self._forget_passes()

    # %% 09_diagonal_curvature sec-dc-machinery 2 398f73ab
    @staticmethod
    def learn(x: Tensor, e: Tensor, h: Names) -> None:
        """Move what is remembered, x, by an estimate e."""
        raise NotImplementedError("a subclass says what it remembers")


    @property
    def _own(self) -> list[dict[str, Any]]:
        """The groups that no other algorithm steps."""
        return [group for group in self.param_groups if "algorithm" not in group]


    @staticmethod
    def _is_due(group: dict[str, Any]) -> bool:
        return group["steps"] % group["hessian_update_every"] == 0


    @property
    def due(self) -> bool:
        """Whether the next step makes an estimate."""
        return any(map(self._is_due, self._own))


    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss and returns it.
                Needed for ``estimator="hutchinson"``, where it does not call
                ``backward``; otherwise optional, and it does.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            TypeError: There is no closure where one is needed, or no loss.
            RuntimeError: The closure called ``backward`` where it should not;
                or the model was not called before a step that is due.
            ValueError, FloatingPointError: As in ``Optimizer``.
            Nothing has changed then.
        """
        if self.estimator == "gnb":
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            try:
                self.found = self._drawn()
                super(DiagonalOptimizer, self).step()
            finally:
                self.found = {}
            self._forget_passes()
            return loss
        if closure is None:
            raise TypeError(
                f"{type(self).__name__} differentiates the loss twice; use step(closure) "
                "with a function that returns the loss and does not call backward(), or, "
                "in a loop that is not yours, Sophia(…, estimator='gnb', model=model)"
            )
        with torch.enable_grad():
            loss = closure()
        params = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        given = [p.grad for p in params]
        try:
            for p, g in zip(params, self._probed(loss, params), strict=True):
                p.grad = g
            super(DiagonalOptimizer, self).step()
        finally:
            self.found = {}
            for p, g in zip(params, given, strict=True):
                p.grad = g
        return loss.detach()


    def directions(self, work: Any, finite: Tensor | None) -> Diagonal:
        """No other directions; but estimates are learnt before the rule needs them."""
        go = known(finite)
        for group, params in work:
            if "algorithm" in group or go is False and group["nonfinite"] == "skip":
                continue
            h = Names(**group)
            keep = finite if go is None and group["nonfinite"] == "skip" else None
            for p in params if self._is_due(group) else ():
                x = self.state[p].get(self.precise[0])
                if x is not None:
                    new = x.clone()
                    self.learn(new, self.found[p].to(x), h)
                    x.copy_(new if keep is None else torch.where(keep.to(x.device), new, x))
                elif keep is not None:
                    self.found[p] = torch.where(keep.to(p.device), self.found[p], 0)
            group["steps"] += 1
        return {}


    def examined(self, work: Any) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Gradients and estimates."""
        yield from super(DiagonalOptimizer, self).examined(work)
        for group, params in work:
            for p in params:
                if p in self.found:
                    what = f"the Hessian estimate of a parameter of shape {tuple(p.shape)}"
                    yield group, what, self.found[p]


    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse what cannot be differentiated here, too."""
        super(DiagonalOptimizer, self)._check_group(group)
        for x in group["params"]:
            p = x[1] if isinstance(x, tuple) else x
            if isinstance(p, Tensor) and (p.is_complex() or hasattr(p, "placements")):
                why = "complex" if p.is_complex() else "sharded over processes"
                raise ValueError(
                    f"{type(self).__name__} got a parameter of shape {tuple(p.shape)} that "
                    f"is {why}; use AdamW for it"
                )


    def _generator(self, device: torch.device, rank: int = 0) -> torch.Generator:
        """What the step draws from: the same after a checkpoint."""
        group = self._own[0]
        seed = 2654435761 * group["seed"] + 1640531527 * rank + group["steps"]
        return torch.Generator(device).manual_seed(seed % 2**32)


    def _sum(self, tensors: list[Tensor]) -> int:
        """Sum over processes, in place; returns how many there are."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1
        group = self.process_group or getattr(self.capture, "process_group", None)
        count = distributed.get_world_size(group)
        for x in tensors if count > 1 else ():
            distributed.all_reduce(x, group=group)
        return count

    # %% 09_diagonal_curvature sec-dc-machinery 3 0f958bb5
    def _probed(self, loss: Any, params: list[Tensor]) -> list[Tensor | None]:
        """Gradients; and, in a step that is due, estimates into ``found``."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"the closure returned {type(loss).__name__}, not a loss; let it return "
                "a tensor with one element"
            )
        if not loss.requires_grad:
            raise RuntimeError(
                "the closure's loss does not depend on the parameters; let it return "
                "the loss itself, not a detached copy or .item()"
            )
        found: Diagonal = {}
        with torch.enable_grad():
            try:
                grads = torch.autograd.grad(
                    loss,
                    params,
                    torch.ones_like(loss),
                    create_graph=self.due,
                    allow_unused=True,
                )
                if self.due:
                    found = self._products(grads, params)
            except RuntimeError as error:
                if "second time" in str(error):
                    raise RuntimeError(
                        "the closure called backward(), which frees the graph that further "
                        "derivatives need; let it return the loss and not call backward()"
                    ) from error
                if "double backward" in str(error):
                    raise RuntimeError(
                        f"no second derivative: {error}; call the model itself in the "
                        "closure, not a compiled one"
                    ) from error
                if "is not implemented" in str(error):
                    raise RuntimeError(
                        f"no second derivative: {error}; use operations that have one "
                        "(attention: run the closure's forward pass under "
                        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
                    ) from error
                raise
        made = [None if g is None else g.detach() for g in grads]
        every = [*(g for g in made if g is not None), *found.values()]
        count = self._sum(every)
        for x in every if count > 1 else ():
            x.div_(count)
        climbing = [p for g in self._own if g["maximize"] for p in g["params"]]
        for p in climbing:
            if p in found:
                found[p] = -found[p]
        self.found = found
        return made


    def _products(self, grads: Any, params: list[Tensor]) -> Diagonal:
        """The mean of z ⊙ Hz over probes z of random signs."""
        samples, drawn = self._own[0]["samples"], {}
        found = {p: torch.zeros_like(p, dtype=wide(p.dtype)) for p in params}
        pairs = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        for _ in range(samples if pairs else 0):
            signs = []
            for p in params:
                if p.device not in drawn:
                    drawn[p.device] = self._generator(p.device)
                bits = torch.empty_like(p).bernoulli_(0.5, generator=drawn[p.device])
                signs.append(bits.mul_(2).sub_(1))
            products = torch.autograd.grad(
                [g for _, g in pairs],
                params,
                [signs[i] for i, _ in pairs],
                retain_graph=True,
                allow_unused=True,
            )
            for p, z, Hz in zip(params, signs, products, strict=True):
                if Hz is not None:
                    found[p] += (z * Hz).detach() / samples
        return found

    # %% 09_diagonal_curvature sec-dc-machinery 4 f006c61a
    def _draw(self, at: Any, edge: Any, f: Tensor, g: Tensor) -> None:
        """Send gradients of a loss with drawn labels from the output f to the weights.

        Args:
            at: The pass.
            edge: Where the output is in the graph.
            f: The output.
            g: The gradient of the user's loss by it.
        """
        capture = self.capture
        flat = callable(capture.likelihood) or f.ndim < 2
        axis = 1 if flat else capture._axis(f)
        shape = (len(f), -1) if flat else f.shape
        if not self.passes:
            several = distributed.is_available() and distributed.is_initialized()
            rank = distributed.get_rank() if several else 0
            capture.generator = self._generator(f.device, rank)
        due = [group for group in self._own if self._is_due(group)]
        params = [p for group in due for p in group["params"] if p.requires_grad]
        outer, _SAMPLING[capture.model] = _SAMPLING.get(capture.model), at
        try:
            for k, v in enumerate(capture.cotangents(f)):
                v = v.reshape(shape)
                seen = (g.reshape(shape) != 0).any(axis, keepdim=True)
                counts = seen | (v == 0).all(axis, keepdim=True)
                found = torch.autograd.grad(
                    [edge],
                    params,
                    [(v * seen).view(f.shape)],
                    retain_graph=True,
                    allow_unused=True,
                )
                for p, S in zip(params, found, strict=True):
                    if S is not None:
                        S = S.to(wide(S.dtype))
                        sums = self.sums.setdefault(p, {})
                        sums[k] = sums[k] + S if k in sums else S
                self.rows = self.rows + (0 if k else counts.sum())
        finally:
            _SAMPLING.pop(capture.model)
            if outer is not None:
                _SAMPLING[capture.model] = outer
        self.examples, self.passes = self.examples + len(f), self.passes + 1


    def _drawn(self) -> Diagonal:
        """Estimates from the gradients of drawn labels, if the step is due."""
        due = [group for group in self._own if self._is_due(group)]
        params = [p for group in due for p in group["params"] if p.grad is not None]
        if not params:
            return {}
        if not self.passes:
            raise RuntimeError(
                f"{type(self).__name__} saw no backward pass through the model's output; "
                "call the model that was passed, as model(x), not a copy and not under a "
                "checkpoint of the whole, and differentiate a loss of its output"
            )
        samples, zero = self._own[0]["samples"], torch.zeros(())
        sums: dict[Tensor, list[Tensor]] = {}
        for p in params:
            mine = self.sums.get(p, {})
            every = [mine.get(k, zero.to(p)).expand_as(p) for k in range(samples)]
            sums[p] = [S.to(wide(p.dtype), copy=True) for S in every]
        rows = torch.as_tensor(self.rows, dtype=torch.float32).reshape(1).clone()
        examples = rows * 0 + self.examples
        several = self._sum([*(S for x in sums.values() for S in x), rows, examples]) > 1
        if several and self.reduction == "sum":
            raise RuntimeError(
                "reduction='sum' is not supported on several processes; let the loss be a "
                "mean over rows"
            )
        counts = {"mean": rows, "examples": examples, "sum": examples * 0 + 1}
        count = counts[self.reduction].clamp(min=1).squeeze()
        return {
            p: sum(S.square() for S in x) / count.to(p.device, wide(p.dtype))
            for p, x in sums.items()
        }


    def _enter(self) -> None:
        """Before a forward call: watch it? And forget passes whose gradients are gone."""
        self.capture.recording = self.due
        params = (p for group in self._own for p in group["params"])
        if self.passes and all(p.grad is None for p in params):
            self._forget_passes()


    def _forget_passes(self) -> None:
        #: Since the last step: sums of drawn gradients, and what they were sums of.
        self.sums: dict[Tensor, dict[int, Tensor]] = {}
        self.rows: Any = 0
        self.examples = self.passes = 0


    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and with them draws not yet used."""
        super(DiagonalOptimizer, self).zero_grad(set_to_none)
        self._forget_passes()


# %% 09_diagonal_curvature sec-dc-machinery 5 d9f42786
class _Drawing(Capture):
    """Hands over where the output is in the graph, when a gradient arrives there."""

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        at = self._stack.pop() if self._stack else None
        if at is None or at in self._stack or output is None or not self.recording:
            return None
        value = self._likelihood_of(output)
        if value is None:
            return None
        root = _Arrival(at, value)
        return _mapped(
            output,
            lambda y: _RootTap.apply(y, root, y is value) if y.requires_grad else y,
        )


class _Arrival(_Root):
    def begin(self, g: Tensor | None) -> None:
        """Now, with the gradient by the output; or when that arrives."""
        if self.output is None or _SAMPLING.get(self.at.capture.model) is not None:
            return  # what passes here is another's sample
        if g is not None:
            return self.draw(g)
        node, k = self.edge.node, self.edge.output_nr
        begun = self.output

        def late(grads: Any) -> None:
            handle.remove()
            if self.output is begun and grads[k] is not None:
                self.draw(grads[k])

        handle = node.register_prehook(late)

    @torch.no_grad()
    def draw(self, g: Tensor) -> None:
        output, self.output, capture = self.output, None, self.at.capture
        if output._version != self.version:
            raise RuntimeError(
                "the model's output was changed in place after the forward call, and "
                "its likelihood with it; use the operation that is not in place"
            )
        capture.examine(output, g)
        capture.consume(self.at, self.edge, output, g)


# %% 09_diagonal_curvature sec-dc-rows 1 2a2aa6dc
class AdaHessian(DiagonalOptimizer):
    """AdaHessian: Adam with Hessian-vector products in place of squared gradients.

    In a step that is due, z is a vector of random signs and ``e = z ⊙ Hz``::

        v ← v + (1−β₂)(e² − v)
        m ← m + (1−β₁)(g − m)
        x ← x − lr · m̂ / (v̂^{k/2} + eps)

    with Adam's corrections; that of v counts estimates. In the mean e² is the
    squared norm of a row of H, not its diagonal entry. Where a row is nearly zero,
    as under losses made of straight pieces, the step is ``lr/eps`` times the
    gradient: raise ``eps``, or set ``hessian_power=0.5``.

    The gradient is computed inside ``step``: ``clip_grad_norm_``, ``GradScaler``
    and compiled models do not go with it; autocast does.

    Args:
        params: Parameters or groups of them, as in ``torch.optim``.
        lr: Step size; 1 is Newton's where H is diagonal. In [0, ∞). Default 0.15.
        betas: β₁, β₂, each in [0, 1). Default (0.9, 0.999).
        eps: Added to the denominator, in units of curvature; in [0, ∞).
            Default 1e-4.
        hessian_power: k, in [0, 1]; 0.5 divides by a root, as Adam does.
            Default 1.
        weight_decay: Decoupled: ``x ← (1 − lr · weight_decay) x`` before the
            step; in [0, ∞). Default 0.
        hessian_update_every: Steps from one estimate to the next. Default 1.
        samples: Probes for each estimate, at least 1. Default 1.
        average_window: For tensors of more than two dimensions, average ``|e|``
            over the window of a convolution, as the official code does.
            Default ``True``.
        seed: Of the probes. Default 0.
        process_group: Processes that train together; ``None``: all.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Raises:
        TypeError: ``step`` without a closure; an argument of the wrong type.
        RuntimeError: The closure called ``backward``.
        ValueError: An argument outside its range; parameters that are sharded
            or complex.

    Source: Yao et al. (2021), arXiv 2006.00719. Chapter 09, eq-dc-rows and
    eq-dc-adahessian.
    """

    precise = ("exp_hessian_diag_sq",)
    clocks = ("step", "estimates")
    ranges = {**DiagonalOptimizer.ranges, "hessian_power": "[0, 1]"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        hessian_power: float = 1.0,
        weight_decay: float = 0.0,
        hessian_update_every: int = 1,
        samples: int = 1,
        average_window: bool = True,
        seed: int = 0,
        process_group: Any = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "hessian_power": hessian_power,
            "weight_decay": weight_decay,
            "hessian_update_every": hessian_update_every,
            "samples": samples,
            "average_window": average_window,
            "seed": seed,
        }
        super().__init__(params, defaults, process_group=process_group, **options)

    # %% 09_diagonal_curvature sec-dc-rows 2 f900ff62
    @staticmethod
    def learn(x: Tensor, e: Tensor, h: Any) -> None:
        if h.average_window and e.ndim > 2:
            window = tuple(range(2, e.ndim))
            e = e.abs().mean(window, keepdim=True).expand_as(x)
        x.mul_(h.betas[1]).addcmul_(e, e, value=1 - h.betas[1])


    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        if h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        m = s.exp_avg.lerp_(g, 1 - h.betas[0])
        size = (s.exp_hessian_diag_sq / h.correction2) ** (h.hessian_power / 2)
        p.addcdiv_(m, size.add_(h.eps), value=-h.step_size)

    # %% 09_diagonal_curvature sec-dc-rows 3 fd275464
    @staticmethod
    def clock(h: Any) -> None:
        """It stands still until there is an estimate. ``steps`` already counts this one."""
        due = (h.steps - 1) % h.hessian_update_every == 0
        h.estimates = h.estimates + due
        begun = 1.0 * (h.estimates > 0)
        h.correction2 = 1 - h.betas[1] ** h.estimates + (1 - begun)
        h.step_size = h.lr * begun / (1 - h.betas[0] ** h.step)


    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        x = torch.zeros_like(p, dtype=wide(p.dtype))
        if p in self.found:
            self.learn(x, self.found[p], h)
        clocks = {name: torch.zeros(()) for name in self.clocks}
        return {"exp_avg": torch.zeros_like(p), "exp_hessian_diag_sq": x, **clocks}


# %% 09_diagonal_curvature sec-dc-clip 1 88fcc9e6
class Sophia(DiagonalOptimizer):
    """Sophia: the momentum over the Hessian's diagonal, clipped entry by entry.

    In a step that is due, e is a new estimate of the diagonal::

        h ← h + (1−β₂)(e − h)
        m ← m + (1−β₁)(g − m)
        x ← x − lr · clip(m / max(ρ h, eps), ±1)

    without Adam's corrections. Where ρh is small or negative the step is that
    of Signum.

    With probes the gradient is computed inside ``step``: ``clip_grad_norm_``,
    ``GradScaler`` and compiled models do not go with them; autocast does. Drawn
    labels go with all of these. They are drawn from the model's own output, so a
    temperature or a factor belongs into the model, not between it and the loss;
    checkpoints inside the model need ``use_reentrant=False``.

    Args:
        params: Parameters or groups of them, as in ``torch.optim``.
        lr: Largest change of an entry in one step, in [0, ∞). Default 1e-4.
        betas: β₁, β₂, each in [0, 1). Default (0.965, 0.99).
        rho: ρ, which share of the entries is clipped: larger, fewer; in
            [0, ∞). Where nothing is clipped the step is ``lr/ρ`` times
            Newton's. Default 0.04.
        eps: Floor of ρh, in (0, ∞). Default 1e-12.
        weight_decay: Decoupled: ``x ← (1 − lr · weight_decay) x`` before the
            step; in [0, ∞). Default 0.1.
        estimator: ``"hutchinson"``: z ⊙ Hz for random signs z. ``step`` then
            takes a closure that returns the loss and does not call
            ``backward``. ``"gnb"``: the squared gradient of a loss whose
            labels the model draws, times the number of rows; it takes
            ``model``, and the usual loop.
        hessian_update_every: Steps from one estimate to the next. Default 10.
        samples: Probes or draws for each estimate, at least 1. Default 1.
        model: For ``"gnb"``, the module whose calls count.
        likelihood: For ``"gnb"``, what its output means: ``"categorical"``
            (logits; the default), ``"gaussian"``, ``"bernoulli"``, or a
            callable, see ``Capture``.
        reduction: For ``"gnb"``, what the loss is: a ``"mean"`` over rows
            whose loss counts (the default), a mean over ``"examples"`` of
            sums over their rows, or a ``"sum"``.
        output, class_dim: For ``"gnb"``, see ``Capture``.
        seed: Of probes and labels. Default 0.
        process_group: Processes that train together; ``None``: those of
            ``DistributedDataParallel``, or all.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Raises:
        TypeError: ``step`` without a closure where one is needed.
        RuntimeError: The closure called ``backward`` where it should not; the
            model was not called before a step that is due.
        ValueError: An argument outside its range; ``model`` without ``"gnb"``
            or the other way round; a loss that the likelihood does not fit;
            parameters that are sharded or complex.

    Source: Liu et al. (2024), arXiv 2305.14342. Chapter 09, eq-dc-sophia. The
    official code adds ``eps`` instead of taking a maximum, and leaves the
    number of rows to the caller.
    """

    precise = ("hessian",)
    ranges = {**DiagonalOptimizer.ranges, "rho": "[0, inf)", "eps": "(0, inf)"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        estimator: Literal["hutchinson", "gnb"] = "hutchinson",
        hessian_update_every: int = 10,
        samples: int = 1,
        model: nn.Module | None = None,
        likelihood: LikelihoodType = "categorical",
        reduction: Literal["mean", "examples", "sum"] = "mean",
        output: Callable[[Any], Tensor] | None = None,
        class_dim: int | None = None,
        seed: int = 0,
        process_group: Any = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_update_every": hessian_update_every,
            "samples": samples,
            "seed": seed,
        }
        super().__init__(
            params,
            defaults,
            estimator=estimator,
            model=model,
            likelihood=likelihood,
            reduction=reduction,
            output=output,
            class_dim=class_dim,
            process_group=process_group,
            **options,
        )

    # %% 09_diagonal_curvature sec-dc-clip 2 7dbe09fa
    @staticmethod
    def learn(x: Tensor, e: Tensor, h: Any) -> None:
        x.lerp_(e, 1 - h.betas[1])


    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        if h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        m = s.exp_avg.lerp_(g, 1 - h.betas[0])
        ratio = m / (h.rho * s.hessian).clamp_min_(h.eps)
        p.add_(ratio.clamp_min_(-1).clamp_max_(1), alpha=-h.lr)

    # %% 09_diagonal_curvature sec-dc-clip 3 c96cb31f
    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        x = torch.zeros_like(p, dtype=wide(p.dtype))
        if p in self.found:
            self.learn(x, self.found[p], h)
        return {"exp_avg": torch.zeros_like(p), "hessian": x}
