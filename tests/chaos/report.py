"""``python -m tests.chaos.report DIR``: the rows of a run as a table; ``--write FILE`` into a
document, between its two marks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

_HEAD = "| fault | repetitions | saves acknowledged | refused | checkpoints loaded | seconds |"
_MARKS = "<!-- table -->\n", "<!-- end of table -->\n"


def table(place: Path) -> str:
    """A row for each fault; a fault whose test failed has none."""
    rows = [json.loads(path.read_text()) for path in sorted(place.glob("*.json"))]
    lines = [_HEAD, "| --- " * 6 + "|"]
    for r in rows:
        cells = (r["fault"], r["runs"], r["saves"], r["refused"], r["loads"], r["seconds"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    made = table(given.place)
    print(made)
    if given.write:
        before, _, rest = given.write.read_text().partition(_MARKS[0])
        after = rest.partition(_MARKS[1])[2]
        given.write.write_text(before + _MARKS[0] + made + _MARKS[1] + after)


if __name__ == "__main__":
    main()
