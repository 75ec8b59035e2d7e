"""Fetches a checkpoint from the Hugging Face Hub: JSON, tokenizer and safetensors, nothing else.

Pickle files and code are never asked for, whatever a repository offers. Family, size and free disk
are checked before the weights are fetched, sizes and hashes after. Files land in the Hub's own
cache, so another build of the same model fetches nothing. Knows nothing of building.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assistant.modelkit.shape import ModelShape
from assistant.modelkit.weights import INDEX, WHOLE, CheckpointError, read_json, shards

Progress = Callable[[str], None]

#: 1.5 billion weights, the most this engine is meant for, take 6 GB in full precision.
MOST_GB = 8.0
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "inhouse.json",
    INDEX,
)
_MOST_SMALL_GB = 0.25
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TIMEOUT_S = 30.0


class HubError(CheckpointError):
    """A checkpoint was not fetched. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A file that a repository offers; ``sha256`` is "" where the Hub does not say it."""

    bytes: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class _Repo:
    """One commit of a repository, and where its files go."""

    id: str
    commit: str
    files: dict[str, Remote]
    endpoint: str
    cache_dir: Path

    @property
    def page(self) -> str:
        return f"{self.endpoint}/{self.id}"

    def cached(self, name: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.id, name, cache_dir=self.cache_dir, revision=self.commit
        )
        return isinstance(found, str)

    def fetch(self, name: str) -> Path:
        """The file in the cache, its size and hash compared. Raises: HubError."""
        from huggingface_hub import hf_hub_download

        with _explained(self.id, self.page, f"downloading {name}"):
            path = hf_hub_download(
                self.id,
                name,
                revision=self.commit,
                endpoint=self.endpoint,
                cache_dir=self.cache_dir,
            )
        self._verify(name, Path(path))
        return Path(path)

    def _verify(self, name: str, path: Path) -> None:
        wanted, found = self.files[name], path.stat().st_size
        if found == wanted.bytes and wanted.sha256 in ("", _sha256(path)):
            return
        path.resolve().unlink()  # or the cache would hand out the bad file for ever
        path.unlink(missing_ok=True)
        raise HubError(
            f"{name} of {self.id} arrived altered: {found} bytes of {wanted.bytes}, or another "
            "SHA-256 than the Hub names. It was thrown away; run the command again."
        )


def is_hub_id(source: str) -> bool:
    """Whether ``source`` is a name on the Hub and can be no folder here."""
    path = Path(source)
    return bool(_REPO.fullmatch(source)) and not path.exists() and not path.parent.is_dir()


def download(
    repo_id: str,
    progress: Progress,
    *,
    revision: str = "main",
    most_gb: float = MOST_GB,
    any_family: bool = False,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The folder of the fetched checkpoint. ``any_family``: whoever builds it knows more families.

    Raises: HubError; CheckpointError where its ``config.json`` is of no use here.
    """
    repo = _look_up(repo_id, revision, endpoint, cache_dir)
    small = [name for name in _SMALL if name in repo.files]
    if "config.json" not in small or "tokenizer.json" not in small:
        lacking = next(name for name in ("config.json", "tokenizer.json") if name not in small)
        raise HubError(f"{repo_id} offers no {lacking}, which a build needs. Choose another model.")
    _refuse_too_much(repo, small, min(most_gb, _MOST_SMALL_GB))
    paths = [repo.fetch(name) for name in small]
    folder = paths[0].parent
    if not any_family:
        ModelShape.from_config(read_json(folder / "config.json"))
    weights = _weights(repo, folder)
    _refuse_too_much(repo, [*small, *weights], most_gb)
    for number, name in enumerate(weights, 1):
        size = repo.files[name].bytes / 1e9
        known = ", here already" if repo.cached(name) else ""
        progress(f"fetching {name} ({size:.2f} GB), {number} of {len(weights)}{known}")
        repo.fetch(name)
    return folder


