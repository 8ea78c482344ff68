"""What an evaluation is made of: detections that are any, the right weights, the right classes."""

import json
import math
from pathlib import Path

import pytest
import torch

import stage_interactor
from stage_interactor.config import instantiate, load_config
from stage_interactor.d2.config import LazyCall as L
from stage_interactor.d2.data import DatasetCatalog, MetadataCatalog
from stage_interactor.d2.detections import UnusableDetectionsError
from stage_interactor.d2.evaluation import DatasetEvaluator
from stage_interactor.data import class_names, load_coco_dataset
from stage_interactor.engine import CheckpointError
from stage_interactor.engine.process import do_test
from stage_interactor.engine.training import Run
from stage_interactor.engine.writers import finite_or_null
from stage_interactor.inference.blueprint import Blueprint

CONFIG = "tests/tiny_config.py"
NAMES = ["ellipse", "rectangle", "triangle", "cross", "ring"]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


@pytest.fixture
def small(shapes, tmp_path):
    return [f"shapes.root={shapes}", "train.device=cpu", f"train.output_dir={tmp_path}",
            "train.max_iter=1", "train.amp.enabled=false"]  # fmt: skip


@pytest.fixture
def cfg(small):
    return load_config(CONFIG, small)


@pytest.fixture
def model(cfg):
    torch.manual_seed(0)
    return instantiate(cfg.model).eval()


def poison(model, *, query, value=math.nan):
    """Makes a query's logits, and those of its box, what a model that overflows gives."""
    decode = model.decode

    def poisoned(images, sizes):
        outputs = decode(images, sizes)
        last = outputs[-1]
        logits, boxes = last.logits.clone(), last.boxes.clone()
        logits[0, query], boxes[0, query, 2] = value, value  # of the first image of a batch
        return [*outputs[:-1], last._replace(logits=logits, boxes=boxes)]

    model.decode = poisoned


class Own(DatasetEvaluator):
    """Counts the detections that it is given; knows nothing of a data set."""

    def reset(self):
        self.scores = []

    def process(self, inputs, outputs):
        self.scores += [output["instances"].scores for output in outputs]

    def evaluate(self):
        scores = torch.cat(self.scores)
        return {"own": {"count": len(scores), "finite": int(scores.isfinite().sum())}}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("own", [False, True])
def test_unusable_detections_fail_whatever_evaluates(cfg, model, own, value):
    if own:
        cfg.dataloader.evaluator = L(Own)()
    poison(model, query=3, value=value)
    # Two batches of four images; five classes of a query in the first of each.
    with pytest.raises(UnusableDetectionsError, match=r"10 detections in 2 pictures.*\.jpg \(5\)"):
        do_test(cfg, model)
    assert not (Path(cfg.train.output_dir) / "results.json").exists()
    cfg.train.unusable_detections = "warning"
    results = do_test(cfg, model)
    if own:
        # 8 an image, as ever: what does not count takes no room.
        assert results == {"own": {"count": 64, "finite": 64}}
    else:
        text = (Path(cfg.train.output_dir) / "coco_instances_results.json").read_text()
        assert len(json.loads(text)) == 64 and "NaN" not in text and "Infinity" not in text


def test_what_cannot_be_computed_is_null_in_the_file_and_none_in_python(cfg, model):
    results = do_test(cfg, model)["bbox"]
    nowhere = [name for name, value in results.items() if math.isnan(value)]
    assert "APl" in nowhere and "AP" not in nowhere  # there are no large objects
    path = Path(cfg.train.output_dir) / "results.json"
    content = json.loads(path.read_text(), parse_constant=pytest.fail)["bbox"]
    assert [name for name, value in content.items() if value is None] == nowhere
    assert content | dict.fromkeys(nowhere) == results | dict.fromkeys(nowhere)
    assert Run.in_folder(cfg.train.output_dir).metrics["bbox"] == content
    path.write_text('{"bbox": {"AP": 1.5, "APl": NaN}}')  # as earlier versions wrote
    assert Run.in_folder(cfg.train.output_dir).metrics == {"bbox": {"AP": 1.5, "APl": None}}


def test_nothing_that_is_no_json_comes_into_a_file():
    values = {"a": math.nan, "b": {"c": -math.inf, "d": {"e": math.inf}}, "f": 1.5, "g": None}
    expected = {"a": None, "b": {"c": None, "d": {"e": None}}, "f": 1.5, "g": None}
    assert finite_or_null(values) == expected and finite_or_null({}) == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_prepared_model_that_overflows_fails(cfg, model, dtype):
    cfg.train.inference.dtype = dtype
    with torch.no_grad():  # features beyond 65504, or beyond all
        model.neck.convs[0].weight.fill_(1e6 if dtype == "float16" else 1e38)
        model.neck.convs[0].bias.fill_(1e6 if dtype == "float16" else 3e38)
    with pytest.raises(UnusableDetectionsError, match="in 8 pictures"):
        do_test(cfg, model)


