"""Asks a checkpoint in a process of its own, without this package unless it is told to use its classes.

    answer_alone.py FOLDER INPUTS ANSWER [--installed]

Run as a script: it imports nothing from beside it. `INPUTS` and `ANSWER` are safetensors files; the last line of the
output is a JSON object.
"""

import importlib.abc
import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel


NEW_TOKENS = 4


class Blocked(importlib.abc.MetaPathFinder):
    """Makes `import hf_moe` fail, installed or not."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.partition(".")[0] == "hf_moe":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def main(folder: str, inputs_file: str, answer_file: str, *options: str) -> int:
    if "--installed" in options:
        from hf_moe.hub.registration import register

        register()
    else:
        sys.meta_path.insert(0, Blocked())
    try:
        model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        inputs = load_file(inputs_file)
        floating = {name: value.to(model.dtype) for name, value in inputs.items() if value.is_floating_point()}
        with torch.no_grad():
            logits = model.eval()(**inputs | floating).logits
            # Decoding runs other code than a forward: the cache's.
            model.generate(**inputs | floating, max_new_tokens=NEW_TOKENS, do_sample=False)
    # Code of any version may fail in any way; what it says is the answer.
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}))
        return 0
    save_file({"logits": logits.float().contiguous()}, answer_file)
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    print(json.dumps({"wrong": wrong, "dtype": str(logits.dtype).removeprefix("torch.")}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
