"""Data of one's own, from the files to a report, by command."""

import csv
import json
import shutil
import subprocess
import tarfile
import time

import numpy as np
import pytest

from experiments.engine import datasets, trained_network
from experiments.engine.runtime import RuntimeOptions
from rll_jax.data import benchmarks
from tests.helpers.benchmark_trees import jpeg, make_cub, make_inshop, make_sop
from tests.helpers.commands import SMALL, command, refused, run, scores


@pytest.fixture
def folder(tmp_path):
    """Eight classes of four images: c4 to c7 are searched."""
    for c in range(8):
        for i in range(4):
            path = tmp_path / f"data/{'train' if c < 4 else 'test'}/c{c}/{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(c))
    return tmp_path / "data"


def test_in_shop_searches_a_gallery(tmp_path):
    make_inshop(tmp_path / "data")
    result = run(
        *SMALL,
        "--report",
        f"--data_dir={tmp_path / 'data'}",
        f"--workdir={tmp_path / 'run'}",
        name="inshop",
    )
    assert result.returncode == 0, result.stderr
    assert (
        "note: In-shop Clothes Retrieval: train has 16 images of 4 classes; "
        "published are 25,882 of 3,997" in result.stderr
    )
    last = scores(tmp_path / "run")[-1]
    assert {"recall@1", "recall@10", "recall@50"} <= last.keys() and last[
        "queries_without_match"
    ] == 0
    page = (tmp_path / "run/report.html").read_text()
    assert page.count('class="query"') == 3 * 4  # all four queries, as worst, typical and best
    assert page.count('alt="query: img/') == 3 * 4
    again = run(f"--workdir={tmp_path / 'run'}", "--clustering=false", name="evaluate")
    assert again.returncode == 0, again.stderr
    found = json.loads((tmp_path / "run/evaluation.json").read_text())["scores"]["H"]
    assert found["recall@1"] == pytest.approx(last["recall@1"])


@pytest.mark.slow
def test_sop_on_eight_devices_with_its_categories(tmp_path):
    make_sop(tmp_path / "data")
    result = run(
        "--flagfile=experiments/flagfiles/sop_2020.flags",
        *SMALL,
        "--levels=H",
        "--sampling=hierarchical",
        "--cache=disk",
        f"--data_dir={tmp_path / 'data'}",
        f"--workdir={tmp_path / 'run'}",
        name="sop",
        devices=8,
    )
    assert result.returncode == 0, result.stderr
    assert "cache: about 0 MiB on disk for 48 images" in result.stdout
    last = scores(tmp_path / "run")[-1]
    assert last["recall@1000"] == 1 and "map@r" in last
    names = sorted(p.name.split("_")[0] for p in (tmp_path / "data").iterdir())
    assert names == ["Stanford", "cache", "cache", "prepared"]


def test_prepare_from_an_archive(tmp_path):
    make_cub(tmp_path / "there")
    with tarfile.open(tmp_path / "CUB_200_2011.tgz", "w:gz") as file:
        file.add(tmp_path / "there/CUB_200_2011", "CUB_200_2011")
    source, out = tmp_path / "CUB_200_2011.tgz", tmp_path / "out"
    refused("is a file: --unpack unpacks", "--dataset=cub", f"--source={source}", name="prepare")
    result = run(
        "--dataset=cub", f"--source={source}", "--unpack", f"--data_dir={out}", name="prepare"
    )
    assert result.returncode == 0, result.stderr
    assert f"written: {out / 'prepared_cub'}: 40 images of 10 classes" in result.stdout
    assert (tmp_path / "CUB_200_2011/images.txt").exists() and [p.name for p in out.iterdir()] == [
        "prepared_cub"
    ]
    again = run(
        "--dataset=cub", f"--source={tmp_path / 'there'}", f"--data_dir={out}", name="prepare"
    )
    assert again.returncode == 2 and "exists already" in again.stderr
    refused(
        "CUB_200_2011 is there already",
        "--dataset=cub",
        f"--source={source}",
        "--unpack",
        f"--data_dir={tmp_path / 'else'}",
        name="prepare",
    )
    trained = run(*SMALL, f"--data_dir={out}", f"--workdir={tmp_path / 'run'}", name="cub")
    assert trained.returncode == 0, trained.stderr
    assert (
        "note: CUB-200-2011: train has 20 images of 5 classes; published are 5,864 of 100"
        in trained.stderr
    )  # each time


