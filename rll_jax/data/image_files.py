"""The image files under a folder: one walk for training, embed, search and prepare.

In are files with a usual image ending, and files of any other name whose content Pillow reads.
Out are hidden and system files and folders, at every depth. Links are followed, and what they lead
to is in once.
"""

from collections import Counter
from collections.abc import Callable
from concurrent import futures
import os
import pathlib
from typing import BinaryIO, NamedTuple, cast
import warnings

from PIL import Image

from rll_jax.data import paths

# Files with these endings are in unopened, so that a damaged one is told of as a bad image.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".tga"),
)
# Of formats that have no signature, need other programs, or hold no pixels.
_NOT_BY_CONTENT = "BUFR EPS GRIB HDF5 IM IMT IPTC MPEG PCD SPIDER TGA WMF"
_SYSTEM = (
    *("__macosx", "@eadir", "@tmp", "@recycle", "@__thumb", "#recycle", "#snapshot"),
    *("@recently-snapshot", "@sharebin", "network trash folder", "temporary items"),
    *("$recycle.bin", "system volume information", "lost+found", "thumbs.db", "ehthumbs.db"),
    *("desktop.ini", "__pycache__"),
)
_HIDDEN = "hidden or of the system"
_TWICE = "linked to twice"
_NO_FILE = "broken links, or no files"
_NO_IMAGE = "not images that can be read"
_NO_ACCESS = "files that cannot be opened"
_THREADS = 16  # each asks the file system, which may be far away


class ImageFiles(NamedTuple):
    """What is found under a folder.

    Attributes:
      names: the paths of the images from the folder, with "/", sorted.
      left_out: {reason: the number of files and folders that are left out for it}.
    """

    names: list[str]
    left_out: Counter[str]


def find(folder: paths.AnyPath) -> ImageFiles:
    """Returns the images in a folder and in the folders below.

    A folder that a link leads to is walked once, whatever links lead in circles; a file or folder
    that is reached without a link is found there. Where several links lead to one file, the first
    by name is in.

    Args:
      folder: the folder, local or in an object store.

    Raises:
      OSError: a folder cannot be read.
    """
    if paths.is_remote(folder):
        return _find_remote(str(folder))
    walk = _Walk(pathlib.Path(folder))
    return _without_others(list(walk.files), walk.left_out, walk.open)


def describe(left_out: Counter[str]) -> str:
    """Returns a line that says what was left out: "left out: 2 hidden or of the system"; or ""."""
    counts = (f"{number} {reason}" for reason, number in sorted(left_out.items()) if number)
    text = ", ".join(counts)
    return f"left out: {text}" if text else ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or of the system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image(file: BinaryIO) -> bool:
    """Whether Pillow knows a file by its content. Its pixels are not read."""
    Image.init()
    formats = [name for name in Image.OPEN if name not in _NOT_BY_CONTENT.split()]
    try:
        with Image.open(file, formats=formats):
            return True
    except Image.DecompressionBombError:
        return True  # told of as a bad image
    except Exception:  # Pillow raises anything on what only looks like an image
        return False


class _Folder(NamedTuple):
    """A folder to list: its path from the root ("" is the root), and its path without links."""

    name: str
    real: str


