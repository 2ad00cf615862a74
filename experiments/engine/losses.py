"""The loss of a run, from its options."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np

from rll_jax import loss
from rll_jax.loss import baselines

_RANKED_LIST = ("alpha", "margin", "temperature_pos", "temperature_neg", "balance")
_VARIANT = ("pair_term", "query_weighting", "weight_gradient", "gallery_gradient")
LOSSES = {  # by the name for --loss: the function, and the options of a run that it takes as they are
    "ranked_list": (loss.ranked_list_loss, _RANKED_LIST + _VARIANT),
    "pml_ranked_list": (baselines.pml_ranked_list_loss, _RANKED_LIST),
    "contrastive": (baselines.contrastive_loss, ()),
    "triplet": (baselines.triplet_loss, ()),
    "lifted_structure": (baselines.lifted_structure_loss, ()),
    "n_pair": (baselines.n_pair_loss, ()),
    "multi_similarity": (baselines.multi_similarity_loss, ()),
    "proxy_anchor": (baselines.proxy_anchor_loss, ()),
    "nt_xent": (baselines.nt_xent_loss, ()),
    "sup_con": (baselines.sup_con_loss, ()),
}
_WITH_PROXIES = "proxy_anchor"
_NOT_OPTIONS = ("where", "axis_name")
_MAY_BE_NONE = ("epsilon",)


def make(config, train_labels):
    """(embeddings, labels, *, axis_name) -> scalar, as `rll_jax.training.steps.train_step` takes it; with `proxies` where it learns some."""
    function, fields = LOSSES[config.loss]
    options = {name: getattr(config, name) for name in fields} | read_options(
        config.loss, config.loss_options
    )
    if not num_proxies(config, train_labels):
        return functools.partial(function, **options)
    classes = np.unique(train_labels)

    def with_proxies(embeddings, labels, *, axis_name=None, proxies):
        return function(
            embeddings, jnp.searchsorted(classes, labels), proxies, axis_name=axis_name, **options
        )

    return with_proxies


def ignored(config, usual) -> list[str]:
    """Options of the run that are not the usual ones, and that its loss does not take."""
    _, fields = LOSSES[config.loss]
    own = fields + (("proxy_lr_multiplier",) if config.loss == _WITH_PROXIES else ())
    taken = (*_VARIANT, "proxy_lr_multiplier")
    return [name for name in taken if name not in own and getattr(config, name) != usual[name]]


def num_proxies(config, train_labels) -> int:
    """One for each class of the training images, or 0."""
    return len(np.unique(train_labels)) if config.loss == _WITH_PROXIES else 0


def read_options(name: str, text: str) -> dict:
    """{argument: value} of --loss_options; raises ValueError where the loss has no such option, or does not take that value."""
    function, fields = LOSSES[name]
    known = inspect.signature(function).parameters.values()
    usual = {
        p.name: p.default
        for p in known
        if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_OPTIONS and not fields
    }
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or key not in usual or key in options:
            expected = (
                f"NAME=VALUE,... of {', '.join(usual)}, each once"
                if usual
                else f"nothing, as --loss={name} has flags of its own"
            )
            raise ValueError(f"--loss_options={text}: expected {expected}, found {part!r}")
        options[key] = _value(usual[key], key, value, f"--loss_options={text}")
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((2, 2), np.float32), ((2,), np.int32), ((2, 2), np.float32))
    ]
    try:
        jax.eval_shape(
            functools.partial(function, **options), *arrays[: 3 if name == _WITH_PROXIES else 2]
        )
    except ValueError as error:
        raise ValueError(f"--loss_options={text}: {str(error).splitlines()[0]}")
    return options


def _value(usual, key, text, where):
    """The text as a value of the kind of the usual one."""
    if isinstance(usual, str):
        return text
    words = (
        {"true": True, "false": False}
        if isinstance(usual, bool)
        else {"none": None}
        if key in _MAY_BE_NONE
        else {}
    )
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = math.nan if isinstance(usual, bool) else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        expected = (
            "true or false" if isinstance(usual, bool) else "a number" + " or none" * bool(words)
        )
        raise ValueError(f"{where}: {key}: expected {expected}, found {text!r}")
    return value
