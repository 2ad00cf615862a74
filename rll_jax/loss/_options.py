"""The options of Ranked List Loss: their types, their defaults and their checks.

Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

from collections.abc import Hashable
import math
from typing import Any, Final, Literal, NamedTuple, TypedDict

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

PairTerm = Literal["distance", "squared"]
QueryWeighting = Literal["uniform", "mass"]
Precision = Literal["highest", "high"]
Gather = Literal["all", "ring"]

# The defaults of every signature: the settings of the CVPR 2019 paper.
ALPHA: Final = 1.2
MARGIN: Final = 0.4
TEMPERATURE_POS: Final = 0.0
TEMPERATURE_NEG: Final = 10.0
BALANCE: Final = 0.5
PAIR_TERM: Final = "distance"
QUERY_WEIGHTING: Final = "uniform"
GALLERY_GRADIENT: Final = False
WEIGHT_GRADIENT: Final = False
NORMALIZE: Final = True
PRECISION: Final = "highest"
GATHER: Final = "all"


_NUMBER_TYPES: tuple[type, ...] = (int, float, np.number, np.ndarray, jax.Array)


class HyperParameters(NamedTuple):
    """The numbers of the loss as a caller passes them. A number may be traced."""

    alpha: ArrayLike
    margin: ArrayLike
    temperature_pos: ArrayLike
    temperature_neg: ArrayLike
    balance: ArrayLike


class Variant(NamedTuple):
    """The choices in which the published variants and the ports of the loss differ."""

    pair_term: PairTerm
    query_weighting: QueryWeighting
    gallery_gradient: bool
    weight_gradient: bool


class Options(NamedTuple):
    """What is known when tracing."""

    variant: Variant
    normalize: bool
    block_size: int | None
    precision: Precision
    gather: Gather


class OverridesExceptMargin(TypedDict, total=False):
    """The keyword arguments of `ranked_list_loss`, each optional, without `margin`."""

    alpha: ArrayLike
    temperature_pos: ArrayLike
    temperature_neg: ArrayLike
    balance: ArrayLike
    pair_term: PairTerm
    query_weighting: QueryWeighting
    gallery_gradient: bool
    weight_gradient: bool
    normalize: bool
    where: jax.Array | np.ndarray | None
    gallery: jax.Array | np.ndarray | None
    gallery_labels: jax.Array | np.ndarray | None
    gallery_where: jax.Array | np.ndarray | None
    axis_name: Hashable | None
    block_size: int | None
    precision: Precision
    gather: Gather


class Overrides(OverridesExceptMargin, total=False):
    """The keyword arguments of `ranked_list_loss`, each optional."""

    margin: ArrayLike


def positive_boundary(alpha: Any, margin: Any) -> Any:
    """Returns alpha_P = alpha - margin, rounded as these two numbers, traced or not, round."""
    return alpha - margin


def check_options(hyper: HyperParameters, options: Options) -> None:
    """Checks all arguments but the arrays. Traced numbers have no value yet and are not checked.

    Raises:
      TypeError: a number is not real, or `block_size` is not an integer.
      ValueError: a number is not a scalar or is out of range, or a choice is unknown.
    """
    variant, precision, gather = options.variant, options.precision, options.gather
    _check_hyper_parameters(hyper)
    if variant.pair_term not in ("distance", "squared"):
        raise ValueError(
            f"pair_term: found {variant.pair_term!r}, expected 'distance' or 'squared'"
        )
    if variant.query_weighting not in ("uniform", "mass"):
        raise ValueError(
            f"query_weighting: found {variant.query_weighting!r}, expected 'uniform' or 'mass'"
        )
    _check_block_size(options.block_size)
    if precision not in ("highest", "high"):
        raise ValueError(f"precision: found {precision!r}, expected 'highest' or 'high'")
    if gather not in ("all", "ring"):
        raise ValueError(f"gather: found {gather!r}, expected 'all' or 'ring'")


def _check_hyper_parameters(hyper: HyperParameters) -> None:
    """Checks the five numbers in the order of the signature."""
    alpha = _check_number("alpha", hyper.alpha, 0, 2, "0 < alpha <= 2", exclude_low=True)
    limit = math.inf if alpha is None else alpha
    # A margin equal to alpha may be above it by rounding, where one of the two was a float32.
    rounded_limit = limit * (1 + 1e-6)
    _check_number("margin", hyper.margin, 0, rounded_limit, f"0 <= margin <= alpha = {limit}")
    for name, temperature in (
        ("temperature_pos", hyper.temperature_pos),
        ("temperature_neg", hyper.temperature_neg),
    ):
        _check_number(name, temperature, 0, 1e30, f"{name} >= 0 and at most 1e30")
    _check_number("balance", hyper.balance, 0, 1, "0 <= balance <= 1")


def _check_number(
    name: str, value: Any, low: float, high: float, expected: str, *, exclude_low: bool = False
) -> float | None:
    """Returns a real scalar between `low` and `high` as a float, or None for a traced one."""
    if not _is_real(value):
        raise TypeError(
            f"{name} must be a real number: found {type(value).__name__}, expected {expected}"
        )
    if np.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar: found shape {np.shape(value)}, expected ()")
    if isinstance(value, Tracer):
        return None
    number = float(value)
    if not (low <= number <= high) or (exclude_low and number == low):
        raise ValueError(f"{name} out of range: found {number}, expected {expected}")
    return number


def as_number(value: Any) -> Any:
    """Returns the array of an object that holds one, such as flax.nnx.Param; otherwise `value`."""
    if isinstance(value, _NUMBER_TYPES) or not hasattr(value, "__jax_array__"):
        return value
    return value.__jax_array__()


def _is_real(value: Any) -> bool:
    """Returns whether a value is a real number or an array of real numbers. A bool is not."""
    if not isinstance(value, _NUMBER_TYPES) or np.iscomplexobj(value):
        return False
    return not jnp.issubdtype(jnp.result_type(value), jnp.bool_)


def _check_block_size(block_size: object) -> None:
    """Checks that the number of rows in a block is None or a positive integer."""
    if block_size is None:
        return
    if isinstance(block_size, bool) or not isinstance(block_size, (int, np.integer)):
        raise TypeError(f"block_size must be an integer: found {type(block_size).__name__}")
    if block_size < 1:
        raise ValueError(f"block_size out of range: found {block_size}, expected block_size >= 1")
