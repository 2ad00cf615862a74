"""Builds the `emoji` data set: the class is an emoji, its images are the drawings of it by different vendors.

    npm install --prefix DIR spdx-license-list @iconify-json/{noto,...}  # All of VENDORS.
    pip install resvg_py pyoxipng tensorflow-datasets array_record importlib_resources
    python -m experiments.data.build_emoji --npm=DIR --out=experiments/data/emoji

The rules, in the order they are applied:

1. A class is a sequence of code points (without variation selectors), so two names of one emoji
   are one class. Four packages give the code points of a drawing in `chars.json`; the names of
   the others are looked up among those four's names and aliases, then among Unicode's.
2. Skin tones are left out; so are country flags and the letters that spell them: every vendor
   draws the same flag, and some colour a wrong one.
3. A class needs drawings by at least four vendors.
4. Gendered twins of a neutral emoji are left out: `woman-X` and `man-X` where `person-X` or `X`
   is there, and the families and couples spelled out by gender.
5. Drawings are rendered at 64 x 64 on white; blank and failed ones are left out.
6. Drawings equal to the pixel: in two classes they are left out of both, in one class the
   first vendor's stays. Then rule 3 again.
7. Half the classes (a permutation of the sorted names, seeded with 0) train, the others test.
"""

import collections
import io
import json
import pathlib
import re
import sys
import tempfile
import unicodedata

from absl import app, flags
import numpy as np
import oxipng
from PIL import Image
import resvg_py
import tensorflow_datasets as tfds

NPM = flags.DEFINE_string("npm", ".", "folder in which the npm packages are installed.")
OUT = flags.DEFINE_string("out", "experiments/data/emoji", "folder to make.")

# The first that has an emoji names its class; the four with code points come first.
VENDORS = (
    "noto",
    "twemoji",
    "openmoji",
    "fluent-emoji-flat",
    "noto-v1",
    "emojione",
    "emojione-v1",
    "fxemoji",
)
SIZE, MIN_VENDORS = 64, 4
MAN, WOMAN, PERSON = "1f468", "1f469", "1f9d1"
FAMILY = {MAN, WOMAN, "1f466", "1f467", "200d"}  # Boy, girl and the joiner.
REGIONAL = {f"{c:x}" for c in range(0x1F1E6, 0x1F200)}  # The letters that spell a country's flag.
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
# Pregnant woman and man: gendered emoji of one code point beside a neutral one.
TWINS = {"1f930": "1fac4", "1fac3": "1fac4"}
# What fxemoji's names mean where it differs from the others; "" for drawings of something else
# (checked by eye) or that need animation to differ from a plain heart.
FXEMOJI = {
    **dict.fromkeys("beatingheart keyboard kiss sparkle sparklingheart star sunglasses tramcar window".split(), ""),
    "bunny": "1f430", "bunnyside": "1f407", "cat": "1f431", "catside": "1f408", "dog": "1f436", "dogside": "1f415",
    "mouse": "1f42d", "mouseside": "1f401", "pig": "1f437", "pigside": "1f416", "tiger": "1f42f",
    "tigerside": "1f405", "leopardside": "1f406", "construction": "1f3d7", "constructionsign": "1f6a7",
    "whitemediumstar": "2b50", "2hearts": "1f495", "heartarrow": "1f498", "heartblue": "1f499",
    "heartgreen": "1f49a", "heartpurple": "1f49c", "heartribbon": "1f49d", "heartyellow": "1f49b",
}  # fmt: skip


class InputError(Exception):
    """What was wrong and how to mend it, in one line."""


