"""Weights under their published names: torchvision's, timm's, and Caffe's for GoogLeNet.

A backbone's configuration has the names of its family (`array_name`). Files are read as data and
never executed: safetensors, .npz, and PyTorch's where torch is installed.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rll_jax.networks import embedding_net, vit
from rll_jax.networks._weight_files import KINDS as KINDS
from rll_jax.networks._weight_files import read as read
from rll_jax.networks._weight_files import write_safetensors as write_safetensors
from rll_jax.networks._weight_folders import FIRST as FIRST
from rll_jax.networks._weight_folders import read_folder as read_folder
from rll_jax.networks._weight_folders import read_model as read_model
from rll_jax.typing import Backbone, TokenBackbone

HEAD_PREFIXES = embedding_net.HEAD_PREFIXES  # names of the heads' modules and arrays begin so

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# The layers of the task that published weights were trained for.
_CLASSIFIERS = (
    "fc", "_fc", "last_linear", "classifier", "head", "heads", "linear", "logits",
    "projection_head", "projector", "predictor", "prototypes", "queue", "queue_ptr",
)  # fmt: skip
# What wrappers put before or within names: DataParallel, torch.compile, FSDP.
_MARKERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PREFERRED = {"ema", "teacher"}  # words of prefixes: what is evaluated, where there are several
_FOLLOWING = {"student", "momentum", "target", "k"}  # such as MoCo's encoder_k
_LISTED = 5  # names of each kind in an error


class OtherNetworkError(ValueError):
    """Weights that are not of a network: their names or shapes are not the network's."""


def to_named_arrays(variables: Mapping[str, Any], backbone: Backbone) -> dict[str, np.ndarray]:
    """Returns a network's variables under their published names, in PyTorch's layout.

    The heads have no published names and keep those of their modules. L_dense and M_dense take a
    map that is flattened as in PyTorch, channels first. Adapters are merged.

    Args:
      variables: {"params": ..., "batch_stats": ...} of an `EmbeddingNet`.
      backbone: the backbone of this network.
    """
    if isinstance(backbone, TokenBackbone):
        variables = {**variables, "params": backbone.merged(variables["params"])}
    return {name: _to_pytorch(name, np.asarray(leaf)) for name, leaf in _named(variables, backbone)}


def from_named_arrays(
    arrays: Mapping[str, np.ndarray],
    variables: Mapping[str, Any],
    backbone: Backbone,
    *,
    heads: bool,
    prefix: str | None = None,
) -> dict[str, Any]:
    """Returns variables with the values of arrays under their published names.

    Classifiers and batch norms' counters among the arrays are ignored. A bias of a convolution is
    subtracted from the running mean of the batch norm behind it, which changes no output. Arrays of
    a batch norm may have sides of 1 more: (1, C) or (1, C, 1, 1).

    Args:
      arrays: {name: array} in PyTorch's layout.
      variables: {"params": ..., "batch_stats": ...} of an `EmbeddingNet`, for its structure,
        shapes and dtypes.
      backbone: the backbone of this network.
      heads: whether the heads are taken from the arrays too, instead of from `variables`.
      prefix: what the names of the arrays begin with. Arrays of other names are ignored. None: what
        `find_prefix` finds.

    Raises:
      OtherNetworkError: names are missing or not expected, or shapes differ. The message lists up
        to 5 names of each kind. It is a ValueError.
      ValueError: no name begins with `prefix`; or arrays are not of a floating type, or hold NaN or
        infinity.
    """
    if prefix is not None:
        arrays = take_prefix(arrays, prefix) if arrays else arrays
    arrays = backbone.from_published(arrays)
    if prefix is None and arrays:
        arrays = take_prefix(arrays, find_prefix(arrays, variables, backbone, heads=heads))
    expected = {
        name: _to_pytorch(name, np.asarray(leaf)).shape
        for name, leaf in _named(variables, backbone)
        if f".{vit.LORA}." not in name  # adapters start anew
    }
    arrays = _without_classifier(arrays, expected)
    arrays = _fold_convolution_biases(arrays)
    if not heads:
        arrays = {name: x for name, x in arrays.items() if not name.startswith(HEAD_PREFIXES)}
        expected = {name: x for name, x in expected.items() if not name.startswith(HEAD_PREFIXES)}
    arrays = {
        name: _flat(x) if len(expected.get(name, ())) == 1 else x for name, x in arrays.items()
    }
    _check_names_and_shapes(arrays, expected)
    _check_values({name: arrays[name] for name in expected})
    leaves = [
        _to_flax(name, arrays[name]).astype(leaf.dtype) if name in expected else leaf
        for name, leaf in _named(variables, backbone)
    ]
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)


