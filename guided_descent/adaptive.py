# Generated from chapters/04_adaptive_methods.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 1c4b8e17
"""Chapter 04, Adaptive methods."""

__all__ = [
    "AdEMAMix",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "NAdam",
    "RMSprop",
]


# %% 04_adaptive_methods sec-adagrad 1 75d1188c
import math
from typing import Any, Unpack

import torch
from torch import Tensor

from guided_descent.core import Optimizer, Options


# %% 04_adaptive_methods sec-adagrad 2 ae3b8550
class Adagrad(Optimizer):
    """AdaGrad: each coordinate divided by the root of its summed squares.

    ``s ← s + g²;  x ← x − lr / (1 + (t−1) lr_decay) · g / (√s + eps)``, with ``g +
    weight_decay · x`` for g.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η, in units of the parameter; in [0, ∞). Default 0.01.
        lr_decay: Extra decay of the step size, per step; in [0, ∞). Default 0.
        weight_decay: L2 penalty λ, added to the gradient as λx; in [0, ∞). Default 0.
        initial_accumulator_value: What s starts from, in units of gradient squared; in
            [0, ∞). Default 0.
        eps: Added to the root, in units of gradient; in [0, ∞). Default 1e-10.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range.
        TypeError: An argument that is not a number.

    Source: Duchi, Hazan & Singer (2011), JMLR 12, 2121–2159. Chapter 04, eq-adagrad.
    """

    clocks = ("step",)
    ranges = {"lr_decay": "[0, inf)", "initial_accumulator_value": "[0, inf)"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay}
        defaults |= {"initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(params, defaults, **options)

    # %% 04_adaptive_methods sec-adagrad 3 178bfefb
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        if h.weight_decay:
            g = g + p * h.weight_decay
        root = s.sum.addcmul_(g, g).sqrt().add_(h.eps)
        p.addcdiv_(g, root, value=-h.step_size)

    # %% 04_adaptive_methods sec-adagrad 4 bf80794b
    @staticmethod
    def init_state(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        start = h.initial_accumulator_value
        return {
            "step": torch.zeros(()),
            "sum": torch.full_like(p, complex(start, start) if p.is_complex() else start),
        }


    @staticmethod
    def clock(h: Any) -> None:
        h.step_size = h.lr / (1 + (h.step - 1) * h.lr_decay)


    @staticmethod
    def fused(p: list[Tensor], g: list[Tensor], s: Any, h: Any) -> None:
        torch._fused_adagrad_(
            p,
            g,
            s.sum,
            s.step,
            lr=h.lr,
            lr_decay=h.lr_decay,
            weight_decay=h.weight_decay,
            eps=h.eps,
            maximize=h.maximize,
            found_inf=h.found_inf,
        )


# %% 04_adaptive_methods sec-forgetting 1 c30d6041
class RMSprop(Optimizer):
    """RMSprop: each coordinate divided by the root of its mean square.

    ``v ← alpha · v + (1 − alpha) g²;  x ← x − lr · g / (√v + eps)``, with ``g +
    weight_decay · x`` for g. Centered: ``v − m²`` instead of v, with m the mean of g.
    With momentum: ``b ← momentum · b + g / (√v + eps);  x ← x − lr · b``.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η, in units of the parameter; in [0, ∞). Default 0.01.
        alpha: Decay of the mean, per step; in [0, 1). Default 0.99.
        eps: Added to the root, in units of gradient; in [0, ∞). Default 1e-8.
        weight_decay: L2 penalty λ, added to the gradient as λx; in [0, ∞). Default 0.
        momentum: Decay of the sum of steps, in [0, 1). Default 0: none.
        centered: Divide by the standard deviation rather than the root mean square.
            Default False.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range.
        TypeError: An argument that is not a number.

    Source: Tieleman & Hinton (2012), Coursera lecture 6.5; centered: Graves (2013),
    arXiv 1308.0850. Chapter 04, eq-rmsprop.
    """

    clocks = ("step",)
    ranges = {"alpha": "[0, 1)"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, defaults | {"momentum": momentum, "centered": centered}, **options
        )

    # %% 04_adaptive_methods sec-forgetting 2 3b7e8e9c
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        if h.weight_decay:
            g = g + p * h.weight_decay
        v = s.square_avg.mul_(h.alpha).addcmul_(g, g, value=1 - h.alpha)
        if h.centered:
            m = s.grad_avg.lerp_(g, 1 - h.alpha)
            v = (v - m.square()).clamp_min_(0)  # round-off can push it below
        root = v.sqrt().add_(h.eps)
        if h.momentum:
            p.add_(s.momentum_buffer.mul_(h.momentum).addcdiv_(g, root), alpha=-h.lr)
        else:
            p.addcdiv_(g, root, value=-h.lr)

    # %% 04_adaptive_methods sec-forgetting 3 64332c54
    @staticmethod
    def init_state(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        names = (
            ["square_avg"]
            + ["momentum_buffer"] * (h.momentum > 0)
            + ["grad_avg"] * h.centered
        )
        return {"step": torch.zeros(())} | {name: torch.zeros_like(p) for name in names}


# %% 04_adaptive_methods sec-adam 1 c7da1d43
def _decayed(p: Tensor, g: Tensor, h: Any) -> Tensor:
    """Weight decay: shrink the parameter (decoupled), or add to the gradient (L2)."""
    if h.weight_decay and h.decoupled_weight_decay:
        p.mul_(1 - h.lr * h.weight_decay)
    elif h.weight_decay:
        g = g + p * h.weight_decay
    return g


# %% 04_adaptive_methods sec-adam 2 5651470b
def _moments(g: Tensor, s: Any, h: Any) -> tuple[Tensor, Tensor]:
    """Running means of the gradient and of its square, each moved on by one step."""
    b1, b2 = h.betas[:2]
    m = s.exp_avg.lerp_(g, 1 - b1)
    v = s.exp_avg_sq.mul_(b2).addcmul_(g, g, value=1 - b2)
    return m, v


# %% 04_adaptive_methods sec-adam 3 806f4dfe
class Adam(Optimizer):
    """Adam: the gradient's mean divided by the root of its mean square.

    ``m ← β₁ m + (1−β₁) g;  v ← β₂ v + (1−β₂) g²;  x ← x − lr · m̂ / (√v̂ + eps)``, with
    ``m̂ = m / (1−β₁ᵗ)`` and ``v̂ = v / (1−β₂ᵗ)``. AMSGrad divides by the largest v so
    far.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η, in units of the parameter; in [0, ∞). Default 0.001.
        betas: Decays β₁, β₂ of the two means, per step; each in [0, 1). Default (0.9,
            0.999).
        eps: Added to the root, in units of gradient; in [0, ∞). Default 1e-8.
        weight_decay: λ, in [0, ∞). Default 0. As an L2 penalty it is added to the
            gradient as λx.
        amsgrad: Divide by the largest second moment so far. Default False.
        decoupled_weight_decay: Shrink x by lr · λ instead; this makes it ``AdamW``.
            Default False.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range.
        TypeError: An argument that is not a number.

    Source: Kingma & Ba (2014), arXiv 1412.6980; AMSGrad: Reddi et al. (2018), arXiv
    1904.09237. Chapter 04, eq-adam.
    """

    clocks = ("step",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    # %% 04_adaptive_methods sec-adam 4 68c7e84f
    @staticmethod
    def clock(h: Any) -> None:
        b1, b2 = h.betas
        h.step_size = h.lr / (1 - b1**h.step)
        h.root_correction = (1 - b2**h.step) ** 0.5

    # %% 04_adaptive_methods sec-adam 5 b3dc4a2c
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        g = _decayed(p, g, h)
        m, v = _moments(g, s, h)
        if h.amsgrad:
            v = s.max_exp_avg_sq.clamp_min_(v)
        root = v.sqrt().div_(h.root_correction).add_(h.eps)
        p.addcdiv_(m, root, value=-h.step_size)

    # %% 04_adaptive_methods sec-adam 6 87972d05
    @staticmethod
    def init_state(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * h.amsgrad
        return {"step": torch.zeros(())} | {name: torch.zeros_like(p) for name in names}


    @staticmethod
    def fused(p: list[Tensor], g: list[Tensor], s: Any, h: Any) -> None:
        kernel = torch._fused_adamw_ if h.decoupled_weight_decay else torch._fused_adam_
        kernel(
            p,
            g,
            s.exp_avg,
            s.exp_avg_sq,
            s.max_exp_avg_sq if h.amsgrad else [],
            s.step,
            lr=h.lr,
            beta1=h.betas[0],
            beta2=h.betas[1],
            weight_decay=h.weight_decay,
            eps=h.eps,
            amsgrad=h.amsgrad,
            maximize=h.maximize,
            found_inf=h.found_inf,
        )


# %% 04_adaptive_methods sec-weight-decay 1 438c6633
class AdamW(Adam):
    """AdamW: Adam whose weight decay acts on the parameter itself.

    ``x ← (1 − lr · weight_decay) x``, then ``Adam``'s step.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η, in units of the parameter; in [0, ∞). Default 0.001.
        betas: Decays β₁, β₂ of the two means, per step; each in [0, 1). Default (0.9,
            0.999).
        eps: Added to the root, in units of gradient; in [0, ∞). Default 1e-8.
        weight_decay: λ, in [0, ∞); a step shrinks x by the fraction lr · λ. Default
            0.01.
        amsgrad: Divide by the largest second moment so far. Default False.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range.
        TypeError: An argument that is not a number.

    Source: Loshchilov & Hutter (2017), arXiv 1711.05101. Chapter 04, eq-adamw.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            decoupled_weight_decay=True,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A checkpoint of ``Adam`` goes on as AdamW, as in torch."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


# %% 04_adaptive_methods sec-nadam 1 ddf70e5d
class NAdam(Optimizer):
    """NAdam: Adam with Nesterov's step ahead, and a momentum that warms up.

    ``μ_t = β₁ (1 − ½ 0.96^(t · momentum_decay))``, m, v and v̂ as in Adam; ``x ← x − lr
    · ((1−μ_t) g / (1 − μ₁⋯μ_t) + μ_{t+1} m / (1 − μ₁⋯μ_{t+1})) / (√v̂ + eps)``.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η, in units of the parameter; in [0, ∞). Default 0.002.
        betas: Decays β₁, β₂, per step; each in [0, 1). Default (0.9, 0.999).
        eps: Added to the root, in units of gradient; in [0, ∞). Default 1e-8.
        weight_decay: λ, in [0, ∞). Default 0. As an L2 penalty it is added to the
            gradient as λx.
        momentum_decay: Speed of the warm-up, per step; in [0, ∞). Default 0.004; 0
            holds μ at β₁/2.
        decoupled_weight_decay: Shrink x by lr · λ instead. Default False.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range.
        TypeError: An argument that is not a number.

    Source: Dozat (2016), ICLR workshop, openreview OM0jvwB8jIp57ZJjtNEZ. Chapter 04,
    eq-nadam.
    """

    clocks = ("step", "mu_product")
    ranges = {"momentum_decay": "[0, inf)"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    # %% 04_adaptive_methods sec-nadam 2 3d2ad984
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        g = _decayed(p, g, h)
        m, v = _moments(g, s, h)
        root = v.sqrt().div_(h.root_correction).add_(h.eps)
        p.addcdiv_(g, root, value=-h.now).addcdiv_(m, root, value=-h.ahead)

    # %% 04_adaptive_methods sec-nadam 3 94e9feff
    @staticmethod
    def init_state(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        clocks = {
            "step": torch.zeros(()),
            "mu_product": torch.ones((), dtype=torch.float64),
        }
        return clocks | {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


    @staticmethod
    def clock(h: Any) -> None:
        b1, b2 = h.betas
        mu, mu_next = (
            b1 * (1 - 0.5 * 0.96 ** (t * h.momentum_decay)) for t in (h.step, h.step + 1)
        )
        h.mu_product = h.mu_product * mu
        h.now = h.lr * (1 - mu) / (1 - h.mu_product)
        h.ahead = h.lr * mu_next / (1 - h.mu_product * mu_next)
        h.root_correction = (1 - b2**h.step) ** 0.5


# %% 04_adaptive_methods sec-adafactor 1 674948c3
def _min(a: Any, b: Any) -> Any:
    """The smaller of two numbers or tensors, without reading either."""
    if isinstance(b, Tensor):
        a, b = b, a
    return a.clamp(max=b) if isinstance(a, Tensor) else min(a, b)


def _rms(x: Tensor) -> Tensor:
    """Root mean square of all numbers of a tensor."""
    return torch.linalg.vector_norm(x) / max(1, x.numel()) ** 0.5


# %% 04_adaptive_methods sec-adafactor 2 3893ad32
class Adafactor(Optimizer):
    """Adafactor: Adam's second moment by its row and column means, no momentum.

    With ``ρ = t^beta2_decay``, and U clipped to root mean square d::

        R ← R + ρ (row means of G² − R)         C likewise by columns
        V = R C / mean R,   U = G / √V
        X ← X − min(lr, 1/√t) · max(eps₂, RMS(X)) · U

    Vectors and numbers keep a full V.

    Args:
        params: Real parameters or parameter groups. Tensors of more than two dimensions
            are stacks of matrices in their last two.
        lr: Largest step relative to RMS(X), without unit; in [0, ∞). Default 0.01.
        beta2_decay: Exponent of ρ, in (−∞, 0]. Default −0.8.
        eps: Floor of √V, in units of gradient, and floor of RMS(X), in units of the
            parameter; each in [0, ∞). ``None`` as the first means the machine epsilon
            of the data type. Default (None, 0.001).
        d: Largest root mean square of U, in [1, ∞). Default 1.
        weight_decay: Decoupled: a step shrinks X by the fraction lr · weight_decay; in
            [0, ∞). Default 0.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range; a complex parameter.
        TypeError: An argument that is not a number.

    Source: Shazeer & Stern (2018), arXiv 1804.04235; conventions of
    ``torch.optim.Adafactor``. Chapter 04, eq-adafactor.
    """

    clocks = ("step",)
    elementwise = False
    ranges = {
        "beta2_decay": "(-inf, 0]",
        "eps": ("[0, inf) | None", "[0, inf)"),
        "d": "[1, inf)",
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    # %% 04_adaptive_methods sec-adafactor 3 fb2763c8
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        eps1 = torch.finfo(p.dtype).eps if h.eps[0] is None else h.eps[0]
        step_size = _rms(p).clamp_min(h.eps[1]) * h.largest
        if h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        v = g.square()
        if p.dim() > 1:
            r = s.row_var.mul_(1 - h.rho).add_(v.mean(-1, keepdim=True) * h.rho)
            c = s.col_var.mul_(1 - h.rho).add_(v.mean(-2, keepdim=True) * h.rho)
            v.copy_(r / r.mean(-2, keepdim=True).clamp_min(eps1)).mul_(c)
        else:
            v.copy_(s.variance.mul_(1 - h.rho).add_(v * h.rho))
        u = v.clamp_min_(eps1**2).rsqrt_().mul_(g)
        p.addcmul_(u, step_size / (_rms(u) / h.d).clamp_min(1), value=-1)

    # %% 04_adaptive_methods sec-adafactor 4 bf8bec9e
    @staticmethod
    def init_state(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        if p.dim() < 2:
            return {"step": torch.zeros(()), "variance": torch.zeros_like(p)}
        rows, columns = torch.zeros_like(p[..., :1]), torch.zeros_like(p[..., :1, :])
        return {"step": torch.zeros(()), "row_var": rows, "col_var": columns}


    @staticmethod
    def clock(h: Any) -> None:
        h.largest, h.rho = _min(h.lr, h.step**-0.5), h.step**h.beta2_decay


# %% 04_adaptive_methods sec-ademamix 1 b2c09ec4
class AdEMAMix(Optimizer):
    """AdEMAMix: Adam that also follows a second, much slower mean of the gradient.

    m̂, v̂ as in Adam; ``n ← β₃ n + (1−β₃) g;  x ← (1 − lr · weight_decay) x − lr · (m̂
    + α n) / (√v̂ + eps)``.

    Args:
        params: Parameters or parameter groups, as in ``torch.optim``.
        lr: Step size η, in units of the parameter; in [0, ∞). Default 0.001.
        betas: Decays β₁, β₂, β₃ of the fast mean, the square and the slow mean, per
            step; each in [0, 1). Default (0.9, 0.999, 0.9999).
        alpha: Weight α of the slow mean, in [0, ∞). Default 5.
        t_alpha_beta3: Steps over which α grows from 0, and the half-life of the slow
            mean from that of β₁; in (0, ∞), or ``None`` (the default) for no warm-up.
        eps: Added to the root, in units of gradient; in [0, ∞). Default 1e-8.
        weight_decay: λ, decoupled; in [0, ∞). Default 0.
        **options: See ``Options``.

    Raises:
        ValueError: An argument out of range.
        TypeError: An argument that is not a number.

    Source: Pagliardini, Ablin & Grangier (2024), arXiv 2409.03137. Chapter 04,
    eq-ademamix.
    """

    clocks = ("step",)
    ranges = {
        "betas": ("[0, 1)",) * 3,
        "alpha": "[0, inf)",
        "t_alpha_beta3": "(0, inf) | None",
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha_beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "t_alpha_beta3": t_alpha_beta3,
            "eps": eps,
        }
        super().__init__(params, defaults | {"weight_decay": weight_decay}, **options)

    # %% 04_adaptive_methods sec-ademamix 2 d9af62ed
    @staticmethod
    def rule(p: Tensor, g: Tensor, s: Any, h: Any) -> None:
        if h.weight_decay:
            p.mul_(1 - h.lr * h.weight_decay)
        m, v = _moments(g, s, h)
        n = s.exp_avg_slow.lerp_(g, 1 - h.beta3)
        root = v.sqrt().div_(h.root_correction).add_(h.eps)
        p.addcdiv_(m, root, value=-h.step_size).addcdiv_(n, root, value=-h.slow_size)

    # %% 04_adaptive_methods sec-ademamix 3 4bda339d
    @staticmethod
    def init_state(p: Tensor, g: Tensor, h: Any) -> dict[str, Tensor]:
        names = ("exp_avg", "exp_avg_sq", "exp_avg_slow")
        return {"step": torch.zeros(())} | {name: torch.zeros_like(p) for name in names}


    @staticmethod
    def clock(h: Any) -> None:
        b1, b2, h.beta3 = h.betas
        h.slow_size = h.lr * h.alpha
        if h.t_alpha_beta3 is not None:
            done = _min(h.step / h.t_alpha_beta3, 1.0)
            fast, slow = (-1 / math.log(max(b, 1e-16)) for b in (b1, h.beta3))
            h.beta3 = math.e ** (-1 / (fast + (slow - fast) * done))
            h.slow_size = h.slow_size * done
        h.step_size, h.root_correction = h.lr / (1 - b1**h.step), (1 - b2**h.step) ** 0.5
