"""Images a second of one core, from JPEG files to train batches: each stage, and the whole beside PyTorch's DataLoader.

    python -m experiments.benchmarks.data                                  # 9 minutes on 2 busy cores
    python -m experiments.benchmarks.data --kb=26 --rounds=1               # 2 minutes

The pictures are 640 x 640 pieces of scikit-learn's two photographs (JPEG themselves) with their mirror images beside them, encoded
again at the quality that gives files of `--kb`. Stanford Online Products' mean is 26 kB (2.87 GiB, 120,053 images); 250 kB is what a
camera writes, for which a flat piece would get some noise: what was needed is printed.

The peer reads the same pictures in the same order: Pillow, RandomResizedCrop and flip as torchvision does them on Pillow images, a
uint8 tensor, default collate. Ours reads ArrayRecord files, the peer JPEG files; ours reads a JPEG at half its scale where the crop
has the pixels then, which users of torchvision seldom do. Both give uint8 batches; neither normalises.

Images per second of CPU time, of all threads and processes of a measurement, since a shared machine's clock says little. Every
measurement runs in a process of its own on one core (where the system can), in turn, in `--rounds` rounds; the best is shown. The
files are in the system's cache: no disk is measured.
"""

import bisect
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time

from absl import app, flags

from experiments.engine import measuring

