"""Files of the Hugging Face hub: the local cache first, then one quick question to the hub, then the download.

A file that is in the cache is used as it is, and the network is left alone; HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE,
HF_ENDPOINT and the proxies mean what they mean to huggingface_hub. Without an answer from the hub this ends in
seconds, where huggingface_hub by itself goes on trying for half a minute to some minutes.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants, utils
from huggingface_hub.file_download import repo_folder_name

from patchssl.runtime.errors import CheckpointError, UsageError
from patchssl.runtime.yamltext import load_json

T = TypeVar("T")
ANSWER_SECONDS = 5  # the look-up of the hub's name included
JSON_BYTES = 10**6
LOGIN = "run 'hf auth login' or set HF_TOKEN"


def hub_file(repo: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The first of the files `names` that the repository `repo` has, as a path in the local cache.

    One of them that is in the cache is taken without a look at the hub. UsageError for a name that no repository
    can have; CheckpointError for a file that is neither in the cache nor to be had.
    """
    return _get(_asked(repo, names, revision))


def hub_json(repo: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """The table in a small JSON file of `repo`, as config.json; CheckpointError as well if it is damaged or large."""
    asked = _asked(repo, [name], revision)
    path = _get(asked, JSON_BYTES)
    anew = f"delete the folder {asked.folder} to download it anew"
    if path.stat().st_size > JSON_BYTES:
        raise _too_large(asked, path.stat().st_size, JSON_BYTES)
    try:
        table = load_json(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{asked} is damaged, it cannot be read as JSON ({error}); {anew}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{asked} holds a JSON {type(table).__name__}, not a table; {anew}")
    return table


def upload_folder(folder: Path, repo: str, *, private: bool = False, message: str) -> str:
    """Upload all files of `folder` to the repository `repo`, USER/NAME, and return its address.

    The repository is made if it is not there, and must be private if `private`; `message` is the commit's. UsageError
    for a folder that is not there or a wrong name, CheckpointError where the hub cannot be reached or refuses.
    """
    _require_name(repo)
    if "/" not in repo:
        raise UsageError(f"'{repo}' does not say whose repository it is; write USER/{repo}")
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    what = f"{folder} cannot be uploaded to {repo}"
    failure = f"{_host()} cannot be reached"
    try:
        api = _logged_in()
        failure = "the upload broke off"
        address = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo, timeout=_seconds()).private:
            raise CheckpointError(f"{what} as private: the repository is there and public; choose another name, or "
                                  f"make it private at {constants.ENDPOINT}/{repo}/settings")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except CheckpointError:
        raise
    except Exception as error:  # of whichever HTTP library huggingface_hub uses, which explains all but no connection
        explained = _status(error) or isinstance(error, utils.LocalTokenNotFoundError)
        why = _reason(error) if explained else f"{failure} ({_reason(error)})"
        raise CheckpointError(f"{what}: {why}") from error
    return str(address)


# which file ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _WantedFiles:
    """Files of a repository; the first that is there is wanted."""

    repo: str
    names: tuple[str, ...]
    revision: str | None

    def __str__(self) -> str:
        return f"{' or '.join(self.names)} of {self.repo}" + (f", revision {self.revision}," if self.revision else "")

    @property
    def folder(self) -> Path:
        """The folder of the repository in the cache."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo, repo_type="model")

    @property
    def elsewhere(self) -> str:
        """What to do without a network here."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return (f"run 'hf download {self.repo} {self.names[0]}{revision}' on a machine with a network and copy "
                f"{self.folder.name} from its cache to {self.folder.parent}, or set HF_HOME to a copy of its cache")

    def refusal(self, why: str, remedy: str) -> CheckpointError:
        """The error that says what is missing, where, why, and what to do."""
        return CheckpointError(f"{self} is not in the cache {constants.HF_HUB_CACHE} and cannot be downloaded: {why}; "
                               f"{remedy}")


def _asked(repo: str, names: Sequence[str], revision: str | None) -> _WantedFiles:
    _require_name(repo)
    if revision is not None and (not revision.isprintable() or re.search(r"^$|^/|\.\.|[\\ ]", revision)):
        raise UsageError(f"'{revision}' is no revision of {repo}; write a branch, a tag or a commit")
    return _WantedFiles(repo, tuple(names), revision)


def _require_name(repo: str) -> None:
    try:
        utils.validate_repo_id(repo)
    except ValueError:
        raise UsageError(f"'{repo}' cannot be a repository on the hub; write ORG/NAME, or NAME alone, of letters, "
                         "digits and single '-', '_' and '.'") from None


# cache and download --------------------------------------------------------------------------------------------


def _get(asked: _WantedFiles, largest: int | None = None) -> Path:
    """The first of the files there is, of at most `largest` bytes if it must be downloaded."""
    if (found := _in_cache(asked)) is not None:
        return found
    name = _name_on_hub(asked, largest)
    try:
        return Path(huggingface_hub.hf_hub_download(asked.repo, name, revision=asked.revision,
                                                    cache_dir=constants.HF_HUB_CACHE))
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        raise asked.refusal(*_explain(error, asked, "the download broke off")) from error


