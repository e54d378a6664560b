"""The ABI as facts: what include/moebius/moebius.h declares, read with clang, and the files that repeat it.

    facts.py check               says what differs from the files as they are; exit 1 if anything does
    facts.py write [--break]     rewrites them (scripts/update-abi); refuses what would break callers, unless --break
    facts.py stub                a C file that defines every function: compiled with -g, what abidiff compares
    facts.py suppressions        what abidiff may pass over: fields added behind the end of a struct
"""
import difflib
import json
import keyword
import pathlib
import re
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEADER = ROOT / 'include/moebius/moebius.h'
GOLDEN = ROOT / 'capi/abi/moebius_abi.json'
SYMBOLS = ROOT / 'capi/abi/moebius.symbols'
PYTHON = ROOT / 'examples/python/moebius.py'
RUST = ROOT / 'examples/rust/stream.rs'
RELEASED = ROOT / 'tests/capi/old'  # moebius-VERSION.h as each version had it

CTYPES = {'char': 'c_char', 'float': 'c_float', 'double': 'c_double', 'int16_t': 'c_int16', 'int32_t': 'c_int32', 'int64_t': 'c_int64',
          'uint32_t': 'c_uint32', 'uint64_t': 'c_uint64', 'size_t': 'c_size_t', 'pointer': 'c_void_p'}
RUST_TYPES = {'char': 'c_char', 'float': 'f32', 'double': 'f64', 'int16_t': 'i16', 'int32_t': 'i32', 'int64_t': 'i64', 'uint32_t': 'u32',
              'uint64_t': 'u64', 'size_t': 'usize', 'pointer': '*const c_void'}
RUST_KEYWORDS = {'type', 'match', 'ref', 'move', 'use', 'where', 'in', 'fn', 'mod', 'impl', 'self', 'box', 'loop', 'final', 'priv'}


# ---- reading

def clang(source: str) -> list:
    command = ['clang', '-x', 'c', '-std=c11', '-Xclang', '-ast-dump=json', '-fsyntax-only', '-']
    return json.loads(subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout)['inner']


def evaluate(header: str, expressions: list) -> list:
    """The values of integer constant expressions, as those of enumerators put behind the header."""
    source = header + ''.join(f'\nenum {{ value_{i} = (int)({e}) }};' for i, e in enumerate(expressions))
    found = [c for n in clang(source) if n['kind'] == 'EnumDecl' for c in n['inner'] if c['name'].startswith('value_')]
    return [int(c['inner'][0]['value']) for c in found]


def read(path: pathlib.Path, prior: dict) -> dict:
    """The facts of a header; whatever is in `prior` keeps its `since`, the rest is new in the header's version."""
    header = path.read_text()
    nodes = [n for n in clang(header) if n['kind'] == 'EnumDecl' or n.get('name', '').startswith('moebius_')]
    records = {n['name']: [(f['name'], f['type']['qualType']) for f in n['inner'] if f['kind'] == 'FieldDecl']
               for n in nodes if n['kind'] == 'RecordDecl' and n.get('completeDefinition')}
    constants = [c['name'] for n in nodes if n['kind'] == 'EnumDecl' for c in n['inner'] if c['name'].startswith('MOEBIUS_')]
    asked = ['MOEBIUS_VERSION_MAJOR', 'MOEBIUS_VERSION_MINOR'] + constants
    for record, fields in records.items():
        asked.append(f'sizeof({record})')
        for name, _ in fields:
            asked += [f'offsetof({record}, {name})', f'sizeof((({record} *)0)->{name})']
    values = iter(evaluate(header, asked))
    version = f'{next(values)}.{next(values)}'

    def since(*where) -> str:
        known = prior
        for key in where:
            known = known.get(key, {})
        return known.get('since', version)

    facts = {'version': version, 'types': {}, 'constants': {}, 'structs': {}, 'functions': {}}
    for n in nodes:
        if n['kind'] == 'TypedefDecl' and n['name'] not in records:
            facts['types'][n['name']] = {'type': n['type']['qualType'], 'since': since('types', n['name'])}
    for name in constants:
        facts['constants'][name] = {'value': next(values), 'since': since('constants', name)}
    for record, fields in records.items():
        facts['structs'][record] = {'size': next(values), 'since': since('structs', record), 'fields': {
            name: {'type': kind, 'offset': next(values), 'size': next(values), 'since': since('structs', record, 'fields', name)}
            for name, kind in fields}}
    for n in nodes:
        if n['kind'] == 'FunctionDecl':
            facts['functions'][n['name']] = {
                'returns': n['type']['qualType'].split('(')[0].strip(),
                'parameters': {p['name']: p['type']['qualType'] for p in n.get('inner', []) if p['kind'] == 'ParmVarDecl'},
                'since': since('functions', n['name'])}
    return facts


