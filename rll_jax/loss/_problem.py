"""The arguments of a loss, checked and turned into the arrays that `_blocks` computes with.

Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of asarray, psum and pmin without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Hashable
import functools
from typing import Any, NamedTuple, TypeVar, cast

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
import numpy as np

from rll_jax.loss._differences import is_symbolic
from rll_jax.loss._mesh import mesh_of, over_rows, pad_rows
from rll_jax.loss._options import (
    HyperParameters,
    Options,
    as_number,
    check_options,
    positive_boundary,
)
from rll_jax.loss._pairs import Arrays, Constants, Spec, dot, make_columns, make_rows
from rll_jax.loss.rows import (
    GALLERY_NAMES,
    LabelledRows,
    check_varying,
    checked_rows,
    clean_embeddings,
    computing_dtype,
    gather,
    sum_over_devices,
)

Tree = TypeVar("Tree")

# The most pairs in one block, so that a block's few matrices stay near the processor's caches.
_BLOCK_PAIRS = 1 << 20
_LEAST_BLOCK_SIZE = 64


class QueryArguments(NamedTuple):
    """The queries as a caller passes them."""

    embeddings: jax.Array | np.ndarray  # (N, D) floating
    labels: jax.Array | np.ndarray  # (N,) integer
    where: jax.Array | np.ndarray | None  # (N,) bool


class GalleryArguments(NamedTuple):
    """The gallery as a caller passes it. Without embeddings the queries are the gallery."""

    embeddings: jax.Array | np.ndarray | None  # (M, D) floating
    labels: jax.Array | np.ndarray | None  # (M,) integer
    where: jax.Array | np.ndarray | None  # (M,) bool


class Arguments(NamedTuple):
    """Checked arguments as jax arrays."""

    batch: LabelledRows
    bank: LabelledRows | None  # the gallery; None where the batch is it
    constants: Constants


class Problem(NamedTuple):
    """A loss reduced to arithmetic on plain arrays."""

    spec: Spec
    arrays: Arrays
    valid: jax.Array | None  # (N, 1) bool: False for a query that is padding; None: all are valid


class _Side(NamedTuple):
    """The queries or the gallery, in the computing dtype."""

    embeddings: jax.Array  # (n, D), padding as 0
    labels: jax.Array  # (n,)
    number: jax.Array  # (n,) int32, the row's; over all devices once gathered
    valid: jax.Array | None  # (n,) bool


def check_arguments(
    queries: QueryArguments,
    gallery: GalleryArguments,
    hyper: HyperParameters,
    options: Options,
) -> Arguments:
    """Checks what a caller passes, and converts it to jax arrays.

    Raises:
      TypeError, ValueError: as `ranked_list_loss` documents them.
    """
    batch = checked_rows(queries.embeddings, queries.labels, queries.where)
    hyper = HyperParameters(*(as_number(number) for number in hyper))
    check_options(hyper, options)
    bank = checked_gallery(gallery, batch.embeddings.shape[1])
    dtype = computing_dtype(batch.embeddings.dtype)
    return Arguments(batch, bank, _make_constants(hyper, dtype))


def make_problem(arguments: Arguments, options: Options, axis_name: Hashable | None) -> Problem:
    """Masks, normalises, gathers and centres checked arguments."""
    batch, bank, constants = arguments
    variant = options.variant
    ring = axis_name is not None and options.gather == "ring"
    dtype = computing_dtype(batch.embeddings.dtype)
    query_side, gallery_side = _make_sides(
        batch, bank, options.normalize, dtype, variant.gallery_gradient
    )
    label_dtype = common_label_dtype(query_side.labels.dtype, gallery_side.labels.dtype)
    if axis_name is not None:
        check_varying(batch.embeddings, axis_name)
        query_side = _numbered(query_side, axis_name)
        if ring:
            gallery_side = _numbered(gallery_side, axis_name)
        else:
            gallery_side = _gathered(gallery_side, axis_name, not variant.gallery_gradient)
    arrays = _centred_arrays(
        query_side, gallery_side, label_dtype, constants, axis_name if ring else None
    )

    num_queries, num_gallery = arrays.queries.shape[0], arrays.gallery.shape[0]
    spec = Spec(
        squared=variant.pair_term == "squared",
        weight_gradient=bool(variant.weight_gradient),
        gallery_gradient=bool(variant.gallery_gradient),
        own_gallery=bank is None,
        mass=variant.query_weighting == "mass",
        axis_name=axis_name,
        ring=ring,
        block_size=_block_size(options.block_size, num_queries, num_gallery),
        high_precision=options.precision == "high",
    )
    return Problem(spec, arrays, None if batch.where is None else batch.where[:, None])


def solve(
    reduce: Callable[[Problem], Tree],
    arguments: Arguments,
    options: Options,
    axis_name: Hashable | None,
) -> Tree:
    """Returns `reduce` of the problem.

    Where the queries or the gallery lie on a mesh of several devices, each device computes its part
    of the queries. The results of all devices are joined. Those of padded rows come last.

    Args:
      reduce: a module's function from a problem to a tree of arrays (n, ...), n its queries, or
        (1,).
      arguments: from `check_arguments`.
      options: the variant and what else is known when tracing.
      axis_name: the caller's axis, or None.
    """
    if axis_name is not None or _mesh_of(arguments) is None:
        return reduce(make_problem(arguments, options, axis_name))
    return cast("Tree", _solve_on_mesh(reduce, options, arguments))


def _mesh_of(arguments: Arguments) -> Any:
    """Returns the mesh of several devices on which the queries or the gallery lie, or None."""
    mesh = mesh_of(arguments.batch.embeddings)
    if mesh is None and arguments.bank is not None:
        return mesh_of(arguments.bank.embeddings)
    return mesh


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve_on_mesh(
    reduce: Callable[[Problem], Tree], options: Options, arguments: Arguments
) -> Tree:
    """Returns `solve` where the arguments lie on a mesh."""
    mesh = _mesh_of(arguments)

    def of_device(rows: tuple[LabelledRows, LabelledRows | None], constants: Constants) -> Tree:
        return reduce(make_problem(Arguments(*rows, constants), options, mesh.axis_names))

    bank = None if arguments.bank is None else _padded(arguments.bank, mesh)
    rows = (_padded(arguments.batch, mesh), bank)
    return over_rows(of_device, mesh, rows, arguments.constants)


def _padded(rows: LabelledRows, mesh: Any) -> LabelledRows:
    """Returns the rows with as much padding as makes them equally many on every device."""
    count = rows.embeddings.shape[0]
    if count % mesh.size == 0:
        return rows
    where = jnp.ones(count, bool) if rows.where is None else rows.where
    return LabelledRows(*(pad_rows(x, mesh) for x in (rows.embeddings, rows.labels, where)))


def checked_gallery(gallery: GalleryArguments, dim: int) -> LabelledRows | None:
    """Returns the gallery as jax arrays after its checks, or None for the batch itself."""
    if gallery.embeddings is None:
        if gallery.labels is not None or gallery.where is not None:
            raise ValueError("gallery_labels and gallery_where need a gallery: found gallery=None")
        return None
    if gallery.labels is None:
        raise ValueError("a gallery needs gallery_labels: found gallery_labels=None")
    where = None if gallery.where is None else jnp.asarray(gallery.where)
    rows = checked_rows(gallery.embeddings, gallery.labels, where, GALLERY_NAMES)
    if rows.embeddings.shape[1] != dim:
        raise ValueError(
            "gallery and embeddings must have the same dimension: "
            f"found {rows.embeddings.shape[1]}, expected {dim}"
        )
    return rows


def common_label_dtype(queries: np.dtype, gallery: np.dtype) -> np.dtype:
    """Returns the integer dtype in which labels of both dtypes keep their values."""
    dtype = np.promote_types(queries, gallery)
    if not np.issubdtype(dtype, np.integer) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            f"labels and gallery_labels must share a dtype: found {queries} and {gallery}, "
            "which no integer dtype in use holds both"
        )
    return dtype


def _make_sides(
    batch: LabelledRows,
    bank: LabelledRows | None,
    normalize: bool,
    dtype: DTypeLike,
    gallery_gradient: bool,
) -> tuple[_Side, _Side]:
    """Returns this device's queries and its rows of the gallery, in the computing dtype."""
    q = clean_embeddings(batch, normalize, dtype)
    g = q if bank is None else clean_embeddings(bank, normalize, dtype)
    g = g if gallery_gradient else lax.stop_gradient(g)
    number = jnp.arange(q.shape[0], dtype=jnp.int32)
    queries = _Side(q, batch.labels, number, batch.where)
    if bank is None:
        return queries, queries._replace(embeddings=g)
    return queries, _Side(g, bank.labels, jnp.arange(g.shape[0], dtype=jnp.int32), bank.where)


