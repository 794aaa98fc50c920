"""Tables and names: what is written is read back, nothing is guessed, and a mistake is named with its true line."""

import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protloc.classify.submission import write_probabilities
from protloc.classify.thresholds import choose_thresholds, read_thresholds
from protloc.core import InputError
from protloc.data import resplit
from protloc.data.readers.tables import read_table, write_table
from protloc.data.simulate.datasets import class_numbers, simulate_store
from protloc.data.store import ImageStore, write_store
from protloc.diffusion.denoiser import UNetConfig
from protloc.diffusion.generate import read_plan
from protloc.diffusion.train import GeneratorConfig, train_generator
from protloc.labels import HPA, STAINS, Vocabulary
from protloc.study.folder import RunFolder
from protloc.training import LoopConfig

FEW = settings(max_examples=150, deadline=None, derandomize=True)

awkward = st.sampled_from(
    ['', ' ', 'NA', 'None', 'nan', '007', '1e5', '-0', 'True', 'inf', 'a,b', ';', '\t', '|', '#', '\\', '\\n', "'"]
    + ['"', '""', 'a"b', ' a', 'a ', '\n', '\r', '\r\n', 'a\nb', '\ufeff', '\u2028', '\x1c', 'Zellkörper', '細胞']
)
text = st.text(st.characters(codec='utf-8', exclude_characters='\0'), max_size=6) | awkward
names = st.lists(text.filter(str.strip), min_size=1, max_size=5, unique=True)


@st.composite
def tables(draw):
    "Column names, rows of cells"
    header = draw(names)
    rows = draw(st.lists(st.lists(text, min_size=len(header), max_size=len(header)), max_size=6))
    return header, rows


@FEW
@given(tables())
def test_what_is_written_is_read_back(table):
    header, rows = table
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 't.csv'
        write_table(pd.DataFrame(rows, columns=header, dtype=str), path)
        again = read_table(path)
        assert [p.name for p in Path(folder).iterdir()] == ['t.csv']
    assert again.columns.tolist() == header
    assert again.to_numpy(dtype=object).tolist() == rows
    breaks = [sum(len(re.findall('\r\n|\r|\n', cell)) for cell in row) for row in [header, *rows]]
    assert again.index.tolist() == [1 + i + sum(breaks[:i]) for i in range(1, len(rows) + 1)]


@FEW
@given(st.text(st.sampled_from('ab,;\t"\r\n 0\ufeff\0ö'), max_size=30) | st.binary(max_size=30))
def test_any_file_is_a_table_or_one_sentence(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 't.csv'
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            table = read_table(path)
            assert table.columns.is_unique and all(isinstance(cell, str) for cell in table.to_numpy().ravel())
        except InputError as e:
            assert str(e).startswith(str(path)) and '\n' not in str(e)


@pytest.mark.parametrize(
    'content,sentence',
    [
        (
            b'Id,Target\nf0,5,25\n',
            'line 2 has 3 cells, the header has 2 (Id, Target): separate class numbers by spaces',
        ),
        (b'Id,Target\n\nf0,0\n\nf1,5,25\n', 'line 5 has 3 cells'),
        (b'Id,Target\r\rf0,5,25\r', 'line 3 has 3 cells'),
        (b'Id,Target\n"f\n0",5\nf1,5,25\n', 'line 4 has 3 cells'),
        (b'Id,Target\nf0\n', 'line 2 has 1 cell'),
        (b'Id,Target\nf0, "5,25"\n', 'line 2 has 3 cells, the header has 2 (Id, Target): remove the space before'),
        (b'Id;Target\nf0;5 25\n', 'separated by semicolons'),
        (b'\xef\xbb\xbfId;Target\r\nf0;5,25\r\n', 'separated by semicolons'),
        (b'Id\tTarget\nf0\t5 25\n', 'separated by tabs'),
        ('Id,Target\nf0,5\n'.encode('utf-16'), 'is text in UTF-16'),
        ('Id,Target\nf0,5\n'.encode('utf-16-be'), 'holds bytes that are 0'),
        ('Id,Target\nZellkörper,5\n'.encode('cp1252'), 'line 2: the byte 0xf6'),
        (b'PK\x03\x04\x14\x00', 'is a workbook'),
        (b'Id,Target\nf0,5\nf1,"5 25\nf2,5\n', 'line 3: in the row that begins there, a quoted cell has no end'),
        (b'Id,Target\nf1,"5" 25\n', 'line 2: in the row that begins there, text follows a quoted cell'),
        (b'Id,Target,Id\n', "the column 'Id' is there twice"),
        (b',Id,Target\n0,f0,5\n', 'column 1 has no name'),
        (b'Id,Target,\nf0,5,\nf1,5,x\n', 'line 3 has 3 cells'),
        (b'Id,target\nf0,5\n', "write 'target' as asked for"),
        (b'', 'is empty: it needs the columns Id and Target'),
        (b'\n \n', 'is empty'),
        (b'Id,Target\n\n', 'has a header but no row'),
    ],
)
def test_tables_that_are_refused(tmp_path, content, sentence):
    (tmp_path / 't.csv').write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_table(tmp_path / 't.csv', ['Id', 'Target'], filled=True)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    'content,lines',
    [
        (b'Id,Target\nf0,5 25\nf1,\n', [2, 3]),
        (b'\xef\xbb\xbfId,Target\r\nf0,5 25\r\nf1,\r\n', [2, 3]),
        (b'Id,Target\nf0,5 25,\nf1,,\n', [2, 3]),
        (b'Id,Target,\nf0,5 25,\nf1,,\n', [2, 3]),
        (b'Id,Target,,\nf0,5 25\nf1,,, \n', [2, 3]),
        (b'\n\nId,Target\n\n  \nf0,"5 25"\n\t\nf1,""\n\n', [6, 8]),
        (b'Id,Target\rf0,5 25\rf1,', [2, 3]),
    ],
)
def test_tables_that_are_read(tmp_path, content, lines):
    (tmp_path / 't.csv').write_bytes(content)
    table = read_table(tmp_path / 't.csv', ['Id', 'Target'], filled=True)
    assert table.to_dict('list') == dict(Id=['f0', 'f1'], Target=['5 25', '']) and table.index.tolist() == lines


