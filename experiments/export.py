"""A trained network in files that need nothing of this project.

    python -m experiments.export --workdir=runs/emoji --out=model.safetensors
    python -m experiments.export --workdir=runs/emoji --out=model.stablehlo --format=stablehlo

safetensors: the weights in torchvision's names and layout, the embedding layers as {L,M,H}_*, which take maps flattened channels
first; for a network in PyTorch.
stablehlo: `jax.export`ed function from (N, size, size, 3) uint8 images, any N, to (N, D) embeddings; for
`jax.export.deserialize(open(FILE, "rb").read()).call(images)` and whatever else runs StableHLO, on CPU, CUDA or TPU.
"""

import pathlib
from typing import cast

from absl import app, flags
import jax
import jax.export
import jax.numpy as jnp

from experiments.engine import build
from experiments.engine import config as config_lib
from rll_jax.networks import embedding_net, weights


def _stablehlo(trained) -> bytes:
    # without the training's axis of devices
    model = build.make_model(trained.config).clone(axis_name=None)
    variables = jax.device_get(trained.variables)
    size = trained.config.image_size
    (batch,) = jax.export.symbolic_shape("N")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    function = jax.jit(
        lambda images: embedding_net.concatenate_levels(
            cast(dict[str, jax.Array], model.apply(variables, images))
        )
    )
    return bytes(jax.export.export(function, platforms=("cpu", "cuda", "tpu"))(images).serialize())


def main(_):
    options = flags.FLAGS
    with config_lib.mistakes_in_one_line():
        out = pathlib.Path(options.out)
        config_lib.check_free("out", out)
        trained = build.load(options.workdir, options.step, options.best)
        with config_lib.written_whole(out) as aside:
            if options.format == "stablehlo":
                aside.write_bytes(_stablehlo(trained))
            else:
                weights.write_safetensors(
                    aside, weights.to_named_arrays(trained.variables, trained.config.network)
                )
    size = trained.config.image_size
    print(
        f"written: {out} ({out.stat().st_size / 2**20:.1f} MiB), step {trained.step}, for images of {size} x {size} pixels"
    )


if __name__ == "__main__":
    build.define_flags()
    flags.DEFINE_string("out", None, "file to write", required=True)
    flags.DEFINE_enum("format", "safetensors", ["safetensors", "stablehlo"], "what to write")
    app.run(main, flags_parser=config_lib.parse_flags)