def checkpoint(cfg, path, names=NAMES, **parts):
    """A checkpoint whose averages score higher than its trained weights."""
    torch.manual_seed(0)
    state = instantiate(cfg.model).state_dict()
    blueprint = Blueprint.of_run(cfg, [{"id": i, "name": name} for i, name in enumerate(names)])
    content = {"model": state} | (blueprint.as_extra() if names else {})
    averages = {f"module.{key}": value.clone() for key, value in state.items()}
    for key in averages:
        if "cls_out.bias" in key:
            averages[key] += 3
    torch.save(content | {"ema": averages} | parts, path)
    return str(path)


def evaluate(small, path, *overrides):
    return stage_interactor.train(CONFIG, [*small, *overrides], checkpoint=path, eval_only=True)


def highest(small):
    folder = next(item for item in small if "output_dir" in item).partition("=")[2]
    results = json.loads((Path(folder) / "coco_instances_results.json").read_text())
    return max(item["score"] for item in results)


KEY = "train.model_ema.use_ema_weights_for_eval_only"


def test_averages_are_evaluated_where_there_are_any_and_the_log_says_which(cfg, small, tmp_path):
    path = checkpoint(cfg, tmp_path / "both.pth")
    scores = {}
    for value, told in (
        ("null", f"the averaged weights of {path}"),
        ("true", f"the averaged weights of {path}"),
        ("false", f"the trained weights, not their averages, of {path}"),
    ):
        evaluate(small, path, f"{KEY}={value}")
        scores[value] = highest(small)
        log = (tmp_path / "log.txt").read_text()
        assert told in log[log.rindex("Loading the ") :]
    assert scores["null"] == scores["true"] > 2 * scores["false"]
    path = checkpoint(cfg, tmp_path / "one.pth", ema={})
    evaluate(small, path)
    assert highest(small) == scores["false"]
    with pytest.raises(CheckpointError, match=f"one.pth holds no averaged weights.*{KEY}=null"):
        evaluate(small, path, f"{KEY}=true")


def test_fine_tuning_starts_from_the_averages_unless_it_is_asked_not_to(cfg, small, tmp_path):
    path = checkpoint(cfg, tmp_path / "both.pth")
    key = "decoder.stages.2.head.cls_out.bias"
    biases = {}
    for value in ("null", "true", "false"):
        run = stage_interactor.train(CONFIG, [*small, "optimizer.lr=0", f"{KEY}={value}"],
                                     checkpoint=path)  # fmt: skip
        biases[value] = torch.load(run.checkpoint, weights_only=True)["model"][key].mean().item()
    assert biases["null"] == biases["true"] == pytest.approx(biases["false"] + 3, abs=1e-4)
    plain = checkpoint(cfg, tmp_path / "one.pth", ema={})
    stage_interactor.train(CONFIG, [*small, f"{KEY}=true"], checkpoint=plain)  # there are none


@pytest.mark.parametrize("way", ["evaluate", "fine_tune", "resume"])
def test_a_checkpoint_that_is_not_finite_is_refused(cfg, small, tmp_path, way):
    path = checkpoint(cfg, tmp_path / "bad.pth")
    content = torch.load(path, weights_only=True)
    if way == "resume":
        content["trainer"] = {"optimizer": {"state": {7: {"exp_avg": torch.tensor([-math.inf])}}}}
        told = r"trainer.optimizer.state.7.exp_avg"
    else:
        content["model"]["backbone.convs.1.bias"][2] = math.nan
        told = r"model.backbone.convs.1.bias"
    torch.save(content, path)
    (tmp_path / "last_checkpoint").write_text("bad.pth")
    with pytest.raises(CheckpointError, match=f"bad.pth: 1 tensors hold NaN or infinite.* {told}"):
        if way == "evaluate":
            evaluate(small, path)
        elif way == "fine_tune":
            stage_interactor.train(CONFIG, small, checkpoint=path)
        else:
            stage_interactor.train(CONFIG, small, resume=True)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([*NAMES[:4], "disc"], "others"),
        (NAMES[:4], "others"),
    ],
)
def test_a_checkpoint_of_other_classes_is_not_evaluated(cfg, small, tmp_path, names, told):
    path = checkpoint(cfg, tmp_path / "c.pth", names)
    with pytest.raises(ValueError, match=f"the checkpoint .*{names[0]}.*{told}.*{NAMES[0]}"):
        evaluate(small, path)
    assert not (tmp_path / "coco_instances_results.json").exists()


def test_a_checkpoint_without_names_is_evaluated(cfg, small, tmp_path):
    evaluate(small, checkpoint(cfg, tmp_path / "c.pth", names=[]))
    assert (tmp_path / "results.json").exists()