def find_prefix(
    names: Iterable[str],
    variables: Mapping[str, Any],
    backbone: Backbone,
    *,
    heads: bool,
    ending: str = "",
) -> str:
    """Returns what the names begin with under which the most of a network's names are found.

    Wrappers put the beginning before the names: "module.", "model.backbone.", "teacher.". Where
    the same number of names is found under several, an average of weights or a teacher comes first,
    a student or a copy that follows last, and else the first in order.

    Args:
      names: the names of the arrays, as `read` returns them.
      variables: {"params": ..., "batch_stats": ...} of the network.
      backbone: the backbone of the network.
      heads: whether the names of the heads count too.
      ending: what the prefix ends with.

    Returns:
      The prefix, with its dot; `ending` where no name of the network is found behind such a prefix.
    """
    expected = {
        name
        for name, _ in _named(variables, backbone)
        if heads or not name.startswith(HEAD_PREFIXES)
    }
    ending = _dotted(ending)
    found: dict[str, set[str]] = {ending: set()}
    for name in names:
        parts = name.split(".")
        for first, part in enumerate(parts):
            inner = _without_markers(parts[first:])
            prefix = "".join(f"{part}." for part in parts[:first])
            fits = part not in _MARKERS and f".{prefix}".endswith(f".{ending}" if ending else "")
            if fits and inner in expected:
                found.setdefault(prefix, set()).add(inner)
    return max(found, key=lambda prefix: (len(found[prefix]), _preference(prefix)))


def take_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Returns the arrays whose names begin with a prefix, without it.

    What wrappers put within the names, such as "_orig_mod.", is taken off too.

    Raises:
      ValueError: no name begins so; the message has some of the beginnings that there are.
    """
    dotted = _dotted(prefix)
    taken = {
        _without_markers(name.removeprefix(dotted).split(".")): array
        for name, array in arrays.items()
        if name.startswith(dotted)
    }
    if not taken:
        beginnings = sorted({name.partition(".")[0] for name in arrays})
        raise ValueError(f"no name begins with {dotted!r}; names begin with {_some(beginnings)}")
    return taken


def _named(variables: Mapping[str, Any], backbone: Backbone) -> Iterator[tuple[str, Any]]:
    """Yields the published name and the value of each leaf, in the order of the tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        _, *modules, kind = (key.key for key in path)
        is_head = modules[0].startswith(HEAD_PREFIXES)
        module = ".".join(modules) if is_head else backbone.array_name(modules)
        # A parameter that is no layer's, such as a class token, keeps its name.
        yield ".".join(filter(None, (module, _LEAVES.get(kind, kind)))), leaf


