"""Opens a checkpoint in a virtual environment that has only torch, transformers and pillow: its folder, and by name.

    make test-bare

The environment is made under `runs/bare` at the first call and kept; delete the folder to start over.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.hub.checkpoints import (  # noqa: E402
    open_without_package,
    record,
    start_with_hub,
    tiny_config,
    tiny_model,
    tiny_processor,
)
from helpers.hub.server import OWNER_TOKEN, HubServer  # noqa: E402
from helpers.programs import last_line  # noqa: E402

from hf_moe.hub.card import write_card  # noqa: E402


RUNS = ROOT / "runs" / "bare"
PACKAGES = ("torch", "transformers", "pillow")


def bare_python() -> str:
    """Return the interpreter of the bare environment, which is made if it is not there."""
    python = RUNS / "venv" / "bin" / "python"
    if not (RUNS / "complete").exists():
        shutil.rmtree(RUNS / "venv", ignore_errors=True)
        venv.create(RUNS / "venv", with_pip=True)
        print(f"Installing {', '.join(PACKAGES)} into {RUNS / 'venv'} ...", flush=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (RUNS / "complete").touch()
    absent = "import importlib.util, sys; sys.exit(importlib.util.find_spec('hf_moe') is not None)"
    subprocess.run([python, "-c", absent], check=True)
    return str(python)


def open_by_name(python: str, checkpoint: Path) -> dict:
    """Push the checkpoint to a double of the Hub, and return what the bare environment finds under its name."""
    # What was recorded for the comparison is no part of the checkpoint.
    reference = shutil.move(checkpoint / "reference.pt", RUNS / "reference.pt")
    with HubServer(RUNS / "hub") as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": OWNER_TOKEN, "HF_HOME": str(RUNS / "home")}
        environment["HF_HUB_DISABLE_XET"] = "1"
        push = [str(Path(sys.executable).with_name("hf-moe")), "push", str(checkpoint), "owner/bare"]
        subprocess.run(push, env=environment, check=True)
        task = {"repo": "owner/bare", "reference": str(reference), "processor": True, "options": {"revision": "v1"}}
        opening = start_with_hub("open_by_name", json.dumps({"by name": task}), hub.url, RUNS / "home", python=python)
        return json.loads(last_line(opening))["by name"]


def main() -> None:
    checkpoint = RUNS / "checkpoint"
    for folder in (checkpoint, RUNS / "checkpoint_again", RUNS / "modules", RUNS / "hub", RUNS / "home"):
        shutil.rmtree(folder, ignore_errors=True)
    python = bare_python()
    model = tiny_model(tiny_config(router="moiie", objectives={"load_balance": 0.01}))
    processor = tiny_processor()
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    write_card(checkpoint, model=model, report={})
    record(checkpoint, model, processor)
    found = open_without_package([checkpoint], RUNS / "modules", python)["checkpoint"]
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    if "error" in found:
        sys.exit("The checkpoint does not open in the bare environment.")
    named = open_by_name(python, checkpoint)
    print(f"by name: {named}")
    if "error" in named or not (named["ids_equal"] and named["inputs_equal"]):
        sys.exit("The pushed checkpoint does not open by name in the bare environment.")
    differences = [found[door] for door in ("difference", "AutoModel", "AutoModelForCausalLM")]
    differences.append(named["difference"])
    # Another build of torch may sum in another order.
    if max(*differences, found["again"]["difference"]) > 1e-5 or not (found["ids_equal"] and found["inputs_equal"]):
        sys.exit("The checkpoint answers otherwise in the bare environment.")


if __name__ == "__main__":
    main()