def test_places_that_are_no_files(tmp_path):
    with pytest.raises(InputError, match='there is no file'):
        read_table(tmp_path / 'nowhere.csv')
    with pytest.raises(InputError, match='is a folder'):
        read_table(tmp_path)
    with pytest.raises(InputError, match='cannot be read'):
        read_table(__file__ + '/t.csv')


def test_a_large_table_is_read_in_a_moment(tmp_path):
    n = 100_000
    table = pd.DataFrame(dict(id=[f'field{i:06d}' for i in range(n)], target='5 25', group='g', split='train'))
    write_table(table, tmp_path / 't.csv')
    began = time.perf_counter()
    again = read_table(tmp_path / 't.csv')
    assert time.perf_counter() - began < 3
    assert again.id.tolist() == table.id.tolist() and again.index[-1] == n + 1


# names of classes


digits = st.sampled_from(['1', '2', '01', '10', 'NA', 'None'])
class_names = st.lists(
    st.text(st.characters(exclude_categories=['Cc', 'Cs', 'Zl', 'Zp']), min_size=1, max_size=4) | digits,
    min_size=1,
    max_size=6,
    unique=True,
)


@FEW
@given(class_names)
def test_a_name_is_the_class_of_that_name(names):
    vocab = Vocabulary(names)
    assert [vocab.number_of(name) for name in names] == list(range(len(names)))
    assert (vocab.multi_hot(names) == np.eye(len(names))).all()
    assert [vocab.encode(str(i)).argmax() for i in range(len(names))] == list(range(len(names)))
    for number in range(len(names)):
        try:
            assert vocab.number_of(number) == number
        except InputError as e:
            named = [name for name in names if name.isdecimal() and int(name) == number]
            assert named and names[number] not in named and f"'{named[0]}'" in str(e)


@pytest.mark.parametrize(
    'names,label,sentence',
    [
        (HPA.names, '7', "no class named '7': write 'Golgi apparatus', or the number 7, not a text"),
        (HPA.names, '28', 'from 0 to 27'),
        (HPA.names, -1, 'from 0 to 27, not -1'),
        (HPA.names, True, 'not True'),
        (HPA.names, 7.0, 'not 7.0'),
        (HPA.names, None, 'not None'),
        ('123', 1, "the class named '1' or the one at position 1, '2'"),
        ('123', np.int64(3), "the class named '3' is written as a text: '3'"),
        (('01', '02'), 1, "the class named '01' or the one at position 1, '02'"),
        ('123', '01', "no class '01'"),
        (('10', 'x'), 10, "the class named '10' is written as a text"),
    ],
)
def test_labels_that_name_no_class(names, label, sentence):
    with pytest.raises(InputError) as caught:
        Vocabulary(list(names)).number_of(label)
    assert sentence in str(caught.value)


