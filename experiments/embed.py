"""Embeddings and names of all the images in a folder, by a trained network, ready for faiss and the like.

    python -m experiments.embed --workdir=runs/emoji --images=DIR --out=embeddings.npz

A .npz holds "files" (N,) and "embeddings" (N, D) float32 of unit length; a .parquet (needs pyarrow) the columns file and embedding.
Given again after an interruption, it goes on. Images that cannot be read are listed at the end; then the exit code is 1.
"""

import pathlib
import sys

from absl import app, flags
import numpy as np

from experiments.engine import build, embedding_index
from experiments.engine import config as config_lib


def tell_unreadable(names: list[str]) -> int:
    """Lists them on stderr; the exit code."""
    for name in names:
        print(f"unreadable: {name}", file=sys.stderr)
    return 1 if names else 0


def _writer(path: pathlib.Path):
    if path.suffix == ".npz":
        return _write_npz
    if path.suffix != ".parquet":
        raise ValueError(f"--out={path}: expected a name that ends in .npz or .parquet")
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"--out={path}: writing Parquet needs pyarrow (pip install pyarrow); .npz needs nothing"
        )

    def write(path, index):
        dim = index.embeddings.shape[1]
        names = [
            name.encode(errors="backslashreplace").decode() for name in index.files.tolist()
        ]  # any bytes may be in them
        rows = pa.FixedSizeListArray.from_arrays(pa.array(index.embeddings.ravel()), dim)
        parquet.write_table(pa.table({"file": pa.array(names), "embedding": rows}), path)

    return write


def _write_npz(path, index):
    with path.open("wb") as file:
        np.savez(file, files=index.files, embeddings=index.embeddings)


def main(_):
    options = flags.FLAGS
    with config_lib.mistakes_in_one_line():
        out = pathlib.Path(options.out)
        write = _writer(out)
        config_lib.check_free("out", out)
        trained = build.load(options.workdir, options.step, options.best)
        index = embedding_index.update(options.workdir, trained, options.images)
        with config_lib.written_whole(out) as aside:
            write(aside, index)
    print(
        f"written: {out}: {len(index.files)} images x {index.embeddings.shape[1]}, {index.embedded} of them embedded now"
    )
    sys.exit(tell_unreadable(index.unreadable))


if __name__ == "__main__":
    build.define_flags()
    flags.DEFINE_string("images", None, "folder of images, its folders too", required=True)
    flags.DEFINE_string("out", None, "file to write, .npz or .parquet", required=True)
    app.run(main, flags_parser=config_lib.parse_flags)
