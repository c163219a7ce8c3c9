"""What the house promises: floors, public names, an honest wheel, and imports without side effects."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "patching"

# Floor of every room, bottom first. A room may import its own floor and those below.
FLOORS = [
    {"errors", "typed", "parquet"},
    {"sites", "grid", "metrics", "interventions"},
    {"models", "dataset", "tasks", "tiny",
     "prompt", "checks", "prompt_pairs", "table", "rows", "subset", "validation_report"},
    {"engine", "pairs", "identity", "finite", "gradients", "edges", "ask", "run", "units", "worker",
     "submitit", "distributed"},
    {"results", "statistics", "store", "compiled", "validation", "collect",
     "joint", "tracing", "mediation", "edge_results", "long", "circuits",
     "screen", "screen_result", "compare"},
    {"patcher", "latent"},
    {"plot", "report", "experiment", "cli"},
]  # fmt: skip
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Imports that run upward: only inside a function, and only these. (file, imported room): the reason.
UPWARD = {
    ("results.py", "plot"): "importing results must not need matplotlib",
    ("results.py", "report"): "importing results must not need plotly",
    ("latent/sweep.py", "plot"): "steering must not need matplotlib",
    ("latent/scores.py", "plot"): "probing must not need matplotlib",
    ("dataset.py", "validation"): "dataset.validate(model) runs a model, which datasets themselves never do",
}

PUBLIC = [
    "ActivationCache",
    "ActivationPatcher",
    "IOIDataset",
    "PatchingDataset",
    "PatchingError",
    "PatchingResult",
    "PromptPair",
    "PromptPairDataset",
    "Site",
    "SweepResult",
    "create_patching_heatmap",
    "load_model",
    "summarize_results",
]


def sources() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room a file belongs to: its folder under patching/, or its own name."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path, source: str) -> Iterator[tuple[str, bool]]:
    """Every module a file imports, absolute, and whether the import is inside a function."""
    package = ("patching", *path.relative_to(PACKAGE).parts[:-1])

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from patching import sites` names a room only with its last part
            yield from ((f"{module}.{alias.name}", inside) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(source), False)


def upward_imports(path: Path, source: str) -> list[str]:
    """The imports of a file that run upward without being listed in UPWARD."""
    floor = FLOOR_OF[room_of(path)]
    name = path.relative_to(PACKAGE).as_posix()
    found = []
    for module, inside in imports(path, source):
        if not (module + ".").startswith("patching."):
            continue
        room = (module + ".").split(".")[1]
        if room not in FLOOR_OF:
            found.append(f"{name} imports {module}: not a room in FLOORS")
        elif FLOOR_OF[room] > floor and not (inside and (name, room) in UPWARD):
            found.append(f"{name} (floor {floor}) imports {room} (floor {FLOOR_OF[room]})")
    return found


def python(code: str, *, cwd: Path = ROOT, path: str | None = None) -> str:
    """What a fresh interpreter prints when it runs ``code`` with ``cwd`` first on its path."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    if path is not None:
        env["PYTHONPATH"] = path
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


# Floors


def test_every_module_has_a_floor() -> None:
    homeless = {room_of(path) for path in sources()} - FLOOR_OF.keys() - {"__init__", "__main__"}
    assert not homeless, f"give these a floor in FLOORS: {sorted(homeless)}"


def test_imports_run_downward() -> None:
    found = []
    for path in sources():
        if room_of(path) in FLOOR_OF:
            found += upward_imports(path, path.read_text("utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from patching.patcher import ActivationPatcher",
        "import patching.patcher",
        "from patching import patcher",
        "from patching import ActivationPatcher",
        "import patching",
        "def later():\n    from patching.plot import heatmap",
        "from .plot import heatmap",
        "from . import plot",
    ],
)
def test_an_upward_import_would_be_seen(source: str) -> None:
    assert upward_imports(PACKAGE / "metrics.py", source)


def test_an_exception_holds_only_inside_a_function() -> None:
    source = "from patching.plot import heatmap"
    assert upward_imports(PACKAGE / "results.py", source)
    assert not upward_imports(PACKAGE / "results.py", f"def plot():\n    {source}")


@pytest.mark.parametrize(("name", "room"), UPWARD)
def test_every_exception_is_still_needed(name: str, room: str) -> None:
    path = PACKAGE / name
    used = {(module + "..").split(".")[1] for module, _ in imports(path, path.read_text("utf-8"))}
    assert room in used, f"drop ({name}, {room}) from UPWARD"


# Names


def test_public_names_are_the_documented_ones() -> None:
    import patching

    assert list(patching.__all__) == sorted(patching.__all__)
    assert list(patching.__all__) == PUBLIC
    missing = [name for name in PUBLIC if not hasattr(patching, name)]
    assert not missing


def test_the_version_has_one_place() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert importlib.metadata.version("patching") == declared
    literal = re.compile(r"__version__\s*=\s*[\"']")
    literals = [path.name for path in sources() if literal.search(path.read_text("utf-8"))]
    assert not literals, f"ask importlib.metadata.version('patching') instead: {literals}"


