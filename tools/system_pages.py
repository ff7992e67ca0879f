"""Writes docs/systems.md, the systems by family, their list in README.md, and a page for each, which is not committed.

python tools/system_pages.py
"""

import re
from pathlib import Path

from hf_moe import list_systems
from hf_moe.catalogue import page
from hf_moe.configuration.systems import systems_by_family


DOCS = Path(__file__).resolve().parents[1] / "docs"
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- Systems: written by `make docs`. -->\n", "<!-- End of systems. -->\n"
RECORDS = "../src/hf_moe/configuration/systems"
# A file of the repository, and a place in it.
FILE = re.compile(r"`((?:src|tests|benchmarks)/[\w./]+)([^`]*)`")
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


def readme() -> str:
    """Return the text of README.md with the systems of today."""
    families = systems_by_family().items()
    lines = [
        f"- [{family.capitalize()}](docs/systems.md#{family}): " + ", ".join(f"`{record.key}`" for record in records)
        for family, records in families
    ]
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2]


def main() -> None:
    README.write_text(readme(), encoding="utf-8")
    (DOCS / "systems.md").write_text(reference(), encoding="utf-8")
    folder = DOCS / "systems"
    folder.mkdir(exist_ok=True)
    for record in list_systems():
        linked = FILE.sub(r"[`\1\2`](../../\1)", page(record))
        (folder / f"{record.key}.md").write_text(linked, encoding="utf-8")
    print(f"Wrote docs/systems.md and {len(list_systems())} pages in docs/systems/")


if __name__ == "__main__":
    main()
