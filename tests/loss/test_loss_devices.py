"""Eight devices give the loss and gradients of the global batch, not the mean of local losses.

Under pmap, shard_map and vmap.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from rll_jax import loss

DEVICES, LOCAL, D = 8, 6, 5
CASES = {
    "default": {},
    "mass": {"query_weighting": "mass", "pair_term": "squared"},
    "all gradients": {"query_weighting": "mass", "gallery_gradient": True, "weight_gradient": True},
    "gallery": {"gallery": True, "gallery_gradient": True},
}


def data():
    """DEVICES * LOCAL rows with classes of 1 to 13, uneven over the devices, and a matrix.

    One device has padding alone. Some rows are near each other or equal.
    """
    rng = np.random.default_rng(0)
    n = DEVICES * LOCAL
    x = rng.normal(size=(n, D))
    x[10] = x[40]
    x[11] = x[3] + 1e-3
    labels = np.sort(np.minimum(rng.geometric(0.2, n), 9))
    where = rng.random(n) < 0.8
    where[2 * LOCAL : 3 * LOCAL] = False
    return x, labels, where, rng.normal(size=(D, D)) / D**0.5


def step(weights, x, labels, where, axis_name=None, gallery=False, **options):
    """Value and gradient of a linear model's loss, averaged over the axis after differentiation."""

    def batch_loss(w):
        z = x @ w
        extra = {}
        if gallery:  # the rows reversed on each device, as its shard of a memory
            extra = {
                "gallery": z[::-1] * 2 + 0.1,
                "gallery_labels": labels[::-1],
                "gallery_where": where[::-1],
            }
        return loss.ranked_list_loss(
            z, labels, where=where, axis_name=axis_name, block_size=4, **extra, **options
        )

    if axis_name is None:
        return jax.value_and_grad(batch_loss)(weights)
    return lax.pmean(jax.value_and_grad(batch_loss)(weights), axis_name)


def everywhere(backend, function, weights, *batch):
    cut = [a.reshape(DEVICES, LOCAL, *a.shape[1:]) for a in batch]
    if backend == "vmap":
        out = jax.jit(jax.vmap(function, in_axes=(None, 0, 0, 0), axis_name="batch"))(weights, *cut)
        return jax.tree.map(lambda a: a[0], out)

    def varying(w, *b):
        return function(lax.pcast(w, "batch", to="varying"), *b)

    if backend == "pmap":
        return jax.pmap(varying, "batch", in_axes=(None, 0, 0, 0), out_axes=None)(weights, *cut)
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("batch",))
    specs = {"mesh": mesh, "in_specs": (P(), P("batch"), P("batch"), P("batch")), "out_specs": P()}
    return jax.jit(jax.shard_map(varying, check_vma=backend.endswith("vma"), **specs))(
        weights, *batch
    )


@pytest.fixture(scope="module", autouse=True)
def eight():
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices, found {jax.device_count()}: JAX_NUM_CPU_DEVICES=8")


@pytest.mark.parametrize(
    "case, backend",
    [
        *((case, backend) for case in CASES for backend in ("shard_map vma", "vmap")),
        *(("all gradients", backend) for backend in ("pmap", "shard_map")),
    ],
)
def test_equals_one_device(case, backend):
    options = CASES[case]
    x, labels, where, weights = data()
    with jax.enable_x64(True):
        value, gradient = jax.jit(lambda *a: step(*a, **options))(weights, x, labels, where)
        actual = everywhere(
            backend, lambda *a: step(*a, axis_name="batch", **options), weights, x, labels, where
        )
    np.testing.assert_allclose(actual[0], value, rtol=1e-9)
    np.testing.assert_allclose(actual[1], gradient, rtol=0, atol=1e-9 * np.abs(gradient).max())


@pytest.mark.parametrize("backend", ["pmap", "shard_map vma"])
def test_equals_one_device_in_float32(backend):
    x, labels, where, weights = data()
    x, weights = x.astype(np.float32), weights.astype(np.float32)
    value, gradient = jax.jit(step)(weights, x, labels, where)
    actual = everywhere(backend, lambda *a: step(*a, axis_name="batch"), weights, x, labels, where)
    np.testing.assert_allclose(actual[0], value, rtol=1e-6)
    np.testing.assert_allclose(actual[1], gradient, rtol=0, atol=2e-6 * np.abs(gradient).max())


def test_differs_from_the_mean_of_local_losses():
    x, labels, where, weights = data()
    with jax.enable_x64(True):
        value, gradient = jax.jit(step)(weights, x, labels, where)

        def local(weights, x, labels, where):
            def batch_loss(w):
                return loss.ranked_list_loss(x @ w, labels, where=where)

            return lax.pmean(jax.value_and_grad(batch_loss)(weights), "batch")

        for backend in ("pmap", "shard_map vma"):  # the loss without axis_name inside them, too
            actual = everywhere(backend, local, weights, x, labels, where)
            assert abs(actual[0] - value) > 0.1 * value
            assert np.abs(actual[1] - gradient).max() > 0.1 * np.abs(gradient).max()


def test_equal_rows_on_two_devices_are_at_distance_0():
    x, labels, where, weights = data()
    x = np.tile(x[:LOCAL], (DEVICES, 1)).astype(np.float32)
    labels = np.arange(len(x))  # of other classes: the hardest negatives, and without a direction

    def local(weights, x, labels, where):
        def batch_loss(x):
            return loss.ranked_list_loss(x, labels, axis_name="batch", temperature_neg=200.0)

        value, gradient = jax.value_and_grad(batch_loss)(x)
        return lax.pmean(value, "batch"), lax.pmean(jnp.abs(gradient).max(), "batch")

    for backend in ("shard_map vma", "vmap"):
        value, largest = everywhere(backend, local, weights, x, labels, where)
        np.testing.assert_allclose(value, 0.5 * 1.2, rtol=1e-6)
        assert largest == 0


def test_the_terms_weights_are_global():
    x, labels, where, weights = data()
    with jax.enable_x64(True):
        value, _ = jax.jit(lambda *a: step(*a, query_weighting="mass"))(weights, x, labels, where)

        def local(weights, x, labels, where):
            t = loss.ranked_list_loss_terms(
                x @ weights, labels, where=where, axis_name="batch", query_weighting="mass"
            )
            return lax.psum(jnp.sum(t.weight * (t.positive + t.negative) / 2), "batch")

        np.testing.assert_allclose(
            everywhere("pmap", local, weights, x, labels, where), value, rtol=1e-9
        )
