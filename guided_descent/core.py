# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 5b28e489
"""Chapter 23, The machinery."""

__all__ = [
    "ENGINES",
    "OPTIONS",
    "RANGES",
    "Batch",
    "Engine",
    "Names",
    "Nonfinite",
    "Optimizer",
    "Options",
    "check_choice",
    "check_range",
]


# %% 23_machinery sec-optimizer 1 d551f300
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral, Real
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

#: How a rule is run; see ``Options``.
Engine = Literal["auto", "loop", "foreach", "fused", "compile"]
#: What to do about a gradient that is not finite; see ``Options``.
Nonfinite = Literal["propagate", "skip", "raise"]


class Options(TypedDict, total=False):
    """Keywords that every optimizer of the package takes beside its own.

    Attributes:
        maximize: Climb instead of descend. Default ``False``.
        engine: What runs the rule. ``"loop"``: one tensor after another. ``"foreach"``: lists of tensors through
            ``torch._foreach_*``, or same-shape matrices stacked. ``"fused"``: torch's own kernel, where it has one
            for exactly this rule. ``"compile"``: one graph over all tensors, compiled at the first step; a change of
            ``lr`` does not compile again, a change of another hyperparameter does.
            ``"auto"`` (the default): the fastest that is valid for the parameters at hand; it never compiles.
        nonfinite: What to do about a gradient with an infinity or a NaN in it. ``"propagate"`` (the default):
            nothing, as torch does. ``"skip"``: leave parameters, state and step count as they
            are, decided on the device without a host synchronisation and counted in ``skipped_steps``.
            ``"raise"``: a ``FloatingPointError`` before anything changes; this reads one number back to the host.
        state_dtype: Data type of the state. ``None`` (the default) means the parameter's, as in torch.
    """

    maximize: bool
    engine: Engine
    nonfinite: Nonfinite
    state_dtype: torch.dtype | None


#: The defaults of ``Options``.
OPTIONS: Options = {"maximize": False, "engine": "auto", "nonfinite": "propagate", "state_dtype": None}


class Names:
    """Values by attribute, such as ``h.lr``. (``types.SimpleNamespace`` cannot be traced by ``torch.compile``.)"""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


# %% 23_machinery sec-ranges 1 823d32d7
#: Valid ranges of the hyperparameters that mean the same in every optimizer.
RANGES: dict[str, str | tuple[str, ...]] = {
    "lr": "[0, inf)",
    "momentum": "[0, 1)",
    "dampening": "[0, 1]",
    "betas": ("[0, 1)", "[0, 1)"),
    "eps": "[0, inf)",
    "weight_decay": "[0, inf)",
}


