"""The page about a run: right numbers, nothing from outside, legible on a desk and on a phone."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from stage_interactor.commands import main
from stage_interactor.pages.matching import confusion_matrix, match_images
from stage_interactor.pages.report import write_report


def coco(objects):
    """One image of objects (class id, box xywh[, crowd])."""
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 100}],
        "categories": [{"id": 5, "name": "b"}, {"id": 2, "name": "a"}],
        "annotations": [
            {"id": i, "image_id": 7, "category_id": c, "bbox": box, "iscrowd": int(bool(crowd))}
            for i, (c, box, *crowd) in enumerate(objects)
        ],
    }


def predictions(*items):
    return [{"image_id": 7, "category_id": c, "bbox": b, "score": s} for c, b, s in items]


def test_the_surest_detection_takes_the_object_it_overlaps_most():
    truth = coco([(2, [0, 0, 10, 10]), (2, [3, 0, 10, 10]), (5, [50, 50, 20, 20]),
                  (5, [80, 80, 9, 9], 1)])  # fmt: skip
    found = predictions(
        (2, [0, 0, 10, 10], 0.5),
        (2, [1, 0, 10, 10], 0.9),  # IoU 0.82 with the first, 0.67 with the second
        (2, [50, 50, 20, 20], 0.8),  # another class
        (5, [0, 0, 10, 10], 0.2),  # below the threshold
        (5, [78, 80, 9, 9], 0.7),  # in the crowd: neither right nor wrong
    )
    (result,) = match_images(truth, found, 0.3)
    assert result.scores.tolist() == [0.9, 0.8, 0.5]
    assert result.classes.tolist() == [0, 0, 0]  # by class index: ids in order
    assert result.object_of.tolist() == [0, -1, 1]
    assert result.missed.tolist() == [False, False, True]
    assert result.f1 == pytest.approx(2 * 2 / 6)
    # Whatever the class, the third object is found, as an "a".
    assert confusion_matrix([result], 2).tolist() == [[2, 0, 0], [1, 0, 0], [0, 0, 0]]
    (result,) = match_images(coco([(2, [0, 0, 5, 5])]), predictions((5, [9, 9, 5, 5], 0.4)), 0.3)
    assert confusion_matrix([result], 2).tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]
    (empty,) = match_images(coco([]), [], 0.3)
    assert empty.f1 == 1.0 and confusion_matrix([empty], 2).sum() == 0


@pytest.fixture(scope="module")
def page(small_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "page.html"
    return write_report(small_run, path, threshold=0.0, num_pictures=2), path.read_text()


def test_the_page_shows_the_figures_of_the_run(small_run, page):
    path, text = page
    results = json.loads((small_run / "results.json").read_text())["bbox"]
    for name in ("AP", "AP50", "AP75"):
        assert f"<b>{results[name]:.1f}</b><span>{name}</span>" in text
    assert "<b>4 of 4</b>" in text and "memory at most" in text
    rows = dict(re.findall(r"<tr><td>(\w+)</td><td>\d+</td><td>([\d.]+|nan)</td>", text))
    for name, ap in rows.items():
        assert float(ap) == pytest.approx(results[f"AP-{name}"], abs=0.051, nan_ok=True)
    assert set(rows) == {"ellipse", "rectangle", "triangle", "cross", "ring"}
    truth = json.loads((small_run / "shapes/val.json").read_text())
    found = json.loads((small_run / "coco_instances_results.json").read_text())
    boxes = {(item["image_id"], *item["bbox"]) for item in found}  # of a query one
    assert f"Of {len(truth['annotations'])} objects" in text
    assert f"of {len(boxes)} detections" in text and len(found) == 48
    for title in ("Loss", "AP during training", "Precision and recall", "Worst images"):
        assert title in text


def table_below(text, title):
    """The rows of the first table below a title, as texts."""
    below = text[text.index(f">{title}</h2>") :]
    table = below[: below.index("</table>")]
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in table.split("<tr>")[1:]]


@pytest.fixture
def rare_run(tmp_path):
    """Two classes with enough objects, one with 3 and one with none; and what was found."""
    names = ("cell", "dot", "ring", "never")
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]

    def write(part, counts):
        content = {"images": [], "annotations": [], "categories": categories}
        for image in range(max(counts)):
            content["images"].append(
                {"id": image, "file_name": f"{part}{image}.png", "width": 64, "height": 64}
            )
            Image.new("RGB", (64, 64)).save(tmp_path / f"{part}{image}.png")
            for index, count in enumerate(counts):
                if image < count:
                    box = [2 + 10 * index, 5, 8, 9]
                    content["annotations"].append(
                        {"id": len(content["annotations"]) + 1, "image_id": image, "area": 72,
                         "category_id": index + 1, "bbox": box, "iscrowd": 0}
                    )  # fmt: skip
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
        return content

    write("train", (60, 50, 3, 0))
    truth = write("val", (6, 6, 6, 0))
    found = [
        {key: item[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for item in truth["annotations"]
        if item["category_id"] < 3  # no ring is found
    ]
    run = tmp_path / "run"
    run.mkdir()
    (run / "coco_instances_results.json").write_text(json.dumps(found))
    (run / "metrics.json").write_text('{"iteration": 3, "total_loss": 2.0}\n')
    parts = {
        name: {
            "dataset": {
                "_target_": "stage_interactor.data.load_coco_dataset", "name": part,
                "json_file": str(tmp_path / f"{part}.json"), "image_root": str(tmp_path),
            }
        }
        for name, part in (("train", "train"), ("test", "val"))
    }  # fmt: skip
    (run / "config_resolved.yaml").write_text(yaml.safe_dump({"dataloader": parts}))
    return run


def test_classes_with_too_few_objects_are_named_with_what_they_cost(rare_run):
    text = Path(write_report(rare_run)).read_text()
    assert "2 of 4 classes have fewer than 50 objects to train on." in text
    # Of three classes that there are in the evaluation: (100 + 100 + 0) / 3.
    assert "AP is 66.7, and 100.0 of the other classes: they cost 33.3." in text
    rows = table_below(text, "Rare classes")
    assert rows[1:] == [["ring", "0.0", "33.33", "3", "3"], ["never", "", "", "0", "0"]]


def test_rare_classes_that_are_found_best_cost_nothing(rare_run):
    path = rare_run / "coco_instances_results.json"
    rings = [
        item | {"category_id": 3, "bbox": [22, 5, 8, 9]}
        for item in json.loads(path.read_text())
        if item["category_id"] == 1
    ]
    path.write_text(json.dumps(rings))  # and nothing else
    text = Path(write_report(rare_run)).read_text()
    assert "and 0.0 of the other classes: these do not lower it. </" in text.replace("\n", "")
    assert "More pictures of them" not in text
    assert table_below(text, "Rare classes")[1] == ["ring", "100.0", "0.00", "3", "3"]


def test_a_page_without_rare_classes_or_their_data_has_no_word_of_them(rare_run):
    train = rare_run.parent / "train.json"
    content = json.loads(train.read_text())
    content["categories"] = content["categories"][:2]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] < 3]
    evaluated = rare_run.parent / "val.json"
    others = json.loads(evaluated.read_text())
    others["categories"] = others["categories"][:2]
    others["annotations"] = [a for a in others["annotations"] if a["category_id"] < 3]
    evaluated.write_text(json.dumps(others))
    train.write_text(json.dumps(content))
    assert "Rare classes" not in Path(write_report(rare_run)).read_text()
    train.unlink()
    text = Path(write_report(rare_run)).read_text()
    assert "Rare classes" not in text and "AP by class" in text


def test_the_page_needs_nothing_else(page):
    _, text = page
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "<script" not in text and "@import" not in text
    assert sum(source.startswith("data:image/jpeg") for source in sources) >= 2


def test_the_same_run_gives_the_same_page(small_run, page, tmp_path):
    again = write_report(small_run, tmp_path / "page.html", threshold=0.0, num_pictures=2)
    assert open(again).read() == page[1]


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_it_fits_a_desk_and_a_phone(page, width, height):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": height})
        told, asked = [], []
        tab.on("console", lambda message: told.append(message.text))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"file://{page[0]}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        shown = tab.evaluate(
            "[...document.querySelectorAll('img, svg')].map(e => e.getBoundingClientRect().width)"
        )
        assert len(shown) > 8 and min(shown) > 200 and max(shown) <= width
        loaded = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
        assert tab.evaluate(loaded)
        assert not told and all(url.startswith(("file:", "data:")) for url in asked)
        browser.close()


def test_a_run_without_evaluation_and_a_line_cut_off(small_run, tmp_path, capsys):
    shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("*.pth"))
    (tmp_path / "run/coco_instances_results.json").unlink()
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    newer = json.loads(lines[0]) | {"total_loss": 1e-3, "dn_loss_class": 1e-3}
    newer["validation/total_loss"] = 1e-3
    lines = [line for line in lines if "bbox/AP" not in line] + [json.dumps(newer), '{"itera']
    (tmp_path / "run/metrics.json").write_text("\n".join(lines))
    assert main(["report", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run/report.html").read_text()
    assert "There was no evaluation yet" in text and "Confusions" not in text
    assert "training, also of noised objects" in text  # which no validation loss has
    assert str(tmp_path / "run/report.html") in capsys.readouterr().out


def test_another_folder_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "has no config_resolved.yaml: is it the folder of a run?" in capsys.readouterr().err


def test_nan_and_many_classes_can_be_drawn():
    from stage_interactor.pages import charts

    assert "none" in charts.bars({"a": np.nan, "b": 3.0}, x="AP")
    # What is drawn keeps its room beside names of any length.
    name = "a box is near enough, of a query that matching does not give it"
    for names in ([name], [name, "x" * 5000, "", " "]):
        for svg in (
            charts.bars({name: 250.0 for name in names}, x="objects"),
            charts.intervals({name: (2.0, 1.0) for name in names}, x="AP"),
        ):
            axes = re.search(r'id="patch_2">\s*<path d="M ([\d.]+) [\d.]+ \s*L ([\d.]+)', svg)
            assert float(axes[2]) - float(axes[1]) > 0.45 * 331, names
            assert all(word in svg for word in name.split())
            assert float(re.search(r'height="([\d.]+)pt"', svg)[1]) < 400
    svg = charts.matrix(np.eye(31, dtype=int), [str(i) for i in range(31)], rows="r", columns="c")
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")


def test_detections_that_are_nan_are_named_and_count_for_nothing(small_run, tmp_path, caplog):
    for name in ("config_resolved.yaml", "metrics.json", "coco_instances_results.json"):
        shutil.copy(small_run / name, tmp_path)
    before = (small_run / "coco_instances_results.json").read_text()
    path = write_report(tmp_path, tmp_path / "before.html")
    results = json.loads(before)
    nan, inf = float("nan"), float("inf")
    for box, score in (([nan] * 4, 0.99), ([0, 0, inf, 9], 0.9), ([9, 9, -5, 2], 0.9),
                       ([0, 0, 60, 60], nan)):  # fmt: skip
        results.append({**results[0], "bbox": box, "score": score})
    (tmp_path / "coco_instances_results.json").write_text(json.dumps(results))
    page = Path(write_report(tmp_path, tmp_path / "after.html")).read_text()
    told = r"4 detections in 1 images are NaN, infinite or of negative size.*: 000001.jpg \(4\)"
    assert re.search(told, page) and re.search(told, caplog.text)
    tables = [re.findall("<td>.*?</td>", text) for text in (Path(path).read_text(), page)]
    assert tables[0] == tables[1] != []


def test_a_limit_of_the_evaluator_is_the_report_s_as_well(small_run, tmp_path):
    shutil.copy(small_run / "metrics.json", tmp_path)
    truth = json.loads((small_run / "shapes/val.json").read_text())
    (item, *_) = truth["annotations"]
    right = {key: item[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5}
    wrong = [right | {"bbox": [0, 0, 1, 1], "score": 0.9}] * 3
    (tmp_path / "coco_instances_results.json").write_text(json.dumps([*wrong, right]))
    config = yaml.safe_load((small_run / "config_resolved.yaml").read_text())
    rows = []
    for limit in (None, 3):
        config["dataloader"]["evaluator"]["max_dets_per_image"] = limit
        (tmp_path / "config_resolved.yaml").write_text(yaml.safe_dump(config))
        page = Path(write_report(tmp_path)).read_text()
        rows.append({float(value) for value in re.findall(r"<td>(\d+\.\d)</td>", page)})
    assert max(rows[0]) > 0 and rows[1] == {0.0}


def test_the_folder_of_an_evaluation_has_a_page_too(small_run, tmp_path, capsys):
    """As --eval-only leaves it, without a metrics.json."""
    for name in ("config_resolved.yaml", "results.json", "coco_instances_results.json"):
        shutil.copy(small_run / name, tmp_path)
    page = Path(write_report(tmp_path)).read_text()
    ap = json.loads((small_run / "results.json").read_text())["bbox"]["AP"]
    assert f"<b>{ap:.1f}</b><span>AP</span>" in page and "iterations</span>" not in page
    assert "Nothing was trained in this folder" in page and "AP by class" in page
    whole = Path(write_report(small_run, tmp_path / "whole.html")).read_text()
    cells = [re.findall("<td>.*?</td>", text) for text in (page, whole)]
    assert cells[0] == cells[1] != []
    compared = tmp_path / "compared.html"
    assert main(["report", str(small_run), str(tmp_path), "--output", str(compared)]) == 0
    weights = shutil.copy(small_run / "model_final.pth", tmp_path)
    main(["report", str(tmp_path), "--save-thresholds", str(weights)])
    told = capsys.readouterr()
    assert "Wrote thresholds into" in told.out or "no thresholds" in told.err
    for text in ("[]", '{"bbox": [1]}', '{"bbox": {"AP": "43"}}', "{}"):
        (tmp_path / "results.json").write_text(text)
        assert "Nothing was trained" in Path(write_report(tmp_path)).read_text()
    (tmp_path / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no metrics.json: is it the folder of a run"):
        write_report(tmp_path)
