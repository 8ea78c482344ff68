"""StageInteractor with DINOv3's ViT-S and ViTDet's pyramid; not one of the paper's systems."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling import PlainBackbone

from .stage_interactor_r50 import model

model.backbone = L(PlainBackbone)(
    name="vit_small_patch16_dinov3.lvd1689m",
    pretrained=True,  # by timm, from the Hugging Face hub
    weights=None,  # a file instead
    out_channels=256,
    drop_path_rate=0.1,  # ViTDet-B's
)
model.neck.in_channels = ["${...backbone.out_channels}"] * 4
