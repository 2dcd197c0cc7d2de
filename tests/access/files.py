"""A user's and the system's configuration files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbsfs.access import config
from pbsfs.access.config import (
    configure,
    read_configuration,
)
from pbsfs.access.options import SourceOptions
from pbsfs.base.errors import UsageError


class Files:
    """A user's and the system's configuration files, and an environment that finds them."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.user = path / "home" / "pbsfs"
        self.system = path / "etc"
        monkeypatch.setattr(config, "SYSTEM_DIRECTORY", self.system)
        self.environment = {"XDG_CONFIG_HOME": str(path / "home")}

    def write(self, text: str, name: str = "config.toml", *, system: bool = False) -> Path:
        file = (self.system if system else self.user) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def options(self, given: SourceOptions | None = None, **environment: str) -> SourceOptions:
        return configure(given or SourceOptions(), self.environment | environment).options

    def refused(self, name: str = "home") -> str:
        with pytest.raises(UsageError) as caught:
            read_configuration(self.environment).profile(name)
        return str(caught.value)
