"""Unpacking a published archive: nothing outside the target, nothing overwritten, whole or not at all."""

import os
import pathlib
import stat
import tarfile
import tempfile
import zipfile

import tqdm

from rll_jax.data import benchmarks


def unpack(archive, target) -> list[pathlib.Path]:
    """Unpacks a .zip or .tar (also compressed) into the folder `target`; its top files and folders.

    Raises:
      ValueError: not such an archive, damaged or encrypted; a member that leads out of the target or is no file or folder; or
        something of that name is in the target already.
    """
    archive, target = pathlib.Path(archive), pathlib.Path(target)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                return _into(target, archive, file, file.infolist(), _zip_name)
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as file:
                return _into(target, archive, file, file.getmembers(), _tar_name)
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        EOFError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise ValueError(f"{archive}: cannot be unpacked: {error}")
    except OSError as error:  # gzip's and zlib's too
        raise ValueError(f"{archive}: cannot be unpacked into {target}: {error}")
    raise ValueError(f"{archive}: expected a .zip or .tar archive")


def _zip_name(member) -> str | None:
    link = stat.S_ISLNK(member.external_attr >> 16)
    return None if link else member.filename


def _tar_name(member) -> str | None:
    return member.name if member.isfile() or member.isdir() else None


def _into(target, archive, file, members, name_of) -> list[pathlib.Path]:
    names = []
    for member in members:
        name = name_of(member)
        if name is None or not benchmarks.inside(name.removeprefix("./") or "."):
            raise ValueError(
                f"{archive}: its member {getattr(member, 'name', None) or member.filename!r} is a link or leads out of the folder"
            )
        names.append(pathlib.PurePosixPath(name))
    tops = sorted({name.parts[0] for name in names if name.parts})
    if not tops:
        raise ValueError(f"{archive}: is empty")
    if there := [str(target / top) for top in tops if os.path.lexists(target / top)]:
        raise ValueError(
            f"{archive}: {', '.join(there[:3])} is there already: leave out --unpack, or move it away"
        )
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".unpacking.") as aside:
        keep = {"filter": "data"} if isinstance(file, tarfile.TarFile) else {}
        for member in tqdm.tqdm(members, desc=archive.name, unit="file", mininterval=1):
            file.extract(member, aside, **keep)
        while keep and file.fileobj.read(1 << 20):  # to the end, where the check sum is
            pass
        for top in tops:
            (pathlib.Path(aside) / top).rename(target / top)
    return [target / top for top in tops]
