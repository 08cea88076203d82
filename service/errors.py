"""What the service itself refuses or fails at; `service.problems` says what a client sees."""


class ServiceError(Exception):
    """Base of the service's own errors. The message is shown to the client."""

    retry_after_s: int | None = None


class InvalidRequestError(ServiceError):
    """Raised when a request is not well-formed: not multipart, broken in the middle, not JSON."""


class UnauthenticatedError(ServiceError):
    """Raised when the service has keys and the request carries none that opens it."""


class ForbiddenError(ServiceError):
    """Raised when a key's role does not reach as far as the request."""


class ValidationError(ServiceError):
    """Raised when a field of a well-formed request has a value that is not allowed.

    Args:
        detail: What was expected and what came.
        pointer: Which part of the request, like ``/frames/3``.
    """

    def __init__(self, detail: str, pointer: str) -> None:
        super().__init__(detail)
        self.pointer = pointer


class AlreadyExistsError(ServiceError):
    """Raised when a tracklet id is taken by other content."""


class PayloadTooLargeError(ServiceError):
    """Raised when a file, a frame or a request is over its limit."""


class TooManyFramesError(ServiceError):
    """Raised when a tracklet has more frames than the limit."""


class UnsupportedMediaError(ServiceError):
    """Raised when a file is not of a kind that is taken."""


class UndecodableFrameError(ServiceError):
    """Raised when a file is of the right kind but cut off or damaged."""


class NoUsableFramesError(ServiceError):
    """Raised when an upload can be read but holds no frame."""


class OverloadedError(ServiceError):
    """Raised when the queue is full: the service is fine, there is too much to do."""

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class RateLimitedError(OverloadedError):
    """Raised when one key sends more requests than it may; the others go on."""


class NotReadyError(ServiceError):
    """Raised by the readiness probe while a part does not answer."""

    retry_after_s = 2


class WorkerUnavailableError(ServiceError):
    """Raised when the embedding worker has stopped, or failed at a tracklet."""

    retry_after_s = 5


class DeadlineExceededError(ServiceError):
    """Raised when a request waited longer than its deadline."""


class AuditUnavailableError(ServiceError):
    """Raised when the audit trail cannot be written: nothing is done that it could not tell of."""

    retry_after_s = 5


class AuditError(ServiceError):
    """Raised by a command, or at the start, when the audit trail cannot be made or read."""


class KeysError(ServiceError):
    """Raised by a command, or at the start, when keys cannot be read, made or revoked."""
