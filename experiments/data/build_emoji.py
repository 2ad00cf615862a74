"""Builds the `emoji` dataset: a class is an emoji, its images are drawings by different vendors.

    npm install --prefix DIR spdx-license-list @iconify-json/{noto,...}  # all of VENDORS
    pip install resvg_py pyoxipng tensorflow-datasets array_record importlib_resources
    python -m experiments.data.build_emoji --npm=DIR --out=experiments/data/emoji

`experiments.data.emoji_drawings` selects and renders the drawings and has the rules. Half of the
classes train and the others test: a permutation, seeded with 0, of the classes sorted by name.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import importlib.util
import io
import pathlib
import tempfile
from typing import Any

from absl import app, flags
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from experiments.data import emoji_drawings
from experiments.engine import command
from rll_jax.data import files

README = """# Emoji

A class is an emoji, and its images are drawings of it by different vendors. There are {classes}
classes and {images} images of 64 x 64 pixels on white. A class has {fewest} to {most} images. Half
of the classes train and the others are searched; no class is in both splits.

| split | classes | images |
|---|---|---|
| train | {train_classes} | {train} |
| test | {test_classes} | {test} |

`python -m experiments.data.build_emoji` made this folder from npm packages.
`tfds.builder_from_directory` reads it. The features are `image` (PNG), `label` (the place of the
class among the sorted names), `name` (the class) and `path` (vendor/drawing).

## Artwork and licences

The images are rendered from openly licensed SVG drawings. Nothing else was changed. Each image
stays under the licence of its vendor:

{licences}

**Under a ShareAlike licence: {share_alike}.** `LICENSES/` has the text of each licence and the
attributions.

| vendor | images | npm package | licence | author | source |
|---|---|---|---|---|---|
{vendors}

## Rules of selection

The docstring of `experiments/data/emoji_drawings.py` explains the rules. They were applied in this
order:

