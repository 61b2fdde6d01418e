# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head fff9b738
"""Chapter 23, The machinery."""

__all__ = [
    "ALGORITHMS",
    "KEYS",
    "OPTIONS",
    "RANGES",
    "TRANSIENT",
    "Engine",
    "Nonfinite",
    "Optimizer",
    "Options",
    "check_choice",
    "check_range",
    "known",
    "share",
    "wide",
]


# %% 23_machinery sec-optimizer 1 c5b74827
import difflib
import functools
import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import import_module
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from guided_descent.engines import ENGINES, Job, Names, plain


# %% 23_machinery sec-optimizer 2 79fd7013
#: How a rule is run; see ``Options``.
Engine = Literal["auto", "loop", "foreach", "fused", "compile"]
#: What to do about a gradient that is not finite; see ``Options``.
Nonfinite = Literal["propagate", "skip", "raise"]


class Options(TypedDict, total=False):
    """Keywords that every optimizer of the package takes beside its own.

    Attributes:
        maximize: Climb instead of descend. Default ``False``.
        engine: What runs the rule. ``"loop"``: one tensor after another. ``"foreach"``:
            lists of tensors through ``torch._foreach_*``, with matrices of one shape
            stacked where a rule works on them as matrices. ``"fused"``: torch's own
            kernel, where it has one for exactly this rule. ``"compile"``: one graph over
            all tensors, compiled at the first step; a change of ``lr`` does not compile
            again, a change of another hyperparameter does. ``"auto"`` (the default): the
            fastest that is valid for the parameters, gradients and state at hand; it
            never compiles.
        nonfinite: What to do about a gradient with an infinity or a NaN in it (one whose
            sum overflows counts). ``"propagate"`` (the default): nothing, as torch does.
            ``"skip"``: leave parameters, state and step count as they are, decided on the
            device without a host synchronisation and counted in ``skipped_steps``.
            ``"raise"``: a ``FloatingPointError`` before anything changes; this reads one
            number back to the host.
        state_dtype: Data type of the state. ``None`` (the default) means the parameter's,
            as in torch.
    """

    maximize: bool
    engine: Engine
    nonfinite: Nonfinite
    state_dtype: torch.dtype | None


#: The defaults of ``Options``.
OPTIONS: Options = {
    "maximize": False, "engine": "auto", "nonfinite": "propagate", "state_dtype": None,
}


# %% 23_machinery sec-ranges 1 ae89989c
#: Valid ranges of the hyperparameters that mean the same in every optimizer.
RANGES: dict[str, str | tuple[str, ...]] = {
    "lr": "[0, inf)",
    "momentum": "[0, 1)",
    "dampening": "[0, 1]",
    "betas": ("[0, 1)", "[0, 1)"),
    "eps": "[0, inf)",
    "weight_decay": "[0, inf)",
}


# %% 23_machinery sec-ranges 2 bd0db93f
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


# %% 23_machinery sec-matrixwise 3 9d8e9451
def share(costs: list[float], bins: int) -> list[int]:
    """Divide jobs over bins: the largest first, each to the emptiest; ties by number.

    The fullest bin then has at most 4/3 of what the fullest has in the best division.

    Args:
        costs: What each job costs.
        bins: How many bins there are, at least 1.

    Returns:
        The bin of each job; the same on every process.

    Source: Graham (1969), doi 10.1137/0117039. Appendix "The machinery".
    """
    load, where = [0.0] * bins, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        where[i] = min(range(bins), key=lambda b: (load[b], b))
        load[where[i]] += costs[i]
    return where


# %% 23_machinery sec-base-class 1 28ee6430
class _Plan(NamedTuple):
    """How a parameter meets its rule, until something changes."""

    seen: tuple[Any, ...]  # what it was derived from,
    state: list[Tensor]  # and the state that the rule sees, clocks apart,
    names: tuple[str, ...]  # with its names
    begun: bool
    key: tuple[Any, ...]  # parameters with equal keys may share a call
    odd: str  # why torch's fused kernels cannot take it, or nothing


