# Generated from chapters/15_schedules.md by `python -m literate tangle`.
# Do not edit here: edit the chapter, or edit and run `python -m literate untangle`.
# %% head f1af2871
"""Chapter 15, Schedules."""

__all__ = [
    "SHAPES",
    "Length",
    "Schedule",
    "constant",
    "cosine",
    "inverse_sqrt",
    "linear",
    "power_cool",
    "tokens",
    "warmup",
    "wsd",
]


# %% 15_schedules sec-sc-module 1 a47750f4
import math
import operator
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from guided_descent.core import check_range

#: Length of a piece: steps, a fraction of the horizon, or what the others leave.
Length = int | float | None


@dataclass(frozen=True, repr=False)
class Schedule:
    """What the learning rate is multiplied by at every step: ``schedule(t)``.

    ``t`` counts steps from 0, as ``torch.optim.lr_scheduler.LambdaLR`` does. Hand a
    schedule to it, for all groups or one for each::

        schedule = (warmup(0.05) >> wsd()).over(10_000)
        scheduler = LambdaLR(optimizer, schedule)

    ``a >> b`` runs ``b`` after ``a``, scaled by the factor that ``a`` ends with. The
    whole is continuous unless ``b`` begins with a warm-up. A piece of n steps owns its
    steps 0 to n − 1, and step n is the first of the next one::

        warmup         (t + 1) / (n + 1)      the first step is not wasted at 0
        decay          end + (1 − end) · h(t / n),  h from 1 at t = 0 to 0 at t = n
        inverse_sqrt   1 / √(1 + t / offset)

    A decay to 0 is therefore at 0 only *after* its last step, and holds its last value
    from there on. To learn past the end of one that reached 0 is warned of.

    A length is an ``int``, in steps (``tokens(...)`` makes steps of tokens); a
    ``float`` in (0, 1], a fraction of the horizon; or ``None``, what the others leave
    of it. ``over(horizon)`` turns all of them into steps.

    Resuming: ``LambdaLR.state_dict`` stores the field below, plain numbers and
    strings that ``torch.load(weights_only=True)`` reads. Loading it restores the
    schedule that was saved, whatever the new one was built with. To change it
    nevertheless, for instance to start a cooldown, put the new one into
    ``scheduler.lr_lambdas`` after loading.

    A group that is added later is unknown to the scheduler, which then raises at its
    next step. Tell it::

        lr = 1e-3
        now = lr * schedule(scheduler.last_epoch)
        optimizer.add_param_group({"params": new, "lr": now, "initial_lr": lr})
        scheduler.base_lrs.append(lr)
        scheduler.lr_lambdas.append(schedule)

    Args:
        pieces: For each piece its shape, length, end and parameter (the power, or the
            offset of ``inverse_sqrt``). Made by the functions of this module.

    Raises:
        ValueError: A piece follows one that ended at 0, or several lengths are
            ``None``; and when called, a length that is no number of steps yet.

    Source: chapter 15, eq-sc-pieces.
    """

    pieces: tuple[tuple[str, Length, float, float], ...] = ()

    def __post_init__(self) -> None:
        self._check()

    # %% 15_schedules sec-sc-module 3 1f20ce2c
    def __call__(self, t: float) -> float:
        level, lengths = 1.0, [_steps_of(piece) for piece in self.pieces]
        if None in lengths[:-1]:
            first, then = self.pieces[lengths.index(None) :][:2]
            told = f"{_name(first)} never ends, and {_name(then)} never begins"
            raise ValueError(f"{told}; call .over(steps) on the schedule first")
        for piece, n in zip(self.pieces, lengths, strict=True):
            if n is None or t < n:
                return level * _factor(piece, t, n)
            t, level = t - n, level * _factor(piece, n, n)
        if t and not level:
            _warn_of_nothing(self)
        return level

    # %% 15_schedules sec-sc-module 5 a246be44
    def __repr__(self) -> str:
        return " >> ".join(map(_name, self.pieces)) or "constant(0)"

    def _check(self) -> None:
        """Refuse what would be silently without effect."""
        for piece, following in pairwise(self.pieces):
            if piece[0] in ("power", "1-sqrt", "cosine") and piece[2] == 0:
                raise ValueError(
                    f"{_name(following)} follows {_name(piece)}, which ends at 0, and "
                    "would be 0 throughout; give the first one an end > 0"
                )
        if len(rest := [p for p in self.pieces if p[1] is None]) > 1:
            names = " and ".join(map(_name, rest))
            raise ValueError(f"{names} both take the rest; give all but one a length")

    def __rshift__(self, other: "Schedule") -> "Schedule":
        if not isinstance(other, Schedule):
            return NotImplemented
        return Schedule(self.pieces + other.pieces)

    # %% 15_schedules sec-sc-module 6 0b0f2816
    @property
    def steps(self) -> int | None:
        """Number of steps, ``None`` if it never ends."""
        lengths = [_steps_of(piece) for piece in self.pieces]
        return None if None in lengths else sum(lengths)

    def over(self, horizon: int) -> "Schedule":
        """The same schedule with every length in steps, ``horizon`` of them in all.

        The ends of the pieces are rounded, not their lengths, so that nothing is lost.

        Args:
            horizon: Number of steps of the run, at least 1.

        Raises:
            ValueError: The pieces are longer or shorter than the horizon, or one of them
                gets no step.
            TypeError: ``horizon`` is not an integer.
        """
        horizon = _count("horizon", horizon, 1)
        wanted = [n * horizon if isinstance(n, float) else n for _, n, _, _ in self.pieces]
        rest = horizon - sum(n for n in wanted if n is not None)
        free = None in wanted
        if rest < -0.5 or (rest > 0.5 and not free):
            raise ValueError(
                f"{self} takes {horizon - rest:g} of horizon={horizon} steps; change a "
                "length, or leave one out to take what is left"
            )
        end, done, pieces = 0.0, 0, []
        for piece, n in zip(self.pieces, wanted, strict=True):
            end += rest if n is None else n
            taken = math.floor(end + 0.5 + 1e-9) - done
            if taken < 1:
                raise ValueError(
                    f"{_name(piece)} gets {taken} of horizon={horizon} steps; "
                    "make it or the horizon longer, or leave it out"
                )
            pieces.append((piece[0], taken, *piece[2:]))
            done += taken
        return Schedule(tuple(pieces))

    def plot(self, steps: int | None = None, ax: Any = None, **style: Any) -> Any:
        """Draw the factor of every step, and return the axes. Needs matplotlib.

        Args:
            steps: Number of steps to draw; default all of them.
            ax: Axes to draw on; default the current ones.
            **style: Options of matplotlib's ``plot``.

        Raises:
            ValueError: ``steps`` is missing and the schedule never ends.
        """
        import matplotlib.pyplot as plt

        steps = self.steps if steps is None else _count("steps", steps, 1)
        if steps is None:
            raise ValueError(f"{self} never ends; pass plot(steps=...)")
        ax = plt.gca() if ax is None else ax
        shown = sorted({round(k * (steps - 1) / 400) for k in range(401)})
        ax.plot(shown, [self(t) for t in shown], **{"label": str(self)} | style)
        ax.set(xlabel="step t", ylabel="factor")
        return ax