ROWS = [[0, 0, 1, 0], [1, 1, 0, 0]]
FOUR = Vocabulary(['a', 'b', 'c', 'd'])


@pytest.mark.parametrize(
    'labels',
    [
        np.array(ROWS),
        torch.tensor(ROWS),
        np.array(ROWS, bool),
        pd.DataFrame(ROWS),
        [[float(v) for v in row] for row in ROWS],
        [[bool(v) for v in row] for row in ROWS],
        [np.array(row, np.float32) for row in ROWS],
        [torch.tensor(row, dtype=torch.float) for row in ROWS],
        [[0, 0, 1.0, 0], [1, True, 0, 0]],
        [['c'], ('a', 'b')],
        [{'c'}, {0, 1}],
        ['c', ['a', 'b']],
        [2, [0, 1]],
        [np.array([2]), np.array(['a', 'b'])],
        pd.Series([['c'], ['a', 'b']]),
    ],
)
def test_labels_of_every_form_are_the_same_rows(labels):
    assert FOUR.multi_hot(labels).tolist() == ROWS


@pytest.mark.parametrize(
    'labels,sentence',
    [
        (
            ROWS,
            'can be class numbers or a multi-hot row: give class names, or rows as an array, np.array(...) of shape',
        ),
        (tuple(map(tuple, ROWS)), 'can be class numbers or a multi-hot row'),
        (ROWS[0], 'can be class numbers or a multi-hot row'),
        (np.array(ROWS[0]), 'can be class numbers or a multi-hot row'),
        (torch.tensor(ROWS[0]), 'can be class numbers or a multi-hot row'),
        ([np.array(ROWS[0])], 'can be class numbers or a multi-hot row'),
        ([[0, 0, 1]], 'class number 0 occurs twice'),
        ([[2, 2]], 'class number 2 occurs twice'),
        ([[0, 0, 1, 0, 0]], 'class number 0 occurs twice'),
        ([[0.0, 1.0]], '2 columns, the vocabulary has 4 classes'),
        ([25.0, 0.0], '2 columns, the vocabulary has 4 classes'),
        (np.zeros((2, 5)), '5 columns, the vocabulary has 4 classes'),
        ([[0.0, 0, 2, 0]], 'between 0 and 1'),
        ([[0.0, float('nan'), 0, 0]], 'between 0 and 1'),
        (['a', 0.5], 'not 0.5'),
        ([[['a']]], "not ['a']"),
        ({'a', 'b'}, 'a set has no order'),
        (['a', '1'], "no class named '1'"),
    ],
)
def test_labels_with_two_readings_are_refused(labels, sentence):
    with pytest.raises(InputError) as caught:
        FOUR.multi_hot(labels)
    assert sentence in str(caught.value)


def test_a_single_row_of_shares_is_one_image():
    assert FOUR.multi_hot([0.0, 0.5, 1.0, 0.0]).tolist() == [[0, 0.5, 1, 0]]
    assert FOUR.multi_hot(np.array(ROWS[0], np.float32)).tolist() == [ROWS[0]]
    assert FOUR.multi_hot('b').tolist() == FOUR.multi_hot(1).tolist() == [[0, 1, 0, 0]]


# the challenge's table and folders of classes


def prepared(protloc, folder, path):
    code, _, err = protloc('prepare', folder, path, '--size', 32, '--workers', 1)
    assert code == 0, err
    return ImageStore(path)


def refused(protloc, *words, left=()):
    code, _, err = protloc(*words)
    assert code == 2 and 'Traceback' not in err, err
    assert not any(Path(path).exists() for path in left)
    return err.strip().splitlines()[-1]


