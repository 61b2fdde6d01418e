# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 6a8326ce
"""Chapter 23, The machinery."""

__all__ = [
    "Capture",
    "FisherType",
    "LikelihoodType",
]


# %% 23_machinery sec-capture 5 ead0cb82
import copy
import dataclasses
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Parameter
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from guided_descent.core import check_choice, check_range, wide
from guided_descent.layers import KINDS, Layer, Site, find_layers
from guided_descent.likelihoods import LIKELIHOODS, check_no_classes, class_axis

#: Whose gradients are captured; see ``Capture``.
FisherType = Literal["mc", "type-2", "empirical", "none"]
#: What the model's output means; see ``Capture``.
LikelihoodType = (
    Literal["categorical", "gaussian", "bernoulli"] | Callable[[Tensor], Tensor]
)


# %% 23_machinery sec-capture 6 d3ca8de0
def _windows(module: nn.Module, x: Tensor) -> Tensor:
    """What a convolution's weight multiplies, a view: (N, *places, C, *window)."""
    x = x if x.ndim > len(module.kernel_size) + 1 else x.unsqueeze(0)
    mode = module.padding_mode.replace("zeros", "constant")
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sides = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (size, stride, gap) in enumerate(sides, 2):
        x = x.unfold(axis, gap * (size - 1) + 1, stride)[..., ::gap]
    return x.movedim(1, len(module.kernel_size) + 1)


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What a norm layer's weight multiplies: its output at weight one, bias zero."""
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
    """A tensor shaped like a module's output, with the features last."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return y.flatten(-len(module.normalized_shape))
    if isinstance(module, KINDS["conv"]):
        y = y if y.ndim > len(module.kernel_size) + 1 else y.unsqueeze(0)
    return y.movedim(1, -1) if isinstance(module, KINDS["conv"] + KINDS["scale"]) else y


# %% 23_machinery sec-capture 7 b4131362
#: The pass whose sampled gradients are on their way through a model, that no other
#: capture may take for its own.
_SAMPLING: "weakref.WeakKeyDictionary[nn.Module, _Pass]" = weakref.WeakKeyDictionary()


class _Pass:
    """One forward call of the model, and what its taps do with gradients."""

    def __init__(self, capture: "Capture") -> None:
        self.capture = capture
        self.examples = self.rows = 1
        self.expected = 0  # gradients that each use of a layer waits for; zero: none
        self.uses: dict[Layer, int] = defaultdict(int)
        self.ready: dict[Layer, list[tuple[Tensor, Tensor | None]]] = defaultdict(list)
        self.anchors: dict[torch.device, Tensor] = {}

    def anchor(self, device: torch.device) -> Tensor:
        """A leaf that all taps hang on: its gradient meets all taps and no weight."""
        if device not in self.anchors:
            self.anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self.anchors[device]

    def arrange(self, x: Tensor, time_first: bool) -> Tensor:
        """(…, d) as (examples, places, d); (1, places, d) where they share the call."""
        n, total = self.examples, x.shape[:-1].numel()
        if time_first and x.ndim == 2 and total % n == 0:
            x = x.unflatten(0, (-1, n))
        if x.ndim > 2 and x.shape[1] == n and (time_first or x.shape[0] != n):
            x = x.transpose(0, 1)
        return x.reshape(n if total % n == 0 else 1, -1, x.shape[-1])

    def finish(self, layer: Layer, a: Tensor, g: Tensor | None) -> None:
        """Hand a pair over, once all uses of a tied weight have come in."""
        self.ready[layer].append((a, g))
        if len(self.ready[layer]) == self.uses[layer]:
            self.hand_over(layer)

    def hand_over(self, layer: Layer) -> None:
        pairs = self.ready.pop(layer)
        if len({a.shape[0] for a, _ in pairs}) == 1 and len(pairs) > 1:
            given = [g for _, g in pairs if g is not None]
            g = torch.cat(given, 2) if given else None
            pairs = [(torch.cat([a for a, _ in pairs], 1), g)]
        self.capture.examples, self.capture.rows = self.examples, self.rows
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            for a, g in pairs:
                self.capture.consume(layer, a, g)

    def sample(self, root: GradientEdge, output: Tensor) -> None:
        """Send gradients through the graph, which the user's still needs."""
        c, options = self.capture, {"retain_graph": True, "allow_unused": True}
        self.expected = c.samples if c.fisher == "mc" else output[0].numel()
        outer = _SAMPLING.get(c.model)
        _SAMPLING[c.model] = self
        try:
            for v in c.cotangents(output):
                torch.autograd.grad([root], list(self.anchors.values()), [v], **options)
        finally:
            self.expected = 0
            _SAMPLING.pop(c.model)
            if outer is not None:
                _SAMPLING[c.model] = outer
        for layer in list(self.ready):
            self.hand_over(layer)


