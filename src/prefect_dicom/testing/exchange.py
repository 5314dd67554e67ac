"""One request to a scripted PACS and its responses."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pynetdicom import dsutils
from pynetdicom.dimse_messages import C_GET_RSP, C_MOVE_RSP
from pynetdicom.dimse_primitives import C_GET, C_MOVE, C_STORE
from pynetdicom.presentation import PresentationContext

from prefect_dicom.testing.acceptor import PATIENT_ROOT
from prefect_dicom.testing.connection_ends import (
    AssociationLost,
    ScriptedAssociation,
    end_association,
)
from prefect_dicom.testing.instances import instance_of_bytes, tag_of, text_of
from prefect_dicom.testing.matching import LEVELS, UNIQUE_KEYS, levels_down_to, select
from prefect_dicom.testing.plans import (
    CANCEL,
    DESTINATION_UNKNOWN,
    IDENTIFIER_DOES_NOT_MATCH,
    PENDING,
    SUCCESS,
    Connection,
    End,
    FindPlan,
    KeepPlan,
    RetrievePlan,
    Stage,
    SubOperation,
)
from prefect_dicom.testing.request_log import Request
from prefect_dicom.testing.retrieve import GetSender, MoveSender, Retrieval

if TYPE_CHECKING:
    from prefect_dicom.testing.pacs import ScriptedPacs

_COUNTERS = (
    "NumberOfRemainingSuboperations",
    "NumberOfCompletedSuboperations",
    "NumberOfFailedSuboperations",
    "NumberOfWarningSuboperations",
)


class Exchange:
    """One request and its responses.

    Parameters
    ----------
    pacs : ScriptedPacs
        The PACS that answers.
    association : Association
        Association of the request.
    context : PresentationContext
        Presentation context of the request.
    message : object
        The request as a DIMSE primitive of pynetdicom.
    request : Request
        Its entry in the log.
    """

    def __init__(
        self,
        pacs: ScriptedPacs,
        association: ScriptedAssociation,
        context: PresentationContext,
        message: Any,
        request: Request,
    ) -> None:
        self.pacs = pacs
        self.association = association
        assert context.context_id is not None, "an accepted context has its id"
        self.context = context
        self.context_id = context.context_id
        self.message = message
        self.request = request
        self.noted_cancel = False
        self.on_cancel = "stop"

    # --- services

    def c_echo(self) -> None:
        """Answer a C-ECHO."""
        self.respond(SUCCESS)

    def c_store(self) -> None:
        """Store the instance of a C-STORE in the holdings."""
        message = self.message
        if message.DataSet is not None:
            data = message.DataSet.getvalue()
        else:  # pynetdicom has been set, for the whole process, to write them into files
            path = Path(message._dataset_path[0])
            with path.open("rb") as file:
                file.seek(message._dataset_path[1])
                data = file.read()
            message._dataset_file.close()
            path.unlink(missing_ok=True)
        stored = instance_of_bytes(
            data,
            str(self.context.transfer_syntax[0]),
            sop_class_uid=str(message.AffectedSOPClassUID),
            sop_instance_uid=str(message.AffectedSOPInstanceUID),
        )
        self.request.keys = {
            "StudyInstanceUID": stored.study_instance_uid,
            "SOPInstanceUID": stored.sop_instance_uid,
        }
        plan = KeepPlan(self.pacs, stored, stored)
        self.pacs._behave(Stage.KEEP, self.request, plan)
        if plan.kept is not None:
            self.pacs.holdings.add(plan.kept)
        if plan.end is not None:
            end_association(self.association, plan.end)
            raise AssociationLost
        self.respond(plan.status)

    def c_find(self) -> None:
        """Answer a C-FIND as planned."""
        fault = self.read_identifier()
        if fault is not None:
            self.respond(fault)
            return
        plan = FindPlan(self.pacs, self.request.level, dict(self.request.keys), self.declared)
        self.pacs._behave(Stage.FIND_QUERY, self.request, plan)
        if plan.refuse is None:
            found = select(self.pacs.holdings, plan.level, plan.keys, plan.matches)
            plan.answers = [self.answer(known) for known, _ in found]
            plan.matched = True
            self.pacs._behave(Stage.FIND_ANSWER, self.request, plan)
        if plan.refuse is not None:
            self.respond(plan.refuse)
            return
        for number, answer in enumerate(plan.answers):
            self.pass_by(plan.connection, number)
            if self.cancelled():
                self.respond(CANCEL)
                return
            data = plan.rewritten.get(number, bytes)(self.encode(answer))
            self.respond(plan.pending, data, astray=number in plan.astray)
            self.request.answers += 1
        self.pass_by(plan.connection, len(plan.answers))
        self.pacs._behave(Stage.FIND_DONE, self.request, plan)
        self.respond(plan.status)

    def c_move(self) -> None:
        """Carry out a C-MOVE as planned."""
        self.request.destination = (self.message.MoveDestination or "").strip()
        plan = self.retrieve_plan()
        if plan is None:
            return
        address = self.pacs.destinations.get(self.request.destination)
        if address is None:
            self.respond(DESTINATION_UNKNOWN, counts=(None, 0, 0, 0))
            return
        Retrieval(self, plan, MoveSender(self, plan, address)).run()

    def c_get(self) -> None:
        """Carry out a C-GET as planned."""
        plan = self.retrieve_plan()
        if plan is not None:
            Retrieval(self, plan, GetSender(self, plan)).run()

    def retrieve_plan(self) -> RetrievePlan | None:
        """Return the plan of a C-MOVE or C-GET; None if it was refused."""
        fault = self.read_identifier()
        request = self.request
        unique = UNIQUE_KEYS.get(request.level, "")
        if fault is None and not request.keys.get(unique):
            fault = IDENTIFIER_DOES_NOT_MATCH
        if fault is not None:
            self.respond(fault, counts=(None, 0, 0, 0))
            return None
        keys = {k: v for k, v in request.keys.items() if k in UNIQUE_KEYS.values()}
        chosen = select(self.pacs.holdings, request.level, keys)
        operations = [SubOperation.of(stored) for _, members in chosen for stored in members]
        plan = RetrievePlan(self.pacs, request.level, operations, request.service, keys)
        self.pacs._behave(Stage.RETRIEVE, request, plan)
        self.on_cancel = plan.on_cancel
        if plan.refuse is not None:
            self.respond(plan.refuse, counts=(None, 0, 0, 0))
            return None
        return plan

    # --- identifiers

    def read_identifier(self) -> int | None:
        """Read level and keys into the log; returns the status of a refusal, or None.

        Baseline behaviour, PS3.4 C.4.1.2.1 and C.4.2.2.1: one value for each unique key above
        the level, Patient Root from the patient on, Study Root from the study on.
        """
        syntax = self.context.transfer_syntax[0]
        stream = self.message.Identifier or BytesIO()
        identifier = dsutils.decode(
            stream, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated
        )
        self.asked = [e.keyword or str(e.tag) for e in identifier]
        self.declared = text_of(identifier, "SpecificCharacterSet")
        request = self.request
        request.level = text_of(identifier, "QueryRetrieveLevel")
        request.keys = {
            keyword: text_of(identifier, keyword)
            for keyword in self.asked
            if keyword not in ("QueryRetrieveLevel", "SpecificCharacterSet")
        }
        root = LEVELS if request.sop_class_uid in PATIENT_ROOT else LEVELS[1:]
        if request.level not in root:
            return IDENTIFIER_DOES_NOT_MATCH
        if not self.pacs.policy.relational:
            # Like Orthanc and DCMTK: a query may name several entities above its level.
            several = "*?" if request.service == "C-FIND" else "*?\\"
            for level in root[: root.index(request.level)]:
                key = request.keys.get(UNIQUE_KEYS[level], "")
                if not key or any(character in key for character in several):
                    return IDENTIFIER_DOES_NOT_MATCH
        return None

    def answer(self, known: Mapping[str, str]) -> Dataset:
        """Return the identifier of one match: the requested keys that are known."""
        level = self.request.level
        keywords = [k for k in self.asked if k in known]
        keywords += [UNIQUE_KEYS[one] for one in levels_down_to(level) if one != "PATIENT"]
        answer = Dataset()
        if known["SpecificCharacterSet"]:
            _set(answer, "SpecificCharacterSet", known["SpecificCharacterSet"])
        for keyword in dict.fromkeys(keywords):
            _set(answer, keyword, known[keyword])
        answer.QueryRetrieveLevel = level
        answer.RetrieveAETitle = self.pacs.ae_title
        return answer

    # --- answers

    def respond(
        self,
        status: int,
        identifier: Dataset | bytes | None = None,
        counts: Sequence[int | None] | None = None,
        astray: bool = False,
    ) -> None:
        """Send a response; ``counts`` are remaining, completed, failed and warning.

        One that goes ``astray`` says that it responds to the message before.
        """
        if not self.connected():
            raise AssociationLost
        response = type(self.message)()
        response.MessageID = self.message.MessageID
        response.MessageIDBeingRespondedTo = self.message.MessageID - astray
        response.AffectedSOPClassUID = self.message.AffectedSOPClassUID
        if isinstance(response, C_STORE):
            response.AffectedSOPInstanceUID = self.message.AffectedSOPInstanceUID
        response.Status = status
        if identifier is not None:
            encoded = identifier if isinstance(identifier, bytes) else self.encode(identifier)
            response.Identifier = BytesIO(encoded)
        long_counts = any(count is not None and count >> 16 for count in counts or ())
        if counts is not None and not long_counts:
            for keyword, count in zip(_COUNTERS, counts, strict=True):
                setattr(response, keyword, count)
        if status >> 8 != PENDING >> 8:
            self.request.status = status
        if counts is not None and long_counts:
            self.send_with_long_counts(response, counts)
        else:
            self.association.dimse.send_msg(response, self.context_id)

    def send_with_long_counts(self, response: Any, counts: Sequence[int | None]) -> None:
        """Send counters that no US can hold, in four bytes each."""
        message = {C_MOVE: C_MOVE_RSP, C_GET: C_GET_RSP}[type(response)]()
        message.primitive_to_message(response)
        for keyword, count in zip(_COUNTERS, counts, strict=True):
            if count is not None:
                tag = tag_of(keyword)
                message.command_set[tag] = DataElement(tag, "UL", count & 0xFFFFFFFF)
        message._set_command_group_length()
        dimse = self.association.dimse
        for primitive in message.encode_msg(self.context_id, dimse.maximum_pdu_size):
            dimse.dul.send_pdu(primitive)

    def encode(self, identifier: Dataset) -> bytes:
        """Encode an identifier, in UTF-8 if its character set lacks a character."""
        syntax = self.context.transfer_syntax[0]
        how = syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated
        data = dsutils.encode(identifier, *how)
        if data is None:  # its texts are not in the character set it declares
            identifier.SpecificCharacterSet = "ISO_IR 192"
            data = dsutils.encode(identifier, *how)
        if data is None:
            raise ValueError("the answer cannot be encoded")
        return data

    # --- the association

    def connected(self) -> bool:
        """Whether responses can still be sent."""
        association = self.association
        return (
            association.is_established
            and not association._sent_abort
            and not association.acse.is_aborted()
            and association.dul.is_alive()
            and association.dul.socket is not None
            and association.dul.socket.socket is not None
        )

    def cancelled(self) -> bool:
        """Whether a C-CANCEL has arrived that stops the request."""
        cancel = self.association.dimse.cancel_req.get(self.message.MessageID)
        if cancel is not None and not self.noted_cancel:
            self.noted_cancel = True
            self.pacs._note(self.association, "C-CANCEL", cancel)
            if self.on_cancel == "answer":
                self.respond(CANCEL)
            elif self.on_cancel == "abort":
                self.drop(End())
        return cancel is not None and self.on_cancel == "stop"

    def pass_by(self, connection: Connection, answers: int) -> None:
        """Hold, mute or drop the association, if the script says so at this number of answers."""
        hold = connection.hold_before.get(answers)
        if hold is not None:
            self.wait_for(hold)
        if connection.pause_seconds:
            self.wait_for(threading.Event(), connection.pause_seconds)
        if connection.mute_after == answers:
            self.pacs._closing.wait()
            raise AssociationLost
        if connection.restart_after == answers:
            self.pacs.restart(connection.back)
            raise AssociationLost
        if connection.drop_after == answers:
            self.drop(connection.drop_by)

    def wait_for(self, hold: threading.Event, most_seconds: float = math.inf) -> None:
        """Wait for an event, the end of the PACS or a C-CANCEL."""
        until = time.monotonic() + most_seconds
        while not hold.wait(0.02) and time.monotonic() < until:
            if self.pacs._closing.is_set() or self.cancelled():
                return

    def drop(self, end: End) -> None:
        """End the association and the exchange."""
        end_association(self.association, end)
        raise AssociationLost


def _set(answer: Dataset, keyword: str, text: str) -> None:
    vr = dictionary_VR(keyword)
    value: Any = text
    if vr in ("CS", "UI") and "\\" in text:
        value = text.split("\\")
    elif vr == "US":
        value = int(text)
    # As stored, however odd: a PACS does not correct what it received.
    answer.add(DataElement(tag_of(keyword), vr, value, validation_mode=IGNORE))
