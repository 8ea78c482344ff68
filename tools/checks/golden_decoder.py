"""A whole decoder against the authors' released code: every stage, losses, labels, gradients."""

import torch
from checks.golden_files import Golden

from stage_interactor.inference import released
from stage_interactor.modeling import (
    Criterion,
    CrossStageAssigner,
    HungarianMatcher,
    InitialQueries,
    OneToOneAssigner,
    build_decoder,
)
from stage_interactor.modeling.matcher import Targets

LOSS_NAMES = {"loss_cls": "loss_class", "loss_bbox": "loss_bbox", "loss_iou": "loss_giou"}


def stage_interactor_decoder(golden: Golden, sizes: dict):
    """The released StageInteractor of this file's sizes, and its criterion."""
    decoder = build_decoder(**sizes, num_points=golden.num_points(), variant="release")
    return decoder, CrossStageAssigner()


def adamixer_decoder(golden: Golden, sizes: dict):
    """The released AdaMixer of this file's sizes, and its criterion."""
    decoder = build_decoder(
        **sizes,
        num_points=golden.num_points(),
        sampler="vanilla",
        level_shift=0.0,
        initial_dz=-1.0,
        first_reusing_stage=None,
        mixing_bias=False,
        refinement="scale",
    )
    return decoder, OneToOneAssigner()


def check_decoder(golden: Golden, build) -> None:
    """Every result of a reference file, on the device that it was opened for."""
    config = golden.config
    levels = golden.count("in/feature_{}")
    sizes = dict(
        num_classes=config["classes"],
        embed_dim=config["dim"],
        num_groups=config["groups"],
        num_heads=config["heads"],
        feedforward_dim=config["ffn"],
        out_points=config["out_points"],
        strides=[4 * 2**level for level in range(levels)],
    )
    decoder, assigner = build(golden, sizes)
    queries = InitialQueries(num_queries=config["queries"], embed_dim=config["dim"])
    sources = {f"decoder.{k}": v for k, v in released.decoder_sources(decoder).items()}
    sources |= {f"queries.{k}": v for k, v in released.query_sources().items()}
    state = {key: golden.tensor(f"state/{key}") for key in golden.keys("state/")}
    assert released.unused_keys(state, sources) == []
    model = torch.nn.ModuleDict({"decoder": decoder, "queries": queries}).to(
        golden.device, golden.dtype
    )
    model.load_state_dict(released.from_released(state, sources))

    # Forward, with the intermediate results of every stage.
    seen: dict[str, torch.Tensor] = {}
    for index, stage in enumerate(decoder.stages):
        parts = {"attended": stage.attention, "sampled": stage.sampler, "mixed": stage.mixing}
        for name, part in parts.items():
            key = f"out/stage_{index}/{name}"
            part.register_forward_hook(
                lambda _, __, out, key=key: seen.update(
                    {key: out[0] if isinstance(out, tuple) else out}
                )
            )
    features = [golden.tensor(f"in/feature_{level}").requires_grad_() for level in range(levels)]
    instances = golden.instances()
    image_sizes = torch.tensor([image.image_size for image in instances], device=golden.device)
    content, xyzr = queries(image_sizes)
    golden.check("out/init_content", content)
    golden.check("out/init_xyzr", xyzr)
    outputs = decoder(features, content, xyzr)
    for index, output in enumerate(outputs):
        for name in ("logits", "boxes", "xyzr", "content"):
            golden.check(f"out/stage_{index}/{name}", getattr(output, name))
    compared = 0
    for key, value in seen.items():
        if key in golden:
            golden.check(key, value)
            compared += 1
    assert compared == 3 * len(outputs) or golden.kind == "adamixer"

    # Matches and labels.
    criterion = Criterion(
        num_classes=config["classes"], matcher=HungarianMatcher(), assigner=assigner
    )
    logits = torch.stack([output.logits for output in outputs])
    boxes = torch.stack([output.boxes for output in outputs])
    targets = Targets.from_instances(instances, golden.dtype)
    matched = criterion.matcher(logits, boxes, targets)
    labels = assigner(matched, boxes, targets, config["classes"])
    for stage in range(len(outputs)):
        if f"out/stage_{stage}/cls_target" in golden:
            golden.check_equal(f"out/stage_{stage}/cls_target", labels[stage])
            for image in range(len(instances)):
                golden.check_equal(f"out/stage_{stage}/matched_gt_{image}", matched[stage, image])
            normaliser = max(int(labels[stage].sum()), int((matched[stage] >= 0).sum()), 1)
            normaliser = torch.tensor(normaliser)
            golden.check_equal(f"out/stage_{stage}/cls_avg_factor", normaliser)

    # Losses and gradients.
    losses = criterion(outputs, instances)
    for stage in range(len(outputs)):
        suffix = "" if stage == len(outputs) - 1 else f"_{stage}"
        for theirs, ours in LOSS_NAMES.items():
            golden.check(f"loss/stage{stage}_{theirs}", losses[ours + suffix])
    total = sum(losses.values())
    golden.check("loss/total", total)
    total.backward()
    for level, feature in enumerate(features):
        golden.check(f"grad/feature_{level}", feature.grad)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    squares: dict[str, torch.Tensor] = {}
    for name, source in sources.items():
        squares[source.key] = squares.get(source.key, 0.0) + gradients[name].square().sum()
    for key, square in squares.items():
        if f"grad/{key}" in golden:
            golden.check(f"grad/{key}", square.sqrt())
