"""Pictures of detections: boxes and names are where they belong, and the grid has both columns."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from stage_interactor.d2.structures import BoxMode
from stage_interactor.pages.boxes import (
    class_colour,
    draw_boxes,
    picture_with_boxes,
    save_detection_grid,
)


def _has_colour(picture, colour, tolerance=0):
    return (np.abs(picture.astype(int) - colour).max(axis=-1) <= tolerance).any()


def test_a_box_is_drawn_along_its_edges_in_the_colour_of_its_class():
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    picture = draw_boxes(image, [[20, 30, 50, 50]], [1])
    drawn = (picture == class_colour(1)).all(axis=-1)
    assert drawn[30:50, 20].all() and drawn[30:50, 49].all()
    assert drawn[30, 20:50].all() and drawn[49, 20:50].all()
    assert not picture[33:47, 23:47].any() and not picture[52:].any()
    assert not image.any()  # the input is untouched


def test_a_small_image_is_enlarged_with_its_boxes():
    picture = draw_boxes(np.zeros((20, 30, 3), dtype=np.uint8), [[10, 5, 20, 15]], [0], scale=6)
    assert picture.shape == (120, 180, 3) and picture.dtype == np.uint8
    drawn = (picture == class_colour(0)).all(axis=-1)
    assert drawn[30:90, 60].all() and drawn[89, 60:120].all()


def test_name_and_score_are_written_inside_the_picture():
    image = np.zeros((80, 120, 3), dtype=np.uint8)
    options = {"class_names": ["cell"], "font_size": 14}
    for box in ([2, 2, 20, 20], [100, 60, 119, 79], [-5, -5, 130, 90]):
        plain = draw_boxes(image, [box], [0], **options)
        scored = draw_boxes(image, [box], [0], [0.87], **options)
        # Black or white letters on a plate of the class's colour; the score makes it longer.
        plates = [(p == class_colour(0)).all(axis=-1).sum() for p in (plain, scored)]
        assert plates[1] > plates[0] > 150
    assert np.array_equal(plain, draw_boxes(image, np.array([box]), np.array([0]), **options))


def test_no_boxes_and_wrong_numbers():
    image = np.full((10, 10, 3), 7, dtype=np.uint8)
    assert np.array_equal(draw_boxes(image, np.zeros((0, 4)), []), image)
    with pytest.raises(ValueError, match="1 boxes, 2 labels"):
        draw_boxes(image, [[0, 0, 5, 5]], [0, 1])
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\)"):
        draw_boxes(image.astype(float), [], [])


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (3000, 10), (60, 80)])
def test_a_thin_picture_is_drawn_and_fills_no_page(size):
    image = np.zeros((*size, 3), dtype=np.uint8)
    box = [[0, 0, size[1], size[0]]]
    drawn = draw_boxes(image, box, [0], [0.5], class_names=["cell"])
    assert drawn.shape == image.shape and drawn.any()
    uri = picture_with_boxes(image, np.array(box), np.array([0]), ["cell"])
    shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert 1 <= shown.width <= 420 and 1 <= shown.height <= 1680
    assert shown.width == 420 or shown.height == 1680


def test_colours_of_many_classes_differ():
    assert len({class_colour(index) for index in range(80)}) == 80


@pytest.fixture
def records(tmp_path):
    found = []
    for image_id, (height, width) in enumerate([(64, 64), (48, 96), (90, 30)]):
        file_name = str(tmp_path / f"{image_id}.png")
        Image.fromarray(np.full((height, width, 3), 128, dtype=np.uint8)).save(file_name)
        annotation = {"bbox": [5, 30, 15, 15], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        found.append(
            {
                "file_name": file_name,
                "image_id": image_id,
                "height": height,
                "width": width,
                "annotations": [annotation],
            }
        )
    return found


def _prediction(image_id, score=0.9, category_id=7):
    box = [5.0, 30.0, 15.0, 15.0]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_grid_shows_ground_truth_on_the_left_and_detections_on_the_right(
    records, tmp_path, suffix
):
    path = tmp_path / "pictures" / f"grid.{suffix}"
    predictions = [_prediction(0), _prediction(0, score=0.1, category_id=3)]
    save_detection_grid(path, records[:1], predictions, ["cat", "dog"], {0: 3, 1: 7})
    picture = np.asarray(Image.open(path).convert("RGB"))
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    tolerance = 0 if suffix == "png" else 40
    assert _has_colour(left, class_colour(0), tolerance)
    assert not _has_colour(left, class_colour(1), tolerance)
    assert _has_colour(right, class_colour(1), tolerance)
    assert not _has_colour(right, class_colour(0), tolerance)  # below the threshold
    assert left.shape[0] >= 300  # a 64-pixel image is enlarged


def test_the_grid_holds_images_of_all_forms_and_a_chosen_number(records, tmp_path):
    sizes = []
    for count in (1, 2, 3, 12):
        path = tmp_path / f"{count}.png"
        options = {"num_images": count, "columns": 2}
        save_detection_grid(path, records, [_prediction(2)], ["a"], {0: 7}, **options)
        sizes.append(Image.open(path).size)
    assert sizes[0][0] < sizes[1][0] == sizes[2][0]
    assert sizes[1][1] < sizes[2][1] and sizes[2] == sizes[3]


def test_predictions_of_another_data_set_are_an_error(records, tmp_path):
    with pytest.raises(ValueError, match=r"category_id 7.*\[0, 1\]"):
        save_detection_grid(tmp_path / "grid.png", records, [_prediction(0)], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 records"):
        save_detection_grid(tmp_path / "grid.png", [], [], ["a"])
