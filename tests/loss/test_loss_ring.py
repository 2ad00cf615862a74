"""A ring of eight devices gives the loss of one device, in the memory of one shard."""

import functools
import json
import re

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from rll_jax import loss
from tests.helpers import oracle
from tests.helpers.loss_batches import HYPER, KINDS, batch, close, compiled
from tests.helpers.paths import SHARED

DEVICES, ROWS = 8, P("a")
SHARP = {**HYPER, "alpha": 1.5, "temperature_pos": 200.0, "temperature_neg": 200.0}
CAFFE = {"pair_term": "squared", "query_weighting": "mass"}
VARIANTS = {
    "default": {},
    "both ends": {"gallery_gradient": True},
    "mass": CAFFE,
    "weights": {"query_weighting": "mass", "weight_gradient": True},
    "all gradients": {**CAFFE, "gallery_gradient": True, "weight_gradient": True},
}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@pytest.fixture(scope="module", autouse=True)
def eight():
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices, found {jax.device_count()}: JAX_NUM_CPU_DEVICES=8")


def on_mesh(x, shape=(DEVICES,), spec=ROWS, kind=AxisType.Auto):
    mesh = jax.make_mesh(
        shape,
        ("a", "b")[: len(shape)],
        axis_types=(kind,) * len(shape),
        devices=jax.devices()[: np.prod(shape)],
    )
    return jax.device_put(x, NamedSharding(mesh, spec))


def same(actual, expected, rtol):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape
        close(a, e, rtol)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_loops_in_float64(variant):
    options = VARIANTS[variant]
    with jax.enable_x64(True):
        run = compiled(block_size=2, gather="ring", **options)  # of 3 rows on a device
        for kind in KINDS:
            x, labels, where = batch(kind)
            for hyper in (HYPER, SHARP):
                expected = oracle.ranked_list_loss(
                    np.where(where[:, None], x, 0),
                    labels,
                    where=where,
                    **hyper,
                    **VARIANTS[variant],
                )
                rows = on_mesh(np.pad(x, [(0, 2), (0, 0)]))
                arrays = {"labels": np.pad(labels, (0, 2)), "where": np.pad(where, (0, 2))}
                value, (gradient, _) = run(rows, None, hyper, arrays)
                close(value, expected.loss, 1e-9)
                scale = np.abs(expected.gradient).max() + 1e-4
                error = np.abs(np.asarray(gradient)[: len(x)] - expected.gradient).max()
                assert error <= 1e-9 * scale, (kind, hyper)


@pytest.mark.parametrize("layer", ["grad_2019", "grad_2020"])
def test_golden_gradients_of_the_authors_layers(layer):
    path = SHARED / "golden" / "rll_caffe.npz"
    if not path.exists():
        pytest.skip(f"no golden gradients at {path}")
    data = np.load(path)
    pair_term = {"grad_2019": "squared", "grad_2020": "distance"}[layer]
    with jax.enable_x64(True):
        run = compiled(pair_term=pair_term, query_weighting="mass", normalize=False, gather="ring")
        for k, case in enumerate(json.loads(str(data["meta"]))):
            x, labels, expected = (data[f"{k}/{name}"] for name in ("embeddings", "labels", layer))
            n, dim = x.shape
            d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
            tolerance = 2e-6 + (2e-6 / d[d > 0].min() if layer == "grad_2020" else 0)
            alpha = case["alpha"] if layer == "grad_2019" else 1 + case["margin"] / 2
            hyper = {name: case[name] for name in ("margin", "temperature_pos", "temperature_neg")}
            arrays = {"labels": np.pad(labels, (0, 96 - n)), "where": np.arange(96) < n}
            rows = on_mesh(np.pad(x, [(0, 96 - n), (0, 64 - dim)]))
            _, (actual, _) = run(rows, None, {**hyper, "alpha": alpha, "balance": 0.5}, arrays)
            error = np.abs(actual[:n, :dim] - expected).max()
            assert error <= tolerance * np.abs(expected).max(), case


def data(n=64, dim=16):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, dim)).astype(np.float32)
    x[10] = x[40]  # of another class: at distance 0
    x[11] = x[3] + 0.1  # near, of another class
    return x, np.arange(n) // 3


