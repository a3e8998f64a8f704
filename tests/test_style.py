"""The scripts as texts: copies that must stay the same, constants that explain themselves, nothing that only works by luck."""
import ast
import builtins
import difflib
import dis
import os
import re
import sys
import types

import pytest

from conftest import ROOT

TRAINERS = ['pretrain_mae.py', 'pretrain_dino.py', 'pretrain_dino_hsi.py', 'pretrain_lejepa.py', 'segment.py',
            'baseline_deeplab.py']
SCRIPTS = [*TRAINERS, 'viz_attention.py']
TOOLS = [f'tools/{name}.py' for name in ('map_scene', 'check_data', 'compare', 'convert_weights')]
SOURCES = [*SCRIPTS, 'models.py', 'data.py', 'scenes.py', *TOOLS]


def read(name):
    return open(os.path.join(ROOT, name), encoding='utf-8').read()


HEADING = r'^ *# (?:----|====)'  # where a block ends


def shell(text):
    """heading -> text of each block headed `shell` or `judge`, up to the next heading"""
    found = re.findall(rf'^( *# (?:----|=+) (?:shell|judge): [^\n]*)\n(.*?)(?={HEADING}|\Z)', text, re.S | re.M)
    return {re.sub(r'[\s#=-]+', ' ', heading): block for heading, block in found}


def test_the_shell_is_the_same_text_in_every_script():
    first = {}  # heading -> the first script that has it, its text
    for name in TRAINERS:
        blocks = shell(read(name))
        assert len(blocks) >= 5, name
        for heading, block in blocks.items():
            owner, expected = first.setdefault(heading, (name, block))
            assert block == expected, f'{name}: "{heading}" differs from {owner}\'s: make them the same again'
    for name in ('pretrain_dino.py', 'pretrain_dino_hsi.py', 'pretrain_lejepa.py'):
        assert shell(read(name)).keys() == shell(read('pretrain_mae.py')).keys()


@pytest.mark.parametrize('name', SOURCES)
def test_lines_are_as_wide_as_a_reader_takes_in(name):
    lines = read(name).splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > 100]
    assert not wide, f'{name}: lines {wide} have over 100 characters'
    prose = set()  # numbers of the lines of docstrings
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, node.end_lineno + 1))
    code = [line for number, line in enumerate(lines, 1) if number not in prose and line.strip() and not line.strip().startswith('#')]
    assert sum(map(len, code)) / len(code) <= 55, name


def test_lejepa_is_dino_without_a_teacher():
    """What is in DINOv2's script and not in LeJEPA's is the teacher, prototypes, masks; the other way round there is little."""
    pair = [read(name).splitlines() for name in ('pretrain_dino.py', 'pretrain_lejepa.py')]
    docstrings = [ast.get_docstring(ast.parse(read(name))).splitlines() for name in ('pretrain_dino.py', 'pretrain_lejepa.py')]
    new = [line for line in difflib.ndiff(*(lines[len(words):] for lines, words in zip(pair, docstrings))) if line[:2] == '+ ']
    assert len(new) < 160


def test_the_second_stream_is_what_tells_the_two_dino_scripts_apart():
    pair = [read(name).splitlines() for name in ('pretrain_dino.py', 'pretrain_dino_hsi.py')]
    changed = [line for line in difflib.ndiff(*pair) if line[:2] in ('- ', '+ ')]
    assert len(changed) < 120, f"{len(changed)} lines differ: the two scripts are copies but for the second stream"


@pytest.mark.parametrize('name', SCRIPTS)
def test_every_constant_explains_itself_and_has_a_plain_type(name):
    constants = [(constant, rest) for constant, rest in re.findall(r'^(\w+) = (.*)$', read(name), re.M)
                 if constant.islower()]
    assert 10 <= len(constants) <= 50
    for constant, rest in constants:
        assert re.match(r"('[^']*'|-?[\d.e-]+|True|False)  # .{5,}", rest), f'{name}: {constant} = {rest}'


