# Generated from chapters/18_initialization.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 71a8774f
"""Chapter 18, Initialization."""

__all__ = [
    "BENT",
    "KEEPS",
    "SMOOTH",
    "Branch",
    "Change",
    "MeanField",
    "Report",
    "critical_gain",
    "critical_point",
    "depth_scaled_",
    "emergence_",
    "emergence_factors",
    "gaussian_",
    "haar",
    "lsuv_",
    "lyapunov",
    "orthogonal_",
]


# %% 18_initialization sec-in-mean-field 1 e7420f6f
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from guided_descent.core import check_choice, check_range, wide

#: Smooth activations by name.
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "erf": torch.erf,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}
#: Activations of two straight pieces: their slope left of zero.
BENT = {"linear": 1.0, "relu": 0.0, "leaky_relu": 0.01, "abs": -1.0}


class MeanField:
    """Lengths, angles and gradients in a wide random network.

    A layer is ``h ← W φ(h) + b`` with ``W ~ N(0, σ_w²/fan_in)`` and ``b ~ N(0, σ_b²)``.
    Of its inputs only the mean square q and the cosine c of two of them count::

        q ← σ_w² E[φ(√q z)²] + σ_b²
        c ← (σ_w² E[φ(√q z₁) φ(√q z₂)] + σ_b²) / q,    E[z₁z₂] = c
        χ = σ_w² E[φ'(√q z)²]

    Gradients grow by √χ a layer on their way back. For the activations of ``BENT`` the
    means are known. For others they are sums over an even grid on [−10, 10], whose
    error falls exponentially where φ is analytic. They are refused where half of the
    nodes differ by more than 1e-6; the error is then below 1e-11, except for an abrupt
    φ.

    Args:
        phi: A name of ``SMOOTH`` or ``BENT``, or a function of tensors, elementwise and
            smooth. Default ``"tanh"``.
        sigma_w: Gain σ_w, in [0, ∞). Default 1.
        sigma_b: Standard deviation σ_b of the biases, in [0, ∞). Default 0.
        nodes: Points of the grid, at least 41. Default 401.

    Raises:
        ValueError: An unknown ``phi``; an argument outside its range; from the methods,
            a ``phi`` with kinks, or too steep for the grid.
        TypeError: ``phi`` is no name and cannot be called.

    Source: Poole et al., arXiv 1606.05340; Schoenholz et al., arXiv 1611.01232. Chapter
        18, eq-in-length, eq-in-chi and eq-in-cosine.
    """

    def __init__(
        self,
        phi: str | Callable[[Tensor], Tensor] = "tanh",
        sigma_w: float = 1.0,
        sigma_b: float = 0.0,
        nodes: int = 401,
    ) -> None:
        if isinstance(phi, str):
            check_choice("phi", phi, [*SMOOTH, *BENT])
        elif not callable(phi):
            told = f"phi={phi!r} is a {type(phi).__name__}"
            raise TypeError(f"{told}; pass a name or a function of tensors")
        check_range("sigma_w", sigma_w, "[0, inf)")
        check_range("sigma_b", sigma_b, "[0, inf)")
        check_range("nodes", nodes, "[41, inf) int")
        self.phi, self.sigma_w, self.sigma_b = phi, float(sigma_w), float(sigma_b)
        self.slope = BENT.get(phi) if isinstance(phi, str) else None
        self._phi = SMOOTH.get(phi) if isinstance(phi, str) else phi
        self._z = torch.linspace(-10, 10, nodes + 1 - nodes % 2, dtype=torch.float64)

    def __repr__(self) -> str:
        return f"MeanField({self.phi!r}, {self.sigma_w:g}, {self.sigma_b:g})"

    # %% 18_initialization sec-in-mean-field 2 d7223ef3
    def length(self, q: float) -> float:
        """Mean square after a layer, from that before it."""
        return self.sigma_w**2 * self._square(q) + self.sigma_b**2


    def chi(self, q: float) -> float:
        """Factor χ of the mean square of a gradient, one layer back."""
        return self.sigma_w**2 * self._steepness(q)


    def cosine(self, c: float, q: float) -> float:
        """Cosine of two inputs of mean square ``q`` after a layer, from that before it."""
        if self.length(q) == 0:
            return c
        return (self.sigma_w**2 * self._product(q, c) + self.sigma_b**2) / self.length(q)

    # %% 18_initialization sec-in-mean-field 3 707d4311
    def _square(self, q: float) -> float:
        """E φ²."""
        if self.slope is not None:
            return (1 + self.slope**2) / 2 * q
        return self._mean(self._phi(math.sqrt(q) * self._z).square(), q)


    def _steepness(self, q: float) -> float:
        """E φ'²."""
        if self.slope is not None:
            return (1 + self.slope**2) / 2
        with torch.enable_grad():
            x = (math.sqrt(q) * self._z).requires_grad_()
            (slopes,) = torch.autograd.grad(self._phi(x).sum(), x)
        return self._mean(slopes.square(), q)


    def _product(self, q: float, c: float) -> float:
        """E φφ, at cosine c."""
        c = min(max(c, -1.0), 1.0)
        if (a := self.slope) is not None:
            ramps = (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / (2 * math.pi)
            return q * (a * c + (1 - a) ** 2 * ramps)
        first = math.sqrt(q) * self._z
        second = c * first[:, None] + math.sqrt(1 - c * c) * first
        values = self._phi(first)[:, None] * self._phi(second)
        return self._mean(values, q)


    def _mean(self, values: Tensor, q: float) -> float:
        """Mean over one or two normal numbers, refused where the grid is too coarse."""
        density = torch.exp(-self._z.square() / 2)
        density /= density.sum()
        full, half = values @ density, values[..., ::2] @ (density[::2] * 2)
        if values.ndim == 2:
            full, half = density @ full, (2 * density[::2]) @ half[::2]
        if not abs(full - half) <= 1e-6 * max(1.0, abs(full)):
            told = f"phi={self.phi!r} at q={q:g} has a kink, or is steep, for"
            nodes = len(self._z)
            remedy = f"pass a smooth phi, a name of BENT, or nodes={2 * nodes - 1}"
            raise ValueError(f"{told} nodes={nodes}; {remedy}")
        return float(full)


    def run(self, depth: int, q: float = 1.0, c: float = 0.0) -> dict[str, Tensor]:
        """Follow two inputs through the layers.

        Args:
            depth: Number of layers, at least 1.
            q: Mean square of both at the first layer, positive.
            c: Their cosine there, in [-1, 1].

        Returns:
            ``"q"`` and ``"c"`` at layers 1 to ``depth``; ``"gradient"``: the factor of the
            gradient's norm from a layer's output back to the first.
        """
        check_range("depth", depth, "[1, inf) int")
        check_range("q", q, "(0, inf)")
        check_range("c", c, "[-1, 1]")
        rows = [(q, c, 1.0)]
        for _ in range(depth - 1):
            q, c, back = rows[-1]
            growth = back * math.sqrt(self.chi(q))
            rows.append((self.length(q), self.cosine(c, q), growth))
        found = torch.tensor(rows, dtype=torch.float64).T
        return dict(zip(("q", "c", "gradient"), found, strict=True))


    def fixed_point(self) -> float:
        """The mean square that layers lead to: infinite where they
            grow without bound, or, of a smooth phi, past 1000.

        Raises:
            ValueError: Every mean square is a fixed point.
        """

        def gap(q: float) -> float:
            return self.length(q) - q

        if self.slope is not None:
            keep = self.sigma_w**2 * (1 + self.slope**2) / 2
            if abs(keep - 1) < 1e-12 and not self.sigma_b:
                told = f"phi={self.phi!r} with sigma_w={self.sigma_w:g} keeps every length"
                raise ValueError(f"{told}; pass another sigma_w, or ask run(depth)")
            return self.sigma_b**2 / (1 - keep) if keep < 1 else math.inf
        low, high = 1e-9, 1.0
        if gap(low) <= 0:
            return 0.0
        while gap(high) > 0:
            high *= 2
            if high > 1e3:
                return math.inf
        for _ in range(100):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if gap(middle) > 0 else (low, middle)
        return middle


# %% 18_initialization sec-in-critical 1 c213c7d5
def critical_point(q: float, phi: Any = "tanh") -> tuple[float, float]:
    """The σ_w² and σ_b² that keep a mean square, and the size of its gradients.

    Args:
        q: Mean square of the preactivations, positive.
        phi: As in ``MeanField``.

    Returns:
        σ_w² = 1/E φ'² and σ_b² = q − E φ²/E φ'²; no network has a negative one.

    Source: chapter 18, eq-in-critical.
    """
    check_range("q", q, "(0, inf)")
    field = MeanField(phi, nodes=1601)
    return 1 / field.chi(q), q - field.length(q) / field.chi(q)


# %% 18_initialization sec-in-critical 2 451ec866
def critical_gain(phi: Any = "tanh", sigma_b: float = 0.0) -> float:
    """The gain σ_w at which gradients neither grow nor shrink with depth.

    Args:
        phi: As in ``MeanField``. Default ``"tanh"``.
        sigma_b: Standard deviation of the biases, in [0, ∞). Default 0.

    Returns:
        σ_w: 1/φ'(0) for an activation such as tanh without biases, √2 for ReLU. Weights
        are then drawn with variance σ_w²/fan_in.

    Raises:
        ValueError: There is no critical gain whose length is stable; the message says
            which biases or which other choice there is.

    Source: Schoenholz et al., arXiv 1611.01232. Chapter 18, eq-in-critical.
    """
    check_range("sigma_b", sigma_b, "[0, inf)")
    field, target = MeanField(phi, nodes=1601), float(sigma_b) ** 2
    if field.slope is not None:
        if target:
            told = f"sigma_b={sigma_b} lets lengths grow in a critical {phi!r} network"
            raise ValueError(f"{told}; pass sigma_b=0")
        return math.sqrt(2 / (1 + field.slope**2))
    tiny, slope = 1e-6, field.chi(0.0)
    if not target and slope and field.length(tiny) <= tiny * slope * (1 + 1e-12):
        return 1 / math.sqrt(slope)
    grid = [10 ** (k / 8) for k in range(-32, 17)]
    missing = [critical_point(q, phi)[1] - target for q in grid]
    for k in range(len(grid) - 1):
        if missing[k] * missing[k + 1] <= 0:
            low, high = grid[k], grid[k + 1]
            for _ in range(80):
                q = math.sqrt(low * high)
                above = (critical_point(q, phi)[1] - target) * missing[k] > 0
                low, high = (q, high) if above else (low, q)
            if _is_stable(field, q):
                return math.sqrt(critical_point(q, phi)[0])
    stable = [
        b + target for q, b in zip(grid, missing, strict=True) if _is_stable(field, q)
    ]
    larger = [f"sigma_b={math.sqrt(b):.3g}" for b in stable[:1] if b > target]
    keep = 1 / math.sqrt(field.length(1.0))
    told = f"phi={phi!r} with sigma_b={sigma_b} has no critical gain of stable length"
    advice = [*larger, f"use a gain that keeps a mean square of 1, {keep:.4g}"]
    raise ValueError(f"{told}; pass {', or '.join(advice)}")


def _is_stable(field: MeanField, q: float) -> bool:
    """Whether a longer signal shrinks back to q, at the gain where χ is one."""
    change = field.length(1.001 * q) - field.length(0.999 * q)
    return change <= 0.002 * q * field.chi(q)


# %% 18_initialization sec-in-model 1 b919a876
class Change(NamedTuple):
    """What became of a parameter, and why."""

    name: str
    shape: tuple[int, ...]
    done: str  # "" where it was left alone
    reason: str


class Report(list):
    """Changes; printed, a table of what was changed, what was not, and why."""

    def __repr__(self) -> str:
        if not self:
            return "Report: nothing"
        wide_name = max(len(change.name) for change in self)
        wide_done = max(len(change.done or "left alone") for change in self)
        rows = [
            f"{name:<{wide_name}}  {'×'.join(map(str, shape)):>12}  "
            f"{done or 'left alone':<{wide_done}}  {reason}".rstrip()
            for name, shape, done, reason in self
        ]
        return "\n".join(rows)


class _Weight(NamedTuple):
    """A layer's weight, as matrices of (outputs, inputs)."""

    name: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    parts: int  # matrices under one another: groups, or queries, keys and values
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        """Of one of the matrices."""
        rows = self.weight.shape[0]
        return rows // self.parts, self.weight.numel() // rows

    @torch.no_grad()
    def write(self, matrices: list[Tensor]) -> None:
        self.weight.copy_(torch.cat(matrices).reshape(self.weight.shape))

    def clear_bias(self) -> None:
        if self.bias is not None:
            with torch.no_grad():
                self.bias.zero_()

    def changed(self, done: str, bias: str = "zero") -> Iterator[Change]:
        """The rows of the report."""
        place = f"{self.name}.{'in_proj_' * (self.kind == 'attention')}".lstrip(".")
        yield Change(f"{place}weight", tuple(self.weight.shape), done, self.kind)
        if self.bias is not None:
            yield Change(f"{place}bias", tuple(self.bias.shape), bias, "bias")


def _is_sharded(p: Tensor) -> bool:
    return type(p.data).__name__ == "DTensor"


def _check_model(model: Any, generator: Any = None) -> None:
    """Refuse what has no parameters to fill yet, or not all of them here."""
    if not isinstance(model, nn.Module):
        told = f"model is a {type(model).__name__}"
        raise TypeError(f"{told}; pass an nn.Module, such as the whole network")
    if generator is not None and not isinstance(generator, torch.Generator):
        told = f"generator={generator!r} is a {type(generator).__name__}"
        raise TypeError(f"{told}; pass torch.Generator().manual_seed(0), or None")
    for name, p in model.named_parameters():
        told = ""
        if isinstance(p, nn.parameter.UninitializedParameter):
            told = "has no shape yet; run the model once on an example"
        elif p.is_meta:
            told = "is on the meta device; give it memory: model.to_empty(device=...)"
        elif _is_sharded(p):
            told = "is sharded; initialize the whole model, then shard it"
        if told:
            raise ValueError(f"model: {name} {told}")


def _survey(model: nn.Module) -> tuple[list[_Weight], Report]:
    """The weights that sum their inputs, in order of definition; and all the rest."""
    owners: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(p, []).append((name, module))
    found, rest, done = [], Report(), set()
    for name, module in model.named_modules():
        for word, p in module._parameters.items():
            if p is None or p in done:
                continue
            done.add(p)
            place, shape = f"{name}.{word}".lstrip("."), tuple(p.shape)
            kind, why = _kind(word, p, module, owners[p])
            if kind:
                bias = module._parameters.get(word.replace("weight", "bias"))
                bias = bias if bias is not None and bias.requires_grad else None
                if bias is not None:
                    done.add(bias)
                parts = 3 if kind == "attention" else getattr(module, "groups", 1)
                found.append(_Weight(name, module, p, bias, parts, kind))
            else:
                rest.append(Change(place, shape, "", why))
    return found, rest


def _kind(
    word: str, p: Tensor, module: nn.Module, owners: list[tuple[str, nn.Module]]
) -> tuple[str, str]:
    """What kind of weight it is; or why it is none."""
    conv = nn.modules.conv
    if not p.requires_grad:
        return "", "frozen"
    if any(isinstance(x, nn.Embedding | nn.EmbeddingBag) for _, x in owners):
        tied = ", tied to an output layer" if len(owners) > 1 else ""
        return "", f"embedding: rows are looked up, not summed{tied}"
    if type(module).__name__ in ("ParametrizationList", "_WeightNorm", "_Orthogonal"):
        return (
            "",
            "parametrized: the weight is computed from it; remove, then add again",
        )
    if word == "weight" and type(module).__name__ == "Conv1D":
        return "", "kept as inputs × outputs"
    if word == "weight" and isinstance(module, nn.Linear):
        return "linear", ""
    if word == "in_proj_weight" and isinstance(module, nn.MultiheadAttention):
        return "attention", ""
    if isinstance(module, conv._ConvTransposeNd):
        return "", "transposed convolution: its fan-in depends on the stride"
    if word == "weight" and isinstance(module, conv._ConvNd):
        return "convolution", ""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "", "recurrent: the same matrix at every step"
    if p.ndim < 2:
        return "", "norm, gain or other vector"
    return "", f"unrecognized: {type(module).__name__}"


def _weights(model: Any, generator: Any = None) -> tuple[list[_Weight], Report]:
    """What there is to initialize, or a refusal."""
    _check_model(model, generator)
    found, rest = _survey(model)
    if not found:
        told = "model has no trainable linear or convolutional weight"
        raise ValueError(f"{told}; found: {rest!r}" if rest else told)
    return found, rest


def _gain(gain: float | str) -> float:
    """A number, or the critical gain of an activation."""
    if isinstance(gain, str):
        return critical_gain(gain)
    check_range("gain", gain, "[0, inf)")
    return float(gain)


def _normal(shape: tuple[int, ...], like: Tensor, generator: Any) -> Tensor:
    """Standard normal numbers in single precision at least, where ``like`` is."""
    place = generator.device if generator is not None else like.device
    drawn = torch.randn(
        shape, generator=generator, dtype=wide(like.dtype), device=place
    )
    return drawn.to(like.device)


# %% 18_initialization sec-in-model 2 1bd25284
@torch.no_grad()
def gaussian_(
    model: nn.Module,
    gain: float | str = 1.0,
    sigma_b: float = 0.0,
    *,
    generator: torch.Generator | None = None,
) -> Report:
    """Draw weights from N(0, gain²/fan_in) and biases from N(0, sigma_b²), in place.

    Args:
        model: All its linear and convolutional weights are drawn.
        gain: σ_w, in [0, ∞), or the activation whose critical gain to take: ``"relu"``
            gives He's √2, ``"tanh"`` LeCun's 1. Default 1.
        sigma_b: σ_b, in [0, ∞). Default 0.
        generator: Where the numbers come from. ``None``: torch's.

    Returns:
        A report; printed, it says what was changed, what was left alone, and why.

    Raises:
        TypeError: ``model`` is no module, ``generator`` no generator.
        ValueError: An argument outside its range; no weight to draw; parameters without
            memory or sharded. Nothing has changed then.

    Source: He et al., arXiv 1502.01852. Chapter 18, eq-in-length.
    """
    sigma_w = _gain(gain)
    check_range("sigma_b", sigma_b, "[0, inf)")
    weights, rest = _weights(model, generator)
    report = Report()
    for w in weights:
        rows, fan_in = w.shape
        drawn = _normal((w.parts * rows, fan_in), w.weight, generator)
        w.write([drawn.mul_(sigma_w / math.sqrt(fan_in))])
        if w.bias is not None:
            w.bias.copy_(_normal(tuple(w.bias.shape), w.bias, generator) * sigma_b)
        bias = f"normal ×{sigma_b:.3g}" if sigma_b else "zero"
        report += w.changed(f"normal ×{sigma_w / math.sqrt(fan_in):.3g}", bias)
    return Report(report + rest)


# %% 18_initialization sec-in-chaos 1 13b9e2e2
def lyapunov(
    layers: Iterable[Callable[[Tensor], Tensor]],
    x: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> float:
    """Growth of a small disturbance, in nats a layer: the largest Lyapunov exponent.

    A disturbance v of the input is carried on by each layer's derivative, and its
    length measured and divided out::

        v ← J v,    λ ← λ + log‖v‖ / layers,    v ← v/‖v‖

    Args:
        layers: Functions of one tensor, run one after another: an ``nn.Sequential``, a
            list of blocks, or ``[cell] * steps`` for a recurrent map.
        x: A batch of inputs, examples first; each gets a disturbance of its own.
        generator: Where the disturbances come from. ``None``: torch's.

    Returns:
        The mean over the batch: negative where differences die out, positive where they
        grow, ``-inf`` where nothing is left of one.

    Raises:
        TypeError: ``layers`` are no functions.
        ValueError: There is no layer; ``x`` is no batch of floating-point numbers.
        FloatingPointError: A disturbance is not finite.

    Source: Benettin et al. (1980), doi 10.1007/BF02128236; Zhang, Feng, Chen &
        Lai, arXiv 2107.09437. Chapter 18, eq-in-lyapunov.
    """
    layers = _check_layers(layers, x)
    v = _normal(tuple(x.shape), x, generator).to(x.dtype)
    total = torch.zeros(len(x), dtype=wide(x.dtype), device=x.device)
    v = v / _lengths(v)
    for layer in layers:
        with torch.no_grad():
            x, v = torch.func.jvp(layer, (x,), (v,))
        size = _lengths(v)
        total += size.flatten().log()
        v = v / torch.where(size > 0, size, 1.0)
    exponent = float(total.mean()) / len(layers)
    if math.isnan(exponent) or exponent == math.inf:
        raise FloatingPointError("layers: a disturbance of x is not finite")
    return exponent


# %% 18_initialization sec-in-chaos 2 dc79de62
def _lengths(v: Tensor) -> Tensor:
    """The norm of each example, in a shape that divides ``v``."""
    norms = torch.linalg.vector_norm(v.flatten(1), dim=1)
    return norms.view(-1, *[1] * (v.ndim - 1))


def _check_layers(layers: Any, x: Any) -> list[Callable[[Tensor], Tensor]]:
    if isinstance(layers, nn.Module) and not isinstance(layers, Iterable):
        told = f"layers is a {type(layers).__name__}, one module"
        raise TypeError(
            f"{told}; pass its blocks: list(model.blocks), or [cell] * steps"
        )
    layers = list(layers)
    if not layers:
        raise ValueError("layers=[] is empty; pass one function at least")
    for k, layer in enumerate(layers):
        if not callable(layer):
            told = f"layers[{k}]={layer!r} cannot be called"
            raise TypeError(f"{told}; pass functions of one tensor")
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and len(x)):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        told = f"x ({shape}) is no batch of floating-point numbers"
        raise ValueError(f"{told}; pass a tensor of shape (examples, ...)")
    return layers


# %% 18_initialization sec-in-orthogonal 1 4e6ef990
def haar(m: int, n: int, like: Tensor, generator: Any = None) -> Tensor:
    """An m×n matrix with orthonormal rows or columns; all are equally likely.

    Source: Mezzadri, arXiv math-ph/0609050. Chapter 18, eq-in-haar.
    """
    Z = _normal((m, n), like, generator)
    Q, R = torch.linalg.qr(Z if m >= n else Z.mT)
    Q = Q * R.diagonal().sign()
    return Q if m >= n else Q.mT


# %% 18_initialization sec-in-orthogonal 2 0741fabf
#: What an orthogonal matrix of a tall shape keeps: see ``orthogonal_``.
KEEPS = ("rms", "norm")


def _length(m: int, n: int, keep: str) -> float:
    return max(1.0, m / n) ** 0.5 if keep == "rms" else 1.0


@torch.no_grad()
def orthogonal_(
    model: nn.Module,
    gain: float | str = 1.0,
    *,
    keep: str = "rms",
    conv: str = "flat",
    generator: torch.Generator | None = None,
) -> Report:
    """Make weights multiples of orthogonal matrices, in place, and biases zero.

    An m×n matrix (m outputs) becomes ``gain · max(1, √(m/n)) · Q``, with orthonormal
    rows or columns. It then has the mean square of a normal one with variance gain²/n.
    A fused projection of attention is three matrices, a grouped convolution one for
    each group.

    Args:
        model: All its linear and convolutional weights are set.
        gain: σ_w, in [0, ∞), or an activation whose critical gain to take. Default 1.
        keep: What a tall matrix keeps of its input: ``"rms"`` (the default), the mean
            square of an entry, as above; ``"norm"``, the norm, without the root, as
            ``torch.nn.init.orthogonal_``.
        conv: ``"flat"`` (the default): a convolution as an out × (in · window) matrix,
            as in torch. ``"delta"``: an orthogonal matrix at the centre of the window
            and zeros around it: it keeps norms exactly, with circular padding.
        generator: Where the numbers come from. ``None``: torch's.

    Returns:
        A report; printed, it says what was changed, what was left alone, and why.

    Raises:
        TypeError: ``model`` is no module, ``generator`` no generator.
        ValueError: An argument outside its range; an even window under ``"delta"``; no
            weight to set; parameters without memory or sharded. Nothing has changed
            then.

    Source: Saxe et al., arXiv 1312.6120; Xiao et al., arXiv 1806.05393 (delta). Chapter
        18, eq-in-haar.
    """
    sigma_w = _gain(gain)
    check_choice("keep", keep, KEEPS)
    check_choice("conv", conv, ("flat", "delta"))
    weights, rest = _weights(model, generator)
    taps = {}
    for w in weights:
        window = tuple(w.weight.shape[2:]) if conv == "delta" else ()
        if any(size % 2 == 0 for size in window):
            told = f"conv='delta' with {w.name}, whose window {window} has no centre"
            raise ValueError(f"{told}; pass conv='flat'")
        taps[w.weight] = math.prod(window)
    report = Report()
    for w in weights:
        (m, n), k = w.shape, taps[w.weight]
        n //= k
        scale = sigma_w * _length(m, n, keep)
        blocks = [scale * haar(m, n, w.weight, generator) for _ in range(w.parts)]
        if k > 1:
            full = [block.new_zeros(m, n, k) for block in blocks]
            for whole, block in zip(full, blocks, strict=True):
                whole[:, :, k // 2] = block
            blocks = [whole.flatten(1) for whole in full]
        w.write(blocks)
        w.clear_bias()
        report += w.changed(f"orthogonal ×{scale:.3g}")
    return Report(report + rest)


# %% 18_initialization sec-in-residual 1 8fd536af
#: A branch: a module, its name, or several that run one after another.
Branch = nn.Module | str | Iterable[nn.Module | str]
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)


def _known_branches(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """The residual branches of torch's own transformer layers."""
    found = []
    for name, x in model.named_modules():
        if isinstance(x, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            found.append((f"{name}.self_attn".lstrip("."), [x.self_attn]))
            if isinstance(x, nn.TransformerDecoderLayer):
                place = f"{name}.multihead_attn".lstrip(".")
                found.append((place, [x.multihead_attn]))
            found.append((f"{name}.linear2".lstrip("."), [x.linear1, x.linear2]))
    if not found:
        told = "branches=None: model has no layer of torch's transformers"
        raise ValueError(f"{told}; pass the modules whose outputs are added")
    return found


def _module(model: nn.Module, name: str, argument: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        told = f"{argument}: model has no module {name!r}"
        raise ValueError(f"{told}; see dict(model.named_modules())") from None


def _named_branches(
    model: nn.Module, branches: Iterable[Branch] | None
) -> list[tuple[str, list[nn.Module]]]:
    """Each branch as a name and modules; refused where it is not the model's."""
    if branches is None:
        return _known_branches(model)
    if isinstance(branches, str) or not isinstance(branches, Iterable):
        told = f"branches={branches!r} is a {type(branches).__name__}"
        raise TypeError(f"{told}; pass a list of modules or names, one a branch")
    names, found = {module: name for name, module in model.named_modules()}, []
    for k, branch in enumerate(branches):
        single = isinstance(branch, str | nn.Module)
        parts = [branch] if single else list(branch)
        modules = [
            _module(model, part, f"branches[{k}]") if isinstance(part, str) else part
            for part in parts
        ]
        for module in modules:
            if module not in names:
                told = f"branches[{k}] is no module of model"
                raise ValueError(f"{told}; pass modules out of model, or their names")
        found.append((names[modules[-1]] or "model", modules))
    if not found:
        raise ValueError("branches=[] is empty; pass the modules that are added")
    return found


class _Ending(NamedTuple):
    """A branch's weights, and what scales its output."""

    name: str
    weights: list[_Weight]
    norm: tuple[str, nn.Module] | None  # a norm layer after the last weight
    normed: bool  # whether there is a norm layer anywhere in it


def _endings(
    model: nn.Module, branches: Iterable[Branch] | None
) -> tuple[list[_Ending], Report]:
    weights, rest = _weights(model)
    by_module: dict[nn.Module, list[_Weight]] = {}
    for w in weights:
        by_module.setdefault(w.module, []).append(w)
    names = {module: name for name, module in model.named_modules()}
    endings, seen = [], set()
    for k, (name, modules) in enumerate(_named_branches(model, branches)):
        inside = [x for module in modules for x in module.modules()]
        if seen & set(inside):
            told = f"branches[{k}] ({name}) shares modules with an earlier branch"
            raise ValueError(f"{told}; pass each branch once, and the smallest ones")
        seen |= set(inside)
        found = [w for x in inside for w in by_module.get(x, [])]
        if not found:
            told = f"branches[{k}] ({name}) has no weight to scale"
            raise ValueError(f"{told}; pass branches that end in a trainable layer")
        after = inside[inside.index(found[-1].module) + 1 :]
        norms = [(names[x], x) for x in after if isinstance(x, _NORMS)]
        if norms and norms[-1][1].weight is None:
            told = f"branches[{k}] ({name}) ends in a norm without weights"
            raise ValueError(f"{told}, which undoes a scale; give it some")
        normed = any(isinstance(x, _NORMS) for x in inside)
        endings.append(_Ending(name, found, norms[-1] if norms else None, normed))
    return endings, rest


# %% 18_initialization sec-in-residual 2 82fee395
@torch.no_grad()
def depth_scaled_(
    model: nn.Module,
    how: str = "sqrt",
    branches: Iterable[Branch] | None = None,
    *,
    head: nn.Module | str | None = None,
) -> Report:
    """Scale the residual branches of a deep model down, in place.

    With L branches x ← x + f(x), each of m layers:

    - ``"sqrt"``: the last layer of a branch times 1/√L, weight and bias. The output of
      a stack then grows by a constant and not exponentially in L.
    - ``"zero"``: the last layer of a branch zero: every block starts as the identity.
    - ``"fixup"``: the last layer zero, the others times L^{−1/(2m−2)}, biases zero; and
      ``head`` zero. Fixup's scalar biases and multipliers are parameters that a model
      has or has not: none is added.

    Where a norm layer follows the last weight, it undoes any scale of that weight: its
    own weight and bias are scaled in place of it. A scale multiplies what is there:
    call this once, after the weights are drawn.

    Args:
        model: The network.
        how: ``"sqrt"`` (the default), ``"zero"`` or ``"fixup"``.
        branches: What is added, one entry a branch: a module, its name, or a list of
            modules that run one after another. ``None``: attention and feed-forward of
            torch's own transformer layers.
        head: The output layer, or its name; for ``"fixup"`` alone. ``None``: left
            alone.

    Returns:
        A report; printed, it says what was changed, what was left alone, and why.

    Raises:
        TypeError: ``model`` is no module; ``branches`` is no list.
        ValueError: An unknown ``how``; a branch that is not the model's, overlaps
            another, or has nothing to scale; under ``"fixup"`` a branch of one layer or
            with a norm layer; ``head`` without ``"fixup"``. Nothing has changed then.

    Source: Zhang, Dauphin & Ma, arXiv 1901.09321 (fixup); Goyal et al., arXiv
        1706.02677 (zero); Radford et al. (2019, sqrt). Chapter 18, eq-in-residual.
    """
    check_choice("how", how, ("sqrt", "zero", "fixup"))
    _check_model(model)
    endings, rest = _endings(model, branches)
    top = _check_fixup(model, endings, head, how)
    L, done, report = len(endings), set(), Report()
    for name, weights, norm, _ in endings:
        scale = L**-0.5 if how == "sqrt" else 0.0
        *inner, last = weights
        if norm:
            place, module = norm
            for word, p in module._parameters.items():
                if p is not None:
                    p.mul_(scale)
                    done.add(p)
                    told = f"ends branch {name}: undoes a scale of the weight before"
                    change = f"{place}.{word}".lstrip("."), tuple(p.shape)
                    report.append(Change(*change, f"×{scale:.3g}", told))
            continue
        report += _scaled(last, scale, f"ends branch {name}", done)
        if how == "fixup":
            inner_scale = L ** (-1 / (2 * len(weights) - 2))
            for w in inner:
                report += _scaled(w, inner_scale, f"in branch {name}", done)
                w.clear_bias()
    for w in top:
        report += _scaled(w, 0.0, "output layer", done)
    left = [x for w in _survey(model)[0] for x in w.changed("") if w.weight not in done]
    return Report(
        report + [x._replace(done="", reason="ends no branch") for x in left] + rest
    )


def _scaled(w: _Weight, scale: float, why: str, done: set[Tensor]) -> list[Change]:
    """Scale weight and bias, and tell."""
    for p in (w.weight, w.bias):
        if p is not None:
            p.mul_(scale)
            done.add(p)
    told = f"×{scale:.3g}" if scale else "zero"
    return [x._replace(reason=why) for x in w.changed(told, told)]


def _check_fixup(
    model: nn.Module, endings: list[_Ending], head: Any, how: str
) -> list[_Weight]:
    """Refuse what fixup is not for; and find the output layer's weights."""
    if how != "fixup":
        if head is not None:
            told = f"head={head!r} with how={how!r}"
            raise ValueError(f"{told}; pass how='fixup', or head=None")
        return []
    for name, weights, _, normed in endings:
        if len(weights) < 2:
            told = f"how='fixup' with branch {name}, which has one layer"
            raise ValueError(f"{told}; pass how='zero'")
        if normed:
            told = f"how='fixup' with branch {name}, which has a norm layer"
            raise ValueError(f"{told}; pass how='zero'")
    if head is None:
        return []
    top = _module(model, head, "head") if isinstance(head, str) else head
    found = [w for w in _survey(model)[0] if w.module is top]
    if not found:
        told = "head is no linear layer of model"
        raise ValueError(f"{told}; pass the output layer, or its name")
    return found


# %% 18_initialization sec-in-lsuv 1 ed34c810
def lsuv_(
    model: nn.Module,
    example: Any,
    *,
    target: float = 1.0,
    orthogonal: bool = True,
    generator: torch.Generator | None = None,
) -> Report:
    """Scale each layer so that its output on an example has a given variance, in place.

    Layer by layer, as the model runs: W ← W · √(target / Var(W a)), the variance over
    all examples and units. Biases become zero, but for frozen ones: then the
    variance is another. The model runs twice, in evaluation
    mode; its modes and buffers are as before.

    Args:
        model: All linear and convolutional layers that run are scaled.
        example: A batch that the model takes: a tensor, a tuple, or a dictionary of
            keywords.
        target: Variance of an output, in (0, ∞). Default 1.
        orthogonal: Start from orthogonal weights, as in the paper; else from what is
            there. Default ``True``.
        generator: Where the numbers come from. ``None``: torch's.

    Returns:
        A report; printed, it says what was changed, what was left alone, and why.

    Raises:
        TypeError: ``model`` is no module, ``generator`` no generator.
        ValueError: ``target`` outside its range; no layer that runs; parameters without
            memory or sharded.
        FloatingPointError: An output is not finite. Nothing has changed then, nor when
            the model itself fails on the example.

    Source: Mishkin & Matas, arXiv 1511.06422. Chapter 18, eq-in-lsuv.
    """
    check_range("target", target, "(0, inf)")
    weights, rest = _weights(model, generator)
    saved = [(p, p.detach().clone()) for p in model.parameters()]
    try:
        calls = [w for w in weights if w.kind != "attention"]
        ran = _watch(model, example, calls, lambda w, y: 1.0)
        used = [w for w in calls if w.weight in ran]
        if not used:
            told = "no linear or convolutional layer of model ran on example"
            raise ValueError(f"{told}; pass an example that goes through them")
        for w in used:
            if orthogonal:
                w.write([haar(*w.shape, w.weight, generator) for _ in range(w.parts)])
            w.clear_bias()
        still: set[Tensor] = set()
        found = _watch(model, example, used, _unit_variance(target, still))
        with torch.no_grad():
            for w in used:
                w.weight.mul_(found[w.weight])
    except BaseException:
        with torch.no_grad():
            for p, value in saved:
                p.copy_(value)
        raise
    report = Report()
    for w in weights:
        if w.weight not in ran:
            why = "its module did not run"
            rest += [x._replace(done="", reason=why) for x in w.changed("")]
        else:
            word = "orthogonal, " * orthogonal
            told = f"{word}×{found[w.weight]:.3g}"
            first, *bias = w.changed(told)
            why = "" if w.weight not in still else ": its output does not vary"
            report += [first._replace(reason=w.kind + why), *bias]
    return Report(report + rest)


# %% 18_initialization sec-in-lsuv 2 a0b1ed18
def _unit_variance(
    target: float, still: set[Tensor]
) -> Callable[[_Weight, Tensor], float]:
    """The factor that gives an output its variance; none if it does not vary."""

    def factor(w: _Weight, y: Tensor) -> float:
        variance = float(y.to(wide(y.dtype)).var())
        if not math.isfinite(variance):
            raise FloatingPointError(f"example: the output of {w.name} is not finite")
        if variance == 0:
            still.add(w.weight)
            return 1.0
        return math.sqrt(target / variance)

    return factor


@torch.no_grad()
def _watch(
    model: nn.Module, example: Any, weights: list[_Weight], factor: Any
) -> dict[Tensor, Any]:
    """Run the model; scale each layer's output by a factor found on its first run."""
    found: dict[Tensor, Any] = {}

    def hook(w: _Weight) -> Callable[..., Any]:
        def scale(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            if w.weight not in found:
                found[w.weight] = factor(w, y)
            return y * found[w.weight]

        return scale

    handles = [w.module.register_forward_hook(hook(w)) for w in weights]
    modes = {module: module.training for module in model.modules()}
    args, kwargs = (example,), {}
    if isinstance(example, dict):
        args, kwargs = (), example
    elif isinstance(example, tuple):
        args = example
    model.eval()
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


# %% 18_initialization sec-in-emergence 1 101f6550
def emergence_factors(depth: int, alpha: float) -> list[float]:
    """``alpha^n`` for layers n = −(depth−1)/2 to (depth−1)/2; their product is one."""
    return [alpha ** (n - (depth - 1) / 2) for n in range(depth)]


# %% 18_initialization sec-in-emergence 2 67d0cda6
@torch.no_grad()
def emergence_(
    model: nn.Module,
    alpha: float = 1.2,
    layers: Iterable[nn.Module | str] | None = None,
) -> Report:
    """Divide early weights and multiply late ones by powers of alpha, in place.

    Of L layers, number l = 1 … L is multiplied by ``s_l = alpha^(l − (L+1)/2)``; the
    product of all is one. A bias is multiplied by ``s_1 ⋯ s_l``. Where activations are
    positively homogeneous (ReLU) and no path skips a layer, the function of the network
    is unchanged, and training is training from the old start with other learning rates:
    SGD's divided by s_l², Adam's and Muon's by s_l; a
    bias's by its own factor.

    Args:
        model: The network.
        alpha: Ratio of neighbouring layers, in (0, ∞). Default 1.2; 1 changes nothing.
        layers: Linear or convolutional modules, or names, from input to output.
            ``None``: all, in order of definition.

    Returns:
        A report; printed, it says what was changed, what was left alone, and why.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``alpha`` outside its range; fewer than two layers; a layer that is
            not the model's, or named twice. Nothing has changed then.

    Source: Li, George & Silva, arXiv 2407.19044. Chapter 18, eq-in-emergence.
    """
    check_range("alpha", alpha, "(0, inf)")
    weights, rest = _weights(model)
    chosen = weights if layers is None else _chosen(model, weights, layers)
    if len(chosen) < 2:
        told = f"model has {len(chosen)} layer to scale"
        raise ValueError(f"{told}; pass a model, or layers, of two at least")
    report, product = Report(), 1.0
    for w, s in zip(chosen, emergence_factors(len(chosen), alpha), strict=True):
        product *= s
        w.weight.mul_(s)
        if w.bias is not None:
            w.bias.mul_(product)
        told = f"rates of SGD ×{s**-2:.3g}, of Adam and Muon ×{1 / s:.3g}"
        first, *bias = w.changed(f"×{s:.3g}", f"×{product:.3g}")
        report += [first._replace(reason=told), *bias]
    for w in weights:
        if all(w is not x for x in chosen):
            rest += [x._replace(done="", reason="not chosen") for x in w.changed("")]
    return Report(report + rest)


def _chosen(
    model: nn.Module, weights: list[_Weight], layers: Iterable[nn.Module | str]
) -> list[_Weight]:
    """The weights of the named layers, in their order."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        told = f"layers={layers!r} is a {type(layers).__name__}"
        raise TypeError(f"{told}; pass a list of modules or names")
    found: list[_Weight] = []
    for k, layer in enumerate(layers):
        name = f"layers[{k}]"
        module = _module(model, layer, name) if isinstance(layer, str) else layer
        own = [w for w in weights if w.module is module]
        if not own:
            told = f"{name} is no trainable linear or convolutional layer of model"
            raise ValueError(f"{told}; pass modules out of model, or their names")
        if any(w is own[0] for w in found):
            raise ValueError(f"{name} ({own[0].name}) comes twice; pass it once")
        found += own
    return found
