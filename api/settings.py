"""What a deployment may set, read from BITFRONTIER_… environment variables."""

from __future__ import annotations

from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Settings of the HTTP service."""

    model_config = SettingsConfigDict(env_prefix="BITFRONTIER_", use_attribute_docstrings=True)

    database_url: str | None = None
    """Postgres to use; left out, the embedded one."""
    max_body_bytes: int = 1_000_000
    """Largest request body that is read."""
