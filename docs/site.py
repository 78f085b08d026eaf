"""Takes files of the repository's root into the site, which mkdocs builds from docs/ (mkdocs.yml).

Links are written for readers of the repository. In the site all pages lie in one folder. The
notebook becomes a page like the others.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE")
LINK = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)\s]*|)\)")  # a link out of docs/


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the root, the tables and figures of results/, and the notebook's page."""
    results = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "results").iterdir())]
    for name in (*PAGES, *results):
        files.append(
            File(name, str(ROOT), config["site_dir"], use_directory_urls=config.use_directory_urls)
        )
    files.append(File.generated(config, "quickstart.md", content=notebook_page()))
    return files


def notebook_page() -> str:
    """docs/quickstart.ipynb in Markdown."""
    # mkdocs runs this file by its path, so `import notebook` would not find its neighbour.
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs/notebook.py")
    notebook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebook)
    text: str = notebook.to_markdown(notebook.load(ROOT / "docs/quickstart.ipynb"))
    return text


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points the links of pages at the site's folders. A link to code becomes its text."""
    if Path(page.file.src_uri).parent == Path("results"):
        return markdown.replace("](../docs/", "](../")

    def in_the_site(link: re.Match) -> str:
        text, name, anchor = link.groups()
        known = files.get_file_from_path(name) is not None
        return f"[{text}]({name}{anchor})" if known else text

    markdown = markdown.replace("](docs/", "](").replace("quickstart.ipynb)", "quickstart.md)")
    return LINK.sub(in_the_site, markdown)
