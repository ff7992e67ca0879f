"""A Space answers, shows its routing and says what is wrong: over HTTP, and in a real browser where there is one."""

import json
import re
import time
from urllib.request import Request, urlopen

import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers.hub.checkpoints import start_with_hub
from helpers.hub.open_checkpoint import sample_image
from helpers.hub.pages import QUESTION, REPO, free_port, listens, numbers
from helpers.hub.server import running_hub
from playwright.sync_api import expect

from hf_moe import HfMoeForConditionalGeneration, HfMoeProcessor
from hf_moe.cli import main
from hf_moe.hub.push import push_checkpoint


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
        page = {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
        log = folder / "log"
        with log.open("w") as output:
            process = start_with_hub("run_space", downloaded, hub.url, folder / "home", log=output, **page)
        try:
            while not listens(port):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
def space(space_url):
    return Client(space_url, verbose=False)


@pytest.fixture
def page(browser, space_url):
    opened = browser.new_page()
    opened.goto(space_url)
    opened.get_by_label("Question").wait_for()
    yield opened
    opened.close()


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