def test_separators_and_blank_lines_at_the_ends(protloc, challenge, tmp_path):
    rows = [f'f{i},{i % 3} 25,' for i in range(8)]
    (challenge / 'train.csv').write_text('Id,Target\n\n' + '\n\n'.join(rows) + '\n')
    store = prepared(protloc, challenge, tmp_path / 'store')
    assert store.table.id.tolist() == [f'f{i}' for i in range(8)]
    assert store.table.target.tolist() == [f'{i % 3} 25' for i in range(8)]


@pytest.mark.parametrize(
    'rows,sentence',
    [
        ('f0,0,25\nf1,1,25\n', 'train.csv, line 2 has 3 cells'),
        ('\n\nf0,0 25\n\nf4,x 25\n', "train.csv, line 6 (Id 'f4'): 'x' is not a class number"),
        ('f0,0 25\nf1\n', 'train.csv, line 3 has 1 cell'),
    ],
)
def test_a_label_table_with_a_mistake(protloc, challenge, tmp_path, rows, sentence):
    (challenge / 'train.csv').write_text('Id,Target\n' + rows)
    words = ['prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', 1]
    assert sentence in refused(protloc, *words, left=[tmp_path / 'store'])


@pytest.mark.parametrize('names', [[str(i) for i in range(11)], ['1', '2', '3'], ['NA', 'None', '01', '1']])
def test_folders_with_names_like_numbers(protloc, tmp_path, names):
    for number, name in enumerate(names):
        (tmp_path / 'in' / name).mkdir(parents=True)
        for i in range(3 + number):
            Image.new('L', (32, 32), 10 * number + i).save(tmp_path / 'in' / name / f'cell{i}.png')
    store = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    counts = {name: 3 + number for number, name in enumerate(names)}
    assert dict(zip(store.vocab, store.labels.sum(0), strict=True)) == counts
    for id, target in zip(store.table.id, store.table.target, strict=True):
        assert store.vocab.names_of(target) == [id.split('/')[0]]


# stores


def with_table(path, **columns):
    n = len(columns['id'])
    return write_store(path, np.zeros((n, 4, 8, 8), np.uint8), pd.DataFrame(columns), STAINS, HPA)


def test_columns_of_a_store_come_back_as_written(tmp_path):
    columns = dict(
        plate=['01', '1', '1.0', ''],
        line=['NA', 'None', 'nan', 'a,b\n'],
        fidelity=[0.5, None, 1, 0.25],
        fold=[0, 1, 2, 0],
    )
    store = with_table(tmp_path / 'store', id=list('abcd'), target=['0', '25 0', '', '1'], **columns)
    table = store.table
    assert table.plate.tolist() == columns['plate'] and table.line.tolist() == columns['line']
    assert table.fold.tolist() == columns['fold'] and table.fold.dtype == int
    assert table.fidelity.tolist()[::2] == [0.5, 1] and table.fidelity.isna().tolist() == [False, True, False, False]
    texts = resplit.table_as_written(store)
    again = resplit.replace_table(store, texts)
    assert again.manifest['sha256'] == store.manifest['sha256'] and texts.fidelity.tolist() == [
        '0.5',
        '',
        '1.0',
        '0.25',
    ]


def test_whole_numbers_stay_whole_where_some_rows_lack_them(tmp_path):
    from protloc.data.store import StoreWriter

    with StoreWriter(tmp_path / 'store', ['green'], HPA, 8) as writer:
        writer.add(np.zeros((1, 8, 8), np.uint8), id='a', target='0', plate=7)
        writer.add(np.zeros((1, 8, 8), np.uint8), id='b', target='0')
    assert ImageStore(tmp_path / 'store').table.plate.tolist() == ['7', '']


def test_ids_that_are_written_alike_are_refused(tmp_path):
    with pytest.raises(InputError, match="id '1' occurs twice"):
        with_table(tmp_path / 'store', id=[1, '1'], target=['0', '0'])
    assert not (tmp_path / 'store').exists()


def test_a_bad_target_is_named_with_its_true_line(tmp_path):
    store = with_table(tmp_path / 'store', id=['a', 'b\nb', 'c', 'd'], target=['0', '0', '28', '28'])
    with pytest.raises(InputError, match=r"table.csv, line 6 \(id 'c'\): there is no class number 28"):
        store.labels  # noqa: B018


