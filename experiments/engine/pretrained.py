"""The weights that a run starts from: a file, another run, or the Hugging Face hub."""

import functools
import logging
import pathlib

import jax
import numpy as np

from experiments.engine import build, processes, trained_network
from experiments.engine.config import Config
from experiments.engine.network import WEIGHT_ENDINGS
from rll_jax.networks import backbones, weights
from rll_jax.typing import Backbone, TokenBackbone

# What the Hugging Face hub's folders of a model have.
_FILES_OF_MODELS = ("model.safetensors", "pytorch_model.bin")


def read_starting_weights(config: Config) -> dict[str, np.ndarray] | None:
    """Returns the weights of --pretrained or --init_from by their published names, or None.

    Raises:
      ValueError: the weights cannot be found or read, or are not of this network; the message says
        what is missing, unexpected or of another shape.
    """
    options = config.network
    name = options.starting_weights
    if not name:
        return None
    try:
        if options.init_from or (pathlib.Path(name) / "flags.txt").is_file():
            trained = trained_network.load(name)
            backbone = trained.config.network.backbone_config
            _check_pixels(backbone, options.backbone_config)
            arrays = weights.to_named_arrays(trained.variables, backbone)
        else:
            arrays = _read_file(name)
        return _checked(arrays, config)
    except ValueError as error:
        flag = "pretrained" if options.pretrained else "init_from"
        raise ValueError(f"--{flag}={name}: {error}") from error


def _check_pixels(theirs: Backbone, ours: Backbone) -> None:
    """Raises ValueError where the run of a workdir had other pixels."""
    expected, found = ((*backbone.mean, *backbone.std) for backbone in (theirs, ours))
    if expected != found:
        names = [name for name, of in backbones.PIXELS.items() if (*of[0], *of[1]) == expected]
        raise ValueError(
            f"its network expects pixels of mean {theirs.mean} and standard deviation "
            f"{theirs.std}, and this one {ours.mean} and {ours.std}: give "
            f"{' or '.join(f'--pixel_norm={name}' for name in names) or 'its --backbone'}"
        )


def _checked(arrays: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Returns the weights without what their names begin with.

    Raises:
      ValueError: the weights are not of this network.
    """
    options = config.network
    shapes = jax.eval_shape(functools.partial(build.create_state, config))
    variables = {"params": shapes.params, "batch_stats": shapes.batch_stats}
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    backbone, heads = options.backbone_config, options.loads_heads
    if isinstance(backbone, TokenBackbone) and options.pretrained_prefix:
        arrays = weights.take_prefix(arrays, options.pretrained_prefix)
    arrays = backbone.from_published(arrays)
    ending = "" if isinstance(backbone, TokenBackbone) else options.pretrained_prefix
    prefix = weights.find_prefix(arrays, zeros, backbone, heads=heads, ending=ending)
    taken = weights.take_prefix(arrays, prefix)
    try:
        weights.from_named_arrays(taken, zeros, backbone, heads=heads, prefix="")
    except weights.OtherNetworkError as error:
        how = "choose --backbone, --stem, --width and --stage_sizes as the weights have them"
        if not options.init_from:
            how += ", or say by --pretrained_prefix what their names begin with"
        raise ValueError(f"{error}; {how}") from error
    if prefix and processes.is_first():
        left = len(arrays) - len(taken)
        others = f"; left out {left} arrays whose names begin otherwise" if left else ""
        print(f'--pretrained={options.pretrained}: took off "{prefix}"{others}', flush=True)
    return taken


def _read_file(name: str) -> dict[str, np.ndarray]:
    path = pathlib.Path(name)
    if path.is_dir():
        files = [path / file for file in _FILES_OF_MODELS if (path / file).is_file()]
        if not files:
            raise ValueError(
                f"the folder holds no run and no weights: expected flags.txt, or one of "
                f"{', '.join(_FILES_OF_MODELS)}"
            )
        return weights.read(files[0])
    if path.exists() or path.suffix in WEIGHT_ENDINGS:
        return weights.read(path)
    return weights.read(_download(name))


def _download(name: str) -> str:
    """Returns the file of a hub repository's weights, which is downloaded once."""
    if name.count("/") != 1:
        raise ValueError(
            f"expected {weights.KINDS}, a run's workdir or a hub name such as "
            "timm/resnet50.tv_in1k, and there is no such file or folder"
        )
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports] (optional)
    except ImportError:
        raise ValueError(
            "no such folder, and names of the hub need huggingface_hub (pip install "
            "huggingface_hub); a file works without"
        ) from None
    # It logs a line for each of five attempts.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return huggingface_hub.hf_hub_download(name, "model.safetensors")
    except Exception as error:  # its many kinds: offline, no such repository, no such file
        reason = " ".join(str(error).split())[:300] or repr(error)
        raise ValueError(
            f"no such folder, and model.safetensors of {name} cannot be had from the hub: "
            f"{reason}; a file works without"
        ) from error
