"""Which detections are given: by thresholds of classes, one box a query, NMS, the best so many."""

import numpy as np
import pytest
import torch
from PIL import Image

from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.d2 import transforms
from stage_interactor.d2.structures import Boxes, Instances
from stage_interactor.inference.predict import predict_files
from stage_interactor.inference.selection import Selection

CAT, DOG, ODD = NAMES = ["cat", "dog", "a=b c"]
# Far apart, but for the second, of the query of the first, and the last, beside the first.
BOXES = [[0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [0, 0, 10, 9]]
SCORES = [0.8, 0.7, 0.6, 0.4, 0.35]
CLASSES = [0, 1, 1, 2, 1]


def finds(boxes=BOXES, scores=SCORES, classes=CLASSES, names=NAMES, thresholds=None):
    """A detector that finds the same in every picture."""

    def model(inputs):
        found = Instances((64, 64), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float)))
        found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes)
        return [{"instances": found} for _ in inputs]

    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return Detector(model, categories, transforms.AugmentationList([]), thresholds=thresholds)


PICTURE = np.zeros((64, 64, 3), np.uint8)


def test_a_query_that_wins_two_classes_gives_the_better_one_unless_asked():
    detector = finds()
    assert detector(PICTURE).names == (CAT, DOG, ODD, DOG)
    assert detector(PICTURE).scores.tolist() == pytest.approx([0.8, 0.6, 0.4, 0.35])
    assert detector(PICTURE, multi_label=True).names == (CAT, DOG, DOG, ODD, DOG)
    # Only what reaches its threshold can win.
    assert detector(PICTURE, {CAT: 0.9}).scores.tolist() == pytest.approx([0.7, 0.6, 0.4, 0.35])


def test_each_class_has_its_threshold():
    detector = finds(thresholds=[0.5, 0.65, 0.1])
    assert detector.thresholds == {CAT: 0.5, DOG: 0.65, ODD: 0.1}
    assert detector(PICTURE).names == (CAT, ODD)
    assert detector(PICTURE, 0.0).names == (CAT, DOG, ODD, DOG)
    assert detector(PICTURE, {DOG: 0.6}).names == (CAT, DOG, ODD)
    assert detector(PICTURE, {ODD: 0.41}).names == (CAT,)
    assert detector(PICTURE, {None: 1, DOG: 0.3}).names == (DOG, DOG, DOG)
    assert finds().thresholds is None
    # The same to float32, in which scores are.
    assert len(finds(scores=[0.7] * 5)(PICTURE, 0.7)) == 4


def test_nms_is_of_a_class_or_of_all_and_only_of_boxes_that_overlap():
    detector = finds()
    assert detector(PICTURE, nms=0.5).names == (CAT, DOG, ODD, DOG)
    assert detector(PICTURE, nms=0.5, agnostic=True).names == (CAT, DOG, ODD)
    assert detector(PICTURE, nms=0.95, agnostic=True).names == (CAT, DOG, ODD, DOG)
    # Of the dogs the last one overlaps the first, which is of the cat's query.
    assert detector(PICTURE, multi_label=True, nms=0.5).names == (CAT, DOG, DOG, ODD)
    assert detector(PICTURE, {CAT: 0.9}, nms=0.5).names == (DOG, DOG, ODD)


def test_the_best_so_many_of_those_that_are_asked_for():
    detector = finds()
    assert detector(PICTURE, max_detections=2).names == (CAT, DOG)
    assert detector(PICTURE, max_detections=1, classes=ODD).names == (ODD,)
    # A class is found as it is among all others.
    assert detector(PICTURE, classes=[DOG]).scores.tolist() == pytest.approx([0.6, 0.35])
    assert len(detector(PICTURE, 0.9, nms=0.5, classes=[DOG], max_detections=9)) == 0


def test_what_is_found_is_best_first_whatever_a_model_gives():
    shuffled = [3, 0, 4, 2, 1]
    parts = ([values[i] for i in shuffled] for values in (BOXES, SCORES, CLASSES))
    assert finds(*parts)(PICTURE).names == (CAT, DOG, ODD, DOG)


def plainly(boxes, scores, classes, thresholds, nms, agnostic):
    """The rule, detection by detection."""
    kept = []
    for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
        box, score, label = boxes[index], scores[index], classes[index]
        if score < thresholds[label] or any((boxes[other] == box).all() for other in kept):
            continue
        kept.append(index)
    final = []
    for index in kept:
        left, top, right, bottom = boxes[index]
        for other in final:
            if not agnostic and classes[other] != classes[index]:
                continue
            width = min(right, boxes[other][2]) - max(left, boxes[other][0])
            height = min(bottom, boxes[other][3]) - max(top, boxes[other][1])
            shared = max(width, 0) * max(height, 0)
            areas = [np.prod(b[2:] - b[:2]) for b in (boxes[index], boxes[other])]
            if shared / (sum(areas) - shared) > nms:
                break
        else:
            final.append(index)
    return final


