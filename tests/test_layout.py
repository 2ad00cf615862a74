"""Which room may use which: a pure core, one direction, experiments on top."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

# Each room and the rooms that it may use besides itself; all may use the files in `FOR_ALL`.
FOR_ALL = {"rll_jax.typing", "rll_jax._jaxlib_fault"}
MAY_USE = {
    "rll_jax": set(),
    "rll_jax.typing": set(),
    "rll_jax._jaxlib_fault": set(),
    "rll_jax.loss": set(),
    "rll_jax.metrics": set(),
    "rll_jax.networks": {"rll_jax.loss", "rll_jax.typing"},
    "rll_jax.data": set(),
    "rll_jax.training": {"rll_jax.loss", "rll_jax.networks", "rll_jax.data"},
    "experiments.data": {"experiments.engine", "rll_jax.data"},
    "experiments.engine": {
        "rll_jax", "rll_jax.loss", "rll_jax.metrics", "rll_jax.networks", "rll_jax.data",
        "rll_jax.training", "rll_jax.typing",
    },
    "experiments.benchmarks": {
        "experiments.engine", "rll_jax.loss", "rll_jax.metrics", "rll_jax.networks", "rll_jax.data",
        "rll_jax.training",
    },
    "experiments.studies": {
        "experiments", "experiments.engine", "rll_jax.loss", "rll_jax.metrics", "rll_jax.data",
    },
    "experiments": {
        "experiments.engine", "rll_jax.metrics", "rll_jax.networks", "rll_jax.data",
        "rll_jax.training",
    },
}  # fmt: skip
CORE = ("loss", "loss.baselines", "loss.memory", "metrics", "data.sampler")
FILES = sorted(
    path for package in ("rll_jax", "experiments") for path in (ROOT / package).rglob("*.py")
)


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imported(path):
    """The modules of the project that a file imports, but for type checkers alone."""
    tree = ast.parse(path.read_text())
    lazy = [
        n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    ]
    skipped = {id(inner) for node in lazy for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (name if name in MODULES else node.module for name in names)


def room_of(module: str) -> str:
    """The longest room that the module is in; a command is in `experiments`."""
    return max((room for room in MAY_USE if f"{module}.".startswith(f"{room}.")), key=len)


def test_every_folder_is_a_room():
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES}
    assert folders | FOR_ALL == MAY_USE.keys()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_rooms_use_rooms_one_way(path):
    room = room_of(module_of(path))
    used = {
        room_of(name) for name in imported(path) if name.split(".")[0] in ("rll_jax", "experiments")
    }
    assert used - {room} - FOR_ALL <= MAY_USE[room]
    if room.startswith("rll_jax"):
        assert not any(name.split(".")[0] in ("absl", "tests") for name in imported(path))


def test_modules_of_a_room_import_in_no_circle():
    uses = {module_of(path): set(imported(path)) & MODULES for path in FILES}
    uses = {module: used - {module} for module, used in uses.items()}
    while free := {module for module, used in uses.items() if not used}:
        uses = {module: used - free for module, used in uses.items() if module not in free}
    assert not uses


@pytest.mark.parametrize("module", CORE)
def test_the_core_needs_jax_and_numpy_alone(module):
    code = f"import sys, rll_jax.{module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    heavy = {"flax", "optax", "orbax", "absl", "grain", "tensorflow", "tensorflow_datasets"}
    heavy |= {"PIL", "cv2", "tensorboardX", "sklearn"}
    assert "jax" in loaded.split() or module == "data.sampler"
    assert not heavy & set(loaded.split())


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not any("test_" in name for name in imported(path)), path


FUNCTIONS = [
    (path, node)
    for path in FILES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
]


def test_functions_fit_a_screen():
    """At most 60 lines, the docstring not counted."""

    def lines(node):
        docstring = (
            node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
        )
        return node.end_lineno - node.lineno + 1 - docstring

    assert not [f"{path}:{node.name}" for path, node in FUNCTIONS if lines(node) > 60]


def test_every_argument_is_annotated():
    def bare(node):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += filter(None, (node.args.vararg, node.args.kwarg))
        missing = [a for a in arguments if not a.annotation and a.arg not in ("self", "cls")]
        return missing or (node.returns is None and node.name != "__init__")

    assert not [f"{path}:{node.name}" for path, node in FUNCTIONS if bare(node)]


def test_ls_is_the_list_of_commands():
    """Commands alone stand at the top of experiments/, and the README there names each."""
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    text = (ROOT / "experiments/README.md").read_text()
    table = text.partition("| command |")[2].partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.count("|") > 2]
    assert {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)} == commands
    for name in commands:
        assert 'if __name__ == "__main__":' in (ROOT / f"experiments/{name}.py").read_text()


def test_rooms_are_imported_when_they_are_named():
    code = """
import sys
import rll_jax
assert "jax" not in sys.modules and {"loss", "metrics"} <= set(dir(rll_jax))
rll_jax.loss.ranked_list_loss, rll_jax.metrics.retrieval_metrics
assert "flax" not in sys.modules and "cv2" not in sys.modules
from rll_jax import losses_baseline, memory  # the names of earlier commits
assert losses_baseline.triplet_loss is rll_jax.loss.triplet_loss and memory is rll_jax.loss.memory
for room in rll_jax.__all__:
    module = getattr(rll_jax, room)
    assert all(getattr(module, name) is not None for name in getattr(module, "__all__", ()))
try:
    rll_jax.no_room
except AttributeError as error:
    assert "no attribute 'no_room'" in str(error)
else:
    raise AssertionError
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_every_room_names_its_public_api():
    for room in ("loss", "metrics", "networks", "data", "training"):
        names = next(
            ast.literal_eval(node.value)
            for node in ast.parse((ROOT / f"rll_jax/{room}/__init__.py").read_text()).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
        assert names == sorted(names) and len(names) > 2
        files = {path.stem for path in (ROOT / "rll_jax" / room).glob("[a-z]*.py")}
        assert room in ("loss", "metrics") or set(names) <= files


def test_what_docstrings_refer_to_is_there():
    """Full names in backticks, `rll_jax.room.module.name`, in docstrings and comments."""
    for path in FILES:
        for name in re.findall(r"`((?:rll_jax|experiments\.engine)(?:\.\w+)+)`", path.read_text()):
            module, attributes = name, []
            while module not in MODULES:
                module, _, attribute = module.rpartition(".")
                attributes.insert(0, attribute)
            found = importlib.import_module(module)
            for attribute in attributes:
                found = getattr(found, attribute, None) or found.__dataclass_fields__[attribute]
            assert found is not None, f"{path}: {name}"
