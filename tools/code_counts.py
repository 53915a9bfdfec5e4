#!/usr/bin/env python3
"""Counts what this project keeps small: words of its former dialect, long functions, long parameter lists, long files, and import
cycles between modules.

    python3 tools/code_counts.py [--list]      # --list names each one

Tests and benches count like other code, except that import cycles are looked for in src/ only.
"""
import argparse
import pathlib
import re
import subprocess

MAX_LINES, MAX_PARAMETERS, MAX_FILE = 80, 7, 500
# The field says image, element, integer, operand, default, again, after and resumed.
DIALECT = re.compile(
    r'\b\w*pictures?\b|\banew\b|\bunasked\b|\buntold\b|\bmended?\b|\bwhole numbers?\b|\b(?:MOST|LEAST|FEWEST)_\w+|\btaken up\b'
    r'|\bis told\b|\bare told\b|\bfor a person\b|\bsomebody\b', re.I)


def files(*patterns):
    out = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard', *patterns], capture_output=True, text=True, check=True)
    return [pathlib.Path(name) for name in out.stdout.split('\n') if name and pathlib.Path(name).is_file()]


def blanked(text):
    """The code with comments, strings and characters blanked out, so that brackets can be counted."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|r(#+)".*?"\1|r"[^"]*"|"(?:\\.|[^"\\])*"|\'(?:\\.[^\']*|[^\\\'])\'', re.S)
    return pattern.sub(lambda m: re.sub(r'[^\n]', ' ', m.group(0)), text)


def closing(code, start, opening='{', end='}'):
    depth = 0
    for at in range(start, len(code)):
        depth += (code[at] == opening) - (code[at] == end)
        if depth == 0:
            return at
    return len(code) - 1


def functions(path):
    """(name, line, lines, parameters) of every function with a body."""
    code = blanked(path.read_text())
    for match in re.finditer(r'\bfn\s+(\w+)', code):
        parameters = code.find('(', match.end())
        # Generic parameters may have brackets of their own: Fn(usize).
        angle = re.match(r'\s*<', code[match.end():])
        if angle:
            depth, at = 0, match.end() + angle.end() - 1
            while True:
                depth += (code[at] == '<') - (code[at] == '>' and code[at - 1] != '-')
                if depth == 0:
                    break
                at += 1
            parameters = code.find('(', at)
        last = closing(code, parameters, '(', ')')
        body = re.compile(r'[{;]').search(code, last)
        if not body or body.group(0) == ';':
            continue
        depth, count, text = 0, 0, code[parameters + 1:last]
        for at, char in enumerate(text):
            depth += char in '([{<'
            depth -= char in ')]}' or (char == '>' and text[at - 1] not in '-=')
            count += char == ',' and depth == 0
        count += bool(text.strip()) and not text.rstrip().endswith(',')
        lines = code.count('\n', match.start(), closing(code, body.start())) + 1
        yield match.group(1), code.count('\n', 0, match.start()) + 1, lines, count


def modules(crate):
    """What each module of a crate's first two levels uses of the others, by `crate::` and `super::` paths."""
    source = crate / 'src'
    uses = {}
    for path in sorted(source.rglob('*.rs')):
        parts = list(path.relative_to(source).with_suffix('').parts)
        if parts[-1] in ('mod', 'lib', 'main'):
            parts.pop()
        if not parts or 'tests' in parts:
            continue
        code = blanked(path.read_text()).split('#[cfg(test)]\nmod tests {')[0]
        found = set()
        for match in re.finditer(r'\bcrate::(?:\{([^;]*?)\}|(\w+)(?:::(\w+))?)', code):
            if match.group(1):
                found |= {(name,) for name in re.findall(r'(?:^|,)\s*(\w+)', match.group(1))}
            else:
                found.add(tuple(part for part in match.groups()[1:] if part))
        uses.setdefault(parts[0], set()).update(found)
    names = set(uses)
    return {name: {use[0] for use in found if use[0] in names and use[0] != name} for name, found in uses.items()}


def cycles(graph):
    """Strongly connected components of more than one module (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            part = stack[at:]
            del stack[at:]
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--list', action='store_true', help='name each one')
    listed = parser.parse_args().list
    code = files('*.rs')
    prose = [path for path in code + files('*.md') if 'old_run' not in path.parts]
    words, long, wide, large = [], [], [], []
    for path in prose:
        for number, line in enumerate(path.read_text().split('\n'), 1):
            words += [f'{path}:{number}: {match.group(0)}' for match in DIALECT.finditer(line)]
    for path in code:
        for name, line, lines, parameters in functions(path):
            if lines > MAX_LINES:
                long.append(f'{path}:{line}: {name}: {lines} lines')
            if parameters > MAX_PARAMETERS:
                wide.append(f'{path}:{line}: {name}: {parameters} parameters')
        lines = path.read_text().count('\n')
        if lines > MAX_FILE:
            large.append(f'{path}: {lines} lines')
    circles = [f'{crate.name}: ' + ', '.join(part)
               for crate in sorted(pathlib.Path('crates').iterdir()) for part in cycles(modules(crate))]
    for what, found in (('words of the dialect', words), (f'functions over {MAX_LINES} lines', long),
                        (f'functions with more than {MAX_PARAMETERS} parameters', wide), (f'files over {MAX_FILE} lines', large),
                        ('import cycles between modules', circles)):
        print(f'{len(found):5} {what}')
        if listed:
            print(''.join(f'      {line}\n' for line in found), end='')


if __name__ == '__main__':
    main()
