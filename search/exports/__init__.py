"""Exports: a candidate written as the file that a tool reads. One file per tool fills the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from search import allocation
from search.allocation import LayerSchemes
from search.candidate import Candidate
from search.errors import ExportRefused, InvalidRequest
from search.inventory import Inventory, whole_and_channels
from search.names import HUB


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

    `carries` says in a sentence which schemes and models it can express. `use` is the one command that uses the file,
    with `{file}`, `{search}`, `{point}`, `{model}` and `{source}` in it, see `command`. `splits_layers`: whether it can
    give output channels of one layer different schemes.
    """

    name: str
    media_type: str
    filename: str
    description: str
    carries: str
    use: str
    render: Callable[[Exported], str]
    splits_layers: bool = False

    def command(self, *, search: int, point: int, model: str, source: str) -> str:
        """What a person types to use the file of point `point` of search `search` on `model`, which the tool loads from
        `source`, see `loaded_from`."""
        return self.use.format(file=self.filename, search=search, point=point, model=model, source=source)


EXPORTS: dict[str, Export] = {}


def loaded_from(source: str | None) -> str:
    """What another tool loads a model of this stored source from: its Hugging Face id, else MODEL_FOLDER, for which a
    person puts the folder; a registered name means nothing to other tools."""
    return source.removeprefix(HUB) if source and source.startswith(HUB) else "MODEL_FOLDER"


def export(
    name: str,
    *,
    filename: str,
    description: str,
    carries: str,
    use: str,
    media_type: str = "application/json",
    splits_layers: bool = False,
) -> Callable[[Callable[[Exported], str]], Callable[[Exported], str]]:
    """Register the decorated function as the writer of format `name`."""

    def register(function: Callable[[Exported], str]) -> Callable[[Exported], str]:
        EXPORTS[name] = Export(name, media_type, filename, description, carries, use, function, splits_layers)
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


def refusal(name: str, exported: Exported) -> ExportRefused | None:
    """Why format `name` cannot carry `exported`; None when it can."""
    try:
        render(name, exported)
    except ExportRefused as error:
        return error
    return None


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
from search.exports import (  # noqa: E402, F401
    autoround,
    csv,
    gptqmodel,
    llama_cpp,
    llm_compressor,
    modelopt,
    native,
    nncf,
    olive,
    torchao,
    vllm,
)

__all__ = ["EXPORTS", "Export", "Exported", "export", "loaded_from", "refusal", "render"]
