"""The arrows of the house: service -> model, service -> index, and no other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "model": {"model"},
    "index": {"index"},
    "service": {"model", "index", "service"},
}
# What a package must not know, whoever made it.
FOREIGN = {
    "model": {"fastapi", "starlette", "uvicorn", "httpx", "faiss", "sqlite3"},
    "index": {"fastapi", "starlette", "uvicorn", "httpx", "torch", "torchvision", "PIL", "av"},
    "service": {"faiss", "sqlite3"},
}


def imported(source: str) -> set[str]:
    """Top-level names of everything that a module imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where an arrow points"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_the_design_allows(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        names = imported(path.read_text(encoding="utf-8"))

        wrong = (names & ALLOWED.keys()) - ALLOWED[package] | names & FOREIGN[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_check_sees_an_import_inside_a_function() -> None:
    source = "def f():\n    from service.app import create_app\n    import faiss.contrib\n"

    assert imported(source) == {"service", "faiss"}


def test_no_package_binds_its_siblings_names_at_module_level() -> None:
    """`model = ...` in a module would hide the package of that name."""
    for package in ALLOWED:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                targets = node.targets if isinstance(node, ast.Assign) else []
                bound = {target.id for target in targets if isinstance(target, ast.Name)}
                assert not bound & ALLOWED.keys(), path