def check_range(name: str, value: Any, interval: str | tuple[str, ...]) -> None:
    """Refuse a number outside an interval.

    Args:
        name: The argument's name, for the message.
        value: A number, or a tensor with exactly one element; for a tuple of
            intervals a tuple or list of as many.
        interval: Such as ``"[0, 1)"``: a square bracket includes the bound, a
            round one excludes it. ``"[1, inf) int"`` asks for an integer, and
            ``"[1, inf) int | None"`` allows ``None`` too.

    Raises:
        TypeError: ``value`` is not a number, or not an integer.
        ValueError: ``value`` lies outside, is not finite, or has another form.
    """
    if isinstance(interval, tuple):
        if not (isinstance(value, tuple | list) and len(value) == len(interval)):
            raise ValueError(
                f"{name}={value!r} has another form; pass {len(interval)} numbers, "
                f"in {', '.join(interval)}"
            )
        for number, part in zip(value, interval, strict=True):
            check_range(name, number, part)
        return
    span, _, none = interval.partition(" | ")
    if none and value is None:
        return
    kind, noun = Real | Tensor, "a number"
    if span.endswith(" int"):
        span, kind, noun = span.removesuffix(" int"), Integral, "an integer"
    remedy = f"pass {noun} in {span}{' or None' if none else ''}"
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; {remedy}")
    if isinstance(value, Tensor) and value.numel() != 1:
        shape = tuple(value.shape)
        raise ValueError(f"{name} has shape {shape}; {remedy} or a one-element tensor")
    low, high = (float(bound) for bound in span[1:-1].split(","))
    above = low <= value if span[0] == "[" else low < value
    below = value <= high if span[-1] == "]" else value < high
    if not (above and below):
        shown = value if kind is Integral else float(value)
        raise ValueError(f"{name}={shown} is outside its range; {remedy}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        ValueError: It is none of them; the message lists them.
    """
    if not any(value is choice or value == choice for choice in choices):
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}")


# %% 23_machinery sec-batch 1 4d31c543
class Batch:
    """Many tensors that answer to the methods of one: each method is one ``torch._foreach_*`` call.

    Numbers may be Python floats or one-element tensors. In-place methods return the batch, as a tensor's do. A rule
    may use the operators ``+ - * / **``, also in place, and every method for which torch has a list version: ``mul_``,
    ``lerp_``, ``addcmul_``, ``addcdiv_``, ``sqrt``, ``abs``, ``sign``, ``maximum``, ``clamp_min``, ``reciprocal``, …
    A reduction such as ``norm`` gives one number for each tensor. Functions such as ``torch.sign(g)`` do not work here.

    Args:
        tensors: The tensors; changed in place by in-place methods.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def __getattr__(self, name: str) -> Callable[..., "Batch"]:
        if not hasattr(torch, f"_foreach_{name}"):
            raise AttributeError(f"an elementwise rule has no .{name}: torch has no list version of it; see Batch")
        return lambda *args, **kwargs: self._call(name, *args, **kwargs)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> "Batch":
        lists = (x.tensors if isinstance(x, Batch) else x for x in args)
        result = getattr(torch, f"_foreach_{name}")(self.tensors, *lists, **kwargs)
        return self if name.endswith("_") else Batch(result)

    def add_(self, x: Any, alpha: Any = 1) -> "Batch":
        if isinstance(alpha, Tensor) or not isinstance(x, Batch):
            return self._call("add_", x * alpha)
        torch._foreach_add_(self.tensors, x.tensors, alpha=alpha)
        return self

    def addcmul_(self, a: "Batch", b: "Batch", value: Any = 1) -> "Batch":
        return self.add_(a * b, value) if isinstance(value, Tensor) else self._call("addcmul_", a, b, value)

    def addcdiv_(self, a: "Batch", b: "Batch", value: Any = 1) -> "Batch":
        return self.add_(a / b, value) if isinstance(value, Tensor) else self._call("addcdiv_", a, b, value)

    def lerp_(self, x: "Batch", weight: Any) -> "Batch":
        return self.add_(x - self, weight) if isinstance(weight, Tensor) else self._call("lerp_", x, weight)

    def sub_(self, x: Any, alpha: Any = 1) -> "Batch":
        return self.add_(x, -alpha)

    def square(self) -> "Batch":
        return self * self

    def __neg__(self) -> "Batch":
        return self._call("neg")

    def __add__(self, x: Any) -> "Batch":
        return self._call("add", x)

    def __sub__(self, x: Any) -> "Batch":
        return self._call("sub", x)

    def __mul__(self, x: Any) -> "Batch":
        return self._call("mul", x)

    def __truediv__(self, x: Any) -> "Batch":
        return self._call("div", x)

    def __pow__(self, x: Any) -> "Batch":
        return self._call("pow", x)

    def __rsub__(self, x: Any) -> "Batch":
        return -(self - x)

    def __rtruediv__(self, x: Any) -> "Batch":
        return self.reciprocal() * x

    def __iadd__(self, x: Any) -> "Batch":
        return self.add_(x)

    def __isub__(self, x: Any) -> "Batch":
        return self._call("sub_", x)

    def __imul__(self, x: Any) -> "Batch":
        return self._call("mul_", x)

    def __itruediv__(self, x: Any) -> "Batch":
        return self._call("div_", x)

    __radd__, __rmul__ = __add__, __mul__


# %% 23_machinery sec-base-class 1 05ab7f10
class Optimizer(torch.optim.Optimizer):
    """The base of every optimizer here: it runs a subclass's ``rule`` over all parameters.

    A subclass has an ``__init__`` that passes its defaults on, a static ``rule(p, g, s, h)`` that changes the
    parameter ``p`` and its state ``s`` in place from the gradient ``g`` and what the group shares, ``h``; and, where
    it needs them, ``init_state``, ``clocks`` with ``clock``, ``fused``, ``elementwise`` and ``ranges``.

    Args:
        params: Tensors, named tensors, or groups of them, as in ``torch.optim``.
        defaults: The method's hyperparameters. Those named in ``RANGES`` are validated, in every group.
        **options: See ``Options``.

    Raises:
        TypeError: A hyperparameter of the wrong type; one of torch's keywords that ``engine=`` replaces.
        ValueError: A hyperparameter outside its range; an unknown ``engine`` or ``nonfinite``.

    Source: appendix "The machinery".
    """

    rule: Callable[[Any, Any, Names, Names], None]
    #: torch's own kernel for exactly this rule, called as ``fused(p, g, s, h)`` with lists, if there is one.
    fused: Callable[[list[Tensor], list[Tensor], Names, Names], None] | None = None
    #: Whether the rule treats every number alone. If not, ``foreach`` stacks tensors of one shape: the rule then finds
    #: a leading batch dimension, and the shape of a single tensor in ``h.shape``.
    elementwise = True
    #: State that is one number, shared by tensors with the same history. The rule finds its value in ``h``.
    clocks: tuple[str, ...] = ()
    #: Ranges of hyperparameters that only this method has, or has in another form.
    ranges: dict[str, str | tuple[str, ...]] = {}
    #: The engines it can run on.
    engines: tuple[str, ...] = ("auto", "loop", "foreach", "fused", "compile")
    #: Whether ``step`` needs a closure.
    needs_closure = False
    #: Whether the method differentiates the loss itself: its closure then returns the loss and calls no ``backward``.
    differentiates = False

    def __new__(cls, *args: Any, **kwargs: Any) -> "Optimizer":
        """Refuse the keywords of torch.optim that have another name here, whatever the subclass's signature."""
        for word in ("foreach", "fused", "capturable", "differentiable"):
            if word in kwargs:
                raise TypeError(f"{cls.__name__} has no {word}={kwargs[word]!r}; choose with engine=, see Options")
        return super().__new__(cls)

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        if unknown := options.keys() - OPTIONS:
            raise TypeError(f"{type(self).__name__} has no {min(unknown)}=; use one of {', '.join(defaults | OPTIONS)}")
        self.skipped: Tensor | None = None
        super().__init__(params, {**defaults, **OPTIONS, **options})

    def init_state(self, p: Tensor, g: Tensor, h: Names) -> dict[str, Tensor]:
        """What the rule remembers of one tensor before its first step, by name. Nothing, unless a subclass says so."""
        return {}

    @staticmethod
    def clock(h: Names) -> None:
        """Compute, once a step, the numbers that all tensors share, and put them into ``h``."""

    @property
    def skipped_steps(self) -> int:
        """How many steps ``nonfinite="skip"`` has skipped, in this process. Reading it waits for the device."""
        return 0 if self.skipped is None else int(self.skipped)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after validating every hyperparameter that it sets or inherits."""
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse what is out of range or of the wrong kind."""
        for name, interval in {**RANGES, **self.ranges}.items():
            if name in self.defaults:
                check_range(name, group[name], interval)
        check_choice("engine", group["engine"], self.engines)
        check_choice("nonfinite", group["nonfinite"], ("propagate", "skip", "raise"))
        check_choice("maximize", group["maximize"], (False, True))
        dtype = group["state_dtype"]
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"state_dtype={dtype!r} is no real floating-point type; pass None or, say, torch.float32")

    def __getstate__(self) -> dict[str, Any]:
        """All attributes, for a copy to be whole; but not what torch hangs on them: hooks, a scheduler's step."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in what an older checkpoint, or one of torch.optim's, does not say."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it; no step here is differentiable
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint, as in torch; clocks are handed out as a copy for each tensor."""
        packed = super().state_dict()
        for key, state in packed["state"].items():
            packed["state"][key] = {n: v.clone() if n in self.clocks else v for n, v in state.items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of the ``torch.optim`` class of the same algorithm.

        ``engine``, ``nonfinite`` and ``state_dtype`` stay as they are: they belong to this run and not to the model.
        Torch casts all state to the parameter's type; here clocks keep their own and ``state_dtype`` is honoured.

        Raises:
            ValueError: The checkpoint holds a hyperparameter that is out of range, or one that this optimizer does not
                have and that would change its steps. Nothing has changed then.
        """
        hooked: dict[str, Any] = dict(state_dict)  # what is left when torch's load hooks have run

        def prepare(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            live = [{k: g[k] for k in ("engine", "nonfinite", "state_dtype")} for g in self.param_groups]
            groups = [{**saved, **own} for saved, own in zip(given["param_groups"], live, strict=False)]
            for group in groups:
                self._check_group({**self.defaults, **group})
                for name in (*RANGES, "nesterov", "amsgrad", "centered"):
                    if group.get(name) and name not in self.defaults:
                        kind = type(self).__name__
                        raise ValueError(f"the checkpoint has {name}={group[name]!r}, which {kind} does not know")
            hooked.update(given, param_groups=groups + given["param_groups"][len(groups) :])
            return hooked

        handle = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        clocks: dict[tuple[str, float], Tensor] = {}
        for saved, group in zip(hooked["param_groups"], self.param_groups, strict=True):
            for key, p in zip(saved["params"], group["params"], strict=True):
                state = hooked["state"].get(key, {})
                if any(value is None for value in state.values()):  # torch's way to say "not begun"
                    self.state.pop(p, None)
                    continue
                for name, value in state.items():
                    if name in self.clocks:
                        clock = torch.as_tensor(value).detach().cpu().clone()
                        self.state[p][name] = clocks.setdefault((name, clock.item()), clock)
                    elif isinstance(value, Tensor):
                        like = p if value.shape == p.shape else value  # in the parameter's memory layout
                        dtype = _state_dtype(value, p, group["state_dtype"])
                        self.state[p][name] = torch.empty_like(like, dtype=dtype, device=p.device).copy_(value.detach())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns the loss. Optional.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            ValueError: A sparse gradient, or parameters that ``engine="fused"`` cannot take. Nothing has changed then.
            FloatingPointError: A gradient that is not finite, under ``nonfinite="raise"``. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        engines = [self._engine(group, params) for group, params in work]
        finite = self._finite(work)
        for (group, params), engine in zip(work, engines, strict=True):
            for p, states, h in self._buckets(group, params, engine, finite):
                keep = finite.to(p[0].device) if group["nonfinite"] == "skip" and finite is not None else None
                now = {name: _clock_tensor(getattr(h, name), states[0][name], keep) for name in self.clocks}
                g = _as_real(x.grad for x in p)
                s = {name: _as_real(x[name] for x in states) for name in states[0] if name not in self.clocks}
                ENGINES[engine](self, _as_real(p), g, s, h, keep)
                if now:
                    for state in states:
                        state.update(now)
        return loss

    def _engine(self, group: dict[str, Any], params: list[Tensor]) -> str:
        """The engine a group runs on, after refusing what it cannot do."""
        for p in params:
            if p.grad.layout is not torch.strided:
                raise ValueError(
                    f"{type(self).__name__} got a gradient with layout {p.grad.layout} for a parameter of shape "
                    f"{tuple(p.shape)}; use a dense gradient (nn.Embedding: sparse=False)"
                )
            if p.is_complex() and not self.elementwise:
                raise ValueError(
                    f"{type(self).__name__} got a complex parameter of shape {tuple(p.shape)}; it works on matrices of "
                    "reals: pass torch.view_as_real of it"
                )
        name = group["engine"]
        if name not in ("auto", "fused"):
            return name
        why = "torch has no kernel for this rule" if self.fused is None else _unfusable(params, group["state_dtype"])
        if name == "fused" and why:
            raise ValueError(f"engine='fused' is not valid for {type(self).__name__}: {why}; use engine='auto'")
        return "foreach" if why and params and all(p.is_cuda for p in params) else "loop" if why else "fused"

    def _finite(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> Tensor | None:
        """Whether the gradients of all groups that skip are finite, on the device of the first; skips are counted."""
        flags: dict[str, list[Tensor]] = {"skip": [], "raise": [], "propagate": []}
        for group, params in work:
            for p in params if group["nonfinite"] != "propagate" else ():
                flags[group["nonfinite"]].append(p.grad.isfinite().all())
                if group["nonfinite"] == "raise" and not flags["raise"][-1]:
                    raise FloatingPointError(
                        f"the gradient of a parameter of shape {tuple(p.shape)} is not finite and nonfinite='raise'; "
                        "lower the learning rate, clip gradients, or use nonfinite='skip'"
                    )
        if not flags["skip"]:
            return None
        finite = torch.stack([flag.to(flags["skip"][0].device) for flag in flags["skip"]]).all()
        self.skipped = (~finite).long() if self.skipped is None else self.skipped.to(finite.device) + (~finite)
        return finite

    def _buckets(
        self, group: dict[str, Any], params: list[Tensor], engine: str, finite: Tensor | None
    ) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]], Names]]:
        """Parameters that may share a call, their states, and what they share in ``h``, the clocks one step on."""
        shared = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        if isinstance(shared["lr"], Tensor):
            shared["lr"] = shared["lr"].squeeze()
        begun: dict[str, Tensor] = {}
        buckets: dict[tuple[Any, ...], list[tuple[Tensor, dict[str, Tensor]]]] = defaultdict(list)
        for p in params:
            state = self.state.get(p) or self._begin(p, Names(**shared), begun, finite)
            shape = () if self.elementwise else tuple(p.shape)
            history = (id(state[name]) for name in self.clocks)
            buckets[p.device, p.dtype, shape, tuple(state), *history].append((p, state))
        for (device, _, shape, _, *_), items in buckets.items():
            h = Names(**shared, shape=shape)
            for name in self.clocks:
                value = items[0][1][name]
                # On the host reading it waits for nobody. What only the device knows stays there.
                on_device = engine == "fused" or group["nonfinite"] == "skip"
                setattr(h, name, value.to(device, _widest(device)) if on_device else value.item())
            if "step" in self.clocks:
                h.step = h.step + 1
            self.clock(h)
            yield [p for p, _ in items], [state for _, state in items], h

    def _begin(self, p: Tensor, h: Names, begun: dict[str, Tensor], finite: Tensor | None) -> dict[str, Tensor]:
        """The state of a tensor before its first step. Tensors that begin together share their clocks."""
        g = -p.grad if h.maximize else p.grad
        if h.nonfinite == "skip" and finite is not None:
            g = torch.where(finite.to(p.device), g, 0)
        state = self.init_state(p, g, h)
        for name, value in state.items():
            if name in self.clocks:
                state[name] = begun.setdefault(name, value)
            else:  # a copy: state that shares memory with p or its gradient would be changed with it
                state[name] = value.detach().to(_state_dtype(value, p, h.state_dtype), copy=True)
        if state:
            self.state[p] = state
        return state


def _widest(device: torch.device) -> torch.dtype:
    """Double precision, where the device has it: powers of β₂ = 0.999 need the digits."""
    return torch.float32 if device.type == "mps" else torch.float64


def _clock_tensor(value: float | Tensor, before: Tensor, finite: Tensor | None) -> Tensor:
    """A clock as it is stored after the step."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=before.dtype)
    now = value if finite is None else torch.where(finite, value, before.to(value))
    return now.to(min(before.dtype, value.dtype, key=lambda dtype: dtype.itemsize))


# %% 23_machinery sec-engines 1 2abbc172
def _run(optimizer: Optimizer, p: list, g: list, s: dict, h: Names, finite: Tensor | None, call: Callable) -> None:
    """Run a rule on one chunk of tensors: negate, convert, call, undo, convert back."""
    if h.maximize:
        g = torch._foreach_neg(g)
    kept = [*p, *(x for values in s.values() for x in values)]
    work = kept
    if h.state_dtype not in (None, p[0].dtype):
        wide = torch.promote_types(p[0].dtype, h.state_dtype)
        p, g, s = _cast(p, wide), _cast(g, wide), {name: _cast(values, wide) for name, values in s.items()}
        work = [*p, *(x for values in s.values() for x in values)]
    old = [x.clone() for x in kept] if finite is not None else kept
    call(optimizer, p, g, s, h)
    for x, new, before in zip(kept, work, old, strict=True):
        if finite is not None:
            x.copy_(torch.where(finite, new, before))
        elif new is not x:
            x.copy_(new)


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) if x.is_floating_point() else x for x in tensors]


