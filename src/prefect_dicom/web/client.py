"""The client of one node that speaks DICOMweb: searches by QIDO-RS, retrieves by WADO-RS.

A client has one connection to the node, as a requestor of DIMSE has one association.
"""

from __future__ import annotations

import contextlib
import email.utils
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import UTC, datetime
from urllib.parse import urljoin

from pydicom.dataset import Dataset

from prefect_dicom.config.capabilities import NodeCapabilities
from prefect_dicom.config.tls import Tls
from prefect_dicom.config.web_node import WebNode
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.reasons import Scope, reason_for
from prefect_dicom.network.find.answers import text_of
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.status import SUCCESS
from prefect_dicom.network.storage_scp.store_handler import StoreHandler
from prefect_dicom.web.authentication import Authenticator, authenticator_for
from prefect_dicom.web.connection import HttpConnection, Patience, Response, origin_of
from prefect_dicom.web.dicom_json import decode_answers
from prefect_dicom.web.query_string import Search, retrieve_paths
from prefect_dicom.web.retrieve import (
    AS_STORED,
    AS_STORED_UNQUOTED,
    SINGLE_AS_STORED,
    receive,
)
from prefect_dicom.web.search import Page, pages
from prefect_dicom.web.status import (
    LONGEST_RETRY_AFTER_SECONDS,
    NO_CONTENT,
    REDIRECTIONS,
    UNAUTHORIZED,
    WebService,
    reason_for_http,
)

NOBODYS_STUDY = "2.25.316045832071839640297641238745812837465"
"""A StudyInstanceUID that no study has: a search for it costs a server next to nothing."""
_MOST_PAGE_BYTES = 64 * 1024**2
_MOST_REDIRECTIONS = 3
_JSON = "application/dicom+json"


