"""A push is one complete commit or none, says what happened, and can be run again."""

import json
import re

import pytest
from helpers.hub.server import OWNER_TOKEN, VISITOR_TOKEN
from huggingface_hub import HfApi, constants

from hf_moe.cli import main
from hf_moe.hub import push
from hf_moe.hub.push import PushError, push_checkpoint
from hf_moe.hub.results import write_evaluation


REPO = "owner/tiny"
SECRET = "hf_" + "aB3dE5gH7j" * 3 + "kLmN"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Retries come at once: the clock of the pushes and of the client."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def commits(hub):
    return len(hub.repositories[REPO].commits) - 1


def test_a_push_is_one_commit_with_every_file_of_the_checkpoint(hub, checkpoint):
    result = push_checkpoint(checkpoint, REPO)
    stored = hub.files(REPO)
    assert commits(hub) == 1
    assert set(stored) == set(result.files) == {path.name for path in checkpoint.iterdir()}
    for name in set(stored) - {"README.md"}:
        assert stored[name] == (checkpoint / name).read_bytes()
    assert result.files["model.safetensors"] == len(stored["model.safetensors"])
    assert result.commit == hub.repositories[REPO].refs["refs/heads/main"]
    assert result.url.endswith(f"{REPO}/commit/{result.commit}")


def test_the_snippet_pins_the_commit_and_is_python(hub, checkpoint):
    result = push_checkpoint(checkpoint, REPO)
    compile(result.snippet, "snippet", "exec")
    assert f'"{REPO}", "{result.commit}"' in result.snippet
    assert result.snippet.count("revision=commit") == 2


