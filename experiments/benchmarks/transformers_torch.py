"""Networks of transformers, with an embedding, for `experiments.benchmarks.model`."""

import torch  # pyright: ignore[reportMissingImports] (optional)
from torch import nn  # pyright: ignore[reportMissingImports] (optional)
import torch.nn.functional as F  # pyright: ignore[reportMissingImports] (optional)

from rll_jax.networks.convnext import ConvNeXtConfig
from rll_jax.networks.vit import ViTConfig


class EmbeddingViT(nn.Module):
    """The network of a plain `ViTConfig` with level H, which takes the class token.

    Args:
      config: the network.
      dim: embedding dimension.

    Raises:
      ValueError: the network has what transformers' `ViTModel` has not.
    """

    def __init__(self, config: ViTConfig, dim: int):
        import transformers  # pyright: ignore[reportMissingImports] (optional)

        super().__init__()
        special = config.registers, config.layer_scale, config.pre_norm, config.attention_pool
        if any(special) or config.rotary or config.activation != "gelu" or not config.class_token:
            raise ValueError(f"transformers' ViTModel is another network than {config}")
        self.vit = transformers.ViTModel(
            transformers.ViTConfig(
                hidden_size=config.width,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                intermediate_size=config.mlp_width or 4 * config.width,
                patch_size=config.patch,
                image_size=config.image_size,
                layer_norm_eps=config.epsilon,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )
        self._side = config.image_size
        self.embedding = nn.Linear(config.width, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, dim) float32 of unit length, of (B, 3, H, W) normalised pixels."""
        others = x.shape[-2:] != (self._side, self._side)
        tokens = self.vit(x, interpolate_pos_encoding=others).last_hidden_state
        return F.normalize(self.embedding(tokens[:, 0]).float())


class EmbeddingConvNeXt(nn.Module):
    """The network of a `ConvNeXtConfig` with level H, which takes the normalised mean.

    Args:
      config: the network.
      dim: embedding dimension.
    """

    def __init__(self, config: ConvNeXtConfig, dim: int):
        import transformers  # pyright: ignore[reportMissingImports] (optional)

        super().__init__()
        depths, widths = [*config.stage_sizes], [*config.widths]
        sizes = {"depths": depths, "hidden_sizes": widths, "layer_norm_eps": 1e-6}
        if config.response_norm:
            self.convnext = transformers.ConvNextV2Model(transformers.ConvNextV2Config(**sizes))
        else:
            self.convnext = transformers.ConvNextModel(transformers.ConvNextConfig(**sizes))
        self.embedding = nn.Linear(config.widths[-1], dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, dim) float32 of unit length, of (B, 3, H, W) normalised pixels."""
        return F.normalize(self.embedding(self.convnext(x).pooler_output).float())
