# Generated from chapters/*.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head e82b6250
"""Guided Descent: the package that the chapters of the book build."""

from guided_descent.core import (
    ENGINES,
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
from guided_descent.noise import (
    CriticalBatch,
    NoiseBall,
    NoiseScale,
    critical_batch_size,
    expected_loss,
    gradient_covariance,
    minibatches,
    noise_ball,
    noise_scale,
    noise_scale_from_batches,
    per_example_gradients,
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
    "Batch",
    "CriticalBatch",
    "Engine",
    "GradientDescent",
    "LogisticRegression",
    "Names",
    "NoiseBall",
    "NoiseScale",
    "Nonfinite",
    "Optimizer",
    "Options",
    "Problem",
    "Quadratic",
    "Rosenbrock",
    "__version__",
    "backtracking",
    "check_choice",
    "check_range",
    "critical_batch_size",
    "digits",
    "expected_loss",
    "gradient_covariance",
    "minibatches",
    "noise_ball",
    "noise_scale",
    "noise_scale_from_batches",
    "per_example_gradients",
    "random_rotation",
    "rotation",
    "steepest_step",
    "trajectory",
]
