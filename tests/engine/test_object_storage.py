"""Data of s3://, from a local server of moto's; needs pip install moto[server] s3fs."""

import csv

import pytest

from tests.helpers.benchmark_trees import jpeg, make_cub
from tests.helpers.commands import SMALL, refused, run, scores

boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """s3://bucket: class folders (with the empty objects of consoles), an index, CUB-200-2011."""
    root = tmp_path_factory.mktemp("bucket")
    for c in range(8):
        for i in range(4):
            path = root / f"data/c{c}/{'more/' * (i == 3)}{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(c))
    with (root / "index.csv").open("w", newline="") as file:
        rows = [
            (p.relative_to(root / "data"), p.relative_to(root / "data").parts[0])
            for p in sorted((root / "data").rglob("*.jpg"))
        ]
        csv.writer(file).writerows([("path", "label"), *rows])
    (root / "cub").mkdir()
    make_cub(root / "cub")
    there = server.ThreadedMotoServer("127.0.0.1", port=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        there.start()
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*there.get_host_and_port()))
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in sorted(root.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), "bucket", path.relative_to(root).as_posix())
        for folder in ("data/", *(f"data/c{c}/" for c in range(8))):
            client.put_object(Bucket="bucket", Key=folder, Body=b"")
        yield "s3://bucket"
        there.stop()


@pytest.mark.parametrize("index", [False, True])
def test_a_folder_trains(bucket, tmp_path, index):
    options = [f"--index={bucket}/index.csv"] if index else []
    result = run(
        *SMALL,
        f"--data_dir={bucket}/data",
        *options,
        f"--workdir={tmp_path / 'run'}",
        name="folder",
    )
    assert result.returncode == 0, result.stderr
    assert (
        "on 4 classes never trained on" in result.stdout
        and scores(tmp_path / "run")[-1]["recall@1"] > 0
    )


def test_a_benchmark_is_prepared_in_a_local_folder(bucket, tmp_path):
    source, out = f"{bucket}/cub", tmp_path / "out"
    refused(
        "python -m experiments.prepare",
        *SMALL,
        f"--data_dir={source}",
        f"--workdir={tmp_path / 'run'}",
        name="cub",
    )
    refused("prepared in a local --data_dir", "--dataset=cub", f"--source={source}", name="prepare")
    result = run("--dataset=cub", f"--source={source}", f"--data_dir={out}", name="prepare")
    assert result.returncode == 0, result.stderr
    assert f"written: {out / 'prepared_cub'}: 40 images of 10 classes" in result.stdout


def test_mistakes(bucket, tmp_path, monkeypatch):
    arguments = [*SMALL, f"--data_dir={bucket}/data"]
    refused("expected a local folder", *arguments, f"--workdir={bucket}/run", name="folder")
    refused(
        "is written into --data_dir, a local folder, and it is",
        *arguments,
        f"--workdir={tmp_path / 'run'}",
        "--cache=disk",
        name="folder",
    )
    refused(
        "nothing: no such folder",
        *SMALL,
        f"--data_dir={bucket}/nothing",
        f"--workdir={tmp_path / 'run'}",
        name="folder",
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    refused(
        "cannot read s3://bucket/data: Could not connect",
        *arguments,
        f"--workdir={tmp_path / 'run'}",
        name="folder",
    )
    assert not (tmp_path / "run").exists()
