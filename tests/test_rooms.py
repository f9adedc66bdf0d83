"""The rooms of the package: nothing imports what is above it, and nothing what imports it."""

import ast
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import nemo_prune

PACKAGE = Path(nemo_prune.__file__).parent
# From the bottom to the top; a room imports rooms below it, and its own modules.
RANK = (
    "errors", "files", "facts", "mask", "progress", "settings", "hub", "corpus", "checkpoint", "engine", "models",
    "proof", "compute", "stages", "screening", "release", "publish", "run", "verify", "cli",
)  # fmt: skip


def imports_of(package):
    """Module -> the modules of the package that it imports, wherever in it; names without the package's own."""
    modules = {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }
    modules.pop("__init__")
    found = {}
    for module, path in modules.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module} imports by a relative name"
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{package.name}."):
                where = node.module.removeprefix(package.name).removeprefix(".")
                names = (f"{where}.{alias.name}".removeprefix(".") for alias in node.names)
                found[module] |= {name if name in modules else where for name in names} - {"", module}
            elif isinstance(node, ast.Import):
                own = [alias.name for alias in node.names if alias.name.startswith(f"{package.name}.")]
                found[module] |= {name.removeprefix(f"{package.name}.") for name in own}
    return found


def room(module):
    return module.split(".")[0]


def arrows_upwards(imports):
    return {
        (module, other)
        for module, others in imports.items()
        for other in others
        if RANK.index(room(other)) > RANK.index(room(module))
    }


def circle(imports):
    """Modules that import each other in a circle; none without one."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_module_is_in_a_room_that_has_its_place():
    assert {room(module) for module in imports_of(PACKAGE)} == set(RANK)


def test_no_arrow_points_upwards():
    assert not arrows_upwards(imports_of(PACKAGE))


def test_no_modules_import_each_other_in_a_circle():
    assert not circle(imports_of(PACKAGE))


def test_the_package_itself_imports_no_room():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [alias.name for node in imported for alias in node.names] == ["lazy_loader"]


def test_an_arrow_upwards_and_a_circle_are_found(tmp_path):
    package = tmp_path / "house"
    contents = {
        "__init__.py": "", "errors.py": "", "cli/__init__.py": "from house.cli import one",
        "cli/one.py": "from house import errors\nfrom house.cli.two import x", "cli/two.py": "import house.errors",
    }  # fmt: skip
    for name, content in contents.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(content)
    imports = imports_of(package)
    assert imports == {"errors": set(), "cli": {"cli.one"}, "cli.one": {"errors", "cli.two"}, "cli.two": {"errors"}}
    assert not arrows_upwards(imports) and not circle(imports)
    (package / "cli" / "two.py").write_text("def late():\n    from house.cli.one import y")
    (package / "errors.py").write_text("from house.cli.two import z")
    imports = imports_of(package)
    assert arrows_upwards(imports) == {("errors", "cli.two")}
    around = circle(imports)
    assert around and all(first in imports[second] for first, second in pairwise(around))
