"""The 12-epoch run with ViTDet-B: a plain vision transformer and its pyramid (needs detectron2)."""

from functools import partial

import torch
from detectron2.modeling.backbone import SimpleFeaturePyramid, ViT

from stage_interactor.d2.config import LazyCall as L

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

_GLOBAL = (2, 5, 8, 11)  # blocks with attention over the whole image; the others have windows
model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.1,
        window_size=14,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        window_block_indexes=[index for index in range(12) if index not in _GLOBAL],
        use_rel_pos=True,
        out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=(4.0, 2.0, 1.0, 0.5),
    norm="LN",
)
model.neck.update(in_channels=[256] * 4, in_features=["p2", "p3", "p4", "p5"])
train.output_dir = "./output/detectron2_vitdet_b_100q_12ep"
