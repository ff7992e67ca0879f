"""Pushes a checkpoint to the Hub: one commit that holds everything a reader needs, or none."""

import argparse
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import httpx, validate_repo_id

from .adapter_folder import adapter_snippet, is_adapter, needed_files
from .checkpoint_files import check_whole, read_config, weights_files
from .host_facts import auto_model, auto_processor, modalities
from .leaks import find_leaks
from .results import check_evaluation


IGNORED = {".cache", ".DS_Store", ".git", ".ipynb_checkpoints", "__pycache__"}
# A push replaces these as a whole: no shard, code or result of an older push may outlive it.
REPLACED = ("*.py", "*.safetensors", "*.safetensors.index.json", f"{constants.EVAL_RESULTS_FOLDER}/*")
RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
RETRY_WAITS = (1, 2, 4, 8)  # seconds
# The client wraps what stops the upload of one file in a RuntimeError.
FAILURES = (HfHubHTTPError, httpx.TransportError, RuntimeError, OfflineModeIsEnabled)

Operation = CommitOperationAdd | CommitOperationDelete

SNIPPET = """\
from transformers import {auto_class}, {auto_processor}

checkpoint, commit = "{repo_id}", "{commit}"
{name} = {auto_processor}.from_pretrained(checkpoint, revision=commit, trust_remote_code=True)
model = {auto_class}.from_pretrained(checkpoint, revision=commit, trust_remote_code=True)
"""


class PushError(OSError):
    """A push that the Hub did not take; the message says what is on the Hub now and how to go on."""


@dataclass(frozen=True)
class PushResult:
    """What a push left on the Hub."""

    repo_id: str  # with its owner
    commit: str | None  # 40 hex digits; `None` after a dry run
    url: str | None  # of the commit or of the pull request
    files: dict[str, int]  # path to size in bytes
    tag: str | None  # the version that names the commit
    snippet: str  # the code that loads exactly this commit


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    gated: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | bool = True,
    token: str | bool | None = None,
    message: str = "Upload checkpoint",
    dry_run: bool = False,
) -> PushResult:
    """Upload a complete checkpoint in one commit.

    The commit replaces code, weights and evaluation results of an older push and leaves other files alone. Until it
    exists the repository is as it was, so a push that fails can be repeated; what has arrived is not sent twice.

    Args:
        folder (`str` or `Path`): the checkpoint: config, safetensors, code, processor and card.
        repo_id (`str`): `user/name`; created when it does not exist.
        private (`bool`, *optional*): whether a new repository is private; must agree with an existing one.
        gated (`str`, *optional*): `"auto"` or `"manual"`: who wants the files must ask first. Set before anything is
            uploaded.
        revision (`str`, *optional*): branch, created when it does not exist; `main` when absent.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead.
        tag (`str` or `bool`, *optional*, defaults to `True`): the name of the version; `True` takes the next of v1,
            v2, ... for a commit on `main` and none elsewhere, `False` none at all.
        token (`str` or `bool`, *optional*): as in `huggingface_hub`; the one that `hf auth login` has stored when
            absent.
        message (`str`, *optional*, defaults to `'Upload checkpoint'`): of the commit.
        dry_run (`bool`, *optional*, defaults to `False`): check everything and list the files, without a connection.

    Raises:
        FileNotFoundError: if the checkpoint is incomplete.
        ValueError: if it holds what must not be published, naming file and line, if its card states a result that no
            evaluation file holds, or if an option contradicts the repository.
        PushError: if the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("create_pr opens a pull request against main: leave revision out.")
    files = checkpoint_files(folder)
    leaks = find_leaks(folder, files)
    if leaks:
        raise ValueError(f"{folder} holds what should not be published, remove it first:\n  " + "\n  ".join(leaks))
    check_evaluation(folder)
    if dry_run:
        return PushResult(repo_id, None, None, files, None, loading_snippet(folder, repo_id, "main"))

    api = HfApi(token=token)
    with told_failures(api, repo_id, "Nothing has been uploaded."):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        before = _prepare(api, repo_id, private, gated, revision)
        version = next_version(api, repo_id, tag, plain=revision is None and not create_pr)
    rest = (
        f"No new commit is known: {revision or 'main'} of {repo_id} was at {before}, which loads as before. Run the "
        "same push again; files that have arrived are not sent twice."
    )
    with told_failures(api, repo_id, rest):
        operations = partial(_operations, folder, files, repo_id)
        commit = commit_operations(api, repo_id, operations, revision=revision, create_pr=create_pr, message=message)
    rest = (
        f"The checkpoint is complete at {commit.commit_url}, but the tag {version} is missing. Run the same push "
        "again; it sends no file twice."
    )
    if version is not None:
        with told_failures(api, repo_id, rest):
            version = set_tag(api, repo_id, version, commit.oid, fixed=isinstance(tag, str))
    url = commit.pr_url or commit.commit_url
    return PushResult(repo_id, commit.oid, url, files, version, loading_snippet(folder, repo_id, commit.oid))


def checkpoint_files(folder: Path) -> dict[str, int]:
    """Return the files of a checkpoint and their sizes; refuse one that lacks something, or with a damaged file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    inside = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: path.stat().st_size for name, path in inside.items() if not IGNORED & set(Path(name).parts)}
    if "config.json" not in files and not is_adapter(folder):
        raise FileNotFoundError(f"{folder} holds no config.json: it is no checkpoint. Push runs/<name>/checkpoint.")
    missing = [name for name in _needed(folder) if name not in files]
    if missing:
        raise FileNotFoundError(
            f"{folder} is no complete checkpoint, it lacks {', '.join(missing)}. Save the model and the processor to "
            "it with save_pretrained, and write the card with hf_moe.hub.card.write_card."
        )
    if not is_adapter(folder):
        check_whole(folder)
    return files


