"""The scripts as texts: copies that must stay the same, constants that explain themselves, nothing that only works by luck."""
import ast
import glob
import os
import re

import pytest

from conftest import ROOT

SCRIPTS = [name for name in ('pretrain_mae.py', 'pretrain_dino.py', 'pretrain_dino_hsi.py', 'segment.py', 'baseline_deeplab.py', 'viz_attention.py')
           if os.path.exists(os.path.join(ROOT, name))]


def read(name):
    return open(os.path.join(ROOT, name), encoding='utf-8').read()


def blocks(text):
    """name -> the text between `# ---- boilerplate: NAME` and `# ---- end of boilerplate: NAME`"""
    found = re.findall(r'# ---- boilerplate: ([\w ,]+?)(?: \(.*?\))?(?: ----)?\n(.*?)# ---- end of boilerplate: \1', text, re.S)
    assert len(found) == text.count('# ---- boilerplate:')
    return dict(found)


def test_boilerplate_is_the_same_text_in_every_script():
    first = {}  # block -> the first script that has it, its text
    for name in SCRIPTS:
        for block, text in blocks(read(name)).items():
            owner, expected = first.setdefault(block, (name, text))
            assert text == expected, f'{name}: the block "{block}" differs from {owner}\'s: make them the same again'
    assert len(first) >= 12


def function(text, name):
    """The text of a top-level function, without what follows it."""
    found = re.search(rf'^def {name}\(.*?(?=^[^\s)]|\Z)', text, re.S | re.M)
    return found and re.sub(r'\n#.*', '', found[0]).strip()


def test_copied_functions_are_the_same_text_as_their_source():
    copies = [(name, *copy) for name in SCRIPTS for copy in re.findall(r'^# Copied from (\w+\.py)\n(?:@.*\n)?def (\w+)', read(name), re.M)]
    assert len(copies) >= 10
    for name, source, copied in copies:
        assert function(read(name), copied) == function(read(source), copied), f'{name}: {copied} differs from {source}\'s: make them the same again'


@pytest.mark.parametrize('name', SCRIPTS)
def test_every_constant_explains_itself_and_has_a_plain_type(name):
    head = read(name).split('# ---- boilerplate: overrides')[0]
    constants = re.findall(r'^(\w+) = (.*)$', head, re.M)
    assert len(constants) > 10
    for constant, rest in constants:
        assert re.match(r"('[^']*'|-?[\d.e-]+|True|False)  # .{5,}", rest), f'{name}: {constant} = {rest}'


def test_scripts_import_only_data_models_and_the_five_packages():
    allowed = {'torch', 'numpy', 'matplotlib', 'tqdm', 'tifffile', 'data', 'models', 'scipy', 'spectral'}
    standard = __import__('sys').stdlib_module_names
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        for module in re.findall(r'^\s*(?:from|import) (\w+)', open(path, encoding='utf-8').read(), re.M):
            assert module in allowed or module in standard, f'{path} imports {module}'


def calls():
    """(file, what is called as text, its call node) for every call in the scripts"""
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.Call):
                yield os.path.basename(path), ast.unparse(node.func), node


def test_text_files_are_utf8_on_every_system():
    texts = [(name, node) for name, function, node in calls() if function == 'open' and not re.search(r"'[rw]\+?b'", ast.unparse(node))]
    assert len(texts) > 20
    for name, node in texts:
        assert 'encoding' in {keyword.arg for keyword in node.keywords}, f'{name}, line {node.lineno}: pass encoding= to open()'


def test_no_file_is_read_in_a_way_that_runs_code():
    loads = [(name, ast.unparse(node)) for name, function, node in calls() if function == 'torch.load']
    assert len(loads) == 1 and 'weights_only=True' in loads[0][1]  # in models.load_checkpoint
    for name, function, node in calls():
        assert function not in ('eval', 'exec', 'os.system', '__import__') or ast.unparse(node) == "__import__('scipy.io')", f'{name}, line {node.lineno}'
        assert not function.startswith(('pickle.', 'marshal.', 'shelve.')), f'{name}, line {node.lineno}'
        assert not {'allow_pickle=True', 'shell=True'} & {ast.unparse(keyword) for keyword in node.keywords}, f'{name}, line {node.lineno}'


def test_readme_commands_use_flags_that_exist():
    if not os.path.exists(os.path.join(ROOT, 'README.md')):
        pytest.skip('no README yet')
    readme = read('README.md').replace('\\\n', ' ')
    for script, flags in re.findall(r'(\w+\.py)((?: +[^\s`]+)*)', readme):
        if script in SCRIPTS:
            known = set(re.findall(r'^(\w+) = ', read(script), re.M))
            assert set(re.findall(r'--(\w+)=', flags)) <= known, f'{script}{flags}'
