"""Detectors on the Hugging Face hub: what their names mean, and how their files come here.

huggingface_hub, which timm brings, downloads into its cache, offline from it. A name is
``hf://user/name[@revision][/file]``, as its file system has them. What comes is read as data, as
any checkpoint is, and kinds of files that could be more are not asked for.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import unquote

from ..untrusted.files import digest_of
from ..untrusted.tensors import CheckpointError

PREFIX = "hf://"
FILE = "model.safetensors"
_TAKEN = (".safetensors", ".onnx")
_SHOWN = 8  # files, of what a repository has


class HubError(CheckpointError):
    """What cannot be had from the hub, or sent to it."""


class Address(NamedTuple):
    """What a name says."""

    repo_id: str
    revision: str | None  # a branch, a tag or a commit
    filename: str


def parse_address(name: str) -> Address:
    """The parts of ``hf://user/name[@revision][/file]``.

    Raises:
        HubError: it is no such name.
    """
    user, _, rest = name.removeprefix(PREFIX).partition("/")
    repo, _, filename = rest.partition("/")
    repo, at, revision = repo.partition("@")
    if not (name.startswith(PREFIX) and user and repo) or (at and not revision):
        raise HubError(f"{name}: a name on the hub is {PREFIX}user/name[@revision][/file]")
    return Address(f"{user}/{repo}", unquote(revision) or None, filename or FILE)


def local_file(path: str) -> str:
    """The path of a checkpoint: a name on the hub becomes that of its file in the cache.

    Raises:
        HubError: see :func:`download`.
    """
    return download(*parse_address(path)) if path.startswith(PREFIX) else path


def download(
    repo_id: str, revision: str | None = None, filename: str = FILE, *, token: str | None = None
) -> str:
    """The path in huggingface_hub's cache of a file, which is downloaded if it is not there.

    Args:
        repo_id: ``"user/name"``.
        revision: a branch, a tag or a commit; the main branch by default.
        filename: ends in ``.safetensors`` or ``.onnx``.
        token: of the user; the one that ``hf auth login`` keeps, by default.

    Raises:
        HubError: there is none, it may not be had, the hub cannot be reached, or it is not what the
            hub says.
    """
    if not filename.endswith(_TAKEN):
        raise HubError(
            f"{PREFIX}{repo_id}/{filename}: of the hub {' and '.join(_TAKEN)} files are taken, "
            "which are data and nothing else; download another yourself and name its path"
        )
    from huggingface_hub import hf_hub_download

    with told(repo_id, revision, filename, token):
        path = hf_hub_download(repo_id, filename, revision=revision, token=token)
    _require_whole(path, f"{PREFIX}{repo_id}/{filename}")
    return path


def file_in_folder(folder: str, filename: str = FILE) -> str:
    """The same of a folder that holds what a repository would.

    Raises:
        HubError: it has no such file; what it has is named.
    """
    path = os.path.join(folder, filename)
    if not os.path.isfile(path):
        raise HubError(f"{folder} has no {filename}; {_listed(os.listdir(folder))}")
    return path


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it has {', '.join(sorted(names)[:_SHOWN]) or 'no file'}{more}"


@contextmanager
def told(
    repo_id: str, revision: str | None = None, filename: str | None = None, token: str | None = None
) -> Iterator[None]:
    """What huggingface_hub raises in here becomes a line: a :class:`HubError`."""
    from huggingface_hub import HfApi, constants, errors

    name = PREFIX + repo_id
    try:
        yield
    except errors.HFValidationError as error:
        raise HubError(f"{name} is no name on the hub, user/name: {_line(error)}") from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{name} asks its users to agree to something: do so on its page, and log in with "
            "`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{name}: the hub has no such repository, or shows it to others only: log in with "
            "`hf auth login`, or name a token (token=, HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name} has no revision {revision}") from error
    except errors.LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else _line(error.__cause__ or error)
        raise HubError(
            f"{name}: {filename} is not in the cache, {constants.HF_HUB_CACHE}, and the hub, "
            f"{constants.ENDPOINT}, is not reached: {reason}"
        ) from error
    except errors.EntryNotFoundError as error:
        with told(repo_id, revision, token=token):
            there = HfApi().list_repo_files(repo_id, revision=revision, token=token)
        raise HubError(f"{name} has no {filename}; {_listed(there)}") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"{name}: the hub is not asked, HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        advice = {
            401: ": log in with `hf auth login`, or name a token (token=, HF_TOKEN)",
            403: ": the token does not allow this",
            409: ": there is something of that name",
            412: ": somebody else has changed it meanwhile; try again",
        }
        raise HubError(f"{name}: the hub says {_line(error)}{advice.get(status, '')}") from error
    except Exception as error:
        kind = type(error).__module__.partition(".")[0]
        is_network = kind in ("httpx", "httpx2", "requests") or isinstance(error, ConnectionError)
        if is_network or (isinstance(error, OSError) and error.errno is None):
            raise HubError(f"{name}: the transfer failed: {_line(error)}") from error
        raise


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _require_whole(path: str, name: str) -> None:
    """Raises a HubError if a file in the cache is not what it is kept as: by its hash.

    huggingface_hub compares sizes alone. Large files are kept by their SHA-256, others by Git's
    SHA-1 of them. Where there are no links to them, as on Windows, there is nothing to compare.
    """
    blob = os.path.realpath(path)
    kept_as = os.path.basename(blob)
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", kept_as):
        return
    of_git = hashlib.sha1(b"blob %d\0" % os.path.getsize(blob))
    if digest_of(blob, None if len(kept_as) == 64 else of_git) != kept_as:
        raise HubError(
            f"{name}: what is in the cache is not what the hub has: its hash is another; delete "
            f"{blob} and try again"
        )
