"""One step function under pmap, shard_map and on one device: the same parameters, to rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rll_jax import loss
from rll_jax.networks import backbones, embedding_net
from rll_jax.training import checkpoint, embedding, steps
from rll_jax.training import devices as devices_lib


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 255, (48, 16, 16, 3), np.uint8),
            "label": np.repeat(rng.permutation(100)[:12], 4).astype(np.int32),
        }
        for _ in range(3)
    ]


def network(levels, **options):
    """One block for one level, two for two: seconds to compile."""
    return embedding_net.EmbeddingNet(
        backbones.ResNetConfig((1,) * len(levels), width=8, small_images=True), 8, levels, **options
    )


@functools.cache
def fresh(levels):
    model = network(levels)
    # SGD, since Adam's first step has the size of the rate whatever the gradient
    return jax.device_get(
        steps.create_train_state(model, optax.sgd(0.05, momentum=0.9), 16, seed=0)
    )


def make_state(axis_name, levels=("M", "H")):
    model = network(levels, axis_name=axis_name)
    return jax.tree.map(jnp.array, fresh(levels)).replace(
        apply_fn=model.apply
    )  # arrays of its own: steps donate them


step = functools.partial(steps.train_step, loss=loss.ranked_list_loss)


@pytest.fixture(scope="module")
def expected(batches):
    state, metrics = make_state(None), []
    one = jax.jit(step)
    for batch in batches:
        state, m = one(state, batch)
        metrics.append(m)
    return state, metrics


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_eight_devices_equal_one(kind, batches, expected):
    runner = devices_lib.make_runner(kind)
    assert runner.num_devices == 8
    state, many = runner.replicate(make_state(devices_lib.AXIS)), runner.train(step)
    for batch, one_device in zip(batches, expected[1], strict=True):
        state, metrics = many(state, runner.shard(batch))
        assert metrics.keys() == one_device.keys() == {"loss", "loss_M", "loss_H", "gradient_norm"}
        for name in metrics:
            np.testing.assert_allclose(metrics[name], one_device[name], rtol=1e-4, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        (state.params, state.batch_stats),
        (expected[0].params, expected[0].batch_stats),
    )
    assert int(state.step) == 3


def test_local_losses_would_be_another_loss(batches, expected):
    """What a classifier's data-parallel step would do: the test above is sharp enough to tell."""

    def local(embeddings, labels, axis_name):
        return loss.ranked_list_loss(embeddings, labels)

    runner = devices_lib.make_runner("pmap")
    state = runner.replicate(make_state(devices_lib.AXIS))
    _, metrics = runner.train(functools.partial(steps.train_step, loss=local))(
        state, runner.shard(batches[0])
    )
    assert abs(float(metrics["loss"]) / float(expected[1][0]["loss"]) - 1) > 0.01


def test_checkpoint_restores_on_other_devices(tmp_path, expected):
    many, one = (
        devices_lib.make_runner("pmap"),
        devices_lib.make_runner("shard_map", jax.local_devices()[:1]),
    )
    saved = checkpoint.Checkpoints(tmp_path)
    assert saved.latest_step() is None
    saved.save(3, many.replicate(expected[0]), {"best_score": 0.5})
    saved.close()
    again = checkpoint.Checkpoints(tmp_path)
    state = again.restore(again.latest_step(), one.replicate(make_state(devices_lib.AXIS)))
    assert again.metadata(3) == {"best_score": 0.5}
    again.close()
    for name in ("params", "batch_stats", "opt_state", "step", "skipped"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(state, name), getattr(expected[0], name)
        )
    assert len(jax.tree.leaves(state.params)[0].devices()) == 1
    with checkpoint.Checkpoints(tmp_path / "of_one") as saved:  # and the other way
        saved.save(4, state)
        saved.wait()
        back = saved.restore(4, many.replicate(make_state(devices_lib.AXIS)))
    jax.tree.map(np.testing.assert_array_equal, back.params, expected[0].params)
    assert len(jax.tree.leaves(back.params)[0].devices()) == 8


