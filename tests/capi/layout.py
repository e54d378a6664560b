"""usage: layout.py c|go|rust [SOURCE]: prints a test that a language sees structs, constants and functions as moebius_abi.json has them.

rust: a test module to stand behind SOURCE, for the structs that it declares.
"""
import json
import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / 'capi/abi'))
import facts  # noqa: E402

ABI = json.loads(facts.GOLDEN.read_text())


def c() -> None:
    print('#include <moebius/moebius.h>\n#define SAME(a, b) __builtin_types_compatible_p(a, b)\n#define HOLDS(x) _Static_assert(x, #x)')
    for name, struct in ABI['structs'].items():
        print(f'HOLDS(sizeof({name}) == {struct["size"]});')
        for field, f in struct['fields'].items():
            print(f'HOLDS(offsetof({name}, {field}) == {f["offset"]} && sizeof((({name} *)0)->{field}) == {f["size"]} && '
                  f'SAME(__typeof__((({name} *)0)->{field}), {f["type"]}));')
    for name, constant in ABI['constants'].items():
        print(f'HOLDS({name} == {constant["value"]});')
    for name, function in ABI['functions'].items():
        parameters = ', '.join(function['parameters'].values()) or 'void'
        print(f'HOLDS(SAME(__typeof__(&{name}), {function["returns"]} (*)({parameters})));')


def go() -> None:
    print('// Checks what cgo makes of the structs.\npackage main\n\n// #include <moebius/moebius.h>\nimport "C"\n'
          'import (\n\t"os"\n\t"unsafe"\n)\n')
    print('func expect(what string, got uintptr, want uintptr) {\n\tif got != want {\n\t\tprintln(what, "is", got, "and should be", want)\n'
          '\t\tos.Exit(1)\n\t}\n}\n\nfunc main() {')
    words = {'type', 'func', 'range', 'map', 'select', 'chan', 'go', 'var', 'package', 'import', 'interface', 'defer', 'fallthrough'}
    for i, (name, struct) in enumerate(ABI['structs'].items()):
        print(f'\tvar s{i} C.{name}\n\texpect("{name}", unsafe.Sizeof(s{i}), {struct["size"]})')
        for field, f in struct['fields'].items():
            at = f's{i}.{"_" + field if field in words else field}'
            print(f'\texpect("the offset of {name}.{field}", unsafe.Offsetof({at}), {f["offset"]})')
            print(f'\texpect("the size of {name}.{field}", unsafe.Sizeof({at}), {f["size"]})')
    for name, constant in ABI['constants'].items():
        print(f'\texpect("{name}", uintptr(C.{name} - ({constant["value"]})), 0)')
    print('}')


def rust(source: str) -> None:
    print('#[cfg(test)]\nmod abi {\n    use super::*;\n    use std::ptr::addr_of;')
    for name in facts.structs_of(pathlib.Path(source).read_text()):
        struct, rust_name = ABI['structs'][name], facts.class_name(name)
        print(f'    #[test]\n    fn {name}_lies_as_in_c() {{\n        let s: {rust_name} = unsafe {{ std::mem::zeroed() }};\n'
              f'        let at = addr_of!(s) as usize;\n        assert_eq!(std::mem::size_of::<{rust_name}>(), {struct["size"]});')
        for field, f in struct['fields'].items():
            member = f's.{facts.rust_field(field)}'
            print(f'        assert_eq!((addr_of!({member}) as usize - at, std::mem::size_of_val(&{member})),\n'
                  f'                   ({f["offset"]}, {f["size"]}), "{field}");')
        print('    }')
    print('}')


if __name__ == '__main__':
    {'c': c, 'go': go, 'rust': rust}[sys.argv[1]](*sys.argv[2:])
