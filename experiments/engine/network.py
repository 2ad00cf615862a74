"""The network of a run: its options, the model, and the weights that it starts from."""

import dataclasses
import pathlib
from typing import Any, ClassVar

import jax.numpy as jnp

from experiments.engine.options import Section, option, to_text
from rll_jax import typing
from rll_jax.networks import (
    backbones,
    convnext,
    embedding_net,
    resnet,
    vit,
    vit_weights,
    weights,
)
from rll_jax.networks.pooling import POOL_ROUNDINGS, PoolRounding
from rll_jax.training import devices, steps

# A name of --pretrained that ends so is a file's, not one of the hub's.
WEIGHT_ENDINGS = (
    ".safetensors",
    ".npz",
    ".pth",
    ".pt",
    ".tar",
    ".ckpt",
    ".bin",
    ".pkl",
    ".th",
    ".h5",
)

# Changes of a `ResNetConfig` by the names of --stem.
_STEMS = {
    "7x7": {"small_images": False, "stem_pool": 1},
    "3x3": {"small_images": True, "stem_pool": 1},
    "3x3_pooled": {"small_images": True, "stem_pool": 2},
}


@dataclasses.dataclass(frozen=True)
class NetworkOptions(Section):
    """The backbone, its embedding heads, and what of them trains."""

    title: ClassVar[str] = "Network"

    backbone: str = option(
        "resnet_small", "The backbone network.", choices=tuple(backbones.BACKBONES), main=True
    )
    stem: str = option(
        "",
        "The stem of a ResNet: 7x7 with stride 2 and a max pool; or, for small images, 3x3 with "
        "stride 1, without or with a 2x2 average pool. Empty: the backbone's own.",
        choices=("", *_STEMS),
    )
    width: int = option(
        0,
        "The number of channels of a ResNet's first stage; it doubles from stage to stage. 0: the "
        "backbone's own.",
        low=0,
    )
    stage_sizes: tuple[int, ...] = option(
        (),
        "The number of blocks in each stage of a ResNet, such as 2,2,2,2. Empty: the backbone's "
        "own.",
    )
    pixel_norm: str = option(
        "auto",
        "The mean and standard deviation of the pixels that the network gets: ImageNet's, a half "
        "and a half, CLIP's, DINOv3's of satellite images, or Caffe's. auto: those of the weights "
        "that --pretrained names, where the name of a vision transformer (dino, augreg, clip, "
        "siglip, ...) or a ConvNeXt (clip, laion) tells; else the backbone's own.",
        choices=("auto", *backbones.PIXELS),
    )
    position_size: int = option(
        0,
        "The side in pixels of the images that the position embeddings of a vision transformer's "
        "weights were learnt on; they are interpolated to --image_size. 0: the backbone's own.",
        low=0,
    )
    pretrained: str = option(
        "",
        "The weights to start from: a file of safetensors, PyTorch or .npz in the names of "
        "torchvision, timm, Hugging Face or Caffe; another run's workdir; or a repository of the "
        "Hugging Face hub such as timm/resnet50.tv_in1k. Empty: random weights.",
        main=True,
    )
    pretrained_prefix: str = option(
        "",
        "What the names of the weights of --pretrained begin with, such as student.backbone., "
        "which is taken off. Empty: the beginning under which the most names are the network's.",
    )
    pretrained_head: bool = option(
        False, "Take the embedding heads of --pretrained too, not the backbone alone."
    )
    init_from: str = option(
        "", "The workdir of another run whose weights, heads included, this run starts from."
    )
    embedding_dim: int = option(128, "The dimension of each level's embedding.", low=1, main=True)
    levels: tuple[str, ...] = option(
        ("H",),
        "The levels of the network that have an embedding and a loss each, some of L,M,H.",
        main=True,
    )
    pooling: embedding_net.Pooling = option(
        "own",
        "How the head of level H pools the last map, or a vision transformer's patches: average, "
        "maximum, the sum of both, or a generalised mean with a learnt power (gem). own: the "
        "average, normalised in a ConvNeXt, or a vision transformer's class token or attention "
        "pool.",
        choices=embedding_net.POOLINGS,
    )
    head_norm: bool = option(
        False, "Put a layer norm before the last linear layer of each embedding head."
    )
    lora_rank: int = option(
        0,
        "Train low-rank adapters (LoRA) of this rank on the queries, keys and values of a vision "
        "transformer, and the heads, in place of its own weights. Export merges them. 0: none.",
        low=0,
    )
    lora_alpha: float = option(
        16.0, "The factor of the adapters of --lora_rank is this number divided by the rank.", low=0
    )
    drop_path: float = option(
        0.0,
        "The share of images that skip the last residual block in a training step; those of the "
        "blocks before grow linearly to it from 0. Frozen stages skip none.",
        low=0,
        high=0.95,
    )
    batch_norm: embedding_net.BatchNormMode = option(
        "train",
        "The statistics of the backbone's batch norm: of the batch over all devices (train), of "
        "each device's share (local), or the running ones (frozen; frozen_affine holds scales "
        "and biases too).",
        choices=embedding_net.BATCH_NORMS,
    )
    batch_norm_momentum: float = option(
        0.9,
        "The share of batch norm's running statistics that a step keeps. Caffe's default is 0.999.",
        low=0,
        high=0.999999,
    )
    pool_rounding: PoolRounding = option(
        "up",
        "How the average pools of L and M, and of a ResNet's stem for small images, round the "
        "number of their windows: up, as Caffe, so that all of a map is seen; or down, where its "
        "last rows and columns may be lost.",
        choices=POOL_ROUNDINGS,
        earlier="down",
    )
    pixel_mean: tuple[float, ...] = option(
        (),
        "The mean of the pixel values 0-255 that is taken off: three numbers in the order that the "
        "backbone's weights expect, which is blue, green, red for googlenet_v2. Empty: the "
        "backbone's own.",
    )
    dtype: str = option(
        "float32",
        "The dtype of the convolutions. bfloat16 is for GPUs, TPUs, and CPUs with instructions for "
        "it (AVX512-BF16, AMX).",
        choices=("float32", "bfloat16"),
    )
    frozen_stages: int = option(
        0,
        "The number of first stages, and the stem, that do not train. The stages of a vision "
        "transformer are its blocks. Networks with batch norm need --batch_norm=frozen or "
        "frozen_affine.",
        low=0,
    )
    frozen_views: int = option(
        0,
        "The number of views of each training image that the frozen stages see, once, before the "
        "first step. Their features are cached in --data_dir, and the remaining stages train on "
        "the cache. 0: no cache, a new view at every step.",
        low=0,
    )
    remat: tuple[int, ...] = option(
        (),
        "The stages, such as 1,2, that are computed again for the gradient to save memory. Empty: "
        "none.",
    )

    def __post_init__(self) -> None:
        # A level's place is that of the network, whatever the order of the flag.
        if set(self.levels) <= set(embedding_net.LEVELS):
            in_order = sorted(self.levels, key=embedding_net.LEVELS.index)
            object.__setattr__(self, "levels", tuple(in_order))
        super().__post_init__()

    def check(self) -> None:
        """See `Section.check`."""
        text = ",".join(self.levels)
        unknown = set(self.levels) - set(embedding_net.LEVELS)
        if unknown or not self.levels or len(set(self.levels)) != len(self.levels):
            raise ValueError(
                f"--levels={text}: expected some of L,M,H, each once, with commas between"
            )
        backbone = self.backbone_config
        stages = backbone.num_stages
        if not set(self.levels) <= embedding_net.level_stages(backbone).keys():
            raise ValueError(
                f"--levels={text}: --backbone={self.backbone} has only {stages} stages"
            )
        self._check_stages(backbone)
        if self.pixel_mean and (
            len(self.pixel_mean) != 3 or not all(0 <= mean <= 255 for mean in self.pixel_mean)
        ):
            raise ValueError(
                f"--pixel_mean={to_text(self.pixel_mean)}: expected three numbers between 0 and 255"
            )
        if self.pretrained_prefix and not self.pretrained:
            raise ValueError(
                f"--pretrained_prefix={self.pretrained_prefix} is of the names in --pretrained: "
                "give --pretrained too"
            )
        if self.frozen_views and not self.frozen_stages:
            raise ValueError(
                f"--frozen_views={self.frozen_views} caches the features of frozen stages: give "
                "--frozen_stages too"
            )
        if self.init_from and self.pretrained:
            raise ValueError(
                f"--init_from={self.init_from} and --pretrained={self.pretrained}: give one of them"
            )

    def _check_stages(self, backbone: typing.Backbone) -> None:
        stages = backbone.num_stages
        if not set(self.remat) <= set(range(1, stages + 1)):
            raise ValueError(
                f"--remat={','.join(map(str, self.remat))}: the stages of "
                f"--backbone={self.backbone} are 1 to {stages}"
            )
        has_norm = not isinstance(backbone, typing.TokenBackbone)
        frozen_norm = self.batch_norm.startswith("frozen") or not has_norm
        if self.frozen_stages > stages or (self.frozen_stages and not frozen_norm):
            raise ValueError(
                f"--frozen_stages={self.frozen_stages}: expected at most the {stages} stages of "
                f"--backbone={self.backbone}"
                + (", and --batch_norm=frozen or frozen_affine" if has_norm else "")
            )

    @property
    def backbone_config(self) -> typing.Backbone:
        """--backbone, changed by the options that are about it and by the weights."""
        sized = self._sized_backbone
        config: Any = self._as_published(sized) if isinstance(sized, vit.ViTConfig) else sized
        pixels = self.pixel_norm if self.pixel_norm != "auto" else None
        if pixels is None and isinstance(sized, vit.ViTConfig):
            pixels = vit_weights.pixels_of(self._published_name)
        elif pixels is None and isinstance(sized, convnext.ConvNeXtConfig):
            pixels = convnext.pixels_of(self._published_name)
        if pixels:
            mean, std = backbones.PIXELS[pixels]
            mean, std = (mean[::-1], std[::-1]) if config.bgr else (mean, std)
            config = dataclasses.replace(config, mean=mean, std=std)
        return dataclasses.replace(config, mean=self.pixel_mean) if self.pixel_mean else config

    def _as_published(self, config: vit.ViTConfig) -> vit.ViTConfig:
        """Returns a vision transformer as its options and the name of --pretrained say."""
        if self.position_size and config.rotary:
            raise ValueError(
                f"--position_size={self.position_size}: --backbone={self.backbone} has no position "
                "embeddings: leave it out"
            )
        if self.position_size:
            try:
                config = dataclasses.replace(config, image_size=self.position_size)
            except ValueError as error:
                raise ValueError(f"--position_size={self.position_size}: {error}") from error
        if self.lora_rank:
            config = dataclasses.replace(
                config, lora_rank=self.lora_rank, lora_alpha=self.lora_alpha
            )
        timms = vit_weights.is_timms(self._published_name) and not config.rotary
        return dataclasses.replace(config, antialias=True) if timms else config

    @property
    def _published_name(self) -> str:
        """The name of the weights of --pretrained: of the hub's repository, or of the file."""
        path = pathlib.PurePath(self.pretrained)
        is_file = path.suffix in WEIGHT_ENDINGS
        return path.stem if is_file else self.pretrained if len(path.parts) == 2 else ""

    @property
    def _sized_backbone(self) -> typing.Backbone:
        """--backbone, changed by --stem, --width and --stage_sizes."""
        config: Any = backbones.BACKBONES[self.backbone]
        if self.drop_path:
            if not hasattr(config, "drop_path"):
                raise ValueError(
                    f"--drop_path={self.drop_path}: --backbone={self.backbone} has no blocks that "
                    "images could skip"
                )
            config = dataclasses.replace(config, drop_path=self.drop_path)
        for name, value in (("position_size", self.position_size), ("lora_rank", self.lora_rank)):
            if value and not isinstance(config, vit.ViTConfig):
                raise ValueError(
                    f"--{name}={value} is of vision transformers, and --backbone={self.backbone} "
                    "is none"
                )
        changes: dict[str, object] = dict(_STEMS.get(self.stem, {}))
        if self.width:
            changes["width"] = self.width
        if self.stage_sizes:
            changes["stage_sizes"] = self.stage_sizes
        if isinstance(config, resnet.ResNetConfig):
            try:
                return dataclasses.replace(config, **changes, pool_rounding=self.pool_rounding)
            except ValueError as error:
                raise ValueError(f"--{error}") from error
        if changes:
            raise ValueError(
                "--stem, --width and --stage_sizes are of ResNets, and "
                f"--backbone={self.backbone} is none"
            )
        return config

    @property
    def starting_weights(self) -> str:
        """--pretrained or --init_from; empty for random weights."""
        return self.pretrained or self.init_from

    @property
    def loads_heads(self) -> bool:
        """Whether the starting weights include the embedding heads."""
        return self.pretrained_head or bool(self.init_from)

    def is_frozen(self, module: str) -> bool:
        """Whether --frozen_stages holds a top-level module of the network, by its name."""
        if not self.is_of_backbone(module):
            return False
        return self.backbone_config.stage_of(module) <= self.frozen_stages

    def is_of_backbone(self, module: str) -> bool:
        """Whether a top-level module is neither a head nor the proxies of a loss."""
        return not module.startswith((*weights.HEAD_PREFIXES, steps.PROXIES))


def make_model(options: NetworkOptions) -> embedding_net.EmbeddingNet:
    """Returns the network, for steps over the axis `devices.AXIS`."""
    return embedding_net.EmbeddingNet(
        options.backbone_config,
        options.embedding_dim,
        options.levels,
        dtype=jnp.dtype(options.dtype),
        batch_norm=options.batch_norm,
        pooling=options.pooling,
        head_norm=options.head_norm,
        axis_name=devices.AXIS,
        remat=options.remat,
        frozen_stages=options.frozen_stages,
        pool_rounding=options.pool_rounding,
        batch_norm_momentum=options.batch_norm_momentum,
    )
