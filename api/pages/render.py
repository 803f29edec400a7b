"""Templates to HTML."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import plotly
from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from api.metrics import is_relative
from api.resources import OBJECTIVES, RESOURCES, budget_text, loss_text

STATIC = Path(__file__).parent.parent / "static"


def plotly_script() -> Path:
    """The plotly.min.js that the plotly package carries."""
    return Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def template(name: str, /, **values: Any) -> str:
    """The template `name` with `values`."""
    return _environment().get_template(name).render(**values)


def page(name: str, /, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> HTMLResponse:
    """The template `name` as a response."""
    return HTMLResponse(template(name, **values), status_code=status, headers=headers)


def problem_page(request: Request, problem: dict[str, Any], headers: dict[str, str] | None) -> HTMLResponse:
    """A problem document as a page a person can read."""
    return page("problem.html", status=problem["status"], headers=headers, problem=problem)


def moment(time: datetime | None) -> str:
    """A time in UTC, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M UTC") if time else "—"


def duration(start: datetime | None, end: datetime | None) -> str:
    """The time between two moments: `2 min 5 s`."""
    if start is None or end is None:
        return "—"
    seconds = round((end - start).total_seconds())
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (seconds, "s")]
    return " ".join(f"{amount} {unit}" for amount, unit in parts if amount) or "0 s"


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
    )
    environment.filters |= {"loss": loss_text, "moment": moment, "breakable": breakable}
    environment.tests["relative"] = is_relative
    environment.globals |= {
        "OBJECTIVES": OBJECTIVES,
        "RESOURCES": RESOURCES,
        "budget_text": budget_text,
        "duration": duration,
        "plotly_version": plotly.__version__,
    }
    return environment
