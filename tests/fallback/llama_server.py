"""llama-cpp-python behind HTTP, on a tiny random model: ``python llama_server.py PORT``.

Its own server where its extra ``server`` is installed; else its own chat completions, sent the way
its server sends them. Run as a process of its own, by the interpreter that has llama-cpp-python;
imports nothing of ours.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDTH, HEADS, DEEP, WIDE = 64, 4, 1, 128
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant> "


def write_model(path: Path) -> None:
    """A Llama that knows three control pieces and every byte, and nothing else."""
    import gguf
    import numpy as np

    kinds = gguf.TokenType
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [chr(code) for code in range(97, 123)] + ["\u2581"]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256
    types += [kinds.NORMAL] * (len(pieces) - len(types))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(DEEP)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([int(kind) for kind in types])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(pieces), WIDTH),
        "output.weight": (len(pieces), WIDTH),
        "blk.0.attn_q.weight": (WIDTH, WIDTH),
        "blk.0.attn_k.weight": (WIDTH, WIDTH),
        "blk.0.attn_v.weight": (WIDTH, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_gate.weight": (WIDE, WIDTH),
        "blk.0.ffn_up.weight": (WIDE, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, WIDE),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, random.normal(0, 0.2, shape).astype(np.float32))
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def own_server(model: Path) -> Any:
    """Raises: ImportError without the extra ``server``."""
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    return create_app(
        server_settings=ServerSettings(),
        model_settings=[ModelSettings(model=str(model), model_alias="tiny", n_ctx=512)],
    )


def same_over_asgi(model: Path) -> Any:
    from llama_cpp import Llama

    llama = Llama(str(model), n_ctx=512, verbose=False)

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await send(
            {
                "type": "http.response.start", "status": 200,
                "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
            }
        )  # fmt: skip
        if scope["path"] == "/v1/chat/completions":
            asked = json.loads(body)
            known = {key: asked[key] for key in ("messages", "max_tokens", "temperature", "seed")}
            for chunk in llama.create_chat_completion(stream=True, **known):
                line = f"data: {json.dumps({**chunk, 'model': asked['model']})}\r\n\r\n"
                await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"data: [DONE]\r\n\r\n"})

    return app


def main() -> None:
    import uvicorn

    model = Path(tempfile.mkdtemp()) / "tiny.gguf"
    write_model(model)
    try:
        app = own_server(model)
        print("its own server", flush=True)
    except ImportError:
        app = same_over_asgi(model)
        print("its chat completions over ASGI", flush=True)
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")


if __name__ == "__main__":
    main()
