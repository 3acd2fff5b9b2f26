"""What pages link to beside docs/, for the site: a hook of mkdocs.

Read unbuilt, a page links to the file itself. The site has copies of the examples, and the part of
CONTRIBUTING.md that docs/extending.md names in a comment stands on that page.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
EXAMPLES = re.compile(r"\]\(\.\./(?=(?:\.\./)*examples/)")
COMMENTED = re.compile(r'^<!-- (--8<-- "[^"\n]+") -->$', re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds the examples."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        name = f"examples/{path.name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links at what the site has, and includes what a comment names."""
    markdown = EXAMPLES.sub("](", markdown)
    markdown = markdown.replace("](../CONTRIBUTING.md#", "](extending.md#")
    return COMMENTED.sub(r"\1", markdown)
