"""`hf-moe refresh`: writes the code of a checkpoint anew, and proves that the model answers as before.

Code in a checkpoint is as old as its last save, while Transformers moves on. A refresh replaces it by what the
installed package would write. Weights stay the same bytes; a refresh that fails leaves the checkpoint as it was.
"""

import argparse
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import AutoProcessor

from ..configuration.reading import PROCESSOR_FILES, check_files, is_path, read_text
from ..version import __version__
from .adapter_folder import is_adapter
from .bundle import add_processor_auto_map, has_own_processor, is_marked, mark_config, replace_text
from .card import refresh_digests
from .carried import renew
from .checkpoint_files import read_config
from .probe import ProbeAnswer, ask, probe_inputs, probed
from .push import Operation, commit_operations, next_version, set_tag, told_failures


# Share of the largest logit: two processes, and two versions, may sum in another order.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class RefreshResult:
    """What a refresh did."""

    changed: list[str]  # the files that were written
    removed: list[str]  # the files of code that are no longer needed
    kept: list[str]  # a user's files of code, which only the checkpoint has; they stay as they are
    # Or "installed classes" where the old code no longer runs, or "nothing" where these lack a mechanism too.
    compared_with: str = "old code"
    compared_on: tuple[str, ...] = ()  # the modalities that stood in the inputs of both
    difference: float | None = 0.0  # the largest between the logits, `None` where nothing is compared
    old_error: str | None = None  # why the old code does not run
    commit: str | None = None  # of the repository, after a push


def refresh_checkpoint(
    source: str | Path, *, revision: str | None = None, push: bool = False, token: str | bool | None = None
) -> RefreshResult:
    """Write the code of a checkpoint anew, after a check that the model answers as before.

    The check runs the code of the checkpoint: refresh what you trust.

    Args:
        source (`str` or `Path`): a checkpoint's folder, which is replaced as a whole; or the name of a repository.
        revision (`str`, *optional*): branch of the repository.
        push (`bool`, *optional*, defaults to `False`): commit the result to the repository; without it nothing is
            changed there.
        token (`str` or `bool`, *optional*): as in `huggingface_hub`.

    Raises:
        FileNotFoundError: if there is no such folder, or something is missing in it.
        ValueError: if it is no model of this library, a mechanism is nowhere to be found, or the logits differ.
        PushError: if the Hub refuses or cannot be reached.
    """
    if is_path(str(source)):
        if push:
            raise ValueError(f"push is for a repository: run `hf-moe push {source} user/name` after the refresh.")
        return _refresh_folder(Path(source))
    return _refresh_repository(str(source), revision, push, token)


def _refresh_folder(source: Path) -> RefreshResult:
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder {source}.")
    # Beside the old folder, so that links into folders above it stay true, and one rename puts it in place.
    folder = source.resolve()
    with _temporary_folder(folder.parent, folder.name) as fresh, _temporary_folder(folder.parent, folder.name) as old:
        shutil.copytree(folder, fresh, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        result = _renew(folder, Path(fresh))
        if result.changed or result.removed:
            os.replace(folder, old)
            try:
                os.replace(fresh, folder)
            except BaseException:
                os.replace(old, folder)
                raise
    return result


def _refresh_repository(repo_id: str, revision: str | None, push: bool, token: str | bool | None) -> RefreshResult:
    api = HfApi(token=token)
    with told_failures(api, repo_id, "Nothing has been changed."):
        commit = str(api.model_info(repo_id, revision=revision).sha)
        snapshot = Path(api.snapshot_download(repo_id, revision=commit))
        version = next_version(api, repo_id, True, plain=push and revision is None)
    with _temporary_folder(None, repo_id.rpartition("/")[2]) as scratch:
        fresh = Path(scratch)
        shutil.copytree(snapshot, fresh, copy_function=_link_to_blob, dirs_exist_ok=True)
        result = _renew(snapshot, fresh)
        if not push or not (result.changed or result.removed):
            return result

        def operations(remote: list[str]) -> list[Operation]:
            return [
                *(CommitOperationDelete(path_in_repo=name) for name in result.removed if name in remote),
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=fresh / name) for name in result.changed),
            ]

        with told_failures(api, repo_id, "Run the same refresh again."):
            if str(api.model_info(repo_id, revision=revision).sha) != commit:
                raise ValueError(f"Somebody else has pushed to {repo_id} since {commit} was checked: refresh again.")
            made = commit_operations(api, repo_id, operations, revision=revision, message="Refresh the code")
            if version is not None:
                set_tag(api, repo_id, version, made.oid, fixed=False)
    return replace(result, commit=made.oid)


