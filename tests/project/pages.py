"""The code blocks of the pages in docs/, as they stand.

What follows the language says what becomes of a block:

- ```` ```python ````: run on its own, in a folder with the page's files;
- ```` ```python title="name.py" ````: a file in that folder;
- ```` ```python gpu ````: as the first, on a machine with a GPU;
- ```` ```python needs NAME ````: as the first, where that package is installed;
- ```` ```sh ````, ```` ```sh needs NAME ````: the same, by a shell in that folder.

There is no other kind: a page has no code that nothing runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"

_FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```\n", re.MULTILINE)
_KIND = re.compile(
    r'python gpu|(python|sh)( needs (?P<needs>[a-z_]+))?|python title="(?P<title>[a-z_]+\.py)"'
)


@dataclass(frozen=True)
class Block:
    """One code block of a page."""

    page: str
    number: int
    heading: str
    kind: str
    title: str | None
    needs: str | None
    code: str

    @property
    def name(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.heading.lower()).strip("-")
        return f"{self.page}-{self.number}-{words}"

    def run(self, folder: Path) -> None:
        """Runs a block that has no title, beside its page's files."""
        write_files(self.page, folder)
        if self.kind.startswith("sh"):
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            subprocess.run(
                ["bash", "-euc", self.code],
                cwd=folder,
                env={**os.environ, "PATH": path},
                check=True,
                timeout=300,
            )
            return
        file = folder / f"block_{self.number}.py"
        file.write_text(self.code)
        with importable(folder):
            exec(compile(self.code, str(file), "exec", dont_inherit=True), {"__name__": "__main__"})


def pages() -> list[str]:
    return sorted(path.name for path in DOCS.glob("*.md"))


def blocks(page: str) -> list[Block]:
    """A page's blocks, in order; raises on one that nothing would run."""
    text = (DOCS / page).read_text()
    found = []
    for number, match in enumerate(_FENCE.finditer(text), start=1):
        info, code = match.groups()
        kind = _KIND.fullmatch(info)
        if kind is None:
            raise ValueError(f"{page}, block {number}: nothing runs a block of kind {info!r}")
        heading = re.findall(r"^## (.*)$", text[: match.start()], re.MULTILINE)
        last = heading[-1] if heading else "start"
        found.append(Block(page, number, last, info, kind["title"], kind["needs"], code))
    if len(found) * 2 != len(re.findall(r"^\s*```", text, re.MULTILINE)):
        raise ValueError(f"{page}: a fence is not at the start of its line, or not closed")
    return found


def write_files(page: str, folder: Path) -> None:
    """Writes a page's blocks that have a title."""
    for block in blocks(page):
        if block.title is not None:
            (folder / block.title).write_text(block.code)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Lets modules be imported from `folder`, and forgets them afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file: Any = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).parent == folder:
                del sys.modules[name]
