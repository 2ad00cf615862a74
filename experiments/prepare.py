"""A data set's published files, or a folder of pictures, written once into ArrayRecord files that are read by random access.

    python -m experiments.prepare --dataset=sop --source=DIR
    python -m experiments.prepare --dataset=cub --source=CUB_200_2011.tgz --unpack
    python -m experiments.prepare --dataset=folder --source=DIR --data_dir=OUT

Writes --data_dir/prepared_NAME, by default in the folder of the source. A benchmark's experiment takes that --data_dir, and does the
same by itself when it holds the unpacked files; folders of one's own need no preparing, and --data_dir=OUT/prepared_folder reads one.
"""

import dataclasses
import pathlib

from absl import app, flags
from etils import epath

from experiments.engine import config as config_lib
from experiments.engine import datasets
from rll_jax.data import archives, benchmarks, paths


def _unpack(source: pathlib.Path) -> pathlib.Path:
    """Unpacks an archive, or those in a folder, where they lie; the folder."""
    folder = source.parent if source.is_file() else source
    packed = (
        [source]
        if source.is_file()
        else sorted(
            p for p in folder.rglob("*") if p.name.endswith(benchmarks.ARCHIVES) and p.is_file()
        )
    )
    if not packed:
        raise ValueError(
            f"--source={source}: no archives ({', '.join(benchmarks.ARCHIVES)}) in it to --unpack"
        )
    for archive in packed:
        tops = archives.unpack(archive, archive.parent)
        print(f"unpacked: {', '.join(map(str, tops))}")
    # what lay in an archive alone is the set; a folder of archives is one as a whole
    return tops[0] if source.is_file() and len(tops) == 1 and tops[0].is_dir() else folder


def main(_):
    options = flags.FLAGS
    with config_lib.mistakes_in_one_line(), datasets.in_one_line(options.source, options.index):
        names = [name for name in datasets.SOURCES if name != "emoji"]
        if options.dataset not in names:
            raise ValueError(f"--dataset={options.dataset}: expected one of {', '.join(names)}")
        if (
            paths.is_remote(options.data_dir)
            or paths.is_remote(options.source)
            and (options.unpack or not options.data_dir)
        ):
            raise ValueError(
                f"--source={options.source} --data_dir={options.data_dir}: sets are prepared in a local --data_dir, and archives unpacked in a local --source"
            )
        source = (epath if paths.is_remote(options.source) else pathlib).Path(options.source)
        if source.is_file() and not options.unpack:
            raise ValueError(f"--source={source} is a file: --unpack unpacks an archive beside it")
        if not source.exists():
            raise ValueError(f"--source={source}: no such file or folder")
        out = datasets.prepared_in(
            options.data_dir or (source.parent if source.is_file() else source), options.dataset
        )
        if out.exists():
            raise ValueError(f"{out} is there already: remove it, or give another --data_dir")
        folder = _unpack(source) if options.unpack else source
        config = dataclasses.replace(config_lib.from_flags(), data_dir=str(folder))
        root, rows = datasets.listing(config)
        datasets.prepare(root, rows, out, config)
    print(
        f"written: {out}: {len(rows)} images of {len({row.label for row in rows})} classes; now --data_dir={out if options.dataset == 'folder' else out.parent}"
    )


if __name__ == "__main__":
    config_lib.define_flags(
        dataset="",
        only=("dataset", "data_dir", "index", "test_share", "split_seed", "on_bad_image"),
    )
    flags.DEFINE_string("source", None, "folder of the files, or an archive", required=True)
    flags.DEFINE_bool("unpack", False, "unpack the archive, or those in the folder, where they lie")
    app.run(main, flags_parser=config_lib.parse_flags)
