"""The baselines next to pytorch-metric-learning's, value and gradient; and what each does alone."""

import functools
import warnings

import jax
from jax import lax
from jax.experimental import checkify
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np
import pytest

from rll_jax.loss import baselines
from tests.helpers import ranking_oracle

CLASSES, CENTERS = 9, 3


def proxies(dtype=np.float64):
    return np.random.default_rng(9).normal(size=(CLASSES, 8)).astype(dtype)


def centers(dtype=np.float64):
    return np.random.default_rng(8).normal(size=(CLASSES * CENTERS, 8)).astype(dtype)


def with_proxies(embeddings, labels, **options):
    return baselines.proxy_anchor_loss(
        embeddings, labels, jnp.asarray(proxies(embeddings.dtype)), **options
    )


def arcface(embeddings, labels, **options):
    return baselines.arcface_loss(
        embeddings, labels, jnp.asarray(proxies(embeddings.dtype)), **options
    )


def soft_triple(embeddings, labels, **options):
    return baselines.soft_triple_loss(
        embeddings,
        labels,
        jnp.asarray(centers(embeddings.dtype)),
        centers_per_class=CENTERS,
        **options,
    )


LOSSES = {
    "contrastive": baselines.contrastive_loss,
    "contrastive, margins": functools.partial(
        baselines.contrastive_loss, pos_margin=0.3, neg_margin=0.8
    ),
    "triplet, semihard": baselines.triplet_loss,
    "triplet, hard": functools.partial(baselines.triplet_loss, mining="hard", margin=0.1),
    "triplet, all": functools.partial(baselines.triplet_loss, mining="all"),
    "lifted": baselines.lifted_structure_loss,
    "lifted, margins": functools.partial(
        baselines.lifted_structure_loss, pos_margin=0.2, neg_margin=0.6
    ),
    "n-pair": baselines.n_pair_loss,
    "n-pair, not normalised": functools.partial(baselines.n_pair_loss, normalize=False),
    "multi-similarity": baselines.multi_similarity_loss,
    "multi-similarity, all": functools.partial(
        baselines.multi_similarity_loss, epsilon=None, beta=40.0
    ),
    "proxy anchor": with_proxies,
    "nt-xent": baselines.nt_xent_loss,
    "sup-con": baselines.sup_con_loss,
    "pml's ranked list": baselines.pml_ranked_list_loss,
    "pml's ranked list, T": functools.partial(
        baselines.pml_ranked_list_loss,
        temperature_pos=2.0,
        temperature_neg=3.0,
        alpha=1.3,
        margin=0.2,
        balance=0.3,
    ),
    "circle": baselines.circle_loss,
    "circle, faces": functools.partial(baselines.circle_loss, margin=0.25, gamma=16.0),
    "arcface": arcface,
    "arcface, beyond pi": functools.partial(arcface, margin=2.0, scale=16.0),
    "soft triple": soft_triple,
    "smooth ap": baselines.smooth_ap_loss,
    "recall at k": baselines.recall_at_k_loss,
    "recall at k, as in retrieval": functools.partial(
        baselines.recall_at_k_loss,
        ks=(1, 3, 50),
        k_temperatures=(1, 1, 2),
        temperature=0.05,
        rank_query=False,
    ),
}
LEARNS = [LOSSES[name] for name in ("proxy anchor", "arcface", "arcface, beyond pi", "soft triple")]
for_each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def peers():
    """{name: (embeddings, labels) -> loss} of PML, by the names above."""
    torch = pytest.importorskip("torch", reason="needs torch and pytorch-metric-learning")
    theirs = pytest.importorskip(
        "pytorch_metric_learning.losses", reason="needs pytorch-metric-learning"
    )
    from pytorch_metric_learning import distances, miners

    def mined(loss, miner):
        return lambda x, labels: loss(x, labels, miner(x, labels))

    def ranked(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the paper's T_n
            return theirs.RankedListLoss(**options)

    anchor = theirs.ProxyAnchorLoss(CLASSES, 8)
    anchor.proxies.data = torch.as_tensor(proxies())
    arc = theirs.ArcFaceLoss(CLASSES, 8, margin=np.degrees(0.5))
    beyond = theirs.ArcFaceLoss(CLASSES, 8, margin=np.degrees(2.0), scale=16)
    arc.W.data = beyond.W.data = torch.as_tensor(proxies()).T.contiguous()
    soft = theirs.SoftTripleLoss(CLASSES, 8, centers_per_class=CENTERS)
    soft.fc.data = torch.as_tensor(centers()).T.contiguous()
    return {
        "contrastive": theirs.ContrastiveLoss(),
        "contrastive, margins": theirs.ContrastiveLoss(pos_margin=0.3, neg_margin=0.8),
        "triplet, semihard": mined(
            theirs.TripletMarginLoss(margin=0.2),
            miners.TripletMarginMiner(margin=0.2, type_of_triplets="semihard"),
        ),
        "triplet, hard": mined(theirs.TripletMarginLoss(margin=0.1), miners.BatchHardMiner()),
        "triplet, all": theirs.TripletMarginLoss(margin=0.2),
        "lifted": theirs.LiftedStructureLoss(),
        "lifted, margins": theirs.LiftedStructureLoss(pos_margin=0.2, neg_margin=0.6),
        "n-pair": theirs.NPairsLoss(),
        "n-pair, not normalised": theirs.NPairsLoss(
            distance=distances.DotProductSimilarity(normalize_embeddings=False)
        ),
        "multi-similarity": mined(theirs.MultiSimilarityLoss(), miners.MultiSimilarityMiner(0.1)),
        "multi-similarity, all": theirs.MultiSimilarityLoss(beta=40.0),
        "proxy anchor": anchor,
        "nt-xent": theirs.NTXentLoss(),
        "sup-con": theirs.SupConLoss(),
        "pml's ranked list": ranked(margin=0.4, Tn=10.0, alpha=1.2),
        "pml's ranked list, T": ranked(margin=0.2, Tn=3.0, Tp=2.0, alpha=1.3, imbalance=0.3),
        "circle": theirs.CircleLoss(),
        "circle, faces": theirs.CircleLoss(m=0.25, gamma=16),
        "arcface": arc,
        "arcface, beyond pi": beyond,
        "soft triple": soft,
        "smooth ap": ranking_oracle.smooth_ap,
        "recall at k": ranking_oracle.recall_at_k,
        "recall at k, as in retrieval": functools.partial(
            ranking_oracle.recall_at_k,
            ks=(1, 3, 50),
            widths=(1, 1, 2),
            temperature=0.05,
            rank_query=False,
        ),
    }


def batch(kind, seed=0, dtype=np.float64):
    """Rows of 8 dimensions and labels: even classes, ragged ones with single rows, or clusters."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(CLASSES), 4))
    if kind == "ragged":
        labels = rng.permutation(np.repeat(np.arange(CLASSES), [1, 7, 2, 1, 9, 3, 5, 2, 6]))
    x = rng.normal(size=(36, 8))
    if kind == "clustered":
        x = rng.normal(size=(CLASSES, 8))[labels] + 0.7 * x
    return x.astype(dtype), labels


# fast code is not what these need
quickly_compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.cache
def jitted(loss):
    return quickly_compiled(jax.value_and_grad(loss))


def value_and_gradient(loss, x, labels, **options):
    compiled_loss = (
        jitted(loss)
        if not options
        else quickly_compiled(jax.value_and_grad(functools.partial(loss, **options)))
    )
    return jax.device_get(compiled_loss(x, labels))


@pytest.mark.parametrize("kind", ["even", "ragged", "clustered"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_pytorch_metric_learning(name, kind):
    peer = peers()[name]
    import torch

    for seed in range(3):
        x, labels = batch(kind, seed)
        theirs = torch.tensor(x, requires_grad=True)
        expected = peer(theirs, torch.as_tensor(labels))
        expected.backward()
        with jax.enable_x64(True):
            value, gradient = value_and_gradient(LOSSES[name], x, labels)
        assert expected.item() > 0
        np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
        np.testing.assert_allclose(
            gradient, theirs.grad.numpy(), atol=1e-6 * np.abs(theirs.grad.numpy()).max()
        )
        single = value_and_gradient(LOSSES[name], x.astype(np.float32), labels)
        np.testing.assert_allclose(single[0], expected.item(), rtol=1e-5)
        np.testing.assert_allclose(
            single[1], theirs.grad.numpy(), atol=1e-4 * np.abs(theirs.grad.numpy()).max()
        )


@pytest.mark.parametrize(
    "name, loss, of_peer, start",
    [
        ("proxy anchor", baselines.proxy_anchor_loss, lambda p: p.proxies.grad, proxies()),
        ("arcface", baselines.arcface_loss, lambda p: p.W.grad.T, proxies()),
        (
            "soft triple",
            functools.partial(baselines.soft_triple_loss, centers_per_class=CENTERS),
            lambda p: p.fc.grad.T,
            centers(),
        ),
    ],
)
def test_the_gradient_of_proxies_is_the_peers(name, loss, of_peer, start):
    peer = peers()[name]
    import torch

    x, labels = batch("ragged")
    peer(torch.tensor(x), torch.as_tensor(labels)).backward()
    with jax.enable_x64(True):
        gradient = jax.grad(loss, argnums=2)(x, labels, start)
    np.testing.assert_allclose(gradient, of_peer(peer).numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_smooth_ap_is_the_peers_with_its_sizes_mended(size):
    """PML's takes even classes in order, and reads C classes of k rows as k classes of C rows."""
    theirs = pytest.importorskip("pytorch_metric_learning.losses", reason="needs PML")
    import torch

    x, labels = batch("clustered", size)[0], np.arange(36) // size
    rows = torch.tensor(x, requires_grad=True)
    as_it_reads = torch.arange(36) // (36 // size)  # labels, where size is 6
    expected = theirs.SmoothAPLoss(temperature=0.05)(rows, as_it_reads)
    expected.backward()
    with jax.enable_x64(True):
        value, gradient = value_and_gradient(
            functools.partial(baselines.smooth_ap_loss, temperature=0.05), x, labels
        )
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)  # theirs sums in float32
    np.testing.assert_allclose(gradient, rows.grad.numpy(), atol=1e-6)


