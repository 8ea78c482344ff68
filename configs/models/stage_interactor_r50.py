"""StageInteractor with ResNet-50: the paper's model (supplement, section J)."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling import (
    ChannelMapper,
    Criterion,
    CrossStageAssigner,
    HungarianMatcher,
    InitialQueries,
    StageInteractor,
    TimmBackbone,
    build_decoder,
    timm_channels,
)

model = L(StageInteractor)(
    num_classes=80,
    backbone=L(TimmBackbone)(
        name="resnet50.tv_in1k",
        pretrained=True,  # by timm, from the Hugging Face hub
        weights=None,  # a file or "package:efficientnet_lite0" instead
        freeze_norm=True,
        frozen_stages=1,
    ),
    neck=L(ChannelMapper)(
        in_channels=L(timm_channels)(name="${...backbone.name}"),
        out_channels="${..decoder.embed_dim}",
        norm_groups=32,
    ),
    queries=L(InitialQueries)(num_queries=100, embed_dim="${..decoder.embed_dim}"),
    decoder=L(build_decoder)(
        num_classes="${..num_classes}",
        embed_dim=256,
        num_groups=4,
        num_heads=8,
        feedforward_dim=2048,
        num_points=(64, 32, 32, 32, 32, 32),  # of each stage
        out_points=128,
        strides=(4, 8, 16, 32),
        sampler="two_stage",
        static_mixing="channel_spatial",
        dynamic_reuse=True,
        first_reusing_stage=2,
        max_reused_filters=None,
        variant="supplement",  # "release" for the released checkpoints
        parts={},  # attention, sampler, mixing, feedforward, head, cascade of your own
    ),
    criterion=L(Criterion)(
        num_classes="${..num_classes}",
        matcher=L(HungarianMatcher)(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0),
        assigner=L(CrossStageAssigner)(scope=("i-1", "L"), iou_threshold=0.5),
        loss_class_weight=2.0,
        loss_bbox_weight=5.0,
        loss_giou_weight=2.0,
    ),
    pixel_mean=None,  # 0 to 255; what the backbone was trained with
    pixel_std=None,
    max_detections=None,  # as many as queries
    nms_threshold=None,  # an IoU switches NMS on (Table 5)
)
