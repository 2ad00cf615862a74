"""What doing nothing scores: the backbone's own features beside what a run has trained."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments.engine import config, datasets, query_scores, zero_shot
from rll_jax import metrics
from rll_jax.networks import backbones, embedding_net, weights
from tests.helpers.commands import FEW, run, scores
from tests.helpers.networks import random_variables

RUN = [*FEW, "--schedule=step", "--decay_at=4,14"]  # its --steps may grow
LINE = "fine-tuning brought Recall@1 "


def generated(backbone, side):
    """Variables of a network whose weights are drawn by chance."""
    model = embedding_net.EmbeddingNet(backbones.BACKBONES[backbone], 16)
    return model, random_variables(model, side, 0.2)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Generated weights of the backbone alone, as a publisher has them."""
    model, variables = generated("resnet_tiny", 16)
    arrays = weights.to_named_arrays(variables, model.backbone)
    del arrays["H_embedding.weight"]
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    weights.write_safetensors(path, arrays)
    return path


@pytest.fixture(scope="module")
def finished(pretrained, pictures, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("zero_shot") / "run"
    given = [*RUN, f"--pretrained={pretrained}", f"--workdir={workdir}"]
    ended = run(*given, "--report")
    assert ended.returncode == 0, ended.stderr
    return workdir, ended.stdout, given


def logged(workdir):
    (found,) = [line for line in scores(workdir) if "zero_shot/recall@1" in line]
    assert found.pop("step") == 0
    return {name.removeprefix("zero_shot/"): value for name, value in found.items()}


def test_it_is_the_score_of_pooled_features(finished):
    options = config.from_flagfile(finished[0] / "flags.txt")
    test = datasets.open_usable(options.data, options.runtime)[0]["test"]
    view = options.data.test_view()
    images = np.stack([view(test.image(row)) for row in range(len(test))])
    model, variables = generated("resnet_tiny", 16)
    embed = jax.jit(model.apply, static_argnames="features")
    ends = embed(variables, images, features=True)
    pooled = np.asarray(ends[-1]).mean(axis=(1, 2))
    expected = metrics.retrieval_metrics(pooled, test.labels, ks=options.data.entry.ks)
    assert logged(finished[0]) == pytest.approx(expected, abs=1e-6)
    head = embed(variables, images)["H"]
    assert metrics.retrieval_metrics(head, test.labels, ks=(1,))["map@r"] != expected["map@r"]


def test_a_run_ends_with_what_training_brought(finished):
    workdir, out, _ = finished
    (line,) = [line for line in out.splitlines() if line.startswith(LINE)]
    before, after = (
        query_scores.read(workdir, name) for name in (zero_shot.FILE, query_scores.NAME)
    )
    interval = query_scores.intervals(after, (1,), before)["recall@1"]
    first, last = logged(workdir)["recall@1"], scores(workdir)[-1]["recall@1"]
    assert interval.value == pytest.approx(last - first)
    low, high = 100 * interval.low, 100 * interval.high
    assert line.startswith(
        f"{LINE}{100 * (last - first):+.1f} ({low:.1f} to {high:.1f}): {100 * last:.1f} against "
        f"{100 * first:.1f} of the untrained resnet_tiny"
    )
    assert ("it may be chance" in line) == (low <= 0 <= high)
    page = (workdir / "report.html").read_text()
    assert f"<strong>{line}</strong>" in page and page.index(line) < page.index("<h2>")
    assert f'<th scope="row">zero_shot</th><td class="number">{100 * first:.1f}</td>' in page
    gained = query_scores.in_percent(interval, sign=True)
    assert f'<td class="number">{gained}</td>' in page and ">difference</th>" in page


def test_evaluate_says_it_too(finished, tmp_path):
    workdir, out, _ = finished
    asked = [f"--workdir={workdir}", "--noclustering", f"--out={tmp_path / 'scores.json'}"]
    ended = run(*asked, name="evaluate")
    (line,) = [line for line in out.splitlines() if line.startswith(LINE)]
    assert ended.returncode == 0 and line in ended.stdout, ended.stderr
    intervals = json.loads((tmp_path / "scores.json").read_text())["intervals"]
    assert intervals["zero_shot"]["recall@1"][0] == pytest.approx(logged(workdir)["recall@1"])
    assert "recall@1" in intervals["difference_to_zero_shot"]
    other = run(*asked, "--all_classes", f"--out={tmp_path / 'all.json'}", name="evaluate")
    assert other.returncode == 0 and LINE not in other.stdout, other.stderr


def test_it_is_scored_once_and_resumed_bit_for_bit(finished, tmp_path):
    workdir, _, given = finished
    shutil.copytree(workdir, tmp_path / "grown")
    kept = tmp_path / "grown" / zero_shot.FILE
    written = kept.stat().st_mtime_ns, kept.read_bytes()
    more = run(*given, "--steps=15", f"--workdir={tmp_path / 'grown'}")
    assert more.returncode == 0 and "at step 12 of 15" in more.stdout, more.stderr
    assert LINE in more.stdout and "zero_shot: " not in more.stdout + more.stderr
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == written
    whole = run(*given, "--steps=15", f"--workdir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    assert scores(tmp_path / "grown") == scores(tmp_path / "whole")


def test_runs_of_earlier_versions_resume(finished, tmp_path):
    workdir, _, given = finished
    shutil.copytree(workdir, folder := tmp_path / "run")
    flags = (folder / "flags.txt").read_text().replace("--zero_shot=True\n", "")
    (folder / "flags.txt").write_text(flags)
    (folder / zero_shot.FILE).unlink()
    ended = run(*given, f"--workdir={folder}")
    assert ended.returncode == 0 and LINE not in ended.stdout + ended.stderr, ended.stderr


def test_it_can_be_turned_off(pretrained, pictures, tmp_path):
    given = [f"--pretrained={pretrained}", "--zero_shot=False", f"--workdir={tmp_path}"]
    ended = run(*FEW, *given, "--steps=1")
    assert ended.returncode == 0 and LINE not in ended.stdout, ended.stderr
    assert not any("zero_shot" in name for line in scores(tmp_path) for name in line)
    assert not (tmp_path / zero_shot.FILE).exists()
    assert not zero_shot.is_wanted(config.from_flat())  # random weights
    assert zero_shot.is_wanted(config.from_flat(init_from=str(tmp_path)))


def test_features_in_a_cache(finished, pictures, pretrained, tmp_path):
    """Those of frozen stages are float16."""
    data = tmp_path / "data"
    flags = config.from_flagfile(finished[0] / "flags.txt")
    shutil.copytree(flags.runtime.data_dir, data)
    frozen = ["--frozen_stages=1", "--batch_norm=frozen", "--frozen_views=2"]
    kept = [*FEW, f"--data_dir={data}", "--verify_images=full", "--steps=1", *frozen]
    start = [f"--pretrained={pretrained}", f"--workdir={tmp_path / 'run'}"]
    ended = run(*kept, *start)
    assert ended.returncode == 0 and LINE in ended.stdout, ended.stderr
    assert logged(tmp_path / "run") == pytest.approx(logged(finished[0]), abs=0.01)


def test_what_is_compared(tmp_path, capsys):
    """Scores of other queries have no interval of their difference; damaged ones are left out."""
    options = config.from_flat(pretrained="some.pth", backbone="resnet50")
    rng = np.random.default_rng(0)
    for rows, interval in ((20, True), (19, False)):
        query_scores.write(tmp_path, a_score(rng, rows), zero_shot.FILE)
        gain = zero_shot.compare(options, tmp_path, a_score(rng, 20))
        assert gain is not None and bool(gain.difference) == interval
        line = zero_shot.in_a_line(gain)
        assert (" to " in line) == interval and "of the untrained resnet50" in line
    (tmp_path / "flags.txt").touch()
    again = config.from_flat(init_from=str(tmp_path), backbone="resnet50")
    gain = zero_shot.compare(again, tmp_path, a_score(rng, 20))
    assert gain is not None and gain.network == f"the resnet50 of {tmp_path}"
    (tmp_path / zero_shot.FILE).write_text("no archive")
    assert zero_shot.compare(options, tmp_path, a_score(rng, 20)) is None
    assert "zero_shot is left out: " in capsys.readouterr().err


def a_score(rng, rows):
    labels = np.arange(rows) % 4
    found = metrics.scores_by_query(rng.normal(size=(rows, 3)), labels, ks=(1,))
    return query_scores.QueryScores(found, labels[found["query"]])


@pytest.mark.parametrize(
    "backbone, dtype, pooling",
    [
        ("resnet_tiny", "bfloat16", "gem"),
        ("resnet_tiny", "float32", "own"),
        ("resnet_tiny", "float32", "max"),
        ("resnet_tiny", "bfloat16", "avg+max"),
        ("vit_test", "float32", "own"),
        ("vit_test", "float32", "max"),
    ],
)
def test_pooled_features_are_the_backbones(backbone, dtype, pooling):
    model, variables = generated(backbone, 32)
    model = model.clone(dtype=dtype, pooling=pooling)
    variables["params"] |= {"H_gem": {"p": np.full(1, 3, np.float32)}}
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    found = model.apply(variables, images, pooled=True)
    end = np.asarray(model.apply(variables, images, features=True)[-1].astype("float32"))
    if backbone == "vit_test":
        expected = end[:, 0]
    else:
        mean, largest = end.mean(axis=(1, 2)), end.max(axis=(1, 2))
        expected = {"max": largest, "avg+max": mean + largest}.get(pooling, mean)
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found["pooled"], expected, atol=1e-6)
    assert found["pooled"].dtype == np.float32 and found.keys() == {"H", "pooled"}
    np.testing.assert_array_equal(found["H"], model.apply(variables, images)["H"])
