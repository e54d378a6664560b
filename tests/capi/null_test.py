"""usage: null_test.py ABI_JSON LIBRARY MODEL_FOLDER: every function of the ABI with each pointer NULL in turn and with wrong sizes.

The functions are those of moebius_abi.json: a new one is called without a word here, unless it takes a parameter that nothing below has a
value for, or allows a NULL. The calls run in a process of their own, which names each first: the last name is the one that crashed.
"""
import ctypes
import json
import pathlib
import subprocess
import sys
from ctypes import addressof, byref, c_char, c_double, c_float, c_int16, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

ABI, LIBRARY, MODEL = json.loads(pathlib.Path(sys.argv[1]).read_text()), sys.argv[2], pathlib.Path(sys.argv[3])
OK, INVALID_ARGUMENT, UNSUPPORTED, INTERNAL = 0, -1, -4, -14
FILL, TAIL, ROOM, STRUCTS = 0xA5, 64, 65536, 256

SCALARS = {'int16_t': c_int16, 'int32_t': c_int32, 'int64_t': c_int64, 'uint32_t': c_uint32, 'uint64_t': c_uint64, 'size_t': c_size_t,
           'float': c_float, 'double': c_double}
HANDLES = {name for name, t in ABI['types'].items() if t['type'].startswith('struct ')}
CALLBACKS = {name for name, t in ABI['types'].items() if '(*)' in t['type']}

# A good value for each parameter that its type does not give, by name or by function and name.
VALUES = {
    'status': 0, 'index': 0, 'id': 1, 'sample': 0, 'seam': 1, 'to': 1, 'token': 7, 'bias': 1.0, 'rank': 0,
    'layer': 0, 'layout': 0, 'ms': 0.0, 'timeout_ms': 0.0, 'value': 1,
    'add_special_tokens': 1, 'skip_special_tokens': 1, 'user_data': 1, 'model_dir': bytes(MODEL), 'text': b'ROMEO:', 'num_bytes': 6,
    'num': 2, 'num_tokens': 3, 'num_ids': 3, 'num_pairs': 1, 'num_dims': 2, 'dtype': b'BF16', 'capacity': ROOM, 'name': b'moebius_event', 'file_name': b'a.json', 'data': b'{}', 'size': 2,
    ('moebius_config_set_i64', 'key'): b'seed',
    ('moebius_config_set_f64', 'key'): b'stall_budget_ms',
    ('moebius_config_set_str', 'key'): b'layout',
    ('moebius_config_set_str', 'value'): b'ep',
    ('moebius_config_set_handles', 'key'): b'streams',
    ('moebius_request_set_i64', 'key'): b'max_tokens',
    ('moebius_request_set_f64', 'key'): b'temperature',
    ('moebius_request_set_str', 'key'): b'id',
    ('moebius_request_set_str', 'value'): b'name',
    ('moebius_request_set_ids', 'key'): b'stop_token_ids',
}
CALLBACK = ctypes.CFUNCTYPE(c_int64)(lambda: -1)  # for all types: the arguments are in registers, and nothing calls it
# Fields of structs that the library reads; the others are 0.
FIELDS = {
    'moebius_plan_spec': {'num_layers': 2, 'num_heads': 4, 'num_kv_heads': 2, 'num_experts': 4, 'slices_per_expert': 4, 'attention_bytes': 64,
                          'kv_projection_bytes': 64, 'expert_slice_bytes': 64, 'dense_slice_bytes': 64, 'kv_slice_bytes': 64, 'tp_pages': 4,
                          'ep_pages': 4},
}
# Where the header allows a NULL; `err` and `user` may be NULL everywhere.
MAY_BE_NULL = {
    'moebius_version': {'major', 'minor', 'patch'},
    'moebius_config_set_progress': {'fn'},
    'moebius_config_set_log': {'fn'},
    'moebius_config_set_thread_hook': {'fn'},
    'moebius_config_key': {'out_name', 'out_type', 'out_default', 'out_doc', 'out_stability'},
    'moebius_engine_create': {'config'},
    'moebius_engine_create_from': {'config'},
    'moebius_engine_submit': {'out_id'},
    'moebius_engine_step': {'out_result'},
    'moebius_engine_metrics_text': {'out_needed'},
    'moebius_engine_take_logits': {'out_logits', 'out_count'},
    'moebius_engine_take_routes': {'out_experts', 'out_count'},
    'moebius_plan_create': {'config'},
    'moebius_plan_slices': {'out_count'},
    'moebius_plan_copies': {'out_count'},
    'moebius_tokenizer_encode': {'out_count'},
    'moebius_tokenizer_decode': {'out_bytes'},
    'moebius_decoder_push': {'out_text', 'out_bytes'},
    'moebius_decoder_finish': {'out_text', 'out_bytes'},
}
# What is asked of the engine may be impossible as things are (an unknown request), though every argument is good.
GOOD = {c['value'] for name, c in ABI['constants'].items() if name == 'MOEBIUS_OK' or name.startswith('MOEBIUS_E_')}
GOOD -= {INVALID_ARGUMENT, INTERNAL}
UNDONE_BY = {'moebius_engine_start': 'moebius_engine_stop'}  # called after the good call, so that the next ones find the engine as before

