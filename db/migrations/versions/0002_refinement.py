"""Stages after the first measurements, and what candidates are expected to lose and would save."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BEFORE = "stage IN ('profile', 'sensitivity', 'baselines', 'optimize', 'measure')"
AFTER = "stage IN ('profile', 'sensitivity', 'baselines', 'optimize', 'measure', 'refine', 'evolve', 'accept')"


def upgrade() -> None:
    op.drop_constraint(op.f("searches_stage_check"), "searches")
    op.create_check_constraint(op.f("searches_stage_check"), "searches", AFTER)
    for name in ("expected", "shadow_prices"):
        op.add_column("candidates", sa.Column(name, JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")))


def downgrade() -> None:
    for name in ("shadow_prices", "expected"):
        op.drop_column("candidates", name)
    op.execute("UPDATE searches SET stage = 'measure' WHERE stage IN ('refine', 'evolve', 'accept')")
    op.drop_constraint(op.f("searches_stage_check"), "searches")
    op.create_check_constraint(op.f("searches_stage_check"), "searches", BEFORE)