def test_the_card_on_the_hub_names_the_repository_where_the_local_one_names_the_folder(hub, checkpoint):
    push_checkpoint(checkpoint, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert f'checkpoint = "{REPO}"\n' in card
    assert f'model="{REPO}"' in card
    assert 'checkpoint = "tiny"' in (checkpoint / "README.md").read_text()


def test_a_name_without_owner_goes_to_the_owner_of_the_token(hub, checkpoint):
    assert push_checkpoint(checkpoint, "tiny").repo_id == REPO


def test_versions_count_up_and_an_unchanged_checkpoint_keeps_its_own(hub, checkpoint):
    first = push_checkpoint(checkpoint, REPO)
    assert push_checkpoint(checkpoint, REPO) == first
    (checkpoint / "generation_config.json").write_text("{}")
    second = push_checkpoint(checkpoint, REPO)
    assert (first.tag, second.tag, commits(hub)) == ("v1", "v2", 2)
    refs = hub.repositories[REPO].refs
    assert (refs["refs/tags/v1"], refs["refs/tags/v2"]) == (first.commit, second.commit)
    with pytest.raises(ValueError, match="has a tag 'v1' already"):
        push_checkpoint(checkpoint, REPO, tag="v1")


def test_code_weights_and_results_of_an_older_push_do_not_outlive_it(hub, checkpoint):
    results = checkpoint / ".eval_results"
    results.mkdir()
    for name in ("router_old.py", "model-00001-of-00002.safetensors", "notes.txt", ".eval_results/old.yaml"):
        (checkpoint / name).write_text("[]")
    push_checkpoint(checkpoint, REPO)
    for name in ("router_old.py", "model-00001-of-00002.safetensors", "notes.txt", ".eval_results/old.yaml"):
        (checkpoint / name).unlink()
    push_checkpoint(checkpoint, REPO)
    assert "notes.txt" in hub.files(REPO)
    assert not {"router_old.py", "model-00001-of-00002.safetensors", ".eval_results/old.yaml"} & set(hub.files(REPO))
    assert "router_old.py" in hub.files(REPO, "v1")


def test_a_branch_and_a_pull_request_leave_main_alone(hub, checkpoint):
    first = push_checkpoint(checkpoint, REPO)
    (checkpoint / "generation_config.json").write_text("{}")
    branch = push_checkpoint(checkpoint, REPO, revision="next")
    request = push_checkpoint(checkpoint, REPO, create_pr=True)
    refs = hub.repositories[REPO].refs
    assert refs["refs/heads/main"] == first.commit
    assert refs["refs/heads/next"] == branch.commit
    assert refs["refs/pr/1"] == request.commit
    assert (branch.tag, request.tag) == (None, None)
    assert request.url.endswith(f"{REPO}/discussions/1")


def test_a_visitor_opens_a_pull_request_where_he_may_not_write(hub, checkpoint):
    push_checkpoint(checkpoint, REPO)
    (checkpoint / "generation_config.json").write_text("{}")
    with pytest.raises(PushError, match=r"\(403\).*open a pull request"):
        push_checkpoint(checkpoint, REPO, token=VISITOR_TOKEN)
    assert commits(hub) == 1
    assert push_checkpoint(checkpoint, REPO, token=VISITOR_TOKEN, create_pr=True).url.endswith("/discussions/1")


def test_private_and_gated_hold_before_anything_is_uploaded(hub, checkpoint):
    push_checkpoint(checkpoint, REPO, private=True, gated="manual")
    assert hub.repositories[REPO].private and hub.repositories[REPO].gated
    asked = [path for _, path in hub.requests]
    assert asked.index(f"/api/models/{REPO}/settings") < next(i for i, path in enumerate(asked) if "/lfs/" in path)
    with pytest.raises(OSError, match="404"):
        HfApi(token=VISITOR_TOKEN).model_info(REPO)


def test_a_checkpoint_meant_to_be_private_does_not_go_to_a_public_repository(hub, checkpoint):
    push_checkpoint(checkpoint, REPO)
    with pytest.raises(ValueError, match="exists and is public"):
        push_checkpoint(checkpoint, REPO, private=True)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/preupload/", 429),
        ("POST", "/objects/batch", 500),
        ("PUT", "/lfs/", 500),
        ("POST", "/commit/", 429),
        ("POST", "/commit/", 500),
    ],
)
def test_a_busy_hub_is_asked_again(hub, checkpoint, method, path, status):
    hub.fail(method, path, status, times=2)
    result = push_checkpoint(checkpoint, REPO)
    assert commits(hub) == 1
    assert set(hub.files(REPO)) == set(result.files)
    assert sum(re.search(path, asked) is not None for verb, asked in hub.requests if verb == method) >= 3


