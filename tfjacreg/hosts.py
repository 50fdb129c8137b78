"""Asks whether a machine on the internet answers."""

import contextlib
import urllib.error
import urllib.request


def ask(host: str) -> None:
    """Asks whether a host answers; raises OSError if it does not."""
    request = urllib.request.Request(host, method="HEAD")
    with contextlib.suppress(urllib.error.HTTPError):  # An error page is an answer too.
        urllib.request.urlopen(request, timeout=10).close()
