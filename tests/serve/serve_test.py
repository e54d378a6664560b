"""moebius-serve over HTTP. usage: serve_test.py PROGRAM MODEL_FOLDER [test names]"""
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

from harness import JSON, Server

PROGRAM, MODEL = sys.argv[1:3]
TEXT, CHAT, LAYOUT = '/v1/completions', '/v1/chat/completions', '/v1/moebius/layout'
GREEDY = {'prompt': 'ROMEO:\n', 'temperature': 0, 'max_tokens': 24, 'ignore_eos': True}
E_ACUTE_AND_A = [128, 103, 65]  # the bundled model's tokens
LONG = {'prompt': 'ROMEO:\n', 'max_tokens': 1900, 'n': 8, 'ignore_eos': True, 'stream': True}


def gathered(chunks, choice=0):
    return ''.join(c['text'] for chunk in chunks for c in chunk['choices'] if c['index'] == choice)


class Endpoints(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server(PROGRAM, MODEL, '--ranks', 2, '--threads', 1, '--chat-template', 'plain', '--max-body-bytes', 100000,
                            '--write-timeout-s', 1, '--read-timeout-s', 1)
        cls.text = cls.server.post(TEXT, GREEDY)['choices'][0]['text']

    @classmethod
    def tearDownClass(cls):
        if cls.server.stop() != 0:
            raise AssertionError('the server did not end well')

    def refused(self, status, path, body, param=None, headers=None, method=None):
        got, _, answer = self.server.ask(path, body, headers, method)
        self.assertEqual(got, status, answer)
        self.assertEqual(sorted(answer['error']), ['code', 'message', 'param', 'type'])
        if param:
            self.assertEqual(answer['error']['param'], param, answer)
            self.assertIn(param, answer['error']['message'])
        return answer['error']

    def test_models_health_and_metrics(self):
        model = self.server.get('/v1/models')['data'][0]
        self.assertEqual((model['id'], model['object'], model['max_model_len']), ('shakespeare-moe', 'model', 2048))
        self.assertEqual(self.server.get('/v1/models/shakespeare-moe'), model)
        self.refused(404, '/v1/models/other', None)
        self.assertEqual(self.server.get('/health'), {'status': 'ok'})
        label = r'[a-zA-Z_]\w*="(?:[^"\\\n]|\\.)*"'
        sample = re.compile(rf'[a-zA-Z_:][a-zA-Z0-9_:]*(\{{{label}(,{label})*\}})? ([0-9.e+-]+|\+Inf|NaN)')
        typed = {}
        for line in self.server.get('/metrics').splitlines():
            if kind := re.fullmatch(r'# TYPE (\w+) (counter|gauge|histogram)', line):
                self.assertNotIn(kind[1], typed)
                typed[kind[1]] = kind[2]
            elif not line.startswith('# HELP '):
                self.assertTrue(sample.fullmatch(line), line)
                name = re.split('[{ ]', line)[0]
                self.assertTrue(name in typed or typed.get(re.sub(r'_(bucket|sum|count)$', '', name)) == 'histogram', line)
        self.assertEqual(typed['moebius_num_requests_running'], 'gauge')
        self.assertGreater(self.server.metric('http_requests_total', code=200), 0)

    def test_prompts_come_as_text_ids_and_lists_of_both(self):
        answer = self.server.post(TEXT, {**GREEDY, 'model': 'shakespeare-moe'})
        self.assertEqual((answer['object'], answer['model']), ('text_completion', 'shakespeare-moe'))
        self.assertTrue(answer['id'].startswith('cmpl-') and answer['system_fingerprint'].startswith('moebius-'))
        self.assertEqual(answer['choices'], [{'index': 0, 'text': self.text, 'logprobs': None, 'finish_reason': 'length'}])
        usage = answer['usage']
        self.assertEqual((usage['completion_tokens'], usage['total_tokens']), (24, usage['prompt_tokens'] + 24))
        both = self.server.post(TEXT, {**GREEDY, 'prompt': ['ROMEO:\n', 'JULIET:\n'], 'n': 2})
        self.assertEqual([c['index'] for c in both['choices']], [0, 1, 2, 3])
        self.assertEqual([c['text'] == self.text for c in both['choices']], [True, True, False, False])
        self.assertEqual(both['usage']['completion_tokens'], 96)
        ids = self.server.post(TEXT, {**GREEDY, 'prompt': [1, 2, 3]})
        lists = self.server.post(TEXT, {**GREEDY, 'prompt': [[1, 2, 3], [4]]})
        self.assertEqual(lists['choices'][0]['text'], ids['choices'][0]['text'])
        self.assertEqual((ids['usage']['prompt_tokens'], lists['usage']['prompt_tokens']), (3, 4))

    def test_seeds_repeat_and_samples_differ(self):
        seeded = {**GREEDY, 'temperature': 1.5, 'seed': 7, 'n': 3}
        texts = [c['text'] for c in self.server.post(TEXT, seeded)['choices']]
        self.assertEqual(len(set(texts)), 3)
        chunks = list(self.server.stream(TEXT, seeded))
        self.assertEqual([gathered(chunks, i) for i in range(3)], texts)
        self.assertNotEqual(self.server.post(TEXT, {**seeded, 'seed': 8})['choices'][0]['text'], texts[0])

    def test_vllms_keys_reach_the_engine(self):
        hot = {**GREEDY, 'temperature': 5}
        for keys in ({'top_k': 1}, {'min_p': 1}, {'top_p': 1e-9}):
            self.assertEqual(self.server.post(TEXT, {**hot, **keys, 'priority': 3})['choices'][0]['text'], self.text, keys)
        for keys in ({'repetition_penalty': 3}, {'logit_bias': {'5': 100}}, {'allowed_token_ids': [5, 6]}, {'frequency_penalty': 2}):
            self.assertNotEqual(self.server.post(TEXT, {**GREEDY, **keys})['choices'][0]['text'], self.text, keys)
        stopped = self.server.post(TEXT, {**GREEDY, 'logit_bias': {'5': 100}, 'stop_token_ids': [5], 'min_tokens': 3})
        self.assertEqual(stopped['choices'][0]['finish_reason'], 'stop')
        self.assertEqual(stopped['usage']['completion_tokens'], 4)
        self.assertTrue(self.text.startswith(stopped['choices'][0]['text']))  # the stop token is no text, unless it is asked for
        included = self.server.post(TEXT, {**GREEDY, 'logit_bias': {'5': 100}, 'stop_token_ids': [5], 'min_tokens': 3, 'include_stop_str_in_output': True})
        self.assertGreater(len(included['choices'][0]['text']), len(stopped['choices'][0]['text']))
        eos = self.server.post(TEXT, {**GREEDY, 'ignore_eos': False, 'logit_bias': {'0': 100}})  # the end of text is no text
        self.assertEqual((eos['choices'][0]['text'], eos['choices'][0]['finish_reason']), ('', 'stop'))

    def test_stop_strings_cut_across_tokens(self):
        pieces = [c['choices'][0]['text'] for c in self.server.stream(TEXT, GREEDY)]
        self.assertEqual(''.join(pieces), self.text)
        border = sum(map(len, pieces[:8]))
        stop = self.text[border - 2:border + 2]  # the end of one token and the beginning of the next
        at = self.text.index(stop)
        for extra, end in (({}, at), ({'include_stop_str_in_output': True}, at + len(stop))):
            body = {**GREEDY, 'max_tokens': 1500, 'stop': ['never seen', stop], **extra}
            whole = self.server.post(TEXT, body)
            self.assertEqual((whole['choices'][0]['text'], whole['choices'][0]['finish_reason']), (self.text[:end], 'stop'))
            self.assertLess(whole['usage']['completion_tokens'], 12)
            chunks = list(self.server.stream(TEXT, {**body, 'stream_options': {'include_usage': True}}))
            self.assertEqual(gathered(chunks), self.text[:end])
            self.assertEqual((chunks[-1]['usage'], chunks[-1]['choices']), (whole['usage'], []))
        aborted = self.server.metric('request_success_total', finished_reason='abort')
        self.assertGreaterEqual(aborted, 4)  # the engine did not go on behind the stop
        held = self.server.post(TEXT, {**GREEDY, 'stop': self.text[-4:] + 'zzz'})['choices'][0]
        self.assertEqual((held['text'], held['finish_reason']), (self.text, 'length'))
        late = self.server.post(TEXT, {**GREEDY, 'stop': stop, 'min_tokens': 24})['choices'][0]
        self.assertEqual(late['text'], self.text)
        begun = self.server.post(TEXT, {**GREEDY, 'stop': stop, 'min_tokens': 8})['choices'][0]  # it begins there and ends behind
        self.assertEqual((begun['text'], begun['finish_reason']), (self.text[:border - 2], 'stop'))
        ended = [self.text[border - 3:border], self.text[border - 2:border]]  # these end there
        later = [self.text.find(s, border - len(s) + 1) for s in ended]
        passed = self.server.post(TEXT, {**GREEDY, 'stop': ended, 'min_tokens': 8})['choices'][0]
        self.assertEqual(passed['text'], self.text[:min((i for i in later if i >= 0), default=None)])
        one = self.server.post(TEXT, {**GREEDY, 'stop': stop, 'n': 2})
        self.assertEqual([c['text'] for c in one['choices']], [self.text[:at]] * 2)

    def test_logprobs_in_both_shapes(self):
        answer = self.server.post(TEXT, {**GREEDY, 'max_tokens': 5, 'logprobs': 3})['choices'][0]
        shape = answer['logprobs']
        self.assertEqual(''.join(shape['tokens']), answer['text'])
        self.assertEqual(shape['text_offset'], [len(''.join(shape['tokens'][:i])) for i in range(5)])
        # The two tokens of é are one character, or one that stands for a half.
        e_acute = {**GREEDY, 'max_tokens': 9, 'temperature': 9, 'seed': 3, 'n': 8, 'logprobs': 0, 'allowed_token_ids': E_ACUTE_AND_A}
        for choice in self.server.post(TEXT, e_acute)['choices']:
            text, shape_of = choice['text'], choice['logprobs']
            for token, offset in zip(shape_of['tokens'], shape_of['text_offset']):
                self.assertTrue(text[offset] in 'a\ufffd' if token == 'a' else offset <= len(text), (text, shape_of))
        for token, logprob, top in zip(shape['tokens'], shape['token_logprobs'], shape['top_logprobs']):
            self.assertTrue(logprob <= 0 and top[token] == logprob == max(top.values()) and len(top) == 3)
        chunks = list(self.server.stream(TEXT, {**GREEDY, 'max_tokens': 5, 'logprobs': 3}))
        streamed = [c['choices'][0]['logprobs'] for c in chunks if c['choices'][0]['logprobs']]
        for key in shape:
            self.assertEqual([v for s in streamed for v in s[key]], shape[key])
        chat = self.server.post(CHAT, {'messages': [{'role': 'user', 'content': 'Hi'}], 'temperature': 0, 'max_tokens': 5, 'logprobs': True,
                                       'top_logprobs': 2})
        content = chat['choices'][0]['logprobs']['content']
        self.assertEqual(bytes(b for t in content for b in t['bytes']).decode(), chat['choices'][0]['message']['content'])
        self.assertTrue(all(len(t['top_logprobs']) == 2 and t['top_logprobs'][0]['token'] == t['token'] for t in content))

    def test_chats_are_completions_of_the_template(self):
        parts = [{'type': 'text', 'text': 'Who '}, {'type': 'text', 'text': 'is it?'}]
        messages = [{'role': 'system', 'content': 'Speak.'}, {'role': 'user', 'content': parts}]
        body = {'messages': messages, 'temperature': 0, 'max_completion_tokens': 20, 'ignore_eos': True}
        want = self.server.post(TEXT, {**GREEDY, 'prompt': 'system: Speak.\nuser: Who is it?\nassistant:', 'max_tokens': 20})
        whole = self.server.post(CHAT, body)
        self.assertEqual(whole['object'], 'chat.completion')
        self.assertEqual(whole['choices'][0]['message'], {'role': 'assistant', 'content': want['choices'][0]['text']})
        self.assertEqual(whole['usage'], want['usage'])
        chunks = list(self.server.stream(CHAT, {**body, 'n': 2}))
        self.assertTrue(all(c['object'] == 'chat.completion.chunk' for c in chunks))
        for i in range(2):
            deltas = [c for chunk in chunks for c in chunk['choices'] if c['index'] == i]
            self.assertEqual(deltas[0]['delta']['role'], 'assistant')
            self.assertEqual(''.join(d['delta'].get('content', '') for d in deltas), want['choices'][0]['text'])
            self.assertEqual([d['finish_reason'] for d in deltas if d['finish_reason']], ['length'])

    def test_what_is_not_supported_is_named(self):
        of_text = {'echo': True, 'best_of': 2, 'suffix': 'x', 'n': 0, 'logprobs': 21, 'temperature': -1, 'stop': [''], 'top_k': 1.5,
                   'prompt': [], 'max_tokens': 0, 'logit_bias': {'x': 1}, 'stop_token_ids': [5000], 'stream': 1, 'no_such_key': 1, 'seed': 'x',
                   'stream_options': {'include_usage': True}, 'messages': [], 'top_logprobs': 1}
        of_chats = {'tools': [{}], 'response_format': {'type': 'json_object'}, 'top_logprobs': 3, 'functions': [1],
                    'tool_choice': 'required', 'messages': [{'role': 'tool', 'content': 'x'}], 'logprobs': 5, 'prompt': 'x', 'audio': {},
                    'skip_special_tokens': False}
        for path, keys in ((TEXT, of_text), (CHAT, of_chats)):
            base = {'messages': [{'role': 'user', 'content': 'x'}]} if path == CHAT else {'prompt': 'x'}
            for key, value in keys.items():
                with self.subTest(path=path, key=key):
                    self.refused(400, path, {**base, key: value}, key)
        neutral = {'echo': False, 'best_of': 1, 'suffix': '', 'user': 'me', 'stop': None, 'response_format': {'type': 'text'}}
        self.assertEqual(self.server.post(TEXT, {**GREEDY, **neutral})['choices'][0]['text'], self.text)
        self.assertEqual(self.refused(404, TEXT, {**GREEDY, 'model': 'gpt-4'}, 'model')['code'], 'model_not_found')
        self.assertEqual(self.refused(400, TEXT, {**GREEDY, 'max_tokens': 5000})['code'], 'context_length_exceeded')
        self.refused(400, TEXT, {**GREEDY, 'max_tokens': 2 ** 31}, 'max_tokens')
        self.refused(400, TEXT, {**GREEDY, 'prompt': ['x'] * 20, 'n': 20}, 'n')

    def test_malformed_requests(self):
        for body in (b'', b'{', b'[]', b'{"prompt": "x"} x', b'{"prompt": "\xff"}', b'[' * 50000, b'{"prompt":"a","prompt":"b"}', b'nul',
                     b'{"prompt": 1e999}', b'{"prompt": "x"}\0 and more', b'{"prompt": "x", "logit_bias": {" 5": 1}}',
                     b'{"prompt": "x", "logit_bias": {"5\\u0000x": 1}}'):
            with self.subTest(body=body[:40]):
                self.refused(400, TEXT, body)
        self.refused(404, '/v1/nothing', None)
        self.refused(404, '/v1/nothing', b'{}')
        self.refused(405, TEXT, None)
        self.refused(405, '/health', b'{}')
        self.refused(405, TEXT, b'{}', method='DELETE')
        self.refused(415, TEXT, b'{}', headers={'Content-Type': 'text/plain'})
        self.refused(415, TEXT, b'{}', headers={'Content-Type': 'application/jsonx'})
        self.refused(400, TEXT, b'{', headers={'Content-Type': 'Application/JSON ; charset=utf-8'})
        for raw in (b'nonsense\r\n\r\n', b'GET / HTTP/9.9\r\n\r\n', b'GET /' + b'x' * 9000 + b' HTTP/1.1\r\n\r\n', b'x' * 300000):
            with self.server.socket() as s:
                s.sendall(raw)
                s.settimeout(5)
                answer = b''
                try:
                    while part := s.recv(65536):
                        answer += part
                except ConnectionError:
                    pass
                self.assertRegex(answer, rb'^(HTTP/1\.1 4|$)', raw[:20])
        self.assertEqual(self.server.post(TEXT, GREEDY)['choices'][0]['text'], self.text)

    def test_bodies_beyond_the_limit(self):
        large = json.dumps({'prompt': 'x' * 100000}).encode()
        self.refused(413, TEXT, large)
        packed = gzip.compress(json.dumps({'prompt': 'x' * 20_000_000}).encode())
        self.assertLess(len(packed), 100000)
        self.refused(413, TEXT, packed, headers={'Content-Encoding': 'gzip'})
        connection = self.server.connect()
        connection.request('POST', TEXT, iter([large[:50000], large[50000:]]), JSON, encode_chunked=True)
        self.assertEqual(connection.getresponse().status, 413)
        connection.close()
        with tempfile.NamedTemporaryFile() as file:  # curl asks before it sends so much
            file.write(b' ' * 3_000_000)
            file.flush()
            run = subprocess.run(['curl', '-s', '-w', '%{http_code}', '-H', 'Content-Type: application/json', '--data-binary',
                                  '@' + file.name, self.server.url + TEXT], capture_output=True, text=True, timeout=20)
        self.assertTrue(run.stdout.endswith('413') and 'max-body-bytes' in run.stdout, run.stdout)
        small = gzip.compress(json.dumps(GREEDY).encode())
        status, _, answer = self.server.ask(TEXT, small, {'Content-Encoding': 'gzip'})
        self.assertEqual((status, answer['choices'][0]['text']), (200, self.text))

    def raw(self, request):
        with self.server.socket() as s:
            s.settimeout(10)
            answer = b''
            try:
                s.sendall(request)
                while part := s.recv(65536):
                    answer += part
            except ConnectionError:  # it need not read all that was sent
                pass
            return answer

    def test_a_body_that_ends_in_two_places_is_refused(self):
        body = json.dumps(GREEDY).encode()
        right = b'Content-Length: %d' % len(body)
        for headers in (b'Content-Length: 0\r\n' + right, b'Content-Length: abc', b'Content-Length: +5', right + b'\r\nTransfer-Encoding: chunked',
                        b'Transfer-Encoding: gzip, chunked', right + b'\r\nContent-Encoding: foo'):
            with self.subTest(headers=headers):
                answer = self.raw(b'POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n' + headers + b'\r\n\r\n' + body)
                self.assertRegex(answer, rb'^HTTP/1\.1 4')
                self.assertIn(b'Connection: close', answer)
                self.assertEqual(answer.count(b'HTTP/1.1'), 1)  # what came behind is no request

    def test_headers_without_end_are_given_up_before_they_weigh_much(self):
        begun = time.monotonic()
        self.assertRegex(self.raw(b'GET /health HTTP/1.1\r\n' + b'a:b\r\n' * 100000), rb'^(HTTP/1\.1 4|$)')
        self.assertLess(time.monotonic() - begun, 1)  # not --read-timeout-s

    def test_http_1_0_gets_a_stream_without_chunks(self):
        body = json.dumps({**GREEDY, 'stream': True}).encode()
        answer = self.raw(b'POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b' % (len(body), body))
        head, stream = answer.split(b'\r\n\r\n', 1)
        self.assertNotIn(b'chunked', head)
        self.assertRegex(stream, rb'^data: \{')
        self.assertTrue(stream.endswith(b'data: [DONE]\n\n'), stream[-40:])

    def test_a_request_that_does_not_come_whole_is_given_up(self):
        with self.server.socket() as slow, self.server.socket() as short:
            slow.sendall(b'POST /v1/completions HTTP/1.1\r\nHost')
            short.sendall(b'POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{')
            begun = time.monotonic()
            self.assertIn(b'400', short.recv(1000))
            self.assertRegex(slow.recv(1000), rb'^(HTTP/1\.1 4|$)')
            self.assertLess(time.monotonic() - begun, 4)

    def test_curl_streams_over_one_connection(self):
        url, body = self.server.url + TEXT, json.dumps({**GREEDY, 'stream': True})
        command = ['curl', '-sN', '-H', 'Content-Type: application/json', '-d', body, url, url, '-w', '%{num_connects}\n']
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
        events = [line[6:] for line in run.stdout.splitlines() if line.startswith('data: ')]
        self.assertEqual(events.count('[DONE]'), 2)
        self.assertEqual(gathered([json.loads(e) for e in events if e != '[DONE]']), self.text * 2)
        self.assertEqual([line for line in run.stdout.splitlines() if line.isdigit()], ['1', '0'])

    def test_64_streams_at_once_are_as_alone_whatever_the_layout(self):
        words = ['ROMEO:', 'First Citizen:', 'What', 'The king', 'Come']
        bodies = [{'prompt': f'{words[i % 5]} {i}', 'max_tokens': 60 + i % 30, 'ignore_eos': True,
                   **({'temperature': 0} if i % 2 else {'seed': i})} for i in range(64)]
        with Server(PROGRAM, MODEL, '--ranks', 1, '--threads', 1, '--chat-template', 'plain') as one_rank:
            alone = [one_rank.post(TEXT, b)['choices'][0]['text'] for b in bodies]
            # Without max_tokens a chat gets the rest of the context.
            to_the_end = one_rank.post(CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'ignore_eos': True})
            self.assertEqual(to_the_end['usage']['total_tokens'], 2048)
        got, begun = [None] * 64, threading.Barrier(65)
        reply_times = []

        def read(i):
            begun.wait()
            got[i] = gathered(self.server.stream(TEXT, bodies[i]))

        threads = [threading.Thread(target=read, args=(i,)) for i in range(64)]
        for t in threads:
            t.start()
        begun.wait()
        outcomes, to = [], 'ep'
        while any(t.is_alive() for t in threads):
            asked = time.monotonic()
            self.server.get('/health')
            reply_times.append(time.monotonic() - asked)
            outcomes.append(self.server.post(LAYOUT, {'layout': to, 'stall_budget_ms': len(outcomes) % 2 * 0.2}))
            to = 'tp' if to == 'ep' else 'ep'
        for t in threads:
            t.join()
        self.assertEqual(got, alone)
        self.assertGreaterEqual(len(outcomes), 2)
        self.assertTrue(all(o['outcome'] == 'finished' and o['bytes'] > 0 for o in outcomes), outcomes)
        self.assertLess(max(reply_times), 3)

    def test_layout_is_read_and_switched(self):
        self.server.post(LAYOUT, {'layout': 'tp', 'stall_budget_ms': 0})
        layout = self.server.get(LAYOUT)
        self.assertEqual((layout['layout'], layout['seam'], layout['layers']), ('tp', 6, 6))
        self.assertEqual((layout['estimate']['layout'], layout['estimate']['fits']), ('ep', True))
        outcome = self.server.post(LAYOUT, {'layout': 'ep'})
        self.assertEqual((outcome['outcome'], outcome['seam']), ('finished', 0))
        self.assertGreaterEqual(outcome['bytes'], outcome['bytes_changed'])
        self.assertEqual(self.server.get(LAYOUT)['last']['to'], 'ep')
        self.assertEqual(self.server.post(LAYOUT, {'layout': 'ep'})['bytes'], 0)
        self.assertEqual(self.server.ask(LAYOUT, {'layout': 'tp', 'wait': False})[0], 202)
        self.server.until('the switch to TP', lambda: self.server.get(LAYOUT)['layout'] == 'tp')
        for body, param in (({'layout': 'pp'}, 'layout'), ({}, 'layout'), ({'layout': 'tp', 'wait': 1}, 'wait'),
                            ({'layout': 'tp', 'to': 1}, 'to'), ({'layout': 'tp', 'stall_budget_ms': 'x'}, 'stall_budget_ms'),
                            ({'layout': 'tp', 'stall_budget_ms': -1}, None)):
            self.refused(400, LAYOUT, body, param)
        history = self.server.get('/v1/moebius/history')
        self.assertEqual([s['to'] for s in history['switches']][-3:], ['ep', 'ep', 'tp'])
        times = [s[0] for s in history['samples']]
        self.assertEqual(times, sorted(times))
        self.assertGreater(len(times), 0)
        self.assertLess(len(self.server.get(f'/v1/moebius/history?since={history["now"]}')['samples']), len(times))
        for sample in history['samples'][-20:]:  # what came after it, not itself
            self.assertNotIn(sample, self.server.get(f'/v1/moebius/history?since={sample[0]}')['samples'])

    def test_every_switch_that_is_asked_for_has_its_own_outcome(self):
        load = self.server.begin({**LONG, 'n': 60, 'stream': False})
        self.server.until('all run', lambda: self.server.metric('num_requests_running') == 60)
        for budget in (0.01, 0):
            self.server.post(LAYOUT, {'layout': 'tp', 'stall_budget_ms': 0})
            begun, got = self.server.get('/v1/moebius/history')['now'], {}

            def ask(name, to, wait=True):
                got[name] = self.server.ask(LAYOUT, {'layout': to, 'wait': wait, 'stall_budget_ms': budget})

            threads = [threading.Thread(target=ask, args=('a', 'ep'))]
            threads[0].start()
            self.server.until('it is under way', lambda: self.server.get(f'/v1/moebius/history?since={begun}')['seam'])
            ask('b', 'tp', wait=False)
            for name, to in (('c', 'ep'), ('d', 'tp'), ('e', 'tp')):
                threads.append(threading.Thread(target=ask, args=(name, to)))
                threads[-1].start()
                time.sleep(0.01)
            for t in threads:
                t.join(20)
                self.assertFalse(t.is_alive(), got)
            self.assertEqual(got['b'][0], 202)
            for name in 'acde':
                status, _, answer = got[name]
                outcome = answer['outcome'] if status == 200 else answer['error']['code']
                allowed = ['finished'] if name in 'de' else ['finished', 'turned']
                self.assertIn(outcome, allowed, got)
            self.assertEqual(self.server.get(LAYOUT)['layout'], 'tp')
        load.close()
        self.server.post(LAYOUT, {'layout': 'tp', 'stall_budget_ms': 0})
        self.server.until('nothing runs', lambda: self.server.metric('num_requests_running') == 0)

    def test_a_post_without_a_length_has_an_empty_body(self):
        with self.server.socket() as s:
            s.settimeout(10)
            s.sendall(f'POST {LAYOUT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\r\n'.encode())
            self.assertIn(b'400', s.recv(4096).split(b'\r\n')[0])

    def test_a_switch_is_turned_round(self):
        load = self.server.begin({**LONG, 'n': 60, 'stream': False})
        self.server.until('all run', lambda: self.server.metric('num_requests_running') == 60)
        for _ in range(20):  # until the second request comes while the first is under way, which a small budget makes slow
            begun, first = self.server.get('/v1/moebius/history')['now'], []
            thread = threading.Thread(target=lambda: first.append(self.server.ask(LAYOUT, {'layout': 'ep', 'stall_budget_ms': 0.01})))
            thread.start()
            self.server.until('it is under way', lambda: self.server.get(f'/v1/moebius/history?since={begun}')['seam'])
            self.assertEqual(self.server.post(LAYOUT, {'layout': 'tp'})['outcome'], 'finished')
            thread.join()
            if first[0][0] != 200:
                break
        self.assertEqual((first[0][0], first[0][2]['error']['code']), (409, 'turned'))
        load.close()
        self.server.post(LAYOUT, {'layout': 'tp', 'stall_budget_ms': 0})
        self.server.until('nothing runs', lambda: self.server.metric('num_requests_running') == 0)

    def aborts(self):
        return self.server.metric('request_success_total', finished_reason='abort')

    def test_clients_that_vanish_are_cancelled(self):
        for body in (LONG, {**LONG, 'stream': False}):
            with self.subTest(stream=body['stream']):
                before, sockets = self.aborts(), [self.server.begin(body) for _ in range(3)]
                self.server.until('they run', lambda: self.server.metric('num_requests_running') == 24)
                for s in sockets:
                    s.close()
                self.server.until('their requests are cancelled', lambda: self.aborts() == before + 24, 3)
                self.server.until('nothing runs', lambda: self.server.metric('num_requests_running') == 0, 3)
        self.assertEqual(self.server.metric('http_streams_open'), 0)
        self.assertGreaterEqual(self.server.metric('http_clients_gone_total'), 6)

    def test_a_stream_that_waits_is_kept_alive(self):
        running = self.server.begin({**LONG, 'n': 64, 'stream': False})
        self.server.until('all run', lambda: self.server.metric('num_requests_running') == 64)
        waiting, came = self.server.begin({**GREEDY, 'stream': True}), b''
        while b': waiting\n' not in came:
            part = waiting.recv(4096)
            self.assertTrue(part)
            came += part
        self.assertNotIn(b'data:', came)
        for s in (running, waiting):
            s.close()
        for state in ('running', 'waiting'):
            self.server.until(f'nothing is {state}', lambda: self.server.metric(f'num_requests_{state}') == 0)

    def test_slow_readers_are_let_go_and_hold_up_nobody(self):
        before, gone = self.aborts(), self.server.metric('http_clients_gone_total')
        slow = self.server.begin({**LONG, 'n': 60, 'logprobs': 20}, receive_buffer=4096)
        self.server.until('it runs', lambda: self.server.metric('num_requests_running') == 60)
        self.assertEqual(self.server.post(TEXT, GREEDY)['choices'][0]['text'], self.text)
        self.server.until('it is cancelled', lambda: self.aborts() == before + 60, 6)
        self.server.until('it is counted', lambda: self.server.metric('http_clients_gone_total') == gone + 1)
        slow.close()

    def test_the_page_needs_nothing_but_this_server(self):
        status, headers, page = self.server.ask('/')
        self.assertEqual(status, 200)
        self.assertIn("connect-src 'self'", headers['Content-Security-Policy'])
        self.assertEqual(re.findall(r'(?:https?:)?//[a-z0-9.-]+\.[a-z]+', page), [])
        self.assertEqual(self.server.ask('/', method='HEAD')[2], '')