@pytest.mark.parametrize(
    'change,sentence',
    [
        (lambda text: '\ufeff' + text.replace(',', ';'), 'separated by semicolons'),
        (lambda text: '\ufeff' + text.replace('\n', '\r\n'), 'does not match its manifest'),
        (lambda text: text.replace('0.5', 'half'), "line 2: fidelity is 'half', not a number"),
        (lambda text: text[:-12], 'it was changed or cut off'),
    ],
)
def test_a_table_that_was_edited(protloc, tmp_path, change, sentence):
    store = with_table(tmp_path / 'store', id=['a', 'b'], target=['0', '1'], fidelity=[0.5, 0.25])
    (store.path / 'table.csv').write_text(change((store.path / 'table.csv').read_text()), newline='')
    said = refused(protloc, 'info', store.path)
    assert sentence in said and 'make the store again' in said


def test_conditions_and_columns_of_a_split_are_texts(protloc, tmp_path):
    from protloc.diffusion.train import conditions_of

    n = 60
    columns = dict(plate=[['01', '1', '001'][i % 3] for i in range(n)], split=['train'] * n)
    store = with_table(tmp_path / 'store', id=[f'i{i}' for i in range(n)], target=['0'] * n, **columns)
    assert conditions_of(store, 'plate') == ['001', '01', '1']
    assert protloc('split', store.path, '--group', 'plate', '--no-duplicates')[0] == 0
    again = ImageStore(store.path)
    assert again.table.plate.tolist() == columns['plate']
    assert again.table.groupby('plate').split.nunique().tolist() == [1, 1, 1]


# thresholds, predictions, results


@pytest.mark.parametrize('file', ['t.csv', 't.json'])
def test_thresholds_of_any_names_are_read_back(tmp_path, file):
    classes = ['None', 'NA', 'nan', '007', '7', 'a,b', '"q"', 'Golgi ', ' Golgi', 'two\nlines', 'Zellkörper', 'a\rb']
    rng = np.random.default_rng(0)
    predicted, labels = rng.random((50, len(classes))), rng.integers(0, 2, (50, len(classes)))
    chosen = choose_thresholds(predicted, labels, tmp_path / file, classes)
    assert len(set(chosen)) == len(classes)
    assert read_thresholds(tmp_path / file, classes).tolist() == chosen.tolist()
    assert read_thresholds(tmp_path / file, classes[::-1]).tolist() == chosen.tolist()[::-1]


@pytest.mark.parametrize(
    'file,content,sentence',
    [
        ('t.csv', 'class,threshold\na,.5\n\nb,nan\n', "line 4: the threshold of 'b' must lie between 0 and 1, not nan"),
        ('t.csv', 'class,threshold\na,.5\nb,\n', "line 3: the threshold of 'b' is '', not a number"),
        ('t.csv', 'class,threshold\na,.5\nb,half\n', "line 3: the threshold of 'b' is 'half', not a number"),
        ('t.csv', 'class,threshold\na,.5\nb,1.5\n', "line 3: the threshold of 'b' must lie between 0 and 1, not 1.5"),
        ('t.csv', 'class,threshold\na,.5\nb,.5\na,.6\n', "line 4: the class 'a' is there twice"),
        ('t.csv', 'class,threshold\na,0,5\n', 'line 2 has 3 cells'),
        ('t.csv', 'class;threshold\na;0,5\n', 'separated by semicolons'),
        ('t.csv', 'class,limit\na,.5\n', 'has no column threshold'),
        ('t.csv', 'class,threshold\na,.5\nb ,.5\n', "has b, 'b '"),
        ('t.json', '{"a": 0.5, "b": NaN}', "the threshold of 'b' must lie between 0 and 1, not nan"),
        ('t.json', '{"a": 0.5, "b": 1, "a": 0.6}', "the class 'a' is there twice"),
        ('t.json', '{"a": 0.5, "b": true}', "the threshold of 'b' is True, not a number"),
        ('t.json', '{"a": 0.5, "b": null}', "the threshold of 'b' is None, not a number"),
        ('t.json', '{"a": 0.5, "b": 1' + '0' * 400 + '}', 'not a number'),
        ('t.json', '{"a": 0.5', 'nor JSON'),
    ],
)
def test_thresholds_with_a_mistake(tmp_path, file, content, sentence):
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as caught:
        read_thresholds(tmp_path / file, ['a', 'b'])
    said = str(caught.value)
    assert sentence in said and said.startswith(str(tmp_path / file))


