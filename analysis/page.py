"""Makes a page that is a single HTML file, from a template, a title and one JSON document.

A template has `__TITLE__` in its title and `__DATA__` in an element such as
`<script type="application/json" id="data">__DATA__</script>`.
"""

import html
import json
import re
from pathlib import Path

from base.files import write_result


def render(template: Path, title: str, document: dict) -> str:
    """The page as text.

    The document's texts cannot end the script element that holds them.
    Raises: ValueError if a number of the document is not finite.
    """
    data = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    values = {"TITLE": html.escape(title), "DATA": data.replace("<", "\\u003c")}
    # One pass, so that a title that contains __DATA__ is not replaced.
    shell = template.read_text(encoding="utf-8")
    return re.sub("__(TITLE|DATA)__", lambda found: values[found[1]], shell)


def write_page(path: Path, template: Path, title: str, document: dict) -> None:
    """Writes the page completely or not at all, and prints its size."""
    text = render(template, title, document)
    write_result(path, text)
    print(f"wrote {path}, {len(text.encode()) / 1e6:.1f} MB")
