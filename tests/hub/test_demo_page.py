"""`hf-moe demo` opens the page of a checkpoint on this machine."""

import shutil
import sys
from unittest.mock import Mock

import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from helpers.hub.checkpoints import tiny_config, tiny_processor
from helpers.hub.hosted import read_film, read_wave, save_hosted, write_wave
from helpers.hub.pages import CHAT_TEMPLATE, QUESTION, numbers, save
from playwright.sync_api import expect
from transformers import Qwen2VLVideoProcessor, processing_utils

from hf_moe.cli import main


def test_a_demo_without_gradio_says_what_to_install(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(checkpoint)]) == 2
    assert "pip install 'hf-moe[space]'" in capsys.readouterr().err


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


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A checkpoint on Qwen2.5-VL."""
    folder = tmp_path_factory.mktemp("hosted") / "seeing"
    save_hosted("qwen2_5_vl", folder)
    return folder


def shown(client, kind):
    return [item for item in client.config["components"] if item["type"] == kind]


def test_a_host_takes_a_picture_and_a_video(demo, seeing, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(Qwen2VLVideoProcessor, "fetch_videos", read_film)
    film = tmp_path / "film.mp4"
    film.write_bytes(b"four frames")
    client = demo(seeing)
    assert shown(client, "image") and shown(client, "video") and not shown(client, "audio")
    answer, cost = client.predict(handle_file(picture), None, QUESTION, api_name="/ask")
    assert answer and numbers(cost)["Experts per patch"] == 2
    _, drawn, _, _ = client.predict(0, api_name="/layer")
    assert drawn.count("<rect") == 4 and "Video" not in drawn
    _, cost = client.predict(None, handle_file(film), QUESTION, api_name="/ask")
    assert numbers(cost)["Experts per video token"] == numbers(cost)["Experts per word"] == 2
    _, drawn, _, shares = client.predict(0, api_name="/layer")
    # Two moments of two frames each.
    assert 'viewBox="0 0 2 4"' in drawn and drawn.count("<rect") == 8 and "<span>video</span>" in shares


def test_a_broken_video_and_no_decoder_get_a_message(demo, seeing, tmp_path, monkeypatch):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"no film")
    client = demo(seeing)

    def fails(error):
        monkeypatch.setattr(Qwen2VLVideoProcessor, "fetch_videos", Mock(side_effect=error))
        with pytest.raises(AppError) as caught:
            client.predict(None, handle_file(film), QUESTION, api_name="/ask")
        return str(caught.value)

    assert "cannot be read as a video" in fails(ValueError("invalid data"))
    assert "This machine lacks" in fails(ImportError("torchcodec is not installed"))


def test_in_a_browser_a_sound_is_heard(demo, browser, tmp_path, monkeypatch):
    monkeypatch.setattr(processing_utils, "load_audio", read_wave)
    write_wave(tmp_path / "sound.wav")
    folder = tmp_path / "hearing"
    save_hosted("qwen2_audio", folder)
    page = browser.new_page()
    page.goto(demo(folder).src)
    page.get_by_label("Question").wait_for()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "sound.wav")
    page.get_by_label("Question").fill(QUESTION)
    expect(page.get_by_label("Remove", exact=False).or_(page.get_by_label("Clear", exact=False)).first).to_be_visible()
    page.get_by_role("button", name="Ask").click()
    heard = page.get_by_role("img", name="over the audio")
    expect(heard.locator("rect")).to_have_count(15)
    expect(page.get_by_text("Experts per audio token")).to_be_visible()
    page.close()