_STAGES = {
    "read": "read a picture's bytes", "header": "size from the header", "decode": "decode the whole picture",
    "train_view": "decode, train view", "test_view": "decode, test view",
}  # fmt: skip
_NAMES = _STAGES | {
    "whole": "**train batches, whole**", "processes": "the same, worker processes", "cached": "the same, `--cache=memory`, once filled",
}  # fmt: skip
_WORKERS = [
    f"{side}_{kind}" for kind in ("stages", "whole", "processes") for side in ("ours", "torch")
] + ["ours_cached"]
_SIDE, _CROP, _RESIZE, _EACH = 640, 227, 256, 4
_WARM = 8  # batches or passes before any counts: no more are made ahead
_KB = flags.DEFINE_multi_integer(
    "kb", [250, 26], "Size of the files, kB; once for each size.", lower_bound=5
)
_IMAGES = flags.DEFINE_integer(
    "images", 64, f"Pictures of each size, {_EACH} of each class.", lower_bound=2 * _EACH
)
_PROCESSES = flags.DEFINE_integer(
    "processes", 1, "Worker processes, in the row that has them.", lower_bound=1
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
_TABLE = flags.DEFINE_string("table", "", "File to write the table to, too.")
_WORKER = flags.DEFINE_enum("worker", None, _WORKERS, "Internal: measure this, print JSON.")
_FOLDER = flags.DEFINE_string("folder", "", "Internal: where the pictures are.")


def _write(folder, kb) -> str:
    """The files, and the same prepared; returns what they are."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from rll_jax.data import array_records, benchmarks

    def encoded(pixels, quality):
        Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG", quality=quality)
        return out.getvalue()

    (folder / "files").mkdir(parents=True)
    rng, photos, rows, made = np.random.default_rng(0), load_sample_images().images, [], []
    for i in range(_IMAGES.value):
        mirrored = np.pad(
            photos[i % 2], [(0, 427), (0, 640), (0, 0)], "symmetric"
        )  # goes on at all edges
        piece, noise = (
            np.roll(mirrored, rng.integers(0, mirrored.shape[:2]), (0, 1))[:_SIDE, :_SIDE],
            0.0,
        )
        pixels, grain = piece, rng.standard_normal(piece.shape, np.float32)
        while len(encoded(pixels, 97)) < kb * 1000:
            noise += 0.5
            pixels = np.clip(piece + noise * grain, 0, 255).astype(np.uint8)
        quality = 1 + bisect.bisect_left(
            range(1, 97), kb * 1000, key=lambda q: len(encoded(pixels, q))
        )
        rows.append(benchmarks.Row(f"{i:04}.jpg", i // _EACH, benchmarks.TRAIN))
        (folder / "files" / rows[-1].path).write_bytes(data := encoded(pixels, quality))
        made.append((len(data) / 1000, quality, noise))
    with contextlib.redirect_stdout(io.StringIO()):
        array_records.write_dataset(folder / "files", rows, folder / "prepared")
    return "{:.0f} kB in the mean (JPEG quality {:.0f}, noise of {:.1f} grey levels)".format(
        *np.mean(made, axis=0)
    )


def _cpu_seconds() -> float:
    """Of this process and its children that are alive (read as Linux tells it)."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _rate(done) -> float:
    """Images per second of CPU time; `done` yields how many it made since the last."""
    for _ in range(_WARM):
        next(done)
    start, count, seconds = _cpu_seconds(), 0, 0
    while seconds < _SECONDS.value:
        count += next(done)
        seconds = _cpu_seconds() - start
    return count / seconds


def _measure(side, kind, folder) -> dict[str, float]:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import numpy as np

    from rll_jax.data import sampler

    files = sorted((folder / "files").iterdir())
    labels, encoded = np.arange(len(files)) // _EACH, [file.read_bytes() for file in files]
    batches = sampler.ClassSampler(labels, min(8, len(files) // _EACH), _EACH)
    processes = _PROCESSES.value if kind == "processes" else 0
    if side == "ours":
        import cv2

        from experiments.engine import datasets
        from rll_jax.data import array_records, cache, images, pipeline, views

        cv2.setNumThreads(1)
        data, augment = (
            array_records.open_dataset(folder / "prepared")["train"],
            views.RandomResizedCrop(_CROP),
        )
        stages = {
            "read": data.image_bytes,
            "header": lambda i: images.EncodedImage(encoded[i], "x"),
            "decode": lambda i: images.decode(encoded[i], "x"),
            "train_view": lambda i: augment(
                images.EncodedImage(encoded[i], "x"), np.random.default_rng((0, i))
            ),
            "test_view": lambda i: views.resize_center_crop(
                images.EncodedImage(encoded[i], "x"), _CROP, _RESIZE
            ),
        }
        if kind == "cached":
            data = cache.in_memory(data, datasets.cached_side(_CROP))
            list(map(data.image_bytes, range(len(data))))
        made = pipeline.train_batches(
            data, batches, augment, start=0, stop=10**6, threads=1, processes=processes
        )
        whole = (len(batch["label"]) for batch in made)
    else:
        from PIL import Image
        import torch

        from experiments.benchmarks import data_torch

        torch.set_num_threads(1)
        stages = {
            "read": lambda i: files[i].read_bytes(),
            "header": lambda i: Image.open(io.BytesIO(encoded[i])).size,
            "decode": lambda i: data_torch.decode(io.BytesIO(encoded[i])),
            "train_view": lambda i: data_torch.train_view(io.BytesIO(encoded[i]), _CROP),
            "test_view": lambda i: data_torch.test_view(io.BytesIO(encoded[i]), _CROP, _RESIZE),
        }
        rows = (batches.batch(step).tolist() for step in itertools.count())
        made = torch.utils.data.DataLoader(
            data_torch.Files(files, labels.tolist(), _CROP),
            batch_sampler=rows,
            num_workers=processes,
        )
        whole = (len(labels) for _, labels in made)
    if kind != "stages":
        return {kind: _rate(whole)}
    return {
        name: _rate(
            sum(1 for i in range(len(files)) if stages[name](i) is not None)
            for _ in itertools.count()
        )
        for name in _STAGES
    }


def _table(rates, kbs):
    """Best rates of both, and how many times the peer's ours is."""
    head = [cell for kb in kbs for cell in (f"{kb} kB", "PyTorch", "ratio")]
    lines = [f"| what | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for name, text in _NAMES.items():
        cells = []
        for ours, theirs in (
            (rates[kb, "ours", name], rates.get((kb, "torch", name))) for kb in kbs
        ):
            missing = "" if name == "cached" else "not installed"
            cells += [
                f"{ours:,.0f}",
                f"{theirs:,.0f}" if theirs else missing,
                f"{ours / theirs:.2f}" if theirs else "",
            ]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError("there are no arguments but flags")
    if _WORKER.value:
        print(json.dumps(_measure(*_WORKER.value.split("_"), pathlib.Path(_FOLDER.value))))
        return
    load, rates, about = " ".join(f"{x:.1f}" for x in os.getloadavg()), {}, []
    with tempfile.TemporaryDirectory() as folder:
        for kb in _KB.value:
            about.append(_write(pathlib.Path(folder) / str(kb), kb))
        for number, kb, worker in itertools.product(range(_ROUNDS.value), _KB.value, _WORKERS):
            own = (
                f"--worker={worker}",
                f"--folder={folder}/{kb}",
                f"--seconds={_SECONDS.value}",
                f"--processes={_PROCESSES.value}",
            )
            measured = measuring.in_own_process("experiments.benchmarks.data", *own) or {}
            shown = (
                "  ".join(f"{name} {rate:.0f}" for name, rate in measured.items())
                or "not installed"
            )
            print(f"round {number + 1}, {kb} kB, {worker}: {shown}", file=sys.stderr, flush=True)
            for name, rate in measured.items():
                key = kb, worker.split("_")[0], name
                rates[key] = max(rate, rates.get(key, 0))
    text = (
        f"Images per second of CPU time, one core, on {measuring.machine()}, load before {load}\n{_IMAGES.value} pictures of {_SIDE} x "
        f"{_SIDE}: {'; '.join(about)}; views of {_CROP} x {_CROP}\n\n{_table(rates, _KB.value)}\n"
    )
    print(text, end="")
    if _TABLE.value:
        pathlib.Path(_TABLE.value).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
