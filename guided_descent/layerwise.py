# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 9d45b0d0
"""Chapter 23, The machinery."""

__all__ = [
    "HYPERPARAMETERS",
    "LayerOptimizer",
    "Memory",
    "full_precision",
]


# %% 23_machinery sec-layerwise 1 70335a5a
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from guided_descent.capture import Capture
from guided_descent.core import ALGORITHMS, OPTIONS, Group, Names, Optimizer
from guided_descent.core import check_choice, check_range, known, share, wide
from guided_descent.layers import Layer, find_layers
from guided_descent.vector import flat, processes, unflat

#: What is remembered of one layer, by name.
Memory = dict[str, Tensor]
#: What a group of layers has, beside the options of every optimizer.
HYPERPARAMETERS = ("lr", "momentum", "damping", "stat_decay", "kl_clip", "weight_decay")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, matrix products know neither TF32 nor autocast."""
    matmul = torch.backends.cuda.matmul
    name, off = "fp32_precision", "ieee"
    if not hasattr(matmul, name):  # before torch 2.9
        name, off = "allow_tf32", False
    before = getattr(matmul, name)
    setattr(matmul, name, off)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(matmul, name, before)


# %% 23_machinery sec-layerwise 2 d981d256
class LayerOptimizer(Optimizer):
    """What KFAC, EKFAC and FOOF share: all but the preconditioner.

    Statistics arrive layer by layer from ``Capture``. With P a layer's preconditioner,
    g the gradient of the loss as a mean over rows of outputs, sums over all layers, and
    ``lr_max`` the largest ``lr`` so far, or ahead where a scheduler says it::

        u = P⁻¹ g,    ν = min(1, √(kl_clip / (lr_max² ⟨u, g⟩)))
        m ← momentum · m + ν u
        w ← (1 − lr · weight_decay) w − lr · m

    Parameters that no layer covers are stepped by ``algorithm``, in groups of their
    own.

    A subclass says what to average over examples (``shapes``, ``statistics``), what to
    derive from a factor now and then (``refresh``), and how to apply it
    (``precondition``).

    Args:
        model: The module that the training loop calls.
        capture: Arguments of ``Capture``.
        algorithm: What steps parameters that no layer covers.
        factor_update_every: Steps between two updates of the statistics.
        inverse_update_every: Steps between two inversions of a factor.
        reduction: What the loss is divided by; see ``KFAC``.
        grad_scaler: What multiplies the loss.
        process_group: The processes that average gradients; see ``KFAC``.
        seed: Of the drawn targets.
        params: Parameters or groups; those of the model by default.
        **given: ``HYPERPARAMETERS``, and ``Options``.

    Raises:
        TypeError: ``model`` is no module; an argument of another type.
        ValueError: An argument out of range; no layer to precondition; sharded
            parameters.

    Source: appendix "The machinery".
    """

    engines = ("auto", "loop")
    ranges = {"damping": "[0, inf)", "kl_clip": "(0, inf]", "stat_decay": "[0, 1)"}
    #: The factors that are inverted.
    sides: tuple[str, ...] = ("A", "G")
    #: Statistics that are quadratic in the gradients.
    quadratic = frozenset({"G", "F", "s"})

    def __init__(
        self,
        model: nn.Module,
        *,
        capture: dict[str, Any],
        algorithm: str,
        factor_update_every: int,
        inverse_update_every: int,
        reduction: str | None,
        seed: int,
        grad_scaler: Any,
        process_group: Any,
        params: Any,
        **given: Any,
    ) -> None:
        kind = type(self).__name__
        if not isinstance(model, nn.Module):
            remedy = "pass the nn.Module, and groups of its parameters as params="
            raise TypeError(f"model is a {type(model).__name__}; {remedy}")
        check_range("factor_update_every", factor_update_every, "[1, inf) int")
        check_range("inverse_update_every", inverse_update_every, "[1, inf) int")
        check_range("seed", seed, "[0, 2147483648) int")
        check_choice("reduction", reduction, (None, "mean", "examples", "sum"))
        check_choice("algorithm", algorithm, ALGORITHMS)
        if isinstance(model, DistributedDataParallel):
            process_group, model = process_group or model.process_group, model.module
        named = list(model.named_parameters())
        if apart := [name for name, p in named if hasattr(p, "placements")]:
            raise ValueError(
                f"parameter {apart[0]!r} is sharded over processes (DTensor) and "
                f"{kind} needs whole layers; use DistributedDataParallel, or AdamW"
            )
        self.model, self.capture_options, self.algorithm = model, capture, algorithm
        self.factor_update_every = factor_update_every
        self.inverse_update_every = inverse_update_every
        self.reduction, self.grad_scaler = reduction, grad_scaler
        self._scaled, self._decay = False, given["weight_decay"]
        self._frozen = [(name, p) for name, p in named if not p.requires_grad]
        defaults = {name: given.pop(name) for name in HYPERPARAMETERS}
        defaults |= {"seed": seed, "steps": 0, "lr_max": 0.0}
        if params is None:
            params = [(name, p) for name, p in named if p.requires_grad]
        groups = list(params)
        if not (groups and isinstance(groups[0], dict)):
            groups = [{"params": groups}]
        halves = zip(*map(self._halves, groups), strict=True)
        own, rest = ([group for group in half if group["params"]] for half in halves)
        if not any(p.requires_grad for group in own for _, p in group["params"]):
            raise ValueError(
                f"{kind} finds none of the given parameters in a layer that it covers "
                "and that requires a gradient; pass the model that is trained, with "
                "its own parameters; unfreeze them before, or use AdamW if there are "
                "no layers"
            )
        super().__init__([*own, *rest], defaults, **{"nonfinite": "skip", **given})
        self._attach(process_group)
        fraction, names = (self.coverage()[key] for key in ("fraction", "rest"))
        if fraction < 0.8 and not any("algorithm" in group for group in groups):
            some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            told = f"{kind} covers {fraction:.0%} of the parameters; the others are"
            warnings.warn(f"{told} stepped by {algorithm!r}: {some}", stacklevel=3)

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """What is averaged for a layer, by name; nothing, if it is not covered."""
        raise TypeError(f"{type(self).__name__} defines no statistics")

    def expected(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """What ``statistics`` gives in this step: all of ``shapes``, by default."""
        return self.shapes(layer)

    def statistics(self, layer: Layer, a: Tensor, g: Tensor | None) -> Memory:
        """Means over the examples at hand, by name."""
        raise TypeError(f"{type(self).__name__} defines no statistics")

    def refresh(self, side: str, memories: list[Memory], groups: list[Names]) -> None:
        """Derive what a step needs from factors of one shape."""
        raise TypeError(f"{type(self).__name__} derives nothing")

    def derived(self, side: str) -> set[str]:
        """Names of what ``refresh`` derives, and a step needs."""
        raise TypeError(f"{type(self).__name__} derives nothing")

    def precondition(self, memory: Memory, g: Tensor, h: Names) -> Tensor:
        """``P⁻¹ g`` for the gradient matrix of one layer."""
        raise TypeError(f"{type(self).__name__} has no preconditioner")

    # %% 23_machinery sec-layerwise 3 26420f25
    def _halves(self, group: Group) -> tuple[Group, Group]:
        """A group in two: what a layer covers, and what ``algorithm`` steps."""
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if all(isinstance(p, Tensor) for p in params):
            names = {id(p): name for name, p in self.model.named_parameters()}
            params = [(names.get(id(p), "outside the model"), p) for p in params]
        if "algorithm" in group:
            return {**group, "params": []}, {**group, "params": params}
        layers, _ = find_layers(self.model, {id(p) for _, p in params})
        inside = {id(p) for x in layers if self.shapes(x) for p in x.parameters}
        own = [(name, p) for name, p in params if id(p) in inside]
        rest = [(name, p) for name, p in params if id(p) not in inside]
        other = {name: group[name] for name in OPTIONS if name in group}
        other["weight_decay"] = group.get("weight_decay", self._decay)
        other["algorithm"] = self.algorithm
        return {**group, "params": own}, {**other, "params": rest}


    def add_param_group(self, param_group: Group) -> None:
        """Add a group, in two halves; the layers that it completes are watched from now."""
        for group in self._halves(param_group):
            if group["params"]:
                super(LayerOptimizer, self).add_param_group(group)
        if "capture" in vars(self):
            for group in self._own:
                group["steps"] = self._own[0]["steps"]
            self._attach(self.capture.process_group)


    @property
    def _own(self) -> list[Group]:
        """The groups that are not left to another algorithm."""
        return [group for group in self.param_groups if "algorithm" not in group]


    def coverage(self) -> dict[str, Any]:
        """What is preconditioned.

        Returns:
            ``"fraction"`` of the optimizer's parameters that lie in a layer, names of the
            ``"layers"``, and names of the parameters that make up the ``"rest"``.
        """
        def size(groups: list[Group]) -> int:
            return sum(p.numel() for group in groups for p in group["params"])

        others = [group for group in self.param_groups if "algorithm" in group]
        return {
            "fraction": size(self._own) / max(1, size(self.param_groups)),
            "layers": [layer.name for layer in self.capture.layers],
            "rest": [name for group in others for name in group["param_names"]],
        }


    def __repr__(self) -> str:
        fraction, layers, rest = self.coverage().values()
        told = f"{len(layers)} layers, {fraction:.0%} of the parameters"
        told = f"{type(self).__name__} of {told} ({len(rest)} tensors are in no layer)"
        return f"{told}\n{super(LayerOptimizer, self).__repr__()}"


    def _attach(self, process_group: Any = None) -> None:
        """Watch the layers of all parameters that are in some group."""
        if "capture" in vars(self):
            self.capture.detach()
        ours = [p for group in self._own for p in group["params"]]
        self.generator = torch.Generator(device=ours[0].device)
        self.capture = Capture(
            self.model, consume=self.observe, generator=self.generator, parameters=ours,
            **self.capture_options,
        )  # fmt: skip
        self.capture.process_group = process_group
        self.capture.entered = self._forget_discarded
        climbs = any(group["maximize"] for group in self._own)
        self.capture.weighing = self.reduction is None and not climbs
        #: Means over the examples seen since the last step, and how many these were.
        self.pending: dict[Layer, Memory] = {}
        self.counts: dict[Layer, Any] = {}
        self._gathered, layers = False, self.capture.layers
        #: Which of the layers in one parameter (a fused QKV has three).
        self.slots: dict[Layer, str] = {}
        for layer in layers:
            before = [x for x in self.slots if x.parameters[0] is layer.parameters[0]]
            self.slots[layer] = str(len(before))
        #: Which parameter group each layer follows, by number.
        places = {p: i for i, x in enumerate(self.param_groups) for p in x["params"]}
        self.numbers = {layer: places[layer.parameters[0]] for layer in layers}
        #: All factors, and in which of so many steps each is inverted.
        self.units = [(k, x) for k in self.sides for x in layers if k in self.shapes(x)]
        shapes = [self.shapes(layer)[side] for side, layer in self.units]
        costs = [float(shape[0] ** 3 if len(shape) == 2 else 1) for shape in shapes]
        self.turns = share(costs, self.inverse_update_every)
        self._prepare()


    def _prepare(self) -> None:
        """Record before the next step? And which targets are drawn?"""
        seed, t = (self._own[0][name] for name in ("seed", "steps"))
        rank = distributed.get_rank() if processes() > 1 else 0
        new = any(
            not self._memory(layer) and any(p.grad is not None for p in layer.parameters)
            for layer in self.capture.layers
        )
        self.capture.recording = new or t % self.factor_update_every == 0
        # A generator on the CPU looks at 32 bits; the factors keep what is drawn apart.
        seed = (2654435761 * seed + 1640531527 * rank + t) % 2**32
        self.generator.manual_seed(seed)

    # %% 23_machinery sec-layerwise 4 c478c214
    @torch.no_grad()
    def observe(self, layer: Layer, a: Tensor, g: Tensor | None) -> None:
        """Take in inputs and output gradients of some examples."""
        if why := self._changed(layer):
            raise ValueError(why)
        with full_precision(a.device):
            means = self.statistics(layer, a, g)
        # Curvature is that of a mean over rows (or examples). The user's own gradients are
        # multiplied by their number when all passes are in: see _gather.
        N, unit = self.capture.examples, self._unit(vars(self.capture))
        scale = N / unit / (N**2 if self.capture.fisher == "empirical" else 1)
        for name in means.keys() & self.quadratic if scale != 1 else ():
            means[name] = means[name] * scale
        self.counts[layer] = self.counts.get(layer, 0) + N
        seen = self.pending.setdefault(layer, means)
        for name, mean in means.items() if seen is not means else ():
            seen[name].lerp_(mean, N / self.counts[layer])


    def _remember(self, finite: Tensor | None) -> None:
        """Move the running means by what the last passes showed."""
        for layer, seen in self.pending.items():
            group, n = self._group(layer), self.counts[layer]
            first = layer.parameters[0]
            keep = finite if group["nonfinite"] == "skip" else None
            if isinstance(n, Tensor):  # of all processes, and perhaps none
                keep = n > 0 if keep is None else keep & (n > 0)
            if not seen:
                continue
            self.state[first].setdefault("layers", {}).setdefault(self.slots[layer], {})
            memory = self._memory(layer)
            for name, mean in seen.items():
                mean = seen[name] = mean.to(wide(first.dtype))
                memory.setdefault("count", mean.new_zeros(()))
                if name not in memory:
                    memory[name] = torch.zeros_like(mean)
            k = memory["count"] + 1
            weight = (1 / k).clamp(min=1 - group["stat_decay"])
            for name, new in [*seen.items(), ("count", k)]:
                if keep is not None:
                    new = torch.where(keep.to(new.device), new, memory[name])
                memory[name].lerp_(new, 1 if name == "count" else weight)


    def _memory(self, layer: Layer) -> Memory:
        """What is remembered of a layer; empty before its first step."""
        first = layer.parameters[0]
        memory = self.state.get(first, {}).get("layers", {}).get(self.slots[layer], {})
        dtype = wide(first.dtype) if memory else None
        for name, x in memory.items():  # the model may have been moved to another type
            if x.dtype != dtype:
                memory[name] = x.to(dtype)
        return memory


    def _changed(self, layer: Layer) -> str:
        """Why a layer is no longer the one that is watched, with the remedy; or nothing."""
        now, kind = [tuple(p.shape) for p in layer.parameters], type(self).__name__
        told = f"layer {layer.name!r} had parameters of shape {layer.sizes}"
        told = f"{told} when {kind} was built, and has {now} now; build it anew"
        return "" if now == layer.sizes else told


    def _group(self, layer: Layer) -> Group:
        return self.param_groups[self.numbers[layer]]


    @property
    def device(self) -> torch.device:
        """Where statistics are kept."""
        return self.generator.device

    # %% 23_machinery sec-layerwise 5 1d57d6e9
    def _gather(self) -> None:
        """Before anything changes: what is refused, and the means over all processes."""
        if self._gathered:
            return
        capture, kind = self.capture, type(self).__name__
        self.factor = self._loss_factor()
        if capture.fisher == "empirical":
            size = self._unit(capture.seen) / self.factor / self._amplified()
            for found in self.pending.values():
                for name in found.keys() & self.quadratic:
                    found[name] = found[name] * size**2
        blind = not self.pending
        self._average()
        if capture.weighing and capture.recording:
            self._check_scale()
        for layer in capture.layers if capture.recording else ():
            # Reading from a device would wait for it, and be needless in a usual step.
            look = blind or self.device.type == "cpu" or not self._memory(layer)
            unmet = look and self.counts.get(layer, 0) == 0
            g = layer.gradient() if unmet else None
            if g is not None and g.any():
                raise RuntimeError(
                    f"layer {layer.name!r} has a gradient, but {kind} saw no forward pass "
                    "of it since the last step; call the model itself, as model(x), not "
                    "compiled, with use_reentrant=False where it is checkpointed, and "
                    "differentiate a loss of its output"
                )
        stepped = {id(p) for layer in capture.layers for p in layer.parameters}
        named = [*self._frozen]
        for group in self.param_groups:
            if "algorithm" in group:
                stepped.update(map(id, group["params"]))
            named += zip(group["param_names"], group["params"], strict=True)
        for name, p in named:
            if p.requires_grad and p.grad is not None and id(p) not in stepped:
                raise RuntimeError(
                    f"parameter {name!r} was frozen when {kind} was built and has a "
                    "gradient now; build it anew or, if no group has the parameter yet, "
                    "add it with add_param_group({'params': [p]})"
                )
        self._gathered = True


    def _loss_factor(self) -> float:
        """What the user's loss is, as a multiple of the mean that it has to be."""
        examples, rows = (self.capture.seen[name] for name in ("examples", "rows"))
        kind = self.capture.likelihood
        if self.reduction is None and rows != examples and kind != "categorical":
            raise ValueError(
                f"{examples} examples have outputs of {rows} rows, and whether the loss is "
                "a mean over the one or the other does not show under "
                f"likelihood={kind!r}; pass reduction='mean' (over rows: tokens, pixels) "
                "or 'examples'"
            )
        return float(rows or 1) if self.reduction == "sum" else 1.0


    def _check_scale(self) -> None:
        """Once: is the user's loss, a mean over processes, the mean that it has to be?"""
        seen = self.capture.seen
        weight = float(seen["weight"] / self._amplified())
        if not 0 < weight < math.inf:
            return
        if self._scaled and self.grad_scaler is None:
            told = "a GradScaler has scaled the loss; whether it is a mean goes unchecked"
            warnings.warn(f"{told}; pass grad_scaler=, or reduction=", stacklevel=2)
        elif weight > 1.5:
            if self.capture.likelihood == "categorical" and seen["largest"] > 1e-3:
                negative = "the loss is the negative of a cross-entropy"
                raise ValueError(f"{negative}; pass maximize=True")
            raise ValueError(
                f"the loss is {weight:.3g} times the mean over the {seen['rows']} rows of "
                "outputs, or more, or no such mean at all; divide it by their number, or "
                "pass reduction='sum', 'examples' (a mean over examples of sums over their "
                "rows), or 'mean' if the factor is meant; or the likelihood of the loss"
            )
        self.capture.weighing = False


    def _amplified(self) -> float | Tensor:
        """What the loss of the backward pass was multiplied by."""
        one = torch.ones((), device=self.device)
        return 1.0 if self.grad_scaler is None else self.grad_scaler.scale(one)


    def _unit(self, counts: dict[str, Any]) -> int:
        """How many terms the mean has that curvature is the curvature of."""
        return counts["examples" if self.reduction == "examples" else "rows"]


    @property
    def _step_supports_amp_scaling(self) -> bool:
        """No; but ``GradScaler`` asks just before it steps, and so makes itself known."""
        if self.capture.fisher == "empirical" and self.grad_scaler is None:
            told = "fisher='empirical' sees the loss as GradScaler has scaled it"
            raise ValueError(f"{told}; pass grad_scaler=")
        self._scaled = True
        return False


    def _average(self) -> None:
        """Replace statistics by their means over processes, weighted by examples.

        And the weight of the loss by its plain mean, as gradients are averaged.
        """
        capture, group = self.capture, self.capture.process_group
        if processes(group) == 1 or not capture.recording:
            return
        if group is None:
            raise RuntimeError(
                f"{processes()} processes run, and {type(self).__name__} does not know "
                "which of them average gradients; wrap the model in "
                "DistributedDataParallel, or pass process_group= (of this process alone, "
                "if it trains alone)"
            )
        if self.reduction == "sum":
            raise RuntimeError(
                "reduction='sum' is not supported on several processes; let the loss be a "
                "mean over rows, and leave reduction= out"
            )
        weight = torch.as_tensor(capture.seen["weight"], device=self.device)
        sums = [weight / processes(group)]
        for layer in capture.layers:
            seen, n = self.pending.get(layer, {}), float(self.counts.get(layer, 0))
            dtype = wide(layer.parameters[0].dtype)
            zero = torch.zeros((), dtype=dtype, device=self.device)
            sums.append(zero + n)
            for name, shape in self.expected(layer).items():
                sums.append((n * seen.get(name, zero).to(zero)).expand(shape))
        whole = flat(sums)
        distributed.all_reduce(whole, group=group)
        capture.seen["weight"], *rest = unflat(whole, sums)
        pieces, before, self.pending = iter(rest), self.pending, {}
        for layer in capture.layers:
            n, like = next(pieces), layer.parameters[0]
            found = [(name, next(pieces) / n.clamp(min=1)) for name in self.expected(layer)]
            means = {name: x.to(like.device, wide(like.dtype)) for name, x in found}
            # the number is seldom read to the host
            if layer in before or self._memory(layer) or n > 0:
                self.pending[layer], self.counts[layer] = means, n

    # %% 23_machinery sec-layerwise 6 3dd9107c
    def _refresh(self) -> None:
        """Renew the factors that are due, those of one shape together."""
        every, now = self.inverse_update_every, self._own[0]["steps"]
        batches = defaultdict(list)
        for (side, layer), turn in zip(self.units, self.turns, strict=True):
            memory = self._memory(layer)
            fresh = not self.derived(side) <= memory.keys()
            for name in [x for x in memory if fresh and x.startswith(f"{side}_")]:
                del memory[name]  # of other settings, in a checkpoint
            if side in memory and (fresh or now < 3 or now % every == turn):
                x, alone = memory[side], self._group(layer)["engine"] == "loop"
                kind = (x.shape, x.dtype, x.device, layer if alone else None)
                batches[side, *kind].append(layer)
        for (side, *_), layers in batches.items():
            memories = [self._memory(layer) for layer in layers]
            groups = [Names(**self._group(layer)) for layer in layers]
            try:
                self.refresh(side, memories, groups)
            except torch.linalg.LinAlgError as error:
                names = ", ".join(repr(layer.name) for layer in layers)
                raise FloatingPointError(
                    f"factor {side} of layer {names} has no eigenvectors, since its "
                    "statistics are not finite; lower lr, or use nonfinite='skip'"
                ) from error

    # %% 23_machinery sec-layerwise 7 6b3ae674
    def directions(self, work: Any, finite: Tensor | None) -> dict[Tensor, Tensor]:
        """Preconditioned gradients, clipped; and the next step is prepared."""
        self._gather()
        careful = all(group["nonfinite"] == "skip" for group in self._own)
        go = known(finite) if careful else None
        updates: dict[Tensor, Tensor] = {}
        if go is not False:
            self._remember(None if go else finite)
            with full_precision(self.device):
                self._refresh()
                for layer in self.capture.layers:
                    self._update(layer, updates)
            self._clip(updates)
        self._forget_passes()
        for group in self._own:
            group["steps"] += 1
        self._prepare()
        return {p: u.to(p.dtype) for p, u in updates.items()}

    # %% 23_machinery sec-layerwise 8 473745ef
    def _clip(self, updates: dict[Tensor, Tensor]) -> None:
        """Shrink the whole step onto its limit, at the largest lr: so far, or scheduled."""
        for group in self._own:
            peak = group.get("max_lr", group.get("initial_lr", 0.0))
            group["lr_max"] = _largest(_largest(group["lr"], group["lr_max"]), peak)
        pairs = [(p, x) for x in self._own for p in x["params"] if p in updates]
        if not pairs:
            return
        terms = [x["lr_max"] ** 2 * _dot(updates[p], p.grad) for p, x in pairs]
        size = torch.stack([x.to(terms[0]).squeeze() for x in terms]).sum() / self.factor
        for group in [x for x in self._own if x["kl_clip"] < math.inf]:
            nu = (group["kl_clip"] / size.clamp(min=0)).sqrt().clamp(max=1)
            for u in [updates[p] for p in group["params"] if p in updates]:
                u.mul_(nu.to(u.device, u.dtype))

    # %% 23_machinery sec-layerwise 9 5c3d26ad
    def _update(self, layer: Layer, updates: dict[Tensor, Tensor]) -> None:
        """Write the update of a layer into tensors like its parameters."""
        memory, g = self._memory(layer), layer.gradient()
        if g is None:
            return
        g = g.to(wide(g.dtype))
        g = g if self.factor == 1 else g / self.factor
        if memory:
            u = self.precondition(memory, g, Names(**self._group(layer)))
            u = u * (memory["count"] > 0)
        else:  # it stands still until there are statistics
            u = torch.zeros_like(g)
        for p, rows, piece in layer.pieces(u):
            if p.grad is not None and piece.shape == p.shape:
                updates[p] = piece
            elif p.grad is not None:  # some rows of a fused matrix
                if p not in updates:
                    updates[p] = p.grad.to(u.dtype, copy=True)
                updates[p][rows] = piece


    def init_state(self, p: Tensor, g: Tensor, h: Names) -> Memory:
        return {"momentum_buffer": torch.zeros_like(p)} if h.momentum else {}


    @staticmethod
    def rule(p: Any, g: Any, s: Names, h: Names) -> None:
        if h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        if h.momentum:
            g = s.momentum_buffer.mul_(h.momentum).add_(g)
        p.add_(g, alpha=-h.lr)


    def examined(self, work: Any) -> Iterator[tuple[Group, str, Tensor]]:
        """Gradients, and the new statistics."""
        yield from super(LayerOptimizer, self).examined(work)
        self._gather()
        for layer, seen in self.pending.items():
            for name, x in seen.items():
                # The diagonal of a factor shows what any entry would.
                x = x.diagonal() if name in self.sides and x.ndim == 2 else x
                yield self._group(layer), f"statistic {name} of layer {layer.name!r}", x

    # %% 23_machinery sec-layerwise 10 82499840
    def _forget_passes(self) -> None:
        self.pending, self.counts, self._gathered = {}, {}, False
        self.capture.clear()


    def _forget_discarded(self) -> None:
        """Before a forward call: a pass whose gradients are gone counts no longer."""
        params = (p for layer in self.capture.layers for p in layer.parameters)
        begun = self.pending or self.capture.seen["rows"]
        if begun and all(p.grad is None for p in params):
            self._forget_passes()


    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and with them statistics not yet used."""
        super(LayerOptimizer, self).zero_grad(set_to_none)
        self._forget_passes()


    def detach(self) -> None:
        """Remove all hooks from the model; it trains no further with this."""
        self.capture.detach()


    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of state by layer: factors, what is derived, momentum."""
        report = {}
        for layer in self.capture.layers:
            sizes = {"factors": 0, "derived": 0, "momentum": 0}
            for name, x in self._memory(layer).items():
                sizes["derived" if "_" in name else "factors"] += x.nbytes
            share_of = math.prod(layer.shape) / sum(p.numel() for p in layer.parameters)
            for p in layer.parameters:
                if (buffer := self.state.get(p, {}).get("momentum_buffer")) is not None:
                    sizes["momentum"] += round(share_of * buffer.nbytes)
            report[layer.name] = sizes
        return report


    def misfit(self, p: Tensor, state: dict[str, Any], group: Group) -> str:
        """Also whether statistics fit the layers."""
        layers = self.capture.layers if "capture" in vars(self) else []
        mine = [x for x in layers if any(q is p for q in x.parameters)]
        why = "".join(map(self._changed, mine[:1]))
        why = why or super(LayerOptimizer, self).misfit(p, state, group)
        for layer in [x for x in layers if x.parameters[0] is p]:
            sizes = {"count": (), **self.shapes(layer)}
            for side in sizes.keys() & self.sides:
                square, row = sizes[side], sizes[side][:1]
                sizes |= {f"{side}_inverse": square, f"{side}_vectors": square}
                sizes |= {f"{side}_values": row}
            for name, x in state.get("layers", {}).get(self.slots[layer], {}).items():
                if tuple(x.shape) != sizes.get(name, tuple(x.shape)):
                    why = why or (
                        f"its statistic {name!r} has shape {tuple(x.shape)}, which has to "
                        f"be {sizes[name]} for layer {layer.name!r}; load a checkpoint of "
                        "this model"
                    )
        return why


    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; statistics keep the type they were saved in."""
        super(LayerOptimizer, self).load_state_dict(state_dict)
        saved, own = ([p for x in groups for p in x["params"]] for groups in (
            state_dict["param_groups"], self.param_groups))  # fmt: skip
        for key, p in zip(saved, own, strict=True):
            given = state_dict["state"].get(key, {}).get("layers", {})
            for slot, memory in given.items():
                copied = {n: x.detach().to(p.device, copy=True) for n, x in memory.items()}
                self.state[p]["layers"][slot] = copied
        self._forget_passes()
        self._prepare()


# %% 23_machinery sec-layerwise 11 2309fc45
def _largest(lr: float | Tensor, before: float | Tensor) -> float | Tensor:
    """The larger of two learning rates, as a value that does not change in place."""
    if isinstance(lr, Tensor):
        return torch.maximum(lr.detach(), torch.as_tensor(before).to(lr))
    return max(lr, float(before))


def _dot(u: Tensor, g: Tensor) -> Tensor:
    return torch.dot(u.flatten().to(wide(u.dtype)), g.flatten().to(wide(u.dtype)))
