"""K-FAC, EKFAC and FOOF: where they are exact, what they are invariant to, and what may not go wrong."""

import copy
import inspect
import io
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from guided_descent.capture import Capture
from guided_descent.core import Optimizer
from guided_descent.kfac import (
    EKFAC,
    FOOF,
    KFAC,
    damping_shifts,
    divide,
    eigenvalue_correction,
    kronecker_factors,
)
from guided_descent.layerwise import full_precision
from guided_descent.likelihoods import check_no_classes, class_axis

METHODS = [KFAC, EKFAC, FOOF]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)


def net(*sizes, act=nn.Tanh, dtype=torch.float64, bias=True):
    layers = []
    for d_in, d_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(d_in, d_out, bias=bias), act()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def data(n=24, d=5, c=3, dtype=torch.float64, key=0):
    generator = torch.Generator().manual_seed(key)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, c, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def mse(model, x, y):
    return (model(x) - y).square().flatten(1).sum(1).mean() / 2


def mean_square(y):
    return y.square().flatten(1).sum(1).mean()


def build(method, model, **options):
    options = {"lr": 0.1, "likelihood": "gaussian", **options}
    return method(model, **options)


def train(model, method, times, dtype=torch.float64):
    for t in times:
        x, y = data(key=t, dtype=dtype)
        method.zero_grad()
        mse(model, x, y).backward()
        method.step()
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def pairs(model, x, fisher="type-2", likelihood="gaussian", loss=None, **options):
    """Each layer's (a, g), in the order of the layers."""
    found = {}
    options = {"fisher": fisher, "likelihood": likelihood, **options}
    capture = Capture(model, consume=lambda layer, a, g: found.update({layer: (a, g)}), **options)
    y = model(x)
    if loss is None:
        loss = (lambda z: -z.log_softmax(1)[:, 0].mean()) if likelihood == "categorical" else mean_square
    loss(y).backward()
    capture.detach()
    model.zero_grad()
    return [found[layer] for layer in capture.layers]


def ggn_blocks(model, x, hessian=None):
    """Dense Gauss–Newton blocks, weight and bias of a layer together, by forward-over-nothing jacobians."""
    params = {n: p.detach() for n, p in model.named_parameters()}

    def one(p, x):
        return torch.func.functional_call(model, p, x[None])[0].flatten()

    J = torch.func.vmap(torch.func.jacrev(one), (None, 0))(params, x)
    outputs = torch.func.vmap(one, (None, 0))(params, x)
    blocks = []
    for name in dict.fromkeys(n.rpartition(".")[0] for n in params):
        M = J[f"{name}.weight"].flatten(3)
        if f"{name}.bias" in J:
            M = torch.cat([M, J[f"{name}.bias"][..., None]], -1)
        M = M.flatten(2)
        H = torch.eye(M.shape[1], dtype=M.dtype).expand(len(x), -1, -1) if hessian is None else hessian(outputs)
        blocks.append(torch.einsum("nci,ncd,ndj->ij", M, H, M) / len(x))
    return blocks


def softmax_hessian(z):
    p = z.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


# Exactness


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(1, 8), st.booleans(), st.integers(0, 999))
def test_deep_linear_networks_are_exact(sizes, n, bias, key):
    torch.manual_seed(key)
    model = net(*sizes, act=nn.Identity, bias=bias)
    x, _ = data(n, sizes[0], sizes[-1], key=key)
    for (a, g), block in zip(pairs(model, x), ggn_blocks(model, x), strict=True):
        A, G = kronecker_factors(a, g)
        torch.testing.assert_close(torch.kron(G, A), block, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_one_datum_is_exact_for_any_network(likelihood):
    torch.manual_seed(0)
    model, (x, _) = net(5, 4, 3), data(1)
    hessian = softmax_hessian if likelihood == "categorical" else None
    for (a, g), block in zip(pairs(model, x, likelihood=likelihood), ggn_blocks(model, x, hessian), strict=True):
        A, G = kronecker_factors(a, g)
        torch.testing.assert_close(torch.kron(G, A), block, rtol=1e-10, atol=1e-12)


def test_one_datum_empirical_is_the_empirical_fisher():
    torch.manual_seed(0)
    model, (x, y) = net(5, 4, 3), data(1)
    found = pairs(model, x, "empirical", loss=lambda z: (z - y).square().sum() / 2)
    mse(model, x, y).backward()
    for (a, g), linear in zip(found, (model[0], model[2]), strict=True):
        v = torch.cat([linear.weight.grad, linear.bias.grad[:, None]], 1).flatten()
        A, G = kronecker_factors(a, g)
        torch.testing.assert_close(torch.kron(G, A), torch.outer(v, v), rtol=1e-12, atol=1e-14)


def test_several_data_and_a_nonlinearity_are_not_exact():
    torch.manual_seed(0)
    model, (x, _) = net(5, 4, 3), data()
    (a, g), block = pairs(model, x)[0], ggn_blocks(model, x)[0]
    A, G = kronecker_factors(a, g)
    assert (torch.kron(G, A) - block).norm() > 0.01 * block.norm()
    swapped = torch.kron(A, G)  # the column-major order
    assert (swapped - block).norm() > (torch.kron(G, A) - block).norm()


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "bernoulli"])
def test_drawn_targets_converge_at_the_monte_carlo_rate(likelihood):
    torch.manual_seed(0)
    model, (x, _) = net(5, 4, 3), data()
    exact = kronecker_factors(*pairs(model, x, likelihood=likelihood)[0])[1]
    errors = []
    for samples in (4, 256):
        draws = [pairs(model, x, "mc", likelihood, samples=samples)[0] for _ in range(24)]
        errors.append(sum((kronecker_factors(*d)[1] - exact).square().sum() for d in draws).sqrt())
    assert 0.6 < errors[0] / errors[1] / 8 < 1.7


class Pooled(nn.Sequential):
    def forward(self, x):
        return super().forward(x).mean(1)


@pytest.mark.parametrize(("sharing", "kind"), [("expand", nn.Sequential), ("reduce", Pooled)])
def test_sharing_is_exact_in_its_setting_and_not_in_the_other(sharing, kind):
    torch.manual_seed(0)
    model = kind(*net(5, 4, 3, act=nn.Identity))
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    blocks = list(ggn_shared(model, x))
    for (a, g), block in zip(pairs(model, x), blocks, strict=True):
        right, wrong = (torch.kron(G, A) for A, G in (kronecker_factors(a, g, s) for s in order(sharing)))
        torch.testing.assert_close(right, block, rtol=1e-10, atol=1e-12)
        assert (wrong - block).norm() > 0.1 * block.norm()


def order(sharing):
    return ("expand", "reduce") if sharing == "expand" else ("reduce", "expand")


def ggn_shared(model, x):
    params = {n: p.detach() for n, p in model.named_parameters()}

    def one(p, x):
        return torch.func.functional_call(model, p, x[None])[0].flatten()

    J = torch.func.vmap(torch.func.jacrev(one), (None, 0))(params, x)
    for name in dict.fromkeys(n.rpartition(".")[0] for n in params):
        M = torch.cat([J[f"{name}.weight"], J[f"{name}.bias"][..., None]], -1).flatten(2)
        yield torch.einsum("nci,ncj->ij", M, M) / len(x)


def test_a_pointwise_convolution_is_a_linear_layer_of_its_pixels():
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 4, 1).double(), nn.Linear(3, 4).double()
    with torch.no_grad():
        linear.weight.copy_(conv.weight[:, :, 0, 0])
        linear.bias.copy_(conv.bias)
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    rows = x.permute(0, 2, 3, 1).reshape(6, 4, 3)
    methods = []
    for model, input in ((conv, x), (linear, rows)):
        methods.append(build(KFAC, model, fisher="type-2", reduction="examples"))
        for _ in range(3):
            methods[-1].zero_grad()
            model(input).square().flatten(1).sum(1).mean().backward()
            methods[-1].step()
    torch.testing.assert_close(conv.weight[:, :, 0, 0], linear.weight)
    torch.testing.assert_close(conv.bias, linear.bias)


# The inverse


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(1e-6, 10), st.integers(0, 999))
def test_ekfac_is_never_farther_than_kfac(d_in, d_out, scale, key):
    torch.manual_seed(key)
    a = scale * torch.randn(7, 2, d_in, dtype=torch.float64).exp()
    g = torch.randn(2, 7, 2, d_out, dtype=torch.float64) * a.sum(-1, keepdim=True)
    v = torch.einsum("mnro,nri->mnoi", g, a).flatten(2).flatten(0, 1)
    F = v.T @ v / 7
    A, G = kronecker_factors(a, g)
    U_A, U_G = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
    s = eigenvalue_correction(a, g, U_A, U_G)
    U = torch.kron(U_G, U_A)
    best = (F - U * s.flatten() @ U.T).norm()
    assert best <= (F - torch.kron(G, A)).norm() * (1 + 1e-9) + 1e-12 * F.norm()
    torch.testing.assert_close(s.flatten(), (U.T @ F @ U).diagonal(), rtol=1e-8, atol=1e-10 * float(F.norm()))


def eye(M):
    return torch.eye(len(M), dtype=M.dtype)


