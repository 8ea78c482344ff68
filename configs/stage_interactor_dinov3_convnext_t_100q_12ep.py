"""DINOv3's ConvNeXt-T, fine-tuned, 100 queries, 12 epochs, shorter side 800.

Not one of the paper's systems, and not measured. DINOv3's features are also used as they are:
train.freeze=[backbone.network] trains all but the network. Its weights have a licence of their own,
the DINOv3 License.
"""

from .common.fine_tuning import use_fine_tuning_recipe
from .models.stage_interactor_dinov3_convnext_t import model
from .stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, optimizer, train

# ConvNeXt-T's detectors have 0.7 from each group of three blocks to the one before it, 0.08 at the
# stem; here it is a factor of each of 18 blocks, and 0.09 at the stem.
use_fine_tuning_recipe(optimizer, layer_decay=0.88)
train.output_dir = "./output/stage_interactor_dinov3_convnext_t_100q_12ep"
