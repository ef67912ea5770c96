"""`python -m sglang.launch_server --host HOST --port PORT [--behave HOW] [--pids FILE] ...`

It writes its process id, and that of a child that does not heed SIGTERM, to FILE, one a line.
"""

import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STUBBORN = "from signal import *; import time; signal(SIGTERM, SIG_IGN); print(0, flush=True); time.sleep(99)"


def main(words):
    said = dict(zip(words, [*words[1:], ""], strict=True))
    print("environment:", *sorted(name for name in os.environ if name in ("RANK", "NCCL_NVLS_ENABLE")), flush=True)
    if "--pids" in said:
        child = subprocess.Popen([sys.executable, "-S", "-c", STUBBORN], stdout=subprocess.PIPE)
        child.stdout.readline()
        with open(said["--pids"], "w") as file:
            file.write(f"{os.getpid()}\n{child.pid}\n")
    how = said.get("--behave", "well")
    if how == "die":
        for line in range(30):
            print(f"line {line}", flush=True)
        print("out of memory", file=sys.stderr)
        sys.exit(3)
    if how == "hang":
        time.sleep(99)
    if how == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(said["--host"], int(said["--port"]))


def serve(host, port):
    born = time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if time.monotonic() > born + 0.1 else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()

    ThreadingHTTPServer((host, port), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
