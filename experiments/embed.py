"""Embeds all images of a folder by a trained network, for faiss and the like.

    python -m experiments.embed --workdir=runs/emoji --images=DIR --out=embeddings.npz

A .npz holds "files" (N,) and "embeddings" (N, D) float32 of unit length; a .parquet, which needs
pyarrow, holds the columns file and embedding. After an interruption the same command resumes.
Images that cannot be read are listed at the end; the exit code is then 1.
"""

from collections.abc import Callable
import pathlib
import sys
from typing import Any

from absl import app, flags
import numpy as np

from experiments.engine import command, embedding_index, trained_network
from experiments.engine.embedding_index import Index
from rll_jax.data import files


def _writer(path: pathlib.Path) -> Callable[[pathlib.Path, Index], None]:
    """Returns the function that writes such a file; raises ValueError where there is none."""
    if path.suffix == ".npz":
        return _write_npz
    if path.suffix != ".parquet":
        raise ValueError(f"--out={path}: expected a name that ends in .npz or .parquet")
    try:
        import pyarrow  # noqa: F401 (checked before any work)
    except ImportError:
        raise ValueError(
            f"--out={path}: writing Parquet needs pyarrow (pip install pyarrow); .npz needs nothing"
        ) from None
    return _write_parquet


def _write_parquet(path: pathlib.Path, index: Index) -> None:
    import pyarrow
    from pyarrow import parquet

    # The names of files may hold any bytes.
    names = [name.encode(errors="backslashreplace").decode() for name in index.files.tolist()]
    values = pyarrow.array(index.embeddings.ravel())
    rows = pyarrow.FixedSizeListArray.from_arrays(values, index.embeddings.shape[1])
    table = pyarrow.table({"file": pyarrow.array(names), "embedding": rows})
    parquet.write_table(table, path)


def _write_npz(path: pathlib.Path, index: Index) -> None:
    with path.open("wb") as file:
        np.savez(file, files=index.files, embeddings=index.embeddings)


def main(_: Any) -> None:
    """Runs the command."""
    options = flags.FLAGS
    with command.user_errors():
        out = pathlib.Path(options.out)
        write = _writer(out)
        command.check_free("out", out)
        trained = trained_network.load_from_flags()
        index = embedding_index.update(options.workdir, trained, options.images)
        with files.atomic_write(out) as temporary:
            write(temporary, index)
    print(
        f"written: {out}: {len(index.files)} images x {index.embeddings.shape[1]}, "
        f"{index.num_embedded} of them embedded now"
    )
    sys.exit(embedding_index.print_unreadable(index.unreadable))


if __name__ == "__main__":
    trained_network.define_flags()
    flags.DEFINE_string(
        "images", None, "The folder of images, with all folders in it.", required=True
    )
    flags.DEFINE_string("out", None, "The file to write, .npz or .parquet.", required=True)
    app.run(main, flags_parser=command.parse_flags)