class _Use:
    """One call of a module: its input, and the gradients that have come back."""

    time_first = False  # leading dimensions are (time, examples): inside attention

    def __init__(self, at: _Pass, module: nn.Module, sites: list[Site], x: Tensor):
        self.at, self.module, self.sites = at, module, sites
        self.x: Tensor | None = x.detach()
        self.version = 0 if x.is_inference() else x._version
        self.gradients: list[Tensor] = []
        for site in sites:
            at.uses[site.layer] += 1

    def tap(self, y: Tensor) -> Tensor:
        """The module's output, watched."""
        return _Tap.apply(y, self.at.anchor(y.device), self)

    def receive(self, g: Tensor | None) -> None:
        """What the tap does with a gradient by the module's output."""
        at, fisher = self.at, self.at.capture.fisher
        mine = _SAMPLING.get(at.capture.model, at) is at
        if not at.expected or self.x is None or not mine:
            return
        if fisher != "none":
            if g is None:
                return
            if fisher == "empirical":  # float16 has no room for the number of examples
                g = g.to(torch.promote_types(g.dtype, torch.bfloat16)) * at.examples
            self.gradients.append(g)
        if len(self.gradients) == at.expected or fisher == "none":
            with torch.no_grad():
                self.finish(self.x)

    def finish(self, x: Tensor) -> None:
        """Arrange input and gradients, hand them over, and let go of them."""
        if not x.is_inference() and x._version != self.version:
            raise RuntimeError(
                f"the input of layer {self.sites[0].layer.name!r} was changed in place "
                "between forward and backward; use the operation that is not in place"
            )
        gradients = [_features_last(self.module, g) for g in self.gradients]
        self.gradients, self.x = [], None
        if (padding := getattr(self.module, "padding_idx", None)) is not None:
            real = (x != padding).unsqueeze(-1)
            gradients = [g * real for g in gradients]
        arranged: dict[Any, Tensor] = {}
        for layer, _, channels, features in self.sites:
            key = (str(channels), layer.weight is None, layer.bias is None)
            if key not in arranged:
                x_of = self.inputs(layer, x, channels)
                arranged[key] = self.at.arrange(x_of, self.time_first)
            a, g, N = arranged[key], None, self.at.examples
            if len(a) != N and self.at.capture.fisher in ("type-2", "empirical"):
                raise ValueError(
                    f"layer {layer.name!r} is called once for all examples (input "
                    f"{tuple(x.shape)}), which hides each example's gradient; repeat "
                    "the input for each example, or use fisher='mc'"
                )
            if gradients:
                parts = [g[..., features] for g in gradients]
                parts = [self.at.arrange(g, self.time_first) for g in parts]
                g = parts[0][None] if len(parts) == 1 else torch.stack(parts)
                g = g if len(a) == N else g * (len(a) / N) ** 0.5
            self.at.finish(layer, a.squeeze(-1) if layer.kind == "embedding" else a, g)

    def inputs(self, layer: Layer, x: Tensor, channels: slice) -> Tensor:
        """(…, d_in), with a one appended for a bias."""
        if layer.kind == "embedding":
            return x.unsqueeze(-1)
        if layer.kind == "scale":
            y = _normalised(self.module, x.to(wide(x.dtype)))
            return _features_last(self.module, y)
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