class Limits(unittest.TestCase):
    def test_key_queue_connections_and_refused_switches(self):
        with tempfile.NamedTemporaryFile('w') as key:
            key.write('secret\n')
            key.flush()
            with Server(PROGRAM, MODEL, '--ranks', 2, '--threads', 1, '--max-batch', 3, '--max-waiting', 2, '--page-tokens', 1024,
                        '--kv-tokens', 6144, '--prefix-cache', 0, '--api-key-file', key.name, '--served-model-name', 'mine') as server:
                self.keys(server)
                self.queue_and_switch(server)
                self.connections(server)
                second = subprocess.run([PROGRAM, '--model', MODEL, '--port', str(server.port)], capture_output=True, text=True, timeout=30)
                self.assertEqual((second.returncode, second.stdout), (2, ''))
                self.assertEqual(server.stop(), 0)

    def keys(self, server):
        for wrong in ('', 'Bearer', 'Bearer secre', 'Bearer secrets', 'Bearer Secret', 'secret'):
            header = {'Authorization': wrong} if wrong else {}
            for path, body in (('/v1/models', None), (TEXT, GREEDY), (LAYOUT, {'layout': 'tp'})):
                status, headers, answer = server.ask(path, body, header)
                self.assertEqual((status, answer['error']['code'], headers['WWW-Authenticate']), (401, 'invalid_api_key', 'Bearer'))
        self.assertEqual(server.ask('/v1/models', headers={'Authorization': 'bearer secret'})[0], 200)
        JSON['Authorization'] = 'Bearer secret'
        self.addCleanup(JSON.pop, 'Authorization', None)
        self.assertEqual(server.ask('/v1/models', headers=JSON)[2]['data'][0]['id'], 'mine')
        self.assertEqual(server.ask('/health')[0], 200)
        status, _, answer = server.ask(CHAT, {'messages': [{'role': 'user', 'content': 'x'}]})
        self.assertEqual((status, answer['error']['code']), (400, 'no_chat_template'))
        self.assertIn('--chat-template', answer['error']['message'])

    def queue_and_switch(self, server):
        status, _, answer = server.ask(TEXT, {**GREEDY, 'n': 3})  # would never be taken
        self.assertEqual((status, answer['error']['param']), (400, 'n'))
        # Two pages for each of three, and three pages a rank in EP: the third finds no home.
        long = {'prompt': [i % 1000 + 1 for i in range(1030)], 'max_tokens': 1000, 'ignore_eos': True}
        streams = [server.stream(TEXT, long) for _ in range(3)]
        for s in streams:
            next(s)
        waiting = [server.connect() for _ in range(2)]
        for connection in waiting:
            connection.request('POST', TEXT, json.dumps(GREEDY), JSON)
        server.until('two wait', lambda: server.metric('num_requests_waiting') == 2)
        status, headers, answer = server.ask(TEXT, GREEDY)
        self.assertEqual((status, answer['error']['code'], headers['Retry-After']), (429, 'queue_full', '1'))
        status, _, answer = server.ask(LAYOUT, {'layout': 'ep'})
        self.assertEqual((status, answer['error']['code']), (409, 'refused'))
        self.assertIn('tokens short', answer['error']['message'])
        for s in streams:
            s.close()
        for connection in waiting:
            self.assertEqual(connection.getresponse().status, 200)
            connection.close()

    def connections(self, server):
        server.until('the other connections are closed', lambda: server.metric('http_connections_open') <= 1)
        idle = [server.socket() for _ in range(37)]  # 3 + 2 and a reserve of 32
        begun = time.monotonic()
        status, headers, answer = server.ask('/health')
        self.assertEqual((status, headers['Retry-After'], answer['error']['code']), (503, '1', 'no_connection'))
        self.assertLess(time.monotonic() - begun, 1)
        for s in idle:
            s.close()
        server.until('it answers again', lambda: server.ask('/health')[0] == 200)