@pytest.mark.parametrize("split", ["exact", "pi"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_step_is_a_dense_solve(split, relative):
    torch.manual_seed(0)
    model, (x, y) = net(5, 4, 3), data()
    options = {"fisher": "type-2", "damping": 0.05, "kl_clip": math.inf, "momentum": 0.0}
    method = build(KFAC, model, damping_split=split, relative_damping=relative, **options)
    for layer, (a, g) in zip(method.capture.layers, pairs(model, x), strict=True):
        A, G = kronecker_factors(a, g)
        lam = 0.05 * (A.diagonal().mean() * G.diagonal().mean() if relative else 1)
        if split == "pi":
            up, down = damping_shifts(A, G, lam)
            matrix = torch.kron(G + down * eye(G), A + up * eye(A))
        else:
            matrix = torch.kron(G, A) + lam * eye(torch.kron(G, A))
        layer.expected = matrix
    mse(model, x, y).backward()
    before = [(layer.matrix(), layer.gradient()) for layer in method.capture.layers]
    method.step()
    for layer, (W, grad) in zip(method.capture.layers, before, strict=True):
        u = torch.linalg.solve(layer.expected, grad.flatten()).view_as(W)
        torch.testing.assert_close(W - layer.matrix(), 0.1 * u, rtol=1e-8, atol=1e-12)


def test_the_split_minimises_the_trace_of_what_it_adds():
    torch.manual_seed(0)
    A, G = (M @ M.T for M in (torch.randn(4, 4), 9 * torch.randn(3, 3)))
    up, down = damping_shifts(A, G, 0.1)
    torch.testing.assert_close(up * down, torch.tensor(0.1))
    excess = [torch.kron(G + down / k * torch.eye(3), A + up * k * torch.eye(4)).trace() for k in (0.9, 1.0, 1.1)]
    assert excess[1] < min(excess[0], excess[2])


def test_division_without_damping_leaves_the_null_space_alone():
    curvature = torch.tensor([1.0, 0.0, 1e-20])
    assert divide(torch.ones(3), curvature, 0.0).tolist() == [1.0, 0.0, 0.0]
    assert divide(torch.ones(3), torch.zeros(3), 0.0).tolist() == [0.0, 0.0, 0.0]
    assert divide(torch.ones(3), curvature, 0.5)[1:].tolist() == [2.0, 2.0]


class Turned(nn.Module):
    """A layer seen in other coordinates: W becomes Q_out W Q_inᵀ."""

    def __init__(self, weight, left, right):
        super().__init__()
        self.inner = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
        self.left, self.right = left, right
        with torch.no_grad():
            self.inner.weight.copy_(left @ weight @ right.T)

    def forward(self, x):
        return self.inner(x @ self.right.T) @ self.left

    def seen(self):
        return self.left.T @ self.inner.weight.detach() @ self.right


@every_method
def test_the_step_does_not_see_a_rotation(method):
    torch.manual_seed(0)
    weight = torch.randn(3, 5, dtype=torch.float64)
    turns = [torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0] for d in (3, 5)]
    ends = []
    for left, right in (turns, [torch.eye(3, dtype=torch.float64), torch.eye(5, dtype=torch.float64)]):
        model = Turned(weight, left, right)
        options = {} if method is FOOF else {"fisher": "type-2"}
        train(model, build(method, model, **options), range(6))
        ends.append(model.seen())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)
    assert (ends[0] - weight).norm() > 1e-3


def test_foof_is_ridge_regression_on_the_outputs():
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(5, 3).double(), data()
    method = FOOF(model, 0.3, damping=0.2, momentum=0.0, kl_clip=math.inf)
    z = torch.cat([x, torch.ones(24, 1)], 1)
    mse(model, x, y).backward()
    back, layer = (model(x) - y).detach(), method.capture.layers[0]
    before = layer.matrix()
    method.step()
    ridge = torch.linalg.solve(z.T @ z / 24 + 0.2 * torch.eye(6), z.T @ back / 24).T
    torch.testing.assert_close(before - layer.matrix(), 0.3 * ridge)


def test_the_clip_bounds_the_step_and_keeps_its_direction():
    steps = {}
    for clip in (math.inf, 1e-4):
        torch.manual_seed(0)
        model = net(5, 4, 3)
        before = [p.detach().clone() for p in model.parameters()]
        method = build(KFAC, model, momentum=0.0, kl_clip=clip)
        x, y = data()
        mse(model, x, y).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        method.step()
        steps[clip] = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    ratios = [s / f for s, f in zip(steps[1e-4], steps[math.inf], strict=True)]
    nu = float(ratios[0].flatten()[0])
    assert 0 < nu < 1
    for ratio in ratios:
        torch.testing.assert_close(ratio, torch.full_like(ratio, nu))
    whole = sum((f * g).sum() for f, g in zip(steps[math.inf], grads, strict=True)) * 0.1
    torch.testing.assert_close(whole * nu**2, torch.tensor(1e-4, dtype=torch.float64))


def test_sharing_reaches_the_factors():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 2).double()
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    (a, g) = pairs(conv, x)[0]
    assert a.shape == (5, 9, 9)
    for sharing in ("expand", "reduce"):
        model = copy.deepcopy(conv)
        optimizer = build(KFAC, model, sharing=sharing, fisher="type-2", reduction="mean", class_dim=1)
        model(x).square().flatten(1).sum(1).mean().backward()
        optimizer.step()
        A, G = kronecker_factors(a, g, sharing)
        memory = optimizer._memory(optimizer.capture.layers[0])
        torch.testing.assert_close(memory["A"], A)
        torch.testing.assert_close(memory["G"], G / 9)  # a mean over 3·3 rows, of three numbers each


def test_eigenvalues_are_kfacs_first_and_then_the_mean_of_the_corrections():
    torch.manual_seed(0)
    model, (x, y) = net(5, 4, 3), data()
    optimizer = build(EKFAC, model, lr=0.0, fisher="type-2", inverse_update_every=1)
    found = pairs(model, x)
    for k in range(1, 6):
        optimizer.zero_grad()
        mse(model, x, y).backward()
        optimizer.step()
        for layer, (a, g) in zip(optimizer.capture.layers, found, strict=True):
            m = optimizer._memory(layer)
            outer = torch.outer(m["G_values"], m["A_values"])
            best = eigenvalue_correction(a, g, m["A_vectors"], m["G_vectors"])
            torch.testing.assert_close(m["s"], outer / k + best * (k - 1) / k, rtol=1e-6, atol=1e-9)


# Training loops


@every_method
def test_accumulation_is_the_whole_batch(method):
    ends = []
    for parts in (24, [17, 7]):
        torch.manual_seed(0)
        model = net(5, 4, 3)
        options = {} if method is FOOF else {"fisher": "type-2"}
        optimizer = build(method, model, **options)
        for t in range(4):
            x, y = data(key=t)
            optimizer.zero_grad()
            for xs, ys in zip(x.split(parts), y.split(parts), strict=True):
                (mse(model, xs, ys) * len(xs) / len(x)).backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every_method
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("how", ["model.zero_grad", "autograd.grad"])
def test_a_pass_whose_gradients_were_discarded_does_not_count(method, fisher, how):
    ends = []
    for discarded in (False, True):
        torch.manual_seed(0)
        model = net(5, 4, 3)
        options = {} if method is FOOF else {"fisher": fisher}
        optimizer = build(method, model, **options)
        for t in range(3):
            x, y = data(key=t)
            model.zero_grad()
            if discarded and how == "autograd.grad":  # an adversarial input, say
                x.requires_grad_()
                torch.autograd.grad(mse(model, 9 * x, y), x)
            elif discarded:
                mse(model, 9 * x, y).backward()
                model.zero_grad()
            mse(model, x.detach(), y).backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    assert same(*ends)


@every_method
def test_torchs_distributed_checkpoints_restore_a_fresh_optimizer(method):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    torch.manual_seed(0)
    model, twin = net(5, 4, 3), net(5, 4, 3)
    optimizer, resumed = build(method, model), build(method, twin)
    train(model, optimizer, range(3))
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, resumed, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    assert same(train(twin, resumed, range(3, 6)), train(model, optimizer, range(3, 6)))


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_stop_save_load_go_on_is_the_run_that_never_stopped(method, dtype):
    def start():
        torch.manual_seed(0)
        model = net(5, 4, 3, dtype=dtype)
        return model, build(method, model, inverse_update_every=4, factor_update_every=2)

    model, optimizer = start()
    expected = train(model, optimizer, range(12), dtype)
    model, optimizer = start()
    train(model, optimizer, range(5), dtype)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    model = net(5, 4, 3, dtype=dtype)
    optimizer = build(method, model, lr=0.7, inverse_update_every=4, factor_update_every=2)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert same(train(model, optimizer, range(5, 12), dtype), expected)


PI = {"damping_split": "pi"}


@pytest.mark.parametrize(
    ("before", "after"),
    [((KFAC, PI), (KFAC, {})), ((KFAC, {}), (KFAC, PI)), ((KFAC, {}), (EKFAC, {})), ((KFAC, PI), (EKFAC, {}))],
    ids=["pi-exact", "exact-pi", "exact-EKFAC", "pi-EKFAC"],
)
def test_a_checkpoint_of_other_settings_goes_on_from_its_factors(before, after):
    torch.manual_seed(0)
    model = net(5, 4, 3)
    (method, options), (other, changed) = before, after
    optimizer = build(method, model, **options)
    train(model, optimizer, range(5))
    resumed = build(other, model, **changed)
    resumed.load_state_dict(optimizer.state_dict())
    train(model, resumed, range(5, 6))
    memory = resumed._memory(resumed.capture.layers[0])
    needed = {"A_inverse", "G_inverse"} if changed else {"A_values", "A_vectors", "G_values", "G_vectors"}
    assert {name for name in memory if "_" in name} == needed
    for side, shift in zip("AG", damping_shifts(memory["A"], memory["G"], 0.03), strict=True):
        if changed:
            expected = torch.linalg.inv(memory[side] + shift * eye(memory[side]))
            torch.testing.assert_close(memory[f"{side}_inverse"], expected)
        else:
            V = memory[f"{side}_vectors"]
            torch.testing.assert_close(V @ memory[f"{side}_values"].diag() @ V.T, memory[side])


@every_method
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "pickle"])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(method, duplicate):
    torch.manual_seed(0)
    model = net(5, 4, 3)
    optimizer = build(method, model)
    train(model, optimizer, range(3))
    twin, twin_optimizer = duplicate((model, optimizer))
    frozen = [p.detach().clone() for p in twin.parameters()]
    expected = train(model, optimizer, range(3, 8))
    assert same([p.detach() for p in twin.parameters()], frozen)
    assert same(train(twin, twin_optimizer, range(3, 8)), expected)


