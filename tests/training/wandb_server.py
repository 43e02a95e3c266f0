"""The few calls of W&B's server that `wandb sync` makes, kept in memory: what a run would look like there."""

import contextlib
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTITY, PROJECT = {"id": "1", "name": "me"}, {"id": "1", "name": "t6"}


class Runs(dict):
    """By run id: {"history": [...], "events": [...], "summary": {...}, "config": {...}, "facts": {...}}."""

    def stream(self, run_id: str, files: dict) -> None:
        for name, content in files.items():
            lines = content["content"]
            if name == "wandb-summary.json":
                self[run_id]["summary"] = json.loads(lines[-1])
            elif name.endswith(".jsonl"):
                kept = self[run_id].setdefault(name.removeprefix("wandb-").removesuffix(".jsonl"), [])
                kept[content["offset"] :] = map(json.loads, lines)

    def answer(self, query: str, given: dict) -> dict:
        if "upsertBucket" in query:
            run = self.setdefault(
                given["name"], {"history": [], "events": [], "summary": {}, "config": {}, "facts": {}}
            )
            run["facts"] |= {key: value for key, value in given.items() if value is not None}
            run["config"] |= json.loads(given["config"]) if given.get("config") else {}
            bucket = {"id": "UnVu", "name": given["name"], "displayName": given.get("displayName"), "description": None,
                      "config": "{}", "sweepName": None, "project": PROJECT | {"entity": ENTITY},
                      "historyLineCount": len(run["history"])}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "RunResumeStatus" in query:
            return {"model": PROJECT | {"entity": ENTITY, "bucket": self.status(given["name"])}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}
        viewer = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "features": []}}

    def status(self, run_id: str) -> dict | None:
        if run_id not in self:
            return None
        run = self[run_id]
        counts = {f"{key}LineCount": len(run[key]) for key in ("history", "events")}
        tails = {
            f"{key}Tail": json.dumps([json.dumps(line) for line in run[key][-1:]]) for key in ("history", "events")
        }
        texts = {"config": run["config"], "summaryMetrics": run["summary"], "wandbConfig": {"t": 1}}
        fixed = {"id": "UnVu", "name": run_id, "displayName": run_id, "logLineCount": 0, "tags": [], "notes": None}
        return fixed | counts | tails | {key: json.dumps(value) for key, value in texts.items()}


@contextlib.contextmanager
def wandb_server():
    """Yields what it is sent, with its address in `url`."""
    runs = Runs()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.reply({})

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path.endswith("file_stream"):
                runs.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
                self.reply({})
            elif "graphql" in self.path:
                query = json.loads(body)
                self.reply({"data": runs.answer(query["query"], query.get("variables") or {})})
            else:
                self.reply({})

        do_PUT = do_POST

        def reply(self, content: dict):
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    runs.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield runs
    finally:
        server.shutdown()
        server.server_close()
