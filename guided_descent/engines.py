# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head ae806fe1
"""Chapter 23, The machinery."""

__all__ = [
    "CHUNK",
    "ENGINES",
    "OUTSIDE",
    "Batch",
    "Job",
    "Names",
    "Work",
    "matrixwise",
    "plain",
]


# %% 23_machinery sec-batch 1 cc465ab2
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from numbers import Real
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Names:
    """Values by attribute: ``h.lr``; ``SimpleNamespace`` cannot be traced."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


def plain(x: Tensor) -> Tensor:
    """A tensor as an elementwise rule sees it: this process's part, in real numbers.

    It shares memory with ``x``.
    """
    x = x.to_local() if hasattr(x, "placements") else x
    return torch.view_as_real(x) if x.is_complex() else x


# %% 23_machinery sec-batch 2 6965ae7a
class Batch:
    """Many tensors with the methods of one: each is one ``torch._foreach_*`` call.

    Numbers may be Python floats or one-element tensors. In-place methods return the
    batch, as a tensor's do. A rule may use the operators ``+ - * / **``, also in place,
    and every
    method for which torch has a list version: ``mul_``, ``lerp_``, ``addcmul_``,
    ``addcdiv_``, ``sqrt``, ``abs``, ``sign``, ``maximum``, ``clamp_min``,
    ``reciprocal``, … A reduction such as ``norm`` gives one number for each tensor.
    ``@`` and ``.mT`` work one by one. Functions such as ``torch.sign(g)`` do not work
    here; those of matrices do, once they are marked ``matrixwise``.

    Args:
        tensors: The tensors; changed in place by in-place methods.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def __getattr__(self, name: str) -> Callable[..., "Batch"]:
        if not hasattr(torch, f"_foreach_{name}"):
            raise AttributeError(
                f"a rule for many tensors has no .{name}: torch has no list version of "
                "it; see Batch, or mark a function of a matrix with matrixwise"
            )
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
        if isinstance(value, Tensor):
            return self.add_(a * b, value)
        return self._call("addcmul_", a, b, value)

    def addcdiv_(self, a: "Batch", b: "Batch", value: Any = 1) -> "Batch":
        if isinstance(value, Tensor):
            return self.add_(a / b, value)
        return self._call("addcdiv_", a, b, value)

    def lerp_(self, x: "Batch", weight: Any) -> "Batch":
        if isinstance(weight, Tensor):
            return self.add_(x - self, weight)
        return self._call("lerp_", x, weight)

    def lerp(self, x: "Batch", weight: Any) -> "Batch":
        return self + (x - self) * weight

    def sub_(self, x: Any, alpha: Any = 1) -> "Batch":
        return self.add_(x, -alpha)

    def square(self) -> "Batch":
        return self * self

    @property
    def mT(self) -> "Batch":
        return Batch([x.mT for x in self.tensors])

    def __matmul__(self, x: "Batch") -> "Batch":
        pairs = zip(self.tensors, x.tensors, strict=True)
        return Batch([a @ b for a, b in pairs])

    def __rsub__(self, x: Any) -> "Batch":
        return -(self - x)

    def __rtruediv__(self, x: Any) -> "Batch":
        return self.reciprocal() * x

    def __iadd__(self, x: Any) -> "Batch":
        return self.add_(x)

    __neg__, __pow__ = partialmethod(_call, "neg"), partialmethod(_call, "pow")
    __add__, __sub__ = partialmethod(_call, "add"), partialmethod(_call, "sub")
    __mul__, __truediv__ = partialmethod(_call, "mul"), partialmethod(_call, "div")
    __isub__, __imul__ = partialmethod(_call, "sub_"), partialmethod(_call, "mul_")
    __itruediv__, __radd__, __rmul__ = partialmethod(_call, "div_"), __add__, __mul__


# %% 23_machinery sec-matrixwise 1 2fa143a4
def matrixwise(function: Callable) -> Callable:
    """Mark a function of matrices that a rule may call on tensors and on batches.

    Of batches, matrices of equal shapes are stacked and the function runs once for each
    stack. So it works on the last two dimensions, (…, m, n), and changes no argument.

    Args:
        function: Takes matrices, by position; whatever else it is given, numbers and
            names, is the same for all. Returns a tensor or a tuple of tensors.
    """

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        batches = [x.tensors for x in args if isinstance(x, Batch)]
        if not batches:
            return function(*args, **options)
        kinds: dict[tuple[torch.Size, ...], list[int]] = defaultdict(list)
        for i, matrices in enumerate(zip(*batches, strict=True)):
            kinds[tuple(x.shape for x in matrices)].append(i)
        results: list[Any] = [None] * len(batches[0])
        for alike in kinds.values():
            y = function(*(_stack(x, alike) for x in args), **options)
            several = isinstance(y, tuple)
            parts = [part.unbind() for part in (y if several else (y,))]
            for i, *mine in zip(alike, *parts, strict=True):
                results[i] = mine
        columns = [Batch(list(column)) for column in zip(*results, strict=True)]
        return tuple(columns) if several else columns[0]

    return call


def _stack(x: Any, alike: list[int]) -> Any:
    if not isinstance(x, Batch):
        return x
    some = [x.tensors[i] for i in alike]
    return some[0][None] if len(some) == 1 else torch.stack(some)


