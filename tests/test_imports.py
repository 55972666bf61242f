"""The rooms of docs/design.md hold: a module imports only from rows above its own.

The table under "## Rooms" is the rule itself. Its first column names modules in back-ticks
(`ranking.py`, `models.clip`); names that share a row do not import each other. `data/` or `data.*`
stands for every module of that package that has no row of its own, and those may.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "grape_jax"
# Rooms of arithmetic: arrays in, arrays out, no files, no flags, no tokenizers.
ARRAYS_ONLY = ("models", "ranking", "rewards", "grpo")
NOT_FOR_ARRAYS = {
    *("absl", "transformers", "tokenizers", "PIL", "safetensors", "gguf", "orbax", "grain"),
    *("tensorflow_datasets", "ml_collections", "io", "json", "os", "pathlib", "pickle", "shutil"),
}
FILE_CALLS = {"open", "load", "loadtxt", "save", "savez", "savetxt", "fromfile", "tofile", "memmap"}


def rows_of(design: str) -> dict[str, int]:
    """Module names, or "data.*", to the number of their row."""
    section = re.search(r"^## Rooms$(.*?)(?=^## |\Z)", design, re.M | re.S)
    assert section, "docs/design.md has no section '## Rooms'"
    rows: dict[str, int] = {}
    for line in section[1].splitlines():
        first = line.split("|")[1] if line.startswith("|") and line.count("|") > 1 else ""
        names = [_module_name(name) for name in re.findall(r"`([^`]+)`", first)]
        assert not rows.keys() & set(names), f"{names} has two rows"
        rows |= dict.fromkeys(names, len(rows))
    return rows


def _module_name(name: str) -> str:
    name = name.strip().removeprefix(f"{PACKAGE}/").removesuffix(".py").replace("/", ".")
    return f"{name}*" if name.endswith(".") else name


def imports_of(package: Path) -> dict[str, set[str]]:
    """Every module of a package, with the modules of the same package that it imports anywhere."""
    files = {_dotted(path.relative_to(package)): path for path in package.rglob("*.py")}
    found = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {_longest(imported, files) for imported in _imported(tree, path, package)}
        found[name] = inside - {None, name}
    # A package's own file counts where it does something.
    return {n: i for n, i in found.items() if i or files[n].name != "__init__.py"}


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _imported(tree: ast.AST, path: Path, package: Path) -> list[str]:
    """Dotted names inside the package; `from a import b` gives "a.b", module or not."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = path.parents[node.level - 1].relative_to(package.parent)
                base = ".".join([*folder.parts, *([base] if base else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    start = f"{package.name}."
    return [name.removeprefix(start) for name in names if name.startswith(start)]


def _longest(name: str, modules: dict) -> str | None:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def offences(rows: dict[str, int], imports: dict[str, set[str]]) -> list[str]:
    """One sentence for each import that points sideways or down, and each module without a row."""
    found = []
    for name in sorted(imports):
        row = _row(name, rows)
        if row is None:
            found.append(f"{name} has no row in docs/design.md")
            continue
        for other in sorted(imports[name]):
            its = _row(other, rows)
            family = its == row and _starred(name, rows) and _starred(other, rows)
            if its is not None and its >= row and not family:
                found.append(f"{name} imports {other}, which is not above it")
    return found


def _row(name: str, rows: dict[str, int]) -> int | None:
    return rows.get(name, rows.get(_star(name)))


def _star(name: str) -> str:
    return f"{name.rpartition('.')[0]}.*"


def _starred(name: str, rows: dict[str, int]) -> bool:
    return name not in rows and _star(name) in rows


def test_modules_import_only_from_rows_above():
    rows = rows_of((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
    imports = imports_of(ROOT / PACKAGE)
    assert imports["report"] >= {"results"}  # the parser sees what is there
    assert offences(rows, imports) == []


def test_every_row_names_something_that_exists():
    rows = rows_of((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
    for name in rows:
        path = ROOT / PACKAGE / name.removesuffix(".*").replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{name} does not exist"


def _arrays_only_files() -> list[Path]:
    files = [path for path in (ROOT / PACKAGE).rglob("*.py") if path.name != "__init__.py"]
    return [
        p for p in files if p.relative_to(ROOT / PACKAGE).with_suffix("").parts[0] in ARRAYS_ONLY
    ]


@pytest.mark.parametrize("path", _arrays_only_files(), ids=lambda p: p.stem)
def test_rooms_of_arithmetic_touch_no_files(path):
    assert file_talk(path.read_text(encoding="utf-8")) == set()


def file_talk(source: str) -> set[str]:
    """Imports and calls that have no place between arrays."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & NOT_FOR_ARRAYS
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(node.module or "").split(".")[0]} & NOT_FOR_ARRAYS
        elif isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            found |= {name} & FILE_CALLS
    return found


# The checks themselves, on a small house.

SAMPLE = """# Design

## Rooms

| room | what lives there |
|---|---|
| `low.py` | `high` in another column does not count |
| `left`, `right` | one row |
| `data.base` | |
| `data/` | |
| `high` | |

## After

| `after` | not a room |
"""


def _house(folder: Path, **sources: str) -> dict[str, set[str]]:
    for name, source in sources.items():
        path = folder / PACKAGE / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return imports_of(folder / PACKAGE)


def test_the_table_is_read_in_order():
    rows = rows_of(SAMPLE)
    assert list(rows) == ["low", "left", "right", "data.base", "data.*", "high"]
    assert rows["left"] == rows["right"] < rows["data.base"] < rows["data.*"] < rows["high"]
    assert rows["low"] < rows["left"]


@pytest.mark.parametrize(
    "sources, wanted",
    [
        ({"low": "", "high": "from grape_jax import low\nimport numpy"}, []),
        ({"high": "", "low": "import grape_jax.high"}, ["low imports high, which is not above it"]),
        (
            {"high": "", "low": "def f():\n    from grape_jax.high import g"},
            ["low imports high, which is not above it"],
        ),
        ({"high": "", "low": "from . import high"}, ["low imports high, which is not above it"]),
        (
            {"left": "", "right": "from grape_jax.left import f"},
            ["right imports left, which is not above it"],
        ),
        (
            {
                "data__base": "",
                "data__one": "",
                "data__two": "from grape_jax.data import base, one",
            },
            [],
        ),
        (
            {"data__one": "", "data__base": "from ..data.one import f"},
            ["data.base imports data.one, which is not above it"],
        ),
        ({"low": "", "stranger": ""}, ["stranger has no row in docs/design.md"]),
    ],
)
def test_offences_are_found(tmp_path, sources, wanted):
    assert offences(rows_of(SAMPLE), _house(tmp_path, **sources)) == wanted


def test_file_talk_is_found():
    assert file_talk("import numpy as np\nimport jax.numpy as jnp\njnp.sum(np.ones(3))") == set()
    source = "import os.path\nfrom absl import flags\nimport numpy as np\nnp.load('x')"
    assert file_talk(source) == {"os", "absl", "load"}