# %% 23_machinery sec-engines 2 93b9ad97
def _loop(optimizer: Optimizer, p: list, g: list, s: dict, h: Names, finite: Tensor | None) -> None:
    """The rule on one tensor after another: the reference for every other engine."""
    numbers_on_device = any(isinstance(value, Tensor) for value in vars(h).values())
    call = _call_batch if optimizer.elementwise and numbers_on_device else _call_single
    for i in range(len(p)):
        one = slice(i, i + 1)
        _run(optimizer, p[one], g[one], {name: x[one] for name, x in s.items()}, h, finite, call)


def _foreach(optimizer: Optimizer, p: list, g: list, s: dict, h: Names, finite: Tensor | None) -> None:
    """The rule on chunks of tensors no larger together than the largest one."""
    call = _call_batch if optimizer.elementwise else _call_stacked
    for chunk in _chunks(p):
        _run(optimizer, p[chunk], g[chunk], {name: x[chunk] for name, x in s.items()}, h, finite, call)


def _compile(optimizer: Optimizer, p: list, g: list, s: dict, h: Names, finite: Tensor | None) -> None:
    """The rule on every tensor, in one compiled graph."""
    _run(optimizer, p, g, s, h, finite, _call_compiled)


def _fused(optimizer: Optimizer, p: list, g: list, s: dict, h: Names, finite: Tensor | None) -> None:
    """Torch's own kernel, which undoes by itself."""
    h.found_inf = None if finite is None else (~finite).float()
    optimizer.fused(p, g, Names(**s, step=[h.step.float()] * len(p) if "step" in optimizer.clocks else []), h)


