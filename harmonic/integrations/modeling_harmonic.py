"""The classes of a model with a harmonic head: the logit of token v is -n log d(h, w_v).

`save_pretrained` and `python -m interop.export` copy this file into the folder of a model. Then
`from_pretrained(FOLDER, trust_remote_code=True)` runs it. If the package `harmonic` is installed,
the head comes from there, with compiled kernels. If not, the head comes from harmonic_files.py,
which holds the text of the package's files.
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
    # transformers copies the files of a folder one by one, and supports no packages inside it. So
    # the package is stored as text, and is imported as a package inside this module.
    from .harmonic_files import FILES  # type: ignore[import-not-found]  # an export has it

    # The two base classes have different types for `source_to_code`, which is not used.
    class Importer(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):  # type: ignore[misc]
        """Imports, for example, `harmonic.loss` inside this module from harmonic/loss.py's text."""

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
    __path__: list[str] = []  # Makes this module a package, so that it can have submodules.
    heads = importlib.import_module(f"{__name__}.harmonic.integrations.transformers")


def __getattr__(name: str) -> Any:
    """The classes that config.json names: HarmonicX for every class X of transformers."""
    return getattr(heads, name)
