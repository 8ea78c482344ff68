#!/usr/bin/env python
"""The paper's figure 2: t-SNE of the content vectors of queries that are matched to objects.

python tools/tsne.py --config-file configs/quickstart.py --checkpoint output/x/model_final.pth
python tools/tsne.py --config-file a.py b.py --checkpoint a.pth b.pth --labels baseline ours

One panel a checkpoint, all on the test data of their config; colours are classes. Under each panel
stands the silhouette of the vectors themselves by class: -1 to 1, larger is better separated.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor

from stage_interactor.config import (
    ConfigError,
    instantiate,
    load_config,
    without_pretrained_weights,
)
from stage_interactor.d2.data import MetadataCatalog
from stage_interactor.engine import load_weights
from stage_interactor.errors import call
from stage_interactor.modeling import StageInteractor
from stage_interactor.modeling.batches import same_padded_size


@torch.no_grad()
def collect(model: StageInteractor, batches: Iterable[list[dict]]) -> tuple[Tensor, Tensor]:
    """Last-stage content of the queries that Hungarian matching gives to objects.

    Args:
        model: with a criterion, whose matcher is used.
        batches: images with ``instances`` (``gt_boxes``, ``gt_classes``), as in training.

    Returns:
        content (objects, D) and classes (objects,), on the CPU.
    """
    contents, classes = [], []
    same_size = (
        [images[index] for index in members]
        for images in batches
        for members in same_padded_size(images, model.size_divisibility)
    )
    for batch in same_size:  # as in detection
        images = model.preprocess(batch, model.ground_truth(batch))
        last = model.decode(images.tensor, images.sizes)[-1]
        targets = images.targets
        (matched,) = model.criterion.matcher(last.logits[None], last.boxes[None], targets)
        image, query = (matched >= 0).nonzero(as_tuple=True)
        contents.append(last.content[image, query].float().cpu())
        classes.append(targets.classes[image, matched[image, query]].cpu())
    return torch.cat(contents), torch.cat(classes)


def most_frequent(classes: Tensor, count: int) -> list[int]:
    """The classes with the most objects, in the order of their numbers."""
    numbers, objects = classes.unique(return_counts=True)
    return sorted(numbers[objects.argsort(descending=True, stable=True)[:count]].tolist())


def draw(
    panels: list[tuple[str, Tensor, Tensor]], names: list[str], path: str, seed: int = 0
) -> list[float]:
    """Draws one panel for each (label, content, classes); the silhouette of each."""
    figure = Figure(figsize=(4.2 * len(panels) + 1.2, 4.6))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    shown = sorted({int(number) for _, _, classes in panels for number in classes.unique()})
    colours = matplotlib.colormaps["tab10" if len(shown) <= 10 else "tab20"]
    scores = []
    for axis, (label, content, classes) in zip(axes, panels):
        perplexity = min(30.0, (len(content) - 1) / 3)
        points = TSNE(perplexity=perplexity, random_state=seed).fit_transform(content.numpy())
        scores.append(float(silhouette_score(content.numpy(), classes.numpy())))
        for index, number in enumerate(shown):
            mine = points[np.asarray(classes == number)]
            colour = [colours(index % colours.N)]
            axis.scatter(*mine.T, s=6, c=colour, label=names[number], linewidths=0)
        axis.set(title=label, xticks=[], yticks=[])
        axis.set_xlabel(f"silhouette {scores[-1]:.3f} ({len(content)} objects)")
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="center right", markerscale=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1 - 1.2 / figure.get_figwidth(), 1))
    figure.savefig(path, dpi=150)
    return scores


def load(config_file: str, checkpoint: str, overrides: list[str], max_images: int):
    """A trained model in evaluation mode, batches with ground truth, and the class names."""
    cfg = load_config(config_file, overrides)
    if not torch.cuda.is_available():
        cfg.train.device = "cpu"
    without_pretrained_weights(cfg)
    model = instantiate(cfg.model).to(cfg.train.device).eval()
    load_weights(model, checkpoint)
    records = instantiate(cfg.dataloader.test.dataset)[:max_images]
    cfg.dataloader.test.mapper.is_train = True  # with annotations; the augmentation stays
    loader = instantiate({**cfg.dataloader.test, "dataset": records})
    return model, loader, MetadataCatalog.get(cfg.dataloader.test.dataset.name).thing_classes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", nargs="+", required=True, help="one, or one a checkpoint")
    parser.add_argument("--checkpoint", nargs="+", required=True)
    parser.add_argument("--labels", nargs="+", help="title of each panel; default: their folders")
    parser.add_argument("--output", default="tsne.png")
    parser.add_argument("--max-images", type=int, default=1000)
    parser.add_argument("--max-classes", type=int, default=10, help="with the most objects, to 20")
    parser.add_argument("--opts", nargs="*", default=[], metavar="key=value")
    args = parser.parse_args()
    if not 2 <= args.max_classes <= 20:
        parser.error("--max-classes must be 2 to 20: there are no more colours to tell apart")
    configs = args.config_file * (len(args.checkpoint) if len(args.config_file) == 1 else 1)
    labels = args.labels or [str(Path(path).parent.name or path) for path in args.checkpoint]
    if not len(configs) == len(labels) == len(args.checkpoint):
        parser.error("name one config for all checkpoints or one for each; likewise labels")
    panels, names = [], []
    for config, checkpoint, label in zip(configs, args.checkpoint, labels):
        model, loader, classes = load(config, checkpoint, args.opts, args.max_images)
        if names and names != classes:
            raise ConfigError(f"{config} has other classes than {configs[0]}")
        names = classes
        panels.append((label, *collect(model, loader)))
    kept = torch.tensor(most_frequent(panels[0][2], args.max_classes))
    chosen = [(label, content[torch.isin(classes, kept)], classes[torch.isin(classes, kept)])
              for label, content, classes in panels]  # fmt: skip
    if min(len(classes.unique()) for _, _, classes in chosen) < 2 or len(chosen[0][1]) < 5:
        raise ValueError("too few objects: the figure needs two classes and five objects at least")
    scores = draw(chosen, names, args.output)
    for label, score in zip(labels, scores):
        print(f"{label}: silhouette {score:.3f}")
    print(f"Written to {args.output}")


if __name__ == "__main__":
    sys.exit(call("tsne.py", main, mistake=1))
