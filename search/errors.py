"""Problems a person can act on. Each type carries its HTTP status and its RFC 9457 problem type."""

from __future__ import annotations

from typing import Any, ClassVar


class BitfrontierError(Exception):
    """Base of every error that may reach a user; `problem()` is the RFC 9457 document."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Something went wrong on our side"

    def __init__(self, detail: str, *, field: str | None = None, value: Any = None, accepted: Any = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.value = value
        self.accepted = accepted

    def problem(self) -> dict[str, Any]:
        """The problem document: type, title, status, detail and, where known, field, value and accepted."""
        document: dict[str, Any] = {
            "type": f"urn:bitfrontier:problem:{self.type}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        extra = {"field": self.field, "value": self.value, "accepted": self.accepted}
        return document | {key: value for key, value in extra.items() if value is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray pickles exceptions across processes; keyword-only arguments need help.
        return (_rebuild, (type(self), self.detail, self.field, self.value, self.accepted))


def _rebuild(
    cls: type[BitfrontierError], detail: str, field: str | None, value: Any, accepted: Any
) -> BitfrontierError:
    return cls(detail, field=field, value=value, accepted=accepted)


class InvalidRequest(BitfrontierError):
    """A field of the request has a value that is not accepted."""

    status = 422
    type = "invalid-request"
    title = "The request has a value that is not accepted"


class InfeasibleBudget(BitfrontierError):
    """No allocation of the space fits the budgets."""

    status = 422
    type = "infeasible-budget"
    title = "No allocation fits the budget"


class UnsupportedModel(BitfrontierError):
    """The model cannot be loaded, or has nothing to quantize."""

    status = 422
    type = "unsupported-model"
    title = "The model cannot be searched"


class ModelTooLarge(UnsupportedModel):
    """The model does not fit into the memory that is free where it would be loaded."""

    type = "model-too-large"
    title = "The model does not fit into memory"


class InvalidCalibration(BitfrontierError):
    """The calibration data is missing, empty or too short."""

    status = 422
    type = "invalid-calibration"
    title = "The calibration data cannot be used"


class ExportRefused(BitfrontierError):
    """The named tool cannot load this allocation."""

    status = 422
    type = "export-refused"
    title = "The allocation cannot be exported to this format"


class NotFound(BitfrontierError):
    """What was asked for does not exist."""

    status = 404
    type = "not-found"
    title = "Not found"


class Conflict(BitfrontierError):
    """The request contradicts the present state."""

    status = 409
    type = "conflict"
    title = "The request contradicts the present state"