def _dotted(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def _without_markers(parts: Sequence[str]) -> str:
    return ".".join(part for part in parts if part not in _MARKERS)


def _preference(prefix: str) -> int:
    """Returns 1 for averages and teachers, -1 for students and followers, 0 for all else."""
    words = set(re.split(r"[._]", prefix))
    return bool(words & _PREFERRED) - bool(words & _FOLLOWING)


def _without_classifier(
    arrays: Mapping[str, np.ndarray], expected: Container[str]
) -> dict[str, np.ndarray]:
    """Returns the arrays without those of classifiers and the counters of batch norms.

    The last norm of a backbone may be named like a part of the classifier: those expected stay.
    """
    return {
        name: array
        for name, array in arrays.items()
        if name in expected
        or (name.split(".")[0] not in _CLASSIFIERS and not name.endswith(".num_batches_tracked"))
    }


def _flat(array: np.ndarray) -> np.ndarray:
    """Returns an array whose sides but one are 1 as (C,), and any other as it is."""
    return array.reshape(-1) if array.ndim > 1 and max(array.shape) == array.size else array


def _fold_convolution_biases(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Subtracts convolutions' biases from the running means of the batch norms behind them.

    The batch norm behind the convolution `name` is `name`_bn, as in the Caffe model.
    """
    folded = dict(arrays)
    for name in arrays:
        if name.endswith(".bias"):
            mean = f"{name.removesuffix('.bias')}_bn.running_mean"
            if mean in folded:
                folded[mean] = _flat(folded[mean]) - _flat(folded.pop(name))
    return folded


def _check_names_and_shapes(
    arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises OtherNetworkError unless the arrays have the expected names and shapes."""
    faults = {
        "missing": sorted(expected.keys() - arrays.keys()),
        "unexpected": sorted(arrays.keys() - expected.keys()),
        "of another shape": [
            f"{name} {arrays[name].shape} instead of {shape}"
            for name, shape in expected.items()
            if name in arrays and arrays[name].shape != shape
        ],
    }
    if any(faults.values()):
        parts = [
            f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names
        ]
        hint = ""
        if any("_dense.weight (" in fault for fault in faults["of another shape"]):
            hint = (
                "; L_dense and M_dense take maps whose size depends on the images' size and on "
                "pool_rounding, which was down before there was a choice"
            )
        raise OtherNetworkError(f"the weights are not of this network: {'; '.join(parts)}{hint}")


def _check_values(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless the arrays are of a floating type and finite."""
    whole = [name for name, x in arrays.items() if not jnp.issubdtype(x.dtype, jnp.floating)]
    if whole:
        raise ValueError(
            f"{len(whole)} arrays are not of a floating type, such as {whole[0]} of "
            f"{arrays[whole[0]].dtype}: quantised weights cannot be trained"
        )
    wrong = [
        name
        for name, x in arrays.items()
        if not np.isfinite(x.astype(np.float32, copy=False)).all()
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} arrays hold NaN or infinity ({_some(wrong)}): the run that wrote them "
            "diverged, or the file is damaged; take an earlier checkpoint"
        )


def _some(names: Sequence[str]) -> str:
    """Returns the first names in a line, with dots behind them where there are more."""
    listed = ", ".join(names[:_LISTED])
    return f"{listed}, ..." if len(names) > _LISTED else listed


def _to_pytorch(name: str, array: np.ndarray) -> np.ndarray:
    """Returns an array of Flax in PyTorch's layout.

    Kernels (h, w, in, out) become (out, in, h, w), and kernels (in, out) become (out, in).
    """
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if _takes_flattened_map(name):
        out = array.shape[1]
        # The inputs are (h * w, channels) in Flax and (channels, h * w) in PyTorch.
        return (
            array.reshape(-1, embedding_net.HEAD_CHANNELS, out).transpose(2, 1, 0).reshape(out, -1)
        )
    return array.T if array.ndim == 2 else array


def _to_flax(name: str, array: np.ndarray) -> np.ndarray:
    """Returns an array of PyTorch in Flax's layout: the reverse of `_to_pytorch`."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if _takes_flattened_map(name):
        out = array.shape[0]
        return (
            array.reshape(out, embedding_net.HEAD_CHANNELS, -1).transpose(2, 1, 0).reshape(-1, out)
        )
    return array.T if array.ndim == 2 else array


def _takes_flattened_map(name: str) -> bool:
    """Returns whether an array is the kernel of a head's linear layer behind a flattened map."""
    return name.startswith(HEAD_PREFIXES) and name.endswith("_dense.weight")
