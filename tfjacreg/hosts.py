"""Whether a machine of the internet answers."""

import contextlib
import urllib.error
import urllib.request


def ask(host: str) -> None:
    """Asks a host whether there is a network; raises OSError if it does not answer."""
    request = urllib.request.Request(host, method="HEAD")
    with contextlib.suppress(urllib.error.HTTPError):  # Somebody answers.
        urllib.request.urlopen(request, timeout=10).close()