FILES = {name: (MODEL / name).read_bytes() for name in ('config.json', 'model.safetensors', 'tokenizer.json')}

SIZED = {name for name, s in ABI['structs'].items() if 'struct_size' in s['fields']}  # the others never grow
MEMORY = ctypes.create_string_buffer(1 << 20)  # for copies between arenas

library = ctypes.CDLL(LIBRARY)
live = {}  # handles that every call shares; of other kinds each gets its own


class Failed(Exception):
    pass


def resolve(kind):
    return ABI['types'][kind]['type'] if kind in ABI['types'] and kind not in HANDLES | CALLBACKS else kind


def pointee(kind):
    """What a pointer points to, without const; None for what is none."""
    kind = resolve(kind)
    if kind in CALLBACKS:
        return 'callback'
    return kind[:kind.rindex('*')].replace('const', '').strip() if '*' in kind else None


def is_output(kind):
    """Whether the library writes to what the pointer points to."""
    inner = resolve(kind)[:-1].strip()
    return pointee(kind) not in HANDLES | {None, 'callback', 'void'} and not inner.endswith('const') and not (
        inner.startswith('const') and '*' not in inner)


def first_size(struct):
    """What the struct had in the version that it came with."""
    struct = ABI['structs'][struct]
    return max(f['offset'] + f['size'] for f in struct['fields'].values() if f['since'] == struct['since'])


