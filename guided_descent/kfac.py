# Generated from chapters/08_kfac.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head f95feff9
"""Chapter 08, K-FAC and EKFAC."""

__all__ = [
    "EKFAC",
    "FOOF",
    "KFAC",
    "LayerOptimizer",
    "Memory",
    "damping_shifts",
    "divide",
    "eigenvalue_correction",
    "kronecker_factors",
    "rotate",
]


# %% 08_kfac sec-kfac-approximations 1 b66b7926
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from guided_descent.capture import Capture, FisherType, Layer
from guided_descent.capture import LikelihoodType, gram
from guided_descent.core import ENGINES, Names, Optimizer, Options
from guided_descent.core import check_choice


# %% 08_kfac sec-kfac-approximations 2 c39f36a1
def kronecker_factors(
    a: Tensor, g: Tensor, sharing: str = "expand"
) -> tuple[Tensor, Tensor]:
    """The two factors of a layer: ``F ≈ G ⊗ A``.

    Args:
        a: Inputs, (N, R, d_in): N examples, R places that share the weight.
        g: Output gradients of the examples' losses, (M, N, R, d_out); outer
            products add up over M.
        sharing: ``"expand"`` treats places as examples, ``"reduce"`` sums
            over them first.

    Returns:
        A, (d_in, d_in), and G, (d_out, d_out).

    Source: Martens & Grosse (2015), arXiv 1503.05671; Eschenhagen et al.
        (2023), arXiv 2311.00636. Chapter 08, eq-kfac-expand and
        eq-kfac-reduce.
    """
    check_choice("sharing", sharing, ("expand", "reduce"))
    if sharing == "reduce":
        a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
    N, R = a.shape[:2]
    return gram(a, weight=1 / (N * R)), gram(g, weight=1 / N)


