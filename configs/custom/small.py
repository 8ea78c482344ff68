"""Your data, for one GPU of 8 GB: ResNet-18, images of about 480 pixels."""

from ..custom_data import data, dataloader, lr_multiplier, model, optimizer, train

# Scaled to data and memory by `stage-interactor train`.
preset = dict(epochs=24, min_images=32000, gib=0.8, gib_per_image=0.35)

model.backbone.update(name="resnet18.tv_in1k")
model.decoder.update(embed_dim=128, feedforward_dim=1024, num_points=(64, 32, 32, 32))
dataloader.train.mapper.augmentation[1].update(
    short_edge_length=(400, 440, 480, 520, 560), max_size=800
)
dataloader.test.mapper.augmentation[0].update(short_edge_length=(480,), max_size=800)

optimizer.lr = 1e-4
train.amp.enabled = "auto"