def test_an_upload_cut_in_the_middle_is_sent_again(hub, checkpoint):
    hub.cut("PUT", "/lfs/")
    hub.cut("POST", "/commit/")
    push_checkpoint(checkpoint, REPO)
    assert commits(hub) == 1
    assert hub.files(REPO)["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()


def test_a_large_file_goes_up_in_parts_and_a_part_cut_in_the_middle_again(hub, checkpoint):
    hub.part_size = 2**15
    hub.cut("PUT", "/lfs/.*/parts/2")
    push_checkpoint(checkpoint, REPO)
    weights = (checkpoint / "model.safetensors").read_bytes()
    sent = [path.rsplit("/", 1)[-1] for method, path in hub.requests if method == "PUT" and "/parts/" in path]
    assert sorted(set(sent), key=int) == [str(part) for part in range(1, -(-len(weights) // hub.part_size) + 1)]
    assert sent.count("2") == 2
    assert hub.files(REPO)["model.safetensors"] == weights


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_twice(hub, checkpoint):
    hub.lose_answer("POST", "/commit/")
    result = push_checkpoint(checkpoint, REPO)
    assert commits(hub) == 1
    assert result.commit == hub.repositories[REPO].refs["refs/heads/main"]


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub, checkpoint):
    push_checkpoint(checkpoint, REPO)
    (checkpoint / "generation_config.json").write_text("{}")
    hub.lose_answer("POST", "/commit/")
    with pytest.raises(PushError, match="No new commit is known"):
        push_checkpoint(checkpoint, REPO, create_pr=True)
    assert [ref for ref in hub.repositories[REPO].refs if "pr" in ref] == ["refs/pr/1"]


@pytest.mark.parametrize(("method", "path"), [("PUT", "/lfs/"), ("POST", "/commit/")])
def test_a_push_that_fails_leaves_the_old_revision_and_can_be_run_again(hub, checkpoint, method, path):
    first = push_checkpoint(checkpoint, REPO)
    before = hub.files(REPO)
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)
    hub.cut(method, path, times=6)
    with pytest.raises(PushError, match=f"main of {REPO} was at {first.commit}.*Run the same push again"):
        push_checkpoint(checkpoint, REPO)
    assert hub.files(REPO) == before
    hub.faults.clear()
    sent = len(hub.requests)
    push_checkpoint(checkpoint, REPO)
    assert hub.files(REPO)["model.safetensors"] == weights
    uploads = [path for verb, path in hub.requests[sent:] if verb == "PUT"]
    assert len(uploads) == (1 if path == "/lfs/" else 0)


def test_a_tag_that_failed_is_set_by_the_next_push(hub, checkpoint):
    hub.fail("POST", "/tag/", 500)
    with pytest.raises(PushError, match="complete at .* but the tag v1 is missing"):
        push_checkpoint(checkpoint, REPO)
    assert push_checkpoint(checkpoint, REPO).tag == "v1"
    assert commits(hub) == 1


def test_a_push_on_top_of_somebody_elses_is_refused_by_the_hub(hub, checkpoint, monkeypatch):
    push_checkpoint(checkpoint, REPO)
    (checkpoint / "generation_config.json").write_text("{}")
    prepared = push._operations

    def while_somebody_pushes(*arguments):
        HfApi().upload_file(path_or_fileobj=b"other", path_in_repo="other.txt", repo_id=REPO)
        return prepared(*arguments)

    monkeypatch.setattr(push, "_operations", while_somebody_pushes)
    with pytest.raises(PushError, match="Somebody else has pushed"):
        push_checkpoint(checkpoint, REPO)
    assert hub.files(REPO)["other.txt"] == b"other"


def test_a_wrong_token_is_named_as_such(hub, checkpoint):
    with pytest.raises(PushError, match=r"does not know this token.*hf auth login"):
        push_checkpoint(checkpoint, REPO, token="hf_wrong")
    assert not hub.repositories


def test_without_a_network_the_endpoint_is_named(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match=r"connection to http://127.0.0.1:9 failed.*Nothing has been uploaded"):
        push_checkpoint(checkpoint, REPO)


def test_offline_mode_is_named(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):
        push_checkpoint(checkpoint, REPO)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optimizer.pt", "x", r"optimizer.pt: a state of the trainer"),
        ("optimizer_1", "x", r"optimizer_1: a state of the trainer"),
        ("rng_state_0.pth", "x", r"rng_state_0.pth: a state of the trainer"),
        ("training_args.bin", "x", r"training_args.bin: a state of the trainer"),
        ("checkpoint-10/model.safetensors", "x", r"checkpoint-10/model.safetensors: a folder of the trainer"),
        (".env", "x", r"\.env: a file of secrets"),
        ("notes.md", f"line\ntoken: {SECRET}\n", r"notes.md, line 2: a Hugging Face token"),
        ("extra.py", "KEY = 'AKIAABCDEFGHIJKLMNOP'\n", r"extra.py, line 1: an AWS key"),
        ("train.log", f"--token {SECRET}", r"train.log, line 1: a Hugging Face token"),
        ("extra.json", '{"path": "/home/anna/models/a"}', r"extra.json, line 1: a path of this machine \(/home/anna"),
        ("extra.yaml", "a: 1\nb: C:\\Users\\anna", r"extra.yaml, line 2: a path of this machine"),
    ],
)
def test_what_must_stay_here_is_refused_before_any_request(hub, checkpoint, name, text, message):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        push_checkpoint(checkpoint, REPO)
    assert SECRET not in str(error.value)
    assert not hub.requests


