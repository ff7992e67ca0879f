"""Pushed repositories load by name where the package cannot be imported: few processes open them all."""

import hashlib
import json
import shutil

import pytest
from helpers.hub.checkpoints import record, start_with_hub, tiny_config, tiny_model, tiny_processor
from helpers.hub.server import OWNER_TOKEN, VISITOR_TOKEN, HubServer
from helpers.programs import last_line
from huggingface_hub import constants

from hf_moe.hub.push import push_checkpoint


TOLERANCE = 1e-6
DEAD = "http://127.0.0.1:9"


def save(folder, number, processor):
    """Save the checkpoint of push `number`: weights and one file of code differ from those of the other."""
    model = tiny_model(tiny_config(router="moiie", objectives={"load_balance": 0.01}))
    model.lm_head.weight.data.mul_(number)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with (folder / "gating.py").open("a") as file:
        file.write(f"PUSH = {number}\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    reference = folder.with_name(f"{folder.name}_reference")
    reference.mkdir()
    record(reference, model, processor)
    return str(reference / "reference.pt")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("by_name") / "hub") as server:
        yield server


@pytest.fixture(scope="module")
def found(hub, tmp_path_factory):
    """What every process found, by the name of what it was asked to open."""
    root = tmp_path_factory.mktemp("pushed")
    pushing = start_with_hub("push_by_methods", str(root), hub.url, root / "home_of_pusher")
    first, second = (
        save(root / name, number, tiny_processor()) for number, name in enumerate(("one", "two"), start=1)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        old = push_checkpoint(root / "one", "owner/twice", token=OWNER_TOKEN)
        for name, options in {"hidden": {"private": True}, "gated": {"gated": "auto"}, "busy": {}}.items():
            push_checkpoint(root / "one", f"owner/{name}", token=OWNER_TOKEN, **options)
        push_checkpoint(root / "two", "owner/twice", token=OWNER_TOKEN)
    last_line(pushing)
    hub.fail("HEAD", "owner/busy/resolve/.*/config.json", 503)
    hub.fail("GET", "owner/busy/resolve/.*/gating.py", 429)
    hub.lose_answer("GET", "owner/busy/resolve/.*/model.safetensors")

    def task(repo, reference, processor=False, **options):
        return {"repo": f"owner/{repo}", "reference": str(reference), "processor": processor, "options": options}

    tasks = {
        "newest": task("twice", second, processor=True),
        "pinned": task("twice", first, processor=True, revision=old.commit),
        "by_tag": task("twice", first, revision="v1"),
        "old_code": task("twice", second, code_revision=old.commit),
        "busy": task("busy", first),
        "hidden": task("hidden", first),
        "hidden_from_visitor": task("hidden", first, token=VISITOR_TOKEN, force_download=True),
        "gated_for_visitor": task("gated", first, token=VISITOR_TOKEN),
        "wrong_token": task("gated", first, token="hf_wrong"),
        "no_such_revision": task("twice", first, revision="v9"),
        "experts": task("experts", first),
        "odd_experts": task("odd_experts", first),
        **{name: task(name, root / name / "reference.pt", processor=name != "adapter") for name in METHODS},
    }
    online = json.loads(last_line(start_with_hub("open_by_name", json.dumps(tasks), hub.url, root / "home")))
    shutil.copytree(root / "home", root / "home_without_network", symlinks=True)
    again = json.dumps({name: tasks[name] for name in ("newest", "pinned", "gated_for_visitor")})
    offline = start_with_hub("open_by_name", again, DEAD, root / "home", HF_HUB_OFFLINE="1")
    unreachable = start_with_hub("open_by_name", again, DEAD, root / "home_without_network")
    return online | {
        f"{place}/{name}": value
        for place, process in {"offline": offline, "unreachable": unreachable}.items()
        for name, value in json.loads(last_line(process)).items()
    }


METHODS = ("methods", "trained", "complete", "adapter")


@pytest.mark.parametrize("name", ["newest", "pinned", "by_tag", "busy", "hidden", *METHODS])
def test_a_repository_answers_as_the_pushed_model_did(found, name):
    assert "error" not in found[name], found[name]
    assert found[name]["class"] == "HfMoeForConditionalGeneration"
    assert found[name]["difference"] < TOLERANCE
    assert found[name]["ids_equal"]


@pytest.mark.parametrize("name", ["newest", "pinned", "methods", "trained"])
def test_its_processor_prepares_the_same_inputs(found, name):
    assert found[name]["processor"] == "HfMoeProcessor"
    assert found[name]["inputs_equal"]


def test_a_revision_pins_code_and_weights_and_code_revision_the_code_alone(found):
    assert (found["newest"]["push"], found["pinned"]["push"], found["by_tag"]["push"]) == ([2], [1], [1])
    assert found["old_code"]["push"] == [1]
    assert found["old_code"]["difference"] < TOLERANCE


def test_a_busy_hub_was_asked_again_until_it_answered(found, hub):
    assert len(hub.faults) == 3
    assert [fault.times for fault in hub.faults] == [0, 0, 0]


@pytest.mark.parametrize("place", ["offline", "unreachable"])
def test_what_was_loaded_once_loads_without_a_network(found, place):
    for name, number in {"newest": 2, "pinned": 1}.items():
        assert found[f"{place}/{name}"]["difference"] < TOLERANCE
        assert found[f"{place}/{name}"]["push"] == [number]
    assert found[f"{place}/gated_for_visitor"]["error"].startswith("OSError")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hidden_from_visitor", "owner/hidden"),
        ("gated_for_visitor", "gated repo"),
        ("wrong_token", "401"),
        ("no_such_revision", "v9"),
        # PEFT leaves no room for more than the name of a method that it does not know; the card says what to install.
        ("experts", "MOE_LORA"),
        ("odd_experts", "MOE_LORA"),
    ],
)
def test_a_refusal_names_its_reason(found, name, message):
    assert message in found[name]["error"]


