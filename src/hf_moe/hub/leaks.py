"""What must not leave the machine with a checkpoint: secrets, the trainer's state, paths of this machine."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path


# A trainer keeps these to continue; `training_args.bin` is a pickle that holds the user's token.
TRAINER_FILES = (
    "optimizer.*", "optimizer_[0-9]*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin",
    "trainer_state.json", "pytorch_model_fsdp*", "*.ckpt",
)  # fmt: skip
TRAINER_FOLDERS = ("checkpoint-*", "global_step*", "runs", "wandb")
SECRET_FILES = (".env", ".env.*", ".netrc", "*.pem", "id_rsa*", "id_ed25519*", "credentials*.json")

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{50,})",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "an API key": r"\bsk-(?:proj-|ant-)?[\w-]{32,}",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abprs]-[\w-]{10,}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
}
_ROOTS = (
    "content|data|fsx|gpfs|home|kaggle|lustre|media|mnt|nfs|opt|private|root|scratch|srv|tmp|Users|var|Volumes|work"
    "|workspace"
)
LOCAL_PATH = re.compile(
    rf"(?<![\w.:/~-])/(?:{_ROOTS})/[\w.+-]+|\bfile:///|(?<!\w)~/[\w.+-]+|(?<!\w)[A-Za-z]:\\+(?:Users|home)\\+"
)

# A vocabulary may hold any string.
ANY_TEXT = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}


def find_leaks(folder: Path, files: Iterable[str]) -> list[str]:
    """Return what in these files must stay here, each as `file, line N: what it is`; never the secret itself."""
    home = str(Path.home())
    found = []
    for name in files:
        reason = _forbidden_name(name)
        if reason:
            found.append(f"{name}: {reason}")
            continue
        path = folder / name
        if _is_binary(path):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            found += [f"{name}, line {number}: {what}" for what, form in SECRETS.items() if re.search(form, line)]
            match = LOCAL_PATH.search(line)
            if path.name not in ANY_TEXT and (match or (len(home) > 1 and f"{home}/" in line)):
                found.append(f"{name}, line {number}: a path of this machine ({match[0] if match else home}...)")
    return found


def _forbidden_name(name: str) -> str | None:
    *folders, file = Path(name).parts
    if any(fnmatchcase(part, form) for part in folders for form in TRAINER_FOLDERS):
        return "a folder of the trainer"
    # A file of code may be called after an optimizer.
    if not file.endswith(".py") and any(fnmatchcase(file, form) for form in TRAINER_FILES):
        return "a state of the trainer"
    if any(fnmatchcase(file, form) for form in SECRET_FILES):
        return "a file of secrets"
    return None


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)