class Images:
    """A dataset of 21 images, as `embed_images` needs it."""

    def __init__(self):
        self.pixels = np.random.default_rng(1).integers(0, 255, (21, 16, 16, 3), np.uint8)

    def __len__(self):
        return 21

    def image(self, row):
        return self.pixels[row]


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_embeddings_do_not_depend_on_batch_or_devices(kind, expected):
    data, state = Images(), expected[0]
    straight = embedding_net.concatenate_levels(steps.embed_step(state, data.pixels))
    np.testing.assert_allclose(np.linalg.norm(straight, axis=1), 1, rtol=1e-5)
    for devices, batch_size in ((8, 5), (1, 8)):
        runner = devices_lib.make_runner(kind, jax.local_devices()[:devices])
        embed = runner.embed(steps.embed_step)
        found = embedding.embed_images(
            runner.replicate(state), data, lambda x: x, embed, runner, batch_size=batch_size
        )
        np.testing.assert_allclose(embedding_net.concatenate_levels(found), straight, atol=1e-5)
    sets = embedding.combinations(found)
    assert list(sets) == ["M", "H", "M,H"]
    np.testing.assert_allclose(sets["M,H"], straight, atol=1e-5)


def test_unknown_way_to_run():
    with pytest.raises(ValueError, match="'pmap' or 'shard_map', got 'pjit'"):
        devices_lib.make_runner("pjit")


# ---- The model


@pytest.mark.parametrize(
    "name, millions",
    [
        ("resnet18", 11.177),
        ("resnet34", 21.285),
        ("resnet50", 23.508),
        ("resnet101", 42.500),
        ("resnet152", 58.144),
    ],
)
def test_parameter_counts_are_torchvisions(name, millions):
    """Without the head: torchvision's published counts less the 1000-way classifier."""
    model = embedding_net.EmbeddingNet(backbones.BACKBONES[name], 16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    head = shapes.pop("H_embedding")["kernel"].shape
    assert head == ({"resnet18": 512, "resnet34": 512}.get(name, 2048), 16)
    assert sum(x.size for x in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=1e-3)


def test_batch_norm_policy_and_dtype(batches):
    images = batches[0]["image"][:8]

    def run(**kwargs):
        model = embedding_net.EmbeddingNet(backbones.BACKBONES["resnet_tiny"], 8, **kwargs)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(shapes))
        variables = variables_like(shapes)
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        out, updates = jax.jit(apply)(variables, images)
        moved = jax.tree.map(
            lambda a, b: not np.allclose(a, b), updates["batch_stats"], variables["batch_stats"]
        )
        return out["H"], any(jax.tree.leaves(moved))

    trained, moved = run()
    frozen, stays = run(batch_norm="frozen")
    half, _ = run(dtype=jnp.bfloat16)
    assert moved and not stays and not np.allclose(trained, frozen, atol=1e-3)
    assert half.dtype == jnp.float32 and not np.array_equal(half, trained)
    np.testing.assert_allclose(half, trained, atol=0.05)


