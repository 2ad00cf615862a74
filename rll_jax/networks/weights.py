"""Weights under their published names: torchvision's and timm's for ResNets, Caffe's for GoogLeNet.

A backbone's configuration has the names of its family (`array_name`). Files are read as data and
never executed: safetensors, .npz, and PyTorch's .pth where torch is installed.
"""

from collections.abc import Iterator, Mapping, Sequence
import os
import pathlib
import pickle
from typing import Any

import jax
import numpy as np

from rll_jax.networks import embedding_net, vit
from rll_jax.typing import Backbone, TokenBackbone

HEAD_PREFIXES = embedding_net.HEAD_PREFIXES  # names of the heads' modules and arrays begin so
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# The layers of the task that published weights were trained for.
_CLASSIFIERS = ("fc", "last_linear", "classifier", "head")
_LISTED = 20  # names of each kind in an error


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
) -> dict[str, Any]:
    """Returns variables with the values of arrays under their published names.

    Classifiers and batch norms' counters among the arrays are ignored. A bias of a convolution is
    subtracted from the running mean of the batch norm behind it, which changes no output.

    Args:
      arrays: {name: array} in PyTorch's layout.
      variables: {"params": ..., "batch_stats": ...} of an `EmbeddingNet`, for its structure,
        shapes and dtypes.
      backbone: the backbone of this network.
      heads: whether the heads are taken from the arrays too, instead of from `variables`.

    Raises:
      ValueError: names are missing or not expected, or shapes differ. The message lists up to 20
        names of each kind.
    """
    arrays = backbone.from_published(arrays) if isinstance(backbone, TokenBackbone) else arrays
    arrays = _fold_convolution_biases(_without_classifier(arrays))
    expected = {
        name: _to_pytorch(name, np.asarray(leaf)).shape
        for name, leaf in _named(variables, backbone)
        if f".{vit.LORA}." not in name  # adapters start anew
    }
    if not heads:
        arrays = {name: x for name, x in arrays.items() if not name.startswith(HEAD_PREFIXES)}
        expected = {name: x for name, x in expected.items() if not name.startswith(HEAD_PREFIXES)}
    _check_names_and_shapes(arrays, expected)
    leaves = [
        _to_flax(name, arrays[name]).astype(leaf.dtype) if name in expected else leaf
        for name, leaf in _named(variables, backbone)
    ]
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads {name: array} from a .safetensors, .npz, .pth or .pt file.

    A .pth or .pt file holds a state dict, or has one under "state_dict" or "model". A leading
    "module." of the names is removed.

    Raises:
      ValueError: the file does not exist, is of another kind or is damaged; or it is a .pth or .pt
        file that holds more than tensors, or there is no torch to read it.
    """
    path = pathlib.Path(path)
    readers = {
        ".safetensors": _read_safetensors,
        ".npz": _read_npz,
        ".pth": _read_torch,
        ".pt": _read_torch,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected weights in .safetensors, .npz, .pth or .pt")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        arrays = readers[path.suffix](path)
    except ImportError as error:
        raise ValueError(
            f"{path}: reading it needs {error.name}; install it, or convert the file to "
            ".safetensors elsewhere"
        ) from None
    except Exception as error:  # each library has its own for a damaged file
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path}: cannot be read as weights: {reason}") from error
    return {name.removeprefix("module."): array for name, array in arrays.items()}


def write_safetensors(path: str | os.PathLike[str], weights: Mapping[str, np.ndarray]) -> None:
    """Writes {name: array} to a .safetensors file, in place.

    A caller that must not leave half a file writes to a temporary path and renames it.
    """
    from safetensors import numpy as safetensors

    safetensors.save_file(
        {name: np.ascontiguousarray(array) for name, array in weights.items()}, path
    )


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import numpy as safetensors

    return safetensors.load_file(path)


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    import torch  # pyright: ignore[reportMissingImports] (optional)

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its text tells how to execute the file all the same
        raise ValueError(
            "it is damaged or holds more than tensors, which would have to be executed: save its "
            "state_dict() alone, or as .safetensors"
        ) from None
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    entries = state.items() if isinstance(state, dict) else ()
    tensors = {name: x for name, x in entries if isinstance(x, torch.Tensor)}
    if not tensors:
        raise ValueError('expected a state dict, or one under "state_dict" or "model"')
    # NumPy has no bfloat16.
    return {
        name: (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()
        for name, x in tensors.items()
    }


def _named(variables: Mapping[str, Any], backbone: Backbone) -> Iterator[tuple[str, Any]]:
    """Yields the published name and the value of each leaf, in the order of the tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        _, *modules, kind = (key.key for key in path)
        is_head = modules[0].startswith(HEAD_PREFIXES)
        module = ".".join(modules) if is_head else backbone.array_name(modules)
        # A parameter that is no layer's, such as a class token, keeps its name.
        yield ".".join(filter(None, (module, _LEAVES.get(kind, kind)))), leaf


def _without_classifier(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays without those of classifiers and the counters of batch norms."""
    return {
        name: array
        for name, array in arrays.items()
        if name.split(".")[0] not in _CLASSIFIERS and not name.endswith(".num_batches_tracked")
    }


def _fold_convolution_biases(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Subtracts convolutions' biases from the running means of the batch norms behind them.

    The batch norm behind the convolution `name` is `name`_bn, as in the Caffe model.
    """
    folded = dict(arrays)
    for name in arrays:
        if name.endswith(".bias"):
            mean = f"{name.removesuffix('.bias')}_bn.running_mean"
            if mean in folded:
                folded[mean] = folded[mean] - folded.pop(name)
    return folded


def _check_names_and_shapes(
    arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError unless the arrays have the expected names and shapes."""
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
        raise ValueError(f"the weights are not of this network: {'; '.join(parts)}")


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
