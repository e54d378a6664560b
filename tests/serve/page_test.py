"""The live page in a headless Chromium, under load and through switches. Exits 77 where there is no Chromium.
usage: page_test.py PROGRAM MODEL_FOLDER [SCREENSHOT.png]"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading

from harness import Server

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
if not CHROMIUM:
    print('skipped: there is no chromium')
    sys.exit(77)


def check(holds, what):
    if not holds:
        sys.exit('FAILED: ' + what)


def look(url, *flags):
    """What the browser printed, and its log; it looks for some seconds of its own time."""
    with tempfile.TemporaryDirectory() as profile:
        run = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--hide-scrollbars',
                              '--enable-logging=stderr', '--window-size=1240,1000', '--virtual-time-budget=4000',
                              f'--user-data-dir={profile}', *flags, url + '/'], capture_output=True, text=True, timeout=120)
    check(run.returncode == 0, f'chromium exited {run.returncode}: {run.stderr[-2000:]}')
    console = [line for line in run.stderr.splitlines() if 'CONSOLE' in line]
    check(not console, f'the console has {console}')
    return run.stdout


def points(page, figure):
    """Points of each line of a chart."""
    drawn = page.split(f'id="{figure}"')[1].split('</figure>')[0]
    return [len(re.findall('[ML]', d)) for d in re.findall(r'<path class="line" d="([^"]*)"', drawn)]


def main():
    program, model = sys.argv[1:3]
    with Server(program, model, '--ranks', 2, '--threads', 1) as server:
        done = threading.Event()

        def load():
            while not done.is_set():
                server.post('/v1/completions', {'prompt': 'ROMEO:', 'max_tokens': 200, 'ignore_eos': True})

        threads = [threading.Thread(target=load) for _ in range(6)]
        for t in threads:
            t.start()
        try:
            for to, budget in (('ep', 0), ('tp', 0.1)):
                server.until('samples', lambda: any(s[1] for s in server.get('/v1/moebius/history')['samples'][-4:]), 20)
                server.post('/v1/moebius/layout', {'layout': to, 'stall_budget_ms': budget})
            page = look(server.url, '--dump-dom')
            if len(sys.argv) > 3:
                look(server.url, '--screenshot=' + os.path.abspath(sys.argv[3]))
        finally:
            done.set()
            for t in threads:
                t.join()
        for figure, lines in (('load', 2), ('throughput', 2), ('layers', 1)):
            drawn = points(page, figure)
            check(len(drawn) == lines and min(drawn) >= 4, f'{figure} has lines of {drawn} points')
        check(len(re.findall(r'<td[^>]*>finished</td>', page)) == 2, 'the table lacks a switch')
        check(len(re.findall('class="mark"', page)) == 6, 'a chart lacks the mark of a switch')
        check(re.search(r'id="layout"[^>]*>TP<', page) and re.search(r'id="rate"[^>]*>[1-9]', page), 'the tiles do not show the load')
        check(re.search(r'id="state" class="">live<', page), 'the page is not live')
        check(server.stop() == 0, 'the server did not end well')
    print('the page drew its lines')


main()
