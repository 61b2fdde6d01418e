# Generated from chapters/16_averaging.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 5476fbb3
"""Chapter 16, Averaging."""

__all__ = [
    "EMA",
    "GPA",
    "LAWA",
    "Polyak",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
]


# %% 16_averaging sec-av-mean 1 edf966ef
import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from guided_descent.core import Optimizer, Options, check_choice, check_range, wide
from guided_descent.engines import CHUNK, Batch, plain
from guided_descent.layers import unwrapped


def _averaged(x: Tensor) -> bool:
    """Whether a tensor can be averaged; what counts is copied."""
    return x.is_floating_point() or x.is_complex()


class _Average:
    """What ``EMA``, ``Polyak`` and ``LAWA`` share: an average, and how to use it."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            kind, own = type(model).__name__, type(self).__name__
            raise TypeError(f"{own} got a {kind}; pass the model, an nn.Module")
        self.model, self.steps, self._inside = model, 0, False
        for name, p in self._parameters():
            if p.is_meta:
                told = f"parameter {name!r} is on the meta device: it has no values"
                raise ValueError(f"{told}; build {type(self).__name__} once it has")
        self.average = {name: self._copy(p) for name, p in self._parameters()}
        self.buffers = {name: x.detach().clone() for name, x in self._buffers()}

    @staticmethod
    def _copy(p: Tensor) -> Tensor:
        """In single precision at least: a mean of many moves by less than 16 bits."""
        dtype = wide(p.dtype) if _averaged(p) else p.dtype
        return p.detach().to(dtype, copy=True)

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return list(unwrapped(self.model).named_parameters())

    def _buffers(self) -> list[tuple[str, Tensor]]:
        return list(unwrapped(self.model).named_buffers())

    def _tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """All that is averaged or copied: the model's, and what is kept of it."""
        model = dict(self._parameters()), dict(self._buffers())
        pairs = {}
        for own, kept in zip(model, (self.average, self.buffers), strict=True):
            if odd := own.keys() ^ kept.keys():
                told = f"the model has gained or lost {min(odd)!r}"
                raise ValueError(f"{told} since this {type(self).__name__} was built")
            for name, x in own.items():
                self._check_shape(name, x, kept[name])
                if kept[name].device != x.device:  # the model has moved
                    kept[name] = kept[name].to(x.device)
                pairs[name] = x, kept[name]
        return pairs

    def _check_shape(self, name: str, x: Tensor, kept: Tensor) -> None:
        if x.shape != kept.shape:
            told = f"{name!r} has shape {tuple(x.shape)}"
            told, kind = f"{told}, its average {tuple(kept.shape)}", type(self).__name__
            raise ValueError(f"{told}; build a new {kind} after changing the model")

    def _outside(self, what: str) -> None:
        if self._inside:
            told = f"{what} inside swap(), where the model holds the average"
            raise RuntimeError(f"{told}; leave the with block first")

    @torch.no_grad()
    def update(self) -> None:
        """Take the model as it is now into the average; call it after each step.

        Raises:
            RuntimeError: Inside ``swap()``.
            ValueError: A parameter has changed its shape, or come or gone.
        """
        self._outside("update()")
        pairs = _Average._tensors(self)  # LAWA's would work out the mean
        self.steps += 1
        for name, x in self.buffers.items():
            x.copy_(pairs[name][0])
        self._take([(a, p) for p, a in (pairs[name] for name in self.average)])

    def _take(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Move the average towards the model, shard by shard where it is sharded."""
        weight, lists = self._weight(), ([], [])
        for a, p in pairs:
            if not _averaged(p):
                a.copy_(p)
            elif a.dtype == p.dtype:
                lists[0].append(plain(a))
                lists[1].append(plain(p.detach()))
            else:
                plain(a).lerp_(plain(p.detach()).to(plain(a).dtype), weight)
        if lists[0]:
            torch._foreach_lerp_(*lists, weight)

    def _weight(self) -> float:
        """How far the average moves towards the model, of the way from 0 to 1."""
        raise NotImplementedError

    @contextlib.contextmanager
    def swap(self) -> Iterator[nn.Module]:
        """Lend the model its averaged weights, for the length of a ``with`` block.

        Afterwards, also after an exception, it has its own again, bit by bit, and so
        have its buffers. Inside, both sets of weights are in memory. To save the
        average: ``torch.save(model.state_dict(), …)`` inside. Statistics of batch norm
        are the model's; inside, ``torch.optim.swa_utils.update_bn(loader, model)``
        takes them anew.

        Yields:
            The model.

        Raises:
            RuntimeError: Inside another ``swap()``.
            ValueError: As ``update``.
        """
        self._outside("swap()")
        pairs = self._tensors()
        own = [(x, x.detach().clone()) for x, _ in pairs.values()]
        self._inside = True
        try:
            with torch.no_grad():
                for x, average in pairs.values():
                    plain(x).copy_(plain(average))
            yield self.model
        finally:
            with torch.no_grad():
                for x, before in own:
                    x.copy_(before)
            self._inside = False

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint, which ``torch.save`` and torch's distributed one take."""
        return {"steps": self.steps, "average": self.average, "buffers": self.buffers}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, exactly.

        Raises:
            ValueError: It is of another model: a name or a shape differs. Nothing has
                changed then.
        """
        if odd := self.state_dict().keys() ^ state_dict.keys():
            told = f"the checkpoint is not of this kind, {type(self).__name__}"
            raise ValueError(f"{told}: {min(odd)!r} is in one of them alone")
        for part in ("average", "buffers"):
            own, saved = getattr(self, part), state_dict[part]
            if odd := own.keys() ^ saved.keys():
                told = f"the checkpoint and the model differ in {min(odd)!r}"
                raise ValueError(f"{told}; load a checkpoint of this model")
            for name, x in own.items():
                self._check_shape(name, saved[name], x)
        self.steps = int(state_dict["steps"])
        for part in ("average", "buffers"):
            for name, x in getattr(self, part).items():
                x.copy_(state_dict[part][name])


# %% 16_averaging sec-av-mean 2 b6cb8db7
class Polyak(_Average):
    """The uniform average of a model's weights over all steps, or over a tail.

    ``x ← x + (z − x) / k`` with z the model's weights after step ``start + k``; before
    that, x is the model.

    Call ``update()`` after every ``optimizer.step()`` and evaluate inside ``with
    average.swap():``. Buffers are copied, not averaged. Averages are kept in single
    precision at least; shards are averaged where they are.

    Args:
        model: The module whose parameters are averaged; it is not changed.
        start: Steps that are left out, an integer in [0, ∞). Default 0.

    Raises:
        TypeError: ``model`` is no module, ``start`` no integer.
        ValueError: ``start`` is negative.

    Source: Polyak & Juditsky (1992), doi 10.1137/0330046. Chapter 16, eq-av-mean.
    """

    def __init__(self, model: nn.Module, start: int = 0) -> None:
        check_range("start", start, "[0, inf) int")
        self.start = start
        super().__init__(model)

    def _weight(self) -> float:
        return 1 / max(self.steps - self.start, 1)


# %% 16_averaging sec-av-ema 1 708406a4
class EMA(_Average):
    """A running mean of a model's weights that forgets: an exponential average.

    ``x ← decay · x + (1 − decay) · z`` with z the model's weights. While the run is
    younger than the mean's memory, 1 − decay gives way to ``warmup / (t + warmup − 1)``
    where that is larger: the mean then covers the last part of the run, about one in
    ``warmup``, and the start leaves no trace.

    Call ``update()`` after every ``optimizer.step()`` and evaluate inside ``with
    average.swap():``. Buffers are copied, not averaged. Averages are kept in single
    precision at least; shards are averaged where they are.

    Args:
        model: The module whose parameters are averaged; it is not changed.
        decay: What a step leaves of the mean, in [0, 1); the memory is 1/(1 − decay)
            steps. Default 0.999.
        warmup: Shortens the memory early on, in [0, ∞). 1 gives the uniform mean, 0
            the bare rule, which starts from the weights at construction. Default 10.

    Raises:
        TypeError: ``model`` is no module, another argument no number.
        ValueError: An argument out of range.

    Source: chapter 16, eq-av-ema and eq-av-warmup; for the warm-up, Karras et al.
    (2023), arXiv 2312.02696.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.999, warmup: float = 10.0
    ) -> None:
        check_range("decay", decay, "[0, 1)")
        check_range("warmup", warmup, "[0, inf)")
        self.decay, self.warmup = decay, warmup
        super().__init__(model)

    def _weight(self) -> float:
        early = self.warmup / (self.steps + self.warmup - 1) if self.warmup else 0.0
        return max(1 - self.decay, early)


