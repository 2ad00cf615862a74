"""The backbones by name, for `--backbone`: each family has a file, each network a line here."""

import functools
from typing import Any

from rll_jax.networks.convnext import ConvNeXtConfig
from rll_jax.networks.efficientnet import EfficientNetLiteConfig
from rll_jax.networks.googlenet import GoogLeNetV2Config
from rll_jax.networks.resnet import IMAGENET_MEAN, IMAGENET_STD, ResNetConfig
from rll_jax.networks.vit import ViTConfig
from rll_jax.typing import Backbone

# The means and standard deviations of RGB values 0-255 that published weights expect.
PIXELS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "clip": (
        (122.7709383, 116.7460125, 104.09373615),
        (68.5005327, 66.6321579, 70.32316305),
    ),
    # DINOv3 of satellite images
    "satellite": ((109.65, 104.805, 75.48), (54.315, 39.78, 36.465)),
    "caffe": ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0)),
}


# The width, depth and heads of vision transformers.
_TINY, _SMALL, _BASE, _LARGE = (192, 12, 3), (384, 12, 6), (768, 12, 12), (1024, 24, 16)
_HUGE, _GIANT, _SO400M = (1280, 32, 20), (1536, 40, 24), (1152, 27, 16)


def _vit(pixels: str, patch: int, size: tuple[int, int, int], **options: Any) -> ViTConfig:
    mean, std = PIXELS[pixels]
    return ViTConfig(patch, *size, mean=mean, std=std, **options)


_augreg = functools.partial(_vit, "half")
_dinov2 = functools.partial(_vit, "imagenet", 14, image_size=518, layer_scale=True)
_dinov2_reg4 = functools.partial(_dinov2, registers=4, antialias=True)
_dinov3 = functools.partial(
    _vit, "imagenet", 16, rotary=True, registers=4, layer_scale=True, epsilon=1e-5
)
_swiglu: dict[str, Any] = {"activation": "swiglu", "mlp_width": 4096}
_clip = functools.partial(_vit, "clip", pre_norm=True, activation="quick_gelu", epsilon=1e-5)
_siglip = functools.partial(
    _vit, "half", class_token=False, attention_pool=True, activation="gelu_tanh"
)

# The widths of ConvNeXts.
_96, _128, _192 = (96, 192, 384, 768), (128, 256, 512, 1024), (192, 384, 768, 1536)
_convnext_v2 = functools.partial(ConvNeXtConfig, response_norm=True)

BACKBONES: dict[str, Backbone] = {
    # For tests: compiles in seconds and learns nothing.
    "resnet_tiny": ResNetConfig((1, 1), width=8, small_images=True),
    # For comparisons of many runs on a CPU.
    "resnet_smaller": ResNetConfig((1, 1, 1), width=16, small_images=True, stem_pool=2),
    "resnet_small": ResNetConfig((1, 1, 1), width=32, small_images=True, stem_pool=2),
    "resnet_medium": ResNetConfig((1, 1, 1), width=64, small_images=True, stem_pool=2),
    "resnet18_small": ResNetConfig((2, 2, 2, 2), small_images=True),
    "resnet18": ResNetConfig((2, 2, 2, 2)),
    "resnet34": ResNetConfig((3, 4, 6, 3)),
    "resnet50": ResNetConfig((3, 4, 6, 3), bottleneck=True),
    "resnet50_v1": ResNetConfig(
        (3, 4, 6, 3),
        bottleneck=True,
        stride_in_first=True,
        mean=PIXELS["caffe"][0],
        std=PIXELS["caffe"][1],
    ),
    "resnet101": ResNetConfig((3, 4, 23, 3), bottleneck=True),
    "resnet152": ResNetConfig((3, 8, 36, 3), bottleneck=True),
    "googlenet_v2": GoogLeNetV2Config(),
    # For CPUs.
    "efficientnet_lite0": EfficientNetLiteConfig(),
    "efficientnet_lite1": EfficientNetLiteConfig(1.0, 1.1),
    "efficientnet_lite2": EfficientNetLiteConfig(1.1, 1.2),
    "efficientnet_lite3": EfficientNetLiteConfig(1.2, 1.4),
    "efficientnet_lite4": EfficientNetLiteConfig(1.4, 1.8),
    # For tests.
    "convnext_test": ConvNeXtConfig((1, 1, 2, 1), (8, 16, 24, 32)),
    # ConvNeXt, also with the weights of DINOv3.
    "convnext_tiny": ConvNeXtConfig((3, 3, 9, 3), _96),
    "convnext_small": ConvNeXtConfig((3, 3, 27, 3), _96),
    "convnext_base": ConvNeXtConfig((3, 3, 27, 3), _128),
    "convnext_large": ConvNeXtConfig((3, 3, 27, 3), _192),
    "convnextv2_atto": _convnext_v2((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnextv2_femto": _convnext_v2((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnextv2_pico": _convnext_v2((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnextv2_nano": _convnext_v2((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnextv2_tiny": _convnext_v2((3, 3, 9, 3), _96),
    "convnextv2_base": _convnext_v2((3, 3, 27, 3), _128),
    "convnextv2_large": _convnext_v2((3, 3, 27, 3), _192),
    # For tests.
    "vit_test": _augreg(8, (24, 3, 2), image_size=32),
    # ViT: of ImageNet-21k (augreg, Google), and DINO, whose pixels are "imagenet".
    "vit_tiny_16": _augreg(16, _TINY),
    "vit_small_32": _augreg(32, _SMALL),
    "vit_small_16": _augreg(16, _SMALL),
    "vit_small_8": _augreg(8, _SMALL),
    "vit_base_32": _augreg(32, _BASE),
    "vit_base_16": _augreg(16, _BASE),
    "vit_base_8": _augreg(8, _BASE),
    "vit_large_16": _augreg(16, _LARGE),
    # DINOv2, without and with four registers.
    "vit_small_14": _dinov2(_SMALL),
    "vit_base_14": _dinov2(_BASE),
    "vit_large_14": _dinov2(_LARGE),
    "vit_giant_14": _dinov2(_GIANT, **_swiglu),
    "vit_small_14_reg4": _dinov2_reg4(_SMALL),
    "vit_base_14_reg4": _dinov2_reg4(_BASE),
    "vit_large_14_reg4": _dinov2_reg4(_LARGE),
    "vit_giant_14_reg4": _dinov2_reg4(_GIANT, **_swiglu),
    # DINOv3.
    "vit_small_16_dinov3": _dinov3(_SMALL),
    "vit_small_plus_16_dinov3": _dinov3(_SMALL, activation="swiglu", mlp_width=1536),
    "vit_base_16_dinov3": _dinov3(_BASE),
    "vit_large_16_dinov3": _dinov3(_LARGE),
    "vit_huge_plus_16_dinov3": _dinov3(_HUGE, activation="swiglu", mlp_width=5120),
    # The vision towers of CLIP and SigLIP.
    "vit_base_32_clip": _clip(32, _BASE),
    "vit_base_16_clip": _clip(16, _BASE),
    "vit_large_14_clip": _clip(14, _LARGE),
    "vit_base_16_siglip": _siglip(16, _BASE),
    "vit_large_16_siglip": _siglip(16, _LARGE, image_size=256),
    "vit_so400m_14_siglip": _siglip(14, _SO400M, mlp_width=4304),
}
