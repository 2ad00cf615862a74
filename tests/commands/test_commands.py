"""evaluate, embed and search, as a user gives them."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.engine import query_scores
from rll_jax import metrics
from rll_jax.data import images, views
from tests.helpers.commands import FEW as TINY
from tests.helpers.commands import browse, refused, run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, pictures):
    workdir = tmp_path_factory.mktemp("commands") / "run"
    small = [flag for flag in TINY if "steps" not in flag and "eval_every" not in flag]
    result = run(*small, "--steps=4", "--eval_every=4", "--levels=M,H", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.fixture
def folder(tmp_path, emoji):
    """Sixty real pictures in folders, a broken one, an empty one and a text."""
    root, test = tmp_path / "pictures", emoji["test"]
    root.mkdir()
    for row in range(60):
        path = root / f"class {test.labels[row]}" / f"{row}.PNG"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(test.image_bytes(row))
    (root / "empty.jpg").touch()
    (root / "broken.png").write_bytes(test.image_bytes(0)[:100])
    (root / "notes.txt").write_text("not a picture")
    return root


def test_evaluate(workdir, emoji):
    result = run(f"--workdir={workdir}", name="evaluate")
    assert result.returncode == 0, result.stderr
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["step"] == 4 and list(found["scores"]) == ["M", "H", "M,H"]
    last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    for name in ("recall@1", "recall@8", "map@r", "r_precision", "mrr"):
        assert found["scores"]["M,H"][name] == pytest.approx(last[name], abs=1e-3)
    assert 0 < found["scores"]["H"]["nmi"] < 1 and {"f1", "ami"} <= found["scores"]["H"].keys()
    assert f"{100 * found['scores']['M']['recall@1']:.1f}" in result.stdout
    for name, (value, low, high) in found["intervals"]["scores"].items():
        assert low <= value <= high and value == pytest.approx(found["scores"]["M,H"][name])
    with np.load(workdir / "scores_by_query.npz") as kept:
        assert np.mean(kept["first_rank"] <= 1) == pytest.approx(last["recall@1"])
    result = run(f"--workdir={workdir}", f"--baseline={workdir}", "--noclustering", name="evaluate")
    assert result.returncode == 0, result.stderr
    assert f"difference to {workdir}, paired:\nrecall@1 +0.0 (+0.0 to +0.0)" in result.stdout
    refused("expected a run", f"--workdir={workdir}", "--baseline=/nowhere", name="evaluate")


def test_a_baseline_on_other_images_is_refused_before_any_is_embedded(workdir, tmp_path):
    given = [f"--workdir={workdir}", f"--baseline={tmp_path}", "--noclustering"]
    kept = query_scores.read(workdir)
    some = kept.classes > kept.classes.min()
    fewer = {name: values[some] for name, values in kept.by_query.items()}
    for other in (
        kept._replace(classes=kept.classes + 1),
        kept._replace(by_query=fewer, classes=kept.classes[some]),
    ):
        query_scores.write(tmp_path, other)
        result = run(*given, name="evaluate")
        assert (
            result.returncode == 2 and "here; give a run on the same test images" in result.stderr
        )
        assert "embedding" not in result.stderr


def test_evaluate_a_dataset_without_training_classes(workdir, folder, tmp_path):
    """All classes of a folder, a folder with test/ alone, and a table without rows of train."""
    (folder / "broken.png").unlink()
    (folder / "empty.jpg").unlink()
    (tmp_path / "other").mkdir()
    folder.rename(tmp_path / "other/test")
    files = sorted((tmp_path / "other").rglob("*.PNG"))
    rows = [f"{file.relative_to(tmp_path)},{file.parent.name},test" for file in files]
    (tmp_path / "index.csv").write_text("\n".join(["path,label,split", *rows]))
    own, found = [f"--workdir={workdir}", "--noclustering"], []
    for number, given in enumerate(
        (
            [f"--data_dir={tmp_path / 'other/test'}", "--all_classes"],
            [f"--data_dir={tmp_path / 'other'}"],
            [f"--data_dir={tmp_path}", f"--index={tmp_path / 'index.csv'}"],
        )
    ):
        out = tmp_path / f"{number}.json"
        result = run(*own, *given, f"--out={out}", name="evaluate")
        assert result.returncode == 0 and ": 60 test images" in result.stdout, result.stderr
        found.append(json.loads(out.read_text())["scores"]["H"])
    assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])
    given = [*TINY, f"--data_dir={tmp_path / 'other'}", f"--workdir={tmp_path / 'run'}"]
    refused("the train split has no images", *given)
    # The table of a run goes with its own dataset.
    shutil.copytree(workdir, tmp_path / "of_a_table")
    with (tmp_path / "of_a_table/flags.txt").open("a") as file:
        file.write("--dataset=folder\n--index=gone.csv\n--validation_share=0.5\n--split_seed=1\n")
    given = ["--dataset=folder", f"--data_dir={tmp_path / 'other'}", "--noclustering"]
    result = run(f"--workdir={tmp_path / 'of_a_table'}", *given, name="evaluate")
    assert result.returncode == 0 and ": 60 test images" in result.stdout, result.stderr


def embed(workdir, folder, out, code):
    result = run(f"--workdir={workdir}", f"--images={folder}", f"--out={out}", name="embed")
    assert result.returncode == code, result.stderr
    return result


def test_embed_and_what_changed_since(workdir, folder, tmp_path):
    result = embed(workdir, folder, tmp_path / "first.npz", 1)
    assert [line for line in result.stderr.splitlines() if "unreadable" in line] == [
        "unreadable: broken.png",
        "unreadable: empty.jpg",
    ]
    with np.load(tmp_path / "first.npz") as first:
        files, embeddings = first["files"], first["embeddings"]
    assert len(files) == 60 and embeddings.dtype == np.float32 and list(files) == sorted(files)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)

    for name in ("empty.jpg", "broken.png"):
        (folder / name).unlink()
    moved, gone = folder / files[0], folder / files[1]
    shutil.copy(folder / files[2], moved)
    os.utime(moved, (1, 1))
    gone.unlink()
    result = embed(workdir, folder, tmp_path / "second.npz", 0)
    assert "59 images x 32, 1 of them embedded now" in result.stdout
    with np.load(tmp_path / "second.npz") as second:
        assert list(second["files"]) == [files[0], *files[2:]]
        np.testing.assert_allclose(second["embeddings"][0], embeddings[2], atol=1e-5)
        np.testing.assert_array_equal(second["embeddings"][1:], embeddings[2:])


def test_an_index_survives_what_happens_to_files(workdir, folder, tmp_path):
    """A damaged part is made again, links that go round end, and mended images are found."""
    embed(workdir, folder, tmp_path / "first.npz", 1)
    parts = sorted((workdir / "index").glob("*/*.npz"), key=lambda path: path.stat().st_mtime_ns)
    parts[-1].write_bytes(parts[-1].read_bytes()[:50])
    (folder / "round").symlink_to(folder)
    (folder / "broken.png").unlink()
    shutil.copy(sorted(folder.glob("*/7.PNG"))[0], folder / "broken.png")
    result = embed(workdir, folder, tmp_path / "second.npz", 1)
    assert (
        "61 images x 32, 61 of them embedded now" in result.stdout
        and "unreadable: empty.jpg" in result.stderr
    )
    result = embed(workdir, folder, tmp_path / "third.npz", 1)
    assert "61 images x 32, 0 of them embedded now" in result.stdout


def test_embed_parquet(workdir, folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    result = run(
        f"--workdir={workdir}",
        f"--images={folder}",
        f"--out={tmp_path / 'e.parquet'}",
        name="embed",
    )
    assert result.returncode == 1, result.stderr
    table = parquet.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["file", "embedding"] and len(table["embedding"][0]) == 32


def test_search_finds_the_picture_itself(workdir, folder, tmp_path):
    query = sorted(folder.glob("*/7.PNG"))[0]
    result = run(
        f"--workdir={workdir}", f"--images={folder}", f"--query={query}", "--k=4", name="search"
    )
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == str(query) and lines[1] == f"  1.000  {query}" and len(lines) == 6
    shown, console = browse(workdir / "search.html", tmp_path)
    assert shown == 5 and not console


def test_search_by_a_folder(workdir, folder, tmp_path):
    queries = tmp_path / "queries"
    queries.mkdir()
    for path in sorted(folder.glob("*/*.PNG"))[:3]:
        shutil.copy(path, queries / path.name)
    (queries / "bad.png").write_text("bad")
    result = run(
        f"--workdir={workdir}",
        f"--images={folder}",
        f"--query={queries}",
        f"--out={tmp_path / 'page.html'}",
        "--k=2",
        name="search",
    )
    assert (
        result.returncode == 1 and "bad.png" in result.stderr and "Traceback" not in result.stderr
    )
    assert (tmp_path / "page.html").read_text().count('class="query"') == 3


def test_gradient_question_of_a_run(workdir, tmp_path):
    small = ["--classes=10", "--batches=1", "--ranks=4", "--temperatures=10", f"--out={tmp_path}"]
    result = run(*small, f"--workdir={workdir}", name="studies.gradient_question")
    assert result.returncode == 0, result.stderr
    (found,) = json.loads((tmp_path / "gradient_question.json").read_text())["runs"]
    assert found["title"].endswith("run, level H, step 4") and found["title"] in result.stdout
    assert 1 < found["effective_dimension"] < 16 and found["published"]["10"]["pairs"] == 0


def test_mistakes(workdir, folder, tmp_path):
    (tmp_path / "there.npz").touch()
    (tmp_path / "none").mkdir()
    own = f"--workdir={workdir}"
    refused("holds no run", f"--workdir={tmp_path}", name="evaluate")
    refused("holds no checkpoint of step 2: there are", own, "--step=2", name="evaluate")
    refused(
        "exists: choose another name",
        own,
        f"--images={folder}",
        f"--out={tmp_path / 'there.npz'}",
        name="embed",
    )
    refused(
        "ends in .npz or .parquet",
        own,
        f"--images={folder}",
        f"--out={tmp_path / 'e.csv'}",
        name="embed",
    )
    refused(
        "no images in it",
        own,
        f"--images={tmp_path / 'none'}",
        f"--out={tmp_path / 'e.npz'}",
        name="embed",
    )
    refused(
        "no such folder",
        own,
        f"--images={tmp_path / 'no'}",
        f"--out={tmp_path / 'e.npz'}",
        name="embed",
    )
    refused(
        "no such file or folder",
        own,
        f"--images={folder}",
        f"--query={tmp_path / 'no'}",
        name="search",
    )
    refused(
        "cannot be read as an image",
        own,
        f"--images={folder}",
        f"--query={tmp_path / 'there.npz'}",
        name="search",
    )
    refused(
        "expected at least 1",
        own,
        f"--images={folder}",
        f"--query={folder}",
        "--k=0",
        name="search",
    )
    refused("--workdir", f"--images={folder}", name="search")
    assert (tmp_path / "there.npz").stat().st_size == 0


def test_scores_of_embeddings_read_back(workdir, folder, tmp_path):
    """What embed writes is what evaluate scores: classes of the pictures are near each other."""
    run(f"--workdir={workdir}", f"--images={folder}", f"--out={tmp_path / 'e.npz'}", name="embed")
    with np.load(tmp_path / "e.npz") as saved:
        labels = np.unique([file.split("/")[0] for file in saved["files"]], return_inverse=True)[1]
        assert metrics.retrieval_metrics(saved["embeddings"], labels, ks=(1,))["recall@1"] > 0.2


def test_pretrained_and_the_way_back(workdir, tmp_path):
    """A run that starts from a workdir, or from what export wrote of it, begins with its scores."""
    out = tmp_path / "model.safetensors"
    assert run(f"--workdir={workdir}", f"--out={out}", name="export").returncode == 0
    refused("exists: choose another name", f"--workdir={workdir}", f"--out={out}", name="export")
    small = [flag for flag in TINY if "steps" not in flag]
    first = []
    for name, donor in (("file", out), ("folder", workdir)):
        given = [*small, "--steps=1", "--levels=M,H", "--pretrained_head", f"--pretrained={donor}"]
        result = run(
            *given,
            f"--workdir={tmp_path / name}",
            "--ema=0.9",
            "--head_lr_multiplier=10",
            "--clip_gradient=1",
        )
        assert result.returncode == 0, result.stderr
        first.append(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]))
    last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    assert first[0]["recall@1"] == first[1]["recall@1"] == pytest.approx(last["recall@1"], abs=1e-3)
    refused(
        "2 of another shape",
        *small,
        f"--pretrained={out}",
        "--pretrained_head",
        "--levels=M,H",
        "--embedding_dim=8",
        f"--workdir={tmp_path / 'other'}",
    )


def test_pytorch_loads_what_export_writes(workdir, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from safetensors.torch import load_file

    from experiments.engine import network, trained_network
    from rll_jax.networks import backbones, embedding_net
    from tests.helpers import torch_networks

    out = tmp_path / "model.safetensors"
    assert run(f"--workdir={workdir}", f"--out={out}", name="export").returncode == 0
    config = backbones.BACKBONES["resnet_tiny"]
    theirs = torch_networks.EmbeddingResNet(
        "MH", stages=config.stage_sizes, bottleneck=False, width=config.width, small_images=True
    )
    theirs.load_state_dict(load_file(out))  # strict: every name, no other
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    x = (pixels.astype(np.float32) - np.float32(config.mean)) / np.float32(config.std)
    with torch.no_grad():
        found = theirs.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    ours = trained_network.load(workdir)
    model = network.make_model(ours.config.network).clone(axis_name=None)
    levels = jax.jit(model.apply)(ours.variables, pixels)
    expected = embedding_net.concatenate_levels(levels)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_stablehlo_runs_without_this_package(workdir, folder, tmp_path):
    out = tmp_path / "model.stablehlo"
    assert (
        run(f"--workdir={workdir}", f"--out={out}", "--format=stablehlo", name="export").returncode
        == 0
    )
    embed(workdir, folder, tmp_path / "e.npz", 1)
    with np.load(tmp_path / "e.npz") as saved:
        files, expected = saved["files"], saved["embeddings"]
    decoded = [images.decode((folder / file).read_bytes(), file) for file in files]
    pixels = [views.resize_center_crop(image, 16, 16) for image in decoded]
    np.save(tmp_path / "pixels.npy", np.stack(pixels))
    code = (
        "import sys, numpy as np; from jax import export; pixels = np.load(sys.argv[2]);"
        "call = export.deserialize(bytearray(open(sys.argv[1], 'rb').read())).call;"
        "np.save(sys.argv[2], np.concatenate([call(pixels[:7]), call(pixels[7:])]));"
        "assert not any(name.startswith(('rll_jax', 'flax')) for name in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, out, tmp_path / "pixels.npy"], check=True, cwd=tmp_path
    )
    found = np.load(tmp_path / "pixels.npy")
    np.testing.assert_allclose(found, expected, atol=1e-5)
