"""
Write the study's tables into `docs/tiny.md`, and the README's selection of their rows, from the results in `docs/`:

    python scripts/make_tables.py

A table on a page is found by its head. Of tables with the same head, the first one on the page is the first one here.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from mc_llava.scenes import study, zoom_study


ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
KNOBS = 3  # columns that identify a row


RESULTS = (*study.FILES.values(), "study_zoom")


def all_tables() -> list[list[str]]:
    """The lines of each table, in the order of `docs/tiny.md`."""
    tables = []
    for name in RESULTS:
        found = json.loads((ROOT / "docs" / f"{name}.json").read_text(encoding="utf-8"))
        markdown = zoom_study.markdown if name == "study_zoom" else study.markdown
        tables += [table.splitlines() for table in markdown(found).split("\n\n")]
    return tables


def all_rows(old: list[str], new: list[str]) -> list[str]:
    return new


def rows_of(old: list[str], new: list[str]) -> list[str]:
    """
    The new lines with the knobs of the old ones.

    Raises:
        ValueError: if an old line has no new one.
    """

    def knobs(line: str) -> str:
        return " ".join(cell.strip() for cell in line.split("|")[1 : 1 + KNOBS])

    found = {knobs(line): line for line in new}
    if missing := [knobs(line) for line in old if knobs(line) not in found]:
        raise ValueError(f"the study has no row for the knobs {', '.join(missing)}: change these rows of the page")
    return [found[knobs(line)] for line in old]


# Page -> a function of a table's old and new lines that returns the lines to write.
PAGES: dict[str, Callable[[list[str], list[str]], list[str]]] = {"docs/tiny.md": all_rows, "README.md": rows_of}


def renewed(page: str, text: str) -> str:
    """
    The text of a page of `PAGES` with its tables updated.

    Raises:
        ValueError: if `docs/tiny.md` lacks a table, the README all of them, or the study a row of the README.
    """
    tables = all_tables()
    waiting = list(tables)

    def renew(found: re.Match) -> str:
        old = found[0].splitlines()
        new = next((table for table in waiting if table[0] == old[0]), None)
        if new is None:
            return found[0]
        waiting.remove(new)
        return "\n".join(PAGES[page](old, new)) + "\n"

    text = TABLE.sub(renew, text)
    if waiting and (PAGES[page] is all_rows or len(waiting) == len(tables)):
        heads = " and ".join(table[0] for table in waiting)
        raise ValueError(f"{page} has no table with the head {heads}: put that line where the table belongs")
    return text


def main():
    for page in PAGES:
        path = ROOT / page
        path.write_text(renewed(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # without it, --help would write
    main()