@every_method
def test_groups_follow_their_own_settings(method):
    torch.manual_seed(0)
    model = net(5, 4, 3)
    biases = [p for p in model.parameters() if p.ndim == 1]
    weights = [p for p in model.parameters() if p.ndim == 2]
    before = [p.detach().clone() for p in biases]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.0}]
    optimizer = build(method, model, params=groups)
    train(model, optimizer, range(3))
    assert same([p.detach() for p in biases], before)
    decayed = [p.detach().clone() for p in weights]
    torch.manual_seed(0)
    model = net(5, 4, 3)
    groups = [{"params": [p for p in model.parameters() if p.ndim == d]} for d in (2, 1)]
    groups[1]["lr"] = 0.0
    train(model, build(method, model, params=groups), range(3))
    plain = [p.detach() for p in model.parameters() if p.ndim == 2]
    assert not any(torch.equal(a, b) for a, b in zip(decayed, plain, strict=True))


@every_method
def test_layers_added_later_are_watched_from_then_on(method):
    torch.manual_seed(0)
    model = net(5, 4, 3)
    optimizer = build(method, model, params=list(model[2].parameters()))
    train(model, optimizer, range(2))
    assert [layer.name for layer in optimizer.capture.layers] == ["2"]
    before = model[0].weight.detach().clone()
    optimizer.add_param_group({"params": list(model[0].parameters())})
    train(model, optimizer, range(2, 4))
    assert [layer.name for layer in optimizer.capture.layers] == ["0", "2"]
    assert not torch.equal(before, model[0].weight) and optimizer.param_groups[1]["steps"] == 4


@every_method
@pytest.mark.parametrize("form", [list, tuple, lambda params: next(iter(params))], ids=["list", "tuple", "tensor"])
def test_unfrozen_layers_are_added_without_naming_them(method, form):
    torch.manual_seed(0)
    model = net(5, 4, 3)
    model[0].requires_grad_(False)
    optimizer = build(method, model)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": form(model[0].parameters()), "lr": 0.01})
    assert optimizer.param_groups[1]["param_names"][0] == "0.weight"
    assert [layer.name for layer in optimizer.capture.layers] == ["0", "2"]
    temperature = torch.nn.Parameter(torch.ones(()))  # of the loss, say
    optimizer.add_param_group({"params": [temperature]})
    assert optimizer.param_groups[2]["params"] == [temperature]
    assert optimizer.param_groups[2]["algorithm"] == "adamw" and optimizer.param_groups[2]["lr"] == 1e-3


class Loose(nn.Module):
    """A layer, and a parameter that no layer covers."""

    def __init__(self, size=3):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.linear(x) * self.scale.mean()