def struct_breaks(name: str, was: dict, now: dict) -> list:
    """Fields stay where they are; new ones stand behind the end, or where a word was reserved."""
    found, at = [], {f['offset']: (field, f) for field, f in now['fields'].items()}
    for field, f in was['fields'].items():
        there, g = at.pop(f['offset'], ('nothing', {}))
        if (field != there and not field.startswith('reserved')) or any(f[k] != g.get(k) for k in ('type', 'size')):
            found.append(f'{name} had {f["type"]} {field} at {f["offset"]}, has {g.get("type", "")} {there}')
    found += [f'{name}.{field} is new at {offset}, before the end of what was there ({was["size"]})'
              for offset, (field, _) in at.items() if offset < was['size']]
    return found


def breaks(old: dict, new: dict) -> list:
    """What a caller of `old` would miss or misread in `new`."""
    found = []
    for kind in ('types', 'constants', 'functions', 'structs'):
        for name, was in old[kind].items():
            now = new[kind].get(name)
            if now is None:
                found.append(f'{name} is gone')
            elif kind == 'structs':
                found += struct_breaks(name, was, now)
            elif kind == 'functions':
                if (was['returns'], *was['parameters'].values()) != (now['returns'], *now['parameters'].values()):
                    found.append(f'{name} has other parameters or returns another type')
            elif {**was, 'since': ''} != {**now, 'since': ''}:
                found.append(f'{name} was {was}, is {now}')
    return found


# ---- the files that repeat it

def dump(value, depth: int = 0) -> str:
    """JSON with one line for each thing that is a leaf: a field, a function, a constant."""
    pad = '  ' * (depth + 1)
    if not isinstance(value, dict) or 'since' in value and 'fields' not in value:
        return json.dumps(value)
    return '{\n' + ',\n'.join(f'{pad}{json.dumps(k)}: {dump(v, depth + 1)}' for k, v in value.items()) + '\n' + '  ' * depth + '}'


def class_name(struct: str) -> str:
    return ''.join(part.capitalize() for part in struct.split('_')[1:])


def python_field(name: str) -> str:
    return name + '_' if keyword.iskeyword(name) else name


def rust_field(name: str) -> str:
    return name + '_' if name in RUST_KEYWORDS else name


def spell(kind: str, table: dict, array: str) -> str:
    if '*' in kind:
        return table['pointer']
    base, length = re.fullmatch(r'(\w+)(?:\[(\d+)\])?', kind).groups()
    return array.format(table[base], length) if length else table[base]


def python_struct(name: str, struct: dict) -> str:
    fields = [f"('{python_field(n)}', {spell(f['type'], CTYPES, '{} * {}')})".replace(' ', '\0') for n, f in struct['fields'].items()]
    lines = textwrap.fill(', '.join(fields), 120, break_long_words=False, break_on_hyphens=False)
    lines = lines.replace('\n', '\n' + ' ' * 16).replace('\0', ' ')
    return f'class _{class_name(name)}(ctypes.Structure):\n    _fields_ = [{lines}]\n'


