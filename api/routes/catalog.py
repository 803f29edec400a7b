"""What a search may name: models, schemes, metrics, targets."""

from __future__ import annotations

from fastapi import APIRouter

from api.catalog import (
    ExportDocument,
    MetricDocument,
    Metrics,
    ModelDocument,
    Models,
    SchemeDocument,
    Schemes,
    TargetDocument,
    Targets,
)
from api.dependencies import CurrentAsker, Database
from api.problems import READ, responses
from api.strict import StrictRoute
from db.models import list_models
from search.exports import EXPORTS
from search.metrics import METRICS
from search.scheme import ACTIVATION_BITS, FULL_PRECISION, GRAMMAR, GROUP_SIZES, WEIGHT_BITS, Scheme
from search.targets import TARGETS

router = APIRouter(prefix="/v1", tags=["catalog"], route_class=StrictRoute)

EXAMPLE_COLUMNS = 4096


@router.get("/models", responses=responses(*READ), summary="Registered models")
def models(engine: Database, asker: CurrentAsker) -> Models:
    """Models that a search may name; any Hugging Face id `org/name` may be named besides.

    A key with the scope admin also sees the ids that searches have named.
    """
    # Which ids others have searched is not for everyone.
    documents = [ModelDocument.of(model) for model in list_models(engine) if model.added or asker.sees_all]
    return Models(models=documents)


@router.get("/schemes", responses=responses(*READ), summary="The scheme grammar")
def schemes() -> Schemes:
    """How schemes are written; every combination is accepted, the examples show some."""
    return Schemes(
        grammar=GRAMMAR,
        weight_bits=list(WEIGHT_BITS),
        activation_bits=list(ACTIVATION_BITS),
        group_sizes=list(GROUP_SIZES),
        examples=[_scheme(example) for example in example_schemes()],
    )


@router.get("/metrics", responses=responses(*READ), summary="Sensitivity metrics")
def metrics() -> Metrics:
    """The metrics that a search may predict the loss with, and what each one needs and says."""
    return Metrics(
        metrics=[
            MetricDocument(
                name=metric.name,
                title=metric.title,
                evidence=metric.evidence,
                needs=list(metric.needs),
                in_loss_units=metric.in_loss_units,
                sees_activations=metric.sees_activations,
            )
            for metric in METRICS.values()
        ]
    )


@router.get("/targets", responses=responses(*READ), summary="Targets and exports")
def targets() -> Targets:
    """The runtimes a search can aim at, and the files a point can become."""
    return Targets(
        targets=[
            TargetDocument(
                name=target.name,
                description=target.description,
                fused=[list(siblings) for siblings in target.fused],
                ties_experts=target.ties_experts,
                schemes=[str(scheme) for scheme in example_schemes() if target.refuses_scheme(scheme) is None],
                default_schemes=list(target.default_schemes),
            )
            for target in TARGETS.values()
        ],
        exports=[
            ExportDocument(
                name=export.name,
                description=export.description,
                media_type=export.media_type,
                filename=export.filename,
                carries=export.carries,
                use=export.use,
            )
            for export in EXPORTS.values()
        ],
    )


def example_schemes() -> list[Scheme]:
    """One scheme of each shape at every width that quantizes, and full precision."""
    widths = [bits for bits in WEIGHT_BITS if bits < FULL_PRECISION.weight_bits]
    grouped = [Scheme(bits, group_size=64) for bits in widths]
    asymmetric = [Scheme(bits, group_size=64, symmetric=False) for bits in widths]
    per_channel = [Scheme(bits) for bits in widths]
    activations = [Scheme(bits, bits) for bits in widths if bits in ACTIVATION_BITS]
    return [*grouped, *asymmetric, *per_channel, *activations, FULL_PRECISION]


def _scheme(scheme: Scheme) -> SchemeDocument:
    return SchemeDocument(
        scheme=str(scheme),
        weight_bits=scheme.weight_bits,
        activation_bits=scheme.activation_bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        bits_per_weight=scheme.storage_bits(1, EXAMPLE_COLUMNS) / EXAMPLE_COLUMNS,
    )
