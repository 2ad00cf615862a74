"""A sweep as a user gives it, on a few pictures."""

import ast
import fcntl
import json
import re
import shlex
import signal
import statistics
import subprocess
import time

from absl import flags
import pytest

from experiments import sweep
from experiments.engine import config, datasets, many_runs
from experiments.engine import flags as engine_flags
from tests.helpers.benchmark_trees import make_folders
from tests.helpers.commands import TINY, command, refused, run
from tests.helpers.paths import ROOT

SWEEP = ["--sweep=margin=0.2,0.40", "--seeds=2", "--seed=5"]
RUNS = [f"margin={margin}/seed={seed}" for margin in (0.2, 0.4) for seed in (5, 6)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Options of a run of two steps on 30 pictures."""
    root = tmp_path_factory.mktemp("pictures")
    make_folders(root, [f"class {c}" for c in range(10)])
    tiny = [
        flag for flag in TINY if not any(name in flag for name in ("steps", "classes", "report"))
    ]
    return [
        *tiny,
        "--dataset=folder",
        f"--data_dir={root}",
        "--classes_per_batch=2",
        "--steps=2",
        "--augment=affine",
    ]


def times(workdir):
    return {
        name: path.stat().st_mtime_ns
        for name in RUNS
        if (path := workdir / name / "metrics.jsonl").exists()
    }


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_its_table(small, tmp_path):
    workdir = tmp_path / "sweep"
    given = [*small, *SWEEP, f"--workdir={workdir}"]
    process = subprocess.Popen(
        **command(*given, name="sweep"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.time() + 120
    while (
        not (workdir / RUNS[1] / "flags.txt").exists()
        and time.time() < deadline
        and process.poll() is None
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert (
        told.splitlines()[-1] == "stopped at 2/4 margin=0.2 seed=6: the same command resumes there"
    )
    assert "Traceback" not in complaint
    finished = times(workdir)
    assert (workdir / RUNS[0] / "report.html").exists() and not (
        workdir / RUNS[1] / "report.html"
    ).exists()

    result = run(*given, name="sweep")
    assert result.returncode == 0, result.stderr
    assert (
        "1/4 margin=0.2 seed=5: recall@1" in result.stdout
        and result.stdout.count("finished before") == 1
    )
    assert times(workdir)[RUNS[0]] == finished[RUNS[0]] and len(times(workdir)) == 4
    _check_table(workdir, result.stdout)

    finished = times(
        workdir
    )  # all of them: the table is made again, of one seed, from what is there
    result = run(
        f"--flagfile={workdir / 'sweep.flags'}", "--seeds=1", f"--workdir={workdir}", name="sweep"
    )
    assert result.returncode == 0 and result.stdout.count("finished before") == 2, result.stderr
    assert times(workdir) == finished and [
        line.split("|")[3].strip() for line in result.stdout.splitlines()[-3:-1]
    ] == ["-", "-"]
    refused(
        "another sweep (--embedding_dim=16 there, 8 here)",
        *given,
        "--embedding_dim=8",
        name="sweep",
    )
    refused(
        "another sweep (--margin=(swept) there, 0.4 here)",
        *small,
        "--seed=5",
        f"--workdir={workdir}",
        name="sweep",
    )


def _check_table(workdir, stdout):
    """The numbers are those that the runs' own files say."""
    last = {}
    for name in RUNS:
        lines = [
            json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()
        ]
        last[name] = lines[-1]
        assert lines[-1]["step"] == 2
    rows = json.loads((workdir / "sweep.json").read_text())
    assert [(row["options"], row["seeds"], row["failed"]) for row in rows] == [
        ({"margin": m}, [5, 6], {}) for m in (0.2, 0.4)
    ]
    text = (workdir / "sweep.md").read_text()
    assert text in stdout
    for row, names, line in zip(rows, (RUNS[:2], RUNS[2:]), text.splitlines()[2:], strict=True):
        assert {"recall@1", "recall@8", "map@r", "r_precision", "mrr"} <= row["scores"].keys()
        for score, found in row["scores"].items():
            values = [last[name][score] for name in names]
            assert found["values"] == values and found["mean"] == sum(values) / 2
            assert found["std"] == pytest.approx(statistics.stdev(values))
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        expected = [
            100 * row["scores"][name][part]
            for name in ("recall@1", "map@r")
            for part in ("mean", "std")
        ]
        assert cells == [
            str(row["options"]["margin"]),
            *(f"{value:.1f}" for value in expected),
            "2",
        ]


def test_commands_are_those_of_the_runs(tmp_path):
    """They parse, for the module of the data set, into the options that were given."""
    given = [
        "--dataset=sop",
        "--alpha=1.4",
        "--sweep=levels=H;L,M,H",
        "--sweep=weight_gradient=false,true",
        "--commands",
    ]
    result = run(*given, f"--workdir={tmp_path / 'a sweep'}", name="sweep")
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert len(lines) == 4 and all(line[1:3] == ["-m", "experiments.sop"] for line in lines)
    found = []
    for line in lines:
        values = flags.FlagValues()
        engine_flags.define(flag_values=values)
        values(["sop", *line[3:]])
        found.append(engine_flags.config_from_flags(values))
    assert found == [
        config.from_flat(
            dataset="sop",
            backbone="resnet50",
            image_size=224,
            alpha=1.4,
            levels=levels,
            weight_gradient=weight,
            workdir=str(
                tmp_path / "a sweep" / f"levels={levels},weight_gradient={weight}" / "seed=0"
            ),
        )
        for levels in ("H", "L,M,H")
        for weight in (False, True)
    ]
    assert [path.name for path in (tmp_path / "a sweep").iterdir()] == ["sweep.flags"]


def test_a_dataset_of_tfds_with_a_version_is_one_of_folder():
    run = config.from_flat(dataset="tfds:birds:1.2.3", workdir="w")
    assert many_runs.command(run)[1:3] == ["-m", "experiments.folder"]


@pytest.mark.parametrize("dataset", datasets.DATASETS)
def test_the_usual_options_of_each_command_are_known(dataset):
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / f"experiments/{dataset}.py").read_text()))
        if isinstance(node, ast.Call)
    ]
    own = next(
        {word.arg: word.value.value for word in call.keywords}
        for call in calls
        if ast.unparse(call.func) == "flags.define"
    )
    usual = {} if dataset == "emoji" else {"backbone": "resnet50", "image_size": 224}
    assert own == {"dataset": dataset, "workdir": f"runs/{dataset}"} | usual


