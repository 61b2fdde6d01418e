"""What the modular norm promises: axioms, composition, reading of networks, and the optimizer on top."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guided_descent as gd
from guided_descent import modular
from guided_descent.layers import unwrapped
from guided_descent.modular import Bias, Bond, Compose, Embed, Gain, Linear, ModularDescent, Mul, Sum, read
from guided_descent.muon import SCALES

torch.manual_seed(0)
POLAR = {"preset": "svd", "engine": "loop"}


def modules():
    """Random expressions on three features."""
    leaf = st.one_of(
        st.floats(0.25, 4).map(lambda m: Linear(3, 3, m).double()),
        st.floats(0.25, 4).map(lambda a: Bond(torch.tanh, a)),
        st.floats(0.25, 4).map(lambda m: Gain(nn.Parameter(torch.rand(3, dtype=torch.float64) + 0.5), m)),
    )
    return st.recursive(
        leaf,
        lambda x: st.one_of(
            st.tuples(x, x).map(lambda p: Compose(*p)),
            st.tuples(x, x).map(lambda p: Sum(*p)),
            st.tuples(st.floats(0.25, 4), x).map(lambda p: p[0] * p[1]),
        ),
        max_leaves=8,
    ).filter(lambda M: len(M.atoms) > 0)


def like(M, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(a.weight.shape, generator=generator, dtype=torch.float64) for a in M.atoms]


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


@settings(max_examples=30, deadline=None)
@given(modules(), st.floats(0.01, 10))
def test_the_best_step_is_as_long_as_asked_and_attains_the_dual(M, t):
    g = like(M)
    step = M.dualize(g, t)
    assert float(M.norm(step)) == pytest.approx(t, rel=1e-9)
    assert float(inner(step, g)) == pytest.approx(t * float(M.dual_norm(g)), rel=1e-9)
    v = like(M, 1)
    assert float(inner(v, g)) <= float(M.norm(v) * M.dual_norm(g)) * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(modules())
def test_it_is_a_norm_and_flat(M):
    v, w = like(M, 1), like(M, 2)
    both = [x + y for x, y in zip(v, w, strict=True)]
    assert float(M.norm(both)) <= float(M.norm(v) + M.norm(w)) * (1 + 1e-12)
    assert float(M.norm([-3 * x for x in v])) == pytest.approx(3 * float(M.norm(v)), rel=1e-12)
    flat = [float(a.norm([x])) / r for a, x, r in zip(M.atoms, v, M.rates(), strict=True)]
    assert float(M.norm(v)) == pytest.approx(max(flat), rel=1e-12)
    dual = [float(a.dual_norm([x])) * r for a, x, r in zip(M.atoms, v, M.rates(), strict=True)]
    assert float(M.dual_norm(v)) == pytest.approx(sum(dual), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(modules(), modules(), modules())
def test_composition_and_sum_are_associative(A, B, C):
    for op in (Compose, Sum):
        one, other = op(op(A, B), C), op(A, op(B, C))
        assert one.rates() == pytest.approx(other.rates(), rel=1e-12)
        assert (one.mass, one.sensitivity) == pytest.approx((other.mass, other.sensitivity), rel=1e-12)


def test_rates_by_hand():
    M = Linear(4, 4, 3.0) @ (2.0 * Linear(4, 4, 1.0)) @ Linear(4, 4, 2.0)
    assert M.rates() == pytest.approx([2 / 6 / 2, 1 / 6 / 2, 3 / 6])
    M = 5.0 * (Linear(4, 4, 1.0) + 2.0 * Linear(4, 4, 3.0))
    assert M.rates(2.0) == pytest.approx([2 * 1 / 4 / 5, 2 * 3 / 4 / 2 / 5])
    assert M.sensitivity == pytest.approx(15) and M.mass == 4
    g = [torch.diag(torch.tensor([2.0, 1.0, 1.0, -1.0])) for _ in range(2)]
    torch.testing.assert_close(M.dualize(g, 20.0)[0], torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0])))


@pytest.mark.parametrize("L", [1, 2, 7])
def test_a_residual_chain_has_the_same_rate_at_any_depth(L):
    identity = Bond(nn.Identity())
    block = (1 / L) * Linear(4, 4)
    block = ((1 - 1 / L) * identity + block) if L > 1 else block
    assert (block**L).rates() == pytest.approx([1.0] * L)
    assert (Linear(4, 4) ** L).rates() == pytest.approx([1 / L] * L)


def test_deep_chains_are_read_in_a_second():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(600)))
    rates = read(model).rates()
    assert rates[0] == pytest.approx(rates[-2]) == pytest.approx(1 / 660)
    assert len(ModularDescent(model).param_groups) == 2
    assert read(model)(torch.ones(2)).shape == (2,)


def test_masses_that_are_zero():
    M = Linear(3, 3, 0.0) @ Linear(3, 3, 1.0)
    M = M.double()
    still, moved = torch.zeros(3, 3).double(), torch.eye(3).double()
    assert M.rates() == [1.0, 0.0]
    assert M.norm([moved, still]) == 1 and M.norm([still, moved]) == math.inf
    assert not M.dualize([moved, moved])[1].any()
    assert (Linear(3, 3) @ Linear(3, 3)).tare(0.0).rates() == [0.0, 0.0]


def test_tare():
    M = Linear(3, 3, 1.0) @ Linear(3, 3, 3.0)
    assert M.tare(2.0) is M and M.mass == pytest.approx(2)
    assert [a.mass for a in M.atoms] == pytest.approx([1.5, 0.5])
    with pytest.raises(ValueError, match="mass=2.0 for a module without mass; give it an atom"):
        Bond(torch.relu).tare(2.0)


def test_a_power_has_copies_with_starts_of_their_own():
    one = Gain(3) @ Linear(3, 3)
    chain = one**3
    weights = [a.weight for a in chain.atoms if isinstance(a, Linear)]
    assert torch.equal(weights[0], one.atoms[0].weight) and weights[0] is not one.atoms[0].weight
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    x = y = torch.randn(3)
    for W in weights:
        y = W @ y
    torch.testing.assert_close(chain(x), y)


def test_refusals_of_modules():
    with pytest.raises(ValueError, match="factor=0 cuts the network; pass another"):
        0.0 * Linear(2, 2)
    with pytest.raises(ValueError, match="Bias ignores its input .*; add it with"):
        Bias(3) @ Linear(3, 3)
    with pytest.raises(ValueError, match="1 tensors for 2 atoms; pass one for each"):
        (Linear(2, 2) @ Linear(2, 2)).norm([torch.eye(2)])
    with pytest.raises(ValueError, match="ruler='long' is unknown; use one of"):
        modular.Atom(nn.Parameter(torch.ones(2, 2)), "long")


def test_each_atom_begins_one_long():
    for atom in (Linear(5, 3), Linear(3, 5), Embed(4, 7), Gain(3)):
        assert float(atom.norm([atom.weight.detach()])) == pytest.approx(1, rel=1e-5)
    assert Mul(-2.0)(torch.ones(2)).tolist() == [-2, -2] and Mul(-2.0).sensitivity == 2


# --- reading -------------------------------------------------------------------------------------------------------


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Sequential(nn.Linear(16, 8, bias=False), nn.LayerNorm(8), nn.LeakyReLU(3.0)),
        nn.Dropout(0.1),
        nn.Linear(8, 10),
    ).double()


def test_what_is_read_computes_the_same_and_has_the_rates_of_the_rules():
    model = conv_net()
    found, x = read(model), torch.randn(5, 1, 8, 8, dtype=torch.float64)
    model.eval()
    assert torch.equal(found(x), model(x))
    m = 3 + 6 * 0.1
    behind = 1.129 * 2 * 3  # GELU, max-pool of 2×2, leaky slope
    big = [1 / m / behind, 1 / m / 3, 1 / m]
    small = [0.1 * r for r in big]
    expected = [big[0], *[small[0]] * 3, big[1], *[small[1]] * 2, big[2], small[2]]
    assert found.rates() == pytest.approx(expected, rel=1e-12)
    groups = ModularDescent(model).param_groups
    by_name = {n: (g["norm"], g["rate"]) for g in groups for n in g["param_names"]}
    assert by_name["1.weight"] == ("max", pytest.approx(small[0]))
    assert by_name["0.weight"] == ("spectral", pytest.approx(big[0]))
    assert by_name["1.bias"] == ("rms", pytest.approx(small[0]))
    assert len(groups) == 8  # three places, each with a matrix, and vectors of one or two kinds


def test_slopes_of_bonds_are_the_largest_there_are():
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64, requires_grad=True)
    for kind, slope in modular.BONDS.items():
        if kind in (nn.ReLU, nn.Tanh, nn.Softplus, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU):
            layer = kind()
            (d,) = torch.autograd.grad(layer(x).sum(), x)
            value = slope(layer) if callable(slope) else slope
            assert value == pytest.approx(float(d.abs().max()), rel=2e-3), kind


def test_embedding_frozen_and_vector_mass():
    model = nn.Sequential(nn.Embedding(7, 4), nn.RMSNorm(4), nn.Linear(4, 7))
    model[0].weight.requires_grad_(False)
    found = read(model, vector_mass=0.5)
    assert found.rates() == pytest.approx([0, 0.25, 0.5, 0.25])
    groups = ModularDescent(model, vector_mass=0.5).param_groups
    assert sorted(n for g in groups for n in g["param_names"]) == ["1.weight", "2.bias", "2.weight"]
    assert [a.ruler for a in found.atoms] == ["embedding", "max", "spectral", "rms"]


class Block(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


RESIDUAL = {Block: lambda block, read: read(nn.Identity()) + read(block.body)}


def test_rules_by_class_and_by_name_and_algorithms():
    model = nn.Sequential(Block(nn.Linear(4, 4)), nn.MultiheadAttention(4, 2), Block(nn.Linear(4, 4)))
    rules = {**RESIDUAL, nn.MultiheadAttention: "adamw", "2": "sgd"}
    groups = ModularDescent(model, rules=rules).param_groups
    kinds = {n: g.get("algorithm", g["norm"]) for g in groups for n in g["param_names"]}
    assert kinds["0.body.weight"] == "spectral" and kinds["2.body.bias"] == "sgd"
    assert kinds["1.in_proj_weight"] == kinds["1.out_proj.bias"] == "adamw"
    assert read(model, rules).mass == pytest.approx(1.1)
    x = torch.randn(3, 4)
    plain = nn.Sequential(model[0], model[2])
    assert torch.equal(read(plain, RESIDUAL)(x), plain(x))


def test_what_cannot_be_read_is_refused_by_name_with_the_remedy():
    with pytest.raises(ValueError, match=r"cannot read '1', a Block; pass rules=\{Block: lambda .* 'adamw'\} to step"):
        ModularDescent(nn.Sequential(nn.Linear(2, 2), Block(nn.Linear(2, 2))))
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'0.weight' is in 2 parts of what was read; pass rules"):
        ModularDescent(nn.Sequential(layer, nn.ReLU(), layer))
    with pytest.raises(ValueError, match="'0.body.weight' is in no part .*; pass rules"):
        ModularDescent(nn.Sequential(Block(nn.Linear(2, 2))), rules={Block: lambda b, read: Bond(b)})
    with pytest.raises(ValueError, match="'0', a Conv2d in 2 groups; pass rules"):
        ModularDescent(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)))
    with pytest.raises(ValueError, match="'0', a ParametrizedLinear whose weight is computed|a ParametrizedLinear"):
        ModularDescent(nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(2, 2))))
    with pytest.raises(TypeError, match="the rule for '0', a Block gave a Linear; compose"):
        ModularDescent(nn.Sequential(Block(layer)), rules={Block: lambda b, read: b.body})
    with pytest.raises(ValueError, match="rules has 'head', which is no class and no part"):
        ModularDescent(nn.Sequential(layer), rules={"head": "adamw"})
    with pytest.raises(ValueError, match="algorithm='adamwish' is unknown"):
        ModularDescent(nn.Sequential(Block(layer)), rules={Block: "adamwish"})
    with pytest.raises(TypeError, match="rules= tell how a model is read, .*; pass the model"):
        ModularDescent(layer.parameters(), rules=RESIDUAL)
    with pytest.raises(TypeError, match="model is a list; pass a torch.nn.Module"):
        read([layer])

    class Odd(nn.Linear):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="cannot read '0', a Odd"):
        ModularDescent(nn.Sequential(Odd(2, 2)))
    with pytest.raises(ValueError, match="vector_mass=-1.* is outside"):
        ModularDescent(nn.Sequential(layer), vector_mass=-1.0)


# --- the optimizer -------------------------------------------------------------------------------------------------


def run(model, optimizer, steps=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_a_convolution_an_embedding_a_gain_and_a_bias_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3)).double()
    table = nn.Embedding(5, 4).double()
    for net in (model, nn.Sequential(table)):
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = ModularDescent(net, 0.5, 0.0, nesterov=False, **POLAR)
        rates = read(net).rates()
        after = run(net, optimizer, 1)
        for p, x, y, r in zip(net.parameters(), before, after, rates, strict=True):
            g = p.grad
            if p.dim() == 4:
                U, _, Vh = torch.linalg.svd(g.reshape(3, 18), full_matrices=False)
                d = math.sqrt(3 / 18) * (U @ Vh).reshape(g.shape)
            elif p.dim() == 2:
                d = g / g.square().mean(1, keepdim=True).sqrt()
            elif p is model[1].weight:
                d = g.sign()
            else:
                d = g / g.square().mean().sqrt()
            torch.testing.assert_close(y, x - 0.5 * r * d, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_on_one_matrix_it_is_muon_and_scion(nesterov):
    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 4, bias=False)).double()

    options = {"momentum": 0.8, "nesterov": nesterov, "weight_decay": 0.1}
    a, b = make(), make()
    ours = run(a, ModularDescent(a, 0.1, **options))
    theirs = run(b, gd.Muon(b.parameters(), 0.1, scale="scion", **options))
    assert torch.equal(*ours, *theirs)
    if not nesterov:
        a, b = make(), make()
        ours = run(a, ModularDescent(a, 0.1, 0.8, nesterov=False))
        theirs = run(b, gd.Scion(b.parameters(), 0.1, 0.8, radius=1.0, constrained=False))
        assert torch.equal(*ours, *theirs)


def test_on_a_chain_of_equal_masses_it_is_muon_with_the_rate_divided():
    def make():
        torch.manual_seed(3)
        return nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(4))).double()

    a, b = make(), make()
    ours = run(a, ModularDescent(a, 0.1))
    theirs = run(b, gd.Muon(b.parameters(), 0.1 / 4, scale="scion"))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)
    assert SCALES["scion"](4, 9) == pytest.approx(2 / 3)


def test_a_step_is_as_long_as_lr_in_the_norm():
    model = conv_net()
    found = read(model)
    before = [a.weight.detach().clone() for a in found.atoms]
    run(model, ModularDescent(model, 0.3, **POLAR), 1)
    change = [a.weight.detach() - x for a, x in zip(found.atoms, before, strict=True)]
    assert float(found.norm(change)) == pytest.approx(0.3, rel=1e-9)
    each = [float(a.norm([d])) / r for a, d, r in zip(found.atoms, change, found.rates(), strict=True)]
    assert each == pytest.approx([0.3] * len(each), rel=1e-9)


@pytest.mark.parametrize("engine", ["auto", "foreach"])
def test_engines_agree_on_a_network(engine):
    a = conv_net()
    b = copy.deepcopy(a)
    ours = run(a, ModularDescent(a, 0.1, weight_decay=0.1, engine=engine))
    theirs = run(b, ModularDescent(b, 0.1, weight_decay=0.1, engine="loop"))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_stop_save_load_go_on():
    a = conv_net()
    b = copy.deepcopy(a)
    optimizer = ModularDescent(a, 0.1)
    run(a, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": a.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = run(a, optimizer, 3, seed=1)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    b.load_state_dict(saved["model"])
    resumed = ModularDescent(b, 0.7)
    resumed.load_state_dict(saved["optimizer"])
    assert all(map(torch.equal, expected, run(b, resumed, 3, seed=1)))


def test_wrapped_models_are_read_through():
    model = nn.Sequential(nn.Linear(3, 3))
    wrapped = torch.nn.Module()
    wrapped._orig_mod = model
    names = [n for g in ModularDescent(wrapped).param_groups for n in g["param_names"]]
    assert sorted(names) == ["0.bias", "0.weight"]


def test_the_norm_of_a_group_is_checked():
    p = [torch.ones(3, 2, requires_grad=True)]
    with pytest.raises(ValueError, match="norm='conv' is unknown; use one of"):
        ModularDescent(p, norm="conv")
    with pytest.raises(ValueError, match="rate=-1.0 is outside"):
        ModularDescent([{"params": p, "rate": -1.0}])
    with pytest.raises(ValueError, match="blows up after"):
        ModularDescent(p, preset=modular.damped_raw if hasattr(modular, "damped_raw") else ((8.3, -23.6, 17.3),) * 5)


@pytest.mark.parametrize("engine", ["loop", "foreach"])
@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 5), ()])
def test_one_row_or_column_is_exact(engine, shape):
    p = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = ModularDescent([p], 0.5, 0.0, nesterov=False, engine=engine)
    p.grad = torch.randn(shape, dtype=torch.float64) * 1e-3
    optimizer.step()
    m, n = modular.matrix(p).shape
    torch.testing.assert_close(p.detach(), -0.5 * (m / n) ** 0.5 * p.grad / p.grad.norm(), rtol=1e-12, atol=1e-12)


def test_decay_does_not_depend_on_the_rate():
    p = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    optimizer = ModularDescent([{"params": [p], "rate": 0.25}], 0.1, weight_decay=0.5, engine="loop")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3, 2), 0.95, dtype=torch.float64), rtol=1e-14, atol=0)


def test_largest_values_of_windows_that_overlap():
    """A value lies in up to ⌈k/s⌉ windows a side, and there are s times fewer outputs."""
    assert modular._window(nn.MaxPool2d(2)) == 2
    assert modular._window(nn.MaxPool2d(3, 1)) == 3
    assert modular._window(nn.MaxPool2d(3, 2)) == 4
    assert modular._window(nn.MaxPool1d(2, 3)) == 3**0.5
    assert modular._window(type("Named", (nn.MaxPool2d,), {})(2)) == 2


def test_wrappers_in_either_order_and_nothing_to_step():
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    twice = nn.Module()
    twice._orig_mod = torch.compile(inner, backend="eager")
    assert unwrapped(twice) is inner
    ModularDescent(twice)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

    with pytest.raises(ValueError, match="ModularDescent got no weight"):
        ModularDescent(Whole(), rules={Whole: "adamw"})