def test_pictures_mended_after_they_were_prepared(tmp_path, capsys):
    """The prepared files hold an empty image still: the refusal and the counts say so."""
    root = make_cub(tmp_path)
    picture = root / "images/001.Some_Bird/Some_Bird_0000_1.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(b"")
    skip = datasets.DataOptions(dataset="cub", on_bad_image="skip")
    stop, runtime = datasets.DataOptions(dataset="cub"), RuntimeOptions(data_dir=str(tmp_path))
    splits, skipped = datasets.open_usable(skip, runtime)
    assert len(splits["train"]) == 19 and len(skipped) == 1
    picture.write_bytes(whole)
    capsys.readouterr()
    with pytest.raises(
        ValueError,
        match=f"Mend them and remove {tmp_path}/prepared_cub, which is written anew, or skip",
    ):
        datasets.open_usable(stop, runtime)
    assert capsys.readouterr().err.count("note: CUB-200-2011: train has 20 images") == 1
    shutil.rmtree(tmp_path / "prepared_cub")
    assert len(datasets.open_usable(stop, runtime)[0]["train"]) == 20


def test_bad_images_stop_a_run_before_it_begins(folder, tmp_path):
    for i in range(3):
        (folder / f"train/c1/{i}.jpg").write_bytes(b"")
    table = tmp_path / "index.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for split in ("train", "test"):
            writer.writerows(
                [p.relative_to(folder), p.parent.name, split]
                for p in sorted((folder / split).rglob("*.jpg"))
            )
        writer.writerows([f"gone/{i}.jpg", "c0", "train"] for i in range(9))
    arguments = [
        *SMALL,
        f"--data_dir={folder}",
        f"--index={table}",
        f"--workdir={tmp_path / 'run'}",
        "--classes_per_batch=3",
    ]
    refused(
        f"12 of the 41 images of {folder} cannot be used: train/c1/0.jpg: missing or empty",
        *arguments,
        name="folder",
    )
    assert not (tmp_path / "run").exists()
    result = run(*arguments, "--on_bad_image=skip", name="folder")
    assert result.returncode == 0, result.stderr
    listed = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert len(listed) == 13 and listed[-2] == "left out: gone/8.jpg: missing or empty"
    assert listed[-1] == "left out: train/c1/3.jpg: the last one of its class"


def test_images_are_searched_at_another_size(folder, tmp_path):
    """The network and its training stay the same."""
    losses, embeddings = [], []
    for size in (16, 24):
        workdir = tmp_path / f"run{size}"
        given = [f"--data_dir={folder}", f"--workdir={workdir}", f"--test_image_size={size}"]
        result = run(*SMALL, *given, "--report", name="folder")
        assert result.returncode == 0, result.stderr
        losses.append([line["loss"] for line in scores(workdir) if "loss" in line])
        assert f"at 16 px, searched at {size} px" in (workdir / "report.html").read_text()
        trained = trained_network.load(str(workdir))
        splits = datasets.open_datasets(trained.config.data, trained.config.runtime)
        assert trained.config.data.test_view()(splits["test"].image(0)).shape == (size, size, 3)
        embeddings.append(trained.embed(splits["test"])["H"])
    assert losses[0] == losses[1]
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-3
    for name, more in (("evaluate", "--clustering=false"), ("export", f"--out={tmp_path / 'x'}")):
        result = run(f"--workdir={tmp_path / 'run24'}", more, name=name)
        assert result.returncode == 0, result.stderr
    assert "for images of 24 x 24 pixels" in result.stdout


def test_images_that_break_on_the_way(folder, tmp_path):
    """A full check finds bad images; without one they are replaced or skipped, up to a limit."""
    for path in (folder / "train/c2/1.jpg", folder / "test/c5/3.jpg"):
        path.write_bytes(path.read_bytes()[:300])
    arguments = [*SMALL, "--steps=8", "--on_bad_image=skip", f"--data_dir={folder}"]
    full = run(
        *arguments,
        "--on_bad_image=stop",
        "--verify_images=full",
        f"--workdir={tmp_path / 'full'}",
        name="folder",
    )
    assert (
        full.returncode == 2
        and "2 of the 32 images of" in full.stderr
        and "cannot decode the image 'train/c2/1.jpg'" in full.stderr
    )
    result = run(
        *arguments,
        "--report",
        "--worker_processes=1",
        f"--workdir={tmp_path / 'run'}",
        name="folder",
    )
    assert result.returncode == 0, result.stderr
    listed = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert sorted(line.split("'")[1] for line in listed) == ["test/c5/3.jpg", "train/c2/1.jpg"]
    assert "15 test images" in (tmp_path / "run/report.html").read_text()
    again = run(f"--workdir={tmp_path / 'run'}", "--clustering=false", name="evaluate")
    assert (
        again.returncode == 0
        and "15 test images" in again.stdout
        and "left out: test/c5/3.jpg" in again.stderr
    ), again.stderr
    few = run(*arguments, "--max_bad_images=1", f"--workdir={tmp_path / 'few'}", name="folder")
    told = [line for line in few.stderr.splitlines() if line.startswith("error: ")]
    assert (
        few.returncode == 2
        and "more than --max_bad_images=1" in told[0]
        and "Traceback" not in few.stderr
    )