# %% 15_schedules sec-sc-module 2 99850565
#: What is left of a piece of n steps at its step t, with parameter p.
SHAPES = {
    "warmup": lambda t, n, p: (t + 1) / (n + 1),
    "constant": lambda t, n, p: 1.0,
    "inverse_sqrt": lambda t, n, p: 1 / math.sqrt(1 + t / p),
    "power": lambda t, n, p: (1 - t / n) ** p,
    "1-sqrt": lambda t, n, p: 1 - math.sqrt(t / n),
    "cosine": lambda t, n, p: (1 + math.cos(math.pi * t / n)) / 2,
}


# %% 15_schedules sec-sc-module 4 ab936b43
def _factor(piece: Any, t: float, n: int | None) -> float:
    shape, _, end, p = piece
    return end + (1 - end) * SHAPES[shape](t, n, p)


def _steps_of(piece: Any) -> int | None:
    """The length of a piece in steps; ``None`` where it never ends."""
    shape, n = piece[:2]
    if isinstance(n, int) or (n is None and shape in ("constant", "inverse_sqrt")):
        return n
    told = "has no length" if n is None else "is a fraction of a horizon"
    raise ValueError(f"{_name(piece)} {told}; call .over(steps) on the schedule first")


def _warn_of_nothing(schedule: Schedule) -> None:
    told = f"{schedule} ended at 0 after {schedule.steps} steps; a later one learns"
    warnings.warn(f"{told} nothing: make it longer, or pass end > 0", stacklevel=3)


