"""The push methods that users know from Transformers, leaving what `hf-moe push` leaves."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard

from .card import refresh_digests, write_card
from .push import loading_snippet, next_version, set_tag


def push_model(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload a model with its code, card and license in one commit, and print the commit and how to load it.

    A card that is already in the repository stays, with the digests of the code brought up to date; a new one states
    no results, as none are known here. Commits on `main` are tagged v1, v2, ... as those of `hf-moe push`. The
    processor follows with `processor.push_to_hub`.

    Args:
        model (`Any`): an `HfMoeForConditionalGeneration`.
        repo_id (`str`): `user/name`, created when it does not exist.
        tags (`list[str]`, *optional*): added to those of the card.

    The other arguments are those of Transformers' `push_to_hub`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    version = next_version(api, repo_id, True, plain=revision is None and not create_pr)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / repo_id.split("/")[-1]
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        path = write_card(folder, model=model, report={})
        card = ModelCard.load(path)
        if api.file_exists(repo_id, path.name, revision=revision):
            kept = api.hf_hub_download(repo_id, path.name, revision=revision, local_dir=Path(scratch) / "kept")
            card = ModelCard(refresh_digests(Path(kept).read_text(encoding="utf-8"), folder))
        else:
            card.content = card.content.replace(f'"{folder.name}"', f'"{repo_id}"')
        card.data.tags = [*(card.data.tags or []), *(tag for tag in tags or [] if tag not in (card.data.tags or []))]
        card.save(path)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            # Shards of a larger model must not outlive it.
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
        if version is not None:
            version = set_tag(api, repo_id, version, commit.oid, fixed=False)
        print(f"{commit.pr_url or commit.commit_url}\ncommit {commit.oid}" + (f", tag {version}" if version else ""))
        print(f"\n{loading_snippet(folder, repo_id, commit.oid)}", end="")
    return commit
