"""The Python binding: what it streams, cancels, switches and refuses. usage: python_test.py PYTHON_FOLDER MODEL_FOLDER ABI_JSON"""
import ctypes
import json
import pathlib
import subprocess
import sys
import threading
import unittest

FOLDER, MODEL, ABI = *sys.argv[1:3], json.load(open(sys.argv[3]))
sys.path.insert(0, FOLDER)
import moebius  # noqa: E402


def engine(**config):
    return moebius.Engine(MODEL, **{'ranks': 2, 'threads': 1, 'kv_tokens': 4096, 'max_batch': 8, 'policy': 'manual', **config})


class Binding(unittest.TestCase):
    def test_structs_and_functions_are_those_of_the_library(self):
        structs = {name: s for name, s in vars(moebius).items() if isinstance(s, type) and issubclass(s, ctypes.Structure)}
        self.assertIn('_Event', structs)
        for name, python in structs.items():
            c = ABI['structs']['moebius' + ''.join('_' + p.lower() if p.isupper() else p for p in name[1:])]
            at = {f.rstrip('_'): (getattr(python, f).offset, getattr(python, f).size) for f, _ in python._fields_}
            self.assertEqual(at, {f: (v['offset'], v['size']) for f, v in c['fields'].items()})
            self.assertEqual(ctypes.sizeof(python), c['size'])
        for name, parameters in moebius._FALLIBLE.items():
            self.assertEqual(len(parameters) + 1, len(ABI['functions']['moebius_' + name]['parameters']), name)

    def test_streams_of_threads_are_those_of_one_request_alone_through_switches(self):
        tokenizer = moebius.Tokenizer(MODEL)
        prompts = ['ROMEO:', 'First Citizen:\n', 'What']
        keys = dict(max_tokens=40, temperature=0, ignore_eos=True)
        with engine() as e:
            alone = [[t.id for t in e.submit(tokenizer.encode(p), **keys)] for p in prompts]
            requests = [e.submit(tokenizer.encode(p), **keys) for p in prompts]
            texts, got = {}, {}

            def read(i):
                tokens = list(requests[i])
                got[i] = [t.id for t in tokens]
                texts[i] = ''.join(tokenizer.stream(tokens))

            threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
            for t in threads:
                t.start()
            for layout in (moebius.EP, moebius.TP):
                switch = e.switch(layout, timeout=30)
                self.assertEqual((switch.outcome, switch.layout), ('finished', layout))
            for t in threads:
                t.join()
            self.assertEqual([got[i] for i in range(3)], alone)
            for i in range(3):
                self.assertEqual(len(got[i]), 40)
                self.assertEqual(texts[i], tokenizer.decode(got[i]))
                self.assertEqual(requests[i].finish_reason, 'length')
            self.assertGreaterEqual(e.stats()['switches'], 2)
            self.assertIn('moebius', e.metrics_text())

    def test_samples_logprobs_and_cancel(self):
        with engine() as e:
            tokens = list(e.submit([1, 2, 3], n=2, max_tokens=5, seed=7, ignore_eos=True, logprobs=3))
            self.assertEqual(sorted(t.sample for t in tokens), [0] * 5 + [1] * 5)
            self.assertTrue(all(len(t.top) == 3 and t.logprob <= 0 for t in tokens))
            request = e.submit([1, 2, 3], max_tokens=2000, ignore_eos=True)
            next(iter(request))
            self.assertTrue(request.cancel())
            self.assertLess(len(list(request)), 2000)
            self.assertEqual(request.finish_reason, 'abort')
            self.assertFalse(request.cancel())

    def test_a_stop_token_is_no_text(self):
        tokenizer = moebius.Tokenizer(MODEL)
        keys = dict(max_tokens=10, temperature=0, ignore_eos=True)
        with engine() as e:
            ids = [t.id for t in e.submit([1, 2, 3], **keys)]
            stop = next(i for i in range(1, 10) if ids[i] not in ids[:i])
            request = e.submit([1, 2, 3], stop_token_ids=[ids[stop]], **{**keys, 'ignore_eos': False})
            tokens = list(request)
        self.assertEqual([(t.id, t.is_stop) for t in tokens], [(i, False) for i in ids[:stop]] + [(ids[stop], True)])
        self.assertEqual(''.join(tokenizer.stream(tokens)), tokenizer.decode(ids[:stop]))
        self.assertEqual(request.finish_reason, 'stop')

    def test_refusals_say_what_is_wrong(self):
        with self.assertRaisesRegex(moebius.MoebiusError, 'no such directory') as refused:
            moebius.Engine('/no/such')
        self.assertEqual(refused.exception.code, 'NOT_FOUND')
        with self.assertRaisesRegex(moebius.MoebiusError, "'threads'"):
            engine(thread=1)
        with engine() as e:
            with self.assertRaisesRegex(moebius.MoebiusError, 'prompt is empty'):
                e.submit([])
            with self.assertRaises(moebius.MoebiusError):
                e.submit([1], temperature=-1)

    def test_a_load_is_watched_and_cancelled_and_an_exception_comes_through(self):
        seen = []
        with engine(progress=lambda done, total: seen.append((done, total))):
            self.assertEqual(seen[-1][0], seen[-1][1])
        with self.assertRaises(moebius.MoebiusError) as cancelled:
            engine(progress=lambda done, total: False)
        self.assertEqual(cancelled.exception.code, 'CANCELLED')

        def broken(done, total):
            raise KeyError('mine')
        with self.assertRaises(KeyError):
            engine(progress=broken)

    def test_weights_are_updated_from_tensors_a_file_and_a_folder(self):
        data = bytearray(pathlib.Path(MODEL, 'model.safetensors').read_bytes())
        begin = 8 + int.from_bytes(data[:8], 'little')
        data[begin + 1::4] = bytes(b ^ 0x80 for b in data[begin + 1::4])  # signs
        header = json.loads(data[8:begin])
        header.pop('__metadata__', None)
        tensors = {n: (t['dtype'], t['shape'], memoryview(data)[begin + t['data_offsets'][0]:begin + t['data_offsets'][1]])
                   for n, t in header.items()}
        seen = []
        with engine(progress=lambda done, total: seen.append((done, total))) as e:
            def said():
                return list(e.submit([1, 2, 3], max_tokens=8, temperature=0, ignore_eos=True, logprobs=3))
            old = said()
            seen.clear()
            e.update_weights(tensors)
            self.assertEqual(seen[-1][0], seen[-1][1])
            new = said()
            self.assertNotEqual(new, old)
            e.update_weights(MODEL)
            self.assertEqual(said(), old)
            for half in range(2):
                e.update_weights(dict(list(tensors.items())[half::2]), partial=True)
            self.assertEqual(said(), new)
            with self.assertRaisesRegex(moebius.MoebiusError, 'none that the model has'):
                e.update_weights({'misspelt': tensors['model.norm.weight']}, partial=True)
            with self.assertRaises(ValueError):
                e.update_weights(MODEL, partial=True)
            e.update_weights(MODEL)
            e.update_weights({'model.safetensors': bytes(data)})
            self.assertEqual(said(), new)
            with self.assertRaisesRegex(moebius.MoebiusError, 'missing'):
                e.update_weights(dict(list(tensors.items())[1:]))
            request = e.submit([1, 2, 3], max_tokens=2000, ignore_eos=True)
            with self.assertRaises(moebius.MoebiusError) as refused:
                e.update_weights(tensors)
            self.assertEqual(refused.exception.code, 'INVALID_STATE')
            request.cancel()
            self.assertEqual([t.id for t in request][2000:], [])
            self.assertEqual(said(), new)

    def test_closing_ends_whoever_waits(self):
        e = engine()
        request = e.submit([1, 2, 3], max_tokens=2000, ignore_eos=True)
        next(iter(request))
        e.close()
        e.close()
        with self.assertRaisesRegex(moebius.MoebiusError, 'closed'):
            list(request)

    def test_keys_are_listed(self):
        keys = {k.name: k for k in moebius.config_keys()}
        self.assertEqual(keys['ranks'].type, 'i64')
        self.assertTrue(all(k.doc for k in keys.values()))

    def test_the_example(self):
        run = subprocess.run([sys.executable, FOLDER + '/stream.py', MODEL], capture_output=True, text=True, timeout=120)
        self.assertEqual(run.returncode, 0, run.stderr)
        for i in range(3):
            self.assertIn(f'request {i} ended: length', run.stdout)
        self.assertRegex(run.stdout, 'switched to expert parallelism: finished, [0-9]+ bytes')
        bad = subprocess.run([sys.executable, FOLDER + '/stream.py', '/no/such'], capture_output=True, text=True, timeout=60)
        self.assertEqual(bad.returncode, 1)
        self.assertRegex(bad.stderr, 'no such file')


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1], verbosity=1)
