"""The commands as a user gives them: in processes of their own."""

from absl import flags
import pytest

from experiments import compare
from experiments.engine import flags as engine_flags
from tests.helpers.commands import TINY, browse, refused, run, scores
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("emoji") / "run"
    return run(*TINY, "--report", f"--workdir={workdir}"), workdir


def test_run_leaves_what_the_readme_says(finished):
    result, workdir = finished
    assert result.returncode == 0, result.stderr
    assert "compiling the train step" in result.stderr
    assert "Recall@1" in result.stdout.splitlines()[-2] and "step 12: recall@1" in result.stdout
    lines = scores(workdir)
    assert [line["step"] for line in lines if "recall@1" in line] == [0, 6, 12]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert list((workdir / "tensorboard").glob("events*"))
    page = (workdir / "report.html").read_text()
    assert (
        page.count('class="query"') == 20
        and page.count('class="wrong"') + page.count('class="right"') == 160
    )
    assert "http" not in page.replace("http-equiv", "")


def test_the_same_command_again_changes_nothing(finished):
    before = (finished[1] / "metrics.jsonl").read_text()
    result = run(*TINY, f"--workdir={finished[1]}")
    assert result.returncode == 0 and "Recall@1" in result.stdout
    assert (finished[1] / "metrics.jsonl").read_text() == before


def test_another_run_in_the_workdir_is_refused(finished):
    files = {p: p.stat().st_mtime_ns for p in finished[1].rglob("*") if p.is_file()}
    refused(
        "holds another run (--margin=0.4 there, 0.2 here)",
        *TINY,
        "--margin=0.2",
        f"--workdir={finished[1]}",
    )
    assert {p: p.stat().st_mtime_ns for p in finished[1].rglob("*") if p.is_file()} == files


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused("is in use and holds no run", *TINY, f"--workdir={tmp_path}")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--stepz=3"], "Unknown command line flag 'stepz'. Did you mean: steps"),
        (["--flagfile=no/such.flags"], "no/such.flags"),
        (["--steps=many"], "steps"),
        (["--steps=0"], "--steps=0: expected at least 1"),
        (["--backbone=vgg"], "--backbone=vgg: expected one of resnet_tiny"),
        (["--levels=H,X"], "expected some of L,M,H"),
        (["--alpha=0.2"], "--margin=0.4 must not be above --alpha=0.2"),
        (["--pretrained=x.npz"], "--pretrained=x.npz: x.npz: no such file"),
        (["--pretrained=resnet50"], "--pretrained=resnet50: expected a file"),
        (
            ["--dataset=imagenet"],
            "--dataset=imagenet: expected emoji, sop, cub, cars, inshop, folder or tfds:NAME",
        ),
        (
            ["--frozen_stages=1"],
            "--frozen_stages=1: expected at most the 3 stages of --backbone=resnet_small, and "
            "--batch_norm=frozen",
        ),
        (["--index=x.csv"], "--index=x.csv goes with --dataset=folder, not emoji"),
        (["--sampling=hierarchical"], "--sampling=hierarchical: emoji has no super classes"),
        (["--sampling=shuffle", "--min_positives=6"], "expected a multiple of 7"),
        (["--cache=disk"], "--cache=disk is written into --data_dir, a local folder, and it is ''"),
        (["--remat=1,4"], "--remat=1,4: the stages of --backbone=resnet_small are 1 to 3"),
        (["--stage_sizes=2,0"], "--stage_sizes=(2, 0): expected one or more blocks for each stage"),
        (
            ["--backbone=googlenet_v2", "--width=8"],
            "--stem, --width and --stage_sizes are of ResNets",
        ),
        (["--data_dir=/no/such/folder"], "cannot read a prepared dataset in /no/such/folder"),
        (["--classes_per_batch=1000"], "the training set has only 718 classes"),
        (["steps=3"], "unexpected argument 'steps=3'"),
    ],
)
def test_mistakes_get_one_line(arguments, text, tmp_path):
    refused(text, f"--workdir={tmp_path / 'run'}", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_typo_in_a_flagfile_is_found(tmp_path):
    (tmp_path / "my.flags").write_text("--steps=3\n--learning_rat=1\n")
    refused("my.flags, line 2", f"--flagfile={tmp_path / 'my.flags'}")


def test_a_batch_that_devices_cannot_share(tmp_path):
    refused(
        "7 classes x 3 images = 21 images cannot be shared by 8 devices",
        "--classes_per_batch=7",
        "--images_per_class=3",
        f"--workdir={tmp_path / 'run'}",
        devices=8,
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments/flagfiles").glob("*.flags")), ids=lambda path: path.stem
)
def test_every_flagfile_is_accepted(path):
    values = flags.FlagValues()
    flags.DEFINE_string("flagfile", "", "", flag_values=values)
    if path.stem.endswith("_compare"):
        compare.define_flags(flag_values=values)
    else:
        engine_flags.define(flag_values=values)
    values(["experiment", *values.read_flags_from_files([f"--flagfile={path}"])])
    options = engine_flags.config_from_flags(values)
    assert options.runtime.workdir == f"runs/{path.stem}"
    assert path.stem.split("_")[0] in (options.data.dataset, "grocery")
    assert (ROOT / "experiments" / f"{options.data.dataset}.py").exists()


def test_the_report_in_a_browser(finished, tmp_path):
    pictures, console = browse(finished[1] / "report.html", tmp_path)
    assert pictures == 20 * 9 + 1 and not console  # the map; plots are SVG
