"""The model in this process: masks values, asks the engine, fills placeholders while streaming.

One engine per process, started on first use and never before a fork. Turns the engine's errors into
ours; knows nothing of conversations or storage.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

from assistant.backends.base import Backend, Vector
from assistant.backends.line import held_back, served
from assistant.engine import (
    ChatTurn,
    Codec,
    Engine,
    EngineConfig,
    EngineError,
    Generation,
    Manifest,
    ManifestError,
    NoEmbeddings,
    PromptTooLong,
    Sampling,
    StopFilter,
    Verdict,
)
from assistant.engine import Overloaded as QueueFull
from assistant.engine.generation import Token
from assistant.engine.machine import cores
from assistant.errors import (
    AssistantError,
    ContextTooLong,
    GenerationFailed,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
)
from assistant.facts import Filler, given, mask
from assistant.modelkit.labels import USER_SLOTS
from assistant.types import (
    Band,
    Delta,
    Event,
    Finished,
    FinishReason,
    Message,
    Params,
    Started,
    Usage,
    Waiting,
)


@dataclass(frozen=True, slots=True)
class Options:
    """As in EngineConfig, memory in MiB. The queue is bounded in questions and in their tokens.

    ``threads``: 0 is every core, for a model of 16 MiB or less every core but one.

    ``opening_tokens``: how much of an answer is held back to see how sure a model without intents
    is, before anything is shown of it; 0: it says nothing of that.
    """

    model_dir: str
    threads: int = 0
    max_batch: int = 32
    max_queue: int = 128
    max_queue_tokens: int = 32768
    context_tokens: int = 1024
    kv_mb: int = 0
    prefix_mb: int = 64
    draft_tokens: int | None = None
    reading_tokens_per_s: float = 0.0
    opening_tokens: int = 8


@dataclass(frozen=True, slots=True)
class _Ready:
    engine: Engine
    codec: Codec
    manifest: Manifest


#: Nobody is shown more of an answer more often than this (see ``conversations.log``).
_WAKE_EVERY_S = 0.03
#: A smaller model gains less by its last thread than the product does by a core of its own.
_SMALL_BYTES = 16 << 20


class OnnxBackend(Backend):
    options_class: ClassVar[type[Any]] = Options
    in_process = True

    def __init__(self, alias: str, options: Options) -> None:
        super().__init__(alias, options)
        self._lock = threading.Lock()
        self._engine: Engine | None = None

    # -- life --------------------------------------------------------------------------------

    def check(self) -> None:
        self._ready()

    def close(self) -> None:
        with self._lock:
            if self._engine is not None:
                self._engine.close()
            self._engine = None

    @property
    def engine(self) -> Engine:
        """The running engine. Raises: ModelUnavailable."""
        return self._ready().engine

    def loaded(self) -> Engine | None:
        return self._engine

    def count_tokens(self, text: str) -> int:
        codec = self._ready().codec
        return codec.count(text) + codec.turn_tokens

    def context_tokens(self) -> int:
        ready = self._ready()
        most = min(int(self.options.context_tokens), ready.manifest.context_tokens)
        return max(0, most - ready.codec.frame_tokens)

    def version(self, params: Params | None = None) -> str:
        manifest = self._engine.manifest if self._engine is not None else None
        if manifest is None:
            return ""
        return f"{manifest.name}@{manifest.version}:{manifest.digest[:12]}"

    def expected_wait_s(self) -> float:
        return self._engine.expected_wait_s() if self._engine is not None else 0.0

    def reads_system(self) -> bool:
        """Models trained here have the mark of a system's turn, and have never seen one."""
        return self._ready().manifest.chat.format != "inhouse"

    def _ready(self) -> _Ready:
        """The started engine; a crashed one is started again. Raises: ModelUnavailable."""
        with self._lock:
            try:
                engine = self._engine or Engine(self._config())
                engine.start()
            except (ManifestError, EngineError) as error:
                raise ModelUnavailable(str(error)) from error
            except ValueError as error:
                raise ModelUnavailable(f"The engine's settings do not fit: {error}.") from error
            except Exception as error:  # the runtime's own, of a graph that it cannot read
                raise ModelUnavailable(
                    f"The model in {self.options.model_dir} cannot be loaded "
                    f"({type(error).__name__}). Build it again: manage.py build_model."
                ) from error
            self._engine = engine
        assert engine.codec is not None and engine.manifest is not None
        return _Ready(engine, engine.codec, engine.manifest)

    def _config(self) -> EngineConfig:
        options: Options = self.options
        return EngineConfig(
            model_dir=Path(options.model_dir),
            threads=options.threads or _threads(Path(options.model_dir)),
            max_batch=options.max_batch,
            max_queue=options.max_queue,
            max_queue_tokens=options.max_queue_tokens,
            context_tokens=options.context_tokens,
            kv_bytes=options.kv_mb << 20,
            prefix_bytes=options.prefix_mb << 20,
            draft_tokens=options.draft_tokens,
            reading_tokens_per_s=options.reading_tokens_per_s,
            wake_every_s=_WAKE_EVERY_S,
        )

    # -- embeddings --------------------------------------------------------------------------

    def embedding_width(self) -> int:
        ready = self._ready()
        return ready.manifest.architecture.hidden_size if ready.manifest.runner == "packed" else 0

    async def embed(self, texts: Sequence[str]) -> Sequence[Vector]:
        """What the model makes of each text as a question, values masked, at the place where it
        would choose the answer's intent."""
        future = await asyncio.to_thread(self._embedding, list(texts))
        try:
            return list(await asyncio.wrap_future(future))
        except EngineError as error:
            raise _failed(error) from error

    def text_of(self, ids: Sequence[int]) -> str:
        ready = self._ready()
        for id_ in ids:
            if not 0 <= id_ < ready.manifest.architecture.vocab_size:
                raise InvalidRequest(
                    "A token id is not of this model's vocabulary; other models' mean something "
                    "else. Send texts."
                )
            if id_ in ready.codec.control_ids:
                raise InvalidRequest("A token id is one that controls the model. Leave it out.")
        stream = ready.codec.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def _embedding(self, texts: Sequence[str]) -> Future[Any]:
        """Raises: AssistantError."""
        ready = self._ready()
        try:
            return ready.engine.embed([_question(ready.codec, text) for text in texts])
        except QueueFull as error:
            raise _busy(error) from error
        except PromptTooLong as error:
            raise ContextTooLong(f"A text is too long to be read: {error}.") from error
        except NoEmbeddings as error:
            raise InvalidRequest(f"There are no embeddings: {error}.") from error
        except EngineError as error:
            raise _failed(error) from error
        except ValueError as error:
            raise InvalidRequest(f"A text cannot be read: {error}.") from error

    # -- one answer --------------------------------------------------------------------------

    async def stream(self, messages: Sequence[Message], params: Params) -> AsyncIterator[Event]:
        ready = await asyncio.to_thread(self._ready)
        turns, values = _masked(messages)
        try:
            prompt = ready.codec.encode_chat(turns)
        except ValueError as error:
            raise InvalidRequest(f"The conversation cannot be read: {error}.") from error
        generation = self._submit(ready, turns, prompt, params)
        try:
            async for event in self._events(ready, generation, params, values, len(prompt)):
                yield event
        finally:
            generation.close()

    def _submit(
        self, ready: _Ready, turns: Sequence[ChatTurn], prompt: list[int], params: Params
    ) -> Generation:
        """Raises: Overloaded, ContextTooLong, InvalidRequest, GenerationFailed."""
        try:
            return ready.engine.submit(
                prompt,
                max_new_tokens=params.max_new_tokens,
                sampling=Sampling(
                    temperature=params.temperature,
                    top_p=params.top_p,
                    top_k=params.top_k,
                    repetition_penalty=params.repetition_penalty,
                    seed=params.seed,
                    # What nobody gave must not be spoken of as if they had.
                    banned=ready.codec.absent(turns, USER_SLOTS - given(params.facts)),
                ),
                stop_ids=ready.codec.end_ids,
                first=ready.engine.first_token_rule(turns),
                scope=params.scope,
                queues=not params.batch,
            )
        except QueueFull as error:
            raise _busy(error) from error
        except PromptTooLong as error:
            raise ContextTooLong(f"The question is too long: {error}.") from error
        except EngineError as error:
            raise _failed(error) from error
        except ValueError as error:
            raise InvalidRequest(f"The parameters do not fit: {error}.") from error

    async def _events(
        self,
        ready: _Ready,
        generation: Generation,
        params: Params,
        values: dict[str, str],
        input_tokens: int,
    ) -> AsyncIterator[Event]:
        writer = _Writer(ready.codec, params, values)
        begun = False
        opening = 0 if ready.manifest.intents else int(self.options.opening_tokens)
        try:
            async with aclosing(cast(Any, held_back(served(generation), opening))) as batches:
                async for tokens in batches:
                    if isinstance(tokens, Waiting):
                        yield tokens
                        continue
                    if not begun:
                        begun = True
                        yield _begun(ready.manifest, generation, tokens[:opening])
                    if text := writer.push(tokens):
                        yield Delta(text)
                    if writer.stopped:
                        break
        except EngineError as error:
            raise _failed(error) from error
        if not begun:  # the model ended before its first word
            yield _begun(ready.manifest, generation, ())
        for event in writer.end(generation.finish_reason, input_tokens):
            yield event


