"""The HTTP face of the scorer: routes, background upkeep, and how the process starts and stops.

Clients get an action and nothing that would tell them how near they came: no score, no threshold, no model.
People on call get `/v1/state`. No decision is taken here (`serving.scorer`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from redqueen.actions import ALLOW
from redqueen.clock import Clock, open_clock
from redqueen.errors import InvalidInput
from redqueen.settings import Settings
from redqueen.store import ObjectStore, open_store
from serving.batching import MicroBatcher
from serving.events import InvalidEvents, parse
from serving.live import Loader
from serving.scorer import Answer, Scorer

logger = logging.getLogger(__name__)

MAX_BODY = 32 * 2**20
UPKEEP_SECONDS = 0.25
GRACE_SECONDS = 10
_TOKEN_HEADER = "Authorization: Bearer <RQ_SERVING_OPERATOR_TOKEN>"


def create_app(
    settings: Settings,
    *,
    store: ObjectStore | None = None,
    clock: Clock | None = None,
    load: Loader | None = None,
    background: bool = True,
) -> Starlette:
    """The scoring service as an ASGI application; its lifespan loads what is live and, at the end, flushes.

    Args:
        store, clock, load: default to what `settings` name, and to the bundles in the store.
        background: look up the rollout and flush the log by the wall's clock. A simulation that moves its own
            clock turns this off and asks for both when its hour says so (`/v1/refresh`, `/v1/flush`).
    """
    opened = store or open_store(settings)
    scorer = Scorer(settings, opened, clock or open_clock(settings, opened), load=load)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(scorer.start)
        app.state.batcher = MicroBatcher(scorer.score)
        chores = (_refreshing, _flushing) if background else ()
        upkeep = [asyncio.create_task(chore(scorer)) for chore in chores]
        try:
            yield
        finally:
            for task in upkeep:
                task.cancel()
            await asyncio.gather(*upkeep, return_exceptions=True)
            await app.state.batcher.close()
            await asyncio.to_thread(scorer.close)

    app = Starlette(
        routes=[
            Route("/v1/score", _score, methods=["POST"]),
            Route("/v1/state", _for_operators(_state)),
            Route("/v1/refresh", _for_operators(_refresh), methods=["POST"]),
            Route("/v1/flush", _for_operators(_flush), methods=["POST"]),
            Route("/metrics", _for_operators(_metrics)),
            Route("/healthz", _healthz),
            Route("/readyz", _readyz),
        ],
        exception_handlers={InvalidEvents: _invalid, HTTPException: _refused},
        lifespan=lifespan,
        max_body_size=MAX_BODY,
    )
    app.state.scorer = scorer
    app.state.operator_token = settings.serving_operator_token
    return app


def serve(settings: Settings, host: str = "127.0.0.1", port: int = 8087) -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are answered and the prediction log is flushed.

    Raises:
        InvalidInput: the address cannot be listened on.
    """
    import uvicorn

    try:
        listening = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise InvalidInput(
            f"cannot listen on {host}:{port} ({error.strerror}): stop what uses it, or choose another port"
        ) from None
    app = create_app(settings)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS, lifespan="on"
    )
    # uvicorn gives the signal back when it is done; without a handler of ours that would kill the process
    # before the last flush.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, previous)
        listening.close()
        app.state.scorer.close()


# -- upkeep --------------------------------------------------------------------------------------------------


async def _refreshing(scorer: Scorer) -> None:
    while True:
        await asyncio.sleep(scorer.settings.serving_refresh_seconds)
        await _kept_going(lambda: scorer.refresh(force=False))


async def _flushing(scorer: Scorer) -> None:
    while True:
        await asyncio.sleep(min(UPKEEP_SECONDS, scorer.settings.serving_flush_seconds))
        if scorer.log.due():
            await _kept_going(scorer.log.flush)


async def _kept_going(task: Callable[[], object]) -> None:
    try:
        await asyncio.to_thread(task)
    except Exception as error:
        # Neither is expected to raise; if one does, the next round must still come.
        logger.error("upkeep failed (%s)", type(error).__name__)


# -- routes --------------------------------------------------------------------------------------------------


async def _score(request: Request) -> Response:
    wanted = parse(await request.body())
    try:
        answers = await request.app.state.batcher.submit(wanted.events)
    except Exception as error:
        logger.error("a batch was not scored (%s)", type(error).__name__)
        answers = [Answer(event["event_id"], ALLOW, True) for event in wanted.events]
    results = [{"event_id": a.event_id, "action": a.action, "degraded": a.degraded} for a in answers]
    return JSONResponse(results[0] if wanted.single else {"results": results})


async def _state(request: Request) -> Response:
    return JSONResponse(request.app.state.scorer.state())


async def _refresh(request: Request) -> Response:
    changed = await asyncio.to_thread(request.app.state.scorer.refresh)
    return JSONResponse({"changed": changed})


async def _flush(request: Request) -> Response:
    written = await asyncio.to_thread(request.app.state.scorer.log.flush)
    return JSONResponse({"written": written})


async def _metrics(request: Request) -> Response:
    state = request.app.state.scorer.state()
    log = state["prediction_log"]
    figures = {f"redqueen_{name}_total": value for name, value in state["counts"].items()}
    figures |= {f"redqueen_predictions_{name}": value for name, value in log.items()}
    figures |= {"redqueen_degraded": int(state["degraded"]), "redqueen_generation": state["generation"]}
    return PlainTextResponse("".join(f"{name} {value}\n" for name, value in figures.items()))


async def _healthz(request: Request) -> Response:
    return PlainTextResponse("ok\n")


async def _readyz(request: Request) -> Response:
    if request.app.state.scorer.ready:
        return PlainTextResponse("ready\n")
    return PlainTextResponse("not ready: the rollout state has not been read yet\n", status_code=503)


async def _invalid(request: Request, error: Exception) -> Response:
    problems = error.problems if isinstance(error, InvalidEvents) else []
    listed = [{"index": p.index, "field": p.field, "message": p.message} for p in problems]
    body = {"code": "invalid_events", "message": str(error), "problems": listed}
    return JSONResponse({"error": body}, status_code=422)


async def _refused(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else "internal error"
    return JSONResponse({"error": {"code": f"http_{status}", "message": detail}}, status_code=status)


Handler = Callable[[Request], Awaitable[Response]]


def _for_operators(handler: Handler) -> Handler:
    """Where a token is set, only who presents it sees models and counts."""

    async def guarded(request: Request) -> Response:
        token: Any = request.app.state.operator_token
        if token is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), token.get_secret_value().encode()):
                raise HTTPException(401, f"this needs the operator's token: {_TOKEN_HEADER}")
        return await handler(request)

    return guarded