class Models(unittest.TestCase):
    MESSAGES = [{'role': role, 'content': text} for role, text in (('system', 'S'), ('user', 'U'), ('assistant', 'A'), ('user', 'V'))]

    def folder(self, files):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        for name in os.listdir(MODEL):
            if name != 'tokenizer_config.json':
                os.symlink(os.path.abspath(os.path.join(MODEL, name)), os.path.join(folder.name, name))
        for name, text in files.items():
            with open(os.path.join(folder.name, name), 'w') as file:
                file.write(text)
        return folder.name

    def chat(self, server, messages=MESSAGES):
        return server.ask(CHAT, {'messages': messages, 'max_tokens': 8, 'temperature': 0})

    def assert_prompt(self, server, text):
        want = server.post(TEXT, {'prompt': text, 'max_tokens': 8, 'temperature': 0, 'add_special_tokens': False})
        status, _, answer = self.chat(server)
        self.assertEqual(status, 200, answer)
        self.assertEqual((answer['choices'][0]['message']['content'], answer['usage']), (want['choices'][0]['text'], want['usage']))

    def test_templates_are_recognised(self):
        turns = (f'<|im_start|>{m["role"]}\n{m["content"]}<|im_end|>\n' for m in self.MESSAGES)
        chatml = ''.join(turns) + '<|im_start|>assistant\n'
        with Server(PROGRAM, self.folder({'chat_template.jinja': "{{ '<|im_start|>' + role }}"}), '--threads', 1) as server:
            self.assert_prompt(server, chatml)
        templates = [{'name': 'default', 'template': '[INST] {{ m }} [/INST]'}]
        config = {'bos_token': {'content': '<s>'}, 'eos_token': '</s>', 'chat_template': templates}
        with Server(PROGRAM, self.folder({'tokenizer_config.json': json.dumps(config)}), '--threads', 1) as server:
            self.assert_prompt(server, '<s> [INST] S\n\nU [/INST] A</s> [INST] V [/INST]')
            for wrong in (self.MESSAGES[2:], self.MESSAGES[1:3], self.MESSAGES[1:2] * 2):
                self.assertEqual(self.chat(server, wrong)[0], 400)
        with Server(PROGRAM, self.folder({'chat_template.jinja': '{{ other }}'}), '--threads', 1) as server:
            self.assertIn('does not know', self.chat(server)[2]['error']['message'])
        command = [PROGRAM, '--model', self.folder({'tokenizer_config.json': '{'}), '--port', '0']
        broken = subprocess.run(command, capture_output=True, text=True, timeout=30)
        self.assertEqual((broken.returncode, broken.stdout), (2, ''))

    def test_a_policy_switches(self):
        with Server(PROGRAM, MODEL, '--ranks', 2, '--threads', 1, '--policy', 'threshold', '--policy-variant', 'rollout',
                    '--policy-threshold', 4, '--policy-cooldown-s', 0) as server:
            self.assertEqual(server.get(LAYOUT)['layout'], 'tp')
            load = server.begin(LONG)
            server.until('the policy goes to EP', lambda: server.get(LAYOUT)['layout'] == 'ep')
            load.close()
            server.until('and back', lambda: server.get(LAYOUT)['layout'] == 'tp')
            self.assertIn('decided', [s['what'] for s in server.get('/v1/moebius/history')['switches']])


