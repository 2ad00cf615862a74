"""prepare, told to stop, killed, and among archives that it cannot or need not unpack."""

import os
import signal
import subprocess
import time
import zipfile

import pytest

from rll_jax.data import archives, files
from tests.helpers.benchmark_trees import make_inshop, make_sop
from tests.helpers.commands import command, run


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_told_to_stop_it_leaves_nothing(number, code, tmp_path):
    root = make_sop(tmp_path, classes=1200)
    given = command("--dataset=sop", f"--source={root}", f"--data_dir={tmp_path}", name="prepare")
    process = subprocess.Popen(
        **given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where the tests run in the background, SIGINT is ignored, and processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None and not hidden(tmp_path):
        time.sleep(0.002)
    process.send_signal(number)
    _, told = process.communicate(timeout=100)
    assert process.returncode == code and "Traceback" not in told, told
    assert {path.name for path in tmp_path.iterdir()} == {root.name}


def test_a_signal_while_the_folder_is_made_leaves_nothing(tmp_path, monkeypatch):
    made, mkdir = [], os.mkdir

    def interrupted(path, *others, **options):
        mkdir(path, *others, **options)
        made.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), files.temporary_folder(tmp_path, ".set."):
        pass
    assert made and not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_told(tmp_path, capsys):
    left, other = tmp_path / ".set.abcd_123", tmp_path / ".set.of mine"
    for folder in (left, other):
        folder.mkdir()
        (folder / "x").touch()
    with files.temporary_folder(tmp_path, ".set.") as used:
        assert not left.exists() and other.exists()
        assert capsys.readouterr().err.splitlines() == [
            f"removing {left}, which an interrupted process left"
        ]
        with files.atomic_folder(tmp_path / "set") as folder:
            assert used.exists() and folder != used
    assert not capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"set", other.name}


def test_archives_that_are_skipped(tmp_path):
    make_inshop(tmp_path)
    with zipfile.ZipFile(tmp_path / "Img/img.zip", "w") as file:
        file.writestr("img/WOMEN/x.jpg", b"")
    with zipfile.ZipFile(tmp_path / "Img/img_highres.zip", "w") as file:
        file.writestr("img_highres/x.jpg", b"")
    data = bytearray((tmp_path / "Img/img_highres.zip").read_bytes())
    data[6] |= 1  # encrypted, in the member's header and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "Img/img_highres.zip").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "Anno.zip", "w") as file:
        file.writestr("Anno/list.txt", b"")
    (tmp_path / ".hidden.zip").write_bytes(data)
    result = run("--dataset=inshop", f"--source={tmp_path}", "--unpack", name="prepare")
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith(("skip", "unp"))] == [
        f"unpacked: {tmp_path / 'Anno'}",
        f"skipped: {tmp_path / 'Img/img.zip'}: img is there already",
        f"skipped: {tmp_path / 'Img/img_highres.zip'}: it is encrypted",
    ]
    assert archives.reason_to_skip(tmp_path / "Anno.zip", tmp_path / "elsewhere") == ""
