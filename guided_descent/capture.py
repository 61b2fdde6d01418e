# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 51daac49
"""Chapter 23, The machinery."""

__all__ = [
    "Capture",
    "FisherType",
    "Layer",
    "LikelihoodType",
    "gram",
]


# %% 23_machinery sec-capture 1 ddcdf3f4
import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Parameter
from torch.nn import functional as F

from guided_descent.core import check_choice

#: Whose gradients are captured; see ``Capture``.
FisherType = Literal["mc", "type-2", "empirical", "none"]
#: What the model's output means; see ``Capture``.
LikelihoodType = Literal["categorical", "gaussian", "bernoulli"] | Callable[[Tensor], Tensor]


# %% 23_machinery sec-capture 2 3e18aaca
class Layer:
    """One matrix of parameters: a weight, and its bias as one more column.

    Attributes:
        name: Where it is in the model: ``"encoder.0"``, ``"attention.q"``.
        kind: ``"linear"``; ``"conv"``, with the weight flattened to (channels out, channels in · window);
            ``"embedding"``, with the weight transposed; ``"scale"``, the elementwise weight and bias of a norm layer.
        weight: The parameter, if it is trained.
        bias: Its bias, if there is one and it is trained.
        shape: (d_out, d_in), the bias counted in d_in. For ``"scale"`` one row for each feature and one column for each
            of weight and bias.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        weight: Parameter | None,
        bias: Parameter | None,
        rows: slice = slice(None),
        bias_rows: slice = slice(None),
    ) -> None:
        self.name, self.kind, self.weight, self.bias = name, kind, weight, bias
        self._rows, self._bias_rows = rows, bias_rows
        columns = [self._columns(p, p.detach()) for p in self.parameters]
        self.shape: tuple[int, int] = len(columns[0]), sum(x.shape[1] for x in columns)

    def __repr__(self) -> str:
        return f"Layer({self.name!r}, {self.kind}, {self.shape[0]}×{self.shape[1]})"

    @property
    def parameters(self) -> list[Parameter]:
        """The weight and the bias, of those that are trained. A fused matrix belongs to several layers."""
        return [p for p in (self.weight, self.bias) if p is not None]

    def matrix(self) -> Tensor:
        """Weight and bias as a fresh (d_out, d_in) matrix."""
        return torch.cat([self._columns(p, p.detach()) for p in self.parameters], 1)

    def gradient(self) -> Tensor | None:
        """``.grad`` as a fresh (d_out, d_in) matrix: zero where only one of weight and bias has none, else ``None``."""
        if all(p.grad is None for p in self.parameters):
            return None
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters]
        return torch.cat([self._columns(p, g) for p, g in zip(self.parameters, grads, strict=True)], 1)

    def pieces(self, matrix: Tensor) -> list[tuple[Parameter, slice, Tensor]]:
        """How a (d_out, d_in) matrix falls apart: each parameter, its rows that are meant, a tensor like these."""
        widths = [self._columns(p, p.detach()).shape[1] for p in self.parameters]
        made = []
        for p, part in zip(self.parameters, matrix.split(widths, 1), strict=True):
            rows = self._rows if p is self.weight else self._bias_rows
            part = part.T if self.kind == "embedding" else part
            made.append((p, rows, part.reshape(p[rows].shape)))
        return made

    def _columns(self, p: Parameter, like: Tensor) -> Tensor:
        """A tensor shaped like ``p`` as columns of the matrix."""
        part = like[self._rows if p is self.weight else self._bias_rows]
        if self.kind == "embedding":
            return part.T
        return part.reshape(-1, 1) if self.kind == "scale" or p is self.bias else part.flatten(1)


# %% 23_machinery sec-capture 3 2531eeb4
#: What is covered, as (kind, classes). A subclass with a ``forward`` of its own is not: nobody knows what it computes.
_KINDS = {
    "linear": (nn.Linear,),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "embedding": (nn.Embedding,),
    "scale": (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
}
#: A convolution of at most this many groups is as many layers; one of more, such as a depthwise one, is in ``rest``.
_MAX_GROUPS = 8


def _kind_of(module: nn.Module) -> str | None:
    """Which of ``_KINDS`` a module is, or ``None``."""
    for kind, classes in _KINDS.items():
        for cls in classes:
            if isinstance(module, cls) and type(module).forward is cls.forward:
                odd = kind == "embedding" and (module.sparse or module.scale_grad_by_freq)
                return None if odd else kind
    return None


def _windows(module: nn.Module, x: Tensor) -> Tensor:
    """What a convolution's weight multiplies, as a view: (N, C, *space) becomes (N, *places, C, *window)."""
    x = x if x.ndim > len(module.kernel_size) + 1 else x.unsqueeze(0)
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode.replace("zeros", "constant"))
    for axis, (size, stride, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True), 2):
        x = x.unfold(axis, gap * (size - 1) + 1, stride)[..., ::gap]
    return x.movedim(1, len(module.kernel_size) + 1)


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What a norm layer's weight multiplies: its output if the weight were one and the bias zero."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    own = not module.training and module.running_mean is not None
    mean, var = (module.running_mean, module.running_var) if own else (None, None)
    return F.batch_norm(x, mean, var, training=not own, eps=module.eps)


