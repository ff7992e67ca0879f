"""What adapter folders record of their version and base, and refuse when they are loaded."""

import json
import warnings
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version
from peft.utils import CONFIG_NAME

from ..hub.adapter_folder import cached_commit, portable_name
from ..version import __version__


# What configs that were saved before 0.1.0 have in place of the method's name.
EARLIER_TYPE = 'MOE_LORA: run `pip install "hf-moe[train]"` and `import hf_moe.adapters`'


def complete_saved_config(folder: str | Path) -> None:
    """Make the config in `folder` name the version that wrote it and where its base lies."""
    path = Path(folder) / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config["hf_moe_version"] = __version__
    config["base_model_name_or_path"] = portable_name(config["base_model_name_or_path"])
    config["revision"] = config["revision"] or cached_commit(config["base_model_name_or_path"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def check_version(version: str | None) -> None:
    """Warn of a config that a newer version has written, whose fields may mean more than this one knows."""
    try:
        newer = version is not None and Version(version) > Version(__version__)
    except InvalidVersion as error:
        raise ValueError(f"hf_moe_version={version!r} is no version, such as {__version__!r}.") from error
    if newer:
        warnings.warn(
            f"The adapter was saved by hf_moe {version}, and this is {__version__}: what it sets that this version "
            "does not know is ignored or refused. Update with `pip install --upgrade hf-moe`.",
            stacklevel=2,
        )


def check_complete(expected: set[str], found: set[str], config: Any) -> None:
    """Refuse weights that lack some of an adapter's, which would stay as drawn, or have others, to be lost."""
    where = getattr(config, "weights_file", None) or "The adapter's weights"
    others = sorted(found - expected)
    if others:
        raise ValueError(
            f"{where} hold {len(others)} of {len(found)} tensors that the adapter has no place for, among them "
            f"{others[:3]}: adapter_config.json names fewer targets or routers than it was saved with, or the file "
            "belongs to another adapter or base."
        )
    missing = sorted(expected - found)
    if missing:
        raise ValueError(
            f"{where} lack {len(missing)} of {len(expected)} tensors of the adapter, among them {missing[:3]}: the "
            "file is damaged, or belongs to another adapter_config.json or another base."
        )