# %% 23_machinery sec-capture 8 7634ebea
class _Tap(torch.autograd.Function):
    """The identity behind a layer's output: what comes back is the gradient by it."""

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
    """The model's output: where sampled gradients start, once any gradient arrives."""

    def __init__(self, at: _Pass, output: Tensor) -> None:
        self.at, self.edge = at, get_gradient_edge(output)
        self.version, self.output = output._version, output.detach()

    @torch.no_grad()
    def begin(self, g: Tensor | None) -> None:
        """Once, before any node of the model's graph has let go of what it saved.

        Args:
            g: The gradient by the output, where it is what has arrived.
        """
        if self.at.capture.model in _SAMPLING:
            return  # what passes here is another's sample
        output, self.output = self.output, None
        if output is None:
            return
        if output._version != self.version:
            remedy = "use the operation that is not in place"
            raise RuntimeError(f"the model's output was changed in place; {remedy}")
        capture = self.at.capture
        capture.examine(output, g)
        self.at.rows = capture.rows_of(output)
        capture.seen["rows"] += self.at.rows
        capture.seen["examples"] += len(output)
        if self.at.uses and capture.fisher in ("mc", "type-2"):
            self.at.sample(self.edge, output)


class _RootTap(torch.autograd.Function):
    """The identity behind what the model returns."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, root: _Root, whole: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.root, ctx.whole = root, whole
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None]:
        ctx.root.begin(g if ctx.whole else None)
        return g, None, None


# %% 23_machinery sec-capture 9 beca08a7
def _mapped(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """What a model returned, a function of each tensor; containers are copied."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, Mapping):
        made: Any = copy.copy(output)
        for key, value in output.items():
            made[key] = _mapped(value, function)
        return made
    if isinstance(output, tuple | list):
        items, make = [_mapped(value, function) for value in output], type(output)
        return make(*items) if hasattr(output, "_fields") else make(items)
    if dataclasses.is_dataclass(output):
        made = copy.copy(output)
        for field in dataclasses.fields(output):
            value = _mapped(getattr(output, field.name), function)
            object.__setattr__(made, field.name, value)
        return made
    return output


class _Hook:
    """A method of a capture as a hook. It keeps nothing alive; copies are inert."""

    def __init__(self, capture: "Capture", method: str, *args: Any) -> None:
        self.capture, self.method, self.args = weakref.ref(capture), method, args

    def __call__(self, *args: Any) -> Any:
        if (capture := self.capture()) is not None:
            return getattr(capture, self.method)(*self.args, *args)
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()


class _Inert:
    def __call__(self, *args: Any) -> None:
        return None