| rule | classes left | images left |
|---|---|---|
{rules}
"""


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Drawings of emoji by different vendors; the classes of train and test are disjoint."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, classes: Sequence[tuple[str, Mapping[str, emoji_drawings.Drawing]]], **kwargs: Any
    ) -> None:
        """Takes the classes sorted by name: (name, {vendor: drawing}) each."""
        self.classes = classes
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image, text = tfds.features.Image(encoding_format="png"), tfds.features.Text()
        features = tfds.features.FeaturesDict(
            {"image": image, "label": np.int64, "name": text, "path": text}
        )
        return tfds.core.DatasetInfo(
            builder=self, description=self.__doc__, features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        order = np.random.default_rng(0).permutation(len(self.classes))
        half = len(order) // 2
        return {
            "train": self._generate_examples(order[:half]),
            "test": self._generate_examples(order[half:]),
        }

    def _generate_examples(self, labels: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
        for label in sorted(labels.tolist()):
            name, drawings = self.classes[label]
            for vendor, drawing in drawings.items():
                path = f"{vendor}/{drawing.name}"
                image = io.BytesIO(png_bytes(drawing.pixels))
                yield path, {"image": image, "label": label, "name": name, "path": path}


def png_bytes(pixels: np.ndarray) -> bytes:
    """Returns (H, W, 3) uint8 pixels as a small RGB PNG file."""
    import oxipng  # pyright: ignore[reportMissingImports]  # optional: needed here alone

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    # Only the compression may change: a palette or grey image would no longer be RGB.
    reductions = ("bit_depth", "color_type", "grayscale", "palette")
    same = {f"{reduction}_reduction": False for reduction in reductions}
    return oxipng.optimize_from_memory(file.getvalue(), level=2, **same)


def check_packages() -> None:
    """Raises ValueError if a Python package that only this command needs is missing."""
    modules = {"resvg_py": "resvg_py", "oxipng": "pyoxipng"}
    missing = [
        package for module, package in modules.items() if not importlib.util.find_spec(module)
    ]
    if missing:
        raise ValueError(f"Python packages missing: run `pip install {' '.join(missing)}`")


def find_modules(npm: str) -> pathlib.Path:
    """Returns the node_modules folder of all npm packages.

    Args:
      npm: the folder in which they were installed.

    Raises:
      ValueError: a package is missing.
    """
    modules = pathlib.Path(npm, "node_modules")
    packages = [f"@iconify-json/{name}" for name in emoji_drawings.VENDORS]
    packages.append("spdx-license-list")
    missing = [package for package in packages if not (modules / package).is_dir()]
    if missing:
        raise ValueError(
            f"packages missing in {modules}: run `npm install --prefix {npm} {' '.join(missing)}`"
        )
    return modules


def by_licence(
    vendors: Sequence[emoji_drawings.Vendor],
) -> dict[str, list[emoji_drawings.Vendor]]:
    """Returns the vendors of each licence, by its SPDX identifier."""
    groups: dict[str, list[emoji_drawings.Vendor]] = {}
    for vendor in vendors:
        groups.setdefault(vendor.info["license"]["spdx"], []).append(vendor)
    return groups


def write_readme(
    folder: pathlib.Path,
    vendors: Sequence[emoji_drawings.Vendor],
    selection: emoji_drawings.Selection,
    splits: Mapping[str, Any],
) -> None:
    """Writes README.md: counts, vendors with their licences, and what each rule left.

    Args:
      folder: the folder of the dataset.
      vendors: all vendors.
      selection: the selected classes.
      splits: {"train": split, "test": split}, each with `num_examples`.
    """
    classes = list(selection.classes.values())
    images = collections.Counter(vendor for drawings in classes for vendor in drawings)
    vendor_rows = []
    for vendor in vendors:
        licence, author = vendor.info["license"], vendor.info["author"]
        package = f"`@iconify-json/{vendor.name}` {vendor.version}"
        cells = [vendor.name, images[vendor.name], package]
        cells += [f"[{licence['spdx']}]({licence['url']})", author["name"], author["url"]]
        vendor_rows.append(f"| {' | '.join(map(str, cells))} |")
    licences = {
        spdx: ", ".join(vendor.name for vendor in group)
        for spdx, group in by_licence(vendors).items()
    }
    rule_rows = [f"| {' | '.join(map(str, count))} |" for count in selection.counts]
    train, test = splits["train"].num_examples, splits["test"].num_examples
    text = README.format(
        classes=len(classes),
        images=train + test,
        fewest=min(map(len, classes)),
        most=max(map(len, classes)),
        train_classes=len(classes) // 2,
        train=train,
        test_classes=len(classes) - len(classes) // 2,
        test=test,
        licences="\n".join(f"- {spdx}: {names}" for spdx, names in licences.items()),
        share_alike="; ".join(names for spdx, names in licences.items() if "-SA-" in spdx),
        vendors="\n".join(vendor_rows),
        rules="\n".join(rule_rows),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_licenses(
    folder: pathlib.Path, vendors: Sequence[emoji_drawings.Vendor], modules: pathlib.Path
) -> None:
    """Writes LICENSES/: the text of each licence, and who made what under it.

    Args:
      folder: the folder of the dataset.
      vendors: all vendors.
      modules: the node_modules folder, in which spdx-license-list has the texts.
    """
    (folder / "LICENSES").mkdir()
    for spdx, group in by_licence(vendors).items():
        source = modules / "spdx-license-list" / "licenses" / f"{spdx}.json"
        text: str = emoji_drawings.read_json(source, "licenseText")["licenseText"]
        text = text.replace("<year> <copyright holders>", group[0].info["author"]["name"])
        lines = [f"{spdx} covers the images of"]
        for vendor in group:
            author, licence = vendor.info["author"], vendor.info["license"]
            made_by = f"{vendor.info['name']} by {author['name']}, {author['url']}"
            lines.append(f"{vendor.name}: {made_by} ({licence['url']})")
        lines += ["", text.strip(), ""]
        (folder / "LICENSES" / f"{spdx}.txt").write_text("\n".join(lines), encoding="utf-8")


def build(npm: str, out: pathlib.Path) -> None:
    """Builds the dataset in a new folder, which is complete or absent.

    Args:
      npm: the folder in which the npm packages were installed.
      out: the folder to make.

    Raises:
      ValueError: `out` exists, or a package is missing or cannot be used.
    """
    if out.exists():
        raise ValueError(f"--out={out} exists: remove it or choose another folder")
    check_packages()
    modules = find_modules(npm)
    vendors = [emoji_drawings.Vendor(modules, name) for name in emoji_drawings.VENDORS]
    selection = emoji_drawings.select(vendors)
    for count in selection.counts:
        print(f"{count.rule}: {count.classes} classes, {count.images} images")
    named = [(selection.names[emoji], drawings) for emoji, drawings in selection.classes.items()]
    named.sort(key=lambda name_and_drawings: name_and_drawings[0])
    with files.atomic_folder(out) as folder, tempfile.TemporaryDirectory(dir=out.parent) as temp:
        builder = Emoji(named, data_dir=temp, file_format="array_record")
        builder.download_and_prepare()
        for path in pathlib.Path(builder.data_path).iterdir():
            path.rename(folder / path.name)
        write_readme(folder, vendors, selection, builder.info.splits)
        write_licenses(folder, vendors, modules)


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "npm", ".", "The folder in which the npm packages are installed.", flag_values=flag_values
    )
    flags.DEFINE_string(
        "out", "experiments/data/emoji", "The folder to make.", flag_values=flag_values
    )


def main(_: Sequence[str]) -> None:
    """Builds the dataset that the flags name."""
    with command.user_errors():
        build(flags.FLAGS.npm, pathlib.Path(flags.FLAGS.out).absolute())


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=command.parse_flags)
