"""Servers on loopback: `transformers serve` and llama.cpp's with a model whose answer is known, and one that misbehaves
on demand."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers
from forks import free_port, start_module
from packaging.version import Version
from tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


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


def make_gguf(parrot: str) -> str:
    """A model of `make_parrot` as a GGUF file beside it, for llama.cpp."""
    import gguf

    model, tokenizer = LlamaForCausalLM.from_pretrained(parrot), AutoTokenizer.from_pretrained(parrot)
    path, config = f"{parrot}/parrot.gguf", model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {each["id"] for each in backend["added_tokens"]}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
        **{f"model.layers.0.self_attn.{name}_proj": f"blk.0.attn_{name}" for name in "qkv"},
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        **{f"model.layers.0.mlp.{name}_proj": f"blk.0.ffn_{name}" for name in ("gate", "up", "down")},
    }
    for name, tensor in model.state_dict().items():
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Where llama-cpp-python[server] is installed, which takes minutes to build
LLAMA_CPP_PYTHON = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)


def has_llama_cpp() -> bool:
    """Whether llama.cpp's server can be started."""
    return subprocess.run([LLAMA_CPP_PYTHON, "-c", "import llama_cpp.server.app"], capture_output=True).returncode == 0


def llama_cpp_serve(model: str, n_ctx: int = 2048) -> AbstractContextManager[str]:
    """The server of llama-cpp-python in a process of its own; its URL."""
    command = [LLAMA_CPP_PYTHON, "-m", "llama_cpp.server", "--model", model, "--model_alias", "parrot"]
    return _serving([*command, "--n_ctx", str(n_ctx), "--n_gpu_layers", "0", "--n_threads", "1"], "v1/models")


# The server that llama.cpp itself has, which packages of it and a build of it have as llama-server
LLAMA_SERVER = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")


