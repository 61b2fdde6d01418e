"""What the multipliers promise: closed forms, the lengths they rest on, and one change of the weights."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import guided_descent as gd
from guided_descent import mup
from guided_descent.muon import SCALES
from guided_descent.mup import LENGTHS, base_shapes, initial_factor, multiplier, parametrize


def net(n, bias=True):
    return nn.Sequential(
        nn.Linear(64, n, bias),
        nn.ReLU(),
        nn.Linear(n, n, bias),
        nn.LayerNorm(n) if bias else nn.ReLU(),
        nn.Linear(n, 10, bias),
    )


class Text(nn.Module):
    """An embedding, positions, attention, a tied head."""

    def __init__(self, d, tied=True):
        super().__init__()
        self.table = nn.Embedding(30, d)
        self.place = nn.Parameter(torch.randn(1, 5, d))
        self.attention = nn.MultiheadAttention(d, 4, batch_first=True)
        self.head = nn.Linear(d, 30, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x):
        h = self.table(x) + self.place
        return self.head(h + self.attention(h, h, h)[0])


ADDED = {"place": "added"}


def names(groups):
    return {x.name: x for x in groups.parts}


def lrs(groups, lr):
    return {name: group["lr"] / lr for group in groups for name, _ in group["params"]}


# ── multipliers


m = 4.0  # from 64 to 256: all sides are beyond 64, so that every maximum is settled
CLOSED = [  # input 256×64, hidden 256×256, output 10×256, bias of 256, bias of 10
    ("adam", {}, (1, 1 / m, 1 / m, 1, 1)),
    ("adamw", {}, (1, 1 / m, 1 / m, 1, 1)),
    ("nadam", {}, (1, 1 / m, 1 / m, 1, 1)),
    ("rmsprop", {}, (1, 1 / m, 1 / m, 1, 1)),
    ("adagrad", {}, (1, 1 / m, 1 / m, 1, 1)),
    ("ademamix", {}, (1, 1 / m, 1 / m, 1, 1)),
    ("lion", {}, (1, 1 / m, 1 / m, 1, 1)),
    ("signum", {}, (1, 1 / m, 1 / m, 1, 1)),
    ("signsgd", {}, (1, 1 / m, 1 / m, 1, 1)),
    ("shampoo", {}, (1, 1 / m, 1 / m, 1, 1)),
    ("shampoo", {"grafting": "sgd"}, (m, 1, 1 / m, 1, 1)),
    ("shampoo", {"grafting": None}, (m**0.5, 1, m**-0.5, 1, 1)),
    ("sgd", {}, (m, 1, 1 / m, m, 1)),
    ("normalizedsgd", {"scope": "layer"}, (m**0.5, 1, m**-0.5, m**0.5, 1)),
    ("muon", {"scale": "scion"}, (1, 1, 1, 1, 1)),
    ("muon", {"scale": "keller"}, (1, 1, m**-0.5, 1, 1)),
    ("muon", {"scale": "moonlight"}, (1, m**-0.5, 1 / m, 1, 1)),
    ("muon", {"scale": "spectral"}, (1, m**-0.5, 1 / m, 1, 1)),
    ("muon", {"scale": "none"}, (m**0.5, 1, m**-0.5, 1, 1)),
    ("kfac", {}, (1, 1, 1, 1, 1)),
    ("ekfac", {}, (1, 1, 1, 1, 1)),
]


@pytest.mark.parametrize(("name", "hyper", "wanted"), CLOSED, ids=lambda x: str(x))
def test_multipliers_by_closed_form(name, hyper, wanted):
    parts = {"0.weight": 0, "2.weight": 1, "4.weight": 2, "0.bias": 3, "4.bias": 4}

    def build(n):
        return nn.Sequential(nn.Linear(64, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 10))

    groups = parametrize(build(256), build(64), name, lr=0.5, rest={"lr": 0.5} if name == "muon" else None, **hyper)
    found = lrs(groups, 0.5)
    for part, k in parts.items():
        assert found[part] == pytest.approx(wanted[k], rel=1e-10), part
        assert names(groups)[part].lr == pytest.approx(wanted[k], rel=1e-10)


def test_rotated_lengths_of_soap():
    groups = parametrize(net(256), net(64), gd.SOAP, lr=1.0)
    found = lrs(groups, 1.0)

    def s(o, i):
        return (o / i) ** 0.5 / (o**0.5 + i**0.5)

    for part, (o, i), (o0, i0) in (
        ("0.weight", (256, 64), (64, 64)), ("2.weight", (256, 256), (64, 64)), ("4.weight", (10, 256), (10, 64))
    ):  # fmt: skip
        assert found[part] == pytest.approx(s(o, i) / s(o0, i0), rel=1e-10)
    assert found["2.weight"] == pytest.approx(0.5) and found["2.bias"] == found["3.weight"] == 1


def test_scion_scales_the_radius_not_the_rate():
    groups = parametrize(net(256), net(64), gd.Scion, lr=0.1, radius=8.0, scale="moonlight")
    group = next(x for x in groups if x["params"][0][0] == "2.weight")
    assert group["lr"] == 0.1 and group["radius"] == pytest.approx(4.0)
    groups = parametrize(net(256), net(64), gd.Scion, lr=0.1, norm="sign", scale="keller")
    assert all(x.lr == 1 for x in groups.parts)


def test_kfac_damping_and_the_clip():
    groups = parametrize(net(128, False), net(32, False), gd.KFAC, damping=0.02)
    found = {x["params"][0][0]: x for x in groups}
    assert {k: v["damping"] for k, v in found.items()} == {"0.weight": 0.005, "2.weight": 0.02, "4.weight": 0.08}
    assert all(x["kl_clip"] == math.inf for x in groups)
    with pytest.raises(ValueError, match="does not transfer.*pass False"):
        parametrize(net(128, False), net(32, False), gd.KFAC, relative_damping=True)
    with pytest.raises(ValueError, match="no rule for '3.weight' under 'kfac'"):
        parametrize(net(128), net(32), gd.KFAC)


def test_kfac_steps_bias_with_its_weight():
    def build(n):
        return nn.Sequential(nn.Linear(64, n), nn.ReLU(), nn.Linear(n, 10))

    model = build(64)
    groups = parametrize(model, build(16), gd.KFAC)
    tool = gd.KFAC(model, params=groups)
    x, y = torch.randn(32, 64), torch.randint(10, (32,))
    cross_entropy(model(x), y).backward()
    tool.step()
    sizes = sorted((g["damping"], len(g["params"])) for g in tool.param_groups)
    assert sizes == [(pytest.approx(0.0075), 2), (pytest.approx(0.12), 2)]


@given(
    st.sampled_from([*LENGTHS]),
    st.lists(st.integers(1, 4096), min_size=6, max_size=6),
)
def test_multipliers_compose(kind, sides):
    a, b, c = (tuple(map(float, sides[k : k + 2])) for k in (0, 2, 4))
    assert multiplier(kind, a, a) == 1
    assert multiplier(kind, a, b) * multiplier(kind, b, c) == pytest.approx(multiplier(kind, a, c), rel=1e-9)


@given(st.integers(1, 2048), st.integers(1, 2048), st.integers(1, 2048))
def test_initial_factors_compose(n, k, fixed):
    for make in (lambda w: (fixed, w), lambda w: (w, fixed), lambda w: (w, w)):
        assert initial_factor(make(n), make(n)) == 1
        there, back = initial_factor(make(n), make(k)), initial_factor(make(k), make(n))
        assert there * back == pytest.approx(1, rel=1e-9)
    assert initial_factor((10, 4 * n), (10, n)) == pytest.approx(0.5)
    assert initial_factor((4 * n, 64), (n, 64)) == 1
    assert initial_factor((n, 4 * n), (n, n)) == pytest.approx(0.5)
    assert initial_factor((2 * n, 8 * n), (n, n)) == pytest.approx(0.5)
    assert initial_factor((8 * n, 2 * n), (n, n)) == 1


def test_a_base_of_the_same_width_changes_nothing():
    model = net(32)
    before = copy.deepcopy(model.state_dict())
    for name in ("adamw", gd.SGD, gd.Muon, gd.SOAP):
        groups = parametrize(copy.deepcopy(model), net(32), name)
        assert all((x.lr, x.init, x.decay, x.eps) == (1, 1, 1, 1) for x in groups.parts)
    parametrize(model, model, "sgd")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# ── the lengths they rest on


def updated(cls, o, i, **options):
    """A first update over lr, of a matrix whose gradient has rank one and entries near 1/o."""
    g = torch.Generator().manual_seed(o + i)
    p = nn.Parameter(torch.zeros(o, i, dtype=torch.float64))
    left, right = (torch.randn(k, generator=g, dtype=torch.float64) for k in (o, i))
    p.grad = torch.outer(left / left.norm() / o**0.5, right / right.norm() * i**0.5)
    tool = cls([p], lr=2.0**-10, engine="loop", **options)
    tool.step()
    return float(torch.linalg.matrix_norm(p.detach(), 2)) * 2**10


SHAPES = [(16, 16), (64, 64), (64, 16), (16, 64), (10, 128)]
LONG = [
    (gd.Adam, "sign", {}), (gd.AdamW, "sign", {"weight_decay": 0.0}), (gd.NAdam, "sign", {}), (gd.RMSprop, "sign", {}),
    (gd.Adagrad, "sign", {}), (gd.AdEMAMix, "sign", {}), (gd.SGD, "gradient", {}),
    (gd.SGD, "gradient", {"momentum": 0.9}),
    (gd.GradientDescent, "gradient", {}), (gd.Shampoo, "sign", {}), (gd.Shampoo, "gradient", {"grafting": "sgd"}),
    (gd.Shampoo, "unit", {"grafting": None}),
    *[(gd.Muon, f"polar, {s}", {"scale": s, "preset": "svd"}) for s in SCALES],
    (gd.Scion, "polar, scion", {"radius": 1.0, "preset": "svd"}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "kind", "options"), LONG, ids=lambda x: getattr(x, "__name__", str(x)))
def test_lengths_of_first_updates(cls, kind, options):
    hyper = mup._defaults(cls) | options
    assert mup._kind(cls.__name__.lower(), hyper) == kind
    ratio = [updated(cls, o, i, **options) / LENGTHS[kind](o, i) for o, i in SHAPES]
    spread = max(ratio) / min(ratio)
    assert spread < (1.05 if kind == "sign" else 1 + 1e-3), ratio


def test_length_of_the_sign_ball():
    for o, i in SHAPES:
        assert updated(gd.Scion, o, i, radius=1.0, norm="sign") == pytest.approx((o / i) ** 0.5)


def test_soap_has_full_rank_once_its_basis_is_full():
    """Noise in every direction: entries near one with random signs, in a basis that is turned."""
    sizes, kinds = [16, 64], {"rotated": [], "sign": []}
    for n in sizes:
        g = torch.Generator().manual_seed(n)
        p = nn.Parameter(torch.zeros(n, n, dtype=torch.float64))
        tool = gd.SOAP([p], lr=2.0**-10, weight_decay=0.0, engine="loop", precondition_every=1)
        for _ in range(20):
            before = p.detach().clone()
            p.grad = torch.randn(n, n, generator=g, dtype=torch.float64)
            tool.step()
        s = float(torch.linalg.matrix_norm(p.detach() - before, 2)) * 2**10
        for kind, found in kinds.items():
            found.append(s / LENGTHS[kind](n, n))
    ratio = {kind: b / a for kind, (a, b) in kinds.items()}
    assert 0.8 < ratio["rotated"] < 1.25 and ratio["sign"] < 0.65


def test_kfac_step_is_as_long_as_the_weights_may_change():
    """With its damping in proportion to the curvature: √(o/i) for each matrix, at every width."""

    def build(n):
        return nn.Sequential(
            nn.Linear(64, n, False), nn.ReLU(), nn.Linear(n, n, False), nn.ReLU(), nn.Linear(n, 10, False)
        )

    found, plain = {}, {}
    for n in (32, 128):
        for scaled, rows in ((True, found), (False, plain)):
            torch.manual_seed(n)
            model = build(n).double()
            groups = parametrize(model, build(32), gd.KFAC, lr=1.0, damping=0.03)
            for group in groups if not scaled else ():
                group["damping"] = 0.03
            tool = gd.KFAC(model, params=groups, momentum=0.0, fisher="type-2")
            x, y = torch.randn(256, 64).double(), torch.randint(10, (256,))
            before = [p.detach().clone() for p in model.parameters()]
            cross_entropy(model(x), y).backward()
            tool.step()
            rows[n] = [
                float(torch.linalg.matrix_norm(p.detach() - q, 2)) / (p.shape[0] / p.shape[1]) ** 0.5
                for p, q in zip(model.parameters(), before, strict=True)
            ]
    ratios = [[b / a for a, b in zip(x[32], x[128], strict=True)] for x in (found, plain)]
    assert all(0.7 < r < 1.4 for r in ratios[0])
    assert ratios[1][0] < 0.4 and ratios[1][2] > 2.2


# ── decay, ε, defaults


def test_decay_and_eps_by_closed_form():
    groups = parametrize(net(256), net(64), gd.AdamW, lr=0.1, weight_decay=0.2, eps=1e-6)
    found = {name: group for group in groups for name, _ in group["params"]}
    for name, part in names(groups).items():
        group, r_o = found[name], part.ratio[0]
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.02)
        assert group["eps"] == pytest.approx(1e-6 / r_o)
    groups = parametrize(net(256), net(64), gd.SOAP, lr=0.1, eps=1e-6)
    found = {name: group["eps"] for group in groups for name, _ in group["params"]}
    wanted = {"0.weight": 0.5, "2.weight": 1, "4.weight": 2, "0.bias": 0.25, "4.bias": 1}
    for name, factor in wanted.items():
        assert found[name] == pytest.approx(factor * 1e-6)


def test_defaults_of_the_optimizer_are_scaled_too():
    for cls, decay, _eps in ((gd.AdamW, 1e-2, 1e-8), (gd.SOAP, 1e-2, 1e-8)):
        for group in parametrize(net(256), net(64), cls):
            lr = mup._defaults(cls)["lr"]
            assert group["lr"] * group["weight_decay"] == pytest.approx(lr * decay)
            assert "eps" in group
    assert all("eps" not in x for x in parametrize(net(256), net(64), gd.Shampoo))


def test_a_penalty_inside_adam_is_refused():
    with pytest.raises(ValueError, match="penalty inside of 'adam'.*use 'adamw'"):
        parametrize(net(64), net(32), gd.Adam, weight_decay=0.1)
    parametrize(net(64), net(32), gd.NAdam, weight_decay=0.1, decoupled_weight_decay=True)


# ── the weights


def test_initial_weights_are_scaled_once():
    torch.manual_seed(0)
    model = net(128)
    before = copy.deepcopy(model.state_dict())
    parametrize(model, net(32))
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name] * (0.5 if name == "4.weight" else 1)), name
    now = copy.deepcopy(model.state_dict())
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nn.Sequential(model), model[4]):
        with pytest.raises(ValueError, match="rescaled already; pass rescale=False"):
            parametrize(again, again)
    groups = parametrize(model, net(32), "sgd", rescale=False, lr=1.0)
    assert lrs(groups, 1.0)["0.weight"] == 4
    assert all(torch.equal(x, now[name]) for name, x in model.state_dict().items())
    assert now.keys() == net(128).state_dict().keys()
    net(128).load_state_dict(model.state_dict())


def test_a_refusal_changes_nothing():
    model = net(128)
    before = copy.deepcopy(model.state_dict())
    for options in ({"optimizer": "klshampoo"}, {"lr": -1.0}, {"layout": {"2.*": "xy"}}, {"momentum": 0.9}):
        with pytest.raises((ValueError, TypeError)):
            parametrize(model, net(32), **options)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    parametrize(model, net(32))


def test_a_base_may_be_on_the_meta_device_or_in_a_file():
    with torch.device("meta"):
        base = net(32)
    want = repr(parametrize(net(128), net(32)))
    assert repr(parametrize(net(128), base)) == want
    assert repr(parametrize(net(128), base_shapes(base))) == want
    with torch.device("meta"):
        model = net(128)
    with pytest.raises(ValueError, match="meta device.*initialise it first"):
        parametrize(model, base)
    assert parametrize(model, base, rescale=False).parts


def test_frozen_weights_stay():
    model = net(128)
    model[4].weight.requires_grad_(False)
    before = model[4].weight.clone()
    groups = parametrize(model, net(32))
    assert torch.equal(model[4].weight, before)
    assert "4.weight" not in lrs(groups, 1) and "frozen" in names(groups)["4.weight"].reason


# ── roles


def test_embedding_positions_attention():
    groups = parametrize(Text(64, tied=False), Text(16, tied=False), "sgd", lr=1.0, layout=ADDED)
    found = lrs(groups, 1.0)
    assert found["table.weight"] == found["place"] == found["attention.in_proj_bias"] == 4
    assert found["attention.in_proj_weight"] == found["attention.out_proj.weight"] == 1
    assert found["head.weight"] == 0.25
    with pytest.raises(ValueError, match=r"which sides of 'place', \(1, 5, 64\), are inputs.*layout="):
        parametrize(Text(64), Text(16), "sgd")


def test_convolutions():
    def build(n):
        return nn.Sequential(nn.Conv2d(3, n, 3), nn.Conv2d(n, n, 3), nn.ConvTranspose2d(n, 5, 2))

    groups = parametrize(build(32), build(8), "sgd", lr=1.0)
    found = lrs(groups, 1.0)
    assert [found[f"{k}.weight"] for k in range(3)] == [4, 1, 0.25]
    assert [names(groups)[f"{k}.weight"].init for k in range(3)] == [1, 1, 0.5]
    found = lrs(parametrize(build(32), build(8), "adamw", lr=1.0), 1.0)
    assert [found[f"{k}.weight"] for k in range(3)] == [1, 0.25, 0.25]
    # a kernel's places are inputs: 8·9 of them against 8 outputs
    part = names(parametrize(build(32), build(8), gd.Muon, lr=1.0, scale="moonlight"))["1.weight"]
    assert part.lr == pytest.approx(0.5)


def test_groups_of_the_user_are_scaled():
    model = net(128)
    given = gd.param_groups(model, lr=0.2, rest={"algorithm": "adamw", "lr": 0.01, "betas": (0.8, 0.9)})
    groups = parametrize(model, net(32), gd.Muon, groups=given, scale="scion")
    tool = gd.Muon(groups)
    found = {n: g for g in tool.param_groups for n in g["param_names"]}
    assert found["2.weight"]["lr"] == 0.2 and found["2.weight"]["scale"] == "scion"
    assert found["4.weight"]["lr"] == pytest.approx(0.0025) and found["4.weight"]["betas"] == (0.8, 0.9)
    assert found["4.weight"]["algorithm"] == "adamw" and found["4.weight"]["weight_decay"] == pytest.approx(0.04)
    with pytest.raises(ValueError, match="not the model's"):
        parametrize(net(128), net(32), gd.SGD, groups=[{"params": [nn.Parameter(torch.ones(2))]}])
    with pytest.raises(ValueError, match="put it into your groups="):
        parametrize(net(128), net(32), gd.Muon, groups=gd.param_groups(net(128)), rest={})


def test_several_matrices_in_one():
    class Fused(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.qkv_proj = nn.Linear(d, 3 * d, bias=False)

    model = Fused(256)
    keys = {"params": [model.qkv_proj.weight], "split_sizes": (256,) * 3}
    groups = parametrize(model, Fused(64), gd.Muon, groups=[keys], lr=1.0, scale="moonlight")
    assert groups[0]["lr"] == pytest.approx(0.5) and groups[0]["split_sizes"] == (256,) * 3
    assert groups[0]["params"][0][0] == "qkv_proj.weight"


def test_vectors_and_embeddings_of_muon_go_by_adamw():
    model = Text(64)
    groups = parametrize(model, Text(16), gd.Muon, layout=ADDED, rest={"lr": 0.04})
    found = {n: g for g in groups for n, _ in g["params"]}
    assert found["table.weight"]["algorithm"] == "adamw" and found["table.weight"]["lr"] == 0.04
    assert "algorithm" not in found["attention.in_proj_weight"]
    assert found["attention.in_proj_bias"]["algorithm"] == "adamw"


# ── tied heads


def test_a_tied_head_divides_its_input():
    torch.manual_seed(0)
    model, x = Text(64), torch.randint(30, (2, 5))
    plain = copy.deepcopy(model)
    seen = []
    model.head.register_forward_hook(lambda module, args, out: seen.append(out))
    groups = parametrize(model, Text(16), "adamw", layout=ADDED)
    assert "tied" in names(groups)["table.weight"].reason and names(groups)["table.weight"].lr == 1
    assert torch.equal(model.table.weight, plain.table.weight)
    assert torch.allclose(model(x), plain(x) / 4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(plain_hooks(model)))):
        assert torch.allclose(other(x), plain(x) / 4)
    parametrize(model, Text(16), "sgd", layout=ADDED, rescale=False)
    assert torch.allclose(model(x), plain(x) / 4)  # one hook, not two
    assert torch.allclose(model.head(input=plain.table.weight), plain.head(plain.table.weight) / 4)
    mup.remove_hooks(model)
    assert torch.allclose(model(x), plain(x))


def plain_hooks(model):
    model.head._forward_hooks.clear()
    return model


# ── wrappers, shards


def test_groups_are_bound_again():
    model = net(64)
    groups = parametrize(model, net(16), gd.Muon, lr=0.5)
    other = copy.deepcopy(model)
    bound = groups.bind(other)
    assert {p for g in bound for _, p in g["params"]} == set(other.parameters())
    assert [{k: v for k, v in g.items() if k != "params"} for g in bound] == [
        {k: v for k, v in g.items() if k != "params"} for g in groups
    ]
    assert repr(bound) == repr(groups)
    gd.Muon(bound)
    gd.Muon(groups.bind(torch.compile(model)))
    with pytest.raises(ValueError, match="no parameter '0.weight' of"):
        groups.bind(net(32))


def test_fully_shard_on_one_process(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = net(64)
        groups = parametrize(model, net(16), gd.AdamW, lr=0.5)
        fully_shard(model, mesh=mesh)
        tool = gd.AdamW(groups.bind(model))
        model(torch.randn(3, 64)).sum().backward()
        tool.step()
        late = net(64)
        fully_shard(late, mesh=mesh)
        before = late[4].weight.full_tensor().clone()
        assert repr(parametrize(late, net(16), gd.AdamW, lr=0.5)) == repr(groups)
        assert torch.equal(late[4].weight.full_tensor(), before / 2)
    finally:
        dist.destroy_process_group()


# ── errors


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="base has no parameter '0.bias'"):
        parametrize(net(64), net(16, False))
    with pytest.raises(ValueError, match="model has no parameter '0.bias'"):
        parametrize(net(64, False), net(16))
    with pytest.raises(ValueError, match="'0.weight' is .*and .* in the base; build both by one function"):
        parametrize(nn.Sequential(nn.Conv1d(4, 8, 1)), {"0.weight": (4, 4), "0.bias": (4,)})
    odd = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 10))
    base = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10))
    with pytest.raises(ValueError, match="different ratios, '0.weight' by 4 and '1.weight' by 8.*uniform=False"):
        parametrize(odd, base)
    parametrize(odd, base, uniform=False)
    with pytest.raises(TypeError, match="base is a int"):
        parametrize(net(64), 16)
    with pytest.raises(TypeError, match="AdamW has no hyperparameter 'momentum'"):
        parametrize(net(64), net(16), gd.AdamW, momentum=0.9)
    with pytest.raises(TypeError, match="pass it to AdamW itself"):
        parametrize(net(64), net(16), gd.AdamW, engine="loop")
    for name in ("klshampoo", gd.PSGDKron, "adafactor"):
        with pytest.raises(ValueError, match="no rule for"):
            parametrize(net(64), net(16), name)
    with pytest.raises(ValueError, match="over all tensors at once; pass scope='layer'"):
        parametrize(net(64), net(16), "normalizedsgd", lr=1.0)
    with pytest.raises(ValueError, match="on a sphere"):
        parametrize(net(64), net(16), gd.Muon, constraint="sphere")
    with pytest.raises(ValueError, match="exponent= and no graft"):
        parametrize(net(64), net(16), gd.Shampoo, grafting=None, exponent=-0.5)
    with pytest.raises(ValueError, match="scales of its own"):
        parametrize(net(64), net(16), torch.optim.Muon)
    with pytest.raises(TypeError, match="pass a class, or its name"):
        parametrize(net(64), net(16), 3)
    with pytest.raises(ValueError, match="lr=-1.0 is outside"):
        parametrize(net(64), net(16), lr=-1.0)
    with pytest.raises(ValueError, match="has no 'newname'|no rule for 'newname'"):
        parametrize(net(64), net(16), "newname")


def test_torchs_own_optimizers_take_the_groups():
    for cls in (torch.optim.AdamW, torch.optim.SGD):
        model = net(64)
        tool = cls(parametrize(model, net(16), cls, lr=0.5))
        model(torch.randn(3, 64)).sum().backward()
        tool.step()


def test_the_table_says_why():
    text = repr(parametrize(net(128), net(32)))
    row = next(x for x in text.splitlines() if x.startswith("2.weight"))
    assert row.split() == "2.weight 128×128 32×32 hidden adamw 0.25 1 outputs × 4, inputs × 4".split()


def test_schedulers_and_checkpoints():
    model = net(64)
    tool = gd.AdamW(parametrize(model, net(16), gd.AdamW, lr=0.5))
    before = [g["lr"] for g in tool.param_groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(tool, lambda t: 0.5**t)
    model(torch.randn(3, 64)).sum().backward()
    tool.step()
    schedule.step()
    assert [g["lr"] for g in tool.param_groups] == [x / 2 for x in before]
    file = io.BytesIO()
    torch.save(tool.state_dict(), file)
    file.seek(0)
    again = gd.AdamW(parametrize(net(64), net(16), gd.AdamW, lr=0.5))
    again.load_state_dict(torch.load(file))
    assert [g["eps"] for g in again.param_groups] == [g["eps"] for g in tool.param_groups]


# ── the two tests


def data(seed):
    g = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(64, 64, generator=g)
        yield x, x[:, :10].argmax(1)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


PROBE = next(data(99))[0]


def test_coordinates_of_a_known_network():
    """One step of Adam with nothing to learn from but ones: changes are known."""

    class Ones(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.layer = nn.Linear(n, 1, bias=False)
            self.n = n

        def forward(self, x):
            return self.layer(x.expand(-1, self.n))

    found = mup.coordinate_check(
        Ones, [16, 64], gd.Adam, loss=lambda model, x: model(x).sum(), batches=lambda seed: [torch.ones(1, 1)] * 2,
        probe=torch.ones(1, 1), steps=2, lr=1e-3, seeds=[0],
    )  # fmt: skip
    assert found.names == ["layer"]
    wanted = torch.tensor([[[0.016, 0.064]], [[0.032, 0.128]]]).double()
    assert torch.allclose(found.changes, wanted, rtol=1e-4)
    assert torch.allclose(found.slopes, torch.ones(2, 1).double(), atol=1e-3)
    assert "layer   1.00   1.00" in repr(found)


def test_coordinate_check_tells_them_apart():
    options = {"loss": loss, "batches": data, "probe": PROBE, "lr": 2**-7, "seeds": range(2)}
    state = torch.get_rng_state()
    standard = mup.coordinate_check(lambda n: net(n, False), [32, 64, 128], gd.Adam, **options)
    held = mup.coordinate_check(lambda n: net(n, False), [32, 64, 128], gd.Adam, base=32, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert standard.slopes[-1, 1] > 0.3 and held.slopes[-1].abs().max() < 0.25
    assert held.plot().get_xlabel() == "width"


def test_transfer_check_finds_a_known_best():
    """Quadratic in one number: the best constant rate in five steps is known."""

    class Point(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.x = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.n = n

    rates = [2**k for k in (-6, -5, -4, -3, -2, -1, 0, 1)]
    found = mup.transfer_check(
        Point, [2, 8], gd.SGD, lrs=rates, loss=lambda model, _: model.n * model.x.square().sum() / 4,
        batches=lambda seed: range(9), evaluate=lambda model: model.x.square().sum() + 1e-2,
        steps=5, seeds=[0, 1], schedule=lambda s: 1.0,
    )  # fmt: skip
    assert found.losses.shape == (2, 8, 2)
    x = torch.tensor([(1 - r) ** 10 + 1e-2 for r in rates]).double()
    assert torch.allclose(found.losses[0, :, 0], x)
    assert found.best[0, 0] == pytest.approx(0, abs=0.6) and found.best[1, 0] == pytest.approx(-2, abs=0.6)
    assert found.drift.tolist() == pytest.approx([-1, -1]) and found.interior
    assert "drift: -1" in repr(found) and found.plot().lines


def test_parabola_and_edges():
    rates = [2**k for k in (-3, -2, -1, 0, 1)]
    curve = torch.tensor([math.exp((k + 1.3) ** 2) for k in (-3, -2, -1, 0, 1)]).double()
    assert mup._lowest(rates, curve) == pytest.approx(-1.3)
    assert mup._lowest(rates, curve.flip(0).cumsum(0)) == -3
    steep = torch.tensor([5.0, 1.0, math.inf, math.inf, math.inf]).double()
    assert mup._lowest(rates, steep) == -2
    found = mup.Transfer([1, 2], rates, torch.stack([curve, curve.cumsum(0)])[..., None])
    assert not found.interior and "widen" in repr(found)


def test_divergence_is_infinite_and_checked():
    found = mup.transfer_check(
        lambda n: net(n, False), [16, 32], gd.SGD, lrs=[1e-3, 1e-2, 1e30], loss=loss, batches=data, steps=5, seeds=[0]
    )
    assert found.losses[:, -1].isinf().all() and found.losses[:, 0].isfinite().all()
    for bad in ({"lrs": [1, 2]}, {"lrs": [3, 2, 1]}, {"widths": [8]}, {"steps": 2}):
        given = {"widths": [8, 16], "lrs": [1, 2, 3], "steps": 5} | bad
        widths = given.pop("widths")
        with pytest.raises(ValueError):
            mup.transfer_check(lambda n: net(n, False), widths, gd.SGD, loss=loss, batches=data, **given)


def test_seeds_and_schedule():
    seen = []

    def schedule(s):
        seen.append(s)
        return 1 - s

    given = {"lrs": [1e-3, 1e-2, 1e-1], "loss": loss, "batches": data, "steps": 5, "schedule": schedule}
    first = mup.transfer_check(lambda n: net(n, False), [16, 32], gd.SGD, seeds=[3, 4], **given)
    assert seen[:6] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    torch.rand(3)
    again = mup.transfer_check(lambda n: net(n, False), [16, 32], gd.SGD, seeds=[3, 4], **given)
    assert torch.equal(first.losses, again.losses)
    assert (first.losses[..., 0] != first.losses[..., 1]).all()


def test_dropout_does_not_hide_what_the_coordinate_check_sees():
    def build(rate):
        return lambda n: nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Dropout(rate), nn.Linear(n, 4))

    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(16, 8, generator=generator), torch.randint(4, (16,), generator=generator)

    def loss(model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    def slopes(rate, **given):
        asked = dict(probe=torch.ones(64, 8), base=None, steps=2, seeds=range(2))
        return mup.coordinate_check(
            build(rate), (16, 64, 256), gd.Adam, loss=loss, batches=batches, **(asked | given)
        ).slopes

    plain = slopes(0.0)
    assert plain[-1, -1] > 0.5
    assert (slopes(0.3)[:, -1] - plain[:, -1]).abs().max() < 0.2
    assert torch.equal(slopes(0.0, probe={"input": torch.ones(64, 8)}), plain)

    def few(seed):
        return [next(batches(seed))]

    with pytest.raises(ValueError, match=r"batches\(0\) gave fewer than steps=2"):
        mup.coordinate_check(build(0.0), (16, 32), "adam", loss=loss, batches=few, probe=torch.ones(4, 8), steps=2)
    with pytest.raises(ValueError, match="has the score -1, not above 0"):
        mup.transfer_check(
            build(0.0),
            (16, 32),
            "adam",
            loss=loss,
            batches=batches,
            lrs=(0.01, 0.02, 0.04),
            steps=5,
            evaluate=lambda m: -1.0,
        )