def _numbered(side: _Side, axis_name: Hashable) -> _Side:
    """Returns the rows of one device, numbered over all devices."""
    offset = lax.axis_index(axis_name) * side.embeddings.shape[0]
    return side._replace(number=side.number + offset)


def _gathered(gallery: _Side, axis_name: Hashable, constant: bool) -> _Side:
    """Returns the gallery of all devices together."""
    embeddings = gather(gallery.embeddings, axis_name, constant)
    return _Side(
        embeddings,
        gather(gallery.labels, axis_name),
        jnp.arange(embeddings.shape[0], dtype=jnp.int32),
        None if gallery.valid is None else gather(gallery.valid, axis_name),
    )


def _centred_arrays(
    queries: _Side,
    gallery: _Side,
    label_dtype: np.dtype,
    constants: Constants,
    ring: Hashable | None,
) -> Arrays:
    """Returns the arrays of a problem: rows around a common origin, and their squared norms.

    The gallery is whole, or a device's shard where `ring` names the devices' axis.
    """
    q, g = queries.embeddings, gallery.embeddings
    # Under shard_map's check_vma a derivative varies over the axes of its argument. Adding zeros of
    # both arrays makes both vary over all axes.
    zero = jnp.zeros_like(q[:1, :1]) + jnp.zeros_like(g[:1, :1])
    q, g = q + zero, g + zero
    origin = _centre(g, gallery.valid, ring)
    rows = make_rows(
        q, queries.labels.astype(label_dtype)[:, None], queries.number[:, None], origin
    )
    columns = make_columns(
        g,
        gallery.labels.astype(label_dtype)[None, :],
        # It varies too, because jax.vmap cannot batch a lax.cond that makes its arguments vary.
        gallery.number[None, :] + zero.astype(jnp.int32),
        None if gallery.valid is None else gallery.valid[None, :],
        origin,
    )
    return Arrays(q, rows, g, columns, origin, constants)


