"""What fine-tuning a large pretrained backbone changes in the recipe.

As ViTDet (Li et al., 2022, appendix A.2) and ConvNeXt (Liu et al., 2022, appendix A.3) do it: rates
that fall from block to block, no decay of norms, positions and layer scales. Learning rate, weight
decay and schedule stay those of the paper's recipe.
"""

# By timm's names: positions and tokens of ViTs; layer scales of ViT, Eva and ConvNeXt.
_UNDECAYED = ("pos_embed", "cls_token", "reg_token", "gamma", "gamma_1", "gamma_2")


def use_fine_tuning_recipe(optimizer, layer_decay):
    """``layer_decay`` is the factor from each block of the backbone to the one before it."""
    optimizer.params.layer_decay = layer_decay
    optimizer.params.weight_decay_norm = 0.0
    optimizer.params.overrides = {name: {"weight_decay": 0.0} for name in _UNDECAYED}