def test_probabilities_of_classes_with_any_name(tmp_path):
    names = ['NA', 'a,b', '01', 'Golgi ', 'two\nlines']
    table = pd.DataFrame([[0.1, 0.2, 0.3, 0.4, 0.5]] * 2, index=pd.Index(['01', 'NA'], name='Id'), columns=names)
    write_probabilities(table, tmp_path / 'p.csv')
    again = read_table(tmp_path / 'p.csv')
    assert again.columns.tolist() == ['Id', *names] and again.Id.tolist() == ['01', 'NA']
    assert again['a,b'].tolist() == ['0.200000'] * 2
    with pytest.raises(InputError, match="the column 'Id' is there twice"):
        write_probabilities(table.rename(columns=dict(NA='Id')), tmp_path / 'q.csv')
    assert not (tmp_path / 'q.csv').exists()


def test_results_keep_names_and_numbers_apart(tmp_path):
    run = RunFolder(tmp_path)
    written = pd.DataFrame(
        {'class': ['NA', '01', 'None'], 'arm': ['1', 'nan', 'inf'], 'seed': [0, 1, 2], 'low': [-np.inf, None, 0.25]}
    )
    run.write_results(dict(classes=written), '')
    again = run.read_results()['classes']
    assert again['class'].tolist() == ['NA', '01', 'None'] and again.arm.tolist() == ['1', 'nan', 'inf']
    assert again.seed.tolist() == [0, 1, 2] and again.low.tolist()[::2] == [-np.inf, 0.25] and np.isnan(again.low[1])
    path = run.table('classes')
    path.write_text(path.read_text().replace('0.25', 'low'))
    with pytest.raises(InputError, match="classes.csv, line 4: low is 'low', not a number"):
        run.read_results()


def test_tables_of_a_study_are_written_as_pandas_would(finished):
    paths = [*finished.glob('*/table.csv'), *(finished / 'results').glob('*.csv')]
    assert len(paths) >= 8
    for path in paths:
        table = read_table(path)
        of_pandas = pd.read_csv(path, dtype=str, keep_default_na=False)
        assert of_pandas.to_csv(index=False, lineterminator='\n').encode() == path.read_bytes()
        write_table(table, path.with_name('again.csv'))
        assert path.with_name('again.csv').read_bytes() == path.read_bytes()
        path.with_name('again.csv').unlink()


# plans and the command line


@pytest.mark.parametrize(
    'content,targets',
    [
        ('Target\n5 0,\n25 0,\n', [[0, 5], [0, 25]]),
        ('Target\n"5 0"\n\n25 0\n', [[0, 5], [0, 25]]),
        ('\ufeffTarget,n\r\n5 0, 2 \r\n', [[0, 5], [0, 5]]),
        ('Id,Target\nf0,5 0\n', [[0, 5]]),
        ('classes\nNucleoplasm;  Nuclear bodies;\n', [[0, 5]]),
    ],
)
def test_plans_that_are_read(tmp_path, content, targets):
    (tmp_path / 'plan.csv').write_text(content)
    assert [row.nonzero()[0].tolist() for row in read_plan(tmp_path / 'plan.csv', HPA)] == targets


@pytest.mark.parametrize(
    'content,sentence',
    [
        (
            'Target\n5,0\n25,0\n',
            'line 2 has 2 cells, the header has 1 (Target): separate class numbers by spaces (\'5 0\')',
        ),
        ('Target\n5\n\n25,0\n', 'line 4 has 2 cells'),
        ('classes\n5\n', "line 2: there is no class named '5': write 'Nuclear bodies'"),
        ('classes;n\nNucleoli;2\n', 'separated by semicolons'),
        ('target\n5\n', "a column 'target': write it as Target"),
        ('Target,N\n5,9\n', "a column 'N': write it as n"),
        ('Target,n\n5,99999999999999999999\n', 'not a whole number'),
        ('Target,classes\n5,Nucleoli\n', 'both Target and classes'),
        ('Target\n', 'plans no image'),
    ],
)
def test_plans_that_are_refused(tmp_path, content, sentence):
    (tmp_path / 'plan.csv').write_text(content)
    with pytest.raises(InputError) as caught:
        read_plan(tmp_path / 'plan.csv', HPA)
    assert sentence in str(caught.value)


