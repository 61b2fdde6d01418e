# Generated from chapters/*.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head bf2a6486
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
from guided_descent.core import (
    ENGINES,
    OPTIONS,
    RANGES,
    Batch,
    Engine,
    Names,
    Nonfinite,
    Optimizer,
    Options,
    check_choice,
    check_range,
)
from guided_descent.problems import (
    GradientDescent,
    LogisticRegression,
    Problem,
    Quadratic,
    Rosenbrock,
    backtracking,
    digits,
    random_rotation,
    rotation,
    steepest_step,
    trajectory,
)
from guided_descent.sgd import (
    SGD,
    optimal_momentum,
    spectral_radius,
)

__version__ = "0.1.0"

__all__ = [
    "ENGINES",
    "OPTIONS",
    "RANGES",
    "SGD",
    "AdEMAMix",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Batch",
    "Engine",
    "GradientDescent",
    "LogisticRegression",
    "NAdam",
    "Names",
    "Nonfinite",
    "Optimizer",
    "Options",
    "Problem",
    "Quadratic",
    "RMSprop",
    "Rosenbrock",
    "__version__",
    "backtracking",
    "check_choice",
    "check_range",
    "digits",
    "optimal_momentum",
    "random_rotation",
    "rotation",
    "spectral_radius",
    "steepest_step",
    "trajectory",
]
