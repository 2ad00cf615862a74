"""Unpacking of published archives: nothing outside the target folder, nothing overwritten."""

from collections.abc import Iterable, Iterator
import contextlib
import os
import pathlib
import stat
import tarfile
from typing import TypeVar
import zipfile

import tqdm

from rll_jax.data import files, paths

_Member = TypeVar("_Member", zipfile.ZipInfo, tarfile.TarInfo)
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    RuntimeError,  # an encrypted .zip
    NotImplementedError,  # an unknown compression
)
# How files begin that are none of these archives, or not whole.
_OTHERS = {
    b"PK": "it is a .zip that is damaged, or of which a part is missing",
    b"\x1f\x8b": "it is compressed by gzip, and there is no .tar in it",
    b"BZh": "it is compressed by bzip2, and there is no .tar in it",
    b"\xfd7zXZ": "it is compressed by xz, and there is no .tar in it",
    b"(\xb5/\xfd": "it is compressed by zstd: unpack it by `tar --zstd -xf`",
    b"7z\xbc\xaf": "it is a .7z: unpack it by 7-Zip",
    b"Rar!": "it is a .rar: unpack it by unrar",
    b"<": "it is a web page or XML: download the archive itself",
    b"version https://git-lfs": "it is a pointer of Git LFS: run `git lfs pull`",
}


def unpack(archive: paths.AnyPath, target: paths.AnyPath) -> list[pathlib.Path]:
    """Unpacks a .zip or a .tar (also a compressed one) into the folder `target`.

    Members are unpacked into a temporary folder in `target` and moved only when all are unpacked.

    Returns:
      The top files and folders of the archive, at their new places, sorted.

    Raises:
      ValueError: the file is not such an archive, or is empty, damaged or encrypted; a member leads
        out of `target` or is neither a file nor a folder; or `target` already has something of the
        same name.
    """
    archive, target = pathlib.Path(archive), pathlib.Path(target)
    try:
        if zipfile.is_zipfile(archive):
            return _unpack_zip(archive, target)
        if tarfile.is_tarfile(archive):
            return _unpack_tar(archive, target)
    except _DAMAGED as error:
        raise ValueError(f"{archive}: cannot be unpacked: {error}") from error
    except OSError as error:  # errors of gzip and zlib are OSErrors too
        raise ValueError(f"{archive}: cannot be unpacked into {target}: {error}") from error
    with archive.open("rb") as file:
        start = file.read(64)
    known = [what for beginning, what in _OTHERS.items() if start.lstrip().startswith(beginning)]
    reasons = known if start else ["it is empty"]
    raise ValueError("; ".join([f"{archive}: expected a .zip or .tar archive", *reasons]))


def reason_to_skip(archive: paths.AnyPath, target: paths.AnyPath) -> str:
    """Returns why an archive is left as it is: it is encrypted, or unpacked in `target` already.

    Returns "" where neither is so, or where `unpack` has something to say.
    """
    archive, target = pathlib.Path(archive), pathlib.Path(target)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                members = file.infolist()
                names = [member.filename for member in members]
            if any(member.flag_bits & 1 for member in members):
                return "it is encrypted"
        else:
            with tarfile.open(archive) as file:
                first = file.next()
                if first is None or not _tops_exist(archive, [first.name], target):
                    return ""
                names = file.getnames()  # reads the whole archive where it is compressed
        if _tops_exist(archive, names, target):
            return f"{', '.join(_top_names(archive, names)[:3])} is there already"
    except (*_DAMAGED, ValueError, OSError):
        pass
    return ""


def _tops_exist(archive: pathlib.Path, names: Iterable[str], target: pathlib.Path) -> bool:
    return all(os.path.lexists(target / top) for top in _top_names(archive, names))


def _unpack_zip(archive: pathlib.Path, target: pathlib.Path) -> list[pathlib.Path]:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            is_link = stat.S_ISLNK(member.external_attr >> 16)
            _check_member(archive, member.filename, allowed=not is_link)
        tops = _top_names(archive, [member.filename for member in members])
        with _moved_into(target, tops, archive) as folder:
            for member in _progress(members, archive):
                file.extract(member, folder)
    return [target / top for top in tops]


def _unpack_tar(archive: pathlib.Path, target: pathlib.Path) -> list[pathlib.Path]:
    with tarfile.open(archive) as file:
        members = file.getmembers()
        for member in members:
            _check_member(archive, member.name, allowed=member.isfile() or member.isdir())
        tops = _top_names(archive, [member.name for member in members])
        with _moved_into(target, tops, archive) as folder:
            for member in _progress(members, archive):
                file.extract(member, folder, filter="data")
            # Reading to the end lets the decompressor compare its check sum.
            while file.fileobj is not None and file.fileobj.read(1 << 20):
                pass
    return [target / top for top in tops]


def _check_member(archive: pathlib.Path, name: str, *, allowed: bool) -> None:
    if not allowed or not paths.is_inside_root(name.removeprefix("./") or "."):
        raise ValueError(f"{archive}: its member {name!r} is a link or leads out of the folder")


def _top_names(archive: pathlib.Path, names: Iterable[str]) -> list[str]:
    """Returns the first parts of the members' names, sorted."""
    parts = [pathlib.PurePosixPath(name).parts for name in names]
    tops = sorted({part[0] for part in parts if part})
    if not tops:
        raise ValueError(f"{archive}: is empty")
    return tops


@contextlib.contextmanager
def _moved_into(
    target: pathlib.Path, tops: list[str], archive: pathlib.Path
) -> Iterator[pathlib.Path]:
    """Yields a temporary folder whose `tops` are moved into `target` when the block ends."""
    existing = [str(target / top) for top in tops if os.path.lexists(target / top)]
    if existing:
        raise ValueError(
            f"{archive}: {', '.join(existing[:3])} is there already: leave out --unpack, "
            "or move it away"
        )
    target.mkdir(parents=True, exist_ok=True)
    # Not `files.atomic_folder`: an archive may have several tops, and `target` exists already.
    with files.temporary_folder(target, ".unpacking.") as folder:
        with files.errors_of(target):
            yield folder
        for top in tops:
            (folder / top).rename(target / top)


def _progress(members: list[_Member], archive: pathlib.Path) -> Iterable[_Member]:
    return tqdm.tqdm(members, desc=archive.name, unit="file", mininterval=1)
