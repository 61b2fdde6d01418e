# Generated from chapters/17_large_batches.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head b21ba69e
"""Chapter 17, Large batches."""

__all__ = [
    "CLARS",
    "LAMB",
    "LARS",
    "adaptive_clip_",
    "clip_by_norm_",
    "example_norms",
    "trust_ratio",
]


# %% 17_large_batches sec-lb-lars 1 98a399b3
from collections import defaultdict
from typing import Any, Unpack

import torch
from torch import Tensor, distributed, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from guided_descent.adaptive import _moments
from guided_descent.capture import Capture
from guided_descent.core import Grads, Group, Optimizer, Options
from guided_descent.core import check_choice, check_range, wide
from guided_descent.engines import Batch, _chunks, matrixwise
from guided_descent.layers import Layer
from guided_descent.vector import flat, processes, unflat


class _LayerWise(Optimizer):
    """What LARS, LAMB and CLARS share: one number for each tensor."""

    def add_param_group(self, param_group: Group) -> None:
        """On shards the rule sees the whole tensor, so that norms are those of it."""
        super().add_param_group(param_group)
        params = [p for group in self.param_groups for p in group["params"]]
        self._sharded = any(hasattr(p, "placements") for p in params)
        self.elementwise = not self._sharded

    def _engine(self, group: Group, params: list[Tensor]) -> str:
        """Torch's kernels take one number for all: on a CPU, tensor by tensor."""
        engine = super()._engine(group, params)
        cpu = all(p.device.type == "cpu" for p in params) and not self._sharded
        if engine != "fused" or cpu or self._method(group) is not self:
            return engine
        if group["engine"] == "fused":
            told = f"engine='fused' is not valid for {type(self).__name__}"
            why = "its kernel would wait for norms from the device"
            raise ValueError(f"{told}: {why}; use engine='auto'")
        return "loop" if self._sharded else "foreach"

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        for name in {"lr_in_buffer", "adapt_vectors", "bias_correction"} & group.keys():
            check_choice(name, group[name], (False, True))


def _norm(x: Any) -> Any:
    """The norm of a tensor, or of each of a batch, in single precision at least."""
    if isinstance(x, Batch):
        return x.norm(2, dtype=wide(x.tensors[0].dtype))
    return torch.linalg.vector_norm(x, dtype=wide(x.dtype))


# %% 17_large_batches sec-lb-lars 2 e62aa6fe
@matrixwise
def trust_ratio(
    w: Tensor, u: Tensor, trust: float = 1.0, decay: float = 0.0, eps: float = 0.0
) -> Tensor:
    """``trust · w / (u + decay · w + eps)``; one, where w or u is zero.

    Args:
        w, u: Norms of parameters and of what would be their steps, of one shape.
        trust: In (0, ∞). Default 1.
        decay, eps: Each in [0, ∞). Default 0.

    Source: You, Gitman & Ginsburg (2017), arXiv 1708.03888. Chapter 17, eq-lb-lars.
    """
    ratio = trust * w / (u + decay * w + eps)
    return torch.where((w > 0) & (u > 0), ratio, 1)


# %% 17_large_batches sec-lb-lars 3 fcfc15bc
def _rate(p: Any, w: Any, u: Any, h: Any, **options: float) -> Any:
    """The ratio of a tensor, or of each of a batch; one for vectors."""
    r = trust_ratio(w, u, **options)
    if h.adapt_vectors:
        return r
    if isinstance(p, Batch):
        one = torch.ones_like(r.tensors[0])
        pairs = zip(p.tensors, r.tensors, strict=True)
        return Batch([y if x.dim() > 1 else one for x, y in pairs])
    return r if p.dim() > 1 else torch.ones_like(r)


def _number(x: float | Tensor) -> float:
    """A number on the host; of a tensor on a CPU, which waits for nobody."""
    return float(x.numpy()) if isinstance(x, Tensor) else x


def _numbers(x: Batch) -> list[float]:
    return torch.stack(x.tensors).numpy().tolist()


def _lars_rate(p: Any, g: Any, h: Any) -> Any:
    """What LARS multiplies a gradient by."""
    options = {"trust": h.trust, "decay": h.weight_decay, "eps": h.eps}
    return _rate(p, _norm(p), _norm(g), h, **options)


