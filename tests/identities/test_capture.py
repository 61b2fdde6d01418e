"""What a capture hands over: exact sums, every layer kind, and a training loop that does not notice."""

import copy
import gc
import io
import math
import pickle
import weakref
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from guided_descent.capture import Capture
from guided_descent.kfac import gram
from guided_descent.layers import Layer

N, TOKENS, WIDTH, CLASSES = 6, 5, 8, 5


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assembled(layer: Layer, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Σ over gradients, examples and places of g aᵀ, in the layer's matrix."""
    if layer.kind == "embedding":
        return a.new_zeros(layer.shape, dtype=g.dtype).index_add_(1, a.flatten(), g.sum(0).flatten(0, 1).T)
    if layer.kind == "scale":
        columns = [] if layer.weight is None else [(g * a).sum((0, 1, 2))]
        return torch.stack(columns + ([] if layer.bias is None else [g.sum((0, 1, 2))]), 1)
    return torch.einsum("mnri,nrj->ij", g, a)


def rows(layer: Layer, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """One gradient of the layer's matrix for each column and example, flattened."""
    pairs = [(m, n) for m in range(len(g)) for n in range(len(a))]
    return torch.stack([assembled(layer, a[n : n + 1], g[m : m + 1, n : n + 1]) for m, n in pairs])


class Taker:
    """Something with a state and a capture, as an optimizer has."""

    def __init__(self, model, **options):
        self.taken = []
        self.capture = Capture(model, consume=self.take, **options)

    def take(self, layer, a, g):
        self.taken.append((layer, a, g))

    @property
    def names(self):
        return [layer.name for layer, _, _ in self.taken]


class Everything(nn.Module):
    """All kinds of layers, activations in place, a weight used twice, attention in its three forms."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 6, (1, 3), groups=2, padding="same", padding_mode="circular")
        self.relu = nn.ReLU(inplace=True)
        self.batch = nn.BatchNorm2d(6)
        self.group = nn.GroupNorm(3, 6)
        self.linear = nn.Linear(6, WIDTH)
        self.tokens = nn.Embedding(11, WIDTH, padding_idx=0)
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.cross = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.separate = nn.MultiheadAttention(WIDTH, 2, batch_first=True, kdim=7, vdim=6)
        self.layer = nn.LayerNorm((TOKENS, WIDTH))
        self.rms = nn.RMSNorm(WIDTH)
        self.conv1 = nn.Conv1d(WIDTH, WIDTH, 3, dilation=2, padding=2, bias=False)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, image, indices, memory):
        h = self.group(self.batch(self.grouped(self.relu(self.conv(image))))).flatten(2).mean(-1)
        h = self.linear(h).unsqueeze(1) + self.tokens(indices)
        t = h.transpose(0, 1)
        h = self.layer(h + self.attention(t, t, t)[0].transpose(0, 1))
        h = h + self.cross(h, h[:, :2], h[:, :2], need_weights=False)[0]
        h = self.rms(h + self.separate(h, memory[..., :7], memory[..., :6])[0])
        h = h + self.conv1(h.transpose(1, 2)).transpose(1, 2)
        h = self.twice(self.twice(h).tanh())
        return self.head(input=h.mean(1))


def everything():
    data = torch.randn(N, 3, 7, 6), torch.randint(0, 11, (N, TOKENS)), torch.randn(N, 4, 7)
    data[1][1, 2] = 0  # the padding
    return Everything(), data, torch.randint(0, CLASSES, (N,))


def some(out, likelihood="categorical", axis=-1):
    """A loss that fits a likelihood."""
    return -out.log_softmax(axis).select(axis, 0).mean() if likelihood == "categorical" else out.sum()


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(N, 4), torch.randint(0, 3, (N,))


def exact(taker, tol=1e-12):
    """Every layer's pairs add up to its gradient."""
    sums = {}
    for layer, a, g in taker.taken:
        sums[layer.name] = sums.get(layer.name, 0) + assembled(layer, a, g) / len(a)
    assert set(sums) == {layer.name for layer in taker.capture.layers}
    for layer in taker.capture.layers:
        torch.testing.assert_close(sums[layer.name], layer.gradient(), rtol=tol, atol=tol)


# ── exact sums ────────────────────────────────────────────────────────────────


def test_pairs_of_every_kind_add_up_to_the_gradient():
    model, data, y = everything()
    taker = Taker(model, fisher="empirical")
    assert not taker.capture.rest
    F.cross_entropy(model(*data), y).backward()
    exact(taker)
    assert {layer.kind for layer in taker.capture.layers} == {"linear", "conv", "embedding", "scale"}
    covered = {id(p) for layer in taker.capture.layers for p in layer.parameters}
    assert covered == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    "conv, shape",
    [
        (nn.Conv1d(2, 3, 4, stride=3, padding=2, padding_mode="reflect"), (N, 2, 11)),
        (nn.Conv2d(2, 3, (3, 2), dilation=(1, 2), padding="valid"), (N, 2, 6, 7)),
        (nn.Conv3d(2, 4, (1, 2, 3), stride=(2, 1, 1), padding=(0, 1, 1), padding_mode="replicate"), (N, 2, 3, 4, 5)),
        (nn.Conv3d(4, 4, 2, groups=4, bias=False), (N, 4, 3, 3, 3)),
    ],
)
def test_convolutions(conv, shape):
    model = nn.Sequential(conv.double(), nn.Flatten())
    taker = Taker(model, fisher="empirical", likelihood="gaussian")
    (model(torch.randn(shape)).square().sum(1) / 2).mean().backward()
    exact(taker)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_with_the_statistics_of_its_mode(training):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[1].running_mean.fill_(0.3)
    model.train(training)
    taker = Taker(model, fisher="empirical", likelihood="gaussian")
    model(torch.randn(N, 4)).square().mean().backward()
    exact(taker)


def ggn(model, x, layer, likelihood):
    """The Gauss–Newton block of a mean over examples of summed losses, by autograd and the Hessian of the loss."""
    params = {n: p for n, p in model.named_parameters() if any(p is q for q in layer.parameters)}

    def f(values, one):
        return torch.func.functional_call(model, values, (one[None],))[0].flatten()

    total = 0
    for one in x:
        out = f(params, one)
        if likelihood == "categorical":
            h = torch.func.hessian(lambda z: -z.log_softmax(0)[0])(out.detach())
        elif likelihood == "gaussian":
            h = torch.eye(len(out))
        else:
            h = torch.func.hessian(lambda z: F.softplus(z).sum())(out.detach())
        j = torch.func.jacrev(f)(params, one)
        blocks = [j[n].reshape(len(out), p.shape[0], -1) for n, p in params.items()]
        matrix = torch.cat(blocks, 2).flatten(1)
        total = total + matrix.T @ h @ matrix / len(x)
    return total


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_type_2_is_the_gauss_newton_block(likelihood):
    model, x, _ = mlp()
    taker = Taker(model, fisher="type-2", likelihood=likelihood)
    some(model(x), likelihood).backward()
    taker.capture.detach()
    assert len(taker.taken) == 2
    for layer, a, g in taker.taken:
        assert g.shape[0] == 3
        v = rows(layer, a, g).flatten(1)
        torch.testing.assert_close(v.T @ v / N, ggn(model, x, layer, likelihood), rtol=1e-12, atol=1e-12)


def test_type_2_of_many_places_and_of_a_class_dimension():
    """Outputs (N, T, C) and (N, C, T) of one model have the same curvature, the sum over the places."""
    linear = nn.Linear(3, 4)
    x = torch.randn(N, 2, 3)
    first = Taker(nn.Sequential(linear), fisher="type-2")
    some(first.capture.model(x)).backward()
    first.capture.detach()
    second = Taker(nn.Sequential(linear, Swapped()), fisher="type-2")
    some(second.capture.model(x), axis=1).backward()
    (layer, a, g), (_, a2, g2) = first.taken[0], second.taken[0]
    v, w = rows(layer, a, g).flatten(1), rows(layer, a2, g2).flatten(1)
    torch.testing.assert_close(v.T @ v, w.T @ w)
    p = linear(x).softmax(-1).detach()
    h = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    ones = torch.cat([x, torch.ones(N, 2, 1)], -1)
    expected = torch.einsum("ntij,ntk,ntl->ikjl", h, ones, ones).reshape(16, 16)
    torch.testing.assert_close(v.T @ v, expected)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_an_output_of_one_number_for_each_example(likelihood):
    linear = nn.Linear(3, 1)
    x = torch.randn(N, 3)
    a = torch.cat([x, torch.ones(N, 1)], 1)
    p = linear(x).sigmoid().detach()
    expected = a.T @ (a * (1 if likelihood == "gaussian" else p * (1 - p)))
    for fisher, samples in (("type-2", 1), ("mc", 20000)):
        taker = Taker(nn.Sequential(linear, nn.Flatten(0)), fisher=fisher, likelihood=likelihood, samples=samples)
        taker.capture.model(x).sum().backward()
        _, a, g = taker.taken[0]
        v = torch.einsum("mnri,nrj->mnj", g, a).flatten(0, 1)
        tol = 1e-12 if fisher == "type-2" else 0.05 * float(expected.abs().max())
        torch.testing.assert_close(v.T @ v, expected, rtol=tol, atol=tol)


class Swapped(nn.Module):
    def forward(self, x):
        return x.movedim(-1, 1)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_monte_carlo_comes_to_type_2_at_the_root_of_the_samples(likelihood):
    model, x, _ = mlp()
    layer = None

    def block(**options):
        nonlocal layer
        taker = Taker(model, likelihood=likelihood, **options)
        some(model(x), likelihood).backward()
        taker.capture.detach()
        layer, a, g = taker.taken[0]
        v = torch.einsum("mnri,nrj->mnij", g, a).flatten(0, 1).flatten(1)
        return v.T @ v / N

    exact_block = block(fisher="type-2")
    errors = {
        m: math.sqrt(sum(float((block(samples=m) - exact_block).square().sum()) for _ in range(20)) / 20)
        for m in (4, 400)
    }
    assert errors[400] < 0.1 * exact_block.norm()
    assert 6 < errors[4] / errors[400] < 16  # 10 is the rate


def test_a_callable_likelihood_draws_its_own_targets():
    model, x, _ = mlp()

    def poisson(f):
        return (f.exp() - torch.poisson(f.detach().exp()) * f).sum(1)

    taker = Taker(model, likelihood=poisson, samples=3000)
    out = model(x)
    out.sum().backward()
    layer, a, g = taker.taken[0]
    second = g.square().sum(0).squeeze(1)
    torch.testing.assert_close(second, out.detach().exp(), rtol=0.25, atol=0.02)


def test_a_gradient_from_the_generator_is_repeatable_and_leaves_the_global_one_alone():
    model, x, y = mlp()
    seen = []
    for _ in range(2):
        taker = Taker(model, generator=torch.Generator().manual_seed(3))
        state = torch.get_rng_state()
        F.cross_entropy(model(x), y).backward()
        assert torch.equal(state, torch.get_rng_state())
        taker.capture.detach()
        seen.append(taker.taken[0][2])
    assert torch.equal(*seen)


# ── the loop does not notice ──────────────────────────────────────────────────


@pytest.mark.parametrize("fisher", ["mc", "type-2", "empirical", "none"])
def test_gradients_and_outputs_are_bitwise_those_without(fisher):
    model, data, y = everything()
    plain = copy.deepcopy(model)
    expected = plain(*data)
    F.cross_entropy(expected, y).backward()
    taker = Taker(model, fisher=fisher, generator=torch.Generator())
    out = model(*data)
    F.cross_entropy(out, y).backward()
    assert torch.equal(out, expected)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert set(taker.names) == {layer.name for layer in taker.capture.layers}
    assert all((g is None) == (fisher == "none") for _, _, g in taker.taken)


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_detach_leaves_the_model_as_before():
    model, data, y = everything()
    before = hooks(model)
    taker = Taker(model)
    assert hooks(model) != before
    taker.capture.detach()
    taker.capture.detach()
    assert hooks(model) == before
    out = model(*data)
    assert "Tap" not in type(out.grad_fn).__name__
    F.cross_entropy(out, y).backward()
    assert not taker.taken


def test_a_dropped_capture_does_nothing():
    model, x, y = mlp()
    taker = Taker(model)
    seen, alive = taker.taken, weakref.ref(taker.capture)
    del taker
    gc.collect()
    assert alive() is None
    F.cross_entropy(model(x), y).backward()
    assert not seen


def test_no_statistics_without_a_backward_pass():
    model, x, y = mlp()
    taker = Taker(model)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    model(x)
    model.eval()(x).sum()
    taker.capture.recording = False
    F.cross_entropy(model(x), y).backward()
    assert not taker.taken
    taker.capture.recording = True
    F.cross_entropy(model(x), y).backward()
    assert len(taker.taken) == 2


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_activations_live_no_longer_than_the_graph_and_not_past_their_use(fisher):
    model, x, y = mlp()
    capture = Capture(model, consume=drop, fisher=fisher)
    gc.collect()
    gc.disable()
    try:
        for differentiate in (False, True):
            alive = []

            def watch(module, args, out, alive=alive):
                alive.append(weakref.ref(out.untyped_storage()))

            handle = model[1].register_forward_hook(watch)
            loss = F.cross_entropy(model(x), y)
            handle.remove()
            storage = [ref() is not None for ref in alive]
            assert storage == [True]
            if differentiate:
                loss.backward()
                assert [ref() for ref in alive] == [None]  # while the loss is still there
            del loss
            assert [ref() for ref in alive] == [None]
    finally:
        gc.enable()
    capture.detach()


def drop(layer, a, g):
    pass


def test_sampled_gradients_are_let_go_layer_by_layer():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))
    refs, alive = [], []

    def take(layer, a, g):
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(g.untyped_storage()))

    capture = Capture(model, consume=take, likelihood="gaussian")
    model(torch.randn(N, 8)).sum().backward()
    assert len(alive) == len(capture.layers) == 6 and max(alive) <= 1


