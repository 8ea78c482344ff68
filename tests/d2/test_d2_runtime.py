"""The choice between detectron2 and its stand-in, made once and never silently."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stage_interactor import d2

PROJECTS = str(Path(d2.__file__).parents[2])

# d2 module -> (detectron2 module, its names); what is elsewhere is listed by its own module
EXPORTS = {
    "config": {"detectron2.config": "LazyCall LazyConfig instantiate"},
    "structures": {"detectron2.structures": "Boxes BoxMode Instances ImageList"},
    "data": {
        "detectron2.data": "DatasetCatalog MetadataCatalog build_detection_train_loader "
        "build_detection_test_loader get_detection_dataset_dicts detection_utils",
        "detectron2.data.datasets": "register_coco_instances",
    },
    "transforms": {
        "detectron2.data.transforms": "Augmentation AugInput AugmentationList RandomFlip RandomCrop"
        " ResizeShortestEdge ResizeTransform TransformList"
    },
    "engine": {"detectron2.engine": "HookBase SimpleTrainer hooks default_setup create_ddp_model"},
    "evaluation": {
        "detectron2.evaluation": "DatasetEvaluator COCOEvaluator inference_on_dataset "
        "print_csv_format",
    },
    "checkpoint": {"detectron2.checkpoint": "DetectionCheckpointer"},
    "solver": {
        "detectron2.solver": "LRMultiplier WarmupParamScheduler get_default_optimizer_params"
    },
    "events": {"detectron2.utils.events": "EventStorage get_event_storage EventWriter"},
    "comm": {
        "detectron2.utils.comm": "get_world_size get_rank get_local_rank is_main_process "
        "all_gather create_local_process_group synchronize"
    },
    "logger": {"detectron2.utils.logger": "setup_logger"},
}


def run_python(code, *, runtime=None, path=()):
    environment = {k: v for k, v in os.environ.items() if k != "STAGE_INTERACTOR_RUNTIME"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), PROJECTS])
    if runtime is not None:
        environment["STAGE_INTERACTOR_RUNTIME"] = runtime
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def fake_detectron2(folder, content):
    package = folder / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text(content)
    return folder


SHOW = "from stage_interactor import d2; print(d2.RUNTIME); print(d2.describe_runtime())"


@pytest.mark.parametrize("module", EXPORTS)
def test_every_module_exports_exactly_its_names(module):
    facade = importlib.import_module(f"stage_interactor.d2.{module}")
    exported = {name for name in vars(facade) if not name.startswith("_")}
    names = " ".join(EXPORTS[module].values()).split()
    # Ours are subclasses of COCO's, and are there with either runtime.
    exported -= {"LVISEvaluator", "PascalVOCDetectionEvaluator"}
    names += ["forget_groups"] if module == "comm" else []  # which detectron2 has not
    assert exported - {"RUNTIME", "TYPE_CHECKING"} == set(names)
    stand_in = importlib.import_module(f"stage_interactor.d2.embedded.{module}")
    assert sorted(stand_in.__all__) == sorted(names)


def test_every_module_is_covered_here():
    modules = {path.stem for path in Path(d2.__file__).parent.glob("*.py")}
    assert modules - {"__init__", "detections", "metrics", "resizing", "screening"} == set(EXPORTS)


def test_with_detectron2_the_stand_in_is_not_imported(tmp_path):
    fake = fake_detectron2(tmp_path, "__version__ = '9.9'")
    (fake / "detectron2" / "checkpoint.py").write_text("class DetectionCheckpointer: pass")
    show = "import sys; from stage_interactor.d2.checkpoint import DetectionCheckpointer as c; "
    show += "print(c.__module__, 'stage_interactor.d2.embedded' in sys.modules)"
    assert run_python(show, path=[fake]).stdout == "detectron2.checkpoint False\n"


@pytest.mark.skipif(d2.RUNTIME != "detectron2", reason="the runtime of this process is embedded")
@pytest.mark.parametrize("module", EXPORTS)
def test_with_detectron2_every_name_is_its_own_object(module):
    ours = importlib.import_module(f"stage_interactor.d2.{module}")
    for origin, names in EXPORTS[module].items():
        theirs = importlib.import_module(origin)
        for name in names.split():
            found = getattr(ours, name)
            # They screen what detectron2's evaluator is given, and leave a pixel of an image.
            if name in ("COCOEvaluator", "AugmentationList"):
                (found, *_) = found.__bases__
            assert found is getattr(theirs, name), name


def test_the_stand_in_needs_neither_detectron2_nor_its_other_dependencies():
    names = ", ".join(f"stage_interactor.d2.{module}" for module in EXPORTS)
    block = "import sys; sys.modules.update(dict.fromkeys(('detectron2', 'cv2', 'cloudpickle', "
    block += "'black', 'matplotlib'))); "
    result = run_python(f"{block}import {names}; print('imported')", runtime="embedded")
    assert result.stdout == "imported\n", result.stderr


def test_the_environment_variable_overrides_an_installed_detectron2(tmp_path):
    fake = fake_detectron2(tmp_path, "__version__ = '9.9'")
    assert run_python(SHOW, path=[fake]).stdout.startswith("detectron2\nRuntime: detectron2 9.9")
    shown = run_python(SHOW, path=[fake], runtime="embedded").stdout
    assert shown.startswith("embedded\n")
    assert "set by STAGE_INTERACTOR_RUNTIME" in shown


def test_an_unknown_runtime_is_refused_by_name():
    result = run_python(SHOW, runtime="mmdet")
    assert result.returncode != 0
    assert "ValueError" in result.stderr and "'mmdet'" in result.stderr


def test_a_missing_detectron2_that_was_asked_for_is_an_error_with_advice():
    hide = "import sys; sys.meta_path.insert(0, type('Hide', (), {'find_spec': staticmethod("
    hide += "lambda name, *rest: None)})); import importlib.util as util; find = util.find_spec; "
    hide += "util.find_spec = lambda name: None if name == 'detectron2' else find(name); "
    result = run_python(hide + SHOW, runtime="detectron2")
    assert result.returncode != 0
    assert "ImportError" in result.stderr and "pip install --no-build-isolation" in result.stderr
    assert run_python(hide + SHOW).stdout.startswith("embedded\n")


@pytest.mark.parametrize("failure", ["raise RuntimeError('no libcudart')", "import no_such_module"])
def test_a_broken_detectron2_is_an_error_and_no_silent_switch(tmp_path, failure):
    result = run_python(SHOW, path=[fake_detectron2(tmp_path, failure)])
    assert result.returncode != 0
    assert "detectron2 is installed at" in result.stderr and "cannot be imported" in result.stderr
    assert "embedded" not in result.stdout


def test_a_detectron2_that_breaks_in_a_submodule_is_an_error(tmp_path):
    fake = fake_detectron2(tmp_path, "__version__ = '9.9'")
    (fake / "detectron2" / "config.py").write_text("raise OSError('undefined symbol')")
    result = run_python("import stage_interactor.d2.config", path=[fake])
    assert result.returncode != 0 and "undefined symbol" in result.stderr


def test_a_mere_folder_of_that_name_is_no_installation(tmp_path):
    (tmp_path / "detectron2" / "configs").mkdir(parents=True)
    hide = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; "
    assert run_python(hide + SHOW, path=[tmp_path]).stdout.startswith("embedded\n")
