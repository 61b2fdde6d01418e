# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head e0332545
"""Chapter 23, The machinery."""

__all__ = [
    "ENGINES",
    "RANGES",
    "Engine",
    "Optimizer",
    "Options",
    "check_range",
]


# %% 23_machinery sec-optimizer 1 cdbb7aac
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

Engine = Literal["auto", "loop"]


class Options(TypedDict, total=False):
    """Keywords that every optimizer of the package takes beside its own.

    Attributes:
        maximize: Climb instead of descend. Default ``False``.
        engine: What runs the rule. ``"loop"`` calls it once for each tensor; ``"auto"`` (the default) picks the
            fastest engine that is valid for the parameters at hand, and never compiles.
    """

    maximize: bool
    engine: Engine


# %% 23_machinery sec-ranges 1 1596db3c
RANGES = {
    "lr": "[0, inf)",
    "momentum": "[0, 1)",
    "dampening": "[0, 1]",
    "betas": "[0, 1)",
    "eps": "[0, inf)",
    "weight_decay": "[0, inf)",
}


def check_range(name: str, value: float | Tensor, interval: str) -> None:
    """Refuse a number outside an interval.

    Args:
        name: The argument's name, for the message.
        value: A number, or a tensor with exactly one element.
        interval: Such as ``"[0, 1)"``: a square bracket includes the bound, a round one excludes it.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` lies outside, or is not finite.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; pass a number in {interval} or a one-element tensor")
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass a number in {interval}")
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name}={float(value)} is outside its range; pass a number in {interval}")


# %% 23_machinery sec-base-class 1 ba63b79e
class Optimizer(torch.optim.Optimizer):
    """The base of every optimizer here: it runs a subclass's ``rule`` over all parameters.

    A subclass has an ``__init__`` that passes its defaults on, a static ``rule(p, g, s, h)`` that changes the
    parameter ``p`` and its state ``s`` in place from the gradient ``g`` and the hyperparameters ``h``, and, when it
    remembers something, ``init_state``.

    Args:
        params: Tensors, named tensors, or groups of them, as in ``torch.optim``.
        defaults: The method's hyperparameters. Those named in ``RANGES`` are validated, in every group.
        **options: See ``Options``.

    Raises:
        TypeError: A hyperparameter of the wrong type; one of torch's keywords that ``engine=`` replaces.
        ValueError: A hyperparameter outside its range; an unknown engine.

    Source: appendix "The machinery".
    """

    rule: Callable[[Tensor, Tensor, SimpleNamespace, SimpleNamespace], None]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Optimizer":
        """Refuse the keywords of torch.optim that have another name here, whatever the subclass's signature."""
        for word in ("foreach", "fused", "capturable", "differentiable"):
            if word in kwargs:
                raise TypeError(f"{cls.__name__} has no {word}={kwargs[word]!r}; use engine='auto' or 'loop'")
        return super().__new__(cls)

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        super().__init__(params, {**defaults, "maximize": False, "engine": "auto", **options})

    def init_state(self, p: Tensor, h: SimpleNamespace) -> dict[str, Tensor]:
        """What the rule remembers of one tensor before its first step, by name. Nothing, unless a subclass says so."""
        return {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after validating every hyperparameter that it sets or inherits."""
        for name, value in {**self.defaults, **param_group}.items():
            if name in RANGES:
                for number in value if isinstance(value, tuple | list) else (value,):
                    check_range(name, number, RANGES[name])
        engine = param_group.get("engine", self.defaults["engine"])
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is unknown; use one of {', '.join(map(repr, ENGINES))}")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """All attributes but torch's own private ones (hooks): a copy then is a whole copy."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in what an older checkpoint, or one of torch.optim's, does not say."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it; no step here is differentiable
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns the loss. Optional.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            ValueError: A sparse gradient. No parameter has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [([p for p in group["params"] if p.grad is not None], group) for group in self.param_groups]
        for params, _ in work:
            for p in params:
                if p.grad.layout is not torch.strided:
                    raise ValueError(
                        f"{type(self).__name__} got a gradient with layout {p.grad.layout} for a parameter of shape "
                        f"{tuple(p.shape)}; use a dense gradient (nn.Embedding: sparse=False)"
                    )
        for params, group in work:
            h = SimpleNamespace(**{name: value for name, value in group.items() if name != "params"})
            if isinstance(h.lr, Tensor):
                h.lr = h.lr.squeeze()
            ENGINES[h.engine](self, params, h)
        return loss


# %% 23_machinery sec-engines 1 be9caef1
def _loop(optimizer: Optimizer, params: list[Tensor], h: SimpleNamespace) -> None:
    """Call the rule once for each tensor: the reference for every other engine."""
    for p in params:
        state = optimizer.state.get(p) or optimizer.init_state(p, h)
        if state:
            optimizer.state[p] = state
        g = -p.grad if h.maximize else p.grad
        real = {name: _as_real(value) for name, value in state.items()}
        optimizer.rule(_as_real(p), _as_real(g), SimpleNamespace(**real), h)


def _as_real(x: Tensor) -> Tensor:
    """A complex tensor as pairs of reals that share its memory; any other tensor as it is."""
    return torch.view_as_real(x) if torch.is_complex(x) else x


ENGINES: dict[str, Callable[[Optimizer, list[Tensor], SimpleNamespace], None]] = {"auto": _loop, "loop": _loop}
