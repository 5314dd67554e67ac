"""Texts that several reasons share: how to check the way from the PACS back to our receiver."""

from __future__ import annotations

THE_NOTE = (
    "None is needed: the instance is archived, and its line in the study's manifest has this note."
)

WAY_BACK_CHECKLIST = (
    "Check on the PACS: our AE title in exact case, our address as the PACS sees it (NAT, "
    "containers), the port open from the PACS to us, permission to send to us. "
    "`prefect-dicom doctor` prints the line to add."
)

WAY_BACK_EXPLANATION = """
A C-MOVE has two halves: our request to the PACS, and the association that the PACS opens to our
receiver. The first half works, or there would be no such answer. Check the second half, in
this order:

1. our AE title in the PACS's table of known nodes, in exact case;
2. the address beside it: the one at which the PACS sees this host (NAT, containers, several
   networks), and the port of `receiver.port`;
3. that the receiver listens there: `receiver.bind` must not be `127.0.0.1` for a PACS elsewhere;
4. the firewalls from the PACS to here, this host's own among them;
5. the permission to send to us: a checkbox of the node, a licence, "export allowed";
6. that the PACS uses TLS to us if `receiver.tls` is set, and only then; and that each side trusts
   the CA of the other's certificate.

`prefect-dicom doctor` retrieves one instance this way and prints the line to add. Where no inbound
port can be opened, `retrieve: c-get` needs none, if the PACS offers it."""
