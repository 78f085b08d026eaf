"""The classes of a model with a harmonic head: the logit of token v is -n log d(h, w_v).

A folder that `save_pretrained` or `python -m interop.export` writes holds a copy of this file, and
`from_pretrained(FOLDER, trust_remote_code=True)` runs it. The head comes from the package
`harmonic` where that is installed, with compiled kernels. Elsewhere the package's own files are
imported, whose text is in harmonic_files.py.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

try:
    from harmonic.integrations import transformers as heads
except ImportError:
    # transformers copies a folder's files one by one and knows no packages inside it. So the
    # package travels as text, and becomes a package inside this module.
    from .harmonic_files import FILES  # type: ignore[import-not-found]  # an export has it

    # typeshed's two classes disagree about `source_to_code`, which is not used.
    class Importer(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):  # type: ignore[misc]
        """Imports `harmonic.loss` as a part of this module, from the text of harmonic/loss.py."""

        def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
            inside = name.startswith(f"{__name__}.harmonic") and self._file(name) in FILES
            return importlib.util.spec_from_loader(name, self) if inside else None

        def _file(self, name: str) -> str:
            file = name.removeprefix(f"{__name__}.").replace(".", "/")
            package = f"{file}/__init__.py"
            return package if package in FILES else f"{file}.py"

        def get_filename(self, name: str) -> str:
            return str(Path(__file__, self._file(name)))

        def get_data(self, path: str | bytes) -> bytes:
            file = Path(str(path)).relative_to(__file__).as_posix()
            return "\n".join(FILES[file]).encode()

    sys.meta_path.append(Importer())
    __path__: list[str] = []  # Python imports parts of packages only, and this makes it one.
    heads = importlib.import_module(f"{__name__}.harmonic.integrations.transformers")


def __getattr__(name: str) -> Any:
    """The classes that config.json names: HarmonicX for every class X of transformers."""
    return getattr(heads, name)
