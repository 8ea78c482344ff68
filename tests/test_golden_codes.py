"""Static mixing and the sampler against the supplement's Code 1 and Code 2."""

import pytest
from checks.golden_files import PRECISIONS, Golden, golden_files

from stage_interactor.modeling import StaticMixing, TwoStageSampler


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("path", golden_files("code1"), ids=lambda path: path.stem)
def test_static_mixing_is_code_1(path, dtype):
    golden = Golden(path, dtype)
    points = golden.tensor("I")  # (N * G, K, Q, Dc)
    _, across, within, width = points.shape
    assert across == int(golden.arrays["K"])
    static = StaticMixing("channel_spatial", num_points=across * within, group_dim=width).to(dtype)
    static.load_state_dict(
        {
            f"{part}.{kind}": golden.tensor(f"{part}_{kind}")
            for part in ("within", "across")
            for kind in ("weight", "bias")
        }
    )
    flat = points.flatten(1, 2)
    golden.check("out", static(flat, flat).view_as(points))


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("path", golden_files("code2"), ids=lambda path: path.stem)
def test_sampling_points_are_code_2(path, dtype):
    golden = Golden(path, dtype)
    content = golden.tensor("content")
    groups, point_groups = int(golden.arrays["groups"]), int(golden.arrays["K"])
    num_points = point_groups * golden.arrays["xy"].shape[2]
    sampler = TwoStageSampler(
        embed_dim=content.shape[-1], num_groups=groups, num_points=num_points
    ).to(dtype)
    assert sampler.point_groups == point_groups
    sampler.load_state_dict(
        {
            f"{part}.{kind}": golden.tensor(f"{part}_{kind}")
            for part in ("outer", "inner")
            for kind in ("weight", "bias")
        }
    )
    xy, z = sampler.points(content[None], golden.tensor("xyzr")[None])  # (1, N, G, K, Q, ...)
    golden.check("xy", xy[0].flatten(0, 1))
    golden.check("z", z[0].flatten(0, 1)[..., None])