class Call:
    """A call with good arguments, of which some are then changed."""

    def __init__(self, function):
        self.function, self.parameters = function, ABI['functions'][function]['parameters']
        self.values = {name: self.good(name, kind) for name, kind in self.parameters.items()}

    def table(self, name):
        for key in ((self.function, name), name):
            if key in VALUES:
                return VALUES[key]
        sys.exit(f'null_test.py has no value for the parameter {name} of {self.function}: give VALUES one')

    def good(self, name, kind):
        base, inner = pointee(kind), (pointee(kind) or '').rstrip(' *')
        if name == 'stride':
            return ABI['structs'][self.struct_array()]['size']
        if name == 'capacity' and self.struct_array():
            return STRUCTS
        if base is None:
            return self.table(name)
        if base in HANDLES:
            return live[base] if base in live else fresh(base)
        if base == 'callback':
            return CALLBACK
        if name == 'user':
            return None
        if base in SIZED and not self.struct_array():
            return self.struct(base, ABI['structs'][base]['size'], 0)
        if is_output(kind):
            return self.output(ROOM * 8)
        if inner in HANDLES:
            return (c_void_p * VALUES['num'])(*(fresh(inner).value for _ in range(VALUES['num'])))
        if inner == 'void' and base != 'void':
            return (c_void_p * VALUES['num'])(*[addressof(MEMORY) + 64 & ~63] * VALUES['num'])
        return ctypes.create_string_buffer(self.table(name) if base in ('char', 'void') else bytes(256))

    def struct_array(self):
        """The struct of an array that goes by stride, if there is one."""
        structs = [pointee(k) for k in self.parameters.values() if pointee(k) in SIZED]
        return structs[0] if 'stride' in self.parameters else None

    def output(self, size):
        buffer = (c_char * size)()
        ctypes.memset(buffer, FILL, size)
        return buffer

    def struct(self, name, struct_size, tail):
        """A struct of zeros that says it has struct_size; what is behind the one that the library knows ends with `tail`."""
        size = max(struct_size, ABI['structs'][name]['size'])
        buffer = (c_char * (size + TAIL))()
        ctypes.memset(addressof(buffer) + struct_size, FILL, size + TAIL - struct_size)
        c_uint32.from_buffer(buffer).value = struct_size
        for field, value in FIELDS.get(name, {}).items():
            f = ABI['structs'][name]['fields'][field]
            SCALARS[f['type']].from_buffer(buffer, f['offset']).value = value
        if tail:
            buffer[struct_size - 1] = tail
        return buffer

    def run(self, label, allowed, null=None):
        """Calls; the status must be allowed, and a failure must leave every output as it was."""
        print(f'{self.function}: {label}', flush=True)
        entry, returns = getattr(library, self.function), resolve(ABI['functions'][self.function]['returns'])
        entry.restype = None if returns == 'void' else c_void_p if '*' in returns else SCALARS[returns]
        error, arguments = c_void_p(), []
        for name, kind in self.parameters.items():
            value = self.values[name]
            if kind == 'moebius_error **' and value is not None:
                arguments.append(c_void_p(addressof(error)))
            elif pointee(kind) is not None:
                arguments.append(value if isinstance(value, c_void_p) else ctypes.cast(value, c_void_p))
            else:
                arguments.append(SCALARS[resolve(kind)](value))
        outputs = {n: v for n, v in self.values.items() if isinstance(v, ctypes.Array) and is_output(self.parameters[n]) and n != 'err'}
        before = {n: v.raw for n, v in outputs.items()}
        status = entry(*arguments)
        if self.parameters.get('err') != 'moebius_error **':  # it cannot fail
            return OK
        text = said(error)
        if status not in allowed:
            raise Failed(f'status {status} ({text}), not one of {sorted(allowed)}')
        if status == INVALID_ARGUMENT and null is not None and not (null in text and text.endswith('NULL')):
            raise Failed(f"the error says '{text}', which does not name {null}")
        for name, was in before.items():
            if status != OK and resolve(pointee(self.parameters[name])) != 'size_t' and outputs[name].raw != was:
                raise Failed(f'it failed with {status} ({text}) and wrote to {name}')
        return status

    def written_behind(self, name, num_bytes):
        return any(b != FILL for b in self.values[name].raw[num_bytes:])


def said(error):
    if not error:
        return ''
    library.moebius_error_message.restype = ctypes.c_char_p
    text = library.moebius_error_message(error).decode()
    library.moebius_error_destroy(error)
    return text


def fresh(handle):
    """A handle of its own, by the function that makes such."""
    if handle == 'moebius_error':
        error = c_void_p()
        library.moebius_config_create(None, byref(error))
        return error
    maker = next(f for f, v in ABI['functions'].items() if f'{handle} **' in v['parameters'].values())
    call = Call(maker)
    call.run('to have one', {OK})
    made = c_void_p.from_buffer(next(call.values[n] for n, kind in call.parameters.items() if kind == f'{handle} **'))
    if handle == 'moebius_config':  # of which engines are made
        for key, value in (('ranks', 2), ('threads', 1), ('kv_tokens', 1024)):
            library.moebius_config_set_i64(made, key.encode(), c_int64(value), None)
    if handle == 'moebius_source':
        for name, data in FILES.items():
            library.moebius_source_add_memory(made, name.encode(), data, c_size_t(len(data)), None)
    if handle == 'moebius_request':
        library.moebius_request_set_prompt(made, (c_int32 * 3)(5, 6, 7), c_size_t(3), None)
        for key in (b'keep_logits', b'routed_experts'):
            library.moebius_request_set_i64(made, key, c_int64(1), None)
    return c_void_p(made.value)


def release(call):
    """Destroys what a good call made."""
    for name, kind in call.parameters.items():
        handle = pointee(kind)[:-1].strip() if '**' in kind else None
        if handle in HANDLES - {'moebius_error'} and call.values[name] is not None:
            getattr(library, f'{handle}_destroy')(c_void_p.from_buffer(call.values[name]))


def may_be_null(function, name):
    return name in ('err', 'user') or name in MAY_BE_NULL.get(function, ())


