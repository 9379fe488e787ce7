"""Asks once whether the Hub can be reached, so that a machine without it does not wait for every file.

huggingface_hub repeats each request for a file that is not in its cache for some 23 s, or for minutes where a firewall
drops packets, and loading a model makes several such requests.
"""

import time
from functools import cache
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_session

from dpokit.console import say

TRIES, WAIT_SECONDS = 3, 1.0  # a short failure of the network does not count
CONNECT_SECONDS = 5.0


def use_cache_without_hub(name: str | None) -> None:
    """Lets libraries use only their caches in this process if a name is not a local path and the Hub cannot be reached.

    A Hub that answers at all, even slowly or with an error, counts as reachable: its libraries then repeat requests.
    """
    if name and not Path(name).expanduser().exists() and not constants.is_offline_mode():
        _use_cache_without_hub()


@cache
def _use_cache_without_hub() -> None:
    for number in range(TRIES):
        try:
            get_session().head(constants.ENDPOINT, timeout=httpx2.Timeout(CONNECT_SECONDS), follow_redirects=False)
            return
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            reason = str(error) or type(error).__name__
            if number < TRIES - 1:
                time.sleep(WAIT_SECONDS)
        except httpx2.HTTPError:  # it answers too slowly, or not in HTTP
            return
    constants.HF_HUB_OFFLINE = True
    say(f"{constants.ENDPOINT} cannot be reached ({reason}): from now on only files in the cache are used")