def read_json(path, *keys):
    """The object in a package's file, which must have these keys."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {**data, **{key: data[key] for key in keys}}
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise InputError(
            f"cannot use {path} ({e!r}): install its package again with `npm install`."
        ) from e


def find_modules(npm):
    """The node_modules folder that holds all packages."""
    modules = pathlib.Path(npm, "node_modules")
    missing = [
        p
        for p in (*(f"@iconify-json/{v}" for v in VENDORS), "spdx-license-list")
        if not (modules / p).is_dir()
    ]
    if missing:
        raise InputError(
            f"packages missing in {modules}: run `npm install --prefix {npm} {' '.join(missing)}`."
        )
    return modules


def normalise(name):
    """One spelling for what differs between vendors in the name of one emoji."""
    return re.sub(r"^flag-for-(flag-)?", "flag-", name.lower()).replace("-", "")


class Vendor:
    """One icon set: SVG bodies, other names for them, and the code points if the package has them."""

    def __init__(self, modules, name):
        package = modules / "@iconify-json" / name
        self.name = name
        self.set = read_json(package / "icons.json", "icons", "width", "height")
        self.info = read_json(package / "info.json", "name", "author", "license")
        self.version = read_json(package / "package.json", "version")["version"]
        self.chars = read_json(package / "chars.json")
        self.aliases = self.set.get("aliases", {})
        self.names = collections.defaultdict(list)
        for alias, target in self.aliases.items():
            self.names[target["parent"]] += (
                [alias] if set(target) == {"parent"} else []
            )  # A flip is another drawing.

    def svg(self, name):
        alias = self.aliases.get(name, {})
        icon = self.set["icons"][alias.get("parent", name)]
        width, height = (icon.get(side, self.set[side]) for side in ("width", "height"))
        flip = f' transform="translate({width} 0) scale(-1 1)"' if alias.get("hFlip") else ""
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        box = f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {width} {height}"'
        return f"<svg {spaces} {box}><g{flip}>{icon['body']}</g></svg>"


def emoji_of(codepoints):
    return "-".join(c.lstrip("0") for c in codepoints.split("-") if c != "fe0f")


def match(vendors):
    """{emoji: {vendor: name}} for all drawings whose code points are known, and how many are not."""
    drawings, names, aliases = collections.defaultdict(dict), {}, {}
    for vendor in vendors:
        for codepoints, name in vendor.chars.items():
            emoji = emoji_of(codepoints)
            drawings[emoji].setdefault(vendor.name, name)
            names.setdefault(normalise(name), emoji)
            for alias in vendor.names[name]:
                aliases.setdefault(normalise(alias), emoji)
    unicode = {
        normalise(unicodedata.name(chr(int(e, 16)), "").replace(" ", "")): e
        for e in drawings
        if "-" not in e
    }
    names, unresolved = {**unicode, **aliases, **names}, 0
    for vendor in (v for v in vendors if not v.chars):
        # fxemoji is older than the short names, and uses Unicode's.
        known = {**names, **unicode, **FXEMOJI} if vendor.name == "fxemoji" else names
        for name in vendor.set["icons"]:
            found = [known[n] for n in map(normalise, [name, *vendor.names[name]]) if n in known]
            unresolved += not found
            if found and found[0]:
                drawings[found[0]].setdefault(vendor.name, name)
    return drawings, unresolved


def neutral_of(emoji):
    """The code points of the neutral emoji that this one would be a gendered twin of."""
    parts = emoji.split("-")
    if len(parts) == 1:
        return TWINS.get(emoji)
    if set(parts) <= FAMILY:
        return "1f46a"
    if parts[0] in (MAN, WOMAN):
        if "2764" in parts:
            return "1f48f" if "1f48b" in parts else "1f491"  # A kiss or a couple with heart.
        parts[0] = PERSON
    return re.sub("-200d-(2640|2642)", "", "-".join(parts))


def render(svg):
    """The pixels of a drawing, or None where nothing can be seen."""
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    except ValueError:
        return None
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return None if np.ptp(pixels) == 0 else pixels


def select(vendors):
    """The classes {emoji: {vendor: (name, pixels)}}, their names, and what each rule left of both."""
    drawn, unresolved = match(vendors)
    names = {e: next(iter(ds.values())) for e, ds in drawn.items()}
    by_name, owners, left = (
        {vendor.name: vendor for vendor in vendors},
        collections.defaultdict(list),
        [],
    )

    def keep(rule, want_class=lambda e, ds: True, want=lambda e, v, d: True):
        classes = {
            e: {v: d for v, d in ds.items() if want(e, v, d)}
            for e, ds in drawn.items()
            if want_class(e, ds)
        }
        left.append((rule, len(classes), sum(map(len, classes.values()))))
        return classes

    enough = lambda e, ds: len(ds) >= MIN_VENDORS
    drawn = keep(f"known code points ({unresolved} names resolve to none)")
    drawn = keep("no skin tones", lambda e, ds: not SKIN_TONES & set(e.split("-")))
    drawn = keep(
        "no country flags and their letters", lambda e, ds: not REGIONAL & set(e.split("-"))
    )
    drawn = keep(f"at least {MIN_VENDORS} vendors", enough)
    drawn = keep(
        "no gendered twins", lambda e, ds: neutral_of(e) == e or neutral_of(e) not in drawn
    )
    drawn = {
        e: {v: (n, render(by_name[v].svg(n))) for v, n in ds.items()} for e, ds in drawn.items()
    }
    drawn = keep("no blank or failed drawings", want=lambda e, v, d: d[1] is not None)
    for e, v in ((e, v) for e, ds in drawn.items() for v in ds):
        owners[drawn[e][v][1].tobytes()].append((e, v))
    one_class = lambda e, v, d: {other for other, _ in owners[d[1].tobytes()]} == {e}
    drawn = keep("no drawings that two classes share", want=one_class)
    drawn = keep(
        "no drawings that two vendors share",
        want=lambda e, v, d: owners[d[1].tobytes()][0] == (e, v),
    )
    drawn = keep(f"at least {MIN_VENDORS} vendors again", enough)
    return drawn, names, left


def png_bytes(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    # Only the compression may change: a palette or grey image would no longer be RGB.
    same = {
        f"{what}_reduction": False for what in ("bit_depth", "color_type", "grayscale", "palette")
    }
    return oxipng.optimize_from_memory(out.getvalue(), level=2, **same)


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Drawings of emoji by different vendors; the classes of train and test are disjoint."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, classes, **kwargs):
        self.classes = classes  # [(class name, {vendor: (name, pixels)})], sorted.
        super().__init__(**kwargs)

    def _info(self):
        image, text = tfds.features.Image(encoding_format="png"), tfds.features.Text()
        features = tfds.features.FeaturesDict(
            {"image": image, "label": np.int64, "name": text, "path": text}
        )
        return tfds.core.DatasetInfo(
            builder=self, description=self.__doc__, features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        order = np.random.default_rng(0).permutation(len(self.classes))
        half = len(order) // 2
        return {
            "train": self._generate_examples(order[:half]),
            "test": self._generate_examples(order[half:]),
        }

    def _generate_examples(self, labels):
        for label in sorted(labels.tolist()):
            name, drawings = self.classes[label]
            for vendor, (drawing, pixels) in drawings.items():
                path = f"{vendor}/{drawing}"
                yield (
                    path,
                    {
                        "image": io.BytesIO(png_bytes(pixels)),
                        "label": label,
                        "name": name,
                        "path": path,
                    },
                )


README = """# emoji

