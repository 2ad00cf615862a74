"""The options of a run: sections, flags, flags.txt, help."""

import dataclasses
import re

from absl import flags
import pytest

from experiments.engine import config, many_runs, options
from experiments.engine import flags as engine_flags
from experiments.engine.config import OPTIONS
from tests.helpers.commands import run

FREE_ON_RESUME = {
    "data_dir", "workdir", "threads", "worker_processes", "checkpoint_every", "keep", "log_every",
    "report", "zero_shot", "verify_images", "max_bad_images", "compilation_cache", "max_bad_steps",
    "profile_steps", "dry_run", "multihost", "coordinator_address", "num_processes", "process_id",
}  # fmt: skip


def test_the_names_of_all_options_differ():
    parts = [type(part.default) for part in dataclasses.fields(config.Config)]
    names = [field.name for section in parts for field in dataclasses.fields(section)]
    assert len(names) == len(set(names)) == len(OPTIONS) == 99


def test_a_section_says_what_may_change_on_resume():
    assert {name for name, known in OPTIONS.items() if known.free_on_resume} == FREE_ON_RESUME


def test_flags_and_flags_txt_give_the_same_run_back(tmp_path):
    one = config.from_flat(
        levels="H,L", remat=(1, 2), decay_at="3,5", seed=3, report=False, pretrained="a=b c"
    )
    assert (one.network.levels, one.network.remat) == (("L", "H"), (1, 2))
    assert one.optimizer.decay_at == (3, 5)
    path = tmp_path / "flags.txt"
    path.write_text(one.as_flagfile())
    assert config.from_flagfile(path) == one
    values = flags.FlagValues()
    flags.DEFINE_string("flagfile", "", "", flag_values=values)
    engine_flags.define(flag_values=values)
    values(["experiment", *values.read_flags_from_files([f"--flagfile={path}"])])
    assert engine_flags.config_from_flags(values) == one
    assert config.differences(one, one.replace(threads=9, workdir="elsewhere")) == []
    assert config.differences(one, one.replace(remat=(2,))) == ["--remat=1,2 there, 2 here"]


