"""A Space for a checkpoint: the application of `space_app.py` with requirements and metadata, ready to be pushed."""

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, SpaceCardData
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..configuration.saving import MINIMUM_TRANSFORMERS
from .checkpoint_files import read_config
from .host_facts import EXAMPLES, described_tokens, files_of, modalities, packages
from .push import PushError, told_failures


# The application is tested with these versions.
GRADIO_VERSION = "6.31.0"
PYTHON_VERSION = "3.11"
APPLICATION = "space_app.py"
# The application imports these files.
BESIDE = ("host_facts.py", "space_checkpoint.py", "space_drawings.py")

README = """\
---
{metadata}
---

# {name}

Ask [{repo_id}](https://huggingface.co/{repo_id}), a mixture-of-experts model, and see which experts {tokens} used,
layer by layer.
"""


def write_space(
    folder: str | Path, repo_id: str, output_dir: str | Path | None = None, *, revision: str | None = None
) -> Path:
    """Write a Gradio Space that loads a checkpoint from the Hub and needs nothing of this package.

    What the checkpoint's folder `examples` holds of what the model takes comes along: pictures, videos, sounds. Files
    of an earlier call are written anew.

    Args:
        folder (`str` or `Path`): the checkpoint, as it is or will be on the Hub.
        repo_id (`str`): `user/name` of the model; the Space gets the same name.
        output_dir (`str` or `Path`, *optional*): the folder to write, which is returned; `<folder>-space` when absent.
        revision (`str`, *optional*): commit, tag or branch of the model; `main` when absent.

    Raises:
        FileNotFoundError: if `folder` holds no checkpoint.
        ValueError: if `repo_id` is not `user/name`.
    """
    folder = check_folder(folder)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} has no owner: a Space names its model in full, user/name.")
    output = Path(output_dir or folder.resolve().with_name(f"{folder.resolve().name}-space"))
    output.mkdir(parents=True, exist_ok=True)

    config = read_config(folder)
    application = _source(APPLICATION).replace('CHECKPOINT = "user/name"', f'CHECKPOINT = "{repo_id}"')
    if revision is not None:
        application = application.replace("REVISION = None", f'REVISION = "{revision}"')
    requirements = ["torch", f"transformers>={MINIMUM_TRANSFORMERS}", *packages(config)]
    (output / "app.py").write_text(application, encoding="utf-8")
    for name in BESIDE:
        (output / name).write_text(_source(name), encoding="utf-8")
    (output / "requirements.txt").write_text("".join(f"{name}\n" for name in requirements), encoding="utf-8")
    (output / "README.md").write_text(_readme(folder, repo_id, modalities(config)), encoding="utf-8")
    for example in [path for name in modalities(config)[1:] for path in files_of(folder / EXAMPLES, name)]:
        (output / EXAMPLES).mkdir(exist_ok=True)
        shutil.copy(example, output / EXAMPLES)
    return output


def _source(name: str) -> str:
    """Return a file of the application as a Space has it, without the package."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return re.sub(r"^from \.(\w+) import", r"from \1 import", text, flags=re.MULTILINE)


def check_folder(folder: str | Path) -> Path:
    """Return the folder of a checkpoint; refuse one that holds none."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is no checkpoint. Take runs/<name>/checkpoint.")
    return folder


def push_space(output: Path, repo_id: str, *, revision: str | None = None, private: bool | None = None) -> str:
    """Upload a written Space in one commit and return the address of its page.

    Raises:
        PushError: if its model is not on the Hub, or the Hub refuses or cannot be reached.
    """
    api = HfApi()
    with told_failures(api, repo_id, "Nothing has been uploaded."):
        try:
            api.model_info(repo_id, revision=revision)
        except RepositoryNotFoundError as error:
            unknown = f"The Hub has no model {repo_id} that you can see: push it first, with `hf-moe push`."
            raise PushError(unknown) from error
    with told_failures(api, repo_id, "Run the same command again."):
        space = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        written = ["app.py", *BESIDE, "requirements.txt", "README.md", f"{EXAMPLES}/*"]
        api.upload_folder(
            repo_id=repo_id,
            repo_type="space",
            folder_path=output,
            allow_patterns=written,
            delete_patterns=f"{EXAMPLES}/*",
            commit_message="Upload the application",
        )
    return str(space)


def _readme(folder: Path, repo_id: str, taken: Sequence[str]) -> str:
    card = folder / "README.md"
    name = repo_id.split("/")[1]
    metadata = SpaceCardData(
        title=name,
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version=PYTHON_VERSION,
        app_file="app.py",
        models=[repo_id],
        license=ModelCard.load(card).data.get("license") if card.is_file() else None,
        tags=["moe", "hf_moe"],
        # A model of a few hundred million parameters takes a while to arrive and to load.
        startup_duration_timeout="1h",
    )
    return README.format(metadata=metadata.to_yaml(), name=name, repo_id=repo_id, tokens=described_tokens(taken))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe space`."""
    parser.add_argument("folder", help="the checkpoint, for example runs/demo/checkpoint")
    parser.add_argument("repo_id", help="user/name of the model; the Space gets the same")
    parser.add_argument("-o", "--output-dir", help="default: the folder's name and -space, beside it")
    parser.add_argument("--revision", help="commit, tag or branch of the model; default: main")
    parser.add_argument("--push", action="store_true", help="upload the Space; the model must be there already")
    parser.add_argument("--private", action="store_true", default=None, help="nobody else sees a new Space")


def run(args: argparse.Namespace) -> int:
    """Run `hf-moe space`."""
    if args.private and not args.push:
        raise ValueError("--private says who sees a Space on the Hub: it needs --push.")
    output = write_space(args.folder, args.repo_id, args.output_dir, revision=args.revision)
    print(f"Wrote {output}")
    if args.push:
        print(push_space(output, args.repo_id, revision=args.revision, private=args.private))
    else:
        print("Nothing was uploaded: --push does that.")
    return 0
