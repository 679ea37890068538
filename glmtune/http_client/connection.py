"""Certificates of this machine, and what the operating system says of a connection that failed."""

from __future__ import annotations

import functools
import os
import ssl

import httpx2


@functools.cache
def certificates() -> ssl.SSLContext:
    """Return those that this machine trusts; reading them takes longer than a request."""
    return httpx2.create_ssl_context()


def system_error(error: BaseException) -> str:
    """Return what the operating system said, which the client's own words ("all attempts failed") hide."""
    words = str(error) or type(error).__name__
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is None:
            continue
        if isinstance(each, OSError) and each.strerror:
            words = os.strerror(each.errno) if each.errno and each.errno > 0 else each.strerror
        if isinstance(each, BaseExceptionGroup):
            pending += each.exceptions
        pending += [each.__cause__, None if each.__cause__ else each.__context__]
    return words


def is_about_certificates(error: BaseException | None) -> bool:
    """Say whether a connection failed as the server's certificate is not trusted."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
