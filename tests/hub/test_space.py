"""A Space answers, shows its routing and says what is wrong: over HTTP, and in a real browser where there is one."""

import ast
import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.request import Request, urlopen

import gradio
import numpy as np
import pytest
import torch
from conftest import running_hub
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from hub_checkpoints import tiny_config, tiny_model, tiny_processor
from hub_server import OWNER_TOKEN
from huggingface_hub import ModelCard, constants
from open_checkpoint import sample_image
from packaging.version import Version
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from hf_moe import HfMoeForConditionalGeneration, HfMoeProcessor
from hf_moe.cli import main
from hf_moe.hub.push import PushError, push_checkpoint
from hf_moe.hub.space import GRADIO_VERSION, push_space, write_space
from hf_moe.hub.space_app import expert_weights, open_picture, patch_grid
from hf_moe.modeling.routing import ExpertAssignment, ParameterMixture, SlotMixture


REPO = "owner/tiny"
QUESTION = "what is this"
RUNNER = Path(__file__).with_name("run_space.py")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without the last ones it keeps looking for its maker's servers.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}{% endfor %} <s>"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def save(folder: Path, config, processor) -> Path:
    tiny_model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def space_url(saved_checkpoint, tmp_path_factory):
    """A Space that was pushed and downloaded, running without `hf_moe`, with the model from the double of the Hub."""
    folder = tmp_path_factory.mktemp("space")
    with running_hub(folder) as hub:
        push_checkpoint(saved_checkpoint, REPO)
        assert main(["space", str(saved_checkpoint), REPO, "-o", str(folder / "written"), "--push"]) == 0
        downloaded = folder / "downloaded"
        downloaded.mkdir()
        for name, content in hub.files(f"spaces/{REPO}").items():
            (downloaded / name).write_bytes(content)
        port = free_port()
        environment = {
            **os.environ,
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": OWNER_TOKEN,
        }
        log = folder / "log"
        with log.open("w") as output:
            command = [sys.executable, str(RUNNER), str(downloaded)]
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while not listens(port):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def space(space_url):
    return Client(space_url, verbose=False)


@pytest.fixture
def demo(monkeypatch):
    """Start `hf-moe demo` in this process and return its client."""
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: None)

    def start(folder: Path) -> Client:
        port = free_port()
        assert main(["demo", str(folder), "--port", str(port)]) == 0
        return Client(f"http://127.0.0.1:{port}", verbose=False)

    yield start
    gradio.close_all()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    sample_image().save(path)
    return path


@pytest.fixture(params=["nothing", "truncated"])
def broken_picture(request, tmp_path, picture):
    content = {"nothing": b"no picture", "truncated": picture.read_bytes()[:60]}[request.param]
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        message = "no Chromium on the PATH: apt-get install chromium"
        # The tests over HTTP hold the same promises; where CI lacks the browser, that is a defect of CI.
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser, space_url):
    opened = browser.new_page()
    opened.goto(space_url)
    opened.get_by_label("Question").wait_for()
    yield opened
    opened.close()


def numbers(cost: str) -> dict[str, float]:
    """Return the newest line of the table of costs."""
    names, values = re.findall(r"<th>(.*?)</th>", cost), re.findall(r"<td>(.*?)</td>", cost)
    return {name: float(value) for name, value in zip(names, values, strict=False) if value != "–"}