def test_several_calls_and_accumulation_are_several_passes():
    model, x, y = mlp()
    taker = Taker(model, fisher="empirical")
    one, two = model(x), model(x[:3] * 2)
    (F.cross_entropy(one, y) + F.cross_entropy(two, y[:3])).backward()
    assert len(taker.taken) == 4
    exact(taker)
    F.cross_entropy(model(x), y).backward()
    assert len(taker.taken) == 6
    exact(taker)


def test_a_model_inside_its_own_loop():
    """The output of one pass is the input of the next: each is its own."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    taker = Taker(model, fisher="type-2", likelihood="gaussian")
    model(model(torch.randn(N, 3))).sum().backward()
    assert [g.shape for _, _, g in taker.taken] == [(3, N, 1, 3)] * 2


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x, depth=2):
        return self.inner(self(x, depth - 1)) if depth else x


def test_a_model_that_calls_itself_is_one_pass():
    model = Recursive()
    taker = Taker(model, fisher="empirical", likelihood="gaussian")
    model(torch.randn(N, 3)).square().mean().backward()
    exact(taker)
    assert [a.shape for _, a, _ in taker.taken] == [(N, 2, 4)]


def test_an_error_in_the_forward_leaves_nothing_behind(recwarn):
    model, data, y = everything()
    taker = Taker(model, fisher="empirical")
    linear = F.linear
    with pytest.raises((RuntimeError, AssertionError)):
        model(data[0], data[1], data[2][..., :5])
    assert F.linear is linear and not taker.capture._stack
    assert not [str(w.message) for w in recwarn if "hook" in str(w.message)]
    F.cross_entropy(model(*data), y).backward()
    exact(taker)
    assert F.linear is linear


def test_backward_twice_through_one_graph_counts_once():
    model, x, y = mlp()
    for fisher in ("mc", "empirical"):
        taker = Taker(model, fisher=fisher)
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
        assert len(taker.taken) == 2
        taker.capture.detach()


def test_gradients_of_gradients_pass_through():
    model, x, y = mlp()
    plain = copy.deepcopy(model)
    taker = Taker(model)

    def penalised(net):
        data = x.clone().requires_grad_()
        loss = F.cross_entropy(net(data), y)
        (slope,) = torch.autograd.grad(loss, data, create_graph=True)
        (loss + slope.square().sum()).backward()
        return [p.grad for p in net.parameters()]

    for a, b in zip(penalised(model), penalised(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert len(taker.taken) == 2


def test_transforms_of_torch_func_are_not_seen():
    model, data, y = everything()
    model.eval()
    plain = copy.deepcopy(model)
    taker = Taker(model)

    def slope(net):
        def f(head):
            return F.cross_entropy(torch.func.functional_call(net, {"head.bias": head}, data), y)

        return torch.func.hessian(f)(net.head.bias.detach())

    assert torch.equal(slope(model), slope(plain))
    assert not taker.taken and not taker.capture._stack


def test_checkpointed_blocks():
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(checkpoint(lambda z: self.a(z).tanh(), x, use_reentrant=False))

    for fisher in ("empirical", "mc"):
        model = Net()
        taker = Taker(model, fisher=fisher)
        F.cross_entropy(model(torch.randn(N, 4)), torch.randint(0, 3, (N,))).backward()
        assert sorted(taker.names) == ["a", "b"]
        if fisher == "empirical":
            exact(taker)


# ── shapes, ties, frozen parts ────────────────────────────────────────────────


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_hooks_do_fire(batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x):
            h = self.attention(x, x, x, need_weights=False)[0]
            return h.mean(1 if batch_first else 0)

    model = Net()
    taker = Taker(model, fisher="empirical", likelihood="gaussian")
    model(torch.randn(N, 4, 8) if batch_first else torch.randn(4, N, 8)).square().mean().backward()
    assert sorted(taker.names) == [f"attention.{part}" for part in ("k", "out_proj", "q", "v")]
    exact(taker)
    assert all(a.shape == (N, 4, 9) and g.shape == (1, N, 4, 8) for _, a, g in taker.taken)
    inputs = {layer.name[-1]: a for layer, a, _ in taker.taken}
    assert inputs["q"] is inputs["k"] is inputs["v"]


def test_the_examples_of_attention_are_in_order():
    attention = nn.MultiheadAttention(8, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x)[0].mean(0)

    model, x = Net(), torch.randn(4, N, 8)
    taker = Taker(model, fisher="empirical", likelihood="gaussian")
    model(x).square().sum().backward()
    taker.capture.detach()
    for n in range(N):
        model.zero_grad()
        model(x[:, n : n + 1]).square().sum().backward()
        for layer, a, g in taker.taken:
            one = assembled(layer, a[n : n + 1], g[:, n : n + 1]) / N
            torch.testing.assert_close(one, layer.gradient(), rtol=1e-12, atol=1e-13)


def test_transformer_encoder_layer_is_covered_whole():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 3))
    taker = Taker(model, fisher="empirical")
    assert not taker.capture.rest
    F.cross_entropy(model(torch.randn(N, 4, 8)).flatten(0, 1), torch.randint(0, 3, (4 * N,))).backward()
    exact(taker)


def test_examples_folded_into_places_or_unfolded_from_them():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, flat):
            h = self.a(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2])
            return self.b(h).flatten(0, 1) if flat else self.b(h).sum(1)

    model, x = Folded(), torch.randn(N, 5, 3)
    for flat, shape in ((False, (N, 5)), (True, (5 * N, 1))):
        taker = Taker(model, fisher="empirical", likelihood="gaussian")
        model.zero_grad()
        model(x, flat).square().mean().backward()
        exact(taker)
        assert all(a.shape[:2] == shape for _, a, _ in taker.taken)
        taker.capture.detach()


def test_as_many_places_as_examples():
    """Examples come first then, except in attention, which says that they come second."""
    x = torch.randn(N, N, 3)
    taker = Taker(nn.Sequential(nn.Linear(3, 2)), likelihood="gaussian", fisher="none")
    taker.capture.model(x).sum().backward()
    assert torch.equal(taker.taken[0][1][..., :3], x)
    second = Taker(nn.Sequential(nn.Linear(3, 2), nn.Flatten(0, 1), nn.Unflatten(0, (2, -1))), fisher="none")
    x = torch.randn(4, 2, 3)
    second.capture.model(x).sum().backward()
    assert torch.equal(second.taken[0][1][..., :3], x.transpose(0, 1))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, i):
        return self.head((self.token(i) + self.position(torch.arange(5))).tanh().mean(1))


def test_positions_that_examples_share():
    """Their gradient is one sum over the examples; scaled so that its outer product is a mean over them."""
    model, i = Positions(), torch.randint(0, 9, (N, 5))
    taker = Taker(model, samples=20000)
    some(model(i)).backward()
    taker.capture.detach()
    layer, a, g = next(pair for pair in taker.taken if pair[0].name == "position")
    assert a.shape == (1, 5) and g.shape == (20000, 1, 5, 4)
    v = g.flatten(2).squeeze(1)
    rest = Taker(model, fisher="type-2")
    with pytest.raises(ValueError, match="position.*fisher='mc'"):
        some(model(i)).backward()
    rest.capture.detach()
    torch.testing.assert_close(v.T @ v, ggn_of_positions(model, i), rtol=0.1, atol=0.002)


def ggn_of_positions(model, i):
    w = model.position.weight.detach()
    total = 0
    for one in i:
        def f(weight, one=one):
            return torch.func.functional_call(model, {"position.weight": weight}, (one[None],))[0]

        p = f(w).softmax(0).detach()
        j = torch.func.jacrev(f)(w).flatten(1)
        total = total + j.T @ (torch.diag(p) - torch.outer(p, p)) @ j / len(i)
    return total.detach()


def test_tied_weights_are_one_layer_with_the_places_of_both():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    taker = Taker(model, fisher="empirical")
    F.cross_entropy(model(torch.randn(N, 4)), torch.randint(0, 3, (N,))).backward()
    exact(taker)
    tied, head = taker.capture.layers
    assert (tied.name, head.name) == ("0", "4")
    assert [a.shape for layer, a, _ in taker.taken if layer is tied] == [(N, 2, 5)]


def test_a_tied_weight_whose_biases_differ_keeps_them_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    taker = Taker(model, fisher="empirical", likelihood="gaussian")
    model(torch.randn(N, 4)).square().mean().backward()
    exact(taker)
    assert [name for name, _ in taker.capture.rest] == ["0.bias", "2.bias"]


def test_an_embedding_tied_to_a_head_is_the_head():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 9))
    model[2].weight = model[0].weight
    taker = Taker(model)
    F.cross_entropy(model(torch.randint(0, 9, (N,))), torch.randint(0, 9, (N,))).backward()
    (layer,) = taker.capture.layers
    assert (layer.name, layer.kind, layer.shape) == ("2", "linear", (9, 5)) and not taker.capture.rest
    assert taker.names == ["2"]
    torch.testing.assert_close(layer.gradient()[:, :4], model[0].weight.grad)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parts(frozen):
    model, data, y = everything()
    for name, p in model.named_parameters():
        if name.endswith(frozen) or name.startswith("twice"):
            p.requires_grad_(False)
    taker = Taker(model, fisher="empirical")
    assert not taker.capture.rest
    F.cross_entropy(model(*data), y).backward()
    exact(taker)
    other = {"weight": "bias", "bias": "weight"}[frozen]
    assert all(getattr(layer, frozen) is None and getattr(layer, other) is not None for layer in taker.capture.layers)
    assert "twice" not in taker.names


def test_only_the_parameters_asked_for():
    model, x, y = mlp()
    taker = Taker(model, fisher="empirical", parameters=model[2].parameters())
    F.cross_entropy(model(x), y).backward()
    assert taker.names == ["2"] and not taker.capture.rest


def test_what_no_layer_covers_is_listed():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.own, self.rnn, self.deep = Own(3, 3), nn.RNN(3, 3), nn.Conv1d(16, 16, 1, groups=16)
            self.sparse = nn.Embedding(3, 3, sparse=True)
            self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
            self.plain = nn.Linear(3, 3)

    capture = Capture(Net(), consume=drop)
    assert [layer.name for layer in capture.layers] == ["plain"]
    assert {name.split(".")[0] for name, _ in capture.rest} == {"scale", "own", "rnn", "deep", "sparse", "weighted"}


def test_gradient_and_pieces_of_a_layer():
    model, data, y = everything()
    taker = Taker(model)
    F.cross_entropy(model(*data), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    for layer in taker.capture.layers:
        gradient, matrix = layer.gradient(), layer.matrix()
        assert gradient.shape == matrix.shape == layer.shape
        for p, rows, part in layer.pieces(gradient):
            assert torch.equal(part, p.grad[rows])
        for p, rows, part in layer.pieces(matrix):
            assert torch.equal(part, p[rows])
        gradient.zero_()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    model.zero_grad()
    assert all(layer.gradient() is None for layer in taker.capture.layers)


def test_where_only_the_weight_has_a_gradient_that_of_the_bias_is_zero():
    model = nn.Sequential(nn.Linear(2, 2))
    layer = Taker(model).capture.layers[0]
    model[0].weight.grad = torch.ones(2, 2)
    assert torch.equal(layer.gradient(), torch.tensor([[1.0, 1, 0], [1, 1, 0]]))


# ── what a model returns ──────────────────────────────────────────────────────

Pair = namedtuple("Pair", "logits extra")


@dataclass(frozen=True)
class Output:
    loss: torch.Tensor
    scores: torch.Tensor


class Returns(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.head, self.form = nn.Linear(4, 3), form

    def forward(self, *, x, labels=None):
        return self.form(self.head(x), labels)


@pytest.mark.parametrize(
    "form, pick, options",
    [
        (lambda f, y: {"logits": f, "other": f * 2}, lambda out: out["logits"], {}),
        (lambda f, y: (f, torch.zeros(3)), lambda out: out[0], {}),
        (lambda f, y: [None, f], lambda out: out[1], {}),
        (lambda f, y: Pair(f, f.tanh()), lambda out: out.logits, {"output": lambda out: out.logits}),
        (lambda f, y: f.T, lambda out: out.T, {"output": lambda out: out.T}),
        (lambda f, y: {"a": (f, f * 2)}, lambda out: out["a"][0], {"output": lambda out: out["a"][0]}),
    ],
)
def test_tuples_dicts_and_keywords(form, pick, options):
    model = Returns(form)
    taker = Taker(model, fisher="type-2", **options)
    out = model(x=torch.randn(N, 4))
    assert type(out) is type(form(torch.zeros(1, 3), None))
    F.cross_entropy(pick(out), torch.randint(0, 3, (N,))).backward()
    assert [g.shape for _, _, g in taker.taken] == [(3, N, 1, 3)]


def test_a_loss_computed_inside_the_model():
    model = Returns(lambda f, y: Output(F.cross_entropy(f, y), f))
    taker = Taker(model, output=lambda out: out.scores)
    model(x=torch.randn(N, 4), labels=torch.randint(0, 3, (N,))).loss.backward()
    assert taker.names == ["head"]


def test_a_clear_error_where_the_output_is_not_evident():
    x = torch.randn(N, 4)
    for form in (lambda f, y: (f, f * 2), lambda f, y: f.sum(), lambda f, y: Output(f.sum(), f), lambda f, y: f[:, 0]):
        model = Returns(form)
        taker = Taker(model)
        with pytest.raises(ValueError, match="output="):
            model(x=x)
        taker.capture.detach()


def test_one_class_is_no_choice_and_where_nothing_is_drawn_the_likelihood_does_not_matter():
    model = nn.Sequential(nn.Linear(4, 1))
    taker = Taker(model)
    with pytest.raises(ValueError, match=r"returned \(.*, 1\), one class, .* pass likelihood="):
        model(torch.randn(N, 4))
    taker.capture.detach()
    for fisher in ("none", "empirical"):
        taker = Taker(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), fisher=fisher)
        taker.capture.model(torch.randn(N, 4)).square().mean().backward()
        assert taker.names == ["0"]


@pytest.mark.parametrize("fisher", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize("other", ["mc", "type-2", "none"])
@pytest.mark.parametrize("first", [True, False])
def test_captures_of_one_model_do_not_take_each_others_gradients(fisher, other, first):
    def taken(among):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        x, y = torch.randn(N, 4), torch.randint(0, 3, (N,))
        makers = [lambda: Taker(model, fisher=fisher, generator=torch.Generator().manual_seed(1))]
        if among:
            makers.insert(0 if first else 1, lambda: Taker(model, fisher=other))
        takers = [make() for make in makers]
        nn.functional.cross_entropy(model(x), y).backward()
        taker = takers[1 if among and first else 0]
        return [pair[1:] for pair in taker.taken]

    alone, together = taken(False), taken(True)
    assert len(alone) == len(together) == 2
    for (a, g), (b, h) in zip(alone, together, strict=True):
        assert torch.equal(a, b) and torch.equal(g, h)


def test_what_cannot_be_watched_is_refused():
    class Opaque:
        def __init__(self, f):
            self.f = f

    model = Returns(lambda f, y: Opaque(f))
    taker = Taker(model, output=lambda out: out.f)
    with pytest.raises(ValueError, match="a Opaque without a tensor"):
        model(x=torch.randn(N, 4))
    assert not taker.taken


def test_other_errors_are_clear():
    model, x, y = mlp()
    for options, words in [
        ({"fisher": "exact"}, "fisher='exact'"),
        ({"likelihood": "poisson"}, "likelihood='poisson'"),
        ({"samples": 0}, "samples=0"),
        ({"fisher": "type-2", "likelihood": lambda f: f}, "callable"),
    ]:
        with pytest.raises(ValueError, match=words):
            Capture(model, consume=drop, **options)
    with pytest.raises(ValueError, match="DataParallel"):
        Capture(nn.DataParallel(model), consume=drop)
    with pytest.raises(ValueError, match="forward call"):
        Capture(nn.LazyLinear(3), consume=drop)
    assert hooks(model) == [0] * 4


def test_a_replica_is_refused():
    model, x, y = mlp()
    taker = Taker(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="replica"):
        replica(x)
    F.cross_entropy(model(x), y).backward()
    assert len(taker.taken) == 2


def test_inputs_or_outputs_changed_in_place_are_noticed():
    model, x, y = mlp()
    taker = Taker(model)
    out = model(x)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="output was changed in place"):
        F.cross_entropy(out, y).backward()
    out = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="'0' was changed in place"):
        F.cross_entropy(out, y).backward()
    assert [layer.name for layer in taker.capture.layers] == ["0", "2"] and taker.names == ["2"]


# ── precision, copies, arithmetic ─────────────────────────────────────────────


def test_autocast():
    model, data, y = everything()
    model, data = model.float(), [x.float() if x.is_floating_point() else x for x in data]
    taker = Taker(model, fisher="empirical")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(*data), y)
    loss.backward()
    sums = {}
    for layer, a, g in taker.taken:
        a = a.float() if a.is_floating_point() else a
        sums[layer.name] = sums.get(layer.name, 0) + assembled(layer, a, g.float()) / len(a)
    for layer in taker.capture.layers:
        error = (sums[layer.name] - layer.gradient()).norm()
        assert error <= 0.03 * layer.gradient().norm() + 1e-5, layer
    taker.capture.detach()
    sampled = Taker(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(*data), y)
    (loss * 2.0**-60).backward()  # the scale of the loss does not enter
    assert len(sampled.taken) == len(sampled.capture.layers)
    head = next(g for layer, _, g in sampled.taken if layer.name == "head")
    assert 0.1 < head.float().abs().max() <= 1


def test_the_callback_computes_without_autocast():
    model, x, y = mlp()
    seen = []
    capture = Capture(model.float(), consume=lambda layer, a, g: seen.append((a[:, 0].T @ a[:, 0]).dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = x.float()
        assert (x.T @ x).dtype is torch.bfloat16
        F.cross_entropy(model(x), y).backward()
    assert capture.recording and seen[-1] is torch.float32


def test_bfloat16_models():
    model, data, y = everything()
    model, data = model.bfloat16(), [x.bfloat16() if x.is_floating_point() else x for x in data]
    taker = Taker(model)
    F.cross_entropy(model(*data), y).backward()
    assert set(taker.names) == {layer.name for layer in taker.capture.layers}
    assert all(a.dtype is torch.float32 for layer, a, _ in taker.taken if layer.kind == "scale")


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), "torch"])
def test_copies_of_model_and_optimizer_are_alive_and_separate(copied, order):
    model, data, y = everything()
    taker = Taker(model)
    pair = (model, taker) if order == 0 else (taker, model)
    if copied == "torch":
        buffer = io.BytesIO()
        torch.save(pair, buffer)
        buffer.seek(0)
        twins = torch.load(buffer, weights_only=False)
    else:
        twins = copied(pair)
    twin, other = twins if order == 0 else twins[::-1]
    assert other.capture.model is twin
    for _ in range(2):
        F.cross_entropy(twin(*data), y).backward()
    assert not taker.taken and len(other.taken) == 2 * len(other.capture.layers)
    assert {id(p) for layer in other.capture.layers for p in layer.parameters} == {id(p) for p in twin.parameters()}
    F.cross_entropy(model(*data), y).backward()
    assert len(taker.taken) == len(taker.capture.layers)


def test_a_copy_of_the_model_alone_is_inert_and_a_detached_copy_stays_detached():
    model, x, y = mlp()
    taker = Taker(model)
    ema = copy.deepcopy(model)
    F.cross_entropy(ema(x), y).backward()
    assert not taker.taken
    taker.capture.detach()
    twin, other = copy.deepcopy((model, taker))
    F.cross_entropy(twin(x), y).backward()
    assert not other.taken and not other.capture._handles


def test_gram():
    for d in (1, 127, 128, 300, 1100):
        x = torch.randn(2, 7, d)
        flat = x.flatten(0, 1)
        torch.testing.assert_close(gram(x), flat.T @ flat)
        out = gram(x, weight=0.1)
        torch.testing.assert_close(out, 0.1 * flat.T @ flat)
        torch.testing.assert_close(out, out.T, rtol=1e-14, atol=1e-14)
    assert gram(torch.ones(3, 2, dtype=torch.bfloat16)).dtype is torch.float32


def test_an_input_that_examples_share_has_no_empirical_gradients_of_each():
    model, i = Positions(), torch.randint(0, 9, (N, 5))
    taker = Taker(model, fisher="empirical")
    with pytest.raises(ValueError, match="position.*fisher='mc'"):
        some(model(i)).backward()
    taker.capture.detach()