@contextmanager
def llama_server(model: str, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """llama.cpp's own server in a process of its own; its URL and its process."""
    command = [str(LLAMA_SERVER), "--model", model, "--device", "none", "--threads", "1", *options]
    with _process(command, "health") as served:
        yield served


@contextmanager
def transformers_serve(model: str) -> Iterator[str]:
    """`transformers serve` in a process of its own, which need not import what this one has; its URL."""
    port = free_port()
    # It was an option in older versions of transformers
    named = [model] if Version(transformers.__version__) >= Version("5.15") else ["--force-model", model]
    options = [*named, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        process = start_module("transformers.cli.transformers", "serve", *options, printed=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", lambda: process.exitcode)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.join(30)
            process.kill()


@contextmanager
def _serving(command: list[str], ready: str) -> Iterator[str]:
    with _process(command, ready) as (url, _):
        yield url


@contextmanager
def _process(command: list[str], ready: str) -> Iterator[tuple[str, subprocess.Popen]]:
    port = free_port()
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # A file: a pipe that nobody reads stops the server when it is full
    log = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/{ready}", process.poll)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


def wait_for(url: str, code: Callable[[], int | None], seconds: float = 120) -> None:
    """Return when the URL answers; raises if its process ends (`code` is how, None while it runs), or takes longer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if code() is not None:
            raise RuntimeError(f"the server ended with {code()}")
        try:
            urllib.request.urlopen(url, timeout=2).read()
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"{url} does not answer")


# (status, body) of a chat's messages; a body that is text is sent as it is
Answer = Callable[[list[dict[str, Any]]], tuple[int, Any]]
# (status, body) for what a server does not take of a request to a path, or None
Refuse = Callable[[str, dict[str, Any]], tuple[int, Any] | None]


class LoopbackServer:
    """An HTTP server that speaks as much of the protocol as a test wants it to.

    Attributes:
        url: to ask it at.
        requests: the JSON of all requests for answers.
        headers: theirs.
        paths: theirs.
        wait: the header that says when to try again.
        models: returns (status, body) for a request for the list of models.
    """

    def __init__(self, answer: Answer, refuse: Refuse = lambda path, request: None):
        self.answer, self.refuse, self.requests, self.headers, self.paths = answer, refuse, [], [], []
        self.models = lambda: (200, {"object": "list", "data": []})
        self.wait = {"Retry-After-Ms": "5"}  # tests should not wait as long as people
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.send(*outer.models())

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                outer.headers.append(dict(self.headers))
                outer.paths.append(self.path)
                refused = outer.refuse(self.path, request)
                status, body = refused or outer.answer(request.get("messages") or request.get("prompt"))
                if isinstance(body, dict) and "choices" in body:
                    body = {"model": request.get("model"), **body}
                self.send(status, body)

            def send(self, status, body):
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in outer.wait.items():
                    self.send_header(name, value)
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


def said(text: Any, finish_reason: str = "stop", **keys: Any) -> tuple[int, dict[str, Any]]:
    """A chat's answer, as the protocol has it, with further keys of its message."""
    message = {"role": "assistant", "content": text, **keys}
    choices = [{"index": 0, "message": message, "text": text, "finish_reason": finish_reason}]
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "choices": choices}


# What servers refuse, in their own words


def openai_error(status: int, message: str, param: str | None, code: str | None) -> tuple[int, dict[str, Any]]:
    """An error of OpenAI's form."""
    return status, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def reasoning_model(path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    """OpenAI's models that reason: chats only, one name of the limit, and no say in the sampling."""
    if path.endswith("/v1/completions"):
        text = "This is a chat model and not supported in the v1/completions endpoint. Did you mean to use "
        return openai_error(404, f"{text}v1/chat/completions?", "model", None)
    if "max_tokens" in request:
        text = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return openai_error(400, text, "max_tokens", "unsupported_parameter")
    if request.get("temperature", 1) != 1:
        text = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is "
        return openai_error(400, f"{text}supported.", "temperature", "unsupported_value")
    if "top_p" in request:
        text = "Unsupported parameter: 'top_p' is not supported with this model."
        return openai_error(400, text, "top_p", "unsupported_parameter")
    return None


def mistral(path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    """Mistral's API: unknown keys are refused, ids of calls have nine characters, and nothing is null."""
    if path.endswith("/v1/completions"):
        return 404, {"message": "no Route matched with those values", "request_id": "1"}
    known = {"model", "messages", "max_tokens", "temperature", "top_p", "random_seed", "stream"}
    extra = [
        {"type": "extra_forbidden", "loc": ["body", key], "msg": "Extra inputs are not permitted", "input": value}
        for key, value in request.items()
        if key not in known
    ]
    if extra:
        message = {"detail": extra}
        body = {"object": "error", "message": message, "type": "invalid_request_error", "param": None, "code": None}
        return 422, body
    if request.get("temperature") == 0 and request.get("top_p", 1) != 1:
        return 400, {"object": "error", "message": "top_p must be 1 when using greedy sampling.", "code": None}
    for number, message in enumerate(request["messages"]):
        if any(value is None for value in message.values()):
            place = ["body", "messages", number, message["role"]]
            wrong = {"type": "string_type", "loc": place, "msg": "Input should be a valid string", "input": None}
            return 422, {"object": "error", "message": {"detail": [wrong]}}
        for call in message.get("tool_calls", []):
            if not (call["id"].isalnum() and len(call["id"]) == 9):
                text = f"Tool call id was {call['id']} but must be a-z, A-Z, 0-9, with a length of 9."
                return 400, {"object": "error", "message": text, "type": "invalid_function_call", "code": "3280"}
            if not isinstance(call["function"]["arguments"], str):
                return 422, {"object": "error", "message": {"detail": [{"loc": ["body"], "msg": "arguments"}]}}
    return None


def groq(path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    """Groq's API as it was, and gateways like it, which name what they do not know."""
    for name in ("max_completion_tokens", "seed", "top_p"):
        if name in request:
            message = f"property '{name}' is unsupported, did you mean 'max_tokens'?"
            return 400, {"error": {"message": message, "type": "invalid_request_error"}}
    return None


def claude(path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    """Anthropic's models behind a gateway: one of two parameters."""
    if "temperature" in request and "top_p" in request:
        message = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."
        return 400, {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
    return None


def vllm_base_model(path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    """vLLM with a model that has no chat template."""
    if path.endswith("/chat/completions"):
        message = (
            "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template "
            "if the tokenizer does not define one. None None"
        )
        return 400, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
    return None


def transformers_strict(path: str, request: dict[str, Any]) -> tuple[int, Any] | None:
    """`transformers serve` and others on FastAPI, of a parameter that they do not have."""
    unexpected = set(request) & {"seed", "logprobs"}
    return (422, {"detail": f"Unexpected fields in the request: {unexpected}"}) if unexpected else None


# Of a single request, each as its server says it
REFUSALS: dict[str, tuple[str, tuple[int, Any]]] = {
    "azure": (
        "filtered",
        (
            400,
            {
                "error": {
                    "message": "The response was filtered due to the prompt triggering Azure OpenAI's content "
                    "management policy. Please modify your prompt and retry.",
                    "type": None,
                    "param": "prompt",
                    "code": "content_filter",
                    "status": 400,
                    "innererror": {"code": "ResponsibleAIPolicyViolation"},
                }
            },
        ),
    ),
    "alibaba": (
        "filtered",
        openai_error(
            400,
            "<400> InternalError.Algo.DataInspectionFailed: Input text data may contain inappropriate content.",
            None,
            "data_inspection_failed",
        ),
    ),
    "openai, safety": ("filtered", openai_error(400, "Your request was rejected by our safety system.", None, None)),
    "deepseek": ("filtered", openai_error(400, "Content Exists Risk", None, "invalid_request_error")),
    "google": (
        "too long",
        (400, {"error": {"code": 400, "message": "The input token count (9) exceeds the maximum (8)."}}),
    ),
    "alibaba, long": ("too long", openai_error(400, "Range of input length should be [1, 30720]", None, "invalid")),
    "openrouter": (
        "filtered",
        (403, {"error": {"code": 403, "message": "The model requires moderation. Your input was flagged for: hate"}}),
    ),
    "openai": (
        "too long",
        openai_error(
            400,
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens. "
            "Please reduce the length of the messages.",
            "messages",
            "context_length_exceeded",
        ),
    ),
    "vllm": (
        "too long",
        (
            400,
            {
                "object": "error",
                "message": "'max_tokens' or 'max_completion_tokens' is too large: 16. This model's maximum context "
                "length is 128 tokens and your request has 300 input tokens (16 > 128 - 300).",
                "type": "BadRequestError",
                "param": "max_tokens",
                "code": 400,
            },
        ),
    ),
    "llama.cpp": (
        "too long",
        (
            400,
            {
                "error": {
                    "code": 400,
                    "message": "request (4390 tokens) exceeds the available context size (4096 tokens), try "
                    "increasing it",
                    "type": "exceed_context_size_error",
                    "n_prompt_tokens": 4390,
                    "n_ctx": 4096,
                }
            },
        ),
    ),
    "llama.cpp, 500": (
        "too long",
        (500, {"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}}),
    ),
    "llama-cpp-python": (
        "too long",
        openai_error(
            400,
            "This model's maximum context length is 512 tokens. However, you requested 600 tokens (584 in the "
            "messages, 16 in the completion). Please reduce the length of the messages or completion.",
            "messages",
            "context_length_exceeded",
        ),
    ),
    "mistral": (
        "too long",
        (
            400,
            {
                "object": "error",
                "message": "Prompt contains 34000 tokens, too large for model with 32768 maximum context length",
                "type": "invalid_request_invalid_args",
                "code": "3051",
            },
        ),
    ),
    "tgi": (
        "too long",
        (
            422,
            {
                "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 "
                "`inputs` tokens and 16 `max_new_tokens`",
                "error_type": "validation",
            },
        ),
    ),
    "nginx": ("too long", (413, "<html><title>413 Request Entity Too Large</title></html>")),
    "gpt-5": (
        "cut",
        openai_error(
            400,
            "Could not finish the message because max_tokens or model output limit was reached. Please try again with "
            "higher max_tokens.",
            None,
            None,
        ),
    ),
    "other": ("refused", (400, {"detail": "The request could not be processed."})),
    "cut by a filter": ("filtered", said("I", "content_filter")),
    "gateway": ("filtered", (200, {"error": {"message": "Blocked", "code": "content_filter"}, "choices": None})),
}
