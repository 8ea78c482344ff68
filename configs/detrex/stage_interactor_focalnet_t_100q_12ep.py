"""The 12-epoch run with detrex's FocalNet-T (needs detectron2 and detrex)."""

from detrex.modeling.backbone import FocalNet

from stage_interactor.d2.config import LazyCall as L

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(FocalNet)(
    embed_dim=96,
    depths=(2, 2, 6, 2),
    focal_levels=(3, 3, 3, 3),
    focal_windows=(3, 3, 3, 3),
    drop_path_rate=0.2,
    out_indices=(0, 1, 2, 3),
)
model.neck.update(in_channels=[96, 192, 384, 768], in_features=["p0", "p1", "p2", "p3"])
train.output_dir = "./output/detrex_focalnet_t_100q_12ep"
