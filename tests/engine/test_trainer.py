"""The training step, without processes or files."""

import logging
import math
import pickle

import numpy as np
import pytest
import torch
from checks.small import random_image, tiny_model

from stage_interactor.d2 import RUNTIME
from stage_interactor.engine import Checkpointer, CheckpointError, NonFiniteError, Trainer
from stage_interactor.engine.schedule import warmup_cosine, warmup_multistep
from stage_interactor.modeling import StageInteractor


def trainer_for(model, images, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Trainer(model, [images] * 10, optimizer, **kwargs)


def build():
    torch.manual_seed(0)
    return tiny_model()


def images(counts=(2, 3, 1, 2)):
    return [random_image(count, (64, 64), seed=index) for index, count in enumerate(counts)]


@pytest.mark.parametrize(
    "counts", [(2, 3, 1, 2), (1, 1, 6, 9), (0, 0, 5, 1), (0, 0, 0, 0)], ids=str
)
@pytest.mark.parametrize("parts", [2, 3, 9])
def test_accumulation_gives_the_gradients_of_the_whole_batch(counts, parts):
    models = [build().double() for _ in range(2)]
    for model in models:  # as built, all boxes are the whole image: rounding decides on matches
        torch.manual_seed(1)
        for stage in model.decoder.stages:
            torch.nn.init.normal_(stage.head.box_out.weight, std=0.1)
    trainers = [
        trainer_for(model, images(counts), accumulation_steps=steps)
        for model, steps in zip(models, (1, parts))
    ]
    for trainer in trainers:
        trainer.train(0, 1)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(
            one.grad, two.grad, msg=lambda m, n=name: f"{n}: {m}", rtol=1e-9, atol=1e-12
        )
    whole, divided = (trainer.storage.latest() for trainer in trainers)
    for name in ("total_loss", "loss_class", "loss_bbox", "loss_giou_0"):
        assert divided[name][0] == pytest.approx(whole[name][0], rel=1e-9)


def test_a_part_draws_the_same_random_numbers_in_both_of_its_passes():
    model, seen = build(), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.rand(1).item()))
    trainer_for(model, images(), accumulation_steps=4).train(0, 1)
    first, again = seen[:4], seen[4:]  # parts in their order; the last one needs no second pass
    assert len(set(first)) == 4 and again == first[:3]


def test_statistics_see_every_part_once():
    model = build()
    model.neck = torch.nn.Sequential(model.neck, Levels(torch.nn.BatchNorm2d(16)))
    trainer_for(model, images(), accumulation_steps=2).train(0, 3)
    assert model.neck[1].norm.num_batches_tracked == 3 * 2 * 4  # iterations, parts, levels


