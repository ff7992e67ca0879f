"""`hf-moe demo` opens the page of a checkpoint on this machine."""

import shutil
import sys

from gradio_client import handle_file
from hub_checkpoints import tiny_config, tiny_processor
from space_pages import CHAT_TEMPLATE, QUESTION, numbers, save

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
