# Generated from chapters/12_muon_scion.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 54669282
"""Chapter 12, Muon and Scion."""

__all__ = [
    "PRESETS",
    "SCALES",
    "Coefficients",
    "Muon",
    "Scion",
    "by_rows",
    "damped",
    "newton_schulz_bounds",
    "newton_schulz_slack",
    "on_sphere",
    "orthogonal",
    "polar",
    "signs",
]


# %% 12_muon_scion sec-mu-polar 1 94545b64
import functools
import math
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from guided_descent.core import Optimizer, Options, check_choice, check_range, wide
from guided_descent.engines import matrixwise
from guided_descent.examples import exact_polar

#: Coefficients (a, b, c) of a x + b x³ + c x⁵.
Coefficients = tuple[tuple[float, float, float], ...]
_KELLER = (3.4445, -4.7750, 2.0315)
_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


def damped(coefficients: Coefficients, by: float = 1.01) -> Coefficients:
    """The polynomials of ``x / by``: room for round-off."""
    return tuple((a / by, b / by**3, c / by**5) for a, b, c in coefficients)


#: How long a step is for an m×n matrix (m outputs), over the learning rate.
SCALES = {
    "keller": lambda m, n: max(1.0, m / n) ** 0.5,
    "moonlight": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "scion": lambda m, n: (m / n) ** 0.5,
    "spectral": lambda m, n: max(m, n) ** 0.5,
    "none": lambda m, n: 1.0,
}
#: Newton–Schulz iterations by name.
PRESETS: dict[str, Coefficients] = {
    "polar_express": damped(_EXPRESS[:5]),
    "polar_express_8": (*damped(_EXPRESS), (1.875, -1.25, 0.375)),
    "keller": (_KELLER,) * 5,
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "deepseek": (_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2,
    "cubic": ((1.5, -0.5, 0.0),) * 15,
}


def _table(preset: str | Coefficients) -> Coefficients:
    if isinstance(preset, str):
        check_choice("preset", preset, PRESETS)
        return PRESETS[preset]
    return preset


# %% 12_muon_scion sec-mu-certificate 1 63892fb6
def _image(lo: float, hi: float, a: float, b: float, c: float) -> tuple[float, float]:
    """The interval onto which ``a x + b x³ + c x⁵`` maps an interval."""
    roots = []  # of p', in x²
    if c and (square := 9 * b * b - 20 * a * c) >= 0:
        roots = [(-3 * b + sign * square**0.5) / (10 * c) for sign in (-1, 1)]
    elif b and not c:
        roots = [-a / (3 * b)]
    points = [sign * t**0.5 for t in roots if t >= 0 for sign in (-1, 1)]
    points = [lo, hi, *(x for x in points if lo < x < hi)]
    values = [x * (a + x * x * (b + x * x * c)) for x in points]
    return min(values), max(values)


def newton_schulz_bounds(
    preset: str | Coefficients, lo: float = 0.0, hi: float = 1.0
) -> tuple[float, float]:
    """Where an iteration takes singular values from [lo, hi], exactly.

    Args:
        preset: A name of ``PRESETS``, or coefficients.
        lo, hi: The interval; a matrix over its Frobenius norm has [0, 1].

    Source: chapter 12, eq-mu-image.
    """
    for a, b, c in _table(preset):
        lo, hi = _image(lo, hi, a, b, c)
    return lo, hi


# %% 12_muon_scion sec-mu-slack 1 ffa27126
@functools.lru_cache
def newton_schulz_slack(preset: str | Coefficients, end: float = 1.5) -> list[float]:
    """Relative error before each step, up to 1, that leaves at most ``end``.

    Source: chapter 12, eq-mu-slack.
    """
    table, high, slack = _table(preset), 1.0, []
    for k, step in enumerate(table):
        low, top = 0.0, 1.0
        for _ in range(40):
            delta = (low + top) / 2
            ends = newton_schulz_bounds(table[k:], 0.0, high * (1 + delta))
            fits = max(map(abs, ends)) <= end
            low, top = (delta, top) if fits else (low, delta)
        slack.append(low)
        high = max(map(abs, _image(0.0, high, *step)))
    return slack


# %% 12_muon_scion sec-mu-slack 2 1d54fa36
def _check_preset(preset: Any) -> None:
    """Refuse an iteration that one rounding blows up, or that may turn around."""
    if preset == "svd":
        return
    if not isinstance(preset, str | tuple):
        told = f"preset={preset!r} is a {type(preset).__name__}"
        raise TypeError(f"{told}; pass a name or a tuple of triples (a, b, c)")
    if not (table := _table(preset)) or any(len(step) != 3 for step in table):
        raise ValueError(f"preset={preset!r}; pass a tuple of triples (a, b, c)")
    if (least := min(newton_schulz_slack(preset))) < 2**-7:
        told = f"preset={preset!r} blows up after a relative error of {least:.1g}"
        raise ValueError(f"{told}; pass damped(preset), or a name of PRESETS")
    if newton_schulz_bounds(preset)[0] < 0:
        told = f"preset={preset!r} makes some singular values negative: steps uphill"
        raise ValueError(f"{told}; pass a name of PRESETS")


# %% 12_muon_scion sec-mu-code 1 c2c19bc9
#: Where products in bfloat16 are the fast ones: a CPU needs units for them.
_HALF = {
    "cuda": True,
    "cpu": any(
        getattr(torch.cpu, name, bool)()
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    ),
}


def _flat(X: Tensor) -> Tensor:
    """At most one dimension before those of the matrix."""
    return X.flatten(0, -3) if X.ndim > 3 else X


def _over(X: Tensor, size: Tensor) -> Tensor:
    """``X / size`` in place, a size for each matrix."""
    return X.div_(size if X.ndim == 2 else size[..., None, None])


@matrixwise
def _begin(G: Tensor, table: Coefficients, dtype: Any) -> tuple[Tensor, Tensor]:
    """A copy of G over its norm, and its smaller Gram matrix, where that will do."""
    full, dims = wide(G.dtype), (-2, -1)
    tiny = torch.finfo(full).tiny
    if dtype is None:
        half = full == torch.float32 and _HALF.get(G.device.type, False)
        dtype = torch.bfloat16 if half else full
    same = {full, dtype} <= {torch.float32, torch.bfloat16}  # in range
    fresh = {"copy": True, "memory_format": torch.contiguous_format}
    # Squares may overflow: first over a power of two near the largest entry.
    peak = torch.maximum(G.amax(dims), -G.amin(dims)).to(full).clamp_min(tiny)
    X = _over(G.to(dtype if same else full, **fresh), peak.log2().floor().exp2())
    norm = torch.linalg.vector_norm(X, dim=dims).to(full).clamp_min(tiny)
    X = _over(X, norm).to(dtype)
    m, n = X.shape[-2:]
    lift = math.prod([a for a, _, _ in table])
    exact = torch.finfo(dtype).eps / 2 * lift**2 < 0.1
    gram = exact and 2 * max(m, n) > 3 * min(m, n)
    return X, _gram(X) if gram else X.new_empty(*X.shape[:-2], 0, 0)


def _gram(X: Tensor, out: Tensor | None = None) -> Tensor:
    """The smaller of ``X Xᵀ`` and ``Xᵀ X``."""
    tall = X.shape[-2] > X.shape[-1]
    return torch.matmul(*((X.mT, X) if tall else (X, X.mT)), out=out)


def _affine(
    A: Tensor, X: Tensor, Y: Tensor, a: float, b: float, out: Tensor | None = None
) -> Tensor:
    """``a A + b X Y``; a batch of one would copy what is transposed."""
    product = torch.addmm if A.ndim == 2 else torch.baddbmm
    return product(A, X, Y, beta=a, alpha=b, out=out)


@matrixwise
def _powers(R: Tensor, table: Coefficients) -> Tensor:
    """Q with ``Q X`` for the iteration's result, from ``R = X Xᵀ`` alone."""
    if not R.numel():
        return R
    shape, Q = R.shape, None
    R = _flat(R)
    for k, (a, b, c) in enumerate(table):
        Z = _affine(R, R, R, b, c) if c else b * R
        Z.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = Z if Q is None else Z @ Q
        R = Z @ (R @ Z) if k + 1 < len(table) else R
    return Q.view(shape)


@matrixwise
def _end(G: Tensor, X: Tensor, Q: Tensor, table: Coefficients, scale: str) -> Tensor:
    """The result, by Q or by the iteration, in X's place; times the shape's scale."""
    m, n = G.shape[-2:]
    length, X, Q = SCALES[scale](m, n), _flat(X), _flat(Q) * SCALES[scale](m, n)
    if Q.numel():
        X = X @ Q.mT if m > n else Q @ X
    else:  # the last polynomial takes the scale; memory anew costs more than products
        Y, k = torch.empty_like(X), min(m, n)
        A, B = (X.new_empty(*X.shape[:-2], k, k) for _ in range(2))
        *table, last = table
        for a, b, c in (*table, tuple(length * x for x in last)):
            _gram(X, out=A)
            _affine(A, A, A, b, c, out=B) if c else torch.mul(A, b, out=B)
            X, Y = _affine(X, *((X, B) if m > n else (B, X)), a, 1.0, out=Y), X
    return X.reshape(G.shape).to(G.dtype)


@matrixwise
def _scaled(X: Tensor, scale: str) -> Tensor:
    return X * SCALES[scale](*X.shape[-2:])


def orthogonal(G: Any, preset: Any, scale: str = "none", dtype: Any = None) -> Any:
    """``polar`` times the scale of the shape, of a matrix or a batch of matrices."""
    if preset == "svd":
        return _scaled(exact_polar(G), scale=scale)
    table = _table(preset)
    X, R = _begin(G, table=table, dtype=dtype)
    return _end(G, X, _powers(R, table=table), table=table, scale=scale)


# %% 12_muon_scion sec-mu-code 2 bc181145
def polar(
    G: Tensor, preset: str | Coefficients = "polar_express", dtype: Any = None
) -> Tensor:
    """Nearly ``U Vᵀ`` where ``G = U S Vᵀ``: singular values in the preset's bounds.

    Args:
        G: (…, m, n), real. It is not changed. Of a zero matrix the result is zero;
            of one with an infinite or undefined entry, undefined.
        preset: A name of ``PRESETS``, coefficients with slack, or ``"svd"``.
        dtype: To compute in. ``None``: bfloat16 for single precision and below
            where the device has units for it; else single, or double as given.

    Raises:
        ValueError: G is no matrix; a preset without slack, or one that ascends.
        TypeError: G is not of a real floating-point type.

    Source: Jordan et al. (2024); Amsel et al. (2025), arXiv 2505.16932. Chapter
    12, eq-mu-polar.
    """
    _check_preset(preset)
    if G.ndim < 2:
        told = f"G has shape {tuple(G.shape)}"
        raise ValueError(f"{told}; pass a matrix, such as G[None], or a batch of them")
    if not G.is_floating_point():
        raise TypeError(f"G is of {G.dtype}; pass G.float()")
    if not G.numel():
        return G.clone()
    return orthogonal(G, preset, dtype=dtype)


# %% 12_muon_scion sec-mu-rule 1 8e205c69
class _OnMatrices(Optimizer):
    """What Muon and Scion share: one momentum, and no vectors."""

    matrices = True

    def __init__(
        self, params: Any, defaults: dict[str, Any], **options: Unpack[Options]
    ) -> None:
        options.setdefault("nonfinite", "skip")
        super().__init__(params, defaults, **options)
        if all(self._method(group) is not self for group in self.param_groups):
            kind = type(self).__name__
            raise ValueError(
                f"{kind} got no matrix: every group has another algorithm=; "
                "give it the hidden matrices, or use AdamW"
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("scale", group["scale"], SCALES)
        _check_preset(group["preset"])

    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)}