@pytest.mark.parametrize(
    "kind, shape, spec",
    [
        (AxisType.Explicit, (8,), P("a")),
        (AxisType.Explicit, (4, 2), P("a", "b")),
        (AxisType.Auto, (4, 2), P("b")),
        (AxisType.Explicit, (1,), P("a")),
    ],
    ids=str,
)
def test_meshes_of_any_axes_in_float32(kind, shape, spec):
    x, labels = data()
    ring = jax.jit(functools.partial(of_both_ends, gather="ring"))
    same(ring(on_mesh(x, shape, spec, kind), labels), of_one_device(), 1e-6)


def of_both_ends(x, labels, **options):
    ranked = functools.partial(
        loss.ranked_list_loss, gallery_gradient=True, block_size=5, **options
    )
    return jax.value_and_grad(lambda x: ranked(x, labels.astype(np.int8)))(x)


@functools.cache
def of_one_device():
    return jax.jit(of_both_ends)(*data())


@pytest.mark.parametrize("mapper", ["pmap", "vmap", "shard_map", "shard_map, no check"])
def test_a_gallery_in_shards_on_a_named_axis(mapper):
    x, labels = data(56)
    bank, bank_labels = data(48)
    bank, bank_labels = bank[::-1] * 2, bank_labels[::-1]
    valid = np.random.default_rng(2).random(48) < 0.7
    valid[:6] = False  # the first device has padding alone

    def value(x, labels, bank, bank_labels, valid, **options):
        return loss.ranked_list_loss(
            x,
            labels,
            gallery=bank,
            gallery_labels=bank_labels.astype(np.uint8),
            gallery_where=valid,
            gallery_gradient=True,
            temperature_pos=3.0,
            **options,
        )

    def gradient(x, labels, bank, *rest, **options):
        return jax.value_and_grad(
            lambda x, bank: value(x, labels, bank, *rest, **options), argnums=(0, 1)
        )(x, bank)

    arrays = (x, labels, bank, bank_labels, valid)
    expected = jax.jit(gradient)(*arrays)
    ring = functools.partial(gradient, axis_name="a", gather="ring")
    if mapper in ("pmap", "vmap"):
        cut = [a.reshape(DEVICES, -1, *a.shape[1:]) for a in arrays]
        run = jax.pmap(ring, "a") if mapper == "pmap" else jax.jit(jax.vmap(ring, axis_name="a"))
        actual, gradients = run(*cut)
        gradients = [g.reshape(-1, g.shape[-1]) / DEVICES for g in gradients]
        return same((actual.mean(), gradients), expected, 1e-6)

    def of_device(*shards):
        return lax.pmean(value(*shards, axis_name="a", gather="ring"), "a")

    mapped = jax.shard_map(
        of_device,
        mesh=jax.make_mesh((DEVICES,), ("a",), axis_types=(AxisType.Auto,)),
        in_specs=(P("a"),) * 5,
        out_specs=P(),
        check_vma=mapper == "shard_map",
    )

    def outside(x, labels, bank, *rest):
        return jax.value_and_grad(lambda x, bank: mapped(x, labels, bank, *rest), (0, 1))(x, bank)

    return same(jax.jit(outside)(*arrays), expected, 1e-6)


def test_within_shard_map_over_one_of_two_axes():
    x, labels = data()
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    rows = jax.device_put(x, NamedSharding(mesh, P("b")))
    row_labels = jax.device_put(labels, NamedSharding(mesh, P("b")))

    def value(x):
        def of_device(x, labels):
            share = loss.ranked_list_loss(x, labels, axis_name="b", gather="ring")
            return lax.pmean(share, "b")

        mapped = jax.shard_map(
            of_device, mesh=mesh, in_specs=(P("b"), P("b")), out_specs=P(), axis_names={"b"}
        )
        return mapped(x, row_labels)

    expected = jax.jit(jax.value_and_grad(loss.ranked_list_loss))(x, labels)
    same(jax.jit(jax.value_and_grad(value))(rows), expected, 1e-6)


@pytest.mark.parametrize("both_ends", [False, True])
def test_the_terms_and_their_gradient(both_ends):
    x, labels = data(61)  # padded to 64
    by_term = np.random.default_rng(1).normal(size=61)

    def step(x, gather):
        def total(x):
            terms = loss.ranked_list_loss_terms(
                x, labels, gallery_gradient=both_ends, weight_gradient=True, gather=gather, **CAFFE
            )
            return jnp.sum(by_term * (terms.positive + terms.weight - 2 * terms.negative)), terms

        return jax.value_and_grad(total, has_aux=True)(x)

    with jax.enable_x64(True):
        x = x.astype(np.float64)
        ring = jax.jit(functools.partial(step, gather="ring"))(on_mesh(x, spec=P()))
        same(ring, jax.jit(functools.partial(step, gather="all"))(x), 1e-9)