def _look_up(repo_id: str, revision: str, endpoint: str | None, cache_dir: Path | None) -> _Repo:
    from huggingface_hub import HfApi, constants

    endpoint = endpoint or constants.ENDPOINT
    with _explained(repo_id, f"{endpoint}/{repo_id}", f"asking for revision {revision!r}"):
        info = HfApi(endpoint=endpoint).model_info(
            repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
        )
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise HubError(f"{endpoint} names no commit for {repo_id}. Check HF_ENDPOINT.")
    files = {
        one.rfilename: Remote(one.size, one.lfs.sha256 if one.lfs else "")
        for one in info.siblings or ()
        if one.size is not None
    }
    return _Repo(repo_id, commit, files, endpoint, cache_dir or Path(constants.HF_HUB_CACHE))


def _weights(repo: _Repo, folder: Path) -> list[str]:
    """The safetensors files that together are the model. Raises: HubError."""
    if WHOLE in repo.files:
        return [WHOLE]
    if INDEX in repo.files:
        names = sorted(set(shards(folder).values()))
        for name in names:
            if name not in repo.files:
                raise HubError(f"{repo.id} lacks the shard {name}, which its index names.")
        return names
    pickle = next((name for name in repo.files if name.endswith(_PICKLE_SUFFIXES)), None)
    also = (
        f" It has {pickle[:100]!r}, a pickle: it could run code, so it never is." if pickle else ""
    )
    raise HubError(
        f"{repo.id} offers no {WHOLE}.{also} Choose a model stored as safetensors (many "
        "repositories have one under another revision: --revision)."
    )


def _refuse_too_much(repo: _Repo, names: Sequence[str], most_gb: float) -> None:
    total = sum(repo.files[name].bytes for name in names)
    if not total <= most_gb * 1e9:  # "nan" bounds nothing
        raise HubError(
            f"{', '.join(names[:3])} ... of {repo.id} take {total / 1e9:.2f} GB, and at most "
            f"{most_gb:.2f} GB are fetched. For weights, --max-download-gb allows more."
        )
    missing = sum(repo.files[name].bytes for name in names if not repo.cached(name))
    there = next(one for one in (repo.cache_dir, *repo.cache_dir.parents) if one.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise HubError(
            f"{repo.id} takes {missing / 1e9:.2f} GB, and the disk of {repo.cache_dir} has "
            f"{free / 1e9:.2f} GB free. Free some, or set HF_HOME to a folder on a larger disk."
        )


@contextmanager
def _explained(repo_id: str, page: str, doing: str) -> Iterator[None]:
    """Turns whatever huggingface_hub raises (its versions differ) into one line with a cure."""
    try:
        yield
    except Exception as error:
        raise HubError(_explanation(error, repo_id, page, doing)) from error


def _explanation(error: Exception, repo_id: str, page: str, doing: str) -> str:
    from huggingface_hub import errors

    chain = list(_causes(error))
    status = next(filter(None, map(_status, chain)), None)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if any(isinstance(one, OSError) and one.errno == errno.ENOSPC for one in chain):
        return (
            f"The disk is full while {doing} of {repo_id}. Free some space, or set HF_HOME to a "
            "folder on a larger disk; what is complete is kept."
        )
    if caused_by(errors.GatedRepoError) or status == 403:
        return (
            f"{repo_id} is gated: accept its terms on {page}, then set HF_TOKEN to a token of that "
            "account and run the command again."
        )
    if caused_by(errors.RevisionNotFoundError):
        return f"{repo_id} has no such revision ({doing}). See {page}/tree/main for its branches."
    if caused_by(errors.RepositoryNotFoundError, errors.HFValidationError) or status in (401, 404):
        return (
            f"There is no folder {repo_id} here and no model of this name on {page}, or it is "
            "private. Check the name; for a private model set HF_TOKEN."
        )
    if status is not None:
        return f"{page} answered {status} while {doing}. Run the command again later."
    if caused_by(errors.OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, so {repo_id} is not fetched. Unset it, or pass the folder of "
            "a checkpoint."
        )
    what = (str(error).strip().splitlines() or [""])[0][:200]
    return (
        f"No network, or the download broke, while {doing} of {repo_id} ({type(error).__name__}: "
        f"{what}). Run the command again (what has arrived is kept), or copy the checkpoint here "
        "and pass its folder."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
