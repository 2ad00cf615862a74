"""Weights by the names that they are published under: torchvision's and timm's for ResNets, Caffe's for GoogLeNet-V2.

Files are read as data and never executed: safetensors, .npz, and PyTorch's .pth where torch is installed (`weights_only`).
"""
import os
import pathlib

import jax
import numpy as np

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_CLASSIFIERS = ("fc", "last_linear", "classifier", "head")  # of the task that published weights were trained for
HEADS = ("L_", "M_", "H_")  # names of the embedding layers of `models.EmbeddingNet` begin so
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")


def to_published(variables: dict) -> dict[str, np.ndarray]:
    """{"params": ..., "batch_stats": ...} of an `EmbeddingNet` -> {name: array} in PyTorch's layout, the heads under our names."""
    return {name: _transposed(np.asarray(leaf)) for name, leaf in _named(variables)}


def from_published(weights: dict[str, np.ndarray], variables: dict, *, heads: bool) -> dict:
    """`variables` with the values of `weights`, whose classifier is left out.

    Args:
      weights: {name: array} in PyTorch's layout.
      variables: of an `EmbeddingNet`, for its structure and shapes.
      heads: take the embedding layers too, instead of keeping those of `variables`.

    Raises:
      ValueError: names that are missing or not expected, or shapes that differ (which).
    """
    weights = _without_conv_biases(weights)
    wanted = {name: _transposed(np.asarray(leaf)).shape for name, leaf in _named(variables)}
    if not heads:
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(HEADS)}
        weights = {name: array for name, array in weights.items() if not name.startswith(HEADS)}
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
        parts = [f"{len(names)} {what} ({', '.join(names[:5])}{', ...' * (len(names) > 5)})" for what, names in wrong.items() if names]
        raise ValueError(f"the weights are not of this network: {'; '.join(parts)}")
    leaves = [
        _transposed(weights[name], back=True).astype(leaf.dtype) if name in wanted else leaf for name, leaf in _named(variables)
    ]
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """{name: array} from .safetensors, .npz, .pth or .pt.

    Raises:
      ValueError: no such file, another kind of file, a damaged one, or a .pth without torch to read it.
    """
    path = pathlib.Path(path)
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".pth": _read_torch, ".pt": _read_torch}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected weights in .safetensors, .npz, .pth or .pt")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        weights = readers[path.suffix](path)
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs {error.name}; install it, or convert the file to .safetensors elsewhere")
    except Exception as error:  # each library has its own for a damaged file
        raise ValueError(f"{path}: cannot be read as weights: {str(error).splitlines()[0] if str(error) else repr(error)}")
    return {name.removeprefix("module."): array for name, array in weights.items()}


def write_safetensors(path: str | os.PathLike, weights: dict[str, np.ndarray]) -> None:
    from safetensors import numpy as safetensors

    safetensors.save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, path)


def _read_safetensors(path):
    from safetensors import numpy as safetensors

    return safetensors.load_file(path)


def _read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _read_torch(path):
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {name: tensor.numpy() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def _named(variables):
    """(published name, leaf) of each leaf, in the order of the tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        _, *modules, kind = (key.key for key in path)
        yield f"{_published(modules)}.{_LEAVES[kind]}", leaf


def _published(modules: list[str]) -> str:
    first, *rest = modules
    if first.startswith("layer") and "_" in first:  # layer1_0/downsample_conv -> layer1.0.downsample.0
        rest = [{"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}.get(name, name) for name in rest]
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


def _transposed(array, back=False):
    """Flax's kernels, (h, w, in, out) and (in, out), to PyTorch's and back."""
    if array.ndim == 4:
        return array.transpose((2, 3, 1, 0) if back else (3, 2, 0, 1))
    return array.T if array.ndim == 2 else array