def test_other_pictures_are_another_run(folder, tmp_path):
    """A changed folder must not turn classes that were trained on into searched ones."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for c in [*(folder / "train").iterdir(), *(folder / "test").iterdir()]:
        c.rename(flat / c.name)
    arguments = [*SMALL, f"--data_dir={flat}", f"--workdir={tmp_path / 'run'}"]
    result = run(*arguments, name="folder")
    assert result.returncode == 0 and "train: 16 images of 4 classes" in result.stdout, (
        result.stderr
    )
    (flat / "c0").rename(tmp_path / "c0")
    for name, more in (("folder", arguments[:-1]), ("evaluate", [])):
        told = run(*more, f"--workdir={tmp_path / 'run'}", name=name)
        assert told.returncode == 2 and "holds a run on other images" in told.stderr, told.stderr


def test_the_second_half_of_the_classes_is_searched(folder, tmp_path):
    """In a folder and in a table of absolute paths; a prepared folder keeps its split."""
    flat = tmp_path / "flat"
    for c in [*(folder / "train").iterdir(), *(folder / "test").iterdir()]:
        shutil.copytree(c, flat / c.name)
    table = tmp_path / "index.csv"
    lines = [f"{path},{path.parent.name}" for path in sorted(flat.rglob("*.jpg"))]
    table.write_text("\n".join(["path,label", *lines]))
    half = "--test_classes=second_half"
    for index in ("", str(table)):
        options = datasets.DataOptions(dataset="folder", index=index, test_classes="second_half")
        rows = datasets.list_images(options, str(flat)).rows
        assert {(row.path[:2], row.split) for row in rows} == {
            (f"c{c}", "train" if c < 4 else "test") for c in range(8)
        }
    made = run("--dataset=folder", f"--source={flat}", half, name="prepare")
    assert made.returncode == 0, made.stderr
    options = datasets.DataOptions(dataset="folder")
    splits = datasets.open_datasets(options, RuntimeOptions(data_dir=f"{flat}/prepared_folder"))
    assert {path[:2] for path in splits["test"].paths} == {"c4", "c5", "c6", "c7"}
    refused(
        "has train/ and test/, so test_classes=second_half does not go with it",
        *SMALL,
        half,
        f"--data_dir={folder}",
        f"--workdir={tmp_path / 'run'}",
        name="folder",
    )
    refused(
        "--test_classes go with the folder",
        *SMALL,
        half,
        f"--data_dir={flat}/prepared_folder",
        f"--workdir={tmp_path / 'run'}",
        name="folder",
    )


def test_a_table_of_open_metric_learning_keeps_queries_and_gallery_apart(tmp_path):
    make_inshop(tmp_path)
    roles = {
        "train": "train,,",
        "query": "validation,True,False",
        "gallery": "validation,False,True",
    }
    lines = [
        f"{row.path},{row.label},{roles[row.split]}"
        for row in benchmarks.read_listing("inshop", tmp_path).rows
    ]
    table = tmp_path / "df.csv"
    table.write_text("\n".join(["path,label,split,is_query,is_gallery", *lines]))
    options = datasets.DataOptions(dataset="folder", index=str(table))
    splits, _ = datasets.open_usable(options, RuntimeOptions(data_dir=f"{tmp_path}/Img"))
    gallery = splits["test"].in_gallery
    assert len(splits["train"]) == 16 and gallery is not None
    assert (gallery.sum(), (~gallery).sum()) == (12, 4)


def test_border_crop_does_not_go_with_a_cache(folder, tmp_path):
    told = run(
        *SMALL,
        "--cache=memory",
        "--augment=border_crop",
        f"--data_dir={folder}",
        f"--workdir={tmp_path / 'run'}",
        name="folder",
    )
    assert told.returncode == 2 and "leave one of them out" in told.stderr


FROZEN = [
    *SMALL,
    "--ema=0",
    "--batch_norm=frozen",
    "--learning_rate=0.1",
    "--weight_decay=0.5",
    "--steps=4",
    "--warmup=0",
]


@pytest.fixture
def trained(folder, tmp_path):
    """The workdir of a run that has trained all stages."""
    result = run(*FROZEN, f"--data_dir={folder}", f"--workdir={tmp_path / 'first'}", name="folder")
    assert result.returncode == 0, result.stderr
    return tmp_path / "first"


@pytest.mark.slow
def test_frozen_stages_stay(folder, trained, tmp_path):
    """A run keeps the weights that it began with, and its features are cached and used again."""
    options = [
        *FROZEN,
        f"--data_dir={folder}",
        "--frozen_stages=1",
        "--frozen_views=2",
    ]
    result = run(
        *options,
        f"--workdir={tmp_path / 'then'}",
        f"--pretrained={trained}",
        "--compilation_cache=false",
        name="folder",
    )
    assert result.returncode == 0, result.stderr
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("frozen_*.npy")}
    assert [np.load(path, mmap_mode="r").shape[:2] for path in sorted(kept)] == [(16, 1), (16, 2)]
    again = run(
        f"--workdir={tmp_path / 'then'}", "--clustering=false", name="evaluate"
    )  # of the pictures
    found = json.loads((tmp_path / "then/evaluation.json").read_text())["scores"]["H"]
    assert again.returncode == 0 and found["map@r"] == pytest.approx(
        scores(tmp_path / "then")[-1]["map@r"], abs=0.02
    ), again.stderr
    first, then = (
        trained_network.load(tmp_path / name).variables["params"] for name in ("first", "then")
    )
    moved = {
        name: not all(
            np.array_equal(a, b)
            for a, b in zip(first[name].values(), then[name].values(), strict=True)
        )
        for name in ("conv1", "bn1")
    }
    assert moved == {"conv1": False, "bn1": False}

    def kernel(tree, stage):
        return np.asarray(tree[f"layer{stage}_0"]["conv1"]["kernel"])

    assert np.array_equal(kernel(first, 1), kernel(then, 1))
    assert not np.array_equal(kernel(first, 2), kernel(then, 2))
    later = [f"--workdir={tmp_path / 'later'}", f"--pretrained={tmp_path / 'then'}"]
    assert run(*options, *later, name="folder").returncode == 0
    assert kept == {
        path: path.stat().st_mtime_ns for path in folder.glob("frozen_*.npy")
    }  # the same stages, the same pictures
    assert (
        not (tmp_path / "then/compiled").exists()
        and not (tmp_path / "then/bad_images.txt").exists()
    )


@pytest.mark.slow
def test_told_to_stop_while_it_caches_features_it_leaves_nothing(folder, trained, tmp_path):
    process = subprocess.Popen(
        **command(
            *FROZEN,
            f"--data_dir={folder}",
            f"--workdir={tmp_path / 'stopped'}",
            f"--pretrained={trained}",
            "--frozen_stages=1",
            "--frozen_views=9999",
            name="folder",
        ),
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 200
    while (
        not list(folder.glob(".frozen_train*.tmp"))
        and time.time() < deadline
        and process.poll() is None
    ):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 75 and not list(
        folder.glob(".frozen*.tmp")
    )  # what was half written is gone


def test_mistakes_about_data(folder, tmp_path):
    refused(
        "--data_dir is needed for folder", *SMALL, f"--workdir={tmp_path / 'run'}", name="folder"
    )
    refused(
        "nowhere: no such folder",
        *SMALL,
        f"--data_dir={tmp_path / 'nowhere'}",
        f"--workdir={tmp_path / 'run'}",
        name="folder",
    )
    keep = ["--frozen_stages=1", "--frozen_views=1", "--batch_norm=frozen"]
    refused(
        "writes into --data_dir, a local folder",
        *keep,
        "--dataset=emoji",
        f"--workdir={tmp_path / 'run'}",
        name="folder",
    )
    refused(
        "no CUB-200-2011 in",
        *SMALL,
        f"--data_dir={folder}",
        f"--workdir={tmp_path / 'run'}",
        name="cub",
    )
    assert not (tmp_path / "run").exists()