@every_method
@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_loose_parameters_are_stepped_by_the_algorithm_with_its_own_defaults(method, algorithm):
    torch.manual_seed(0)
    model, alone = Loose().double(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    ours = build(method, model, algorithm=algorithm, weight_decay=0.1)
    theirs = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[algorithm]([alone], lr=1e-3, weight_decay=0.1)
    assert ours.param_groups[1]["lr"] == 1e-3 and ours.coverage()["rest"] == ["scale"]
    for t in range(4):
        x, y = data(key=t)
        ours.zero_grad()
        mse(model, x, y).backward()
        alone.grad = model.scale.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(model.scale.data, alone.data)


class Everything(nn.Module):
    """A convolution, an embedding, norms, attention with a fused matrix, a tied head, a loose scale."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        h = self.embed(tokens)
        h = h + self.conv(h.mT).mT
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.norm(h * self.scale).mean(1))


@pytest.mark.parametrize(
    ("method", "options"),
    [(KFAC, {"damping_split": "pi"}), *((m, {}) for m in METHODS)],
    ids=["KFAC-pi", "KFAC", "EKFAC", "FOOF"],
)
def test_every_kind_of_layer_learns_and_resumes(method, options):
    tokens = torch.randint(7, (32, 5), generator=torch.Generator().manual_seed(0))
    target = tokens[:, 0] % 4

    def start():
        torch.manual_seed(0)
        model = Everything().double()
        return model, method(model, 0.1, likelihood="categorical", **options)

    def run(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), target)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    model, optimizer = start()
    names = {layer.name for layer in optimizer.capture.layers}
    assert {"embed", "conv", "attention.q", "attention.k", "attention.v", "attention.out_proj", "head"} <= names
    first = run(model, optimizer, 1)
    for layer in optimizer.capture.layers:  # attention's four projections among them
        assert optimizer._memory(layer) or (method is FOOF and layer.kind == "scale"), layer.name
    before = [p.detach().clone() for p in model.parameters()]
    run(model, optimizer, 20)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    end = run(model, optimizer, 20)
    assert end < 0.5 * first
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {"factors", "derived", "momentum"} == set(optimizer.memory()["head"])
    again, resumed = start()
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert run(again, resumed, 20) == end


def test_memory_counts_factors_and_what_is_derived():
    model = net(5, 4, 3, dtype=torch.float32)
    optimizer = build(KFAC, model)
    train(model, optimizer, range(1), torch.float32)
    report = optimizer.memory()
    floats = {"factors": 6 * 6 + 4 * 4 + 1, "derived": 6 * 6 + 4 * 4 + 6 + 4, "momentum": 24}
    assert report["0"] == {name: 4 * n for name, n in floats.items()}


@every_method
def test_detach_removes_every_hook(method):
    model = net(5, 4, 3)
    optimizer = build(method, model)
    optimizer.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_evaluation_leaves_no_trace():
    ends = []
    for evaluate in (False, True):
        torch.manual_seed(0)
        model = net(5, 4, 3)
        optimizer = build(KFAC, model)
        for t in range(4):
            if evaluate:
                with torch.no_grad():
                    model(data(key=50 + t)[0])
                model.eval()
                model(data(key=60 + t)[0])
                model.train()
            train(model, optimizer, [t])
        ends.append([p.detach() for p in model.parameters()])
    assert same(*ends)


def test_inverse_work_is_spread_over_steps():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(10))).double()
    optimizer = build(KFAC, model, inverse_update_every=5)
    done = []
    refresh = optimizer.refresh

    def counted(side, memories, groups):
        done[-1] += len(memories)
        return refresh(side, memories, groups)

    optimizer.refresh = counted
    for t in range(13):
        done.append(0)
        x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert done[:3] == [20, 20, 20] and max(done[3:]) <= 5 and sum(done[3:8]) == sum(done[8:13]) == 20


def test_batched_and_looped_factors_agree():
    ends = []
    for engine in ("auto", "loop"):
        for split in ("exact", "pi"):
            torch.manual_seed(0)
            model = net(5, 5, 5, 3)
            train(model, build(KFAC, model, engine=engine, damping_split=split), range(6))
            ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(ends[0] + ends[1], ends[2] + ends[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_maximize_is_the_ascent_of_the_mirrored_loss():
    ends = []
    for sign in (1, -1):
        torch.manual_seed(0)
        model = net(5, 4, 3)
        optimizer = build(KFAC, model, maximize=sign < 0)
        for t in range(4):
            x, y = data(key=t)
            optimizer.zero_grad()
            (sign * mse(model, x, y)).backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    assert same(*ends)


# What has gone wrong elsewhere


@every_method
def test_gradients_are_never_modified(method):
    torch.manual_seed(0)
    model = net(5, 4, 3)
    optimizer = build(method, model, weight_decay=0.1)
    x, y = data()
    mse(model, x, y).backward()
    before = [(id(p.grad), p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    assert all(id(p.grad) == i and torch.equal(p.grad, g) for p, (i, g) in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("split", ["exact", "pi"])
def test_damping_is_not_applied_in_place(split):
    torch.manual_seed(0)
    model, (x, y) = net(5, 4, 3), data()
    optimizer = build(KFAC, model, damping=10.0, damping_split=split, fisher="type-2", lr=0.0, inverse_update_every=1)
    for _ in range(3):
        optimizer.zero_grad()
        mse(model, x, y).backward()
        optimizer.step()
    for layer, (a, g) in zip(optimizer.capture.layers, pairs(model, x), strict=True):
        A, G = kronecker_factors(a, g)
        torch.testing.assert_close(optimizer._memory(layer)["A"], A)
        torch.testing.assert_close(optimizer._memory(layer)["G"], G)


def test_factors_and_eigenvectors_never_see_tf32(monkeypatch):
    seen = []
    matmul = torch.backends.cuda.matmul

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((str(function), matmul.fp32_precision))
            return function(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model = net(5, 4, 3, dtype=torch.float32)
    optimizer = build(EKFAC, model)
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        train(model, optimizer, range(2), torch.float32)
        x, y = data(dtype=torch.float32)
        mse(model, x, y).backward()
        with Watch():
            optimizer.step()
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    work = [mode for name, mode in seen if any(k in name for k in ("eigh", "mm", "matmul"))]
    assert work and set(work) == {"ieee"}


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_parameters_have_factors_of_32(method, dtype):
    torch.manual_seed(0)
    model = net(5, 4, 3, dtype=dtype)
    optimizer = build(method, model)
    x, y = data(dtype=dtype)
    start = float(mse(model, x, y).detach())
    for _ in range(20):
        optimizer.zero_grad()
        mse(model, x, y).backward()
        optimizer.step()
    assert float(mse(model, x, y).detach()) < 0.9 * start
    assert all(p.dtype == dtype for p in model.parameters())
    memory = optimizer._memory(optimizer.capture.layers[0])
    assert all(value.dtype == torch.float32 for value in memory.values())
    copied = build(method, net(5, 4, 3, dtype=dtype))
    copied.load_state_dict(optimizer.state_dict())
    again = copied._memory(copied.capture.layers[0])
    assert all(torch.equal(again[name], memory[name]) for name in memory)


@pytest.mark.parametrize(
    ("method", "options"),
    [(KFAC, {"damping_split": "pi"}), *((m, {}) for m in METHODS)],
    ids=["KFAC-pi", "KFAC", "EKFAC", "FOOF"],
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float16)], ids=str)
def test_a_model_may_change_its_type_between_steps(method, options, dtypes):
    exact = {} if method is FOOF else {"fisher": "type-2"}
    ends = []
    for first, then in ((torch.float64, torch.float64), dtypes):
        torch.manual_seed(0)
        model = net(5, 4, 3, dtype=first)
        optimizer = build(method, model, **options, **exact)
        train(model, optimizer, range(2), first)
        model.to(then)
        ends.append(train(model, optimizer, range(2, 4), then))
    assert optimizer._memory(optimizer.capture.layers[0])["count"] == 4
    for a, b in zip(*ends, strict=True):
        error = 1e-4 if then == torch.float64 else 3e-2
        torch.testing.assert_close(a, b.double(), rtol=error, atol=error)


@every_method
def test_autocast_leaves_factors_in_single_precision(method):
    torch.manual_seed(0)
    model = net(5, 4, 3, dtype=torch.float32)
    optimizer = build(method, model)
    x, y = data(dtype=torch.float32)
    start = float(mse(model, x, y).detach())
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = mse(model, x, y)
            loss.backward()
            optimizer.step()
    assert float(mse(model, x, y).detach()) < 0.9 * start
    memory = optimizer._memory(optimizer.capture.layers[0])
    assert all(value.dtype == torch.float32 for value in memory.values())


@pytest.mark.parametrize(
    ("method", "options"),
    [(KFAC, {"damping_split": "pi"}), *((m, {}) for m in METHODS), (KFAC, {"damping": 0.0})],
    ids=["KFAC-pi", "KFAC", "EKFAC", "FOOF", "KFAC-undamped"],
)
def test_zero_inputs_and_gradients_give_a_finite_first_step(method, options):
    model = net(5, 4, 3)
    optimizer = build(method, model, **options)
    x = torch.zeros(4, 5, dtype=torch.float64)
    (model(x) * 0).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert same([p.detach() for p in model.parameters()], before)
    train(model, optimizer, range(3))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("split", ["exact", "pi"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_singular_statistics_give_a_finite_step(split, scale):
    torch.manual_seed(0)
    model = net(64, 32, 3, dtype=torch.float32)
    optimizer = build(KFAC, model, damping=1e-6, damping_split=split)
    x = scale * torch.ones(2, 64) * torch.tensor([[1.0], [1.0 + 1e-6]])  # rank one up to round-off
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@every_method
def test_a_step_with_an_infinity_never_happened(method, flags):
    ends = []
    for poisoned in (False, True):
        torch.manual_seed(0)
        model = net(5, 4, 3)
        optimizer = build(method, model, inverse_update_every=1)
        for t in range(5):
            x, y = data(key=t)
            if poisoned and t in (0, 3):
                before = copy.deepcopy(optimizer.state_dict()["state"])
                optimizer.zero_grad()
                (mse(model, x, y) * math.inf).backward()
                optimizer.step()
                after = optimizer.state_dict()["state"]
                if t:
                    for p, state in before.items():
                        assert torch.equal(state["momentum_buffer"], after[p]["momentum_buffer"])
                for group in optimizer.param_groups:
                    group["steps"] -= 1  # for the same targets to be drawn
                optimizer._prepare()
            optimizer.zero_grad()
            mse(model, x, y).backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
        assert optimizer.skipped_steps == (2 if poisoned else 0)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_statistics_that_are_not_finite_skip_or_raise_and_name_the_layer(flags):
    for kind in ("skip", "raise", "propagate"):
        model, (x, y) = net(5, 4, 3, dtype=torch.float32), data(dtype=torch.float32)
        optimizer = build(KFAC, model, nonfinite=kind)
        mse(model, x, y).backward()
        optimizer.pending[optimizer.capture.layers[0]]["A"].fill_(math.nan)
        before = [p.detach().clone() for p in model.parameters()]
        if kind == "skip":
            optimizer.step()
            assert optimizer.skipped_steps == 1
        else:
            with pytest.raises(FloatingPointError, match="layer '0'"):
                optimizer.step()
        assert same([p.detach() for p in model.parameters()], before)


@pytest.fixture(params=["host", "device"])
def flags(request, monkeypatch):
    """Flags as they are, or as on a device: not to be looked at."""
    if request.param == "device":
        monkeypatch.setattr("guided_descent.layerwise.known", lambda flag: True if flag is None else None)


def test_no_host_synchronisation(flags):
    class NoItem(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "read back to the host"
            return function(*args, **(kwargs or {}))

    for split in ("exact", "pi"):
        torch.manual_seed(0)
        model, (x, y) = net(5, 4, 3), data()
        optimizer = build(KFAC, model, damping_split=split, lr=torch.tensor(0.1))
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        with NoItem():
            mse(model, x, y).backward()
            optimizer.step()


def test_a_forward_pass_that_bypasses_the_model_is_an_error_that_names_the_layer():
    model, (x, y) = net(5, 4, 3), data()
    optimizer = build(KFAC, model)
    (model[2](torch.tanh(model[0](x))) - y).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"layer '0' has a gradient.*call the model itself"):
        optimizer.step()
    assert same([p.detach() for p in model.parameters()], before)


def test_a_tensor_learning_rate_is_the_same_number_and_stays_it():
    ends = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)):
        torch.manual_seed(0)
        model = net(5, 4, 3)
        train(model, build(KFAC, model, lr=lr), range(4))
        ends.append([p.detach() for p in model.parameters()])
        assert float(lr) == 0.1
    for end in ends[1:]:
        for a, b in zip(end, ends[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


BAD = [
    ({"damping": -1.0}, "damping=-1.0 .* pass"),
    ({"kl_clip": 0.0}, "kl_clip=0.0 .* pass"),
    ({"stat_decay": 1.0}, "stat_decay=1.0 .* pass"),
    ({"sharing": "sum"}, "sharing='sum' is unknown; use"),
    ({"damping_split": "half"}, "damping_split='half' is unknown; use"),
    ({"damping_split": "pi", "damping": 0.0}, r"damping=0.0 .* pass a number in \(0, inf\)"),
    ({"fisher": "exact"}, "fisher='exact' is unknown; use"),
    ({"likelihood": "poisson"}, "likelihood='poisson' is unknown; use"),
    ({"inverse_update_every": 0}, r"inverse_update_every=0.* pass an integer in \[1, inf\)"),
    ({"factor_update_every": 1.5}, r"factor_update_every=1.5.* pass an integer in \[1, inf\)"),
    ({"seed": -1}, "seed=-1.* pass an integer in"),
    ({"samples": 0}, "samples=0.* pass an integer in"),
    ({"reduction": "none"}, "reduction='none' is unknown; use"),
    ({"algorithm": "adm"}, "algorithm='adm' is unknown; use"),
    ({"engine": "foreach"}, "has no engine='foreach'; use"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(o) for o, _ in BAD])
def test_bad_arguments_are_named(options, message):
    model = net(5, 4, 3)
    with pytest.raises((ValueError, TypeError), match=message):
        build(KFAC, model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model is a generator; pass the nn.Module"):
        KFAC(net(5, 3).parameters())
    with pytest.raises(TypeError, match="damping_split"):
        EKFAC(net(5, 3), damping_split="pi")
    with pytest.raises(TypeError, match="fisher"):
        FOOF(net(5, 3), fisher="mc")
    with pytest.raises(ValueError, match=r"damping=0.0 .* pass a number in \(0, inf\)"):
        FOOF(net(5, 3), damping=0)


def testfull_precision_before_torch_had_fp32_precision(monkeypatch):
    matmul = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    with full_precision(torch.device("cpu")):
        assert vars(matmul) == {"allow_tf32": False}
    assert vars(matmul) == {"allow_tf32": True}


# The user's loss


class Tokens(nn.Module):
    """Logits of five classes for each of eight tokens, the classes on some axis."""

    def __init__(self, axis=2, then=lambda z: z):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.axis, self.then = nn.Linear(6, 10), nn.Linear(10, 5), axis, then
        self.double()

    def forward(self, x):
        return self.then(self.second(self.first(x).tanh())).movedim(-1, self.axis)


def tokens():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 8, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (20, 8), generator=generator)


def cross_entropy(model, x, y, **options):
    z = model(x)
    return nn.functional.cross_entropy(z.movedim(2, 1) if model.axis == 2 else z, y, **options)


FREE = {"momentum": 0.0, "kl_clip": math.inf}


def after_two_steps(method, fisher, way, axis=2):
    (x, y), model = tokens(), Tokens(axis)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if way in ("scaled", "unscaled") else None
    options = {"reduction": "sum"} if way == "sum" else {}
    if fisher == "empirical" and scaler:
        options["grad_scaler"] = scaler
    optimizer = method(model, 0.3, fisher=fisher, **FREE, **options)
    for _ in range(2):
        optimizer.zero_grad()
        parts = 4 if way == "accumulated" else 1
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = cross_entropy(model, xs, ys, reduction="sum" if way == "sum" else "mean") / parts
            (scaler.scale(loss) if scaler else loss).backward()
        if way == "unscaled":
            scaler.unscale_(optimizer)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("method", [KFAC, EKFAC], ids=lambda m: m.__name__)
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_every_way_to_scale_a_loss_gives_the_same_step(method, fisher):
    mean = after_two_steps(method, fisher, "mean")
    for way in ("sum", "accumulated", "scaled", "unscaled"):
        torch.testing.assert_close(after_two_steps(method, fisher, way), mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(after_two_steps(method, fisher, "mean", axis=1), mean, rtol=1e-10, atol=1e-12)


def test_the_empirical_fisher_is_that_of_the_mean_over_all_rows():
    (x, y), model = tokens(), Tokens()
    optimizer = KFAC(model, 0.0, fisher="empirical")
    cross_entropy(model, x, y).backward()
    optimizer.step()
    z = model(x).detach()
    g = z.softmax(2) - nn.functional.one_hot(y, 5)
    G = torch.einsum("nti,ntj->ij", g, g) / 160
    torch.testing.assert_close(optimizer._memory(optimizer.capture.layers[1])["G"], G)


@pytest.mark.parametrize("reduction", ["mean", "examples", "sum"])
def test_an_undamped_step_on_a_linear_layer_solves_it_whatever_the_mean_is_over(reduction):
    torch.manual_seed(0)
    x, target = torch.randn(20, 8, 6, dtype=torch.float64), nn.Linear(6, 4, bias=False).double()
    model = nn.Linear(6, 4, bias=False).double()
    optimizer = build(KFAC, model, lr=1.0, damping=0.0, fisher="type-2", reduction=reduction, **FREE)
    squares = (model(x) - target(x).detach()).square().sum(2) / 2
    {"mean": squares.mean, "examples": lambda: squares.sum(1).mean(), "sum": squares.sum}[reduction]().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight, target.weight, rtol=1e-9, atol=1e-9)


def test_a_scale_that_shows_is_checked_and_one_that_does_not_is_asked_for():
    (x, y), one = tokens(), torch.nn.functional.one_hot
    for loss, times in [
        (lambda m: cross_entropy(m, x, y, reduction="sum"), "160"),
        (lambda m: cross_entropy(m, x, y, reduction="none").sum(1).mean(), "8"),
        (lambda m: 2 * cross_entropy(m, x, y), "2"),
    ]:
        model = Tokens()
        optimizer, before = KFAC(model), copy.deepcopy(model.state_dict())
        loss(model).backward()
        with pytest.raises(ValueError, match=f"the loss is {times} times the mean over the 160 rows"):
            optimizer.step()
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()) and not optimizer.state
    model = Tokens()
    optimizer = KFAC(model, reduction="mean")
    (2 * cross_entropy(model, x, y)).backward()
    optimizer.step()
    bernoulli = nn.functional.binary_cross_entropy_with_logits
    model, target = Tokens(), one(y[:, 0], 5).double()
    optimizer = KFAC(model, likelihood="bernoulli")
    bernoulli(model(x[:, :1])[:, 0], target, reduction="sum").backward()
    with pytest.raises(ValueError, match="the loss is 20 times the mean over the 20 rows"):
        optimizer.step()
    for likelihood in ("gaussian", "bernoulli"):
        model = Tokens()
        optimizer = KFAC(model, likelihood=likelihood)
        bernoulli(model(x), one(y, 5).double()).backward()
        with pytest.raises(ValueError, match="20 examples have outputs of 160 rows.* pass reduction='mean'"):
            optimizer.step()


def test_the_empirical_fisher_asks_for_the_scaler():
    model = net(5, 4, 3, dtype=torch.float32)
    optimizer, scaler = build(KFAC, model, fisher="empirical"), torch.amp.GradScaler("cpu")
    x, y = data(dtype=torch.float32)
    scaler.scale(mse(model, x, y)).backward()
    with pytest.raises(ValueError, match="pass grad_scaler="):
        scaler.step(optimizer)


def softmax(z):
    return z.softmax(-1)


def log_softmax(z):
    return z.log_softmax(-1)


@pytest.mark.parametrize("then", [lambda z: z, lambda z: 9 * z, log_softmax], ids=["flat", "sharp", "log"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_negative_of_a_loss_is_told_from_a_multiple(then, smoothing):
    x, y = tokens()
    for factor, message in (
        (-1, "the negative of a cross-entropy; pass maximize"),
        (3, r"the loss is (3|2\.\d+) times the mean .* or no such"),
    ):
        model = Tokens(then=then)
        optimizer = KFAC(model)
        (factor * cross_entropy(model, x, y, label_smoothing=smoothing)).backward()
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        optimizer = KFAC(model, maximize=factor < 0, reduction="mean")
        optimizer.zero_grad()
        (factor * cross_entropy(model, x, y)).backward()
        optimizer.step()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("known", [True, False])
def test_a_summed_loss_is_noticed_behind_the_scaler(unscale, reduction, known):
    (x, y), model, scaler = tokens(), Tokens(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = KFAC(model, grad_scaler=scaler if known else None)

    def step():
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model, x, y, reduction=reduction)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    if known and reduction == "sum":
        with pytest.raises(ValueError, match="the loss is 160 times the mean over the 160 rows"):
            step()
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
        step()
    found = [str(w.message) for w in caught]
    assert len(found) == (not known) and all("unchecked; pass grad_scaler=" in message for message in found)


def squared(z, y):
    return (z - nn.functional.one_hot(y, 5)).square().mean()


def binary(z, y):
    return nn.functional.binary_cross_entropy_with_logits(z, nn.functional.one_hot(y, 5).to(z))


def mixed(z, y):
    return nn.functional.cross_entropy(z, 0.3 * nn.functional.one_hot(y, 5) + 0.7 * nn.functional.one_hot(y.flip(0), 5))


def partial(**options):
    return lambda z, y: nn.functional.cross_entropy(z, y, **options)


WEIGHTS = torch.tensor([0.1, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("then", "loss", "options", "message"),
    [
        (None, squared, {}, "likelihood='categorical' does not fit the loss"),
        (None, binary, {}, "likelihood='categorical' does not fit the loss"),
        (softmax, lambda z, y: nn.functional.nll_loss(z.log(), y), {}, "'categorical' does not fit the loss"),
        (None, partial(), {"likelihood": "gaussian"}, "'gaussian' does not fit the loss.*pass likelihood="),
        (None, partial(), {"likelihood": "bernoulli"}, "'bernoulli' does not fit the loss.*axis 1"),
        (None, partial(), {}, ""),
        (None, partial(label_smoothing=0.2), {}, ""),
        (None, partial(weight=WEIGHTS), {}, ""),
        (None, partial(ignore_index=1), {}, ""),
        (None, mixed, {}, ""),
        (log_softmax, nn.functional.nll_loss, {}, ""),
        (None, squared, {"likelihood": "gaussian"}, ""),
        (softmax, squared, {"likelihood": "gaussian"}, ""),
        (None, binary, {"likelihood": "bernoulli"}, ""),
    ],
)
def test_the_likelihood_is_held_against_the_loss(then, loss, options, message):
    (x, y), model = tokens(), Tokens(1, then or (lambda z: z))
    x, y = x[:, 0], y[:, 0]
    optimizer = KFAC(model, **options)
    if message:
        with pytest.raises(ValueError, match=message):
            loss(model(x), y).backward()
        optimizer.zero_grad()
    else:
        loss(model(x), y).backward()
        optimizer.step()
        assert optimizer._memory(optimizer.capture.layers[0])["count"] == 1


def test_the_axis_of_the_classes_is_found_or_asked_for():
    (x, y), model = tokens(), Tokens(1)
    optimizer = KFAC(model, class_dim=2)
    with pytest.raises(ValueError, match="does not sum to zero over class_dim=2"):
        cross_entropy(model, x, y).backward()
    optimizer.detach()
    optimizer = KFAC(model, class_dim=1)
    cross_entropy(model, x, y).backward()
    optimizer.detach()
    model = Tokens(1)
    optimizer = KFAC(model)  # two tokens whose gradients are opposite: both axes sum to zero
    z, half = model(x[:, :2]), torch.zeros(20, 5, 2, dtype=torch.float64)
    half[:, 0, 0] = half[:, 1, 1] = 1.0
    half[:, 1, 0] = half[:, 0, 1] = -1.0
    with pytest.raises(ValueError, match=r"over each of the axes \[1, 2\]; pass class_dim="):
        z.backward(half)


class WithLoss(Tokens):
    """As the models of some libraries: it computes its own loss."""

    def __init__(self, loss):
        super().__init__(1)
        self.loss = loss

    def forward(self, x, y):
        z = super().forward(x)
        return {"loss": self.loss(z, y), "logits": z}


def test_a_loss_computed_in_the_model_is_checked_too():
    x, y = tokens()
    model = WithLoss(partial())
    optimizer = KFAC(model)
    model(x[:, 0], y[:, 0])["loss"].backward()
    optimizer.step()
    model = WithLoss(squared)
    optimizer = KFAC(model)
    with pytest.raises(ValueError, match="does not fit the loss"):
        model(x[:, 0], y[:, 0])["loss"].backward()
    del optimizer


# Step length


def moved(optimizer, model, t=0):
    before = [p.detach().clone() for p in model.parameters()]
    x, y = data(key=t)
    optimizer.zero_grad()
    mse(model, x, y).backward()
    optimizer.step()
    change = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    for p, b in zip(model.parameters(), before, strict=True):
        p.data.copy_(b)
    return change


@every_method
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_half_the_learning_rate_is_half_the_step_while_the_limit_binds(method, kind):
    torch.manual_seed(0)
    model = net(5, 4, 3)
    options = {} if method is FOOF else {"fisher": "type-2"}
    optimizer = build(method, model, lr=kind(1.0), momentum=0.0, kl_clip=1e-6, stat_decay=0.0, **options)
    for _ in range(3):  # EKFAC's eigenvalues of the first step are others
        full = moved(optimizer, model)
    (group,) = optimizer.param_groups
    for lr in (0.5, 0.125):
        group["lr"] = kind(lr)
        torch.testing.assert_close(moved(optimizer, model), lr * full, rtol=1e-3, atol=0)
    group["lr"] = kind(4.0)  # beyond it the limit holds
    torch.testing.assert_close(moved(optimizer, model), full, rtol=1e-3, atol=0)
    group["lr"] = kind(2.0)
    torch.testing.assert_close(moved(optimizer, model), full / 2, rtol=1e-3, atol=0)
    again = build(method, model, lr=kind(0.1), momentum=0.0, kl_clip=1e-6, stat_decay=0.0, **options)
    again.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(moved(again, model), full / 2, rtol=1e-3, atol=0)


def test_a_warmup_counts_from_the_rate_that_was_given():
    ends = {}
    for warm in (False, True):
        torch.manual_seed(0)
        model = net(5, 4, 3)
        optimizer = build(KFAC, model, lr=1.0, momentum=0.0, kl_clip=1e-6, fisher="type-2")
        if warm:
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.1 + 0.1 * t)
        ends[warm] = moved(optimizer, model)
    torch.testing.assert_close(ends[True], 0.1 * ends[False])


@every_method
@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("given", [1.0, 0.004])
def test_the_top_of_a_schedule_counts_and_not_a_rate_that_it_replaces(method, kind, given):
    ends = {}
    for way in ("fixed", "by hand", "one cycle"):
        torch.manual_seed(0)
        model = net(5, 4, 3)
        lr = kind(0.1 if way == "fixed" else given)
        optimizer = build(method, model, lr=lr, momentum=0.0, kl_clip=1e-6)
        if way == "by hand":
            optimizer.param_groups[0]["lr"] = kind(0.1)
        if way == "one cycle":
            torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False)
        ends[way] = moved(optimizer, model)
    torch.testing.assert_close(ends["by hand"], ends["fixed"])
    torch.testing.assert_close(ends["one cycle"], ends["fixed"] / 25)


# What is covered


class Conv1D(nn.Module):
    """A linear layer with its weight transposed, as GPT-2's in transformers."""

    def __init__(self, d_out, d_in):
        super().__init__()
        self.nf = d_out
        self.weight = nn.Parameter(torch.randn(d_in, d_out, dtype=torch.float64) / d_in**0.5)
        self.bias = nn.Parameter(torch.zeros(d_out, dtype=torch.float64))

    def forward(self, x):
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view(*x.shape[:-1], self.nf)


@every_method
@pytest.mark.parametrize("sizes", [(5, 4, 3), (4, 4, 4)])
def test_a_transposed_linear_layer_is_a_linear_layer(method, sizes):
    torch.manual_seed(0)
    linear = net(*sizes)
    model = nn.Sequential(Conv1D(*sizes[1::-1]), nn.Tanh(), Conv1D(*sizes[:0:-1]))
    with torch.no_grad():
        for k in (0, 2):
            model[k].weight.copy_(linear[k].weight.T)
            model[k].bias.copy_(linear[k].bias)
    options = {} if method is FOOF else {"fisher": "type-2"}
    optimizers = [build(method, m, **options) for m in (linear, model)]
    assert optimizers[1].coverage() == {"fraction": 1.0, "layers": ["0", "2"], "rest": []}
    for t in range(4):
        x, y = data(d=sizes[0], c=sizes[-1], key=t)
        for m, optimizer in zip((linear, model), optimizers, strict=True):
            optimizer.zero_grad()
            mse(m, x, y).backward()
            optimizer.step()
    for k in (0, 2):
        torch.testing.assert_close(model[k].weight.T, linear[k].weight, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(model[k].bias, linear[k].bias, rtol=1e-9, atol=1e-11)


class Odd(nn.Module):
    """One matrix, and something beside the product."""

    def __init__(self, then, weight=None):
        super().__init__()
        self.weight = nn.Parameter((torch.randn(4, 4) if weight is None else weight).double())
        self.then = then

    def forward(self, x):
        return self.then(x @ self.weight)


@pytest.mark.parametrize(
    "module",
    [Odd(torch.relu), Odd(lambda y: y + 1), Odd(lambda y: 2 * y), Odd(torch.tanh), Odd(lambda y: y.sort()[0])],
    ids=["relu", "shift", "scale", "tanh", "sort"],
)
def test_what_only_resembles_a_linear_layer_is_not_covered(module):
    with pytest.warns(UserWarning, match=r"KFAC covers 56% of the parameters.*'adamw': 0.weight"):
        optimizer = build(KFAC, nn.Sequential(module, nn.Linear(4, 4).double()))
    assert optimizer.coverage()["layers"] == ["1"]


@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.eye(4)], ids=["zero", "symmetric"])
def test_a_linear_layer_is_known_whatever_its_numbers(weight):
    model = nn.Sequential(Conv1D(4, 4), Odd(lambda y: y, weight), nn.Linear(4, 3).double())
    model[0].weight.data.copy_(weight)
    before = copy.deepcopy(model.state_dict())
    optimizer = build(KFAC, model)
    assert [(x.name, x.transposed) for x in optimizer.capture.layers] == [("0", True), ("1", True), ("2", False)]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert optimizer.capture.layers[0].weight is model[0].weight


