"""Installs requirements with uv, in seconds instead of pip's minutes. If uv fails, pip is used.

    python -m base.install requirements.txt

uv does not read pip's configuration. So this passes its mirrors, wheel folders and constraints on
to uv. It needs nothing but the standard library.
"""

import ast
import os
import subprocess
import sys

# pip's setting -> uv's environment variable, and the separator of several values there.
SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "cert": ("SSL_CERT_FILE", " "),
}
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def settings_for_uv(pip_config: str) -> dict[str, str]:
    """Turns the output of `pip config list` into environment variables of uv."""
    found = {}
    for line in pip_config.splitlines():
        name, _, value = line.partition("=")
        if (key := name.rpartition(".")[2]) in SETTINGS:
            variable, separator = SETTINGS[key]
            found[variable] = separator.join(ast.literal_eval(value).split())
    if "UV_INDEX" in found:
        # Like pip, take the best version in all indexes, not in the first one with any version.
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found


def main() -> None:
    (requirements,) = sys.argv[1:]
    config = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    )
    environment = settings_for_uv(config.stdout) | dict(os.environ)
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    if subprocess.run([*PIP, "uv"]).returncode == 0:
        if subprocess.run([*uv, "-r", requirements], env=environment).returncode == 0:
            return
    print("uv could not install the packages: using pip", file=sys.stderr, flush=True)
    sys.exit(subprocess.run([*PIP, "-r", requirements]).returncode)


if __name__ == "__main__":
    main()
