# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 5afc0e35
"""Chapter 23, The machinery."""

__all__ = [
    "Objective",
    "VectorOptimizer",
    "flat",
    "processes",
    "pull",
    "unflat",
]


# %% 23_machinery sec-vector 1 91d7c407
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, Unpack

import torch
from torch import Tensor, distributed

from guided_descent.core import Group, Optimizer, Options, check_choice


def processes(group: Any = None) -> int:
    """How many processes run together: one without ``torch.distributed``."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(group)
    return 1


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors as one vector, each row by row."""
    return torch.cat([x.reshape(-1) for x in tensors])


def unflat(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector as tensors of the shapes of others; rows of ``v`` stay rows."""
    parts = v.split([x.numel() for x in like], -1)
    pairs = zip(parts, like, strict=True)
    return [part.reshape((*v.shape[:-1], *x.shape)) for part, x in pairs]


def pull(
    y: Iterable[Tensor], x: list[Tensor], u: Iterable[Tensor], rows: bool = False
) -> tuple[Tensor, ...]:
    """``(∂y/∂x)ᵀ u``, where some of y may be constants.

    With ``rows=True`` for every row of u, but zeros may come without rows.
    """
    pairs = [(a, b) for a, b in zip(y, u, strict=True) if a.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(a) for a in x)
    y, u = zip(*pairs, strict=True)
    keep = {"retain_graph": True, "materialize_grads": True}
    return torch.autograd.grad(y, x, u, is_grads_batched=rows, **keep)


# %% 23_machinery sec-vector 2 eddfdbf9
class Objective:
    """A closure's loss as a function of one vector: all parameters that are not frozen.

    Each evaluation reads numbers back to the host.

    Args:
        params: The parameters, on one device.
        closure: Computes the loss, and calls ``backward`` unless
            ``differentiates``; gradients are enabled around it.
        maximize: Negate the loss. Default ``False``.
        differentiates: Take gradients of the loss that is returned, rather than
            read ``.grad``. Default ``False``.

    Attributes:
        x: The parameters as one vector, when this was built.
        calls: How often the closure was called.
        loss: What it returned the first time.

    Source: appendix "The machinery".
    """

    def __init__(
        self,
        params: list[Tensor],
        closure: Callable[[], Any],
        *,
        maximize: bool = False,
        differentiates: bool = False,
    ) -> None:
        self.params = [p for p in params if p.requires_grad]
        self.closure, self.calls, self.loss = closure, 0, None
        self.sign = -1.0 if maximize else 1.0
        self.differentiates = differentiates
        self.x = flat(self.params).detach()

    @torch.no_grad()
    def move(self, x: Tensor) -> None:
        """Make ``x`` the parameters."""
        for p, part in zip(self.params, unflat(x, self.params), strict=True):
            p.copy_(part)

    def __call__(
        self, x: Tensor | None = None, graph: bool = False
    ) -> tuple[float, Tensor]:
        """Loss and gradient at ``x``, or where the parameters are.

        With ``graph=True``, ``product`` and ``hessian`` work afterwards, until the
        parameters move.
        """
        if x is not None:
            self.move(x)
        with torch.enable_grad():
            loss = self.closure()
        self.calls += 1
        self._check_loss(loss)
        if self.differentiates:
            slopes = self.slopes = self._differentiate(loss, graph)
            loss = loss.detach()
        else:
            slopes = self._collect()
        for g, p in zip(slopes, self.params, strict=True):
            if g.layout is not torch.strided:
                told = f"the gradient of a parameter {tuple(p.shape)} is sparse"
                raise ValueError(f"{told}; use a dense one (Embedding: sparse=False)")
        self.loss = loss if self.loss is None else self.loss
        return self.sign * float(loss), self.sign * flat(slopes).detach()

    def product(self, v: Tensor) -> Tensor:
        """The Hessian times ``v``, or times every row of ``v``."""
        rows = v.shape[:-1]
        try:
            Hv = pull(self.slopes, self.params, unflat(v, self.params), bool(rows))
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            remedy = "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            raise RuntimeError(
                f"no second derivative: {error}; use operations that have one "
                f"(attention: run the closure's forward pass {remedy})"
            ) from error
        pairs = zip(Hv, self.params, strict=True)  # a zero has no rows yet
        Hv = [h.expand((*rows, *p.shape)).reshape(*rows, p.numel()) for h, p in pairs]
        return self.sign * torch.cat(Hv, -1)

    def hessian(self) -> Tensor:
        """The Hessian, made symmetric to the last bit."""
        H = self.product(torch.ones_like(self.x).diag())
        return (H + H.T) / 2

    def _check_loss(self, loss: Any) -> None:
        """Refuse what is no loss."""
        if isinstance(loss, Tensor):
            fine, kind = loss.numel() == 1, f"shape {tuple(loss.shape)}"
        else:
            fine = isinstance(loss, Real) and not self.differentiates
            kind = f"type {type(loss).__name__}"
        if not fine:
            remedy = "let it return the loss, a tensor with one element"
            raise TypeError(f"the closure returned something of {kind}; {remedy}")

    def _collect(self) -> list[Tensor]:
        """The gradients that the closure's ``backward`` has left."""
        if all(p.grad is None for p in self.params):
            told = "the closure left no gradient in any parameter"
            raise RuntimeError(f"{told}; let it call loss.backward() before it returns")
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]

    def _differentiate(self, loss: Tensor, graph: bool) -> tuple[Tensor, ...]:
        """The gradients of a loss that nobody has differentiated yet."""
        if not loss.requires_grad:
            raise RuntimeError(
                "the closure's loss does not depend on the parameters; let it return "
                "the loss itself, not a detached copy or .item()"
            )
        keep = {"retain_graph": True, "materialize_grads": True, "create_graph": graph}
        try:
            return torch.autograd.grad(loss, self.params, torch.ones_like(loss), **keep)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise RuntimeError(
                "the closure called backward(), which frees the graph that further "
                "derivatives need; let it return the loss and not call backward()"
            ) from error