def _in_cache(asked: _WantedFiles) -> Path | None:
    """The first of the files that is in the cache."""
    for name in asked.names:
        try:
            found = huggingface_hub.try_to_load_from_cache(asked.repo, name, cache_dir=constants.HF_HUB_CACHE,
                                                           revision=asked.revision)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{asked} cannot be looked for in the cache: {error}; delete the folder "
                                  f"{asked.folder} to download it anew") from None
        if isinstance(found, str):  # otherwise None, or the object that stands for "is not in the repository"
            return Path(found)
    return None


def _name_on_hub(asked: _WantedFiles, largest: int | None) -> str:
    """The first of the names that the hub has; each is asked for once, without the repetitions of a download."""
    absent: Exception | None = None
    for name in asked.names:
        url = huggingface_hub.hf_hub_url(asked.repo, name, revision=asked.revision)
        try:
            facts = _in_time(partial(huggingface_hub.get_hf_file_metadata, url, timeout=_seconds()))
        except Exception as error:
            if not _is_absent(error):
                raise asked.refusal(*_explain(error, asked, f"{_host()} cannot be reached")) from error
            absent = error
            continue
        if largest is not None and (facts.size or 0) > largest:
            raise _too_large(asked, facts.size or 0, largest)
        return name
    if absent is not None and not isinstance(absent, utils.EntryNotFoundError):
        raise asked.refusal(*_explain(absent, asked, ""))  # a 404 without the hub's word for what was not found
    raise asked.refusal(f"the repository has no such file{'s' * (len(asked.names) > 1)}",
                        f"see which it has at {constants.ENDPOINT}/{asked.repo}/tree/{asked.revision or 'main'}")


def _in_time(ask: Callable[[], T]) -> T:
    """What `ask` returns or raises; NoAnswer if it takes too long. The look-up of a name has no limit of its own."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(_seconds())


def _seconds() -> int:
    """How long the hub may take to answer; HF_HUB_ETAG_TIMEOUT sets it for slow networks."""
    asked = constants.HF_HUB_ETAG_TIMEOUT
    return ANSWER_SECONDS if asked == constants.DEFAULT_ETAG_TIMEOUT else asked


# what went wrong -----------------------------------------------------------------------------------------------


def _explain(error: BaseException, asked: _WantedFiles, failure: str) -> tuple[str, str]:
    """Why a file could not be had, and what to do; `failure` is what happened if the hub itself said nothing."""
    if isinstance(error, utils.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # it only says that the file is not in the cache
    status, page = _status(error), f"{constants.ENDPOINT}/{asked.repo}"
    if isinstance(error, utils.GatedRepoError) or status == 403:
        return f"access is refused (HTTP {status}{_words(error)})", f"ask for access at {page}, then {LOGIN}"
    if isinstance(error, utils.RevisionNotFoundError):
        return f"the repository has no revision {asked.revision or 'main'}", f"see which it has at {page}"
    if status == 401 and _sent_token(error):
        return "the hub refuses the token of this machine (HTTP 401)", LOGIN
    if isinstance(error, utils.RepositoryNotFoundError) or status == 401:
        return (f"the repository does not exist, or is private or gated (HTTP {status})",
                f"look for {page}, and if you may read it, {LOGIN}")
    if status:
        return f"{_host()} answers HTTP {status}{_words(error)}", f"try again later, or {asked.elsewhere}"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, NoAnswer):
        return f"the cache cannot be written ({error.strerror})", "make room, or set HF_HOME to a folder with room"
    return f"{failure} ({_reason(error)})", f"try again, or {asked.elsewhere}"


def _logged_in() -> huggingface_hub.HfApi:
    """The hub's interface with this machine's token, once the hub has answered: what follows has no time limit."""
    api = huggingface_hub.HfApi(token=True)
    try:
        _in_time(api.whoami)
    except Exception as error:
        if _status(error) in (None, 401):
            raise
        # any other answer is one: a hub may hold back whose token it is and still take files
    return api


def _too_large(asked: _WantedFiles, size: int, largest: int) -> CheckpointError:
    return CheckpointError(f"{asked} is {size:,} bytes large, more than the {largest:,} that are read; it is not the "
                           "small file that is needed")


def _is_absent(error: Exception) -> bool:
    """Whether the hub has the repository and the revision, but not the file; mirrors may send the bare number."""
    other = isinstance(error, utils.RepositoryNotFoundError | utils.RevisionNotFoundError)
    return _status(error) == 404 and not other


def _status(error: BaseException) -> int | None:
    """The HTTP status of the hub's answer, if it answered."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _words(error: BaseException) -> str:
    """The hub's own words about its answer, if any."""
    words = getattr(error, "server_message", None)
    return f": {_line(str(words))}" if words else ""


def _reason(error: BaseException) -> str:
    if isinstance(error, NoAnswer) and not str(error):
        return f"no answer within {_seconds()} s; HF_HUB_ETAG_TIMEOUT sets how many"
    return _line(str(error)) or type(error).__name__


def _line(text: str) -> str:
    """`text` in one line of limited length."""
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"{text[:400]}..."


def _host() -> str:
    return urlsplit(constants.ENDPOINT).netloc or constants.ENDPOINT


def _sent_token(error: BaseException) -> bool:
    """Whether the question that the hub refused bore a token."""
    request = getattr(getattr(error, "response", None), "request", None)
    return "authorization" in getattr(request, "headers", {})
