"""The service over HTTP, with types: what the command line uses, and any program may.

    with Client() as client:
        search = client.wait(client.create({"model": "my-model", "budgets": {"avg_bits": 4.25}}).id)
        table = client.frontier_table(search.id)

It computes nothing and loads neither the tables of the service nor what draws its pages; pandas only when a table is
asked for.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from io import BytesIO
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import httpx

from api.catalog import LatencyProfileDocument, LatencyProfiles, Metrics, ModelDocument, Models, Schemes, Targets
from api.client_errors import (
    ClientError,
    NotFinished,
    NotUnderstood,
    Refused,
    SearchCancelled,
    SearchFailed,
    Unreachable,
)
from api.documents import FINISHED, FrontierDocument, Point, SearchDocument, SearchPage, SearchSummary
from api.events import (
    Event,
    MeasuredEvent,
    NoticeEvent,
    ProgressEvent,
    StageEndEvent,
    StageEvent,
    StateEvent,
    read_event,
)
from api.transport import BUSY, DEFAULT_URL, KEY_VARIABLE, URL_VARIABLE, File, Transport
from db.states import State
from search.request import SearchRequest

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "DEFAULT_URL",
    "KEY_VARIABLE",
    "URL_VARIABLE",
    "Client",
    "ClientError",
    "Event",
    "File",
    "MeasuredEvent",
    "NotFinished",
    "NotUnderstood",
    "NoticeEvent",
    "ProgressEvent",
    "Refused",
    "SearchCancelled",
    "SearchFailed",
    "StageEndEvent",
    "StageEvent",
    "StateEvent",
    "Unreachable",
]

# Keep-alive comments come every 15 s; a stream that is silent for longer is dead.
SILENCE_SECONDS = 40.0
RECONNECT_SECONDS = 1.0
MOST_RECONNECTS = 30

Group = Literal["baselines", "dominated", "predicted"]
BASELINES: tuple[Group, ...] = ("baselines",)


class Client:
    """Talks to the service at `url`, with `key` where it asks for one; use it in a `with`, or `close` it.

    Left out, they come from BITFRONTIER_URL (else `http://127.0.0.1:8400`) and BITFRONTIER_KEY. `timeout`: seconds to
    wait for an answer. What got no answer, or 429, 502, 503 or 504, is asked again up to `retries` times, with longer
    and longer pauses; a request that starts a search has a key, so that a lost answer never starts a second one.

    Everything raises Refused where the service answers with a problem, Unreachable where it does not answer, and
    NotUnderstood where what it sends cannot be read. Making one raises NotAnAddress, NotAKey, and ValueError for less
    than no retries.
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, timeout: float = 60.0, retries: int = 3
    ) -> None:
        self._service = Transport(url, key, timeout=timeout, retries=retries)

    @property
    def url(self) -> str:
        """Where the service is."""
        return self._service.url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the connections go."""
        self._service.close()

    def create(
        self, request: SearchRequest | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> SearchDocument:
        """Start a search. The same `idempotency_key` with the same request gives the same search.

        Raises Refused for what cannot succeed, among it budgets that nothing meets (`problem.accepted` has the
        smallest feasible values).
        """
        body = request.model_dump(mode="json") if isinstance(request, SearchRequest) else dict(request)
        headers = {"Idempotency-Key": idempotency_key or secrets.token_urlsafe(24)}
        return self._service.read(SearchDocument, "POST", "/v1/searches", json=body, headers=headers)

    def search(self, search_id: int) -> SearchDocument:
        """A search as it stands."""
        return self._service.read(SearchDocument, "GET", f"/v1/searches/{search_id}")

    def searches(
        self, *, state: State | None = None, model: str | None = None, page_size: int = 100
    ) -> Iterator[SearchSummary]:
        """The searches that this key may see, newest first; only those in a state, or of a model. Asks for a page of
        `page_size` (at most 200) when the one before is used up."""
        given = {"state": state, "model": model, "limit": str(page_size)}
        params = {name: value for name, value in given.items() if value is not None}
        while True:
            page = self._service.read(SearchPage, "GET", "/v1/searches", params=params)
            yield from page.searches
            if page.next_cursor is None:
                return
            params["cursor"] = str(page.next_cursor)

    def cancel(self, search_id: int) -> SearchDocument:
        """Cancel a search. A running one ends when its worker next looks; a finished one stays as it is."""
        return self._service.read(SearchDocument, "POST", f"/v1/searches/{search_id}/cancel")

    def result(self, search_id: int) -> SearchDocument:
        """The search, if it has succeeded. Raises SearchFailed, SearchCancelled or NotFinished."""
        search = self.search(search_id)
        if search.state == "failed":
            raise SearchFailed(search)
        if search.state == "cancelled":
            raise SearchCancelled(search)
        if search.state != "succeeded":
            raise NotFinished(f"search {search_id} is {search.state}")
        return search

    def wait(self, search_id: int, timeout: float | None = None) -> SearchDocument:
        """The search, once it has succeeded.

        Raises SearchFailed, SearchCancelled, and NotFinished (a TimeoutError) after `timeout` seconds.
        """
        for _ in self.events(search_id, timeout=timeout):
            pass
        return self.result(search_id)

    def events(
        self,
        search_id: int,
        after: int = 0,
        *,
        timeout: float | None = None,
        pulse: Callable[[], None] = lambda: None,
    ) -> Iterator[Event]:
        """The events of a search that follow event `after`, as they happen, until the final one. A connection that
        breaks is made again, and nothing is missed or told twice.

        `pulse` is called at every sign of life, at least every 15 s while the service lives; it may raise. Raises
        NotFinished after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        failures = 0
        while True:
            try:
                for event in self._stream(search_id, after, deadline, pulse):
                    after, failures = event.id, 0
                    yield event
                    if isinstance(event, StateEvent) and event.state in FINISHED:
                        return
                if self.search(search_id).state in FINISHED:
                    return
            except (httpx.RequestError, Unreachable, Refused) as error:
                failures += 1
                if isinstance(error, Refused) and error.problem.status not in BUSY:
                    raise
                pulse()
                if failures > MOST_RECONNECTS:
                    raise error if isinstance(error, ClientError) else self._service.unreachable(error) from error
            if deadline is not None and time.monotonic() > deadline:
                raise NotFinished(f"search {search_id} was not finished in {timeout:g} s")
            time.sleep(RECONNECT_SECONDS if deadline is None else min(RECONNECT_SECONDS, _left(deadline)))

    def frontier(
        self,
        search_id: int,
        *,
        include: Collection[Group] = BASELINES,
        under: Mapping[str, float] | None = None,
    ) -> FrontierDocument:
        """The measured frontier, so far where the search still runs. `include` names further groups of points.

        With other budgets `under` (`{"avg_bits": 4.25}`), `best_under` is the best measured point that keeps them.
        """
        params = {"include": ",".join(include)}
        if under:
            params["under"] = ",".join(f"{name}:{value}" for name, value in under.items())
        return self._service.read(FrontierDocument, "GET", f"/v1/searches/{search_id}/frontier", params=params)

    def frontier_table(self, search_id: int, *, include: Collection[Group] = BASELINES) -> pd.DataFrame:
        """The frontier as a table, indexed by the points' numbers: `source`, `label`, `on_frontier`, `fits`, costs
        (`size_bytes`, `avg_bits`, `bitops`, …), metrics (`loss`, `loss_stderr`, …) and `predicted_…` losses."""
        import pandas as pd

        return pd.read_parquet(BytesIO(self.frontier_file(search_id, "parquet", include=include).content))

    def frontier_file(
        self,
        search_id: int,
        format: Literal["json", "csv", "parquet", "html"],
        *,
        include: Collection[Group] = BASELINES,
    ) -> File:
        """The frontier as a file; `html` is a page that needs nothing else."""
        params = {"format": format, "include": ",".join(include)}
        return self._service.download(f"/v1/searches/{search_id}/frontier", params, f"frontier.{format}")

    def sensitivities(self, search_id: int) -> pd.DataFrame:
        """The sensitivities as a table: a row per `metric`, `unit` and `scheme`, with `sensitivity` (predicted increase
        of the loss, or a relative score), its `weight_part` and `activation_part`, and `stderr`."""
        import pandas as pd

        return pd.read_parquet(BytesIO(self.sensitivities_file(search_id, "parquet").content))

    def sensitivities_file(self, search_id: int, format: Literal["json", "csv", "parquet"]) -> File:
        """The sensitivities as a file."""
        path = f"/v1/searches/{search_id}/sensitivities"
        return self._service.download(path, {"format": format}, f"sensitivities.{format}")

    def point(self, search_id: int, number: int) -> Point:
        """A point, with its allocation."""
        return self._service.read(Point, "GET", f"/v1/searches/{search_id}/points/{number}")

    def export(self, search_id: int, number: int, format: str = "json") -> File:
        """A point as the file that another tool loads; `targets().exports` lists the formats.

        Raises Refused with the reason where that tool could not load it.
        """
        return self._service.download(
            f"/v1/searches/{search_id}/points/{number}/config", {"format": format}, "config.json"
        )

    def models(self) -> list[ModelDocument]:
        """The registered models."""
        return self._service.read(Models, "GET", "/v1/models").models

    def metrics(self) -> Metrics:
        """The sensitivity metrics: what they rest on, need and say."""
        return self._service.read(Metrics, "GET", "/v1/metrics")

    def schemes(self) -> Schemes:
        """The grammar of schemes, and examples."""
        return self._service.read(Schemes, "GET", "/v1/schemes")

    def targets(self) -> Targets:
        """The runtimes a search can aim at, and the formats of a point."""
        return self._service.read(Targets, "GET", "/v1/targets")

    def latency_profiles(self) -> list[LatencyProfileDocument]:
        """The devices whose latency a search may count and bound."""
        return self._service.read(LatencyProfiles, "GET", "/v1/latency-profiles").profiles

    def latency_profile(self, key: str) -> File:
        """All times of a profile, as `bitfrontier latency import` reads them."""
        return self._service.download(f"/v1/latency-profiles/{key}", {}, f"latency-{key}.json")

    def _stream(self, search_id: int, after: int, deadline: float | None, pulse: Callable[[], None]) -> Iterator[Event]:
        """The events after `after`, until the connection ends."""
        silence = SILENCE_SECONDS if deadline is None else min(SILENCE_SECONDS, _left(deadline))
        headers = {"Last-Event-ID": str(after)}
        fields: dict[str, str] = {}
        for line in self._service.lines(f"/v1/searches/{search_id}/events", headers, silence):
            if line:
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
                continue
            pulse()
            if "data" in fields:
                yield self._read(search_id, fields)
                fields = {}
            if deadline is not None and time.monotonic() > deadline:
                return

    def _read(self, search_id: int, fields: dict[str, str]) -> Event:
        try:
            return read_event(fields)
        except ValueError as error:
            told = f"{self.url} sent an event of search {search_id} that cannot be read"
            raise NotUnderstood(f"{told}; is this a Bitfrontier service of this version?") from error


def _left(deadline: float) -> float:
    """Seconds until `deadline`; a little where it has passed."""
    return max(0.01, deadline - time.monotonic())
