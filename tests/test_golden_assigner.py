"""Matching, cross-stage labels and losses against the authors' released code."""

import pytest
import torch
from checks.golden_decoder import LOSS_NAMES
from checks.golden_files import PRECISIONS, Golden, golden_files, predictions

from stage_interactor.modeling import Criterion, CrossStageAssigner, HungarianMatcher
from stage_interactor.modeling.matcher import Targets


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("path", golden_files("assigner"), ids=lambda path: path.stem)
def test_matches_labels_and_losses_are_those_of_the_release(path, dtype):
    golden = Golden(path, dtype)
    config = golden.config
    stages = golden.count("in/stage_{}/logits")
    inputs = {
        name: [
            golden.tensor(f"in/stage_{stage}/{name}").requires_grad_() for stage in range(stages)
        ]
        for name in ("logits", "boxes")
    }
    instances = golden.instances()
    assigner = CrossStageAssigner(
        scope=config["scope"].strip("[]").split(","), iou_threshold=config["threshold"]
    )
    cost, focal = config["cost"], config["focal"]
    matcher = HungarianMatcher(
        cost_class=cost["cls"], cost_bbox=cost["l1"], cost_giou=cost["giou"], **focal
    )
    criterion = Criterion(
        num_classes=config["classes"], matcher=matcher, assigner=assigner, **focal
    )
    logits, boxes = torch.stack(inputs["logits"]), torch.stack(inputs["boxes"])
    targets = Targets.from_instances(instances, dtype)
    matched = matcher(logits, boxes, targets)
    labels = assigner(matched, boxes, targets, config["classes"])
    for stage in range(stages):
        out = f"out/stage_{stage}"
        golden.check_equal(f"{out}/cls_target", labels[stage])
        for image in range(len(instances)):
            golden.check_equal(f"{out}/matched_gt_{image}", matched[stage, image])
        num_matches = (matched[stage] >= 0).sum()
        golden.check_equal(f"{out}/num_box_targets", num_matches)
        golden.check_equal(f"{out}/box_avg_factor", num_matches.clamp(min=1))
        golden.check_equal(
            f"{out}/cls_avg_factor", max(labels[stage].sum(), num_matches, torch.tensor(1))
        )

    losses = criterion([predictions(*pair) for pair in zip(*inputs.values())], instances)
    for stage in range(stages):
        suffix = "" if stage == stages - 1 else f"_{stage}"
        for theirs, ours in LOSS_NAMES.items():
            golden.check(f"loss/stage{stage}_{theirs}", losses[ours + suffix])
    total = sum(losses.values())
    golden.check("loss/total", total)
    total.backward()
    for stage in range(stages):
        for name, tensors in inputs.items():
            golden.check(f"grad/stage_{stage}/{name}", tensors[stage].grad)
