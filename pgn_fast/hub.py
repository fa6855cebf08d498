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

from .errors import UserError

_TIMEOUT_S = 5.0
# owner/name, or a name alone; with @revision at its end
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


class HubError(UserError, RuntimeError):
    """The hub cannot be reached, or has no such repository or file, or does not let us in."""


def is_repo_id(text: str) -> bool:
    """Whether ``text`` can be a repository's id: OWNER/NAME, with or without @REVISION."""
    return "/" in text and _ID.fullmatch(text) is not None and ".." not in text


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
def asked(what: str) -> Iterator[None]:
    """Run code that asks the hub; its errors become one sentence about ``what``.

    Where the hub does not answer, the code runs in the client's offline mode: what is in the cache
    is found at once, and what is not fails at once.

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
        raise HubError(_without_network(what, was_offline)) from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{what}: {' '.join(str(error).split())}") from error
    except OSError as error:
        if not offline:
            raise
        raise HubError(_without_network(what, was_offline)) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _without_network(what: str, switched_off: bool) -> str:
    from huggingface_hub import constants

    why = (
        "HF_HUB_OFFLINE is set"
        if switched_off
        else f"{constants.ENDPOINT} does not answer (HF_ENDPOINT names another)"
    )
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
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, revision = split_revision(repo_id)
    with asked(repo_id):
        try:
            return Path(hf_hub_download(name, filename, revision=revision))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
    return None


def cached(repo_id: str, filename: str) -> Path | None:
    """The same without the network: None where the cache does not have it."""
    from huggingface_hub import try_to_load_from_cache

    name, revision = split_revision(repo_id)
    found: Any = try_to_load_from_cache(name, filename, revision=revision)
    return Path(found) if isinstance(found, str) else None
