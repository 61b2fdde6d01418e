# Generated from chapters/13_modular_norm.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 1da36f9b
"""Chapter 13, The modular norm."""

__all__ = [
    "BONDS",
    "LAYERS",
    "Atom",
    "Bias",
    "Bond",
    "Compose",
    "Embed",
    "Gain",
    "Left",
    "Linear",
    "ModularDescent",
    "Module",
    "Mul",
    "Read",
    "Rule",
    "Sum",
    "chained",
    "matrix",
    "read",
    "spectral_step",
]


# %% 13_modular_norm sec-mo-layer 1 b94d80fe
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from guided_descent.core import (
    ALGORITHMS,
    Optimizer,
    Options,
    check_choice,
    check_range,
)
from guided_descent.engines import matrixwise
from guided_descent.layers import unwrapped
from guided_descent.muon import _check_preset, orthogonal
from guided_descent.norms import NORMS


# %% 13_modular_norm sec-mo-compose 1 e0419904
class Module(nn.Module):
    """A part of a network with a norm: what it is made of, and who may have what.

    ``M1 @ M0`` is M1 after M0, ``M0 + M1`` the sum of their outputs, ``a * M`` a
    multiple, ``M ** n`` a chain of n copies with starts of their own. It is a
    ``torch.nn.Module``: call it, train its ``parameters()``.

    Source: Large et al. (2024), arXiv 2405.14813. Chapter 13, eq-mo-compose.
    """

    #: What it is made of, in the order in which an input meets it.
    members: tuple["Module", ...] = ()

    def parts(self) -> list[tuple["Module", float]]:
        """Its members, each with the fraction of a step that it gets."""
        return []

    # %% 13_modular_norm sec-mo-compose 2 ad8f8d57
    def norm(self, w: Iterable[Tensor]) -> Tensor:
        """The length of weights, one for each of ``atoms``, or of changes of them."""
        sizes = [_over(M.norm(x), f) for M, f, x in self._dealt(w)]
        return torch.stack(sizes).amax() if sizes else torch.zeros(())

    def dualize(self, g: Iterable[Tensor], target: float = 1.0) -> list[Tensor]:
        """Of all changes of length ``target``, the one most aligned with g."""
        steps = [M.dualize(x, f * target) for M, f, x in self._dealt(g)]
        return [x for step in steps for x in step]

    def dual_norm(self, g: Iterable[Tensor]) -> Tensor:
        """How much a change of length one can gain, to first order."""
        return sum((f * M.dual_norm(x) for M, f, x in self._dealt(g)), torch.zeros(()))

    # %% 13_modular_norm sec-mo-compose 3 adfaee5e
    def _dealt(self, w: Iterable[Tensor]) -> list[tuple["Module", float, list[Tensor]]]:
        """The parts that have weights, each with its fraction and its tensors."""
        w, parts = list(w), [x for x in self.parts() if x[0].atoms]
        if len(w) != (n := len(self.atoms)):
            raise ValueError(f"{len(w)} tensors for {n} atoms; pass one for each of .atoms")
        dealt = []
        for part, fraction in parts:
            count = len(part.atoms)
            dealt.append((part, fraction, w[:count]))
            w = w[count:]
        return dealt

    @property
    def atoms(self) -> list["Atom"]:
        """The atoms in it, in the order in which an input meets them."""
        return [atom for member in self.members for atom in member.atoms]

    @property
    def mass(self) -> float:
        """How much of the learning it is to do."""
        return sum(atom.mass for atom in self.atoms)

    def tare(self, mass: float = 1.0) -> "Module":
        """Set its mass, scaling those of its atoms alike; returns it."""
        check_range("mass", mass, "[0, inf)")
        if not (now := self.mass) and mass:
            told = f"mass={mass} for a module without mass"
            raise ValueError(f"{told}; give it an atom with a mass")
        for atom in self.atoms:
            atom.mass *= mass / now if now else 0.0
        return self

    def __matmul__(self, other: Any) -> "Module":
        return Compose(self, other)

    def __add__(self, other: Any) -> "Module":
        return Sum(self, other)

    def __rmul__(self, factor: float) -> "Module":
        return Compose(Mul(factor), self)

    def __pow__(self, n: int) -> "Module":
        check_range("n", n, "[1, inf) int")
        copies = [copy.deepcopy(self) for _ in range(n)]
        for atom in (x for chain in copies[1:] for x in chain.atoms):
            atom.reset()
        return chained(copies)

    # %% 13_modular_norm sec-mo-rates 1 d0869cf5
    def rates(self, target: float = 1.0) -> list[float]:
        """How long the step of each atom may be, for a step of length ``target``."""
        return [r for M, f in self.parts() for r in M.rates(f * target)]


