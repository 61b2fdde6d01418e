"""What the base offers to methods beyond elementwise ones: matrices, turns, directions, an algorithm per group."""

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import guided_descent as gd
from guided_descent.core import ALGORITHMS, Optimizer, share
from guided_descent.engines import CHUNK, Batch, matrixwise
from guided_descent.examples import PlainMuon as Muon
from guided_descent.examples import PlainSOAP as SOAP
from guided_descent.examples import exact_polar as polar

ENGINES = ["loop", "foreach", "compile"]
every_engine = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(autouse=True)
def traced_but_not_generated(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()


def matrices(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def run(optimizer, params, steps):
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


# Matrices


def test_a_matrix_function_runs_once_for_each_shape():
    calls = []

    @matrixwise
    def scaled(a, b, factor):
        calls.append((tuple(a.shape), tuple(b.shape)))
        return factor * a @ b, a.sum((-2, -1))

    a, b = matrices((2, 3), (4, 3), (2, 3), (2, 3)), matrices((3, 5), (3, 5), (3, 5), (3, 1))
    product, total = scaled(Batch(a), Batch(b), 2.0)
    assert sorted(calls) == [((1, 2, 3), (1, 3, 1)), ((1, 4, 3), (1, 3, 5)), ((2, 2, 3), (2, 3, 5))]
    for x, y, z, s in zip(a, b, product.tensors, total.tensors, strict=True):
        torch.testing.assert_close((z, s), (2 * x @ y, x.sum()), rtol=1e-14, atol=1e-14)
    alone, _ = scaled(a[0], b[0], 2.0)
    assert calls[-1] == ((2, 3), (3, 5)) and torch.equal(alone, 2 * a[0] @ b[0])


def test_a_foreach_rule_stacks_small_matrices_and_no_more_than_a_chunk(monkeypatch):
    shapes = []

    def spy(M):
        shapes.append(tuple(M.shape))
        return polar(M)

    monkeypatch.setattr("guided_descent.examples.exact_polar", matrixwise(spy))
    params = matrices(*[(8, 8)] * 5, (4, 8), *[(8, 8)] * 5)
    run(Muon(params, engine="foreach"), params, range(1))
    assert sorted(shapes) == [(1, 4, 8), (10, 8, 8)]
    shapes.clear()
    params = matrices(*[(2, CHUNK // 4)] * 3)
    run(Muon(params, engine="foreach"), params, range(1))
    assert sorted(shapes) == [(1, 2, CHUNK // 4), (2, 2, CHUNK // 4)]
    shapes.clear()
    params = matrices(*[(2, CHUNK // 4), (4, CHUNK // 8)] * 2)  # like shapes are brought together first
    run(Muon(params, engine="foreach"), params, range(1))
    assert sorted(shapes) == [(2, 2, CHUNK // 4), (2, 4, CHUNK // 8)]


def test_a_batch_multiplies_and_transposes_one_by_one():
    a, b = matrices((2, 3), (4, 3)), matrices((5, 3), (1, 3))
    expected = [x @ y.T for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close((Batch(a) @ Batch(b).mT).tensors, expected, rtol=0, atol=0)
    between = Batch(a).lerp(Batch([2 * x for x in a]), 0.25)
    torch.testing.assert_close(between.tensors, [1.25 * x for x in a], rtol=1e-14, atol=0)


@every_engine
@pytest.mark.parametrize("cls", [Muon, SOAP])
def test_declared_splits_and_blocks_are_matrices_of_their_own(cls, engine):
    (whole,), options = matrices((7, 6)), {"lr": 0.1, "engine": engine} | ({"eps": 0.1} if cls is SOAP else {})
    parts = [x.clone().requires_grad_() for x in whole.detach().split([4, 3])]
    (blocked,) = matrices((7, 6))
    blocks = [x.clone().requires_grad_() for x in grid(blocked.detach())]
    optimizers = [
        cls([{"params": [whole], "split_sizes": [4, 3]}], **options),
        cls(parts, **options),
        cls([{"params": [blocked], "split_sizes": [4, 3], "block_size": 3}], **options),
        cls(blocks, **options),
    ]
    for t in range(3):
        g = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        whole.grad = blocked.grad = g
        for p, x in zip([*parts, *blocks], [*g.split([4, 3]), *grid(g)], strict=True):
            p.grad = x
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(list(whole.detach().split([4, 3])), [p.detach() for p in parts], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grid(blocked.detach()), [p.detach() for p in blocks], rtol=1e-12, atol=1e-12)


def grid(x):
    """Parts of 4 and 3 rows in blocks of at most 3: as equal as can be."""
    return [block for part in x.split([2, 2, 3]) for block in part.split(3, 1)]


@every_engine
def test_a_convolution_is_flattened_in_any_layout(engine):
    (flat,), (plain,), (last,) = matrices((4, 12)), matrices((4, 3, 2, 2)), matrices((4, 3, 2, 2))
    last.data = last.data.contiguous(memory_format=torch.channels_last)
    assert torch.equal(flat.view(4, 3, 2, 2), last)
    results = [run(Muon([p], lr=0.1, engine=engine), [p], range(3)) for p in (plain, last)]
    optimizer = Muon([flat], lr=0.1, engine=engine)
    for t in range(3):
        generator = torch.Generator().manual_seed(t)
        flat.grad = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64).flatten(1)
        optimizer.step()
    expected = [flat.detach().view(4, 3, 2, 2)]
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


class Remembers(Optimizer):
    """A rule for matrices whose state begins as the gradient, and whose steps show it."""

    matrices = True

    def __init__(self, params, lr=1.0, **options):
        super().__init__(params, {"lr": lr}, **options)

    def init_state(self, p, g, h):
        return {"first": g}

    @staticmethod
    def rule(p, g, s, h):
        p.copy_(s.first)
        s.first.add_(g)


@every_engine
@pytest.mark.parametrize("group", [{}, {"block_size": 3}, {"split_sizes": [1, 3]}, {"maximize": True}])
def test_elementwise_state_of_matrices_has_the_parameters_shape_in_any_layout(engine, group):
    (p,) = matrices((4, 3, 2, 2))
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    optimizer = Remembers([{"params": [p], **group}], engine=engine)
    for k in (1, 2):
        p.grad = torch.arange(48.0, dtype=torch.float64).view(4, 3, 2, 2)
        optimizer.step()
        g = -p.grad if "maximize" in group else p.grad  # also what the state begins with
        assert torch.equal(p, k * g) and torch.equal(optimizer.state[p]["first"], (k + 1) * g)


def test_blocks_are_the_fewest_and_as_equal_as_can_be():
    (p,) = matrices((8, 7))
    optimizer = SOAP([p], lr=0.1, block_size=3)
    run(optimizer, [p], range(1))
    sides = [tuple(optimizer.state[p][f"{side}{k}"].shape[0] for side in ("left", "right")) for k in ("", ".1", ".3")]
    assert sides == [(3, 3), (3, 2), (3, 3)] and "left.8" in optimizer.state[p] and "left.9" not in optimizer.state[p]


def test_state_of_blocks_is_flat_and_precise():
    params = matrices((6, 4), dtype=torch.bfloat16)
    optimizer = SOAP([{"params": params, "split_sizes": [4, 2]}], lr=0.1)
    run(optimizer, params, range(2))
    state = optimizer.state_dict()["state"][0]
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    assert shapes["left"] == (4, 4) and shapes["left.1"] == (2, 2) and shapes["exp_avg"] == (6, 4)
    assert state["left.1"].dtype == torch.float32 and state["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [torch.ones(3)]}, r"takes matrices and got a parameter of shape \(3,\); .*algorithm='adamw'"),
        ({"params": [("b", torch.ones(3))]}, r"got a parameter 'b' of shape \(3,\)"),
        ({"params": [torch.ones(4, 4)], "split_sizes": [3, 2]}, r"split_sizes=\[3, 2\] adds up to 5 .* has 4 rows"),
    ],
)
def test_what_is_no_matrix_is_refused_by_name(group, message):
    with pytest.raises(ValueError, match=message):
        Muon([group])
    optimizer = Muon([("w", matrices((2, 2))[0])])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_polar_leaves_out_what_is_rounding():
    (M,) = matrices((4, 4))
    low = (M[:, :2] @ M[:2]).detach()
    U, S, Vh = torch.linalg.svd(low)
    torch.testing.assert_close(polar(low), U[:, :2] @ Vh[:2], rtol=1e-10, atol=1e-10)
    assert not polar(torch.zeros(3, 2)).any()
    torch.testing.assert_close(polar(torch.stack([low, M.detach()]))[1], polar(M.detach()), rtol=1e-12, atol=1e-12)


@every_engine
def test_soap_is_adam_in_the_eigenbasis_of_the_running_means(engine):
    """Written out with explicit sums; past two refreshes, with different decays and a matrix that is not square."""
    (x,), (b1, b2), lr, eps = matrices((4, 3)), (0.9, 0.8), 0.1, 1e-3
    y, m, v = x.detach().clone(), torch.zeros(4, 3).double(), torch.zeros(4, 3).double()
    optimizer = SOAP([x], lr=lr, betas=(b1, b2), eps=eps, precondition_every=2, engine=engine)
    for t in range(6):
        g = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        x.grad = g
        optimizer.step()
        if t == 0:
            L, R = g @ g.T, g.T @ g
            QL, QR = (torch.linalg.eigh(S)[1].flip(-1) for S in (L, R))
            continue
        G = QL.T @ g @ QR
        m, v = b1 * m + (1 - b1) * G, b2 * v + (1 - b2) * G**2
        y -= lr * QL @ (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps / (1 - b2**t) ** 0.5)) @ QR.T
        L, R = b2 * L + (1 - b2) * g @ g.T, b2 * R + (1 - b2) * g.T @ g
        if t % 2 == 0:
            whole = QL @ m @ QR.T
            QL, QR = (torch.linalg.eigh(S)[1].flip(-1) for S in (L, R))
            m = QL.T @ whole @ QR
    torch.testing.assert_close(x.detach(), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["loop", "foreach"])
@pytest.mark.parametrize("cls", [Muon, SOAP])
def test_a_run_that_starts_turned_and_sees_turned_gradients_is_the_turned_run(cls, engine):
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))
    start, *gradients = torch.randn(6, 4, 3, dtype=torch.float64, generator=generator)

    def descend(turn):
        x = (turn @ start).requires_grad_()
        optimizer = cls([x], lr=0.1, engine=engine)
        for g in gradients:
            x.grad = turn @ g
            optimizer.step()
        return x.detach()

    torch.testing.assert_close(descend(Q), Q @ descend(torch.eye(4).double()), rtol=1e-12, atol=1e-12)


# Turns


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 3))
def test_shares_are_within_four_thirds_of_the_best(costs, bins):
    where = share(costs, bins)
    load = [sum(c for c, b in zip(costs, where, strict=True) if b == k) for k in range(bins)]
    best = min(
        max(sum(c for c, b in zip(costs, choice, strict=True) if b == k) for k in range(bins))
        for choice in itertools.product(range(bins), repeat=len(costs))
    )
    assert sum(load) == sum(costs) and max(load) <= (4 / 3 - 1 / (3 * bins)) * best + 1e-9


def test_shares_are_the_largest_first_and_by_number():
    assert share([1, 5, 5, 3], 2) == [1, 0, 1, 0]
    assert share([2, 2, 2, 2], 2) == [0, 1, 0, 1] and share([], 3) == []


@every_engine
def test_each_basis_is_renewed_once_in_a_period_in_steps_of_like_cost(engine):
    params = matrices(*[(8, 8)] * 12, (16, 16))  # the large one costs as much as eight
    optimizer = SOAP(params, lr=0.1, precondition_every=3, engine=engine)
    run(optimizer, params, range(1))
    renewed = []
    for t in range(1, 7):
        before = [optimizer.state[p]["left_basis"].clone() for p in params]
        run(optimizer, params, [t])
        after = [optimizer.state[p]["left_basis"] for p in params]
        renewed.append({i for i, (x, y) in enumerate(zip(before, after, strict=True)) if not torch.equal(x, y)})
    assert [len(x) for x in renewed] == [6, 6, 1] * 2 and renewed[2] == {12}
    assert renewed[0] | renewed[1] == set(range(12)) and renewed[3:] == renewed[:3]
    assert optimizer.param_groups[0]["steps"] == 7


@every_engine
def test_turns_are_over_all_groups_and_go_on_after_a_load(engine):
    def build(params):
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        return SOAP(groups, lr=0.1, eps=0.1, precondition_every=4, engine=engine)

    whole, params = matrices(*[(4, 4)] * 4), matrices(*[(4, 4)] * 4)
    expected = run(build(whole), whole, range(8))
    first, second = build(params), build(params)
    run(first, params, range(3))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(run(second, params, range(3, 8)), expected, rtol=0, atol=0)
    due = [first._due(group) for group in first.param_groups]
    assert len(set.union(*due)) == 1  # four matrices, four steps, two groups


# Directions


class Twice(Optimizer):
    """Heavy ball along twice the gradient of the first parameter."""

    def __init__(self, params, lr=0.1, momentum=0.9, **options):
        super().__init__(params, {"lr": lr, "momentum": momentum}, **options)

    def init_state(self, p, g, h):
        return {"momentum_buffer": torch.zeros_like(p)}

    def directions(self, work, finite):
        self.calls = getattr(self, "calls", 0) + 1
        return {p: 2 * p.grad for _, params in work for p in params[:1]}

    @staticmethod
    def rule(p, g, s, h):
        p.add_(s.momentum_buffer.mul_(h.momentum).add_(g), alpha=-h.lr)


@every_engine
@pytest.mark.parametrize("maximize", [False, True])
def test_directions_replace_gradients_and_leave_them_alone(engine, maximize):
    params, expected = matrices((3, 2), (2, 2)), matrices((3, 2), (2, 2))
    optimizer = Twice(params, engine=engine, maximize=maximize)
    reference = gd.SGD(expected, lr=0.1, momentum=0.9, engine="loop", maximize=maximize)
    for t in range(3):
        for x in (params, expected):
            for k, p in enumerate(x):
                p.grad = torch.full_like(p, 1.0 + t + k) * (2 if x is expected and k == 0 else 1)
        optimizer.step()
        reference.step()
        assert params[0].grad.unique().item() == 1.0 + t
    torch.testing.assert_close(params, expected, rtol=1e-14, atol=0)


def test_directions_are_asked_for_in_a_skipped_step_too():
    params = matrices((2, 2))
    optimizer = Twice(params, nonfinite="skip")
    params[0].grad = torch.full((2, 2), float("nan"), dtype=torch.float64)
    optimizer.step()
    assert optimizer.calls == 1 and optimizer.skipped_steps == 1 and not optimizer.state
    assert torch.equal(params[0], matrices((2, 2))[0])


# An algorithm per group


@every_engine
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_group_of_another_algorithm_is_stepped_as_by_that_algorithm(name, engine):
    rest = ((4, 2), (2, 3)) if name in ("muon", "scion") else ((4,), (5,))
    weights, biases = matrices((4, 3), (3, 3)), matrices(*rest)
    twins = matrices((4, 3), (3, 3)), matrices(*rest)
    mixed = Muon([{"params": weights}, {"params": biases, "algorithm": name, "lr": 0.05}], lr=0.1, engine=engine)
    module, _, cls = ALGORITHMS[name].partition(".")
    alone = Muon(twins[0], lr=0.1, engine=engine), getattr(gd, cls)(twins[1], lr=0.05, engine=engine)
    for t in range(4):
        run(mixed, weights + biases, [t])
        for p, q in zip(twins[0] + twins[1], weights + biases, strict=True):
            p.grad = q.grad
        for optimizer in alone:
            optimizer.step()
    torch.testing.assert_close(weights + biases, twins[0] + twins[1], rtol=0, atol=0)
    assert set(mixed.state[biases[0]]) == set(alone[1].state[twins[1][0]])


@pytest.mark.parametrize("name", ["klshampoo", "psgdkron", "shampoo", "soap"])
def test_a_group_of_matrices_keeps_the_turns_of_its_own_algorithm(name):
    """Beside another method that also renews every three steps, and beside a group of its own class."""
    shapes = (4, 3), (5, 5), (6, 2), (3, 3)
    cls = getattr(gd, ALGORITHMS[name].partition(".")[2])
    every = {} if cls is gd.PSGDKron else {"precondition_every": 3}
    first, second = matrices(*shapes), matrices(*shapes)
    twins = matrices(*shapes), matrices(*shapes)
    group = {"params": second, "algorithm": name, "lr": 0.05, **every}
    mixed = gd.Shampoo([{"params": first}, group], lr=0.1, precondition_every=3, engine="loop")
    if cls is gd.Shampoo:
        groups = [{"params": twins[0]}, {"params": twins[1], "lr": 0.05}]
        alone = [gd.Shampoo(groups, lr=0.1, precondition_every=3, engine="loop")]
    else:
        alone = [
            gd.Shampoo(twins[0], lr=0.1, precondition_every=3, engine="loop"),
            cls(twins[1], lr=0.05, engine="loop", **every),
        ]
    for t in range(8):
        run(mixed, first + second, [t])
        for p, q in zip(twins[0] + twins[1], first + second, strict=True):
            p.grad = q.grad
        for optimizer in alone:
            optimizer.step()
    torch.testing.assert_close(first + second, twins[0] + twins[1], rtol=0, atol=0)


def test_a_group_has_its_algorithms_defaults_and_the_optimizers_options():
    optimizer = Muon(matrices((2, 2)), lr=0.3, maximize=True)
    optimizer.add_param_group({"params": matrices((2,)), "algorithm": "adamw"})
    group = optimizer.param_groups[1]
    assert group["lr"] == 1e-3 and group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0.01
    assert group["maximize"] and group["nonfinite"] == "skip"


@pytest.mark.parametrize(
    ("alias", "algorithm"),
    [({"use_muon": False}, "adamw"), ({"use_muon": True}, None), ({"use_fallback": True}, "adamw"),
     ({"use_fallback": False}, None), ({"kind": "sgd"}, "sgd")],
)  # fmt: skip
def test_other_libraries_names_are_understood(alias, algorithm):
    optimizer = Muon([{"params": matrices((2, 2)), **alias}])
    assert optimizer.param_groups[0].get("algorithm") == algorithm
    assert not alias.keys() & optimizer.param_groups[0].keys()


def test_what_a_group_may_not_ask_for_is_said():
    with pytest.raises(ValueError, match="algorithm='lion9' is unknown; use one of 'adafactor', .*'sgd'"):
        Muon([{"params": matrices((2,)), "algorithm": "lion9"}])
    with pytest.raises(ValueError, match=r"betas=1.0 is outside its range; pass a number in \[0, 1\)"):
        Muon([{"params": matrices((2,)), "algorithm": "adamw", "betas": (1.0, 0.9)}])
    first, second = matrices((2, 2)), matrices((2, 2))
    saved = Muon([{"params": first, "algorithm": "adamw"}])
    run(saved, first, range(1))
    plain = Muon(second)
    with pytest.raises(ValueError, match="steps a group by algorithm='adamw', this optimizer by None; build it as"):
        plain.load_state_dict(saved.state_dict())
    assert not plain.state


def test_a_checkpoint_with_algorithms_goes_on_and_copies_step_on():
    def build(weights, biases):
        return Muon([{"params": weights}, {"params": biases, "algorithm": "nadam"}], lr=0.1)

    weights, biases = matrices((4, 3)), matrices((4,), (5,))
    optimizer = build(weights, biases)
    run(optimizer, weights + biases, range(2))
    twins = [p.detach().clone().requires_grad_() for p in weights + biases]
    other = build(twins[:1], twins[1:])
    other.load_state_dict(optimizer.state_dict())
    assert len({id(other.state[p]["mu_product"]) for p in twins[1:]}) == 1
    saved = optimizer.state_dict()["state"]
    assert saved[1]["step"] is not saved[2]["step"]
    assert all(torch.equal(a, b) for a, b in zip(
        run(other, twins, range(2, 4)), run(optimizer, weights + biases, range(2, 4)), strict=True))  # fmt: skip


# What a state must be


def test_state_that_a_changed_hyperparameter_asks_for_is_named():
    params = matrices((3, 2), (2, 2))
    optimizer = gd.Adam(params)
    run(optimizer, params, range(2))  # the second step finds all as the first left it, and looks no more
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="no state 'max_exp_avg_sq', which the hyperparameters of its group ask for"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("engine", ["auto", "loop", "foreach", "fused"])
def test_state_put_in_by_hand_is_fitted_or_refused(engine):
    params, twins = matrices((4, 6)), matrices((4, 6))
    optimizer, twin = gd.AdamW(params, engine=engine), gd.AdamW(twins, engine="loop")
    run(optimizer, params, range(2))
    run(twin, twins, range(2))
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    torch.testing.assert_close(run(optimizer, params, [2]), run(twin, twins, [2]), rtol=1e-13, atol=0)
    for _ in range(20):  # also where the new tensor's address is one that an old one had
        state["exp_avg"] = torch.zeros(4, 6, dtype=torch.float64).t().contiguous().t()
        optimizer.step()
        state["exp_avg"] = torch.zeros(2, 2, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"state 'exp_avg' has shape \(2, 2\), which has to be \(4, 6\)"):
            optimizer.step()


def test_a_parameter_that_changes_its_type_goes_on():
    params = matrices((4, 6), dtype=torch.float32)
    optimizer = gd.AdamW(params, lr=0.1)
    run(optimizer, params, range(2))
    params[0].data, params[0].grad = params[0].data.double(), None
    before = params[0].detach().clone()
    run(optimizer, params, [2])
    assert params[0].dtype == torch.float64 and not torch.equal(before, params[0])
    params[0].grad = params[0].grad.clone()
    with pytest.raises(ValueError, match="is not torch.float64, as its parameter is; see state_dtype="):
        optimizer.param_groups[0]["engine"] = "fused"
        optimizer.step()


@every_engine
def test_complex_state_of_another_precision(engine):
    z, x = torch.randn(3, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)), None
    z, x = z.clone().requires_grad_(), torch.view_as_real(z).clone().requires_grad_()
    for p, optimizer in ((z, gd.AdamW([z], lr=0.1, engine=engine, state_dtype=torch.float32)), (x, gd.AdamW(
        [x], lr=0.1, engine=engine, state_dtype=torch.float32))):  # fmt: skip
        for t in range(3):
            g = torch.randn(3, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(t))
            p.grad = g if p is z else torch.view_as_real(g)
            optimizer.step()
        kept = optimizer.state[p]["exp_avg"].dtype
        assert kept == (torch.complex64 if p is z else torch.float32)
    torch.testing.assert_close(torch.view_as_real(z.detach()), x.detach(), rtol=1e-12, atol=0)


def test_what_a_group_or_a_call_misspells_is_said():
    for wrong, right in ({"split_size": [1, 1]}, "split_sizes"), ({"weightdecay": 0.1}, "weight_decay"):
        optimizer = gd.AdamW(matrices((2, 2)))
        (name,) = wrong
        with pytest.raises(TypeError, match=f"a group has '{name}', which means nothing; use '{right}'"):
            optimizer.add_param_group({"params": matrices((2, 2)), **wrong})
        assert len(optimizer.param_groups) == 1
    gd.AdamW([{"params": matrices((2, 2)), "name": "trunk", "lr_scale": 0.5}])  # a user's own
    with pytest.raises(TypeError, match="KFAC has no sample=; use one of lr, momentum, .*fisher, .*params, .*maximize"):
        gd.KFAC(torch.nn.Linear(2, 2), sample=1)
    params = matrices((2, 2))
    optimizer = gd.AdamW(params)
    optimizer.param_groups[0]["engine"] = "warp"
    with pytest.raises(ValueError, match="engine='warp' is unknown; use one of 'auto'"):
        run(optimizer, params, range(1))


def test_a_checkpoint_holds_what_torchs_distributed_checkpoint_knows():
    params, twins = matrices((2, 2)), matrices((2, 2))
    optimizer = gd.AdamW(params, state_dtype=torch.bfloat16)
    run(optimizer, params, range(1))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["state_dtype"] == "torch.bfloat16"
    assert optimizer.param_groups[0]["state_dtype"] == torch.bfloat16
    twin = gd.AdamW(twins, state_dtype=torch.float32)
    twin.load_state_dict(saved)
    assert twin.state[twins[0]]["exp_avg"].dtype == twin.param_groups[0]["state_dtype"] == torch.float32


def test_the_module_itself_is_refused_with_a_remedy():
    with pytest.raises(TypeError, match=r"AdamW got a module; pass model.parameters\(\)"):
        gd.AdamW(torch.nn.Linear(2, 2))