# %% 08_kfac sec-kfac-damping 1 3a28abb1
def rotate(V: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """``leftᵀ V right``; ``right = None`` stands for the identity."""
    V = left.mT @ V
    return V if right is None else V @ right


def divide(V: Tensor, curvature: Tensor, damping: float | Tensor) -> Tensor:
    """``V / (curvature + damping)``, entry by entry.

    Without damping, what has no curvature (down to round-off) stays put.
    """
    total = curvature + damping
    floor = curvature.amax() * torch.finfo(total.dtype).eps
    known = total > floor * (total == curvature)
    return torch.where(known, V / total, 0)


def damping_shifts(
    A: Tensor, G: Tensor, damping: float | Tensor
) -> tuple[Tensor, Tensor]:
    """What the split adds to the diagonals of A and G.

    Args:
        A: Input factor, (d_in, d_in), or its diagonal alone.
        G: Output factor, the same.
        damping: λ, in [0, ∞).

    Returns:
        ``π √λ`` and ``√λ / π``.

    Source: Martens & Grosse (2015), arXiv 1503.05671. Chapter 08,
    eq-kfac-pi.
    """
    ratio = (_mean_eigenvalue(A) / _mean_eigenvalue(G)).sqrt()
    pi = ratio.nan_to_num(nan=1.0).clamp(1e-8, 1e8)
    root = torch.as_tensor(damping, dtype=pi.dtype, device=pi.device).sqrt()
    return pi * root, root / pi


def _mean_eigenvalue(factor: Tensor) -> Tensor:
    return (factor.diagonal() if factor.ndim == 2 else factor).mean()


# %% 08_kfac sec-kfac-bookkeeping 1 4b64df16
#: What is remembered of one layer, by name.
Memory = dict[str, Tensor]


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
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


class LayerOptimizer(Optimizer):
    """What KFAC, EKFAC and FOOF share: all but the preconditioner.

    Statistics arrive layer by layer from ``Capture``. With P a layer's
    preconditioner, and sums over all parameters::

        u = P⁻¹ g,    ν = min(1, √(kl_clip / (lr² ⟨u, g⟩)))
        m ← momentum · m + ν u
        w ← (1 − lr · weight_decay) w − lr · m

    A subclass says what to average over examples (``statistics``), what to
    derive from a factor now and then (``refresh``), and how to apply it
    (``precondition``).

    Args:
        model: The module that the training loop calls.
        defaults: Hyperparameters of a parameter group.
        capture: Arguments of ``Capture``.
        factor_update_every: Steps between two updates of the statistics.
        inverse_update_every: Steps between two inversions of a factor.
        seed: Of the drawn targets.
        params: Parameters or groups; those of the model by default.
        **options: See ``Options``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: An argument out of range; no parameters.

    Source: chapter 08, "The bookkeeping".
    """

    engines = ("auto", "loop")
    elementwise = False
    ranges = {
        "damping": "[0, inf)",
        "kl_clip": "(0, inf]",
        "stat_decay": "[0, 1)",
    }
    #: The factors that are inverted.
    sides: tuple[str, ...] = ("A", "G")
    #: The memory's name for what is derived from a factor, after its name.
    derived = "_inverse"

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        capture: dict[str, Any],
        *,
        factor_update_every: int,
        inverse_update_every: int,
        seed: int,
        params: Any,
        **options: Unpack[Options],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}; pass the nn.Module "
                "itself, and groups of its parameters as params="
            )
        for name, count in {
            "factor_update_every": factor_update_every,
            "inverse_update_every": inverse_update_every,
        }.items():
            if type(count) is not int or count < 1:
                raise ValueError(f"{name}={count!r}; pass an integer ≥ 1")
        if type(seed) is not int or not 0 <= seed < 2**31:
            raise ValueError(f"seed={seed!r}; pass an integer in [0, 2³¹)")
        self.model, self.capture_options = model, capture
        self.factor_update_every = factor_update_every
        self.inverse_update_every = inverse_update_every
        if params is None:
            named = model.named_parameters()
            params = [(name, p) for name, p in named if p.requires_grad]
        options.setdefault("nonfinite", "skip")
        defaults = {**defaults, "seed": seed, "steps": 0}
        super().__init__(params, defaults, **options)
        self._attach()

    def statistics(
        self, layer: Layer, a: Tensor, g: Tensor | None
    ) -> dict[str, Tensor]:
        """Means over the examples at hand, by name."""
        raise TypeError(f"{type(self).__name__} defines no statistics")

    def refresh(
        self, side: str, memories: list[Memory], groups: list[Names]
    ) -> None:
        """Derive what a step needs from factors of one shape."""
        raise TypeError(f"{type(self).__name__} derives nothing")

    def precondition(self, memory: Memory, g: Tensor, h: Names) -> Tensor:
        """``P⁻¹ g`` for the gradient matrix of one layer."""
        raise TypeError(f"{type(self).__name__} has no preconditioner")

    # Statistics

    def _attach(self) -> None:
        """Watch the layers of all parameters that are in some group."""
        loss_scale: float | Tensor = 1.0
        if "capture" in vars(self):
            self.capture.detach()
            loss_scale = self.capture.loss_scale
        ours = [p for group in self.param_groups for p in group["params"]]
        self.generator = torch.Generator(device=ours[0].device)
        self.capture = Capture(
            self.model,
            consume=self.observe,
            generator=self.generator,
            parameters=ours,
            **self.capture_options,
        )
        self.capture.loss_scale = loss_scale
        #: Means over the examples seen since the last step.
        self.pending: dict[Layer, dict[str, Any]] = {}
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
        self._prepare()

    def _prepare(self) -> None:
        """Record before the next step? And which targets are drawn?"""
        seed, t = (self.param_groups[0][name] for name in ("seed", "steps"))
        self.capture.recording = t % self.factor_update_every == 0
        self.generator.manual_seed(seed * 2**32 + t)

    @torch.no_grad()
    def observe(self, layer: Layer, a: Tensor, g: Tensor | None) -> None:
        """Take in inputs and output gradients of some examples."""
        dtype, N = _wide(layer.parameters[0].dtype), len(a)
        a = a if layer.kind == "embedding" else a.to(dtype)
        g = None if g is None else g.to(dtype)
        with _full_precision(a.device):
            means = self.statistics(layer, a, g)
        seen = self.pending.setdefault(layer, {"examples": 0})
        seen["examples"] += N
        for name, mean in means.items():
            if name in seen:
                seen[name].lerp_(mean, N / seen["examples"])
            else:
                seen[name] = mean

    def _remember(self, finite: Tensor | None) -> None:
        """Move the running means by what the last passes showed."""
        for layer, seen in self.pending.items():
            memory, group = self._memory(layer), self._group(layer)
            keep = finite if group["nonfinite"] == "skip" else None
            del seen["examples"]
            for name, mean in seen.items():
                if name not in memory:
                    memory.setdefault("count", mean.new_zeros(()))
                    memory[name] = torch.zeros_like(mean)
            if not seen:
                continue
            k = memory["count"] + 1
            weight = (1 / k).clamp(min=1 - group["stat_decay"])
            for name, new in [*seen.items(), ("count", k)]:
                if keep is not None:
                    new = torch.where(keep.to(new.device), new, memory[name])
                memory[name].lerp_(new, 1 if name == "count" else weight)
        self.pending.clear()

    def _memory(self, layer: Layer) -> Memory:
        state = self.state[layer.parameters[0]]
        slots = state.setdefault("layers", {})
        return slots.setdefault(self.slots[layer], {})

    def _group(self, layer: Layer) -> dict[str, Any]:
        return self.param_groups[self.numbers[layer]]

    # Inverses

    def _refresh(self) -> None:
        """Renew the factors that are due, those of one shape together."""
        units = [
            (self._memory(layer)[side], side, layer)
            for side in self.sides
            for layer in self.capture.layers
            if side in self._memory(layer)
        ]
        units.sort(key=lambda unit: _length(unit[0]))
        every, now = self.inverse_update_every, self.param_groups[0]["steps"]
        total = sum(_length(unit[0]) ** 3 for unit in units)
        done, batches = 0, defaultdict(list)
        for factor, side, layer in units:
            cube = _length(factor) ** 3
            phase = int(every * (done + cube / 2) / total)
            done += cube
            new = side + self.derived not in self._memory(layer)
            if new or now < 3 or now % every == phase:
                alone = self._group(layer)["engine"] == "loop"
                key = factor.shape, factor.dtype, factor.device
                batches[side, *key, layer if alone else None].append(layer)
        for (side, *_), layers in batches.items():
            memories = [self._memory(layer) for layer in layers]
            groups = [Names(**self._group(layer)) for layer in layers]
            try:
                self.refresh(side, memories, groups)
            except torch.linalg.LinAlgError as error:
                raise FloatingPointError(
                    f"factor {side} of layer "
                    f"{', '.join(repr(layer.name) for layer in layers)} has "
                    "no eigenvectors, since its statistics are not finite; "
                    "lower lr, or use nonfinite='skip'"
                ) from error

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: As in ``Optimizer.step``. Optional.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            RuntimeError: A layer has a gradient, but its forward pass was
                not seen when it should have been. Nothing has changed then.
            FloatingPointError: A gradient or a statistic is not finite,
                under ``nonfinite="raise"``; nothing has changed then. Or an
                eigendecomposition fails on what is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        for group, params in work:
            self._engine(group, params)
        self._check_seen()
        finite = self._finite(work)
        careful = all(x["nonfinite"] == "skip" for x in self.param_groups)
        known = _known(finite) if careful else None
        if known is False:
            self.pending.clear()
        else:
            self._advance(work, None if known else finite)
        for group in self.param_groups:
            group["steps"] += 1
        self._prepare()
        return loss

    def _advance(self, work: Any, finite: Tensor | None) -> None:
        """Statistics, inverses, updates and the move along them."""
        self._remember(finite)
        updates: dict[Tensor, Tensor] = {}
        with _full_precision(self.generator.device):
            self._refresh()
            for layer in self.capture.layers:
                self._update(layer, updates)
        self._move(work, updates, finite)

    def _update(self, layer: Layer, updates: dict[Tensor, Tensor]) -> None:
        """Write the update of a layer into tensors like its parameters."""
        memory, g = self._memory(layer), layer.gradient()
        if g is None or "count" not in memory:
            return
        g = g.to(_wide(g.dtype))
        u = self.precondition(memory, g, Names(**self._group(layer)))
        for p, rows, piece in layer.pieces(u):
            if p.grad is None:
                continue
            if piece.shape == p.shape:
                updates[p] = piece
            else:  # some rows of a fused matrix
                if p not in updates:
                    updates[p] = p.grad.to(u.dtype, copy=True)
                updates[p][rows] = piece

    def _move(
        self,
        work: list[tuple[dict[str, Any], list[Tensor]]],
        updates: dict[Tensor, Tensor],
        finite: Tensor | None,
    ) -> None:
        """Clip, and let the rule take each parameter along its update."""
        terms = [
            _squeezed(x["lr"]) ** 2 * _dot(updates.get(p, p.grad), p.grad)
            for x, params in work
            for p in params
        ]
        if not terms:
            return
        size = torch.stack([x.to(terms[0]) for x in terms]).sum()
        for group, params in work:
            h = Names(**group)
            h.lr = _squeezed(h.lr)
            nu = (h.kl_clip / size.clamp(min=0)).sqrt().clamp(max=1)
            keep = finite if h.nonfinite == "skip" else None
            for p in params:
                u = updates.get(p, p.grad)
                if h.kl_clip < math.inf:
                    scale = nu.to(p.device, u.dtype)
                    u = scale * u if u is p.grad else u.mul_(scale)
                state, s = self.state[p], {}
                if h.momentum:
                    if "momentum_buffer" not in state:
                        dtype = h.state_dtype or p.dtype
                        zeros = torch.zeros_like(p, dtype=dtype)
                        state["momentum_buffer"] = zeros
                    s = {"momentum_buffer": [state["momentum_buffer"]]}
                flag = None if keep is None else keep.to(p.device)
                ENGINES["loop"](self, [p], [u.to(p.dtype)], s, h, flag)

    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        if h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        if h.momentum:
            g = s.momentum_buffer.mul_(h.momentum).add_(g)
        if isinstance(h.lr, Tensor):
            p.sub_(h.lr * g)
        else:
            p.sub_(g, alpha=h.lr)

    # What can go wrong

    def _check_seen(self) -> None:
        """Refuse to guess where the hooks were bypassed."""
        for layer in self.capture.layers if self.capture.recording else ():
            seen = layer in self.pending or self._memory(layer)
            if not seen and layer.gradient() is not None:
                raise RuntimeError(
                    f"layer {layer.name!r} has a gradient, but "
                    f"{type(self).__name__} saw no forward pass of it; call "
                    "the model itself, as model(x), not compiled, and "
                    "differentiate a loss of its output"
                )

    def _finite(self, work: Any) -> Tensor | None:
        """Whether gradients and new statistics are finite, on the device."""
        raising = [x for x in work if x[0]["nonfinite"] == "raise"]
        super()._finite(raising)
        flags = [  # one pass; a sum hands an infinity or a NaN on
            p.grad.sum(dtype=_wide(p.dtype)).isfinite()
            for group, params in work
            if group["nonfinite"] == "skip"
            for p in params
        ]
        for layer, seen in self.pending.items():
            kind = self._group(layer)["nonfinite"]
            for name, x in seen.items() if kind != "propagate" else ():
                if name == "examples":
                    continue
                # The diagonal of a factor shows what any entry would.
                square = name in ("A", "G") and x.ndim == 2
                flag = (x.diagonal() if square else x).isfinite().all()
                if kind == "skip":
                    flags.append(flag)
                elif not flag:
                    raise FloatingPointError(
                        f"statistic {name} of layer {layer.name!r} is not "
                        "finite and nonfinite='raise'; lower lr, or use "
                        "nonfinite='skip'"
                    )
        if not flags:
            return None
        finite = torch.stack([x.to(flags[0].device) for x in flags]).all()
        before = 0 if self.skipped is None else self.skipped.to(finite.device)
        self.skipped = before + (~finite).long()
        return finite

    # The rest

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and with them statistics not yet used."""
        super().zero_grad(set_to_none)
        self.pending.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the layers that it completes are watched from now."""
        names = {p: name for name, p in self.model.named_parameters()}
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if all(isinstance(p, Tensor) for p in params):
            params = [(names.get(p, "outside the model"), p) for p in params]
        super().add_param_group({**param_group, "params": params})
        if "capture" in vars(self):
            steps = self.param_groups[0]["steps"]
            self.param_groups[-1]["steps"] = steps
            self._attach()

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
            for p in layer.parameters:
                if "momentum_buffer" in self.state[p]:
                    share = math.prod(layer.shape) / sum(
                        q.numel() for q in layer.parameters
                    )
                    buffer = self.state[p]["momentum_buffer"]
                    sizes["momentum"] += round(share * buffer.nbytes)
            report[layer.name] = sizes
        return report

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; statistics keep the type they were saved in."""
        super().load_state_dict(state_dict)
        for saved, group in zip(
            state_dict["param_groups"], self.param_groups, strict=True
        ):
            for key, p in zip(saved["params"], group["params"], strict=True):
                given = state_dict["state"].get(key, {}).get("layers", {})
                for slot, memory in given.items():
                    self.state[p]["layers"][slot] = {
                        name: x.detach().to(p.device, copy=True)
                        for name, x in memory.items()
                    }
        self.pending.clear()
        self._prepare()


def _known(flag: Tensor | None) -> bool | None:
    """What a flag says, where to look at it means to wait for nobody."""
    if flag is None:
        return True
    return bool(flag.numpy()) if flag.device.type == "cpu" else None


def _dot(u: Tensor, g: Tensor) -> Tensor:
    dtype = _wide(u.dtype)
    return torch.dot(u.flatten().to(dtype), g.flatten().to(dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _length(factor: Tensor) -> int:
    """Length of a side; 1 for a diagonal, which costs next to nothing."""
    return len(factor) if factor.ndim == 2 else 1


def _squeezed(lr: float | Tensor) -> float | Tensor:
    return lr.squeeze() if isinstance(lr, Tensor) else lr


# %% 08_kfac sec-kfac-bookkeeping 2 de676183
class KFAC(LayerOptimizer):
    """K-FAC: natural gradient with a Kronecker product for each layer.

    With A = mean of ``a aᵀ`` over a layer's inputs and G = mean of
    ``g gᵀ`` over gradients by its outputs, for drawn targets::

        u = (G ⊗ A + damping · I)⁻¹ ∇L        for each layer
        ν = min(1, √(kl_clip / (lr² ⟨u, ∇L⟩)))
        m ← momentum · m + ν u,    w ← w − lr · m

    The loss is taken as a mean over examples of a sum over outputs, the
    negative log-likelihood that ``likelihood`` names. Statistics are this
    process's own: under ``DistributedDataParallel`` replicas would drift
    apart. ``detach()`` an optimizer before building another: its hooks
    would go on to cost time.

    Args:
        model: The module that the training loop calls, as ``model(x)``.
            Covered are ``nn.Linear``, ``Conv1d/2d/3d``, ``Embedding``,
            ``MultiheadAttention`` and norm layers (diagonal); what is not
            covered is stepped as SGD would, under the same clip.
        lr: Step size η, in [0, ∞). Default 0.1.
        momentum: In [0, 1). Default 0.9.
        damping: λ, in units of curvature, in [0, ∞); under
            ``relative_damping`` in units of the layer's mean curvature.
            Default 0.03. Zero needs ``damping_split="exact"``.
        fisher: ``"mc"`` (default), ``"type-2"`` or ``"empirical"``. The
            last needs ``capture.loss_scale`` set where the loss is scaled
            before ``backward``, as ``GradScaler`` does.
        likelihood: ``"categorical"`` (default), ``"gaussian"``,
            ``"bernoulli"`` or a callable; see ``Capture``.
        samples: Targets drawn for each example under ``"mc"``. Default 1.
        sharing: ``"expand"`` (default) or ``"reduce"``, for weights that
            are used in several places.
        damping_split: ``"exact"`` (default): in the eigenbasis, which on a
            GPU waits for the device when it is renewed. ``"pi"``: split
            over the factors, with Cholesky, several times cheaper.
        relative_damping: See ``damping``. Default ``False``.
        stat_decay: Weight of the past in running means, in [0, 1).
            Default 0.95.
        factor_update_every: Steps between updates of A and G. Default 1.
        inverse_update_every: Steps between inversions. Default 10.
        kl_clip: Limit c on ``η² ⟨u, ∇L⟩``, in (0, ∞]; ``math.inf`` turns
            it off. Default 1e-3.
        weight_decay: Decoupled, ``lr · weight_decay · w``; in [0, ∞).
            Default 0.
        seed: Of the drawn targets, with the step count. Default 0.
        output: Where the tensor of the likelihood is in what the model
            returns; see ``Capture``.
        class_dim: Dimension of the classes; see ``Capture``. Default −1.
        params: Parameters or groups, with their own ``lr``, ``momentum``,
            ``damping``, ``stat_decay``, ``kl_clip``, ``weight_decay``. All
            trainable parameters of the model by default. A layer follows
            the group of its weight.
        **options: See ``Options``; ``engine`` is ``"auto"`` or ``"loop"``
            (no batching of factors), ``nonfinite`` is ``"skip"`` by
            default. ``state_dtype`` concerns the momentum alone.

    Raises:
        ValueError: An argument out of range, or unknown.
        TypeError: ``model`` is no module; an argument of another type.

    Source: Martens & Grosse (2015), arXiv 1503.05671. Chapter 08,
    eq-kfac-damped, eq-kfac-pi and eq-kfac-clip.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.9,
        damping: float = 0.03,
        fisher: FisherType = "mc",
        likelihood: LikelihoodType = "categorical",
        samples: int = 1,
        sharing: Literal["expand", "reduce"] = "expand",
        damping_split: Literal["exact", "pi"] = "exact",
        relative_damping: bool = False,
        stat_decay: float = 0.95,
        factor_update_every: int = 1,
        inverse_update_every: int = 10,
        kl_clip: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        output: Callable[[Any], Tensor] | None = None,
        class_dim: int = -1,
        params: Any = None,
        **options: Unpack[Options],
    ) -> None:
        check_choice("sharing", sharing, ("expand", "reduce"))
        check_choice("damping_split", damping_split, ("exact", "pi"))
        self.sharing, self.relative_damping = sharing, relative_damping
        self.derived = "_values"
        if damping_split == "pi":
            self.derived = "_inverse"
            self.ranges = self.ranges | {"damping": "(0, inf)"}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "stat_decay": stat_decay,
            "kl_clip": kl_clip,
            "weight_decay": weight_decay,
        }
        capture = {
            "fisher": fisher,
            "likelihood": likelihood,
            "samples": samples,
            "output": output,
            "class_dim": class_dim,
        }
        super().__init__(
            model,
            defaults,
            capture,
            factor_update_every=factor_update_every,
            inverse_update_every=inverse_update_every,
            seed=seed,
            params=params,
            **options,
        )

    def statistics(
        self, layer: Layer, a: Tensor, g: Tensor | None
    ) -> dict[str, Tensor]:
        if layer.kind == "scale":
            columns = [] if layer.weight is None else [(g * a).sum(2)]
            columns += [] if layer.bias is None else [g.sum(2)]
            squares = torch.stack(columns, -1).square().sum(0)
            return {"F": squares.mean(0)}
        if layer.kind == "embedding":
            g = g.sum(2, keepdim=True) if self.sharing == "reduce" else g
            return {"A": _frequencies(layer, a), "G": gram(g, weight=1 / g.shape[1])}
        A, G = kronecker_factors(a, g, self.sharing)
        return {"A": A, "G": G}

    def refresh(
        self, side: str, memories: list[Memory], groups: list[Names]
    ) -> None:
        factors = torch.stack([m[side] for m in memories])
        if self.derived == "_inverse":
            pairs = zip(memories, groups, strict=True)
            shifts = torch.stack([self.shift(side, m, h) for m, h in pairs])
            results = {"_inverse": _inverses_(factors, shifts)}
        elif factors.ndim == 2:
            results = {"_values": factors}
        else:
            values, vectors = torch.linalg.eigh(factors)
            results = {"_values": values.clamp(min=0), "_vectors": vectors}
        for name, result in results.items():
            for m, x in zip(memories, result, strict=True):
                m[side + name] = x.clone() if len(memories) > 1 else x

    def shift(self, side: str, m: Memory, h: Names) -> Tensor:
        """What the split adds to the diagonal of a factor."""
        lam = h.damping
        if self.relative_damping:
            lam = lam * _mean_eigenvalue(m["A"]) * _mean_eigenvalue(m["G"])
        shifts = damping_shifts(m["A"], m["G"], lam)
        return shifts[0 if side == "A" else 1]

    def precondition(self, m: Memory, g: Tensor, h: Names) -> Tensor:
        if self.derived == "_inverse" and "F" not in m:
            diagonal = m["A"].ndim == 1
            u = g * m["A_inverse"] if diagonal else g @ m["A_inverse"]
            return m["G_inverse"] @ u
        curvature = m["F"] if "F" in m else self.curvature(m)
        lam = h.damping * (curvature.mean() if self.relative_damping else 1)
        if "F" in m:
            return divide(g, curvature, lam)
        left, right = m["G_vectors"], m.get("A_vectors")
        u = divide(rotate(g, left, right), curvature, lam)
        return rotate(u, left.mT, None if right is None else right.mT)

    def curvature(self, m: Memory) -> Tensor:
        """Eigenvalues of the layer's block, in the factors' eigenbasis."""
        return torch.outer(m["G_values"], m["A_values"])


