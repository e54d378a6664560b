#!/usr/bin/env python3
"""Streams several requests at once, cancels one, and changes the layout in the middle.

usage: stream.py MODEL_FOLDER    (MOEBIUS_LIBRARY names libmoebius.so.0 where the loader does not find it)
"""
import sys
import threading

import moebius

PROMPTS = ['ROMEO:', 'First Citizen:\n', 'What say you', 'The king']


def show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        share = done / max(1, total)
        print(f'\rloading [{"#" * int(40 * share):<40}] {share:4.0%}', end='\n' if done == total else '', file=sys.stderr, flush=True)


def show_problem(level: str, category: str, message: str) -> None:
    if level != 'info':
        print(f'{level}: {message}', file=sys.stderr)


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        tokenizer = moebius.Tokenizer(sys.argv[1])
        engine = moebius.Engine(sys.argv[1], progress=show_progress, log=show_problem, ranks=2, max_batch=8,
                                kv_tokens=4096)
    except moebius.MoebiusError as error:
        print(f'stream.py: {error} ({error.code})', file=sys.stderr)
        return 1
    with engine:
        print_lock = threading.Lock()

        def stream(name: str, request: moebius.Request) -> None:
            for text in tokenizer.stream(request):
                with print_lock:
                    print(f'{name}: {text!r}', flush=True)
            with print_lock:
                print(f'{name} ended: {request.finish_reason}', flush=True)

        requests = [engine.submit(tokenizer.encode(prompt), max_tokens=60, temperature=0.8, seed=i, ignore_eos=True) for i, prompt in enumerate(PROMPTS)]
        threads = [threading.Thread(target=stream, args=(f'request {i}', request)) for i, request in enumerate(requests)]
        for thread in threads:
            thread.start()
        switch = engine.switch(moebius.EP, timeout=30)
        with print_lock:
            print(f'switched to expert parallelism: {switch.outcome}, {switch.bytes} bytes in {1e3 * switch.seconds:.2f} ms', flush=True)
        requests[-1].cancel()
        for thread in threads:
            thread.join()
        print(f"{engine.stats()['generation_tokens']} tokens in all")
    return 0


if __name__ == '__main__':
    sys.exit(main())
