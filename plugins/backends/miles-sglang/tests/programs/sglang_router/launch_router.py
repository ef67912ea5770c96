"""`python -m sglang_router.launch_router --host HOST --port PORT --worker-urls URL ...`: finds one server after the
other, and does nothing with them."""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer


def main(words):
    said = dict(zip(words, [*words[1:], ""], strict=True))
    servers, born = len(words) - words.index("--worker-urls") - 1, time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = min(int((time.monotonic() - born) / 0.2), servers)
            body = json.dumps({"healthy_workers": found}).encode()
            self.send_response(200 if found else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    HTTPServer((said["--host"], int(said["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