def other_data(shapes, tmp_path, change, is_function):
    """The held-out images with other categories, as what evaluates takes them."""
    content = json.loads((shapes / "val.json").read_text())
    content["categories"] = change(content["categories"])
    known = {category["id"] for category in content["categories"]}
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] in known]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    name = f"other_{tmp_path.name}"
    if not is_function:
        return L(load_coco_dataset)(
            name=name, json_file=str(path), image_root=str(shapes / "val"), is_train=False
        )
    records = load_coco_dataset(f"{name}_file", str(path), str(shapes / "val"), is_train=False)
    names = MetadataCatalog.get(f"{name}_file").thing_classes
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = names
    return L(load_coco_dataset)(name=name, is_train=False)


def permuted(categories):
    names = [category["name"] for category in categories]
    return [c | {"name": name} for c, name in zip(categories, names[1:] + names[:1])]


def one_less(categories):
    return categories[:-1]


def of_one_name(categories):
    return [c | {"name": "disc"} if c["id"] < 3 else c for c in categories]


@pytest.mark.parametrize("is_function", [False, True])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (one_less, r"evaluated on, has others: \['ellipse', 'rectangle', 'triangle', 'cross'\]"),
        (of_one_name, "several classes have the name 'disc'"),
    ],
)
def test_other_classes_to_evaluate_on_end_a_training_before_it_begins(
    cfg, shapes, tmp_path, change, told, is_function
):
    def data():
        return other_data(shapes, tmp_path, change, is_function)

    if change is of_one_name and is_function:
        DatasetCatalog.register(f"other_{tmp_path.name}", lambda: [])
        MetadataCatalog.get(f"other_{tmp_path.name}").thing_classes = [
            "disc",
            "disc",
            "a",
            "b",
            "c",
        ]
        cfg.dataloader.test.dataset = L(load_records)(name=f"other_{tmp_path.name}")
    else:
        cfg.dataloader.test.dataset = data()
    with pytest.raises(ValueError, match=told):
        stage_interactor.train(cfg)
    assert not (tmp_path / "metrics.json").exists()


def load_records(name):
    """A user's own reader, which checks nothing."""
    return DatasetCatalog.get(name)


def test_a_data_set_of_a_function_names_each_class_once():
    DatasetCatalog.register("twice", lambda: [])
    MetadataCatalog.get("twice").thing_classes = ["a", "b", "a"]
    with pytest.raises(ValueError, match="'twice': several classes have the name 'a'"):
        class_names(name="twice")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.unusable_detections=ignore", "must be one of .*, got .ignore"),
        ("dataloader.evaluator.max_dets_per_image=0", "1 or more.*got 0|integer of 1"),
    ],
)
def test_a_wrong_value_of_the_evaluation_is_found_before_the_training(
    small, tmp_path, override, told
):
    with pytest.raises(ValueError, match=told):
        stage_interactor.train(CONFIG, [*small, override])
    assert not (tmp_path / "metrics.json").exists()


def test_vocs_metric_is_chosen_by_its_name_in_training_and_evaluation(small, tmp_path):
    voc = "dataloader.evaluator._target_=stage_interactor.d2.evaluation.PascalVOCDetectionEvaluator"
    overrides = [*small, voc, "train.best_checkpointer.val_metric=bbox/AP50",
                 "train.early_stopping.patience=3", "train.early_stopping.metric=bbox/AP50-ring",
                 "train.validation_loss=true"]  # fmt: skip
    run = stage_interactor.train(CONFIG, overrides)
    names = ["AP", "AP50", "AP75", *(f"AP50-{name}" for name in NAMES)]
    assert list(run.metrics["bbox"]) == names and "validation" in run.metrics
    assert (tmp_path / "model_best.pth").is_file()
    assert json.loads((tmp_path / "coco_instances_results.json").read_text())
    again = stage_interactor.train(
        CONFIG, [*overrides, f"train.output_dir={tmp_path}/again"], eval_only=True,
        checkpoint=run.checkpoint,
    )  # fmt: skip
    assert again.metrics["bbox"] == run.metrics["bbox"]
    with pytest.raises(ValueError, match=r"best_checkpointer.val_metric=bbox/APs: .*'bbox/AP50-"):
        stage_interactor.train(CONFIG, [*overrides, "train.best_checkpointer.val_metric=bbox/APs"])


def test_lvis_metric_is_refused_where_the_data_lack_what_it_needs(small):
    pytest.importorskip("faster_coco_eval", reason="needs stage-interactor[lvis]")
    lvis = "dataloader.evaluator._target_=stage_interactor.d2.evaluation.LVISEvaluator"
    with pytest.raises(ValueError, match="its images have no neg_category_ids .* LVIS's metric"):
        stage_interactor.train(CONFIG, [*small, lvis])
