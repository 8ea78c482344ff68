"""Iterations of a run that are built again."""

import itertools
import os
import shutil
import signal

import pytest
import torch
from checks.small import random_image, tiny_model, without_zeros

from stage_interactor import get_config, train
from stage_interactor.commands import main
from stage_interactor.d2.config import LazyCall as L
from stage_interactor.data import Part, batches_of
from stage_interactor.data.augmentations import Mosaic
from stage_interactor.engine.milestones import RunState
from stage_interactor.engine.replay import replay
from stage_interactor.engine.trainer import Trainer
from stage_interactor.modeling import OneToOneAssigner
from stage_interactor.modeling.geometry import box_iou
from stage_interactor.modeling.matcher import Targets
from stage_interactor.pages.object_trace import DROPPED, KEPT, OUT_OF_SCOPE, trace_objects
from stage_interactor.untrusted.tensors import CheckpointError

CONFIG = "tests/tiny_config.py"
OPTIONS = ["train.device=cpu", "train.checkpointer.period=1", "train.checkpointer.max_to_keep=20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shapes):
    """A folder, and what its iterations saw: from iteration 5 on batches are of another size, the
    last quarter of the training has other augmentation."""
    folder = str(tmp_path_factory.mktemp("run") / "out")
    seen = {}
    inner = Trainer._accumulate_gradients

    def watched(self, data):
        losses, total = inner(self, data)
        images = [(item["file_name"], item["image"], item["instances"]) for item in data]
        seen[self.iter] = images, {name: float(loss) for name, loss in losses.items()}
        if self.iter == 4 and len(data) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses, total

    cfg = get_config(CONFIG, [*OPTIONS, f"shapes.root={shapes}", f"train.output_dir={folder}"])
    cfg.dataloader.train.update(closing=0.25, max_iter=8)
    cfg.train.max_iter = 8
    cfg.dataloader.train.mapper.combinations = [L(Mosaic)(prob=0.7)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_accumulate_gradients", watched)
        with pytest.raises(SystemExit):
            train(cfg)
        train(cfg, ["dataloader.train.total_batch_size=6"], resume=True)
    return folder, seen


@pytest.mark.parametrize("iteration", range(8))
def test_an_iteration_is_what_it_was_in_the_run(run, iteration):
    folder, seen = run
    images, losses = seen[iteration]
    found = replay(folder, iteration)
    assert len(found.images) == len(images) == (4 if iteration < 5 else 6)
    for image, (name, pixels, objects) in zip(found.images, images):
        assert image.file_name == name and image.process == 0
        assert torch.equal(image.image, pixels)
        assert torch.equal(image.boxes, objects.gt_boxes.tensor)
        assert torch.equal(image.classes, objects.gt_classes)
    assert not found.changes and found.of_run
    if iteration:
        assert found.trained == iteration and found.has_losses_of_run
        assert found.losses == pytest.approx(losses, rel=1e-5)
        assert sum(image.loss for image in found.images) == pytest.approx(found.total_loss)
    else:  # of which there are no weights
        assert found.trained == 1 and not found.has_losses_of_run


def test_weights_of_another_iteration_are_named(run):
    folder, _ = run
    found = replay(folder, 7, checkpoint=os.path.join(folder, "model_0000001.pth"))
    assert found.trained == 2 and found.checkpoint.endswith("model_0000001.pth")
    assert found.total_loss != replay(folder, 7).total_loss and not found.has_losses_of_run


def test_what_has_changed_since_is_told(run, tmp_path, shapes, capsys):
    """A resume writes another config, which iterations of before had not."""
    folder = str(tmp_path / "out")
    base = [*OPTIONS, f"shapes.root={shapes}", f"train.output_dir={folder}"]
    train(CONFIG, [*base, "train.max_iter=3"])
    assert replay(folder, 2).has_losses_of_run
    weight = "model.criterion.loss_bbox_weight"
    train(CONFIG, [*base, "train.max_iter=4", f"{weight}=1.0"], resume=True)
    found = replay(folder, 2)
    assert [*found.changes] == [f"{weight}, 5.0, 1.0", "train.max_iter, 3, 4"]
    assert not found.has_losses_of_run
    assert main(["replay", folder, "--iteration", "2"]) == 0
    told = capsys.readouterr().out
    assert f"{weight}, 5.0, 1.0" in told and "those of the run" not in told
    again = replay(folder, 2, [f"{weight}=5.0", "train.max_iter=3"])
    assert again.has_losses_of_run and again.total_loss > 2 * found.total_loss
    other = replay(run[0], 2, checkpoint=os.path.join(folder, "model_0000001.pth"))
    assert not other.of_run and not other.has_losses_of_run


def test_other_data_are_not_taken_for_those_of_the_run(run, tmp_path, shapes):
    folder, _ = run
    with pytest.raises(ValueError, match="the data are not those that .* was trained on"):
        replay(folder, 3, [f"shapes.root={tmp_path / 'fewer'}", "shapes.num_train=23"])
    options = [*OPTIONS, f"train.output_dir={tmp_path / 'out'}", "train.max_iter=2"]
    train(CONFIG, [*options, f"shapes.root={shapes}"])
    options[-1] = "train.max_iter=3"
    train(
        CONFIG, [*options, f"shapes.root={tmp_path / 'fewer'}", "shapes.num_train=23"], resume=True
    )
    log = (tmp_path / "out/log.txt").read_text()
    assert "changed on resume: the images that are trained on" in log


def test_a_loader_of_ones_own_is_told():
    with pytest.raises(TypeError, match="only a loader of build_train_loader .* got DataLoader"):
        batches_of(torch.utils.data.DataLoader([1, 2]), 3, [Part(4, 1, 1, False)])


def test_the_images_of_all_processes(run, monkeypatch):
    """A run of two processes had the images of both, and divided by what both had."""
    folder, _ = run
    inner = RunState.load_state_dict

    def of_two(self, state):
        inner(self, state)
        self.parts = [Part(8, 2, 2, False)]

    monkeypatch.setattr(RunState, "load_state_dict", of_two)
    found = replay(folder, 3)
    assert [image.process for image in found.images] == [0, 0, 1, 1]
    monkeypatch.undo()
    one = replay(folder, 3)
    losses = [{i.file_name: i.loss for i in images} for images in (found.images, one.images)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert found.losses == pytest.approx(one.losses, rel=1e-3)  # they compute what one would


def test_what_is_no_iteration_of_a_run_is_told(run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match="the run has iterations 0 to 7, not 8"):
        replay(folder, 8)
    with pytest.raises(ValueError, match="not -1"):
        replay(folder, -1)
    with pytest.raises(FileNotFoundError, match="config_resolved.yaml: is it the folder of a run"):
        replay(tmp_path, 0)
    shutil.copy(os.path.join(folder, "config_resolved.yaml"), tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint of a training"):
        replay(tmp_path, 0)


def test_the_command_writes_a_page(run, capsys, tmp_path):
    folder, seen = run
    page = tmp_path / "page.html"
    assert main(["replay", folder, "--iteration", "6", "--output", str(page)]) == 0
    told = capsys.readouterr().out
    images, losses = seen[6]
    assert f"total loss {sum(losses.values()):.3f}"[:-1] in told
    assert "The losses are those of the run" in told and str(page) in told
    text = page.read_text()
    for name, _, objects in images:
        assert f"{os.path.basename(name)}: {len(objects)} objects" in text
    assert text.count("data:image/jpeg") == len(images)
    assert main(["replay", folder, "--iteration", "0"]) == 0
    assert "The weights have seen 1 iterations" in capsys.readouterr().out
    assert os.path.isfile(os.path.join(folder, "replay_0000000.html"))


def brute_force(criterion, outputs, objects):
    """Told query by query, of an image."""
    logits = torch.stack([output.logits for output in outputs])
    boxes = torch.stack([output.boxes for output in outputs])
    targets = Targets.from_instances([objects], boxes.dtype)
    matched = criterion.matcher(logits, boxes, targets)[:, 0].tolist()
    stages = range(len(outputs))
    query = [[row.index(m) if m in row else -1 for m in range(len(objects))] for row in matched]
    labels, carried = {}, {}
    for i, m in itertools.product(stages, range(len(objects))):
        goal = objects.gt_boxes.tensor[m]
        scope = [i]
        if not isinstance(criterion.assigner, OneToOneAssigner):
            scope = criterion.assigner.stages_in_scope(i, len(outputs))
        carriers = set()
        for j in stages:
            labels[i, j, m] = OUT_OF_SCOPE
            if j not in scope or query[j][m] < 0:
                continue
            overlap = float(box_iou(boxes[i, 0, query[j][m]], goal))
            least = getattr(criterion.assigner, "iou_threshold", -1.0)
            labels[i, j, m] = KEPT if overlap >= least else DROPPED
            if labels[i, j, m] == KEPT:
                carriers.add(query[j][m])
        carried[i, m] = len(carriers)
    return query, labels, carried


@pytest.mark.parametrize("least", [0.02, 0.1, None])
def test_a_trace_says_who_had_which_label_from_where(least):
    torch.manual_seed(0)
    model = without_zeros(tiny_model(num_points=(8, 8, 8, 8)), std=0.05).train()
    criterion = model.criterion
    if least is None:
        criterion.assigner = OneToOneAssigner()
    else:
        criterion.assigner.iou_threshold = least
    images = [random_image(3, seed=1), random_image(0, seed=2), random_image(5, seed=3)]
    kinds = set()
    for image in images:
        with torch.no_grad():
            outputs = model([image], with_losses=False)
        (trace,) = trace_objects(criterion, outputs, [image["instances"]])
        query, labels, carried = brute_force(criterion, outputs, image["instances"])
        assert trace.query.tolist() == query
        for (i, j, m), kind in labels.items():
            assert int(trace.labels[i, j, m]) == kind
            kinds.add(kind)
        for (i, m), count in carried.items():
            assert int(trace.queries_labelled[i, m]) == count
        for i, row in enumerate(query):
            for m, n in enumerate(row):
                goal = image["instances"].gt_boxes.tensor[m]
                label = int(image["instances"].gt_classes[m])
                assert float(trace.iou[i, m]) == pytest.approx(
                    float(box_iou(outputs[i].boxes[0, n], goal)), abs=1e-6
                )
                near = max(float(box_iou(box, goal)) for box in outputs[i].boxes[0])
                assert float(trace.nearest[i, m]) == pytest.approx(near, abs=1e-6)
                score = float(outputs[i].logits[0, n, label].sigmoid())
                assert float(trace.score[i, m]) == pytest.approx(score, abs=1e-6)
    assert KEPT in kinds and (least is None or DROPPED in kinds)