def test_building_draws_no_numbers():
    model = nn.Sequential(Conv1D(4, 5), nn.Linear(4, 4).double())
    before = torch.get_rng_state()
    build(KFAC, model)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_covered_is_said(recwarn):
    model = Loose(3)
    optimizer = build(KFAC, model)
    assert not [w for w in recwarn if "covers" in str(w.message)]
    found = optimizer.coverage()
    assert found["fraction"] == pytest.approx(18 / 21) and found["rest"] == ["scale"]
    assert repr(optimizer).startswith("KFAC of 1 layers, 86% of the parameters (1 tensors are in no layer)\nKFAC (")
    with pytest.warns(UserWarning, match="KFAC covers 62% of the parameters.*'adamw': scale"):
        build(KFAC, Loose(11))


def test_where_no_layer_is_covered_it_is_an_error():
    model, other = net(5, 4, 3), net(5, 4, 3)
    for method in METHODS:
        with pytest.raises(ValueError, match="pass the model that is trained"):
            build(method, model, params=other.parameters())
        with pytest.raises(ValueError, match="none of the given parameters in a layer"):
            build(method, nn.GRU(3, 3))
        for p in other.parameters():
            p.requires_grad_(False)
        with pytest.raises(ValueError, match="none of the given parameters .* unfreeze them"):
            build(method, other)
        with pytest.raises(ValueError, match="none of the given parameters .* unfreeze them"):
            build(method, other, params=other.parameters())
        for p in other.parameters():
            p.requires_grad_(True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *other.modules()])