class LARS(_LayerWise):
    """LARS: gradient descent with momentum, each matrix at its own rate.

    ::

        r = trust · ‖w‖ / (‖g‖ + weight_decay · ‖w‖ + eps)
        m ← momentum · m + r (g + weight_decay · w)
        w ← w − lr · m

    r is 1 where ‖w‖ or ‖g‖ is zero, and for vectors.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η, relative to the parameter once multiplied by ``trust``;
            for vectors as in SGD. In [0, ∞). Default 1.
        momentum: In [0, 1). Default 0.9; 0 keeps no state.
        weight_decay: λ, in [0, ∞). Default 0.
        trust: What the ratio is multiplied by, in (0, ∞). Default 0.001.
        eps: Added to the denominator, in units of gradient, in [0, ∞). Default 0.
        lr_in_buffer: Multiply by lr what enters the buffer, as the paper does, and
            not what leaves it, as most code does. Without a schedule it is the
            same. Default ``False``.
        adapt_vectors: Adapt tensors of fewer than two dimensions, too. Default
            ``False``.
        **options: See ``Options``. Sharded parameters run on ``engine="loop"``.

    Raises:
        ValueError: An argument outside its range.
        TypeError: An argument that is not a number.

    Source: You, Gitman & Ginsburg (2017), arXiv 1708.03888. Chapter 17, eq-lb-lars.
    """

    ranges = {"trust": "(0, inf)"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        eps: float = 0.0,
        lr_in_buffer: bool = False,
        adapt_vectors: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= {"trust": trust, "eps": eps, "lr_in_buffer": lr_in_buffer}
        super().__init__(params, defaults | {"adapt_vectors": adapt_vectors}, **options)

    # %% 17_large_batches sec-lb-lars 4 abc57f6c
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        r = _lars_rate(p, g, h)
        d = g.add(p, alpha=h.weight_decay) * r if h.weight_decay else g * r
        if h.lr_in_buffer:
            d = d * h.lr
        if h.momentum:
            d = s.momentum_buffer.mul_(h.momentum).add_(d)
        p.add_(d, alpha=-1 if h.lr_in_buffer else -h.lr)

    # %% 17_large_batches sec-lb-lars 5 761ddfe5
    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)} if h.momentum else {}


    @staticmethod
    def fused(p: list[Tensor], g: list[Tensor], s: Any, h: Any) -> None:
        """Torch's SGD, for tensors of one rate at a time: its dampening is one minus it."""
        lr, alike = _number(h.lr), defaultdict(list)
        for i, r in enumerate(_numbers(_lars_rate(Batch(p), Batch(g), h))):
            alike[r].append(i)
        for r, some in alike.items():
            inside, outside = (lr * r, 1.0) if h.lr_in_buffer else (r, lr)
            torch._fused_sgd_(
                [p[i] for i in some],
                [g[i] for i in some],
                [s.momentum_buffer[i] for i in some] if h.momentum else [],
                lr=outside if h.momentum else inside * outside,
                momentum=h.momentum,
                dampening=1 - inside if h.momentum else 0.0,
                weight_decay=h.weight_decay,
                nesterov=False,
                maximize=h.maximize,
                is_first_step=False,
                found_inf=h.found_inf,
            )


# %% 17_large_batches sec-lb-lamb 1 9cfbc0ac
def _phi(w: Any, h: Any) -> Any:
    """A norm between the ends of the clamp; zero stays zero."""
    if h.clamp is None:
        return w
    low, high = h.clamp
    return w.clamp_max(high).clamp_min(low) * w.sign()