# %% 13_modular_norm sec-mo-compose 4 68c28e38
def chained(modules: list[Module]) -> Module:
    """One after the other, the first first; bracketed in halves."""
    if len(modules) == 1:
        return modules[0]
    half = len(modules) // 2
    return Compose(chained(modules[half:]), chained(modules[:half]))


def matrix(x: Tensor) -> Tensor:
    """A weight as its norm sees it: a vector as a column, a convolution flat."""
    return x.reshape(-1, 1) if x.dim() < 2 else x.flatten(1)


def _over(size: Tensor, fraction: float) -> Tensor:
    """What a part claims; one that may not move at all claims everything."""
    if fraction:
        return size / fraction
    return torch.where(size > 0, torch.inf, torch.zeros_like(size))


class Bond(Module):
    """A function without weights.

    Args:
        function: Takes and returns a tensor.
        sensitivity: By how much it enlarges a change of its input, at most.
    """

    def __init__(self, function: Callable, sensitivity: float = 1.0) -> None:
        super().__init__()
        check_range("sensitivity", sensitivity, "[0, inf)")
        self.function, self.sensitivity = function, sensitivity

    def forward(self, x: Any) -> Any:
        return self.function(x)


class Mul(Bond):
    """Multiplication by a number that is not zero."""

    def __init__(self, factor: float) -> None:
        if not factor:
            raise ValueError("factor=0 cuts the network; pass another, or leave it out")
        super().__init__(nn.Identity(), abs(factor))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


# %% 13_modular_norm sec-mo-compose 5 440c3fbc
class Compose(Module):
    """``second`` after ``first``."""

    def __init__(self, second: Module, first: Module) -> None:
        super().__init__()
        self.first, self.second = self.members = first, second
        if not second.sensitivity:
            told = f"{type(second).__name__} ignores its input (sensitivity 0)"
            raise ValueError(f"{told}; add it with + in place of composing")

    def parts(self) -> list[tuple[Module, float]]:
        m0, m1, nu1 = self.first.mass, self.second.mass, self.second.sensitivity
        m = m0 + m1 or 1.0
        return [(self.first, m0 / m / nu1), (self.second, m1 / m)]

    @property
    def sensitivity(self) -> float:
        return self.first.sensitivity * self.second.sensitivity

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


# %% 13_modular_norm sec-mo-compose 6 70fca5c0
class Sum(Module):
    """Two modules of one input, their outputs added."""

    def __init__(self, one: Module, other: Module) -> None:
        super().__init__()
        self.one, self.other = self.members = one, other

    def parts(self) -> list[tuple[Module, float]]:
        m = self.one.mass + self.other.mass or 1.0
        return [(self.one, self.one.mass / m), (self.other, self.other.mass / m)]

    @property
    def sensitivity(self) -> float:
        return self.one.sensitivity + self.other.sensitivity

    def forward(self, x: Any) -> Any:
        return self.one(x) + self.other(x)


