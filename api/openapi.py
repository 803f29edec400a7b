"""What the OpenAPI description says of keys."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api.keyring import COOKIE
from api.middleware.gate import is_public

SCHEMES = {
    "key": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "bf_…",
        "description": "An API key, made with `bitfrontier keys create NAME`. Its scope says what it may do: `read`; "
        "`write`, also start and cancel searches; `admin`, also see those of all keys. A search of another key is not "
        "found.",
    },
    "cookie": {
        "type": "apiKey",
        "in": "cookie",
        "name": COOKIE,
        "description": "The same key, as a browser keeps it after `/login`.",
    },
}


def describe_keys(app: FastAPI) -> None:
    """Have the description of `app` name how keys are sent, and which operations need none."""
    generate = app.openapi

    def described() -> dict[str, Any]:
        document = generate()
        document["components"]["securitySchemes"] = SCHEMES
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if is_public(path) else [{name: []} for name in SCHEMES]
        return document

    app.openapi = described  # type: ignore[method-assign]
