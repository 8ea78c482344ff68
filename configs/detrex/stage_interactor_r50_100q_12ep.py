"""The 12-epoch run made of detrex's parts where it has them (needs detectron2 and detrex).

Its L1 cost compares centres and sizes where the paper's compares corners, its data has DETR's
multi-scale and crop augmentation: a place to start mixing, not the paper's recipe.
"""

from detectron2.layers import ShapeSpec
from detrex.config import get_config
from detrex.modeling import HungarianMatcher
from detrex.modeling.backbone import TimmBackbone
from detrex.modeling.neck import ChannelMapper
from torch.nn import GroupNorm

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling import DetrStyleMatcher

from ..stage_interactor_r50_100q_12ep import lr_multiplier, model, train

dataloader = get_config("common/data/coco_detr.py").dataloader  # with detrex's DetrDatasetMapper
dataloader.evaluator.output_dir = "${train.output_dir}"
optimizer = get_config("common/optim.py").AdamW
optimizer.update(lr=2.5e-5, weight_decay=1e-4)

model.backbone = L(TimmBackbone)(
    model_name="resnet50",
    features_only=True,
    pretrained=True,
    in_channels=3,
    out_indices=(1, 2, 3, 4),
    norm_layer=None,  # detectron2's FrozenBatchNorm2d does not fit recent versions of timm
)
model.neck = L(ChannelMapper)(
    input_shapes={
        f"p{level}": ShapeSpec(channels=width)
        for level, width in ((1, 256), (2, 512), (3, 1024), (4, 2048))
    },
    in_features=["p1", "p2", "p3", "p4"],
    out_channels="${..decoder.embed_dim}",
    kernel_size=1,
    norm_layer=L(GroupNorm)(num_groups=32, num_channels="${..out_channels}"),
    num_outs=4,
)
model.criterion.matcher = L(DetrStyleMatcher)(
    matcher=L(HungarianMatcher)(
        cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, cost_class_type="focal_loss_cost"
    )
)
train.output_dir = "./output/detrex_r50_100q_12ep"
