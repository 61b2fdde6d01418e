"""Chapter 23: what lies in an interval passes; all else is refused with the argument, the value and the remedy."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import guided_descent as gd
from guided_descent.core import check_range


def refused(error, message, *args):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check_range(*args)


@given(
    st.sampled_from("[("), st.sampled_from("])"), st.integers(-3, 3), st.integers(-3, 3), st.floats(-4, 4),
    st.sampled_from(["", " | None"]),
)  # fmt: skip
def test_an_interval_holds_what_its_brackets_say(left, right, low, high, x, none):
    inside = (low <= x if left == "[" else low < x) and (x <= high if right == "]" else x < high)
    interval = f"{left}{low}, {high}{right}"
    for value in (x, np.float64(x), torch.tensor(x, dtype=torch.float64), torch.tensor([x], dtype=torch.float64)):
        if inside:
            check_range("x", value, interval + none)
        else:
            remedy = f"pass a number in {interval}" + " or None" * bool(none)
            refused(ValueError, f"x={x} is outside its range; {remedy}", "x", value, interval + none)


@given(st.integers(-3, 12), st.sampled_from(["[", "("]))
def test_an_integer_interval_holds_integers(n, left):
    interval = f"{left}1, 9]"
    for value in (n, np.int64(n)):
        if n + (left == "[") > 1 and n <= 9:
            check_range("n", value, interval + " int")
        else:
            message = f"n={n} is outside its range; pass an integer in {interval}"
            refused(ValueError, message, "n", value, interval + " int")


NO_INTEGERS = [2.0, 2.5, math.inf, math.nan, True, "2", torch.tensor(2), torch.ones(2), [2]]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_what_is_no_integer_is_refused(value):
    message = f"n={value!r} is a {type(value).__name__}; pass an integer in [1, inf)"
    refused(TypeError, message, "n", value, "[1, inf) int")
    refused(TypeError, message + " or None", "n", value, "[1, inf) int | None")


def test_none_is_a_value_only_where_the_interval_says_so():
    check_range("x", None, "(0, inf) | None")
    check_range("x", None, "[1, inf) int | None")
    refused(TypeError, "x=None is a NoneType; pass a number in (0, inf)", "x", None, "(0, inf)")
    refused(TypeError, "x=None is a NoneType; pass an integer in [1, inf)", "x", None, "[1, inf) int")


@pytest.mark.parametrize("value", ["fast", True, [0.1], 1j], ids=repr)
def test_what_is_no_number_is_refused(value):
    message = f"x={value!r} is a {type(value).__name__}; pass a number in [0, inf)"
    refused(TypeError, message, "x", value, "[0, inf)")
    refused(TypeError, message + " or None", "x", value, "[0, inf) | None")


def test_numbers_that_are_none_and_tensors_of_several():
    refused(ValueError, "x=nan is outside its range; pass a number in [0, inf)", "x", math.nan, "[0, inf)")
    refused(ValueError, "x=inf is outside its range; pass a number in [0, inf)", "x", math.inf, "[0, inf)")
    check_range("x", math.inf, "(0, inf]")
    message = "x has shape (2,); pass a number in [0, inf) or a one-element tensor"
    refused(ValueError, message, "x", torch.ones(2), "[0, inf)")


def test_a_tuple_has_an_interval_for_each_number():
    pair = ("[0, inf) | None", "[0, 1)")
    for value in ((None, 0.5), [3.0, 0.0]):
        check_range("x", value, pair)
    refused(ValueError, "x=1.0 is outside its range; pass a number in [0, 1)", "x", (0.5, 1.0), pair)
    refused(ValueError, "x=-1.0 is outside its range; pass a number in [0, inf) or None", "x", (-1.0, 0.5), pair)
    refused(TypeError, "x=None is a NoneType; pass a number in [0, 1)", "x", (None, None), pair)
    for value in (0.5, None, (0.5,), (0.5, 0.5, 0.5), torch.ones(2)):
        message = f"x={value!r} has another form; pass 2 numbers, in [0, inf) | None, [0, 1)"
        refused(ValueError, message, "x", value, pair)


OUT = "is outside its range; pass"


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (gd.AdamW, {"betas": 0.9}, "betas=0.9 has another form; pass 2 numbers, in [0, 1), [0, 1)"),
        (gd.AdamW, {"eps": None}, "eps=None is a NoneType; pass a number in [0, inf)"),
        (gd.AdEMAMix, {"betas": (0.9, 0.99, 1.0)}, f"betas=1.0 {OUT} a number in [0, 1)"),
        (gd.AdEMAMix, {"t_alpha_beta3": 0}, f"t_alpha_beta3=0.0 {OUT} a number in (0, inf) or None"),
        (gd.Adafactor, {"eps": (-1.0, 1.0)}, f"eps=-1.0 {OUT} a number in [0, inf) or None"),
        (gd.Adafactor, {"eps": (1e-30, None)}, "eps=None is a NoneType; pass a number in [0, inf)"),
        (gd.Adafactor, {"eps": 1.0}, "eps=1.0 has another form; pass 2 numbers, in [0, inf) | None, [0, inf)"),
        (gd.NewtonCG, {"max_cg": True}, "max_cg=True is a bool; pass an integer in [1, inf) or None"),
        (gd.BFGS, {"max_iter": None}, "max_iter=None is a NoneType; pass an integer in [1, inf)"),
        (gd.BFGS, {"max_eval": 0}, f"max_eval=0 {OUT} an integer in [1, inf) or None"),
        (gd.BFGS, {"initial_scale": 0.0}, f"initial_scale=0.0 {OUT} a number in (0, inf) or None"),
        (gd.LBFGS, {"history_size": 2.5}, "history_size=2.5 is a float; pass an integer in [1, inf)"),
    ],
)
def test_optimizers_refuse_by_their_ranges(method, arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        method([torch.ones(2, requires_grad=True)], **arguments)
