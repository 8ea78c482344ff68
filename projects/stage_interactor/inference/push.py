"""A trained detector on the Hugging Face hub: weights and model card, in one commit."""

import os
import re
import tempfile
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

from .blueprint import Blueprint, load_model
from .export import is_ours, model_card
from .hub import FILE, PREFIX, HubError, told
from .weights import save_safetensors

CARD = "README.md"
Card = Literal["keep", "replace"]


class Pushed(NamedTuple):
    """What :func:`push_checkpoint` did."""

    url: str  # of the repository
    commit: str  # of the hub's
    card: bool  # whether the model card was written


def push_checkpoint(
    checkpoint: str | os.PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool = False,
    message: str | None = None,
    card: Card | None = None,
    config_file: str | None = None,
    averaged: bool | None = None,
    token: str | None = None,
) -> Pushed:
    """Puts a detector on the hub, from where :meth:`Detector.from_pretrained` takes it.

    ``model.safetensors`` carries what a detector needs and nothing of the training; the card says
    what it is, and for ``model_final``, beside which the ``results.json`` of the last evaluation
    lies, how good.

    Args:
        checkpoint: a ``.pth`` or ``.safetensors`` file.
        repo_id: ``"user/name"``; it is made if it is not there.
        license: of the weights, one of the hub's names, such as ``"apache-2.0"``; the card says
            ``unknown`` if it is not said.
        private: for a repository that is made: others do not see it. One that is there must be.
        message: of the commit.
        card: what becomes of a card that somebody wrote or changed: ``"keep"`` or ``"replace"`` it;
            None is an error then.
        config_file, averaged: see :meth:`Detector.from_checkpoint`.
        token: of the user; the one that ``hf auth login`` keeps, by default.

    Raises:
        HubError: the hub refuses, or is not reached, or there is such a card, or a public
            repository where it is to be private.
        FileNotFoundError, CheckpointError, ConfigError: see :meth:`Detector.from_checkpoint`.
        ValueError: another ``card``, or a ``results.json`` that holds no metrics.
    """
    if card not in (None, *get_args(Card)):
        raise ValueError(f"card must be one of {get_args(Card)} or None, got {card!r}")
    if license is not None and not re.fullmatch(r"[\w.+-]+", license):
        raise ValueError(f"license must be a name of the hub's, as apache-2.0, got {license!r}")
    from huggingface_hub import CommitOperationAdd, HfApi

    checkpoint = os.fspath(checkpoint)
    model, blueprint = load_model(checkpoint, config_file, averaged=averaged)
    text = model_card(blueprint, checkpoint, model, license=license, repo_id=repo_id)
    api = HfApi(token=token, library_name="stage-interactor")
    with tempfile.TemporaryDirectory() as folder, told(repo_id, token=token):
        weights = os.path.join(folder, FILE)
        save_safetensors(model, _of_detector(blueprint).as_extra(), weights)
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise HubError(
                f"{PREFIX}{repo_id} is there and public: make it private on its page, or name "
                "another"
            )
        files: dict[str, str | bytes] = {CARD: text.encode(), FILE: weights}
        if any(item.rfilename == CARD for item in info.siblings or ()):
            there = api.hf_hub_download(repo_id, CARD, revision=info.sha, cache_dir=folder)
            if not is_ours(there):
                if card is None:
                    raise HubError(
                        f"{PREFIX}{repo_id} has a {CARD} that somebody wrote or changed: keep it "
                        "(--card keep, card='keep') or replace it (--card replace)"
                    )
                if card == "keep":
                    del files[CARD]
        try:
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(name, content) for name, content in files.items()],
                commit_message=message or "A detector of StageInteractor",
                parent_commit=info.sha,
            )
        except ValueError as error:  # of the card's front matter, such as a licence
            said = " ".join(str(error).split())
            raise HubError(f"{PREFIX}{repo_id}: the hub refuses: {said}") from error
    return Pushed(str(url), commit.oid, CARD in files)


def _of_detector(blueprint: Blueprint) -> Blueprint:
    """Without what its config says of the training: names of folders are nobody's business."""
    mapper = blueprint.config["dataloader"]["test"]["mapper"]
    config = {"model": blueprint.config["model"], "dataloader": {"test": {"mapper": mapper}}}
    return replace(blueprint, config=config)
