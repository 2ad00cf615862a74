"""The weights that a run starts from: a file, another run, or the Hugging Face hub."""

import functools
import logging
import pathlib

import jax
import numpy as np

from experiments.engine import build, trained_network
from experiments.engine.config import Config
from rll_jax.networks import backbones, weights
from rll_jax.typing import Backbone


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
        if options.init_from or pathlib.Path(name).is_dir():
            trained = trained_network.load(name)
            backbone = trained.config.network.backbone_config
            _check_pixels(backbone, options.backbone_config)
            arrays = weights.to_named_arrays(trained.variables, backbone)
        else:
            arrays = _read_file(name)
        _check(arrays, config)
    except ValueError as error:
        flag = "pretrained" if options.pretrained else "init_from"
        raise ValueError(f"--{flag}={name}: {error}") from error
    return arrays


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


def _check(arrays: dict[str, np.ndarray], config: Config) -> None:
    """Raises ValueError where the weights are not of this network."""
    shapes = jax.eval_shape(functools.partial(build.create_state, config))
    variables = {"params": shapes.params, "batch_stats": shapes.batch_stats}
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    weights.from_named_arrays(
        arrays, zeros, config.network.backbone_config, heads=config.network.loads_heads
    )


def _read_file(name: str) -> dict[str, np.ndarray]:
    path = pathlib.Path(name)
    return weights.read(path if path.suffix in weights.SUFFIXES else _download(name))


def _download(name: str) -> str:
    """Returns the file of a hub repository's weights, which is downloaded once."""
    if name.count("/") != 1:
        raise ValueError(
            f"expected a file ({', '.join(weights.SUFFIXES)}), a run's workdir or a hub name such "
            "as timm/resnet50.tv_in1k"
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
