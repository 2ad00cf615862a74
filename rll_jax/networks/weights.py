"""Weights by the names that they are published under: torchvision's and timm's for ResNets, Caffe's for GoogLeNet-V2.

Files are read as data and never executed: safetensors, .npz, and PyTorch's .pth where torch is installed (`weights_only`).
"""

import os
import pathlib
import pickle

import jax
import numpy as np

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_CLASSIFIERS = (
    "fc",
    "last_linear",
    "classifier",
    "head",
)  # of the task that published weights were trained for
HEAD_PREFIXES = (
    "L_",
    "M_",
    "H_",
)  # names of the embedding layers of `models.EmbeddingNet` begin so
_HEAD_CHANNELS = 128  # of the maps that the heads' L_dense and M_dense take flattened
_LISTED = 20  # names of each kind in an error
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")


def to_named_arrays(variables: dict) -> dict[str, np.ndarray]:
    """{"params": ..., "batch_stats": ...} of an `EmbeddingNet` -> {name: array} in PyTorch's layout, the heads under our names.

    L_dense and M_dense take a map that is flattened as PyTorch does it, channels first.
    """
    return {name: _transposed(name, np.asarray(leaf)) for name, leaf in _named(variables)}


def from_named_arrays(weights: dict[str, np.ndarray], variables: dict, *, heads: bool) -> dict:
    """`variables` with the values of `weights`, whose classifier is left out.

    Args:
      weights: {name: array} in PyTorch's layout.
      variables: of an `EmbeddingNet`, for its structure and shapes.
      heads: take the embedding layers too, instead of keeping those of `variables`.

    Raises:
      ValueError: names that are missing or not expected, or shapes that differ (which).
    """
    weights = _without_conv_biases(weights)
    wanted = {name: _transposed(name, np.asarray(leaf)).shape for name, leaf in _named(variables)}
    if not heads:
        wanted = {
            name: shape for name, shape in wanted.items() if not name.startswith(HEAD_PREFIXES)
        }
        weights = {
            name: array for name, array in weights.items() if not name.startswith(HEAD_PREFIXES)
        }
    wrong = {
        "missing": sorted(wanted.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {weights[name].shape} instead of {shape}"
            for name, shape in wanted.items()
            if name in weights and weights[name].shape != shape
        ],
    }
    if any(wrong.values()):
        parts = [
            f"{len(names)} {what} ({', '.join(names[:_LISTED])}{', ...' * (len(names) > _LISTED)})"
            for what, names in wrong.items()
            if names
        ]
        raise ValueError(f"the weights are not of this network: {'; '.join(parts)}")
    leaves = [
        _transposed(name, weights[name], back=True).astype(leaf.dtype) if name in wanted else leaf
        for name, leaf in _named(variables)
    ]
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """{name: array} from .safetensors, .npz, .pth or .pt.

    A .pth holds a state dict, or has one under "state_dict" or "model".

    Raises:
      ValueError: no such file, another kind of file, a damaged one, a .pth that holds more than tensors or without torch to read it.
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
        weights = readers[path.suffix](path)
    except ImportError as error:
        raise ValueError(
            f"{path}: reading it needs {error.name}; install it, or convert the file to .safetensors elsewhere"
        )
    except Exception as error:  # each library has its own for a damaged file
        raise ValueError(
            f"{path}: cannot be read as weights: {str(error).splitlines()[0] if str(error) else repr(error)}"
        )
    return {name.removeprefix("module."): array for name, array in weights.items()}


def write_safetensors(path: str | os.PathLike, weights: dict[str, np.ndarray]) -> None:
    from safetensors import numpy as safetensors

    safetensors.save_file(
        {name: np.ascontiguousarray(array) for name, array in weights.items()}, path
    )


def _read_safetensors(path):
    from safetensors import numpy as safetensors

    return safetensors.load_file(path)


def _read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _read_torch(path):
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose text tells how to run it all the same
        raise ValueError(
            "it is damaged or holds more than tensors, which would have to be executed: save its state_dict() alone, or as .safetensors"
        )
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    tensors = (
        {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        if isinstance(state, dict)
        else {}
    )
    if not tensors:
        raise ValueError('expected a state dict, or one under "state_dict" or "model"')
    # numpy has no bfloat16
    return {
        name: (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy()
        for name, t in tensors.items()
    }


def _named(variables):
    """(published name, leaf) of each leaf, in the order of the tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        _, *modules, kind = (key.key for key in path)
        yield f"{_published(modules)}.{_LEAVES[kind]}", leaf


def _published(modules: list[str]) -> str:
    first, *rest = modules
    if (
        first.startswith("layer") and "_" in first
    ):  # layer1_0/downsample_conv -> layer1.0.downsample.0
        rest = [
            {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}.get(name, name)
            for name in rest
        ]
        return ".".join([*first.split("_"), *rest])
    if rest:  # inception_3a/3x3_reduce/bn -> inception_3a_3x3_reduce_bn
        return "_".join([first, *rest]).removesuffix("_conv")
    return first


def _without_conv_biases(weights):
    """Convolutions' biases subtracted from the running means of the batch norms behind them; classifiers and counters left out."""
    weights = {
        name: array
        for name, array in weights.items()
        if name.split(".")[0] not in _CLASSIFIERS and not name.endswith(".num_batches_tracked")
    }
    for name in [name for name in weights if name.endswith(".bias")]:
        mean = f"{name.removesuffix('.bias')}_bn.running_mean"
        if mean in weights:
            weights[mean] = weights[mean] - weights.pop(name)
    return weights


def _transposed(name, array, back=False):
    """Flax's kernels, (h, w, in, out) and (in, out), to PyTorch's and back."""
    if array.ndim == 4:
        return array.transpose((2, 3, 1, 0) if back else (3, 2, 0, 1))
    if name.endswith(
        "_dense.weight"
    ):  # of a flattened map: (h, w, channel) in Flax, (channel, h, w) in PyTorch
        shape = (len(array), _HEAD_CHANNELS, -1) if back else (-1, _HEAD_CHANNELS, array.shape[1])
        array = array.reshape(shape).transpose(2, 1, 0)
        return array.reshape(-1, array.shape[2]) if back else array.reshape(len(array), -1)
    return array.T if array.ndim == 2 else array
