"""Hugging Face's hub: files fetched from it, and errors that say what would work instead.

Where the hub does not answer, its client would try again for half a minute for every file; one
short request finds that out beforehand, and what is in the cache is used without asking.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError, brief

_TIMEOUT_S = 5.0
# owner/name, or a name alone; with @revision at its end
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?", re.ASCII)
_LONGEST_ID = 96  # of the hub, without the revision
# what its client lets through of the libraries below it
_HTTP = ("httpx", "httpcore", "requests", "urllib3")  # also httpx2 and the like


class HubError(UserError, RuntimeError):
    """The hub cannot be reached, or has no such repository or file, or does not let us in."""


def is_repo_id(text: str) -> bool:
    """Whether ``text`` can be a repository's id: OWNER/NAME, with or without @REVISION."""
    name = split_revision(text)[0]
    known = _ID.fullmatch(text) is not None and len(name) <= _LONGEST_ID
    return "/" in name and known and ".." not in text


def split_revision(repo_id: str) -> tuple[str, str | None]:
    """ "owner/name@revision" to its two parts; the revision is None where there is none."""
    name, at, revision = repo_id.partition("@")
    return name, revision if at else None


def reachable() -> bool:
    """Whether the hub answers at all, within five seconds."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception:
        return False
    return True


@contextmanager
def asked(what: str, *, uploads: bool = False) -> Iterator[None]:
    """Run code that asks the hub; its errors become one sentence about ``what``.

    Where the hub does not answer, the code runs in the client's offline mode: what is in the cache
    is found at once, and what is not fails at once.

    Args:
        what: begins the sentence: a repository's id, or what is wanted of it.
        uploads: the code sends files, so that no copy elsewhere would do.

    Raises:
        HubError: for every error of the hub's client.
    """
    from huggingface_hub import constants, errors

    was_offline, offline = constants.HF_HUB_OFFLINE, not reachable()
    constants.HF_HUB_OFFLINE = offline
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{what}: access is granted by its owners; ask for it on the repository's page, then "
            "log in (hf auth login, or HF_TOKEN in the environment)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{what}: the hub has no such repository, or it is private; check the name, or log in "
            "(hf auth login, or HF_TOKEN in the environment)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{what}: the repository has no such revision") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if not offline and error.__cause__ is not None:
            # it answers, but not with the file: too many requests, an error of its own
            raise HubError(_answered(what, error.__cause__)) from error
        raise HubError(_without_network(what, was_offline, uploads)) from error
    except errors.HFValidationError as error:
        raise HubError(f"{what}: that is no repository's id, which is OWNER/NAME") from error
    except errors.HfHubHTTPError as error:
        raise HubError(_answered(what, error)) from error
    except OSError as error:
        if not offline:
            raise
        raise HubError(_without_network(what, was_offline, uploads)) from error
    except Exception as error:
        if not type(error).__module__.startswith(_HTTP):
            raise
        raise HubError(_answered(what, error)) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _answered(what: str, error: BaseException) -> str:
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    why = f"status {status}: " if status else ""
    return f"{what}: {constants.ENDPOINT} answers, but not with it: {why}{brief(error, 200)}"


def _without_network(what: str, switched_off: bool, uploads: bool) -> str:
    from huggingface_hub import constants

    why = (
        "HF_HUB_OFFLINE is set (or TRANSFORMERS_OFFLINE)"
        if switched_off
        else f"{constants.ENDPOINT} does not answer (HF_ENDPOINT names another)"
    )
    if uploads:
        return f"{what}: {why}; nothing was uploaded"
    return (
        f"{what}: {why}, and it is not in the cache {constants.HF_HUB_CACHE} (HF_HOME names "
        "another). Copy the repository's folder to this machine and give its path, or pass a model"
    )


def download(repo_id: str, filename: str) -> Path | None:
    """A file of a repository in the cache, fetched if need be; None where it has no such file.

    Args:
        repo_id: "owner/name" or "owner/name@revision".

    Raises:
        HubError: one sentence, see ``asked``.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    name, revision = split_revision(repo_id)
    with asked(repo_id):
        try:
            return Path(hf_hub_download(name, filename, revision=revision))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
        except HFValidationError:
            raise
        except ValueError as error:  # a commit or a file by a name that leads out of the cache
            raise HubError(_answered(repo_id, error)) from error
    return None


def cached(repo_id: str, filename: str) -> Path | None:
    """The same without the network: None where the cache does not have it."""
    from huggingface_hub import try_to_load_from_cache

    name, revision = split_revision(repo_id)
    found: Any = try_to_load_from_cache(name, filename, revision=revision)
    return Path(found) if isinstance(found, str) else None
