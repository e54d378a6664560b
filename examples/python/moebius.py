"""Moebius from Python: the C library by ctypes alone, no package needed.

    from moebius import Engine, Tokenizer

    with Engine('path/to/model', ranks=2) as engine:
        tokenizer = Tokenizer('path/to/model')
        request = engine.submit(tokenizer.encode('ROMEO:'), max_tokens=40, temperature=0)
        for text in tokenizer.stream(request):
            print(text, end='', flush=True)
        print(request.finish_reason)

The engine runs a thread of its own; all may be used from any thread. Keys of Engine and submit are those of
moebius.h; config_keys() lists the engine's with their meaning. The library is MOEBIUS_LIBRARY, or libmoebius.so.0 as the loader finds it.
"""
from __future__ import annotations

import ctypes
import os
import queue
import select
import threading
from ctypes import POINTER, byref, c_char, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Sequence

TP, EP = 0, 1

_ERRORS = {-1: 'INVALID_ARGUMENT', -2: 'INVALID_STATE', -3: 'NOT_FOUND', -4: 'UNSUPPORTED', -5: 'IO', -6: 'CORRUPT_MODEL', -7: 'OUT_OF_MEMORY',
           -8: 'TIMEOUT', -9: 'CANCELLED', -10: 'QUEUE_FULL', -11: 'CONTEXT_TOO_LONG', -12: 'DOES_NOT_FIT', -13: 'RANK_FAILED', -14: 'INTERNAL'}
_FINISH = {1: 'stop', 2: 'length', 3: 'abort', 4: 'error'}
_TOKEN, _FINISHED, _SWITCH_FINISHED, _SWITCH_REFUSED, _ROLLED_BACK = 2, 3, 8, 9, 10
_REAL_KEYS = ('temperature', 'top_p', 'min_p', 'presence_penalty', 'frequency_penalty', 'repetition_penalty', 'deadline_ms')


