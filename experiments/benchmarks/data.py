"""Images a second of one core, from JPEG files to train batches, beside PyTorch's DataLoader.

    python -m experiments.benchmarks.data                     # 9 minutes on 2 busy cores
    python -m experiments.benchmarks.data --kb=26 --rounds=1  # 2 minutes

`experiments/benchmarks/README.md` says what is measured and what the rows mean.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import io
import itertools
import multiprocessing
import os
import pathlib
import tempfile
import time
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from experiments.engine import measuring

if TYPE_CHECKING:
    import numpy as np

    from rll_jax.data import sampler

_STAGES = {
    "read": "read an image's bytes",
    "header": "size from the header",
    "decode": "decode the whole image",
    "train_view": "decode, train view",
    "test_view": "decode, test view",
}
_NAMES = _STAGES | {
    "whole": "**train batches, whole**",
    "processes": "the same, worker processes",
    "cached": "the same, `--cache=memory`, once filled",
}
_WORK = [(side, kind) for kind in ("stages", "whole", "processes") for side in ("ours", "torch")]
_WORK += [("ours", "cached")]  # side and kind of each process of a round
_SIDE, _CROP, _RESIZE = 640, 227, 256  # of the images, the views, and the images of test views
_IMAGES_PER_CLASS = 4
_WARM_UP = 8  # batches or passes before any counts: no more are made ahead

_KB = flags.DEFINE_multi_integer(
    "kb", [250, 26], "Size of the files in kB; may be given several times.", lower_bound=5
)
_IMAGES = flags.DEFINE_integer(
    "images",
    64,
    f"Number of images of each size, {_IMAGES_PER_CLASS} of each class.",
    lower_bound=2 * _IMAGES_PER_CLASS,
)
_PROCESSES = flags.DEFINE_integer(
    "processes", 1, "Number of worker processes, in the row that has them.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "Processes for each measurement; the best is shown.", lower_bound=1
)
_SECONDS = flags.DEFINE_float(
    "seconds",
    1.0,
    "CPU time of each measurement, about; at least one batch or pass.",
    lower_bound=0.02,
)
_TABLE = flags.DEFINE_string("table", "", "File to write the table to; empty: none.")


# ---- The images


class _Jpeg(NamedTuple):
    """A file.

    Attributes:
      data: its bytes.
      quality: JPEG's, 1 to 97.
      noise: standard deviation of the noise that was added, in grey levels.
    """

    data: bytes
    quality: int
    noise: float


def _write_images(folder: pathlib.Path, kb: int, count: int) -> str:
    """Writes JPEG files into `folder/files` and the same as ArrayRecord into `folder/prepared`.

    Returns:
      A text with the mean size, quality and noise of the files.
    """
    import numpy as np
    from sklearn.datasets import load_sample_images

    from rll_jax.data import array_records, benchmarks

    (folder / "files").mkdir(parents=True)
    rng, photos, rows, sizes = np.random.default_rng(0), load_sample_images().images, [], []
    for i in range(count):
        mirrored = np.pad(  # goes on at all edges
            photos[i % 2], [(0, 427), (0, 640), (0, 0)], "symmetric"
        )
        shift = rng.integers(0, mirrored.shape[:2])
        piece = np.roll(mirrored, shift, (0, 1))[:_SIDE, :_SIDE]
        jpeg = _jpeg_of_size(piece, rng.standard_normal(piece.shape, np.float32), kb)
        rows.append(benchmarks.Row(f"{i:04}.jpg", i // _IMAGES_PER_CLASS, benchmarks.TRAIN))
        (folder / "files" / rows[-1].path).write_bytes(jpeg.data)
        sizes.append((len(jpeg.data) / 1000, jpeg.quality, jpeg.noise))
    with contextlib.redirect_stdout(io.StringIO()):
        array_records.write_dataset(folder / "files", rows, folder / "prepared")
    return "{:.0f} kB in the mean (JPEG quality {:.0f}, noise of {:.1f} grey levels)".format(
        *np.mean(sizes, axis=0)
    )


def _jpeg_of_size(piece: "np.ndarray", grain: "np.ndarray", kb: int) -> _Jpeg:
    """Encodes an image at the least quality that gives `kb`, with noise where none does."""
    import numpy as np

    pixels, noise = piece, 0.0
    while len(_encoded(pixels, 97)) < kb * 1000:
        noise += 0.5
        pixels = np.clip(piece + noise * grain, 0, 255).astype(np.uint8)
    quality = 1 + bisect.bisect_left(
        range(1, 97), kb * 1000, key=lambda quality: len(_encoded(pixels, quality))
    )
    return _Jpeg(_encoded(pixels, quality), quality, noise)


def _encoded(pixels: "np.ndarray", quality: int) -> bytes:
    """Returns the JPEG file of an image."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