@pytest.mark.parametrize(
    "texts, error",
    [
        (["margn=0.2"], "--sweep=margn=0.2: expected NAME=VALUE,VALUE,... of an option"),
        (["margin"], "--sweep=margin: expected NAME=VALUE"),
        (["seed=1,2"], "other than dataset, seed and workdir"),
        (["margin=0.2,"], "--sweep=margin=0.2,: "),
        (["weight_gradient=maybe"], "--sweep=weight_gradient=maybe: "),
        (["margin=0.2,0.20"], "a value is there twice: margin=0.2"),
        (["margin=0.2", "margin=0.4"], "an option or a value is there twice"),
    ],
)
def test_sweeps_that_cannot_be(texts, error, monkeypatch):
    values = flags.FlagValues()
    engine_flags.define(flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(ValueError, match=re.escape(error)):
        sweep._plan(config.Config().flat(), [sweep._axis(text) for text in texts], seeds=1)


def test_folders_of_runs_have_safe_names():
    base = config.from_flat(workdir="w").flat()
    runs = sweep._plan(
        base, [("pretrained", ["", "../a b/c?.npz"]), ("levels", ["L,M,H"])], seeds=2
    )
    folders = ["levels=L,M,H,pretrained=", "levels=L,M,H,pretrained=..%2Fa b%2Fc%3F.npz"]
    assert [run.runtime.workdir for run in runs] == [
        f"w/{folder}/seed={seed}" for folder in folders for seed in (0, 1)
    ]
    assert runs[3].network.pretrained == "../a b/c?.npz" and runs[3].schedule.seed == 1


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--sweep=margin=0.2,1.4"], "margin=1.4: --margin=1.4 must not be above --alpha=1.2"),
        (["--seeds=0"], "seeds"),
    ],
)
def test_mistakes_before_anything_is_written(arguments, text, tmp_path):
    refused(text, *arguments, f"--workdir={tmp_path / 'sweep'}", name="sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused("is in use and holds no sweep", f"--workdir={tmp_path}", name="sweep")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_runs_that_fail(tmp_path):
    """The first ends the sweep, or the table lists all; a run of another process is left to it."""
    given = [
        "--dataset=folder",
        f"--data_dir={tmp_path / 'none'}",
        "--seeds=2",
        f"--workdir={tmp_path / 'sweep'}",
    ]
    refused("1/2 base seed=0: exit code 2: ", *given, name="sweep")
    result = run(*given, "--keep_going", name="sweep")
    assert result.returncode == 1 and "2/2 base seed=1: exit code 2: " in result.stderr, (
        result.stderr
    )
    (row,) = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert (
        row["seeds"] == []
        and "no such folder" in row["failed"]["0"]
        and "| 0, 2 failed |" in result.stdout
    )
    with (tmp_path / "sweep/base/seed=0.log").open() as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        refused("base seed=0 is being run by another process", *given, name="sweep")
