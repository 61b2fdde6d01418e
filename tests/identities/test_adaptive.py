"""Reductions and invariances of the adaptive methods, on gradients drawn by hypothesis."""

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import guided_descent as gd

settings.register_profile("adaptive", deadline=None, max_examples=15)
settings.load_profile("adaptive")

seeds = st.integers(0, 2**31 - 1)
scales = st.floats(1e-6, 1e6)
lrs = st.floats(1e-4, 1.0)
decays = st.floats(0.0, 0.99)


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(build, gradients, start=None):
    """The points an optimizer visits on a given sequence of gradients."""
    x = (torch.zeros_like(gradients[0]) if start is None else start.clone()).requires_grad_()
    optimizer, path = build([x]), []
    for g in gradients:
        x.grad = g.clone()
        optimizer.step()
        path.append(x.detach().clone())
    return torch.stack(path)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(seeds, lrs)
def test_adam_without_memory_is_sign_descent(seed, lr):
    g = draw(seed, 20, 7)
    close(run(partial(gd.Adam, lr=lr, betas=(0.0, 0.0), eps=0.0), g), -lr * g.sign().cumsum(0))


@given(seeds, lrs, decays)
def test_first_step_of_adam_is_a_sign_step_whatever_the_betas(seed, lr, beta):
    g = draw(seed, 1, 7)
    for method in (gd.Adam, gd.AdamW):
        close(run(partial(method, lr=lr, betas=(beta, beta), eps=0.0), g), -lr * g.sign())


@given(seeds, scales)
def test_without_eps_the_scale_of_the_gradient_does_not_matter(seed, scale):
    g = draw(seed, 20, 4, 3)
    for build in (
        partial(gd.Adagrad, eps=0.0),
        partial(gd.RMSprop, eps=0.0),
        partial(gd.RMSprop, eps=0.0, momentum=0.9),
        partial(gd.Adam, eps=0.0),
        partial(gd.Adam, eps=0.0, amsgrad=True),
        partial(gd.NAdam, eps=0.0),
        partial(gd.AdEMAMix, eps=0.0, t_alpha_beta3=10),
        partial(gd.Adafactor, eps=(0.0, 1e-3)),
    ):
        close(run(build, g), run(build, scale * g))


@given(seeds, scales)
def test_eps_is_measured_in_gradients(seed, scale):
    g = draw(seed, 20, 5)
    for method in (gd.Adam, gd.NAdam, gd.RMSprop, gd.Adagrad, gd.AdEMAMix):
        close(run(partial(method, eps=0.1), g), run(partial(method, eps=0.1 * scale), scale * g))


@given(seeds, lrs, scales)
def test_steps_are_proportional_to_the_learning_rate(seed, lr, scale):
    g = draw(seed, 20, 5)
    for method in (gd.Adagrad, gd.RMSprop, gd.Adam, gd.NAdam, gd.AdEMAMix):
        close(run(partial(method, lr=lr * scale), g) / scale, run(partial(method, lr=lr), g))


@given(seeds, decays)
def test_adam_without_correction_and_momentum_is_rmsprop(seed, alpha):
    class Uncorrected(gd.Adam):
        @staticmethod
        def clock(h):
            h.step_size, h.root_correction = h.lr, 1.0

    g = draw(seed, 20, 5)
    close(
        run(partial(Uncorrected, lr=0.01, betas=(0.0, alpha), engine="loop"), g),
        run(partial(gd.RMSprop, lr=0.01, alpha=alpha), g),
    )


@given(seeds, st.floats(0.0, 1.0))
def test_ademamix_without_the_slow_mean_is_adamw(seed, weight_decay):
    g, start = draw(seed, 20, 5), draw(seed + 1, 5)
    close(
        run(partial(gd.AdEMAMix, lr=0.1, alpha=0.0, weight_decay=weight_decay), g, start),
        run(partial(gd.AdamW, lr=0.1, weight_decay=weight_decay), g, start),
    )


