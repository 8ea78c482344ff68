"""Pictures of random sizes, random companions for them, and detectors that would tell the two."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from checks.small import without_zeros
from PIL import Image

from stage_interactor.modeling import (
    ChannelMapper,
    InitialQueries,
    StageInteractor,
    TimmBackbone,
    build_decoder,
)

_TIMM = {
    "resnet": dict(
        name="resnet18", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8,
        channels_last=True,
    ),
    "swin": dict(
        name="swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 1, 2, 1),
        num_heads=(1, 1, 2, 2), output_norm=True,
    ),
    "vit": dict(
        name="vit_tiny_patch16_224", strides=(16,), embed_dim=32, depth=3, num_heads=2,
        dynamic_img_size=True,
    ),
}  # fmt: skip
BACKBONES = list(_TIMM)


def random_detector(backbone: str, norm_groups: int | None, **options) -> StageInteractor:
    """In evaluation, with weights at random: no layer starts as zero, as before a training."""
    network = TimmBackbone(pretrained=False, freeze_norm=False, frozen_stages=0, **_TIMM[backbone])
    levels = dict(embed_dim=32, strides=network.strides)
    model = StageInteractor(
        num_classes=3,
        backbone=network,
        neck=ChannelMapper(
            in_channels=network.channels, out_channels=32, norm_groups=norm_groups
        ),
        queries=InitialQueries(num_queries=6, embed_dim=32),
        decoder=build_decoder(
            num_classes=3, num_groups=2, num_heads=2, feedforward_dim=32, num_points=(16, 8, 8),
            out_points=8, **levels,
        ),
        **options,
    )  # fmt: skip
    without_zeros(model, std=0.05)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def random_sizes(rng: random.Random, count: int, longest: int = 130) -> list[tuple[int, int]]:
    """(height, width) of pictures: some equal, some nearly, at times strips of a pixel."""
    sides = [rng.randint(20, longest) for _ in range(2)]
    sides += [32 * rng.randint(1, longest // 32) + step for step in (-1, 0, 1)]
    sides += [1] * (rng.random() < 0.3)
    return [(rng.choice(sides), rng.choice(sides)) for _ in range(count)]


def random_picture(rng: random.Random, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3): rectangles on noise."""
    draw = np.random.default_rng(rng.getrandbits(32))
    height, width = size
    pixels = draw.integers(0, 60, (height, width, 3), dtype=np.uint8)
    for _ in range(3):
        left, right = sorted(draw.integers(0, width + 1, 2))
        top, bottom = sorted(draw.integers(0, height + 1, 2))
        pixels[top:bottom, left:right] += draw.integers(0, 195, 3, dtype=np.uint8)
    return pixels


def random_companies(rng: random.Random, count: int) -> list[list[int]]:
    """All of so many pictures once, by number, in random order, in batches of random lengths."""
    numbers = rng.sample(range(count), count)
    batches = []
    while numbers:
        length = rng.randint(1, 6)
        batches.append(numbers[:length])
        numbers = numbers[length:]
    return batches


def write_pictures(rng: random.Random, folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """PNG files, which are read as they were written; named in another order than they are in."""
    folder.mkdir()
    names = rng.sample(range(1000), len(sizes))
    paths = [folder / f"{name:03d}.png" for name in names]
    for path, size in zip(paths, sizes):
        Image.fromarray(random_picture(rng, size)).save(path)
    return paths


def write_annotations(rng: random.Random, pictures: list[Path], names: list[str]) -> Path:
    """A COCO file beside the folder of pictures, with an object in each of more than a pixel."""
    images, annotations = [], []
    for number, path in enumerate(pictures, start=1):
        width, height = Image.open(path).size
        images.append(dict(id=number, file_name=path.name, width=width, height=height))
        if min(width, height) > 4:
            box = [1, 1, width / 2, height / 2]
            annotations.append(
                dict(id=number, image_id=number, category_id=rng.randint(1, len(names)), bbox=box,
                     area=box[2] * box[3], iscrowd=0)
            )  # fmt: skip
    categories = [dict(id=index, name=name) for index, name in enumerate(names, start=1)]
    path = pictures[0].parent.with_suffix(".json")
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return path


def scrambled_checkpoint(path: Path, output: Path) -> Path:
    """A checkpoint whose layers that a short training left near zero have weights at random."""
    content = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for part in ("model", "ema"):
        for weight in content.get(part, {}).values():
            if weight.is_floating_point() and weight.dim() > 1 and weight.std() < 0.02:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    torch.save(content, output)
    return output