# %% 12_muon_scion sec-mu-rule 2 a10c5c84
class Muon(_OnMatrices):
    """Muon: momentum, then its polar factor.

    ::

        m ← μ m + (1−μ) g;   u = μ m + (1−μ) g (with nesterov), else m
        x ← (1 − lr · weight_decay) x − lr · s · polar(u)

    Args:
        params: Matrices, or groups of them; ``param_groups(model)`` makes them.
            A convolution is flattened to (outputs, rest). A group may say
            ``split_sizes`` or ``num_heads`` (rows that are matrices of their
            own), ``batched`` (experts: (count, m, n)), ``transposed`` (inputs
            by outputs), and ``algorithm`` for what is no matrix.
        lr: Step size, in [0, ∞), in units of the scale. Default 0.02.
        momentum: μ, in [0, 1). Default 0.95.
        nesterov: Look ahead. Default ``True``.
        weight_decay: Decoupled, in [0, ∞). Default 0.
        scale: s, of the shape; a name of ``SCALES``. Default ``"keller"``.
        preset: The iteration; see ``polar``. Default ``"polar_express"``.
        normuon: β₂ of a running mean of each row's square by which rows are
            divided, the norm of the step kept; in [0, 1). ``None``: off.
        cautious: Decay only what the step makes smaller too. Default ``False``.
        constraint: ``"sphere"``: the norm of each matrix stays as it is at
            first, and lr is the length of a step relative to it. ``None``: off.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Raises:
        ValueError: No matrix; a vector without another ``algorithm``; a preset
            without slack; a zero matrix on a sphere.

    Source: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon.
    Chapter 12, eq-mu-rule. State: one number for each parameter.
    """

    precise = ("second_momentum_buffer", "radius")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: str = "keller",
        preset: str | Coefficients = "polar_express",
        normuon: float | None = None,
        cautious: bool = False,
        constraint: Literal["sphere"] | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "scale": scale,
            "preset": preset,
            "normuon": normuon,
            "cautious": cautious,
            "constraint": constraint,
        }
        super().__init__(params, defaults, **options)

    # %% 12_muon_scion sec-mu-rule 3 0d4ba54d
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        m = s.momentum_buffer.lerp_(g, 1 - h.momentum)
        u = g.lerp(m, h.momentum) if h.nesterov else m
        u = orthogonal(u, h.preset, h.scale)
        if h.normuon is not None:
            u, v = by_rows(u, s.second_momentum_buffer, beta=h.normuon)
            s.second_momentum_buffer.copy_(v)
        if h.constraint == "sphere":
            p.copy_(on_sphere(p, u, s.radius, lr=h.lr))
            return
        if h.cautious and h.weight_decay:
            shrinks = (u * p).sign().clamp_min(0)
            p.add_(shrinks * p, alpha=-h.lr * h.weight_decay)
        elif h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        p.add_(u, alpha=-h.lr)

    # %% 12_muon_scion sec-mu-rule 5 b9cebf4f
    def init_state(self, p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        s = super(Muon, self).init_state(p, g, h)
        if h.normuon is not None:
            s["second_momentum_buffer"] = torch.zeros_like(p[:, :1])
        if h.constraint == "sphere":
            s["radius"] = torch.linalg.matrix_norm(p.to(wide(p.dtype)))
        return s


    def _check_group(self, group: dict[str, Any]) -> None:
        super(Muon, self)._check_group(group)
        check_choice("nesterov", group["nesterov"], (False, True))
        check_choice("cautious", group["cautious"], (False, True))
        check_choice("constraint", group["constraint"], (None, "sphere"))
        if group["normuon"] is not None:
            check_range("normuon", group["normuon"], "[0, 1)")
        if group["constraint"] == "sphere":
            if group["weight_decay"]:
                told = f"weight_decay={group['weight_decay']} does nothing on a sphere"
                raise ValueError(f"{told}; pass weight_decay=0, or constraint=None")
            tensors = (x[1] if isinstance(x, tuple) else x for x in group["params"])
            if any(x.numel() and not x.is_meta and not x.any() for x in tensors):
                told = "constraint='sphere' keeps the norm of a matrix, and one is zero"
                raise ValueError(f"{told}; pass constraint=None for its group")


# %% 12_muon_scion sec-mu-rule 4 2cc8fc5b
@matrixwise
def by_rows(u: Tensor, v: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """u over the roots of its rows' mean squares, as long as before; and those."""
    v = torch.lerp(u.square().mean(-1, keepdim=True).to(v.dtype), v, beta)
    w = (u * torch.where(v > 0, v, torch.inf).rsqrt()).to(u.dtype)
    before, after = (torch.linalg.matrix_norm(x, keepdim=True) for x in (u, w))
    return w * torch.where(after > 0, before / after, 0), v


@matrixwise
def on_sphere(p: Tensor, u: Tensor, radius: Tensor, lr: Any) -> Tensor:
    """A step of length ``lr · radius``, and back to the sphere of that radius."""
    r = radius[..., None, None].to(p.dtype)
    size = torch.linalg.matrix_norm(u, keepdim=True)
    q = p - lr * r * u / torch.where(size > 0, size, 1)
    return q * (r / torch.linalg.matrix_norm(q, keepdim=True))


# %% 12_muon_scion sec-mu-scion 1 74605e90
class Scion(_OnMatrices):
    """Scion: towards, or along, the best point of a ball of matrices.

    ::

        m ← μ m + (1−μ) g;   d = −scale · s · polar(m)
        x ← (1 − lr) x + lr · d   (constrained),   x ← x + lr · d   (not)

    Args:
        params: Matrices, or groups of them, as for ``Muon``.
        lr: γ, in [0, ∞); constrained, in [0, 1]. Default 1e-3.
        momentum: μ, in [0, 1). (Its authors' code calls 1 − μ so.) Default 0.9.
        norm: Whose ball: ``"spectral"``, or ``"sign"`` for entries of at most
            1/n (output layers), which uses no scale and no preset. Default
            ``"spectral"``.
        radius: Of the ball, in (0, ∞). Default 50.
        scale: s, of the shape; a name of ``SCALES``. Spectral norm only. Default
            ``"scion"``.
        preset: The iteration; see ``polar``. Spectral norm only. Default
            ``"polar_express"``.
        constrained: Stay in the ball. Default ``True``.
        **options: See ``Options``; ``nonfinite`` is ``"skip"`` by default.

    Source: Pethick et al. (2025), arXiv 2502.07529. Chapter 12, eq-mu-scion.
    """

    ranges = {"radius": "(0, inf)"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        norm: Literal["spectral", "sign"] = "spectral",
        radius: float = 50.0,
        scale: str = "scion",
        preset: str | Coefficients = "polar_express",
        constrained: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "norm": norm,
            "radius": radius,
            "scale": scale,
            "preset": preset,
            "constrained": constrained,
        }
        super().__init__(params, defaults, **options)

    # %% 12_muon_scion sec-mu-scion 2 e6f4ad62
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        m = s.momentum_buffer.lerp_(g, 1 - h.momentum)
        d = orthogonal(m, h.preset, h.scale) if h.norm == "spectral" else signs(m)
        if h.constrained:
            p.mul_(1 - h.lr)
        p.add_(d, alpha=-h.lr * h.radius)


    def _check_group(self, group: dict[str, Any]) -> None:
        super(Scion, self)._check_group(group)
        check_choice("norm", group["norm"], ("spectral", "sign"))
        check_choice("constrained", group["constrained"], (False, True))
        if group["constrained"]:
            check_range("lr", group["lr"], "[0, 1]")


# %% 12_muon_scion sec-mu-scion 3 94c97b5d
@matrixwise
def signs(m: Tensor) -> Tensor:
    """The corner of the ball of ``n · max |entry|``, n inputs, nearest to m."""
    return m.sign() / m.shape[-1]
