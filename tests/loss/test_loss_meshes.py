"""In plain jit on a mesh of eight devices, whatever its axes, the loss is that of one device.

The work is divided: no device computes all pairs, and no collective carries them.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from rll_jax import loss

DEVICES, N, D = 8, 64, 16
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
LAYOUTS = {
    "one axis": ((8,), ("a",), P("a")),
    "rows over two axes": ((4, 2), ("a", "b"), P(("a", "b"))),
    "rows and dimensions": ((4, 2), ("a", "b"), P("a", "b")),
    "one of two axes": ((4, 2), ("a", "b"), P("b")),
    "replicated": ((2, 4), ("a", "b"), P()),
}
VARIANTS = {
    "blocks": {"block_size": 3},
    "both ends": {"gallery_gradient": True, "block_size": 3},
    "all gradients": {
        "query_weighting": "mass",
        "pair_term": "squared",
        "gallery_gradient": True,
        "weight_gradient": True,
    },
}


@pytest.fixture(scope="module", autouse=True)
def eight():
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices, found {jax.device_count()}: JAX_NUM_CPU_DEVICES=8")


def data(n=N):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, D)).astype(np.float32)
    x[10] = x[40]  # of another class: at distance 0
    x[11] = x[3] + 0.1  # near, of another class
    return x, np.arange(n) // 3


def on_mesh(kind, layout, *arrays):
    """The mesh, and the arrays on it: the first as the layout says, the others by its rows."""
    shape, names, spec = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names))
    specs = [spec] + [P(*spec[:1])] * (len(arrays) - 1)
    return mesh, *(
        jax.device_put(array, NamedSharding(mesh, s))
        for array, s in zip(arrays, specs, strict=True)
    )


def check(actual, expected):
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    scale = np.abs(expected[1]).max()
    np.testing.assert_allclose(actual[1], expected[1], rtol=0, atol=3e-6 * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layout, variant",
    [
        *((layout, "both ends") for layout in LAYOUTS),
        *(("one axis", variant) for variant in ("blocks", "all gradients")),
    ],
)
def test_equals_one_device(kind, layout, variant):
    x, labels = data()
    step = jax.jit(
        jax.value_and_grad(functools.partial(loss.ranked_list_loss, **VARIANTS[variant]))
    )
    _, rows, row_labels = on_mesh(kind, layout, x, labels)
    check(step(rows, row_labels), step(x, labels))


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_context_of_the_mesh(kind):
    x, labels = data()
    where = np.arange(N) < 60
    step = jax.value_and_grad(lambda x: loss.caffe2019(x, labels, where=where))
    mesh, rows = on_mesh(kind, "one axis", x)
    expected = step(x)
    with jax.set_mesh(mesh):
        check(jax.jit(step)(rows), expected)
        check(step(rows), expected)  # not compiled
    if kind == "automatic":  # JAX itself needs the context of explicit axes outside jit
        check(step(rows), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_divide_are_padded(kind):
    x, labels = data(61)
    mesh, rows = on_mesh(kind, "replicated", x)
    terms = jax.jit(loss.ranked_list_loss_terms)(rows, labels)
    for actual, expected in zip(terms, loss.ranked_list_loss_terms(x, labels), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    step = jax.jit(jax.value_and_grad(loss.ranked_list_loss))
    check(step(rows, labels), step(x, labels))


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_gallery_is_divided_too(kind):
    x, labels = data()
    bank, bank_labels = data(45)

    mesh, rows = on_mesh(kind, "one axis", x)
    everywhere = jax.device_put(bank, NamedSharding(mesh, P()))

    def ranked(x, bank):
        return loss.ranked_list_loss(
            x, labels, gallery=bank, gallery_labels=bank_labels, gallery_gradient=True
        )

    for argnum in (0, 1):
        step = jax.jit(jax.value_and_grad(ranked, argnums=argnum))
        check(step(rows, everywhere), step(x, bank))
    towers = jax.jit(
        jax.value_and_grad(
            lambda x, b: loss.two_tower_ranked_list_loss(x, b, labels, bank_labels), argnums=0
        )
    )
    check(towers(rows, everywhere), towers(x, bank))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("both_ends", [False, True])
def test_the_work_is_divided_and_few_collectives_are_needed(kind, both_ends):
    n = 1024
    x, labels = data(n)
    step = jax.value_and_grad(
        functools.partial(loss.ranked_list_loss, gallery_gradient=both_ends, block_size=n)
    )
    _, rows, row_labels = on_mesh(kind, "one axis", x, labels)
    one = jax.jit(step).lower(x, labels).compile()
    all_devices = jax.jit(step).lower(rows, row_labels).compile()
    found = collections.Counter(
        re.findall(rf" ({COLLECTIVES})(?:-start)?\(", all_devices.as_text())
    )
    # The rows and their labels are gathered, the shares summed, the gallery's gradient scattered.
    assert found["all-gather"] == 2 and found["all-reduce"] == 1
    assert found.total() == (4 if both_ends else 3)
    flops = [program.cost_analysis()["flops"] for program in (all_devices, one)]
    assert flops[0] <= 1.1 * flops[1] / DEVICES


BASELINES = {
    "contrastive": loss.contrastive_loss,
    "triplet": functools.partial(loss.triplet_loss, mining="hard"),
    "lifted": loss.lifted_structure_loss,
    "n-pair": loss.n_pair_loss,
    "multi-similarity": loss.multi_similarity_loss,
    "nt-xent": loss.nt_xent_loss,
    "sup-con": loss.sup_con_loss,
    "pml": loss.pml_ranked_list_loss,
    "proxy anchor": lambda x, labels: loss.proxy_anchor_loss(
        x, labels, jnp.cos(jnp.arange(22 * D).reshape(22, D))
    ),
}


@pytest.mark.parametrize(
    "kind, name", [*(("explicit", name) for name in BASELINES), ("automatic", "contrastive")]
)
def test_baselines_equal_one_device_and_divide_the_work(kind, name):
    x, labels = data()
    step = jax.jit(jax.value_and_grad(BASELINES[name]))
    _, rows, row_labels = on_mesh(kind, "rows and dimensions", x, labels)
    check(step(rows, row_labels), step(x, labels))
    flops = [
        step.lower(*args).compile().cost_analysis()["flops"]
        for args in ((rows, row_labels), (x, labels))
    ]
    # Proxies lie on every device in whole.
    slack = 1.4 if name == "proxy anchor" else 1.25
    assert flops[0] <= slack * flops[1] / DEVICES


CUBIC = {
    "semihard triplets": loss.triplet_loss,
    "all triplets": functools.partial(loss.triplet_loss, mining="all"),
    "smooth-ap": loss.smooth_ap_loss,
    "recall at k": loss.recall_at_k_loss,
}


@pytest.mark.parametrize(
    "kind, name", [*(("explicit", name) for name in CUBIC), ("automatic", "smooth-ap")]
)
def test_losses_of_triplets_divide_them(kind, name):
    x, labels = data()
    step = jax.jit(jax.value_and_grad(CUBIC[name]))
    _, rows, row_labels = on_mesh(kind, "rows and dimensions", x, labels)
    check(step(rows, row_labels), step(x, labels))
    divided, one = (step.lower(*args).compile() for args in ((rows, row_labels), (x, labels)))

    def rounds(program):
        return re.findall(r'known_trip_count":\{"n":"(\d+)"', program.as_text())

    # A loop takes one query of N x N comparisons a round, once for the value and once for the
    # gradient. The count of FLOPs has one round of each loop.
    assert rounds(one) == [str(N)] * 2 and rounds(divided) == [str(N // DEVICES)] * 2
    assert divided.cost_analysis()["flops"] <= one.cost_analysis()["flops"]
    sizes = re.findall(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", divided.as_text())
    shapes = [shape for result in sizes for shape in re.findall(r"\[([\d,]+)\]", result)]
    assert shapes and max(np.prod([int(k) for k in s.split(",")]) for s in shapes) <= N * D


@pytest.mark.parametrize("kind", ["explicit", "automatic"])
def test_losses_of_triplets_are_differentiated_by_their_numbers(kind):
    x, labels = data()

    def value(x, number):
        of_triplets = loss.triplet_loss(x, labels, margin=number)
        of_ranks = loss.smooth_ap_loss(x, labels, temperature=number)
        return of_triplets + of_ranks + loss.recall_at_k_loss(x, labels, temperature=number)

    step = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
    number = jnp.float32(0.1)
    actual = step(on_mesh(kind, "rows and dimensions", x)[1], number)
    expected = step(x, number)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=3e-6 * np.abs(e).max())


def test_losses_of_triplets_take_rows_that_do_not_divide():
    x, labels = data(61)
    bank, bank_labels = data(45)

    def value(x):
        options = {"gallery": bank, "gallery_labels": bank_labels}
        return loss.triplet_loss(x, labels, **options) + loss.recall_at_k_loss(x, labels)

    step = jax.jit(jax.value_and_grad(value))
    check(step(on_mesh("explicit", "replicated", x)[1]), step(x))


@pytest.mark.parametrize(
    "spec, batch_loss",
    [
        *((spec, loss.ranked_list_loss) for spec in (P("b"), P("b", "a"), P(("b", "a")))),
        (P("b", "a"), functools.partial(loss.ranked_list_loss, gallery_gradient=True)),
        (P("b", "a"), loss.contrastive_loss),
    ],
)
def test_within_shard_map_over_one_of_two_axes(spec, batch_loss):
    x, labels = data()
    mesh, row_labels = on_mesh("explicit", "one of two axes", labels)
    rows = jax.device_put(x, NamedSharding(mesh, spec))

    def value(x):
        def of_device(x, labels):
            return jax.lax.pmean(batch_loss(x, labels, axis_name="b"), "b")

        mapped = jax.shard_map(
            of_device, mesh=mesh, in_specs=(P("b"), P("b")), out_specs=P(), axis_names={"b"}
        )
        return mapped(x, row_labels)

    actual = jax.jit(jax.value_and_grad(value))(rows)
    check(actual, jax.jit(jax.value_and_grad(batch_loss))(x, labels))


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_gradient_outside_shard_map_needs_nothing_else(check_vma):
    x, labels = data()
    weights = np.random.default_rng(1).normal(size=(D, D)).astype(np.float32)
    mesh = jax.make_mesh((DEVICES,), ("a",), axis_types=(AxisType.Auto,))

    def batch_loss(weights, x, labels):
        def of_device(weights, x, labels):
            return jax.lax.pmean(
                loss.ranked_list_loss(x @ weights, labels, axis_name="a", gallery_gradient=True),
                "a",
            )

        return jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(P(), P("a"), P("a")),
            out_specs=P(),
            check_vma=check_vma,
        )(weights, x, labels)

    def one_device(weights, x, labels):
        return loss.ranked_list_loss(x @ weights, labels, gallery_gradient=True)

    actual = jax.jit(jax.value_and_grad(batch_loss))(weights, x, labels)
    check(actual, jax.jit(jax.value_and_grad(one_device))(weights, x, labels))


def test_the_same_rows_on_all_devices_are_refused():
    x, labels = data()
    mesh = jax.make_mesh((DEVICES,), ("a",), axis_types=(AxisType.Auto,))

    def of_device(x, labels):
        return jax.lax.pmean(loss.ranked_list_loss(x, labels, axis_name="a"), "a")

    with pytest.raises(ValueError, match="the same on all devices of axis a"):
        jax.shard_map(of_device, mesh=mesh, in_specs=(P(), P()), out_specs=P())(x, labels)
