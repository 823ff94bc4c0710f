"""Every setting, its meaning, its default and what is allowed.

Each is read from the environment variable `UPLOAD_PIPELINE_<NAME>`, or from a `.env` file in the working
directory. A bad value stops the start with the setting's name, the value and what is allowed.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

import platformdirs
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.prices import check_prices
from upload_pipeline.storage_address import parse_storage_url
from upload_pipeline.url_secrets import without_password

ENV_PREFIX = "UPLOAD_PIPELINE_"

Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """The settings of one process; frozen once read."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True
    )

    # where state lives
    home: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("upload-pipeline"),
        description="Directory of all local state: the embedded database and the local object store.",
    )
    database_url: SecretStr = Field(
        default=SecretStr(""),
        description="Postgres of workers and terminal (role `upload_worker`); empty starts the embedded one.",
    )
    migration_database_url: SecretStr = Field(
        default=SecretStr(""),
        description="Postgres as the role that owns the schema, for `migrate`; empty means `DATABASE_URL`.",
    )
    storage_url: str = Field(
        default="",
        description="Object store: `file:///<path>`, `s3://<bucket>[/<prefix>]`, `gs://<bucket>[/<prefix>]`, "
        "`az://<container>[/<prefix>]` or `supabase://<project>/<bucket>[/<prefix>]`; empty means "
        "`file://<home>/storage`.",
    )
    storage_public_endpoint: str = Field(
        default="",
        pattern=r"^(https?://[^/@\s]+/?)?$",
        description="Where clients reach the bucket's server by signed URLs, as `https://files.example.com`; empty: "
        "where this process does.",
    )
    storage_encryption: Literal["aes256", "kms", "none"] = Field(
        default="aes256",
        description="What each write asks of a bucket on S3: keys of S3's own, of its key service, or no encryption at "
        "rest, for servers that offer none.",
    )
    storage_kms_key_id: str = Field(
        default="",
        max_length=2048,
        pattern=r"^[A-Za-z0-9:/_.-]*$",
        description="Key of the key service, by id, ARN or alias, where STORAGE_ENCRYPTION is `kms`; empty: the "
        "account's own for S3.",
    )
    storage_raw_days: int = Field(
        default=0,
        ge=0,
        le=36_500,
        description="Days after which `storage setup` has the bucket remove files as they were uploaded; 0: never.",
    )
    storage_version_days: int = Field(
        default=7,
        ge=1,
        le=36_500,
        description="Days after which `storage setup` has the bucket end what was replaced or deleted.",
    )

    supabase_publishable_key: SecretStr = Field(
        default=SecretStr(""),
        description="The project's publishable key (`sb_publishable_…`, or the anon key), where files lie in Supabase "
        "Storage: users then get its signed URLs; empty: the service's own.",
    )

    # what does the work
    parser: Literal["local", "llamaparse"] = Field(default="local", description="Who turns files into Markdown.")
    embedder: Literal["local", "openai"] = Field(
        default="local", description="Who turns text into vectors, in a new database."
    )

    # LlamaParse
    llamaparse_api_key: SecretStr = Field(
        default=SecretStr(""), description="Key of the account that pays, where PARSER is `llamaparse`."
    )
    llamaparse_base_url: str = Field(
        default="https://api.cloud.llamaindex.ai",
        pattern=r"^https?://[^/@\s]+/?$",
        description="The API, without a path; in the EU `https://api.cloud.eu.llamaindex.ai`. A key is of one region.",
    )
    llamaparse_tier: Literal["fast", "cost_effective", "agentic", "agentic_plus"] = Field(
        default="cost_effective", description="How files are parsed: 1, 3, 10 or 45 credits a page."
    )
    llamaparse_version: str = Field(
        default="", description="Version of the tier, a date as `2026-09-28`; empty: the one this release was made for."
    )
    llamaparse_timeout: float = Field(default=60.0, gt=0, le=600, description="Seconds that one request may take.")
    llamaparse_poll: float = Field(
        default=5.0, gt=0, le=60, description="Seconds before the first look at a parse; the waits grow to 60."
    )
    llamaparse_parse_timeout: Seconds = Field(
        default=3600.0, description="Seconds after its submission that a parse may take."
    )
    llamaparse_wait_timeout: Seconds = Field(
        default=86_400.0,
        description="Seconds that the limits on requests, ours and LlamaParse's, may keep a document waiting.",
    )
    llamaparse_failed_pages: Literal["warn", "fail"] = Field(
        default="warn", description="What becomes of a file some of whose pages cannot be parsed."
    )
    llamaparse_requests_per_minute: int = Field(
        default=20, ge=0, description="Requests in a minute, of all workers (20: the free plan's); 0: no limit of ours."
    )
    llamaparse_webhook_secret: SecretStr = Field(
        default=SecretStr(""),
        description="What LlamaParse signs its messages with, 32 characters or more; with API_PUBLIC_URL it is told to "
        "send them.",
    )

    # OpenAI, or a server that speaks as it does
    openai_api_key: SecretStr = Field(
        default=SecretStr(""), description="Key of the account that pays, where EMBEDDER is `openai`."
    )
    openai_base_url: str = Field(
        default="https://api.openai.com/v1",
        pattern=r"^https?://[^/@\s]+(/\S*)?$",
        description="The API with its version; regions and compatible servers have their own.",
    )
    openai_model: str = Field(
        default="text-embedding-3-small", min_length=1, max_length=200, description="Model, as the API names it."
    )
    openai_dimensions: int = Field(
        default=0, ge=0, le=16_000, description="Length of its vectors; 0: as the model gives them, where it is known."
    )
    openai_concurrency: int = Field(default=4, ge=1, le=100, description="Requests of one worker at once.")
    openai_timeout: float = Field(default=60.0, gt=0, le=600, description="Seconds that one request may take.")
    openai_requests_per_minute: int = Field(
        default=0, ge=0, description="Requests in a minute, of all workers; 0: as many as the provider says."
    )
    openai_tokens_per_minute: int = Field(
        default=0, ge=0, description="Tokens in a minute, of all workers; 0: as many as the provider says."
    )
    embedding_cache_days: int = Field(
        default=90, ge=1, le=36_500, description="Days after its last use that a vector that was paid for is forgotten."
    )

    model_grace: float = Field(
        default=7 * 24 * 3600.0,
        ge=0,
        description="Seconds that the vectors of the model before are kept once another is active, to go back to it.",
    )

    # detection in photos
    detector: Literal["none", "openai", "webhook"] = Field(
        default="none", description="Who looks for things in photos; `openai` uses OPENAI_API_KEY and OPENAI_BASE_URL."
    )
    detection_types: tuple[str, ...] = Field(
        default=("damage", "material"), description='What may be looked for in photos, as `["damage", "material"]`.'
    )
    detection_model: str = Field(
        default="gpt-4.1-mini",
        min_length=1,
        max_length=200,
        description="Model of the detector `openai`: one that sees images and keeps to a JSON schema.",
    )
    detection_detail: Literal["low", "high", "auto"] = Field(
        default="auto", description="How closely that model looks at the thumbnail; `low` costs least."
    )
    detection_max_tokens: int = Field(
        default=4000, ge=100, le=100_000, description="Most tokens of that model's answer, its reasoning counted."
    )
    detection_concurrency: int = Field(default=4, ge=1, le=100, description="Requests of one worker at once.")
    detection_requests_per_minute: int = Field(
        default=0, ge=0, description="Requests in a minute, of all workers; 0: as many as the provider says."
    )
    detection_tokens_per_minute: int = Field(
        default=0, ge=0, description="Tokens in a minute, of all workers; 0: as many as the provider says."
    )
    detection_timeout: float = Field(
        default=60.0, gt=0, le=250, description="Seconds that one request to a detector may take."
    )
    detection_url: str = Field(
        default="",
        pattern=r"^(https?://[^/@\s]+(/\S*)?)?$",
        description="Where the detector `webhook` is sent its messages.",
    )
    detection_secret: SecretStr = Field(
        default=SecretStr(""),
        description="What messages to the detector `webhook` and its callbacks are signed with, 32 bytes or more.",
    )
    detection_callback_seconds: Seconds = Field(
        default=600.0, description="Seconds in which the detector `webhook` has to call back; then it is asked again."
    )
    detection_patience: Seconds = Field(
        default=86_400.0,
        description="Seconds that a photo waits for a detector that cannot be reached before that counts as a failure.",
    )

    # what it costs
    prices: dict[str, dict[str, float]] = Field(
        default={},
        description="What hosted providers cost, in US dollars for a million `tokens` or a thousand `pages`, "
        '`credits`, `requests`: `{"openai/text-embedding-3-small": {"tokens": 0.02}}`. Without a price: unknown.',
    )
    record_local_usage: bool = Field(
        default=False, description="Whether workers record what local parsers and embedders do as usage, too."
    )

    # limits
    max_file_bytes: int = Field(default=25 * 1024 * 1024, gt=0, description="Largest file that intake takes.")
    max_concurrent_batch_bytes: int = Field(
        default=5 * 1024**3,
        gt=0,
        description="Bytes that batch requests may be sending, with those of the jobs at work, over all processes.",
    )
    min_free_bytes: int = Field(
        default=256 * 1024**2,
        ge=0,
        description="Bytes that must stay free where local objects and temporary files lie; uploads are refused below.",
    )
    max_policy_bytes: int = Field(
        default=100 * 1024 * 1024, gt=0, description="Largest insurance policy that is taken, in bytes."
    )
    min_photo_bytes: int = Field(default=1024, gt=0, description="Smallest photo that is taken, in bytes.")
    max_photo_bytes: int = Field(
        default=50 * 1024 * 1024, gt=0, description="Largest photo that is taken, in bytes (50 MB)."
    )
    clamd_url: str = Field(
        default="",
        description="Virus scanner that sees every file: clamd at `tcp://host:port` or `unix:///path`; empty: none.",
    )
    clamd_timeout: Seconds = Field(default=120.0, description="Seconds that each wait for the virus scanner may take.")
    parse_timeout: Seconds = Field(default=120.0, description="Wall-clock seconds that one parse may take.")
    parse_memory_bytes: int = Field(
        default=1024**3, ge=128 * 1024**2, description="Memory that one parse may use, in bytes."
    )
    max_photo_pixels: int = Field(
        default=120_000_000, gt=0, description="Largest photo that is decoded, width times height."
    )
    stage_timeout: Seconds = Field(
        default=300.0, description="Seconds that a job may stay in one step before its lease is let go."
    )

    # batches
    max_batch_bytes: int = Field(
        default=2_684_354_560, gt=0, description="Bytes of one batch, all its files together (2.5 GB)."
    )
    max_mapping_bytes: int = Field(
        default=10 * 1024 * 1024, gt=0, le=100 * 1024 * 1024, description="Largest metadata mapping of a batch."
    )
    batch_required_fields: tuple[str, ...] = Field(
        default=(), description='Metadata that each file of a batch must have, as `["department"]`.'
    )
    max_archive_entries: int = Field(
        default=1000, ge=1, le=65_534, description="Entries of a batch's ZIP, folders and hidden files counted."
    )
    max_archive_ratio: float = Field(
        default=200.0, ge=1, description="How many times as large as in the ZIP a file of a batch may become."
    )

    # chunks
    chunk_target_chars: int = Field(default=2000, ge=100, description="Characters that a chunk aims at.")
    chunk_overlap_chars: int = Field(
        default=200, ge=0, description="Characters that a chunk repeats of the one before."
    )
    chunk_max_bytes: int = Field(default=8000, ge=400, description="Hard limit of a chunk's text in UTF-8 bytes.")
    embed_batch_size: int = Field(
        default=256, ge=1, le=2048, description="Texts in one call of the embedder; OpenAI takes 2,048 at most."
    )

    # workers
    worker_pools: tuple[str, ...] = Field(
        default=("default", "background"),
        description="Pools that a worker serves; `background`: where a new embedding model is filled.",
    )
    worker_concurrency: int = Field(default=4, ge=1, le=1000, description="Jobs that a worker leads at once.")
    worker_memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Resident bytes of a worker and its parsers above which it claims nothing more; 0: no limit.",
    )
    lease_ttl: Seconds = Field(default=60.0, description="Seconds that a lease lasts unless renewed.")
    heartbeat_interval: Seconds = Field(default=20.0, description="Seconds between two renewals.")
    poll_min: Seconds = Field(default=0.25, description="Shortest wait before an idle worker looks again.")
    poll_max: Seconds = Field(default=5.0, description="Longest wait before an idle worker looks again.")
    group_window: float = Field(
        default=0.0005, ge=0, le=1, description="Seconds that a queue write waits for others to share its statement."
    )
    shutdown_grace: Seconds = Field(default=25.0, description="Seconds that running steps get to finish.")
    shutdown_deadline: Seconds = Field(
        default=30.0, description="Seconds after which a stopping worker exits whatever happens."
    )
    maintenance_interval: Seconds = Field(default=60.0, description="Seconds between two maintenance rounds.")
    orphan_grace: Seconds = Field(
        default=3600.0, description="Seconds that an object without a document is left alone."
    )
    sweep_interval: Seconds = Field(
        default=1800.0,
        description="Seconds between two looks through the whole store for such objects, by one worker of all; "
        "half of ORPHAN_GRACE where that is less.",
    )
    health_host: str = Field(default="127.0.0.1", description="Address of the worker's health endpoint.")
    health_port: int = Field(default=0, ge=0, le=65535, description="Its port; 0 turns it off.")

    # the HTTP service
    api_host: str = Field(default="127.0.0.1", description="Address that the HTTP service listens on.")
    api_port: int = Field(default=8000, ge=0, le=65535, description="Its port; 0 takes any that is free.")
    api_trusted_hosts: tuple[str, ...] = Field(
        default=("localhost", "127.0.0.1", "::1"),
        description="Names that the service answers to (the Host header); `*.example.com` and `*` are allowed.",
    )
    api_public_url: str = Field(
        default="", description="Where clients reach the service, for URLs that it hands out; empty: as they called it."
    )
    api_shutdown_grace: Seconds = Field(
        default=25.0, description="Seconds that open requests get to finish once the service is told to stop."
    )
    api_body_timeout: float = Field(
        default=30.0,
        gt=0,
        le=50,
        description="Seconds without any byte of a request's body, after which it is refused.",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description='Web pages that may call the service: origins, as `["https://app.example.com"]`.'
    )
    jwt_issuer: str = Field(
        default="", description="Who signs users' tokens: their `iss`. Supabase: `https://<ref>.supabase.co/auth/v1`."
    )
    jwt_jwks_url: str = Field(
        default="",
        description="Where the issuer's public keys are; empty means `<JWT_ISSUER>/.well-known/jwks.json`.",
    )
    jwt_secret: SecretStr = Field(
        default=SecretStr(""),
        description="Secret of an issuer that signs by HS256, 32 bytes or more; then no JWKS is used.",
    )
    jwt_audience: str = Field(default="authenticated", min_length=1, description="The `aud` of users' tokens.")
    jwt_leeway: float = Field(default=10.0, ge=0, le=30, description="Seconds that clocks may differ by.")

    # URLs that the service signs
    signing_secret: SecretStr = Field(
        default=SecretStr(""),
        description="What they are signed with, 32 bytes or more and the same for all processes of the service; empty: "
        "a secret made once in `HOME`.",
    )
    upload_url_seconds: Seconds = Field(default=900.0, description="Seconds in which an upload URL can be used.")
    upload_finish_seconds: Seconds = Field(
        default=300.0, description="Seconds that an upload which began in time has to end."
    )
    download_url_seconds: float = Field(
        default=300.0, ge=1, le=604800, description="Seconds in which a download URL can be used."
    )

    # anonymous sessions of browsers
    sessions_enabled: bool = Field(
        default=True,
        description="Whether browsers without credentials get a session, and with it documents of their own.",
    )
    session_seconds: Seconds = Field(
        default=30 * 24 * 3600.0, description="Seconds after its last use that a session is over."
    )
    session_grace: Seconds = Field(
        default=24 * 3600.0, description="Seconds after its end that a session's documents are deleted."
    )
    session_cookie_secure: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether browsers send the cookie over TLS only; `auto`: yes, unless the service listens on the "
        "loopback address and API_PUBLIC_URL is not https.",
    )
    limit_sessions_per_minute: int = Field(
        default=600, ge=1, le=1_000_000, description="New sessions in a minute, of all browsers together."
    )

    # how jobs are followed
    estimate_seconds: Seconds = Field(
        default=60.0, description="Seconds that a document is taken to need while there is no history to go by."
    )
    sse_interval: Seconds = Field(
        default=0.25, description="Seconds between two looks for events to stream while no notification tells of them."
    )
    sse_listening_interval: Seconds = Field(
        default=5.0, le=15.0, description="Seconds between two such looks while notifications arrive."
    )
    sse_heartbeat: Seconds = Field(default=15.0, description="Seconds of silence before a stream says it is alive.")
    sse_seconds: Seconds = Field(
        default=3600.0, description="Seconds after which a stream ends; its client comes back and misses nothing."
    )
    sse_streams_per_user: int = Field(
        default=1000, ge=1, description="Streams of events of one user that one process has open at once."
    )
    sse_streams: int = Field(
        default=4000, ge=1, description="Streams of events of all users that one process has open at once."
    )
    sse_retry: Seconds = Field(default=3.0, description="Seconds that a client waits before it comes back.")

    # limits of the HTTP service, shared by all its processes
    limit_uploads_per_day: int = Field(default=30, ge=1, le=1_000_000, description="Uploads of one user in a day.")
    limit_uploads_per_minute: int = Field(
        default=10, ge=1, le=1_000_000, description="Upload requests of one user in a minute."
    )
    limit_upload_tries_per_minute: int = Field(
        default=10, ge=1, le=1_000_000, description="Times in a minute that the bytes of one announced file are sent."
    )
    limit_photo_urls_per_minute: int = Field(
        default=100, ge=1, le=1_000_000, description="Photos that one user announces in a minute."
    )
    limit_batch_files_per_day: int = Field(
        default=1000, ge=1, le=1_000_000, description="Files of one user's batches in a day."
    )
    limit_status_reads_per_minute: int = Field(
        default=10, ge=1, le=1_000_000, description="Reads of one job's status in a minute."
    )
    limit_requests_per_hour: int = Field(
        default=1000, ge=1, le=1_000_000, description="Requests of one user to one route in an hour."
    )
    limit_open_jobs: int = Field(default=500, ge=1, description="Jobs of one user that have not ended.")

    # connections
    pool_size: int = Field(default=10, ge=1, le=500, description="Database connections of one process.")
    connect_timeout: Seconds = Field(default=10.0, description="Seconds to wait for a database connection.")
    statement_timeout: Seconds = Field(default=30.0, description="Seconds that one statement may take.")
    lock_timeout: Seconds = Field(default=5.0, description="Seconds that a statement may wait for a lock.")
    idle_transaction_timeout: Seconds = Field(
        default=30.0, description="Seconds after which an idle transaction is ended."
    )
    transaction_pooler: bool = Field(
        default=False,
        description="True behind a transaction pooler (Supabase: port 6543): no LISTEN, nothing prepared.",
    )

    # logs
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least severe lines that are written."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="`auto` is readable on a terminal and JSON elsewhere."
    )

    @field_validator("home")
    @classmethod
    def _absolute_home(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("storage_url")
    @classmethod
    def _known_store(cls, value: str) -> str:
        if value:
            parse_storage_url(value)
        return value

    @field_validator("llamaparse_version")
    @classmethod
    def _dated_version(cls, value: str) -> str:
        if value == "latest":
            raise ValueError("`latest` changes what the same file becomes, and when is not told: name a date")
        if value:
            try:
                date.fromisoformat(value if len(value) == 10 else "")
            except ValueError:
                raise ValueError("it is no date, as 2026-09-28") from None
        return value

    @field_validator("prices")
    @classmethod
    def _known_prices(cls, value: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        check_prices(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for smaller, larger, share in (
            ("chunk_overlap_chars", "chunk_target_chars", 0.5),
            ("heartbeat_interval", "lease_ttl", 0.5),
            ("poll_min", "poll_max", 1.0),
            ("shutdown_grace", "shutdown_deadline", 1.0),
        ):
            value, limit = getattr(self, smaller), getattr(self, larger)
            if value > limit * share:
                raise ValueError(
                    f"{ENV_PREFIX}{smaller.upper()}={value:g} must be at most {'half of ' if share < 1 else ''}"
                    f"{ENV_PREFIX}{larger.upper()}={limit:g}"
                )
        if self.storage_kms_key_id and self.storage_encryption != "kms":
            raise ValueError("storage_kms_key_id is for storage_encryption=kms")
        secret = self.jwt_secret.get_secret_value()
        if secret and self.jwt_jwks_url:
            raise ValueError("jwt_secret and jwt_jwks_url exclude each other: an issuer signs in one way")
        if secret and len(secret.encode()) < 32:
            raise ValueError("jwt_secret must have 32 bytes or more (RFC 7518, section 3.2)")
        if (secret or self.jwt_jwks_url) and not self.jwt_issuer:
            raise ValueError("jwt_issuer must be set where jwt_secret or jwt_jwks_url is")
        hook = self.llamaparse_webhook_secret.get_secret_value()
        if hook and (len(hook) < 32 or not hook.isascii() or not hook.isprintable()):
            raise ValueError("llamaparse_webhook_secret must have 32 characters of ASCII or more")
        signing = self.signing_secret.get_secret_value()
        if signing and len(signing.encode()) < 32:
            raise ValueError("signing_secret must have 32 bytes or more (RFC 2104, section 3)")
        detection = self.detection_secret.get_secret_value()
        if detection and len(detection.encode()) < 32:
            raise ValueError("detection_secret must have 32 bytes or more (RFC 2104, section 3)")
        return self

    @property
    def embedded(self) -> bool:
        """Whether the database is the embedded one."""
        return not self.database_url.get_secret_value()

    @property
    def development_tokens(self) -> bool:
        """Whether the HTTP service takes the tokens of `upload-pipeline token`: embedded, and nobody else signs."""
        return self.embedded and not self.jwt_issuer

    @property
    def effective_storage_url(self) -> str:
        """The object store's URL with the default filled in."""
        return self.storage_url or f"file://{self.home / 'storage'}"


def load_settings(**overrides: object) -> Settings:
    """Reads the settings of this process.

    Args:
        overrides: values that win over the environment, by field name.

    Raises:
        PipelineError: `SETTING_INVALID`, naming each bad setting, its value and what is allowed.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except SettingsError as error:
        raise PipelineError(ErrorCode.SETTING_INVALID, _unreadable(str(error))) from error
    except ValidationError as error:
        lines = [_explain(dict(item)) for item in error.errors(include_url=False)]
        raise PipelineError(ErrorCode.SETTING_INVALID, "\n".join(lines)) from error


def _unreadable(message: str) -> str:
    # Where a setting is not the JSON that it must be, its name is in nothing but the message.
    field = next((name for name in Settings.model_fields if f'"{name}"' in message), None)
    if field is None:
        return f"A setting cannot be read: {message}."
    return f"{ENV_PREFIX}{field.upper()} is not JSON. It means: {Settings.model_fields[field].description}"


def _explain(item: dict[str, object]) -> str:
    location = item["loc"]
    if not isinstance(location, tuple) or not location:
        return f"Settings do not fit together: {str(item['msg']).removeprefix('Value error, ')}."
    field = str(location[0])
    hidden = isinstance(Settings.model_fields[field].default, SecretStr)
    value = item["input"]
    shown = "(hidden)" if hidden else repr(without_password(value) if isinstance(value, str) else value)
    meaning = Settings.model_fields[field].description
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{ENV_PREFIX}{field.upper()}={shown} is not allowed: {message}. It means: {meaning}"
