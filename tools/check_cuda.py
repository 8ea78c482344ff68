#!/usr/bin/env python
"""All checks of the CUDA path, on a machine that needs no more than torch, triton and torchvision.

Operations, kernels and decoders on the GPU against the reference in float64. tools/check_cuda.sh
runs it, and the benchmark after it.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "projects"), str(ROOT / "tools")]

import bare  # noqa: E402, F401, I001
from checks import operations as operation_checks  # noqa: E402
from checks.golden_decoder import adamixer_decoder, check_decoder, stage_interactor_decoder  # noqa: E402
from checks.golden_files import PRECISIONS, Golden, golden_files  # noqa: E402
from checks.small import without_zeros  # noqa: E402
from stage_interactor.inference.prepare import prepare_for_inference  # noqa: E402
from stage_interactor.modeling import build_decoder  # noqa: E402
from stage_interactor.modeling.queries import InitialQueries  # noqa: E402
from stage_interactor.ops import use_ops  # noqa: E402


def golden_checks() -> Iterator[tuple[str, Callable[[], None]]]:
    builders = {"decoder": stage_interactor_decoder, "adamixer": adamixer_decoder}
    for kind, build in builders.items():
        for path in golden_files(kind):
            for dtype in PRECISIONS:
                for ops in ("fast", "reference"):

                    def check(path=path, dtype=dtype, build=build, ops=ops):
                        with use_ops(ops):
                            check_decoder(Golden(path, dtype, device="cuda"), build)

                    yield f"golden {path.stem}, {dtype}, {ops}", check


def full_size_decoder() -> None:
    """The paper's sizes, which the kernels take: fast against the reference, with gradients.

    Three stages, the last of which reuses: through six, float32 gradients differ by some per cent.
    """
    torch.manual_seed(0)
    decoder = build_decoder(num_points=(64, 32, 32)).cuda()
    queries = InitialQueries(num_queries=60).cuda()
    without_zeros(decoder)
    # Smooth maps: on rough ones the gradient of bilinear sampling jumps from pixel to pixel, and
    # rounding decides on which side of a jump a point lies.
    coarse = torch.randn(2, 256, 5, 7, device="cuda")
    maps = [
        torch.nn.functional.interpolate(coarse, (320 // s, 448 // s), mode="bicubic")
        for s in (4, 8, 16, 32)
    ]
    sizes = torch.tensor([[320, 448], [300, 400]], device="cuda")
    results = {}
    for ops in ("reference", "fast"):
        for level in maps:
            level.requires_grad_().grad = None
        decoder.zero_grad()
        with use_ops(ops):
            outputs = decoder(maps, *queries(sizes))
            sum(o.logits.square().mean() + o.boxes.mean() for o in outputs).backward()
        results[ops] = [o.logits for o in outputs], [level.grad.clone() for level in maps]
    for kind, limit in ((0, 1e-3), (1, 1e-2)):
        for ours, theirs in zip(results["fast"][kind], results["reference"][kind]):
            error = operation_checks.relative_error(ours, theirs)
            assert error < limit, f"{('logits', 'gradient')[kind]}: relative error {error:.1e}"


def compiled_inference() -> None:
    """torch.compile with CUDA graphs gives the eager detections, in float32 and bfloat16."""
    from checks.small import random_image, tiny_model

    torch.manual_seed(0)
    model = tiny_model(num_queries=16, embed_dim=64, num_points=(32, 16, 16), out_points=32)
    model = model.cuda().eval()
    images = [random_image(2, (64, 96), seed=seed) for seed in (1, 2)]
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        eager = prepare_for_inference(model, dtype=dtype)(images)
        compiled = prepare_for_inference(model, dtype=dtype, compile=True)
        for _ in range(3):  # warm-up, recording, replay
            found = compiled(images)
        for ours, theirs in zip(found, eager):
            ours, theirs = ours["instances"], theirs["instances"]
            torch.testing.assert_close(
                ours.scores.float(), theirs.scores.float(), atol=limit, rtol=0
            )
            if dtype == torch.float32:
                torch.testing.assert_close(
                    ours.pred_boxes.tensor, theirs.pred_boxes.tensor, atol=0.5, rtol=0
                )
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert not skips, f"CUDA graphs were skipped {skips} times"


def main() -> int:
    if not torch.cuda.is_available():
        print("check_cuda.py: no CUDA device: nothing can be checked here")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    checks = [
        *operation_checks.checks("cuda"),
        *golden_checks(),
        ("full-size decoder", full_size_decoder),
        ("compiled inference", compiled_inference),
    ]
    failed, start = [], time.perf_counter()
    for name, check in checks:
        begin = time.perf_counter()
        try:
            check()
            torch.cuda.synchronize()
        except Exception as error:
            failed.append(name)
            print(f"FAILED {name}: {str(error)[:300]}")
            if not isinstance(error, AssertionError):
                traceback.print_exc(limit=-3)
        if time.perf_counter() - begin > 5:
            print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    print(
        f"{len(checks) - len(failed)} of {len(checks)} checks passed in {seconds:.0f} s", flush=True
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