@pytest.mark.parametrize("name", ["methods", "trained", "complete"])
def test_the_push_methods_leave_a_complete_repository(found, hub, name):
    files = hub.files(f"owner/{name}")
    assert {"config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "README.md"} <= set(
        files
    )
    assert {"modeling_hf_moe.py", "processing_hf_moe.py", "router_moiie.py"} <= set(files)


@pytest.mark.parametrize("name", ["methods", "complete"])
def test_a_push_of_ours_brings_card_license_and_version(found, hub, name):
    files = hub.files(f"owner/{name}", "v1")
    assert files["LICENSE"].startswith(b"                                 Apache License")
    card = files["README.md"].decode()
    for path in ("modeling_hf_moe.py", "router_moiie.py"):
        assert f"| `{path}` | `{hashlib.sha256(files[path]).hexdigest()}` |" in card
    assert f'checkpoint = "owner/{name}"' in card
    assert "training_args.bin" not in files


def test_a_card_in_the_repository_outlives_a_push_and_shards_of_an_older_one_do_not(found, hub):
    old, new = hub.files("owner/methods", "v1"), hub.files("owner/methods", "v2")
    assert "model-00002-of-00004.safetensors" in old
    assert [path for path in new if path.endswith(".safetensors")] == ["model.safetensors"]
    assert b"A word of my own." in new["README.md"] and b"- small\n" in new["README.md"]
    assert "processing_hf_moe.py" in new


def test_the_trainer_states_what_it_has_measured(found, hub):
    numbers = json.loads(hub.files("owner/complete")["evaluation.json"])
    assert numbers["train_seconds"] > 0 and numbers["parameters_total"] > 0


def test_an_adapter_repository_holds_no_code_and_names_its_base(found, hub):
    files = hub.files("owner/adapter")
    assert not [path for path in files if path.endswith(".py")]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/methods"