# %% 13_modular_norm sec-mo-compose 7 ff784abf
class Atom(Module):
    """One weight, with its ruler.

    Args:
        weight: The parameter.
        ruler: A name of ``NORMS`` (chapter 11).
        mass: How much of the learning it is to do, in [0, ∞).
        sensitivity: By how much its layer enlarges a change of its input, while the
            weight is at most one long.
    """

    def __init__(
        self, weight: Tensor, ruler: str, mass: float = 1.0, sensitivity: float = 1.0
    ) -> None:
        super().__init__()
        check_choice("ruler", ruler, NORMS)
        check_range("mass", mass, "[0, inf)")
        self.weight, self.ruler = weight, ruler
        self.mass, self.sensitivity = mass, sensitivity
        self.reset()

    mass: float = 1.0

    def reset(self) -> None:
        """Draw its first weight, where that is random; else leave it as it is."""

    @property
    def atoms(self) -> list["Atom"]:
        return [self]

    def norm(self, w: Iterable[Tensor]) -> Tensor:
        (w,) = w
        return NORMS[self.ruler].norm(matrix(w))

    def dual_norm(self, g: Iterable[Tensor]) -> Tensor:
        (g,) = g
        return NORMS[self.ruler].dual(matrix(g))

    def dualize(self, g: Iterable[Tensor], target: float = 1.0) -> list[Tensor]:
        (g,) = g
        return [-target * NORMS[self.ruler].lmo(matrix(g)).view_as(g)]

    def rates(self, target: float = 1.0) -> list[float]:
        return [target]


