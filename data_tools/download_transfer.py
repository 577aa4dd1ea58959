"""Fetch single files from the hub: going on after every break, verified before they get their names.

The library lists, authenticates and makes the requests, but its own `hf_hub_download` (2.4) removes what it has on an
error, begins at zero after a kill, takes the hash on trust, and gives data on in pieces of 10 MiB, which is most of a
SlimPajama file. So the loop that receives is here.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers

from data_tools.download_record import Record, RemoteFile
from data_tools.files import replace_durably

TRANSIENT_CLIENT_ERRORS = (408, 429)
NO_ACCESS = (401, 403, 404)


class FetchError(Exception):
    """A file, or the listing, can't be had; the message says which and why."""


class Stopped(Exception):
    """The command is ending; what was received stays for the next run."""


class BadContent(Exception):
    """A body was cut short or is not the file; worth another try."""


@dataclass(frozen=True)
class Backoff:
    """When to try again: after `first` seconds, then twice as long each time up to `longest`, and how often."""

    first: float = 1.0
    longest: float = 60.0
    retries: int = 8

    def seconds(self, failures: int, error: Exception) -> float:
        """How long to wait after so many failures in a row; as long as the server says, where it does."""
        if isinstance(error, HfHubHTTPError):
            headers = error.response.headers
            limit = parse_ratelimit_headers(headers)
            if error.response.status_code == 429 and limit and limit.remaining == 0:
                return limit.reset_in_seconds + 1.0  # the server rounds down
            if (seconds := headers.get("Retry-After", "")).isdecimal():
                return float(seconds)
        return min(self.longest, self.first * 2 ** (failures - 1))

    def gives_up(self, failures: int, error: Exception) -> bool:
        """Whether another try is pointless."""
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
        return failures > self.retries or (status < 500 and status not in TRANSIENT_CLIENT_ERRORS)


def fetch_record(api: HfApi, repository: str, revision: str, backoff: Backoff) -> Record:
    """Resolve a revision and list its files; FetchError says what to do where there is no access."""
    failures = 0
    while True:
        try:
            return Record.of_hub(api, repository, revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        except (httpx2.RequestError, HfHubHTTPError) as error:
            failures += 1
            if backoff.gives_up(failures, error):
                raise FetchError(f"{api.endpoint}: dataset {repository}: {_reason(error, revision)}") from error
            time.sleep(backoff.seconds(failures, error))


class Transfer:
    """Fetches files of a record; several threads may use one.

    Args:
        on_bytes: hears how many bytes more were received, as a negative number where some were thrown away.
        stop: once set, all fetches end with Stopped.
    """

    def __init__(
        self, api: HfApi, record: Record, backoff: Backoff, on_bytes: Callable[[int], None], stop: Event
    ) -> None:
        self._api, self._record, self._backoff, self._on_bytes, self._stop = api, record, backoff, on_bytes, stop
        # Byte ranges and sizes are those of the file itself.
        self._headers = {**build_hf_headers(token=api.token), "Accept-Encoding": "identity"}

    def fetch(self, file: RemoteFile, final: Path) -> None:
        """Fetch a file to its name, from where an earlier try or run broke off.

        Failures count in a row: one that came after more of the file than ever before is the first.

        Raises:
            FetchError: the server refuses, or the retries are used up; what was received stays.
            OSError: it can't be written.
        """
        partial = partial_path(final)
        furthest, failures = received(file, partial), 0
        while True:
            try:
                self._receive(file, partial)
                self._check(file, partial)
                return replace_durably(partial, final)
            except (httpx2.RequestError, HfHubHTTPError, BadContent) as error:
                reached = received(file, partial)
                failures = 1 if reached > furthest else failures + 1
                furthest = max(reached, furthest)
                if self._backoff.gives_up(failures, error):
                    raise FetchError(f"{file.path}: {_reason(error, self._record.commit)}") from error
                if self._stop.wait(self._backoff.seconds(failures, error)):
                    raise Stopped from error

    def _receive(self, file: RemoteFile, partial: Path) -> None:
        have = received(file, partial)
        if have == file.size:
            return partial.touch()
        record, endpoint = self._record, self._api.endpoint
        url = hf_hub_url(record.repository, file.path, repo_type="dataset", revision=record.commit, endpoint=endpoint)
        headers = self._headers | ({"Range": f"bytes={have}-"} if have else {})
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            if response.status_code != httpx2.codes.PARTIAL_CONTENT:
                self._on_bytes(-have)
                have = 0
            with open(partial, "ab" if have else "wb") as stream:
                for chunk in response.iter_bytes():
                    if self._stop.is_set():
                        raise Stopped
                    stream.write(chunk)
                    self._on_bytes(len(chunk))
                    have += len(chunk)
                    if have > file.size:
                        break  # to be thrown away; nobody knows how much there is to come
        if have < file.size:
            raise BadContent(f"the body ended after {have:,} of {file.size:,} bytes")

    def _check(self, file: RemoteFile, partial: Path) -> None:
        if damage := file.damage(partial):
            self._on_bytes(-partial.stat().st_size)
            partial.unlink()
            raise BadContent(f"received {damage}")


def partial_path(final: Path) -> Path:
    """Where a file is until it is whole; no glob for data files matches it."""
    return final.with_name(f"{final.name}.partial")


def received(file: RemoteFile, partial: Path) -> int:
    """Bytes of a file that are there; what is longer than the file is worth nothing."""
    size = partial.stat().st_size if partial.exists() else 0
    return size if size <= file.size else 0


def _reason(error: Exception, revision: str) -> str:
    if isinstance(error, RevisionNotFoundError):
        return f"no revision {revision!r}"
    if isinstance(error, HfHubHTTPError):
        status = f"HTTP {error.response.status_code} {error.response.reason_phrase}"
        if error.response.status_code in NO_ACCESS:
            status += ": not there, private or gated; check the name, and that HF_TOKEN is a token that may read it"
        return status
    return str(error) if isinstance(error, BadContent) else f"{type(error).__name__}: {error}"
