import numpy as np
import torch
import tsne
from checks.small import random_image, tiny_model
from PIL import Image


def test_every_object_gives_the_content_of_its_query():
    torch.manual_seed(0)
    model = tiny_model(num_queries=6).eval()
    batches = [[random_image(3, seed=1), random_image(0, seed=2)], [random_image(9, seed=3)]]
    content, classes = tsne.collect(model, batches)
    assert content.shape == (3 + 6, 16)  # at most one object a query
    truth = batches[0][0]["instances"].gt_classes
    assert sorted(classes[:3].tolist()) == sorted(truth.tolist())


def test_the_content_of_an_object_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    model = tiny_model(num_queries=6).eval()
    images = [random_image(2, size, seed=seed) for seed, size in enumerate([(64, 96), (96, 160)])]
    alone = torch.cat([tsne.collect(model, [[image]])[0] for image in images])
    torch.testing.assert_close(tsne.collect(model, [images])[0], alone)


def test_the_figure_and_its_scores(tmp_path):
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(60) % 3
    noise = torch.randn(60, 8, generator=generator)
    apart = noise + 20 * torch.nn.functional.one_hot(classes, 8)
    path = tmp_path / "figure.png"
    panels = [("mixed", noise, classes), ("apart", apart, classes)]
    mixed_score, apart_score = tsne.draw(panels, ["a", "b", "c"], str(path))
    assert mixed_score < 0.1 and apart_score > 0.7
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 10
    assert tsne.most_frequent(torch.tensor([5, 5, 2, 2, 9]), 2) == [2, 5]
