# Generated from chapters/14_mup.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head dcc2386e
"""Chapter 14, Maximal update parametrization."""

__all__ = [
    "LENGTHS",
    "Coordinates",
    "Parametrized",
    "Part",
    "Shape",
    "Transfer",
    "base_shapes",
    "coordinate_check",
    "initial_factor",
    "multiplier",
    "parametrize",
    "remove_hooks",
    "role_of",
    "transfer_check",
]


# %% 14_mup sec-wp-number 1 aa035e44
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from guided_descent.core import (
    ALGORITHMS,
    KEYS,
    OPTIONS,
    Optimizer,
    check_choice,
    check_range,
)
from guided_descent.layerwise import LayerOptimizer
from guided_descent.muon import SCALES
from guided_descent.routing import TRANSPOSED, Groups

#: An outputs × inputs shape, as numbers.
Shape = tuple[float, float]


# %% 14_mup sec-wp-number 2 6686f2a3
#: s: the spectral norm of an update of an o×i matrix, over the learning rate.
LENGTHS: dict[str, Callable[[float, float], float]] = {
    "gradient": lambda o, i: (i / o) ** 0.5,  # SGD
    "unit": lambda o, i: 1.0,  # the gradient over its norm
    "sign": lambda o, i: (o * i) ** 0.5,  # entries near one, rank near one
    "rotated": lambda o, i: o**0.5 + i**0.5,  # entries near one, of full rank
    "curvature": lambda o, i: (o / i) ** 0.5,  # over its Kronecker factors
}
LENGTHS |= {f"polar, {name}": scale for name, scale in SCALES.items()}


def multiplier(kind: str, shape: Shape, base: Shape) -> float:
    """What the learning rate of a matrix is multiplied by.

    Args:
        kind: The optimizer's, a name of ``LENGTHS``.
        shape: Outputs and inputs, (o, i).
        base: The same in the model whose learning rate is known.

    Source: Yang et al. (2023), arXiv 2310.17813. Chapter 14, eq-wp-mult.
    """
    rates = [(o / i) ** 0.5 / LENGTHS[kind](o, i) for o, i in (shape, base)]
    return _neat(rates[0] / rates[1])


def _neat(x: float) -> float:
    """Without round-off, so that equal multipliers are one group."""
    return float(f"{x:.12g}")


# %% 14_mup sec-wp-number 3 56ee470f
#: The kind of an optimizer, by its name in small letters.
_KINDS = dict.fromkeys(
    ("adam", "adamw", "nadam", "ademamix", "rmsprop", "adagrad")
    + ("lion", "signum", "signsgd"),
    "sign",
)
_KINDS |= dict.fromkeys(("sgd", "gradientdescent"), "gradient")
_KINDS |= {"normalizedsgd": "unit", "soap": "rotated"}
_KINDS |= {"kfac": "curvature", "ekfac": "curvature"}
#: Of Shampoo, by its ``grafting``.
_GRAFTS = {"adam": "sign", "sgd": "gradient", None: "unit"}
#: Whose ε is compared with entries of a gradient; whose, with singular values.
_BY_ENTRY = ("adam", "adamw", "nadam", "ademamix", "rmsprop", "adagrad")
_BY_SIZE = ("soap",)
#: What takes matrices alone: all else goes by AdamW.
_MATRICES = ("muon", "scion")


def _kind(name: str, hyper: Mapping[str, Any]) -> str:
    """The kind of an optimizer, a name of ``LENGTHS``.

    Args:
        name: The optimizer's, in small letters.
        hyper: Its hyperparameters, those left out by default included.

    Raises:
        ValueError: There is no rule for it.
    """
    told = f"there is no rule for {name!r}"
    if name == "muon" and hyper.get("constraint") == "sphere":
        raise ValueError(f"{told} on a sphere: a step is relative to the weight")
    if name == "scion" and hyper["norm"] == "sign":
        return "polar, scion"  # entries of 1/i: the same length
    if name in _MATRICES:
        return f"polar, {hyper['scale']}"
    if name == "shampoo":
        if hyper["grafting"] is None and hyper["exponent"] is not None:
            told = f"{told} with exponent= and no graft"
            raise ValueError(f"{told}; pass grafting='adam'")
        return _GRAFTS[hyper["grafting"]]
    if name == "normalizedsgd" and hyper.get("scope") != "layer":
        raise ValueError(f"{told} over all tensors at once; pass scope='layer'")
    if name not in _KINDS:
        known = ", ".join(sorted([*_KINDS, *_MATRICES, "shampoo"]))
        remedy = f"measure its update as chapter 14 does, or use {known}"
        raise ValueError(f"{told}; {remedy}")
    return _KINDS[name]


