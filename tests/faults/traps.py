"""Faults at an exact write: triggers that hold a transaction, cut its connection, lose the answer to its commit, or
refuse what it writes. Nothing in the service knows of them."""

from __future__ import annotations

from sqlalchemy import Engine, text

from db.tables import Base

HOLD = "PERFORM pg_advisory_xact_lock_shared({key}, {trap});"
"""Keep the transaction where it is until the test opens the trap."""

DROP = "PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(5);"
"""Cut the connection: the transaction is rolled back."""

LOSE_ANSWER = "PERFORM set_config('synchronous_commit', 'on', true);"
"""Commit, and cut the connection before the answer: the commit, durable already, waits for a standby that there is not,
until `Traps.cut` ends the wait together with the connection."""

DISK_FULL = "RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';"
"""Refuse the write."""

KEY = 0x7261  # "ra", of the advisory locks that hold

SPRING = """
CREATE FUNCTION faults.spring_{trap}() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE n bigint;
BEGIN
    IF {when} THEN
        n := nextval('faults.count_{trap}') - {skip};
        {springs}
    END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER faults_{trap} BEFORE {operation} ON {table} FOR EACH ROW EXECUTE FUNCTION faults.spring_{trap}()
"""

WITNESS = """
CREATE TABLE faults.writes (relation text, operation text, role text, number bigint);
CREATE FUNCTION faults.witness() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO faults.writes SELECT TG_TABLE_NAME, TG_OP, session_user, count(*) FROM changed HAVING count(*) > 0;
    RETURN NULL;
END $$
"""
CHANGED = {"INSERT": "NEW", "UPDATE": "NEW", "DELETE": "OLD"}


class Trap:
    """Springs at the writes it was laid at, in the order of its springs, and then lets all through."""

    def __init__(self, traps: Traps, number: int, skip: int) -> None:
        self._traps, self._number, self._skip = traps, number, skip

    @property
    def met(self) -> int:
        """How many writes met it, also those that were rolled back, and those it let through after its last spring."""
        count = f"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM faults.count_{self._number}"
        return max(0, self._traps.scalar(count) - self._skip)

    @property
    def holds(self) -> bool:
        """Whether a transaction stands in it."""
        waiting = f"locktype = 'advisory' AND classid = {KEY} AND objid = {self._number} AND NOT granted"
        return self._traps.scalar(f"SELECT count(*) FROM pg_locks WHERE {waiting}") > 0

    def open(self) -> None:
        """Let whom it holds go on."""
        self._traps.run(f"SELECT pg_advisory_unlock({KEY}, {self._number})")

    def lift(self) -> None:
        """Take it away."""
        self.open()
        self._traps.run(f"DROP FUNCTION faults.spring_{self._number} CASCADE")


class Traps:
    """What lies on the tables of one database until `close`."""

    def __init__(self, engine: Engine) -> None:
        self._connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._laid = 0
        self.run("SET lock_timeout = '240s'")
        self.run("DROP SCHEMA IF EXISTS faults CASCADE")
        self.run("CREATE SCHEMA faults")

    def lay(self, table: str, operation: str, *springs: str, when: str = "true", skip: int = 0, then: str = "") -> Trap:
        """Spring at writes of which `when` (a condition on NEW and OLD) holds, the first `skip` of them let through;
        `then` springs at all that follow.

        They are counted outside of transactions: a write that is tried again meets the next spring.
        """
        self._laid += 1
        known = {"key": KEY, "trap": self._laid}
        cases = [f"IF n = {n} THEN {spring.format(**known)} END IF;" for n, spring in enumerate(springs, start=1)]
        cases += [f"IF n > {len(springs)} THEN {then} END IF;"] if then else []
        self.run(f"CREATE SEQUENCE faults.count_{self._laid}")
        self.run(f"SELECT pg_advisory_lock({KEY}, {self._laid})")
        spring = {"when": when, "skip": skip, "springs": "\n".join(cases), "operation": operation, "table": table}
        self.run(SPRING.format(**spring, **known))
        return Trap(self, self._laid, skip)

    def unanswered(self) -> int:
        """How many commits are durable and wait to be answered."""
        return self.scalar("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")

    def cut(self) -> list[int]:
        """End the connections whose commits are durable and wait to be answered; the processes that served them."""
        waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        processes = list(self._connection.exec_driver_sql(waiting).scalars())
        for process in processes:
            self.run(f"SELECT pg_terminate_backend({process})")
        return processes

    def queueing(self) -> int:
        """How many transactions wait for a row that another has locked."""
        return self.scalar("SELECT count(*) FROM pg_locks WHERE locktype IN ('transactionid', 'tuple') AND NOT granted")

    def witness(self, tables: list[str] | None = None) -> None:
        """Note from now on which role writes which tables."""
        self.run(WITNESS)
        for table in tables or Base.metadata.tables:
            for operation, rows in CHANGED.items():
                self.run(
                    f"CREATE TRIGGER witness_{operation} AFTER {operation} ON {table} REFERENCING {rows} TABLE AS "
                    "changed FOR EACH STATEMENT EXECUTE FUNCTION faults.witness()"
                )

    def witnessed(self, role: str | None = None) -> set[tuple[str, str]]:
        """(table, operation) of the committed writes, of one role or of all."""
        whose = f"WHERE role = '{role}'" if role else ""
        return {tuple(row) for row in self._all(f"SELECT DISTINCT relation, operation FROM faults.writes {whose}")}

    def close(self) -> None:
        """Take everything away."""
        self.run("SELECT pg_advisory_unlock_all()")
        self.cut()
        self.run("DROP SCHEMA faults CASCADE")
        self._connection.close()

    def run(self, statement: str) -> None:
        """Run SQL outside of any transaction."""
        self._connection.exec_driver_sql(statement)

    def scalar(self, query: str) -> int:
        """The number that a query gives."""
        return int(self._connection.exec_driver_sql(query).scalar_one())

    def _all(self, query: str) -> list[tuple[str, str]]:
        return [tuple(row) for row in self._connection.execute(text(query))]


def let_commits_wait(engine: Engine) -> None:
    """Set the server up for LOSE_ANSWER; who does not ask to wait commits as before."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for setting in ("synchronous_commit = local", "synchronous_standby_names = 'nobody'"):
            connection.execute(text(f"ALTER SYSTEM SET {setting}"))
        connection.execute(text("SELECT pg_reload_conf()"))