def _needed(folder: Path) -> Iterator[str]:
    """Yield the files that the checkpoint cannot do without."""
    if is_adapter(folder):
        yield from needed_files(folder)
        return
    config = read_config(folder)
    yield from sorted({f"{target.partition('.')[0]}.py" for target in (config.auto_map or {}).values()})
    yield from weights_files(folder)
    yield from ["processor_config.json"] if modalities(config) != ("text",) else []
    yield from ("tokenizer_config.json", "README.md")


def _prepare(api: HfApi, repo_id: str, private: bool | None, gated: str | None, revision: str | None) -> str:
    """Make repository and branch ready and return the commit that the push builds on."""
    info = api.model_info(repo_id)
    if private is not None and bool(info.private) != private:
        seen = "private" if info.private else "public"
        raise ValueError(f"{repo_id} exists and is {seen}: leave `private` out, or change its settings first.")
    if gated is not None:
        api.update_repo_settings(repo_id, gated=gated)  # type: ignore[arg-type]  # the client refuses other words
    if revision is None:
        return str(info.sha)
    if not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return str(api.model_info(repo_id, revision=revision).sha)


def commit_operations(
    api: HfApi,
    repo_id: str,
    operations: Callable[[list[str]], list[Operation]],
    *,
    revision: str | None,
    create_pr: bool = False,
    message: str,
) -> CommitInfo:
    """Make a commit, again where the Hub is busy or the connection breaks.

    The client repeats its uploads by itself, but not the commit: an answer may be lost after it was made. Here every
    attempt begins by asking what the repository holds, so such a commit is found and not made twice. A pull request
    could not be found so, and is repeated only after the Hub has answered that it is not there. The operations are
    made for the paths that the repository holds.
    """
    for wait in (*RETRY_WAITS, None):
        try:
            info = api.model_info(repo_id, revision=revision)
            return api.create_commit(
                repo_id,
                operations([sibling.rfilename for sibling in info.siblings or []]),
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=info.sha,
            )
        except HfHubHTTPError as error:
            if wait is None or error.response.status_code not in RETRIED_STATUS:
                raise
        except httpx.TransportError:
            if wait is None or create_pr:
                raise
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _operations(folder: Path, files: dict[str, int], repo_id: str, remote: list[str]) -> list[Operation]:
    stale = [name for name in remote if name not in files and any(fnmatchcase(name, pattern) for pattern in REPLACED)]
    contents = {name: folder / name for name in files} | {"README.md": _card(folder, repo_id).encode()}
    return [
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()),
    ]


