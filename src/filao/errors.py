"""Every exception that Filao raises on purpose. Catch `FilaoError` to catch them all.

    FilaoError
    ├── ConfigurationError         the call or the declaration cannot be right, whatever the queue holds
    │   └── UnsupportedFeature     this engine cannot do it; the text names those that can
    ├── QueueNotFound              nobody declared this queue; the text names its nearest neighbours
    ├── MessageError               this message cannot be sent as it is
    │   ├── MessageTooLarge        its body or its headers pass a limit
    │   └── MessageNotEncodable    its body cannot be written, or does not fit the queue's type
    ├── QueueFull                  the queue's `max_length` is reached, and no room can be made
    ├── LeaseLost                  the message is no longer yours to settle; nothing was changed
    └── EngineError                the storage failed; the text says what it said and what to do
        └── EngineUnavailable      ... for now: the same call may succeed later

An operation that raised did not happen, except where the storage died while it was confirming, or a thread that did it
together with its own was interrupted: then a send may have been stored. Send again with the same `message_id`, and it
is stored once.
"""


class FilaoError(Exception):
    """The root of everything that Filao raises on purpose."""

    done: int = 0
    """How many messages the call had changed for good before it failed half-way."""


class ConfigurationError(FilaoError):
    """The call, the URL or the declaration cannot be right; trying again will not help."""


class UnsupportedFeature(ConfigurationError):
    """This engine cannot do what was asked, and does not pretend to."""


class QueueNotFound(FilaoError):
    """The queue was never declared on this engine."""


class MessageError(FilaoError):
    """The message cannot be sent as it is; nothing was stored."""


class MessageTooLarge(MessageError):
    """The body or the headers pass a limit of their queue. Send a reference instead of the content."""


class MessageNotEncodable(MessageError):
    """The body cannot be written as JSON, would not come back as it was, or is not of the queue's declared type."""


class QueueFull(FilaoError):
    """The queue holds `max_length` messages and refuses more. Add consumers, or wait."""


class LeaseLost(FilaoError):
    """The lease ended and the message was taken over, settled or removed: this call changed nothing."""


class EngineError(FilaoError):
    """The storage failed. What was confirmed before stays confirmed."""


class EngineUnavailable(EngineError):
    """The storage cannot be reached or is locked for now; the same call may succeed later."""
