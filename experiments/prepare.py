"""Writes a dataset into ArrayRecord files, once.

    python -m experiments.prepare --dataset=sop --source=DIR
    python -m experiments.prepare --dataset=cub --source=CUB_200_2011.tgz --unpack
    python -m experiments.prepare --dataset=folder --source=DIR --data_dir=OUT

Writes --data_dir/prepared_NAME, by default in the folder of the source. A benchmark's command takes
that --data_dir, and prepares unpacked files by itself. A folder of your own needs no preparing;
--data_dir=OUT/prepared_folder reads a prepared one.
"""

from collections.abc import Iterator
import os
import pathlib
from typing import Any

from absl import app
from absl import flags as absl_flags

from experiments.engine import command, datasets, flags, phases
from rll_jax.data import archives, benchmarks, image_files, paths


def _unpack(source: pathlib.Path) -> pathlib.Path:
    """Unpacks an archive, or those of a folder, beside them; returns the dataset's folder."""
    folder = source.parent if source.is_file() else source
    packed = [source]
    if not source.is_file():
        packed = list(_archives_in(folder))
    if not packed:
        raise ValueError(
            f"--source={source}: no archives ({', '.join(benchmarks.ARCHIVES)}) in it to --unpack"
        )
    unpacked: list[pathlib.Path] = []
    for archive in packed:
        reason = "" if source.is_file() else archives.reason_to_skip(archive, archive.parent)
        if reason:
            print(f"skipped: {archive}: {reason}", flush=True)
            continue
        unpacked = archives.unpack(archive, archive.parent)
        print(f"unpacked: {', '.join(map(str, unpacked))}")
    # The single folder of a single archive is the dataset; archives of a folder are one together.
    if source.is_file() and len(unpacked) == 1 and unpacked[0].is_dir():
        return unpacked[0]
    return folder


def _archives_in(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the archives under a folder, sorted, but for hidden folders."""
    for parent, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not image_files.is_hidden(name))
        for name in sorted(names):
            if name.endswith(benchmarks.ARCHIVES) and not image_files.is_hidden(name):
                yield pathlib.Path(parent, name)


def _check_places(options: absl_flags.FlagValues) -> None:
    """Raises ValueError where files would be written to an object store."""
    remote_source = paths.is_remote(options.source)
    writes_there = remote_source and (options.unpack or not options.data_dir)
    if paths.is_remote(options.data_dir) or writes_there:
        raise ValueError(
            f"--source={options.source} --data_dir={options.data_dir}: datasets are prepared in a "
            "local --data_dir, and archives unpacked in a local --source"
        )


def _source(options: absl_flags.FlagValues) -> Any:
    source = paths.to_path(options.source)
    if source.is_file() and not options.unpack:
        raise ValueError(f"--source={source} is a file: --unpack unpacks an archive beside it")
    if not source.exists():
        raise ValueError(f"--source={source}: no such file or folder")
    return source


def main(_: Any) -> None:
    """Runs the command."""
    options = absl_flags.FLAGS
    with command.user_errors(), datasets.store_errors(options.source, options.index):
        names = [*benchmarks.BENCHMARKS, "folder"]
        if options.dataset not in names:
            raise ValueError(f"--dataset={options.dataset}: expected one of {', '.join(names)}")
        _check_places(options)
        source = _source(options)
        parent = options.data_dir or (source.parent if source.is_file() else source)
        out = datasets.array_records_folder(parent, options.dataset)
        if out.exists():
            raise ValueError(f"{out} exists already: remove it, or give another --data_dir")
        folder = str(_unpack(source) if options.unpack else source)
        config = flags.config_from_flags().replace(data_dir=folder)
        with phases.told("listing the images"):
            listing = datasets.list_images(config.data, folder)
        datasets.write_array_records(listing, out, config.data, config.runtime)
    classes = len({row.label for row in listing.rows})
    data_dir = out if options.dataset == "folder" else out.parent
    print(
        f"written: {out}: {len(listing.rows)} images of {classes} classes; now "
        f"--data_dir={data_dir}"
    )


if __name__ == "__main__":
    flags.define(
        dataset="",
        only=(
            "dataset",
            "data_dir",
            "index",
            "test_share",
            "test_classes",
            "split_seed",
            "on_bad_image",
        ),
    )
    absl_flags.DEFINE_string(
        "source", None, "The folder of the dataset's files, or an archive.", required=True
    )
    absl_flags.DEFINE_bool(
        "unpack", False, "Unpack the archive, or the archives of the folder, beside them."
    )
    app.run(main, flags_parser=command.parse_flags)