def rust_struct(name: str, struct: dict) -> str:
    fields = ''.join(f"    {rust_field(n)}: {spell(f['type'], RUST_TYPES, '[{}; {}]')},\n" for n, f in struct['fields'].items())
    return f'#[repr(C)]\n#[derive(Clone, Copy)]\nstruct {class_name(name)} {{\n{fields}}}\n'


REGION = re.compile(r'(?P<start>^(?:#|//) generated by scripts/update-abi: (?P<names>[\w, ]+)\n).*?'
                    r'(?P<end>^(?:#|//) end of what is generated\n)', re.M | re.S)


def structs_of(text: str) -> list:
    """The structs that a caller's file names in its marker."""
    return [name.strip() for m in REGION.finditer(text) for name in m['names'].split(',')]


def with_structs(path: pathlib.Path, facts: dict, one, between: str) -> str:
    def region(m) -> str:
        return m['start'] + between.join(one(n, facts['structs'][n]) for n in structs_of(m[0])) + m['end']
    text, count = REGION.subn(region, path.read_text())
    if count == 0:
        sys.exit(f'{path} has no part that is "generated by scripts/update-abi: STRUCT, …"')
    return text


def outputs(facts: dict) -> dict:
    return {GOLDEN: dump(facts) + '\n', SYMBOLS: ''.join(name + '\n' for name in sorted(facts['functions'])),
            PYTHON: with_structs(PYTHON, facts, python_struct, '\n\n'), RUST: with_structs(RUST, facts, rust_struct, '')}


# ---- commands

def released_breaks(facts: dict) -> list:
    return [f'since {old.name}: {b}' for old in sorted(RELEASED.glob('moebius-*.h')) for b in breaks(read(old, {}), facts)]


def check(prior: dict) -> int:
    facts, failed = read(HEADER, prior), False
    for path, text in outputs(facts).items():
        name = str(path.relative_to(ROOT))
        diff = list(difflib.unified_diff(path.read_text().splitlines(True), text.splitlines(True), name, 'as the header has it'))
        sys.stderr.writelines(diff)
        failed = failed or bool(diff)
    if failed:
        print('the header has changed: run scripts/update-abi and look at what it changes', file=sys.stderr)
    broken = released_breaks(facts)
    for line in broken:
        print(f'callers break, {line}', file=sys.stderr)
    return int(failed or bool(broken))


def write(prior: dict, may_break: bool) -> int:
    facts = read(HEADER, prior)
    broken = breaks(prior, facts) if prior else []
    if broken and not may_break:
        print('\n'.join(broken), 'nothing was written: this breaks callers (docs/abi.md); before the first release --break takes it',
              sep='\n', file=sys.stderr)
        return 1
    for path, text in outputs(facts).items():
        path.write_text(text)
    return 0


def stub(facts: dict) -> int:
    print('#include <moebius/moebius.h>')
    # No function takes an enum: values are seen through one that lists them all.
    print('enum constants {', ', '.join(f'value_of_{name} = {name}' for name in facts['constants']), '};')
    print('void constants(enum constants all) { (void)all; }')
    for name, f in facts['functions'].items():
        parameters = ', '.join(f'{kind} {parameter}' for parameter, kind in f['parameters'].items()) or 'void'
        print(f'{f["returns"]} {name}({parameters}) {{ __builtin_trap(); }}')
    return 0


def suppressions(old: dict, new: dict) -> int:
    """Only of structs that grew: abidiff takes the rule as leave to change their other fields too, which check() then finds."""
    for name, was in old['structs'].items():
        if new['structs'].get(name, was)['size'] > was['size']:
            print(f'[suppress_type]\nname = {name}\ntype_kind = struct\nhas_data_member_inserted_between = {{{was["size"] * 8}, end}}')
    return 0


def main(arguments: list) -> int:
    prior = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if arguments == ['check']:
        return check(prior)
    if arguments in (['write'], ['write', '--break']):
        return write(prior, '--break' in arguments)
    if arguments == ['stub']:
        return stub(read(HEADER, prior))
    if arguments == ['suppressions']:
        return suppressions(prior, read(HEADER, prior))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