# %% 23_machinery sec-engines 1 d7cb5db1
class Job(NamedTuple):
    """What an engine has to run."""

    method: Any  # the optimizer whose rule it is
    rule: Callable[[Any, Any, Names, Names], None]
    h: Names
    finite: Tensor | None  # keep the step? None: yes
    dtype: torch.dtype | None  # to compute in, where parameter and state differ in type

    @property
    def many(self) -> bool:
        """Whether the rule can take a ``Batch``."""
        return self.method.elementwise or self.method.matrices


class Work(NamedTuple):
    """What it is run on: parameters, their gradients, and each state by name."""

    p: list[Tensor]
    g: list[Tensor]
    s: dict[str, list[Tensor]]

    def each(self, function: Callable[[list[Tensor]], Any]) -> "Work":
        """The same function of every list."""
        s = {name: function(x) for name, x in self.s.items()}
        return Work(function(self.p), function(self.g), s)

    @property
    def changing(self) -> list[Tensor]:
        """All that a rule may change."""
        return [*self.p, *(x for xs in self.s.values() for x in xs)]


def _run(job: Job, work: Work, call: Callable[[Job, Work], None]) -> None:
    """Run a rule on one chunk of tensors: negate, convert, call, undo, convert back."""
    if job.h.maximize:
        work = work._replace(g=torch._foreach_neg(work.g))
    if job.dtype is None and job.finite is None:
        return call(job, work)
    kept = work.changing
    if job.dtype is not None:
        work = work.each(
            lambda xs: [x.to(job.dtype) if x.is_floating_point() else x for x in xs]
        )
    old = kept if job.finite is None else [x.clone() for x in kept]
    call(job, work)
    for x, new, before in zip(kept, work.changing, old, strict=True):
        if job.finite is not None:
            plain(x).copy_(torch.where(job.finite, plain(new), plain(before)))
        elif new is not x:
            x.copy_(new)


# %% 23_machinery sec-engines 2 f043bd91
def _loop(job: Job, work: Work) -> None:
    """The rule on one tensor after another: the reference for every other engine."""
    on_device = any(isinstance(value, Tensor) for value in vars(job.h).values())
    call = _many if job.many and on_device else _one
    for i in range(len(work.p)):
        _run(job, work.each(itemgetter(slice(i, i + 1))), call)


def _foreach(job: Job, work: Work) -> None:
    """The rule on chunks of tensors."""
    if not job.many:
        return _loop(job, work)
    for chunk in _chunks(work.p):
        _run(job, work.each(itemgetter(chunk)), _many)


def _fused(job: Job, work: Work) -> None:
    """Torch's own kernel, which undoes by itself."""
    h, steps = job.h, []
    if "step" in job.method.clocks:
        steps = [h.step.float()] * len(work.p)
    h.found_inf = None if job.finite is None else (~job.finite).float()
    job.method.fused(work.p, work.g, Names(**work.s, step=steps), h)


def _apply(job: Job, work: Work, seen: Callable[[list[Tensor]], Any]) -> None:
    """The rule on what it sees of the lists: their only tensor, or a batch."""
    p, g, s = work.each(seen)
    names = Names(**s)
    job.rule(p, g, names, job.h)
    for name, value in s.items():
        if getattr(names, name) is not value:
            said = f"the rule binds s.{name} to something new, which is lost"
            raise TypeError(f"{said}; change it in place")


_one, _many = partial(_apply, seen=itemgetter(0)), partial(_apply, seen=Batch)


#: What a group holds that no rule looks at.
OUTSIDE = ("engine", "nonfinite", "maximize", "state_dtype", "algorithm")


def _compiled(job: Job, work: Work) -> None:
    """Numbers that change from step to step enter the graph as tensors.

    A Python number would be compiled in. (Torch 2.13 compiles in even a tensor, where
    it is the ``alpha`` of ``sub_``; ``add_`` is right.)
    """
    method, changing, fixed = job.method, {}, {}
    for name, value in vars(job.h).items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        changes = name == "lr" or name not in method.defaults
        if isinstance(value, Tensor) or changes and number:
            changing[name] = torch.as_tensor(value, dtype=torch.float64)
        elif name not in OUTSIDE:
            fixed[name] = value
    if "_graph" not in vars(method):
        method._graph = torch.compile(_trace, dynamic=False, fullgraph=True)
    # Dynamo counts the graphs of all optimizers together, and stops at eight.
    limits = {"recompile_limit": 4096, "accumulated_recompile_limit": 4096}
    with torch._dynamo.config.patch(limits):
        method._graph(job.rule, *work, changing, fixed)


def _trace(rule: Callable, p: list, g: list, s: dict, h: dict, fixed: dict) -> None:
    h = Names(**h, **fixed)
    for i in range(len(p)):
        rule(p[i], g[i], Names(**{name: x[i] for name, x in s.items()}), h)


#: Numbers that a chunk may hold, where no tensor is larger.
CHUNK = 2**20


def _chunks(p: list[Tensor]) -> Iterator[slice]:
    """Consecutive tensors, together no larger than a chunk or the largest of them."""
    limit, start, size = max(CHUNK, *(x.numel() for x in p)), 0, 0
    for i, x in enumerate(p):
        if size + x.numel() > limit:
            yield slice(start, i)
            start, size = i, 0
        size += x.numel()
    yield slice(start, len(p))


#: What runs a rule, by name.
ENGINES: dict[str, Callable[[Job, Work], None]] = {
    "auto": _loop,  # resolved to one of the others before it is called
    "loop": _loop,
    "foreach": _foreach,
    "fused": _fused,
    "compile": partial(_run, call=_compiled),
}
