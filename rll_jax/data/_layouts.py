"""Finds a dataset's files near a folder, however people have unpacked, nested or renamed them.

The folder of the images is the one that holds some of the very files that the metadata name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import os
from typing import NamedTuple

from etils import epath

from rll_jax.data import image_files, paths
from rll_jax.data.listings import Listing, Row

_DEPTH = 2  # so far below a folder files are looked for
_SAMPLE = 32  # so many of the named images are looked for
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda path: path,
    str.lower,
    lambda path: f"{os.path.splitext(path)[0]}{os.path.splitext(path)[1].lower()}",
)


class FolderTree:
    """The folders near a folder; each is listed once. Hidden and system folders are left out.

    Attributes:
      top: the folder, local or in an object store. It need not exist.
    """

    def __init__(self, top: epath.Path) -> None:
        self.top = top
        self._listed: dict[epath.Path, tuple[list[str], set[str]]] = {}

    def folders(self, folder: epath.Path) -> list[str]:
        """Returns the names of the folders in a folder, sorted."""
        return self._list(folder)[0]

    def names(self, folder: epath.Path) -> set[str]:
        """Returns the names of all that is in a folder; none where it cannot be listed."""
        return self._list(folder)[1]

    def near(self, folder: epath.Path) -> Iterator[epath.Path]:
        """Yields a folder and those below it, the upper ones first, sorted by name."""
        level = [folder]
        for _ in range(_DEPTH):
            yield from level
            level = [upper / name for upper in level for name in self.folders(upper)]
        yield from level

    def around(self, folder: epath.Path) -> Iterator[epath.Path]:
        """Yields the folders near `folder`, near the one above it, and near `top`, each once."""
        above = [folder] if folder == self.top else [folder, folder.parent]
        yield from dict.fromkeys(near for base in [*above, self.top] for near in self.near(base))

    def find(self, name: str) -> Iterator[epath.Path]:
        """Yields the files of a name, in any case, near `top`."""
        for folder in self.near(self.top):
            yield from (folder / found for found in self._spelled(folder, name))

    def beside(self, file: epath.Path, name: str) -> epath.Path:
        """Returns the file of a name, in any case, in the folder of another file."""
        return file.parent / next(self._spelled(file.parent, name), name)

    def _spelled(self, folder: epath.Path, name: str) -> Iterator[str]:
        names = self.names(folder)
        yield from (
            [name] if name in names else sorted(n for n in names if n.lower() == name.lower())
        )

    def find_folders(self, folder: epath.Path, name: str) -> list[epath.Path]:
        """Returns the folders of a name, in any case, that are in a folder."""
        names = self.folders(folder)
        return [folder / inner for inner in names if inner.lower() == name.lower()]

    def is_named(self, folder: epath.Path, words: Sequence[str]) -> bool:
        """Whether one of the words is in the name of a folder, or of those above it near `top`."""
        top = self.top if paths.is_remote(self.top) else paths.to_path(os.path.abspath(self.top))
        names = "/".join([*top.parts[-2:], self.relative(folder)]).lower()
        return any(word in names for word in words)

    def relative(self, folder: epath.Path) -> str:
        """Returns the name of a folder from `top`, "." for `top` itself."""
        inside = folder == self.top or self.top in folder.parents
        return str(folder.relative_to(self.top)) if inside else str(folder)

    def _list(self, folder: epath.Path) -> tuple[list[str], set[str]]:
        if folder not in self._listed:
            entries = [
                (name, is_folder)
                for name, is_folder in _entries(folder)
                if not image_files.is_hidden(name)
            ]
            folders = sorted(name for name, is_folder in entries if is_folder)
            self._listed[folder] = folders, {name for name, _ in entries}
        return self._listed[folder]


def _entries(folder: epath.Path) -> list[tuple[str, bool]]:
    """Returns (name, whether it is a folder) for all that is in a folder; links are followed."""
    if paths.is_remote(folder):
        import fsspec

        system, top = fsspec.core.url_to_fs(str(folder))
        try:
            listed = system.ls(top, detail=True)
        except FileNotFoundError:
            return []
        named = [(entry["name"].rstrip("/"), entry["type"] == "directory") for entry in listed]
        # An object store may list the folder itself.
        return [(name.rsplit("/", 1)[-1], kind) for name, kind in named if name != top.rstrip("/")]
    try:
        with os.scandir(folder) as entries:
            return [(entry.name, entry.is_dir()) for entry in entries]
    except OSError:
        return []


class FoundImages(NamedTuple):
    """Where the images of some rows are.

    Attributes:
      listing: the rows, with paths from a root folder that holds the images.
      present: how many of the rows that were looked for are there.
      sampled: how many were looked for.
      looked_in: the folders in which they were looked for.
    """

    listing: Listing
    present: int
    sampled: int
    looked_in: list[epath.Path]


class _Place(NamedTuple):
    """The folder of a group of images, the spelling of their paths, and how many are there."""

    folder: epath.Path
    spell: Callable[[str], str]
    present: int


def find_images(
    tree: FolderTree, metadata: epath.Path, rows: list[Row], groups: Mapping[str, bool]
) -> FoundImages:
    """Finds the folders that hold the images of metadata.

    Args:
      tree: the folders to search.
      metadata: the folder of the metadata.
      rows: the images, by their published paths.
      groups: {first part of published paths, such as "images/": whether a folder of another name
        may stand for it, because the names of its files tell them apart}. Paths that start with
        none of them are looked for as they are.
    """
    groups = {**groups, "": True}
    places, present, sampled = {}, 0, 0
    for prefix, rests in _by_prefix(rows, list(groups)).items():
        folders = _image_folders(tree, metadata, prefix.rstrip("/"), groups[prefix])
        sample = _spread(rests)
        place = _best_place(tree, folders, sample)
        if not place and not paths.is_remote(tree.top):
            sample = rests
            place = _best_place(tree, folders, sample)
        sampled += len(sample)
        if place:
            places[prefix] = place
            present += place.present
    listing = _moved(metadata, rows, list(groups), places)
    return FoundImages(listing, present, sampled, list(tree.around(metadata)))


def _by_prefix(rows: list[Row], prefixes: list[str]) -> dict[str, list[str]]:
    """Returns {prefix: the rest of each path that starts with it}; the last prefix is "".

    A path counts for the first prefix that it starts with.
    """
    grouped: dict[str, list[str]] = {}
    for row in rows:
        prefix = _prefix_of(row.path, prefixes)
        grouped.setdefault(prefix, []).append(row.path[len(prefix) :])
    return grouped


def _prefix_of(path: str, prefixes: list[str]) -> str:
    return next(prefix for prefix in prefixes if path.startswith(prefix))


def _spread(rests: list[str]) -> list[str]:
    """Returns some of the paths, the first and the last among them."""
    step = max(1, (len(rests) - 1) // (_SAMPLE - 1))
    return list(dict.fromkeys([*rests[::step][: _SAMPLE - 1], rests[-1]]))


def _image_folders(
    tree: FolderTree, metadata: epath.Path, name: str, any_name: bool
) -> list[epath.Path]:
    """Returns the folders that may hold the images published in a folder, the likely ones first."""
    folders = list(tree.around(metadata))
    for folder in list(folders):  # an archive unpacked into a folder of its own name
        if name and folder.name.lower() == name.lower():
            folders += tree.find_folders(folder, name)
    if metadata == tree.top:  # it may be a folder of lists alone, beside the images
        folders.append(tree.top.parent / name)
    named = [folder for folder in folders if name and folder.name.lower() == name.lower()]
    others = [folder for folder in folders if any_name]
    return list(dict.fromkeys([*named, *others]))


def _best_place(tree: FolderTree, folders: list[epath.Path], sample: list[str]) -> _Place | None:
    """Returns the folder that holds most of the paths, the first of those; None for none."""
    best = None
    for spell in _SPELLINGS:
        spelled = [spell(path) for path in sample]
        for folder in folders:
            present = _count_present(tree, folder, spelled)
            if present > (best.present if best else 0):
                best = _Place(folder, spell, present)
            if present == len(sample):
                return best
        if best:
            break
    return best


def _count_present(tree: FolderTree, folder: epath.Path, sample: list[str]) -> int:
    names = tree.names(folder)
    likely = [path for path in sample if path.split("/", 1)[0] in names]
    deep = [folder / path for path in likely if "/" in path]
    if not deep:
        return len(likely)
    with futures.ThreadPoolExecutor(16) as pool:  # each asks the file system
        return len(likely) - len(deep) + sum(pool.map(lambda path: path.exists(), deep))


def _moved(
    metadata: epath.Path, rows: list[Row], prefixes: list[str], places: dict[str, _Place]
) -> Listing:
    """Returns the rows with paths from a root folder to where their images were found."""
    bases = [
        place.folder.parent
        if place.folder.name.lower() == prefix.rstrip("/").lower()
        else place.folder
        for prefix, place in places.items()
    ] or [metadata]
    root = next(
        folder
        for folder in [bases[0], *bases[0].parents]
        if all(base == folder or folder in base.parents for base in bases)
    )
    # {published prefix: (prefix from the root, spelling)}
    new = {}
    for prefix, place in places.items():
        inside = "" if place.folder == root else f"{place.folder.relative_to(root)}/"
        new[prefix] = inside, place.spell

    def move(row: Row) -> Row:
        prefix = _prefix_of(row.path, prefixes)
        if prefix not in new:
            return row
        inside, spell = new[prefix]
        return row._replace(path=f"{inside}{spell(row.path[len(prefix) :])}")

    return Listing(root, [move(row) for row in rows])
