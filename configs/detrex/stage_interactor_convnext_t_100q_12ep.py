"""The 12-epoch run with detrex's ConvNeXt-T (needs detectron2 and detrex)."""

from detrex.modeling.backbone import ConvNeXt

from stage_interactor.d2.config import LazyCall as L

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(ConvNeXt)(
    in_chans=3,
    depths=[3, 3, 9, 3],
    dims=[96, 192, 384, 768],
    drop_path_rate=0.1,
    layer_scale_init_value=1.0,
    out_indices=[0, 1, 2, 3],
)
model.neck.update(in_channels=[96, 192, 384, 768], in_features=["p0", "p1", "p2", "p3"])
train.output_dir = "./output/detrex_convnext_t_100q_12ep"
