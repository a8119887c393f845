"""What a client may send to be scored, and what it is told when it sends something else.

Only shapes and ranges are checked here. Nothing a client sent is ever repeated in an answer or a log: a
message that names the field is enough to mend it, and the text of a person is not ours to spread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from redqueen.errors import InvalidInput
from redqueen.loose import mended

MAX_EVENTS = 512
MAX_PROBLEMS = 50
_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,40}")
_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a request: which event (None: the request itself), which field, and what."""

    index: int | None
    field: str
    message: str


class InvalidEvents(InvalidInput):
    """A request that was refused whole; `problems` says why, without repeating what was sent."""

    def __init__(self, problems: list[Problem]) -> None:
        events = len({p.index for p in problems if p.index is not None})
        where = f" in {events} event{'s' * (events != 1)}" if events else ""
        count = f"{len(problems)} problem{'s' * (len(problems) != 1)}{where}"
        super().__init__(f"{count}; nothing was scored. Mend the fields named and send the request again.")
        self.problems = problems


def _in_range(value: datetime) -> datetime:
    try:
        utc = value.astimezone(UTC)
    except OverflowError:
        raise ValueError("the instant must lie between the years 1970 and 2200") from None
    if not _EARLIEST <= utc < _LATEST:
        raise ValueError("the instant must lie between the years 1970 and 2200")
    return utc


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("the value holds half of a surrogate pair, which is not text") from None
    return value


def _repaired(value: object) -> object:
    # Half a surrogate pair can be sent in JSON but not stored. No message may escape scoring by holding one.
    # As ingestion will, or training would read another text than was scored.
    return mended(value) if isinstance(value, str) else value


Instant = Annotated[AwareDatetime, AfterValidator(_in_range)]
Id = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_encodable)]
Text = Annotated[str, BeforeValidator(_repaired), Field(max_length=200_000)]


class ScoreEvent(BaseModel):
    """One event to score: the columns of the `events` table that the client knows."""

    model_config = ConfigDict(extra="forbid")

    event_id: Id
    ts: Instant
    actor_id: Id
    community_id: Id
    community_size: int = Field(ge=0, lt=2**31)
    channel_id: Id
    kind: Literal["message", "dm", "friend_request", "join"]
    account_created_at: Instant
    text: Text | None = None
    recipient_id: Id | None = None
    response: Literal["accept", "decline", "reply", "block"] | None = None
    response_ts: Instant | None = None
    language: Annotated[str, Field(max_length=64), AfterValidator(_encodable)] | None = None
    ip_hash: Id | None = None
    device_hash: Id | None = None
    received_at: Instant | None = Field(
        None,
        description="When the platform's edge received it, as the events table will say; if not given, `ts`.",
    )


MAX_FIELDS = 2 * len(ScoreEvent.model_fields)


@dataclass(frozen=True)
class ScoreRequest:
    """The events of a request as plain mappings, and whether it was one event or a list of them."""

    events: list[Mapping[str, Any]]
    single: bool


def parse(body: bytes) -> ScoreRequest:
    """Read the body of `POST /v1/score`: one event, or `{"events": [...]}` with 1 to 512 of them.

    Raises:
        InvalidEvents: anything is wrong with any of it; all or nothing is scored.
    """
    try:
        # Not pydantic's parser: that refuses the whole body for one half surrogate in one message.
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidEvents([Problem(None, "body", "the body is not JSON in UTF-8")]) from None
    if not isinstance(value, dict):
        raise InvalidEvents([Problem(None, "body", 'send one event object, or {"events": [...]}')])
    if "events" not in value:
        return ScoreRequest(validate([value]), single=True)
    events = value["events"]
    if not isinstance(events, list) or not 1 <= len(events) <= MAX_EVENTS:
        raise InvalidEvents([Problem(None, "events", f"must be a list of 1 to {MAX_EVENTS} events")])
    return ScoreRequest(validate(events), single=False)


def validate(events: list[Any]) -> list[Mapping[str, Any]]:
    """The events with instants as UTC datetimes; raises `InvalidEvents`."""
    valid: list[Mapping[str, Any]] = []
    problems: list[Problem] = []
    for index, event in enumerate(events):
        if isinstance(event, dict) and len(event) > MAX_FIELDS:
            # Each unknown one would be told of by itself, and a million of them take seconds.
            problems.append(Problem(index, "event", f"it has {len(event)} fields, {MAX_FIELDS} are the most"))
            continue
        try:
            valid.append(ScoreEvent.model_validate(event).__dict__)
        except ValidationError as error:
            problems += _problems(index, error)
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        raise InvalidEvents(problems[:MAX_PROBLEMS])
    return valid


def _problems(index: int, error: ValidationError) -> list[Problem]:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    problems = []
    for one in found:
        field = str(one["loc"][0]) if one["loc"] else "event"
        # The name of an unknown field is the client's own text too.
        name = field if _FIELD_NAME.fullmatch(field) else "(a field with an odd name)"
        unknown = one["type"] == "extra_forbidden"
        problems.append(Problem(index, name, "no such field" if unknown else _plain(one["msg"])))
    return problems


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ")
