"""What runs beside a proxy, in processes of its own: `flood PREFIX`, `drain FILE` or `measure FILE`; told on stdin."""

import json
import statistics
import sys
import threading
import time
from pathlib import Path

import zmq
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.session import Session

PER_S = 4000
"""Messages of 500 bytes; a kernel that displays in a loop says some 2,700 a second."""
LARGE_PER_S = 15
"""And messages of a mebibyte."""
STEP_S = 0.002


def flood(prefix: str) -> None:
    """A guest that answers kernel_info and otherwise says a lot, while the word is `on`."""
    context, session = zmq.Context(), Session(key=b"")
    sockets = {}
    for number, (name, kind) in enumerate(
        (("shell", zmq.ROUTER), ("iopub", zmq.XPUB), ("stdin", zmq.ROUTER), ("control", zmq.ROUTER)), 1
    ):
        sockets[name] = context.socket(kind)
        sockets[name].bind(f"ipc://{prefix}-{number}")
    words = {"now": "off"}
    threading.Thread(target=_listen, args=(words,), daemon=True).start()
    small = session.serialize(session.msg("stream", {"name": "stdout", "text": "x" * 100}), ident=b"stream")
    large = session.serialize(session.msg("stream", {"name": "stdout", "text": "x" * 2**20}), ident=b"stream")
    steps = 0
    while True:
        for name in ("shell", "control"):
            if sockets[name].poll(0):
                route, rest = session.feed_identities(sockets[name].recv_multipart())
                request = session.deserialize(rest)
                session.send(sockets[name], "kernel_info_reply", {"status": "ok"}, parent=request, ident=route)
                session.send(sockets["iopub"], "status", {"execution_state": "idle"}, parent=request)
        if words["now"] == "on":
            for _ in range(int(PER_S * STEP_S)):
                sockets["iopub"].send_multipart(small)
            steps += 1
            if steps % int(1 / (STEP_S * LARGE_PER_S)) == 0:
                sockets["iopub"].send_multipart(large)
        time.sleep(STEP_S)


def _listen(words: dict[str, str]) -> None:
    for line in sys.stdin:
        words["now"] = line.strip()
        sys.stdout.write("done\n")
        sys.stdout.flush()


def drain(file: str) -> None:
    """A client that reads all output; told twice, it says how many messages came between."""
    connection = json.loads(Path(file).read_text())
    socket = zmq.Context().socket(zmq.SUB)
    socket.subscribe(b"")
    socket.connect(f"ipc://{connection['ip']}-{connection['iopub_port']}")
    count = 0

    def answer() -> None:
        for _ in sys.stdin:
            sys.stdout.write(f"{count}\n")
            sys.stdout.flush()

    threading.Thread(target=answer, daemon=True).start()
    while True:
        socket.recv_multipart(copy=False)
        count += 1


def measure(file: str) -> None:
    """A client that executes as often as it is told and says the median in milliseconds."""
    client = BlockingKernelClient(connection_file=file)
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    for line in sys.stdin:
        took = []
        for _ in range(int(line)):
            began = time.perf_counter()
            client.execute_interactive("pass", store_history=False, output_hook=lambda message: None)
            took.append(1000 * (time.perf_counter() - began))
        sys.stdout.write(f"{statistics.median(took)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    {"flood": flood, "drain": drain, "measure": measure}[sys.argv[1]](sys.argv[2])
