"""The few calls of W&B's server that a run and `wandb sync` make, kept in memory: what a run would look like there.

A row of a run's history is known by its number, `_step`, as W&B's client expects when it sends a file a second time.
Whether the second of two rows with one number replaces the first is not documented, so the server can do both.
"""

import contextlib
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTITY, PROJECT = {"id": "1", "name": "me"}, {"id": "1", "name": "t6"}


class Runs(dict):
    """By run id: history, events, summary, config, facts (what the run was opened with) and the names of its files."""

    replaces = True  # whether a row replaces one with the same number
    is_away = False  # whether nothing is accepted

    def stream(self, run_id: str, files: dict) -> None:
        for name, content in files.items():
            lines = [json.loads(line) for line in content["content"]] if "json" in name else []
            if name == "wandb-summary.json":
                self[run_id]["summary"] = lines[-1]
            elif name == "wandb-events.jsonl":
                self[run_id]["events"][content["offset"] :] = lines
            elif name == "wandb-history.jsonl":
                old = {row["_step"]: row for row in self[run_id]["history"]}
                new = {row["_step"]: row for row in lines}
                rows = old | new if self.replaces else new | old
                self[run_id]["history"] = [row for _, row in sorted(rows.items())]

    def answer(self, query: str, given: dict) -> dict:
        if "upsertBucket" in query:
            new = {"history": [], "events": [], "summary": {}, "config": {}, "facts": {}, "files": set()}
            run = self.setdefault(given["name"], new)
            run["facts"] |= {key: value for key, value in given.items() if value is not None}
            run["config"] |= json.loads(given["config"]) if given.get("config") else {}
            bucket = {"id": "UnVu", "name": given["name"], "displayName": given.get("displayName"), "description": None,
                      "config": "{}", "sweepName": None, "project": PROJECT | {"entity": ENTITY},
                      "historyLineCount": len(run["history"])}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "RunResumeStatus" in query:
            return {"model": PROJECT | {"entity": ENTITY, "bucket": self.status(given["name"])}}
        if "CreateRunFiles" in query:
            self[given["run"]]["files"] |= set(given["files"])
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
    """Yields what it is sent, with its address in `url` and the environment of its clients in `environment`."""
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
            if runs.is_away:
                self.reply({}, status=503)
            elif self.path.endswith("file_stream"):
                runs.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
                self.reply({})
            elif "graphql" in self.path:
                query = json.loads(body)
                self.reply({"data": runs.answer(query["query"], query.get("variables") or {})})
            else:
                self.reply({})

        do_PUT = do_POST

        def reply(self, content: dict, status: int = 200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    runs.url = f"http://127.0.0.1:{server.server_address[1]}"
    runs.environment = {"WANDB_BASE_URL": runs.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield runs
    finally:
        server.shutdown()
        server.server_close()
