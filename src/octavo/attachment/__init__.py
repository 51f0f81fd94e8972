"""Joining a Hugging Face model with gates, SwiftKV, pages and attention; undoing it; finding adapters."""

from octavo.attachment.attach import attach, detach, restore, set_swiftkv
from octavo.attachment.attachment import Attachment, attachment_of, fill, require_attachment
from octavo.attachment.cache import KVCache
from octavo.kv import Snapshot

__all__ = [
    "Attachment",
    "KVCache",
    "Snapshot",
    "attach",
    "attachment_of",
    "detach",
    "fill",
    "require_attachment",
    "restore",
    "set_swiftkv",
]
