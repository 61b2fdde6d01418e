# Generated from chapters/*.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head e1fd6e27
"""Guided Descent: the package that the chapters of the book build."""

from guided_descent.core import (
    ENGINES,
    RANGES,
    Engine,
    Optimizer,
    Options,
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

__version__ = "0.1.0"

__all__ = [
    "ENGINES",
    "RANGES",
    "Engine",
    "GradientDescent",
    "LogisticRegression",
    "Optimizer",
    "Options",
    "Problem",
    "Quadratic",
    "Rosenbrock",
    "__version__",
    "backtracking",
    "check_range",
    "digits",
    "random_rotation",
    "rotation",
    "steepest_step",
    "trajectory",
]