class _Writer:
    """Tokens to visible text: detokenise, placeholders, stop strings. One answer each.

    Stops last: they are about what is shown, and must not cut a placeholder in half.
    """

    def __init__(self, codec: Codec, params: Params, values: dict[str, str]) -> None:
        self._text = codec.stream()
        self._stops = StopFilter(params.stop)
        self._filler = Filler({**params.facts, **values})
        self._stopping = bool(params.stop)
        self._count, self._logprob = 0, 0.0
        self.stopped = False

    def push(self, tokens: Sequence[Token]) -> str:
        """What can be shown of these tokens."""
        if not self._stopping:
            return self._filler.push("".join(map(self._read, tokens)))
        shown = ""
        for token in tokens:  # none counts behind the one that stops
            text, self.stopped = self._stops.push(self._filler.push(self._read(token)))
            shown += text
            if self.stopped:
                break
        return shown

    def _read(self, token: Token) -> str:
        self._count += 1
        self._logprob += token.logprob
        return self._text.push(token.id)

    def end(self, reason: str | None, input_tokens: int) -> Iterator[Event]:
        # Half a character, an open brace, what looked like a stop string: nothing follows them now.
        text = self._filler.push(self._text.flush()) + self._filler.flush()
        text, self.stopped = self._stops.push(text)
        if rest := text + self._stops.flush():
            yield Delta(rest)
        yield Finished(
            reason=_finish(reason, self.stopped),
            usage=Usage(input_tokens, self._count),
            logprob=self._logprob / self._count if self._count else None,
        )


