"""`python -m db migrate` brings the schema of the database up to date."""

from __future__ import annotations

import argparse
import sys

from db.engine import connect, migrate
from search.errors import BitfrontierError


def main() -> int:
    """0 when the schema is up to date, 1 with a plain message otherwise."""
    parser = argparse.ArgumentParser(prog="python -m db", description=__doc__)
    parser.add_subparsers(dest="command", required=True).add_parser("migrate", help="bring the schema up to date")
    parser.parse_args()
    try:
        engine = connect()
        migrate(engine)
    except BitfrontierError as error:
        print(error.detail, file=sys.stderr)
        return 1
    print(f"the schema of {engine.url.render_as_string()} is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
