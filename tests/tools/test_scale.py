"""How cost grows, where it stops being linear, what processes exchange: found by the tool."""

import csv

import pytest
import scale
import torch
from checks.small import random_image, tiny_model

CPU = torch.device("cpu")


def rows_of(costs, axis="queries", mode="training"):
    """Of costs by part, each a list over the axis; all together the detector's and decoder's."""
    values = scale.AXES[axis]
    totals = [sum(cost) for cost in zip(*costs.values())]
    rows = []
    for index, value in enumerate(values):
        for whole in ("detector", "decoder"):
            rows.append(scale.Row(axis, value, mode, whole, totals[index], totals[index]))
        for part, cost in costs.items():
            rows.append(scale.Row(axis, value, mode, part, cost[index], None))
    return rows


def test_exponents_are_those_of_powers():
    work = [1, 2, 5, 40]
    for power in (0.0, 1.0, 1.5, 3.0):
        cost = [7 * value**power for value in work]
        assert scale.exponent(work, cost) == pytest.approx(power, abs=1e-9)
        assert scale.slopes(work, cost) == pytest.approx([power] * 3)


@pytest.mark.parametrize(
    "cost, found",
    [
        ([1, 2, 4, 8], None),
        ([1, 1, 1, 1], None),
        ([1, 4, 16, 64], 0),
        ([1, 2, 4, 12], 2),
        ([1, 2, 6, 18], 1),
        ([1, 4, 8, 16], None),  # a jump alone, linear from there on
        ([1, 2.1, 4.3, 9.0], None),  # within what counts as linear
    ],
)
def test_the_point_is_where_all_further_slopes_are_steep(cost, found):
    assert scale.knee([1, 2, 4, 8], cost) == found


def test_the_tool_names_the_point_and_the_part():
    values = scale.AXES["queries"]
    costs = {
        "mixing": [0.1 * n for n in values],
        "attention": [1e-3 * n**2 for n in values],
        "heads": [0.5 for _ in values],
    }
    growth = scale.Growth(rows_of(costs), "queries", "training")
    *wholes, of_parts = growth.told()
    for line in wholes:
        assert "faster than linear from" in line and "most of it is attention, 2.00" in line
    assert of_parts == (
        "queries, training, parts: attention from 50 on, at the end with exponent 2.00 and 90% of "
        "the time"
    )
    assert scale.exponent(growth.work, growth.memory["decoder"]) > 1.3
    del costs["attention"]
    (decoder, detector) = scale.Growth(rows_of(costs), "queries", "training").told()
    assert decoder.endswith("linear or below up to 900") and "detector" in detector


def test_the_work_of_an_image_is_its_pixels():
    costs = {"backbone": [side**2 for side in scale.AXES["image"]]}
    growth = scale.Growth(rows_of(costs, "image"), "image", "training")
    assert scale.exponent(growth.work, growth.times["detector"]) == pytest.approx(1)
    assert "linear or below" in growth.told()[0]


class Slow(torch.autograd.Function):
    """Takes so long in each direction, by a clock that nothing else moves."""

    now = 0.0

    @staticmethod
    def forward(ctx, tensor, forth, back):
        ctx.back = back
        Slow.now += forth
        return tensor * 1

    @staticmethod
    def backward(ctx, grad):
        Slow.now += ctx.back
        return grad, None, None


def test_time_goes_to_the_part_that_takes_it_in_both_directions(monkeypatch):
    model = tiny_model().train()
    taken = {
        "attention": (model.decoder.stages[0].attention, 0.05, 0.11),
        "sampling": (model.decoder.stages[1].sampler, 0.03, 0.17),
        "mixing": (model.decoder.stages[2].mixing, 0.08, 0.07),
        "neck": (model.neck, 0.04, 0.13),
        "backbone": (model.backbone, 0.02, 0.09),
        "matching": (model.criterion.matcher, 0.06, 0.0),
        "heads": (model.decoder.stages[0].head, 0.01, 0.15),
    }
    for module, forth, back in taken.values():
        forward = module.forward

        def slow(*args, forward=forward, forth=forth, back=back):
            outputs = forward(*args)
            if isinstance(outputs, torch.Tensor):
                return Slow.apply(outputs, forth, back)
            if isinstance(outputs, dict):
                name, last = list(outputs.items())[-1]
                return {**outputs, name: Slow.apply(last, forth, back)}
            return type(outputs)([Slow.apply(outputs[0], forth, back), *outputs[1:]])

        monkeypatch.setattr(module, "forward", slow)
    parts = scale.Parts(model, lambda: Slow.now)
    data = [random_image(2, (64, 64))]
    sum(model(data).values()).backward()  # allocates, and finds its way
    parts.take()
    sum(model(data).values()).backward()
    seconds = parts.take()
    for name, (_, forth, back) in taken.items():
        assert seconds[name] == pytest.approx(forth + back), name
    assert sum(seconds.values()) == pytest.approx(sum(f + b for _, f, b in taken.values()))


def test_memory_is_what_tensors_hold_at_most():
    def work():
        first = torch.ones(2**20)
        second = first * 2
        del first
        return second + 1

    assert scale.peak_bytes(work, CPU) == pytest.approx(8 * 2**20, rel=0.01)
    assert scale.peak_bytes(lambda: None, CPU) == 0