@pytest.mark.parametrize("agnostic", [False, True])
def test_it_is_what_the_rule_says_detection_by_detection(agnostic):
    random = np.random.default_rng(0)
    for _ in range(100):
        count = random.integers(0, 40)
        corners = random.integers(0, 30, (count, 2))
        boxes = np.concatenate((corners, corners + random.integers(1, 20, (count, 2))), 1)
        boxes = np.repeat(boxes, 2, axis=0).astype(np.float64)  # each query in two classes
        scores = random.permutation(2 * count) / (2.0 * count + 1)
        classes = random.integers(0, 3, 2 * count)
        thresholds = random.uniform(0, 0.6, 3)
        nms = random.uniform(0.05, 1)
        select = Selection(thresholds, nms=nms, agnostic=agnostic)
        expected = plainly(boxes, scores, classes, thresholds, nms, agnostic)
        assert select(boxes, scores, classes).tolist() == expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(threshold=1.5), "threshold must be a number from 0 to 1, got 1.5"),
        (dict(threshold={CAT: float("nan")}), "threshold of 'cat' must be .* got nan"),
        (dict(threshold={"cow": 0.5}), r"classes \['cow'\]: the detector knows"),
        (dict(threshold="0.5"), "must be a number from 0 to 1, got .0.5"),
        (dict(nms=0), "nms .* more than 0 and at most 1, got 0"),
        (dict(nms=float("nan")), "at most 1, got nan"),
        (dict(agnostic=True), "agnostic .* give its IoU"),
        (dict(max_detections=0), "max_detections .* 1 or more, got 0"),
        (dict(max_detections=2.0), "max_detections .* got 2.0"),
    ],
)
def test_an_option_out_of_its_range_is_told(options, told):
    with pytest.raises(ValueError, match=told):
        finds()(PICTURE, **options)
    with pytest.raises(ValueError, match=told):
        predict_files(finds(), "tests/files/picture.png", **options)
    with pytest.raises(TypeError, match="nmss"):
        finds()(PICTURE, nmss=0.5)


@pytest.fixture
def predict(tmp_path, monkeypatch, capsys):
    """``stage-interactor predict`` with a detector in place of a checkpoint: status and words."""
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")

    def run(detector, *arguments):
        monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: detector)
        fixed = ["--checkpoint", "any.pth", "--output-dir", str(tmp_path / "out")]
        try:
            status = main(["predict", *fixed, *arguments, str(tmp_path / "picture.png")])
        except SystemExit as ended:
            status = ended.code
        told = capsys.readouterr()
        return status, told.out + told.err

    return run


def test_thresholds_by_name_on_the_command_line(predict):
    chosen = finds(thresholds=[0.5, 0.65, 0.1])
    for detector, arguments, told in (
        (finds(), [], "4 objects in 1 pictures with a score of at least 0.3;"),
        (chosen, [], "2 objects in 1 pictures with scores of at least cat 0.5, dog 0.65, "
                     "a=b c 0.1, the thresholds of the checkpoint;"),
        (chosen, ["--threshold", "0"], "4 objects in 1 pictures with a score of at least 0;"),
        (chosen, ["--threshold", "a=b c=0.41"], "1 objects .* cat 0.5, dog 0.65, a=b c 0.41;"),
        (chosen, ["--threshold=dog=0.3", "--threshold=1"], "3 objects .* cat 1, dog 0.3, a=b c 1;"),
        (chosen, ["--threshold=dog=0.9", "--threshold=dog=0.6"], "3 objects .* dog 0.6,"),
        (finds(names=["1", "2", "3"]), ["--threshold=1=0.9"], "4 objects .* 1 0.9, 2 0.3, 3 0.3;"),
        (finds(), ["--multi-label", "--max-detections", "4"], "4 objects"),
        (finds(), ["--nms", "0.5", "--agnostic"], "3 objects"),
    ):  # fmt: skip
        status, said = predict(detector, *arguments)
        assert status == 0
        first, *rest = told.split(" .* ")
        assert said.index(first) >= 0 and all(part in said for part in rest), said
    many = finds(names=[str(n) for n in range(30)], thresholds=np.linspace(0.2, 0.49, 30).tolist())
    assert "at least 0.2 to 0.49 by class, the thresholds of the checkpoint" in predict(many)[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--threshold", "high"], "'high' is neither a score, such as 0.4, nor a class and its"),
        (["--threshold", "cat=high"], "'cat=high' is neither"),
        (["--threshold", "cow=0.5"], "classes ['cow']: the detector knows ['cat', 'dog', 'a=b c']"),
        (["--threshold", "cat=2"], "threshold of 'cat' must be a number from 0 to 1, got 2"),
        (["--threshold", "nan"], "threshold must be a number from 0 to 1, got nan"),
        (["--nms", "0"], "nms (--nms) must be an IoU"),
        (["--agnostic"], "give its IoU, nms (--nms)"),
        (["--max-detections", "0"], "max_detections (--max-detections) must be"),
    ],
)
def test_mistakes_are_told_in_a_line(predict, arguments, told):
    status, said = predict(finds(), *arguments)
    assert status == 2 and told in said.splitlines()[-1]


def test_numbers_of_numpy_are_taken_as_those_of_python():
    names = ("a", "b")
    given = Selection.of(
        names, threshold=np.float32(0.5), nms=np.float64(0.7), max_detections=np.int64(3)
    )
    assert (given.nms, given.max_detections) == (0.7, 3) and given.thresholds.tolist() == [0.5] * 2
    assert type(given.nms) is float and type(given.max_detections) is int
    for wrong in ("0.3", np.array([0.3]), [0.3, 0.3], True, 1j, float("nan")):
        with pytest.raises(ValueError, match="threshold must be a number from 0 to 1, got"):
            Selection.of(names, threshold=wrong)
    with pytest.raises(ValueError, match="classes is empty"):
        Selection.of(names, classes=[])
    for wrong in (0, 2.0, True, "3"):
        with pytest.raises(ValueError, match="must be a whole number of 1 or more, got"):
            Selection.of(names, max_detections=wrong)
