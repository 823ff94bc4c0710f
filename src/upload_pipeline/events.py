"""The closed list of event codes, as the type `upload_pipeline.event_code` has them.

An event is written by the verb that makes it happen, in the same transaction. Code that reads events, or writes the few
that are not a job's, names them by this list; a test holds it against the database.
"""

from __future__ import annotations

from enum import StrEnum


class EventCode(StrEnum):
    """What happened."""

    DOCUMENT_RESERVED = "document_reserved"
    DOCUMENT_ACCEPTED = "document_accepted"
    DOCUMENT_SEARCHABLE = "document_searchable"
    DOCUMENT_DELETION_STARTED = "document_deletion_started"
    DOCUMENT_DELETED = "document_deleted"
    PHOTO_STATUS_CHANGED = "photo_status_changed"
    PHOTO_DELETION_STARTED = "photo_deletion_started"
    PHOTO_DELETED = "photo_deleted"
    PHOTO_EXPIRED = "photo_expired"
    JOB_ENQUEUED = "job_enqueued"
    JOB_CLAIMED = "job_claimed"
    JOB_ADVANCED = "job_advanced"
    JOB_HANDED_ON = "job_handed_on"
    JOB_SNOOZED = "job_snoozed"
    JOB_FAILED = "job_failed"
    JOB_PROMOTED = "job_promoted"
    JOB_RELEASED = "job_released"
    JOB_REAPED = "job_reaped"
    JOB_DEADLETTERED = "job_deadlettered"
    JOB_CANCEL_REQUESTED = "job_cancel_requested"
    JOB_CANCELLED = "job_cancelled"
    JOB_RESTARTED = "job_restarted"
    JOB_DONE = "job_done"
    BATCH_ACCEPTED = "batch_accepted"
    BATCH_COMPLETED = "batch_completed"
    WRITE_FENCED = "write_fenced"
    ORPHAN_REMOVED = "orphan_removed"
    UPKEEP_REFUSED = "upkeep_refused"
    CAPACITY_WARNING = "capacity_warning"
    PROVIDER_PAUSED = "provider_paused"
    WORKER_STARTED = "worker_started"
    WORKER_STOPPED = "worker_stopped"
    WORKER_LEFT_POOLS = "worker_left_pools"
    EMBEDDING_MODEL_CHANGED = "embedding_model_changed"


class EventSeverity(StrEnum):
    """How much it matters."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
