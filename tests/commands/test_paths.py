"""Paths are names: every command in folders whose names are patterns, formats or shell text."""

import os
import shutil

import numpy as np
import pytest

from tests.helpers.benchmark_trees import make_folders, make_sop
from tests.helpers.commands import TINY, refused, run

ODD = "~a [b] {c} *?'\"\\ ü%, \x85~"
SMALL = [
    *(
        flag
        for flag in TINY
        if "classes" not in flag and "every" not in flag and "steps" not in flag
    ),
    "--classes_per_batch=2",
    "--steps=2",
    "--eval_every=2",
    "--checkpoint_every=1",
    "--augment=affine",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of an odd name, with class folders of odd names in it."""
    root = tmp_path_factory.mktemp("paths") / ODD
    make_folders(root / "images", [f"{ODD} {c}" for c in range(6)])
    return root


def ended(*arguments, name):
    result = run(*arguments, name=name)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    return result


def test_every_command_in_a_folder_of_an_odd_name(root):
    data, workdir = f"--data_dir={root / 'images'}", root / "run"
    given = [*SMALL, data, "--report", "--cache=disk", "--keep=1"]
    ended(*given, f"--workdir={workdir}", name="folder")
    assert (workdir / "report.html").exists()
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
    # What the checkpoint holds is what the run scored.
    at = f"--workdir={workdir}"
    ended(at, "--noclustering", name="evaluate")
    ended(at, f"--out={root / 'e.npz'}", f"--images={root / 'images'}", name="embed")
    with np.load(root / "e.npz") as saved:
        assert len(saved["files"]) == 18
    query = root / f"images/{ODD} 0/0.JPG"
    found = ended(at, f"--images={root / 'images'}", f"--query={query}", "--k=1", name="search")
    assert found.stdout.split("\n")[0] == str(query)
    ended(at, f"--out={root / 'model.safetensors'}", name="export")
    prepared = [f"--source={root / 'images'}", f"--data_dir={root / 'out'}"]
    ended("--dataset=folder", *prepared, name="prepare")
    given = [*SMALL, f"--data_dir={root / 'out/prepared_folder'}", f"--init_from={workdir}"]
    ended(*given, f"--workdir={root / 'next'}", name="folder")


def test_a_name_that_is_not_utf8(root, tmp_path):
    folder = tmp_path / os.fsdecode(b"a \xff")
    shutil.copytree(root / "images", folder)
    given = [*SMALL, f"--data_dir={folder}", "--noreport", f"--workdir={folder / 'run'}"]
    refused("a folder whose name is UTF-8", *given, "--cache=disk", name="folder")
    ended(*given, name="folder")
    refused("whose name is UTF-8", *given, "--profile_steps=1:2", name="folder")
    refused("has a line break", *given, "--init_from=a\nb", name="folder")
    searched = [f"--images={folder}", f"--query={root / 'images' / f'{ODD} 0/0.JPG'}", "--k=1"]
    ended(f"--workdir={folder / 'run'}", *searched, name="search")
    refused(
        "run/flags.txt: expected UTF-8", f"--flagfile={folder / 'run/flags.txt'}", name="folder"
    )


def test_sweeps_in_a_folder_of_an_odd_name(root):
    given = [*SMALL, f"--data_dir={root / 'images'}", "--dataset=folder"]
    ended(*given, "--sweep=margin=0.2", f"--workdir={root / 'sweep'}", name="sweep")
    compared = ["--only=rll", "--rates=1e-3", "--more_rates=0", "--seeds=1", "--tuning_steps=1"]
    ended(*given, *compared, f"--workdir={root / 'compare'}", name="compare")
    assert (root / "compare/compare.md").exists()


def test_a_folder_beside_that_its_name_would_match_as_a_pattern_is_not_read(tmp_path):
    make_sop(tmp_path / "sop2")
    make_sop(tmp_path / "sop[2]")
    shutil.rmtree(tmp_path / "sop[2]/Stanford_Online_Products/chair_final")
    result = run("--dataset=sop", f"--source={tmp_path / 'sop[2]'}", name="prepare")
    assert result.returncode == 2 and "24 of the 48 images" in result.stderr, result.stderr
