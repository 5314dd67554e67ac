"""A storage SCP as pynetdicom's documentation writes one: give it a port and a directory."""

import sys

from pynetdicom import AE, AllStoragePresentationContexts, evt


def handle_store(event: evt.Event) -> int:
    """Decode the data set, and save it under its SOP Instance UID."""
    dataset = event.dataset
    dataset.file_meta = event.file_meta
    dataset.save_as(f"{sys.argv[2]}/{dataset.SOPInstanceUID}", enforce_file_format=True)
    return 0x0000


if __name__ == "__main__":
    application = AE()
    application.supported_contexts = AllStoragePresentationContexts
    handlers = [(evt.EVT_C_STORE, handle_store)]
    application.start_server(("127.0.0.1", int(sys.argv[1])), evt_handlers=handlers)