def _renew(folder: Path, fresh: Path) -> RefreshResult:
    """Write the new code into `fresh`, a copy of `folder`, and check it."""
    if is_adapter(folder):
        raise ValueError(f"{folder} is an adapter (adapter_config.json): it holds no code. Refresh its base model.")
    config = read_config(folder)
    check_files(folder, PROCESSOR_FILES)
    old = {path.name: read_text(path) for path in sorted(folder.glob("*.py")) if is_marked(path)}
    has_processor = has_own_processor(config) and (folder / "processor_config.json").is_file()
    renewed = renew(config, old, has_processor)
    if renewed.unknown:
        missing = " and ".join(f"the {kind} {name!r}" for kind, name in renewed.unknown)
        raise ValueError(
            f"{folder} needs {missing}, which neither hf-moe {__version__} nor the checkpoint has: import the file "
            "that registers it and call hf_moe.hub.refresh.refresh_checkpoint."
        )
    for name in old.keys() - renewed.files.keys():
        (fresh / name).unlink()
    for name, text in renewed.files.items():
        replace_text(fresh / name, text)
    mark_config(config)
    replace_text(fresh / "config.json", config.to_json_string())
    if has_processor:
        add_processor_auto_map(fresh)
    if (folder / "README.md").is_file():
        replace_text(fresh / "README.md", refresh_digests(read_text(folder / "README.md"), fresh))
    written = sorted([*renewed.files, "config.json", "processor_config.json", "tokenizer_config.json", "README.md"])
    changed = [name for name in written if _content(folder / name) != _content(fresh / name)]
    removed = sorted(old.keys() - renewed.files.keys())
    result = RefreshResult(changed, removed, sorted(renewed.carried))
    return _checked(folder, fresh, config, result) if changed or removed else result


def _checked(folder: Path, fresh: Path, config: Any, result: RefreshResult) -> RefreshResult:
    """Compare what the checkpoint answers before and after, each in a process without the package."""
    inputs = probe_inputs(config, processor=None if has_own_processor(config) else _processor(folder))
    with tempfile.TemporaryDirectory() as scratch:

        def answer(where: Path, installed: bool = False) -> ProbeAnswer:
            return ask(where, inputs, Path(scratch), installed)

        after = answer(fresh)
        if after.error or after.wrong:
            wrong = "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in after.wrong.items())
            raise ValueError(
                f"{folder} does not open with the code of hf-moe {__version__} under Transformers "
                f"{transformers.__version__} ({after.error or wrong}); it stays as it was."
            )
        before, compared_with = answer(folder), "old code"
        old_error = before.error
        if old_error and not result.kept:
            before, compared_with = answer(folder, installed=True), "installed classes"
    if before.logits is None or after.logits is None:
        return replace(result, compared_with="nothing", difference=None, old_error=old_error)
    difference = (after.logits - before.logits).abs().max().item()
    tolerance = max(TOLERANCE, torch.finfo(getattr(torch, after.dtype)).eps)
    allowed = tolerance * max(1.0, before.logits.abs().max().item())
    # A difference that is no number is refused too.
    if not difference <= allowed:
        raise ValueError(
            f"The code of hf-moe {__version__} gives {folder} other logits than the {compared_with}: they differ by "
            f"{difference:.1e} where {allowed:.1e} is allowed. The checkpoint stays as it was."
        )
    compared = {"compared_with": compared_with, "compared_on": probed(config, inputs), "difference": difference}
    return replace(result, **compared, old_error=old_error)


def _processor(folder: Path) -> Any:
    """Return a host's own processor; `None` where it cannot be opened."""
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, OSError, ValueError):
        return None


def _temporary_folder(parent: Path | None, name: str) -> tempfile.TemporaryDirectory:
    """Make a folder that is removed in the end, unless it was renamed."""
    return tempfile.TemporaryDirectory(prefix=f".{name}.", dir=parent, ignore_cleanup_errors=True)


def _link(source: str, target: str) -> None:
    """Give a file a second name; copy it where the file system cannot."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target)


def _link_to_blob(source: str, target: str) -> None:
    os.symlink(os.path.realpath(source), target)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe refresh`."""
    parser.add_argument("source", help="a checkpoint's folder, or user/name on the Hub; its code is run")
    parser.add_argument("--push", action="store_true", help="commit the new code to the repository")
    parser.add_argument("--revision", metavar="BRANCH", help="of the repository; default: main")


def run(args: argparse.Namespace) -> int:
    """Run `hf-moe refresh`."""
    result = refresh_checkpoint(args.source, revision=args.revision, push=args.push)
    if not result.changed and not result.removed:
        print(f"{args.source} has the code of hf-moe {__version__} already.")
        return 0
    for verb, names in {"written": result.changed, "removed": result.removed, "kept": result.kept}.items():
        print("".join(f"  {verb:8} {name}\n" for name in names), end="")
    if result.old_error:
        print(f"The old code does not run under Transformers {transformers.__version__}: {result.old_error}")
    if result.difference is None:
        print("So the answers could not be compared: the new code opens the checkpoint and reads every tensor of it.")
    else:
        place = result.compared_with + (f", on {' and '.join(result.compared_on)}" if result.compared_on else "")
        print(f"Largest difference of the logits from those of the {place}: {result.difference:.1e}")
    if result.commit:
        print(f"commit {result.commit}")
    elif not is_path(args.source):
        print(f"Nothing was changed in {args.source}: add --push.")
    return 0
