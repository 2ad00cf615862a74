"""Writes a trained network into a file that needs nothing of this project.

    python -m experiments.export --workdir=runs/emoji --out=model.safetensors
    python -m experiments.export --workdir=runs/emoji --out=model.stablehlo --format=stablehlo

safetensors: the weights in torchvision's names and layout, for a network in PyTorch; those of a
vision transformer or a ConvNeXt in timm's names, or in Hugging Face's with --names=huggingface. The
embedding heads are {L,M,H}_*, and take maps flattened channels first.

stablehlo: a function from (N, size, size, 3) uint8 images, any N, to (N, D) embeddings, exported by
`jax.export` for CPU, CUDA and TPU. Read it by
`jax.export.deserialize(open(FILE, "rb").read()).call(images)`, or by anything that runs StableHLO.
"""

import pathlib
from typing import Any, cast

from absl import app, flags
import jax
import jax.export
import jax.numpy as jnp

from experiments.engine import command, network, phases, trained_network
from experiments.engine.trained_network import TrainedNetwork
from rll_jax.data import files
from rll_jax.networks import embedding_net, weights
from rll_jax.typing import TokenBackbone


def _stablehlo(trained: TrainedNetwork) -> bytes:
    # An exported function has no axis of devices.
    model = network.make_model(trained.config.network).clone(axis_name=None)
    variables = jax.device_get(trained.variables)
    size = trained.config.data.searched_size

    def embed(images: jax.Array) -> jax.Array:
        levels: Any = model.apply(variables, images)
        return embedding_net.concatenate_levels(levels)

    (batch,) = jax.export.symbolic_shape("N")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    exported = jax.export.export(jax.jit(embed), platforms=("cpu", "cuda", "tpu"))(images)
    return bytes(exported.serialize())


def main(_: Any) -> None:
    """Runs the command."""
    options = flags.FLAGS
    with command.user_errors():
        out = pathlib.Path(options.out)
        command.check_free("out", out)
        trained = trained_network.load_from_flags()
        backbone = trained.config.network.backbone_config
        if options.names == "huggingface" and not isinstance(backbone, TokenBackbone):
            raise ValueError(
                "--names=huggingface is of vision transformers and ConvNeXts, and "
                f"--backbone={trained.config.network.backbone} is none: leave it out"
            )
        with phases.told("writing the file"), files.atomic_write(out) as temporary:
            if options.format == "stablehlo":
                temporary.write_bytes(_stablehlo(trained))
            else:
                arrays = weights.to_named_arrays(trained.variables, backbone)
                if options.names == "huggingface":
                    arrays = cast(TokenBackbone, backbone).to_huggingface(arrays)
                weights.write_safetensors(temporary, arrays)
    size, mib = trained.config.data.searched_size, out.stat().st_size / 2**20
    print(
        f"written: {out} ({mib:.1f} MiB), step {trained.step}, for images of {size} x {size} pixels"
    )


if __name__ == "__main__":
    trained_network.define_flags()
    flags.DEFINE_string("out", None, "The file to write.", required=True)
    flags.DEFINE_enum(
        "format", "safetensors", ["safetensors", "stablehlo"], "The format of the file."
    )
    flags.DEFINE_enum(
        "names",
        "published",
        ["published", "huggingface"],
        "The names of the weights in a .safetensors file: torchvision's, timm's and Caffe's, or, "
        "of a vision transformer or a ConvNeXt, Hugging Face's.",
    )
    app.run(main, flags_parser=command.parse_flags)
