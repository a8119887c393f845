"""What every asset and sensor is given: the settings of a home, its store and its clock. No logic here."""

from __future__ import annotations

from functools import cached_property

from dagster import ConfigurableResource
from pydantic import ConfigDict

from redqueen.clock import Clock, open_clock
from redqueen.settings import Settings, load_settings
from redqueen.store import ObjectStore, open_store


class Environment(ConfigurableResource):
    """Settings, object store and clock of one Red Queen home."""

    home: str | None = None
    """The home directory; `RQ_HOME`, then `.redqueen`, when not given."""

    model_config = ConfigDict(frozen=True, ignored_types=(cached_property,))

    @cached_property
    def settings(self) -> Settings:
        return load_settings(self.home)

    @cached_property
    def store(self) -> ObjectStore:
        return open_store(self.settings)

    @cached_property
    def clock(self) -> Clock:
        return open_clock(self.settings, self.store)