def test_a_space_holds_the_application_what_it_needs_and_its_metadata(saved_checkpoint, tmp_path):
    output = write_space(saved_checkpoint, REPO, tmp_path / "space", revision="v1")
    assert {path.name for path in output.iterdir()} == {"README.md", "app.py", "requirements.txt"}
    metadata = ModelCard.load(output / "README.md").data.to_dict()
    expected = {"sdk": "gradio", "app_file": "app.py", "models": [REPO], "license": "apache-2.0"}
    assert expected.items() <= metadata.items()
    assert (output / "requirements.txt").read_text().splitlines() == ["torch", "transformers>=5.23.0", "pillow"]
    constants = {
        node.targets[0].id: node.value.value
        for node in ast.parse((output / "app.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert (constants["CHECKPOINT"], constants["REVISION"]) == (REPO, "v1")


def test_a_space_asks_for_the_gradio_that_the_tests_ran():
    installed, asked = Version(gradio.__version__), Version(GRADIO_VERSION)
    assert installed.major == asked.major and installed >= asked


def test_pictures_in_the_folder_examples_come_along(checkpoint, picture):
    (checkpoint / "examples").mkdir()
    shutil.copy(picture, checkpoint / "examples")
    (checkpoint / "examples" / "notes.txt").write_text("no picture")
    output = write_space(checkpoint, REPO)
    assert output == checkpoint.with_name("tiny-space")
    assert [path.name for path in (output / "examples").iterdir()] == ["picture.png"]


def test_a_space_is_pushed_in_one_commit_and_again_without_what_is_gone(hub, checkpoint, picture):
    push_checkpoint(checkpoint, REPO)
    (checkpoint / "examples").mkdir()
    shutil.copy(picture, checkpoint / "examples")
    output = write_space(checkpoint, REPO)
    (output / "notes.txt").write_text("of mine")
    assert push_space(output, REPO, private=True) == f"{constants.ENDPOINT}/spaces/{REPO}"
    stored = hub.files(f"spaces/{REPO}")
    assert set(stored) == {"README.md", "app.py", "requirements.txt", "examples/picture.png"}
    assert hub.repositories[f"spaces/{REPO}"].private and not hub.repositories[REPO].private
    shutil.rmtree(output / "examples")
    push_space(output, REPO)
    assert set(hub.files(f"spaces/{REPO}")) == {"README.md", "app.py", "requirements.txt"}
    assert len(hub.repositories[f"spaces/{REPO}"].commits) == 3


def test_a_space_without_its_model_is_not_pushed(hub, checkpoint):
    with pytest.raises(PushError, match="no model owner/tiny that you can see: push it first"):
        push_space(write_space(checkpoint, REPO), REPO)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["space", "missing", REPO], "missing holds no config.json"),
        (["space", "tiny", "tiny"], "has no owner"),
        (["space", "tiny", REPO, "--private"], "needs --push"),
        (["demo", "missing"], "missing holds no config.json"),
    ],
)
def test_what_cannot_be_done_is_one_line(checkpoint, monkeypatch, capsys, arguments, hint):
    monkeypatch.chdir(checkpoint.parent)
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_demo_without_gradio_says_what_to_install(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(checkpoint)]) == 2
    assert "pip install 'hf-moe[space]'" in capsys.readouterr().err


