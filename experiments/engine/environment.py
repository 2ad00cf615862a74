"""environment.json: what ran, so that a result can be traced."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys

import jax

_ROOT = pathlib.Path(__file__).parents[2]
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
)


def environment() -> str:
    """Returns the command, the code's commit, versions and devices, as JSON."""
    described = {
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": _versions(),
        "processes": jax.process_count(),
        "devices": [f"{device} ({device.device_kind})" for device in jax.devices()],
    }
    return json.dumps(described, indent=1)


def commit() -> str:
    """Returns the commit of the code, with "-dirty" where it was changed; empty if unknown."""
    # Not `describe --dirty`, which writes into the repository, and may leave a lock there.
    git = ["git", "--no-optional-locks", "-C", str(_ROOT)]
    asked = (["describe", "--always"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        name, changes = (
            subprocess.run([*git, *what], capture_output=True, text=True) for what in asked
        )
    except OSError:  # no git
        return ""
    known = name.returncode == changes.returncode == 0 and (_ROOT / ".git").exists()
    return f"{name.stdout.strip()}{'-dirty' if changes.stdout else ''}" if known else ""


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
