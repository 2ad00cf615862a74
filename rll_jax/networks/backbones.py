"""The backbones by name, for `--backbone`: each family has a file, each network a line here."""

from rll_jax.networks.googlenet import GoogLeNetV2Config
from rll_jax.networks.resnet import ResNetConfig
from rll_jax.typing import Backbone

_CAFFE_MEAN, _NO_STD = (123.68, 116.779, 103.939), (1.0, 1.0, 1.0)

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
        (3, 4, 6, 3), bottleneck=True, stride_in_first=True, mean=_CAFFE_MEAN, std=_NO_STD
    ),
    "resnet101": ResNetConfig((3, 4, 23, 3), bottleneck=True),
    "resnet152": ResNetConfig((3, 8, 36, 3), bottleneck=True),
    "googlenet_v2": GoogLeNetV2Config(),
}
