"""Every score against its formula, computed again with numpy on a small block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_block import D, F, N, case, silu

from moyu import methods
from moyu.methods import larosa, moefication, r_sparse
from moyu.methods.magnitude import Magnitude
from moyu.methods.random import uniform
from moyu.methods.selection import Threshold, TopK, keep_count

TARGET = 0.4


def fitted(name, reads, small=None, target=TARGET, **knobs):
    small = small or case()
    method = methods.method(name, **knobs)
    site = small.site(method, reads)
    return small, method, site, method.fit(site, small.acts, target)


def quantile(values, share):
    """The smallest entry with at least `share` of all entries at or below it."""
    return np.sort(values.ravel())[max(round(share * values.size), 1) - 1]


def column_norms(weight, order=2):
    return np.linalg.norm(weight, ord=order, axis=0)


# ------------------------------------------------------------------------------------------------- a cut on magnitudes


@pytest.mark.parametrize(
    ("name", "reads"),
    [("cats", "gate"), ("countdown", "up"), ("teal", "attn_in"), ("teal", "mid"), ("r-sparse", "heads")],
)
def test_plain_magnitudes(name, reads):
    block, method, site, params = fitted(name, reads)
    expected = np.abs(block.taps[reads])
    assert np.array_equal(block.scores(method, site, params), expected)
    assert params.rule.value == pytest.approx(quantile(expected[block.met], TARGET), rel=1e-6)
    assert block.mask(method, site, params)[block.met].mean() == pytest.approx(1 - TARGET, abs=0.01)


@pytest.mark.parametrize("weighted", [False, True])
def test_chess_is_a_threshold_a_channel(weighted):
    block, method, site, params = fitted("chess", "gate", weighted=weighted)
    power = (block.taps["up"][block.met] ** 2).mean(0)  # E[u_j^2]
    if weighted:
        power = power * column_norms(block.weights["down"]) ** 2
    gate = np.abs(block.taps["gate"])
    cuts = np.sqrt(quantile(gate[block.met] ** 2 * power, TARGET) / power)  # t_j
    clear = np.abs(gate / cuts - 1) > 1e-6  # all but the one entry that is the quantile
    assert clear.sum() >= clear.size - 1
    assert np.array_equal(block.mask(method, site, params)[clear], (gate > cuts)[clear])


def test_chess_cuts_the_inputs_of_q_and_o_alone():
    block, method, site, params = fitted("chess", "heads")
    assert [s.linears for s in method.sites(block.block)] == [("q",), ("o",), ("up", "down")]
    assert np.array_equal(block.scores(method, site, params), np.abs(block.taps["heads"]))


@pytest.mark.parametrize(
    ("reads", "linears"), [("attn_in", "qkv"), ("heads", "o"), ("mlp_in", ("gate", "up")), ("mid", ("down",))]
)
def test_wina_joint_norm(reads, linears):
    block, method, site, params = fitted("wina", reads)
    assert site.linears == tuple(linears)
    norms = np.sqrt(sum(column_norms(block.weights[n]) ** 2 for n in linears))
    assert np.allclose(block.scores(method, site, params), np.abs(block.taps[reads]) * norms, rtol=1e-6)
    assert (block.mask(method, site, params).sum(1) == keep_count(site.units, TARGET)).all()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_was_norm_and_exponent(order, exponent):
    block, method, site, params = fitted("was", "mid", order=order, exponent=exponent)
    expected = np.abs(block.taps["mid"]) * column_norms(block.weights["down"], order) ** exponent
    assert np.allclose(block.scores(method, site, params), expected, rtol=1e-5)


def test_was_fits_the_exponent_with_the_least_error():
    block = case()
    block.acts.weights["down"][:, ::2] *= 30  # the norms now matter far more than the inputs
    _, _, _, params = fitted("was", "mid", block, exponent=None)
    errors = {}
    x, down = block.taps["mid"][block.met], block.acts.weights["down"].numpy()
    for alpha in (0.0, 0.5, 1.0, 1.5):
        scores = np.abs(x) * column_norms(down, 1) ** alpha
        dropped = np.where(scores[1::2] > quantile(scores[::2], TARGET), 0, x[1::2])
        errors[alpha] = ((dropped @ down.T) ** 2).sum()
    best = min(errors, key=errors.__getitem__)
    assert best > 0
    assert np.allclose(params.buffers["norms"], column_norms(down, 1) ** best, rtol=1e-4)


@pytest.mark.parametrize("name", ["cett", "oracle"])
def test_contributions(name):
    block, method, site, params = fitted(name, "mid")
    expected = np.abs(block.taps["mid"]) * column_norms(block.weights["down"])
    assert np.allclose(block.scores(method, site, params), expected, rtol=1e-6)


def test_relu_zero_keeps_what_is_not_zero():
    for gated, reads in ((True, "gate"), (False, "mid")):
        block, method, site, params = fitted("relu-zero", reads, case("relu", gated))
        assert np.array_equal(block.mask(method, site, params), block.taps[reads] != 0)
    assert methods.method("relu-zero").sites(case("silu").block) == ()


# ------------------------------------------------------------------------------------------- rotations, low-rank paths


def test_larosa_directions_and_scores():
    block, method, site, params = fitted("larosa", "mlp_in")
    x = block.taps["mlp_in"][block.met]
    values, vectors = np.linalg.eigh(x.T @ x)
    q = params.basis.numpy()
    assert np.allclose(q.T @ q, np.eye(D), atol=1e-12)
    assert np.allclose(np.abs(vectors[:, ::-1].T @ q), np.eye(D), atol=1e-8)  # the same directions, up to sign
    assert (np.diff(np.diag(q.T @ x.T @ x @ q)) <= 1e-9 * values[-1]).all()
    assert np.allclose(block.scores(method, site, params), np.abs(block.taps["mlp_in"] @ vectors[:, ::-1]), atol=1e-8)


@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("target", [0.05, 0.5, 0.9])
def test_larosa_levels(target, ratio):
    first, second = larosa.levels(target, ratio, rotated=24, others=36)
    assert (24 * first + 36 * second) / 60 == pytest.approx(target)
    assert 0 <= first <= second <= 1
    assert second == 1.0 or second == pytest.approx(ratio * first)


@pytest.mark.parametrize("share", [0.05, 0.4])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_r_sparse_rank_is_its_share_of_the_bytes(share, sparsity):
    q, n = 4096, 1024
    path = r_sparse.rank_for(q, n, sparsity, share) * (q + n)
    assert path / (path + (1 - sparsity) * q * n) == pytest.approx(share, rel=0.02)


def test_r_sparse_paths():
    block, _, _, params = fitted("r-sparse", "mid", share=0.4)
    weight, rank = block.weights["down"], r_sparse.rank_for(D, F, TARGET, 0.4)
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    outer, inner = (t.numpy() for t in params.low_rank)
    assert outer.shape == (D, rank) and rank > 1
    assert np.allclose(outer @ inner, (u[:, :rank] * s[:rank]) @ v[:rank])
    _, _, _, other = fitted("r-sparse", "mid", share=0.4, path="skipped")
    x = block.taps["mid"][block.met]
    skipped = np.where(np.abs(x) > params.rule.value, 0, x)
    # Eckart-Young by the other route: truncate W C^(1/2), C the second moment of what is skipped, and go back.
    values, vectors = np.linalg.eigh(skipped.T @ skipped)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    u, s, v = np.linalg.svd(weight @ root, full_matrices=False)
    best = np.linalg.norm(s[rank:]) ** 2
    outer, inner = (t.numpy() for t in other.low_rank)
    assert ((skipped @ (weight - outer @ inner).T) ** 2).sum() == pytest.approx(best, rel=1e-6)
    first, published = (t.numpy() for t in params.low_rank)
    assert best < ((skipped @ (weight - first @ published).T) ** 2).sum() < ((skipped @ weight.T) ** 2).sum()


# ----------------------------------------------------------------------------------------------- proxies and routers


def test_prox_foresees_with_four_bits():
    block, method, site, params = fitted("prox", "mlp_in", inputs=0.25, weighted=True)
    x = block.taps["mlp_in"]
    kept = np.zeros_like(x, dtype=bool)
    np.put_along_axis(kept, np.argsort(-np.abs(x), axis=1)[:, : keep_count(D, 0.25)], True, axis=1)
    seen = np.where(kept, x, 0)  # (N, D): one block of 32 a row, as D < 32; rounded to 8 bits
    scale = np.abs(seen).max(1, keepdims=True) / 127
    seen = np.round(seen / scale) * scale
    values = []
    for name in ("gate", "up"):
        weight = block.weights[name]  # (F, D)
        largest = np.take_along_axis(weight, np.abs(weight).argmax(1, keepdims=True), axis=1)
        codes = np.clip(np.trunc(weight * (-8 / largest) + 8.5), 0, 15)
        values.append(seen @ ((codes - 8) * (largest / -8).astype(np.float16)).T)
    expected = np.abs(silu(values[0]) * values[1]) * column_norms(block.weights["down"])
    assert np.allclose(block.scores(method, site, params), expected, rtol=1e-4, atol=1e-5)
    codes = 9 * 16 * -(-F // 32)  # of 9 of the 12 channels; and a scale for each neuron, the only block of its row
    assert method.score_bytes(site, params) == 2 * (codes + 2 * F) + 4 * F


def test_moefication_clusters_are_balanced_and_stable():
    points = torch.nn.functional.normalize(torch.randn(50, 6), dim=1)
    labels = moefication.balanced_clusters(points, 7)
    assert sorted(labels.bincount().tolist()) == [7, 7, 7, 7, 7, 7, 8]


def test_moefication_finds_planted_experts():
    directions = torch.nn.functional.normalize(torch.randn(4, 12), dim=1)
    true = torch.arange(32) % 4
    points = torch.nn.functional.normalize(directions[true] + 0.05 * torch.randn(32, 12), dim=1)
    labels = moefication.balanced_clusters(points, 4)
    together = labels[:, None] == labels
    assert (together == (true[:, None] == true)).float().mean() > 0.8


def test_moefication_graph_cuts_where_neurons_do_not_fire_together():
    true = torch.arange(24) % 3
    fires = torch.rand(200, 3) < 0.4  # a planted group fires as one, at sizes of its neurons' own
    mass = (fires[:, true] * torch.rand(200, 24) + 0.01 * torch.rand(200, 24)).t()  # (f, N)
    found = moefication.spectral(mass, 3)
    weights = (mass @ mass.t()).double().numpy()
    root = np.sqrt(weights.sum(1))
    values, vectors = np.linalg.eigh(weights / np.outer(root, root))
    assert np.isclose(values[-1], 1.0)  # a normalised graph's largest
    for column, vector in zip(found.t().numpy(), vectors[:, ::-1].T, strict=False):
        assert np.isclose(abs(column @ vector), 1.0, atol=1e-4)
    labels = moefication.balanced_clusters(torch.nn.functional.normalize(found, dim=1), 3)
    assert torch.equal(labels[:, None] == labels, true[:, None] == true)


@pytest.mark.parametrize("groups", ["weights", "graph", "activations"])
def test_moefication_scores(groups):
    block, method, site, params = fitted("moefication", "mlp_in", block=4, groups=groups)
    experts = params.blocks.numpy()
    means = np.stack([block.weights["gate"][experts == e].mean(0) for e in range(F // 4)])
    expected = block.taps["mlp_in"] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert np.allclose(block.scores(method, site, params), expected)
    assert (np.bincount(experts) == 4).all()


@pytest.mark.parametrize(("act", "gated"), [("silu", True), ("relu", False)])
def test_deja_vu_lessons_and_scores(act, gated):
    block = case(act, gated)
    method = methods.method("deja-vu", rank=5, weighted=True)
    site = block.site(method, "mlp_in")
    labels, weights = (t.numpy() for t in method.lessons(site, block.acts, TARGET))
    mass = np.abs(block.taps["mid"][block.met]) * column_norms(block.weights["down"])
    if act == "relu":
        assert np.array_equal(labels, mass > 0)
    else:
        kept = np.argsort(-mass, axis=1)[:, : keep_count(F, TARGET)]
        assert (np.take_along_axis(labels, kept, 1)).all() and labels.sum() == kept.size
    assert np.allclose(weights, mass / mass.mean(1, keepdims=True), rtol=1e-5)
    params = method.fit(site, block.acts, TARGET)
    inner, outer = (params.buffers[f"{n}.weight"].numpy() for n in ("inner", "outer"))
    assert inner.shape == (5, D) and outer.shape == (F, 5)
    assert np.allclose(block.scores(method, site, params), block.taps["mlp_in"] @ inner.T @ outer.T)


# --------------------------------------------------------------------------------------- prompts, references, bounds


@pytest.mark.parametrize("at_once", [1000, 3], ids=["one piece", "pieces"])
def test_griffin_and_tda_statistics(monkeypatch, at_once):
    monkeypatch.setattr("moyu.methods.griffin.AT_ONCE", at_once)
    block = case()
    prompt = block.taps["mid"][::2]  # dense rows
    s = np.sqrt(((prompt / np.linalg.norm(prompt, axis=1, keepdims=True)) ** 2).sum(0))
    for name, expected in (("griffin", s), ("tda", s / s.max())):
        method = methods.method(name)
        site = block.site(method, "mid")
        params = method.fit(site, block.acts, TARGET)
        memory = method.update({}, torch.from_numpy(block.taps["mid"]), block.acts.rows, site, params)
        assert np.allclose(method.score(torch.empty(0), block.acts.rows, site, params, memory)[0], expected)


def test_static_scores():
    block = case()
    down, mid = column_norms(block.weights["down"]), block.taps["mid"]
    rows = {n: np.linalg.norm(block.weights[n], axis=1) for n in ("gate", "up")}
    cases = [
        ("popularity", {}, np.abs(mid).mean(0) * down),
        ("static-norm", {}, np.sqrt((mid[block.met] ** 2).mean(0)) * down),
        ("static-norm", {"data": False}, rows["gate"] * rows["up"]),
    ]
    for name, knobs, expected in cases:
        _, method, site, params = fitted(name, "mlp_in", block, **knobs)
        assert np.allclose(block.scores(method, site, params), np.tile(expected, (N, 1)), rtol=1e-5)
    plain = case(gated=False)
    _, method, site, params = fitted("static-norm", "mlp_in", plain, data=False)
    expected = np.linalg.norm(plain.weights["up"], axis=1) * column_norms(plain.weights["down"])
    assert np.allclose(plain.scores(method, site, params)[0], expected, rtol=1e-5)


def test_random_popular_draws_in_proportion():
    block, method, site, params = fitted("random-popular", "mlp_in", seed=3)
    popularity = np.abs(block.taps["mid"][block.met]).mean(0) * column_norms(block.weights["down"])
    drawn = uniform(3, site, block.acts.rows.pos, F).numpy()
    assert np.allclose(block.scores(method, site, params), np.log(drawn) / popularity, rtol=1e-5)
    many = torch.arange(20_000)
    rows = block.acts.rows._replace(pos=many, seq=many * 0)
    first = method.score(torch.empty(0), rows, site, params, {}).argmax(1).bincount(minlength=F).numpy() / len(many)
    assert np.abs(first - popularity / popularity.sum()).max() < 0.012  # five standard errors of a share of .1
    assert method.score_bytes(site, params) == 0


def test_oracle_greedy_order():
    block, method, site, params = fitted("oracle-greedy", "mid", target=0.5)
    scores, mask = block.scores(method, site, params), block.mask(method, site, params)
    assert isinstance(params.rule, TopK)
    plain = methods.method("oracle")
    near = {"greedy": 0.0, "plain": 0.0}
    by_norm = block.mask(plain, block.site(plain, "mid"), plain.fit(block.site(plain, "mid"), block.acts, 0.5))
    for row in range(N):
        parts = block.taps["mid"][row] * block.weights["down"]  # (D, F): column j is n_j
        lost, order = np.zeros(D), []
        for _ in range(F - params.rule.k):
            errors = [np.inf if j in order else ((lost + parts[:, j]) ** 2).sum() for j in range(F)]
            order.append(int(np.argmin(errors)))
            lost = lost + parts[:, order[-1]]
        assert np.array_equal(np.argsort(scores[row], kind="stable")[: len(order)], order)
        assert set((~mask[row]).nonzero()[0]) == set(order)
        near["greedy"] += (lost**2).sum()
        near["plain"] += (parts[:, ~by_norm[row]].sum(1) ** 2).sum()
    assert near["greedy"] < near["plain"]


def test_random_scores_depend_on_the_counter_alone():
    block, method, site, params = fitted("random", "mlp_in")
    scores = block.scores(method, site, params)
    assert np.array_equal(scores[:5], uniform(0, site, torch.arange(5), F).numpy())
    assert 0.45 < scores.mean() < 0.55 and len(np.unique(scores)) == scores.size


@pytest.mark.parametrize("name", [n for n in methods.names() if issubclass(methods.method_class(n), Magnitude)])
def test_magnitude_scores_are_what_kernels_compute(name):
    """|x| times `factors()` is the score, for every site of columns or rows of every method that says so."""
    block = case("relu" if name == "relu-zero" else "silu")
    method = methods.method(name)
    for site in method.sites(block.block):
        if site.skips == "neurons":
            continue  # foreseen from another tap
        params = method.fit(site, block.acts, TARGET)
        factors = method.factors(site, params)
        x = np.abs(params.turned(torch.from_numpy(block.taps[site.reads])).numpy())
        expected = x if factors is None else x * factors.double().numpy()
        assert np.allclose(block.scores(method, site, params), expected, rtol=1e-6)
        if isinstance(params.rule, Threshold) and method.solves_target:
            assert block.mask(method, site, params)[block.met].mean() == pytest.approx(1 - TARGET, abs=0.01)