class Draining(unittest.TestCase):
    def test_running_requests_end_and_then_the_server_does(self):
        with Server(PROGRAM, MODEL, '--threads', 1, '--max-batch', 4) as server:
            idle = server.connect()
            idle.request('GET', '/health')
            idle.getresponse().read()
            stream = server.stream(TEXT, {**GREEDY, 'max_tokens': 1900, 'n': 4})  # more than fits the sockets: it cannot end unread
            next(stream)
            server.signal()
            server.until('it drains', lambda: server.ask('/health')[2] == {'status': 'draining'}, 2)
            self.assertEqual(server.ask(TEXT, GREEDY)[0], 503)
            self.assertEqual(list(stream)[-1]['choices'][0]['finish_reason'], 'length')
            begun = time.monotonic()
            self.assertEqual(server.stop(), 0)
            self.assertLess(time.monotonic() - begun, 2)  # a connection that is kept alive does not hold it up
            idle.close()

    def test_what_does_not_end_in_time_is_told(self):
        with Server(PROGRAM, MODEL, '--threads', 1, '--max-batch', 64, '--request-timeout-s', 0.5, '--drain-s', 0.1) as server:
            long = {**LONG, 'n': 64}
            timed_out = list(server.stream(TEXT, long))
            self.assertEqual(timed_out[-1]['error']['code'], 'timeout')
            status, _, answer = server.ask(TEXT, {**long, 'stream': False})
            self.assertEqual((status, answer['error']['code']), (504, 'timeout'))
            stream = server.stream(TEXT, long)
            next(stream)
            server.signal()
            self.assertEqual(list(stream)[-1]['error']['code'], 'draining')
            self.assertEqual(server.stop(), 0)


    def test_a_client_that_reads_slowly_holds_nothing_up(self):
        with Server(PROGRAM, MODEL, '--threads', 1, '--max-batch', 16, '--request-timeout-s', 60, '--drain-s', 0.1) as server:
            slow = server.begin({**LONG, 'n': 16, 'logprobs': 20, 'stream': True}, receive_buffer=4096)
            server.until('it runs', lambda: server.metric('num_requests_running') == 16)
            reads = True

            def read():
                slow.settimeout(1)
                try:
                    while reads and slow.recv(500):
                        time.sleep(0.05)
                except OSError:
                    pass
            reader = threading.Thread(target=read)
            reader.start()
            time.sleep(1)
            begun = time.monotonic()
            self.assertEqual(server.stop(), 0)
            self.assertLess(time.monotonic() - begun, 6)  # with what waits for it, it would take minutes
            reads = False
            reader.join()