def test_scripts_import_only_data_models_and_the_five_packages():
    packages = {'torch', 'numpy', 'matplotlib', 'tqdm', 'tifffile'}
    more = {'scenes.py': {'scipy', 'h5py', 'PIL'}, 'data.py': {'scenes'}, 'models.py': {'data'}}
    for name in SOURCES:
        allowed = packages | more.get(name, {'data', 'models', 'wandb'} | ({'scenes'} if name in TOOLS else set()))
        for node in ast.walk(ast.parse(read(name))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in (full.split('.')[0] for full in names):
                assert module in allowed or module in sys.stdlib_module_names, f'{name} imports {module}'


def calls():
    """(file, what is called as text, its call node) for every call in the scripts"""
    for name in SOURCES:
        for node in ast.walk(ast.parse(read(name))):
            if isinstance(node, ast.Call):
                yield name, ast.unparse(node.func), node


def test_text_files_are_utf8_on_every_system():
    texts = [(name, node) for name, function, node in calls() if function == 'open' and not re.search(r"'[rw]\+?b'", ast.unparse(node))]
    assert len(texts) > 15
    for name, node in texts:
        assert 'encoding' in {keyword.arg for keyword in node.keywords}, f'{name}, line {node.lineno}: pass encoding= to open()'


def test_no_file_is_read_in_a_way_that_runs_code():
    loads = [(name, ast.unparse(node)) for name, function, node in calls() if function == 'torch.load']
    assert len(loads) == 1 and 'weights_only=True' in loads[0][1]  # in models.load_checkpoint
    for name, function, node in calls():
        assert function not in ('eval', 'exec', 'os.system', '__import__') or ast.unparse(node) == "__import__('scipy.io')", f'{name}, line {node.lineno}'
        assert not function.startswith(('pickle.', 'marshal.', 'shelve.')), f'{name}, line {node.lineno}'
        assert not {'allow_pickle=True', 'shell=True'} & {ast.unparse(keyword) for keyword in node.keywords}, f'{name}, line {node.lineno}'


def test_commands_in_the_docs_use_flags_that_exist():
    texts = ['README.md', *sorted(f'docs/{name}' for name in os.listdir(os.path.join(ROOT, 'docs')) if name.endswith('.md') and name != 'log.md')]
    for text in texts:
        for script, flags in re.findall(r'((?:tools/)?\w+\.py)((?: +[^\s`]+)*)', read(text).replace('\\\n', ' ')):
            if script in SCRIPTS:
                known = set(re.findall(r'^(\w+) = ', read(script), re.M))
            elif script in (*TOOLS, 'data.py'):
                known = set(re.findall(r"'--(\w+)'", read(script)))
            else:
                continue
            assert set(re.findall(r'--(\w+)', flags)) <= known | {'help'}, f'{text}: {script}{flags}'


def test_the_readme_is_short():
    readme = read('README.md')
    words = readme.split()
    assert len(words) <= 1500 and sum(any(c.isdigit() for c in word) for word in words) / len(words) <= 0.08
    commands = [line for block in re.findall(r'```\w*\n(.*?)```', readme, re.S) for line in block.splitlines()]
    assert max(map(len, commands)) <= 120


def test_every_name_that_a_script_uses_is_defined_somewhere_in_it():
    """A branch that no test takes may use a module that nobody imported"""
    def instructions(code):
        yield from dis.get_instructions(code)
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                yield from instructions(inner)

    def unknown(text):
        found = {'global': set(), 'STORE_NAME': set(), 'STORE_GLOBAL': set()}
        for one in instructions(compile(text, '?', 'exec')):
            kind = 'global' if one.opname in ('LOAD_GLOBAL', 'LOAD_NAME') else one.opname
            found.setdefault(kind, set()).add(one.argval)
        defined = found['STORE_NAME'] | found['STORE_GLOBAL'] | {*dir(builtins)}
        return {name for name in found['global'] - defined if not name.startswith('__')}
    assert unknown('import os\ndef f():\n    return math.inf, os.sep') == {'math'}
    for name in SOURCES:
        assert not unknown(read(name)), name
