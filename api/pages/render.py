"""Templates to HTML."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import plotly
from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from api.auth import asking
from api.metrics import is_relative
from api.pages.timeline import STAGES
from api.resources import OBJECTIVES, RESOURCES, budget_text, loss_text
from api.times import duration, moment

STATIC = Path(__file__).parent.parent / "static"
VENDOR = STATIC / "vendor"
"""Scripts of others; see the README there."""


def plotly_script() -> Path:
    """The plotly.min.js that the plotly package carries."""
    return Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def template(name: str, /, **values: Any) -> str:
    """The template `name` with `values`."""
    return _environment().get_template(name).render(**values)


def page(name: str, /, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> HTMLResponse:
    """The template `name` as a response."""
    return HTMLResponse(template(name, **values), status_code=status, headers=headers)


def wants_page(request: Request) -> bool:
    """Whether a browser asks for a page, and not a program for data."""
    on_page = not request.url.path.startswith("/v1/") and "text/html" in request.headers.get("accept", "")
    return on_page and request.method == "GET"


def problem_page(request: Request, problem: dict[str, Any], headers: dict[str, str] | None) -> HTMLResponse:
    """A problem document as a page a person can read."""
    return page("problem.html", status=problem["status"], headers=headers, problem=problem)


def breakable(name: str) -> Markup:
    """A qualified name that may be broken after its dots and plusses."""
    return Markup(escape(name).replace(".", Markup(".<wbr>")).replace("+", Markup("+<wbr>")))  # noqa: S704 - escaped


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("api", "pages/templates"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Code and templates are of one version: an upgrade under a running server changes neither.
        auto_reload=False,
    )
    environment.filters |= {"loss": loss_text, "moment": moment, "breakable": breakable}
    environment.tests["relative"] = is_relative
    environment.globals |= {
        "OBJECTIVES": OBJECTIVES,
        "RESOURCES": RESOURCES,
        "STAGES": STAGES,
        "asking": asking,
        "budget_text": budget_text,
        "duration": duration,
        "plotly_version": plotly.__version__,
    }
    return environment