def test_a_plan_of_classes_with_awkward_names(tmp_path):
    vocab = Vocabulary(['2', '10', 'Golgi ', 'a;b', 'a'])
    (tmp_path / 'plan.csv').write_text('classes\n10; 2\nGolgi ;10\na;b\n')
    rows = read_plan(tmp_path / 'plan.csv', vocab)
    assert [vocab.names_of(row) for row in rows] == [['2', '10'], ['10', 'Golgi '], ['a;b']]


@pytest.fixture(scope='module')
def generator(tmp_path_factory):
    "A store of simulated cells whose classes are named by digits, and a generator trained on it for a moment"
    folder = tmp_path_factory.mktemp('generator')
    cells = simulate_store(folder / 'cells', dict(train=24, val=6), classes=['Nucleoli', 'Plasma membrane', 'Cytosol'])
    vocab = Vocabulary(['1', '2', '3'])
    store = write_store(folder / 'digits', cells.images, cells.table, cells.channels, vocab)
    loop = LoopConfig(steps=2, batch_size=4, lr=1e-3)
    train_generator(store, folder / 'trained', GeneratorConfig(unet=UNetConfig(widths=(16, 32)), loop=loop))
    return folder


def test_a_plan_and_negative_labels_on_the_command_line(protloc, generator, tmp_path):
    plan = tmp_path / 'plan.csv'
    words = ['generate', generator / 'trained', tmp_path / 'new', '--like', generator / 'digits']
    words += ['--plan', plan, '--num-inference-steps', 2]
    plan.write_text('Target\n\n2,0\n')
    assert 'plan.csv, line 3 has 2 cells' in refused(protloc, *words, left=[tmp_path / 'new'])
    plan.write_text('classes\n1;3\n2\n')
    assert "no class '0'" in refused(protloc, *words, '--negative', '0', left=[tmp_path / 'new'])
    code, _, err = protloc(*words, '--negative', '1')
    assert code == 0, err
    store = ImageStore(tmp_path / 'new')
    assert store.table.target.tolist() == ['0 2', '1']
    assert store.manifest['made']['negative_labels'] == ['1']
    shutil.rmtree(tmp_path / 'new')


def test_the_pipeline_refuses_lists_with_two_readings(generator):
    from protloc.diffusion.pipeline import generators_for
    from protloc.diffusion.train import open_pipeline

    pipe = open_pipeline(generator / 'trained')
    pipe.set_progress_bar_config(disable=True)

    def draw(labels):
        return pipe(labels, generator=generators_for(0, [0]), num_inference_steps=2)

    expected = draw(np.array([[0, 1, 0]]))
    assert (draw([[0.0, 1.0, 0.0]]) == expected).all() and (draw('2') == expected).all()
    for labels in ([[0, 1, 0]], [0, 1, 0]):
        with pytest.raises(InputError, match='class numbers or a multi-hot row'):
            draw(labels)
    with pytest.raises(InputError, match="the class named '1' or the one at position 1, '2'"):
        draw(1)


def test_simulated_classes_by_name_or_number(protloc, tmp_path):
    words = ['simulate', tmp_path / 's', '--train', 6, '--val', 0, '--test', 0]
    assert protloc(*words, '--classes', 'Nucleoli, 25,7')[0] == 0
    assert ImageStore(tmp_path / 's').vocab.names == ('Nucleoli', 'Cytosol', 'Golgi apparatus')
    words[1] = tmp_path / 't'
    assert 'there is no class number 99' in refused(protloc, *words, '--classes', '99', left=[tmp_path / 't'])
    assert "class name occurs twice" in refused(protloc, *words, '--classes', 'Nucleoli,2', left=[tmp_path / 't'])
    assert class_numbers(['2', 25, 'Golgi apparatus']) == [2, 25, 7]


def test_tables_are_read_and_written_in_one_place():
    "pandas guesses missing values, indices and numbers; the csv module of others would do without line numbers"
    import protloc

    package = Path(protloc.__file__).parent
    modules = [path for path in package.rglob('*.py') if path.name not in ('tables.py', '_modidx.py')]
    guessing = re.compile(r'read_csv\(|read_table\(.*sep|csv\.(reader|writer|DictReader)|\.to_csv\([^)]')
    assert len(modules) > 40
    assert not {path.name for path in modules if guessing.search(path.read_text())}
