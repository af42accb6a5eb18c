"""Servers on loopback: `transformers serve` with a model whose answer is known, and one that misbehaves on demand."""

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


def make_parrot(folder: Path, reply: str) -> str:
    """A Llama that answers every chat with one reply and ends: each token of it follows from the one before."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    chain = tokenizer(f"<|assistant|>{reply}<|end|>")["input_ids"]
    assert len(set(chain)) == len(chain)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # The layer adds nothing, and the head asks which token's embedding it sees
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.nn.functional.normalize(torch.randn(len(tokenizer), 64), dim=1)
        model.model.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.zero_()
        for before, after in itertools.pairwise(chain):
            model.lm_head.weight[after] = embeddings[before]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@contextmanager
def transformers_serve(model: str) -> Iterator[str]:
    """`transformers serve` in a process of its own; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # A file: a pipe that nobody reads stops the server when it is full
    log = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


def wait_for(url: str, process: subprocess.Popen, seconds: float = 120) -> None:
    """Return when the URL answers; raises where its process ends, or takes longer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=2).read()
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"{url} does not answer")


# (status, body) of a chat's messages; a body that is text is sent as it is
Answer = Callable[[list[dict[str, Any]]], tuple[int, Any]]


class LoopbackServer:
    """An HTTP server that speaks as much of the protocol as a test wants it to.

    Attributes:
        url: to ask it at.
        requests: the JSON of all requests for answers.
        headers: theirs.
    """

    def __init__(self, answer: Answer):
        self.answer, self.requests, self.headers = answer, [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.send(200, {"object": "list", "data": []})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                outer.headers.append(dict(self.headers))
                self.send(*outer.answer(request.get("messages") or request.get("prompt")))

            def send(self, status, body):
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Retry-After-Ms", "5")  # tests should not wait as long as people
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # a client that has gone away, as after its timeout

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()


def said(text: str | None, finish_reason: str = "stop") -> tuple[int, dict[str, Any]]:
    """A chat's answer, as the protocol has it."""
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "text": text, "finish_reason": finish_reason}]
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
