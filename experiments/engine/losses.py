"""The losses by the names of --loss, and their options."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import inspect
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.engine.options import Section, option
from rll_jax import loss, typing


class LossEntry(NamedTuple):
    """What the commands know of a loss.

    Attributes:
      function: (embeddings, labels, *, axis_name, ...) -> scalar, see `rll_jax.typing.Loss`.
      flags: the options of `LossOptions` that the function takes under their names. Without any,
        --loss_options sets the function's keyword arguments.
      proxies: whether the function takes proxies to be learnt, one per training class, as its
        third argument, and labels from 0 to the number of classes. Where it has an option
        `centers_per_class`, there are so many per class.
    """

    function: Callable[..., jax.Array]
    flags: tuple[str, ...] = ()
    proxies: bool = False


_RANKED_LIST = ("alpha", "margin", "temperature_pos", "temperature_neg", "balance")
_VARIANT = ("pair_term", "query_weighting", "weight_gradient", "gallery_gradient")
LOSSES = {
    "ranked_list": LossEntry(loss.ranked_list_loss, (*_RANKED_LIST, *_VARIANT)),
    "pml_ranked_list": LossEntry(loss.pml_ranked_list_loss, _RANKED_LIST),
    "contrastive": LossEntry(loss.contrastive_loss),
    "triplet": LossEntry(loss.triplet_loss),
    "lifted_structure": LossEntry(loss.lifted_structure_loss),
    "n_pair": LossEntry(loss.n_pair_loss),
    "multi_similarity": LossEntry(loss.multi_similarity_loss),
    "proxy_anchor": LossEntry(loss.proxy_anchor_loss, proxies=True),
    "nt_xent": LossEntry(loss.nt_xent_loss),
    "sup_con": LossEntry(loss.sup_con_loss),
    "circle": LossEntry(loss.circle_loss),
    "arcface": LossEntry(loss.arcface_loss, proxies=True),
    "soft_triple": LossEntry(loss.soft_triple_loss, proxies=True),
    "smooth_ap": LossEntry(loss.smooth_ap_loss),
    "recall_at_k": LossEntry(loss.recall_at_k_loss),
}
_NOT_OPTIONS = ("where", "gallery", "gallery_labels", "gallery_where", "axis_name")
_MAY_BE_NONE = ("epsilon", "k_temperatures")
_LISTS = ("ks", "k_temperatures")
_CENTERS = "centers_per_class"
_DEFAULTS = inspect.signature(loss.ranked_list_loss).parameters


def _default(name: str) -> Any:
    return _DEFAULTS[name].default


@dataclasses.dataclass(frozen=True)
class LossOptions(Section):
    """What is minimised."""

    title: ClassVar[str] = "Loss"

    loss: str = option(
        "ranked_list",
        "The loss that trains the network. The flags of this section set ranked_list and "
        "pml_ranked_list; --loss_options sets the other losses.",
        choices=tuple(LOSSES),
        main=True,
    )
    loss_options: str = option(
        "",
        "Keyword arguments of another --loss, such as margin=0.1,mining=hard or ks=1+2+4. "
        "rll_jax/loss/README.md says which file has their meaning.",
    )
    proxy_lr_multiplier: float = option(
        1.0,
        "With --loss=proxy_anchor, arcface or soft_triple: the factor of the learning rate of the "
        "proxies.",
        low=0,
    )
    alpha: float = option(
        _default("alpha"),
        "The negatives' boundary, a distance above 0 and up to 2: nearer negatives are pushed out.",
        low=1e-6,
        high=2,
        main=True,
    )
    margin: float = option(
        _default("margin"),
        "The margin between the boundaries, a distance: positives beyond alpha - margin are "
        "pulled in.",
        low=0,
        main=True,
    )
    temperature_pos: float = option(
        _default("temperature_pos"),
        "T_p, the temperature of the positives' weights. 0 treats all positives alike.",
        low=0,
    )
    temperature_neg: float = option(
        _default("temperature_neg"),
        "T_n, the temperature of the negatives' weights. The larger, the more the hardest "
        "negatives count.",
        low=0,
        main=True,
    )
    balance: float = option(
        _default("balance"),
        "The share of the negative term, 0 to 1: lambda / (1 + lambda) of the CVPR paper.",
        low=0,
        high=1,
    )
    pair_term: str = option(
        _default("pair_term"),
        "The hinge of a pair: on the distance, or on half of its square (the 2019 layer).",
        choices=("distance", "squared"),
    )
    query_weighting: str = option(
        _default("query_weighting"),
        "The weight of a query: the same for all, or the mass of its pairs' weights (the released "
        "layers).",
        choices=("uniform", "mass"),
    )
    weight_gradient: bool = option(
        _default("weight_gradient"),
        "Differentiate the pairs' weights too, as other ports do. The paper holds them constant.",
    )
    gallery_gradient: bool = option(
        _default("gallery_gradient"),
        "Move the gallery of a query too. The paper's code moves the query alone.",
    )
    memory_size: int = option(
        0,
        "The number of most recent embeddings of each level, this batch's included, that the loss "
        "ranks instead of the batch alone (cross-batch memory). Those of earlier batches are "
        "constants. 0: no memory.",
        low=0,
    )

    def check(self) -> None:
        """See `Section.check`."""
        if not self.margin <= self.alpha:
            raise ValueError(f"--margin={self.margin} must not be above --alpha={self.alpha}")
        read_loss_options(self.loss, self.loss_options)
        self._check_all_are_used()
        if self.memory_size and self.loss != "ranked_list":
            raise ValueError(
                f"--memory_size={self.memory_size} goes with --loss=ranked_list, not {self.loss}"
            )

    def _check_all_are_used(self) -> None:
        used = [*self.entry.flags, *(["proxy_lr_multiplier"] if self.entry.proxies else [])]
        for name in (*_VARIANT, "proxy_lr_multiplier"):
            if name not in used and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"--{name} does nothing with --loss={self.loss}: leave it out")

    @property
    def entry(self) -> LossEntry:
        """The loss's entry in `LOSSES`."""
        return LOSSES[self.loss]


