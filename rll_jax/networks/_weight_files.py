"""Files of weights, read as data by what they hold, whatever their names; nothing is executed."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
import os
import pathlib
import pickle
import re
import types
from typing import Any
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np

KINDS = "a file of safetensors, of PyTorch (.pth, .pt, .bin, .ckpt, ...) or .npz"

_ZIP, _PICKLE, _TAR = b"PK\x03\x04", b"\x80", b"ustar"
_TORCH_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# How files begin that people take for weights.
_OTHERS = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file: run `git lfs pull`",
    b"<": "it is a web page or XML, not weights: download the file itself",
    b"\x89HDF": "it is an HDF5 file, such as Keras writes",
    b"\x1f\x8b": "it is compressed by gzip: unpack it first",
}
_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_MUCH_NESTED = 10  # dicts within dicts


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads {name: array} from a file of safetensors, of PyTorch or .npz.

    The kind is told by the content. A file of PyTorch may hold a state dict within other dicts, and
    other things beside it, which are ignored. Where several of the dicts hold tensors, the keys of
    the dicts come first in the names: teacher.conv1.weight.

    Raises:
      ValueError: the file does not exist, is of another kind, is damaged or holds no named tensors;
        or there is no torch to read it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected weights in .safetensors, .npz or .pth")
    try:
        return _read(path)
    except ImportError as error:
        raise ValueError(
            f"{path}: reading it needs {error.name}; install it, or convert the file to "
            ".safetensors elsewhere"
        ) from None
    except Exception as error:  # each library has its own for a damaged file
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path}: cannot be read as weights: {reason}") from error


def write_safetensors(path: str | os.PathLike[str], weights: Mapping[str, np.ndarray]) -> None:
    """Writes {name: array} to a .safetensors file, in place.

    A caller that must not leave half a file writes to a temporary path and renames it.

    Raises:
      OSError: the file cannot be written, such as on a full disk.
    """
    import safetensors
    from safetensors import numpy as of_arrays

    arrays = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    try:
        of_arrays.save_file(arrays, path)
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"cannot write {os.fspath(path)}: {error}") from error
        code = int(number[1])
        raise OSError(code, os.strerror(code), os.fspath(path)) from error


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError("it is empty")
    if start.startswith(_ZIP):
        return _read_zip(path)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return _read_safetensors(path)
    if start[257:262] == _TAR:
        raise ValueError("it is a .tar archive: unpack it, and give the file that was in it")
    if start.startswith(_PICKLE):
        return _read_torch(path)
    for beginning, what in _OTHERS.items():
        if start.lstrip().startswith(beginning):
            raise ValueError(what)
    if path.suffix in _TORCH_ENDINGS:
        return _read_torch(path)
    raise ValueError(f"expected {KINDS}")


def _read_zip(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads an .npz or what PyTorch writes, which are archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is damaged, or not all of it is there: {error}") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError("it is a program of TorchScript: save its state_dict() instead")
    if any(name.endswith(".npy") for name in names):
        return _read_npz(path)
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"it is an archive of {', '.join(names[:3]) or 'nothing'}: unpack it")
    return _read_torch(path)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    import safetensors

    arrays = {}
    for name, entry in safetensors.deserialize(path.read_bytes()):
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is of the type {entry['dtype']}: save it as F32 or F16")
        array = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        arrays[name] = array.astype(np.float32) if entry["dtype"] == "BF16" else array
    return arrays


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    import torch  # pyright: ignore[reportMissingImports] (optional)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Not the path: torch would go by its ending.
            with path.open("rb") as file:
                content, is_whole = torch.load(file, map_location="cpu", weights_only=True), True
        except pickle.UnpicklingError:  # its text tells how to execute the file all the same
            content, is_whole = _load_tensors_alone(path), False
    found = dict(_tensors(content, torch.Tensor))
    if not found and not is_whole:
        raise ValueError(
            "it is damaged or holds more than tensors, which would have to be executed: save its "
            "state_dict() alone, or as .safetensors"
        )
    if not found:
        raise ValueError('expected a state dict, or one under a key such as "state_dict"')
    several = len({keys[:-1] for keys in found}) > 1
    return {
        ".".join(keys if several else keys[-1:]): _to_numpy(tensor, torch)
        for keys, tensor in found.items()
    }


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    """Returns a tensor as an array; what NumPy has no type for, such as bfloat16, as float32."""
    numpy_has = (torch.float64, torch.float32, torch.float16)
    is_other = tensor.is_floating_point() and tensor.dtype not in numpy_has
    return (tensor.float() if is_other else tensor).detach().numpy()


def _tensors(
    content: Any, kind: type, keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields (keys, tensor) of all tensors in dicts with texts as keys."""
    if not isinstance(content, Mapping) or len(keys) > _MUCH_NESTED:
        return
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, kind):
            yield (*keys, key), value
        elif isinstance(key, str):
            yield from _tensors(value, kind, (*keys, key))


# ---- Checkpoints that hold more than tensors


class _Inert(dict):
    """What stands for an object of any class in a pickle: it keeps items and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> "_Inert":
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        """Forgets the state."""

    def append(self, item: Any) -> None:
        """Forgets the item."""

    add = append

    def extend(self, items: Any) -> None:
        """Forgets the items."""

    __hash__ = object.__hash__  # type: ignore[assignment]


class _InertUnpickler(pickle.Unpickler):
    """An unpickler that makes tensors, and `_Inert` of all else: it imports and calls nothing."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        from torch import _utils  # pyright: ignore[reportMissingImports] (optional)

        def rebuild_tensor(*parts: Any) -> Any:
            return _utils._rebuild_tensor_v2(*parts)

        def rebuild_parameter(tensor: Any, *_: Any) -> Any:
            return tensor

        return {
            "torch._utils._rebuild_tensor_v2": rebuild_tensor,
            "torch._utils._rebuild_parameter": rebuild_parameter,
            "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
            "collections.OrderedDict": OrderedDict,
        }.get(f"{module_name}.{global_name}", _Inert)


def _load_tensors_alone(path: pathlib.Path) -> Any:
    """Returns what a checkpoint of PyTorch holds, with `_Inert` for what is not a tensor.

    Raises:
      ValueError: it is damaged.
    """
    import torch  # pyright: ignore[reportMissingImports] (optional)

    inert = types.SimpleNamespace(
        __name__="inert",
        Unpickler=_InertUnpickler,
        load=lambda file, **options: _InertUnpickler(file, **options).load(),
    )
    try:
        # Not its own safe unpickler, which refuses the whole file: nothing runs in ours either.
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", pickle_module=inert, weights_only=False)
    except Exception:  # a pickle may raise anything
        return None