class MoebiusError(Exception):
    """What the library refused or could not do; `code` is its name in moebius.h without the prefix."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.code = _ERRORS.get(status, str(status))


class _Event(ctypes.Structure):
    _fields_ = [('struct_size', c_uint32), ('type', c_int32), ('step', c_uint64), ('request', c_uint64), ('user_data', c_uint64), ('time_ns', c_int64),
                ('sample', c_int32), ('token', c_int32), ('logprob', c_float), ('num_top', c_int32), ('top_tokens', c_int32 * 20), ('top_logprobs', c_float * 20), ('finish_reason', c_int32),
                ('from_', c_int32), ('to', c_int32), ('seam', c_int32), ('bytes', c_int64), ('bytes_changed', c_int64), ('seconds', c_double),
                ('prompt_tokens', c_int32), ('cached_tokens', c_int32), ('generated_tokens', c_int32), ('preemptions', c_int32),
                ('queued_ns', c_int64), ('scheduled_ns', c_int64), ('first_token_ns', c_int64), ('reason', c_char * 512)]


class _Stats(ctypes.Structure):
    _fields_ = [('struct_size', c_uint32), ('running', c_int32), ('waiting', c_int32), ('seam', c_int32), ('num_layers', c_int32),
                ('switching', c_int32), ('step', c_uint64), ('switches', c_uint64), ('rollbacks', c_uint64), ('refusals', c_uint64),
                ('preemptions', c_uint64), ('prompt_tokens', c_uint64), ('generation_tokens', c_uint64), ('prefix_queries', c_uint64),
                ('prefix_hits', c_uint64), ('bytes_moved', c_int64), ('switch_seconds', c_double), ('kv_usage', c_double)]


_Progress = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int64, c_int64)
_Log = ctypes.CFUNCTYPE(None, c_void_p, c_int32, c_char_p, c_char_p)
_LEVELS = ('error', 'warning', 'info')

# The parameters of each function, but for the error that stands last; functions without one return nothing that can fail.
_FALLIBLE = {
    'config_create': [POINTER(c_void_p)],
    'config_set_i64': [c_void_p, c_char_p, c_int64],
    'config_set_f64': [c_void_p, c_char_p, c_double],
    'config_set_str': [c_void_p, c_char_p, c_char_p],
    'config_set_progress': [c_void_p, _Progress, c_void_p],
    'config_set_log': [c_void_p, _Log, c_void_p],
    'config_key': [c_size_t, POINTER(c_char_p), POINTER(c_char_p), POINTER(c_char_p), POINTER(c_char_p), POINTER(c_char_p)],
    'engine_create': [c_char_p, c_void_p, POINTER(c_void_p)],
    'engine_start': [c_void_p],
    'engine_stop': [c_void_p],
    'engine_submit': [c_void_p, c_void_p, POINTER(c_uint64)],
    'engine_cancel': [c_void_p, c_uint64],
    'engine_poll': [c_void_p, POINTER(_Event), c_size_t, c_size_t, c_double, POINTER(c_size_t)],
    'engine_event_fd': [c_void_p, POINTER(c_int32)],
    'engine_switch': [c_void_p, c_int32],
    'engine_hold_seam': [c_void_p, c_int32],
    'engine_set_stall_budget': [c_void_p, c_double],
    'engine_stats': [c_void_p, POINTER(_Stats)],
    'engine_metrics_text': [c_void_p, c_char_p, c_size_t, POINTER(c_size_t)],
    'request_create': [POINTER(c_void_p)],
    'request_set_prompt': [c_void_p, POINTER(c_int32), c_size_t],
    'request_set_i64': [c_void_p, c_char_p, c_int64],
    'request_set_f64': [c_void_p, c_char_p, c_double],
    'request_set_str': [c_void_p, c_char_p, c_char_p],
    'request_set_ids': [c_void_p, c_char_p, POINTER(c_int32), c_size_t],
    'request_add_logit_bias': [c_void_p, c_int32, c_float],
    'tokenizer_load': [c_char_p, POINTER(c_void_p)],
    'tokenizer_encode': [c_void_p, c_char_p, c_size_t, c_int32, POINTER(c_int32), c_size_t, POINTER(c_size_t)],
    'tokenizer_decode': [c_void_p, POINTER(c_int32), c_size_t, c_int32, c_char_p, c_size_t, POINTER(c_size_t)],
    'decoder_create': [c_void_p, POINTER(c_void_p)],
    'decoder_push': [c_void_p, c_int32, POINTER(c_void_p), POINTER(c_size_t)],
    'decoder_finish': [c_void_p, POINTER(c_void_p), POINTER(c_size_t)],
}


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ.get('MOEBIUS_LIBRARY', 'libmoebius.so.0'))
    for name, parameters in _FALLIBLE.items():
        function = getattr(library, 'moebius_' + name)
        function.argtypes, function.restype = parameters + [POINTER(c_void_p)], c_int32
    for name in ('config', 'engine', 'request', 'tokenizer', 'decoder', 'error'):
        destroy = getattr(library, f'moebius_{name}_destroy')
        destroy.argtypes, destroy.restype = [c_void_p], None
    library.moebius_error_message.argtypes, library.moebius_error_message.restype = [c_void_p], c_char_p
    return library


_library = _load()


def _call(name: str, *arguments) -> None:
    error = c_void_p()
    status = getattr(_library, 'moebius_' + name)(*arguments, byref(error))
    if status == 0:
        return
    message = _library.moebius_error_message(error).decode(errors='replace')
    _library.moebius_error_destroy(error)
    raise MoebiusError(status, message)


class _Handle:
    """Owns a handle of the library's; each is destroyed once."""

    def __init__(self, kind: str, create: str, *arguments):
        self._destroy = getattr(_library, f'moebius_{kind}_destroy')
        self.value = c_void_p()
        _call(create, *arguments, byref(self.value))

    def close(self) -> None:
        value, self.value = self.value, c_void_p()
        if value:
            self._destroy(value)

    def __del__(self):
        if hasattr(self, 'value'):
            self.close()


def _set(kind: str, handle: _Handle, key: str, value) -> None:
    if isinstance(value, bool) or isinstance(value, int):
        _call(f'{kind}_set_i64', handle.value, key.encode(), int(value))
    elif isinstance(value, float):
        _call(f'{kind}_set_f64', handle.value, key.encode(), value)
    else:
        _call(f'{kind}_set_str', handle.value, key.encode(), str(value).encode())


def _ids(values: Sequence[int]):
    return (c_int32 * len(values))(*values)


@dataclass(frozen=True)
class ConfigKey:
    name: str
    type: str
    default: str
    doc: str
    stability: str


def config_keys() -> list[ConfigKey]:
    """The keys of Engine: what they are called, their types, defaults and meaning."""
    keys, texts = [], [c_char_p() for _ in range(5)]
    while True:
        try:
            _call('config_key', len(keys), *map(byref, texts))
        except MoebiusError as error:
            if error.code == 'NOT_FOUND':
                return keys
            raise
        keys.append(ConfigKey(*(text.value.decode() for text in texts)))


