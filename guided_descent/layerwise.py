# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 311914d2
"""Chapter 23, The machinery."""

__all__ = [
    "LayerOptimizer",
    "Memory",
    "full_precision",
]


# %% 23_machinery sec-layerwise 1 87da76a2
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from guided_descent.capture import Capture
from guided_descent.core import ALGORITHMS, OPTIONS, Names, Optimizer, Options
from guided_descent.core import check_choice, check_range, known, share, wide
from guided_descent.layers import Layer, find_layers

#: What is remembered of one layer, by name.
Memory = dict[str, Tensor]


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


# %% 23_machinery sec-layerwise 2 3e654603
class LayerOptimizer(Optimizer):
    """What KFAC, EKFAC and FOOF share: all but the preconditioner.

    Statistics arrive layer by layer from ``Capture``. With P a layer's preconditioner, g
    the gradient of the loss as a mean over rows of outputs, sums over all layers, and
    ``lr_max`` the largest ``lr`` so far, or ahead where a scheduler says it::

        u = P⁻¹ g,    ν = min(1, √(kl_clip / (lr_max² ⟨u, g⟩)))
        m ← momentum · m + ν u
        w ← (1 − lr · weight_decay) w − lr · m

    Parameters that no layer covers are stepped by ``algorithm``, in groups of their own.

    A subclass says what to average over examples (``shapes``, ``statistics``), what to
    derive from a factor now and then (``refresh``), and how to apply it (``precondition``).

    Args:
        model: The module that the training loop calls.
        lr, momentum, damping, stat_decay, kl_clip, weight_decay: Hyperparameters of a
            parameter group.
        capture: Arguments of ``Capture``.
        algorithm: What steps parameters that no layer covers.
        factor_update_every: Steps between two updates of the statistics.
        inverse_update_every: Steps between two inversions of a factor.
        reduction: What the loss is divided by; see ``KFAC``.
        grad_scaler: What multiplies the loss.
        process_group: The processes that average gradients; see ``KFAC``.
        seed: Of the drawn targets.
        params: Parameters or groups; those of the model by default.
        **options: See ``Options``.

    Raises:
        TypeError: ``model`` is no module; an argument of another type.
        ValueError: An argument out of range; no layer to precondition; sharded parameters.

    Source: appendix "The machinery".
    """

    engines = ("auto", "loop")
    ranges = {
        "damping": "[0, inf)",
        "kl_clip": "(0, inf]",
        "stat_decay": "[0, 1)",
    }
    #: The factors that are inverted.
    sides: tuple[str, ...] = ("A", "G")
    #: Statistics that are quadratic in the gradients.
    quadratic = frozenset({"G", "F", "s"})

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float | Tensor,
        momentum: float,
        damping: float,
        stat_decay: float,
        kl_clip: float,
        weight_decay: float,
        capture: dict[str, Any],
        algorithm: str,
        factor_update_every: int,
        inverse_update_every: int,
        reduction: str | None,
        seed: int,
        grad_scaler: Any,
        process_group: Any,
        params: Any,
        **options: Unpack[Options],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}; pass the nn.Module itself, and groups "
                "of its parameters as params="
            )
        for name, count in (
            ("factor_update_every", factor_update_every),
            ("inverse_update_every", inverse_update_every),
        ):
            check_range(name, count, "[1, inf) int")
        check_range("seed", seed, "[0, 2147483648) int")
        check_choice("reduction", reduction, (None, "mean", "examples", "sum"))
        check_choice("algorithm", algorithm, ALGORITHMS)
        if isinstance(model, DistributedDataParallel):
            process_group, model = process_group or model.process_group, model.module
        for name, p in model.named_parameters():
            if hasattr(p, "placements"):
                raise ValueError(
                    f"parameter {name!r} is sharded over processes (DTensor) and "
                    f"{type(self).__name__} needs whole layers; use DistributedDataParallel, "
                    "or an elementwise method such as AdamW"
                )
        self.model, self.capture_options, self.algorithm = model, capture, algorithm
        self.factor_update_every = factor_update_every
        self.inverse_update_every = inverse_update_every
        self.reduction, self.grad_scaler = reduction, grad_scaler
        self._scaled, self._decay = False, weight_decay
        self._frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
        if params is None:
            params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        options.setdefault("nonfinite", "skip")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "stat_decay": stat_decay,
            "kl_clip": kl_clip,
            "weight_decay": weight_decay,
            "seed": seed,
            "steps": 0,
            "lr_max": 0.0,
        }
        groups = list(params)
        if not isinstance(groups[0] if groups else None, dict):
            groups = [{"params": groups}]
        halves = [self._halves(group) for group in groups]
        own, rest = ([x for x in half if x["params"]] for half in zip(*halves, strict=True))
        if not any(p.requires_grad for group in own for _, p in group["params"]):
            raise ValueError(
                f"{type(self).__name__} finds none of the given parameters in a layer of the "
                "model that it covers and requiring a gradient; pass the model that is "
                "trained, with its own parameters; unfreeze them before with "
                "requires_grad_(True); use an elementwise method such as AdamW if it has no "
                "layers"
            )
        super().__init__([*own, *rest], defaults, **options)
        self._attach(process_group)
        fraction, names = (self.coverage()[key] for key in ("fraction", "rest"))
        if fraction < 0.8 and not any("algorithm" in group for group in groups):
            warnings.warn(
                f"{type(self).__name__} covers {fraction:.0%} of the parameters; the others "
                f"are stepped by {algorithm!r}: {', '.join(names[:8])}"
                f"{', …' if len(names) > 8 else ''}",
                stacklevel=3,
            )

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """What is averaged for a layer, by name; nothing, if it is not covered."""
        raise TypeError(f"{type(self).__name__} defines no statistics")

    def expected(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """What ``statistics`` gives in this step: all of ``shapes``, unless overridden."""
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

    # %% 23_machinery sec-layerwise 3 53e4cc39
    def _halves(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A group in two: what a layer covers, and what ``algorithm`` steps."""
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        names = {id(p): name for name, p in self.model.named_parameters()}
        if all(isinstance(p, Tensor) for p in params):
            params = [(names.get(id(p), "outside the model"), p) for p in params]
        layers, _ = find_layers(self.model, {id(p) for _, p in params})
        layers = [layer for layer in layers if self.shapes(layer)]
        inside = {id(p) for layer in layers for p in layer.parameters}
        if "algorithm" in group:
            inside = set()
        own = [(name, p) for name, p in params if id(p) in inside]
        rest = [(name, p) for name, p in params if id(p) not in inside]
        kept = {name: group[name] for name in OPTIONS if name in group}
        kept["weight_decay"] = group.get("weight_decay", self._decay)
        other = group if "algorithm" in group else {**kept, "algorithm": self.algorithm}
        return {**group, "params": own}, {**other, "params": rest}


    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the layers that it completes are watched from now.

        What no layer covers makes a second group, stepped by ``algorithm``.
        """
        for group in self._halves(param_group):
            if group["params"]:
                super(LayerOptimizer, self).add_param_group(group)
        if "capture" in vars(self):
            for group in self._own:
                group["steps"] = self._own[0]["steps"]
            self._attach(self.capture.process_group)


    @property
    def _own(self) -> list[dict[str, Any]]:
        """The groups that are not left to another algorithm."""
        return [group for group in self.param_groups if "algorithm" not in group]


    def coverage(self) -> dict[str, Any]:
        """What is preconditioned.

        Returns:
            ``"fraction"`` of the optimizer's parameters that lie in a layer, names of the
            ``"layers"``, and names of the parameters that make up the ``"rest"``.
        """
        inside = sum(p.numel() for group in self._own for p in group["params"])
        others = [group for group in self.param_groups if "algorithm" in group]
        outside = sum(p.numel() for group in others for p in group["params"])
        return {
            "fraction": inside / max(1, inside + outside),
            "layers": [layer.name for layer in self.capture.layers],
            "rest": [name for group in others for name in group["param_names"]],
        }


    def __repr__(self) -> str:
        found = self.coverage()
        inside, outside = len(found["layers"]), len(found["rest"])
        return (
            f"{type(self).__name__} of {inside} layers, {found['fraction']:.0%} of the "
            f"parameters ({outside} tensors are in no layer)\n{super(LayerOptimizer, self).__repr__()}"
        )


    def _attach(self, process_group: Any = None) -> None:
        """Watch the layers of all parameters that are in some group."""
        if "capture" in vars(self):
            self.capture.detach()
        ours = [p for group in self._own for p in group["params"]]
        self.generator = torch.Generator(device=ours[0].device)
        self.capture = Capture(
            self.model,
            consume=self.observe,
            generator=self.generator,
            parameters=ours,
            **self.capture_options,
        )
        self.capture.process_group = process_group
        self.capture.entered = self._forget_discarded
        climbs = any(group["maximize"] for group in self._own)
        self.capture.weighing = self.reduction is None and not climbs
        #: Means over the examples seen since the last step, and how many these were.
        self.pending: dict[Layer, Memory] = {}
        self.counts: dict[Layer, Any] = {}
        self._gathered = False
        #: Which of the layers in one parameter (a fused QKV has three).
        self.slots: dict[Layer, str] = {}
        taken: dict[Tensor, int] = defaultdict(int)
        for layer in self.capture.layers:
            first = layer.parameters[0]
            self.slots[layer] = str(taken[first])
            taken[first] += 1
        #: Which parameter group each layer follows, by number.
        self.numbers = {
            layer: i
            for layer in self.capture.layers
            for i, group in enumerate(self.param_groups)
            if any(p is layer.parameters[0] for p in group["params"])
        }
        #: All factors, and in which of so many steps each is inverted.
        layers = self.capture.layers
        self.units = [(k, x) for k in self.sides for x in layers if k in self.shapes(x)]
        shapes = [self.shapes(layer)[side] for side, layer in self.units]
        costs = [float(shape[0] ** 3 if len(shape) == 2 else 1) for shape in shapes]
        self.turns = share(costs, self.inverse_update_every)
        self._prepare()


    def _prepare(self) -> None:
        """Record before the next step? And which targets are drawn?"""
        seed, t = (self._own[0][name] for name in ("seed", "steps"))
        several = distributed.is_available() and distributed.is_initialized()
        rank = distributed.get_rank() if several else 0
        new = any(
            p.grad is not None and not self._memory(layer)
            for layer in self.capture.layers
            for p in layer.parameters
        )
        self.capture.recording = new or t % self.factor_update_every == 0
        # A generator on the CPU looks at 32 bits; the factors keep what is drawn apart.
        seed = (2654435761 * seed + 1640531527 * rank + t) % 2**32
        self.generator.manual_seed(seed)

    # %% 23_machinery sec-layerwise 4 e299f5bb
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
            keep = finite if group["nonfinite"] == "skip" else None
            if isinstance(n, Tensor):  # of all processes, and perhaps none
                keep = n > 0 if keep is None else keep & (n > 0)
            if not seen:
                continue
            first = layer.parameters[0]
            slots = self.state[first].setdefault("layers", {})
            slots.setdefault(self.slots[layer], {})
            memory = self._memory(layer)
            for name, mean in seen.items():
                mean = seen[name] = mean.to(wide(first.dtype))
                if name not in memory:
                    memory.setdefault("count", mean.new_zeros(()))
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
        slots = self.state.get(first, {}).get("layers", {})
        memory = slots.get(self.slots[layer], {})
        for name, x in memory.items():  # the model may have been moved to another type
            memory[name] = x.to(wide(first.dtype))
        return memory


    def _changed(self, layer: Layer) -> str:
        """Why a layer is no longer the one that is watched, with the remedy; or nothing."""
        now = [tuple(p.shape) for p in layer.parameters]
        return "" if now == layer.sizes else (
            f"layer {layer.name!r} had parameters of shape {layer.sizes} when "
            f"{type(self).__name__} was built, and has {now} now; build it anew"
        )


    def _group(self, layer: Layer) -> dict[str, Any]:
        return self.param_groups[self.numbers[layer]]


    @property
    def device(self) -> torch.device:
        """Where statistics are kept."""
        return self.generator.device

    # %% 23_machinery sec-layerwise 5 4352831a
    def _gather(self) -> None:
        """Before anything changes: what is refused, and the means over all processes."""
        if self._gathered:
            return
        capture = self.capture
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
                    f"layer {layer.name!r} has a gradient, but {type(self).__name__} saw no "
                    "forward pass of it; call the model itself, as model(x), not compiled, "
                    "with use_reentrant=False where it is checkpointed, and differentiate a "
                    "loss of its output"
                )
        stepped = {id(p) for layer in capture.layers for p in layer.parameters}
        named = [*self._frozen]
        for group in self.param_groups:
            if "algorithm" in group:
                stepped.update(map(id, group["params"]))
            else:
                named += zip(group["param_names"], group["params"], strict=True)
        for name, p in named:
            if p.requires_grad and p.grad is not None and id(p) not in stepped:
                raise RuntimeError(
                    f"parameter {name!r} was frozen when {type(self).__name__} was built and "
                    "has a gradient now; build it anew or, if no group has the parameter yet, "
                    "add it with add_param_group({'params': [p]})"
                )
        self._gathered = True


    def _loss_factor(self) -> float:
        """What the user's loss is, as a multiple of the mean that it has to be."""
        seen, kind = self.capture.seen, self.capture.likelihood
        examples, rows = seen["examples"], seen["rows"]
        if not rows:
            return 1.0
        if self.reduction is None and rows != examples and kind != "categorical":
            raise ValueError(
                f"{examples} examples have outputs of {rows} rows, and whether the loss is "
                f"a mean over the one or the other does not show under likelihood={kind!r}; "
                "pass reduction='mean' (over rows: tokens, pixels) or 'examples'"
            )
        return float(rows) if self.reduction == "sum" else 1.0


    def _check_scale(self) -> None:
        """Once: is the user's loss, a mean over processes, the mean that it has to be?"""
        seen = self.capture.seen
        weight = float(seen["weight"] / self._amplified())
        if not 0 < weight < math.inf:
            return
        if self._scaled and self.grad_scaler is None:
            warnings.warn(
                "the loss comes scaled by a GradScaler, so whether it is a mean goes "
                "unchecked; pass grad_scaler=, or reduction=",
                stacklevel=2,
            )
        elif weight > 1.5:
            negative = self.capture.likelihood == "categorical" and seen["largest"] > 1e-3
            raise ValueError(
                "the loss is the negative of a cross-entropy; pass maximize=True"
                if negative
                else f"the loss is {weight:.3g} times the mean over the {seen['rows']} rows of "
                "outputs, or more, or no such mean at all; divide it by their number, or pass "
                "reduction='sum', 'examples' (a mean over examples of sums over their rows), "
                "or 'mean' if the factor is meant; or the likelihood of the loss"
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
            raise ValueError(
                "fisher='empirical' sees the loss as GradScaler has scaled it; pass "
                "grad_scaler="
            )
        self._scaled = True
        return False


    def _average(self) -> None:
        """Replace statistics by their means over processes, weighted by examples.

        And the weight of the loss by its plain mean, as gradients are averaged.
        """
        group = self.capture.process_group
        several = distributed.is_available() and distributed.is_initialized()
        if not several or distributed.get_world_size(group) == 1 or not self.capture.recording:
            return
        kind = type(self).__name__
        if group is None:
            raise RuntimeError(
                f"{distributed.get_world_size()} processes run, and {kind} does not know which "
                "of them average gradients; wrap the model in DistributedDataParallel, or pass "
                "process_group= (of this process alone, if it trains alone)"
            )
        if self.reduction == "sum":
            raise RuntimeError(
                "reduction='sum' is not supported on several processes; let the loss be a "
                "mean over rows, and leave reduction= out"
            )
        weight = torch.as_tensor(self.capture.seen["weight"], device=self.device)
        parts = [weight.view(1) / distributed.get_world_size(group)]
        for layer in self.capture.layers:
            seen, n = self.pending.get(layer, {}), float(self.counts.get(layer, 0))
            zero = torch.zeros((), dtype=wide(layer.parameters[0].dtype), device=self.device)
            sums = [(zero + 1).view(1) * n]
            for name, shape in self.expected(layer).items():
                mean = seen.get(name, zero).to(zero)
                sums.append((n * mean).expand(shape).reshape(-1))
            parts += sums
        whole = torch.cat(parts)
        distributed.all_reduce(whole, group=group)
        pieces = iter(whole.split([len(x) for x in parts]))
        self.capture.seen["weight"] = next(pieces).squeeze()
        self.pending, before = {}, self.pending
        for layer in self.capture.layers:
            n = next(pieces).squeeze()
            first = layer.parameters[0]
            like = {"dtype": wide(first.dtype), "device": first.device}
            mean = {
                name: (next(pieces).view(shape) / n.clamp(min=1)).to(**like)
                for name, shape in self.expected(layer).items()
            }
            if layer in before or self._memory(layer) or n > 0:  # seldom read to the host
                self.pending[layer], self.counts[layer] = mean, n

    # %% 23_machinery sec-layerwise 6 f1c91651
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
                alone = layer if self._group(layer)["engine"] == "loop" else None
                factor = memory[side]
                batches[side, factor.shape, factor.dtype, factor.device, alone].append(layer)
        for (side, *_), layers in batches.items():
            memories = [self._memory(layer) for layer in layers]
            groups = [Names(**self._group(layer)) for layer in layers]
            try:
                self.refresh(side, memories, groups)
            except torch.linalg.LinAlgError as error:
                raise FloatingPointError(
                    f"factor {side} of layer "
                    f"{', '.join(repr(layer.name) for layer in layers)} has no eigenvectors, "
                    "since its statistics are not finite; lower lr, or use nonfinite='skip'"
                ) from error

    # %% 23_machinery sec-layerwise 7 d5d26a8e
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
            self._clip([(x, params) for x, params in work if "algorithm" not in x], updates)
        self._forget_passes()
        for group in self._own:
            group["steps"] += 1
        self._prepare()
        return {p: u.to(p.dtype) for p, u in updates.items()}


    def _clip(self, work: Any, updates: dict[Tensor, Tensor]) -> None:
        """Shrink the whole step onto its limit, at the largest lr: so far, or scheduled."""
        for group, _ in work:
            peak = group.get("max_lr", group.get("initial_lr", 0.0))
            group["lr_max"] = _largest(_largest(group["lr"], group["lr_max"]), peak)
        terms = [
            _number(group["lr_max"]) ** 2 * _dot(updates[p], p.grad) / self.factor
            for group, params in work
            for p in params
            if p in updates
        ]
        if not terms:
            return
        size = torch.stack([x.to(terms[0]) for x in terms]).sum().clamp(min=0)
        for group, params in work:
            nu = (group["kl_clip"] / size).sqrt().clamp(max=1)
            for p in params if group["kl_clip"] < math.inf else ():
                if p in updates:
                    updates[p].mul_(nu.to(p.device, updates[p].dtype))

    # %% 23_machinery sec-layerwise 8 ba923e0b
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


    def examined(self, work: Any) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Gradients, and the new statistics."""
        yield from super(LayerOptimizer, self).examined(work)
        self._gather()
        for layer, seen in self.pending.items():
            for name, x in seen.items():
                # The diagonal of a factor shows what any entry would.
                x = x.diagonal() if name in self.sides and x.ndim == 2 else x
                yield self._group(layer), f"statistic {name} of layer {layer.name!r}", x

    # %% 23_machinery sec-layerwise 9 fc0741a9
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
                if "momentum_buffer" in self.state.get(p, {}):
                    buffer = self.state[p]["momentum_buffer"]
                    sizes["momentum"] += round(share_of * buffer.nbytes)
            report[layer.name] = sizes
        return report


    def misfit(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> str:
        """Also whether statistics fit the layers."""
        layers = self.capture.layers if "capture" in vars(self) else ()
        for layer in layers:
            if any(q is p for q in layer.parameters) and (why := self._changed(layer)):
                return why
        why = super(LayerOptimizer, self).misfit(p, state, group)
        for layer in layers if not why else ():
            if layer.parameters[0] is not p:
                continue
            sizes = {"count": (), **self.shapes(layer)}
            for side in self.sides:
                if side in sizes:
                    names = (f"{side}_inverse", f"{side}_vectors", f"{side}_values")
                    sizes |= dict(zip(names, (*[sizes[side]] * 2, sizes[side][:1]), strict=True))
            for name, x in state.get("layers", {}).get(self.slots[layer], {}).items():
                if name in sizes and tuple(x.shape) != sizes[name]:
                    return (
                        f"its statistic {name!r} has shape {tuple(x.shape)}, which has to be "
                        f"{sizes[name]} for layer {layer.name!r}; load a checkpoint of this model"
                    )
        return why


    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; statistics keep the type they were saved in."""
        super(LayerOptimizer, self).load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, p in zip(saved["params"], group["params"], strict=True):
                given = state_dict["state"].get(key, {}).get("layers", {})
                for slot, memory in given.items():
                    copies = {n: x.detach().to(p.device, copy=True) for n, x in memory.items()}
                    self.state[p]["layers"][slot] = copies
        self._forget_passes()
        self._prepare()


# %% 23_machinery sec-layerwise 10 02c31fe3
def _number(lr: float | Tensor) -> float | Tensor:
    return lr.squeeze() if isinstance(lr, Tensor) else lr


def _largest(lr: float | Tensor, before: float | Tensor) -> float | Tensor:
    """The larger of two learning rates, apart from a tensor that may change in place."""
    if isinstance(lr, Tensor):
        return torch.maximum(lr.detach(), torch.as_tensor(before).to(lr))
    return max(lr, float(before))


def _dot(u: Tensor, g: Tensor) -> Tensor:
    return torch.dot(u.flatten().to(wide(u.dtype)), g.flatten().to(wide(u.dtype)))