def test_two_towers_presets_and_one_device():
    x, labels = data()
    b, labels_b = data(48)
    ring = jax.jit(functools.partial(loss.two_tower_ranked_list_loss, gather="ring"))
    expected = loss.two_tower_ranked_list_loss(x, b, labels, labels_b)
    same(ring(on_mesh(x), b, labels, labels_b), expected, 1e-6)
    both = functools.partial(jax.grad, argnums=(0, 1))
    gradients = both(loss.two_tower_ranked_list_loss)(x, b, labels, labels_b)
    same(jax.jit(both(ring))(on_mesh(x), b, labels, labels_b), gradients, 1e-5)
    assert loss.tpami2020(x, labels, gather="ring") == loss.tpami2020(x, labels)


def test_nan_in_one_shard_is_seen_on_all_devices():
    x, labels = data()
    x[20, 3] = np.nan
    step = jax.jit(jax.value_and_grad(functools.partial(loss.ranked_list_loss, gather="ring")))
    value, gradient = step(on_mesh(x), labels)
    assert np.isnan(value) and np.isnan(gradient).any(axis=1).all()


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_devices_that_count_differently(variant, gather):
    """What each device returns has a gradient of its own, or is the loss of all on each."""
    options = VARIANTS[variant]
    weights = np.array([1.0, 0, 3, 0.5, 2, 1, 1, 0])
    returns_mean = {"weights", "all gradients"} | ({"both ends"} if gather == "ring" else set())

    def share(x, labels, weight):
        value = loss.ranked_list_loss(x, labels, axis_name="a", gather=gather, **options)
        return lax.psum(weight[0] * value, "a") / DEVICES

    def expected(x):
        if variant in returns_mean:
            return weights.mean() * loss.ranked_list_loss(x, labels, **options)
        terms = loss.ranked_list_loss_terms(x, labels, **options)
        by_row = np.repeat(weights, len(labels) // DEVICES)
        return jnp.sum(by_row * terms.weight * (terms.positive + terms.negative) / 2)

    x, labels = data()
    with jax.enable_x64(True):
        x = x.astype(np.float64)
        mesh = on_mesh(x).sharding.mesh
        shares = jax.shard_map(share, mesh=mesh, in_specs=(ROWS,) * 3, out_specs=P())
        actual = jax.jit(jax.value_and_grad(lambda x: shares(x, labels, weights)))(x)
        same(actual, jax.jit(jax.value_and_grad(expected))(x), 1e-9)


@functools.cache
def program(gather, devices=DEVICES, both_ends=False, rows=1024, dim=256):
    """The compiled step with the same number of rows on each device."""
    step = jax.value_and_grad(
        functools.partial(
            loss.ranked_list_loss, gather=gather, gallery_gradient=both_ends, block_size=64
        )
    )
    mesh = jax.make_mesh(
        (devices,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    placed = NamedSharding(mesh, P("a"))
    n = rows * devices
    x = jax.ShapeDtypeStruct((n, dim), jnp.float32, sharding=placed)
    labels = jax.ShapeDtypeStruct((n,), jnp.int32, sharding=placed)
    return jax.jit(step).lower(x, labels).compile()


def test_the_memory_of_a_device_does_not_grow_with_the_number_of_devices():
    few, many, gathered = (
        program(gather, devices, both_ends=True).memory_analysis().temp_size_in_bytes
        for gather, devices in (("ring", 2), ("ring", 8), ("all", 8))
    )
    assert many <= 1.02 * few
    assert many <= 0.5 * gathered


@pytest.mark.parametrize("both_ends", [False, True])
def test_shards_travel_and_nothing_is_gathered(both_ends):
    text = program("ring", both_ends=both_ends).as_text()
    found = re.findall(rf"= (\S+).* ({COLLECTIVES})(?:-start)?\(", text)
    rows = [kind for shape, kind in found if shape.startswith(("f32[1024,256]", "(f32[1024,256]"))]
    # Once for the lists and once for the gradient; the gallery's gradient travels beside it.
    assert rows == ["collective-permute"] * (3 if both_ends else 2)
    kinds = {kind for _, kind in found}
    assert kinds == {"collective-permute", "all-reduce"}  # of the origin and of the loss