def test_growth_is_measured_told_written_and_drawn(tmp_path, capsys):
    table, picture = tmp_path / "scale.csv", tmp_path / "scale.png"
    arguments = "--config-file configs/quickstart.py --axes queries --values 8 4 --repeats 1"
    arguments += " --base image:64 stages:3 points:8 objects:2 --device cpu --clock cpu"
    scale.main([*arguments.split(), "--output", str(table), "--plot", str(picture)])
    told = capsys.readouterr().out
    assert "| exponent |" in told and "| attention |" in told
    assert "queries, inference, decoder: " in told and "queries, training, detector: " in told
    scale.main(["--read", str(table)])
    assert capsys.readouterr().out.strip() in told  # which has the machine as well
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert {row["value"] for row in rows} == {"4", "8"}
    assert {"detector", "decoder", "mixing", "matching"} <= {row["part"] for row in rows}
    for mode in scale.MODES:
        for value in "48":
            of = {r["part"]: r for r in rows if (r["mode"], r["value"]) == (mode, value)}
            times = {part: float(row["milliseconds"]) for part, row in of.items()}
            whole = times.pop("detector")
            assert whole > times.pop("decoder") > 0
            assert sum(times.values()) == pytest.approx(whole, rel=1e-6)
            assert float(of["detector"]["mib"]) > 0
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments",
    ["--base queries:0", "--base size:3", "--values 1 2", "--axes batch --values 2 2",
     "--repeats 0", "--processes 0"],
)  # fmt: skip
def test_what_cannot_be_meant_ends_with_a_line(arguments, capsys):
    with pytest.raises(SystemExit):
        scale.main(arguments.split())
    assert "error: --" in capsys.readouterr().err


def test_another_file_is_told(tmp_path):
    path = tmp_path / "other.csv"
    for content in ("", "a,b\n1,2\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match="other.csv is no file that --output of this tool"):
            scale.main(["--read", str(path)])
    path.write_text(",".join(scale.Row._fields) + "\nbatch,2,training,detector,1.0,1.0\n")
    with pytest.raises(ValueError, match="other.csv has nothing of --axes and --modes"):
        scale.main(["--read", str(path), "--axes", "queries"])


def test_what_two_processes_exchange_is_counted():
    overrides = ["model.queries.num_queries=4", "model.decoder.num_points=[8,8,8]"]
    overrides += ["train.ddp.bucket_cap_mb=1"]
    sizes = dict(queries=4, image=64, batch=1, points=8, stages=3, objects=2)
    setting = dict(config="configs/quickstart.py", overrides=overrides, repeats=1, sizes=sizes)
    seen = scale.in_processes(2, setting)
    buckets = scale.buckets_of(setting["config"], overrides)
    gradients = sum(size for _, size in buckets) / 2**20
    assert sum(seen["buckets"]) == pytest.approx(gradients, rel=1e-6)
    assert 2 <= len(seen["buckets"]) == seen["calls"]["allreduce"] - 3
    # The losses' normaliser, what is not finite, signals; then metrics, for the first process.
    assert seen["calls"] == {"allreduce": len(seen["buckets"]) + 3, "allgather": 1, "gather": 1}
    others = seen["bytes"]["allreduce"] - 2**20 * sum(seen["buckets"])
    assert others == pytest.approx(4 * (2 * 3 + 2 + 1), abs=1)
    assert 0 <= seen["exposed_ms"] and 0 < seen["busy_ms"] and seen["mib"] > 0
    alone = dict(seen, processes=1, buckets=[], calls={}, bytes={}, busy_ms=0.0)
    *_, one, two = scale.table_of_processes([alone, seen], cores=2).splitlines()
    assert one.startswith("| 1 |") and "100%" in one and "3 allreduce" in two
    crowded = scale.table_of_processes([alone, seen], cores=1).splitlines()[-1]
    assert crowded.startswith("| 2 |  |")  # no times of work that was not parallel


def test_spans_are_counted_once():
    assert scale.covered([(0, 2), (1, 3), (5, 6)]) == 4
    assert scale.covered([]) == 0


def test_an_exchange_on_paper():
    network = scale.Network("", 4, 1.0, 0.5)  # 1 GB/s, half a millisecond
    assert scale.all_reduce_ms(1e6, network) == pytest.approx(0.5 + 1.5)
    buckets = [("decoder", 10**6), ("decoder", 10**6), ("rest", 10**6)]
    computed = scale.Step("", 100, decoder=20, rest=10, at_once=False)
    # Ready at 10, 20 and 30 ms, 2 ms each: the last one is not hidden.
    assert scale.exposed_ms(buckets, computed, network) == pytest.approx((6, 2))
    assert scale.exposed_ms(buckets, computed, network, half=True)[1] == pytest.approx(1.25)
    slow = network._replace(rate=0.05, latency=0)  # 30 ms each: 10 + 3 * 30 - 30 are left
    assert scale.exposed_ms(buckets, computed, slow) == pytest.approx((90, 70))
    at_once = computed._replace(at_once=True)
    assert scale.exposed_ms(buckets, at_once, slow) == pytest.approx((90, 80))
    # Gradients of the rest are there last, in whatever order they come.
    assert scale.exposed_ms(buckets[::-1], at_once, slow) == pytest.approx((90, 80))


def test_the_papers_model_on_paper(capsys):
    scale.main(["--computed"])
    told = capsys.readouterr().out
    assert "MB of gradients in float32" in told
    buckets = scale.buckets_of(scale.CONFIG, [])
    assert sum(size for _, size in buckets) / 4e6 == pytest.approx(136.9, abs=0.3)  # M weights
    for network in scale.NETWORKS:
        assert told.count(f"| {network.name} | ") == 2
    for part in ("decoder", "rest"):
        assert any(name == part for name, _ in buckets)
