"""The HTML shell of a page that is one file: a template, a title and one JSON document.

A template has `__TITLE__` in its title and `__DATA__` in an element such as
`<script type="application/json" id="data">__DATA__</script>`.
"""

import html
import json
import re
from pathlib import Path

from base.files import write_whole


def render(template: Path, title: str, document: dict) -> str:
    """The page as text. A number of the document must be finite; no text of it can end the script
    element that it stands in."""
    data = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    values = {"TITLE": html.escape(title), "DATA": data.replace("<", "\\u003c")}
    # One pass, so that a title which says __DATA__ stays as it is.
    shell = template.read_text(encoding="utf-8")
    return re.sub("__(TITLE|DATA)__", lambda found: values[found[1]], shell)


def write_page(path: Path, template: Path, title: str, document: dict) -> None:
    """Writes the page whole or not at all, and says how large it is."""
    text = render(template, title, document)
    write_whole(path, text)
    print(f"wrote {path}, {len(text.encode()) / 1e6:.1f} MB")