def _features_last(module: nn.Module, y: Tensor) -> Tensor:
    """What has the shape of a module's output, with the features as its last dimension."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return y.flatten(-len(module.normalized_shape))
    if isinstance(module, _KINDS["conv"]):
        y = y if y.ndim > len(module.kernel_size) + 1 else y.unsqueeze(0)
    return y.movedim(1, -1) if isinstance(module, _KINDS["conv"] + _KINDS["scale"]) else y


# %% 23_machinery sec-capture 4 b71450a3
#: A layer of a module with its matrix, and the input channels and output features that are its.
_Site = tuple[Layer, Tensor, slice, slice]
#: The same, as a use needs it.
_Part = tuple[Layer, slice, slice]


def _candidates(name: str, module: nn.Module) -> Iterator[tuple[str, str, Any, Any, Any, slice, slice]]:
    """Name, kind, weight, bias, rows, input channels and output features of each matrix of one module."""
    own, every = module._parameters, slice(None)
    if isinstance(module, nn.MultiheadAttention):
        if type(module).forward is not nn.MultiheadAttention.forward:
            return
        d = module.embed_dim
        for k, part in enumerate(("q", "k", "v")):
            rows = slice(k * d, (k + 1) * d)
            fused = own.get("in_proj_weight")
            weight, features = (own.get(f"{part}_proj_weight"), every) if fused is None else (fused, rows)
            yield f"{name}.{part}", "linear", weight, own.get("in_proj_bias"), (features, rows), every, features
        out = module.out_proj._parameters
        yield f"{name}.out_proj", "linear", out.get("weight"), out.get("bias"), (every, every), every, every
    elif kind := _kind_of(module):
        groups = getattr(module, "groups", 1)
        for j in range(groups if groups <= _MAX_GROUPS else 0):
            rows = channels = every
            if groups > 1:
                rows = slice(*(module.out_channels // groups * k for k in (j, j + 1)))
                channels = slice(*(module.in_channels // groups * k for k in (j, j + 1)))
            label = name if groups == 1 else f"{name}.{j}"
            yield label, kind, own.get("weight"), own.get("bias"), (rows, rows), channels, rows


def _find_layers(model: nn.Module, trained: set[int]) -> tuple[list[Layer], list[tuple[nn.Module, list[_Site]]]]:
    """The layers of a model, and the modules to watch with what belongs to each.

    Modules with the same weight are one layer. Where an embedding shares its weight with a linear layer, the linear
    layer's inputs and gradients stand for both. A bias that does not go with one weight alone is in no layer.
    """
    found, inside = [], set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.add(module.out_proj)
        for label, kind, weight, bias, rows, channels, features in _candidates(name or type(model).__name__, module):
            if isinstance(weight, Parameter) and {id(weight), id(bias)} & trained and not weight.is_complex():
                keys = (id(weight), str(rows[0])), (id(bias), str(rows[1]))
                found.append((label.removeprefix("."), kind, weight, bias, rows, channels, features, keys, module))
    linear = {keys[0] for _, kind, *_, keys, _ in found if kind != "embedding"}
    found = [x for x in found if x[1] != "embedding" or x[-2][0] not in linear]
    partners: dict[Any, set[Any]] = {}
    for *_, (w, b), _ in found:
        partners.setdefault(("weight", w), set()).add(b)
        partners.setdefault(("bias", b), set()).add(w)
    layers: dict[Any, Layer] = {}
    sites: dict[nn.Module, list[_Site]] = {}
    for name, kind, weight, bias, rows, channels, features, (w, b), module in found:
        alone = bias is not None and len(partners["weight", w]) == len(partners["bias", b]) == 1
        own_bias = bias if alone and id(bias) in trained else None
        own_weight = weight if id(weight) in trained else None
        if own_weight is None and own_bias is None:
            continue
        if w not in layers:
            layers[w] = Layer(name, kind, own_weight, own_bias, *rows)
        sites.setdefault(module, []).append((layers[w], weight, channels, features))
    return list(layers.values()), list(sites.items())


# %% 23_machinery sec-capture 5 b07a1546
def _cotangents(
    fisher: str, likelihood: LikelihoodType, f: Tensor, samples: int, class_dim: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Gradients of each example's loss by the model's output ``f``, whose outer products sum to its curvature.

    Under ``"mc"`` the targets are drawn from the model's own output, and ``samples`` gradients are each divided by the
    root of their number. Under ``"type-2"`` there is one for each number of an example's output, and the sum is exact.
    """
    dtype, f = f.dtype, f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
    if callable(likelihood):
        with torch.enable_grad():
            for _ in range(samples):
                leaf = f.detach().requires_grad_()
                yield torch.autograd.grad(likelihood(leaf).sum(), leaf)[0].div(samples**0.5).to(dtype)
        return
    choice = likelihood == "categorical"
    moved = f.movedim(class_dim, -1) if choice else f
    z = moved.reshape(len(f), -1, moved.shape[-1]) if choice else f.reshape(len(f), 1, -1)
    p = z.softmax(-1) if choice else z.sigmoid()

    def shaped(v: Tensor) -> Tensor:
        v = v.reshape(moved.shape)
        return (v.movedim(-1, class_dim) if choice else v).to(dtype)

    for _ in range(samples if fisher == "mc" else 0):
        if likelihood == "categorical":
            race = z - torch.empty_like(z).exponential_(generator=generator).log_()
            v = p.scatter_add(-1, race.argmax(-1, keepdim=True), -torch.ones_like(p[..., :1]))
        elif likelihood == "gaussian":
            v = torch.empty_like(z).normal_(generator=generator)
        else:
            v = p - (torch.empty_like(z).uniform_(generator=generator) < p).to(p.dtype)
        yield shaped(v.div_(samples**0.5))
    for place in range(z.shape[1] if fisher == "type-2" else 0):
        for c in range(z.shape[2]):
            v, q = torch.zeros_like(z), p[:, place]
            if likelihood == "categorical":
                v[:, place] = q * q[:, c, None].sqrt()
                v[:, place, c] -= q[:, c].sqrt()
            else:
                v[:, place, c] = 1 if likelihood == "gaussian" else (q[:, c] * (1 - q[:, c])).sqrt()
            yield shaped(v)


