"""The baselines against a given gallery, next to pytorch-metric-learning's `ref_emb`."""

import functools

import jax
from jax import lax
import numpy as np
import pytest

from rll_jax import loss

LOSSES = {
    "contrastive": loss.contrastive_loss,
    "triplet, semihard": loss.triplet_loss,
    "triplet, hard": functools.partial(loss.triplet_loss, mining="hard"),
    "triplet, all": functools.partial(loss.triplet_loss, mining="all"),
    "multi-similarity": loss.multi_similarity_loss,
    "multi-similarity, all": functools.partial(loss.multi_similarity_loss, epsilon=None),
    "nt-xent": loss.nt_xent_loss,
    "sup-con": loss.sup_con_loss,
    "circle": loss.circle_loss,
}
for_each_loss = pytest.mark.parametrize("name", LOSSES)


def peer(name):
    """(embeddings, labels, reference rows, their labels) -> loss of PML."""
    theirs = pytest.importorskip(
        "pytorch_metric_learning.losses", reason="needs pytorch-metric-learning"
    )
    from pytorch_metric_learning import miners

    def mined(function, miner):
        return lambda *rows: function(*rows[:2], miner(*rows), *rows[2:])

    def plain(function):
        return lambda *rows: function(*rows[:2], None, *rows[2:])

    return {
        "contrastive": plain(theirs.ContrastiveLoss()),
        "triplet, semihard": mined(
            theirs.TripletMarginLoss(margin=0.2),
            miners.TripletMarginMiner(margin=0.2, type_of_triplets="semihard"),
        ),
        "triplet, hard": mined(theirs.TripletMarginLoss(margin=0.2), miners.BatchHardMiner()),
        "triplet, all": plain(theirs.TripletMarginLoss(margin=0.2)),
        "multi-similarity": mined(theirs.MultiSimilarityLoss(), miners.MultiSimilarityMiner(0.1)),
        "multi-similarity, all": plain(theirs.MultiSimilarityLoss()),
        "nt-xent": plain(theirs.NTXentLoss()),
        "sup-con": plain(theirs.SupConLoss()),
        "circle": plain(theirs.CircleLoss()),
    }[name]


def data(seed=0):
    """Ragged classes; some are of the batch alone, some of the gallery alone; copies of a row."""
    rng = np.random.default_rng(seed)
    labels, gallery_labels = rng.integers(0, 7, 16), rng.integers(2, 9, 24)
    x, gallery = rng.normal(size=(16, 8)), rng.normal(size=(24, 8))
    gallery[:2], gallery_labels[:2] = x[:2], labels[:2]
    return x, labels, gallery, gallery_labels


@functools.cache
def compiled(name):
    def batch_loss(x, gallery, **arrays):
        return LOSSES[name](x, gallery=gallery, **arrays)

    # fast code is not what these need
    quickly = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.value_and_grad(batch_loss, argnums=(0, 1)), compiler_options=quickly)


@for_each_loss
def test_equals_pytorch_metric_learning(name):
    theirs = peer(name)
    import torch

    x, labels, gallery, gallery_labels = data()
    rows = torch.tensor(x, requires_grad=True)
    expected = theirs(
        rows, torch.as_tensor(labels), torch.as_tensor(gallery), torch.as_tensor(gallery_labels)
    )
    expected.backward()
    with jax.enable_x64(True):
        value, (gradient, constant) = compiled(name)(
            x, gallery, labels=labels, gallery_labels=gallery_labels
        )
    assert expected.item() > 0 and not constant.any()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(
        gradient, rows.grad.numpy(), atol=1e-6 * np.abs(rows.grad.numpy()).max()
    )


@for_each_loss
def test_masks_and_devices(name):
    x, labels, gallery, gallery_labels = data(1)
    kept = np.arange(24) % 5 != 2
    padded = np.where(kept[:, None], gallery, np.nan)
    x, padded = x.astype(np.float32), padded.astype(np.float32)
    expected, (gradient, _) = compiled(name)(
        x, padded[kept], labels=labels, gallery_labels=gallery_labels[kept]
    )
    arrays = {"labels": labels, "gallery_labels": gallery_labels, "gallery_where": kept}
    value, (masked_gradient, constant) = compiled(name)(x, padded, **arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(masked_gradient, gradient, atol=1e-5 * np.abs(gradient).max())
    assert not constant.any()

    def of_device(x, gallery, arrays):
        return lax.pmean(LOSSES[name](x, gallery=gallery, axis_name="batch", **arrays), "batch")

    shards = jax.tree.map(lambda a: a.reshape(4, -1, *a.shape[1:]), (x, padded, arrays))
    values = jax.vmap(of_device, axis_name="batch")(*shards)
    np.testing.assert_allclose(values[0], expected, rtol=1e-5)
    assert np.isnan(LOSSES[name](x, labels, gallery=padded, gallery_labels=gallery_labels))


def test_a_memory_is_a_gallery():
    x, labels, _, _ = data()
    bank = loss.memory.push(loss.memory.init(32, 8), x.astype(np.float32), labels)
    rows = {"gallery": bank.embeddings, "gallery_labels": bank.labels, "gallery_where": bank.valid}
    value = loss.contrastive_loss(x[::-1].astype(np.float32), labels[::-1], **rows)
    expected = loss.contrastive_loss(
        x.astype(np.float32), labels, gallery=x.astype(np.float32), gallery_labels=labels
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_bad_galleries():
    x, labels, gallery, gallery_labels = data()
    for options, kind, text in (
        ({"gallery": gallery}, ValueError, "needs gallery_labels"),
        ({"gallery_labels": gallery_labels}, ValueError, "need a gallery"),
        (
            {"gallery": gallery[:, :3], "gallery_labels": gallery_labels},
            ValueError,
            "same dimension: found 3, expected 8",
        ),
        (
            {"gallery": gallery.astype(int), "gallery_labels": gallery_labels},
            TypeError,
            "gallery must be floating",
        ),
    ):
        with pytest.raises(kind, match=text):
            loss.nt_xent_loss(x, labels, **options)
