"""The rules of the house: what lies where, and which room may know of which."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import stage_interactor

PACKAGE = Path(stage_interactor.__file__).parent
# From the top down: a room may import those of lower rows, and of its own row in one direction.
ROWS = (
    ("commands",),
    ("engine", "inference", "pages"),
    ("data",),
    ("modeling",),
    ("config",),
    ("d2", "ops"),
    ("untrusted",),
    ("locking",),
    ("errors", "writing"),
)
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted names below the package, folders by their own."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


def imports(name: str, path: Path, *, lazy: bool) -> set[str]:
    """What a module imports of the package; with ``lazy`` also inside functions."""
    tree = ast.parse(path.read_text())
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    nodes = ast.walk(tree) if lazy else tree.body
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base += (node.module or "").split(".") if node.module else []
            for alias in node.names:
                found.add(".".join([*base, alias.name]))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            own = [n for n in names if n and n.split(".")[0] == "stage_interactor"]
            assert not own, f"{path} imports {own}: imports inside the package are relative"
    known = modules()
    resolved = set()
    for target in found:
        while target and target not in known:
            target = target.rpartition(".")[0]
        resolved.add(target)
    return resolved - {name}


def room(name: str) -> str:
    return name.split(".")[0]


# Modules that every room may use.
LOOSE = {"config", "errors", "locking", "writing"}


def test_no_file_of_the_package_lies_loose():
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "py.typed", *(f"{name}.py" for name in LOOSE)}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders - {"configs"} == set(ROW) - LOOSE


def test_no_room_imports_one_above_it():
    for name, path in modules().items():
        if not name:
            continue  # what the package offers is imported when it is asked for
        for target in imports(name, path, lazy=True):
            if target:
                assert ROW[room(target)] >= ROW[room(name)], f"{name} imports {target}"


@pytest.mark.parametrize("what", ["rooms", "folders", "modules"])
def test_nothing_is_imported_in_a_circle(what):
    known = modules()

    def place(name: str) -> str:
        if what == "modules":
            return name
        if what == "rooms":
            return room(name)
        return name if known[name].name == "__init__.py" else name.rpartition(".")[0] or name

    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        # A package's own __init__ gathers its modules, which may import one another by file.
        if not name or (what != "rooms" and path.name == "__init__.py"):
            continue
        targets = imports(name, path, lazy=what != "modules")
        targets = {t for t in targets if t and (what == "rooms" or known[t].name != "__init__.py")}
        graph.setdefault(place(name), set()).update(
            place(target) for target in targets if place(target) != place(name)
        )
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


@pytest.mark.parametrize(
    ("package", "allowed"), [("argparse", "commands"), ("detectron2", "d2"), ("detrex", "")]
)
def test_a_package_is_imported_in_its_room_alone(package, allowed):
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            if any(found.split(".")[0] == package for found in names):
                assert room(name) == allowed, f"{path} imports {package}"


def loaded_after(statement: str) -> set[str]:
    # Names of before stand in sys.modules without being loaded.
    ours = "(m for m in sys.modules if 'stage_inter' in m and sys.modules[m].__spec__)"
    code = f"import sys; {statement}; print(*{ours})"
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {name.removeprefix("stage_interactor.") for name in done.stdout.split()}


def test_using_a_detector_imports_neither_exporter_nor_engine_nor_video():
    loaded = loaded_after("from stage_interactor import Detector")
    assert "inference.exported" in loaded  # reading is no part of writing
    assert not loaded & {"inference.export", "inference.predict", "inference.sources"}
    assert not any(room(name) in ("engine", "commands") for name in loaded)


def test_preparing_a_model_takes_the_model_alone():
    loaded = loaded_after("from stage_interactor.inference import prepare_for_inference")
    assert "inference.prepare" in loaded
    assert not any(room(name) in ("config", "data", "engine", "pages") for name in loaded)


OLD_NAMES = (
    "from stage_interactor import Detector",
    "from stage_interactor.predictor import Detector, Detections",
    "from stage_interactor.visualization import draw_boxes, save_detection_grid",
    "from stage_interactor.report import write_report",
    "from stage_interactor.stages import trace_stages, trace_labels",
    "from stage_interactor.export import export_program, save_onnx",
    "from stage_interactor.inference import prepare_for_inference",
    "from stage_interactor.data.quality import check_folder",
    "from stage_interactor.data.folders import read_folder, write_coco",
    "from stage_interactor.data.shapes import generate_shapes, load_shapes",
    "from stage_interactor.cli import main",
    "from stage_interactor.engine import read_checkpoint, CheckpointError, load_weights",
    "from stage_interactor.engine import warmup_cosine, save_atomically, Trainer, SERVICES",
    "from stage_interactor.modeling.decoder import DecoderStage, Decoder, build_decoder",
    "from stage_interactor.d2.config import LazyCall, LazyConfig, instantiate",
    "import stage_interactor.predictor as p; p.Detector",
    "import stage_interactor.predictor; stage_interactor.predictor.Detector",
)


@pytest.mark.parametrize("statement", OLD_NAMES)
def test_names_of_the_version_before_are_found(statement):
    exec(statement, {})


def test_what_is_not_there_is_not_found():
    with pytest.raises(ImportError):
        exec("from stage_interactor.predictor import Nonsense", {})
    with pytest.raises(ImportError):
        exec("from stage_interactor import nonsense", {})
    with pytest.warns(DeprecationWarning, match="is stage_interactor.inference.detector now"):
        exec("from stage_interactor.predictor import Detector", {})
