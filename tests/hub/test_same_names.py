"""Checkpoints whose folders have one last name run their own code in one process, whichever is opened first."""

import importlib
import json
import shutil

import pytest
from helpers.hub.checkpoints import record, start_with_hub, tiny_config, tiny_model, tiny_processor
from helpers.hub.server import OWNER_TOKEN, HubServer
from helpers.programs import last_line
from huggingface_hub import constants

from hf_moe.hub.push import push_checkpoint


TOLERANCE = 1e-6
# name -> the router, and the experts that the user's own one prefers
CHECKPOINTS = {"top_k": ("top_k", 0), "moiie": ("moiie", 0), "mine": ("mine", 0), "mine_edited": ("mine", 2)}
USER_ROUTER = """
import torch
from hf_moe import ExpertAssignment, Router, register_router


@register_router("mine")
class Mine(Router):
    def forward(self, hidden_states, context):
        index = torch.arange({first}, {first} + self.spec.num_experts_per_tok).expand(len(hidden_states), -1)
        return ExpertAssignment(index, torch.full(index.shape, 0.5), self.spec.num_experts)
"""


def save(root, name, source):
    router, first = CHECKPOINTS[name]
    (source / "router_of_mine.py").write_text(USER_ROUTER.format(first=first))
    importlib.invalidate_caches()
    importlib.reload(importlib.import_module("router_of_mine"))
    folder = root / name / "checkpoint"
    model, processor = tiny_model(tiny_config(router=router)), tiny_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    record(root / name, model, processor)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root, source = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(source)
        patch.setattr("sys.dont_write_bytecode", True)
        yield {name: save(root, name, source) for name in CHECKPOINTS}


@pytest.fixture(scope="module")
def found(checkpoints, tmp_path_factory):
    """What one process finds in every checkpoint and repository, in one order and in the other."""
    home = tmp_path_factory.mktemp("home")
    edited = tmp_path_factory.mktemp("by_hand") / "checkpoint"
    shutil.copytree(checkpoints["moiie"], edited)
    with (edited / "router_moiie.py").open("a") as file:
        file.write("# a change by hand\n")
    sources = [(name, str(folder), str(folder.parent / "reference.pt")) for name, folder in checkpoints.items()]
    with HubServer(home / "hub") as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name, folder, reference in sources[:]:
            push_checkpoint(folder, f"owner/{name}", token=OWNER_TOKEN)
            sources.append((f"hub_{name}", f"owner/{name}", reference))
        by_hand = ("by_hand", str(edited), sources[1][2])
        orders = {"forward": [*sources, by_hand], "backward": [*sources[::-1], by_hand]}
        processes = {
            order: start_with_hub("open_in_order", json.dumps(listed), hub.url, home / order)
            for order, listed in orders.items()
        }
        return {order: json.loads(last_line(process)) for order, process in processes.items()}


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("place", ["", "hub_"], ids=["folder", "hub"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_each_answers_with_its_own_code(found, name, place, order):
    answer = found[order][place + name]
    assert "error" not in answer, answer
    assert answer["router"] == CHECKPOINTS[name][0]
    assert max(answer["auto_model"], answer["difference"]) < TOLERANCE
    assert answer["ids_equal"] and answer["inputs_equal"]
    own = "router_of_mine.py" if name.startswith("mine") else f"router_{name}.py"
    assert answer["files"] == [own]


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_code_edited_by_hand_is_never_passed_over_silently(found, order):
    assert "router_moiie.py was edited after its checkpoint was saved" in found[order]["by_hand"]["error"]


def test_saving_twice_writes_the_same_files(checkpoints, tmp_path):
    for name in ("one", "two"):
        tiny_model(tiny_config(router="moiie")).save_pretrained(tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert one["modeling_hf_moe.py"] == (checkpoints["moiie"] / "modeling_hf_moe.py").read_bytes()