@dataclass(frozen=True)
class Token:
    """One more token of a request; `top`: (token, log-probability) of the likeliest, where logprobs was asked for."""
    id: int
    sample: int = 0
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Switch:
    """What became of a wish to switch: 'finished', 'refused' or 'rolled back'."""
    outcome: str
    layout: int
    bytes: int
    seconds: float
    reason: str


class Tokenizer:
    """The tokenizer of a model folder; immutable, for any thread."""

    def __init__(self, model: str | os.PathLike):
        self._handle = _Handle('tokenizer', 'tokenizer_load', os.fsencode(model))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        data, room, count = text.encode(), len(text.encode()) + 16, c_size_t()
        out = (c_int32 * room)()
        _call('tokenizer_encode', self._handle.value, data, len(data), int(add_special_tokens), out, room, byref(count))
        return out[:count.value]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        count = c_size_t()
        try:
            _call('tokenizer_decode', self._handle.value, _ids(ids), len(ids), int(skip_special_tokens), None, 0, byref(count))
        except MoebiusError:
            if count.value == 0:
                raise
        out = ctypes.create_string_buffer(max(1, count.value))
        _call('tokenizer_decode', self._handle.value, _ids(ids), len(ids), int(skip_special_tokens), out, count.value, byref(count))
        return out.raw[:count.value].decode(errors='replace')

    def stream(self, tokens: Iterable[Token | int]) -> Iterator[str]:
        """The text of tokens as they come: whole characters, each as soon as it is certain."""
        decoder = _Handle('decoder', 'decoder_create', self._handle.value)
        text, size = c_void_p(), c_size_t()
        for token in tokens:
            _call('decoder_push', decoder.value, token.id if isinstance(token, Token) else token, byref(text), byref(size))
            if size.value:
                yield ctypes.string_at(text, size.value).decode()
        _call('decoder_finish', decoder.value, byref(text), byref(size))
        if size.value:
            yield ctypes.string_at(text, size.value).decode(errors='replace')


class Request:
    """A request that was submitted: an iterator over its tokens, which ends when all its samples have. Raises MoebiusError where one failed."""

    def __init__(self, engine: Engine, samples: int):
        self._engine = engine
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self._unfinished = samples  # that the iterator has not seen end
        self._to_come = samples     # whose end has not come from the engine
        self.id = 0
        self.finish_reason: str | None = None  # 'stop', 'length' or 'abort' (cancelled, past its deadline), once a sample has ended

    def __iter__(self) -> Iterator[Token]:
        while self._unfinished > 0:
            item = self._events.get()
            if isinstance(item, Token):
                yield item
                continue
            self._unfinished -= 1
            self.finish_reason, why = item
            if self.finish_reason == 'error':
                self._unfinished = 0
                raise MoebiusError(-14, why)

    def cancel(self) -> bool:
        """Ends it wherever it is: its tokens end with finish_reason 'abort'. False: it had ended already."""
        try:
            _call('engine_cancel', self._engine._handle.value, self.id)
            return True
        except MoebiusError as error:
            if error.code == 'NOT_FOUND':
                return False
            raise


