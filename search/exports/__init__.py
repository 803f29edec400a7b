"""Exports: a candidate written as the file that a tool reads. One file per tool fills the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from search import allocation
from search.allocation import LayerSchemes
from search.candidate import Candidate
from search.errors import ExportRefused, InvalidRequest
from search.inventory import Inventory, whole_and_channels


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
        """The candidate's scheme of every searched layer; of its parts, where its output channels take several."""
        schemes = allocation.from_json(self.candidate.allocation)
        return {layer.name: scheme for layer, scheme in allocation.placed(schemes, self.inventory.layers)}


@dataclass(frozen=True, slots=True)
class Export:
    """A format: its media type, the file name it is offered under, and the function that writes it.

    `splits_layers`: whether it can give output channels of one layer different schemes.
    """

    name: str
    media_type: str
    filename: str
    description: str
    render: Callable[[Exported], str]
    splits_layers: bool = False


EXPORTS: dict[str, Export] = {}


def export(
    name: str,
    *,
    filename: str,
    description: str,
    media_type: str = "application/json",
    splits_layers: bool = False,
) -> Callable[[Callable[[Exported], str]], Callable[[Exported], str]]:
    """Register the decorated function as the writer of format `name`."""

    def register(function: Callable[[Exported], str]) -> Callable[[Exported], str]:
        EXPORTS[name] = Export(name, media_type, filename, description, function, splits_layers)
        return function

    return register


def render(name: str, exported: Exported) -> str:
    """`exported` in format `name`.

    Raises InvalidRequest for an unknown format, ExportRefused when the tool could not load the result.
    """
    if name not in EXPORTS:
        raise InvalidRequest(f"'{name}' is not an export format", field="format", value=name, accepted=sorted(EXPORTS))
    if not EXPORTS[name].splits_layers:
        _refuse_parts(name, exported)
    return EXPORTS[name].render(exported)


def _refuse_parts(name: str, exported: Exported) -> None:
    for layer, scheme in exported.schemes.items():
        if whole_and_channels(layer)[1] is not None:
            raise ExportRefused(
                f"this point gives output channels of one layer several schemes; in '{name}' a layer has one",
                field=layer,
                value=str(scheme),
                accepted=f"the formats {', '.join(sorted(one for one in EXPORTS if EXPORTS[one].splits_layers))}",
            )


# Each module registers its format as it is imported.
from search.exports import native, vllm  # noqa: E402

__all__ = ["EXPORTS", "Export", "Exported", "export", "native", "render", "vllm"]
