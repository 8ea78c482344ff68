"""The authors' released checkpoints made this project's, and back: whole, or told why not."""

import logging
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import instantiate, load_config, without_pretrained_weights
from ..data import categories_of
from ..modeling import StageInteractor
from ..untrusted.files import digest_of
from ..untrusted.tensors import CheckpointError, load_tensors
from . import released
from .blueprint import Blueprint
from .weights import choose_weights, read_checkpoint, set_weights

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
_CONFIGS = "released/"
# Where the authors' readme says that their checkpoints are; it tells no names and no hashes.
_PAGE = "https://github.com/MCG-NJU/StageInteractor"
# The authors' configs, after which the files are called here.
FILES = {
    "stage_interactor_r50_100q_12ep": "stageinteractor_r50_1x_coco.pth",
    "stage_interactor_r50_300q_36ep_crop":
        "stageinteractor_r50_300_query_crop_mstrain_480-800_3x_coco.pth",
    "stage_interactor_r101_300q_36ep_crop":
        "stageinteractor_r101_300_query_crop_mstrain_480-800_3x_coco.pth",
    "stage_interactor_x101_dcn_300q_36ep_crop":
        "stageinteractor_dx101_300_query_crop_mstrain_480-800_3x_coco.pth",
    "stage_interactor_swin_s_300q_36ep_crop":
        "stageinteractor_swin_s_300_query_crop_mstrain_480-800_3x_coco.pth",
}  # fmt: skip
MISFIT = (
    "does not fit the config. Check model.num_classes, model.queries.num_queries and the sizes of "
    "model.decoder, and that StageInteractor's released checkpoints get a config of "
    "configs/released/ (model.decoder.variant=release)."
)


def load_released(
    name: str, path: str | os.PathLike | None = None, folder: str | os.PathLike = FOLDER
) -> tuple[StageInteractor, Blueprint]:
    """The detector of a released checkpoint, in evaluation mode.

    See :meth:`stage_interactor.Detector.from_released` for arguments and errors.
    """
    name = name.removeprefix(_CONFIGS).removesuffix(".py")
    if name not in FILES:
        raise ValueError(f"there is no released checkpoint {name!r}; there are {', '.join(FILES)}")
    path = os.path.join(folder, FILES[name]) if path is None else os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{path}: there is no such file. Download the checkpoint of the authors' config "
            f"{FILES[name].removesuffix('.pth')}, to which their page leads, {_PAGE}, and save it "
            "there, or name its path"
        )
    cfg = load_config(f"{_CONFIGS}{name}.py")
    without_pretrained_weights(cfg)
    with torch.device("meta"):
        sketch = instantiate(cfg.model)
    weights = converted(load_state(path, to_released=False), sketch, path)
    logger.info(
        f"{path} has the SHA-256 {digest_of(path)}, with which there is nothing to compare: the "
        "authors name none"
    )
    model = instantiate(cfg.model)
    set_weights(model, weights)
    categories = categories_of(cfg.dataloader.test.dataset.name)
    mean, std, _ = model.normalisation
    cfg.model.update(pixel_mean=list(mean), pixel_std=list(std))
    return model.eval(), Blueprint.of_run(cfg, categories)


def load_state(path: str, to_released: bool, averaged: bool | None = None) -> dict[str, Tensor]:
    """The state dict in a file of the expected kind. No code in the file is run.

    Of a checkpoint of this project the averages, where it has them; the trained weights if
    ``averaged`` is False.

    Raises:
        CheckpointError: if it is another kind of file, or holds NaN or infinite values.
    """
    try:
        loaded = load_tensors(path)
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a checkpoint")
    kinds = {
        False: ("state_dict", "roi_head.bbox_head.", "a released checkpoint"),
        True: ("model", "decoder.stages.", "a checkpoint of this project"),
    }
    for wanted, (section, prefix, kind) in kinds.items():
        state = loaded.get(section, loaded)
        if isinstance(state, Mapping) and any(str(key).startswith(prefix) for key in state):
            if wanted == to_released:
                if to_released:
                    return choose_weights(read_checkpoint(path), path, averaged)
                return {key: value for key, value in state.items() if isinstance(value, Tensor)}
            flag = "without" if to_released else "with"
            raise CheckpointError(f"{path} is {kind} already: convert it {flag} --to-released")
    raise CheckpointError(
        f"{path} is neither a released StageInteractor or AdaMixer checkpoint (keys such as "
        "roi_head.bbox_head.0...) nor one of this project (decoder.stages.0...); its first keys "
        f"are {[str(key) for key in loaded][:5]}"
    )


def converted(
    state: Mapping[str, Tensor], model: StageInteractor, path: str, *, to_released: bool = False
) -> dict[str, Tensor]:
    """The state dict of a file, of the other kind, with each of its tensors in its place.

    Args:
        state: of :func:`load_state`.
        model: that it is of; its own weights may be on the meta device.
        path: of the file.

    Raises:
        CheckpointError: it is not of this model.
    """
    with torch.device("cpu"):
        sources = released.model_sources(model)
    try:
        if to_released:
            unknown = [key for key in state if key not in sources]
            _check_shapes(state, model, path)
            found = released.to_released(state, sources)
        else:
            unknown = released.unused_keys(state, sources)
            found = released.from_released(state, sources)
            _check_shapes(found, model, path)
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]}") from error
    except IndexError as error:  # a layer with fewer outputs than the model takes rows of
        raise CheckpointError(f"{path} {MISFIT}") from error
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} keys have no place in this model, such as "
            f"{unknown[:3]}; is it the right config?"
        )
    return found


def _check_shapes(state: Mapping[str, Tensor], model: nn.Module, path: str) -> None:
    differing = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in model.state_dict().items()
        if key in state and state[key].shape != value.shape
    ]
    if differing:
        shown = "\n  ".join(differing[:3])
        raise CheckpointError(
            f"{path} {MISFIT}\n{len(differing)} tensors differ in shape, such as\n  {shown}"
        )
