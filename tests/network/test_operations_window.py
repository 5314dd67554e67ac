"""The asynchronous operations window, PS3.7 D.3.3.3: granted, and kept within bounds."""

from __future__ import annotations

import threading

import pytest
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    AsynchronousOperationsWindowNegotiation,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelGet as GET_MODEL

from prefect_dicom.network.dimse import Element, unsigned_short
from prefect_dicom.network.upper_layer.association_items import OperationsWindow
from prefect_dicom.network.upper_layer.negotiation import (
    Answer,
    AssociationRequest,
    get_request_pdu,
    read_answer,
    read_items,
    request_pdu,
)
from tests.support.wire import (
    CT,
    EXPLICIT,
    RELEASE_RQ,
    Conversation,
    MemoryStoreHandler,
    association_request,
    responses,
    store_message,
)

RESPONSE_BYTES = 114
"""Of one at the most."""


def answer_to(*window: int) -> bytes:
    request = A_ASSOCIATE_RQ()
    request.decode(association_request())
    primitive = request.to_primitive()
    if window:
        item = AsynchronousOperationsWindowNegotiation()
        item.maximum_number_operations_invoked, item.maximum_number_operations_performed = window
        primitive.user_information.append(item)
    request.from_primitive(primitive)
    items = read_items(request.encode()[6:])
    return Answer(AssociationRequest(1, "", "", "", 0, items), 16384).pdu


def granted(pdu: bytes) -> tuple[int, int] | None:
    answer = A_ASSOCIATE_AC()
    answer.decode(pdu)
    for item in answer.to_primitive().user_information:
        if isinstance(item, AsynchronousOperationsWindowNegotiation):
            return (
                item.maximum_number_operations_invoked,
                item.maximum_number_operations_performed,
            )
    return None


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ((1, 1), (1, 1)),
        ((8, 1), (8, 1)),
        ((64, 64), (64, 1)),
        ((65, 1), (64, 1)),
        ((65535, 65535), (64, 1)),
        ((0, 0), (64, 1)),
    ],
)
def test_the_smaller_of_what_is_asked_and_64_is_granted(asked, answered):
    assert granted(answer_to(*asked)) == answered


def test_who_does_not_ask_for_a_window_gets_no_answer_to_it():
    assert granted(answer_to()) is None


def test_what_a_peer_grants_us_is_read_and_one_at_a_time_where_it_says_nothing():
    assert read_answer(answer_to(0, 0)).operations_window == 64
    assert read_answer(answer_to(7, 1)).operations_window == 7
    assert read_answer(answer_to()).operations_window == 1


def test_a_c_get_lets_the_pacs_send_64_instances_ahead():
    proposed = A_ASSOCIATE_RQ()
    proposed.decode(get_request_pdu("US", "PACS", GET_MODEL, [(CT, EXPLICIT)]))
    user = proposed.to_primitive().user_information
    (window,) = (i for i in user if isinstance(i, AsynchronousOperationsWindowNegotiation))
    assert window.maximum_number_operations_invoked == 1
    assert window.maximum_number_operations_performed == 64
    (role,) = (i for i in user if isinstance(i, SCP_SCU_RoleSelectionNegotiation))
    assert (role.sop_class_uid, role.scu_role, role.scp_role) == (CT, False, True)


def test_a_request_of_ours_is_read_by_pynetdicom_as_it_was_meant():
    proposed = [(CT, [EXPLICIT, "1.2.840.10008.1.2"]), ("1.2.3", ["1.2.840.10008.1.2"])]
    pdu = request_pdu("US", "PACS", proposed, ["1.2.3"], OperationsWindow(9, 0), 32768)
    read = A_ASSOCIATE_RQ()
    read.decode(pdu)
    assert read.encode() == pdu
    request = read.to_primitive()
    assert (request.calling_ae_title, request.called_ae_title) == ("US", "PACS")
    assert request.application_context_name == "1.2.840.10008.3.1.1.1"
    assert [
        (context.context_id, context.abstract_syntax, context.transfer_syntax)
        for context in request.presentation_context_definition_list
    ] == [(1, *proposed[0]), (3, *proposed[1])]
    assert request.maximum_length_received == 32768


@pytest.mark.parametrize("title", ["SEVENTEEN-LETTERS", "MÜLLER", "TAB\t"])
def test_an_ae_title_that_cannot_be_written_is_refused(title):
    with pytest.raises(ValueError, match="AE title"):
        request_pdu(title, "PACS", [])


def test_each_response_follows_the_write_of_its_own_instance():
    store_handler = MemoryStoreHandler()
    talk = Conversation(store_handler)
    stream = b"".join(store_message(f"1.2.{n}", b"ab" * 5000) for n in range(300))
    sending = threading.Thread(target=talk.ours.sendall, args=(stream + RELEASE_RQ,))
    sending.start()
    said = b""
    while piece := talk.ours.recv(700):
        said += piece
        whole = len(said) // RESPONSE_BYTES
        assert whole <= len(store_handler.completed)
    sending.join()
    answered = responses(said)[0]
    named = [command[Element.AFFECTED_SOP_INSTANCE_UID].rstrip(b"\0") for command in answered]
    assert named == [b"1.2.%d" % number for number in range(300)]
    assert {unsigned_short(command, Element.STATUS) for command in answered} == {0}


class Waiting(MemoryStoreHandler):
    """Completes the second instance only when the first was answered."""

    def __init__(self) -> None:
        super().__init__()
        self.answered = threading.Event()

    def complete(self, part):
        if self.completed:
            assert self.answered.wait(20)
        return super().complete(part)


def test_a_response_does_not_wait_for_an_instance_that_is_not_there_yet():
    talk = Conversation(Waiting())
    second = store_message("1.2.2", b"ab" * 5000)
    talk.ours.sendall(store_message("1.2.1", b"ab") + second[:-1])
    assert talk.ours.recv(1) == b"\x04"
    talk.store_handler.answered.set()
    talk.ours.sendall(second[-1:] + RELEASE_RQ)
    talk.everything()
    assert len(talk.store_handler.completed) == 2