# %% 16_averaging sec-av-lawa 1 47fc4e3f
class LAWA(_Average):
    """The uniform average of the last few snapshots of a model's weights.

    Call ``update()`` after every ``optimizer.step()``; it keeps every ``every``-th
    state of the model, the last ``k`` of them, each as large as the model. Evaluate
    inside ``with average.swap():``; before the first snapshot that is the model itself.
    ``average`` is brought up to date by ``swap()`` and ``state_dict()``. Buffers are
    copied, not averaged.

    Args:
        model: The module whose parameters are averaged; it is not changed.
        k: Snapshots that are averaged, an integer from 1. Default 5.
        every: Steps from one snapshot to the next, an integer from 1. Default 100.

    Raises:
        TypeError: ``model`` is no module, another argument no integer.
        ValueError: An argument out of range.

    Source: Kaddour (2022), arXiv 2209.14981; Sanyal et al. (2023), arXiv 2306.03241.
    Chapter 16, eq-av-lawa.
    """

    def __init__(self, model: nn.Module, k: int = 5, every: int = 100) -> None:
        check_range("k", k, "[1, inf) int")
        check_range("every", every, "[1, inf) int")
        self.every = every
        self.snapshots: deque[dict[str, Tensor]] = deque(maxlen=k)
        super().__init__(model)

    # %% 16_averaging sec-av-lawa 2 35c7e160
    def _take(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        if self.steps % self.every == 0:
            now = {name: p.detach().clone() for name, p in self._parameters()}
            self.snapshots.append(now)

    def _tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """With the average brought up to date: it is wanted more rarely than snapshots."""
        pairs = super(LAWA, self)._tensors()
        for i, snapshot in enumerate(self.snapshots or [dict(self._parameters())]):
            for name, a in self.average.items():
                new = plain(snapshot[name].detach()).to(plain(a))
                if _averaged(a):
                    plain(a).lerp_(new, 1 / (i + 1))
                else:
                    a.copy_(new)
        return pairs

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint, with the snapshots."""
        self._tensors()  # the average, brought up to date
        snapshots = {str(i): snapshot for i, snapshot in enumerate(self.snapshots)}
        return {**super(LAWA, self).state_dict(), "snapshots": snapshots}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, exactly; of more snapshots than ``k``, the last."""
        super(LAWA, self).load_state_dict(state_dict)
        self.snapshots.clear()
        saved, own = state_dict["snapshots"], dict(self._parameters())
        for i in sorted(saved, key=int):
            alike = {n: torch.empty_like(p).copy_(saved[i][n]) for n, p in own.items()}
            self.snapshots.append({name: x.detach() for name, x in alike.items()})


# %% 16_averaging sec-av-schedule-free 1 e45140c0
class _Averaged(Optimizer):
    """What ``ScheduleFreeSGD``, ``ScheduleFreeAdamW`` and ``GPA`` share.

    Three points move: z by the gradients; x, an average of z; and y between them,
    ``y = β x + (1 − β) z``, where gradients are taken. In training a parameter is y and
    its state z, in evaluation it is x. Where β = 0, y is z, and the state is x.
    """

    precise = ("y",)  # a parameter, kept aside in evaluation
    #: The hyperparameter that says where y lies between z and x.
    between = "betas"
    #: Whether its average is meant to replace a schedule.
    replaces_schedule = True
    _warned = False

    # %% 16_averaging sec-av-schedule-free 5 b99baa23
    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        clocks = {"step": torch.zeros(())}
        for name in self.clocks[1:]:
            clocks[name] = torch.zeros((), dtype=torch.float64)
        means = {name: torch.zeros_like(p) for name in self._means(h)}
        return clocks | {"z" if self._beta(vars(h)) else "x": p} | means

    def _beta(self, group: dict[str, Any]) -> float:
        """How far y is on the way from z to x."""
        value = group[self.between]
        return value[0] if isinstance(value, tuple | list) else value

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse another point for the decay, or another base, too."""
        super(_Averaged, self)._check_group(group)
        check_choice("decay_at", group["decay_at"], ("y", "z"))
        check_choice("base", group.get("base", "sgd"), ("adamw", "sgd"))
        check_choice("train_mode", group["train_mode"], (True, False))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, in the mode of those that are there."""
        if self.param_groups:
            param_group = {**param_group, "train_mode": self.param_groups[0]["train_mode"]}
        super(_Averaged, self).add_param_group(param_group)

    # %% 16_averaging sec-av-schedule-free 6 ae9ce547
    def _begun(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Parameters of a group, each with its state, that have taken a step."""
        for p in group["params"] if self._method(group) is self else ():
            if {"x", "z"} & self.state.get(p, {}).keys():
                yield p, self.state[p]

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average x into the parameters, to evaluate it or to save it."""
        for group in self.param_groups:
            for p, state in self._begun(group) if group["train_mode"] else ():
                state["y"] = p.detach().clone()
                if "x" in state:
                    p.copy_(state["x"])
                else:
                    z = state["z"].to(torch.promote_types(state["z"].dtype, p.dtype))
                    p.copy_(z + (p.to(z.dtype) - z) / self._beta(group))
            group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Put y back into the parameters, to go on training."""
        for group in self.param_groups:
            for p, state in self._begun(group) if not group["train_mode"] else ():
                if "y" in state:
                    p.copy_(state.pop("y"))
                elif "z" in state:  # a flat distributed checkpoint drops y
                    z = state["z"].to(torch.promote_types(state["z"].dtype, p.dtype))
                    p.copy_(z + (p.to(z.dtype) - z) * self._beta(group))
                else:
                    told = "the checkpoint was saved in evaluation, and y is not in it"
                    raise RuntimeError(f"{told}; save after optimizer.train()")
            group["train_mode"] = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, in training only; see ``Optimizer.step``.

        Raises:
            RuntimeError: In evaluation. Nothing has changed then.
        """
        if not all(group["train_mode"] for group in self.param_groups):
            told = f"{type(self).__name__} is in evaluation, its parameters are x"
            raise RuntimeError(f"{told}; call optimizer.train() before step()")
        if self.replaces_schedule:
            self._watch()
        return super(_Averaged, self).step(closure)

    def _watch(self) -> None:
        """Warn, once, of a scheduler that lowers lr."""
        seen = vars(self).setdefault("_highest", {})
        for i, group in enumerate(self.param_groups):
            lr = _number(group["lr"])
            if self._method(group) is not self:
                continue
            if isinstance(lr, Tensor):  # reading it would wait
                continue
            seen[i] = max(seen.get(i, 0.0), lr)
            if lr < 0.999 * seen[i] and "initial_lr" in group and not self._warned:
                self._warned = True
                kind, told = type(self).__name__, f"from {seen[i]:.4g} to {lr:.4g}"
                warnings.warn(
                    f"a scheduler has lowered lr {told}, and {kind} averages in place of a "
                    "schedule; leave lr constant, with warmup_steps= if need be",
                    stacklevel=4,
                )

    # %% 16_averaging sec-av-schedule-free 8 2908d1b7
    @staticmethod
    def fused(p: list[Tensor], g: list[Tensor], s: Any, h: Any) -> None:
        """Torch's kernel steps z, while the parameter is x."""
        names = ("step_size", "c", "back", "on")
        lr, c, back, on = (_number(vars(h)[name]) for name in names)
        alone, decay = hasattr(s, "x"), h.weight_decay
        kinds = [name for name in ("exp_avg", "exp_avg_sq") if hasattr(s, name)]
        lists = [p, s.x if alone else s.z, g, *(vars(s)[name] for name in kinds)]
        for y, other, some_g, *moments in _parts(*lists):
            z, x = (y, Batch(other)) if alone else (other, Batch(y))
            kept = []
            if h.found_inf is not None:  # the kernel undoes its own part alone
                kept = [(a, a.clone()) for a in (*x.tensors, *z)]
            if not alone:
                x.lerp_(Batch(z), back)
            if decay and not alone and h.decay_at == "y":  # of y as it was, from x and z
                rate = lr * decay
                Batch(z).mul_(1 - rate * (1 - h.beta)).add_(x, alpha=-rate * h.beta)
            inside = decay if alone or h.decay_at == "z" else 0.0
            means = dict(zip(kinds, moments, strict=True)) | {"step": s.step[0]}
            _kernel(z, some_g, means, lr, inside, h)
            x.lerp_(Batch(z), c if alone else on)
            for a, before in kept:
                a.copy_(torch.where(h.found_inf.bool(), before, a))


# %% 16_averaging sec-av-schedule-free 2 51341ac2
def _weights(h: Any) -> None:
    """How far from y to z the old x lies, and how far from there the new y."""
    h.back = 1 - 1 / h.beta if h.beta else 0.0
    h.on = 1 - h.beta * (1 - h.c)


# %% 16_averaging sec-av-schedule-free 3 f2512c09
def _average(y: Tensor, u: Tensor, s: Any, h: Any) -> None:
    """Step z against u, then x after z, then y between; β and c are in ``h``."""
    alone = hasattr(s, "x")  # β = 0: the parameter is z
    if h.weight_decay:
        at = y if alone or h.decay_at == "y" else s.z
        u = (h.weight_decay * at).add_(u)
    if alone:
        y.add_(u, alpha=-h.step_size)
        s.x.add_(y - s.x, alpha=h.c)
    else:
        x = y.add_(s.z - y, alpha=h.back)
        s.z.add_(u, alpha=-h.step_size)
        x.add_(s.z - x, alpha=h.on)


# %% 16_averaging sec-av-schedule-free 4 070a6ac1
def _number(x: Any) -> Any:
    """A tensor's number, where to read it means to wait for nobody."""
    if isinstance(x, Tensor) and x.device.type == "cpu":
        return x.detach().squeeze().numpy().item()
    return x


# %% 16_averaging sec-av-schedule-free 7 5a22debe
def _parts(*lists: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Lists one by one on a CPU, so that a tensor stays in the cache; else chunks."""
    start = size = 0
    for i, x in enumerate(lists[0]):
        size += x.numel()
        if x.device.type == "cpu" or size > CHUNK or i + 1 == len(lists[0]):
            yield [some[start : i + 1] for some in lists]
            start, size = i + 1, 0


def _kernel(
    z: list[Tensor], g: list[Tensor], means: dict[str, Any], lr: Any, decay: Any, h: Any
) -> None:
    lr = lr.float() if isinstance(lr, Tensor) else lr
    shared = {"lr": lr, "weight_decay": decay, "found_inf": h.found_inf}
    if "exp_avg_sq" not in means:
        shared |= {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
        shared |= {"maximize": h.maximize, "is_first_step": False}
        torch._fused_sgd_(z, g, [], **shared)
        return
    maximize, beta1, m = h.maximize, 0.0, g
    if "exp_avg" in means:
        beta1, m = h.betas[0], means["exp_avg"]
    elif maximize:  # with β₁ = 0 the kernel writes g over g, and must not write −g
        maximize, m = False, torch._foreach_neg(g)
        g = m
    shared |= {"beta1": beta1, "beta2": h.betas[1], "eps": h.eps, "amsgrad": False}
    v, steps = means["exp_avg_sq"], [means["step"]] * len(z)
    torch._fused_adamw_(z, g, m, v, [], steps, maximize=maximize, **shared)


# %% 16_averaging sec-av-schedule-free 9 ffcb7dc4
def _weigh(h: Any) -> None:
    """The weight c of the newest z in a mean where ``step``-th weighs tʳ · lr_maxᵖ."""
    h.step_size = h.lr
    if h.warmup_steps:
        h.step_size = h.lr * _smaller(h.step / h.warmup_steps, 1.0)
    h.lr_max = _larger(h.lr_max, h.step_size)
    weight = h.step**h.r * h.lr_max**h.weight_lr_power
    h.weight_sum = h.weight_sum + weight
    h.c = weight / _larger(h.weight_sum, 1e-37)  # lr = 0 weighs nothing
    _weights(h)


# %% 16_averaging sec-av-schedule-free 10 0a9bff08
def _larger(a: Any, b: Any) -> Any:
    """The larger of two, of which any may be a tensor; nobody waits for it."""
    if not (isinstance(a, Tensor) or isinstance(b, Tensor)):
        return max(a, b)
    like = a if isinstance(a, Tensor) else b
    a, b = (torch.as_tensor(x, dtype=torch.float64, device=like.device) for x in (a, b))
    return torch.maximum(a, b)

def _smaller(a: Any, b: Any) -> Any:
    """The smaller of two."""
    return -_larger(-a, -b)


# %% 16_averaging sec-av-schedule-free 11 83d96291
class ScheduleFreeSGD(_Averaged):
    """SGD without a schedule: a growing average takes the place of decay.

    With k the step, ``w = kʳ · lr_maxᵖ``, c the newest w over the sum of all, and g the
    gradient at y plus ``weight_decay · y``::

        z ← z − lr · g
        x ← (1 − c) x + c z
        y ← momentum · x + (1 − momentum) z

    In training the parameters are y. ``eval()`` puts x in their place, ``train()`` puts
    y back, bit by bit; both may be called twice. In between y is kept beside z. A step
    in evaluation is refused. Checkpoints of either mode load; the model's must be of
    the same mode. What is written into the parameters in evaluation is lost.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η of z, in units of parameter per unit of gradient; in [0, ∞).
            Constant: a schedule that decays it is warned of. Default 1.
        momentum: Where gradients are taken, β: 0 at z, 1 at the average x; in [0, 1].
            Constant over a run, as x is recovered with it (``OneCycleLR``:
            ``cycle_momentum=False``). Default 0.9.
        weight_decay: Strength λ of the penalty, added to the gradient as λ times the
            point that ``decay_at`` names; in [0, ∞). Default 0.
        warmup_steps: Steps over which lr rises from nought, an integer in [0, ∞).
            Default 0.
        r: Power of k in the weights; the larger, the shorter the memory; in [0, ∞).
            Default 0: all steps weigh the same.
        weight_lr_power: Power p of the largest lr so far, in [0, ∞), so that a warm-up
            weighs less. Default 2.
        decay_at: ``"y"``, the default, or ``"z"``.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range.
        TypeError: An argument that is not a number.
        RuntimeError: A step in evaluation.

    Source: Defazio et al. (2024), arXiv 2405.15682. Chapter 16, eq-av-schedule-free.
    """

    between = "momentum"
    clocks = ("step", "weight_sum", "lr_max")
    ranges = {
        "momentum": "[0, 1]",
        "warmup_steps": "[0, inf) int",
        "r": "[0, inf)",
        "weight_lr_power": "[0, inf)",
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        decay_at: Literal["y", "z"] = "y",
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= {"warmup_steps": warmup_steps, "r": r, "train_mode": True}
        defaults |= {"weight_lr_power": weight_lr_power, "decay_at": decay_at}
        super().__init__(params, defaults, **options)

    # %% 16_averaging sec-av-schedule-free 12 12db6b76
    def _means(self, h: Any) -> list[str]:
        return []

    # %% 16_averaging sec-av-schedule-free 13 ab7372d4
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        _average(p, g, s, h)

    @staticmethod
    def clock(h: Any) -> None:
        h.beta = h.momentum
        _weigh(h)


# %% 16_averaging sec-av-schedule-free 14 fb3f4f05
class ScheduleFreeAdamW(_Averaged):
    """AdamW without a schedule: a growing average takes the place of decay.

    With k the step, ``w = kʳ · lr_maxᵖ``, c the newest w over the sum of all, and g the
    gradient at y::

        v ← β₂ v + (1 − β₂) g²
        u = g / (√(v / (1 − β₂ᵏ)) + eps) + weight_decay · y
        z ← z − lr · u
        x ← (1 − c) x + c z
        y ← β₁ x + (1 − β₁) z

    In training the parameters are y. ``eval()`` puts x in their place, ``train()`` puts
    y back, bit by bit; both may be called twice. In between y is kept beside z. A step
    in evaluation is refused. Checkpoints of either mode load; the model's must be of
    the same mode. What is written into the parameters in evaluation is lost.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η of z, in units of the parameter; in [0, ∞). Constant: a schedule
            that decays it is warned of. Default 0.0025.
        betas: Where gradients are taken, β₁: 0 at z, 1 at the average x, in [0, 1]; and
            the decay β₂ of v, in [0, 1). β₁ is constant over a run, as x is recovered
            with it (``OneCycleLR``: ``cycle_momentum=False``). Default (0.9, 0.999).
        eps: Added to the root, in units of gradient; in [0, ∞). Default 1e-8.
        weight_decay: λ, in [0, ∞); a step takes lr · λ times the point that
            ``decay_at`` names. Default 0.
        warmup_steps: Steps over which lr rises from nought, an integer in [0, ∞).
            Default 0.
        r: Power of k in the weights; the larger, the shorter the memory; in [0, ∞).
            Default 0: all steps weigh the same.
        weight_lr_power: Power p of the largest lr so far, in [0, ∞), so that a warm-up
            weighs less. Default 2.
        decay_at: ``"y"``, the default, or ``"z"``.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range.
        TypeError: An argument that is not a number.
        RuntimeError: A step in evaluation.

    Source: Defazio et al. (2024), arXiv 2405.15682. Chapter 16, eq-av-schedule-free.
    """

    clocks = ("step", "weight_sum", "lr_max")
    ranges = {
        "betas": ("[0, 1]", "[0, 1)"),
        "warmup_steps": "[0, inf) int",
        "r": "[0, inf)",
        "weight_lr_power": "[0, inf)",
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        decay_at: Literal["y", "z"] = "y",
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"warmup_steps": warmup_steps, "r": r, "train_mode": True}
        defaults |= {"weight_lr_power": weight_lr_power, "decay_at": decay_at}
        super().__init__(params, defaults, **options)

    # %% 16_averaging sec-av-schedule-free 15 007c4652
    def _means(self, h: Any) -> list[str]:
        return ["exp_avg_sq"]

    # %% 16_averaging sec-av-schedule-free 17 bd75757a
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        _average(p, _adam_direction(g, s, h), s, h)

    @staticmethod
    def clock(h: Any) -> None:
        h.beta = h.betas[0]
        h.root_correction = (1 - h.betas[1] ** h.step) ** 0.5
        _weigh(h)


# %% 16_averaging sec-av-schedule-free 16 55a4a933
def _adam_direction(g: Tensor, s: Any, h: Any) -> Tensor:
    """Adam's step, up to −lr; without memory of g itself where β₁ is left out."""
    v = s.exp_avg_sq.mul_(h.betas[1]).addcmul_(g, g, value=1 - h.betas[1])
    root = v.sqrt().div_(h.root_correction).add_(h.eps)
    if hasattr(s, "exp_avg"):
        g = s.exp_avg.lerp_(g, 1 - h.betas[0]) / h.mean_correction
    return g / root


# %% 16_averaging sec-av-gpa 1 cc080c0f
class GPA(_Averaged):
    """Generalized primal averaging: two numbers between EMA, heavy ball and Nesterov.

    With u the step of SGD or AdamW at y (weight decay included)::

        z ← z − lr · u
        x ← mu_x · x + (1 − mu_x) z
        y ← mu_y · x + (1 − mu_y) z

    With ``base="sgd"``: mu_y = 0 is SGD with an EMA, mu_y = 1 the heavy ball with
    lr (1 − mu_x), and mu_y = mu_x Nesterov's method. It does not replace a schedule.

    In training the parameters are y. ``eval()`` puts x in their place, ``train()`` puts
    y back, bit by bit; both may be called twice. In between y is kept beside z. A step
    in evaluation is refused. Checkpoints of either mode load; the model's must be of
    the same mode. What is written into the parameters in evaluation is lost.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η of z; in [0, ∞). Default 1e-3.
        mu_x: What a step leaves of the average, in [0, 1). Default 0.9967, a memory of
            300 steps: too long for runs of a few hundred.
        mu_y: Where gradients are taken: 0 at z, 1 at the average; in [0, 1]. Constant
            over a run, as x is recovered with it. Default 0.7.
        betas: AdamW's decays of its two means, each in [0, 1). With β₁ = 0 it keeps no
            first mean. Default (0.9, 0.999).
        eps: Added to AdamW's root, in units of gradient; in [0, ∞). Default 1e-8.
        weight_decay: λ, in [0, ∞); a step takes lr · λ times the point that
            ``decay_at`` names. Default 0.
        base: ``"adamw"``, the default, or ``"sgd"``, which ignores betas and eps.
        decay_at: ``"y"``, the default, or ``"z"``.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range.
        TypeError: An argument that is not a number.
        RuntimeError: A step in evaluation.

    Source: Defazio et al. (2025), arXiv 2512.17131. Chapter 16, eq-av-gpa.
    """

    clocks = ("step",)
    ranges = {"mu_x": "[0, 1)", "mu_y": "[0, 1]"}
    between, replaces_schedule = "mu_y", False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        mu_x: float = 0.9967,
        mu_y: float = 0.7,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        base: Literal["adamw", "sgd"] = "adamw",
        decay_at: Literal["y", "z"] = "y",
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "mu_x": mu_x, "mu_y": mu_y, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "base": base, "decay_at": decay_at}
        super().__init__(params, defaults | {"train_mode": True}, **options)

    # %% 16_averaging sec-av-gpa 2 f5f1d56a
    def _means(self, h: Any) -> list[str]:
        if h.base == "sgd":
            return []
        return ["exp_avg"] * bool(h.betas[0]) + ["exp_avg_sq"]

    # %% 16_averaging sec-av-gpa 3 40151143
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        u = _adam_direction(g, s, h) if h.base == "adamw" else g
        _average(p, u, s, h)

    @staticmethod
    def clock(h: Any) -> None:
        h.step_size, h.beta, h.c = h.lr, h.mu_y, 1 - h.mu_x
        h.mean_correction = 1 - h.betas[0] ** h.step
        h.root_correction = (1 - h.betas[1] ** h.step) ** 0.5
        _weights(h)
