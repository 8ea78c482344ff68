"""DINOv3's ViT-S with ViTDet's pyramid, fine-tuned, 100 queries, 12 epochs, shorter side 800.

Not one of the paper's systems, and not measured. DINOv3's features are also used as they are:
train.freeze=[backbone.network] trains the pyramid and the detector alone. Its weights have a
licence of their own, the DINOv3 License.
"""

from .common.fine_tuning import use_fine_tuning_recipe
from .models.stage_interactor_dinov3_vit_s import model
from .stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, optimizer, train

use_fine_tuning_recipe(optimizer, layer_decay=0.7)  # ViTDet-B's, which has twelve blocks too
train.output_dir = "./output/stage_interactor_dinov3_vit_s_100q_12ep"
