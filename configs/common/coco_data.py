"""COCO 2017 with flip and the shorter side at 800; DETR's multi-scale and crop as options."""

from omegaconf import OmegaConf

from stage_interactor.d2 import transforms as T
from stage_interactor.d2.config import LazyCall as L
from stage_interactor.d2.data import build_detection_test_loader
from stage_interactor.d2.evaluation import COCOEvaluator
from stage_interactor.data import DetrDatasetMapper, build_train_loader, load_coco_dataset

MULTI_SCALE = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


def resize(short_edge_length, max_size=1333):
    """The shorter side becomes one of ``short_edge_length``, the longer at most ``max_size``."""
    return L(T.ResizeShortestEdge)(
        short_edge_length=short_edge_length, max_size=max_size, sample_style="choice"
    )


def crop_augmentation(short_edge_length=MULTI_SCALE, max_size=1333):
    """DETR's second branch, taken for half of the images: resize, crop 384..600, resize."""
    return [
        L(T.RandomFlip)(),
        resize((400, 500, 600), max_size),
        L(T.RandomCrop)(crop_type="absolute_range", crop_size=(384, 600)),
        resize(short_edge_length, max_size),
    ]


dataloader = OmegaConf.create()
dataloader.train = L(build_train_loader)(
    dataset=L(load_coco_dataset)(
        name="coco_2017_train", json_file=None, image_root=None, is_train=True, filter_empty=True
    ),
    mapper=L(DetrDatasetMapper)(
        augmentation=[L(T.RandomFlip)(), resize((800,))],
        augmentation_with_crop=None,
        is_train=True,
        image_format="RGB",
    ),
    total_batch_size=16,
    aspect_ratio_grouping=True,
    repeat_threshold=None,  # images with classes in fewer than this share of them come more often
    num_workers=4,
    seed="${train.seed}",
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(load_coco_dataset)(
        name="coco_2017_val", json_file=None, image_root=None, is_train=False, filter_empty=False
    ),
    mapper=L(DetrDatasetMapper)(
        augmentation=[resize((800,))],
        is_train=False,
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)
dataloader.evaluator = L(COCOEvaluator)(
    dataset_name="${..test.dataset.name}",
    output_dir="${train.output_dir}",
    use_fast_impl=False,  # the official COCO API, to the digit
)
