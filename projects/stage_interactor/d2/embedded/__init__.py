"""The subset of detectron2 that this project uses, for where detectron2 is not installed.

Same names, signatures and behaviour, written on omegaconf, hydra-core, fvcore, iopath, pycocotools,
Pillow and torch. Import it through the modules of the parent package, which choose the runtime.
Each module here says at its top which detectron2 module it stands in for and what it leaves out.
"""