#: What runs a rule, by name.
ENGINES: dict[str, Callable[..., None]] = {
    "auto": _loop,  # resolved to one of the others before it is called
    "loop": _loop,
    "foreach": _foreach,
    "fused": _fused,
    "compile": _compile,
}


def _call_single(optimizer: Optimizer, p: list, g: list, s: dict, h: Names) -> None:
    _apply(optimizer.rule, p[0], g[0], {name: x[0] for name, x in s.items()}, h)


def _call_batch(optimizer: Optimizer, p: list, g: list, s: dict, h: Names) -> None:
    _apply(optimizer.rule, Batch(p), Batch(g), {name: Batch(x) for name, x in s.items()}, h)


def _call_stacked(optimizer: Optimizer, p: list, g: list, s: dict, h: Names) -> None:
    """Stack tensors of one shape, run the rule once, and deal the results out again."""
    stack, state = torch.stack(p), {name: torch.stack(x) for name, x in s.items()}
    _apply(optimizer.rule, stack, torch.stack(g), state, h)
    for x, new in ((p, stack), *((s[name], state[name]) for name in s)):
        torch._foreach_copy_(x, list(new.unbind()))


def _apply(rule: Callable, p: Any, g: Any, s: dict[str, Any], h: Names) -> None:
    names = Names(**s)
    rule(p, g, names, h)
    for name, value in s.items():
        if getattr(names, name) is not value:
            raise TypeError(f"the rule binds s.{name} to something new, which is lost; change it in place")


