"""Ways to ask for scores: over HTTP, or in this process through the same application. One interface.

A client chunks long lists, keeps order, and turns a missing service into a sentence. It knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol, Self

import anyio.from_thread
import httpx
from starlette.applications import Starlette

from redqueen.errors import InvalidInput, ServiceUnavailable
from serving.events import MAX_EVENTS

Event = Mapping[str, Any]
IN_PROCESS = "http://redqueen.in-process"


class ScoringClient(Protocol):
    """What `InProcessClient` and `HttpClient` have in common."""

    def score(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """`{"event_id", "action", "degraded"}` for each event, in order."""
        ...

    def refresh(self) -> bool:
        """Have the service look up the rollout now; whether anything changed."""
        ...

    def flush(self) -> int:
        """Have the service write its prediction log; how many rows reached the store."""
        ...

    def state(self) -> dict[str, Any]:
        """The operator's view of the service."""
        ...

    def close(self) -> None:
        """Let go of the service."""
        ...


class _Client:
    """The interface on top of one exchange of bytes."""

    def _exchange(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def score(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """Answers in the order of `events`, however many.

        Raises:
            InvalidInput: the service refused an event; the message names index and field.
            ServiceUnavailable: the service did not answer.
        """
        answers: list[dict[str, Any]] = []
        for start in range(0, len(events), MAX_EVENTS):
            chunk = list(events[start : start + MAX_EVENTS])
            body = json.dumps({"events": chunk}, default=_encoded).encode()
            answers += _read(self._exchange("POST", "/v1/score", body), offset=start)["results"]
        return answers

    def refresh(self) -> bool:
        """Whether the rollout had changed."""
        return bool(_read(self._exchange("POST", "/v1/refresh"))["changed"])

    def flush(self) -> int:
        """Rows that reached the store."""
        return int(_read(self._exchange("POST", "/v1/flush"))["written"])

    def state(self) -> dict[str, Any]:
        """The operator's view."""
        return _read(self._exchange("GET", "/v1/state"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class InProcessClient(_Client):
    """Runs the application's lifespan and requests on an event loop in a thread of its own.

    The same code answers as over a socket: parsing, validation, batching and routing included. `close` (or
    leaving the `with` block) runs the shutdown, which flushes the prediction log.
    """

    def __init__(self, app: Starlette) -> None:
        self._stack = ExitStack()
        self._portal = self._stack.enter_context(anyio.from_thread.start_blocking_portal())
        try:
            self._stack.enter_context(
                self._portal.wrap_async_context_manager(app.router.lifespan_context(app))
            )
        except BaseException:
            self._stack.close()
            raise
        token = app.state.operator_token
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url=IN_PROCESS,
            headers=_authorization(token),
            timeout=None,
        )

    def _exchange(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        async def ask() -> httpx.Response:
            return await self._http.request(method, path, content=body)

        return self._portal.call(ask)

    def close(self) -> None:
        """Shut the application down; safe to call twice."""
        if not self._http.is_closed:
            self._portal.call(self._http.aclose)
            self._stack.close()


class HttpClient(_Client):
    """Asks a service at `url`, such as `http://127.0.0.1:8087`."""

    def __init__(self, url: str, *, timeout_s: float = 30.0, operator_token: Any = None) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self._url,
            timeout=httpx.Timeout(timeout_s, connect=3.0),
            headers=_authorization(operator_token),
            trust_env=False,
        )

    def _exchange(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        try:
            return self._http.request(method, path, content=body)
        except httpx.ConnectError:
            raise ServiceUnavailable(
                f"no scoring service answers at {self._url}: start one with `redqueen serve`, "
                "or name another with RQ_SERVING_URL"
            ) from None
        except httpx.HTTPError as error:
            raise ServiceUnavailable(
                f"the scoring service at {self._url} did not answer {path} ({type(error).__name__}): "
                "see its log and GET /v1/state, then try again"
            ) from None

    def close(self) -> None:
        """Close the connections; the service goes on."""
        self._http.close()


def _authorization(token: Any) -> dict[str, str]:
    secret = token.get_secret_value() if hasattr(token, "get_secret_value") else token
    return {"authorization": f"Bearer {secret}"} if secret else {}


def _encoded(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise InvalidInput(
        f"an event holds a {type(value).__name__}, which JSON cannot: send text, numbers or datetimes"
    )


def _read(response: httpx.Response, offset: int = 0) -> dict[str, Any]:
    """The body of a good answer; the sentence of a bad one as an error."""
    if response.status_code == 200:
        body: dict[str, Any] = response.json()
        return body
    try:
        error = response.json()["error"]
        message, problems = error["message"], error.get("problems", [])
    except (ValueError, KeyError, TypeError):
        raise ServiceUnavailable(
            f"{response.url.host} answered {response.status_code}, not as a scoring service does: check "
            "RQ_SERVING_URL"
        ) from None
    text = "; ".join([message, *(_named(problem, offset) for problem in problems[:5])])
    raise InvalidInput(text) if response.status_code < 500 else ServiceUnavailable(text)


def _named(problem: Mapping[str, Any], offset: int) -> str:
    if problem["index"] is None:
        return str(problem["message"])
    return f"event {problem['index'] + offset}, {problem['field']}: {problem['message']}"
