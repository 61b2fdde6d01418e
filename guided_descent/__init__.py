# Generated from chapters/*.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head 88111136
"""Guided Descent: the package that the chapters of the book build."""

from guided_descent.adaptive import (
    AdEMAMix,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    NAdam,
    RMSprop,
)
from guided_descent.averaging import (
    EMA,
    GPA,
    LAWA,
    Polyak,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
)
from guided_descent import capture as capture
from guided_descent.core import (
    Optimizer,
    Options,
)
from guided_descent.curvature import (
    GGN,
    EmpiricalFisher,
    Fisher,
    Hessian,
    Jacobian,
    NaturalGradient,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    lanczos,
    spectral_density,
)
from guided_descent.diagonal import (
    AdaHessian,
    Sophia,
)
from guided_descent import engines as engines
from guided_descent import examples as examples
from guided_descent import feature_learning as feature_learning
from guided_descent import initialization as initialization
from guided_descent.kfac import (
    EKFAC,
    FOOF,
    KFAC,
)
from guided_descent.large_batch import (
    CLARS,
    LAMB,
    LARS,
    adaptive_clip_,
    clip_by_norm_,
)
from guided_descent import layers as layers
from guided_descent import layerwise as layerwise
from guided_descent import likelihoods as likelihoods
from guided_descent.modular import ModularDescent
from guided_descent.muon import (
    Muon,
    Scion,
    newton_schulz_bounds,
    polar,
)
from guided_descent import mup as mup
from guided_descent.newton import (
    BFGS,
    LBFGS,
    Newton,
    NewtonCG,
)
from guided_descent.noise import (
    critical_batch_size,
    noise_scale,
    noise_scale_from_batches,
    per_example_gradients,
)
from guided_descent.norms import (
    Lion,
    NormalizedSGD,
    SignSGD,
    Signum,
    dual_norm,
    lmo,
)
from guided_descent.problems import GradientDescent
from guided_descent.routing import param_groups
from guided_descent import schedules as schedules
from guided_descent.sgd import SGD
from guided_descent.shampoo import (
    SOAP,
    KLShampoo,
    PSGDKron,
    Shampoo,
)
from guided_descent import vector as vector

__version__ = "0.1.0"

__all__ = [
    "BFGS",
    "CLARS",
    "EKFAC",
    "EMA",
    "FOOF",
    "GGN",
    "GPA",
    "KFAC",
    "LAMB",
    "LARS",
    "LAWA",
    "LBFGS",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "AdaHessian",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "EmpiricalFisher",
    "Fisher",
    "GradientDescent",
    "Hessian",
    "Jacobian",
    "KLShampoo",
    "Lion",
    "ModularDescent",
    "Muon",
    "NAdam",
    "NaturalGradient",
    "Newton",
    "NewtonCG",
    "NormalizedSGD",
    "Optimizer",
    "Options",
    "PSGDKron",
    "Polyak",
    "RMSprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Scion",
    "Shampoo",
    "SignSGD",
    "Signum",
    "Sophia",
    "__version__",
    "adaptive_clip_",
    "clip_by_norm_",
    "critical_batch_size",
    "dual_norm",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hutchpp_trace",
    "lanczos",
    "lmo",
    "newton_schulz_bounds",
    "noise_scale",
    "noise_scale_from_batches",
    "param_groups",
    "per_example_gradients",
    "polar",
    "spectral_density",
]
