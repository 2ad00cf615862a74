"""--loss and its options; proxies that train with the network; classes held out for tuning."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.engine import build, config, datasets, losses, optimizer, trained_network
from experiments.engine.runtime import RuntimeOptions
from rll_jax import loss
from rll_jax.data import image_dataset
from rll_jax.loss import baselines
from rll_jax.training import checkpoint, devices, steps
from tests.helpers.networks import Linear

CLASSES = np.array([3, 7, 20, 21, 40, 41])
LABELS = np.repeat(CLASSES, 4).astype(np.int32)


def batch():
    return {
        "image": np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), np.uint8),
        "label": LABELS,
    }


class Proxied(Linear):
    levels, embedding_dim = ("H",), 8


def make_state():
    return steps.create_train_state(Proxied(), optax.sgd(0.05), 16, seed=0, proxies=6)


def make_step(**options):
    return functools.partial(
        steps.train_step,
        loss=losses.make_loss(losses.LossOptions(loss="proxy_anchor"), LABELS[::-1]),
        **options,
    )


def test_every_loss_is_its_function_with_its_options():
    x, labels = np.random.default_rng(1).normal(size=(24, 8)).astype(np.float32), np.arange(24) // 4
    cases = {
        ("ranked_list", "", ("margin", 0.2), ("query_weighting", "mass")): loss.ranked_list_loss(
            x, labels, margin=0.2, query_weighting="mass"
        ),
        ("pml_ranked_list", "", ("temperature_neg", 4.0)): baselines.pml_ranked_list_loss(
            x, labels, temperature_neg=4.0
        ),
        ("triplet", "margin=0.1,mining=hard"): baselines.triplet_loss(
            x, labels, margin=0.1, mining="hard"
        ),
        ("multi_similarity", "epsilon=none"): baselines.multi_similarity_loss(
            x, labels, epsilon=None
        ),
        ("n_pair", "scale=4, normalize=false"): baselines.n_pair_loss(
            x, labels, scale=4, normalize=False
        ),
        ("circle", "margin=0.25"): baselines.circle_loss(x, labels, margin=0.25),
        ("smooth_ap", "temperature=0.1"): baselines.smooth_ap_loss(x, labels, temperature=0.1),
        (
            "recall_at_k",
            "ks=1+2+4,k_temperatures=1+1+2,rank_query=false",
        ): baselines.recall_at_k_loss(
            x, labels, ks=(1, 2, 4), k_temperatures=(1, 1, 2), rank_query=False
        ),
    }
    for (name, text, *more), expected in cases.items():
        options = losses.LossOptions(loss=name, loss_options=text, **dict(more))
        np.testing.assert_allclose(
            losses.make_loss(options, labels)(x, labels), expected, rtol=1e-6
        )


@pytest.mark.parametrize(
    "options, text",
    [
        ({"loss": "tripplet"}, "--loss=tripplet: expected one of ranked_list, "),
        (
            {"loss": "triplet", "loss_options": "margn=1"},
            "--loss_options=margn=1: expected NAME=VALUE,... of margin, mining, each once",
        ),
        ({"loss": "triplet", "loss_options": "margin=1,margin=2"}, "each once, found 'margin=2'"),
        (
            {"loss": "triplet", "loss_options": "mining=hardest"},
            "mining: found 'hardest', expected 'semihard', 'hard' or 'all'",
        ),
        (
            {"loss": "contrastive", "loss_options": "neg_margin=far"},
            "neg_margin: expected a number, found 'far'",
        ),
        (
            {"loss": "nt_xent", "loss_options": "temperature=0"},
            "temperature out of range: found 0.0, expected temperature > 0",
        ),
        (
            {"loss": "n_pair", "loss_options": "normalize=1"},
            "normalize: expected true or false, found '1'",
        ),
        (
            {"loss": "multi_similarity", "loss_options": "epsilon=inf"},
            "epsilon: expected a number or none, found 'inf'",
        ),
        (
            {"loss": "triplet", "query_weighting": "mass"},
            "--query_weighting does nothing with --loss=triplet",
        ),
        (
            {"loss": "sup_con", "proxy_lr_multiplier": 10.0},
            "--proxy_lr_multiplier does nothing with --loss=sup_con",
        ),
        ({"loss": "contrastive", "loss_options": "where=1"}, "of pos_margin, neg_margin, each"),
        (
            {"loss": "soft_triple", "loss_options": "centers_per_class=2.5"},
            "centers_per_class: expected a whole number, found '2.5'",
        ),
        (
            {"loss": "soft_triple", "loss_options": "centers_per_class=0"},
            "centers_per_class out of range: found 0, expected centers_per_class > 0",
        ),
        (
            {"loss": "recall_at_k", "loss_options": "ks=1+x"},
            "ks: expected whole numbers with + between, found '1+x'",
        ),
        (
            {"loss": "recall_at_k", "loss_options": "k_temperatures=1+1"},
            "k_temperatures must be 5 numbers above 0",
        ),
        (
            {"loss": "arcface", "loss_options": "margin=28.6"},
            "margin out of range: found 28.6, expected 0 to pi, in radians",
        ),
        (
            {"loss_options": "margin=0.2"},
            "expected nothing, as --loss=ranked_list has flags of its own",
        ),
        ({"loss": "nt_xent", "memory_size": 64}, "--memory_size=64 goes with --loss=ranked_list"),
    ],
)
def test_mistakes(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        config.from_flat(**options)


@functools.cache
def of_one_device():
    return jax.device_get(jax.jit(make_step())(make_state(), batch()))


def test_proxies_train_with_the_network_and_eight_devices_equal_one():
    state, metrics = of_one_device()
    runner = devices.make_runner("pmap")
    start = runner.replicate(make_state())
    before = jax.device_get(start.params["proxies"])
    many, of_many = runner.train(make_step())(start, runner.shard(batch()))
    assert before["H"].shape == (6, 8) and before["H"].std() == pytest.approx(
        (2 / 6) ** 0.5, rel=0.3
    )
    assert np.abs(state.params["proxies"]["H"] - before["H"]).min(axis=1).all()
    np.testing.assert_allclose(of_many["loss"], metrics["loss"], rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), many.params, state.params
    )


def test_losses_with_proxies_number_the_classes():
    x = np.random.default_rng(2).normal(size=(24, 8)).astype(np.float32)
    rng = np.random.default_rng(3)
    for name, text, count, function in (
        ("arcface", "scale=16", 6, functools.partial(loss.arcface_loss, scale=16.0)),
        (
            "soft_triple",
            "centers_per_class=3",
            18,
            functools.partial(loss.soft_triple_loss, centers_per_class=3),
        ),
        ("soft_triple", "", 60, loss.soft_triple_loss),
    ):
        options = losses.LossOptions(loss=name, loss_options=text)
        assert losses.num_proxies(options, LABELS) == count
        proxies = rng.normal(size=(count, 8)).astype(np.float32)
        value = losses.make_loss(options, LABELS)(x, LABELS, proxies=proxies)
        expected = function(x, np.searchsorted(CLASSES, LABELS), proxies)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_proxies_in_chunks():
    expected, _ = of_one_device()
    state, _ = jax.jit(make_step(embed_chunk=8))(make_state(), batch())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, expected.params
    )


def test_proxies_and_the_optimiser():
    params = {"conv1": {"kernel": jnp.ones((2, 2))}, "proxies": {"H": jnp.ones((2, 2))}}
    usual = dict(
        optimizer="sgd",
        schedule="step",
        learning_rate=0.1,
        weight_decay=0.0,
        batch_norm="frozen",
        frozen_stages=2,
    )
    options = config.from_flat(**usual)
    tx = optimizer.make_optimizer(
        options.optimizer, options.network, options.schedule.steps, proxy_lr_multiplier=100.0
    )
    updates, _ = tx.update(params, tx.init(params), params)
    assert (
        float(updates["proxies"]["H"][0, 0]) == pytest.approx(-10.0)
        and float(updates["conv1"]["kernel"][0, 0]) == 0
    )


@pytest.mark.parametrize("ema", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
def test_a_run_with_proxies_is_loaded_without_them(ema, tmp_path):
    """What searches has no use for them."""
    options = config.from_flat(
        loss="proxy_anchor",
        ema=ema,
        backbone="resnet_tiny",
        image_size=8,
        embedding_dim=4,
        classes_per_batch=8,
        workdir=str(tmp_path),
    )
    state = build.make_state(options, devices.make_runner("pmap"), proxies=6)
    (tmp_path / "flags.txt").write_text(options.as_flagfile())
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as saved:
        saved.save(3, state)
    loaded = trained_network.load(tmp_path)
    expected = {
        name: leaf
        for name, leaf in (state.ema if ema else state.params).items()
        if name != "proxies"
    }
    assert loaded.step == 3 and loaded.variables["params"].keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"], expected)


def test_classes_held_out():
    def open_splits(**options):
        return datasets.open_usable(datasets.DataOptions(**options), RuntimeOptions())[0]

    opened, held = open_splits(), open_splits(validation_share=0.25)
    other = open_splits(validation_share=0.25, split_seed=1)
    classes = {name: np.unique(held[name].labels) for name in held}
    assert (
        len(classes["test"]) == round(0.25 * 718)
        and not np.intersect1d(classes["train"], classes["test"]).size
    )
    np.testing.assert_array_equal(
        np.union1d(classes["train"], classes["test"]), np.unique(opened["train"].labels)
    )
    assert len(held["train"]) + len(held["test"]) == len(opened["train"])
    assert set(classes["test"]) != set(np.unique(other["test"].labels))


def test_what_cannot_be_held_out():
    def labelled(*labels):
        labels = np.array(labels)
        return image_dataset.EncodedImageDataset(
            None, np.arange(len(labels)), labels, labels.astype(str), labels
        )

    for seed in range(4):
        held = image_dataset.hold_out(labelled(1, 1, 2, 3, 4, 4), 0.5, seed)["test"]
        assert set(held.labels) in ({1}, {4})  # of two images
    with pytest.raises(ValueError, match="at least two classes with two images or more, found 1"):
        image_dataset.hold_out(labelled(1, 1, 2), 0.5, 0)