class WebClient(NodeClient):
    """Requests to one node that speaks DICOMweb, over one connection that is kept.

    Parameters
    ----------
    node : WebNode
        The node, its limits and time limits.
    answered : set of str, optional
        See :class:`~prefect_dicom.network.node_client.NodeClient`.
    authenticator : Authenticator, optional
        Shared by all clients of the node, so that a token is issued once.
    capabilities : NodeCapabilities, optional
        What was learnt of the node before.
    """

    node: WebNode

    def __init__(
        self,
        node: WebNode,
        answered: set[str] | None = None,
        authenticator: Authenticator | None = None,
        capabilities: NodeCapabilities | None = None,
    ) -> None:
        super().__init__(node, answered)
        # Lists above their level would be keys in a query string, which a server may ignore.
        self.answers_lists = False
        self.characters = "ISO_IR 192"
        self.decodes = None if capabilities is None else capabilities.percent_decoding
        """Whether the node undoes percent-encoding; None: not known."""
        self._connection = HttpConnection(tls_of(node), lambda: self.stopping())
        self._authenticator = authenticator or authenticator_of(node)
        times = node.timeouts
        self._search_patience = Patience(
            times.connect_seconds, times.find_seconds, times.find_seconds
        )
        self._retrieve_patience = Patience(
            times.connect_seconds, times.first_byte_seconds, times.stall_seconds
        )
        self._accept = AS_STORED
        self._host = origin_of(node.dicomweb)[1]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    # --- services

    def echo(self) -> float:
        """Search for a study that nobody has; returns the seconds until its answer.

        Raises
        ------
        PacsError
            With the cause.
        """
        url = f"{self.node.search_url}/studies?StudyInstanceUID={NOBODYS_STUDY}&limit=1"
        began = time.monotonic()
        self._page(url)
        return time.monotonic() - began

    def character_sets(self, texts: Sequence[str]) -> Iterator[str]:
        """URLs and DICOM JSON are in UTF-8, PS3.18 8.3.4 and F.2."""
        yield self.characters

    def answers(self, identifier: Dataset, level: str) -> Generator[Dataset]:
        """Search, page by page, and yield the answers as they come."""
        search = Search.of(identifier, level)
        if not search.encodes:
            yield from self._all_pages(search, search.url(self.node.search_url))
            return
        if self.decodes is not False:
            found = False
            for answer in self._all_pages(search, search.url(self.node.search_url)):
                found = True
                yield answer
            if found or self.decodes:
                return
        url = search.wider_url(self.node.search_url)
        if url is None:
            raise PacsError("request-refused", "a value cannot be searched for at this server")
        for answer in self._all_pages(search, url):
            if search.takes(answer):
                if self.decodes is None:
                    self.decodes = False
                yield answer

    def finds_encoded(self, patient_id: str) -> bool:
        """Whether a PatientID is found when its last character is percent-encoded."""
        encoded = f"{patient_id[:-1]}%{ord(patient_id[-1]):02X}"
        url = f"{self.node.search_url}/studies?PatientID={encoded}&limit=1"
        return any(text_of(a, "PatientID") == patient_id for a in self._page(url).answers)

    def get(
        self,
        identifier: Dataset,
        *,
        contexts: Sequence[tuple[str, str]],
        store_handler: StoreHandler,
        should_stop: Callable[[], bool] | None = None,
        without_roles: bool = True,
    ) -> RetrieveResult:
        """Request instances by WADO-RS, one request for each UID, and receive them.

        Returns
        -------
        RetrieveResult
            Of success only where every answer was whole. Else ``lost`` says what the first one
            ended by that was not, or the one at which the others were given up.
        """
        lost: str | None = None
        stopping = self.stopping
        if should_stop is not None:
            self.stopping = should_stop
        try:
            for path, single in retrieve_paths(identifier):
                if self.stopping():
                    return RetrieveResult(None, lost="interrupted")
                url = f"{self.node.retrieve_url}/{path}"
                try:
                    end = self._retrieve(url, store_handler, single=single)
                except PacsError as error:
                    if error.code == "credentials-missing":
                        raise
                    return RetrieveResult(
                        None, lost=error.code, retry_after_seconds=error.retry_after_seconds
                    )
                lost = lost or end
                if end is not None and not _goes_on(end):
                    return RetrieveResult(None, lost=end)
        finally:
            self.stopping = stopping
        return RetrieveResult(None, lost=lost) if lost else RetrieveResult(SUCCESS)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def abort(self) -> None:
        """Close the connection, whatever is under way on it."""
        self._connection.close()

    # --- requests

    def _all_pages(self, search: Search, url: str) -> Generator[Dataset]:
        def fetch(limit: int, offset: int) -> Page:
            separator = "" if url.endswith("?") else "&"
            return self._page(f"{url}{separator}limit={limit}&offset={offset}")

        yield from pages(search, fetch)

    def _page(self, url: str) -> Page:
        headers = {"Accept": _JSON}
        with self._sent(WebService.SEARCH, url, headers, self._search_patience) as response:
            says_more = any(text.strip().startswith("299") for text in response.warnings)
            if response.status == NO_CONTENT:
                return Page((), says_more)
            body = response.read(_MOST_PAGE_BYTES)
        return Page(decode_answers(body) if body.strip() else (), says_more)

    def _retrieve(self, url: str, sink: StoreHandler, *, single: bool) -> str | None:
        """Send one request; in another form, where the server refuses the form.

        Returns
        -------
        str or None
            See :func:`~prefect_dicom.web.retrieve.receive`.
        """
        forms = [self._accept, *({AS_STORED, AS_STORED_UNQUOTED} - {self._accept})]
        if single:
            forms.append(SINGLE_AS_STORED)
        refusal: PacsError | None = None
        for accept in forms:
            headers = {"Accept": accept}
            try:
                with self._sent(
                    WebService.RETRIEVE, url, headers, self._retrieve_patience
                ) as response:
                    end = receive(response, sink, self._host, single=single)
                    if end is None and accept != SINGLE_AS_STORED:
                        self._accept = accept
                    return end
            except PacsError as error:
                if not error.reason.refuses_form:
                    if error.scope is Scope.NODE:
                        raise
                    return error.code
                refusal = refusal or error
        assert refusal is not None
        return refusal.code

    @contextlib.contextmanager
    def _sent(
        self, service: WebService, url: str, headers: dict[str, str], patience: Patience
    ) -> Iterator[Response]:
        """Send a request, follow redirections, renew a token that was refused.

        Raises
        ------
        PacsError
            With what the status stands for.
        """
        headers = {"Accept-Encoding": "identity", **headers}
        renewed, redirections = False, 0
        while True:
            asked_at = self.now()
            signed = {**headers, **self._authenticator.headers("GET", url)}
            again, failure = "", None
            with self._connection.request(url, signed, patience) as response:
                if response.status == UNAUTHORIZED and not renewed and self._authenticator.renew():
                    renewed, again = True, url
                elif response.status in REDIRECTIONS:
                    redirections += 1
                    again = self._redirected(url, response, redirections)
                elif (failure := _failure(service, response)) is None:
                    self.first_answer(service, self.now() - asked_at)
                    self.answered.add(service)
                    yield response
                    return
            if not again:
                assert failure is not None
                raise failure
            url = again

    def _redirected(self, url: str, response: Response, count: int) -> str:
        """Where a redirection leads: only within the origin that credentials are for."""
        try:
            target = urljoin(url, response.headers.get("Location", ""))
            same = origin_of(target) == origin_of(url)
        except (ValueError, KeyError):
            same = False
        if not same or count > _MOST_REDIRECTIONS or not target.isascii():
            raise PacsError(
                "service-not-offered", f"status {response.status}: redirected elsewhere"
            )
        return target


def _failure(service: WebService, response: Response) -> PacsError | None:
    """The error that an answer stands for; None where the request succeeded."""
    code = reason_for_http(service, response.status)
    if code is None:
        return None
    error = PacsError(code, f"{service} status {response.status}")
    if code == "pacs-busy":
        error.retry_after_seconds = retry_after(response.headers.get("Retry-After", ""))
    return error


def _goes_on(code: str) -> bool:
    """Whether the other instances of a request are worth asking for after one ended so."""
    return reason_for(code).scope is not Scope.NODE and code != "interrupted"


def retry_after(value: str) -> float | None:
    """Seconds of a Retry-After, RFC 9110 10.2.3; None where it says nothing.

    Examples
    --------
    >>> retry_after("120"), retry_after("soon"), retry_after("999999")
    (120.0, None, 900.0)
    """
    value = value.strip()
    if value.isascii() and value.isdigit():
        seconds = float(value[:9])
    else:
        try:
            at = email.utils.parsedate_to_datetime(value)
        except (ValueError, TypeError, IndexError):
            return None
        if at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        seconds = (at - datetime.now(UTC)).total_seconds()
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER_SECONDS)


def tls_of(node: WebNode) -> Tls:
    """How the servers of a node are verified: by its own settings, or by the system's CAs."""
    return node.tls if isinstance(node.tls, Tls) else Tls(trust="system")


def authenticator_of(node: WebNode) -> Authenticator:
    """The authenticator of a node, for all of its clients."""
    times = node.timeouts
    patience = Patience(times.connect_seconds, times.acse_seconds, times.acse_seconds)
    return authenticator_for(
        node.authentication, lambda: HttpConnection(tls_of(node), lambda: False), patience
    )
