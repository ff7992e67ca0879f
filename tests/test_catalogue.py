"""Every system is recorded, its checks exist, and the build that its page shows runs."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from hf_moe import list_mechanisms, list_systems
from hf_moe.adapters.experts import EXPERT_KINDS
from hf_moe.catalogue import ADAPTER_EXPERTS, HOST_ROUTER, build_lines, mechanisms_of, numbers, page
from hf_moe.cli import main
from hf_moe.configuration.systems import load_system, recipe_names
from hf_moe.construction.expert_sources import source_names
from hf_moe.modeling.registry import KINDS


ROOT = Path(__file__).resolve().parents[1]
RECORDS = list_systems()
MECHANISMS = [
    *((kind, name) for kind in KINDS if kind != "host" for name in list_mechanisms(kind)),
    *(("source", name) for name in source_names()),
    HOST_ROUTER,
    *((ADAPTER_EXPERTS, name) for name in EXPERT_KINDS),
]
by_key = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.key)


@cache
def names_in(file: Path) -> set[str]:
    return {
        node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    }


@by_key
def test_a_record_names_the_tests_that_hold_its_promise(record):
    assert record.check
    for check in record.check:
        file, _, name = check.partition("::")
        tests = {found for found in names_in(ROOT / file) if found.startswith("test_")}
        assert name in tests if name else tests, check


def test_every_mechanism_has_a_record():
    named = {item for record in RECORDS for item in mechanisms_of(record)}
    assert not set(MECHANISMS) - named


def test_keys_and_aliases_are_one_name_each():
    names = [name for record in RECORDS for name in (record.key, *record.aliases)]
    assert len(names) == len(set(names))


@by_key
def test_a_record_points_at_recipes_and_numbers_that_exist(record):
    assert record.recipe is None or record.recipe in recipe_names()
    assert all("| --- |" in numbers(pointer) for pointer in record.measured)


def test_a_pointer_to_nowhere_is_refused():
    with pytest.raises(ValueError, match="no 'contestants/moie': it lacks 'moie'"):
        numbers("hosts.json#contestants/moie")


@by_key
def test_a_page_names_files_that_exist(record):
    files = re.findall(r"`((?:src|tests|benchmarks)/[\w./]+)", page(record))
    assert f"src/hf_moe/configuration/systems/{record.family}/{record.key}.yaml" in files
    assert not [file for file in files if not (ROOT / file).is_file()]


@by_key
def test_the_build_on_a_page_runs(record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"```python\n{build_lines(record)}\n```" in page(record)
    exec(compile(build_lines(record), record.key, "exec"), {})
    assert list(tmp_path.glob("*/*.safetensors"))


def test_list_prints_a_line_for_each_system_by_family(capsys):
    assert main(["list", "systems"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(RECORDS) + len({record.family for record in RECORDS})
    assert next(line for line in lines[lines.index("routing:") :] if "moiie" in line).endswith("(arXiv:2508.09779)")


def test_show_prints_all_that_is_known_of_a_system(capsys):
    assert main(["show", "anyexperts"]) == 0
    shown = capsys.readouterr().out
    record = load_system("anyexperts")
    for part in ("2511.18314", "max_slots: 8", "K_tot = round(K_soft)", "| real_experts_per_token |", *record.differs):
        assert part in shown


def test_show_refuses_an_unknown_key_with_the_nearest(capsys):
    assert main(["show", "anyexpert"]) == 2
    assert "Did you mean 'anyexperts'" in capsys.readouterr().err