def _frequencies(layer: Layer, indices: Tensor) -> Tensor:
    """The diagonal input factor of an embedding."""
    dtype = _wide(layer.parameters[0].dtype)
    counts = torch.zeros(layer.shape[1], dtype=dtype, device=indices.device)
    ones = counts.new_ones(indices.numel())
    return counts.index_add_(0, indices.flatten(), ones) / indices.numel()


def _inverses_(factors: Tensor, shifts: Tensor) -> list[Tensor] | Tensor:
    """Inverses of factors, or of diagonals, after shifting them in place.

    A shift that would be lost in round-off is raised to it.
    """
    if factors.ndim == 2:
        return 1 / (factors + shifts[:, None])
    diagonal = factors.diagonal(dim1=1, dim2=2)
    eps = torch.finfo(factors.dtype).eps
    diagonal.add_((shifts + 8 * eps * diagonal.sum(1))[:, None])
    L = torch.linalg.cholesky_ex(factors)[0]
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    L_inverse = torch.linalg.solve_triangular(L, eye, upper=False)
    return [gram(x) for x in L_inverse]


# %% 08_kfac sec-kfac-ekfac 1 c939d26d
def eigenvalue_correction(
    a: Tensor, g: Tensor, U_A: Tensor, U_G: Tensor
) -> Tensor:
    """Second moments of the examples' gradients in a Kronecker basis.

    Args:
        a: Inputs, (N, R, d_in): N examples, R places.
        g: Output gradients, (M, N, R, d_out), outer products add up over M.
        U_A: Eigenvectors of A, (d_in, d_in).
        U_G: Eigenvectors of G, (d_out, d_out).

    Returns:
        (d_out, d_in).

    Source: George et al. (2018), arXiv 1806.03884. Chapter 08, eq-ekfac.
    """
    a, g, N = a @ U_A, g @ U_G, len(a)
    if a.shape[1] == 1:
        return g.square().sum((0, 2)).T @ a[:, 0].square() / N
    s = g.new_zeros(g.shape[-1], a.shape[-1])
    chunk = max(1, 2**22 // s.numel())  # examples' gradients at a time
    for A, G in zip(a.split(chunk), g.split(chunk, 1), strict=True):
        per_example = torch.einsum("mnro,nri->mnoi", G, A)
        s += per_example.square().sum((0, 1))
    return s / N


# %% 08_kfac sec-kfac-ekfac 2 a7d374f7
class EKFAC(KFAC):
    """EKFAC: K-FAC's eigenvectors with the best eigenvalues for them.

    With ``U_A``, ``U_G`` the eigenvectors of K-FAC's factors::

        s = mean of (U_Gᵀ g aᵀ U_A)²
        u = U_G [(U_Gᵀ ∇L U_A) / (s + damping)] U_Aᵀ

    and from there on as ``KFAC``.

    Args:
        model, lr: As for ``KFAC``.
        **options: As for ``KFAC``, but for ``damping_split``: the basis is
            at hand, so damping is always exact.

    Raises:
        ValueError, TypeError: As for ``KFAC``.

    Source: George et al. (2018), arXiv 1806.03884. Chapter 08, eq-ekfac
    and eq-ekfac-carry.
    """

    def __init__(
        self, model: nn.Module, lr: float | Tensor = 0.1, **options: Any
    ) -> None:
        if "damping_split" in options:
            raise TypeError("EKFAC has no damping_split=: its damping is exact; leave it out")
        super().__init__(model, lr, **options)

    def statistics(
        self, layer: Layer, a: Tensor, g: Tensor | None
    ) -> dict[str, Tensor]:
        found, m = super().statistics(layer, a, g), self._memory(layer)
        if "s" in m:
            correct = _correct_words if "A_vectors" not in m else None
            correct = correct or eigenvalue_correction
            U_A = m.get("A_vectors", m["A_values"])
            found["s"] = correct(a, g, U_A, m["G_vectors"])
        return found

    def refresh(
        self, side: str, memories: list[Memory], groups: list[Names]
    ) -> None:
        before = [m.get(f"{side}_vectors") for m in memories]
        super().refresh(side, memories, groups)
        for m, U in zip(memories, before, strict=True):
            if {"A_values", "G_values"} <= m.keys():
                start = super().curvature(m)
                s = m.get("s", start)
                if "s" in m and U is not None:
                    V = (m[f"{side}_vectors"].mT @ U).square()
                    s = V @ s if side == "G" else s @ V.mT
                m["s"] = torch.where(m["count"] > 1, s, start)

    def curvature(self, m: Memory) -> Tensor:
        return m["s"]


def _correct_words(
    indices: Tensor, g: Tensor, frequencies: Tensor, U_G: Tensor
) -> Tensor:
    """The same for an embedding, whose places are taken one by one."""
    squares = (g @ U_G).square().sum(0).flatten(0, 1).mT
    s = squares.new_zeros(len(squares), len(frequencies))
    return s.index_add_(1, indices.flatten(), squares) / len(indices)


# %% 08_kfac sec-kfac-foof 1 6b11e458
class FOOF(KFAC):
    """FOOF: gradient descent on a layer's outputs, by ridge regression.

    With A = mean of ``a aᵀ`` over a layer's inputs::

        u = ∇L (A + damping · I)⁻¹

    and from there on as ``KFAC``; ``kl_clip`` then limits
    ``η² ⟨u, ∇L⟩``, the squared change of the layers' outputs.

    Args:
        model, lr: As for ``KFAC``.
        **options: As for ``KFAC``, without ``fisher``, ``samples`` and
            ``damping_split``; ``likelihood`` is taken, so that methods can
            be exchanged, and has no effect. Norm layers have no input
            factor and are stepped as SGD would.

    Raises:
        ValueError, TypeError: As for ``KFAC``; ``damping`` is positive.

    Source: Benzing (2022), arXiv 2201.12250. Chapter 08, eq-foof.
    """

    sides = ("A",)

    def __init__(
        self, model: nn.Module, lr: float | Tensor = 0.1, **options: Any
    ) -> None:
        for name in ("fisher", "samples", "damping_split"):
            if name in options:
                raise TypeError(f"FOOF has no {name}=; leave it out")
        options |= {"fisher": "none", "damping_split": "pi"}
        super().__init__(model, lr, **options)

    def statistics(
        self, layer: Layer, a: Tensor, g: Tensor | None
    ) -> dict[str, Tensor]:
        if layer.kind == "scale":
            return {}
        if layer.kind == "embedding":
            return {"A": _frequencies(layer, a)}
        nothing = a.new_zeros(1, *a.shape[:2], 1)
        return {"A": kronecker_factors(a, nothing, self.sharing)[0]}

    def shift(self, side: str, m: Memory, h: Names) -> Tensor:
        unit = _mean_eigenvalue(m["A"])
        lam = torch.as_tensor(h.damping).to(unit)
        return lam * unit if self.relative_damping else lam

    def precondition(self, m: Memory, g: Tensor, h: Names) -> Tensor:
        diagonal = m["A"].ndim == 1
        return g * m["A_inverse"] if diagonal else g @ m["A_inverse"]