def _threads(model: Path) -> int:
    """All cores; all but one for a small model, beside which the product needs one itself."""
    small = sum(path.stat().st_size for path in model.glob("*.onnx*")) <= _SMALL_BYTES
    return max(1, cores() - small)


def _finish(reason: str | None, stopped: bool) -> FinishReason:
    if stopped or reason == "stop":
        return "stop"
    return "length" if reason == "length" else "cancelled"


def _begun(manifest: Manifest, generation: Generation, opening: Sequence[Token]) -> Started:
    """The event that opens an answer, with how long it took to get there.

    ``opening``: the first tokens, for a model that says nothing else of how sure it is.
    """
    begun = started(manifest, generation.verdict)
    return replace(
        begun,
        confidence=begun.confidence if generation.verdict else _sureness(opening),
        queue_s=generation.queue_s,
        prefill_s=generation.prefill_s,
    )


def _sureness(opening: Sequence[Token]) -> float | None:
    """e to the mean log-probability (the geometric mean of the probabilities), 0..1; not fitted."""
    if not opening:
        return None
    return min(1.0, math.exp(sum(token.logprob for token in opening) / len(opening)))


def started(manifest: Manifest, verdict: Verdict | None) -> Started:
    """The event that opens an answer, with what the model makes of the question."""
    name = f"{manifest.name}@{manifest.version}"
    if verdict is None:
        return Started(name)
    intents = {id_: intent for intent, id_ in manifest.intents.items()}
    return Started(
        name,
        intent=intents[verdict.intent_id],
        confidence=verdict.confidence,
        scope=verdict.scope,
        band=_band(manifest, verdict),
    )


def _band(manifest: Manifest, verdict: Verdict) -> Band:
    if verdict.token_id != verdict.intent_id:
        return "out_of_scope"
    if verdict.confidence >= manifest.calibration.answer_from:
        return "answer"
    return "caution" if verdict.confidence >= manifest.calibration.caution_from else "hand_on"


def _masked(messages: Sequence[Message]) -> tuple[list[ChatTurn], dict[str, str]]:
    """The turns as the model reads them, and the values taken out; the latest of a kind wins."""

    turns: list[ChatTurn] = []
    values: dict[str, str] = {}
    for message in messages:
        masked = mask(message.text)
        turns.append(ChatTurn(message.role, masked.parts, message.intent))
        if message.role == "user":
            values |= masked.values
    return turns, values


def _question(codec: Codec, text: str) -> list[int]:
    """A text alone, as the model reads a question. Raises: ValueError."""
    return codec.encode_chat([ChatTurn("user", mask(text).parts)])


def _busy(error: QueueFull) -> Overloaded:
    return Overloaded(
        f"The assistant is busy: {error}. Try again shortly.",
        retry_after_s=max(1.0, error.eta_s),
    )


def _failed(error: Exception) -> AssistantError:
    return GenerationFailed(
        f"The model stopped while answering ({type(error).__name__}). Please try again.",
        retry_after_s=1.0,
    )
