"""Opens repositories of the Hub by name where `hf_moe` cannot be imported.

Run as a program, `TASKS`, with a JSON object: name to `{"repo", "reference", "processor", "options"}`.
The last line of the output is a JSON object: name to findings.
"""

import json
import sys
import time

import torch

from helpers.hub.open_checkpoint import NoHfMoe, open_model, open_processor


def remote_modules() -> list[str]:
    return [name for name in sys.modules if name.startswith("transformers_modules.")]


def open_by_name(repo: str, reference: str, processor: bool, options: dict) -> dict:
    for name in remote_modules():
        del sys.modules[name]
    expected = torch.load(reference)
    found = open_model(repo, expected, **options)
    # What the tests write into one file of code, of every copy that was imported.
    found["push"] = [sys.modules[name].PUSH for name in remote_modules() if hasattr(sys.modules[name], "PUSH")]
    if processor:
        options.pop("code_revision", None)
        found |= open_processor(repo, expected, **options)
    return found


def main(tasks: dict[str, dict]) -> None:
    sys.meta_path.insert(0, NoHfMoe())
    time.sleep = lambda seconds: None  # the pauses of the client between its attempts
    findings = {}
    for name, task in tasks.items():
        try:
            findings[name] = open_by_name(**task)
        except (KeyError, OSError, ValueError) as error:
            findings[name] = {"error": f"{type(error).__name__}: {error}"}
    assert not any(name.partition(".")[0] == "hf_moe" for name in sys.modules)
    print(json.dumps(findings))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
