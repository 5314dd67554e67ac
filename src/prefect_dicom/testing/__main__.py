"""Run a scripted PACS as a process: ``python -m prefect_dicom.testing --directory D --port N``."""

from __future__ import annotations

import argparse
import ast
import signal
import threading
from pathlib import Path
from typing import Any

from prefect_dicom.config.tls import Tls
from prefect_dicom.testing.pacs import PacsPolicy, ScriptedPacs
from prefect_dicom.testing.script import Behaviour, knob_table


def _destination(text: str) -> tuple[str, tuple[str, int]]:
    title, _, address = text.partition("=")
    host, _, port = address.rpartition(":")
    if not (title and host and port.isdigit()):
        raise argparse.ArgumentTypeError("a destination is TITLE=HOST:PORT")
    return title, (host, int(port))


def _behaviour(text: str) -> Behaviour:
    knob, *arguments = text.split()
    try:
        values = dict(argument.split("=", 1) for argument in arguments)
        parsed: dict[str, Any] = {name: _value(value) for name, value in values.items()}
        return Behaviour(knob, **parsed)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a word needs no quotes


def _tls(files: list[Path] | None) -> Tls | None:
    if files is None:
        return None
    certificate, key, trust = files
    return Tls(certificate=certificate, key=key, trust=trust)


def main() -> None:
    """Serve until SIGINT or SIGTERM; prints one line when it listens."""
    parser = argparse.ArgumentParser(prog="python -m prefect_dicom.testing", description=__doc__)
    parser.add_argument("--directory", type=Path, help="holds the Part 10 files")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--ae-title", default="DEMOPACS")
    parser.add_argument(
        "--destination",
        type=_destination,
        action="append",
        default=[],
        metavar="TITLE=HOST:PORT",
        help="a move destination; may be repeated",
    )
    parser.add_argument(
        "--behave",
        type=_behaviour,
        action="append",
        default=[],
        metavar="'KNOB ARGUMENT=VALUE …'",
        help="a line of the script; may be repeated",
    )
    parser.add_argument(
        "--tls",
        nargs=3,
        type=Path,
        metavar=("CERTIFICATE", "KEY", "TRUST"),
        help="PEM files: speak TLS only, to who calls and to destinations",
    )
    parser.add_argument("--knobs", action="store_true", help="print the table of knobs, and end")
    options = parser.parse_args()
    if options.knobs:
        print(knob_table(), end="")
        return
    if options.directory is None:
        parser.error("--directory is missing")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ScriptedPacs(
        [options.directory],
        ae_title=options.ae_title,
        host=options.host,
        port=options.port,
        destinations=dict(options.destination),
        script=options.behave,
        policy=PacsPolicy(tls=_tls(options.tls)),
    ) as pacs:
        print(
            f"{pacs.ae_title} listens on {pacs.host}:{pacs.port} with {len(pacs.holdings)} "
            f"instances of {len(pacs.holdings.study_instance_uids())} studies",
            flush=True,
        )
        stop.wait()


if __name__ == "__main__":
    main()