def _card(folder: Path, repo_id: str) -> str:
    """Return the card with the repository's id where its snippets name the folder."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    name = re.escape(folder.resolve().name)
    text = re.sub(rf'^checkpoint = "{name}".*$', f'checkpoint = "{repo_id}"', text, flags=re.MULTILINE)
    return re.sub(rf'model="{name}"', f'model="{repo_id}"', text)


def next_version(api: HfApi, repo_id: str, tag: str | bool, plain: bool) -> str | None:
    """Return the tag to set; refuse a taken one before anything is uploaded."""
    if tag is False or (tag is True and not plain):
        return None
    taken = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if isinstance(tag, str):
        if tag in taken:
            raise ValueError(f"{repo_id} has a tag {tag!r} already, for {taken[tag]}: choose another.")
        return tag
    numbers = [int(name[1:]) for name in taken if re.fullmatch(r"v\d+", name)]
    return f"v{max(numbers, default=0) + 1}"


def set_tag(api: HfApi, repo_id: str, version: str, commit: str, fixed: bool) -> str:
    """Name the commit; where nothing had changed it has a number already and keeps it."""
    names = [ref.name for ref in api.list_repo_refs(repo_id).tags if ref.target_commit == commit]
    if names and not fixed:
        return names[0]
    api.create_tag(repo_id, tag=version, revision=commit)
    return version


@contextmanager
def told_failures(api: HfApi, repo_id: str, rest: str) -> Iterator[None]:
    """Raise a `PushError` where the Hub refuses or cannot be reached: the reason, and the rest that is to be known."""
    try:
        yield
    except FAILURES as error:
        raise PushError(f"{_failure_reason(error, api, repo_id)} {rest}") from error


def _failure_reason(error: BaseException, api: HfApi, repo_id: str) -> str:
    """Return what went wrong and its remedy, as a sentence."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to push."
    if isinstance(error, RuntimeError):
        return f"{error} {_failure_reason(error.__cause__, api, repo_id)}" if error.__cause__ else f"{error}."
    if not isinstance(error, HfHubHTTPError):
        return f"The connection to {api.endpoint} failed ({type(error).__name__}: {error})."
    status = error.response.status_code
    if status == 403:
        return (
            f"The Hub does not let this token write to {repo_id} (403): take one with write access from "
            "https://huggingface.co/settings/tokens, or open a pull request with create_pr."
        )
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return (
            f"The Hub does not know this token, or {repo_id} is not its owner's ({status}): run `hf auth login`, or "
            "pass another token."
        )
    if status == 412:
        return f"Somebody else has pushed to {repo_id} meanwhile (412)."
    return f"The Hub answered {status}: {' '.join(str(error).split())}."


def loading_snippet(folder: Path, repo_id: str, commit: str) -> str:
    if is_adapter(folder):
        return adapter_snippet(folder, repo_id, commit)
    config = read_config(folder)
    return SNIPPET.format(
        auto_class=auto_model(config),
        auto_processor=auto_processor(config),
        name="tokenizer" if auto_processor(config) == "AutoTokenizer" else "processor",
        repo_id=repo_id,
        commit=commit,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe push`."""
    parser.add_argument("folder", help="the checkpoint, for example runs/demo/checkpoint")
    parser.add_argument("repo_id", help="user/name")
    parser.add_argument("--private", action="store_true", default=None, help="nobody else sees a new repository")
    parser.add_argument("--gated", choices=("auto", "manual"), help="who wants the files must ask first")
    parser.add_argument("--revision", metavar="BRANCH", help="default: main")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--tag", default=True, help="name of the version; default: the next of v1, v2, ...")
    parser.add_argument("--no-tag", dest="tag", action="store_false", help="name no version")
    parser.add_argument("--dry-run", action="store_true", help="check and list the files, upload nothing")


def run(args: argparse.Namespace) -> int:
    """Run `hf-moe push`."""
    names = ("private", "gated", "revision", "create_pr", "tag", "dry_run")
    result = push_checkpoint(args.folder, args.repo_id, **{name: getattr(args, name) for name in names})
    for name, size in result.files.items():
        print(f"{size:>14,}  {name}")
    print(f"{sum(result.files.values()):>14,}  bytes in {len(result.files)} files")
    if result.commit is None:
        print(f"Dry run: nothing was uploaded to {result.repo_id}.")
        return 0
    print(f"\n{result.url}\ncommit {result.commit}" + (f", tag {result.tag}" if result.tag else ""))
    print(f"\n{result.snippet}", end="")
    return 0
