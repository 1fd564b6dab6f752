# SPDX-License-Identifier: Apache-2.0
"""Guards of the page's server: the requests that are let in, their largest size, and the headers that browsers are sent."""

import ipaddress
import os
import re
import socket
import time
from collections import defaultdict, deque
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse


# A request carries references to files, not the files; an entry of the history is the largest thing in it.
MAX_BODY_BYTES = 4 * 2**20
# What one address may upload in an hour, after which Gradio deletes it.
MAX_UPLOADED_BYTES = 256 * 2**20
_UPLOAD_SECONDS = 3600.0
# Paths by which Gradio fetches a file from elsewhere for whoever asks.
_FETCHES = re.compile(r"/(file=[a-z]+:/|proxy=)", re.IGNORECASE)
# Gradio's page has scripts in it and makes functions of text, so both have to be allowed; nothing from elsewhere is.
_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:;"
    " worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
# A file that somebody uploaded is shown, and runs nothing.
_FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"


class Guard:
    """
    ASGI middleware that refuses what is addressed to another host, bodies and uploads that are too large.

    Args:
        app: the server behind it.
        hosts: names and addresses by which it may be asked, as [`served_hosts`] lists them; any address of the form of
            numbers where it holds `*`.
        max_upload_bytes: the largest upload.
    """

    def __init__(self, app: Any, hosts: Collection[str], max_upload_bytes: int):
        self.app, self.hosts, self.max_upload_bytes = app, hosts, max_upload_bytes
        self._uploads: defaultdict[str, deque[tuple[float, int]]] = defaultdict(deque)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._is_ours(headers.get("host", "")):
            refusal = "This page is not served under that name: see `allowed_hosts`, or `--allow-host`."
            await _refusal(421, refusal)(scope, receive, send)
            return
        if _FETCHES.search(scope["path"]):
            await _refusal(403, "This page fetches nothing from elsewhere.")(scope, receive, send)
            return
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        limit = self.max_upload_bytes + 2**16 if is_upload else MAX_BODY_BYTES
        client = (scope.get("client") or ("",))[0]
        if is_upload:
            limit = min(limit, MAX_UPLOADED_BYTES - self._uploaded(client))
        declared = headers.get("content-length", "0")
        if limit <= 0 or not declared.isdecimal() or int(declared) > limit:
            code = 429 if is_upload and limit < self.max_upload_bytes else 413
            await _refusal(code, "That is too much: send less, or wait an hour.")(scope, receive, send)
            return
        received, started = 0, False

        async def limited_receive() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _TooLargeError
            return message

        async def send_with_headers(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                answer = MutableHeaders(scope=message)
                answer["x-content-type-options"] = "nosniff"
                answer["content-security-policy"] = _FILE_POLICY if "/file=" in scope["path"] else _PAGE_POLICY
            await send(message)

        try:
            await self.app(scope, limited_receive, send_with_headers)
        except _TooLargeError:
            if not started:
                await _refusal(413, "That is too much: send less.")(scope, receive, send)
        finally:
            if is_upload:
                self._uploads[client].append((time.monotonic(), received))

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        name = name.strip("[]").lower()
        return name in self.hosts or ("*" in self.hosts and _is_address(name))

    def _uploaded(self, client: str) -> int:
        """Bytes that a client has uploaded within the last hour."""
        now = time.monotonic()
        for address in [address for address, kept in self._uploads.items() if now - kept[-1][0] > _UPLOAD_SECONDS]:
            del self._uploads[address]
        kept = self._uploads.get(client, deque())
        while kept and now - kept[0][0] > _UPLOAD_SECONDS:
            kept.popleft()
        return sum(size for _, size in kept)


def _refusal(code: int, text: str) -> PlainTextResponse:
    # The rest of the request is not waited for.
    return PlainTextResponse(text, code, {"connection": "close"})


class _TooLargeError(Exception):
    """A body goes on beyond its limit."""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def served_hosts(server_name: str, allowed: Collection[str] = ()) -> set[str]:
    """
    Return the names under which a server may be asked that listens on `server_name`: a page elsewhere whose name leads here
    (DNS rebinding) is none of them. `*` among them stands for any address of the form of numbers.
    """
    hosts = {"localhost", "127.0.0.1", "::1", server_name, *allowed, os.environ.get("SPACE_HOST", "")} - {""}
    if server_name in ("0.0.0.0", "::"):
        machine = socket.gethostname()
        hosts |= {"*", machine, f"{machine}.local", socket.getfqdn()}
    return {host.lower() for host in hosts}