def _resolve(optimizer: Any) -> tuple[str, Any]:
    """The name of an optimizer, and its class where the package has it."""
    if isinstance(optimizer, type):
        name = optimizer.__name__.lower()
        if name in _MATRICES and not issubclass(optimizer, Optimizer):
            told = f"{optimizer.__module__}.{optimizer.__name__} has scales of its own"
            raise ValueError(f"{told}; pass guided_descent's")
        return name, optimizer
    if not isinstance(optimizer, str):
        told = f"optimizer={optimizer!r} is a {type(optimizer).__name__}"
        raise TypeError(f"{told}; pass a class, or its name, before it is built")
    package = import_module("guided_descent")
    names = {x.lower(): x for x in package.__all__}
    place = ALGORITHMS.get(optimizer.lower())
    if place:
        module, _, word = place.partition(".")
        return optimizer.lower(), getattr(
            import_module(f"guided_descent.{module}"), word
        )
    return optimizer.lower(), getattr(package, names.get(optimizer.lower(), ""), None)


def _defaults(cls: Any) -> dict[str, Any]:
    """The hyperparameters of a class, as it is built without any."""
    if cls is None:
        return {}
    given = signature(cls.__init__).parameters.values()
    return {x.name: x.default for x in given if x.default is not x.empty}


# %% 14_mup sec-wp-init 1 7f13fba0
class Part(NamedTuple):
    """What a parameter is to width, and what it gets for it.

    ``lr``, ``init``, ``decay`` and ``eps`` are factors; ``damping`` too, under K-FAC.
    """

    name: str
    shape: tuple[int, ...]
    base: tuple[int, ...]
    role: str
    ratio: tuple[float, float]
    method: str
    lr: float
    init: float
    decay: float
    eps: float
    reason: str


def role_of(r_o: float, r_i: float) -> str:
    """A matrix's role, by which of its sides grow with width."""
    return {
        (False, False): "fixed", (True, False): "input",
        (False, True): "output", (True, True): "hidden",
    }[r_o != 1, r_i != 1]


def initial_factor(shape: Shape, base: Shape) -> float:
    """What the initial weights are multiplied by, if they are made like 1/√inputs.

    Source: chapter 14, eq-wp-init.
    """
    (o, i), (o0, i0) = shape, base
    if i == i0:
        return 1.0
    if o == o0:
        return _neat((i0 / i) ** 0.5)
    return _neat(min(1.0, o / i) ** 0.5 / min(1.0, o0 / i0) ** 0.5)


# %% 14_mup sec-wp-parametrize 1 581c80aa
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")
_WRAPPERS += ("_checkpoint_wrapped_module",)
_FORWARD = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)
_LOOKUP = (nn.Embedding, nn.EmbeddingBag)


def _clean(name: str) -> str:
    """A parameter's name without what DDP, compile or a checkpoint puts into it."""
    return ".".join(x for x in name.split(".") if x not in _WRAPPERS)


def base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters by name: a base, in a form that can be kept."""
    return {_clean(name): tuple(p.shape) for name, p in model.named_parameters()}


def _layout(owner: nn.Module, group: Mapping[str, Any]) -> str | None:
    """Whether a module keeps outputs × inputs, "oi", or the other way; else nothing."""
    turned = isinstance(owner, (*_LOOKUP, nn.modules.conv._ConvTransposeNd))
    if turned or type(owner).__name__ in TRANSPOSED or group.get("transposed"):
        return "io"
    return "oi" if isinstance(owner, _FORWARD) or group.get("batched") else None


def _sides(shape: Sequence[float], layout: str, group: Mapping[str, Any]) -> Shape:
    """Outputs and inputs of a tensor: of one of its matrices, if it holds several."""
    shape = shape[1:] if group.get("batched") else shape
    if len(shape) < 2:
        return float(math.prod(shape)), 1.0
    if layout == "oi":
        return float(shape[0]), float(math.prod(shape[1:]))
    if layout == "added":  # the last dimension is that of the features
        return float(shape[-1]), float(math.prod(shape[:-1]))
    return float(shape[1] * math.prod(shape[2:])), float(shape[0])


def _parts(group: Mapping[str, Any], rows: float) -> float:
    """Which fraction of a matrix's rows is a matrix of its own."""
    if sizes := group.get("split_sizes"):
        return sizes[0] / rows
    return 1 / group.get("num_heads", 1)


