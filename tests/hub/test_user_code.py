"""A user's own mechanism travels with the checkpoint, or the save says why it cannot."""

import importlib
import sys
import warnings

import pytest
from helpers.hub.checkpoints import open_without_package, record, tiny_config, tiny_model, tiny_processor

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.hub.bundle import bundle_files
from hf_moe.hub.flatten import flatten


ROUTER = """
import math
from hf_moe import ExpertAssignment, Router, register_router
{imports}

@register_router("{name}")
class MyRouter(Router):
    pass
"""


@pytest.fixture
def write_router(tmp_path, monkeypatch):
    """Return a function that writes `my_router.py` with further imports; the router is forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(imports="", name="mine", file="my_router.py"):
        path = tmp_path / file
        path.write_text(ROUTER.format(imports=imports, name=name))
        return path

    yield write
    for module in [
        name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))
    ]:
        del sys.modules[module]


def test_names_of_the_package_come_from_the_bundled_files_that_define_them(write_router):
    text, imported = flatten(write_router("from hf_moe.modeling.routers.top_k import (\n    TopKRouter,\n)"))
    assert (
        "from .decisions import ExpertAssignment\nfrom .routing import Router\nfrom .registry import register_router\n"
        in text
    )
    assert "from .router_top_k import (\n    TopKRouter,\n)" in text
    assert {path.name for path in imported} == {"decisions.py", "routing.py", "registry.py", "top_k.py"}


def test_sibling_files_are_bundled_with_what_they_import(write_router, tmp_path):
    (tmp_path / "my_helpers.py").write_text("from my_constants import TWO\n\ndef double(x):\n    return TWO * x\n")
    (tmp_path / "my_constants.py").write_text("TWO = 2\n")
    write_router("from my_helpers import double")
    importlib.import_module("my_router")
    tiny_config(router="mine").save_pretrained(tmp_path / "checkpoint")
    saved = {path.name: path.read_text() for path in (tmp_path / "checkpoint").glob("my_*.py")}
    assert set(saved) == {"my_router.py", "my_helpers.py", "my_constants.py"}
    assert "from .my_helpers import double" in saved["my_router.py"]
    assert "from .my_constants import TWO" in saved["my_helpers.py"]
    assert "from .my_router import MyRouter" in (tmp_path / "checkpoint" / "mechanisms.py").read_text()


def test_files_of_the_users_own_package_are_bundled(write_router, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "helpers.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "project" / "shared.py").write_text("def triple(x):\n    return 3 * x\n")
    path = write_router(
        "from project.helpers import double\nfrom .shared import triple",
        name="nested",
        file="project/nested_router.py",
    )
    text, imported = flatten(path)
    assert "from .helpers import double\nfrom .shared import triple" in text
    assert {tmp_path / "project" / "helpers.py", tmp_path / "project" / "shared.py"} <= set(imported)


@pytest.mark.parametrize(
    ("imports", "reason"),
    [
        ("import numpy as np", r"my_router.py, line 4: `import numpy as np` .* numpy is not part of a checkpoint"),
        ("from einops import rearrange", "einops is not part of a checkpoint"),
        ("def late():\n    import sklearn", "sklearn is not part of a checkpoint"),
        ("import hf_moe", "write `from hf_moe import"),
        ("import my_helpers", "write `from my_helpers import"),
        ("from . import my_helpers", "write `from .name import"),
        ("from .absent import thing", "no file absent.py"),
        ("from hf_moe import list_systems", "only hf_moe.modeling and hf_moe.configuration do|yaml"),
        ("from hf_moe import list_mechanisms", "only hf_moe.modeling and hf_moe.configuration do"),
        ("from hf_moe.modeling import routing", "only hf_moe.modeling and hf_moe.configuration do"),
        ("import math; from my_helpers import f", "does not start its line"),
        ('"""\nfrom .nowhere import thing\n"""', "from .nowhere import.* is not an import"),
    ],
)
def test_imports_that_would_not_travel_are_refused_with_the_remedy(write_router, tmp_path, imports, reason):
    (tmp_path / "my_helpers.py").write_text("f = None\n")
    path = write_router(imports)
    with pytest.raises(ValueError, match=reason):
        bundle_files([path], {})


def test_two_files_of_one_name_are_refused(write_router, tmp_path):
    write_router(file="routing.py")
    importlib.import_module("routing")
    with pytest.raises(ValueError, match="routing.py .* would both be routing.py"):
        tiny_config(router="mine").save_pretrained(tmp_path / "checkpoint")


def test_router_of_a_script_or_notebook_is_refused_with_the_remedy(write_router, tmp_path, monkeypatch):
    write_router()
    router = importlib.import_module("my_router").MyRouter
    monkeypatch.setattr(router, "__module__", "__main__")
    with pytest.raises(ValueError, match="'mine' .*in a notebook, in the script.* Put MyRouter .* my_router.py"):
        tiny_config(router="mine").save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_top_level_code_that_would_run_at_every_load_is_warned_about(write_router, recwarn):
    bundle_files([write_router()], {})
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"my_router.py travels whole.*lines \[4, 5\]"):
        bundle_files([write_router("print('hello')\nfor _ in range(3): pass\nif __name__ == '__main__': print()")], {})


class OwnModel(HfMoeForConditionalGeneration):
    pass


def test_a_subclass_that_would_open_as_its_base_is_said(tmp_path):
    with pytest.warns(UserWarning, match="The code of OwnModel does not travel"):
        OwnModel(tiny_config()).save_pretrained(tmp_path / "own")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        HfMoeForConditionalGeneration(tiny_config()).save_pretrained(tmp_path / "plain")
        tiny_processor().save_pretrained(tmp_path / "plain")


OUTER_ROUTER = """
from hf_moe import Router, register_router
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build


@register_router("outer")
class OuterRouter(Router):
    def __init__(self, spec, inner):
        super().__init__(spec)
        options = dict(inner)
        self.inner = build("router", get_mechanism("router", options.pop("name")), options, spec)

    def initialize(self, std):
        self.inner.initialize(std)

    def forward(self, hidden_states, context):
        return self.inner(hidden_states, context)
"""


def test_a_mechanism_that_builds_others_travels_with_them(write_router, tmp_path):
    (tmp_path / "outer_router.py").write_text(OUTER_ROUTER)
    importlib.import_module("outer_router")
    folder, processor = tmp_path / "outer", tiny_processor()
    model = tiny_model(tiny_config(router={"name": "outer", "inner": {"name": "moiie"}}))
    model.save_pretrained(folder)
    assert {path.name for path in folder.glob("*router*.py")} == {"outer_router.py", "router_moiie.py"}
    record(folder, model, processor)
    found = open_without_package([folder], tmp_path / "modules")["outer"]
    assert found["difference"] < 1e-6 and found["ids_equal"]
