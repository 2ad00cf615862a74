"""A data set's published files, or a folder of pictures, written once into ArrayRecord files that are read by random access.

    python -m experiments.prepare --dataset=sop --source=DIR
    python -m experiments.prepare --dataset=cub --source=CUB_200_2011.tgz --unpack
    python -m experiments.prepare --dataset=folder --source=DIR --data_dir=OUT

Writes --data_dir/prepared_NAME, by default in the folder of the source; experiments take that folder as their --data_dir. A benchmark's
experiment does the same by itself when its --data_dir holds the unpacked files; folders of one's own need no preparing.
"""
import dataclasses
import pathlib

from absl import app, flags
from etils import epath

from experiments import config as config_lib
from experiments import sources
from rll_jax import archives, published


def _unpack(source: pathlib.Path) -> pathlib.Path:
    """Unpacks an archive, or those in a folder, where they lie; the folder."""
    folder = source.parent if source.is_file() else source
    packed = [source] if source.is_file() else sorted(p for p in folder.rglob("*") if p.name.endswith(published.ARCHIVES) and p.is_file())
    if not packed:
        raise ValueError(f"--source={source}: no archives ({', '.join(published.ARCHIVES)}) in it to --unpack")
    for archive in packed:
        print(f"unpacked: {', '.join(map(str, archives.unpack(archive, archive.parent)))}")
    return folder


def main(_):
    options = flags.FLAGS
    with config_lib.mistakes_in_one_line(), sources.in_one_line(options.source, options.index):
        if options.dataset not in sources.SOURCES or options.dataset == "emoji":
            names = ", ".join(name for name in sources.SOURCES if name != "emoji")
            raise ValueError(f"--dataset={options.dataset}: expected one of {names}")
        if published.is_remote(options.data_dir) or published.is_remote(options.source) and (options.unpack or not options.data_dir):
            raise ValueError(
                f"--source={options.source} --data_dir={options.data_dir}: sets are prepared in a local --data_dir, and archives unpacked in a local --source"
            )
        source = (epath if published.is_remote(options.source) else pathlib).Path(options.source)
        if source.is_file() and not options.unpack:
            raise ValueError(f"--source={source} is a file: --unpack unpacks an archive beside it")
        if not source.exists():
            raise ValueError(f"--source={source}: no such file or folder")
        folder = _unpack(source) if options.unpack else source
        out = sources.prepared_in(options.data_dir or folder, options.dataset)
        if out.exists():
            raise ValueError(f"{out} is there already: remove it, or give another --data_dir")
        config = dataclasses.replace(config_lib.from_flags(), data_dir=str(folder))
        root, rows = sources.listing(config)
        sources.prepare(root, rows, out, config)
    print(f"written: {out}: {len(rows)} images of {len({row.label for row in rows})} classes; now --data_dir={out.parent}")


if __name__ == "__main__":
    config_lib.define_flags(only=("dataset", "data_dir", "index", "test_share", "split_seed", "on_bad_image"))
    flags.DEFINE_string("source", None, "folder of the files, or an archive", required=True)
    flags.DEFINE_bool("unpack", False, "unpack the archive, or those in the folder, where they lie")
    app.run(main, flags_parser=config_lib.parse_flags)