@every_method
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("what", ["0", "0.weight"])
def test_a_layer_unfrozen_later_is_named(method, listed, what):
    torch.manual_seed(0)
    model = net(5, 4, 3)
    frozen = [p for name, p in model.named_parameters() if name.startswith(what)]
    for p in frozen:
        p.requires_grad_(False)
    optimizer = build(method, model, params=model.parameters() if listed else None)
    train(model, optimizer, range(2))
    for p in frozen:
        p.requires_grad_(True)
    x, y = data()
    mse(model, x, y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="parameter '0.weight' was frozen .*build it anew.* add_param_group"):
        optimizer.step()
    assert same([p.detach() for p in model.parameters()], before)


def test_what_an_algorithm_steps_may_be_unfrozen_later():
    model = Loose().double()
    model.scale.requires_grad_(False)
    optimizer = build(KFAC, model, params=model.parameters())
    train(model, optimizer, range(2))
    assert model.scale.eq(1).all()
    model.scale.requires_grad_(True)
    train(model, optimizer, range(1))
    assert not model.scale.eq(1).any()


def test_a_group_with_an_algorithm_of_its_own_is_left_to_it(recwarn):
    torch.manual_seed(0)
    model, twin = net(5, 4, 3), net(5, 4, 3)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "algorithm": "sgd"}]
    optimizer = build(KFAC, model, params=groups)
    assert optimizer.coverage()["layers"] == ["0"] and optimizer.coverage()["rest"] == ["2.weight", "2.bias"]
    twin.load_state_dict(model.state_dict())
    x, y = data()
    mse(twin, x, y).backward()
    torch.optim.SGD(twin.parameters(), lr=optimizer.param_groups[1]["lr"]).step()
    train(model, optimizer, range(1))
    assert not recwarn
    assert torch.equal(model[2].weight, twin[2].weight) and not torch.equal(model[0].weight, twin[0].weight)


def test_the_signatures_are_shown():
    for method in (EKFAC, FOOF):
        names = inspect.signature(method.__init__).parameters
        assert {"momentum", "damping", "kl_clip", "likelihood", "algorithm", "params"} <= names.keys()
    assert not issubclass(FOOF, KFAC)
    assert all(inspect.unwrap(method.step) is inspect.unwrap(Optimizer.step) for method in METHODS)


# State and messages


@every_method
def test_without_momentum_no_parameter_has_an_empty_state(method):
    model = net(5, 4, 3)
    optimizer = build(method, model, momentum=0.0)
    train(model, optimizer, range(2))
    assert optimizer.memory()["0"]["momentum"] == 0
    assert all(optimizer.state.values()) and len(optimizer.state) == 2


@every_method
def test_a_checkpoint_of_other_shapes_is_refused_by_name(method):
    torch.manual_seed(0)
    wide, narrow = net(5, 4, 3), net(5, 6, 3)
    optimizer = build(method, wide, momentum=0.0)
    train(wide, optimizer, range(2))
    other = build(method, narrow, momentum=0.0)
    train(narrow, other, range(1))
    before = copy.deepcopy(other.state_dict()["state"])
    with pytest.raises(ValueError, match=r"parameter '[02].weight'.* 'A|G.* has shape .* has to be"):
        other.load_state_dict(optimizer.state_dict())
    after = other.state_dict()["state"]
    for key, state in before.items():
        for name, x in state["layers"]["0"].items():
            assert torch.equal(after[key]["layers"]["0"][name], x)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.double()

    def forward(self, i):
        return self.head(self.embed(i).tanh())


@every_method
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("name", ["embed", "head"])
def test_a_layer_that_has_grown_is_named_with_the_remedy(method, momentum, seen, name):
    torch.manual_seed(0)
    model, i = Words(), torch.randint(7, (20,))
    optimizer = build(method, model, momentum=momentum, factor_update_every=1 if seen else 9)
    mean_square(model(i)).backward()
    optimizer.step()
    weight = getattr(model, name).weight
    weight.data = torch.cat([weight.data, torch.zeros(2, 4)])
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=rf"layer '{name}' had parameters of shape \[\(7, 4\)\].* build it anew"):
        mean_square(model(i + 2 * (name == "embed"))).backward()
        optimizer.step()
    assert same([p.detach() for p in model.parameters()], before)