def test_the_answer_streams_and_is_the_one_of_the_model(space, picture, saved_checkpoint):
    job = space.submit(handle_file(picture), QUESTION, api_name="/ask")
    answer, cost = job.result()
    pieces = [text for text, _ in job.outputs()]
    assert len(pieces) > 5 and all(later.startswith(piece) for piece, later in zip(pieces, pieces[1:], strict=False))

    model = HfMoeForConditionalGeneration.from_pretrained(saved_checkpoint).eval()
    processor = HfMoeProcessor.from_pretrained(saved_checkpoint)
    inputs = processor(images=[sample_image()], text=[f"<image> {QUESTION}"], return_tensors="pt")
    placeholder = model.config.image_token_id
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False, suppress_tokens=[placeholder])
    new_tokens = tokens[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.decode(new_tokens, skip_special_tokens=True)
    measured = numbers(cost)
    assert measured["Experts per patch"] == measured["Experts per word"] == 2
    assert 0 < measured["Milliseconds per new token"] < measured["Milliseconds"]


def test_the_heat_map_shows_the_weights_of_the_chosen_expert(space, picture, saved_checkpoint):
    space.predict(handle_file(picture), QUESTION, api_name="/ask")
    model = HfMoeForConditionalGeneration.from_pretrained(saved_checkpoint).eval()
    processor = HfMoeProcessor.from_pretrained(saved_checkpoint)
    inputs = processor(images=[sample_image()], text=[f"<image> {QUESTION}"], return_tensors="pt")
    routing = model(**inputs, output_routing=True).routing
    decision = routing.decisions[1]
    image = routing.modality_ids[0] == 1
    weights = torch.zeros(len(image), 5).scatter_add(1, decision.expert_index, decision.expert_weight)[image, :4]

    experts, *busiest = space.predict(1, api_name="/layer")
    assert experts["value"] == weights.sum(0).argmax()
    shown = {expert: space.predict(1, expert, api_name="/expert") for expert in range(4)}
    assert tuple(busiest) == shown[experts["value"]]
    for expert, (patches, _, _) in shown.items():
        opacity = [float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', patches)]
        strongest = float(re.search(r"</span>&nbsp;(\d\.\d+)", patches)[1])
        torch.testing.assert_close(torch.tensor(opacity) / 0.9 * strongest, weights[:, expert], atol=0.01, rtol=0)


def test_words_are_listed_with_their_experts_and_shares_by_modality(space, picture):
    space.predict(handle_file(picture), QUESTION, api_name="/ask")
    _, words, shares = space.predict(0, 0, api_name="/expert")
    listed = re.findall(r'<span class="(.*?)".*?>([^<]+)<small>([\d, ]+)</small>', words)
    assert [word for _, word, _ in listed[:3]] == QUESTION.split()
    assert {kind for kind, _, _ in listed[3:]} == {"word answer"}
    assert all(len(experts.split(",")) == 2 for _, _, experts in listed)
    for modality in ("text", "image"):
        percents = re.findall(rf"<span>{modality}</span>.*?<span>(\d+)%</span>", shares)
        assert len(percents) == 4 and sum(map(int, percents)) == pytest.approx(100, abs=2)


def test_a_question_without_a_picture_is_answered(space):
    answer, cost = space.predict(None, QUESTION, api_name="/ask")
    assert answer and "Experts per patch" not in cost
    _, patches, words, _ = space.predict(0, api_name="/layer")
    assert "without a picture" in patches and "what" in words


def test_a_broken_picture_gets_a_message(space, broken_picture):
    with pytest.raises(AppError, match="cannot be read as a picture"):
        space.predict(handle_file(broken_picture), QUESTION, api_name="/ask")


def sample_bytes() -> bytes:
    buffer = io.BytesIO()
    sample_image().save(buffer, "PNG")
    return buffer.getvalue()


def test_an_upload_is_opened_as_the_processor_opens_it(tmp_path):
    checkpoint = SimpleNamespace(processor=tiny_processor())
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.new("RGBA", (8, 4), (255, 0, 0, 0)).save(tmp_path / "a.png", exif=rotated)
    Image.fromarray(np.full((4, 8), 40000, dtype=np.uint16)).save(tmp_path / "b.png")
    for name, colour, size in (("a.png", 255, (4, 8)), ("b.png", 156, (8, 4))):
        opened = open_picture(checkpoint, {"path": str(tmp_path / name)})
        assert opened.size == size and opened.getcolors() == [(32, (colour,) * 3)]
        assert opened == checkpoint.processor.open_image(tmp_path / name)


def test_an_upload_is_a_file_of_this_machine_never_an_address():
    checkpoint = SimpleNamespace(processor=tiny_processor())
    content = base64.b64encode(sample_bytes()).decode()
    assert checkpoint.processor.open_image(f"data:image/png;base64,{content}").size == (16, 16)
    with pytest.raises(gradio.Error, match="cannot be read as a picture"):
        open_picture(checkpoint, {"path": f"data:image/png;base64,{content}"})


def test_a_missing_question_gets_a_message(space, picture):
    with pytest.raises(AppError, match="Write a question first"):
        space.predict(handle_file(picture), "  ", api_name="/ask")


def test_files_of_the_machine_cannot_be_asked_for(space_url, picture):
    # Not through the client, which would upload the file first.
    upload = {"path": str(picture), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [upload, QUESTION]}).encode()
    request = Request(f"{space_url}/gradio_api/call/ask", body, {"Content-Type": "application/json"})
    event = json.load(urlopen(request))["event_id"]
    assert urlopen(f"{space_url}/gradio_api/call/ask/{event}").read().startswith(b"event: error")


def test_an_elastic_checkpoint_has_a_slider_that_moves_the_cost(demo, tmp_path, picture):
    router = {"name": "anyexperts", "min_slots": 1, "max_slots": 4, "max_virtual_share": 0.0}
    processor = tiny_processor()
    processor.chat_template = CHAT_TEMPLATE
    folder = save(tmp_path / "elastic", tiny_config(router=router), processor)
    (folder / "examples").mkdir()
    shutil.copy(picture, folder / "examples")
    client = demo(folder)
    (slider,) = [item["props"] for item in client.config["components"] if item["type"] == "slider"]
    assert (slider["minimum"], slider["maximum"], slider["value"]) == (1, 4, 2)
    assert any(item["type"] == "dataset" for item in client.config["components"])
    for budget in (1, 4):
        _, cost = client.predict(handle_file(picture), QUESTION, budget, api_name="/ask")
        measured = numbers(cost)
        assert measured["Budget"] == measured["Experts per patch"] == measured["Experts per word"] == budget
    assert cost.count("<tr>") == 3


def test_a_text_model_has_no_picture_and_answers(demo, tmp_path):
    config = tiny_config(router="top_k")
    config.vision_config = None
    folder = save(tmp_path / "text", config, tiny_processor().tokenizer)
    client = demo(folder)
    assert not [item for item in client.config["components"] if item["type"] == "image"]
    answer, cost = client.predict(QUESTION, api_name="/ask")
    assert answer and numbers(cost)["Experts per word"] == 2


def test_every_kind_of_decision_tells_the_weight_of_each_expert_in_each_token():
    assigned = ExpertAssignment(torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0.6, 0.4], [1.0, 0.0]]), num_experts=3)
    assert expert_weights(assigned).tolist() == torch.tensor([[0.4, 0.0, 0.6], [0.0, 1.0, 0.0]]).tolist()
    combine = torch.arange(12.0).view(1, 2, 6)  # 3 experts of 2 slots
    mixed = SlotMixture(dispatch=combine, combine=combine, num_experts=3)
    assert expert_weights(mixed).tolist() == [[1, 5, 9], [13, 17, 21]]
    merged = ParameterMixture(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([1, 0, 0]), num_experts=2)
    assert expert_weights(merged).tolist() == [[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("patches", "shapes", "grid"),
    [(16, None, (4, 4)), (6, torch.tensor([[2, 3]]), (2, 3)), (5, None, None), (0, None, None)],
)
def test_patches_lie_on_the_grid_of_their_image(patches, shapes, grid):
    assert patch_grid(patches, shapes) == grid


def test_in_a_browser_a_question_is_answered_and_the_heat_map_follows_the_choice(page, picture):
    page.locator("input[type=file]").first.set_input_files(picture)
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    heat_map = page.get_by_role("img", name="Weight of expert")
    expect(heat_map.locator("rect")).to_have_count(4)
    expect(page.get_by_label("Answer")).not_to_have_value("")
    expect(page.get_by_text("Milliseconds per new token")).to_be_visible()
    for label, choice, shown in (("Expert", "3", "expert 3 in layer 0"), ("Layer", "1", "in layer 1")):
        page.get_by_label(label, exact=True).click()
        page.get_by_role("option", name=choice).click()
        expect(page.get_by_role("img", name=shown)).to_be_visible()
        # The list fades out, and the next one has options of the same names.
        expect(page.get_by_role("option")).to_have_count(0)


def test_in_a_browser_a_broken_picture_and_a_missing_question_get_a_message(page, broken_picture):
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_text("Write a question first.")).to_be_visible()
    page.locator("input[type=file]").first.set_input_files(broken_picture)
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_text("cannot be read as a picture")).to_be_visible()