def _call_compiled(optimizer: Optimizer, p: list, g: list, s: dict, h: Names) -> None:
    """Numbers that change from step to step enter the graph as tensors; a Python number would be compiled in."""
    changing, fixed = {}, {}
    for name, value in vars(h).items():
        changes = name == "lr" or name not in optimizer.defaults
        if isinstance(value, Tensor) or changes and isinstance(value, Real):
            changing[name] = torch.as_tensor(value, dtype=torch.float64)
        elif name not in OPTIONS:
            fixed[name] = value
    if "_graph" not in vars(optimizer):
        optimizer._graph = torch.compile(_trace, dynamic=False, fullgraph=True)
    # Dynamo counts the graphs of all optimizers together, and by default stops at eight.
    with torch._dynamo.config.patch(recompile_limit=4096, accumulated_recompile_limit=4096):
        optimizer._graph(type(optimizer).rule, p, g, s, changing, fixed)


def _trace(rule: Callable, p: list, g: list, s: dict, changing: dict, fixed: dict) -> None:
    h = Names(**changing, **fixed)
    for i in range(len(p)):
        rule(p[i], g[i], Names(**{name: x[i] for name, x in s.items()}), h)


def _chunks(p: list[Tensor]) -> Iterator[slice]:
    """Consecutive tensors, together no larger than the largest one."""
    limit, start, size = max(x.numel() for x in p), 0, 0
    for i, x in enumerate(p):
        if size + x.numel() > limit:
            yield slice(start, i)
            start, size = i, 0
        size += x.numel()
    yield slice(start, len(p))


