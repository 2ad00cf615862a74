"""The study of batch sizes: its plan, its table, and the command on a few images."""

import json

from absl import flags
import pytest

from experiments.engine import comparison_table, config
from experiments.studies import batch_size
from tests.helpers.commands import TINY, refused, run

STUDY = "studies.batch_size"


@pytest.fixture(scope="module")
def values():
    found = flags.FlagValues()
    batch_size.define_flags(found)
    found(["batch_size", "--images=1000", "--only=rll,nt_xent", "--seeds=2"])
    return found.flag_values_dict()


def test_batches_of_equally_many_images(values):
    base = {**config.Config().flat(), "workdir": "w", "embed_chunk": 25}
    batches = batch_size.parse_batches("50x4,10x2,5x5")
    assert batches == [(10, 2), (5, 5), (50, 4)]
    expected = {(10, 2): (50, 0), (5, 5): (40, 0), (50, 4): (5, 25)}
    for batch, (steps, chunk) in expected.items():
        options, terms = batch_size.planned(base, values, batch)
        assert (options["steps"], options["embed_chunk"]) == (steps, chunk)
        assert (options["classes_per_batch"], options["images_per_class"]) == batch
        assert options["workdir"] == f"w/{batch[0]}x{batch[1]}" and terms.seeds == 2
        assert terms.tuning_steps == max(1, steps // 2)
        batch_size.compare.check(options, terms)
        changed = {name for name in options if options[name] != base[name]}
        assert changed <= {
            *("classes_per_batch", "images_per_class", "steps", "embed_chunk", "workdir")
        }


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--batches=20x4,20x4"], "--batches=20x4,20x4: expected classes x images per class"),
        (["--batches=20x4,10x8"], "--batches=20x4,10x8: expected"),
        (["--batches=20"], "--batches=20: expected"),
        (["--batches=0x4"], "--batches=0x4: expected"),
        (["--batches=20x4x2"], "--batches=20x4x2: expected"),
        (["--batches=20x4,1x4"], "--classes_per_batch=1"),
        (["--images=0"], "images"),
        (["--images=1999"], "--images=1999: expected at least a batch of 500x4"),
        (["--embed_chunk=40"], "--embed_chunk=40 does not divide a batch of 125x4"),
        (["--schedule=step"], "--schedule=step, --head_warmup_steps and --ema count steps"),
        (["--ema=0.9"], "--schedule=step, --head_warmup_steps and --ema count steps"),
        (["--only=rlll"], "--only=rlll: expected some of"),
        (["--out=/no/such/folder"], "--out=/no/such/folder: no such folder"),
    ],
)
def test_mistakes_before_anything_is_written(arguments, text, tmp_path):
    refused(text, *arguments, f"--workdir={tmp_path / 'study'}", name=STUDY)
    assert not (tmp_path / "study").exists()


def test_the_table_and_the_plot_with_a_loss_that_failed(tmp_path):
    def rows(recall):
        scores = {"a": {0: {"recall@1": recall, "map@r": 0.1}, 1: {"recall@1": 0.5, "map@r": 0.1}}}
        return comparison_table.make_rows(scores | {"b": {}}, {"a": "A", "b": "B"}, {"a": 0.1})

    found = {(2, 2): rows(0.5), (4, 2): rows(0.6)}
    text = batch_size.as_markdown(found, "about").splitlines()
    assert text[4] == "Percent, mean ± standard deviation over 2 seeds."
    assert text[6:10] == [
        "| Recall@1 | 2x2 | 4x2 |",
        "|---|---|---|",
        "| A | 50.0 ± 0.0 | 55.0 ± 7.1 |",
        "| B | - | - |",
    ]
    batch_size.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_command_resumes(tmp_path):
    apart = ("--memory", "--classes", "--images_", "--ema")
    tiny = [flag for flag in TINY if not flag.startswith(apart)]
    study = tmp_path / "study"
    given = [*tiny, "--only=rll,sup_con", "--rates=1e-3", "--more_rates=0", f"--workdir={study}"]
    result = run(*given, "--images=32", "--seeds=1", "--batches=4x2", name=STUDY)
    assert result.returncode == 0, result.stderr
    again = [*given, "--images=32", "--seeds=1", "--batches=4x2,8x2", "--tuning_steps=9"]
    result = run(*again, name=STUDY)
    assert result.returncode == 0 and result.stdout.count("finished before") == 4, result.stderr
    found = json.loads((study / "batch_size.json").read_text())
    assert list(found["batches"]) == ["4x2", "8x2"]
    assert (study / "batch_size.md").read_text() in result.stdout
    refused("another batch_size (--images=32 there, 64 here)", *again, "--images=64", name=STUDY)
    refused("holds no compare to resume", f"--workdir={study}", name="compare")
