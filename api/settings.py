"""What a deployment may set, read from BITFRONTIER_… environment variables."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Settings of the HTTP service."""

    model_config = SettingsConfigDict(env_prefix="BITFRONTIER_", use_attribute_docstrings=True)

    database_url: str | None = Field(None, repr=False)
    """Postgres to use; left out, the embedded one."""
    auth: Literal["keys", "open"] = "keys"
    """`keys`: every request needs an API key. `open`: none is asked for, on this machine's own names."""
    hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Further names that an open service answers to, separated by commas."""
    max_body_bytes: int = Field(1_000_000, ge=1)
    """Largest request body that is read."""
    body_seconds: float = Field(10.0, gt=0)
    """How long a request body may take to arrive."""
    answer_seconds: float = Field(30.0, gt=0)
    """How long an answer may take to begin."""
    statement_seconds: float = Field(15.0, gt=0)
    """How long the database may take over one statement."""
    max_streams: int = Field(1000, ge=0)
    """Event streams that one process holds open at once."""

    @field_validator("hosts", mode="before")
    @classmethod
    def _split(cls, hosts: object) -> object:
        if not isinstance(hosts, str):
            return hosts
        return tuple(host.strip().lower() for host in hosts.split(",") if host.strip())