# %% 23_machinery sec-capture 6 2cb74d08
#: The pass whose sampled gradients are on their way through a model, that no other capture may take for its own.
_SAMPLING: "weakref.WeakKeyDictionary[nn.Module, _Pass]" = weakref.WeakKeyDictionary()


class _Pass:
    """One forward call of the model: how many examples it had, and what its taps are to do when gradients arrive."""

    def __init__(self, capture: "Capture") -> None:
        self.capture = capture
        self.examples = 0
        self.expected = 0  # gradients that each use of a layer waits for; while it is zero, taps do nothing
        self.uses: dict[Layer, int] = {}
        self.ready: dict[Layer, list[tuple[Tensor, Tensor | None]]] = {}
        self.anchors: dict[torch.device, Tensor] = {}

    def anchor(self, device: torch.device) -> Tensor:
        """A leaf that all taps of the pass hang on: whoever asks for its gradient reaches every tap and no weight."""
        if device not in self.anchors:
            self.anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self.anchors[device]

    def arrange(self, x: Tensor, time_first: bool) -> Tensor:
        """(…, d) as (examples, places, d), or (1, places, d) where the examples share the call, as positions do."""
        n, total = self.examples, x.shape[:-1].numel()
        if time_first and x.ndim == 2 and total % n == 0:
            x = x.unflatten(0, (-1, n))
        if x.ndim > 2 and x.shape[1] == n and (time_first or x.shape[0] != n):
            x = x.transpose(0, 1)
        return x.reshape(n if total % n == 0 else 1, -1, x.shape[-1])

    def finish(self, layer: Layer, a: Tensor, g: Tensor | None) -> None:
        """Hand a pair over, once all uses of a tied weight have come in."""
        pairs = self.ready.setdefault(layer, [])
        pairs.append((a, g))
        if len(pairs) == self.uses[layer]:
            self.hand_over(layer)

    def hand_over(self, layer: Layer) -> None:
        pairs = self.ready.pop(layer)
        if len({a.shape[0] for a, _ in pairs}) == 1 and len(pairs) > 1:
            gradients = [g for _, g in pairs if g is not None]
            pairs = [(torch.cat([a for a, _ in pairs], 1), torch.cat(gradients, 2) if gradients else None)]
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            for a, g in pairs:
                self.capture.consume(layer, a, g)

    @torch.no_grad()
    def sample(self, root: GradientEdge, output: Tensor) -> None:
        """Send each cotangent from the model's output through the graph, which the user's backward still needs."""
        c = self.capture
        self.expected = c.samples if c.fisher == "mc" else output[0].numel()
        outer = _SAMPLING.get(c.model)
        _SAMPLING[c.model] = self
        try:
            for v in _cotangents(c.fisher, c.likelihood, output, c.samples, c.class_dim, c.generator):
                torch.autograd.grad([root], list(self.anchors.values()), [v], retain_graph=True, allow_unused=True)
        finally:
            self.expected = 0
            _SAMPLING.pop(c.model)
            if outer is not None:
                _SAMPLING[c.model] = outer
        for layer in list(self.ready):
            self.hand_over(layer)