class _Walk:
    """A walk of local folders.

    Attributes:
      files: {path from the root: path without links} of all files that are not hidden.
      left_out: see `ImageFiles`.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self._root = root
        self.files: dict[str, str] = {}
        self.left_out: Counter[str] = Counter()
        self._walked: set[str] = set()  # the folders, without links
        self._file_links: list[str] = []
        self._folder_links: list[str] = []
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            self._walk(pool, [_Folder("", os.path.realpath(root))])
            while self._folder_links:  # what is reached without a link comes first
                links, self._folder_links = sorted(self._folder_links), []
                for name in links:
                    real = os.path.realpath(root / name)
                    if real in self._walked:
                        self.left_out[_TWICE] += 1
                    else:
                        self._walk(pool, [_Folder(name, real)])
        self._add_linked_files()

    def open(self, name: str) -> BinaryIO:
        """Opens a file by its path from the root."""
        return (self._root / name).open("rb")

    def _walk(self, pool: futures.Executor, folders: list[_Folder]) -> None:
        while folders:
            folders = [folder for folder in folders if folder.real not in self._walked]
            self._walked.update(folder.real for folder in folders)
            inner: list[_Folder] = []
            for folder, entries in zip(folders, pool.map(self._entries, folders), strict=True):
                for name, kind in entries:
                    path = f"{folder.name}/{name}" if folder.name else name
                    if kind == "folder":
                        inner.append(_Folder(path, os.path.join(folder.real, name)))
                    elif kind == "link to a folder":
                        self._folder_links.append(path)
                    elif kind == "link":
                        self._file_links.append(path)
                    elif kind == "file":
                        self.files[path] = os.path.join(folder.real, name)
                    else:
                        self.left_out[kind] += 1
            folders = inner

    def _entries(self, folder: _Folder) -> list[tuple[str, str]]:
        """Returns (name, kind) of what is in a folder, sorted; a kind may be a reason."""
        with os.scandir(self._root / folder.name) as entries:
            return sorted((entry.name, _kind(entry)) for entry in entries)

    def _add_linked_files(self) -> None:
        """Adds the files that links lead to, each file once."""
        known = set(self.files.values())
        for name in sorted(self._file_links):
            real = os.path.realpath(self._root / name)
            if real in known:
                self.left_out[_TWICE] += 1
            else:
                known.add(real)
                self.files[name] = real


def _kind(entry: os.DirEntry[str]) -> str:
    """Returns what an entry of a folder is, or why it is left out."""
    if is_hidden(entry.name):
        return _HIDDEN
    link = "link" if entry.is_symlink() else ""
    try:
        if entry.is_dir():
            return "link to a folder" if link else "folder"
        if entry.is_file():
            return _HIDDEN if entry.name.endswith("~") else link or "file"  # an editor's backup
    except OSError:  # links in a circle
        return _NO_FILE
    # A broken link with the name of an image is told of as a missing image.
    return "file" if link and _has_image_ending(entry.name) else _NO_FILE


def _find_remote(folder: str) -> ImageFiles:
    import fsspec

    system, top = fsspec.core.url_to_fs(folder)
    left_out: Counter[str] = Counter()
    names = []
    for file in system.find(top):
        name = file.removeprefix(f"{top.rstrip('/')}/")
        if any(is_hidden(part) for part in name.split("/")) or name.endswith("~"):
            left_out[_HIDDEN] += 1
        elif not name.endswith("/") and file != top:  # consoles make objects for folders
            names.append(name)

    def opened(name: str) -> BinaryIO:
        return cast(BinaryIO, system.open(f"{top.rstrip('/')}/{name}", "rb"))

    return _without_others(names, left_out, opened)


def _without_others(
    names: list[str], left_out: Counter[str], opened: Callable[[str], BinaryIO]
) -> ImageFiles:
    """Returns the names of images; the others are counted, with their endings.

    Args:
      names: files.
      left_out: what was left out before.
      opened: opens a file by its name.
    """

    def fault(name: str) -> str:
        try:
            with opened(name) as file:
                return "" if is_image(file) else _NO_IMAGE
        except OSError:
            return _NO_ACCESS

    unknown = [name for name in names if not _has_image_ending(name)]
    with warnings.catch_warnings(action="ignore"), futures.ThreadPoolExecutor(_THREADS) as pool:
        faults = dict(zip(unknown, pool.map(fault, unknown), strict=True))
    for reason in (_NO_IMAGE, _NO_ACCESS):
        others = [name for name in unknown if faults[name] == reason]
        if others:
            endings = sorted({_ending(name) or "no ending" for name in others})
            more = ", ..." if len(endings) > 5 else ""
            left_out[f"{reason} ({', '.join(endings[:5])}{more})"] = len(others)
    return ImageFiles(sorted(name for name in names if not faults.get(name)), left_out)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _has_image_ending(name: str) -> bool:
    return _ending(name) in SUFFIXES