def test_the_past_has_the_weight_of_stat_decay_in_the_long_run():
    torch.manual_seed(0)
    model, expected, decay = net(5, 4, 3), None, 0.7
    optimizer = build(KFAC, model, lr=0.0, stat_decay=decay)
    for k in range(1, 12):
        x, y = data(key=k)
        optimizer.zero_grad()
        mse(model, x, y).backward()
        optimizer.step()
        z = torch.cat([x, torch.ones(24, 1, dtype=torch.float64)], 1)
        weight = max(1 / k, 1 - decay)
        expected = z.T @ z / 24 if k == 1 else (1 - weight) * expected + weight * z.T @ z / 24
        torch.testing.assert_close(optimizer._memory(optimizer.capture.layers[0])["A"], expected)


def test_eigenvalues_are_carried_into_a_new_basis():
    torch.manual_seed(0)
    model = net(5, 4, 3)
    optimizer = build(EKFAC, model, fisher="type-2", inverse_update_every=1, lr=0.0)
    train(model, optimizer, range(3))
    m = optimizer._memory(optimizer.capture.layers[0])
    for side in ("A", "G"):
        U, s = m[f"{side}_vectors"].clone(), m["s"].clone()
        m[side] = m[side] + torch.randn(len(m[side]), 2, dtype=torch.float64) @ torch.randn(2, len(m[side])).double()
        m[side] = m[side] @ m[side].mT
        optimizer.refresh(side, [m], [None])
        V = (m[f"{side}_vectors"].mT @ U).square()
        assert V.amax() < 0.999  # another basis
        torch.testing.assert_close(m["s"], V @ s if side == "G" else s @ V.mT)
        torch.testing.assert_close(m["s"].sum(), s.sum())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("split", ["exact", "pi"])
@pytest.mark.parametrize("autocast", [False, True])
def test_keys_have_no_reduced_factor_and_move_all_the_same(split, autocast):
    steps = {}
    for sharing in ("expand", "reduce"):
        torch.manual_seed(0)
        model, x, y = Attention(), torch.randn(64, 7, 16), torch.randint(5, (64,))
        optimizer = KFAC(model, 0.1, sharing=sharing, relative_damping=True, damping_split=split)
        keys = next(layer for layer in optimizer.capture.layers if layer.name == "attention.k")
        for _ in range(2):
            before = model.attention.in_proj_weight.detach().clone()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                z = model(x)
            nn.functional.cross_entropy(z.float(), y).backward()
            optimizer.step()
            change = (model.attention.in_proj_weight.detach() - before).abs()
            steps.setdefault(sharing, []).append([float(part.amax()) for part in change.split(16)])
        assert optimizer._memory(keys)["G"].trace() > 0  # that of "expand" under both
        optimizer.relative_damping = False
        a, g = torch.randn(8, 7, 17), torch.randn(1, 8, 7, 16)
        found = optimizer.statistics(keys, a, g - g.mean(2, keepdim=True))
        assert found["G"].eq(0).all() == (sharing == "reduce")
    for moves in steps["reduce"]:
        assert all(0 < move < 3 for move in moves)


def test_bypassed_hooks_are_explained():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = net(5, 4), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=True))

    model, (x, y) = Checkpointed(), data()
    optimizer = build(KFAC, model)
    mse(model, x, y).backward()
    with pytest.raises(RuntimeError, match=r"layer 'body.0' has a gradient.*not compiled.*use_reentrant=False"):
        optimizer.step()
    model = net(5, 4, 3)
    optimizer = build(KFAC, model)
    mse(torch.compile(model, backend="eager"), x.detach(), y).backward()
    with pytest.raises(RuntimeError, match=r"not compiled"):
        optimizer.step()


class Passed(nn.Sequential):
    """It may call its first layer where no hook sees it, or not at all."""

    way = "plain"

    def forward(self, x):
        first = self[0].forward if self.way == "unseen" else self[0]
        x = torch.zeros(len(x), 4).to(x) if self.way == "unused" else first(x)
        return self[2](self[1](x))


@every_method
def test_with_memory_too_it_is_noticed_that_a_layer_is_no_longer_seen(method):
    torch.manual_seed(0)
    model = net(5, 4, 3)
    optimizer = build(method, model)
    train(model, optimizer, range(2))
    twin = net(5, 4, 3)
    resumed = build(method, twin)
    resumed.load_state_dict(optimizer.state_dict())
    before = [p.detach().clone() for p in twin.parameters()]
    with pytest.raises(RuntimeError, match=r"layer '0' has a gradient.*not compiled"):
        train(torch.compile(twin, backend="eager"), resumed, range(1))
    assert same([p.detach() for p in twin.parameters()], before)
    model = Passed(*net(5, 4, 3))
    optimizer = build(method, model)
    train(model, optimizer, range(2))
    optimizer.zero_grad(set_to_none=False)
    model.way, (x, y) = "unused", data()
    mse(model, x, y).backward()
    optimizer.step()  # a layer whose gradient stayed zero was rightly not seen
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    model.way = "unseen"
    with pytest.raises(RuntimeError, match=r"layer '0' has a gradient.*call the model itself"):
        train(model, optimizer, range(1))


def test_the_seed_and_the_step_decide_what_is_drawn():
    ends = []
    for seed, steps in ((0, 2), (0, 2), (1, 2), (0, 1)):
        torch.manual_seed(0)
        model = net(5, 4, 3)
        optimizer = build(KFAC, model, seed=seed, lr=0.0, stat_decay=0.0)
        train(model, optimizer, [0] * steps)
        ends.append(optimizer._memory(optimizer.capture.layers[0])["G"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[3])


# Found by a mathematician's reading


@pytest.mark.parametrize("method", [KFAC, EKFAC])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_an_undamped_step_of_few_examples_is_the_pseudo_inverses(method, dtype, tol):
    """Twenty examples leave 180 of 200 eigenvalues zero, which eigh returns as roundings."""
    torch.manual_seed(0)
    layer, (x, y) = nn.Linear(200, 10, bias=False, dtype=dtype), data(20, 200, 10, dtype)
    start = layer.weight.detach().clone()
    method = build(method, layer, lr=1.0, momentum=0.0, damping=0.0, kl_clip=math.inf, fisher="type-2")
    mse(layer, x, y).backward()
    A, g = x.double().T @ x.double() / 20, layer.weight.grad.double()
    method.step()
    wanted = g @ torch.linalg.pinv(A, hermitian=True, rtol=1e-10)
    error = (start - layer.weight.detach()).double() - wanted
    assert error.norm() < tol * wanted.norm()


@pytest.mark.parametrize("classes", [10, 128, 784])
def test_a_squared_error_of_many_outputs_is_no_cross_entropy(classes):
    """Its signs cancel: the sum over outputs is about 1/√C of the whole."""
    torch.manual_seed(0)
    z, y = torch.randn(64, classes), torch.randn(64, classes)
    with pytest.raises(ValueError, match="does not fit the loss"):
        class_axis(z, z - y)
    for dtype in (torch.float32, torch.bfloat16):
        leaf = z.to(dtype, copy=True).requires_grad_()
        nn.functional.cross_entropy(leaf, y.argmax(1)).backward()
        assert class_axis(leaf.detach(), leaf.grad) == 1
    leaf = z.clone().requires_grad_()  # a small penalty of the normaliser does not hide it
    (nn.functional.cross_entropy(leaf, y.argmax(1)) + 1e-3 * leaf.logsumexp(1).square().mean()).backward()
    assert class_axis(leaf, leaf.grad) == 1


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_that_balance_over_places_leave_the_classes_evident(classes):
    torch.manual_seed(0)
    z = (0.1 * torch.randn(8, classes, 1026)).requires_grad_()
    y = torch.stack([torch.randperm(1026) % classes for _ in range(8)])
    nn.functional.cross_entropy(z, y).backward()
    assert z.grad.sum(2).abs().sum() < 0.1 * z.grad.abs().sum()
    assert class_axis(z.detach(), z.grad) == 1


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_the_check_is_not_lost_where_float16_overflows(likelihood):
    """As under a GradScaler: the sum over all gradients is beyond 65504."""
    torch.manual_seed(0)
    z, y = torch.randn(64, 10, 4).half().requires_grad_(), torch.randint(10, (64, 4))
    (65536 * nn.functional.cross_entropy(z.float(), y)).backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() == math.inf
    capture = Capture(net(5, 3), consume=lambda *_: None, likelihood=likelihood)
    if likelihood == "categorical":
        capture.examine(z.detach(), z.grad)
        assert capture._axes == {3: 1}
    else:
        with pytest.raises(ValueError, match="does not fit the loss"):
            capture.examine(z.detach(), z.grad)


def test_the_empirical_fisher_of_a_scaled_float16_loss_is_finite():
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3).half(), torch.randn(64, 5).half()
    y, ce = torch.arange(64) % 3, nn.functional.cross_entropy
    ((_, g),) = pairs(model, x, "empirical", "categorical", lambda z: 2**17 * ce(z.float(), y))
    assert g.isfinite().all() and g.abs().amax() > 65504


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_heads_are_not_taken_for_classes(dtype):
    """Exclusive events, and centred targets: with outputs near zero the gradient's sum is, too."""
    torch.manual_seed(0)
    z = (1e-4 * torch.randn(64, 2)).to(dtype)
    y = torch.eye(2, dtype=dtype)[torch.randint(2, (64,))]
    check_no_classes("bernoulli", z, z.sigmoid() - y)
    y = torch.randn(64, 2).to(dtype)
    check_no_classes("gaussian", z, z - torch.stack([y[:, 0], -y[:, 0]], 1))
    z = (torch.randn(64, 2) * (1 if dtype == torch.bfloat16 else 1e-3)).to(dtype)
    for likelihood in ("bernoulli", "gaussian"):
        with pytest.raises(ValueError, match="as a cross-entropy's does"):
            check_no_classes(likelihood, z, z.softmax(1) - torch.eye(2, dtype=dtype)[torch.arange(64) % 2])


class MeanOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 3, dtype=torch.float64)

    def forward(self, i):
        return self.table(i).mean(1).tanh()


@pytest.mark.parametrize("method", [KFAC, EKFAC])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_curvature_of_distinct_words_has_the_true_trace(method, sharing):
    """An example's gradient has one column for each of its words, so their squares add up."""
    torch.manual_seed(0)
    model, i = MeanOfWords(), torch.stack([torch.randperm(40)[:8] for _ in range(16)])
    y = torch.randn(16, 3, dtype=torch.float64)
    optimizer = build(method, model, sharing=sharing, fisher="type-2", lr=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        mse(model, i, y).backward()
        optimizer.step()
    slope = (1 - model(i).detach().square()) / 8  # of an output by each of the 8 words
    wanted = 8 * slope.square().sum(1).mean()
    memory = optimizer._memory(optimizer.capture.layers[0])
    torch.testing.assert_close(optimizer.curvature(memory).sum(), wanted)
    torch.testing.assert_close(memory["A"].sum() * memory["G"].trace(), wanted)


@every_method
def test_a_layer_without_statistics_stands_still(method, flags):
    """Not: descends, unclipped. On the host its next gradient brings statistics."""
    torch.manual_seed(0)
    model = net(5, 4, 3)
    model[0].requires_grad_(False)
    optimizer = build(method, model, momentum=0.0, factor_update_every=4)
    start, moved = [p.detach().clone() for p in model.parameters()], []
    for t in range(8):
        x, y = data(key=t)
        if t == 6:
            optimizer.add_param_group({"params": list(model[0].requires_grad_().parameters())})
        optimizer.zero_grad()
        mse(model, x * (math.nan if t == 0 else 1), y).backward()
        optimizer.step()
        now = [p.detach().clone() for p in model.parameters()]
        moved.append([not torch.equal(a, b) for a, b in zip(start, now, strict=True)])
        start = now
    first, second = [m[0] for m in moved], [m[2] for m in moved]
    assert first == [False] * 7 + [True]
    assert second in ([False] * 4 + [True] * 4, [False] + [True] * 7)
    counts = [int(optimizer._memory(layer)["count"]) for layer in optimizer.capture.layers]
    assert counts == [1, 2 + second[1]]


def test_a_model_with_its_own_loss_says_where_its_classes_are():
    """Before the gradient by its outputs has come by, targets are drawn over the last axis."""
    x, y = tokens()
    model = WithLoss(cross_entropy_of)
    optimizer = KFAC(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="pass class_dim=1"):
            model(x, y)["loss"].backward()
    optimizer.detach()
    optimizer = KFAC(model, class_dim=1)
    model(x, y)["loss"].backward()
    optimizer.step()
    assert optimizer._memory(optimizer.capture.layers[0])["count"] == 1


def cross_entropy_of(z, y):
    return nn.functional.cross_entropy(z, y)


@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_the_clip_is_that_of_the_mean_and_of_each_groups_rate(method):
    rates, (x, y) = (1.0, 1.0, 0.1, 0.1), data()

    def step(kl_clip, reduction="mean"):
        torch.manual_seed(0)
        model = net(5, 4, 3)
        groups = [{"params": model[k].parameters(), "lr": lr} for k, lr in ((0, 1.0), (2, 0.1))]
        options = {"momentum": 0.0, "fisher": "type-2", "params": groups}
        optimizer = build(method, model, kl_clip=kl_clip, reduction=reduction, **options)
        factor = 24 if reduction == "sum" else 1
        (factor * mse(model, x, y)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        params = zip(model.parameters(), before, rates, strict=True)
        return [((b - p.detach()) / lr, lr**2 * p.grad / factor) for p, b, lr in params]

    whole, clipped = step(math.inf), step(1e-4)
    size = sum(float((u * g).sum()) for u, g in whole)
    nu = (1e-4 / size) ** 0.5
    assert 0 < nu < 0.9
    for (u, _), (short, _), (summed, _) in zip(whole, clipped, step(1e-4, "sum"), strict=True):
        torch.testing.assert_close(short, nu * u, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(summed, nu * u, rtol=1e-9, atol=1e-12)


class WordsAndPositions(MeanOfWords):
    def __init__(self):
        super().__init__()
        self.position = nn.Embedding(8, 3, dtype=torch.float64)

    def forward(self, i):
        return (self.table(i) + self.position(torch.arange(8))).mean(1).tanh()


def test_what_examples_share_counts_once_for_each_of_them():
    model, i = WordsAndPositions(), torch.randint(40, (24, 8))
    optimizer = build(KFAC, model)
    optimizer.statistics = lambda layer, a, g: {"A": torch.full((3,), float(optimizer.capture.examples))}
    for part in i.split([17, 7]):
        mse(model, part, 0).backward()
    for layer in optimizer.capture.layers:
        assert optimizer.counts[layer] == 24
        torch.testing.assert_close(optimizer.pending[layer]["A"], torch.full((3,), (17**2 + 7**2) / 24))


# What mutants survived


def test_a_norm_layers_curvature_is_the_mean_square_of_examples_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    (x, y), options = data(), {"fisher": "empirical", "lr": 0.0}
    optimizer = build(KFAC, model, **options)
    mse(model, x, y).backward()
    optimizer.step()
    squares = torch.zeros(4, 2, dtype=torch.float64)
    for n in range(24):
        grads = torch.autograd.grad(mse(model, x[n : n + 1], y[n : n + 1]), list(model[1].parameters()))
        squares += torch.stack(grads, 1).square() / 24
    layer = next(layer for layer in optimizer.capture.layers if layer.kind == "scale")
    torch.testing.assert_close(optimizer._memory(layer)["F"], squares)


def test_foof_is_ridge_regression_in_units_of_the_mean_square_input():
    torch.manual_seed(0)
    layer, (x, y) = nn.Linear(5, 3, bias=False).double(), data()
    optimizer = build(FOOF, layer, lr=1.0, momentum=0.0, damping=0.3, relative_damping=True, kl_clip=math.inf)
    before = layer.weight.detach().clone()
    mse(layer, 4 * x, y).backward()
    g, A = layer.weight.grad.clone(), 16 * x.T @ x / 24
    optimizer.step()
    wanted = torch.linalg.solve(A + 0.3 * A.diagonal().mean() * torch.eye(5), g.T).T
    torch.testing.assert_close(before - layer.weight.detach(), wanted)


def test_twice_a_log_likelihood_of_log_probabilities_shows():
    (x, y), model = tokens(), Tokens(1, lambda z: z.log_softmax(1))
    optimizer = KFAC(model)
    (2 * nn.functional.nll_loss(model(x[:, 0]), y[:, 0])).backward()
    with pytest.raises(ValueError, match="the loss is 2 times the mean"):
        optimizer.step()


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, words=7, d=4):
        super().__init__()
        self.table, self.body = nn.Embedding(words, d), nn.Linear(d, d)
        self.head = nn.Linear(d, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.body(self.table(x)))


@every_method
def test_a_factor_that_is_too_large_is_refused_with_its_size(method):
    def model():
        return nn.Sequential(nn.Linear(39, 3), nn.Tanh(), nn.Linear(3, 2), nn.Linear(2, 12))

    longest = 40  # 39 inputs and the bias
    build(method, model(), max_dim=longest)
    message = rf"layer '0' has a factor of 40 × 40 numbers, .* GB.*\"algorithm\": \"adamw\".*max_dim={longest}"
    with pytest.raises(ValueError, match=message):
        build(method, model(), max_dim=longest - 1)
    with pytest.raises(ValueError, match="max_dim=0 is outside its range"):
        build(method, model(), max_dim=0)
    m = model()
    first, others = list(m[0].parameters()), [p for x in m[1:] for p in x.parameters()]
    groups = [{"params": others}, {"params": first, "algorithm": "adamw"}]
    optimizer = build(method, m, max_dim=12, params=groups)
    assert optimizer.coverage()["layers"] == ["2", "3"]
    partial = build(method, m, max_dim=12, params=others)
    with pytest.raises(ValueError, match="layer '0' has a factor of 40"):
        partial.add_param_group({"params": first})
    assert len(partial.param_groups) == 1


def test_a_head_of_many_words_is_refused_by_default_and_a_table_is_not():
    with torch.device("meta"):
        head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 50257))
    with pytest.raises(ValueError, match=r"layer '1' has a factor of 50257 × 50257 numbers, 10\.1 GB"):
        KFAC(head)
    KFAC(nn.Sequential(nn.Embedding(50257, 2), nn.Linear(2, 3)))  # its long factor is a diagonal


@every_method
def test_a_compiled_model_is_refused_at_once(method):
    model = net(5, 4, 3)
    compiled = torch.compile(model, backend="eager")
    for whole in (compiled, nn.Sequential(compiled)):
        with pytest.raises(ValueError, match="compiled by torch.compile.*on the uncompiled model"):
            build(method, whole)
    build(method, model)


@pytest.mark.parametrize("passes", [1, 4])
def test_passes_that_are_added_up_are_told_to_be_divided_by_their_number(passes):
    torch.manual_seed(0)
    for remedy in (1, passes):
        model = net(5, 4, 3)
        optimizer = KFAC(model)
        for i in range(passes):
            x, _ = data(8, key=i)
            (nn.functional.cross_entropy(model(x), torch.arange(8) % 3) / remedy).backward()
        if remedy == passes:
            optimizer.step()
        else:
            with pytest.raises(ValueError, match="by the number of passes if gradients of several passes are accum"):
                optimizer.step()


def test_coverage_counts_a_tied_embedding_once():
    model = Tied()
    covered = KFAC(model).coverage()
    assert covered["fraction"] == 1 and covered["rest"] == []
    assert sum(p.numel() for p in model.parameters()) == 7 * 4 + 4 * 4 + 4
    assert covered["layers"] == ["body", "head"]
