"""Joining a Hugging Face model with gates, SwiftKV, pages and attention; undoing it; finding adapters."""

from octavo.attachment.attach import attach, detach, restore, set_swiftkv
from octavo.attachment.attachment import Attachment, KVCache, attachment_of, fill, require_attachment

__all__ = [
    "Attachment",
    "KVCache",
    "attach",
    "attachment_of",
    "detach",
    "fill",
    "require_attachment",
    "restore",
    "set_swiftkv",
]