# %% 23_machinery sec-vector 3 bcc604d5
class VectorOptimizer(Optimizer):
    """The base of methods that treat all parameters as one vector.

    A subclass has ``search(objective, f, g, group, state)``. It returns the new point,
    and changes ``state``, a copy of what was remembered.

    A step reads losses back to the host. It needs a closure, takes one parameter group,
    and runs as written: there is only ``engine="auto"`` or ``"loop"``. The state
    belongs to the first parameter, as in ``torch.optim.LBFGS``.

    Where the loss or a gradient is not finite at the start of a step, ``nonfinite``
    decides: ``"skip"`` (the default here) changes nothing and counts, ``"raise"``
    raises, ``"propagate"`` takes the step −lr·g. Trial points where the loss is not
    finite are refused like those where it is too large. If the closure raises, the
    parameters are put back. On several processes loss and gradient have to be the same
    on all.

    Args:
        params: Parameters, or one group, as in ``torch.optim``.
        defaults: The method's hyperparameters.
        **options: ``maximize``, ``engine`` and ``nonfinite``, see ``Options``.

    Raises:
        ValueError: A second group; parameters that are sharded, complex, of 16 bits, of
            several types or on several devices; a hyperparameter out of range.

    Source: appendix "The machinery".
    """

    elementwise = False
    engines = ("auto", "loop")
    needs_closure = True
    #: Whether it differentiates twice, that is, multiplies by the Hessian.
    twice = False
    #: Whether it compares losses: they need parameters of one type, not of 16 bits.
    compares = True

    def __init__(
        self, params: Any, defaults: dict[str, Any], **options: Unpack[Options]
    ) -> None:
        super().__init__(params, defaults, **{"nonfinite": "skip", **options})

    def search(
        self, objective: Objective, f: float, g: Tensor, group: Group, state: dict
    ) -> Tensor:
        """The new point, from the loss and the gradient at the old one."""
        raise TypeError(f"{type(self).__name__} has no search")

    def forget(self, state: dict[str, Any]) -> None:
        """Drop from the memory what other parameters taught. Nothing, here."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss, and returns it. It calls
                ``backward`` unless the method ``differentiates``. Within a step it is
                the same function each time: one batch, no dropout.

        Returns:
            The loss at the point where the step began.

        Raises:
            TypeError: There is no closure, or it returns no loss.
            RuntimeError: The closure called ``backward`` where it should not, or did
                not where it should; processes see different losses.
            ValueError: A sparse gradient; no parameter is free; a parameter has another
                shape than it had.
            FloatingPointError: The loss or its gradient is not finite, under
                ``nonfinite="raise"``.
            Nothing has changed then.
        """
        kind, group = type(self).__name__, self.param_groups[0]
        if closure is None:
            backward = "does not call" if self.differentiates else "calls"
            raise TypeError(
                f"{kind} evaluates the loss itself; use step(closure) with a function "
                f"that returns the loss and {backward} backward()"
            )
        params, lr = group["params"], float(group["lr"])
        self._check_params(params)
        if not any(p.requires_grad for p in params):
            told = f"{kind} has nothing to train, every parameter is frozen"
            raise ValueError(f"{told}; call requires_grad_() on those that should move")
        state = {"n_iter": 0, "func_evals": 0, **self.state.get(params[0], {})}
        if why := self.misfit(params[0], state, group):
            told = f"{kind}'s memory is of other parameters: {why}"
            raise ValueError(f"{told}; make a new optimizer after changing a shape")
        shapes = _shapes(params)
        if state.get("shapes", shapes) != shapes:  # some were frozen, or set free
            self.forget(state)
        state["shapes"] = shapes
        options = {"maximize": group["maximize"], "differentiates": self.differentiates}
        objective = Objective(params, closure, **options)
        x = new = objective.x
        try:
            f, g = objective(graph=self.twice)
            self._check_alike(f, g)
            if not (math.isfinite(f) and bool(g.isfinite().all())):
                objective.move(self._not_finite(x, g, group))
                return objective.loss
            if lr > 0 and bool(g.any()):
                new = self.search(objective, f, g, group, state)
        except BaseException:
            objective.move(x)
            raise
        objective.move(new)
        state["func_evals"] += objective.calls
        self.state[params[0]] = state
        return objective.loss

    def _check_alike(self, f: float, g: Tensor) -> None:
        """Refuse other losses on other processes: replicas would drift apart."""
        if processes() == 1:
            return
        mine = torch.stack([g.new_tensor(f), g.sum(), g.square().sum()]).nan_to_num()
        seen = torch.cat([mine, -mine])
        distributed.all_reduce(seen, distributed.ReduceOp.MAX)
        if not torch.equal(seen[:3], -seen[3:]):
            raise RuntimeError(
                f"{processes()} processes have losses or gradients of their own, and "
                f"{type(self).__name__} would drift apart on them; let the closure "
                "return the mean over processes, differentiably, or use KFAC, or an "
                "elementwise method"
            )

    def _not_finite(self, x: Tensor, g: Tensor, group: Group) -> Tensor:
        if group["nonfinite"] == "raise":
            raise FloatingPointError(
                "the loss or its gradient is not finite and nonfinite='raise'; start "
                "elsewhere, or use nonfinite='skip'"
            )
        if group["nonfinite"] == "propagate":
            return x - float(group["lr"]) * g
        self.skipped = torch.tensor(self.skipped_steps + 1)
        return x

    def misfit(self, p: Tensor, state: dict[str, Any], group: Group) -> str:
        """Why a memory is not one of the parameters as they are, or nothing."""
        params = group["params"]
        shapes = _shapes(params)
        then = state.get("shapes", shapes)
        if p is not params[0] or not state:
            return ""
        if len(then) != len(shapes):
            return f"it is of {len(then)} parameters, and there are {len(shapes)}"
        for k, (old, new) in enumerate(zip(then, shapes, strict=True)):
            if None not in (old, new) and old != new:
                return f"parameter {k} has shape {new}, and had {old}"
        d = sum(math.prod(shape) for shape in then if shape is not None)
        for name, value in state.items():
            for x in value if isinstance(value, list) else [value]:
                if isinstance(x, Tensor) and x.ndim and set(x.shape) != {d}:
                    return f"{name} has shape {tuple(x.shape)} for {d} parameters"
        return ""

    def add_param_group(self, param_group: Group) -> None:
        """Add the one group there is."""
        if self.param_groups:
            told = f"{type(self).__name__} treats all parameters as one vector"
            raise ValueError(f"{told}; pass one group")
        super().add_param_group(param_group)
        self._check_params(self.param_groups[0]["params"])

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if "line_search_fn" in group:
            search = group["line_search_fn"]
            check_choice("line_search_fn", search, ("strong_wolfe", None))
        if (dtype := group["state_dtype"]) is not None:
            why = f"the memory of {type(self).__name__} has the parameters' type"
            raise ValueError(f"state_dtype={dtype} is not valid: {why}; pass None")

    def _check_params(self, params: list[Tensor]) -> None:
        """Refuse free parameters that do not make a vector."""
        # The first one counts too: a memory that is loaded takes its type.
        free = [p for p in params if p.requires_grad or p is params[0]]
        dtype, device = free[0].dtype, free[0].device
        for p in free:
            why = ""
            if hasattr(p, "to_local"):
                why = "is sharded (a DTensor); use an elementwise method such as AdamW"
            elif p.is_complex():
                why = "is complex; pass torch.view_as_real of it"
            elif self.compares and p.dtype.itemsize < 4:
                why = f"is {p.dtype}, too coarse to compare losses; use float32"
            elif self.compares and p.dtype != dtype or p.device != device:
                why = f"is {p.dtype} on {p.device}, beside one of {dtype} on {device}"
                why = f"{why}; use one type and one device"
            if why:
                kind, shape = type(self).__name__, tuple(p.shape)
                raise ValueError(f"{kind} got a parameter of shape {shape} that {why}")


def _shapes(params: list[Tensor]) -> list[tuple[int, ...] | None]:
    """The shapes of the parameters that are free, by their places."""
    return [tuple(p.shape) if p.requires_grad else None for p in params]