# %% 14_mup sec-wp-parametrize 2 9917dc32
class Parametrized(Groups):
    """Parameter groups with multipliers; printed, a table of who got which, and why."""

    parts: tuple[Part, ...] = ()

    def __repr__(self) -> str:
        rows = [("parameter", "shape", "base", "role", "by", "lr ×", "init ×", "why")]
        for x in self.parts:
            factors = f"{x.lr:.4g}", f"{x.init:.4g}"
            sides = ["×".join(map(str, shape)) or "1" for shape in (x.shape, x.base)]
            rows.append((x.name, *sides, x.role, x.method, *factors, x.reason))
        width = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, width)).rstrip() for row in rows]
        return "\n".join(lines)

    def bind(self, model: nn.Module) -> "Parametrized":
        """The same groups, over the parameters of these names in another model.

        After ``fully_shard(model)``, a wrapper or a copy the parameters are others.

        Raises:
            ValueError: A name is missing, or has another shape.
        """
        found = {_clean(name): p for name, p in model.named_parameters()}
        known, groups = {x.name: x.shape for x in self.parts}, []
        for group in self:
            names = [name for name, _ in group["params"]]
            for name in names:
                if name not in found or tuple(found[name].shape) != known[name]:
                    told = f"the model has no parameter {name!r} of {known[name]}"
                    raise ValueError(f"{told}; pass the model that was parametrized")
            groups.append({**group, "params": [(name, found[name]) for name in names]})
        bound = Parametrized(groups)
        bound.parts = self.parts
        return bound


class _Shrink:
    """A hook before a tied head: its input times a number."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] * self.factor, *args[1:]), kwargs
        return args, {**kwargs, "input": kwargs["input"] * self.factor}


def remove_hooks(model: nn.Module) -> None:
    """Take out what ``parametrize`` put before tied heads."""
    for module in model.modules():
        for key, hook in [*module._forward_pre_hooks.items()]:
            if isinstance(hook, _Shrink):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


# %% 14_mup sec-wp-parametrize 3 47662070
class _Rules(NamedTuple):
    """How one optimizer's hyperparameters follow from shapes."""

    optimizer: Any
    name: str
    kind: str
    hyper: dict[str, Any]  # of a group, before any factor

    @classmethod
    def of(cls, optimizer: Any, given: Mapping[str, Any]) -> "_Rules":
        name, made = _resolve(optimizer)
        if made is None and "lr" not in given:
            _kind(name, given)  # an unknown name is the first thing to say
            told = f"the package has no {name!r} whose learning rate could be scaled"
            raise ValueError(f"{told}: pass its class, or lr=")
        defaults = _defaults(made)
        own = signature(made.__init__).parameters if made else given
        for word in given if made else ():
            if word not in own or word in OPTIONS:
                told = f"{made.__name__} has no hyperparameter {word!r} of a group"
                raise TypeError(f"{told}; pass it to {made.__name__} itself")
        hyper = {**defaults, **given}
        if name in ("kfac", "ekfac"):
            if hyper.get("relative_damping"):
                told = "relative_damping=True does not transfer"
                raise ValueError(f"{told}: its best lr falls with width; pass False")
            damping = hyper.get("damping", 0.03)
            given = {"kl_clip": math.inf, "damping": damping, **given}
            given.pop("relative_damping", None)
        kept = {"lr", "weight_decay", "eps", "scale", "norm", "radius", "grafting"}
        kept = {x: v for x, v in defaults.items() if x in kept}
        if name not in _BY_ENTRY + _BY_SIZE and "eps" not in given:
            kept.pop("eps", None)
        rules = cls(optimizer, name, _kind(name, hyper), {**kept, **given})
        coupled = name in ("adam", "nadam", "rmsprop", "adagrad")
        decay = rules.hyper.get("weight_decay")
        if coupled and decay and not hyper.get("decoupled_weight_decay"):
            told = f"weight_decay={decay} is a penalty inside of {name!r}"
            raise ValueError(f"{told}, for which there is no rule; use 'adamw'")
        return rules

    def group(self, lr: float, decay: float, eps: float) -> dict[str, Any]:
        """The hyperparameters with their factors."""
        made = dict(self.hyper)
        length = "radius" if self.name == "scion" else "lr"
        for word, factor in ((length, lr), ("weight_decay", decay), ("eps", eps)):
            if made.get(word) is not None and factor != 1:
                made[word] = made[word] * factor
        if "damping" in made:
            made["damping"] = made["damping"] * eps
        return made

    def factors(self, shape: Shape, base: Shape, vector: bool) -> tuple[float, ...]:
        """Of the learning rate, of decay, and of ε (K-FAC: of damping)."""
        kind = self.kind
        if vector and self.name in ("soap", "shampoo"):
            kind = "sign"  # they step vectors as Adam does
        lr = multiplier(kind, shape, base)
        (r_o, r_i) = (a / b for a, b in zip(shape, base, strict=True))
        eps = 1.0
        if self.name in _BY_ENTRY or vector and self.name == "soap":
            eps = _neat(1 / r_o)
        elif self.name in _BY_SIZE:
            eps = _neat((r_i / r_o) ** 0.5)
        elif kind == "curvature":
            eps = _neat(r_i / r_o)
        decay = 1.0 if self.name == "scion" else _neat(1 / lr)
        return lr, decay, eps


