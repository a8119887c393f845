"""Every setting there is, in one place, each with its reason. No reading of files or services here.

Values come from the environment (`RQ_` and the field's name), then from `redqueen.env` in the home directory
(what `make demo` leaves there, so that the UI finds the same settings), then from the defaults.
"""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_FILE = "redqueen.env"


class Settings(BaseSettings):
    """The configuration of one Red Queen home."""

    model_config = SettingsConfigDict(env_prefix="RQ_", extra="ignore", frozen=True)

    # where things are
    home: Path = Field(Path(".redqueen"), description="The one directory of the embedded default.")
    store_url: str | None = Field(
        None, description="s3://bucket/prefix, or a directory. Default: `store/` below the home."
    )
    s3_endpoint_url: str | None = Field(None, description="An S3 endpoint other than AWS.")
    clock: Literal["auto", "wall"] = Field(
        "auto",
        description="auto: the simulated clock in the store while a simulation holds one, else the wall's. "
        "wall: always the wall's; what production sets.",
    )
    partitions_start: datetime = Field(
        datetime.fromisoformat("2026-01-01T00:00:00+00:00"),
        description="The first hourly partition. Changing it later only hides or shows older hours.",
    )
    partitions_ahead_hours: int = Field(
        24,
        ge=0,
        description="Hourly partitions beyond the wall's hour: room for a feed whose clock runs ahead.",
    )

    # what is detected
    policies: Annotated[tuple[str, ...], NoDecode] = Field(
        ("spam", "scam", "harassment"), description="The abuse classes, comma separated."
    )
    severe_policies: Annotated[tuple[str, ...], NoDecode] = Field(
        ("harassment",),
        description="Policies never delivered for the sake of measuring; they are blocked, not limited.",
    )
    fpr_budget: float = Field(
        0.01, gt=0, lt=0.5, description="Share of benign messages acted on, all policies together."
    )
    label_error: float = Field(
        0.02,
        ge=0,
        lt=0.5,
        description="Share of messages that those who judge get wrong. Thresholds and the canary do not take "
        "abuse called benign for false positives, and estimates of recall not the reverse for missed abuse.",
    )
    miss_cost: float = Field(
        2.3,
        gt=0,
        description="What a missed abusive message costs, in false actions. No message is acted on whose "
        "probability is below 1 / (1 + cost), and the false-positive budget is shared out in proportion.",
    )
    miss_cost_by_policy: Annotated[dict[str, float], NoDecode] = Field(
        {}, description="The same for policies that are dearer or cheaper to miss: `scam=10,spam=1`."
    )
    salt: str = Field(
        "red-queen",
        description="Salts the audit slice, and the hashes of ids in Redis. Change it and other events are "
        "audited, and windows in Redis begin anew.",
    )
    audit_rate: float = Field(
        0.12, gt=0, le=1, description="Share of messages sent to human review whatever the score."
    )
    review_budget_per_hour: int = Field(
        600,
        ge=0,
        description="Most messages that reviewers are asked to judge in an hour; the audit comes first.",
    )
    review_budget_per_day: int | None = Field(
        None,
        ge=0,
        description="Messages that reviewers can judge in a UTC day. An hour may use a 24th of it and what "
        "earlier hours left. Default: 24 times the hour's.",
    )
    maturity_hours: float = Field(
        4.0, gt=0, description="Age after which an unlabelled event no longer waits for labels."
    )
    maturity_by_policy: Annotated[dict[str, float], NoDecode] = Field(
        {},
        description="The same for policies that are judged sooner or later: `harassment=8,scam=24`. "
        "`gold_labels` shows how late labels come.",
    )

    # training
    encoder: str | None = Field(
        None,
        description="A Hugging Face encoder by name or path; `none` does without one. Default: a compact one "
        "trained here.",
    )
    encoder_layers: int = Field(2, ge=1, description="Layers of the compact encoder.")
    encoder_width: int = Field(96, ge=16, description="Width of the compact encoder.")
    encoder_heads: int = Field(4, ge=1, description="Attention heads; they divide the width.")
    max_tokens: int = Field(48, ge=8, le=512, description="Tokens of a message that the encoder reads.")
    train_epochs: int = Field(
        3, ge=1, description="Passes over the training set at most; the later ones with the newest messages."
    )
    train_examples: int = Field(
        40_000,
        ge=0,
        description="Examples that the compact encoder sees at least, all passes together: a small training "
        "set is gone through more often, up to twelve times.",
    )
    train_seed: int = Field(7, ge=0, description="The same snapshot and seed give the same model.")
    train_max_rows: int = Field(
        24_000,
        ge=200,
        description="Rows of a training set; beyond it benign rows are thinned, and of abuse what campaigns "
        "have most of where it is more than half.",
    )
    train_warm_start: bool = Field(
        False,
        description="Begin with the champion's encoder where enough messages are newer than its training.",
    )
    training_timeout_s: int = Field(
        1800,
        ge=30,
        description="Seconds after which the encoder learns no more, earlier attempts included: it then "
        "stops at its best epoch so far, and says so; what is fitted beside it takes a fraction of that.",
    )
    training_memory_mb: int = Field(
        8192, ge=512, description="MiB that the training process may hold: beyond it the training fails."
    )
    behaviour: bool = Field(
        True, description="Use features of the sender's behaviour; off for streams without a sender."
    )

    signing_key: Path | None = Field(
        None,
        description="Private key (PEM, elliptic curve) that signs new models. Default: `keys/signing.pem` in "
        "the home, made at the first training.",
    )
    signing_key_password: SecretStr | None = Field(None, description="Of that key, if it has one.")
    verify_key: Path | None = Field(
        None,
        description="Public key (PEM) of the one whose models are loaded. Default: `keys/verify.pem` in the "
        "home.",
    )

    # adversarial evaluation
    attack_messages: int = Field(90, ge=5, description="Abusive messages attacked per family.")
    attack_families: Annotated[tuple[str, ...], NoDecode] = Field(
        ("invisible", "homoglyph", "leet", "spacing", "typo", "padding", "url"),
        description="The threat model: what an abuser can change here. Where texts are domain names, say, "
        "nobody can add words.",
    )
    attack_query_budget: int = Field(20_000, ge=100, description="Scores an attack may ask for in all.")

    # when to retrain
    cooldown_hours: float = Field(6.0, ge=0, description="Least time between two retrains.")
    daily_retrain_budget: int = Field(4, ge=0, description="Most retrains that are launched in 24 hours.")
    min_trusted_labels: int = Field(
        1500, ge=1, description="Trusted labels that the first training needs before it starts."
    )
    min_class_labels: int = Field(
        150,
        ge=1,
        description="Judged abusive, and judged benign, events that a first training needs at least.",
    )
    trusted_sources: Annotated[tuple[str, ...], NoDecode] = Field(
        ("moderator", "audit", "honeypot"), description="Label sources that count towards those numbers."
    )
    min_new_labels: int = Field(
        150, ge=0, description="Labels received since the last training set that a retrain needs."
    )
    min_missed_labels: int = Field(
        150,
        ge=0,
        description="Judged abusive messages that got through, before adaptation is worth a retrain: a "
        "campaign is learnt from a few hundred examples, not from thirty.",
    )
    stale_after_hours: float = Field(
        3.0, gt=0, description="Monitoring older than this is unknown, and unknown pages."
    )

    # rollout
    bootstrap_approval: str | None = Field(
        None,
        description="Who approves that the first model goes live without a control, after gate and shadow.",
    )

    # serving
    serving_url: str = Field("http://127.0.0.1:8087", description="Where the scoring service listens.")
    serving_refresh_seconds: float = Field(2.0, gt=0, description="How often rollout state is looked up.")
    serving_flush_seconds: float = Field(5.0, gt=0, description="Longest a prediction waits in memory.")
    serving_flush_rows: int = Field(5000, ge=1, description="Most predictions that wait in memory.")
    serving_max_ahead_hours: float = Field(
        2.0,
        gt=0,
        description="How far an event's time may run ahead of the clock and still count as behaviour.",
    )
    redis_url: SecretStr | None = Field(
        None,
        description="redis://[user:password@]host:port/database: where behaviour windows are kept so that "
        "several scoring services share them; a database of its own for each stream. Default: in the memory "
        "of the one service.",
    )
    serving_operator_token: SecretStr | None = Field(
        None,
        description="Where set, /v1/state, /metrics, /v1/refresh and /v1/flush want it as a bearer token.",
    )
    block_probability: float = Field(
        0.97, gt=0, le=1, description="From here on a message over a mild policy's threshold is blocked too."
    )
    review_ratio: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the threshold from which a message is delivered and shown to a person.",
    )
    cascade: bool = Field(
        True,
        description="Let a model's first stage, where it has one, settle what is surely benign without the "
        "encoder; off reads every message by all parts.",
    )
    cascade_audit_rate: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Share of settled messages that the whole model reads all the same, so that what the "
        "first stage misses is measured.",
    )
    latency_objective_ms: float = Field(50.0, gt=0, description="A slower answer counts against a candidate.")

    # watching
    sensor_interval_seconds: int = Field(30, ge=1, description="Least time between two ticks of a sensor.")
    reports_url: str = Field(
        "http://127.0.0.1:3001",
        description="Where a browser finds drift reports; `make ui` serves them there.",
    )
    alert_webhook: str | None = Field(None, description="Where alerts are posted as JSON, besides the log.")

    # keeping
    retention_days: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="How long tables are kept, where it differs from `redqueen retention`: "
        "`events=30,served=never`.",
    )

    @field_validator(
        "policies", "severe_policies", "trusted_sources", "attack_families", "retention_days", mode="before"
    )
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(v.strip() for v in value.split(",") if v.strip()) if isinstance(value, str) else value

    @field_validator("maturity_by_policy", "miss_cost_by_policy", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
        return {name.strip(): number.strip() for name, _, number in pairs}

    @model_validator(mode="after")
    def _pairs_are_of_policies(self) -> Settings:
        for field, what in (("maturity_by_policy", "hours"), ("miss_cost_by_policy", "costs")):
            given: dict[str, float] = getattr(self, field)
            variable = f"RQ_{field.upper()}"
            if unknown := sorted(set(given) - set(self.policies)):
                raise ValueError(
                    f"{variable} names {unknown}, which are not among RQ_POLICIES {self.policies}"
                )
            if wrong := sorted(name for name, number in given.items() if not 0 < number < float("inf")):
                raise ValueError(f"{variable} wants {what} above 0 for {wrong}")
        return self

    @model_validator(mode="after")
    def _severe_are_policies(self) -> Settings:
        unknown = set(self.severe_policies) - set(self.policies)
        if unknown and "severe_policies" in self.model_fields_set:
            raise ValueError(
                f"RQ_SEVERE_POLICIES names {sorted(unknown)}, which are not among RQ_POLICIES {self.policies}"
            )
        if not self.policies:
            raise ValueError("RQ_POLICIES is empty: name at least one abuse class")
        return self

    @property
    def severe(self) -> frozenset[str]:
        """The severe ones among the policies detected here."""
        return frozenset(self.severe_policies) & frozenset(self.policies)

    @property
    def maturity(self) -> dict[str, float]:
        """Hours after which an event is mature, of each policy."""
        return {policy: self.maturity_by_policy.get(policy, self.maturity_hours) for policy in self.policies}

    @property
    def miss_costs(self) -> tuple[float, ...]:
        """What a missed message costs, of each policy in their order."""
        return tuple(self.miss_cost_by_policy.get(policy, self.miss_cost) for policy in self.policies)

    @property
    def dagster_home(self) -> Path:
        """Where Dagster keeps its instance."""
        return self.home / "dagster"


def load_settings(home: Path | str | None = None) -> Settings:
    """The settings of `home` (default: `RQ_HOME`, then `.redqueen`).

    Raises:
        pydantic.ValidationError: a value is out of its range; the message names the field.
    """
    root = Path(home or os.environ.get("RQ_HOME", ".redqueen")).resolve()
    return Settings(_env_file=root / ENV_FILE, home=root)  # type: ignore[call-arg]


def write_env(home: Path, **values: object) -> None:
    """Keep settings with the home they belong to, for every process that works on it later."""
    home.mkdir(parents=True, exist_ok=True)
    lines = [
        f"RQ_{name.upper()}={_quoted(str(value))}"
        for name, value in sorted(values.items())
        if value is not None
    ]
    partial = home / f"{ENV_FILE}.partial"
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(home / ENV_FILE)


def _quoted(value: str) -> str:
    """`value` as one line of an env file: quoted where it would otherwise be cut short or expanded."""
    if re.fullmatch(r"[A-Za-z0-9_./:,+@-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def table() -> str:
    """Every setting as a Markdown table, for `docs/settings.md`."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        rows.append(f"| `RQ_{name.upper()}` | {_shown(field.default)} | {_meaning(field)} |")
    return "\n".join(rows) + "\n"


def _shown(default: object) -> str:
    if default is None or default == ():
        return "not set"
    if isinstance(default, dict) and not default:
        return "not set"
    if isinstance(default, tuple):
        return f"`{','.join(default)}`"
    return f"`{default.isoformat() if isinstance(default, datetime) else str(default)}`"


def _meaning(field: FieldInfo) -> str:
    """What a setting is for, and its bounds."""
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f"{words} {getattr(rule, sign):g}"
        for rule in field.metadata
        for sign, words in signs.items()
        if getattr(rule, sign, None) is not None
    ]
    return (field.description or "") + (f" ({', '.join(bounds)})" if bounds else "")


INTRODUCTION = """\
# Settings

Every setting is an environment variable. `redqueen.env` in the home directory is read too (the environment
wins), and `redqueen doctor` checks them all before anything runs. Lists are comma separated; times are ISO
8601; in the file `${NAME}` stands for another variable. This page is written by
`python -m redqueen.settings > docs/settings.md`; a test holds it to the code.

"""

if __name__ == "__main__":
    print(INTRODUCTION + table(), end="")
