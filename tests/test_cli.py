"""The command line as its users run it."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe.cli import main
from hf_moe.construction.tokenizer import train_word_tokenizer


@pytest.fixture
def decoder_folder(tmp_path):
    torch.manual_seed(0)
    tokenizer = train_word_tokenizer(["is there a circle ? yes"])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", **sizes, vocab_size=len(tokenizer))
    folder = tmp_path / "decoder"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("module", ["hf_moe", "hf_moe.cli"])
def test_python_runs_it_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "list", "systems"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "anyexperts" in done.stdout


def test_build_prints_its_report(decoder_folder, tmp_path):
    arguments = [
        "--language-model",
        decoder_folder,
        "--system",
        "deepseekmoe",
        "-o",
        tmp_path / "model",
        "--noise",
        "0.01",
    ]
    code = "import sys; from hf_moe.cli import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "build", *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for line in ("MiB of weights", "in total", "active per text token", "(not exact by design)"):
        assert line in result.stdout
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--system", "moie"], "Did you mean 'moiie'"),
        (["--system", "moiie", "--moe-config", '{"num_experts": 6}'], "multiple of 4"),
        (["--vision-tower", "no/such/tower"], "no/such/tower"),
    ],
)
def test_what_cannot_be_built_is_one_line(decoder_folder, tmp_path, capsys, arguments, hint):
    output = tmp_path / "model"
    assert main(["build", "--language-model", str(decoder_folder), "-o", str(output), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-moe: error: ") and hint in error
    assert not output.exists()


def test_list_shows_mechanisms(capsys):
    assert main(["list", "mechanisms"]) == 0
    assert "connector:  mlp, pixel_shuffle" in capsys.readouterr().out


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["bild"])
    assert error.value.code == 2
    assert "build" in capsys.readouterr().err
