"""StageInteractor with DINOv3's ConvNeXt-T; not one of the paper's systems."""

from .stage_interactor_r50 import model

model.backbone.update(
    name="convnext_tiny.dinov3_lvd1689m",
    drop_path_rate=0.1,
    output_norm=True,  # as ConvNeXt's own detectors have it
    freeze_norm=False,
    frozen_stages=0,
)
