"""The loss of a run, from its options."""
import ast
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np

from rll_jax import loss, losses_baseline

_RANKED_LIST = ("alpha", "margin", "temperature_pos", "temperature_neg", "balance")
_VARIANT = ("pair_term", "query_weighting", "weight_gradient", "gallery_gradient")
LOSSES = {  # by the name for --loss: the function, and the options of a run that it takes as they are
    "ranked_list": (loss.ranked_list_loss, _RANKED_LIST + _VARIANT),
    "pml_ranked_list": (losses_baseline.pml_ranked_list_loss, _RANKED_LIST),
    "contrastive": (losses_baseline.contrastive_loss, ()),
    "triplet": (losses_baseline.triplet_loss, ()),
    "lifted_structure": (losses_baseline.lifted_structure_loss, ()),
    "n_pair": (losses_baseline.n_pair_loss, ()),
    "multi_similarity": (losses_baseline.multi_similarity_loss, ()),
    "proxy_anchor": (losses_baseline.proxy_anchor_loss, ()),
    "nt_xent": (losses_baseline.nt_xent_loss, ()),
    "sup_con": (losses_baseline.sup_con_loss, ()),
}
_WITH_PROXIES = "proxy_anchor"
_NOT_OPTIONS = ("where", "axis_name")


def make(config, train_labels):
    """(embeddings, labels, *, axis_name) -> scalar, as `rll_jax.train.train_step` takes it; with `proxies` where it learns some."""
    function, fields = LOSSES[config.loss]
    options = {name: getattr(config, name) for name in fields} | read_options(config.loss, config.loss_options)
    if not num_proxies(config, train_labels):
        return functools.partial(function, **options)
    classes = np.unique(train_labels)

    def with_proxies(embeddings, labels, *, axis_name=None, proxies):
        return function(embeddings, jnp.searchsorted(classes, labels), proxies, axis_name=axis_name, **options)

    return with_proxies


def num_proxies(config, train_labels) -> int:
    """One for each class of the training images, or 0."""
    return len(np.unique(train_labels)) if config.loss == _WITH_PROXIES else 0


def read_options(name: str, text: str) -> dict:
    """{argument: value} of --loss_options; raises ValueError where the loss has no such option, or does not take that value."""
    function, fields = LOSSES[name]
    known = inspect.signature(function).parameters.values()
    known = [p.name for p in known if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_OPTIONS and not fields]
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or key not in known or key in options:
            expected = f"NAME=VALUE,... of {', '.join(known)}, each once" if known else f"nothing, as --loss={name} has flags of its own"
            raise ValueError(f"--loss_options={text}: expected {expected}, found {part!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((2, 2), np.float32), ((2,), np.int32), ((2, 2), np.float32))]
    try:
        jax.eval_shape(functools.partial(function, **options), *arrays[: 3 if name == _WITH_PROXIES else 2])
    except (ValueError, TypeError) as error:
        raise ValueError(f"--loss_options={text}: {str(error).splitlines()[0]}")
    return options
