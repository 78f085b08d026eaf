"""What is handed on from pip's configuration to uv."""

from base.install import settings_for_uv


def test_settings_of_pip_for_uv():
    config = (
        ":env:.find-links='/wheels'\n"
        "global.constraint='/etc/a.txt /etc/b.txt'\n"
        "global.extra-index-url='file:///one file:///two'\n"
        "global.timeout='180'\n"
    )
    assert settings_for_uv(config) == {
        "UV_FIND_LINKS": "/wheels",
        "UV_CONSTRAINT": "/etc/a.txt /etc/b.txt",
        "UV_INDEX": "file:///one file:///two",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert settings_for_uv("") == {}