@for_each_loss
def test_finite_at_copies_and_in_one_class(loss):
    x, labels = batch("even", dtype=np.float32)
    copies = x.copy()
    copies[::2] = copies[0]
    collapsed, zero = np.tile(x[:1], (36, 1)), np.zeros_like(x)
    for rows in (x, copies, collapsed, zero):
        for row_labels in (labels, np.zeros(36, int), np.arange(36)):
            value, gradient = value_and_gradient(loss, rows, row_labels)
            assert np.isfinite(value) and np.isfinite(gradient).all()
    assert value_and_gradient(loss, copies, labels)[0] > 0
    value, gradient = value_and_gradient(loss, x[:1], labels[:1])
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "name", ["contrastive", "triplet, semihard", "triplet, all", "lifted", "pml's ranked list"]
)
def test_rows_near_each_other_keep_their_digits(name):
    """A network that is about to collapse, or has just begun."""
    x, labels = batch("even")
    x = (x[:1] + 3e-3 * x).astype(np.float32)
    value, gradient = value_and_gradient(LOSSES[name], x, labels)
    with jax.enable_x64(True):
        expected, expected_gradient = value_and_gradient(LOSSES[name], x.astype(np.float64), labels)
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    np.testing.assert_allclose(
        gradient, expected_gradient, atol=1e-2 * np.abs(expected_gradient).max()
    )