# What the package leans on


def test_every_import_is_a_declared_dependency() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    names = {re.split(r"[^A-Za-z0-9_]", line)[0] for line in declared}
    undeclared = set()
    for path in sources():
        for module, inside in imports(path, path.read_text("utf-8")):
            top = module.split(".")[0]
            # an import inside a function may be of an extra; at the top of a file it may not
            if not inside and top not in names | sys.stdlib_module_names | {"patching"}:
                undeclared.add(f"{path.name}: {top}")
    assert not undeclared


def test_every_dependency_has_its_reason() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    without = [line for line in declared if f"| `{re.split(r'[<>=]', line)[0]}` |" not in page]
    assert not without


def test_the_two_tested_sets_differ_in_transformer_lens_only() -> None:
    pins = [
        {line for line in (ROOT / name).read_text("utf-8").splitlines() if not line.startswith("#")}
        for name in ("constraints.txt", "constraints-tl4.txt")
    ]
    assert pins[0] - pins[1] == {"transformer-lens==3.9.0"}
    assert pins[1] - pins[0] == {"transformer-lens==4.3.0"}


def runs_files(source: str) -> list[str]:
    """Ways in which loading could run what it reads: pickle, torch.load, and code from the model hub."""
    risky = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in risky]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in risky:
            found.append(str(node.module))
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += ["torch.load" for a in node.names if a.name == "load"]
        elif isinstance(node, ast.Attribute) and node.attr == "load":
            found += ["torch.load"] if getattr(node.value, "id", "") == "torch" else []
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += ["allow_pickle"] if getattr(node.value, "value", True) else []
        elif "trust_remote_code" in (getattr(node, "arg", None), getattr(node, "value", None)):
            found.append("trust_remote_code")
    return found


def test_nothing_that_is_read_is_ever_run() -> None:
    found = {path.name: runs_files(path.read_text("utf-8")) for path in sources()}
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "np.load('x', allow_pickle=True)",
        "from_pretrained('x', trust_remote_code=True)",
        "from_pretrained('x', **{'trust_remote_code': True})",
    ],
)
def test_what_could_run_it_would_be_seen(source: str) -> None:
    assert runs_files(source)


# Import has no side effects

IMPORTED = "import sys; from patching import *; {more}print([m for m in sys.modules if m == 'matplotlib'])"


def test_import_does_not_import_matplotlib() -> None:
    assert python(IMPORTED.format(more="")) == "[]"


def test_an_import_of_matplotlib_would_be_seen() -> None:
    assert "matplotlib" in python(IMPORTED.format(more="import matplotlib; "))


WAITED_FOR = "import sys; import patching; {more}print([m for m in ('torch', 'numpy') if m in sys.modules])"


def test_the_package_itself_waits_for_nothing() -> None:
    assert python(WAITED_FOR.format(more="")) == "[]"
    assert python(WAITED_FOR.format(more="patching.Site; ")) == "[]"


def test_a_wait_would_be_seen() -> None:
    assert python(WAITED_FOR.format(more="patching.PromptPair; ")) == "['torch', 'numpy']"


def test_rooms_are_attributes_and_other_names_are_not() -> None:
    import patching

    assert patching.compiled.ioi().name == "IOI-3L"
    with pytest.raises(AttributeError, match="no attribute 'ActivationPatchers'"):
        _ = patching.ActivationPatchers


# Hugging Face's `datasets` and ours

THEIRS = "import datasets; datasets.Dataset; print(datasets.__file__)"


@pytest.mark.parametrize("folder", ["datasets", "experiments"])
def test_folders_of_data_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), "it would hide another package"


def test_hugging_face_datasets_is_seen_from_the_root() -> None:
    assert ROOT / "datasets" not in Path(python(THEIRS)).parents


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as pip would install it, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"patching"}
    assert not [name for name in names if name.endswith((".pyc", ".pkl", ".pt", ".pth"))]


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    expected = {p.relative_to(ROOT).as_posix() for p in files}
    expected |= {f"patching/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "datasets").rglob("*.*")}
    assert expected - names == set()
    kinds = {Path(name).suffix for name in names if not Path(name).match("*.dist-info/*")}
    assert {".toml", ".safetensors"} <= kinds, f"tasks and weights belong in the wheel; it has {kinds}"


def test_the_installed_wheel_hides_nothing_and_finds_its_tasks(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    assert str(tmp_path) not in python(THEIRS, cwd=tmp_path, path=str(site))
    found = python(
        "import patching; print(patching.__file__)\n"
        "model = patching.load_model('tiny')\n"
        "print(len(patching.PatchingDataset.load('ioi', model)))",
        cwd=tmp_path,
        path=str(site),
    ).splitlines()
    assert Path(found[0]).is_relative_to(site), "the wheel was tested, not the source tree"
    assert int(found[-1]) > 0
