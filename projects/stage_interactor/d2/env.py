"""Random seeds and a description of the environment."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.utils.collect_env import collect_env_info
    from detectron2.utils.env import seed_all_rng
else:
    from .embedded.env import collect_env_info, seed_all_rng

__all__ = [
    "collect_env_info",
    "seed_all_rng",
]
