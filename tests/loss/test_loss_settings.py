"""The losses under JAX's strict settings and checks, exported, and with numbers of any kind."""

import functools

import jax
from jax import export
from jax.experimental import checkify
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from rll_jax import loss

N, D, CLASSES = 12, 6, 4
LABELS = jnp.arange(N) // 3


def rows(dtype=jnp.float32, seed=0, n=N):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, D)), dtype)


def with_gallery(x, labels, where=None, **options):
    gallery = rows(x.dtype, 1)
    return loss.ranked_list_loss(
        x,
        labels,
        where=where,
        gallery=gallery,
        gallery_labels=LABELS,
        gallery_where=None if where is None else jnp.arange(N) < 9,
        **options,
    )


def sum_of_terms(x, labels, where=None, **options):
    terms = loss.ranked_list_loss_terms(x, labels, where=where, **options)
    return jnp.sum(terms.weight * (terms.positive + terms.negative))


def proxy_anchor(x, labels, where=None):
    return loss.proxy_anchor_loss(x, labels, rows(x.dtype, 2, CLASSES), where=where)


def two_towers(x, labels, where=None):
    b = rows(x.dtype, 3)
    return loss.two_tower_ranked_list_loss(x, b, labels, labels, where_a=where, where_b=where)


def of_query(x, labels, where=None):
    others = jnp.arange(x.shape[0]) > 0
    where = others if where is None else others & where
    return loss.ranked_list_loss_of_query(x[0], labels[0], x, labels, where=where)


ALL_GRADIENTS = {"gallery_gradient": True, "weight_gradient": True}
LOSSES = {
    "cvpr2019": loss.cvpr2019,
    "caffe2019": loss.caffe2019,
    "tpami2020": loss.tpami2020,
    "true derivative": functools.partial(loss.caffe2019, **ALL_GRADIENTS),
    "gallery gradient": functools.partial(loss.cvpr2019, gallery_gradient=True),
    "weight gradient": functools.partial(loss.tpami2020, weight_gradient=True),
    "blocks": functools.partial(loss.cvpr2019, block_size=4),
    "high precision": functools.partial(loss.cvpr2019, precision="high"),
    "plain": functools.partial(loss.cvpr2019, normalize=False),
    "gallery": with_gallery,
    "gallery's gradient": functools.partial(with_gallery, **ALL_GRADIENTS),
    "terms": sum_of_terms,
    "two towers": two_towers,
    "of query": of_query,
    "contrastive": loss.contrastive_loss,
    "triplet semihard": loss.triplet_loss,
    "triplet hard": functools.partial(loss.triplet_loss, mining="hard"),
    "triplet all": functools.partial(loss.triplet_loss, mining="all"),
    "lifted": loss.lifted_structure_loss,
    "n pair": loss.n_pair_loss,
    "n pair plain": functools.partial(loss.n_pair_loss, normalize=False),
    "multi-similarity": loss.multi_similarity_loss,
    "multi-similarity, all pairs": functools.partial(loss.multi_similarity_loss, epsilon=None),
    "proxy anchor": proxy_anchor,
    "nt_xent": loss.nt_xent_loss,
    "sup_con": loss.sup_con_loss,
    "pml": loss.pml_ranked_list_loss,
}
EXPORTED_RUN = {"cvpr2019", "contrastive"}
every_loss = pytest.mark.parametrize("name", LOSSES)


def finite(tree):
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree))


def value_and_gradient(name, where):
    return jax.value_and_grad(lambda x: LOSSES[name](x, LABELS, where=where))


WHERE = jnp.arange(N) != 4


# Compiling a checked program takes seconds: the default suite has three of them.
QUICK = {("cvpr2019", False), ("gallery", True), ("contrastive", True)}
CHECKED = [
    pytest.param(name, masked, marks=() if (name, masked) in QUICK else pytest.mark.slow)
    for name in LOSSES
    for masked in (False, True)
]


@pytest.mark.parametrize("name, masked", CHECKED)
def test_checkify_finds_nothing_in_healthy_rows(name, masked):
    call = value_and_gradient(name, WHERE if masked else None)
    error, out = jax.jit(checkify.checkify(call, errors=checkify.float_checks))(rows())
    error.throw()
    assert finite(out)


@every_loss
def test_strict_promotion(name):
    def both(x, where):
        return value_and_gradient(name, None)(x), value_and_gradient(name, where)(x)

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for dtype in (jnp.float32, jnp.bfloat16):
            for value, gradient in jax.eval_shape(both, rows(dtype), WHERE):
                assert value.dtype == jnp.float32 and gradient.dtype == dtype