def _as_real(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Complex tensors as pairs of reals that share their memory; any other tensor as it is."""
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors]


def _state_dtype(value: Tensor, p: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type a state is kept in: as asked, else the parameter's; complex stays complex, and integers integers."""
    if not (value.is_floating_point() or value.is_complex()):
        return value.dtype
    dtype = dtype or p.dtype
    return dtype.to_complex() if value.is_complex() and not dtype.is_complex else dtype


def _unfusable(params: list[Tensor], state_dtype: torch.dtype | None) -> str:
    """Why torch's fused kernels cannot take these parameters, or nothing."""
    for p in params:
        kind = p.device.type
        if not p.is_floating_point():
            return "a parameter is not a real floating-point tensor"
        if kind not in ("cpu", "cuda", "mps", "xpu"):
            return f"a parameter is on {kind}"
        if kind == "cpu" and p.dtype.itemsize < 4:  # fused SGD of torch 2.13 is wrong there, from 16 elements on
            return f"a parameter is {p.dtype} on the CPU"
        dense = p.is_contiguous() or p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
        if not dense or p.stride() != p.grad.stride():
            return "a parameter or its gradient is not contiguous"
        if state_dtype not in (None, p.dtype):
            return f"state_dtype={state_dtype} differs from a parameter's"
    return ""
