"""Names that do not come in by a request body: the same rules as `search.request` has for them."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from search.errors import InvalidRequest
from search.request import DatasetName, ModelName

HUB = "hub:"
"""Before the Hugging Face id that is a model's source; other sources are folders and files."""

_MODEL: TypeAdapter[str] = TypeAdapter(ModelName)
_DATASET: TypeAdapter[str] = TypeAdapter(DatasetName)


def model_name(text: str) -> str:
    """`text`, which by its form is a registered name or a Hugging Face id.

    Raises InvalidRequest for anything else: a path, a URL, a word with blanks.
    """
    try:
        return _MODEL.validate_python(text)
    except ValidationError as error:
        raise InvalidRequest(
            f"'{text[:200]}' is not the name of a model; accepted: letters, digits, dots, dashes and underscores, at "
            "most 200, with one slash in a Hugging Face id (org/name)",
            field="model",
            value=text[:200],
            accepted="a registered name (GET /v1/models), or a Hugging Face id such as org/name",
        ) from error


def is_dataset_name(text: str) -> bool:
    """Whether `text` by its form names a data set: no path out of the data sets folder, no URL."""
    try:
        _DATASET.validate_python(text)
    except ValidationError:
        return False
    return True
