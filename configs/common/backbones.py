"""The paper's backbones (supplement, Table 6): what differs from the ResNet-50 of the models."""

RESNET101 = dict(name="resnet101.tv_in1k")
# ResNeXt-101 32x4d, deformable convolutions in the last three stages.
RESNEXT101_DCN = dict(name="resnext101_32x4d.gluon_in1k", deformable_strides=(8, 16, 32))
# Swin trains all of its layers; each of its four maps has a norm of its own.
SWIN_S = dict(
    name="swin_small_patch4_window7_224.ms_in1k",
    drop_path_rate=0.2,
    output_norm=True,
    freeze_norm=False,
    frozen_stages=0,
)