def test_learns_the_classes_it_is_shown():
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 255, (8, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    images = np.clip(prototypes.repeat(4, 0) + rng.normal(0, 40, (32, 16, 16, 3)), 0, 255).astype(
        np.uint8
    )
    batch = {"image": images, "label": np.repeat(np.arange(8), 4)}
    state, one = make_state(None, ("H",)), jax.jit(step)
    first = None
    for _ in range(40):
        state, metrics = one(state, batch)
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < 0.2 * first


def variables_like(shapes):
    """Random, all of them: what a test should see change is nowhere zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: np.abs(rng.normal(size=s.shape)).astype(np.float32) + 0.1, dict(shapes)
    )


def gradients(images, backbone=backbones.BACKBONES["resnet_tiny"], **options):
    model = embedding_net.EmbeddingNet(backbone, 8, ("M", "H"), **options)
    variables = variables_like(jax.eval_shape(model.init, jax.random.key(0), images))

    def objective(params):
        out, _ = model.apply(
            variables | {"params": params}, images, train=True, mutable=["batch_stats"]
        )
        return sum(jnp.vdot(e, directions) for e in out.values())

    directions = np.random.default_rng(1).normal(size=(8, 8))
    return jax.jit(jax.grad(objective))(variables["params"])


def test_remat_changes_no_gradient(batches):
    images = batches[0]["image"][:8].astype(np.float32)
    plain, recomputed = gradients(images), gradients(images, remat=(1, 2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), plain, recomputed
    )


def test_frozen_affine_stops_the_backbones_alone(batches):
    images = batches[0]["image"][:8].astype(np.float32)
    frozen, fixed = (
        gradients(images, batch_norm="frozen"),
        gradients(images, batch_norm="frozen_affine"),
    )
    assert np.abs(frozen["bn1"]["scale"]).max() > 0 and not np.any(fixed["bn1"]["scale"])
    assert not np.any(fixed["layer2_0"]["bn2"]["bias"])
    np.testing.assert_allclose(
        fixed["M_bn1"]["scale"], frozen["M_bn1"]["scale"], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        fixed["conv1"]["kernel"], frozen["conv1"]["kernel"], rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["pmap", "shard_map", None])
def test_chunks_make_the_same_update(kind, batches):
    """With frozen statistics, on eight devices and on one.

    Trained statistics are the mean of the chunks'.
    """
    axis = devices_lib.AXIS if kind else None

    def run(chunk, batch_norm):
        model = network(("H",), axis_name=axis, batch_norm=batch_norm)
        state = jax.tree.map(jnp.array, fresh(("H",))).replace(apply_fn=model.apply)
        one = functools.partial(step, embed_chunk=chunk)
        runner = devices_lib.make_runner(kind) if kind else None
        new, metrics = (
            runner.train(one)(runner.replicate(state), runner.shard(batches[0]))
            if kind
            else jax.jit(one)(state, batches[0])
        )
        return new, float(metrics["loss"])

    (whole, loss_of_whole), (chunked, loss_of_chunked) = run(0, "frozen"), run(3, "frozen")
    assert loss_of_chunked == pytest.approx(loss_of_whole, rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), chunked.params, whole.params
    )
    if kind is None:
        trained_stats, _ = run(3, "train")
        assert np.isfinite(trained_stats.batch_stats["bn1"]["mean"]).all()
        assert not np.allclose(
            trained_stats.batch_stats["bn1"]["mean"], whole.batch_stats["bn1"]["mean"]
        )


def test_a_step_that_is_not_finite_changes_nothing(batches):
    """Neither parameters nor statistics nor the optimiser; streak, longest, total are counted."""
    state, one = make_state(None, ("H",)), jax.jit(step)
    broken = {**batches[1], "image": np.full((48, 16, 16, 3), np.nan, np.float32)}
    counted = []
    for batch in (batches[0], broken, broken, batches[1], broken):
        before = jax.device_get((state.params, state.batch_stats, state.opt_state))
        state, _ = one(state, batch)
        same = all(
            jax.tree.leaves(
                jax.tree.map(
                    np.array_equal,
                    before,
                    jax.device_get((state.params, state.batch_stats, state.opt_state)),
                )
            )
        )
        assert same == (batch is broken)
        counted.append(state.skipped.tolist())
    assert (
        counted == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [0, 2, 2], [1, 2, 3]] and int(state.step) == 5
    )


@pytest.mark.parametrize(
    "backbone", [backbones.BACKBONES["resnet_tiny"], backbones.GoogLeNetV2Config(width=1 / 32)]
)
def test_frozen_stages_get_no_gradient(backbone):
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    model = embedding_net.EmbeddingNet(
        backbone, 8, ("M", "H"), batch_norm="frozen", frozen_stages=1
    )
    variables = variables_like(jax.eval_shape(model.init, jax.random.key(0), images))

    def ends(params):
        maps = model.apply(variables | {"params": params}, images, train=True, features=True)
        return sum(x.mean() for x in maps)

    found = jax.jit(jax.grad(ends))(variables["params"])
    moved = {
        name: bool(max(np.abs(x).max() for x in jax.tree.leaves(module)))
        for name, module in found.items()
    }
    in_backbone = {
        name: backbone.stage_of(name) for name in found if not name.startswith(("M_", "H_"))
    }
    assert set(in_backbone.values()) == set(range(backbone.num_stages + 1))
    assert {name: moved[name] for name in in_backbone} == {
        name: stage > 1 for name, stage in in_backbone.items()
    }


def test_moving_average(batches):
    state = make_state(None, ("H",))
    state = state.replace(ema=jax.tree.map(jnp.copy, state.params))
    expected, one = state.ema, jax.jit(functools.partial(step, ema_decay=0.3))
    for number, batch in enumerate(batches, start=1):
        state, _ = one(state, batch)
        decay = min(0.3, (1 + number) / (10 + number))
        expected = jax.tree.map(
            lambda e, p, decay=decay: decay * e + (1 - decay) * p, expected, state.params
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, expected)
    averaged = state.replace(params=state.ema, ema=None)
    images = batches[0]["image"]
    np.testing.assert_array_equal(
        steps.embed_step(state, images)["H"], steps.embed_step(averaged, images)["H"]
    )