@for_each_loss
def test_low_precision_is_worked_on_in_float32(loss):
    x, labels = batch("clustered", dtype=np.float32)
    low = jnp.asarray(x, jnp.float16)
    value, gradient = value_and_gradient(loss, low, labels)
    expected = value_and_gradient(loss, np.asarray(low, np.float32), labels)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.float16
    np.testing.assert_allclose(value, expected[0], rtol=1e-2 if loss in LEARNS else 1e-6)
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


@for_each_loss
def test_masked_rows_are_not_there(loss):
    x, labels = batch("ragged", dtype=np.float32)
    kept = np.random.default_rng(1).random(36) < 0.7
    padded = np.where(kept[:, None], x, np.nan).astype(np.float32)
    value, gradient = value_and_gradient(loss, padded, labels, where=kept)
    expected, kept_gradient = value_and_gradient(loss, x[kept], labels[kept])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(
        gradient[kept], kept_gradient, atol=1e-5 * np.abs(kept_gradient).max()
    )
    assert (gradient[~kept] == 0).all()


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if "n-pair" not in name]
)  # which takes the first two rows of each class
def test_order_of_the_rows_does_not_matter(name):
    loss = LOSSES[name]
    x, labels = batch("ragged", dtype=np.float32)
    order = np.random.default_rng(2).permutation(36)
    value, gradient = value_and_gradient(loss, x, labels)
    moved, moved_gradient = value_and_gradient(loss, x[order], labels[order])
    np.testing.assert_allclose(moved, value, rtol=1e-5)
    np.testing.assert_allclose(moved_gradient, gradient[order], atol=2e-5 * np.abs(gradient).max())


ON_DEVICES = [(name, "vmap") for name in LOSSES] + [
    (name, kind)
    for name in ("triplet, hard", "proxy anchor", "arcface", "smooth ap")
    for kind in ("pmap", "shard_map")
]


