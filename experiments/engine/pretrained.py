"""The weights that a run starts from: a file, another run, or the Hugging Face hub."""

from collections.abc import Iterator
import contextlib
import functools
import logging
import pathlib
import re
from typing import Any

import jax
import numpy as np

from experiments.engine import build, processes, trained_network
from experiments.engine.config import Config
from experiments.engine.network import WEIGHT_ENDINGS
from rll_jax.networks import backbones, weights
from rll_jax.typing import Backbone, TokenBackbone

_HUB_SCHEME = re.compile(r"^(hf[-_]hub:|hf://|https://(huggingface\.co|hf\.co)/)")


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
        return weights.read_folder(path, "the folder holds no run and no weights")
    if path.exists() or path.suffix in WEIGHT_ENDINGS:
        return weights.read(path)
    return _read_from_hub(name)


def _read_from_hub(name: str) -> dict[str, np.ndarray]:
    """Returns the weights of a hub repository, whose files are downloaded once."""
    repository, _, revision = _HUB_SCHEME.sub("", name).partition("@")
    if repository.count("/") != 1:
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
    which: dict[str, Any] = {"revision": revision} if revision else {}

    def fetch(file: str) -> str:
        with _hub_errors(repository, file):
            return huggingface_hub.hf_hub_download(repository, file, **which)

    try:
        first = fetch(weights.FIRST)  # asks the hub for one file alone, and only once
    except _NotThereError as error:
        if error.is_offline:  # the hub was not asked
            with _hub_errors(repository, weights.FIRST):
                folder = huggingface_hub.snapshot_download(
                    repository, local_files_only=True, **which
                )
            return weights.read_folder(folder)
        with _hub_errors(repository, "a list of the files"):
            names = huggingface_hub.list_repo_files(repository, **which)
        return weights.read_model(names, fetch, f"{repository} holds no weights")
    return weights.read(first)


class _NotThereError(ValueError):
    """A repository of the hub, or what is kept of it here, does not hold a file."""

    is_offline = False


@contextlib.contextmanager
def _hub_errors(repository: str, what: str) -> Iterator[None]:
    """Turns what the hub's client raises into a ValueError that says what cannot be had."""
    try:
        yield
    except Exception as error:  # its many kinds: offline, no such repository, no such file
        kinds = {kind.__name__ for kind in type(error).__mro__}
        reason = " ".join(str(error).split())[:300] or repr(error)
        kind = _NotThereError if "EntryNotFoundError" in kinds else ValueError
        told = kind(
            f"no such folder, and {what} of {repository} cannot be had from the hub: "
            f"{reason}; a file works without"
        )
        if isinstance(told, _NotThereError):
            told.is_offline = "LocalEntryNotFoundError" in kinds
        raise told from error