The class is an emoji, its images are the drawings of it by different vendors: {classes} classes,
{images} images of 64 x 64 pixels on white, at least four a class. The train split has {train_classes}
classes in {train} images, the test split the other {test_classes} classes in {test} images.
`experiments/data/build_emoji.py` built it; its docstring has the rules. `tfds.builder_from_directory` reads it.
Features: `image` (PNG), `label` (place in the sorted names), `name` (class), `path` (vendor/drawing).

| vendor | images | npm package | licence | author | source |
|---|---|---|---|---|---|
{vendors}

The SVG drawings were rendered, nothing else was changed; each image stays under its vendor's licence (`LICENSES/`).

| rule | classes left | images left |
|---|---|---|
{rules}
"""


def write_readme(out, vendors, classes, left, splits):
    images = collections.Counter(v for ds in classes.values() for v in ds)
    row = "| {0.name} | {1} | `@iconify-json/{0.name}` {0.version} | [{2[spdx]}]({2[url]}) | {3[name]} | {3[url]} |"
    rows = [row.format(v, images[v.name], v.info["license"], v.info["author"]) for v in vendors]
    rules = ["| {} | {} | {} |".format(*rule) for rule in left]
    half, train, test = len(classes) // 2, splits["train"].num_examples, splits["test"].num_examples
    counts = {"classes": len(classes), "train_classes": half, "test_classes": len(classes) - half}
    counts |= {"images": train + test, "train": train, "test": test}
    text = README.format(**counts, vendors="\n".join(rows), rules="\n".join(rules))
    (out / "README.md").write_text(text, encoding="utf-8")


def write_licenses(out, vendors, modules):
    """LICENSES/ has the text of each licence, and who made what under it."""
    (out / "LICENSES").mkdir()
    for spdx in {v.info["license"]["spdx"] for v in vendors}:
        sets = [v for v in vendors if v.info["license"]["spdx"] == spdx]
        text = read_json(
            modules / "spdx-license-list" / "licenses" / f"{spdx}.json", "licenseText"
        )["licenseText"]
        text = text.replace("<year> <copyright holders>", sets[0].info["author"]["name"])
        line = "{0.name}: {1[name]} by {2[name]}, {2[url]} ({3[url]})"
        who = [line.format(v, v.info, v.info["author"], v.info["license"]) for v in sets]
        lines = [f"{spdx} covers the images of", *who, "", text.strip(), ""]
        (out / "LICENSES" / f"{spdx}.txt").write_text("\n".join(lines), encoding="utf-8")


def build(npm, out):
    if out.exists():
        raise InputError(f"{out} is already there: remove it or name another --out.")
    modules = find_modules(npm)
    vendors = [Vendor(modules, v) for v in VENDORS]
    classes, names, left = select(vendors)
    print(*("{}: {} classes, {} images".format(*rule) for rule in left), sep="\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    # The data set appears under its name only when it is whole.
    with tempfile.TemporaryDirectory(dir=out.parent) as temp:
        named = sorted(((names[e], ds) for e, ds in classes.items()), key=lambda c: c[0])
        builder = Emoji(named, data_dir=temp, file_format="array_record")
        builder.download_and_prepare()
        made = pathlib.Path(builder.data_path)
        write_readme(made, vendors, classes, left, builder.info.splits)
        write_licenses(made, vendors, modules)
        made.rename(out)


def main(_):
    try:
        build(NPM.value, pathlib.Path(OUT.value).absolute())
    except InputError as e:
        print(f"build_emoji: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