class LAMB(_LayerWise):
    """LAMB: Adam's step, as long as its matrix times the learning rate.

    With m̂ and v̂ as in ``Adam``::

        u = m̂ / (√v̂ + eps) + weight_decay · w
        w ← w − lr · φ(‖w‖) / ‖u‖ · u

    The factor is 1 where ‖w‖ or ‖u‖ is zero, and for vectors.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η, relative to the parameter; for vectors as in Adam. In
            [0, ∞). Default 0.001.
        betas: Decays β₁, β₂ of the two means; each in [0, 1). Default (0.9, 0.999).
        eps: Added to the root, in units of gradient; in [0, ∞). Default 1e-6.
        weight_decay: λ, inside the ratio; in [0, ∞). Default 0.01.
        clamp: φ keeps ‖w‖ between these two, each in [0, ∞]. ``None``, the default:
            φ(z) = z.
        bias_correction: Divide m and v by what they lack at first. Default ``True``.
        adapt_vectors: Adapt tensors of fewer than two dimensions, too. Default
            ``False``.
        **options: See ``Options``. Sharded parameters run on ``engine="loop"``.

    Raises:
        ValueError: An argument outside its range; a clamp whose ends are crossed.
        TypeError: An argument that is not a number.

    Source: You et al. (2019), arXiv 1904.00962. Chapter 17, eq-lb-lamb.
    """

    clocks = ("step",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        clamp: tuple[float, float] | None = None,
        bias_correction: bool = True,
        adapt_vectors: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"clamp": clamp, "bias_correction": bias_correction}
        super().__init__(params, defaults | {"adapt_vectors": adapt_vectors}, **options)

    # %% 17_large_batches sec-lb-lamb 2 07af6395
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        m, v = _moments(g, s, h)
        root = v.sqrt().div_(h.root_correction).add_(h.eps)
        u = (m / root).div_(h.mean_correction)
        if h.weight_decay:
            u.add_(p, alpha=h.weight_decay)
        p.add_(u * _rate(p, _phi(_norm(p), h), _norm(u), h), alpha=-h.lr)

    # %% 17_large_batches sec-lb-lamb 3 e73cde38
    @staticmethod
    def clock(h: Any) -> None:
        b1, b2 = h.betas if h.bias_correction else (0.0, 0.0)
        h.mean_correction, h.root_correction = 1 - b1**h.step, (1 - b2**h.step) ** 0.5


    @staticmethod
    def init_state(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        names = ("exp_avg", "exp_avg_sq")
        return {"step": torch.zeros(())} | {name: torch.zeros_like(p) for name in names}


    def _check_group(self, group: Group) -> None:
        super(LAMB, self)._check_group(group)
        if group["clamp"] is not None:
            check_range("clamp", group["clamp"], ("[0, inf]", "[0, inf]"))
            if group["clamp"][0] > group["clamp"][1]:
                told = f"clamp={group['clamp']!r} has no number between its ends"
                raise ValueError(f"{told}; pass a pair (low, high), or None")


    @staticmethod
    def fused(p: list[Tensor], g: list[Tensor], s: Any, h: Any) -> None:
        """Torch's Adam makes u, from λw by a step of minus one; some tensors at a time."""
        lr = _number(h.lr) * (h.found_inf is None or not h.found_inf.numpy())
        step = s.step if h.bias_correction else [torch.full((), torch.inf)] * len(p)
        chunks = list(_chunks(p))
        scratch = p[0].new_empty(max(sum(x.numel() for x in p[part]) for part in chunks))
        for part in chunks:
            x, u, at = p[part], [], 0
            for a in x:
                u.append(scratch.as_strided(a.shape, a.stride(), at))
                torch.mul(a, h.weight_decay, out=u[-1])
                at += a.numel()
            torch._fused_adam_(
                u,
                g[part],
                s.exp_avg[part],
                s.exp_avg_sq[part],
                [],
                step[part],
                lr=-1.0,
                beta1=h.betas[0],
                beta2=h.betas[1],
                weight_decay=0.0,
                eps=h.eps,
                amsgrad=False,
                maximize=h.maximize,
                found_inf=h.found_inf,
            )
            w = _phi(_norm(Batch(x)), h)
            rates = _numbers(_rate(Batch(x), w, _norm(Batch(u)), h))
            for a, b, r in zip(x, u, rates, strict=True):
                a.add_(b, alpha=-lr * r)


# %% 17_large_batches sec-lb-coherence 1 cacd5de9
def example_norms(layer: Layer, a: Tensor, g: Tensor) -> list[tuple[Parameter, Tensor]]:
    """The squared norm of each example's gradient, for each parameter of a layer.

    Args:
        layer: As ``find_layers`` finds it.
        a, g: Inputs and output gradients, (N, R, d_in) and (N, R, d_out), as
            ``Capture`` hands them over.

    Source: Goodfellow (2015), arXiv 1510.01799. Chapter 17, eq-lb-outer and eq-lb-gram.
    """
    one = g.sum(1)  # the gradient of a bias
    found = [] if layer.bias is None else [(layer.bias, one.square().sum(1))]
    if layer.weight is None:
        return found
    if layer.kind == "scale":
        square = (a * g).sum(1).square().sum(1)
    elif layer.kind == "embedding":
        square = ((a[:, :, None] == a[:, None]) * (g @ g.mT)).sum((1, 2))
    else:
        a = a if layer.bias is None else a[..., :-1]
        square = _outer(a, g)
    return [(layer.weight, square), *found]


def _outer(a: Tensor, g: Tensor) -> Tensor:
    """The squared norm of each example's Σ g aᵀ over places, the cheaper way."""
    places, columns, rows = g.shape[1], a.shape[2], g.shape[2]
    if places == 1:
        return a.square().sum((1, 2)) * g.square().sum((1, 2))
    if places * (rows + columns) <= rows * columns:
        return ((a @ a.mT) * (g @ g.mT)).sum((1, 2)).clamp_min(0)
    return (g.mT @ a).square().sum((1, 2))


# %% 17_large_batches sec-lb-clars 1 0b8f190a
def _any_loss(output: Tensor) -> Tensor:
    """A likelihood that nothing is held against."""
    return output


class CLARS(_LayerWise):
    """CLARS: LARS, with the mean norm of the examples' gradients in place of ‖g‖.

    With ν the mean over examples of ‖gᵢ‖, for one matrix::

        r = trust · ‖w‖ / (ν + weight_decay · ‖w‖ + eps)
        m ← momentum · m + r (g + weight_decay · w)
        w ← w − lr · m

    This is the form of this book; see the chapter for what is known of the paper's.
    ν is measured in the user's own backward passes, for nearly nothing. Of several
    passes before a step their ν are added up, as their gradients are.

    Args:
        model: The module that the training loop calls. ν is known for linear layers,
            convolutions, embeddings and norm layers.
        lr, momentum, weight_decay, trust, eps, lr_in_buffer, adapt_vectors: As for
            ``LARS``.
        params: Parameters or groups; those of the model by default.
        grad_scaler: The ``GradScaler`` that multiplies the loss. Needed where
            ``unscale_`` is called before ``step``.
        process_group: The processes that average gradients; that of
            ``DistributedDataParallel`` by default.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Raises:
        TypeError: ``model`` is no module; an argument that is not a number.
        ValueError: An argument outside its range; a matrix that lies in no layer;
            sharded or compiled parameters; an embedding that shares its weight.
        RuntimeError: In ``step``, a gradient without a forward call of the model.

    Source: after Huo, Gu & Huang (2020), arXiv 2002.01576. Chapter 17, eq-lb-clars.
    """

    ranges = {"trust": "(0, inf)"}

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        eps: float = 0.0,
        lr_in_buffer: bool = False,
        adapt_vectors: bool = False,
        *,
        params: Any = None,
        grad_scaler: Any = None,
        process_group: Any = None,
        **options: Unpack[Options],
    ) -> None:
        if not isinstance(model, nn.Module):
            told = f"model is a {type(model).__name__}"
            raise TypeError(f"{told}; pass the nn.Module that the loop calls")
        if isinstance(model, DistributedDataParallel):
            process_group, model = process_group or model.process_group, model.module
        if any(hasattr(module, "_orig_mod") for module in model.modules()):
            told = "the model is compiled, where CLARS sees no layer"
            raise ValueError(f"{told}; build CLARS on the uncompiled model")
        if params is None:
            params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        options.setdefault("nonfinite", "skip")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= {"trust": trust, "eps": eps, "lr_in_buffer": lr_in_buffer}
        super().__init__(params, defaults | {"adapt_vectors": adapt_vectors}, **options)
        self.model, self.grad_scaler = model, grad_scaler
        self.process_group = process_group
        self._attach()

    # %% 17_large_batches sec-lb-clars 2 4a03c601
    @torch.no_grad()
    def directions(self, work: Any, finite: Tensor | None) -> Grads:
        """Each gradient, and the decay, times its rate."""
        nu, made = self._gather(work), {}
        for group, params in work:
            for p in params:
                d = p.grad if self._by is None else p.grad / self._by
                if "algorithm" not in group:
                    sign = -1 if group["maximize"] else 1
                    d = d.add(p, alpha=sign * group["weight_decay"])
                    if p in nu:
                        options = (group[k] for k in ("trust", "weight_decay", "eps"))
                        d = d * trust_ratio(_norm(p), nu[p], *options)
                made[p] = d.to(p.dtype)
        self._forget_passes()
        return made


    @staticmethod
    def rule(p: Tensor, d: Tensor, s: Any, h: Any) -> None:
        if h.lr_in_buffer:
            d = d * h.lr
        if h.momentum:
            d = s.momentum_buffer.mul_(h.momentum).add_(d)
        p.add_(d, alpha=-1 if h.lr_in_buffer else -h.lr)

    # %% 17_large_batches sec-lb-clars 3 996c1a54
    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)} if h.momentum else {}


    def add_param_group(self, param_group: Group) -> None:
        """Add a group, whose layers are watched from now on."""
        super(CLARS, self).add_param_group(param_group)
        if self._sharded:
            told = "a parameter is sharded over processes (DTensor)"
            raise ValueError(f"{told}, where CLARS sees no example's gradient; use LARS")
        if "capture" in vars(self):
            self._attach()


    def _attach(self) -> None:
        """Watch the layers of all parameters that are adapted."""
        if "capture" in vars(self):
            self.capture.detach()
        names, ours = {p: n for n, p in self.model.named_parameters()}, []
        for group in self.param_groups:
            vectors = group.get("adapt_vectors")
            own = () if "algorithm" in group else group["params"]
            ours += [p for p in own if p.requires_grad and (vectors or p.dim() > 1)]
        options = {"fisher": "empirical", "likelihood": _any_loss, "parameters": ours}
        self.capture = Capture(self.model, consume=self.observe, **options)
        self.capture.entered = self._forget_discarded
        self._adapted, self._by = ours, None
        inside = {p: x.kind for x in self.capture.layers for p in x.parameters}
        tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        for p in ours:
            name = f"parameter {names.get(p, 'outside the model')!r}, {tuple(p.shape)},"
            remedy = "put it into a group of params= with algorithm='adamw'"
            if p not in inside:
                raise ValueError(f"{name} lies in no layer that CLARS knows; {remedy}")
            if inside[p] != "embedding" and any(p is table for table in tables):
                raise ValueError(f"{name} is an embedding and more; {remedy}")
        self._forget_passes()


    @torch.no_grad()
    def observe(self, layer: Layer, a: Tensor, g: Tensor) -> None:
        """Take in the inputs and output gradients of some examples."""
        a = a if layer.kind == "embedding" else a.to(wide(a.dtype))
        for p, square in example_norms(layer, a, g[0].to(wide(g.dtype))):
            passes = self._seen.setdefault(p, {}).setdefault(layer, [])
            passes.append(square)


    def _gather(self, work: Any) -> dict[Tensor, Tensor]:
        """ν of each parameter, over all passes and processes; what is refused."""
        self._by, one = self._amplified()
        nu: dict[Tensor, Tensor] = {}
        for p in self._adapted:
            parts = self._seen.get(p, {}).values()  # a fused matrix is several layers
            norms = [sum(squares).sqrt().mean() for squares in zip(*parts, strict=True)]
            if norms:
                nu[p] = sum(norms) / one
            elif p.grad is not None and processes(self.process_group) == 1:
                if p.grad.any():
                    told = f"a parameter of shape {tuple(p.shape)} has a gradient"
                    raise RuntimeError(
                        f"{told}, but CLARS saw no pass of it since the last step; call "
                        "the model, as model(x), and differentiate a loss of its output"
                    )
        if processes(self.process_group) > 1 and self._adapted:
            nu = self._averaged(nu)
        return nu


    def _averaged(self, nu: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Means over the processes that average gradients."""
        group = self.process_group or self.capture.process_group
        if group is None:
            raise RuntimeError(
                f"{processes()} processes run, and CLARS does not know which of them "
                "average gradients; wrap the model in DistributedDataParallel, or pass "
                "process_group="
            )
        dtype = max((wide(p.dtype) for p in self._adapted), key=lambda x: x.itemsize)
        zero = torch.zeros((), device=self._adapted[0].device, dtype=dtype)
        all_of = [nu.get(p, zero).to(zero) for p in self._adapted]
        whole = flat(all_of)
        distributed.all_reduce(whole, group=group)
        parts = unflat(whole / processes(group), all_of)
        return dict(zip(self._adapted, parts, strict=True))


    def _amplified(self) -> tuple[Any, Any]:
        """What gradients, and norms, still have to be divided by."""
        if self.grad_scaler is not None:
            first = self.param_groups[0]["params"][0]
            one = torch.ones((), device=first.device)
            return None, self.grad_scaler.scale(one)
        if not hasattr(self, "found_inf"):
            return None, 1
        if self.grad_scale is None:
            told = "GradScaler.unscale_ was called, and CLARS does not know the scale"
            raise RuntimeError(f"{told}; build it with grad_scaler=")
        if any(group["nonfinite"] != "skip" for group in self.param_groups):
            told = "GradScaler skips steps, and a group has another nonfinite="
            raise RuntimeError(f"{told}; pass nonfinite='skip', or grad_scaler=")
        return self.grad_scale, self.grad_scale


    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``GradScaler`` leaves the division to this; it then says by what."""
        return self.grad_scaler is None


    def _forget_passes(self) -> None:
        self._seen: dict[Tensor, dict[Layer, list[Tensor]]] = {}
        self._by = None
        self.capture.clear()


    def _forget_discarded(self) -> None:
        """Before a forward call: a pass whose gradients are gone counts no longer."""
        if self._seen and all(p.grad is None for p in self._adapted):
            self._forget_passes()


    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and with them what was measured of them."""
        super(CLARS, self).zero_grad(set_to_none)
        self._forget_passes()


    def coherence(self) -> dict[Tensor, Tensor]:
        """‖g‖/ν of each matrix, in [0, 1]: after ``backward``, before ``step``.

        Under a GradScaler: after ``unscale_`` with ``grad_scaler``, before it without.
        """
        one = self._amplified()[1]
        found = {}
        for p, parts in self._seen.items():
            passes = zip(*parts.values(), strict=True)
            nu = sum(sum(squares).sqrt().mean() for squares in passes)
            found[p] = _norm(p.grad) / nu * (1 if self.grad_scaler is None else one)
        return found


    def detach(self) -> None:
        """Remove all hooks from the model; it trains no further with this."""
        self.capture.detach()


# %% 17_large_batches sec-lb-clip 1 01fc4c88
@torch.no_grad()
def clip_by_norm_(parameters: Any, max_norm: float) -> Tensor:
    """Shorten all gradients together to a norm of at most ``max_norm``, in place.

    Under a GradScaler, after ``unscale_``. A norm that is not finite changes nothing.

    Args:
        parameters: A tensor, or several; those without a gradient are left out.
        max_norm: c, in units of gradient, in (0, ∞).

    Returns:
        The norm before, on the device, as a tensor.

    Source: Pascanu, Mikolov & Bengio (2013), arXiv 1211.5063. Chapter 17, eq-lb-clip.
    """
    check_range("max_norm", max_norm, "(0, inf)")
    grads = [p.grad for p in _listed(parameters) if p.grad is not None]
    total = _total([_norm(g) for g in grads])
    factor = torch.where(total > max_norm, max_norm / total, 1)
    factor = torch.where(total.isfinite(), factor, 1)
    for g in grads:
        g.mul_(factor.to(g.device, wide(g.dtype)))
    return total


# %% 17_large_batches sec-lb-clip 2 ad447353
def _listed(parameters: Any) -> list[Tensor]:
    """Tensors, alone or several, with a dense gradient if they have one."""
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for p in params:
        if p.grad is not None and p.grad.layout is not torch.strided:
            told = f"{tuple(p.shape)} has a gradient of layout {p.grad.layout}"
            remedy = "use a dense gradient (nn.Embedding: sparse=False)"
            raise ValueError(f"a parameter {told}; {remedy}")
    return params


def _total(norms: list[Tensor]) -> Tensor:
    """The norm of several norms, those of shards included."""
    norms = [x.full_tensor() if hasattr(x, "placements") else x for x in norms]
    if not norms:
        return torch.zeros(())
    device = norms[0].device
    return torch.linalg.vector_norm(torch.stack([x.to(device) for x in norms]))


# %% 17_large_batches sec-lb-clip 3 88ef6ced
@torch.no_grad()
def adaptive_clip_(
    parameters: Any, clipping: float = 0.01, eps: float = 1e-3
) -> None:
    """Shorten each row of a gradient to a fraction of the row of weights, in place.

    Under a GradScaler, after ``unscale_``. Its authors leave out the last layer.

    Args:
        parameters: A tensor, or several. A row is what belongs to one output; a
            vector is one row.
        clipping: The fraction, in (0, ∞). Default 0.01.
        eps: A row of weights counts as no shorter than this; in (0, ∞). Default 1e-3.

    Source: Brock et al. (2021), arXiv 2102.06171. Chapter 17, eq-lb-agc.
    """
    check_range("clipping", clipping, "(0, inf)")
    check_range("eps", eps, "(0, inf)")
    for p in [p for p in _listed(parameters) if p.grad is not None]:
        limit, size = clipping * _rows(p).clamp_min(eps), _rows(p.grad)
        factor = torch.where(size > limit, limit / size, 1)
        p.grad.mul_(torch.where(size.isfinite(), factor, 1))


def _rows(x: Tensor) -> Tensor:
    """The norm of each row, as a column; of a vector, of all of it."""
    dims = tuple(range(1, x.dim())) if x.dim() > 1 else tuple(range(x.dim()))
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide(x.dtype))