def _make_constants(hyper: HyperParameters, dtype: DTypeLike) -> Constants:
    """Returns the numbers of the loss as scalars of the computing dtype, without derivative."""
    hyper = HyperParameters(
        *(
            _differentiated_never(name, number) if isinstance(number, Tracer) else number
            for name, number in zip(hyper._fields, hyper, strict=True)
        )
    )
    alpha_pos = jnp.maximum(positive_boundary(hyper.alpha, hyper.margin), 0)

    def constant(value: ArrayLike) -> jax.Array:
        return jnp.asarray(value, dtype)

    return Constants(
        alpha=constant(hyper.alpha),
        alpha_pos=constant(alpha_pos),
        temperature_pos=constant(hyper.temperature_pos),
        temperature_neg=constant(hyper.temperature_neg),
        balance=constant(hyper.balance),
    )


def _identity(name: str, number: jax.Array) -> jax.Array:
    """Returns the number."""
    del name
    return number


def _refuse_derivative(name: str, *_: object) -> Any:
    """Refuses the derivative by a number of the loss, which would be 0."""
    raise NotImplementedError(
        f"{name} has no derivative: found that {name} is differentiated. "
        f"Pass jax.lax.stop_gradient({name})."
    )


_differentiated_never: Any = jax.custom_jvp(_identity, nondiff_argnums=(0,))
_differentiated_never.defjvp(_refuse_derivative)


def _block_size(block_size: int | None, num_queries: int, num_gallery: int) -> int:
    """Returns the rows in a block: as asked for, or as many as `_BLOCK_PAIRS` allows.

    All rows where a number is symbolic (`jax.export`).
    """
    if is_symbolic(num_queries) or is_symbolic(num_gallery):
        return num_queries
    if block_size is None:
        block_size = max(_LEAST_BLOCK_SIZE, _BLOCK_PAIRS // num_gallery)
    return min(int(block_size), num_queries)


def _centre(gallery: jax.Array, valid: jax.Array | None, ring: Hashable | None) -> jax.Array:
    """Returns (1, D), the origin that is subtracted from all rows.

    No distance changes, but the distances of a batch far from the origin keep their digits.
    """
    gallery = lax.stop_gradient(gallery)
    first_valid = 0 if valid is None else jnp.argmax(valid)
    first = jnp.take(gallery, first_valid, axis=0)[None, :]
    first = first if ring is None else _of_first_device(first, valid, ring)
    # The mean of the differences is exact where all rows are equal.
    difference = gallery - first
    if valid is None:
        count = gallery.shape[0] if ring is None else gallery.shape[0] * lax.axis_size(ring)
    else:
        difference = jnp.where(valid[:, None], difference, 0)
        count = jnp.maximum(sum_over_devices(jnp.sum(valid, dtype=jnp.int32), ring), 1)
    # A sum over the rows; as a product it takes less time on a CPU.
    total = dot(jnp.ones((1, gallery.shape[0]), gallery.dtype), difference, ((1,), (0,)))
    return first + sum_over_devices(total, ring) / jnp.asarray(count, gallery.dtype)


def _of_first_device(first: jax.Array, valid: jax.Array | None, axis_name: Hashable) -> jax.Array:
    """Returns the first row of the first device that has a valid one."""
    number = lax.axis_index(axis_name)
    source: jax.Array | int = 0
    if valid is not None:
        none = jnp.asarray(lax.axis_size(axis_name), number.dtype)
        source = cast("jax.Array", lax.pmin(jnp.where(jnp.any(valid), number, none), axis_name))
    return sum_over_devices(jnp.where(number == source, first, 0), axis_name)
