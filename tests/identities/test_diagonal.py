"""Chapter 09: what the two estimators estimate, and what AdaHessian and Sophia reduce to."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import guided_descent as gd
from guided_descent.diagonal import AdaHessian, Sophia

seeds = st.integers(0, 2**31 - 1)
fast = settings(max_examples=15, deadline=None)
ONCE = {"betas": (0.0, 0.0), "engine": "loop", "weight_decay": 0.0}


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(*sizes, seed=0):
    torch.manual_seed(seed)
    layers = [x for a, b in itertools.pairwise(sizes) for x in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def diagonal(optimizer, params, name="hessian"):
    return torch.cat([optimizer.state[p][name].flatten() for p in params])


def signs(d):
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * d)


# --- probes


@fast
@given(seeds)
def test_a_probe_is_the_product_with_signs(seed):
    A = normal(seed, 6, 6)
    A = A + A.T
    x, y = normal(seed + 1, 2).requires_grad_(), normal(seed + 2, 4).requires_grad_()
    optimizer = Sophia([x, y], seed=seed, **ONCE)
    optimizer.step(lambda: (z := torch.cat([x, y])) @ A @ z / 2)
    every = signs(6) * (signs(6) @ A)
    assert (every - diagonal(optimizer, [x, y])).abs().amax(1).min() < 1e-12


def test_probes_are_signs_of_either_kind_independent_and_new_in_every_estimate():
    A = normal(0, 3, 3)
    A = A + A.T
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = Sophia([x], hessian_update_every=1, **ONCE)
    candidates, seen = signs(3) * (signs(3) @ A), []
    for _ in range(60):
        optimizer.step(lambda: x @ A @ x / 2)
        e = optimizer.state[x]["hessian"]
        seen.append(int((candidates - e).abs().amax(1).argmin()))
    classes = {min(k, 7 - k) for k in seen}  # z and −z give the same
    assert classes == {0, 1, 2, 3}


def test_samples_are_averaged_and_approach_the_diagonal():
    A = normal(0, 5, 5)
    A = A + A.T
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = Sophia([x], samples=4000, **ONCE)
    optimizer.step(lambda: x @ A @ x / 2)
    noise = ((A.square().sum(1) - A.diagonal() ** 2) / 4000).sqrt()
    assert ((optimizer.state[x]["hessian"] - A.diagonal()).abs() < 5 * noise).all()


@fast
@given(seeds)
def test_in_the_mean_adahessian_squares_to_row_norms(seed):
    A = normal(seed, 4, 4)
    A = A + A.T
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([x], hessian_update_every=1, betas=(0.0, 0.0), engine="loop", lr=0.0, seed=seed)
    total = 0
    for _ in range(300):
        optimizer.step(lambda: x @ A @ x / 2)
        total = total + optimizer.state[x]["exp_hessian_diag_sq"] / 300
    spread = (signs(4) * (signs(4) @ A)).square().std(0)
    assert ((total - A.square().sum(1)).abs() < 6 * spread / 300**0.5 + 1e-12).all()


@fast
@given(seeds)
def test_on_a_diagonal_hessian_adahessian_is_newton(seed):
    c, x = normal(seed, 6).exp(), normal(seed + 1, 6).requires_grad_()
    AdaHessian([x], lr=1.0, betas=(0.0, 0.0), eps=0.0, engine="loop").step(lambda: (c * x**2).sum() / 2)
    assert x.detach().abs().max() < 1e-12


def test_the_window_of_a_convolution_is_averaged():
    c = normal(0, 2, 3, 2, 2)
    results = []
    for average in (True, False):
        x = torch.ones(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        optimizer = AdaHessian([x], betas=(0.0, 0.0), average_window=average, engine="loop")
        optimizer.step(lambda x=x: (c * x**2).sum() / 2)
        results.append(optimizer.state[x]["exp_hessian_diag_sq"])
    torch.testing.assert_close(results[0], c.abs().mean((2, 3), keepdim=True).square().expand_as(c))
    torch.testing.assert_close(results[1], c.square())


def test_a_parameter_that_appears_between_estimates_waits_for_one():
    c = torch.tensor([2.0, 3.0], dtype=torch.float64)
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    late = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([x, late], lr=0.5, hessian_update_every=3, engine="loop")
    for t in range(4):
        both = [x, late] if t else [x]
        optimizer.step(lambda both=both: sum((c * y**2).sum() for y in both))
        assert torch.equal(late, torch.ones(2, dtype=torch.float64)) == (t < 3)
    assert optimizer.state[late]["estimates"] == 1 and optimizer.state[x]["estimates"] == 2


def test_the_corrections_count_steps_and_estimates():
    c = torch.tensor([2.0, -3.0], dtype=torch.float64)
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([x], lr=0.01, betas=(0.9, 0.9), eps=0.0, hessian_update_every=2, engine="loop")
    for _ in range(5):
        before = x.detach().clone()
        optimizer.step(lambda: (c * x).sum() + (c * x**2).sum() / 2 - (c * x).sum())
    # the Hessian stands still, so v with its correction is c² however many estimates there were
    m = optimizer.state[x]["exp_avg"] / (1 - 0.9**5)
    torch.testing.assert_close(before - x.detach(), 0.01 * m / c.abs())


# --- drawn labels


def drawn(loss, model, x, likelihood, draws=4000, **options):
    options |= {"model": model, "likelihood": likelihood, "samples": draws, **ONCE}
    optimizer = Sophia(model.parameters(), lr=0.0, estimator="gnb", **options)
    loss(model(x)).backward()
    optimizer.step()
    return diagonal(optimizer, model.parameters())


@pytest.mark.parametrize(
    ("likelihood", "loss", "operator"),
    [
        ("categorical", lambda f: cross_entropy(f, torch.tensor([0, 1, 2, 0, 1, 1])), nn.CrossEntropyLoss()),
        ("gaussian", lambda f: f.square().sum(1).mean() / 2, "gaussian"),
        (
            "bernoulli",
            lambda f: binary_cross_entropy_with_logits(f, torch.ones_like(f), reduction="none").sum(1).mean(),
            "bernoulli",
        ),
    ],
)
def test_drawn_labels_estimate_the_gauss_newton_diagonal(likelihood, loss, operator):
    model, x = network(3, 4, 3), normal(0, 6, 3)
    y = torch.tensor([0, 1, 2, 0, 1, 1]) if likelihood == "categorical" else torch.zeros(6, 3, dtype=torch.float64)
    exact = gd.Fisher(model, operator, (x, y)).diagonal()
    estimate = drawn(loss, model, x, likelihood)
    assert ((estimate - exact).abs() < 6 * 2 * exact / 4000**0.5).all()


def test_the_scale_of_the_loss_and_the_labels_do_not_enter():
    model, x = network(3, 4, 3), normal(0, 6, 3)
    a = drawn(lambda f: cross_entropy(f, torch.zeros(6, dtype=torch.long)), model, x, "categorical", 1)
    model.zero_grad()
    b = drawn(lambda f: 8 * cross_entropy(f, torch.ones(6, dtype=torch.long)), model, x, "categorical", 1)
    assert torch.equal(a, b)


def test_a_sum_has_the_curvature_of_all_rows_and_examples_that_of_their_places():
    model, x = network(3, 4, 3), normal(0, 6, 3)

    def loss(f):
        return cross_entropy(f, torch.zeros(6, dtype=torch.long))

    def tokens(f):
        return loss(f.flatten(0, 1))

    mean = drawn(loss, model, x, "categorical", 1)
    model.zero_grad()
    total = drawn(lambda f: 6 * loss(f), model, x, "categorical", 1, reduction="sum")
    torch.testing.assert_close(total, 6 * mean)
    model.zero_grad()
    sequences = x.view(2, 3, 3)
    by_token = drawn(tokens, model, sequences, "categorical", 1)
    model.zero_grad()
    by_example = drawn(lambda f: 3 * tokens(f), model, sequences, "categorical", 1, reduction="examples")
    torch.testing.assert_close(by_example, 3 * by_token)


def all_draws(model, x):
    """Sums of gradients over rows, for every choice of labels."""
    rows = []
    for n in range(len(x)):
        of_class = []
        for c in range(3):
            model.zero_grad()
            cross_entropy(model(x[n : n + 1]), torch.tensor([c])).backward()
            of_class.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        rows.append(of_class)
    model.zero_grad()
    draws = itertools.product(range(3), repeat=len(x))
    return torch.stack([sum(row[c] for row, c in zip(rows, draw, strict=True)) for draw in draws])


@pytest.mark.parametrize("seed", range(6))
def test_ignored_labels_and_accumulated_batches(seed):
    model, x, y = network(3, 4, 3), normal(0, 3, 3), torch.tensor([0, 1, 1])
    three, two = all_draws(model, x), all_draws(model, x[:2])

    def estimate(*batches):
        model.zero_grad()
        optimizer = Sophia(model.parameters(), lr=0.0, estimator="gnb", model=model, seed=seed, **ONCE)
        for i, labels in batches:
            cross_entropy(model(x[i]), labels).backward()
        optimizer.step()
        return diagonal(optimizer, model.parameters())

    def among(e, candidates):
        return (candidates - e).abs().amax(1).min() < 1e-13

    every = slice(None)
    assert among(estimate((every, y)), three**2 / 3)
    assert among(estimate((slice(0, 1), y[:1]), (slice(1, 3), y[1:])), three**2 / 3)
    assert among(estimate((every, torch.tensor([0, 1, -100]))), two**2 / 2)
    assert among(estimate((slice(0, 2), y[:2]), (slice(2, 3), torch.tensor([-100]))), two**2 / 2)


def test_labels_differ_by_row_step_and_seed():
    model = nn.Linear(1, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.eye(1, dtype=torch.float64).expand(64, 1)
    found = set()
    optimizer = Sophia(model.parameters(), lr=0.0, estimator="gnb", model=model, hessian_update_every=1, **ONCE)
    for _ in range(8):
        optimizer.zero_grad()
        cross_entropy(model(x), torch.zeros(64, dtype=torch.long)).backward()
        optimizer.step()
        e = float(optimizer.state[model.weight]["hessian"][0, 0])
        found.add(round(e, 9))
        assert e < 10  # one draw for all rows would be 64 · ¼
    assert len(found) > 2


@pytest.mark.parametrize("cls", [Sophia, AdaHessian])
def test_climbing_is_descending_the_negative(cls):
    def end(sign, **options):
        x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
        optimizer = cls([x], lr=0.05, **options)
        for _ in range(4):
            optimizer.step(lambda: sign * (x**4 + torch.tensor([1.0, 3.0, 9.0]) * x**2).sum())
        return x.detach()

    options = {"rho": 100.0, "hessian_update_every": 2} if cls is Sophia else {"hessian_update_every": 2}
    torch.testing.assert_close(end(-1.0, maximize=True, **options), end(1.0, **options), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kfac_first", [False, True])
def test_gradients_arrive_as_they_would_and_two_may_watch_one_model(kfac_first):
    model, x, y = network(3, 4, 3), normal(0, 3, 3), torch.tensor([0, 1, 1])
    candidates = all_draws(model, x) ** 2 / 3
    cross_entropy(model(x), y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    kfac = gd.KFAC(model, lr=0.0) if kfac_first else None  # it compares the loss's gradient with its likelihood's
    both = [
        Sophia(layer.parameters(), lr=0.0, estimator="gnb", model=model, seed=k, **ONCE)
        for k, layer in enumerate((model[0], model[2]))
    ]
    alone = network(3, 4, 3)
    reference = gd.KFAC(alone, lr=0.0)
    cross_entropy(alone(x), y).backward()
    reference.step()
    kfac = kfac or gd.KFAC(model, lr=0.0)
    model.zero_grad()
    cross_entropy(model(x), y).backward()
    for p, g in zip(model.parameters(), plain, strict=True):
        assert torch.equal(p.grad, g)
    kfac.step()
    torch.testing.assert_close(*(dict(optimizer.state_dict()["state"]) for optimizer in (kfac, reference)))
    for optimizer, part in zip(both, (slice(0, 16), slice(16, None)), strict=True):
        assert optimizer.passes == 1
        optimizer.step()
        e = diagonal(optimizer, optimizer.param_groups[0]["params"])
        assert (candidates[:, part] - e).abs().amax(1).min() < 1e-13


def test_a_model_that_computes_its_own_loss():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(3, 4, 3)

        def forward(self, x, y):
            logits = self.inner(x)
            return {"logits": logits, "loss": cross_entropy(logits, y)}

    model, x = Model(), normal(0, 3, 3)
    three, two = all_draws(model.inner, x), all_draws(model.inner, x[:2])
    for labels, candidates, n in (([0, 1, 1], three, 3), ([0, 1, -100], two, 2)):
        model.zero_grad()
        optimizer = Sophia(model.parameters(), lr=0.0, estimator="gnb", model=model, **ONCE)
        model(x, torch.tensor(labels))["loss"].backward()
        optimizer.step()
        e = diagonal(optimizer, model.parameters())
        assert (candidates**2 / n - e).abs().amax(1).min() < 1e-13


def test_only_due_steps_draw_and_a_pass_without_the_model_is_named():
    model, x, y = network(3, 4, 3), normal(0, 6, 3), torch.zeros(6, dtype=torch.long)
    optimizer = Sophia(model.parameters(), estimator="gnb", model=model, hessian_update_every=3)
    for t in range(6):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        assert optimizer.passes == (t % 3 == 0)
        optimizer.step()
    optimizer.zero_grad()
    cross_entropy(model[2](model[1](model[0](x))), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="saw no backward pass .* call the model that was passed"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_discarded_pass_does_not_count():
    model, x, y = network(3, 4, 3), normal(0, 6, 3), torch.zeros(6, dtype=torch.long)
    optimizer = Sophia(model.parameters(), estimator="gnb", model=model)
    for clear in (optimizer.zero_grad, model.zero_grad):
        cross_entropy(model(x), y).backward()
        clear()
        cross_entropy(model(x), y).backward()
        assert optimizer.passes == 1 and optimizer.rows == 6
        clear()


def test_what_is_refused():
    model = network(3, 4, 3)
    for wrong in ({"estimator": "gnb"}, {"model": model}):
        with pytest.raises(ValueError, match="pass model= with estimator='gnb', and only with it"):
            Sophia(model.parameters(), **wrong)
    with pytest.raises(ValueError, match="estimator='gauss' is unknown"):
        Sophia(model.parameters(), estimator="gauss")
    with pytest.raises(ValueError, match=r"got a parameter of shape \(2,\) that is complex; use AdamW for it"):
        Sophia([torch.ones(2, dtype=torch.complex128, requires_grad=True)])
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="does not depend on the parameters"):
        Sophia([x]).step(lambda: torch.ones(()))
    with pytest.raises(TypeError, match="not a loss; let it return a tensor with one element"):
        Sophia([x]).step(lambda: x)


def test_attention_without_a_second_derivative_is_named():
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    attend = nn.functional.scaled_dot_product_attention
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        try:
            attend(q, q, q)
        except RuntimeError:
            pytest.skip("no such kernel here")
        with pytest.raises(RuntimeError, match="sdpa_kernel"):
            Sophia([q]).step(lambda: attend(q, q, q).square().sum())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        Sophia([q]).step(lambda: attend(q, q, q).square().sum())


# --- the rule


@fast
@given(seeds)
def test_without_curvature_sophia_is_signum(seed):
    x = normal(seed, 5).requires_grad_()
    optimizer = Sophia([x], lr=0.01, betas=(0.9, 0.99), rho=0.0, weight_decay=0.0, engine="loop")
    y, m = x.detach().clone(), torch.zeros(5, dtype=torch.float64)
    for t in range(5):
        slope = normal(seed + t, 5)
        optimizer.step(lambda slope=slope: slope @ x + x.square().sum() * 0)
        m = 0.9 * m + 0.1 * slope
        y = y - 0.01 * m.sign()
    torch.testing.assert_close(x.detach(), y, rtol=1e-12, atol=1e-12)


def test_at_negative_curvature_it_descends():
    x = torch.tensor([0.1, -0.1], dtype=torch.float64, requires_grad=True)
    optimizer = Sophia([x], lr=0.01, rho=0.5, weight_decay=0.0)
    for _ in range(5):
        optimizer.step(lambda: -x.square().sum())
    assert x[0] > 0.14 and x[1] < -0.14


def test_estimates_are_kept_in_single_precision():
    model, x = network(3, 4, 3).bfloat16(), normal(0, 6, 3).bfloat16()
    optimizer = Sophia(model.parameters(), estimator="gnb", model=model)
    cross_entropy(model(x), torch.zeros(6, dtype=torch.long)).backward()
    optimizer.step()
    assert all(state["hessian"].dtype == torch.float32 for state in optimizer.state.values())


def test_a_compiled_model_has_no_second_derivative_and_the_error_says_what_to_do():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(8, 4)
    optimizer = gd.AdaHessian(model.parameters())
    with pytest.raises(RuntimeError, match="call the model itself in the closure, not a compiled one"):
        optimizer.step(lambda: compiled(x).square().mean())