@every_loss
def test_export_with_a_symbolic_batch(name):
    (count,) = export.symbolic_shape("n")
    shapes = (
        jax.ShapeDtypeStruct((count, D), jnp.float32),
        jax.ShapeDtypeStruct((count,), jnp.int32),
    )
    call = jax.value_and_grad(LOSSES[name])
    if name == "two towers":  # a row of each tower
        call = jax.value_and_grad(lambda x, y: loss.two_tower_ranked_list_loss(x, x[::-1], y, y))
    exported = export.export(jax.jit(call), platforms=("cpu", "cuda", "tpu"))(*shapes)
    if name not in EXPORTED_RUN:
        return
    program = export.deserialize(exported.serialize())
    arguments = (rows(n=7), jnp.arange(7) // 3)
    for actual, expected in zip(program.call(*arguments), jax.jit(call)(*arguments), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


NUMBERS = {
    "alpha": 1.1,
    "margin": 0.3,
    "temperature_pos": 1.0,
    "temperature_neg": 5.0,
    "balance": 0.4,
}
WITH_NUMBERS = {
    "loss": loss.ranked_list_loss,
    "2020": loss.tpami2020,
    "terms": lambda x, y, **k: loss.ranked_list_loss_terms(x, y, **k).negative.sum(),
    "two towers": lambda x, y, **k: loss.two_tower_ranked_list_loss(x, x[::-1], y, y, **k),
}
each_number = pytest.mark.parametrize("number", NUMBERS)


@each_number
@pytest.mark.parametrize("function", WITH_NUMBERS.values(), ids=WITH_NUMBERS)
def test_a_number_that_is_differentiated_is_named(function, number):
    def of(value, x):
        return function(x, LABELS, **{number: value})

    for derivative in (jax.grad, jax.jacfwd):
        with pytest.raises(NotImplementedError, match=f"^{number} has no derivative"):
            jax.eval_shape(derivative(of), NUMBERS[number], rows())
    # A traced number is well where the rows alone are differentiated.
    jax.eval_shape(jax.grad(of, argnums=1), NUMBERS[number], rows())
    stopped = jax.grad(lambda value: of(jax.lax.stop_gradient(value), rows()))
    assert jax.eval_shape(stopped, NUMBERS[number]).shape == ()


def test_a_variable_of_nnx_serves_as_a_number():
    nnx = pytest.importorskip("flax.nnx", reason="needs flax")
    for kind in (nnx.Param, nnx.Variable):
        value = loss.ranked_list_loss(
            rows(), LABELS, **{name: kind(jnp.float32(v)) for name, v in NUMBERS.items()}
        )
        np.testing.assert_allclose(
            value, loss.ranked_list_loss(rows(), LABELS, **NUMBERS), rtol=1e-6
        )
    margin, expected = nnx.Param(jnp.float32(0.3)), loss.tpami2020(rows(), LABELS, margin=0.3)
    scheduled = nnx.jit(lambda margin: loss.tpami2020(rows(), LABELS, margin=margin))
    np.testing.assert_allclose(scheduled(margin), expected, rtol=1e-6)
    with pytest.raises(NotImplementedError, match="^margin has no derivative"):
        nnx.grad(lambda m: loss.ranked_list_loss(rows(), LABELS, margin=m))(margin)


@pytest.mark.parametrize(
    "labels, message",
    [
        (
            np.array(list("aabb")),
            r"integers: use numpy.unique\(..., return_inverse=True\).*; found <U1",
        ),
        (list("aabb"), r"found list; use numpy.asarray\(labels\)"),
        ([0, 0, 1, 1], r"found list; use numpy.asarray\(labels\)"),
        (jnp.zeros(4), r'or labels.reshape\(-1\).astype\("int32"\); found float32'),
        (np.zeros((4, 1)), r'or labels.reshape\(-1\).astype\("int32"\); found float64'),
    ],
    ids=["strings", "list of strings", "list", "floats", "column of floats"],
)
def test_a_message_about_labels_says_what_to_do(labels, message):
    for function in (loss.ranked_list_loss, loss.contrastive_loss):
        with pytest.raises(TypeError, match=message):
            function(rows(n=4), labels)


@pytest.mark.parametrize("name", ["cvpr2019", "terms", "contrastive"])
def test_explicit_axes_of_one_device(name):
    mesh = jax.make_mesh(
        (1,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1]
    )
    lying = jax.device_put((rows(), LABELS), NamedSharding(mesh, PartitionSpec("data")))
    call = jax.jit(jax.value_and_grad(LOSSES[name]))
    for actual, expected in zip(call(*lying), call(rows(), LABELS), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
