"""Which database this process works on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from upload_pipeline.database.connection import describe_url
from upload_pipeline.database.embedded import ensure_embedded
from upload_pipeline.errors import PipelineError
from upload_pipeline.settings import ENV_PREFIX

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings


@dataclass(frozen=True, slots=True)
class DatabaseUrls:
    """Where the database is; the URLs may hold passwords and so are left out of the `repr`.

    Attributes:
        admin: as the role that owns the schema, for migrations.
        worker: as `upload_worker`, for everything else.
        embedded: whether it is the embedded database.
    """

    admin: str = field(repr=False)
    worker: str = field(repr=False)
    embedded: bool


def resolve_database(settings: Settings) -> DatabaseUrls:
    """The database that the settings name; where they name none, the embedded one, started if it does not run.

    Raises:
        PipelineError: `SETTING_INVALID` for a URL or home that cannot be used, `DATABASE_UNAVAILABLE` where the
            embedded database cannot run.
    """
    if settings.embedded:
        embedded = ensure_embedded(settings.home)
        return DatabaseUrls(admin=embedded.admin_url, worker=embedded.worker_url, embedded=True)
    worker = settings.database_url.get_secret_value()
    admin = settings.migration_database_url.get_secret_value() or worker
    for setting, url in (("DATABASE_URL", worker), ("MIGRATION_DATABASE_URL", admin)):
        try:
            describe_url(url)
        except PipelineError as error:
            message = f"{ENV_PREFIX}{setting} is not allowed: {error.message}"
            raise PipelineError(error.code, message, {"setting": f"{ENV_PREFIX}{setting}"}) from None
    return DatabaseUrls(admin=admin, worker=worker, embedded=False)