class Levels(torch.nn.Module):
    """One norm for all levels."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, levels):
        return [self.norm(level) for level in levels]


def test_a_model_with_losses_of_its_own_gets_the_mean_gradient_of_its_parts():
    class MoreLosses(StageInteractor):
        def losses(self, images, image_sizes, ground_truth):
            found = super().losses(images, image_sizes, ground_truth)
            return found | {"loss_size": self.queries.content.square().mean()}

    models = [build() for _ in range(2)]
    for model, parts in zip(models, (1, 2)):
        model.__class__ = MoreLosses
        trainer = trainer_for(model, images((1, 1)), accumulation_steps=parts)
        trainer.train(0, 1)
        assert trainer.storage.history("loss_size").latest() > 0
    torch.testing.assert_close(
        models[0].queries.content.grad, models[1].queries.content.grad, rtol=1e-2, atol=1e-3
    )


def test_another_model_gets_the_mean_gradient_of_its_parts():
    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, batch):
            return {"loss": self.weight * sum(item["x"] for item in batch) / len(batch)}

    model = Losses()
    data = [{"x": value} for value in (1.0, 2.0, 6.0)]
    trainer_for(model, data, accumulation_steps=2).train(0, 1)
    assert model.weight.grad == pytest.approx(3.0)


def test_gradients_are_clipped_to_the_norm():
    model = build()
    clip = {"enabled": True, "params": {"max_norm": 0.1, "norm_type": 2.0}}
    trainer_for(model, images(), clip_grad=clip).train(0, 1)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains(dtype):
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_for(model, images(), amp={"enabled": True, "dtype": dtype})
    trainer.train(0, 3)
    assert trainer.grad_scaler.is_enabled() == (dtype == "float16")
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) > 0.8 * len(before)  # zero-initialised layers block some at first
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = build()
    trainer = trainer_for(model, images())
    trainer.train(0, 1)
    good = {name: p.detach().clone() for name, p in model.named_parameters()}
    bad = images()
    bad[2]["image"] = bad[2]["image"].float() * math.nan
    trainer.reset_data_loader(lambda: [bad])
    with pytest.raises(NonFiniteError) as error:
        trainer.train(1, 5)
    assert "iteration 1" in str(error.value)
    assert "loss_class" in str(error.value) and "image2.jpg" in str(error.value)
    assert all(torch.equal(p, good[name]) for name, p in model.named_parameters())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    model = build()
    model.queries.content.register_hook(lambda gradient: gradient * math.nan)
    good = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFiniteError, match="iteration 0: the gradient norm is nan.*image0.jpg"):
        trainer_for(model, images()).train(0, 5)
    assert all(torch.equal(p, good[name]) for name, p in model.named_parameters())


def test_random_numbers_depend_on_the_iteration_not_on_the_history():
    seen = []
    model = build()
    model.register_forward_pre_hook(lambda *_: seen.append(torch.rand(1).item()))
    trainer_for(model, images(), seed=1).train(0, 4)
    torch.rand(100)
    trainer_for(model, images(), seed=1).train(2, 4)
    trainer_for(model, images(), seed=2).train(2, 3)
    assert seen[4:6] == seen[2:4] and len(set(seen)) == 5


def test_an_unknown_precision_is_an_error():
    with pytest.raises(ValueError, match="train.amp.dtype must be one of .* got 'fp8'"):
        trainer_for(build(), images(), amp={"enabled": True, "dtype": "fp8"})


def test_a_checkpoint_that_does_not_fit_says_which_keys(tmp_path):
    state = build().state_dict()
    del state["queries.content"]
    state["decoder.stages.0.attention.tau"] = torch.zeros(5)
    state["unknown.weight"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as error:
        Checkpointer(build()).load(str(tmp_path / "other.pth"))
    message = str(error.value)
    assert "1 keys missing: ['queries.content']" in message
    assert "1 keys unexpected: ['unknown.weight']" in message
    assert "decoder.stages.0.attention.tau" in message and "(5,)" in message


def test_for_fine_tuning_what_does_not_fit_is_a_warning(tmp_path, caplog):
    state = build().state_dict()
    del state["queries.content"]
    torch.save({"model": state}, tmp_path / "other.pth")
    with caplog.at_level(logging.WARNING):
        Checkpointer(build(), strict=False).load(str(tmp_path / "other.pth"))
    assert "queries.content" in caplog.text


def test_a_truncated_or_unsafe_checkpoint_is_told_apart(tmp_path):
    torch.save({"model": build().state_dict()}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="half.pth is damaged or incomplete"):
        Checkpointer(build()).load(str(tmp_path / "half.pth"))
    torch.save({"model": build()}, tmp_path / "code.pth")  # a pickled module runs code on loading
    with pytest.raises(CheckpointError, match="code.pth .* more than tensors"):
        Checkpointer(build()).load(str(tmp_path / "code.pth"))


def test_the_best_checkpoint_is_not_the_one_to_resume_from(tmp_path):
    checkpointer = Checkpointer(build(), str(tmp_path))
    checkpointer.save("model_0000001")
    checkpointer.save("model_best")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not list(tmp_path.glob("*.tmp"))


def test_the_multistep_schedule_warms_up_and_drops_at_its_epochs():
    schedule = warmup_multistep(milestones=(8, 11), num_epochs=12, warmup_iters=500, max_iter=12000)
    assert schedule(0.0) == pytest.approx(0.001)
    assert schedule(250 / 12000) == pytest.approx(0.5, abs=0.01)
    rates = [schedule(epoch / 12) for epoch in (1, 7.99, 8.01, 10.99, 11.01)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_a_warm_up_longer_than_the_run_is_only_warm_up():
    schedule = warmup_cosine(final=0.0, warmup_iters=500, max_iter=100)
    assert 0 < schedule(0.5) < 1


def test_weights_of_detectron2s_model_zoo(tmp_path):
    model = tiny_model()
    path = str(tmp_path / "R-50.pkl")
    bias = model.backbone.convs[0].bias
    weights = {"convs.0.bias": np.full(bias.shape, 7.0, dtype=np.float32)}
    with open(path, "wb") as file:
        pickle.dump({"model": weights, "__author__": "test", "matching_heuristics": True}, file)
    checkpointer = Checkpointer(model, strict=False)
    if RUNTIME == "detectron2":
        checkpointer.load(path)
        assert (bias == 7).all()
    else:
        with pytest.raises(CheckpointError, match="needs detectron2"):
            checkpointer.load(path)


class RunsOut:
    """Memory runs out where a batch has more images than fit, in the forward or backward pass."""

    def __init__(self, model, most, error, backward=False):
        self.most, self.error, self.backward, self.sizes = most, error, backward, []
        forward = model.forward

        def limited(images, *args, **kwargs):
            self.sizes.append(len(images))
            found = forward(images, *args, **kwargs)
            if len(images) > most and not backward:
                raise error
            value = found["loss_class"] if isinstance(found, dict) else found[0].logits
            if len(images) > most and value.requires_grad:
                value.register_hook(self.fail)
            return found

        model.forward = limited

    def fail(self, gradient):
        raise self.error


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_batch_that_does_not_fit_has_more_parts_from_then_on(error, backward, caplog):
    plain, model = build(), build()
    plain.neck = torch.nn.Sequential(plain.neck, Levels(torch.nn.Dropout(0.2)))
    model.neck = torch.nn.Sequential(model.neck, Levels(torch.nn.Dropout(0.2)))
    limit = RunsOut(model, 1, error, backward)
    trainers = [trainer_for(plain, images(), accumulation_steps=4), trainer_for(model, images())]
    for trainer in trainers:
        trainer.train(0, 2)
    assert trainers[1].accumulation_steps == 4
    told = [r.message for r in caplog.records if "memory ran out" in r.message]
    assert len(told) == 2
    assert "iteration 0" in told[0] and "train.accumulation_steps=2" in told[0]
    assert "in 4 parts from here on" in told[1]
    assert max(limit.sizes[-7:]) == 1  # of the second iteration: nothing is tried again
    for one, two in zip(plain.parameters(), model.parameters()):
        assert torch.equal(one, two)


def test_one_image_that_does_not_fit_ends_the_run():
    model = build()
    RunsOut(model, 0, ERRORS[0])
    trainer = trainer_for(model, images())
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train(0, 2)
    assert trainer.accumulation_steps == 4


def test_another_error_is_none_of_memory():
    model = build()
    RunsOut(model, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        trainer_for(model, images()).train(0, 2)
