"""Exports: a candidate written as the file that a tool reads. One file per tool fills the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from search import allocation
from search.allocation import LayerSchemes
from search.candidate import Candidate
from search.errors import InvalidRequest
from search.inventory import Inventory


@dataclass(frozen=True, slots=True)
class Exported:
    """What is exported: one candidate of a search, with the model and the choices it was measured under."""

    model: str
    inventory: Inventory
    target: str
    quantizer: str
    candidate: Candidate

    @property
    def schemes(self) -> LayerSchemes:
        """The candidate's scheme of every searched layer."""
        return allocation.from_json(self.candidate.allocation)


@dataclass(frozen=True, slots=True)
class Export:
    """A format: its media type, the file name it is offered under, and the function that writes it."""

    name: str
    media_type: str
    filename: str
    description: str
    render: Callable[[Exported], str]


EXPORTS: dict[str, Export] = {}


def export(
    name: str, *, filename: str, description: str, media_type: str = "application/json"
) -> Callable[[Callable[[Exported], str]], Callable[[Exported], str]]:
    """Register the decorated function as the writer of format `name`."""

    def register(function: Callable[[Exported], str]) -> Callable[[Exported], str]:
        EXPORTS[name] = Export(name, media_type, filename, description, function)
        return function

    return register


def render(name: str, exported: Exported) -> str:
    """`exported` in format `name`.

    Raises InvalidRequest for an unknown format, ExportRefused when the tool could not load the result.
    """
    if name not in EXPORTS:
        raise InvalidRequest(f"'{name}' is not an export format", field="format", value=name, accepted=sorted(EXPORTS))
    return EXPORTS[name].render(exported)


# Each module registers its format as it is imported.
from search.exports import native, vllm  # noqa: E402

__all__ = ["EXPORTS", "Export", "Exported", "export", "native", "render", "vllm"]