@given(seeds)
def test_ademamix_past_its_warm_up_is_ademamix_without_one(seed):
    g = draw(seed, 20, 5)
    close(run(partial(gd.AdEMAMix, t_alpha_beta3=1), g), run(gd.AdEMAMix, g))


@given(seeds, st.floats(0.0, 1.0))
def test_adamw_is_adam_and_decay(seed, weight_decay):
    g, start = draw(seed, 20, 5), draw(seed + 1, 5)
    adam = run(partial(gd.Adam, lr=0.1), g).diff(dim=0, prepend=torch.zeros(1, 5, dtype=torch.float64))
    x = start
    for step in adam:
        x = (1 - 0.1 * weight_decay) * x + step
    close(run(partial(gd.AdamW, lr=0.1, weight_decay=weight_decay), g, start)[-1], x)


@given(seeds)
def test_amsgrad_is_adam_while_the_second_moment_grows(seed):
    g = draw(seed, 10, 5).abs().cumsum(0)  # gradients that grow: the largest v is the newest
    close(run(partial(gd.Adam, amsgrad=True), g), run(gd.Adam, g))


@given(seeds, st.floats(0.05, 0.95))
def test_adafactor_is_exact_where_the_square_has_rank_one(seed, rho):
    """For gradients δaᵀ of one shape the factored moment equals the full one, so the step is that of a vector."""
    delta, a = draw(seed, 4).exp(), draw(seed + 1, 6).exp()
    signs = draw(seed + 2, 10, 4, 6).sign()
    sizes = draw(seed + 3, 10, 1, 1).exp()
    g = signs * sizes * delta[:, None] * a

    def build(p):
        return gd.Adafactor(p, lr=0.1, beta2_decay=-rho, eps=(0.0, 1e-3))

    close(run(build, g), run(build, g.reshape(10, 24)).reshape(10, 4, 6))


@given(seeds, st.integers(1, 3))
def test_adafactor_treats_a_stack_as_its_matrices_up_to_their_size(seed, k):
    """Rows and columns are those of the last two dimensions; only the two root mean squares see the whole stack."""
    g = draw(seed, 5, 1, 4, 3).expand(5, k, 4, 3).contiguous()

    def build(p):
        return gd.Adafactor(p, lr=0.1)

    close(run(build, g), run(build, g[:, 0])[:, None].expand(5, k, 4, 3))


def coordinates(seed, kind, d=5):
    generator = torch.Generator().manual_seed(seed)
    if kind == "rotation":
        return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    signs = torch.randint(0, 2, (d,), generator=generator).double() * 2 - 1
    return torch.eye(d, dtype=torch.float64)[torch.randperm(d, generator=generator)] * signs


@given(seeds)
def test_renaming_and_flipping_axes_changes_nothing_but_a_rotation_does(seed):
    g, start = draw(seed, 20, 5), draw(seed + 1, 5)
    for method in (gd.Adagrad, gd.RMSprop, gd.Adam, gd.AdamW, gd.NAdam, gd.AdEMAMix, gd.Adafactor):
        plain = run(partial(method, lr=0.1), g, start)
        P, Q = coordinates(seed, "signed permutation"), coordinates(seed, "rotation")
        close(run(partial(method, lr=0.1), g @ P.T, P @ start), plain @ P.T)
        if (Q.abs().amax(1) < 0.9).all():
            assert (run(partial(method, lr=0.1), g @ Q.T, Q @ start) - plain @ Q.T).abs().max() > 1e-6


@given(seeds)
def test_adafactor_does_not_mind_renamed_rows_and_columns(seed):
    g, start = draw(seed, 10, 4, 5), draw(seed + 1, 4, 5)
    P, R = coordinates(seed, "signed permutation", 4), coordinates(seed + 2, "signed permutation")

    def build(p):
        return gd.Adafactor(p, lr=0.1)

    close(run(build, P @ g @ R, P @ start @ R), P @ run(build, g, start) @ R)
