"""Boxes, instances and image batches, on whichever runtime is there."""

import numpy as np
import pytest
import torch

from stage_interactor.d2.structures import Boxes, BoxMode, ImageList, Instances


def test_box_modes_convert_there_and_back_and_keep_the_type():
    for box in ([1.0, 2.0, 3.0, 4.0], (1.0, 2.0, 3.0, 4.0)):
        corners = BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        assert corners == type(box)((1.0, 2.0, 4.0, 6.0))
        assert BoxMode.convert(corners, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) == box
    array = np.array([[1.0, 2.0, 3.0, 4.0]])
    converted = BoxMode.convert(array, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    assert converted.tolist() == [[1, 2, 4, 6]] and array.tolist() == [[1, 2, 3, 4]]


def test_relative_boxes_cannot_be_converted():
    with pytest.raises((NotImplementedError, AssertionError)):
        BoxMode.convert([0.0, 0.0, 1.0, 1.0], BoxMode.XYXY_REL, BoxMode.XYXY_ABS)


def test_boxes_know_their_area_and_which_are_empty():
    boxes = Boxes([[0.0, 2.0, 20.0, 10.0], [20.0, 1.0, 20.0, 9.0]])
    assert boxes.nonempty().tolist() == [True, False]
    assert boxes.area().tolist() == [160, 0]


def test_boxes_of_nothing_are_a_matrix_of_four_columns():
    assert Boxes(torch.zeros(0)).tensor.shape == (0, 4)
    assert Boxes.cat([]).tensor.shape == (0, 4)
    with pytest.raises((ValueError, AssertionError)):
        Boxes(torch.zeros(2, 5))


def test_indexing_boxes_always_gives_boxes():
    boxes = Boxes(torch.arange(12.0).reshape(3, 4))
    assert boxes[1].tensor.tolist() == [[4, 5, 6, 7]]
    assert len(boxes[torch.tensor([True, False, True])]) == 2
    assert len(Boxes.cat([boxes, boxes[:1]])) == 4


def test_instances_fields_have_one_length_and_are_indexed_together():
    instances = Instances((10, 20), scores=torch.tensor([0.1, 0.2, 0.3]))
    instances.pred_boxes = Boxes(torch.rand(3, 4))
    assert len(instances) == 3 and instances.has("scores") and instances.image_size == (10, 20)
    assert instances[instances.scores > 0.15].pred_boxes.tensor.shape == (2, 4)
    assert instances[-1].scores.tolist() == pytest.approx([0.3])
    with pytest.raises((ValueError, AssertionError)):
        instances.labels = torch.zeros(2)
    with pytest.raises(AttributeError):
        _ = instances.labels
    with pytest.raises(IndexError):
        _ = instances[3]


def test_instances_of_one_image_are_joined_field_by_field():
    first = Instances((4, 4), boxes=Boxes(torch.rand(2, 4)), names=["a", "b"])
    second = Instances((4, 4), boxes=Boxes(torch.rand(1, 4)), names=["c"])
    joined = Instances.cat([first, second])
    assert joined.names == ["a", "b", "c"] and len(joined.boxes) == 3
    with pytest.raises((ValueError, AssertionError)):
        Instances.cat([first, Instances((5, 4), boxes=first.boxes, names=["a", "b"])])


@pytest.mark.parametrize("divisor, shape", [(0, (7, 9)), (4, (8, 12)), (32, (32, 32))])
def test_images_are_padded_at_the_right_and_at_the_bottom(divisor, shape):
    images = [torch.ones(3, 5, 9), torch.full((3, 7, 4), 2.0)]
    batch = ImageList.from_tensors(images, size_divisibility=divisor)
    assert batch.tensor.shape == (2, 3, *shape)
    assert batch.image_sizes == [(5, 9), (7, 4)]
    for padded, image in zip(batch.tensor, images):
        height, width = image.shape[1:]
        assert torch.equal(padded[:, :height, :width], image)
    padding = batch.tensor.numel() - sum(image.numel() for image in images)
    assert (batch.tensor == 0).sum() == padding