def make_loss(options: LossOptions, train_labels: np.ndarray) -> typing.Loss:
    """Returns the loss for `train_step`, which passes `proxies` too where the loss learns some."""
    function = options.entry.function
    arguments = {name: getattr(options, name) for name in options.entry.flags}
    arguments |= read_loss_options(options.loss, options.loss_options)
    if not options.entry.proxies:
        return functools.partial(function, **arguments)
    classes = np.unique(train_labels)

    def with_proxies(
        embeddings: jax.Array,
        labels: jax.Array,
        *,
        axis_name: str | None = None,
        proxies: jax.Array,
    ) -> jax.Array:
        numbered = jnp.searchsorted(classes, labels)
        return function(embeddings, numbered, proxies, axis_name=axis_name, **arguments)

    return with_proxies  # pyright: ignore[reportReturnType] (train_step passes the proxies)


def num_proxies(options: LossOptions, train_labels: np.ndarray) -> int:
    """Returns the number of proxies to learn: one or some per training class, or 0."""
    if not options.entry.proxies:
        return 0
    arguments = read_loss_options(options.loss, options.loss_options)
    return len(np.unique(train_labels)) * _proxies_per_class(options.entry, arguments)


def _proxies_per_class(entry: LossEntry, arguments: Mapping[str, Any]) -> int:
    """Returns the number of proxies that the loss learns for each class."""
    return int(arguments.get(_CENTERS, _keyword_defaults(entry).get(_CENTERS, 1)))


def read_loss_options(name: str, text: str) -> dict[str, Any]:
    """Returns {argument: value} of --loss_options.

    Raises:
      ValueError: the loss has no such option, or does not take that value.
    """
    defaults = _keyword_defaults(LOSSES[name])
    arguments = {}
    for part in filter(None, text.split(",")):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or key not in defaults or key in arguments:
            expected = f"nothing, as --loss={name} has flags of its own"
            if defaults:
                expected = f"NAME=VALUE,... of {', '.join(defaults)}, each once"
            raise ValueError(f"--loss_options={text}: expected {expected}, found {part!r}")
        arguments[key] = _parse(defaults[key], key, value, f"--loss_options={text}")
    try:
        _trace(LOSSES[name], arguments)
    except ValueError as error:
        raise ValueError(f"--loss_options={text}: {str(error).splitlines()[0]}") from error
    return arguments


def _keyword_defaults(entry: LossEntry) -> dict[str, Any]:
    """Returns the keyword arguments that --loss_options may set, with their defaults."""
    if entry.flags:
        return {}
    parameters = inspect.signature(entry.function).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in _NOT_OPTIONS
    }


def _trace(entry: LossEntry, arguments: Mapping[str, Any]) -> None:
    """Has the loss itself check its arguments."""
    embeddings = jax.ShapeDtypeStruct((2, 2), np.float32)
    labels = jax.ShapeDtypeStruct((2,), np.int32)
    count = max(2 * _proxies_per_class(entry, arguments), 1)  # the loss refuses less than one
    proxies = [jax.ShapeDtypeStruct((count, 2), np.float32)] if entry.proxies else []
    jax.eval_shape(functools.partial(entry.function, **arguments), embeddings, labels, *proxies)


def _parse(default: Any, key: str, text: str, where: str) -> Any:
    """Returns the text as a value of the default's type."""
    if isinstance(default, str):
        return text
    words: dict[str, Any] = {"none": None} if key in _MAY_BE_NONE else {}
    if isinstance(default, bool):
        words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    whole = key == "ks" or (isinstance(default, int) and not isinstance(default, bool))
    try:
        numbers = [float(part) for part in (text.split("+") if key in _LISTS else [text])]
    except ValueError:
        numbers = [math.nan]
    fits = all(math.isfinite(number) and not (whole and number % 1) for number in numbers)
    if isinstance(default, bool) or not fits:
        expected = "a whole number" if whole else "a number"
        if key in _LISTS:
            expected = f"{'whole ' if whole else ''}numbers with + between"
        expected += " or none" if words else ""
        if isinstance(default, bool):
            expected = "true or false"
        raise ValueError(f"{where}: {key}: expected {expected}, found {text!r}")
    values = tuple(int(number) if whole else number for number in numbers)
    return values if key in _LISTS else values[0]
