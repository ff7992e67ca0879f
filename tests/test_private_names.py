"""What the package uses of other libraries without their promise is listed, used and there."""

import importlib.util
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml


TOOL = Path(__file__).parents[1] / "tools" / "private_names.py"
spec = importlib.util.spec_from_file_location("private_names", TOOL)
private_names = sys.modules["private_names"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(private_names)

# Ways of using a private or unpromised name, each with what the scan calls it.
UNLISTED = {
    "import": ("from transformers.modeling_utils import _get_dtype", "transformers.modeling_utils._get_dtype"),
    "module": ("import torch._dynamo.config", "torch._dynamo.config"),
    "not exported": ("from peft.tuners.lora import layer", "peft.tuners.lora.layer"),
    "inside a function": ("def f():\n    from trl.core import _x", "trl.core._x"),
    "read": ("def f(model):\n    return model._prefix_of_others", "_prefix_of_others"),
    "called": ("def f(model):\n    model.base._init_weights(model)", "_init_weights"),
    "set": ("def f(config):\n    config._attn_implementation_internal = 'eager'", "_attn_implementation_internal"),
    "deleted": ("def f(model):\n    del model._hooks", "_hooks"),
    "getattr": ("def f(model):\n    return getattr(model, '_origin', None)", "_origin"),
    "setattr": ("def f(model):\n    setattr(model, '_no_split_modules', [])", "_no_split_modules"),
    "names in a tuple": ("def f(m):\n    return [getattr(m, n) for n in ('_forward_hooks', 'x')]", "_forward_hooks"),
    "keyword": ("def f(load):\n    return load('x', _commit_hash=None)", "_commit_hash"),
    "key": ("OPTIONS = {'_fast_init': False}", "_fast_init"),
    "flag of a class": ("class Model:\n    _supports_sdpa_of_others = True", "_supports_sdpa_of_others"),
    "flag of an object": ("class Model:\n    def f(self):\n        self._is_stateful_now = True", "_is_stateful_now"),
    "hook of a class": ("class Model:\n    def _maybe_init(self):\n        pass", "_maybe_init"),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that writes a package of one module, which can be imported, and returns its folder."""

    def write(code):
        (tmp_path / f"module_{abs(hash(code))}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    return write


def test_list_and_package_agree_in_these_versions():
    assert private_names.problems() == []


@pytest.mark.parametrize("code, name", UNLISTED.values(), ids=UNLISTED)
def test_an_unlisted_use_is_found(package, code, name):
    lines = private_names.problems(package(code))
    assert any(line.startswith(f"{name} is not in private_names.yaml; used in module_") for line in lines)


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import PreTrainedModel",
        "import torch.distributed.fsdp",
        "class Own:\n    def _help(self):\n        pass\n    def f(self):\n        self._help()",
        "class Own:\n    def __init__(self):\n        self._x = 1\n    def f(self):\n        return self._x",
        "def f(module):\n    return [getattr(module, 'down' + ending) for ending in ('', '_bias')]",
        "KINDS = (('weight', ''), ('bias', '_bias'))",
        "class Kind:\n    def f(self):\n        return self._value_",
    ],
)
def test_promised_and_own_names_are_not(package, code):
    assert private_names.uses(package(code)) == {}


def test_own_names_that_override_are_found(package):
    code = (
        "from torch import nn\n\nclass Layer(nn.Module):\n    def _apply(self, fn):\n        return self._apply(fn)\n"
        "    def _mine(self):\n        return self._mine()\n"
    )
    assert set(private_names.uses(package(code))) == {"_apply"}


def test_names_that_are_gone_or_unused_are_reported(monkeypatch):
    kept = private_names.entries()
    gone = private_names.Entry("_supports_sdpa", "transformers.PreTrainedConfig.gone", "", "Do without.")
    unused = private_names.Entry("_nobody_uses_it", "torch.nn.Module", "", "")
    monkeypatch.setattr(private_names, "entries", lambda: [*kept, gone, unused])
    version = metadata.version("transformers")
    assert private_names.problems()[-2:] == [
        f"transformers.PreTrainedConfig.gone._supports_sdpa is gone from transformers {version}. Do without.",
        "torch.nn.Module._nobody_uses_it is listed, and nothing uses it",
    ]


@pytest.mark.parametrize(
    "where, name", [("torch.nn.Module", "_supports_sdpa"), ("transformers.utils", "no_such_name")]
)
def test_a_name_that_is_not_there_does_not_exist(where, name):
    assert not private_names.exists(private_names.Entry(name, where, "", ""))


def test_every_entry_says_why_and_what_then():
    listed = yaml.safe_load(private_names.LIST.read_text())
    assert all(entry.why and entry.when_gone for entry in private_names.entries())
    libraries = {entry.library for entry in private_names.entries()} - {"sys"}
    assert set(listed["tried"]) >= libraries
