"""What training with Swin changes in the recipe: more warm-up, no decay of norms and positions."""


def use_swin_recipe(optimizer, lr_multiplier):
    optimizer.params.weight_decay_norm = 0.0
    optimizer.params.overrides = {"relative_position_bias_table": {"weight_decay": 0.0}}
    lr_multiplier.warmup_iters = 1000