@pytest.mark.parametrize("name, runner", ON_DEVICES)
def test_devices_together_are_one(name, runner):
    loss = LOSSES[name]
    x, labels = batch("ragged", dtype=np.float32)
    x, labels, where = x[:32], labels[:32], np.arange(32) != 5
    matrix = np.random.default_rng(3).normal(size=(8, 8)).astype(np.float32)
    expected = quickly_compiled(jax.value_and_grad(lambda m: loss(x @ m, labels, where=where)))(
        matrix
    )

    def step(m, x, labels, where):
        if runner != "vmap":
            m = lax.pcast(m, "batch", to="varying")
        return lax.pmean(
            jax.value_and_grad(lambda m: loss(x @ m, labels, where=where, axis_name="batch"))(m),
            "batch",
        )

    split = [a.reshape(4, 8, *a.shape[1:]) for a in (x, labels, where)]
    if runner == "shard_map":
        mesh, rows, everywhere = (
            Mesh(np.array(jax.devices()[:4]), ("batch",)),
            PartitionSpec("batch"),
            PartitionSpec(),
        )
        on_devices = jax.jit(
            jax.shard_map(
                step, mesh=mesh, in_specs=(everywhere, rows, rows, rows), out_specs=everywhere
            )
        )
        actual = on_devices(matrix, x, labels, where)
    elif runner == "pmap":
        actual = jax.pmap(
            step, "batch", in_axes=(None, 0, 0, 0), out_axes=None, devices=jax.devices()[:4]
        )(matrix, *split)
    else:
        actual = jax.tree.map(
            lambda a: a[0],
            quickly_compiled(jax.vmap(step, axis_name="batch", in_axes=(None, 0, 0, 0)))(
                matrix, *split
            ),
        )
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-4 * np.abs(expected[1]).max())


@pytest.mark.parametrize(
    "loss", [baselines.triplet_loss, baselines.smooth_ap_loss, baselines.recall_at_k_loss]
)
def test_triplets_do_not_take_a_cube_of_memory(loss):
    x, labels = np.zeros((512, 8), np.float32), np.arange(512) // 4
    compiled = jax.jit(jax.value_and_grad(loss)).lower(x, labels).compile()
    # 512^3 floats would be 512 MiB
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


def test_bad_input():
    x, labels = batch("even", dtype=np.float32)
    with pytest.raises(ValueError, match="mining: found 'hardest', expected"):
        baselines.triplet_loss(x, labels, mining="hardest")
    with pytest.raises(TypeError, match="embeddings must be floating"):
        baselines.contrastive_loss(x.astype(int), labels)
    for wrong, kind in (
        ([[1.0] * 8], TypeError),
        (np.ones((9, 8), int), TypeError),
        (np.ones((9, 4), np.float32), ValueError),
    ):
        with pytest.raises(kind, match="proxies must"):
            baselines.proxy_anchor_loss(x, labels, wrong)
    with pytest.raises(ValueError, match="labels must go with embeddings"):
        baselines.nt_xent_loss(x, labels[:-1])
    with pytest.raises(ValueError, match="margin out of range: found 28.6, .* in radians"):
        arcface(x, labels, margin=28.6)
    with pytest.raises(ValueError, match="multiple of centers_per_class=2: found 9"):
        baselines.soft_triple_loss(x, labels, proxies(np.float32), centers_per_class=2)
    for options, text in (
        ({"ks": ()}, "ks must be"),
        ({"ks": (0, 1)}, "ks must be"),
        ({"ks": (1, 2), "k_temperatures": (1,)}, "k_temperatures must be 2 numbers"),
        ({"k_temperatures": (1, 2, 4, 8, 0)}, "k_temperatures must be 5 numbers"),
    ):
        with pytest.raises(ValueError, match=text):
            baselines.recall_at_k_loss(x, labels, **options)
    # An array of a known value within jit, too.
    zero, one = jnp.float32(0), jnp.float32(1)
    with pytest.raises(ValueError, match="temperature out of range: found 0.0"):
        jax.jit(lambda x: baselines.smooth_ap_loss(x, labels, temperature=zero))(x)
    assert jax.jit(lambda x: baselines.smooth_ap_loss(x, labels, temperature=one))(x) > 0


@for_each_loss
def test_clean_under_strict_types_and_checks(loss):
    x, labels = batch("ragged", dtype=np.float32)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        checked = checkify.checkify(jax.grad(loss), errors=checkify.all_checks)
        error, gradient = jax.jit(checked)(x, labels.astype(np.int32), where=np.arange(36) != 3)
    assert error.get() is None and np.isfinite(gradient).all()
    assert np.isnan(loss(np.where(np.arange(36)[:, None] == 4, np.nan, x), labels))
    assert loss(x, labels, where=np.zeros(36, bool)) == 0
