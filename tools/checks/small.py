"""A StageInteractor small enough for tests, and made-up images for it."""

import torch

from stage_interactor.d2.structures import Boxes, Instances
from stage_interactor.modeling import (
    ChannelMapper,
    Criterion,
    CrossStageAssigner,
    HungarianMatcher,
    InitialQueries,
    StageInteractor,
    build_decoder,
)


class TinyBackbone(torch.nn.Module):
    """Four strided convolutions: maps of stride 4, 8, 16, 32."""

    def __init__(self, width: int = 8):
        super().__init__()
        strides = (4, 2, 2, 2)
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(3 if index == 0 else width, width, stride, stride)
            for index, stride in enumerate(strides)
        )

    def forward(self, images):
        maps = {}
        for index, conv in enumerate(self.convs):
            images = conv(images).tanh()
            maps[f"stride{4 * 2**index}"] = images
        return maps


def tiny_model(*, num_classes=3, num_queries=6, embed_dim=16, assigner=None, **decoder):
    options = dict(
        num_groups=2,
        num_heads=2,
        feedforward_dim=32,
        num_points=(16, 8, 8),
        out_points=8,
    )
    return StageInteractor(
        num_classes=num_classes,
        backbone=TinyBackbone(),
        neck=ChannelMapper(in_channels=[8] * 4, out_channels=embed_dim, norm_groups=4),
        queries=InitialQueries(num_queries=num_queries, embed_dim=embed_dim),
        decoder=build_decoder(num_classes=num_classes, embed_dim=embed_dim, **options | decoder),
        criterion=Criterion(
            num_classes=num_classes,
            matcher=HungarianMatcher(),
            assigner=assigner or CrossStageAssigner(),
        ),
    )


def without_zeros(module, std=0.01):
    """Layers that start as zero would let whole branches pass as nothing but denormals."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return module


def random_image(num_objects, size=(64, 96), *, num_classes=3, seed=0):
    """One element of a batch, of a (height, width) with so many objects."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    corners = torch.rand(num_objects, 2, generator=generator) * torch.tensor([width, height]) * 0.5
    sizes = 8 + torch.rand(num_objects, 2, generator=generator) * 20
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.cat((corners, corners + sizes), dim=1))
    instances.gt_classes = torch.randint(0, num_classes, (num_objects,), generator=generator)
    return {
        "image": torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator),
        "instances": instances,
        "file_name": f"image{seed}.jpg",
        "image_id": seed,
        "height": height,
        "width": width,
    }