class Engine:
    """A model served on several ranks. Use it in a with statement, or call close()."""

    def __init__(self, model: str | os.PathLike, progress: Callable[[int, int], object] | None = None,
                 log: Callable[[str, str, str], object] | None = None, **config):
        """progress(bytes done, bytes in all) may return False to cancel the load; log('error', 'warning' or 'info', category, message) comes
        from any thread and may not call the engine. Raises MoebiusError."""
        handle = _Handle('config', 'config_create')
        for key, value in config.items():
            _set('config', handle, key, value)
        stop: list[BaseException] = []

        def on_progress(_, done, total):  # an exception must not pass through the library
            try:
                return int(progress(done, total) is False)
            except BaseException as error:
                stop.append(error)
                return 1

        def on_log(_, level, category, message):
            log(_LEVELS[level], category.decode(), message.decode(errors='replace'))

        callbacks = self._callbacks = [_Progress(on_progress) if progress else _Progress(), _Log(on_log) if log else _Log()]
        _call('config_set_progress', handle.value, callbacks[0], None)
        _call('config_set_log', handle.value, callbacks[1], None)
        try:
            self._handle = _Handle('engine', 'engine_create', os.fsencode(model), handle.value)
        except MoebiusError:
            if stop:
                raise stop[0]
            raise
        self._requests: dict[int, Request] = {}  # those that have not ended
        self._switches: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        descriptor = c_int32()
        _call('engine_event_fd', self._handle.value, byref(descriptor))
        self._wake = os.pipe()
        _call('engine_start', self._handle.value)
        self._reader = threading.Thread(target=self._read, args=(descriptor.value,), name='moebius-events', daemon=True)
        self._reader.start()

    def submit(self, prompt: Sequence[int], stop_token_ids: Sequence[int] = (), allowed_token_ids: Sequence[int] = (),
               logit_bias: dict[int, float] | None = None, **keys) -> Request:
        """Queues a request. Keys: max_tokens, temperature, top_p, top_k, min_p, seed, n, logprobs, … of moebius.h."""
        handle = _Handle('request', 'request_create')
        _call('request_set_prompt', handle.value, _ids(prompt), len(prompt))
        for key, ids in (('stop_token_ids', stop_token_ids), ('allowed_token_ids', allowed_token_ids)):
            if ids:
                _call('request_set_ids', handle.value, key.encode(), _ids(ids), len(ids))
        for token, bias in (logit_bias or {}).items():
            _call('request_add_logit_bias', handle.value, token, bias)
        for key, value in keys.items():
            _set('request', handle, key, float(value) if key in _REAL_KEYS else value)
        request, number = Request(self, int(keys.get('n', 1))), c_uint64()
        with self._lock:  # its first events wait until it is known
            _call('engine_submit', self._handle.value, handle.value, byref(number))
            request.id = number.value
            self._requests[request.id] = request
        return request

    def switch(self, layout: int, timeout: float | None = None) -> Switch:
        """Changes the layout (TP or EP) under whatever is running, and waits for the outcome; queue.Empty after `timeout` seconds. One thread at
        a time; with a policy, which switches by itself, the outcome may be of a switch of its."""
        while not self._switches.empty():
            self._switches.get_nowait()
        _call('engine_switch', self._handle.value, layout)
        return self._switches.get(timeout=timeout)

    def set_stall_budget(self, ms: float) -> None:
        """0: a switch moves everything at once; else the time that each step may lend to it."""
        _call('engine_set_stall_budget', self._handle.value, ms)

    def stats(self) -> dict[str, int | float]:
        stats = _Stats(struct_size=ctypes.sizeof(_Stats))
        _call('engine_stats', self._handle.value, byref(stats))
        return {name: getattr(stats, name) for name, _ in _Stats._fields_[1:]}

    def metrics_text(self) -> str:
        """Prometheus text."""
        needed = c_size_t()
        while True:
            out = ctypes.create_string_buffer(needed.value + 256)
            try:
                _call('engine_metrics_text', self._handle.value, out, len(out), byref(needed))
                return out.value.decode()
            except MoebiusError as error:
                if error.code != 'INVALID_ARGUMENT' or needed.value <= len(out):
                    raise

    def close(self) -> None:
        """Ends the engine; requests that still run are dropped, and their tokens() raise."""
        if self._closed.is_set():
            return
        self._closed.set()
        _call('engine_stop', self._handle.value)
        os.write(self._wake[1], b'x')
        self._reader.join()
        for end in self._wake:
            os.close(end)
        with self._lock:
            for request in self._requests.values():
                request._events.put(('error', 'the engine was closed'))
            self._requests.clear()
        self._handle.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self, descriptor: int) -> None:
        room = 256
        events, count = (_Event * room)(), c_size_t()
        poller = select.poll()
        for end in (descriptor, self._wake[0]):
            poller.register(end, select.POLLIN)
        while not self._closed.is_set():
            poller.poll()
            _call('engine_poll', self._handle.value, events, room, ctypes.sizeof(_Event), 0.0, byref(count))
            for event in events[:count.value]:
                self._take(event)

    def _take(self, e: _Event) -> None:
        outcomes = {_SWITCH_FINISHED: 'finished', _SWITCH_REFUSED: 'refused', _ROLLED_BACK: 'rolled back'}
        if e.type in outcomes:
            self._switches.put(Switch(outcomes[e.type], e.to, e.bytes, e.seconds, e.reason.decode(errors='replace')))
        if e.type not in (_TOKEN, _FINISHED):
            return
        with self._lock:
            request = self._requests[e.request]
            if e.type == _TOKEN:
                request._events.put(Token(e.token, e.sample, e.logprob, tuple((e.top_tokens[i], e.top_logprobs[i]) for i in range(e.num_top))))
                return
            request._events.put((_FINISH.get(e.finish_reason, str(e.finish_reason)), e.reason.decode(errors='replace')))
            request._to_come -= 1
            if request._to_come == 0:
                del self._requests[e.request]