def test_web_addresses_and_vocabularies_are_no_paths_of_this_machine(hub, checkpoint):
    (checkpoint / "notes.md").write_text("See https://example.org/data/set and a/home/page, or `/models/x`.")
    (checkpoint / "vocab.json").write_text('{"/home/anna": 3}')
    assert push_checkpoint(checkpoint, REPO, dry_run=True).commit is None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "README.md", "processor_config.json", "modeling_hf_moe.py", "config.json"]
)
def test_an_incomplete_checkpoint_is_refused(hub, checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        push_checkpoint(checkpoint, REPO)
    assert not hub.requests


def test_a_card_with_an_invented_result_is_refused(hub, checkpoint):
    with (checkpoint / "README.md").open("a") as card:
        card.write("\n## Results\n\n| all | 0.9990 |\n")
    with pytest.raises(ValueError, match="results that evaluation.json does not hold: README.md: all 0.9990"):
        push_checkpoint(checkpoint, REPO)
    assert not hub.requests


def test_the_hub_shows_the_results_of_the_evaluation_files(hub, checkpoint):
    numbers = {"accuracy": 0.75, "accuracy_by_question_type": {"yes/no": 0.5}}
    write_evaluation(checkpoint, numbers, ["owner/questions"])
    push_checkpoint(checkpoint, REPO)
    results = HfApi().model_info(REPO, expand=["evalResults"]).eval_results
    assert [(result.dataset_id, result.task_id, result.value) for result in results] == [
        ("owner/questions", "default", 0.75),
        ("owner/questions", "yes_no", 0.5),
    ]


def test_a_card_whose_metadata_is_no_yaml_is_refused(hub, checkpoint):
    (checkpoint / "README.md").write_text("---\ntags: [moe\n---\n")
    with pytest.raises(ValueError, match="is no YAML"):
        push_checkpoint(checkpoint, REPO)


def test_a_name_that_the_hub_would_not_take_is_refused_at_once(hub, checkpoint):
    with pytest.raises(ValueError, match="owner/a/b"):
        push_checkpoint(checkpoint, "owner/a/b", dry_run=True)


def test_the_command_dry_runs_without_a_request_then_pushes(hub, checkpoint, capsys):
    assert main(["push", str(checkpoint), REPO, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    size = (checkpoint / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in shown and "nothing was uploaded" in shown
    assert not hub.requests
    assert main(["push", str(checkpoint), REPO, "--private"]) == 0
    shown = capsys.readouterr().out
    commit = hub.repositories[REPO].refs["refs/heads/main"]
    assert f"commit {commit}, tag v1" in shown and f'"{REPO}", "{commit}"' in shown


def test_the_command_says_in_one_line_why_it_cannot_push(hub, checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(checkpoint), REPO]) == 2
    assert capsys.readouterr().err.startswith("hf-moe: error: The Hub does not know this token")


def test_the_double_lists_and_hides_as_the_hub_does(hub, checkpoint):
    push_checkpoint(checkpoint, REPO, private=True)
    api = HfApi(token=OWNER_TOKEN)
    tree = {item.path: item for item in api.list_repo_tree(REPO, recursive=True)}
    assert tree["model.safetensors"].lfs.size == (checkpoint / "model.safetensors").stat().st_size
    assert api.model_info(REPO).card_data.license == "apache-2.0"
    assert json.loads(open(api.hf_hub_download(REPO, "config.json")).read())["model_type"] == "hf_moe"
    assert not api.file_exists(REPO, "absent.txt")
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=b"---\nlicense: [1]\n---\n", path_in_repo="README.md", repo_id=REPO)
