"""The 12-epoch run with detectron2's own ResNet-50 (needs detectron2).

Start it from the weights of detectron2's model zoo:
train.init_checkpoint=detectron2://ImageNetPretrained/torchvision/R-50.pkl
"""

from detectron2.modeling.backbone import BasicStem, ResNet

from stage_interactor.d2.config import LazyCall as L

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
    stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
    out_features=["res2", "res3", "res4", "res5"],
    freeze_at=2,  # the stem and the first stage
)
model.neck.in_channels = [256, 512, 1024, 2048]
train.output_dir = "./output/detectron2_r50_100q_12ep"
