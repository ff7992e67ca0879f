"""Writes docs/systems.md, the systems by family, and beside it a page for each, which is not committed.

python tools/system_pages.py
"""

from pathlib import Path

from hf_moe import list_systems
from hf_moe.catalogue import page
from hf_moe.configuration.systems import systems_by_family


DOCS = Path(__file__).resolve().parents[1] / "docs"
RECORDS = "../src/hf_moe/configuration/systems"
INTRODUCTION = """\
# Published systems

Written from the records by `make docs`, which writes a page for each into `docs/systems/` too; `hf-moe show KEY`
prints it. A system is a model, an adapter for PEFT, a construction from models that exist, or a recipe that trains
one; `hf_moe.from_system(KEY, ...)` builds it. Its record says what it sets, where it leaves the paper and which tests
hold what the paper promises.
"""


def reference() -> str:
    """Return the text of docs/systems.md."""
    sections = [INTRODUCTION]
    for family, records in systems_by_family().items():
        rows = [f"## {family.capitalize()}\n", "| Key | Form | System | Source |", "|---|---|---|---|"]
        for record in records:
            source = f"[arXiv:{record.arxiv}](https://arxiv.org/abs/{record.arxiv})" if record.arxiv else ""
            key = f"[`{record.key}`]({RECORDS}/{family}/{record.key}.yaml)"
            rows.append(f"| {key} | {', '.join(record.forms)} | {record.title} | {source} |")
        sections.append("\n".join(rows) + "\n")
    return "\n".join(sections)


def main() -> None:
    (DOCS / "systems.md").write_text(reference(), encoding="utf-8")
    folder = DOCS / "systems"
    folder.mkdir(exist_ok=True)
    for record in list_systems():
        (folder / f"{record.key}.md").write_text(page(record), encoding="utf-8")
    print(f"Wrote docs/systems.md and {len(list_systems())} pages in docs/systems/")


if __name__ == "__main__":
    main()