class Capture:
    """Hand each layer's inputs and output gradients to a callback, in the user's loop.

    Each weight gradient of an example is Σ over places of g aᵀ: a is what the weight
    multiplied, g the gradient by the layer's output. During a backward pass through the
    model's output, each layer's pairs are handed to ``consume``.

    The user's gradient at the output has to be one of the likelihood's: that is checked
    in the first backward passes (of each number of dimensions), on numbers read to the
    host.

    Args:
        model: The module whose calls count. Its layers are found once, here; freeze and
            tie before.
        fisher: Whose gradients. ``"mc"``: of targets drawn from the model's own output.
            ``"type-2"``: one for each number of an example's output; outer products sum
            to the exact Gauss–Newton matrix. ``"empirical"``: the user's own, times the
            number of examples; outputs (N, C) are then not held against the likelihood.
            ``"none"``: no gradients, only inputs.
        likelihood: What the output means: logits of one choice (``"categorical"``), a
            mean with unit variance (``"gaussian"``: the loss is half the squared
            distance), logits of separate events (``"bernoulli"``). Losses of one
            example add up over all its outputs. Or a callable: from the output (a leaf)
            to losses, with targets that it draws itself; only for ``"mc"``.
        consume: Called as ``consume(layer, a, g)`` with a of shape (N, R, d_in), for N
            examples and R places that share the weight, a one appended for a bias; and
            g of shape (M, N, R, d_out), for M gradients. For an embedding a holds the
            indices, (N, R). For ``"scale"`` it holds the normalised inputs, (N, R,
            d_out), without a one. Under ``"none"`` g is ``None``. Under ``"mc"`` g is
            scaled so that outer products add up over M. Called once for each layer and
            pass; tied weights have the places of all their uses. An input that the
            examples share, such as positions, has N = 1 and g divided by √N.
        samples: How many targets ``"mc"`` draws for each output, at least 1.
        generator: Draws them. ``None``: the default generator of the output's device.
        parameters: Only these are covered. ``None``: all that require a gradient.
        output: From what the model returns to the tensor that the likelihood speaks of.
            ``None``: a returned tensor, the entry ``"logits"``, or the only tensor in
            there that requires a gradient.
        class_dim: The dimension of the classes, or of the numbers that make up one row.
            ``None`` (the default): of classes, where the gradient of the user's loss
            sums to zero; else the last.

    Attributes:
        layers: What is covered.
        rest: Names and parameters that require a gradient and that no layer covers.
        recording: Whether forward calls are recorded. Default ``True``.
        examples, rows: How many there were in the pass that is being handed over; a row
            is a place at which the likelihood has a factor of its own: a token, a
            pixel.
        entered: Called before each forward call that has a graph, if given.
        process_group: Of the ``DistributedDataParallel`` that calls the model, if one
            does.
        seen: Sums since it was last cleared: ``"examples"``, ``"rows"``, and
            ``"weight"``, the least that the user's loss can weigh all rows together (a
            mean: 1); and ``"largest"``, of the loss's gradient by each row the largest
            entry plus the smallest: positive only if the loss is the negative of a
            cross-entropy.
        weighing: Whether the latter two are computed. Default ``False``.

    Raises:
        ValueError: An unknown fisher or likelihood, ``samples`` below one, type-2 with
            a callable, lazy modules without shapes, ``nn.DataParallel``; in a forward
            call, an output that is no tensor and has no evident one; in a backward
            pass, a loss that the likelihood does not fit, or classes on an ambiguous
            axis.
        RuntimeError: In a forward call of a replica; in a backward pass, a changed
            input or output.

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
        class_dim: int | None = None,
    ) -> None:
        check_choice("fisher", fisher, ("mc", "type-2", "empirical", "none"))
        if not callable(likelihood):
            check_choice("likelihood", likelihood, LIKELIHOODS)
        elif fisher == "type-2":
            told = "fisher='type-2' needs a likelihood by name, not a callable"
            raise ValueError(f"{told}; use fisher='mc'")
        check_range("samples", samples, "[1, inf) int")
        if isinstance(model, nn.DataParallel):
            raise ValueError("nn.DataParallel is refused; use DistributedDataParallel")
        for name, p in model.named_parameters():
            if isinstance(p, nn.parameter.UninitializedParameter):
                remedy = "run a forward call before you build this"
                raise ValueError(f"parameter {name!r} has no shape yet; {remedy}")
        self.model, self.consume, self.fisher = model, consume, fisher
        self.likelihood, self.samples, self.generator = likelihood, samples, generator
        self.output, self.class_dim = output, class_dim
        self.recording, self.weighing = True, False
        self.examples = self.rows = 0
        self.process_group: Any = None
        self.entered: Callable[[], None] | None = None
        self.seen: dict[str, Any] = {}
        self.clear()
        self._axes: dict[int, int] = {}  # of the classes, by number of dimensions
        chosen = set(map(id, model.parameters() if parameters is None else parameters))
        needed = {id(p) for p in model.parameters() if p.requires_grad} & chosen
        self.layers, self._sites = find_layers(model, needed)
        missed = needed - {id(p) for layer in self.layers for p in layer.parameters}
        self.rest = [(n, p) for n, p in model.named_parameters() if id(p) in missed]
        self._attach()

    def clear(self) -> None:
        """Begin ``seen`` anew."""
        self.seen = {"examples": 0, "rows": 0, "weight": 0.0, "largest": 0.0}

    def _attach(self) -> None:
        """Put the hooks in place; the model's own last: it may be a layer itself."""
        self._stack: list[_Pass | None] = []
        self._linear: list[Any] = []
        self._handles: list[Any] = []

        def around(module: nn.Module, before: _Hook, after: _Hook) -> None:
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after, always_call=True))

        for module, sites in self._sites:
            if isinstance(module, nn.MultiheadAttention):
                around(module, _Hook(self, "_attend", sites), _Hook(self, "_attended"))
            else:
                called = _Hook(self, "_called", sites)
                hook = module.register_forward_hook(called, with_kwargs=True)
                self._handles.append(hook)
        around(self.model, _Hook(self, "_enter"), _Hook(self, "_leave"))

    def detach(self) -> None:
        """Remove every hook; to do so twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        """All but the hooks; a copied capture makes its own, on its own model."""
        transient = ("_stack", "_linear", "_handles", "process_group")
        kept = {name: x for name, x in vars(self).items() if name not in transient}
        return {**kept, "_attached": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_attached")
        vars(self).update(state, process_group=None)
        self._attach()
        if not attached:
            self.detach()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module is not self.model:
            remedy = "use DistributedDataParallel, not nn.DataParallel"
            raise RuntimeError(f"a replica of the model was called; {remedy}")
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if self.process_group is None:
            self.process_group = getattr(wrapper, "process_group", None)
        outer = self._stack[-1] if self._stack else None
        functional = torch._C._are_functorch_transforms_active()
        plain = torch.is_grad_enabled() and not functional
        if plain and outer is None and self.entered is not None:
            self.entered()
        self._stack.append(outer or (_Pass(self) if plain else None))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        at = self._stack.pop() if self._stack else None
        idle = at is None or at in self._stack or self.recording and not at.uses
        if idle or output is None:
            return None
        value = self._likelihood_of(output)
        if value is None:
            return None
        at.examples = at.rows = len(value)
        if self.fisher in ("empirical", "none"):
            at.expected = 1
        if self.fisher == "none":
            return None
        root = _Root(at, value)
        if value.ndim not in self._axes:  # the loss may have been computed in the model
            value.register_hook(_Late(at, root.output))

        def watched(y: Tensor) -> Tensor:
            return _RootTap.apply(y, root, y is value) if y.requires_grad else y

        mapped = _mapped(output, watched)
        if mapped is output:
            raise ValueError(
                f"the model returned a {type(output).__name__} without a tensor that "
                "can be watched; return a tensor, or a tuple, list, mapping or "
                "dataclass of tensors"
            )
        return mapped

    def _likelihood_of(self, output: Any) -> Tensor | None:
        """The tensor that the likelihood speaks of; ``None`` if it has no graph."""
        if self.output is not None:
            value = self.output(output)
        elif isinstance(output, Tensor):
            value = output
        elif isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
            value = output["logits"]
        else:
            inside = output.values() if isinstance(output, Mapping) else output
            inside = list(inside) if isinstance(inside, Iterable) else [output]
            tensors = [x for x in inside if isinstance(x, Tensor) and x.ndim]
            alive = [x for x in tensors if x.requires_grad]
            value = alive[0] if len(alive) == 1 else None
        choice = self.likelihood == "categorical" and self.fisher in ("mc", "type-2")
        found = isinstance(value, Tensor)
        given = tuple(value.shape) if found else type(output).__name__
        if not found or value.ndim < (2 if choice else 1):
            raise ValueError(
                f"the model returned {given}, and which tensor of shape (N, …) in it "
                f"likelihood={self.likelihood!r} speaks of is not evident; pass "
                "output=, a function from what the model returns to that tensor"
            )
        if choice and value[0].numel() == 1:
            told = f"the model returned {given}, one class, which has no curvature"
            raise ValueError(f"{told}; pass likelihood='gaussian' or 'bernoulli'")
        return value if value.requires_grad and value.numel() else None

    def examine(self, f: Tensor, g: Tensor | None) -> None:
        """Hold the likelihood against ``g``, the user's gradient at ``f``."""
        loose = self.fisher == "empirical" and f.ndim < 3
        if g is None or loose or callable(self.likelihood):
            return
        if f.ndim not in self._axes:
            if not 0 < float(g.to(wide(g.dtype)).abs().sum()) < torch.inf:
                return
            if self.likelihood == "categorical":
                self._axes[f.ndim] = class_axis(f, g, self.class_dim)
            else:
                check_no_classes(self.likelihood, f, g)
                self._axes[f.ndim] = self._axis(f)
        kind = LIKELIHOODS[self.likelihood]
        if self.weighing and kind.weight is not None:
            f, g = (kind.rows(x.to(wide(x.dtype)), self._axis(x)) for x in (f, g))
            self.seen["weight"] = self.seen["weight"] + kind.weight(f, g).sum()
            largest = (g.amax(-1) + g.amin(-1)).sum()
            self.seen["largest"] = self.seen["largest"] + largest

    def rows_of(self, f: Tensor) -> int:
        """At how many places the likelihood has a factor."""
        plain = f.ndim < 2 or callable(self.likelihood)
        return len(f) if plain else f.numel() // f.shape[self._axis(f)]

    def _axis(self, f: Tensor) -> int:
        """Where the outputs of one row lie."""
        last = f.ndim - 1 if self.class_dim is None else self.class_dim % f.ndim
        return self._axes.get(f.ndim, last)

    def cotangents(self, f: Tensor) -> Iterator[Tensor]:
        """Gradients by the output; their outer products sum to an example's curvature.

        Under ``"mc"`` targets are drawn from the model's own output, and each gradient
        is divided by the root of their number. Under ``"type-2"`` there is one for each
        number of an example's output, and the sum is exact.
        """
        dtype, f = f.dtype, f.to(wide(f.dtype))
        if callable(self.likelihood):
            with torch.enable_grad():
                for _ in range(self.samples):
                    leaf = f.detach().requires_grad_()
                    (v,) = torch.autograd.grad(self.likelihood(leaf).sum(), leaf)
                    yield v.div(self.samples**0.5).to(dtype)
            return
        kind, axis = LIKELIHOODS[self.likelihood], self._axis(f)
        moved = f.unsqueeze(1) if f.ndim < 2 else f.movedim(axis, -1)
        z = moved.reshape(len(f), -1, moved.shape[-1])

        def shaped(v: Tensor) -> Tensor:
            v = v.reshape(moved.shape)
            return (v.squeeze(1) if f.ndim < 2 else v.movedim(-1, axis)).to(dtype)

        for _ in range(self.samples if self.fisher == "mc" else 0):
            yield shaped(kind.score(z, self.generator) / self.samples**0.5)
        for place in range(z.shape[1] if self.fisher == "type-2" else 0):
            for c in range(z.shape[2]):
                v = torch.zeros_like(z)
                v[:, place] = kind.root(z[:, place], c)
                yield shaped(v)

    def _current(self) -> _Pass | None:
        return self._stack[-1] if self._stack and self.recording else None

    def _called(
        self, sites: list[Site], module: nn.Module, args: Any, kwargs: Any, y: Tensor
    ) -> Tensor | None:
        at = self._current()
        if at is None or not y.requires_grad:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return _Use(at, module, sites, x).tap(y)

    def _attend(self, sites: list[Site], module: nn.Module, args: Any) -> None:
        """Watch ``F.linear`` while attention runs: it calls its projections so."""
        at, linear = self._current(), F.linear

        def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y = linear(x, weight, bias)
            mine = []
            for site in sites:
                matrix, rows = site.weight, site.features
                if weight is matrix or weight._base is matrix:
                    skipped = weight.storage_offset() - matrix.storage_offset()
                    first = skipped // matrix.stride(0)
                    start, stop = rows.start or 0, rows.stop or len(matrix)
                    if first <= start and stop <= first + len(weight):
                        there = slice(start - first, stop - first)
                        mine.append(site._replace(channels=slice(None), features=there))
            if at is None or not mine or not y.requires_grad:
                return y
            use = _Use(at, module, mine, x)
            use.time_first = True
            return use.tap(y)

        self._linear.append(linear)
        F.linear = watched if at is not None else linear

    def _attended(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._linear:
            F.linear = self._linear.pop()


class _Late:
    """Examines the gradient by an output that no tap stands behind, where it comes by.

    Such is the output of a model that computes its own loss. It holds no part of the
    graph.
    """

    def __init__(self, at: _Pass, output: Tensor) -> None:
        self.at, self.output = at, output

    @torch.no_grad()
    def __call__(self, g: Tensor) -> None:
        capture, output = self.at.capture, self.output
        if output is None or capture.model in _SAMPLING:
            return
        self.output = None
        if output.ndim in capture._axes:
            return
        used = capture._axis(output)
        capture.examine(output, g)
        if (axis := capture._axes.get(output.ndim, used)) != used:
            del capture._axes[output.ndim]
            raise ValueError(
                f"the classes lie on axis {axis} of the outputs of shape "
                f"{tuple(output.shape)}, which shows too late where the model computes "
                f"its own loss; pass class_dim={axis}"
            )
