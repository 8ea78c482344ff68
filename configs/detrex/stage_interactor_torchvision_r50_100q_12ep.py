"""The 12-epoch run with torchvision's ResNet-50 through detrex (needs detectron2 and detrex)."""

from detrex.modeling.backbone import TorchvisionBackbone

from stage_interactor.d2.config import LazyCall as L

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(TorchvisionBackbone)(
    model_name="resnet50",
    pretrained=True,
    return_nodes={"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"},
)
model.neck.update(in_channels=[256, 512, 1024, 2048], in_features=["res2", "res3", "res4", "res5"])
train.ddp.find_unused_parameters = True  # the backbone keeps its classifier
train.output_dir = "./output/detrex_torchvision_r50_100q_12ep"
