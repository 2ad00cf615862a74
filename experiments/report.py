"""Compares finished runs in a page: scores with intervals, paired differences, curves, options.

    python -m experiments.report --workdir=runs/a,runs/b,runs/c

All runs are compared with the first. Differences are paired by query where the runs scored the same
test images. The queries on which the runs differ most are shown where the images of the first run
are still there, or in --data_dir. The page is one file that fetches nothing.
"""

import pathlib
import sys
from typing import Any

from absl import app, flags

from experiments.engine import checks, command, comparison_page, datasets, finished_runs
from experiments.engine.finished_runs import FinishedRun
from rll_jax.data.image_dataset import EncodedImageDataset


def _test_images(first: FinishedRun, data_dir: str) -> tuple[EncodedImageDataset | None, str]:
    """Returns the test images that a run scored, or why there are none.

    Raises:
      ValueError: `data_dir` is given and does not hold them.
    """
    if first.scores is None:
        return None, f"{first.name} {first.without}."
    config = first.config.replace(**({"data_dir": data_dir} if data_dir else {}))
    try:
        in_place = datasets.open_in_place
        splits, _ = datasets.open_usable(config.data, config.runtime, open_splits=in_place)
        test = splits["test"]
        if checks.data_digest(test) != finished_runs.digest_of_images(first, first.scores):
            where = f"--data_dir={data_dir}" if data_dir else "the data"
            raise ValueError(f"{where}: not the test images that {first.workdir} scored")
    except (ValueError, OSError) as error:
        if data_dir:
            raise
        return None, f"{error}. --data_dir names another folder."
    return test, ""


def main(_: Any) -> None:
    """Runs the command."""
    options = flags.FLAGS
    with command.user_errors():
        folders = [
            folder for given in options.workdir for folder in finished_runs.split_folders(given)
        ]
        out = pathlib.Path(options.out or folders[0] / "comparison.html")
        if options.out:
            command.check_free("out", out)
        runs = finished_runs.read(folders)
        test, without = None, ""
        if len(runs) > 1:
            test, without = _test_images(runs[0], options.data_dir)
        comparison_page.write(out, runs, test, without)
    print(f"page: {out}")
    sys.exit(0)


if __name__ == "__main__":
    flags.DEFINE_multi_string(
        "workdir",
        None,
        "The folders of the runs, with commas between; the flag may be given again. All runs are "
        "compared with the first.",
        required=True,
    )
    flags.DEFINE_string(
        "data_dir", "", "The folder of the dataset. Empty: that of the first run, if it is there."
    )
    flags.DEFINE_string(
        "out",
        "",
        "The page to write. Empty: comparison.html in the first run's folder, overwritten.",
    )
    app.run(main, flags_parser=command.parse_flags)
