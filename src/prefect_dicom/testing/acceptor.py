"""Associations of a scripted PACS: connections, negotiation, presentation contexts."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from pydicom.uid import (
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AllStoragePresentationContexts, build_context
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made at import
    PatientRootQueryRetrieveInformationModelFind,
    PatientRootQueryRetrieveInformationModelGet,
    PatientRootQueryRetrieveInformationModelMove,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from prefect_dicom.testing.association_pdus import OddItems, operations_window, with_odd_items
from prefect_dicom.testing.connection_ends import (
    ScriptedAssociation,
    end_association,
    end_connection,
    send_pdu,
)
from prefect_dicom.testing.plans import AssociationPlan, End, Stage
from prefect_dicom.testing.sending import without_message_log
from prefect_dicom.testing.tls import secured_server

if TYPE_CHECKING:
    from prefect_dicom.testing.pacs import ScriptedPacs

PATIENT_ROOT = frozenset(
    {
        PatientRootQueryRetrieveInformationModelFind,
        PatientRootQueryRetrieveInformationModelMove,
        PatientRootQueryRetrieveInformationModelGet,
    }
)
_MODELS = (
    *sorted(PATIENT_ROOT),
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
    StudyRootQueryRetrieveInformationModelGet,
)
# Native encodings first, so that a sender which offers a choice does not re-encode.
_PLAIN = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
_ACCEPTANCE = b"\x02"
_STORAGE_SYNTAXES = list(dict.fromkeys(map(str, (*_PLAIN, *AllTransferSyntaxes))))
_SERVICE_OF = {
    str(Verification): "C-ECHO",
    str(PatientRootQueryRetrieveInformationModelFind): "C-FIND",
    str(PatientRootQueryRetrieveInformationModelMove): "C-MOVE",
    str(PatientRootQueryRetrieveInformationModelGet): "C-GET",
    str(StudyRootQueryRetrieveInformationModelFind): "C-FIND",
    str(StudyRootQueryRetrieveInformationModelMove): "C-MOVE",
    str(StudyRootQueryRetrieveInformationModelGet): "C-GET",
}


class AssociationServer(ThreadedAssociationServer):
    """Server with a long backlog, whose threads end with the process."""

    request_queue_size = 128
    daemon_threads = True


class Acceptor:
    """Acceptor of the associations of a scripted PACS.

    Parameters
    ----------
    pacs : ScriptedPacs
        The PACS, whose script and holdings decide.
    """

    def __init__(self, pacs: ScriptedPacs) -> None:
        self._pacs = pacs
        self._contexts = self._supported_contexts()

    def handler_class(self) -> type[RequestHandler]:
        """Return the handler of connections for pynetdicom's server."""
        acceptor = self

        class Handler(RequestHandler):
            def handle(self) -> None:
                """Negotiate and serve an association, unless the script ends the connection."""
                self.begun = acceptor._begin(self.request)
                if self.begun is None:
                    return
                if acceptor._pacs.policy.tls is not None:
                    plan, _ = self.begun
                    secured = secured_server(self.request, acceptor._pacs.policy.tls, plan.tls_as)
                    if secured is None:
                        return
                    self.request = secured
                super().handle()

            def _create_association(self) -> ScriptedAssociation:
                association: ScriptedAssociation = super()._create_association()
                association.acceptor.supported_contexts = acceptor._contexts
                without_message_log(association)
                assert self.begun is not None
                association.scripted, number = self.begun
                association.acse._negotiate_as_acceptor = lambda: acceptor._negotiate(
                    association, number
                )
                # In place of pynetdicom's service classes, which answer only as they should.
                association._serve_request = lambda message, context_id: acceptor._pacs._serve(
                    association, message, context_id
                )
                return association

        return Handler

    def _begin(self, connection: socket.socket) -> tuple[AssociationPlan, int] | None:
        """Return the plan of a new connection and its number; None if the script ended it."""
        number, plan = self._pacs._number("A-ASSOCIATE"), AssociationPlan(self._pacs)
        self._pacs._apply(Stage.CONNECT, "A-ASSOCIATE", number, plan)
        if plan.listen_again is not None:
            self._pacs.restart(plan.listen_again)
        if plan.end_at_once is not None:
            end_connection(connection, plan.end_at_once)
            return None
        if plan.tls and self._pacs.policy.tls is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            connection.settimeout(10)
            with contextlib.suppress(OSError):
                context.wrap_socket(connection, server_side=True)
            end_connection(connection, End("close"))
            return None
        return plan, number

    def _negotiate(self, association: ScriptedAssociation, number: int) -> None:
        """Answer an association request, in the association's own thread."""
        plan = association.scripted
        self._pacs._apply(Stage.ASSOCIATE, "A-ASSOCIATE", number, plan)
        if plan.hold is not None:
            while not (plan.hold.wait(0.02) or self._pacs._closing.is_set()):
                if not association.dul.is_alive() or association.acse.is_aborted():
                    return
        if plan.reject is not None:
            send_pdu(association, plan.rejection)
        elif end := plan.end.get("instead"):
            end_association(association, end)
        else:
            if not plan.roles:
                contexts = [copy(context) for context in self._contexts]
                for context in contexts:
                    context.scu_role = context.scp_role = None
                association.acceptor.supported_contexts = contexts
            honest = association.acse.send_accept
            association.acse.send_accept = lambda: self._accept(association, honest)
            type(association.acse)._negotiate_as_acceptor(association.acse)
            return
        association.kill()

    def _accept(self, association: ScriptedAssociation, send: Callable[[], None]) -> None:
        """Accept the association with the contexts that the script leaves."""
        plan = association.scripted
        for number, context in list(association._accepted_cx.items()):
            sop_class = str(context.abstract_syntax)
            named = (sop_class, _SERVICE_OF.get(sop_class, "C-STORE"), "all")
            context.result = next((plan.refused[n] for n in named if n in plan.refused), 0)
            if context.result:
                del association._accepted_cx[number]
                association._rejected_cx.append(context)
        if not plan.list_contexts:
            association._accepted_cx, association._rejected_cx = {}, []
        items = plan.items
        if plan.window:
            window = operations_window(*association.requestor.asynchronous_operations)
            items = items or OddItems()
            items = replace(items, add=items.add + window)
        if items is not None:
            _send_with_items(association, items)
        send()
        if end := plan.end.get("accepted"):
            while association.dul.to_provider_queue.queue:  # the acceptance goes out first
                time.sleep(0.001)
            end_association(association, end)

    def _supported_contexts(self) -> list[PresentationContext]:
        contexts = [build_context(Verification)]
        contexts += [build_context(uid) for uid in _MODELS]
        held: dict[str, Counter[str]] = {}
        for stored in self._pacs.holdings:
            held.setdefault(stored.sop_class_uid, Counter())[stored.transfer_syntax_uid] += 1
        known = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
        for uid in dict.fromkeys([*known, *held]):
            # The acceptor's order decides: a C-GET that offers a choice of syntaxes in one
            # context gets the one most instances of the class are stored in.
            syntaxes = [syntax for syntax, _ in held.get(uid, Counter()).most_common()]
            contexts.append(_storage_context(uid, *dict.fromkeys(syntaxes + _STORAGE_SYNTAXES)))
        return contexts


def _send_with_items(association: ScriptedAssociation, items: OddItems) -> None:
    """Have the acceptance go out with odd items, which pynetdicom would not encode."""
    transport = association.dul.socket
    plain = transport.send

    def send(pdu: bytes) -> None:
        if pdu[:1] == _ACCEPTANCE:
            pdu = with_odd_items(pdu, items)
        plain(pdu)

    transport.send = send


@cache
def _storage_context(uid: str, *syntaxes: str) -> PresentationContext:
    """Return the supported context of a class; cached, as there are hundreds of many syntaxes."""
    context = build_context(uid, list(syntaxes))
    context.scu_role = context.scp_role = True  # C-GET: we send, the requestor takes
    return context