class Program(unittest.TestCase):
    def test_bad_usage_is_said_before_anything_runs(self):
        with socket.socket() as taken:
            taken.bind(('127.0.0.1', 0))
            taken.listen()
            port = taken.getsockname()[1]
            for flags, text in (('', '--model'), ('--model /no/such --port 0', '/no/such'), ('--port 99999', '--port'),
                                (f'--port {port}', f'port {port}'),
                                ('--port 0 --api-key-file /no/such', '/no/such'), ('--port 0 --max-waiting 5000', '--max-waiting'),
                                ('--port 0 --api-key=', 'key'), ('--port 0 --max-body-bytes 9223372036854775807', '2^60'),
                                ('--chat-template x', '--chat-template'), ('--port 0 --ranks 5', '5'), ('--max-queue 5', '--max-queue')):
                model = [] if not flags or '--model' in flags else ['--model', MODEL]
                run = subprocess.run([PROGRAM, *model, *flags.split()], capture_output=True, text=True, timeout=30)
                self.assertEqual((run.returncode, run.stdout), (2, ''), run.stderr)
                self.assertIn(text, run.stderr)
        self.assertEqual(subprocess.run([PROGRAM, '--help'], capture_output=True, timeout=30).returncode, 0)

    def test_a_signal_during_the_load_ends_it(self):
        def with_a_signal_waiting():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            os.kill(os.getpid(), signal.SIGTERM)

        run = subprocess.run([PROGRAM, '--model', MODEL, '--port', '0'], preexec_fn=with_a_signal_waiting, capture_output=True, text=True,
                             timeout=30)
        self.assertEqual((run.returncode, run.stdout), (0, ''), run.stderr)
        self.assertIn('stopped while loading', run.stderr)


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]], verbosity=1)