# %% 23_machinery sec-base-class 2 de57452c
class Optimizer(torch.optim.Optimizer):
    """The base of every optimizer here: it runs a subclass's ``rule`` over all parameters.

    A subclass has an ``__init__`` that passes its defaults on, a static
    ``rule(p, g, s, h)`` that changes the parameter ``p`` and its state ``s`` in place from
    the gradient ``g`` and what the group shares, ``h``; and, where it needs them,
    ``init_state``, ``clocks`` with ``clock``, ``fused``, ``elementwise``, ``matrices``,
    ``every`` with ``refresh``, ``directions`` and ``ranges``.

    A group may carry ``algorithm``, the name of an optimizer of the package: its rule then
    steps the group, with its own defaults. ``use_muon``, ``use_fallback`` and ``kind``, as
    other libraries say it, are understood too.

    Args:
        params: Tensors, named tensors, or groups of them, as in ``torch.optim``.
        defaults: The method's hyperparameters. Those named in ``RANGES`` are validated, in
            every group.
        **options: See ``Options``.

    Raises:
        TypeError: A hyperparameter of the wrong type; one of torch's keywords that
            ``engine=`` replaces; a module in place of its parameters.
        ValueError: A hyperparameter outside its range; an unknown ``engine``, ``nonfinite``
            or ``algorithm``; a vector where the rule takes matrices.

    Source: appendix "The machinery".
    """

    rule: Callable[[Any, Any, Names, Names], None]
    #: torch's kernel for exactly this rule, called as ``fused(p, g, s, h)`` with lists.
    fused: Callable[[list[Tensor], list[Tensor], Names, Names], None] | None = None
    #: Whether the rule treats every number alone. If not, it gets one tensor at a time.
    elementwise = True
    #: Whether the rule takes matrices: a tensor of more dimensions is flattened to
    #: (first, rest), and one that ``split_sizes`` or ``block_size`` cuts is several.
    matrices = False
    #: Whether a rule for matrices also takes vectors and numbers, as columns.
    vectors = False
    #: The hyperparameter that says in how many steps ``refresh`` comes round to a matrix.
    every: str | None = None
    #: State that belongs to one matrix, of any shape, in single precision at least.
    precise: tuple[str, ...] = ()
    #: State that is one number, shared by tensors with the same history. The rule finds its
    #: value in ``h``.
    clocks: tuple[str, ...] = ()
    #: Ranges of hyperparameters that only this method has, or has in another form.
    ranges: dict[str, str | tuple[str, ...]] = {}
    #: The engines it can run on.
    engines: tuple[str, ...] = ("auto", "loop", "foreach", "fused", "compile")
    #: Whether ``step`` needs a closure.
    needs_closure = False
    #: Whether the method differentiates the loss itself: its closure then returns the loss
    #: and calls no ``backward``.
    differentiates = False

    def __new__(cls, *args: Any, **kwargs: Any) -> "Optimizer":
        """Refuse torch's keywords that have another name here, whatever the signature."""
        for word in ("foreach", "fused", "capturable", "differentiable"):
            if word in kwargs:
                raise TypeError(
                    f"{cls.__name__} has no {word}={kwargs[word]!r}; "
                    "choose with engine=, see Options"
                )
        return super().__new__(cls)

    # %% 23_machinery sec-base-class 3 f9b6e26e
    def __init__(
        self, params: Any, defaults: dict[str, Any], **options: Unpack[Options]
    ) -> None:
        kind = type(self).__name__
        if unknown := options.keys() - OPTIONS:
            known = [*inspect.signature(type(self)).parameters][1:-1]
            raise TypeError(
                f"{kind} has no {min(unknown)}=; use one of {', '.join([*known, *OPTIONS])}"
            )
        if isinstance(params, torch.nn.Module):
            raise TypeError(f"{kind} got a module; pass model.parameters()")
        self.skipped: Tensor | None = None
        self._forget()
        super(Optimizer, self).__init__(params, {**defaults, **OPTIONS, **options})


    def init_state(self, p: Tensor, g: Tensor, h: Names) -> dict[str, Tensor]:
        """What the rule remembers of one tensor before its first step, by name.

        Nothing, unless a subclass says so. Shapes must not depend on values: they are
        also asked for on the meta device. Which names there are may depend on whether a
        hyperparameter is zero or not.
        """
        return {}


    @staticmethod
    def clock(h: Names) -> None:
        """Compute, once a step, the numbers that all tensors share, into ``h``."""


    @staticmethod
    def refresh(s: Names, h: Names) -> None:
        """Renew state that is expensive to renew, after ``rule``, of matrices in turn."""


    def directions(
        self, work: list[tuple[dict[str, Any], list[Tensor]]], finite: Tensor | None
    ) -> dict[Tensor, Tensor]:
        """What the rule takes in place of a parameter's gradient; by default nothing.

        Called once in every step, after all refusals, also in one that is skipped.

        Args:
            work: The groups, each with its parameters that have a gradient.
            finite: Whether all is finite that has to be, where some group skips; else
                ``None``. On a CPU ``known`` reads it.
        """
        return {}


    @property
    def skipped_steps(self) -> int:
        """How many steps ``nonfinite="skip"`` has skipped, in this process.

        Reading it waits for the device.
        """
        return 0 if self.skipped is None else int(self.skipped)

    # %% 23_machinery sec-base-class 4 06eacf65
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns the
                loss. Optional.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            ValueError: A sparse gradient; state that does not fit its parameter; parameters
                that ``engine="fused"`` cannot take. Nothing has changed then.
            FloatingPointError: A gradient that is not finite, under ``nonfinite="raise"``.
                Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        engines = [self._engine(group, params) for group, params in work]
        finite = self._finite(work)
        directions = self.directions(work, finite)
        go = known(finite)
        for (group, params), engine in zip(work, engines, strict=True):
            skips = group["nonfinite"] == "skip"
            if go is not False or not skips:
                keep = finite if skips and go is None else None
                self._advance(group, params, engine, directions, keep)
        return loss

    # %% 23_machinery sec-base-class 5 3ba8da02
    def _engine(self, group: dict[str, Any], params: list[Tensor]) -> str:
        """The engine a group runs on, after refusing what it cannot do."""
        method, odd = self._method(group), ""
        settings = _settings(group)
        for p in params:
            g, state, plan = p.grad, self.state.get(p, {}), self._plans.get(p)
            if g.layout is not torch.strided:
                raise ValueError(
                    f"{type(self).__name__} got a gradient with layout {g.layout} for a "
                    f"parameter of shape {tuple(p.shape)}; use a dense gradient "
                    "(nn.Embedding: sparse=False)"
                )
            seen = (p.shape, p.stride(), p.dtype, p.device, g.stride(), g.dtype, settings)
            if not (
                plan
                and plan.begun
                and plan.seen == seen
                and all(map(operator.is_, map(state.get, plan.names), plan.state))
            ):
                plan = self._plan(method, p, group, seen)
            odd = odd or plan.odd
        name = group["engine"]
        check_choice("engine", name, method.engines)
        if name not in ("auto", "fused"):
            return name
        why = odd if method.fused else "torch has no kernel for this rule"
        if name == "fused" and why:
            kind = type(method).__name__
            raise ValueError(
                f"engine='fused' is not valid for {kind}: {why}; use engine='auto'"
            )
        lists = params and all(p.is_cuda for p in params)
        return "foreach" if why and lists else "loop" if why else "fused"


    def _plan(
        self, method: "Optimizer", p: Tensor, group: dict[str, Any], seen: tuple[Any, ...]
    ) -> _Plan:
        kind, state = type(method).__name__, self.state.get(p, {})
        sharded, whole = hasattr(p, "placements"), not method.elementwise or method.matrices
        partial = sharded and any(x.is_partial() for x in p.placements)
        why = self.misfit(p, state, group)
        if p.grad.shape != p.shape:
            why = (
                f"it has a gradient of shape {tuple(p.grad.shape)}; clear that with zero_grad() "
                "and call backward again"
            )
        elif p.is_complex() and whole:
            why = f"it is complex, and {kind} works on reals: pass torch.view_as_real of it"
        elif partial or sharded and method.matrices:
            why = (
                f"it is sharded over processes (DTensor), and {kind} needs all of it; use an "
                "elementwise method such as AdamW for it"
            )
        elif sharded and whole and group["engine"] not in ("auto", "loop"):
            why = (
                f"it is sharded over processes (DTensor), where {kind} has no "
                f"engine={group['engine']!r}; use engine='auto'"
            )
        if why:
            shape = tuple(p.shape)
            raise ValueError(f"{kind} cannot step {self._label(p, group)}, {shape}: {why}")
        wanted = method._initial(_meta(p), _meta(p), _shared(group))
        names = tuple(name for name in wanted if name not in method.clocks)
        begun = all(name in state for name in wanted)
        if begun:
            for name in names:
                x, like = state[name], wanted[name]
                # a model moved to channels_last keeps its numbers, in another order
                moved = x.device != p.device or x.stride() != like.stride()
                if moved and x.shape == p.shape and not sharded:
                    state[name] = torch.empty_like(p, dtype=x.dtype).copy_(x)
        dtypes = tuple((state if begun else wanted)[name].dtype for name in names)
        view = None
        if sharded and whole:  # DTensor cannot update a dimension of length one in place
            view = _whole if any(p.shape[x.dim] == 1 for x in p.placements if x.is_shard()) else None
        elif sharded or p.is_complex():
            view = plain
        key = (p.device, p.dtype, view, names, dtypes)
        odd = _unfusable(p, set(dtypes))
        kept = [state[name] for name in names] if begun else []
        self._plans[p] = plan = _Plan(seen, kept, names, begun, key, odd)
        return plan


    def misfit(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> str:
        """Why a state does not fit its parameter, with the remedy; or nothing."""
        method = self._method(group)
        wanted = method._initial(_meta(p), _meta(p), _shared(group))
        if not any(name in state for name in wanted):  # not begun
            return ""
        for name, like in wanted.items():
            if name not in state:
                return (
                    f"it has no state {name!r}, which the hyperparameters of its group ask for; "
                    "set them before its first step, or delete optimizer.state[p] to begin anew"
                )
            shape = torch.as_tensor(state[name]).shape
            if shape != like.shape and (name not in method.clocks or shape.numel() != 1):
                return (
                    f"its state {name!r} has shape {tuple(shape)}, which has to be "
                    f"{tuple(like.shape)}; load a checkpoint of this model, or delete "
                    "optimizer.state[p] to begin anew"
                )
        return ""

    # %% 23_machinery sec-base-class 6 cd3a19c6
    def examined(self, work: Any) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """What has to be finite, with its group and what an error calls it: each gradient."""
        for group, params in work:
            for p in params:
                yield group, f"the gradient of a parameter of shape {tuple(p.shape)}", p.grad


    def _finite(self, work: Any) -> Tensor | None:
        """Whether all is finite in the groups that skip; a skip is counted."""
        if all(group["nonfinite"] == "propagate" for group, _ in work):
            return None
        flags: dict[str, list[tuple[str, Tensor]]] = {"raise": [], "skip": []}
        for group, what, x in self.examined(work):
            if group["nonfinite"] != "propagate":
                x = plain(x)
                flag = x.sum(dtype=wide(x.dtype)).isfinite()
                flags[group["nonfinite"]].append((what, flag))
        shards = [p for _, params in work for p in params if hasattr(p, "placements")]
        meshes = list(dict.fromkeys(p.device_mesh for p in shards))
        fine = _agreed([flag for _, flag in flags["raise"]], meshes)
        if fine is not None and not fine:
            bad = [what for what, flag in flags["raise"] if not flag]
            raise FloatingPointError(
                f"{(bad or ['a gradient of another process'])[0]} is not finite and "
                "nonfinite='raise'; lower the learning rate, clip gradients, or use "
                "nonfinite='skip'"
            )
        finite = _agreed([flag for _, flag in flags["skip"]], meshes)
        if finite is not None:
            before = 0 if self.skipped is None else self.skipped.to(finite.device)
            self.skipped = before + (~finite).long()
        return finite

    # %% 23_machinery sec-base-class 8 a765ec0b
    def _advance(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        engine: str,
        directions: dict[Tensor, Tensor],
        finite: Tensor | None,
    ) -> None:
        """One step of a group: call by call, its rule, and the refreshes whose turn it is."""
        method, fresh = self._method(group), {}
        calls: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for p in params if not method.matrices else [p for p in params if p.numel()]:
            plan = self._plans[p]
            if not plan.begun:
                g = directions.get(p, p.grad)
                g = -g if group["maximize"] else g
                if finite is not None and not hasattr(p, "placements"):
                    g = torch.where(finite.to(p.device), g, 0)
                state = method._initial(p, g, _shared(group))
                fresh = fresh or {name: state[name] for name in method.clocks}
                self.state[p].update(state | fresh)  # who begins together shares clocks
            history = [id(self.state[p][name]) for name in method.clocks]
            calls[(plan.key, *history)].append(p)
        due = self._due(method, group)
        for ((device, dtype, view, names, dtypes), *_), some in calls.items():
            h = _shared(group)
            keep = None if finite is None else finite.to(device)
            before = self.state[some[0]] if method.clocks else {}
            for name in method.clocks:  # on the host, reading it waits for nobody
                value, ahead = before[name], engine == "fused" or keep is not None
                setattr(h, name, value.to(device, _widest(device)) if ahead else value.item())
            if "step" in method.clocks:
                h.step = h.step + 1
            method.clock(h)
            now = {n: _clock_tensor(getattr(h, n), before[n], keep) for n in method.clocks}
            p, g = some, [directions.get(p, p.grad) for p in some]
            s = {name: [self.state[p][name] for p in some] for name in names}
            units, copies = range(len(p)), []
            if view:
                given = [*p, *(x for values in s.values() for x in values)]
                p, g = [view(x) for x in p], [view(x) for x in g]
                s = {name: [view(x) for x in values] for name, values in s.items()}
                seen = [*p, *(x for values in s.values() for x in values)]
                copies = list(zip(given, seen, strict=True)) if view is _whole else []
            if method.matrices:
                units, p, g, s, copies = _matrices(method, p, g, s, group)
            widest = _common(dtype, dtypes)
            ENGINES[engine](Job(method, method.rule, h, keep, widest), p, g, s)
            if turn := [i for i, unit in enumerate(units) if unit in due]:
                again = Job(method, lambda p, g, s, h: method.refresh(s, h), h, keep, widest)
                s = {name: [values[i] for i in turn] for name, values in s.items()}
                p, g = [p[i] for i in turn], [g[i] for i in turn]
                ENGINES["foreach" if engine == "foreach" else "loop"](again, p, g, s)
            for x, copy in copies:
                y = copy.view(x.shape)
                x.copy_(_placed(y, x, x.dtype) if view else y)
            for q in some if now else ():
                self.state[q].update(now)


    def _initial(self, p: Tensor, g: Tensor, h: Names) -> dict[str, Tensor]:
        """The whole state of a parameter: what ``init_state`` gives for each of its matrices."""
        made: dict[str, Tensor] = {}
        for k, cut in enumerate(_cuts(p, vars(h)) if self.matrices else [...]):
            part = (p, g) if cut is ... else (_flat(p)[cut], _flat(g)[cut])
            for name, value in self.init_state(*part, h).items():
                dtype = _state_dtype(value, p, h.state_dtype, self._is_precise(name))
                if name in self.clocks:
                    made.setdefault(name, value)
                elif cut is ... or self._is_precise(name):
                    # a copy: state that shares memory with p or its gradient would change too
                    made[_key(name, k)] = value.detach().to(dtype, copy=True)
                else:  # of the shape of p: each matrix has its part of it
                    whole = made.setdefault(name, torch.zeros_like(p, dtype=dtype))
                    (flat := _flat(whole))[cut] = value
                    whole.copy_(flat.view(p.shape))
        return made


    def _is_precise(self, name: str) -> bool:
        return name.partition(".")[0] in self.precise


    def _due(self, method: "Optimizer", group: dict[str, Any]) -> set[Any]:
        """The matrices whose turn it is: about the same work in every step.

        The first step has none: ``init_state`` has just made what a refresh renews.
        """
        if method.every is None:
            return set()
        every, now = group[method.every], group.setdefault("steps", 0)
        group["steps"] = now + 1
        if every not in self._turns:
            groups = [x for x in self.param_groups if self._method(x) is method]
            units = [
                ((id(p), k), float(sum((side.stop - side.start) ** 3 for side in cut)))
                for x in groups if x[method.every] == every
                for p in x["params"] for k, cut in enumerate(_cuts(p, x))
            ]
            turns = share([cost for _, cost in units], every)
            self._turns[every] = list(zip(turns, (unit for unit, _ in units), strict=True))
        return {unit for turn, unit in self._turns[every] if turn == now % every and now}

    # %% 23_machinery sec-base-class 9 55ca12d4
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after validating every hyperparameter that it sets or inherits."""
        group = _named({**param_group})
        params = group["params"]
        if not isinstance(params, set):  # torch refuses those
            group["params"] = [params] if isinstance(params, Tensor) else list(params)
        method = self._method(group)
        if method is not self:  # its own defaults, under the options of this optimizer
            inherited = {name: self.defaults[name] for name in OPTIONS}
            group = {**method.defaults, **inherited, **group}
        method._check_group({**self.defaults, **group})
        known = {**self.defaults, **method.defaults, **dict.fromkeys(KEYS)}
        for name in group.keys() - known:
            if near := difflib.get_close_matches(name, known, 1, 0.8):
                raise TypeError(f"a group has {name!r}, which means nothing; use {near[0]!r}")
        super(Optimizer, self).add_param_group(group)
        self._forget()


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
            raise TypeError(
                f"state_dtype={dtype!r} is no real floating-point type; pass None or, say, "
                "torch.float32"
            )
        for x in group["params"] if self.matrices else ():
            p = x[1] if isinstance(x, tuple) else x
            if isinstance(p, Tensor) and p.dim() < 2 and not self.vectors:
                name = f" {x[0]!r}" if isinstance(x, tuple) else ""
                raise ValueError(
                    f"{type(self).__name__} takes matrices and got a parameter{name} of shape "
                    f"{tuple(p.shape)}; put it into a group with algorithm='adamw'"
                )
            if isinstance(p, Tensor):
                _cuts(p, group)


    def _method(self, group: dict[str, Any]) -> "Optimizer":
        """The optimizer whose rule steps a group: this one, or one made for its rule alone."""
        name = group.get("algorithm")
        if name is None:
            return self
        if name not in self._others:
            check_choice("algorithm", name, ALGORITHMS)
            module, _, kind = ALGORITHMS[name].partition(".")
            cls = getattr(import_module(f"guided_descent.{module}"), kind)
            self._others[name] = self if cls is type(self) else cls([torch.zeros(1, 1)])
        return self._others[name]


    def _forget(self) -> None:
        """Drop all that follows from parameters and groups; it is worked out again."""
        self._plans: dict[Tensor, _Plan] = {}
        self._turns: dict[int, list[tuple[int, Any]]] = {}
        self._others: dict[str, Optimizer] = {}


    def _label(self, p: Tensor, group: dict[str, Any]) -> str:
        """What an error calls a parameter."""
        names = group.get("param_names") or [""] * len(group["params"])
        name = next(n for n, q in zip(names, group["params"], strict=True) if q is p)
        return f"parameter {name!r}" if name else "a parameter"


    def __getstate__(self) -> dict[str, Any]:
        """All attributes, for a copy to be whole; but not what torch hangs on them."""
        return {name: value for name, value in vars(self).items() if name not in TRANSIENT}


    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in what an older checkpoint, or one of torch.optim's, does not say."""
        self._forget()
        super(Optimizer, self).__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it; no step here is
        for group in self.param_groups:
            for name, value in {**self.defaults, **self._method(group).defaults}.items():
                group.setdefault(name, value)


    def state_dict(self) -> dict[str, Any]:
        """The checkpoint, as in torch; clocks are handed out as a copy for each tensor."""
        packed = super(Optimizer, self).state_dict()
        for group in packed["param_groups"]:
            if group["state_dtype"] is not None:  # torch's distributed checkpoint knows no types
                group["state_dtype"] = str(group["state_dtype"])
            clocks = self._method(group).clocks
            for key in group["params"] if clocks else ():
                if state := packed["state"].get(key):
                    copies = {n: x.clone() for n, x in state.items() if n in clocks}
                    packed["state"][key] = {**state, **copies}
        return packed


    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of the ``torch.optim`` class of its algorithm.

        ``engine``, ``nonfinite`` and ``state_dtype`` stay as they are: they belong to this run
        and not to the model. Torch casts all state to the parameter's type; here clocks keep
        their own and ``state_dtype`` is honoured.

        Raises:
            ValueError: The checkpoint holds a hyperparameter that is out of range, or one that
                this optimizer does not have and that would change its steps; state that does
                not fit a parameter; another ``algorithm`` of a group. Nothing has changed then.
        """
        hooked: dict[str, Any] = dict(state_dict)  # what is left when torch's hooks have run

        def prepare(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            kept = ("engine", "nonfinite", "state_dtype")
            groups = []
            for saved, own in zip(given["param_groups"], self.param_groups, strict=False):
                group = {**saved, **{name: own[name] for name in kept}}
                groups.append(group)
                self._check_saved(group, own, given["state"])
            hooked.update(given, param_groups=groups + given["param_groups"][len(groups) :])
            return hooked

        handle = self.register_load_state_dict_pre_hook(prepare)
        try:
            super(Optimizer, self).load_state_dict(state_dict)
        finally:
            handle.remove()
        self._forget()
        clocks: dict[tuple[str, float], Tensor] = {}
        for saved, group in zip(hooked["param_groups"], self.param_groups, strict=True):
            method = self._method(group)
            for key, p in zip(saved["params"], group["params"], strict=True):
                state = hooked["state"].get(key, {})
                if any(value is None for value in state.values()):  # torch's "not begun"
                    self.state.pop(p, None)
                    continue
                for name, value in state.items():
                    if name in method.clocks:
                        clock = torch.as_tensor(value).detach().cpu().clone()
                        self.state[p][name] = clocks.setdefault((name, clock.item()), clock)
                    elif isinstance(value, Tensor):
                        precise = method._is_precise(name)
                        dtype = _state_dtype(value, p, group["state_dtype"], precise)
                        self.state[p][name] = _placed(value.detach(), p, dtype)


    def _check_saved(
        self, saved: dict[str, Any], own: dict[str, Any], state: dict[Any, Any]
    ) -> None:
        """Refuse a group of a checkpoint that is not this group's."""
        _named(saved)
        if saved.get("algorithm") != own.get("algorithm"):
            raise ValueError(
                f"the checkpoint steps a group by algorithm={saved.get('algorithm')!r}, this "
                f"optimizer by {own.get('algorithm')!r}; build it as it was"
            )
        method = self._method(saved)
        full = {**self.defaults, **method.defaults, **saved, "params": own["params"]}
        method._check_group(full)
        for name in (*RANGES, "nesterov", "amsgrad", "centered"):
            if saved.get(name) and name not in method.defaults | self.defaults:
                raise ValueError(
                    f"the checkpoint has {name}={saved[name]!r}, which "
                    f"{type(method).__name__} does not know"
                )
        for key, p in zip(saved["params"], own["params"], strict=False):
            found = state.get(key, {})
            if all(value is not None for value in found.values()):
                if why := self.misfit(p, found, full):
                    label, shape = self._label(p, own), tuple(p.shape)
                    raise ValueError(f"the checkpoint does not fit {label}, {shape}: {why}")


# %% 23_machinery sec-base-class 7 de1e1167
def _agreed(flags: list[Tensor], meshes: list[Any]) -> Tensor | None:
    """All flags in one, on the device of the first; and over the processes of a mesh."""
    if not flags:
        return None
    fine = torch.stack([flag.to(flags[0].device) for flag in flags]).all().long()
    for group in [group for mesh in meshes for group in mesh.get_all_groups()]:
        torch.distributed.all_reduce(fine, torch.distributed.ReduceOp.MIN, group)
    return fine.bool()


def known(finite: Tensor | None) -> bool | None:
    """What a flag says, where to look at it means to wait for nobody; else ``None``."""
    if finite is None:
        return True
    return bool(finite.numpy()) if finite.device.type == "cpu" else None


# %% 23_machinery sec-base-class 10 c361234d
#: What a group's ``algorithm`` may name, and where it is.
ALGORITHMS = {
    "adafactor": "adaptive.Adafactor",
    "adagrad": "adaptive.Adagrad",
    "adam": "adaptive.Adam",
    "adamw": "adaptive.AdamW",
    "ademamix": "adaptive.AdEMAMix",
    "nadam": "adaptive.NAdam",
    "rmsprop": "adaptive.RMSprop",
    "sgd": "sgd.SGD",
}
#: What any group may hold, beside hyperparameters.
KEYS = ("params", "param_names", "algorithm", "block_size", "split_sizes", "initial_lr")
#: Attributes that a copy makes anew: what torch hangs on every optimizer, and ours.
TRANSIENT = vars(torch.optim.SGD([torch.zeros(1)])).keys() | {"step", "_graph", "_opt_called"}
TRANSIENT |= {"_plans", "_turns", "_others"}
TRANSIENT -= {"defaults", "state", "param_groups"}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: this one, or single precision if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def _whole(x: Tensor) -> Tensor:
    """A sharded tensor, gathered."""
    return x.full_tensor() if hasattr(x, "placements") else x


def _named(group: dict[str, Any]) -> dict[str, Any]:
    """A group with other libraries' ways to name an algorithm put into ``algorithm``."""
    if not group.pop("use_muon", True) or group.pop("use_fallback", False):
        group.setdefault("algorithm", "adamw")
    if "kind" in group:
        group["algorithm"] = group.pop("kind")
    return group


def _shared(group: dict[str, Any]) -> Names:
    """What a rule finds in ``h``."""
    h = {name: x for name, x in group.items() if name not in ("params", "param_names")}
    if isinstance(h["lr"], Tensor):
        h["lr"] = h["lr"].squeeze()
    return Names(**h)


#: Values of a group that change from step to step, and no state depends on.
_MOVING = ("params", "param_names", "lr", "initial_lr", "steps")


def _settings(group: dict[str, Any]) -> list[Any]:
    """All of a group that state may depend on; of a number only whether it is zero."""
    return [
        bool(x) if isinstance(x, float) else None if isinstance(x, Tensor | tuple) else x
        for name, x in group.items()
        if name not in _MOVING
    ]


def _meta(p: Tensor) -> Tensor:
    """A tensor like ``p`` without numbers; of a shard, like the whole."""
    if hasattr(p, "placements"):
        return torch.empty(p.shape, dtype=p.dtype, device="meta")
    return torch.empty_like(p, device="meta")


def _placed(value: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a state, with its parameter's device, layout and sharding."""
    if hasattr(p, "placements") and not hasattr(value, "placements"):
        from torch.distributed.tensor import distribute_tensor

        if value.shape == p.shape:  # every process has all of it
            mesh, value = p.device_mesh, value.to(p.device)
            value = distribute_tensor(value, mesh, p.placements, src_data_rank=None)
    sharded = hasattr(value, "placements")
    like = value if sharded or value.shape != p.shape else p
    return torch.empty_like(like, dtype=dtype, device=p.device).copy_(value)


def _cuts(p: Tensor, group: dict[str, Any]) -> list[tuple[slice, slice]]:
    """Where the matrices of a parameter lie in it, once it is flattened."""
    if p.numel() == 0:
        return []
    rows, columns = _sides(p)
    parts = group.get("split_sizes") or [rows]
    if sum(parts) != rows:
        raise ValueError(
            f"split_sizes={parts!r} adds up to {sum(parts)} and a parameter has {rows} rows; "
            "pass sizes that add up to it, in a group of its own"
        )
    size = group.get("block_size") or max(rows, columns)
    tall = [height for part in parts for height in _balanced(part, size)]
    return [(a, b) for a in _slices(tall) for b in _slices(_balanced(columns, size))]


def _balanced(length: int, size: int) -> list[int]:
    """A length as the fewest parts of at most this size, as equal as can be."""
    k = -(-length // size)
    return [length // k + (i < length % k) for i in range(k)]


def _slices(sizes: list[int]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def _sides(p: Tensor) -> tuple[int, int]:
    return (p.numel(), 1) if p.dim() < 2 else (len(p), p.numel() // max(len(p), 1))


def _flat(x: Tensor) -> Tensor:
    """Two-dimensional; it shares memory where it can."""
    return x if x.dim() == 2 else x.reshape(_sides(x))


def _key(name: str, k: int) -> str:
    """What a checkpoint calls the state of a parameter's k-th matrix."""
    return f"{name}.{k}" if k else name


def _matrices(
    method: Optimizer, p: list, g: list, s: dict[str, list], group: dict[str, Any]
) -> tuple[list, list, list, dict[str, list], list]:
    """Each matrix of each parameter: a name, the matrix, its gradient and its state.

    Matrices share memory with their tensor; where they cannot, a copy is noted, to be
    written back. Those of one shape are neighbours, so that they can be stacked.
    """
    units, copies = [], []

    def flat(x: Tensor) -> Tensor:
        y = _flat(x)
        if y.data_ptr() != x.data_ptr():
            copies.append((x, y))
        return y

    for i, q in enumerate(p):
        alike = {n: flat(x[i]) for n, x in s.items() if not method._is_precise(n)}
        whole, grad = flat(q), _flat(g[i])
        for k, cut in enumerate(_cuts(q, group)):
            state = {name: x[cut] for name, x in alike.items()}
            state |= {n: s[_key(n, k)][i] for n in method.precise if _key(n, k) in s}
            units.append(((id(q), k), whole[cut], grad[cut], state))
    units.sort(key=lambda unit: sorted(unit[1].shape))
    names, matrices, grads, states = map(list, zip(*units, strict=True))
    s = {name: [state[name] for state in states] for name in states[0]}
    return names, matrices, grads, s, copies


def _common(dtype: torch.dtype, others: tuple[torch.dtype, ...]) -> torch.dtype | None:
    """The type to compute in, where a state has another than its parameter; else ``None``."""
    real = {x.to_real() for x in others if x.is_floating_point or x.is_complex}
    both = functools.reduce(torch.promote_types, real, dtype.to_real())
    return both if real - {dtype.to_real()} else None


def _widest(device: torch.device) -> torch.dtype:
    """Double precision, where the device has it: powers of β₂ = 0.999 need the digits."""
    return torch.float32 if device.type == "mps" else torch.float64


def _clock_tensor(value: float | Tensor, before: Tensor, finite: Tensor | None) -> Tensor:
    """A clock as it is stored after the step."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=before.dtype)
    now = value if finite is None else torch.where(finite, value, before.to(value))
    return now.to(min(before.dtype, value.dtype, key=lambda dtype: dtype.itemsize))


def _state_dtype(
    value: Tensor, p: Tensor, dtype: torch.dtype | None, precise: bool
) -> torch.dtype:
    """The type a state is kept in: as asked, else the parameter's, wider where precise.

    Complex stays complex, and integers integers.
    """
    if not (value.is_floating_point() or value.is_complex()):
        return value.dtype
    dtype = dtype or p.dtype
    dtype = wide(dtype) if precise else dtype
    return dtype.to_complex() if value.is_complex() and not dtype.is_complex else dtype


def _unfusable(p: Tensor, dtypes: set[torch.dtype]) -> str:
    """Why torch's fused kernels cannot take a parameter, or nothing."""
    if not p.is_floating_point():
        return "a parameter is not a real floating-point tensor"
    p, g, kind = plain(p), plain(p.grad), p.device.type
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        return f"a parameter is on {kind}"
    if kind == "cpu" and p.dtype.itemsize < 4:
        return f"a parameter is {p.dtype} on the CPU"  # fused SGD of torch 2.13 is wrong
    last = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
    if not (p.is_contiguous() or last) or p.stride() != g.stride():
        return "a parameter or its gradient is not contiguous"
    if dtypes - {p.dtype} or g.dtype != p.dtype:
        return f"a state or gradient is not {p.dtype}, as its parameter is; see state_dtype="
    return ""
