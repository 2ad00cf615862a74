"""First derivatives in forward and reverse mode; second ones are right or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rll_jax import loss
from tests.helpers.loss_batches import close

N, D = 24, 8
VARIANTS = {
    "default": {},
    "both ends": {"gallery_gradient": True, "block_size": 7},
    "mass": {"query_weighting": "mass", "pair_term": "squared"},
    "all gradients": {
        "query_weighting": "mass",
        "gallery_gradient": True,
        "weight_gradient": True,
    },
    "not normalised": {"normalize": False},
}
CAFFE_WEIGHTS = {"pair_term": "squared", "query_weighting": "mass", "weight_gradient": True}
BASELINES = {
    "contrastive": loss.contrastive_loss,
    "triplet": loss.triplet_loss,
    "lifted": loss.lifted_structure_loss,
    "n-pair": loss.n_pair_loss,
    "multi-similarity": loss.multi_similarity_loss,
    "nt-xent": loss.nt_xent_loss,
    "sup-con": loss.sup_con_loss,
    "pml": loss.pml_ranked_list_loss,
    "proxy anchor": lambda x, labels: loss.proxy_anchor_loss(
        x, labels, np.random.default_rng(2).normal(size=(N // 3, D))
    ),
}
LOSSES = {
    **{
        name: functools.partial(loss.ranked_list_loss, **options)
        for name, options in VARIANTS.items()
    },
    **BASELINES,
}


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, D)), np.arange(N) // 3, rng.normal(size=(N, D))


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_the_gradient_along_a_direction(name):
    x, labels, direction = data()
    with jax.enable_x64(True):

        def value(x):
            return LOSSES[name](x, labels)

        _, tangent = jax.jit(lambda x: jax.jvp(value, (x,), (direction,)))(x)
        gradient = jax.jit(jax.grad(value))(x)
        close(tangent, np.sum(gradient * direction), 1e-9)


def second_derivatives(gradient, x, direction):
    """The product of the Hessian with a direction, in every order of modes."""

    def along(x):
        return jnp.sum(gradient(x) * direction)

    return {
        "forward over reverse": lambda: jax.jvp(gradient, (x,), (direction,))[1],
        "reverse over reverse": lambda: jax.grad(along)(x),
        "linearised": lambda: jax.linearize(gradient, x)[1](direction),
    }


@pytest.mark.parametrize(
    "name, compiled", [*((name, False) for name in VARIANTS), ("default", True)]
)
def test_a_second_derivative_is_refused_by_name(name, compiled):
    x, labels, direction = data()

    def value(x):
        return LOSSES[name](x, labels)

    gradient = jax.jit(jax.grad(value)) if compiled else jax.grad(value)
    for second in second_derivatives(gradient, x, direction).values():
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            second()
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.hessian(value)(x)


@pytest.mark.parametrize("options", [{"block_size": 7}, CAFFE_WEIGHTS], ids=str)
def test_the_terms_have_forward_mode(options):
    x, labels, direction = data()
    with jax.enable_x64(True):

        def terms(x):
            terms = loss.ranked_list_loss_terms(x, labels, **options)
            return terms.positive, terms.negative, terms.weight

        _, tangents = jax.jit(lambda x: jax.jvp(terms, (x,), (direction,)))(x)
        jacobians = jax.jit(jax.jacrev(terms))(x)
        for tangent, jacobian in zip(tangents, jacobians, strict=True):
            close(tangent, np.sum(jacobian * direction, axis=(1, 2)), 1e-9)
        counts = jax.jvp(lambda x: loss.ranked_list_loss_terms(x, labels)[2], (x,), (direction,))
        assert counts[1].dtype == jax.dtypes.float0
    assert np.abs(tangents[0]).max() > 0


@pytest.mark.parametrize("both_ends", [False, True])
def test_a_second_derivative_of_the_terms_is_refused(both_ends):
    x, labels, direction = data()

    def value(x):
        terms = loss.ranked_list_loss_terms(x, labels, gallery_gradient=both_ends)
        return jnp.sum(terms.positive**2 + terms.negative)

    for second in second_derivatives(jax.grad(value), x, direction).values():
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            second()


@pytest.mark.parametrize("name", ["contrastive", "multi-similarity", "pml"])
def test_the_second_derivatives_of_baselines_are_right(name):
    x, labels, direction = data()
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda x: LOSSES[name](x, labels)))
        step = 1e-6
        expected = gradient(x + step * direction) - gradient(x - step * direction)
        for second in second_derivatives(gradient, x, direction).values():
            close(second(), expected / (2 * step), 1e-5)


def test_the_definition_has_all_derivatives():
    x, labels, direction = data()
    others = ~np.eye(N, dtype=bool)
    with jax.enable_x64(True):

        @jax.jit
        def gradient(x):
            def value(x):
                of_query = functools.partial(
                    loss.ranked_list_loss_of_query,
                    gallery=x,
                    gallery_labels=labels,
                    gallery_gradient=True,
                    weight_gradient=True,
                )
                return jnp.mean(
                    jax.vmap(lambda q, label, where: of_query(q, label, where=where))(
                        x, jnp.asarray(labels), others
                    )
                )

            return jax.grad(value)(x)

        step = 1e-6
        expected = gradient(x + step * direction) - gradient(x - step * direction)
        for second in second_derivatives(gradient, x, direction).values():
            close(second(), expected / (2 * step), 1e-5)


@pytest.mark.parametrize("number", ["alpha", "margin", "temperature_neg", "balance"])
def test_a_number_that_is_differentiated_is_refused_by_name(number):
    x, labels, _ = data()

    def value(number_value, x):
        return loss.ranked_list_loss(x, labels, **{number: number_value})

    with pytest.raises(NotImplementedError, match=f"{number} has no derivative"):
        jax.grad(value)(0.5, x)
    assert np.isfinite(jax.jit(jax.grad(value, argnums=1))(0.5, x)).all()  # traced, a constant
    assert jax.grad(lambda m: value(jax.lax.stop_gradient(m), x) + m)(0.5) == 1


@pytest.mark.parametrize("name", BASELINES)
def test_nan_in_a_valid_row_is_seen_in_baselines(name):
    x, labels, _ = data()
    x[5, 2] = np.nan
    value, gradient = jax.jit(jax.value_and_grad(LOSSES[name]))(x.astype(np.float32), labels)
    assert np.isnan(value) and np.isnan(gradient).any()
