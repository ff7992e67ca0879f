"""Opens checkpoints one after another in one process where `hf_moe` cannot be imported.

Run as a program, `SOURCES`, with a JSON list of `[name, source, reference]`. The last line of the
output is a JSON object: name to what every auto class found.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from helpers.hub.open_checkpoint import NoHfMoe, largest_difference, open_model, open_processor


def open_all(source: str, reference: dict) -> dict:
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = AutoModel.from_pretrained(source, trust_remote_code=True)
    code = Path(sys.modules[type(model).__module__].__file__).parent
    return {
        "router": config.moe_config.router["name"],
        "auto_model": largest_difference(model, reference),
        "files": sorted(path.name for path in code.glob("*router*.py")),
        **open_model(source, reference),
        **open_processor(source, reference),
    }


def main(sources: list[list[str]]) -> None:
    sys.meta_path.insert(0, NoHfMoe())
    findings = {}
    for name, source, reference in sources:
        try:
            findings[name] = open_all(source, torch.load(reference))
        except (OSError, ValueError) as error:
            findings[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(findings))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
