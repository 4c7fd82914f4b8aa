"""Where things lie and who may know whom."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import qtool

ROOT = Path(__file__).parents[1]
PACKAGES = ("calibration", "formats", "qtool")
TOP_LEVEL = {"pyproject.toml", "README.md", "Makefile", "benchmarks", "tests", *PACKAGES}
BUILT = {"build", "dist"}  # what the Makefile makes


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported_packages(path):
    """The top-level names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).split(".")[0])
    return names


def test_the_wheel_holds_exactly_the_three_packages():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel.keys() == {"packages"}  # nothing is forced in or taken out besides
    assert sorted(wheel["packages"]) == sorted(PACKAGES)
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file()


def test_the_top_level_is_as_designed():
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))} - BUILT
    assert {name for name in found if not name.endswith((".egg-info", ".qtm"))} <= TOP_LEVEL


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("formats", {"qtool", "calibration", "tests"}),
        ("calibration", {"qtool", "formats", "tests"}),
        ("qtool", {"tests"}),
    ],
)
def test_import_contract(package, forbidden):
    assert modules(package)
    for path in modules(package):
        assert not imported_packages(path) & forbidden, path


def test_the_contract_would_see_a_breach(tmp_path):
    path = tmp_path / "breach.py"
    path.write_text("def f():\n    if True:\n        from qtool.plan import x\n    import formats.reader as r\n")
    assert imported_packages(path) == {"qtool", "formats"}


def test_stages_do_not_know_the_command_line():
    """`cli -> api -> commands -> pipeline -> stage` is the only direction; what is printed, `commands` words."""
    cli = tuple(path.name for path in modules("qtool") if path.name.startswith("cli"))
    above = {
        "qtool.cli": (),
        "qtool.api": (*cli, "__init__.py"),
        "qtool.commands": (*cli, "api.py"),
        "qtool.finished": (*cli, "api.py"),
        "qtool.pipeline": ("commands.py", "estimate.py"),
    }
    for path in modules("qtool"):
        for module, allowed in above.items():
            own = f"qtool.{path.stem}" == module
            imports = re.search(rf"(from|import) {re.escape(module)}\b", path.read_text(encoding="utf-8"))
            from_package = re.search(
                rf"from qtool import .*\b{module.split('.')[1]}\b", path.read_text(encoding="utf-8")
            )
            assert own or path.name in allowed or not (imports or from_package), (path, module)


def test_every_dependency_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["gguf"], *extras["cuda"], *extras["cluster"], *extras["tasks"]]
    declared = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in requirements}
    through = {"pyarrow": "datasets", "lm_eval": "lm-eval"}  # pyarrow comes with datasets, whose reader it is
    for package in PACKAGES:
        for path in modules(package):
            for name in imported_packages(path) - sys.stdlib_module_names - set(PACKAGES) - {"__future__"}:
                assert through.get(name, name) in declared, (path, name)


def test_the_version_is_stated_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == qtool.__version__


def test_importing_a_stage_does_nothing():
    """No statement at the top of a module calls anything but what defines names.

    One does: `import qtool` is what makes transformers know its folders. It leaves transformers alone until then.
    """
    for package in PACKAGES:
        for path in modules(package):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                bare = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
                if bare and (path != ROOT / "qtool/__init__.py" or ast.unparse(node) != "register_when_imported()"):
                    raise AssertionError(f"{path}:{node.lineno}: runs at import")
