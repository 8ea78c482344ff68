"""What a training step asks of a GPU, counted without one.

Operations that Python dispatches, those of them that launch something (no views, no memory asked
for), places where the host waits for the device, and transfers, of a step in bfloat16, on a
stand-in for the device (``checks/stand_in_device.py``):

    python tools/step_cost.py
    python tools/step_cost.py --config-file configs/quickstart.py --batch-size 4

They depend on the number of images a little, on their size and on the number of queries, which
is 10 here, not at all.
"""

import argparse
import sys

import bare  # noqa: F401
import torch
from checks.small import random_image
from checks.stand_in_device import DEVICE, stand_in_device

from stage_interactor.config import instantiate, load_config, without_pretrained_weights
from stage_interactor.engine import Trainer
from stage_interactor.errors import call

CASES = {
    "configs/quickstart.py": (16, (64, 64)),
    "configs/stage_interactor_r50_100q_12ep.py": (8, (64, 64)),
}


def step_cost(
    config_file: str, batch_size: int, image_size: tuple[int, int], cuda_graph: bool
) -> dict[str, list]:
    """Of a step of a model that has been trained for two.

    Returns:
        by kind: names of the operations and of the launches, places of waits, and bytes of the
        transfers to the device.
    """
    torch.manual_seed(0)
    cfg = load_config(config_file, ["model.queries.num_queries=10"])
    without_pretrained_weights(cfg)
    model = instantiate(cfg.model).train()
    images = [
        random_image(6, image_size, num_classes=cfg.model.num_classes, seed=seed)
        for seed in range(batch_size)
    ]
    with stand_in_device() as device:
        model.to(DEVICE)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        trainer = Trainer(
            model,
            [images] * 3,
            optimizer,
            amp={"enabled": True},
            clip_grad={"enabled": True, "params": {"max_norm": 1.0}},
            cuda_graph=cuda_graph,
            fold_norms=True,
        )
        step = trainer.run_step

        def counted() -> None:
            device.reset()
            step()

        trainer.run_step = counted  # type: ignore[method-assign]
        trainer.train(0, 3)
        return {
            "operations": sorted(device.dispatched.elements()),
            "launches": sorted(device.launched.elements()),
            "waits": device.waits,
            "transfers": device.uploads,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="default: quick start and R50")
    parser.add_argument("--batch-size", type=int, help="of --config-file (8)")
    parser.add_argument("--image-size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"),
                        help="of --config-file (64 64)")  # fmt: skip
    args = parser.parse_args()
    given = [args.batch_size, *(args.image_size or [None])]
    if any(number is not None and number < 1 for number in given):
        parser.error("--batch-size and --image-size must be at least 1")
    cases = CASES
    if args.config_file:
        height, width = args.image_size or (64, 64)
        cases = {args.config_file: (args.batch_size or 8, (height, width))}
    elif given != [None, None]:
        parser.error("--batch-size and --image-size are of a --config-file")
    print("| config | images | decoder | operations | launches | waits | transfers |")
    print("|---|---|---|---|---|---|---|")
    for config_file, (batch_size, image_size) in cases.items():
        for graph in (False, True):
            cost = step_cost(config_file, batch_size, image_size, graph)
            counts = " | ".join(str(len(part)) for part in cost.values())
            how = "replayed" if graph else "computed"
            print(f"| `{config_file}` | {batch_size} | {how} | {counts} |", flush=True)


if __name__ == "__main__":
    sys.exit(call("step_cost.py", main, mistake=1))
