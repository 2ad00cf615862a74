"""The drawings of the `emoji` dataset: which npm packages have them, and which of them are kept.

The rules, in the order in which they are applied:

1. A class is a sequence of code points without variation selectors, so two names of one emoji are
   one class. Four packages give the code points of their drawings in `chars.json`. The names of
   the other packages' drawings are looked up among the names and aliases of those four, then among
   Unicode's names.
2. Skin tones are left out. So are country flags and the letters that spell them: every vendor
   draws the same flag, and some colour it wrongly.
3. A class needs drawings by at least four vendors.
4. Gendered twins of a neutral emoji are left out: `woman-X` and `man-X` where there is `person-X`
   or `X`, and the families and couples that are spelled out by gender.
5. Drawings are rendered at 64 x 64 pixels on white. Blank and failed ones are left out.
6. Drawings that are equal to the pixel: those in two classes are left out of both, and of those in
   one class the first vendor's stays. Then rule 3 is applied again.
"""

import collections
from collections.abc import Container, Mapping, Sequence
import io
import json
import pathlib
import re
from typing import Any, NamedTuple
import unicodedata

import numpy as np
from PIL import Image

# The first vendor that has an emoji names its class. The four with code points come first.
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
SIZE = 64  # pixels of a side
MIN_VENDORS = 4
MAN, WOMAN, PERSON = "1f468", "1f469", "1f9d1"
FAMILY = {MAN, WOMAN, "1f466", "1f467", "200d"}  # with boy, girl and the joiner
REGIONAL = {f"{c:x}" for c in range(0x1F1E6, 0x1F200)}  # the letters that spell a country's flag
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
# Pregnant woman and man: gendered emoji of one code point beside a neutral one.
TWINS = {"1f930": "1fac4", "1fac3": "1fac4"}
# The emoji of fxemoji's names where they differ from the other vendors' names. Names with "" are
# left out: they were seen to be drawings of something else, or need animation to differ from a
# plain heart.
FXEMOJI = {
    "beatingheart": "", "keyboard": "", "kiss": "", "sparkle": "", "sparklingheart": "",
    "star": "", "sunglasses": "", "tramcar": "", "window": "",
    "bunny": "1f430", "bunnyside": "1f407", "cat": "1f431", "catside": "1f408",
    "dog": "1f436", "dogside": "1f415", "mouse": "1f42d", "mouseside": "1f401",
    "pig": "1f437", "pigside": "1f416", "tiger": "1f42f", "tigerside": "1f405",
    "leopardside": "1f406", "construction": "1f3d7", "constructionsign": "1f6a7",
    "whitemediumstar": "2b50", "2hearts": "1f495", "heartarrow": "1f498", "heartblue": "1f499",
    "heartgreen": "1f49a", "heartpurple": "1f49c", "heartribbon": "1f49d", "heartyellow": "1f49b",
}  # fmt: skip


class Drawing(NamedTuple):
    """A rendered drawing.

    Attributes:
      name: its name in the vendor's package.
      pixels: (64, 64, 3) uint8.
    """

    name: str
    pixels: np.ndarray


class RuleCount(NamedTuple):
    """What a rule left.

    Attributes:
      rule: the rule in words.
      classes: the number of classes left.
      images: the number of images left.
    """

    rule: str
    classes: int
    images: int


class Selection(NamedTuple):
    """The dataset's classes and how they were selected.

    Attributes:
      classes: {emoji: {vendor: drawing}}.
      names: {emoji: name of the class}, also of emoji that are left out.
      counts: what each rule left, in the order of the rules.
    """

    classes: dict[str, dict[str, Drawing]]
    names: dict[str, str]
    counts: list[RuleCount]