class _Use:
    """One call of a module in a pass: its input, and the gradients that have come back.

    Args:
        at: The pass.
        module: The module called.
        parts: The layers behind it; for each the input channels and the output features that are its.
        x: The input.
        time_first: Whether the leading dimensions are (time, examples).
    """

    def __init__(self, at: _Pass, module: nn.Module, parts: list[_Part], x: Tensor, time_first: bool = False) -> None:
        self.at, self.module, self.parts, self.time_first = at, module, parts, time_first
        self.x: Tensor | None = x.detach()
        self.version = 0 if x.is_inference() else x._version
        self.gradients: list[Tensor] = []
        for layer, _, _ in parts:
            at.uses[layer] = at.uses.get(layer, 0) + 1

    def receive(self, g: Tensor | None) -> None:
        """What the tap does with a gradient by the module's output."""
        at, fisher = self.at, self.at.capture.fisher
        if not at.expected or self.x is None or _SAMPLING.get(at.capture.model, at) is not at:
            return
        if fisher == "empirical" and g is not None:
            g = g * (at.examples / at.capture.loss_scale)
        if fisher != "none":
            if g is None:
                return
            self.gradients.append(g)
        if len(self.gradients) == at.expected or fisher == "none":
            with torch.no_grad():
                self.finish(self.x)

    def finish(self, x: Tensor) -> None:
        """Arrange input and gradients, hand them over, and let go of them."""
        if not x.is_inference() and x._version != self.version:
            raise RuntimeError(
                f"the input of layer {self.parts[0][0].name!r} was changed in place between forward and backward, so "
                "its statistics would be wrong; use the operation that is not in place"
            )
        gradients, self.gradients, self.x = [_features_last(self.module, g) for g in self.gradients], [], None
        if isinstance(self.module, nn.Embedding) and self.module.padding_idx is not None:
            gradients = [g * (x != self.module.padding_idx).unsqueeze(-1) for g in gradients]
        shared: tuple[Any, Tensor] | None = None
        for layer, channels, features in self.parts:
            key = (channels, layer.weight is None, layer.bias is None)
            if shared is None or shared[0] != key:
                shared = key, self.at.arrange(self.inputs(layer, x, channels), self.time_first)
            a, g = shared[1], None
            if len(a) != self.at.examples and self.at.capture.fisher == "type-2":
                raise ValueError(
                    f"layer {layer.name!r} is called once for all examples (input {tuple(x.shape)}), so the gradients "
                    "of an example are not to be had; repeat the input for each example, or use fisher='mc'"
                )
            if gradients:
                split = [self.at.arrange(g[..., features], self.time_first) for g in gradients]
                g = split[0].unsqueeze(0) if len(split) == 1 else torch.stack(split)
                g = g if len(a) == self.at.examples else g * (len(a) / self.at.examples) ** 0.5
            self.at.finish(layer, a.squeeze(-1) if layer.kind == "embedding" else a, g)

    def inputs(self, layer: Layer, x: Tensor, channels: slice) -> Tensor:
        """(…, d_in), with a one appended for a bias."""
        if layer.kind == "embedding":
            return x.unsqueeze(-1)
        if layer.kind == "scale":
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            return _features_last(self.module, _normalised(self.module, x))
        window = 1
        if layer.kind == "conv":
            window += len(self.module.kernel_size)
            x = _windows(self.module, x)
            x = x[(..., channels, *[slice(None)] * (window - 1))]
        lead, rest = x.shape[:-window], x.shape[-window:]
        if layer.bias is None:
            return x.flatten(-window)
        made = x.new_empty(*lead, rest.numel() + 1 if layer.weight is not None else 1)
        made[..., -1] = 1
        if layer.weight is not None:
            made[..., :-1].unflatten(-1, rest).copy_(x)
        return made


