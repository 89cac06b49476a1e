"""The import rules of ARCHITECTURE.md, read from the source; nothing is imported here."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS, STORAGE, CORE = ROOT / "kernels/kvoffload_kernels", ROOT / "storage/kvoffload_storage", ROOT / "kvoffload"
OURS = ("kvoffload", "kvoffload_kernels", "kvoffload_storage")


def files(*folders):
    found = sorted(path for folder in folders for path in folder.rglob("*.py"))
    assert found, folders
    return found


def trees(*folders):
    return [(path, parsed(path)) for path in files(*folders)]


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def package_of(path):
    """Dotted name of the package that a file's relative imports start from."""
    root = next(parent for parent in (KERNELS.parent, STORAGE.parent, ROOT) if path.is_relative_to(parent))
    return ".".join(path.relative_to(root).with_suffix("").parts[:-1])


def imports(path, tree):
    """Every module that a file imports anywhere in it, in full; of ``from a import b`` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package_of(path).split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def offenders(folders, forbidden, allowed=()):
    """``file: module`` for every import that lies in a forbidden package and in no allowed one."""

    def inside(module, packages):
        return any(module == package or module.startswith(package + ".") for package in packages)

    return [
        f"{path.relative_to(ROOT)}: {module}"
        for path, tree in trees(*folders)
        for module in imports(path, tree)
        if inside(module, forbidden) and not inside(module, allowed)
    ]


def calls(tree, name):
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


@pytest.mark.parametrize(
    ("folders", "forbidden", "allowed"),
    [
        ([KERNELS], OURS, ["kvoffload_kernels"]),
        ([STORAGE], OURS, ["kvoffload_storage"]),
        ([CORE / "selection"], ["kvoffload_storage", "kvoffload.completion", "kvoffload.cache"], []),
        ([CORE / "completion"], ["kvoffload_storage", "kvoffload.selection", "kvoffload.cache"], []),
        ([CORE / "cache"], ["kvoffload.selection", "kvoffload.completion"], []),
        ([CORE / "selection", CORE / "completion", CORE / "cache"], ["kvoffload.attention", "kvoffload.models"], []),
        ([CORE / "selection", CORE / "completion", CORE / "cache"], ["kvoffload.runtime", "kvoffload.config"], []),
        ([CORE / "attention"], ["kvoffload.models", "kvoffload.runtime"], []),
        ([CORE / "policies"], ["kvoffload.models", "kvoffload.runtime", "kvoffload.config", "kvoffload_storage"], []),
        ([CORE / "selection", CORE / "completion", CORE / "cache"], ["kvoffload.policies"], []),
        ([CORE / "models"], ["kvoffload.runtime"], []),
        (
            [path for path in CORE.iterdir() if path.is_dir() and path.name not in ("server", "__pycache__")],
            ["kvoffload.server"],
            [],
        ),
        (
            [path for path in CORE.iterdir() if path.is_dir() and path.name not in ("bench", "__pycache__")],
            ["kvoffload.bench"],
            [],
        ),
    ],
    ids=lambda value: "+".join(getattr(v, "name", str(v)) for v in value) if isinstance(value, list | tuple) else None,
)
def test_layers_import_only_what_lies_below_them(folders, forbidden, allowed):
    assert offenders(folders, forbidden, allowed) == []


def test_only_the_models_know_transformers():
    others = [path for path in CORE.iterdir() if path.name != "models" and path.is_dir() and path.name != "__pycache__"]
    assert offenders([KERNELS, STORAGE, *others], ["transformers"]) == []
    assert not [p for p in CORE.glob("*.py") if "transformers" in {m.split(".")[0] for m in imports(p, parsed(p))}]


def test_only_the_storage_and_the_server_are_asynchronous():
    others = [path for path in CORE.iterdir() if path.is_dir() and path.name not in ("server", "__pycache__")]
    assert offenders([KERNELS, *others], ["asyncio", "aiofiles"]) == []
    assert offenders([CORE / "server"], ["aiofiles"]) == []
    assert not [p for p in CORE.glob("*.py") if {"asyncio", "aiofiles"} & {*imports(p, parsed(p))}]


def test_only_the_server_knows_http():
    packages = ["fastapi", "starlette", "uvicorn", "prometheus_client"]
    outside = [line for line in offenders([KERNELS, STORAGE, CORE], packages) if "kvoffload/server/" not in line]
    assert outside == []


def test_only_the_command_line_prints():
    printing = [str(path.relative_to(ROOT)) for path, tree in trees(KERNELS, STORAGE, CORE) if calls(tree, "print")]
    assert set(printing) <= {"kvoffload/cli.py"}


def test_nobody_asks_which_selector_or_completion_it_has():
    """isinstance names no class that selection/ or completion/ defines, except in that package itself."""
    wrong = []
    for package in ("selection", "completion"):
        names = {n.name for _, tree in trees(CORE / package) for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
        for path, tree in trees(CORE):
            if path.is_relative_to(CORE / package):
                continue
            for call in calls(tree, "isinstance") + calls(tree, "issubclass"):
                used = {n.id for n in ast.walk(call) if isinstance(n, ast.Name)}
                used |= {n.attr for n in ast.walk(call) if isinstance(n, ast.Attribute)}
                wrong += [f"{path.relative_to(ROOT)}:{call.lineno}: {name}" for name in sorted(used & names)]
    assert wrong == []


def test_the_decode_path_knows_no_kind():
    """No policy is told by its name either."""
    kinds = {
        node.value.value
        for package in ("selection", "completion")
        for _, tree in trees(CORE / package)
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "kind" and node.value is not None
    }
    assert {"quantized", "anchored", "none"} <= kinds
    for path, tree in trees(CORE / "attention", CORE / "cache"):
        compared = [
            n for node in ast.walk(tree) if isinstance(node, ast.Compare) for n in [node.left, *node.comparators]
        ]
        texts = {n.value for n in compared if isinstance(n, ast.Constant)} - {"none", "cpu"}  # pool and index say these
        assert not texts & kinds, path


def test_the_step_knows_no_policy():
    """Only the building of a layer sees policies, and nobody asks for their names."""
    seeing = {line.partition(":")[0] for line in offenders([CORE / "attention"], ["kvoffload.policies"])}
    assert seeing == {"kvoffload/attention/build.py"}
    kinds = {"prhs", "hshare", "tokenselect", "retro", "resa", "refresh"}
    for path, tree in trees(CORE / "attention", CORE / "cache", CORE / "models"):
        compared = [
            n for node in ast.walk(tree) if isinstance(node, ast.Compare) for n in [node.left, *node.comparators]
        ]
        assert not {n.value for n in compared if isinstance(n, ast.Constant)} & kinds, path


def test_no_file_is_long():
    long = {
        str(p.relative_to(ROOT)): n
        for p in files(KERNELS, STORAGE, CORE)
        if (n := len(p.read_text().splitlines())) > 350
    }
    assert long == {}


def test_the_source_roots_are_no_packages():
    assert not [
        name for name in ("kernels", "storage", "tests", "scripts", "configs") if (ROOT / name / "__init__.py").exists()
    ]