# ---- One measurement, in a process of its own


_Stages = Mapping[str, Callable[[int], object]]  # {stage: function of an image's number}


def measure(side: str, kind: str, folder: str, seconds: float, processes: int) -> dict[str, float]:
    """Measures one side and kind in this process, on one core where the system can do that.

    Args:
      side: "ours" or "torch".
      kind: "stages", "whole" (batches), "processes" (batches by worker processes) or "cached"
        (batches from decoded images in memory; ours alone).
      folder: where `_write_images` wrote.
      seconds: CPU time of each measurement; at least one batch or pass.
      processes: number of worker processes of the kind "processes".

    Returns:
      {name of a row of the table: images per second of CPU time}.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    root = pathlib.Path(folder)
    if kind == "stages":
        stages = _our_stages(root) if side == "ours" else _peer_stages(root)
        count = len(_files(root))
        return {name: _rate(_passes(stages[name], count), seconds) for name in _STAGES}
    workers = processes if kind == "processes" else 0
    if side == "ours":
        sizes = _our_batch_sizes(root, workers, cached=kind == "cached")
    else:
        sizes = _peer_batch_sizes(root, workers)
    return {kind: _rate(sizes, seconds)}


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((folder / "files").iterdir())


def _passes(stage: Callable[[int], object], count: int) -> Iterator[int]:
    """Does a stage for all images, again and again, and yields their number after each pass."""
    while True:
        yield sum(1 for i in range(count) if stage(i) is not None)


def _rate(counts: Iterator[int], seconds: float) -> float:
    """Returns images per second of CPU time; `counts` yields how many it made since the last."""
    for _ in range(_WARM_UP):
        next(counts)
    start, total, spent = _cpu_seconds(), 0, 0.0
    while spent < seconds:
        total += next(counts)
        spent = _cpu_seconds() - start
    return total / spent


def _cpu_seconds() -> float:
    """Returns the CPU time of this process and of its children that are alive, as Linux has it."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _sampler(files: Sequence[pathlib.Path]) -> "sampler.ClassSampler":
    """Returns the batches of both sides: up to 8 classes."""
    import numpy as np

    from rll_jax.data import sampler

    labels = np.arange(len(files)) // _IMAGES_PER_CLASS
    return sampler.ClassSampler(labels, min(8, len(files) // _IMAGES_PER_CLASS), _IMAGES_PER_CLASS)


def _our_stages(folder: pathlib.Path) -> _Stages:
    import cv2
    import numpy as np

    from rll_jax.data import array_records, images, views

    cv2.setNumThreads(1)
    encoded = [file.read_bytes() for file in _files(folder)]
    augment = views.RandomResizedCrop(_CROP)
    return {
        "read": array_records.open_dataset(folder / "prepared")["train"].image_bytes,
        "header": lambda i: images.EncodedImage(encoded[i], "x"),
        "decode": lambda i: images.decode(encoded[i], "x"),
        "train_view": lambda i: augment(
            images.EncodedImage(encoded[i], "x"), np.random.default_rng((0, i))
        ),
        "test_view": lambda i: views.resize_center_crop(
            images.EncodedImage(encoded[i], "x"), _CROP, _RESIZE
        ),
    }


def _our_batch_sizes(folder: pathlib.Path, processes: int, *, cached: bool) -> Iterator[int]:
    """Makes train batches and yields the size of each. With `cached`, the cache is filled first."""
    import cv2

    from experiments.engine import augmentation
    from rll_jax.data import array_records, cache, pipeline, views

    cv2.setNumThreads(1)
    data = array_records.open_dataset(folder / "prepared")["train"]
    if cached:
        data = cache.in_memory(data, augmentation.resized_side(_CROP))
        for row in range(len(data)):
            data.image_bytes(row)
    batches = pipeline.train_batches(
        data,
        _sampler(_files(folder)),
        views.RandomResizedCrop(_CROP),
        start=0,
        stop=10**6,
        threads=1,
        processes=processes,
    )
    return (len(batch["label"]) for batch in batches)


def _peer_stages(folder: pathlib.Path) -> _Stages:
    from PIL import Image
    import torch  # pyright: ignore[reportMissingImports] (optional)

    from experiments.benchmarks import data_torch

    torch.set_num_threads(1)
    files = _files(folder)
    encoded = [file.read_bytes() for file in files]
    return {
        "read": lambda i: files[i].read_bytes(),
        "header": lambda i: Image.open(io.BytesIO(encoded[i])).size,
        "decode": lambda i: data_torch.decode(io.BytesIO(encoded[i])),
        "train_view": lambda i: data_torch.train_view(io.BytesIO(encoded[i]), _CROP),
        "test_view": lambda i: data_torch.test_view(io.BytesIO(encoded[i]), _CROP, _RESIZE),
    }


def _peer_batch_sizes(folder: pathlib.Path, processes: int) -> Iterator[int]:
    import torch  # pyright: ignore[reportMissingImports] (optional)

    from experiments.benchmarks import data_torch

    torch.set_num_threads(1)
    files = _files(folder)
    batches = _sampler(files)
    loader = torch.utils.data.DataLoader(
        data_torch.Files(files, batches.labels.tolist(), _CROP),
        batch_sampler=(batches.batch(step).tolist() for step in itertools.count()),
        num_workers=processes,
    )
    return (len(labels) for _, labels in loader)


# ---- The command

_Rates = dict[tuple[int, str, str], float]  # {(kB, side, row): images per second of CPU time}


def _table(rates: _Rates, kbs: Sequence[int]) -> str:
    """Returns the best rates of both sides, and how many times the peer's rate ours is."""
    head = ["what", *(cell for kb in kbs for cell in (f"{kb} kB", "PyTorch", "ratio"))]
    lines = []
    for name, text in _NAMES.items():
        cells = []
        for kb in kbs:
            ours, peer = rates[kb, "ours", name], rates.get((kb, "torch", name))
            if peer:
                cells += [f"{ours:,.0f}", f"{peer:,.0f}", f"{ours / peer:.2f}"]
            else:
                cells += [f"{ours:,.0f}", "" if name == "cached" else "not installed", ""]
        lines.append([text, *cells])
    return measuring.markdown_table(head, lines)


def _best_rates(root: pathlib.Path, kbs: Sequence[int]) -> _Rates:
    """Measures everything: one process for each side and kind in turn, in rounds."""
    rates: _Rates = {}
    for number, kb, (side, kind) in itertools.product(range(_ROUNDS.value), kbs, _WORK):
        measured = measuring.in_own_process(
            "experiments.benchmarks.data",
            side=side,
            kind=kind,
            folder=str(root / str(kb)),
            seconds=_SECONDS.value,
            processes=_PROCESSES.value,
        )
        measured = measured or {}
        text = "  ".join(f"{name} {rate:.0f}" for name, rate in measured.items())
        measuring.tell(f"round {number + 1}, {kb} kB, {side} {kind}: {text or 'not installed'}")
        for name, rate in measured.items():
            rates[kb, side, name] = max(rate, rates.get((kb, side, name), 0))
    return rates


def main() -> None:
    """Measures what the flags ask for and prints the table."""
    measuring.check_outputs(_TABLE)
    load, kbs = " ".join(f"{x:.1f}" for x in os.getloadavg()), _KB.value
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        written = [_write_images(root / str(kb), kb, _IMAGES.value) for kb in kbs]
        rates = _best_rates(root, kbs)
    text = (
        f"Images per second of CPU time, one core, on {measuring.machine()}, load before {load}\n"
        f"{_IMAGES.value} images of {_SIDE} x {_SIDE}: {'; '.join(written)}; views of {_CROP} x "
        f"{_CROP}\n\n{_table(rates, kbs)}\n"
    )
    measuring.print_and_write(text, _TABLE.value)


if __name__ == "__main__":
    measuring.run_command(main)