def with_null(function):
    for name, kind in ABI['functions'][function]['parameters'].items():
        if pointee(kind) is None:
            continue
        call = Call(function)
        call.values[name] = None
        allowed = GOOD if may_be_null(function, name) else {INVALID_ARGUMENT}
        if call.run(f'{name} is NULL', allowed, null=name) == OK:
            release(call)
            undo(function)


def undo(function):
    if function in UNDONE_BY:
        Call(UNDONE_BY[function]).run(f'after {function}', {OK})


def with_wrong_structs(function):
    for name, kind in ABI['functions'][function]['parameters'].items():
        struct = pointee(kind)
        if struct not in SIZED:
            continue
        if 'stride' in ABI['functions'][function]['parameters']:
            for stride in (0, first_size(struct) - 1):
                call = Call(function)
                call.values['stride'] = stride
                call.run(f'stride is {stride}', {INVALID_ARGUMENT})
            call = Call(function)
            call.values['stride'] += TAIL
            call.run('stride of a later version', {OK})
            continue
        known, first = ABI['structs'][struct]['size'], first_size(struct)
        for size, tail, allowed in ((0, 0, {INVALID_ARGUMENT}), (first - 1, 0, {INVALID_ARGUMENT}), (first, 0, {OK}), (known, 0, {OK}),
                                    (known + TAIL, 0, {OK}), (known + TAIL, 1, {UNSUPPORTED})):
            call = Call(function)
            call.values[name] = call.struct(struct, size, tail)
            call.run(f'{struct} of {size} bytes, {tail} behind', allowed)
            if allowed == {OK} and call.written_behind(name, size):
                raise Failed(f'it wrote behind the {size} bytes of {struct}')


def with_wrong_sizes(function):
    parameters = ABI['functions'][function]['parameters']
    names = list(parameters)
    for i, name in enumerate(names):
        if i == 0 or parameters[name] != 'size_t' or pointee(parameters[names[i - 1]]) is None:
            continue
        array = names[i - 1]
        call = Call(function)
        call.values[name], call.values[array] = 0, None
        call.run(f'{array} is NULL and {name} 0', GOOD | {INVALID_ARGUMENT})
        if name != 'capacity':
            continue
        for capacity in (0, 1):
            call = Call(function)
            call.values[name] = capacity
            call.run(f'capacity is {capacity}', GOOD | {INVALID_ARGUMENT})
            element = pointee(parameters[array])
            size = call.values['stride'] if call.struct_array() else ctypes.sizeof(SCALARS.get(element, c_char))
            if call.written_behind(array, capacity * size):
                raise Failed(f'it wrote behind {capacity} elements of {array}')


def with_all_good(function):
    call = Call(function)
    status = call.run('as meant', GOOD)
    if status == OK:
        release(call)
        undo(function)


def child():
    for handle in ('moebius_engine', 'moebius_tokenizer', 'moebius_decoder'):
        live[handle] = fresh(handle)
    for function in ('moebius_engine_submit', 'moebius_engine_step'):  # request 1, whose first logits can be taken
        Call(function).run('first of all', {OK})
    for function in ABI['functions']:
        for tries in (with_null, with_wrong_structs, with_wrong_sizes, with_all_good):
            if tries is with_all_good and function.endswith('_destroy'):
                continue
            try:
                tries(function)
            except Failed as failed:
                print(f'FAILED {function}: {failed}', flush=True)
    for handle in ('moebius_decoder', 'moebius_tokenizer', 'moebius_engine'):
        getattr(library, f'{handle}_destroy')(live[handle])


def main():
    run = subprocess.run([sys.executable, __file__, *sys.argv[1:4], 'child'], stdout=subprocess.PIPE, text=True)
    lines = run.stdout.splitlines()
    failed = False
    for i, line in enumerate(lines):
        if line.startswith('FAILED'):
            failed = True
            print(f'{lines[i - 1]}\n  {line}')
    if run.returncode != 0:
        print(f'ended with {run.returncode} in: {lines[-1] if lines else "the beginning"}')
    print(f'{len(lines)} calls of {len(ABI["functions"])} functions')
    return 1 if failed or run.returncode != 0 else 0


if __name__ == '__main__':
    sys.exit(child() if len(sys.argv) > 4 else main())
