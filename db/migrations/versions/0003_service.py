"""Keys and quotas, workers, tallies; events that are said once; results that know which search computed them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

OPEN = sa.text("state IN ('queued', 'running')")


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True)),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("scopes", ARRAY(sa.Text), nullable=False),
        sa.Column("created_at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("expires_at", TIMESTAMP(timezone=True)),
        sa.Column("revoked_at", TIMESTAMP(timezone=True)),
        sa.Column("last_used_at", TIMESTAMP(timezone=True)),
        sa.Column("max_open", sa.Integer, nullable=False),
        sa.Column("rate_per_minute", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="api_keys_pkey"),
        sa.UniqueConstraint("name", name="api_keys_name_key"),
        sa.UniqueConstraint("digest", name="api_keys_digest_key"),
        sa.CheckConstraint("scopes <@ ARRAY['read', 'write', 'admin']", name=op.f("api_keys_scopes_check")),
    )
    op.create_table(
        "workers",
        sa.Column("owner", sa.Text),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("started_at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("seen_at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("evaluators", sa.Integer, nullable=False, server_default="0"),
        sa.Column("gpus", JSONB, nullable=False, server_default=sa.text("'[]'::jsonb")),
        sa.PrimaryKeyConstraint("owner", name="workers_pkey"),
    )
    op.create_table(
        "tallies",
        sa.Column("name", sa.Text),
        sa.Column("label", sa.Text),
        sa.Column("value", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("name", "label", name="tallies_pkey"),
    )
    op.add_column("events", sa.Column("once", sa.Text))
    op.create_unique_constraint("events_search_id_key", "events", ["search_id", "once"])
    op.add_column("results", sa.Column("search_id", sa.BigInteger))
    op.create_foreign_key("results_search_id_fkey", "results", "searches", ["search_id"], ["id"], ondelete="SET NULL")
    op.create_index("results_search_id", "results", ["search_id"])
    op.add_column("searches", sa.Column("key_id", sa.BigInteger))
    op.create_foreign_key("searches_key_id_fkey", "searches", "api_keys", ["key_id"], ["id"], ondelete="RESTRICT")
    op.drop_constraint("searches_idempotency_key_key", "searches")
    op.create_index(
        "searches_idempotency",
        "searches",
        ["key_id", "idempotency_key"],
        unique=True,
        postgresql_nulls_not_distinct=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_index("searches_key_id_id", "searches", ["key_id", "id"])
    op.create_index("searches_state_id", "searches", ["state", "id"])
    op.create_index("searches_queued", "searches", ["created_at"], postgresql_where=sa.text("state = 'queued'"))
    op.create_index("searches_open", "searches", ["key_id"], postgresql_where=OPEN)
    op.create_index(
        "searches_spent",
        "searches",
        ["id"],
        postgresql_where=sa.text(f"{OPEN} AND (cancel_requested OR attempt >= max_attempts)"),
    )


def downgrade() -> None:
    for name in ("spent", "open", "queued", "state_id", "key_id_id", "idempotency"):
        op.drop_index(f"searches_{name}", "searches")
    op.execute("UPDATE searches SET idempotency_key = NULL WHERE key_id IS NOT NULL")
    op.create_unique_constraint("searches_idempotency_key_key", "searches", ["idempotency_key"])
    op.drop_column("searches", "key_id")
    op.drop_column("results", "search_id")
    op.drop_column("events", "once")
    for table in ("tallies", "workers", "api_keys"):
        op.drop_table(table)