def read_json(path: pathlib.Path, *keys: str) -> dict[str, Any]:
    """Returns the object in a JSON file of a package.

    Args:
      path: the file.
      *keys: keys that the object must have.

    Raises:
      ValueError: the file cannot be read, is no JSON object or lacks a key.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {**data, **{key: data[key] for key in keys}}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"cannot use {path} ({error!r}): install its package again with `npm install`"
        ) from error


class Vendor:
    """An icon set: the SVG text of its drawings, their names and their code points.

    Attributes:
      name: the vendor's name, one of `VENDORS`.
      version: the version of the npm package.
      info: the package's info.json, with name, author and license.
      icons: {name: drawing}.
      chars: {code points: name}, empty if the package does not have them.
      aliases: {alias: {"parent": name, ...}}; further keys say how the alias differs.
      other_names: {name: aliases that are the same drawing}.
    """

    def __init__(self, modules: pathlib.Path, name: str) -> None:
        package = modules / "@iconify-json" / name
        icons = read_json(package / "icons.json", "icons", "width", "height")
        self.name = name
        self.version: str = read_json(package / "package.json", "version")["version"]
        self.info = read_json(package / "info.json", "name", "author", "license")
        self.icons: dict[str, dict[str, Any]] = icons["icons"]
        self.chars: dict[str, str] = read_json(package / "chars.json")
        self.aliases: dict[str, dict[str, Any]] = icons.get("aliases", {})
        self.other_names: dict[str, list[str]] = {}
        self._size = {side: icons[side] for side in ("width", "height")}
        for alias, target in self.aliases.items():
            if set(target) == {"parent"}:  # a flipped drawing is another drawing
                self.other_names.setdefault(target["parent"], []).append(alias)

    def all_names(self, name: str) -> list[str]:
        """Returns the name and the aliases of a drawing."""
        return [name, *self.other_names.get(name, [])]

    def svg(self, name: str) -> str:
        """Returns the SVG text of a drawing, given its name or an alias."""
        alias = self.aliases.get(name, {})
        icon = self.icons[alias.get("parent", name)]
        width, height = (icon.get(side, size) for side, size in self._size.items())
        flip = f' transform="translate({width} 0) scale(-1 1)"' if alias.get("hFlip") else ""
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        box = f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {width} {height}"'
        return f"<svg {spaces} {box}><g{flip}>{icon['body']}</g></svg>"


def normalise(name: str) -> str:
    """Returns one spelling for the names of an emoji that differ in case, hyphens or flag-for-."""
    return re.sub(r"^flag-for-(flag-)?", "flag-", name.lower()).replace("-", "")


def emoji_of(codepoints: str) -> str:
    """Returns code points without leading zeros and variation selectors, joined by hyphens."""
    return "-".join(c.lstrip("0") for c in codepoints.split("-") if c != "fe0f")


def match(vendors: Sequence[Vendor]) -> tuple[dict[str, dict[str, str]], int]:
    """Finds the emoji of each drawing.

    Args:
      vendors: the vendors, those with code points first.

    Returns:
      drawings: {emoji: {vendor: name}} of all drawings whose code points are known.
      unresolved: the number of drawings whose code points are not known.
    """
    drawings: dict[str, dict[str, str]] = collections.defaultdict(dict)
    names: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for vendor in vendors:
        for codepoints, name in vendor.chars.items():
            emoji = emoji_of(codepoints)
            drawings[emoji].setdefault(vendor.name, name)
            names.setdefault(normalise(name), emoji)
            for alias in vendor.other_names.get(name, []):
                aliases.setdefault(normalise(alias), emoji)
    unicode = {
        normalise(unicodedata.name(chr(int(emoji, 16)), "").replace(" ", "")): emoji
        for emoji in drawings
        if "-" not in emoji
    }
    names = {**unicode, **aliases, **names}
    unresolved = 0
    for vendor in vendors:
        if vendor.chars:
            continue
        # fxemoji is older than the short names and uses Unicode's.
        known = {**names, **unicode, **FXEMOJI} if vendor.name == "fxemoji" else names
        for name in vendor.icons:
            spellings = (normalise(other) for other in vendor.all_names(name))
            emoji = next((known[spelling] for spelling in spellings if spelling in known), None)
            if emoji is None:
                unresolved += 1
            elif emoji:
                drawings[emoji].setdefault(vendor.name, name)
    return drawings, unresolved


def neutral_of(emoji: str) -> str | None:
    """Returns the neutral emoji of which the given one would be a gendered twin.

    That is the emoji itself where nothing in it is gendered, and None for an emoji of one code
    point that is not in `TWINS`.
    """
    parts = emoji.split("-")
    if len(parts) == 1:
        return TWINS.get(emoji)
    if set(parts) <= FAMILY:
        return "1f46a"
    if parts[0] in (MAN, WOMAN):
        if "2764" in parts:
            return "1f48f" if "1f48b" in parts else "1f491"  # a kiss or a couple with heart
        parts[0] = PERSON
    return re.sub("-200d-(2640|2642)", "", "-".join(parts))


def render(svg: str) -> np.ndarray | None:
    """Returns the (64, 64, 3) uint8 pixels of a drawing on white.

    None: the drawing cannot be rendered, or all its pixels are alike.
    """
    import resvg_py  # pyright: ignore[reportMissingImports]  # optional: needed here alone

    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    except ValueError:
        return None
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return None if np.ptp(pixels) == 0 else pixels


def is_gendered_twin(emoji: str, emojis: Container[str]) -> bool:
    """Returns whether the emoji is a gendered twin of another one among `emojis`."""
    neutral = neutral_of(emoji)
    return neutral is not None and neutral != emoji and neutral in emojis


def select(vendors: Sequence[Vendor]) -> Selection:
    """Applies the rules, which the docstring of this module has, to all drawings."""
    named, unresolved = match(vendors)
    names = {emoji: next(iter(by_vendor.values())) for emoji, by_vendor in named.items()}
    counts = [_count(f"known code points ({unresolved} names resolve to none)", named)]
    named = {e: by_vendor for e, by_vendor in named.items() if not SKIN_TONES & set(e.split("-"))}
    counts.append(_count("no skin tones", named))
    named = {e: by_vendor for e, by_vendor in named.items() if not REGIONAL & set(e.split("-"))}
    counts.append(_count("no country flags and their letters", named))
    named = {e: by_vendor for e, by_vendor in named.items() if len(by_vendor) >= MIN_VENDORS}
    counts.append(_count(f"at least {MIN_VENDORS} vendors", named))
    named = {e: by_vendor for e, by_vendor in named.items() if not is_gendered_twin(e, named)}
    counts.append(_count("no gendered twins", named))

    classes = _rendered(named, vendors)
    counts.append(_count("no blank or failed drawings", classes))
    owners: dict[bytes, list[tuple[str, str]]] = collections.defaultdict(list)
    for emoji, by_vendor in classes.items():
        for vendor, drawing in by_vendor.items():
            owners[drawing.pixels.tobytes()].append((emoji, vendor))
    classes = _without_shared_by_classes(classes, owners)
    counts.append(_count("no drawings that two classes share", classes))
    classes = _without_shared_by_vendors(classes, owners)
    counts.append(_count("no drawings that two vendors share", classes))
    classes = {e: by_vendor for e, by_vendor in classes.items() if len(by_vendor) >= MIN_VENDORS}
    counts.append(_count(f"at least {MIN_VENDORS} vendors again", classes))
    return Selection(classes, names, counts)


def _count(rule: str, classes: Mapping[str, Mapping[str, Any]]) -> RuleCount:
    return RuleCount(rule, len(classes), sum(map(len, classes.values())))


def _rendered(
    named: Mapping[str, Mapping[str, str]], vendors: Sequence[Vendor]
) -> dict[str, dict[str, Drawing]]:
    """Renders the drawings; those that are blank or fail are left out."""
    by_name = {vendor.name: vendor for vendor in vendors}
    classes: dict[str, dict[str, Drawing]] = {}
    for emoji, by_vendor in named.items():
        classes[emoji] = {}
        for vendor, name in by_vendor.items():
            pixels = render(by_name[vendor].svg(name))
            if pixels is not None:
                classes[emoji][vendor] = Drawing(name, pixels)
    return classes


def _without_shared_by_classes(
    classes: Mapping[str, Mapping[str, Drawing]], owners: Mapping[bytes, list[tuple[str, str]]]
) -> dict[str, dict[str, Drawing]]:
    """Leaves out the drawings whose pixels occur in another class too.

    Args:
      classes: {emoji: {vendor: drawing}}.
      owners: the (emoji, vendor) that have the same pixels, by the bytes of the pixels.
    """
    kept: dict[str, dict[str, Drawing]] = {emoji: {} for emoji in classes}
    for emoji, by_vendor in classes.items():
        for vendor, drawing in by_vendor.items():
            if all(owner == emoji for owner, _ in owners[drawing.pixels.tobytes()]):
                kept[emoji][vendor] = drawing
    return kept


def _without_shared_by_vendors(
    classes: Mapping[str, Mapping[str, Drawing]], owners: Mapping[bytes, list[tuple[str, str]]]
) -> dict[str, dict[str, Drawing]]:
    """Keeps the first vendor's of the drawings of a class that are equal to the pixel.

    Args:
      classes: {emoji: {vendor: drawing}}.
      owners: as in `_without_shared_by_classes`, the first vendor first.
    """
    kept: dict[str, dict[str, Drawing]] = {emoji: {} for emoji in classes}
    for emoji, by_vendor in classes.items():
        for vendor, drawing in by_vendor.items():
            if owners[drawing.pixels.tobytes()][0] == (emoji, vendor):
                kept[emoji][vendor] = drawing
    return kept
