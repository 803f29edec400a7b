"""The tables of the first release."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "searches",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True)),
        sa.Column("state", sa.Text, nullable=False, server_default="queued"),
        sa.Column("stage", sa.Text),
        sa.Column("done", sa.Integer, nullable=False, server_default="0"),
        sa.Column("total", sa.Integer, nullable=False, server_default="0"),
        sa.Column("request", JSONB, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
        sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
        sa.Column("max_attempts", sa.Integer, nullable=False, server_default="3"),
        sa.Column("owner", sa.Text),
        sa.Column("lease_until", TIMESTAMP(timezone=True)),
        sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.text("false")),
        sa.Column("error", JSONB),
        sa.Column("summary", JSONB),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("body_digest", sa.Text),
        sa.Column("created_at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("started_at", TIMESTAMP(timezone=True)),
        sa.Column("finished_at", TIMESTAMP(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="searches_pkey"),
        sa.UniqueConstraint("idempotency_key", name="searches_idempotency_key_key"),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("searches_state_check")
        ),
        sa.CheckConstraint(
            "stage IN ('profile', 'sensitivity', 'baselines', 'optimize', 'measure')", name=op.f("searches_stage_check")
        ),
    )
    op.create_index(
        "searches_unfinished",
        "searches",
        [sa.text("priority DESC"), "id"],
        postgresql_where=sa.text("state IN ('queued', 'running')"),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True)),
        sa.Column("search_id", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("data", JSONB, nullable=False),
        sa.Column("created_at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.PrimaryKeyConstraint("id", name="events_pkey"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="events_search_id_fkey", ondelete="CASCADE"),
    )
    op.create_index("events_search_id_id", "events", ["search_id", "id"])
    op.create_table(
        "results",
        sa.Column("key", sa.Text),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("value", JSONB, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("created_at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.PrimaryKeyConstraint("key", name="results_pkey"),
    )
    op.create_table(
        "candidates",
        sa.Column("search_id", sa.BigInteger),
        sa.Column("number", sa.Integer),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("allocation", JSONB, nullable=False),
        sa.Column("predicted", JSONB, nullable=False),
        sa.Column("costs", JSONB, nullable=False),
        sa.Column("metrics", JSONB, nullable=False),
        sa.Column("fits", sa.Boolean, nullable=False),
        sa.Column("on_frontier", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("search_id", "number", name="candidates_pkey"),
        sa.ForeignKeyConstraint(["search_id"], ["searches.id"], name="candidates_search_id_fkey", ondelete="CASCADE"),
    )
    op.create_table(
        "models",
        sa.Column("name", sa.Text),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("inventory", JSONB),
        sa.Column("created_at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.PrimaryKeyConstraint("name", name="models_pkey"),
    )
    op.create_table(
        "latency_profiles",
        sa.Column("key", sa.Text),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("profile", JSONB, nullable=False),
        sa.Column("created_at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.PrimaryKeyConstraint("key", name="latency_profiles_pkey"),
    )


def downgrade() -> None:
    for table in ("latency_profiles", "models", "candidates", "results", "events", "searches"):
        op.drop_table(table)
