# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 5216a79a
"""Chapter 23, The machinery."""

__all__ = [
    "ALGORITHMS",
    "KEYS",
    "OPTIONS",
    "RANGES",
    "Engine",
    "Grads",
    "Group",
    "Nonfinite",
    "Optimizer",
    "Options",
    "check_choice",
    "check_range",
    "known",
    "share",
    "wide",
]


# %% 23_machinery sec-optimizer 1 f751b04b
import difflib
import functools
import inspect
import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from guided_descent.engines import ENGINES, Job, Names, Work, plain

#: A parameter group.
Group = dict[str, Any]
#: Parameters, each with what its rule takes for its gradient.
Grads = dict[Tensor, Tensor]
#: How a rule is run; see ``Options``.
Engine = Literal["auto", "loop", "foreach", "fused", "compile"]
#: What to do about a gradient that is not finite; see ``Options``.
Nonfinite = Literal["propagate", "skip", "raise"]


class Options(TypedDict, total=False):
    """Keywords that every optimizer of the package takes beside its own.

    Attributes:
        maximize: Climb instead of descend. Default ``False``.
        engine: What runs the rule. ``"loop"``: one tensor after another. ``"foreach"``:
            lists of tensors through ``torch._foreach_*``, matrices of one shape
            stacked. ``"fused"``: torch's kernel, where it has one for exactly this
            rule. ``"compile"``: one graph over all tensors, which costs tens of seconds
            at the first step; another ``lr`` does not compile again, another value of
            any other hyperparameter does. ``"auto"`` (the default): the fastest that is
            valid for the tensors at hand, never compiled.
        nonfinite: What to do about a gradient with an infinity or a NaN in it (one
            whose sum overflows counts). ``"propagate"`` (the default): nothing, as
            torch does. ``"skip"``: leave everything as it is, decided on the device
            without a host synchronisation and counted in ``skipped_steps``.
            ``"raise"``: a ``FloatingPointError`` before anything changes; it reads one
            number back.
        state_dtype: Data type of the state. Default ``None``: the parameter's.
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


# %% 23_machinery sec-ranges 2 ae1d739c
def check_range(name: str, value: Any, interval: str | tuple[str, ...]) -> None:
    """Refuse a number outside an interval.

    Args:
        name: The argument's name, for the message.
        value: A number, or a one-element tensor; for a tuple of intervals as many.
        interval: Such as ``"[0, 1)"``: a square bracket includes the bound, a round one
            excludes it. ``"[1, inf) int | None"`` asks for an integer, or ``None``.

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
    span, integer, _ = span.partition(" int")
    kind, noun = (Integral, "an integer") if integer else (Real | Tensor, "a number")
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
        shown = value if integer else float(value)
        raise ValueError(f"{name}={shown} is outside its range; {remedy}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is none of the choices; the ``ValueError`` lists them."""
    if not any(value is choice or value == choice for choice in choices):
        options = ", ".join(map(repr, choices))
        raise ValueError(f"{name}={value!r} is unknown; use one of {options}")


# %% 23_machinery sec-turns 1 9d8e9451
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


# %% 23_machinery sec-base-class 1 bb84ce7e
class _Plan(NamedTuple):
    """How a parameter meets its rule, until something changes."""

    seen: tuple[Any, ...]  # what it was derived from,
    state: list[Tensor]  # and the state that the rule sees, clocks apart,
    names: tuple[str, ...]  # with its names
    begun: bool
    key: tuple[Any, ...]  # parameters with equal keys may share a call
    odd: str  # why torch's fused kernels cannot take it, or nothing


class Optimizer(torch.optim.Optimizer):
    """The base of every optimizer: it runs a subclass's ``rule`` over all parameters.

    A subclass has an ``__init__`` that passes its defaults on, a static ``rule(p, g, s,
    h)`` that changes the parameter ``p`` and its state ``s`` in place from the gradient
    ``g`` and what the group shares, ``h``; and, where it needs them, ``init_state``,
    ``clocks`` with ``clock``, ``fused``, ``elementwise``, ``matrices``, ``every`` with
    ``refresh``, ``directions`` and ``ranges``.

    A group may carry ``algorithm``, the name of an optimizer of the package: its rule
    then steps the group, with its own defaults. ``use_muon``, ``use_fallback`` and
    ``kind``, as other libraries say it, are understood too.

    Args:
        params: Tensors, named tensors, or groups of them, as in ``torch.optim``.
        defaults: The method's hyperparameters. Those named in ``RANGES`` are validated,
            in every group.
        **options: See ``Options``.

    Raises:
        TypeError: A hyperparameter of the wrong type; one of torch's keywords that
            ``engine=`` replaces; a module in place of its parameters.
        ValueError: A hyperparameter outside its range; an unknown ``engine``,
            ``nonfinite`` or ``algorithm``; a vector where the rule takes matrices.

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
    #: The hyperparameter that says in how many steps ``refresh`` comes round to a
    #: matrix.
    every: str | None = None
    #: State that belongs to one matrix, of any shape, in single precision at least.
    precise: tuple[str, ...] = ()
    #: State that is one number, shared by tensors with the same history. The rule finds
    #: its value in ``h``.
    clocks: tuple[str, ...] = ()
    #: Ranges of hyperparameters that only this method has, or has in another form.
    ranges: dict[str, str | tuple[str, ...]] = {}
    #: The engines it can run on.
    engines: tuple[str, ...] = ("auto", "loop", "foreach", "fused", "compile")
    #: Whether ``step`` needs a closure.
    needs_closure = False
    #: Whether the method differentiates the loss itself: its closure then returns the
    #: loss and calls no ``backward``.
    differentiates = False

    def __new__(cls, *args: Any, **kwargs: Any) -> "Optimizer":
        """Refuse torch's keywords that have another name here, and a parent's alone."""
        for word in _TORCHS:
            if word in kwargs:
                raise TypeError(_engine_instead(cls, word, kwargs[word]))
        own = inspect.signature(cls.__init__).parameters.keys() | OPTIONS
        if (unknown := kwargs.keys() - own) and _declares(cls):
            raise TypeError(_unknown(cls, min(unknown)))
        return super().__new__(cls)

    # %% 23_machinery sec-base-class 2 34c5b453
    def __init__(
        self, params: Any, defaults: dict[str, Any], **options: Unpack[Options]
    ) -> None:
        kind = type(self).__name__
        if unknown := options.keys() - OPTIONS:
            raise TypeError(_unknown(type(self), min(unknown)))
        if isinstance(params, torch.nn.Module):
            raise TypeError(f"{kind} got a module; pass model.parameters()")
        self.skipped: Tensor | None = None
        self._forget()
        super(Optimizer, self).__init__(params, {**defaults, **OPTIONS, **options})


    def init_state(self, p: Tensor, g: Tensor, h: Names) -> dict[str, Tensor]:
        """What the rule remembers of a tensor before its first step, by name.

        Shapes must not depend on values: they are also asked for on the meta device. Names
        may depend on whether a hyperparameter is zero.
        """
        return {}


    @staticmethod
    def clock(h: Names) -> None:
        """Compute, once a step, the numbers that all tensors share, into ``h``."""


    @staticmethod
    def refresh(s: Names, h: Names) -> None:
        """Renew state that is expensive to renew, after ``rule``, of matrices in turn."""


    def block(self, rows: int, columns: int, group: Group) -> tuple[int, int]:
        """The largest height and width that a matrix of this shape is cut into."""
        size = group.get("block_size") or max(rows, columns)
        return size, size


    def directions(self, work: Any, finite: Tensor | None) -> Grads:
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
        """How many steps ``"skip"`` has skipped, in this process; reading it waits."""
        return 0 if self.skipped is None else int(self.skipped)

    # %% 23_machinery sec-base-class 3 2474de85
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns
                the loss. Optional.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            ValueError: A sparse gradient; state that does not fit its parameter; parameters
                that ``engine="fused"`` cannot take. Nothing has changed then.
            FloatingPointError: A gradient that is not finite, under ``nonfinite="raise"``.
                Nothing has changed then.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        groups = self.param_groups
        work = [(x, [p for p in x["params"] if p.grad is not None]) for x in groups]
        engines = [self._engine(group, params) for group, params in work]
        finite = self._finite(work)
        directions = self.directions(work, finite)
        go = known(finite)
        for (group, params), engine in zip(work, engines, strict=True):
            skips = group["nonfinite"] == "skip"
            if go is not False or not skips:
                grads = {p: directions.get(p, p.grad) for p in params}
                keep = finite if skips and go is None else None
                self._advance(group, engine, grads, keep)
        return loss

    # %% 23_machinery sec-base-class 4 ceee56a0
    def _engine(self, group: Group, params: list[Tensor]) -> str:
        """The engine a group runs on, after refusing what it cannot do."""
        method, name, settings = self._method(group), group["engine"], _settings(group)
        method._check_engine(name)
        odd = [plan.odd for p in params if (plan := self._plan(p, group, settings)).odd]
        if name not in ("auto", "fused"):
            return name
        why = "".join(odd[:1]) if method.fused else "torch has no kernel for this rule"
        if not why:
            return "fused"
        if name == "fused":
            said = f"engine='fused' is not valid for {type(method).__name__}: {why}"
            raise ValueError(f"{said}; use engine='auto'")
        return "foreach" if params and all(p.is_cuda for p in params) else "loop"


    def _plan(self, p: Tensor, group: Group, settings: list[Any]) -> _Plan:
        """How a parameter meets its rule: as before, where nothing has changed."""
        method, g, state = self._method(group), p.grad, self.state.get(p, {})
        plan, seen = self._plans.get(p), (_looks(p), _looks(g), settings)
        if plan and plan.begun and plan.seen == seen:
            if all(map(operator.is_, map(state.get, plan.names), plan.state)):
                return plan
        kind, sharded = type(method).__name__, hasattr(p, "placements")
        whole = method.matrices or not method.elementwise
        partial = sharded and any(x.is_partial() for x in p.placements)
        apart, engine = "it is sharded over processes (DTensor)", group["engine"]
        why = self.misfit(p, state, group)
        if g.layout is not torch.strided:
            given = f"its gradient has layout {g.layout}"
            why = f"{given}; use a dense gradient (nn.Embedding: sparse=False)"
        elif g.shape != p.shape:
            given = f"it has a gradient of shape {tuple(g.shape)}"
            why = f"{given}; clear that with zero_grad() and call backward again"
        elif p.is_complex() and whole:
            why = f"it is complex, and {kind} is for reals: pass torch.view_as_real of it"
        elif partial or sharded and method.matrices:
            remedy = "put it into a group with algorithm='adamw'"
            why = f"{apart}, and {kind} needs all of it; {remedy}"
        elif sharded and whole and engine not in ("auto", "loop"):
            why = f"{apart}, where {kind} has no engine={engine!r}; use engine='auto'"
        if why:
            raise ValueError(f"{kind} cannot step {self._label(p, group)}: {why}")
        wanted = method._initial(_meta(p), _meta(p), _shared(group))
        names = tuple(name for name in wanted if name not in method.clocks)
        begun = wanted.keys() <= state.keys()
        for name in names if begun and not sharded else ():
            x, like = state[name], wanted[name]
            # a model moved to channels_last keeps its numbers, in another order
            moved = x.device != p.device or x.stride() != like.stride()
            if moved and x.shape == p.shape:
                state[name] = torch.empty_like(p, dtype=x.dtype).copy_(x)
        view = plain if sharded or p.is_complex() else None
        if sharded and whole:
            # DTensor cannot update a dimension of length one in place
            thin = any(p.shape[x.dim] == 1 for x in p.placements if x.is_shard())
            view = _whole if thin else None
        kept = [(state if begun else wanted)[name] for name in names]
        dtypes = tuple(x.dtype for x in kept)
        key = (p.device, p.dtype, view, names, dtypes)
        plan = _Plan(seen, kept, names, begun, key, _unfusable(p, set(dtypes)))
        self._plans[p] = plan
        return plan


    def misfit(self, p: Tensor, state: dict[str, Any], group: Group) -> str:
        """Why a state does not fit its parameter, with the remedy; or nothing."""
        method, anew = self._method(group), "or delete optimizer.state[p] to begin anew"
        wanted = method._initial(_meta(p), _meta(p), _shared(group))
        for name, like in wanted.items() if wanted.keys() & state.keys() else ():
            if name not in state:
                why = f"no state {name!r}, which the hyperparameters of its group ask for"
                remedy = "load a checkpoint of this optimizer, set them before its first"
                return f"it has {why}; {remedy} step, {anew}"
            shape = torch.as_tensor(state[name]).shape
            single = name in method.clocks and shape.numel() == 1
            if shape != like.shape and not single:
                why = f"has shape {tuple(shape)}, which has to be {tuple(like.shape)}"
                return f"its state {name!r} {why}; load a checkpoint of this model, {anew}"
        return ""

    # %% 23_machinery sec-base-class 5 8306dd8e
    def examined(self, work: Any) -> Iterator[tuple[Group, str, Tensor]]:
        """What has to be finite, with its group and its name in an error."""
        for group, params in work:
            for p in params:
                what = f"the gradient of a parameter of shape {tuple(p.shape)}"
                yield group, what, p.grad


    def _finite(self, work: Any) -> Tensor | None:
        """Whether all is finite in the groups that skip; a skip is counted."""
        if all(group["nonfinite"] == "propagate" for group, _ in work):
            return None
        flags: dict[str, list[tuple[str, Tensor]]] = {"raise": [], "skip": []}
        for group, what, x in self.examined(work):
            if group["nonfinite"] in flags:
                x = plain(x)
                fine = x.sum(dtype=wide(x.dtype)).isfinite()
                flags[group["nonfinite"]].append((what, fine))
        shards = [p for _, params in work for p in params if hasattr(p, "placements")]
        meshes = {p.device_mesh: None for p in shards}
        strict, finite = (_agreed([x for _, x in of], meshes) for of in flags.values())
        if strict is not None and not strict:
            bad = [what for what, fine in flags["raise"] if not fine]
            what = bad[0] if bad else "a gradient of another process"
            raise FloatingPointError(
                f"{what} is not finite and nonfinite='raise'; lower the learning rate, "
                "clip gradients, or use nonfinite='skip'"
            )
        if finite is not None:
            before = 0 if self.skipped is None else self.skipped.to(finite.device)
            self.skipped = before + (~finite).long()
        return finite

    # %% 23_machinery sec-base-class 7 e36ef223
    def _advance(
        self, group: Group, engine: str, grads: Grads, finite: Tensor | None
    ) -> None:
        """One step of a group, call by call: the rule, and refreshes whose turn it is."""
        method, due = self._method(group), self._due(group)
        for (key, *_), some in self._calls(group, grads, finite).items():
            device, dtype, view, names, dtypes = key
            h, state = _shared(group), [self.state.get(p, {}) for p in some]
            keep = None if finite is None else finite.to(device)
            before = {name: state[0][name] for name in method.clocks}
            for name, x in before.items():  # on the host, reading it waits for nobody
                ahead = engine == "fused" or keep is not None
                setattr(h, name, x.to(device, _widest(device)) if ahead else x.item())
            if "step" in before:
                h.step = h.step + 1
            method.clock(h)
            now = {n: _clock_tensor(getattr(h, n), x, keep) for n, x in before.items()}
            lists = {name: [s[name] for s in state] for name in names}
            given = work = Work(some, [grads[p] for p in some], lists)
            copies: Iterable[tuple[Tensor, Tensor]] = []
            if view:
                work = given.each(lambda xs, view=view: [view(x) for x in xs])
            if view is _whole:
                copies = zip(given.changing, work.changing, strict=True)
            if method.matrices:
                units, work, copies = _matrices(method, work, group)
            job = Job(method, method.rule, h, keep, _common(dtype, dtypes))
            ENGINES[engine](job, work)
            if turn := [i for i, unit in enumerate(units) if unit in due] if due else []:
                again = job._replace(rule=lambda p, g, s, h: method.refresh(s, h))
                chosen = work.each(lambda xs, turn=turn: [xs[i] for i in turn])
                ENGINES["foreach" if engine == "foreach" else "loop"](again, chosen)
            for x, copy in copies:
                x.copy_(_placed(copy, x, x.dtype) if view else _folded(copy, x, group))
            for s in state:
                s.update(now)


    def _calls(
        self, group: Group, grads: Grads, finite: Tensor | None
    ) -> dict[Any, list[Tensor]]:
        """Parameters by what those in one call have in common; all have a state."""
        method, fresh = self._method(group), {}
        calls: dict[Any, list[Tensor]] = defaultdict(list)
        for p, g in grads.items():
            plan = self._plans[p]
            if method.matrices and not p.numel():
                continue
            if not plan.begun:
                g = -g if group["maximize"] else g
                if finite is not None and not hasattr(p, "placements"):
                    g = torch.where(finite.to(p.device), g, 0)
                state = method._initial(p, g, _shared(group))
                fresh = fresh or {name: state[name] for name in method.clocks}
                self.state[p].update(state | fresh)  # who begins together shares clocks
            history = [id(self.state[p][name]) for name in method.clocks]
            calls[(plan.key, *history)].append(p)
        return calls


    def _initial(self, p: Tensor, g: Tensor, h: Names) -> dict[str, Tensor]:
        """The state of a parameter: what ``init_state`` gives for each of its matrices."""
        made: dict[str, Tensor] = {}
        for k, cut in enumerate(_cuts(self, p, vars(h)) if self.matrices else [...]):
            part = [x if cut is ... else _flat(x, vars(h))[cut] for x in (p, g)]
            for name, value in self.init_state(*part, h).items():
                precise = self._is_precise(name)
                dtype = _state_dtype(value, p, h.state_dtype, precise)
                if name in self.clocks:
                    made.setdefault(name, value)
                elif cut is ... or precise:
                    # a copy: state that shares memory with p or its gradient would change
                    # too
                    made[_key(name, k)] = value.detach().to(dtype, copy=True)
                else:  # of the shape of p: each matrix has its part of it
                    whole = made.setdefault(name, torch.zeros_like(p, dtype=dtype))
                    (flat := _flat(whole, vars(h)))[cut] = value
                    whole.copy_(_folded(flat, p, vars(h)))
        return made


    def _is_precise(self, name: str) -> bool:
        return name.partition(".")[0] in self.precise


    def _due(self, group: Group) -> set[Any]:
        """The matrices whose turn it is: about the same work in every step.

        The first step has none: ``init_state`` has just made what a refresh renews.
        """
        method = self._method(group)
        if method.every is None:
            return set()
        every, now = group[method.every], group.setdefault("steps", 0)
        group["steps"] = now + 1
        if (kind := (type(method), every)) not in self._turns:
            costs = {
                (p, k): float(sum((side.stop - side.start) ** 3 for side in cut))
                for x in self.param_groups
                if self._method(x) is method and x[method.every] == every
                for p in x["params"]
                for k, cut in enumerate(_cuts(method, p, x))
            }
            turns = share([*costs.values()], every)
            self._turns[kind] = dict(zip(costs, turns, strict=True))
        turn = now % every if now else None
        return {unit for unit, its in self._turns[kind].items() if its == turn}

    # %% 23_machinery sec-base-class 8 d056315c
    def add_param_group(self, param_group: Group) -> None:
        """Add a group, after validating every hyperparameter that it sets or inherits."""
        group = _named({**param_group})
        params = group["params"]
        if not isinstance(params, set):  # torch refuses those
            group["params"] = [params] if isinstance(params, Tensor) else list(params)
        method = self._method(group)
        if method is not self:  # its own defaults, under the options of this optimizer
            options = {name: self.defaults[name] for name in OPTIONS}
            group = {**method.defaults, **options, **group}
        method._check_group({**self.defaults, **group})
        known = {*self.defaults, *method.defaults, *KEYS}
        whole = {x for cls in (type(self), type(method)) for x in _arguments(cls)}
        for name in sorted(group.keys() - known):
            if name in _TORCHS and group[name]:
                raise TypeError(_engine_instead(type(method), name, group[name]))
            if name in whole:
                told = f"{name!r} is set for the whole optimizer, not for a group"
                raise TypeError(f"{told}; pass it to {type(self).__name__} itself")
            if near := difflib.get_close_matches(name, known, 1, 0.8):
                told = f"a group has {name!r}, which means nothing"
                raise TypeError(f"{told}; use {near[0]!r}")
        super(Optimizer, self).add_param_group(group)
        self._forget()


    def _check_group(self, group: Group) -> None:
        """Refuse what is out of range or of the wrong kind."""
        for name, interval in {**RANGES, **self.ranges}.items():
            if name in self.defaults:
                check_range(name, group[name], interval)
        self._check_engine(group["engine"])
        check_choice("nonfinite", group["nonfinite"], ("propagate", "skip", "raise"))
        check_choice("maximize", group["maximize"], (False, True))
        dtype = group["state_dtype"]
        real = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if not (real or dtype is None):
            told = f"state_dtype={dtype!r} is no real floating-point type"
            raise TypeError(f"{told}; pass None or, say, torch.float32")
        for x in group["params"] if self.matrices else ():
            name, p = x if isinstance(x, tuple) else ("", x)
            if not isinstance(p, Tensor):
                continue
            if p.dim() < 2 and not self.vectors:
                got = f"a parameter {name!r}" if name else "a parameter"
                raise ValueError(
                    f"{type(self).__name__} takes matrices and got {got} of shape "
                    f"{tuple(p.shape)}; put it into a group with algorithm='adamw'"
                )
            _cuts(self, p, group)


    def _check_engine(self, name: Any) -> None:
        """Refuse an engine that does not exist, or not for this method."""
        if name in Engine.__args__ and name not in self.engines:
            told = f"{type(self).__name__} has no engine={name!r}"
            raise ValueError(f"{told}; use one of {', '.join(map(repr, self.engines))}")
        check_choice("engine", name, self.engines)


    def _method(self, group: Group) -> "Optimizer":
        """The optimizer whose rule steps a group: this, or one made for its rule alone."""
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
        self._turns: dict[Any, dict[Any, int]] = {}
        self._others: dict[str, Optimizer] = {}


    def _label(self, p: Tensor, group: Group) -> str:
        """What an error calls a parameter."""
        names = group.get("param_names") or [""] * len(group["params"])
        name = next(n for n, q in zip(names, group["params"], strict=True) if q is p)
        return f"{f'parameter {name!r}' if name else 'a parameter'}, {tuple(p.shape)}"


    def __getstate__(self) -> dict[str, Any]:
        """All attributes, for a copy to be whole; but not what torch hangs on them."""
        return {name: x for name, x in vars(self).items() if name not in _transient()}


    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in what an older checkpoint, or one of torch.optim's, does not say."""
        self._forget()
        super(Optimizer, self).__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it; no step here is
        for group in self.param_groups:
            known = {**self.defaults, **self._method(group).defaults}
            group.update({name: x for name, x in known.items() if name not in group})


    def state_dict(self) -> dict[str, Any]:
        """The checkpoint, as in torch; clocks are handed out as a copy for each tensor."""
        packed = super(Optimizer, self).state_dict()
        for group in packed["param_groups"]:
            if group["state_dtype"] is not None:
                # torch's distributed checkpoint knows no types
                group["state_dtype"] = str(group["state_dtype"])
            clocks = self._method(group).clocks
            for key in packed["state"].keys() & group["params"] if clocks else ():
                state = packed["state"][key]
                copies = {n: x.clone() for n, x in state.items() if n in clocks}
                packed["state"][key] = {**state, **copies}
        return packed


    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of its ``torch.optim`` namesake.

        ``engine``, ``nonfinite`` and ``state_dtype`` stay as they are: they belong to this
        run and not to the model. Torch casts all state to the parameter's type; here clocks
        keep their own and ``state_dtype`` is honoured.

        Raises:
            ValueError: The checkpoint holds a hyperparameter that is out of range, or one
                that this optimizer does not have and that would change its steps; state
                that does not fit a parameter; another ``algorithm`` of a group. Nothing has
                changed then.
        """
        hooked: dict[str, Any] = {}  # what is left when torch's hooks have run
        kept = ("engine", "nonfinite", "state_dtype")

        def prepare(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            groups = list(given["param_groups"])
            for i, own in enumerate(self.param_groups[: len(groups)]):
                groups[i] = _named({**groups[i], **{name: own[name] for name in kept}})
                self._check_saved(groups[i], own, given["state"])
            hooked.update(given, param_groups=groups)
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
                if any(x is None for x in state.values()):  # torch's "not begun"
                    self.state.pop(p, None)
                    continue
                for name, x in state.items():
                    if name in method.clocks:
                        clock = torch.as_tensor(x).detach().cpu().clone()
                        clock = clocks.setdefault((name, clock.item()), clock)
                        self.state[p][name] = clock
                    elif isinstance(x, Tensor):
                        precise = method._is_precise(name)
                        dtype = _state_dtype(x, p, group["state_dtype"], precise)
                        self.state[p][name] = _placed(x.detach(), p, dtype)


    def _check_saved(self, saved: Group, own: Group, state: dict[Any, Any]) -> None:
        """Refuse a group of a checkpoint that is not this group's."""
        theirs, ours = saved.get("algorithm"), own.get("algorithm")
        if theirs != ours:
            raise ValueError(
                f"the checkpoint steps a group by algorithm={theirs!r}, this optimizer by "
                f"{ours!r}; build it as it was"
            )
        method = self._method(own)
        known = {**self.defaults, **method.defaults}
        full = {**known, **saved, "params": own["params"]}
        method._check_group(full)
        for name in (*RANGES, "nesterov", "amsgrad", "centered"):
            if saved.get(name) and name not in known:
                told = f"the checkpoint has {name}={saved[name]!r}"
                told = f"{told}, which {type(method).__name__} does not know"
                raise ValueError(f"{told}: saved by another optimizer; begin anew")
        for key, p in zip(saved["params"], own["params"], strict=False):
            found = state.get(key, {})
            begun = all(x is not None for x in found.values())
            if begun and (why := self.misfit(p, found, full)):
                label = self._label(p, own)
                raise ValueError(f"the checkpoint does not fit {label}: {why}")


# %% 23_machinery sec-base-class 6 06f9e593
def _agreed(flags: list[Tensor], meshes: Iterable[Any]) -> Tensor | None:
    """All flags in one, on the device of the first; over all processes of a mesh."""
    if not flags:
        return None
    fine = torch.stack([flag.to(flags[0].device) for flag in flags]).all().long()
    for mesh in meshes:
        for group in mesh.get_all_groups():
            torch.distributed.all_reduce(fine, torch.distributed.ReduceOp.MIN, group)
    return fine.bool()


def known(finite: Tensor | None) -> bool | None:
    """What a flag says, where to look at it means to wait for nobody; else ``None``."""
    if finite is None:
        return True
    return bool(finite.numpy()) if finite.device.type == "cpu" else None


# %% 23_machinery sec-base-class 9 02fc9e81
#: What a group's ``algorithm`` may name, and where it is.
ALGORITHMS = {
    "adafactor": "adaptive.Adafactor",
    "adagrad": "adaptive.Adagrad",
    "adam": "adaptive.Adam",
    "adamw": "adaptive.AdamW",
    "ademamix": "adaptive.AdEMAMix",
    "klshampoo": "shampoo.KLShampoo",
    "lion": "norms.Lion",
    "muon": "muon.Muon",
    "nadam": "adaptive.NAdam",
    "psgdkron": "shampoo.PSGDKron",
    "rmsprop": "adaptive.RMSprop",
    "scion": "muon.Scion",
    "sgd": "sgd.SGD",
    "shampoo": "shampoo.Shampoo",
    "signsgd": "norms.SignSGD",
    "signum": "norms.Signum",
    "soap": "shampoo.SOAP",
}
#: What any group may hold, beside hyperparameters.
KEYS = ("params", "param_names", "algorithm", "initial_lr", "block_size")
KEYS += ("split_sizes", "num_heads", "batched", "transposed")
#: Torch's words for what ``engine`` says here.
_TORCHS = ("foreach", "fused", "capturable", "differentiable")


def _arguments(cls: type) -> list[str]:
    """What a method takes beside what it steps, without ``Options``."""
    return [*inspect.signature(cls).parameters][1:-1]


def _declares(cls: type) -> bool:
    """Whether a method says which keywords it takes: its own, and ``Options``."""
    own = inspect.signature(cls.__init__).parameters.values()
    return any(x.annotation == Unpack[Options] for x in own)


def _unknown(cls: type, word: str) -> str:
    """What to say of a keyword that a method does not have."""
    methods = cls.__mro__[1 : cls.__mro__.index(Optimizer)]
    others = [x.__name__ for x in methods if _declares(x) and word in _arguments(x)]
    names = ", ".join([*_arguments(cls), *OPTIONS])
    remedy = others[0] if others else f"one of {names}"
    return f"{cls.__name__} has no {word}=; use {remedy}"


def _engine_instead(cls: type, word: str, value: Any) -> str:
    """What to say of one of torch's words for an engine."""
    has = word in cls.engines and (word != "fused" or cls.fused)
    engine = word if value and has else "loop"
    return f"{cls.__name__} has no {word}={value!r}; use engine={engine!r}, see Options"


@functools.cache
def _transient() -> set[str]:
    """Attributes that a copy makes anew: what torch hangs on every optimizer, and ours.

    Asked when something is copied: torch's first optimizer loads its compiler.
    """
    torchs = {*vars(torch.optim.SGD([torch.zeros(1)]))}
    ours = {"step", "_graph", "_opt_called", "_plans", "_turns", "_others"}
    return torchs - {"defaults", "state", "param_groups"} | ours


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: this one, or single precision if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def _whole(x: Tensor) -> Tensor:
    """A sharded tensor, gathered."""
    return x.full_tensor() if hasattr(x, "placements") else x


def _named(group: Group) -> Group:
    """A group where other libraries' words for an algorithm became ``algorithm``."""
    if not group.pop("use_muon", True) or group.pop("use_fallback", False):
        group.setdefault("algorithm", "adamw")
    if "kind" in group:
        group["algorithm"] = group.pop("kind")
    return group


def _shared(group: Group) -> Names:
    """What a rule finds in ``h``."""
    h = {name: x for name, x in group.items() if name not in ("params", "param_names")}
    if isinstance(h["lr"], Tensor):
        h["lr"] = h["lr"].squeeze()
    return Names(**h)


#: Values of a group that change from step to step, and no state depends on.
_MOVING = ("params", "param_names", "lr", "initial_lr", "steps")


def _settings(group: Group) -> list[Any]:
    """All of a group that state may depend on; of a number only whether it is zero."""
    fixed = [x for name, x in group.items() if name not in _MOVING]
    simple = [x for x in fixed if not isinstance(x, Tensor | tuple)]
    return [bool(x) if isinstance(x, float) else x for x in simple]


def _looks(x: Tensor) -> tuple[Any, ...]:
    """All that decides which kernels take a tensor."""
    strides = x.stride() if x.layout is torch.strided else None
    return x.shape, strides, x.dtype, x.device


def _meta(p: Tensor) -> Tensor:
    """A tensor like ``p`` without numbers; of a shard, like the whole."""
    if hasattr(p, "placements"):
        return torch.empty(p.shape, dtype=p.dtype, device="meta")
    return torch.empty_like(p, device="meta")


def _placed(value: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a state, with its parameter's device, layout and sharding."""
    alone = value.shape == p.shape and not hasattr(value, "placements")
    if alone and hasattr(p, "placements"):  # every process has all of it
        from torch.distributed.tensor import distribute_tensor

        full, mesh = value.to(p.device), p.device_mesh
        value = distribute_tensor(full, mesh, p.placements, src_data_rank=None)
    like = p if alone else value
    return torch.empty_like(like, dtype=dtype, device=p.device).copy_(value)


def _cuts(method: Optimizer, p: Tensor, group: Group) -> list[tuple[slice, slice]]:
    """Where the matrices of a parameter lie in it, once it is flattened."""
    if p.numel() == 0:
        return []
    rows, columns = _flat(p, group).shape
    many = len(p) if p.dim() > 2 and group.get("batched") else 1
    parts = [*(group.get("split_sizes") or [rows // many])] * many
    if heads := group.get("num_heads"):
        if any(part % heads for part in parts):
            told = f"num_heads={heads} does not divide a matrix of {parts[0]} rows"
            raise ValueError(f"{told}; pass split_sizes, or no num_heads for it")
        parts = [part // heads for part in parts for _ in range(heads)]
    if sum(parts) != rows:
        told = f"split_sizes={parts!r} adds up to {sum(parts)}"
        told = f"{told} and a parameter has {rows} rows"
        raise ValueError(f"{told}; pass sizes that add up to it, in its own group")
    height, width = method.block(max(parts), columns, group)
    tall = [part for whole in parts for part in _balanced(whole, height)]
    return list(itertools.product(_slices(tall), _slices(_balanced(columns, width))))


def _balanced(length: int, size: int) -> list[int]:
    """A length as the fewest parts of at most this size, as equal as can be."""
    k = -(-length // size)
    return [length // k + (i < length % k) for i in range(k)]


def _slices(sizes: list[int]) -> Iterator[slice]:
    ends = itertools.accumulate(sizes, initial=0)
    return itertools.starmap(slice, itertools.pairwise(ends))


def _flat(x: Tensor, group: Group) -> Tensor:
    """Two-dimensional, a vector as a column; it shares memory where it can.

    A batch of matrices becomes one below the other, a transposed one is turned.
    """
    if x.dim() < 2:
        return x.reshape(-1, 1)
    x = x.mT if group.get("transposed") else x
    return x.flatten(0, -2) if group.get("batched") else x.flatten(1)


def _folded(y: Tensor, x: Tensor, group: Group) -> Tensor:
    """What ``_flat`` made, in the shape of ``x`` again."""
    turned = x.dim() > 1 and group.get("transposed")
    return y.reshape(x.mT.shape).mT if turned else y.reshape(x.shape)


def _key(name: str, k: int) -> str:
    """What a checkpoint calls the state of a parameter's k-th matrix."""
    return f"{name}.{k}" if k else name


def _matrices(method: Optimizer, work: Work, group: Group) -> tuple[list, Work, list]:
    """Each matrix of each parameter with its gradient and state; and what it is called.

    Matrices share memory with their tensor; where they cannot, a copy is noted, to be
    written back. Those of one shape are neighbours, so that they can be stacked.
    """
    units, copies = [], []

    def flat(x: Tensor) -> Tensor:
        y = _flat(x, group)
        if y.data_ptr() != x.data_ptr():
            copies.append((x, y))
        return y

    for i, p in enumerate(work.p):
        alike = {n: flat(x[i]) for n, x in work.s.items() if not method._is_precise(n)}
        whole, grad = flat(p), _flat(work.g[i], group)
        for k, cut in enumerate(_cuts(method, p, group)):
            state = {name: x[cut] for name, x in alike.items()}
            keys = ((name, _key(name, k)) for name in method.precise)
            state |= {name: work.s[key][i] for name, key in keys if key in work.s}
            units.append(((p, k), whole[cut], grad[cut], state))
    units.sort(key=lambda unit: sorted(unit[1].shape))
    names, p, g, states = map(list, zip(*units, strict=True))
    return names, Work(p, g, {n: [s[n] for s in states] for n in states[0]}), copies


def _common(dtype: torch.dtype, others: tuple[torch.dtype, ...]) -> torch.dtype | None:
    """The type to compute in, where a state has another than its parameter."""
    real = {x.to_real() for x in others if x.is_floating_point or x.is_complex}
    both = functools.reduce(torch.promote_types, real, dtype.to_real())
    return both if real - {dtype.to_real()} else None


def _widest(device: torch.device) -> torch.dtype:
    """Double precision, where there is: powers of β₂ = 0.999 need the digits."""
    return torch.float32 if device.type == "mps" else torch.float64


def _clock_tensor(value: Any, before: Tensor, finite: Tensor | None) -> Tensor:
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
    if kind == "cpu" and p.dtype.itemsize < 4:  # fused SGD of torch 2.13 is wrong
        return f"a parameter is {p.dtype} on the CPU"
    last = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
    if not (p.is_contiguous() or last) or p.stride() != g.stride():
        return "a parameter or its gradient is not contiguous"
    if dtypes - {p.dtype} or g.dtype != p.dtype:
        said = f"a state or gradient is not {p.dtype}, as its parameter is"
        return f"{said}; see state_dtype="
    return ""
