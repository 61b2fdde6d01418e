# Generated from chapters/23_machinery.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 5e84866d
"""Chapter 23, The machinery."""

__all__ = [
    "KINDS",
    "MAX_GROUPS",
    "Layer",
    "Site",
    "find_layers",
    "kind_of",
    "multiplies",
    "unwrapped",
]


# %% 23_machinery sec-capture 1 a9a687a5
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.nn.utils.stateless import _reparametrize_module


# %% 23_machinery sec-capture 2 36ce7f04
class Layer:
    """One matrix of parameters: a weight, and its bias as one more column.

    Attributes:
        name: Where it is in the model: ``"encoder.0"``, ``"attention.q"``.
        kind: ``"linear"``; ``"conv"``, with the weight flattened to (channels out,
            channels in · window); ``"embedding"``; ``"scale"``, the elementwise weight
            and bias of a norm layer.
        weight: The parameter, if it is trained.
        bias: Its bias, if there is one and it is trained.
        transposed: Whether the matrix is the weight's transpose, as in an embedding.
        shape: (d_out, d_in), the bias counted in d_in. For ``"scale"`` one row for each
            feature and one column for each of weight and bias.
        sizes: The shapes that its parameters had when it was found.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        weight: Parameter | None,
        bias: Parameter | None,
        rows: slice = slice(None),
        bias_rows: slice = slice(None),
        transposed: bool = False,
    ) -> None:
        self.name, self.kind, self.weight, self.bias = name, kind, weight, bias
        self.transposed, self._rows, self._bias_rows = transposed, rows, bias_rows
        self.sizes = [tuple(p.shape) for p in self.parameters]
        columns = [self._columns(p, p.detach()) for p in self.parameters]
        self.shape: tuple[int, int] = len(columns[0]), sum(x.shape[1] for x in columns)

    def __repr__(self) -> str:
        return f"Layer({self.name!r}, {self.kind}, {self.shape[0]}×{self.shape[1]})"

    @property
    def parameters(self) -> list[Parameter]:
        """The trained of weight and bias. A fused matrix belongs to several layers."""
        return [p for p in (self.weight, self.bias) if p is not None]

    def matrix(self) -> Tensor:
        """Weight and bias as a fresh (d_out, d_in) matrix."""
        return torch.cat([self._columns(p, p.detach()) for p in self.parameters], 1)

    def gradient(self) -> Tensor | None:
        """``.grad`` as a fresh (d_out, d_in) matrix.

        Zero where only one of weight and bias has none, ``None`` where both have none.
        """
        given = [(p, p.grad) for p in self.parameters]
        if all(g is None for _, g in given):
            return None
        full = [torch.zeros_like(p) if g is None else g.detach() for p, g in given]
        pairs = zip(self.parameters, full, strict=True)
        return torch.cat([self._columns(p, g) for p, g in pairs], 1)

    def pieces(self, matrix: Tensor) -> list[tuple[Parameter, slice, Tensor]]:
        """How a (d_out, d_in) matrix falls apart: parameter, rows of it, their part."""
        widths = [self._columns(p, p.detach()).shape[1] for p in self.parameters]
        made = []
        for p, part in zip(self.parameters, matrix.split(widths, 1), strict=True):
            rows = self._rows if p is self.weight else self._bias_rows
            part = part.T if self.transposed else part
            made.append((p, rows, part.reshape(p[rows].shape)))
        return made

    def _columns(self, p: Parameter, like: Tensor) -> Tensor:
        """A tensor shaped like ``p`` as columns of the matrix."""
        if p is self.bias or self.kind == "scale":
            rows = self._bias_rows if p is self.bias else self._rows
            return like[rows].reshape(-1, 1)
        return like[self._rows].T if self.transposed else like[self._rows].flatten(1)


# %% 23_machinery sec-capture 3 d652d7b0
#: What is known by its class. A subclass with a ``forward`` of its own is not.
KINDS = {
    "linear": (nn.Linear,),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "embedding": (nn.Embedding,),
    "scale": (
        nn.LayerNorm, nn.RMSNorm, nn.GroupNorm,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    ),
}
#: A convolution of at most this many groups is as many layers; one of more, such as a
#: depthwise one, is none.
MAX_GROUPS = 8


def kind_of(module: nn.Module) -> tuple[str, bool] | None:
    """Which of ``KINDS`` a module is, and whether with its weight transposed."""
    for kind, classes in KINDS.items():
        for cls in classes:
            if isinstance(module, cls) and type(module).forward is cls.forward:
                table = kind == "embedding"
                odd = table and (module.sparse or module.scale_grad_by_freq)
                return None if odd else (kind, table)
    return multiplies(module)


def multiplies(module: nn.Module) -> tuple[str, bool] | None:
    """Try whether a module of unknown class multiplies by its weight and adds its bias.

    Such is the ``Conv1D`` of transformers, a linear layer with its weight transposed.
    """
    own = dict(module.named_parameters())
    weight, bias = own.get("weight"), own.get("bias")
    others = own.keys() - {"weight", "bias"} or list(module.buffers())
    if others or weight is None or weight.ndim != 2 or weight.is_meta:
        return None
    # In place of its own numbers, that may be zero, or symmetric.
    trial = {name: _numbers(*p.shape, like=p) for name, p in own.items()}
    weight, bias = trial["weight"], trial.get("bias")
    aside = torch.random.fork_rng(devices=[])
    with torch.no_grad(), aside, _reparametrize_module(module, trial):
        for transposed in (False, True):
            matrix = weight.T if transposed else weight
            x = _numbers(4, matrix.shape[1], like=weight)
            x = x * x.new_tensor([[1], [-1], [9], [0]])
            try:
                y, wanted = module.forward(x), F.linear(x, matrix, bias)
            except Exception:  # whatever it is, it takes no such input
                continue
            if isinstance(y, Tensor) and y.shape == wanted.shape:
                size = wanted.abs().amax() * torch.finfo(y.dtype).eps * 32
                if (y - wanted).abs().amax() <= size:
                    return "linear", transposed
    return None


def _numbers(*shape: int, like: Tensor) -> Tensor:
    return torch.arange(math.prod(shape), device=like.device).cos().view(shape).to(like)


# %% 23_machinery sec-capture 4 344de86a
class Site(NamedTuple):
    """A layer of a module: its whole weight, input channels and output features."""

    layer: Layer
    weight: Tensor
    channels: slice
    features: slice


class _Found(NamedTuple):
    """A matrix of one module, before layers are made of those that are trained."""

    name: str
    kind: str
    weight: Any
    bias: Any
    rows: tuple[slice, slice]
    channels: slice
    features: slice
    transposed: bool = False

    @property
    def keys(self) -> tuple[Any, Any]:
        return (id(self.weight), str(self.rows[0])), (id(self.bias), str(self.rows[1]))


def _matrices(name: str, module: nn.Module) -> Iterator[_Found]:
    own, every = module._parameters, slice(None)
    if isinstance(module, nn.MultiheadAttention):
        if type(module).forward is not nn.MultiheadAttention.forward:
            return
        d, biases = module.embed_dim, own.get("in_proj_bias")
        for k, part in enumerate(("q", "k", "v")):
            rows = slice(k * d, (k + 1) * d)
            weight, features = own.get("in_proj_weight"), rows
            if weight is None:
                weight, features = own.get(f"{part}_proj_weight"), every
            label = f"{name}.{part}"
            both = (features, rows)
            yield _Found(label, "linear", weight, biases, both, every, features)
        out = module.out_proj._parameters
        pair = out.get("weight"), out.get("bias")
        yield _Found(f"{name}.out_proj", "linear", *pair, (every, every), every, every)
    elif found := kind_of(module):
        kind, transposed = found
        pair = own.get("weight"), own.get("bias")
        groups = getattr(module, "groups", 1)
        for j in range(groups if groups <= MAX_GROUPS else 0):
            rows = channels = every
            if groups > 1:
                rows, channels = (
                    slice(*(total // groups * k for k in (j, j + 1)))
                    for total in (module.out_channels, module.in_channels)
                )
            label = name if groups == 1 else f"{name}.{j}"
            yield _Found(label, kind, *pair, (rows, rows), channels, rows, transposed)


def unwrapped(model: nn.Module) -> nn.Module:
    """What ``DistributedDataParallel`` and ``torch.compile`` wrap."""
    if not isinstance(model, nn.Module):
        told = f"model is a {type(model).__name__}"
        raise TypeError(f"{told}; pass a torch.nn.Module")
    while True:  # either may be around the other
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def find_layers(
    model: nn.Module, trained: set[int] | None = None
) -> tuple[list[Layer], list[tuple[nn.Module, list[Site]]]]:
    """The layers of a model, and its modules with the layers that each holds.

    Modules with the same weight are one layer. Where an embedding shares its weight
    with a linear layer, the linear layer stands for both. A bias that does not go with
    one weight alone is in no layer.

    Args:
        model: The model.
        trained: The ``id`` of each parameter that may be in a layer. ``None``: of all
            that require a gradient.

    Source: appendix "The machinery".
    """
    if trained is None:
        trained = {id(p) for p in model.parameters() if p.requires_grad}
    found, inside = [], set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.add(module.out_proj)
        for x in _matrices(name or type(model).__name__, module):
            real = isinstance(x.weight, Parameter) and not x.weight.is_complex()
            if real and {id(x.weight), id(x.bias)} & trained:
                found.append((module, x._replace(name=x.name.removeprefix("."))))
    taken = {x.keys[0] for _, x in found if x.kind != "embedding"}
    tied = [x for _, x in found if x.kind == "embedding" and x.keys[0] in taken]
    found = [(module, x) for module, x in found if x not in tied]
    partners: dict[Any, set[Any]] = {}
    for _, x in found:
        w, b = x.keys
        partners.setdefault(("weight", w), set()).add(b)
        partners.setdefault(("bias", b), set()).add(w)
    layers: dict[Any, Layer] = {}
    sites: dict[nn.Module, list[Site]] = {}
    for module, x in found:
        w, b = x.keys
        alone = len(partners["weight", w]) == len(partners["bias", b]) == 1
        bias = x.bias if alone and id(x.bias) in trained else None
        weight = x.weight if id(x.weight) in trained else None
        if weight is not None or bias is not None:
            if w not in layers:
                layers[w] = Layer(x.name, x.kind, weight, bias, *x.rows, x.transposed)
            site = Site(layers[w], x.weight, x.channels, x.features)
            sites.setdefault(module, []).append(site)
    return list(layers.values()), list(sites.items())