def _name(piece: Any) -> str:
    """How a piece was made: what ``repr`` prints and Python can read again."""
    shape, n, end, p = piece
    name, extra = shape, {"end": end} if end else {}
    if shape == "inverse_sqrt":
        return f"inverse_sqrt({p!r}{'' if n is None else f', T={n!r}'})"
    if shape == "power":
        name = "linear" if p == 1 else "power_cool"
        extra = extra if p == 1 else {"power": p, **extra}
    elif shape == "1-sqrt":
        name, extra = "wsd", {"decay": 1.0, "shape": shape, **extra}
    first = [] if n is None and shape != "warmup" else [repr(n)]
    return f"{name}({', '.join(first + [f'{k}={v!r}' for k, v in extra.items()])})"


# %% 15_schedules sec-sc-module 7 47d05c14
def _count(name: str, value: Any, least: int) -> int:
    """An integer that is large enough."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        told = f"{name}={value!r} is not an integer"
        raise TypeError(f"{told}; pass a number of steps") from None
    if value < least:
        raise ValueError(f"{name}={value} is too small; pass at least {least}")
    return value


def _length(name: str, value: Any, least: int = 1) -> Length:
    """Steps, a fraction of the horizon, or ``None``."""
    if value is None:
        return None
    if not isinstance(value, float):
        return _count(name, value, least)
    if 0 < value <= 1:
        return value
    raise ValueError(
        f"{name}={value!r} is a float, and so a fraction of the horizon, but not in "
        "(0, 1]; pass an int for a number of steps"
    )


def _piece(shape: str, n: Length, end: float = 0.0, p: float = 0.0) -> Schedule:
    return Schedule(() if n == 0 else ((shape, n, float(end), float(p)),))


# %% 15_schedules sec-sc-module 8 218869df
def warmup(n: int | float) -> Schedule:
    """From near 0 to 1 in n steps: step t has ``(t + 1) / (n + 1)``.

    Step n, the first of what follows, is the first with the full rate; no step has
    none. ``warmup(0)`` is nothing.

    Args:
        n: Length, at least 0: steps or a fraction of the horizon, see ``Schedule``.

    Raises:
        ValueError: ``n`` is negative, or a float outside (0, 1].
        TypeError: ``n`` is not a number.

    Source: Goyal et al. (2017), arXiv 1706.02677. Chapter 15, eq-sc-warmup.
    """
    if n is None:
        raise TypeError("n=None is not a number; pass warmup(steps or fraction)")
    return _piece("warmup", _length("n", n, 0))


def constant(T: Length = None) -> Schedule:
    """The factor 1, for T steps or without end.

    Args:
        T: Length, at least 0, see ``Schedule``; default for ever, or to fill a horizon.

    Source: chapter 15, eq-sc-pieces.
    """
    return _piece("constant", _length("T", T, 0))


def linear(T: Length = None, end: float = 0.0) -> Schedule:
    """From 1 to ``end`` on a straight line: ``end + (1 − end) · (1 − t/T)``.

    The last of T steps has the factor ``1/T`` if ``end = 0``: it is not wasted.

    Args:
        T: Length, at least 1, see ``Schedule``; default what is left of a horizon.
        end: The factor that step T would have, in [0, 1]. Default 0.

    Raises:
        ValueError: An argument outside its range.
        TypeError: An argument that is not a number.

    Source: Defazio et al. (2023), arXiv 2310.07831; Zamani & Glineur (2023), arXiv
    2307.11134. Chapter 15, eq-sc-linear.
    """
    return power_cool(T, 1.0, end)


def cosine(T: Length = None, end: float = 0.0) -> Schedule:
    """Half a cosine from 1 to ``end``: ``end + (1 − end) · (1 + cos(π t/T))/2``.

    Args:
        T: Length, at least 1, see ``Schedule``; default what is left of a horizon.
        end: The factor that step T would have, in [0, 1]. Default 0.

    Raises:
        ValueError: An argument outside its range.
        TypeError: An argument that is not a number.

    Source: Loshchilov & Hutter (2017), arXiv 1608.03983. Chapter 15, eq-sc-shapes.
    """
    check_range("end", end, "[0, 1]")
    return _piece("cosine", _length("T", T), end)


# %% 15_schedules sec-sc-module 9 7fc9c0f5
def power_cool(T: Length = None, power: float = 1.2, end: float = 0.0) -> Schedule:
    """From 1 to ``end`` as a power: ``end + (1 − end) · (1 − t/T)^power``.

    Args:
        T: Length, at least 1, see ``Schedule``; default what is left of a horizon.
        power: Exponent, in (0, ∞); 1 is ``linear``, above 1 the end is flatter.
            Default 1.2.
        end: The factor that step T would have, in [0, 1]. Default 0.

    Raises:
        ValueError: An argument outside its range.
        TypeError: An argument that is not a number.

    Source: Attia & Koren (2025), arXiv 2503.09411. Chapter 15, eq-sc-shapes.
    """
    check_range("power", power, "(0, inf)")
    check_range("end", end, "[0, 1]")
    return _piece("power", _length("T", T), end, power)


def wsd(
    T: Length = None,
    decay: int | float = 0.2,
    shape: str = "linear",
    end: float = 0.0,
) -> Schedule:
    """Stable, then decay: the factor 1, and a cooldown at the end. Warm up before it.

    Args:
        T: Length of both together, see ``Schedule``; default what is left of a horizon.
        decay: Length of the cooldown: steps, or a fraction in (0, 1] of T (of the
            horizon where T is ``None``). Default 0.2.
        shape: ``"linear"``, ``"1-sqrt"``, which is ``1 − √s``, or ``"cosine"``.
        end: The factor after the cooldown, in [0, 1]. Default 0.

    Raises:
        ValueError: An argument outside its range; a cooldown that is longer than T;
            ``decay`` in steps of a T that is a fraction.
        TypeError: An argument that is not a number.

    Source: Hu et al. (2024), arXiv 2404.06395; Hägele et al. (2024), arXiv 2405.18392.
    Chapter 15, eq-sc-shapes.
    """
    known = {"linear": "power", "1-sqrt": "1-sqrt", "cosine": "cosine"}
    if shape not in known:
        told = ", ".join(map(repr, known))
        raise ValueError(f"shape={shape!r} is unknown; use one of {told}")
    check_range("end", end, "[0, 1]")
    T, n = _length("T", T), _length("decay", decay)
    if n is None:
        raise TypeError("decay=None is not a number; pass steps or a fraction")
    if isinstance(T, float) and isinstance(n, int):
        told = f"decay={n} is in steps and T={T} a fraction of the horizon"
        raise ValueError(f"{told}; pass both as steps or both as fractions")
    if T is not None and isinstance(n, float):
        n = T * n if isinstance(T, float) else max(1, round(T * n))
    if T is not None and n > T:
        raise ValueError(f"decay={decay} is longer than T={T}; pass a shorter one")
    hold = None if T is None else T - n
    if decay == 1 and isinstance(decay, float):
        hold = 0  # all of it: a plain decay, of whatever length
        n = T
    cool = _piece(known[shape], n, end, shape == "linear")
    return _piece("constant", hold) >> cool


def inverse_sqrt(offset: float, T: Length = None) -> Schedule:
    """Decay that needs no horizon: ``1 / √(1 + t/offset)``.

    ``warmup(n - 1) >> inverse_sqrt(n)`` is the Transformer's schedule, and
    ``inverse_sqrt(n, T) >> linear(m)`` one with a cooldown.

    Args:
        offset: After how many steps the square of the factor is a half, in (0, ∞).
        T: Length, at least 1, see ``Schedule``; default for ever.

    Raises:
        ValueError: An argument outside its range.
        TypeError: An argument that is not a number.

    Source: Vaswani et al. (2017), arXiv 1706.03762; Zhai et al. (2022), arXiv
    2106.04560. Chapter 15, eq-sc-shapes.
    """
    check_range("offset", offset, "(0, inf)")
    return _piece("inverse_sqrt", _length("T", T), 0.0, offset)


def tokens(total: int | float, per_step: int) -> int:
    """The steps it takes to see ``total`` tokens (or examples), rounded up.

    As a length: ``cosine(tokens(10e9, per_step=2**19))``.

    Args:
        total: Tokens to see, in (0, ∞); may be a float such as ``10e9``.
        per_step: Tokens in a batch, over all devices and accumulated gradients; at
            least 1.

    Raises:
        ValueError: An argument outside its range.
        TypeError: An argument that is not a number.

    Source: chapter 15, the section on lengths.
    """
    check_range("total", total, "(0, inf)")
    return math.ceil(total / _count("per_step", per_step, 1))