class Linear(Atom):
    """``W x``, at first orthogonal and one long. ``W`` is (out, inputs)."""

    def __init__(self, out: int, inputs: int, mass: float = 1.0) -> None:
        super().__init__(nn.Parameter(torch.empty(out, inputs)), "spectral", mass)

    def reset(self) -> None:
        out, inputs = self.weight.shape
        nn.init.orthogonal_(self.weight, (out / inputs) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


class Embed(Atom):
    """Rows by number, at first one long. ``W`` is (count, dim)."""

    def __init__(self, dim: int, count: int, mass: float = 1.0) -> None:
        super().__init__(nn.Parameter(torch.empty(count, dim)), "embedding", mass)

    @torch.no_grad()
    def reset(self) -> None:
        self.weight.copy_(-NORMS["embedding"].lmo(self.weight.normal_()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[x]


class Bias(Atom):
    """A constant: add it to a module."""

    def __init__(self, weight: Tensor | int, mass: float = 1.0) -> None:
        if isinstance(weight, int):
            weight = nn.Parameter(torch.zeros(weight))
        super().__init__(weight, "rms", mass, sensitivity=0.0)

    def forward(self, x: Any) -> Tensor:
        return self.weight


class Gain(Atom):
    """A factor for each entry, at first one."""

    def __init__(self, weight: Tensor | int, mass: float = 1.0) -> None:
        if isinstance(weight, int):
            weight = nn.Parameter(torch.ones(weight))
        super().__init__(weight, "max", mass)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


# %% 13_modular_norm sec-mo-model 1 bf42983b
class Read(Module):
    """A layer of torch that computes as before, with the norm of ``inner``."""

    def __init__(self, layer: nn.Module, inner: Module) -> None:
        super().__init__()
        self.layer, self.inner, self.members = layer, inner, (inner,)

    def parts(self) -> list[tuple[Module, float]]:
        return [(self.inner, 1.0)]

    @property
    def sensitivity(self) -> float:
        return self.inner.sensitivity

    def forward(self, x: Any) -> Any:
        return self.layer(x)


class Left(Bond):
    """A part of a network that another algorithm steps; for the norm, a bond."""

    def __init__(self, layer: nn.Module, algorithm: str) -> None:
        super().__init__(layer)
        check_choice("algorithm", algorithm, ALGORITHMS)
        self.algorithm = algorithm


def _window(layer: Any) -> float:
    """A largest value may come from another place in each channel, of each window."""
    d = next(d for d in _D if isinstance(layer, getattr(nn, f"MaxPool{d}d")))
    sizes = (layer.kernel_size, layer.stride)
    sides = zip(*((x,) * d if isinstance(x, int) else x for x in sizes), strict=True)
    return math.prod(s * math.ceil(k / s) for k, s in sides) ** 0.5


_D = (1, 2, 3)
#: What multiplies, with the ruler of its weight.
LAYERS: dict[type, str] = {
    nn.Linear: "spectral",
    nn.Embedding: "embedding",
    **{getattr(nn, f"Conv{d}d"): "spectral" for d in _D},
    nn.LayerNorm: "max",
    nn.RMSNorm: "max",
    nn.GroupNorm: "max",
    **{getattr(nn, f"BatchNorm{d}d"): "max" for d in _D},
}
#: What has no weights: the largest slope, or how to find it.
BONDS: dict[type, float | Callable[[Any], float]] = {
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    nn.Dropout: 1.0,
    nn.ReLU: 1.0,
    nn.Tanh: 1.0,
    nn.Softplus: 1.0,
    nn.Sigmoid: 0.25,
    nn.GELU: 1.129,
    nn.SiLU: 1.0999,
    nn.LeakyReLU: lambda x: max(1.0, abs(x.negative_slope)),
    nn.ELU: lambda x: max(1.0, x.alpha),
    **{getattr(nn, f"AvgPool{d}d"): 1.0 for d in _D},
    **{getattr(nn, f"AdaptiveAvgPool{d}d"): 1.0 for d in _D},
    **{getattr(nn, f"MaxPool{d}d"): _window for d in _D},
}
#: How a module is read: a function of it and of ``read``, or an algorithm's name.
Rule = Callable[[Any, Callable[[Any], Module]], Module] | str


# %% 13_modular_norm sec-mo-model 2 55f88ec7
def read(
    model: nn.Module,
    rules: dict[type | str, Rule] | None = None,
    vector_mass: float = 0.1,
) -> Module:
    """A network of torch as a module with a norm; it shares the parameters.

    Args:
        model: Made of ``nn.Sequential``, layers that ``LAYERS`` and ``BONDS`` list,
            and what ``rules`` tell.
        rules: By class, or by name inside the model. A function ``(module, read)``
            that composes the module of its parts, as ``lambda block, read:
            0.5 * read(nn.Identity()) + 0.5 * read(block.body)``; or the name of an
            algorithm that steps its parameters, at that algorithm's own default lr:
            change it in ``optimizer.param_groups``. Attention needs a rule.
        vector_mass: Mass of each bias and gain, in [0, ∞), where a matrix has 1.

    Returns:
        The module. Called, it computes what the model computes.

    Raises:
        ValueError: A module that is not known, a trained parameter that no part has
            or two have; with its name and the remedy.

    Source: chapter 13, eq-mo-rate.
    """
    check_range("vector_mass", vector_mass, "[0, inf)")
    model = unwrapped(model)
    reader = _Reader(model, rules or {}, vector_mass)
    found = reader(model)
    reader.compare(found)
    return found


# %% 13_modular_norm sec-mo-model 3 a44d9f48
class _Reader:
    """One reading: rules, masses, and what modules are called."""

    def __init__(self, model: nn.Module, rules: Any, vector_mass: float) -> None:
        self.model, self.rules, self.vector_mass = model, rules, vector_mass
        self.names = {module: name for name, module in model.named_modules()}
        for key in rules:
            known = isinstance(key, type) or key in self.names.values()
            if not known:
                told = f"rules has {key!r}, which is no class and no part of the model"
                raise ValueError(f"{told}; use a name of model.named_modules()")

    def label(self, module: nn.Module) -> str:
        name, kind = self.names.get(module, ""), type(module).__name__
        return f"{name!r}, a {kind}" if name else f"the {kind}"

    def __call__(self, module: Any) -> Module:
        """A module of torch, by the first that knows it: rules, itself, the tables."""
        rule = self.rules.get(self.names.get(module))
        for kind in type(module).__mro__ if rule is None else ():
            rule = rule or self.rules.get(kind)
        if isinstance(rule, str):
            return Left(module, rule)
        if rule is not None:
            found = rule(module, self)
            if not isinstance(found, Module):
                told = f"the rule for {self.label(module)} gave"
                told = f"{told} a {type(found).__name__}"
                raise TypeError(f"{told}; compose what read(part) gives")
            return found
        if isinstance(module, Module):
            return module
        for kind, how in (*BONDS.items(), *LAYERS.items(), (nn.Sequential, None)):
            if isinstance(module, kind) and type(module).forward is kind.forward:
                if kind in BONDS:
                    return Bond(module, how(module) if callable(how) else how)
                return self.layer(module, how) if how else self.chain(module)
        raise ValueError(self.refusal(module))

    def refusal(self, module: nn.Module, why: str = "") -> str:
        kind = type(module).__name__
        told = f"ModularDescent cannot read {self.label(module)}{why}"
        compose = f"rules={{{kind}: lambda module, read: ...}} that composes its parts"
        return f"{told}; pass {compose}, or rules={{{kind}: 'adamw'}} to step it so"

    def chain(self, modules: nn.Sequential) -> Module:
        return chained([self(x) for x in modules] or [Bond(nn.Identity())])

    def layer(self, module: Any, ruler: str) -> Module:
        """Its weight, composed with or beside its bias."""
        if getattr(module, "groups", 1) > 1:
            raise ValueError(self.refusal(module, f" in {module.groups} groups"))
        own = {"weight": module.weight, "bias": getattr(module, "bias", None)}
        for name, x in own.items():
            if x is not None and not isinstance(x, nn.Parameter):
                raise ValueError(self.refusal(module, f" whose {name} is computed"))
        inner: Module = Bond(nn.Identity())
        if own["weight"] is not None:
            mass = self.vector_mass if ruler == "max" else 1.0
            inner = Atom(own["weight"], ruler, mass * own["weight"].requires_grad)
        if (bias := own["bias"]) is not None:
            inner = Sum(inner, Bias(bias, self.vector_mass * bias.requires_grad))
        return Read(module, inner)

    def compare(self, found: Module) -> None:
        """Refuse a parameter that no part has, or several."""
        left = [x for x in found.modules() if isinstance(x, Left)]
        owned = [atom.weight for atom in found.atoms]
        owned += [p for x in left for p in x.parameters()]
        counts = Counter(map(id, owned))
        for name, p in self.model.named_parameters():
            count = counts[id(p)]
            if count != 1 and p.requires_grad:
                how = f"is in {count} parts" if count else "is in no part"
                told = f"parameter {name!r} {how} of what was read"
                remedy = "its owner: a function that adds its Atom once, or 'adamw'"
                raise ValueError(f"{told}; pass rules for {remedy}")


# %% 13_modular_norm sec-mo-model 4 114773cd
class ModularDescent(Optimizer):
    """Steepest descent under the modular norm of a network.

    With r the rate of a weight's group, D its step of length one, and u the momentum::

        m ← μ m + (1−μ) g;   u = μ m + (1−μ) g (with nesterov), else m
        x ← (1 − lr · weight_decay) x − lr · r · D(u)

    Args:
        model: A network that ``read`` understands, or a ``Module``. Or, as for other
            optimizers, parameters and groups that say ``norm`` and ``rate``.
        lr: Length of a step in the modular norm, in [0, ∞): how far the output
            moves, at most and about, by its root mean square. Default 0.1.
        momentum: μ, in [0, 1). Default 0.95.
        nesterov: Look ahead. Default ``True``.
        weight_decay: Decoupled, in [0, ∞). Default 0.
        preset: How polar factors are computed; see ``polar``. Default
            ``"polar_express"``.
        rules, vector_mass: See ``read``.
        norm: For parameters without a model: a name of ``NORMS`` (chapter 11);
            vectors are columns. Default ``"spectral"``.
        rate: The same, in [0, ∞): the length of a step over lr. Default 1.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Raises:
        ValueError: A module that ``read`` does not know; an argument out of range.

    Source: Large et al. (2024), arXiv 2405.14813; Bernstein & Newhouse (2024), arXiv
    2410.21265. Chapter 13, eq-mo-descent. State: one number for each parameter.
    """

    matrices = True
    vectors = True
    ranges = {"rate": "[0, inf)"}

    def __init__(
        self,
        model: Any,
        lr: float | Tensor = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        preset: Any = "polar_express",
        rules: dict[type | str, Rule] | None = None,
        vector_mass: float = 0.1,
        norm: str = "spectral",
        rate: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        if isinstance(model, nn.Module):
            params = _groups(model, read(model, rules, vector_mass))
        elif rules:
            told = "rules= tell how a model is read, and the first argument is none"
            raise TypeError(f"{told}; pass the model")
        else:
            params = model
        options.setdefault("nonfinite", "skip")
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        defaults |= {"weight_decay": weight_decay, "preset": preset}
        super().__init__(params, {**defaults, "norm": norm, "rate": rate}, **options)
        if all(self._method(group) is not self for group in self.param_groups):
            told = "ModularDescent got no weight: another algorithm steps every part"
            remedy = "tell by rules= how the model is composed, or use AdamW"
            raise ValueError(f"{told}; {remedy}")

    # %% 13_modular_norm sec-mo-model 5 5dd1d5f7
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        m = s.momentum_buffer.lerp_(g, 1 - h.momentum)
        u = g.lerp(m, h.momentum) if h.nesterov else m
        spectral = h.norm == "spectral"
        d = spectral_step(u, h.preset) if spectral else -NORMS[h.norm].lmo(u)
        if h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        p.add_(d, alpha=-h.lr * h.rate)

    # %% 13_modular_norm sec-mo-model 7 b1359627
    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)}

    def _check_group(self, group: dict[str, Any]) -> None:
        super(ModularDescent, self)._check_group(group)
        check_choice("norm", group["norm"], [x for x in NORMS if x != "conv"])
        check_choice("nesterov", group["nesterov"], (False, True))
        _check_preset(group["preset"])


# %% 13_modular_norm sec-mo-model 6 bc7841a6
@matrixwise
def spectral_step(G: Tensor, preset: Any) -> Tensor:
    """``√(m/n) · U Vᵀ`` of (…, m, n), nearly; exact for a single row or column."""
    m, n = G.shape[-2:]
    if min(m, n) > 1:
        return orthogonal(G, preset, "scion")
    return -((m / n) ** 0.5) * NORMS["frobenius"].lmo(G)


# %% 13_modular_norm sec-mo-model 8 f1cdd1f0
def _groups(model: nn.Module, found: Module) -> list[dict[str, Any]]:
    """Parameter groups: weights of one ruler and rate together, then what is left."""
    names = {p: name for name, p in unwrapped(model).named_parameters()}
    made: dict[Any, list[tuple[str, Tensor]]] = {}
    for atom, rate in zip(found.atoms, found.rates(), strict=True):
        if (p := atom.weight).requires_grad:
            key = ("norm", atom.ruler), ("rate", float(f"{rate:.12g}"))
            made.setdefault(key, []).append((names[p], p))
    for x in found.modules():
        for p in x.parameters() if isinstance(x, Left) else ():
            if p.requires_grad:
                key = (("algorithm", x.algorithm),)
                made.setdefault(key, []).append((names[p], p))
    return [{"params": params, **dict(key)} for key, params in made.items()]
