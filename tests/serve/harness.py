"""A moebius-serve of a test's own, and the least of a client: nothing but the standard library."""
import http.client
import json
import re
import signal
import socket
import subprocess
import time

JSON = {'Content-Type': 'application/json'}


class Server:
    """Whose layout changes when the test says, unless it names a policy."""

    def __init__(self, program, model, *flags):
        if '--policy' not in flags:
            flags += '--policy', 'manual'
        self.process = subprocess.Popen([program, '--model', model, '--port', '0', *map(str, flags)], stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        if not re.fullmatch(r'http://127\.0\.0\.1:[0-9]+', self.url):
            raise RuntimeError(f'the server said {self.url!r} and exited {self.process.wait()}')
        self.port = int(self.url.rsplit(':', 1)[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()

    def signal(self):
        self.process.send_signal(signal.SIGTERM)

    def stop(self, timeout=30):
        """Its exit status after SIGTERM."""
        if self.process.poll() is None:
            self.signal()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.process.stdout.close()

    def connect(self, timeout=60):
        return http.client.HTTPConnection('127.0.0.1', self.port, timeout=timeout)

    def socket(self, receive_buffer=None):
        s = socket.socket()
        if receive_buffer:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        s.settimeout(30)
        s.connect(('127.0.0.1', self.port))
        return s

    def ask(self, path, body=None, headers=None, method=None):
        """Status, headers and what came, as JSON where it is that."""
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection = self.connect()
        try:
            sent = {**(JSON if body is not None else {}), **(headers or {})}
            connection.request(method or ('GET' if body is None else 'POST'), path, data, sent)
            response = connection.getresponse()
            raw = response.read()
        finally:
            connection.close()
        is_json = response.headers.get('Content-Type', '').startswith('application/json')
        return response.status, response.headers, json.loads(raw) if is_json else raw.decode()

    def get(self, path):
        status, _, body = self.ask(path)
        if status != 200:
            raise AssertionError(f'{path}: {status} {body}')
        return body

    def post(self, path, body):
        status, _, answer = self.ask(path, body)
        if status != 200:
            raise AssertionError(f'{path}: {status} {answer}')
        return answer

    def stream(self, path, body, connection=None):
        """The chunks of a stream as they come; it has to end with [DONE]."""
        connection = connection or self.connect()
        try:
            connection.request('POST', path, json.dumps({**body, 'stream': True}), JSON)
            response = connection.getresponse()
            if response.status != 200:
                raise AssertionError(f'{path}: {response.status} {response.read()}')
            for line in response:
                if line.startswith(b'data: '):
                    if line == b'data: [DONE]\n':
                        return
                    yield json.loads(line[6:])
            raise AssertionError('the stream broke off')
        finally:
            connection.close()

    def begin(self, body, path='/v1/completions', receive_buffer=None):
        """A socket on which a request was sent and nothing is read."""
        s, data = self.socket(receive_buffer), json.dumps(body)
        head = f'POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n'
        s.sendall((head + data).encode())
        return s

    def metric(self, name, **labels):
        wanted = ','.join(f'{k}="{v}"' for k, v in labels.items())
        for line in self.get('/metrics').splitlines():
            key, _, value = line.rpartition(' ')
            if re.match(rf'moebius_{name}(\{{|$)', key) and wanted in key:
                return float(value)
        return 0.0

    def until(self, what, condition, seconds=5.0):
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f'not within {seconds} s: {what}')
            time.sleep(0.02)