@pytest.mark.parametrize(
    "line, text",
    [
        ("--stepz=3", "line 2: expected --option=value of an experiment, found '--stepz=3'"),
        ("--steps=many", "line 2: '--steps=many': invalid literal"),
        ("--report=maybe", "--report=maybe: expected True or False"),
        ("--remat=1,x", "--remat=1,x: expected numbers with commas between"),
        ("--stage_sizes=-1", "--stage_sizes=-1: expected numbers"),
        ("steps", "found 'steps'"),
    ],
)
def test_a_damaged_flags_txt_is_refused_by_line(line, text, tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text(f"--seed=1\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(text)):
        config.from_flagfile(path)


@pytest.mark.parametrize(
    "values, text",
    [
        ({"no_option": 1}, "--no_option: no such option"),
        ({"levels": ()}, "--levels=: expected some of L,M,H"),
        ({"levels": "L,M"}, None),
        ({"backbone": "resnet_tiny", "levels": "L"}, "--backbone=resnet_tiny has only 2 stages"),
        ({"remat": "4"}, "--remat=4: the stages of --backbone=resnet_small are 1 to 3"),
        ({"backbone": "googlenet_v2", "width": 3}, "are of ResNets, and --backbone=googlenet_v2"),
        ({"stage_sizes": "1,0"}, "--stage_sizes=(1, 0): expected one or more blocks"),
        ({"margin": float("nan")}, "--margin=nan: expected at least 0"),
        ({"ema": 1.0}, "--ema=1.0: expected between 0 and 0.999999"),
        ({"memory_size": 64, "class_augment": True}, "another way in each batch"),
        (
            {"dataset": "cub", "test_classes": "second_half"},
            "--test_classes=second_half goes with --dataset=folder: cub has a split of its own",
        ),
        (
            {"dataset": "folder", "test_classes": "second_half", "test_share": 0.3},
            "--test_classes=second_half and --test_share=0.3 do not go together",
        ),
        ({"test_classes": "first"}, "--test_classes=first: expected one of drawn, second_half"),
        ({"pixel_mean": "1,2"}, "--pixel_mean=1.0,2.0: expected three numbers between 0 and 255"),
        ({"pixel_mean": "1,2,x"}, "--pixel_mean=1,2,x: expected numbers with commas between"),
        ({"pool_rounding": "even"}, "--pool_rounding=even: expected one of up, down"),
        ({"pretrained_prefix": "a."}, "--pretrained_prefix=a. is of the names in --pretrained"),
        ({"process_id": 1}, "--num_processes and --process_id go together, with --multihost"),
        ({"profile_steps": "5:5"}, "--profile_steps=5:5: expected A:B with A below B"),
    ],
)
def test_what_does_not_go_together_is_refused_by_flag(values, text):
    if text is None:
        assert config.from_flat(**values)
        return
    with pytest.raises(ValueError, match=re.escape(text)):
        config.from_flat(**values)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_flags_help_is_a_sentence_that_stands_alone(name):
    text = OPTIONS[name].metadata["help"]
    assert re.match(r"[A-Z]|sgd", text) and text.endswith(".")
    assert not re.search(r"next three|see above|these options|the same as before", text)


def test_a_run_older_than_an_option_goes_on_as_it_began(tmp_path):
    now = config.from_flat(seed=3)
    lines = now.as_flagfile().splitlines(keepends=True)
    path = tmp_path / "flags.txt"
    path.write_text("".join(line for line in lines if "--pool_rounding" not in line))
    before = config.from_flagfile(path)
    assert before.network.pool_rounding == "down" and now.network.pool_rounding == "up"
    begun, changed = config.as_begun(now, path)
    assert begun == before and changed == {"pool_rounding": "down"}
    assert config.as_begun(before, path) == (before, {})
    path.write_text("".join(lines))
    assert config.as_begun(now, path) == (now, {}) and config.from_flagfile(path) == now


def test_a_sweep_older_than_an_option_is_the_same_sweep(tmp_path):
    now = {name: options.to_text(value) for name, value in config.from_flat().flat().items()}
    lines = [f"--{name}={text}" for name, text in now.items() if name != "margin"]
    lines = [line for line in lines if "batch_norm_momentum" not in line]
    path = tmp_path / "sweep.flags"
    path.write_text("\n".join([*lines, "--sweep=margin=0.2,0.4"]))
    swept = {name: text for name, text in now.items() if name != "margin"}
    assert many_runs._differences(path, swept) == []
    assert many_runs._differences(path, now) == ["--margin=(swept) there, 0.4 here"]
    other = swept | {"batch_norm_momentum": "0.5"}
    assert many_runs._differences(path, other) == ["--batch_norm_momentum=0.9 there, 0.5 here"]


def test_texts_of_values():
    for value, text in (((1, 2), "1,2"), ((), ""), (None, ""), (True, "True"), (0.5, "0.5")):
        assert options.to_text(value) == text


def test_help_shows_what_matters_first_and_helpfull_all_by_section():
    short, full = (run(f"--{name}").stdout for name in ("help", "helpfull"))
    shown = re.findall(r"^  --(?:\[no\])?(\w+)$", short, re.M)
    assert shown == [name for name, known in OPTIONS.items() if known.metadata["main"]]
    assert len(shown) == 20 and "--helpfull shows all 99 options" in short
    titles = ["Data", "Batches", "Loss", "Network", "Optimiser", "Schedule", "Devices"]
    assert re.findall(r"^(\w+):$", full, re.M) == [*titles, "Processes", "Runtime"]
    assert re.findall(r"^  --(?:\[no\])?(\w+)$", full, re.M) == list(OPTIONS)


@pytest.mark.parametrize(
    "name",
    [
        "evaluate",
        "embed",
        "search",
        "serve",
        "export",
        "prepare",
        "sweep",
    ],
)
def test_every_command_has_a_help(name):
    ended = run("--help", name=name)
    assert ended.returncode == 0 and f"python -m experiments.{name}" in ended.stdout
    assert "Flags of this command:" in ended.stdout and "--flagfile=FILE" in ended.stdout


def test_another_size_is_searched_by_heads_that_take_it():
    config.from_flat(test_image_size=32, image_size=32, levels=("L", "H"))
    with pytest.raises(ValueError, match="--test_image_size=7: expected 0, or 8 pixels or more"):
        config.from_flat(test_image_size=7)
    with pytest.raises(ValueError, match="--test_image_size=48 and --levels=L,H: the heads"):
        config.from_flat(test_image_size=48, image_size=32, levels=("L", "H"))
