"""moebius-serve through OpenAI's own client. Exits 77 where the module openai is not installed.
usage: openai_test.py PROGRAM MODEL_FOLDER"""
import asyncio
import sys
import unittest

try:
    import openai
except ImportError:
    print('skipped: the Python module openai is not installed')
    sys.exit(77)

from harness import Server

MODEL = 'shakespeare-moe'
MESSAGES = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Who art thou?'}]


class Client(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server(*sys.argv[1:3], '--ranks', 2, '--threads', 1, '--chat-template', 'plain', '--api-key', 'secret')
        cls.client = openai.OpenAI(base_url=cls.server.url + '/v1', api_key='secret', max_retries=0)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        if cls.server.stop() != 0:
            raise AssertionError('the server did not end well')

    def test_models(self):
        self.assertEqual([m.id for m in self.client.models.list()], [MODEL])
        self.assertEqual(self.client.models.retrieve(MODEL).owned_by, 'moebius')

    def test_completions(self):
        keys = dict(model=MODEL, prompt=['ROMEO:\n', 'JULIET:\n'], max_tokens=20, temperature=0.8, seed=3, n=2, logprobs=2)
        whole = self.client.completions.create(**keys)
        self.assertEqual([c.index for c in whole.choices], [0, 1, 2, 3])
        self.assertEqual(len(whole.choices[0].logprobs.tokens), len(whole.choices[0].logprobs.token_logprobs))
        chunks = list(self.client.completions.create(**keys, stream=True, stream_options={'include_usage': True}))
        for i in range(4):
            self.assertEqual(''.join(c.text for chunk in chunks for c in chunk.choices if c.index == i), whole.choices[i].text)
        self.assertEqual(chunks[-1].usage, whole.usage)

    def test_chats(self):
        keys = dict(model=MODEL, messages=MESSAGES, max_tokens=20, seed=5, extra_body={'ignore_eos': True, 'top_k': 20})
        whole = self.client.chat.completions.create(**keys, logprobs=True, top_logprobs=2)
        self.assertEqual(whole.choices[0].message.role, 'assistant')
        self.assertEqual(len(whole.choices[0].logprobs.content), whole.usage.completion_tokens)
        self.assertEqual(len(whole.choices[0].logprobs.content[0].top_logprobs), 2)
        stream = self.client.chat.completions.create(**keys, stream=True)
        self.assertEqual(''.join(c.choices[0].delta.content or '' for c in stream), whole.choices[0].message.content)
        with self.client.chat.completions.stream(**keys) as events:
            self.assertEqual(''.join(e.delta for e in events if e.type == 'content.delta'), whole.choices[0].message.content)

    def test_a_stream_that_is_closed_is_cancelled(self):
        keys = dict(model=MODEL, prompt='ROMEO:', max_tokens=1900, n=32, extra_body={'ignore_eos': True})
        stream = self.client.completions.create(**keys, stream=True)
        next(iter(stream))
        stream.close()
        aborts = lambda: self.server.metric('request_success_total', finished_reason='abort')  # noqa: E731
        self.server.until('its requests are cancelled', lambda: aborts() >= 32, 3)

    def test_errors_are_those_of_the_client(self):
        with self.assertRaises(openai.AuthenticationError):
            openai.OpenAI(base_url=self.server.url + '/v1', api_key='other', max_retries=0).models.list()
        with self.assertRaises(openai.NotFoundError) as refused:
            self.client.completions.create(model='gpt-4', prompt='x')
        self.assertEqual(refused.exception.code, 'model_not_found')
        with self.assertRaises(openai.BadRequestError) as refused:
            self.client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[{'type': 'function', 'function': {'name': 'f'}}])
        self.assertEqual(refused.exception.param, 'tools')
        with self.assertRaises(openai.BadRequestError):
            self.client.completions.create(model=MODEL, prompt='x', temperature=-1)

    def test_64_at_once(self):
        async def all_of_them():
            async with openai.AsyncOpenAI(base_url=self.server.url + '/v1', api_key='secret', max_retries=0) as client:
                async def one(i):
                    stream = await client.completions.create(model=MODEL, prompt=f'What {i}', max_tokens=40, seed=i, stream=True)
                    return ''.join([c.choices[0].text async for c in stream])
                return await asyncio.gather(*map(one, range(64)))
        texts = asyncio.run(all_of_them())
        for i in (0, 20, 63):
            alone = self.client.completions.create(model=MODEL, prompt=f'What {i}', max_tokens=40, seed=i)
            self.assertEqual(texts[i], alone.choices[0].text)


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1], verbosity=1)
