"""The documentation does what it says: snippets run, commands and links exist, generated text is up to date."""

import ast
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from hf_moe import cli
from hf_moe.training.recipe import load_recipe


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


class Snippet(NamedTuple):
    language: str
    mark: str
    code: str


def snippets(page: Path) -> list[Snippet]:
    """Return the fenced blocks of a page: language, what follows it on its line, text."""
    found = re.findall(
        r"^```(\w+) ?(\S*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return [Snippet(*item) for item in found]


def commands(page: Path) -> list[list[str]]:
    lines = "".join(item.code for item in snippets(page) if item.language == "bash").replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in lines.splitlines() if shlex.split(line, comments=True)]


def run_page(page: Path, folder: Path) -> dict:
    """Write the blocks marked `file=NAME` and run those marked `run`, in order, as one program in `folder`."""
    namespace: dict = {"__name__": "page"}
    for snippet in snippets(page):
        if snippet.mark.startswith("file="):
            (folder / snippet.mark.removeprefix("file=")).write_text(snippet.code, encoding="utf-8")
        elif snippet.mark == "run":
            exec(compile(snippet.code, str(page), "exec"), namespace)
    return namespace


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """An empty current folder that can be imported from; what is imported there is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if name not in before and str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def test_the_quick_start_of_the_readme_trains_saves_and_answers(workshop, capsys):
    page = run_page(ROOT / "README.md", workshop)
    assert page["model"].config.system == "moiie"
    assert (workshop / "colours" / "router_moiie.py").is_file()
    assert "generated_text" in capsys.readouterr().out


def test_the_thirty_line_router_trains_travels_and_loads(workshop, capsys):
    page = ROOT / "docs" / "write-your-own-router.md"
    model = run_page(page, workshop)["model"]
    gate = model.moe_layers()[0].gate
    assert type(gate).__name__ == "ModalityBiasRouter"
    assert gate.bias_scale == 2.0
    assert gate.bias[:2].abs().sum() > 0
    assert gate.bias[2:].abs().sum() == 0
    assert Image.open("routing.png").format == "PNG"
    # Without this library, as far as the loader can tell: no bundled file imports it.
    bundled = list((workshop / "checkpoint").glob("*.py"))
    assert "modality_bias.py" in [path.name for path in bundled]
    assert "hf_moe" not in set().union(*map(imported_packages, bundled))
    capsys.readouterr()
    loaded = runpy.run_path("load.py")["model"]
    assert "transformers_modules" in capsys.readouterr().out
    assert loaded.moe_layers()[0].gate.bias.equal(gate.bias)


def test_the_guide_to_lora_experts_trains_saves_and_loads(workshop):
    page = run_page(ROOT / "docs" / "lora-experts.md", workshop)
    trained, loaded = page["model"].eval(), page["loaded"]
    input_ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(input_ids).logits, trained(input_ids=input_ids).logits)


def test_the_guide_to_trained_adapters_merges_edits_and_shares(workshop):
    page = run_page(ROOT / "docs" / "trained-adapters.md", workshop)
    assert 0 < page["report"].kl and page["report"].tokens == 64
    assert page["expert_names"](page["model"]) == ["english", "1", "3", "german"]
    assert page["check_lora_trained"](page["lora"]) > 0
    assert '"MOE_LORA"' in (workshop / "experts" / "adapter_config.json").read_text()


def test_the_guide_to_hosts_upcycles_trains_and_loads(workshop, capsys):
    page = run_page(ROOT / "docs" / "your-own-vlm.md", workshop)
    assert page["difference"] < 1e-5
    assert page["modalities"] == [0, 1, 2, 3]
    assert Image.open("before.png").format == "PNG"
    model = page["model"].eval()
    for layer in model.moe_layers().values():  # equal copies before the training
        assert layer.experts.down_proj.std(0).mean() > 0
    loaded = runpy.run_path("load.py")["model"]
    assert "Qwen2_5OmniThinkerForConditionalGeneration" in capsys.readouterr().out
    inputs = page["inputs"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_the_example_of_the_reference_builds_a_config(workshop):
    page = run_page(ROOT / "docs" / "configuration.md", workshop)
    assert (page["config"].system, page["config"].moe_config.num_experts) == ("moiie", 8)
    assert (page["hosted"].host_type, page["hosted"].moe_config.num_experts) == ("qwen2_5_vl", 4)


def test_the_router_of_the_guide_is_thirty_lines(workshop):
    file = next(item for item in snippets(ROOT / "docs" / "write-your-own-router.md") if item.mark.startswith("file="))
    assert len([line for line in file.code.splitlines() if line.strip()]) <= 30


def imported_packages(path: Path) -> set[str]:
    """Return the top-level packages that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists(page, monkeypatch):
    asked = []
    for module, _ in cli.COMMANDS.values():
        monkeypatch.setattr(f"{module}.run", lambda args: asked.append(args) or 0)
    for program, *arguments in commands(page):
        if program == "make":
            assert set(arguments) <= make_targets(), arguments
        else:
            assert program == "hf-moe"
            assert cli.main(arguments) == 0, arguments
    for args in asked:
        if args.command == "train":
            load_recipe(args.recipe, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_of_a_page_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    missing = [target for target in targets if not os.path.exists(page.parent / target)]
    assert not missing


@pytest.mark.parametrize(("tool", "page"), [("config_reference", "configuration"), ("system_pages", "systems")])
def test_the_generated_pages_are_up_to_date(tool, page):
    written = runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))["reference"]()
    assert (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") == written, "run `make docs`"


def test_the_readme_names_every_system():
    tool = runpy.run_path(str(ROOT / "tools" / "system_pages.py"))
    assert tool["README"].read_text(encoding="utf-8") == tool["readme"](), "run `make docs`"