# %% 14_mup sec-wp-parametrize 4 3ff93be0
def _owners(model: nn.Module) -> dict[Tensor, list[nn.Module]]:
    """The modules that hold each parameter."""
    found: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                found.setdefault(p, []).append(module)
    return found


def _shapes_of(base: Any, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The base's shapes, after holding its names against the model's."""
    own = base_shapes(model)
    if isinstance(base, nn.Module):
        base = base_shapes(base)
    elif not isinstance(base, Mapping):
        told = f"base is a {type(base).__name__}"
        remedy = "pass the model at the base width, or its base_shapes()"
        raise TypeError(f"{told}; {remedy}")
    base = {_clean(name): tuple(shape) for name, shape in base.items()}
    for here, there, whose in ((own, base, "base"), (base, own, "model")):
        for name in here:
            if name not in there:
                told = f"the {whose} has no parameter {name!r}, as the other has"
                raise ValueError(f"{told}; build both by one function of the width")
    for name, shape in own.items():
        if len(shape) != len(base[name]):
            told = f"parameter {name!r} is {shape}, and {base[name]} in the base"
            raise ValueError(f"{told}; build both by one function of the width")
    return base


def _check_fresh(model: nn.Module) -> None:
    """Refuse weights that have been rescaled, or that do not exist."""
    for module in model.modules():
        if "_mup" in vars(module):
            told = "the weights of this model have been rescaled already"
            raise ValueError(f"{told}; pass rescale=False for groups alone")
    for name, p in model.named_parameters():
        if p.is_meta:
            told = f"parameter {name!r} is on the meta device: it has no initial values"
            raise ValueError(f"{told}; initialise it first, or pass rescale=False")


def _groups(
    model: nn.Module, owners: Any, main: _Rules, groups: Any, rest: Any
) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Each trainable parameter, with its name and what its group says."""
    names = {p: _clean(name) for name, p in model.named_parameters()}
    if groups is None:
        vectors = {"algorithm": "adamw", **(rest or {})}
        made = []
        for p, name in names.items():
            apart = p.dim() < 2 or any(isinstance(x, _LOOKUP) for x in owners[p])
            if p.requires_grad:
                group = vectors if apart and main.name in _MATRICES else {}
                made.append((group, name, p))
        return made
    if rest is not None:
        raise ValueError("rest= is for groups made here; put it into your groups=")
    made = []
    for group in groups:
        keys = {word: x for word, x in group.items() if word != "params"}
        params = group["params"]
        for x in [params] if isinstance(params, Tensor) else params:
            p = x[1] if isinstance(x, tuple) else x
            if p not in names:
                told = f"groups= hold a tensor of {tuple(p.shape)}, not the model's"
                raise ValueError(f"{told}; make them from this model")
            made.append((keys, names[p], p))
    return made


def _check_uniform(parts: list[Part]) -> None:
    """Refuse widths that grow by different ratios: a slip, more often than a plan."""
    seen = [(r, x) for x in parts for r in x.ratio if r != 1]
    for ratio, part in seen:
        if abs(ratio - seen[0][0]) > 1e-9 * ratio:
            said = [f"{x.name!r} by {r:g}" for r, x in (seen[0], (ratio, part))]
            told = f"sides grow by different ratios, {said[0]} and {said[1]}"
            raise ValueError(f"{told}; mend the base, or pass uniform=False")


def _tied(p: Tensor, owners: Any) -> list[nn.Module]:
    """The heads that share an embedding's table."""
    lookup = [isinstance(x, _LOOKUP) for x in owners[p]]
    heads = [x for x, found in zip(owners[p], lookup, strict=True) if not found]
    return heads if any(lookup) else []


# %% 14_mup sec-wp-parametrize 5 fafaa3cb
def _plan(
    group: dict[str, Any],
    name: str,
    p: Tensor,
    owners: Any,
    before: dict[str, tuple[int, ...]],
    main: _Rules,
    layout: Mapping[str, str],
    given: dict[str, Any],
) -> tuple[Part, dict[str, Any]]:
    """What a parameter gets, and its group without parameters."""
    rules, keys = main, {x: v for x, v in group.items() if x in KEYS}
    own = {x: v for x, v in group.items() if x not in KEYS}
    if "algorithm" in group:
        rules = _Rules.of(group["algorithm"], own)
    elif own:
        rules = _Rules.of(main.optimizer, {**given, **own})
    shape, base = tuple(p.shape), before[name]
    turn = _turn(name, p, owners[p][0], base, layout, group)
    (o, i), (o0, i0) = (_sides(x, turn, group) for x in (shape, base))
    ratio = _neat(o / o0), _neat(i / i0)
    role, why = role_of(*ratio), f"outputs × {ratio[0]:g}, inputs × {ratio[1]:g}"
    vector = p.dim() < 2
    part = _parts(group, o)
    whole = (o * part, i), (o0 * part, i0)
    init = 1.0 if vector else initial_factor((o, i), (o0, i0))
    if rules.kind == "curvature" and vector:
        weight = getattr(owners[p][0], "weight", None)
        if weight is None or weight.dim() < 2:
            told = f"there is no rule for {name!r} under {rules.name!r}: no factors"
            raise ValueError(f"{told}; put it into a group with algorithm='adamw'")
        place = name.rpartition(".")[0]
        key = f"{place}.weight" if place else "weight"
        whole = (_sides(weight.shape, "oi", {}), _sides(before[key], "oi", {}))
        why += ", with its weight"
    lr, decay, eps = rules.factors(*whole, vector)
    if vector:
        role = "vector" if role == "input" else role
    elif isinstance(owners[p][0], _LOOKUP):
        why += ", looked up"
    if _tied(p, owners) and base[-1] != shape[-1]:
        why += f"; tied: its head's input × {base[-1] / shape[-1]:.4g}"
    row = (name, shape, base, role, ratio, rules.name, lr, init, decay, eps, why)
    return Part(*row), {**keys, **rules.group(lr, decay, eps)}


def _turn(
    name: str, p: Tensor, owner: nn.Module, base: Any, layout: Any, group: Any
) -> str:
    """How a parameter is laid out, or an error if that cannot be told."""
    for pattern, word in layout.items():
        if fnmatch(name, pattern):
            check_choice("layout", word, ("oi", "io", "added"))
            return word
    if p.dim() < 2:
        return "oi"
    if found := _layout(owner, group):
        return found
    grown = [a != b for a, b in zip(p.shape, base, strict=True)]
    if any(grown) and not (len(grown) == 2 and all(grown)):
        told = f"which sides of {name!r}, {tuple(p.shape)}, are inputs cannot be told"
        remedy = "'oi', 'io' or 'added' (features last, such as positions)"
        raise ValueError(f"{told}; pass layout={{{name!r}: …}} with {remedy}")
    return "oi"


@torch.no_grad()
def _apply(
    model: nn.Module, owners: Any, groups: Parametrized, inits: dict[Tensor, float]
) -> None:
    """Rescale initial weights, hook tied heads, and say so on the modules."""
    for p, factor in inits.items():
        if factor != 1:
            p.mul_(factor)
    known = {x.name: x for x in groups.parts}
    for name, p in model.named_parameters():
        part = known.get(_clean(name))
        for head in _tied(p, owners) if part else ():
            hooks = head._forward_pre_hooks.values()
            hooked = any(isinstance(x, _Shrink) for x in hooks)
            if not hooked and part.base[-1] != part.shape[-1]:
                factor = part.base[-1] / part.shape[-1]
                head.register_forward_pre_hook(_Shrink(factor), with_kwargs=True)
    for module in model.modules() if inits else ():
        vars(module)["_mup"] = True


# %% 14_mup sec-wp-parametrize 6 64883938
def parametrize(
    model: nn.Module,
    base: nn.Module | Mapping[str, Sequence[int]],
    optimizer: Any = "adamw",
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    eps: float | None = None,
    groups: Iterable[dict[str, Any]] | None = None,
    rest: dict[str, Any] | None = None,
    layout: Mapping[str, str] | None = None,
    uniform: bool = True,
    rescale: bool = True,
    verbose: bool = False,
    **hyper: Any,
) -> Parametrized:
    """Make a learning rate that was found at one width hold at another.

    ::

        lr ← lr · √(o/i)/s(o,i) / (√(o₀/i₀)/s(o₀,i₀))     for each o×i matrix
        weight_decay ← weight_decay / that;    ε ← ε · o₀/o    (Adam and its like)
        initial weights of the output layer ← · √(i₀/i)

    and a tied head's input is divided by its width ratio, if the head is a module
    that shares the table (of ``F.linear(x, table)`` nothing is known: divide there
    yourself). No other multiplier is left in the forward pass. Roles come from shapes
    and the kinds of modules, so call it before ``fully_shard`` and ``bind`` the
    groups after, or call it on the sharded model. Save and load as ever: make the
    model, parametrize it, load its weights.

    Args:
        model: With fresh weights, made like 1/√inputs, as torch makes them, and not
            with one deviation at every width, such as an ``initializer_range``.
            They are changed in place, once.
        base: The same model at the width for which the learning rate is known:
            only shapes are read, so it may be on the meta device; or what
            ``base_shapes`` gives for it.
        optimizer: A class, or its name. It settles s, with ``hyper``.
        lr: Step size in the base, to be given here: the groups carry it times their
            multipliers, so an lr= of the optimizer built on them is without effect,
            and a loop that writes one lr into all groups undoes them (schedulers
            are fine). ``None``: the optimizer's default.
        weight_decay, eps: In the base, given here as lr is; by default the optimizer's.
        groups: What to scale, such as ``param_groups(model)``, with lists of (name,
            parameter). ``None``: all, and by AdamW what Muon and Scion cannot
            take, or should not: vectors and embeddings. For Muon pass
            ``param_groups(model)``, which also splits fused projections and leaves
            the output layer to AdamW.
        rest: What those groups hold, such as ``{"lr": 3e-3}`` in the base.
        layout: For parameters of a module's own, by pattern of names: ``"oi"``,
            outputs × inputs; ``"io"``, inputs × outputs; ``"added"``, features
            in the last dimension, such as positions.
        uniform: Refuse sides that grow by different ratios. Default ``True``.
        rescale: Change initial weights. ``False`` for a second optimizer of a
            model that has been parametrized. Default ``True``.
        verbose: Print the table.
        **hyper: Hyperparameters for every group; ``scale``, ``norm``, ``grafting``
            and ``damping`` (absolute, in the base) bear on the rule.

    Returns:
        Groups for the optimizer; printed, a table with reasons.

    Raises:
        ValueError: A parameter that the base lacks, or in another number of
            dimensions; ratios that differ; a layout that cannot be told; no rule
            for the optimizer; weights that have been rescaled already, or that
            do not exist yet. Nothing has changed then.
        TypeError: A hyperparameter that the optimizer does not have.

    Source: Yang et al. (2022), arXiv 2203.03466; (2023), arXiv 2310.17813.
    Chapter 14, eq-wp-mult and eq-wp-init.
    """
    given = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
    given = {name: x for name, x in given.items() if x is not None} | hyper
    for name in ("lr", "weight_decay", "eps"):
        if name in given:
            check_range(name, given[name], "[0, inf)")
    main = _Rules.of(optimizer, given)
    owners = _owners(model)
    before = _shapes_of(base, model)
    if rescale:
        _check_fresh(model)
    chosen = _groups(model, owners, main, groups, rest)
    plans, inits, made = [], {}, {}
    for group, name, p in chosen:
        part, keys = _plan(group, name, p, owners, before, main, layout or {}, given)
        plans.append(part)
        inits[p] = part.init
        made.setdefault(repr(keys), {"params": [], **keys})["params"].append((name, p))
    if uniform:
        _check_uniform(plans)
    for name, p in model.named_parameters():
        if p not in inits:
            name, shape = _clean(name), tuple(p.shape)
            why = "in no group" if p.requires_grad else "frozen: left as it is"
            row = (name, shape, before[name], "-", (1.0, 1.0), "-", 1.0, 1.0, 1.0, 1.0)
            plans.append(Part(*row, why))
    done = Parametrized(made.values())
    done.parts = tuple(plans)
    _apply(model, owners, done, inits if rescale else {})
    if verbose:
        print(done)
    return done


# %% 14_mup sec-wp-coordinates 1 ab7ec760
def _run(
    build: Callable[[int], nn.Module],
    width: int,
    base: int | None,
    optimizer: type,
    seed: int,
    options: dict[str, Any],
) -> tuple[nn.Module, Optimizer]:
    """A model and its optimizer; without a base, as if it were its own."""
    torch.manual_seed(seed)
    optimizer = _resolve(optimizer)[1] or optimizer
    model = build(width)
    before = model if base is None else _apart(build, base)
    keys = {name: x for name, x in options.items() if name in OPTIONS}
    rest = {name: x for name, x in options.items() if name not in OPTIONS}
    groups = parametrize(model, before, optimizer, **rest)
    if issubclass(optimizer, LayerOptimizer):
        return model, optimizer(model, params=groups, **keys)
    return model, optimizer(groups, **keys)


def _apart(build: Callable[[int], nn.Module], width: int) -> dict[str, tuple[int, ...]]:
    """The shapes at a width, without a trace in the random numbers."""
    with torch.random.fork_rng(devices=[]):
        return base_shapes(build(width))


def _ask(optimizer: Any, model: nn.Module, loss: Any, batch: Any) -> float:
    """One step; the loss before it."""
    optimizer.zero_grad()
    value = loss(model, batch)
    value.backward()
    optimizer.step()
    return float(value.detach())


def _next(stream: Any, seed: int, steps: int) -> Any:
    for batch in stream:
        return batch
    told = f"batches({seed}) gave fewer than steps={steps}"
    raise ValueError(f"{told}; let it give more, or pass fewer steps")


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """Of the best line, along the last axis."""
    x = x - x.mean()
    return ((y - y.mean(-1, keepdim=True)) * x).sum(-1) / x.square().sum()


# %% 14_mup sec-wp-coordinates 2 87212d6b
class Coordinates(NamedTuple):
    """How much each layer's output has changed since the start.

    ``changes``: root mean squares, (steps, layers, widths), the geometric mean over
    seeds.
    """

    names: list[str]
    widths: list[int]
    changes: Tensor

    @property
    def slopes(self) -> Tensor:
        """Powers of the width, (steps, layers): near zero where a layer is stable."""
        widths = torch.tensor(self.widths, dtype=self.changes.dtype).log2()
        return _slope(widths, self.changes.log2())

    def __repr__(self) -> str:
        head = f"{'power of width after':>22}" + "".join(
            f"{t + 1:>7}" for t in range(len(self.changes))
        )
        rows = [
            f"{name:>22}" + "".join(f"{x:7.2f}" for x in column)
            for name, column in zip(self.names, self.slopes.T.tolist(), strict=True)
        ]
        return "\n".join([head, *rows])

    def plot(self, step: int = -1, ax: Any = None) -> Any:
        """Changes against width, a line for each layer; returns the axes."""
        ax = _axes(ax)
        for name, line in zip(self.names, self.changes[step], strict=True):
            ax.loglog(self.widths, line, marker="o", base=2, label=name)
        ax.set(xlabel="width", ylabel="change of output")
        return ax


def coordinate_check(
    build: Callable[[int], nn.Module],
    widths: Sequence[int],
    optimizer: type,
    *,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Callable[[int], Iterable[Any]],
    probe: Any,
    base: int | None = None,
    steps: int = 6,
    seeds: Iterable[int] = range(3),
    **options: Any,
) -> Coordinates:
    """Does a step change each layer's output equally at every width?

    Args:
        build: The model at a width.
        widths: At least two.
        optimizer: A class.
        loss: Of a model and a batch.
        batches: For a seed, at least as many as there are steps.
        probe: What the model is called with, to look at its layers' outputs: a
            tensor, a tuple, or a dictionary of keywords.
        base: The base width. ``None``: no multipliers.
        steps: How many, at least one. Look at several.
        seeds: Of weights and batches.
        **options: For ``parametrize``, and ``Options``.

    Source: Yang et al. (2022), arXiv 2203.03466, D.1. Chapter 14.
    """
    _check_widths(widths)
    check_range("steps", steps, "[1, inf) int")
    changes, names = [], []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            found = []
            for width in widths:
                model, tool = _run(build, width, base, optimizer, seed, options)
                before, stream, rows = _outputs(model, probe), iter(batches(seed)), []
                for _ in range(steps):
                    _ask(tool, model, loss, _next(stream, seed, steps))
                    after = _outputs(model, probe)
                    moved = [(after[n] - x).square().mean() for n, x in before.items()]
                    rows.append(torch.stack(moved).sqrt())
                names = [*before]
                found.append(torch.stack(rows))
            changes.append(torch.stack(found, -1))
    mean = torch.stack(changes).cpu().double().log().mean(0).exp()
    return Coordinates(names, [*widths], mean)


@torch.no_grad()
def _outputs(model: nn.Module, probe: Any) -> dict[str, Tensor]:
    """What comes out of every module that has weights of its own, by name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    own = [(n, x) for n, x in model.named_modules() if [*x.parameters(recurse=False)]]
    handles = [x.register_forward_hook(keep(name or "model")) for name, x in own]
    try:
        with torch.random.fork_rng(devices=[]):  # dropout: the same mask each time
            torch.manual_seed(0)
            if isinstance(probe, dict):
                model(**probe)
            else:
                model(*(probe if isinstance(probe, tuple) else (probe,)))
    finally:
        for handle in handles:
            handle.remove()
    return {name: x.detach().clone() for name, x in found.items()}


def _check_widths(widths: Sequence[int]) -> None:
    if len(widths) < 2:
        raise ValueError(f"widths={list(widths)} shows no trend; pass at least two")


def _axes(ax: Any) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("plot() needs matplotlib: pip install matplotlib") from None
    return ax or pyplot.subplots()[1]


# %% 14_mup sec-wp-transfer 1 dedaaa29
class Transfer(NamedTuple):
    """Losses over learning rates and widths.

    ``losses``: (widths, rates, seeds), infinite where training diverged.
    """

    widths: list[int]
    lrs: list[float]
    losses: Tensor

    @property
    def curves(self) -> Tensor:
        """Geometric means over seeds, (widths, rates)."""
        return self.losses.log().mean(-1).exp()

    @property
    def best(self) -> Tensor:
        """log₂ of the best rate, (widths, seeds): between grid points, by parabola."""
        return torch.stack([
            torch.stack([_lowest(self.lrs, line) for line in losses.T])
            for losses in self.losses
        ])

    @property
    def drift(self) -> Tensor:
        """Octaves by which the best rate moves with each doubling, by seed."""
        widths = torch.tensor(self.widths, dtype=self.losses.dtype).log2()
        return _slope(widths, self.best.T)

    @property
    def interior(self) -> bool:
        """Whether every mean curve has its lowest point inside the grid."""
        lowest = self.curves.argmin(-1)
        return bool(((lowest > 0) & (lowest < len(self.lrs) - 1)).all())

    def __repr__(self) -> str:
        rows = [f"{'width':>6}  {'best log2 lr':>12}  {'loss there':>10}"]
        lowest = self.curves.amin(-1)
        for width, best, loss in zip(self.widths, self.best, lowest, strict=True):
            rows.append(f"{width:>6}  {best.mean():>12.2f}  {loss:>10.4f}")
        rows.append(f"drift: {self.drift.mean():+.2f} octaves a doubling")
        if not self.interior:
            rows.append("a best rate lies at the edge of the grid: widen it")
        return "\n".join(rows)

    def plot(self, ax: Any = None) -> Any:
        """Mean loss against log₂ of the rate, a line for each width; the axes."""
        ax, rates = _axes(ax), [math.log2(lr) for lr in self.lrs]
        for width, line in zip(self.widths, self.curves, strict=True):
            ax.semilogy(rates, line, marker=".", label=f"width {width}")
        ax.set(xlabel="log2 of the learning rate", ylabel="loss")
        return ax


def _lowest(lrs: list[float], losses: Tensor) -> Tensor:
    """log₂ of the rate at the lowest point of the parabola through the lowest three."""
    rates = torch.tensor(lrs, dtype=losses.dtype).log2()
    k = int(losses.argmin())
    if not 0 < k < len(lrs) - 1 or losses[k - 1 : k + 2].isinf().any():
        return rates[k]
    (a, b, c), (x, y, z) = rates[k - 1 : k + 2], losses[k - 1 : k + 2].log()
    left, right = (y - x) / (b - a), (z - y) / (c - b)
    bend = (right - left) / (c - a)
    return rates[k] if bend <= 0 else (a + b) / 2 - left / (2 * bend)


def transfer_check(
    build: Callable[[int], nn.Module],
    widths: Sequence[int],
    optimizer: type,
    *,
    lrs: Sequence[float],
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Callable[[int], Iterable[Any]],
    evaluate: Callable[[nn.Module], Any] | None = None,
    base: int | None = None,
    steps: int = 60,
    seeds: Iterable[int] = range(3),
    schedule: Callable[[float], float] = lambda s: 1 - s,
    **options: Any,
) -> Transfer:
    """Is the best learning rate the same at every width? Trains to find out.

    Args:
        build, widths, optimizer, loss, batches, base, seeds, options: As for
            ``coordinate_check``.
        lrs: Rates, in rising order; at least three.
        evaluate: A loss of a trained model (in training mode): positive, less is
            better. ``None``: the mean loss over the last fifth of the steps.
        steps: How many, at least five.
        schedule: From the fraction of steps done to a factor of the rate. By
            default linear to zero.

    Source: Yang et al. (2022), arXiv 2203.03466. Chapter 14.
    """
    _check_widths(widths)
    check_range("steps", steps, "[5, inf) int")
    if len(lrs) < 3 or sorted(lrs) != list(lrs):
        told = f"lrs={list(lrs)} is no rising grid of at least three"
        raise ValueError(f"{told}; pass one")
    runs = [(width, lr, seed) for width in widths for lr in lrs for seed in seeds]
    losses = []
    with torch.random.fork_rng(devices=[]):
        for width, lr, seed in runs:
            given = {**options, "lr": lr}
            model, tool = _run(build, width, base, optimizer, seed, given)
            decay = LambdaLR(tool, lambda t: schedule(t / steps))
            stream, seen = iter(batches(seed)), []
            for _ in range(steps):
                seen.append(_ask(tool, model, loss, _next(stream, seed, steps)))
                decay.step()
                if not math.isfinite(seen[-1]):
                    break
            with torch.no_grad():
                last = seen[-max(1, steps // 5) :]
                score = float(evaluate(model)) if evaluate else sum(last) / len(last)
            if score <= 0:
                told = f"a trained model has the score {score:.4g}, not above 0"
                remedy = "let evaluate give a positive loss, less is better"
                raise ValueError(f"{told}; {remedy}")
            losses.append(score if math.isfinite(score + seen[-1]) else math.inf)
    found = torch.tensor(losses, dtype=torch.float64)
    return Transfer([*widths], [*lrs], found.view(len(widths), len(lrs), -1))
