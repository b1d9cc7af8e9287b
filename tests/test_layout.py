"""The folder tree is the design: who may import whom, what ships, what is public."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import moclip

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in (ROOT, ROOT / "store", ROOT / "pipeline")
    for path in (folder.glob("*.py") if folder == ROOT else folder.rglob("*.py"))
)
#: Each room, and the rooms below it that it may use. Errors and the version are everybody's.
ROOMS = {
    "moclip.store": set(),
    "moclip.pipeline.weights": set(),
    "moclip.pipeline.notebook": {"moclip.store"},
    "moclip.pipeline.analysis": {"moclip.store", "moclip.pipeline.notebook"},
    "moclip.pipeline.backbones": {"moclip.store", "moclip.pipeline.weights"},
    "moclip.pipeline.extract": {"moclip.store", "moclip.pipeline.backbones"},
    "moclip.pipeline.learn": {"moclip.store", "moclip.pipeline.backbones", "moclip.pipeline.weights"},
}
#: Heavy libraries, and the rooms that may know them.
LIBRARIES = {
    "av": {"moclip.pipeline.extract"},
    "dask": {"moclip.pipeline.analysis", "moclip.pipeline.extract.cluster"},
    "distributed": {"moclip.pipeline.extract.cluster", "moclip.pipeline.extract.schedule"},
    "fsspec": {"moclip.store.remote"},
    "h5py": {"moclip.store.containers.hdf5", "moclip.store.copies.single_file"},
    "tensorstore": {"moclip.store.containers.zarr_arrays"},
    "torch": {"moclip.pipeline"},
    "open_clip": {"moclip.pipeline.backbones"},
    "timm": {"moclip.pipeline"},
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("moclip", *parts)).removesuffix(".__init__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_rooms_reach_only_what_is_below_them(path):
    here = module_name(path)
    for name in imports(path):
        for room, below in ROOMS.items():
            if inside(here, room) and inside(name, "moclip"):
                allowed = {room, *below, "moclip.errors", "moclip.__version__"}
                assert any(inside(name, other) for other in allowed), f"{here} imports {name}"
        for library, rooms in LIBRARIES.items():
            if inside(name, library):
                assert any(inside(here, room) for room in rooms), f"{here} imports {name}"


def test_copies_and_checks_stand_on_the_rest_of_the_store():
    for path in (path for path in SOURCES if inside(module_name(path), "moclip.store")):
        here = module_name(path)
        above = {f"moclip.store.{room}" for room in ("copies", "checks")}
        if here != "moclip.store" and not any(inside(here, room) for room in above):
            assert not [name for name in imports(path) if any(inside(name, room) for room in above)], here


def test_every_folder_with_code_ships():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {module_name(path.parent / "__init__.py") for path in SOURCES}
    assert listed == there


def test_only_modules_of_the_package_lie_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py", "errors.py"}


def test_public_names():
    assert sorted(moclip.__all__) == ["MoclipError", "Store", "__version__", "open_store"]
    assert all(hasattr(moclip, name) for name in moclip.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = moclip.nonsense


@pytest.mark.parametrize("statement", ["import moclip", "import moclip.cli"])
def test_importing_is_cheap(statement):
    code = f"{statement}; import sys; print(sorted({{'torch', 'av', 'numpy', 'pyarrow'}} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_errors_are_few_and_builtin_too():
    from moclip import errors

    leaves = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.MoclipError)]
    leaves.remove(errors.MoclipError)
    assert len(leaves) <= 8
    for leaf in leaves:
        assert leaf.__mro__[2] is not Exception, f"{leaf.__name__} is no builtin error too"
        assert leaf.__name__ in errors.__doc__