# %% 23_machinery sec-capture 7 7fae2033
class _Tap(torch.autograd.Function):
    """The identity, behind a layer's output: what comes back through it is the gradient by that output."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, use: _Use) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.use = use
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None]:
        ctx.use.receive(g)
        return g, None, None


class _Root:
    """The model's output: where the sampled gradients start, as soon as any gradient arrives at what it returned."""

    def __init__(self, at: _Pass, output: Tensor) -> None:
        self.at, self.edge, self.version = at, get_gradient_edge(output), output._version
        self.output: Tensor | None = output.detach()

    def begin(self) -> None:
        """Once, before any node of the model's graph has run and let go of what it saved."""
        output, self.output = self.output, None
        if output is None:
            return
        if output._version != self.version:
            raise RuntimeError(
                "the model's output was changed in place after the forward call, and its likelihood with it; use the "
                "operation that is not in place"
            )
        self.at.sample(self.edge, output)


class _RootTap(torch.autograd.Function):
    """The identity, behind what the model returns."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, root: _Root) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.root = root
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        ctx.root.begin()
        return g, None


# %% 23_machinery sec-capture 8 d0cdd00b
def _mapped(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """What a model returned, with a function applied to each tensor; containers are copied, not changed."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, Mapping):
        made: Any = copy.copy(output)
        for key, value in output.items():
            made[key] = _mapped(value, function)
        return made
    if isinstance(output, tuple | list):
        items = [_mapped(value, function) for value in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if dataclasses.is_dataclass(output):
        made = copy.copy(output)
        for field in dataclasses.fields(output):
            object.__setattr__(made, field.name, _mapped(getattr(output, field.name), function))
        return made
    return output


class _Hook:
    """A method of a capture as a hook. It keeps nothing alive, and a copy of it does nothing: see ``Capture``."""

    def __init__(self, capture: "Capture", method: str, *args: Any) -> None:
        self.capture, self.method, self.args = weakref.ref(capture), method, args

    def __call__(self, *args: Any) -> Any:
        capture = self.capture()
        return None if capture is None else getattr(capture, self.method)(*self.args, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()


class _Inert:
    def __call__(self, *args: Any) -> None:
        return None


class Capture:
    """Hand the inputs and the output gradients of a model's layers to a callback, in the user's own training loop.

    Each weight gradient of an example is Σ over places of g aᵀ: a is what the weight multiplied, g the gradient by the
    layer's output. During a backward pass through the model's output, each layer's pairs are handed to ``consume``.

    Args:
        model: The module whose calls count. Its layers are found once, here; freeze and tie before.
        fisher: Whose gradients. ``"mc"``: of targets drawn from the model's own output. ``"type-2"``: one for each
            number of an example's output; outer products sum to the exact Gauss–Newton matrix. ``"empirical"``: the
            user's own, times the number of examples, since a loss is a mean. ``"none"``: no gradients, only inputs.
        likelihood: What the output means: logits of one choice (``"categorical"``), a mean with unit variance
            (``"gaussian"``: the loss is half the squared distance), logits of separate events (``"bernoulli"``). Losses
            of one example add up over all its outputs. Or a callable: from the output (a leaf) to
            losses, with targets that it draws itself; only for ``"mc"``.
        consume: Called as ``consume(layer, a, g)`` with a of shape (N, R, d_in), for N examples and R places that share
            the weight, a one appended for a bias; and g of shape (M, N, R, d_out), for M gradients. For an embedding a
            holds the indices, (N, R). For ``"scale"`` it holds the normalised inputs, (N, R, d_out), without
            a one. Under ``"none"`` g is ``None``. Under ``"mc"`` g is scaled so that outer products add up over M.
            Called once for each layer and pass; tied weights have the places of all their uses. An input that
            the examples share, such as positions, has N = 1 and g divided by √N.
        samples: How many targets ``"mc"`` draws for each output, at least 1.
        generator: Draws them. ``None``: the default generator of the output's device.
        parameters: Only these are covered. ``None``: all that require a gradient.
        output: From what the model returns to the tensor that the likelihood speaks of. ``None``: a returned tensor,
            the entry ``"logits"``, or the only tensor in there that requires a gradient.
        class_dim: The dimension of the classes. Default −1; for images in torch's order, (N, C, H, W), it is 1.

    Attributes:
        layers: What is covered.
        rest: Names and parameters that require a gradient and are covered by no layer.
        recording: Whether forward calls are recorded. Default ``True``.
        loss_scale: What the user's loss is multiplied by before ``backward``, for ``"empirical"``: a number or tensor.

    Raises:
        ValueError: An unknown fisher or likelihood, ``samples`` below one, type-2 with a callable, lazy modules without
            shapes, ``nn.DataParallel``; in a forward call, an output that is no tensor and has no evident one.
        RuntimeError: In a forward call of a replica; in a backward pass, a changed input or output.

    Source: appendix "The machinery".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        consume: Callable[[Layer, Tensor, Tensor | None], None],
        fisher: FisherType = "mc",
        likelihood: LikelihoodType = "categorical",
        samples: int = 1,
        generator: torch.Generator | None = None,
        parameters: Iterable[Parameter] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        class_dim: int = -1,
    ) -> None:
        check_choice("fisher", fisher, ("mc", "type-2", "empirical", "none"))
        if not callable(likelihood):
            check_choice("likelihood", likelihood, ("categorical", "gaussian", "bernoulli"))
        elif fisher == "type-2":
            raise ValueError("fisher='type-2' needs a likelihood by name, not a callable; use fisher='mc'")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples={samples!r} is no positive integer; pass at least 1")
        if isinstance(model, nn.DataParallel):
            raise ValueError("nn.DataParallel is not supported: its replicas differ; use DistributedDataParallel")
        for name, p in model.named_parameters():
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(f"parameter {name!r} has no shape yet; run a forward call before you build this")
        self.model, self.consume, self.fisher, self.likelihood = model, consume, fisher, likelihood
        self.samples, self.generator, self.output, self.class_dim = samples, generator, output, class_dim
        self.recording = True
        self.loss_scale: float | Tensor = 1.0
        chosen = {id(p) for p in (model.parameters() if parameters is None else parameters)}
        trained = {id(p) for p in model.parameters() if p.requires_grad and id(p) in chosen}
        self.layers, self._sites = _find_layers(model, trained)
        covered = {id(p) for layer in self.layers for p in layer.parameters}
        self.rest = [(n, p) for n, p in model.named_parameters() if id(p) in trained - covered]
        self._attach()

    def _attach(self) -> None:
        """Put the hooks in place. The model's own come last: it may be a layer itself."""
        self._stack: list[_Pass | None] = []
        self._linear: list[Any] = []
        self._handles: list[Any] = []
        for module, parts in self._sites:
            if isinstance(module, nn.MultiheadAttention):
                before, after = _Hook(self, "_attend", parts), _Hook(self, "_attended")
                self._handles.append(module.register_forward_pre_hook(before))
                self._handles.append(module.register_forward_hook(after, always_call=True))
            else:
                hook = _Hook(self, "_called", [(layer, x, y) for layer, _, x, y in parts])
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self._handles.append(self.model.register_forward_pre_hook(_Hook(self, "_enter")))
        self._handles.append(self.model.register_forward_hook(_Hook(self, "_leave"), always_call=True))

    def detach(self) -> None:
        """Remove every hook; to do so twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        """All but the hooks. Hooks copied with the model do nothing; a copied capture makes its own on its model."""
        kept = {name: value for name, value in vars(self).items() if name not in ("_stack", "_linear", "_handles")}
        return {**kept, "_attached": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_attached")
        vars(self).update(state)
        self._attach()
        if not attached:
            self.detach()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module is not self.model:
            raise RuntimeError("a replica of the model was called; use DistributedDataParallel, not nn.DataParallel")
        outer = self._stack[-1] if self._stack else None
        plain = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        self._stack.append(outer or (_Pass(self) if self.recording and plain else None))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        at = self._stack.pop() if self._stack else None
        if at is None or at in self._stack or not at.uses or output is None:
            return None
        value = self._likelihood_of(output)
        if value is None:
            return None
        at.examples = len(value)
        if self.fisher in ("empirical", "none"):
            at.expected = 1
            return None
        root = _Root(at, value)
        mapped = _mapped(output, lambda y: _RootTap.apply(y, root) if y.requires_grad else y)
        if mapped is output:
            raise ValueError(
                f"the model returned a {type(output).__name__} without a tensor that can be watched; return a tensor, "
                "or a tuple, list, mapping or dataclass of tensors"
            )
        return mapped

    def _likelihood_of(self, output: Any) -> Tensor | None:
        """The tensor in a model's output that the likelihood speaks of; ``None`` if it has no graph."""
        if self.output is not None:
            value = self.output(output)
        elif isinstance(output, Tensor):
            value = output
        elif isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
            value = output["logits"]
        else:
            inside = output.values() if isinstance(output, Mapping) else output
            inside = list(inside) if isinstance(inside, Iterable) else [output]
            tensors = [x for x in inside if isinstance(x, Tensor) and x.requires_grad and x.ndim]
            value = tensors[0] if len(tensors) == 1 else None
        choice = self.likelihood == "categorical" and self.fisher in ("mc", "type-2")
        if not isinstance(value, Tensor) or value.ndim < (2 if choice else 1):
            what = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(output).__name__
            raise ValueError(
                f"the model returned {what}, and which tensor of shape (N, …) in it likelihood={self.likelihood!r} "
                "speaks of is not evident; pass output=, a function from what the model returns to that tensor"
            )
        if choice and value.shape[self.class_dim] == 1:
            raise ValueError(
                f"the model returned {tuple(value.shape)}, one class, so likelihood='categorical' has no "
                "curvature; pass likelihood='gaussian' or 'bernoulli', or the class_dim="
            )
        return value if value.requires_grad and value.numel() else None

    def _called(self, parts: list[_Part], module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        at = self._stack[-1] if self._stack else None
        if at is None or not y.requires_grad:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return _Tap.apply(y, at.anchor(y.device), _Use(at, module, parts, x))

    def _attend(self, sites: list[_Site], module: nn.Module, args: Any) -> None:
        """Watch ``F.linear`` while the attention module runs: it calls its projections as functions."""
        at, linear = self._stack[-1] if self._stack else None, F.linear

        def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y = linear(x, weight, bias)
            parts = []
            for layer, matrix, _, rows in sites:
                if weight is matrix or weight._base is matrix:
                    first = (weight.storage_offset() - matrix.storage_offset()) // matrix.stride(0)
                    start, stop = rows.start or 0, rows.stop or len(matrix)
                    if first <= start and stop <= first + len(weight):
                        parts.append((layer, slice(None), slice(start - first, stop - first)))
            if at is None or not parts or not y.requires_grad:
                return y
            return _Tap.apply(y, at.anchor(y.device), _Use(at, module, parts, x, time_first=True))

        self._linear.append(linear)
        F.linear = watched if at is not None else linear

    def _attended(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._linear:
            F.linear = self._linear.pop()


# %% 23_machinery sec-capture 9 84caefc3
def gram(x: Tensor, weight: float = 1.0) -> Tensor:
    """``weight · Σ x xᵀ``, summed over all rows of ``x``, in single precision at least.

    Only blocks on and right of the diagonal are multiplied, 9/16 of a large matrix; the others are copied.

    Args:
        x: (…, d).
        weight: Of the sum. Default 1.

    Returns:
        (d, d).

    Source: appendix "The machinery".
    """
    x = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    out = x.new_empty(x.shape[1], x.shape[1])
    block = max(128, -(-x.shape[1] // 8))
    for i in range(0, x.shape[1], block):
        j = i + block
        out[i:j, i:].addmm_(x[:, i:j].T, x[:, i:], beta=0, alpha=weight)
        out[j:, i:j] = out[i:j, j:].T
    return out
