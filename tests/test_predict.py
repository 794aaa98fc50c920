"""New fields are prepared for a classifier as its training images were, and its answers depend on nothing else."""

import importlib.util
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from protloc.classify import export
from protloc.classify.backbone import Classifier, with_aux_bn
from protloc.classify.export import export_classifier, open_exported
from protloc.classify.predict import (
    contrast_note,
    load_classifier,
    load_classifiers,
    map_batches,
    probabilities,
    save_classifier,
    symmetries,
)
from protloc.classify.submission import predict_folder, submission, write_probabilities
from protloc.classify.thresholds import choose_thresholds, prevalence_thresholds, read_thresholds
from protloc.core import InputError
from protloc.data.kind import ImageKind
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore
from protloc.labels import STAINS
from protloc.training import seeded

HOW = ('--size', 16, '--tile', 32, '--normalise', '--percentiles', '1,99', '--min-foreground', 0.2, '--workers', 1)


@pytest.fixture
def model(protloc, challenge, tmp_path):
    "A classifier trained on stretched tiles with nuclei; half of the fields have a nucleus in one tile only"
    for i in range(0, 8, 2):
        plane = np.zeros((64, 64), np.uint8)
        plane[:32, :32] = 200
        plane[:16, :16] = 90 + i
        Image.fromarray(plane).save(challenge / 'train' / f'f{i}_blue.png')
    assert protloc('prepare', challenge, tmp_path / 'store', *HOW)[0] == 0
    train = (
        'train-classifier',
        tmp_path / 'store',
        tmp_path / 'model',
        '--set',
        'loop={steps: 2, batch_size: 8}',
        '--set',
        'backbone=resnet10',
    )
    assert protloc(*train)[0] == 0
    return tmp_path / 'model'


def test_a_folder_is_prepared_as_the_training_images_were(protloc, challenge, model, tmp_path):
    out, table = tmp_path / 'submission.csv', tmp_path / 'p.csv'
    code, _, err = protloc('predict', model, challenge, out, '--probabilities', table)
    assert code == 0, err
    store, predicted = ImageStore(tmp_path / 'store'), pd.read_csv(table, index_col='Id')
    assert store.manifest['made']['tiles_dropped'] == 12
    tiles = pd.DataFrame(probabilities(load_classifier(model)[0], store, store.rows()))
    expected = tiles.groupby(store.table.group.values).mean()
    assert np.abs(predicted.loc[expected.index].to_numpy() - expected.to_numpy()).max() < 1e-5


def test_a_field_without_nuclei_still_gets_an_answer(protloc, challenge, model, tmp_path):
    new = tmp_path / 'new'
    new.mkdir()
    for stain in STAINS:
        Image.fromarray(np.full((64, 64), 9, np.uint8)).save(new / f'glass_{stain}.png')
    assert protloc('predict', model, new, tmp_path / 'submission.csv')[0] == 0
    assert pd.read_csv(tmp_path / 'submission.csv').Id.tolist() == ['glass']


@pytest.mark.slow
def test_bad_files_are_listed_beside_the_predictions(protloc, challenge, model, tmp_path):
    (challenge / 'train' / 'f3_red.png').write_text('hello')
    code, _, err = protloc('predict', model, challenge, tmp_path / 'submission.csv')
    assert code == 2 and f'1 of 8 fields cannot be used, see {tmp_path}/submission.csv.bad.csv' in err
    assert not (tmp_path / 'submission.csv').exists()
    assert pd.read_csv(tmp_path / 'submission.csv.bad.csv').Id.tolist() == ['f3']
    assert protloc('predict', model, challenge, tmp_path / 'submission.csv', '--skip-bad')[0] == 0
    assert len(pd.read_csv(tmp_path / 'submission.csv')) == 7


@pytest.mark.parametrize(
    'option,sentence',
    [
        (('--tile', 64), 'has tile 64, .* has 32'),
        (('--percentiles', '.1,99.9'), 'has percentiles 0.1, 99.9, .* has 1.0, 99.0'),
    ],
)
def test_images_prepared_otherwise_are_refused(protloc, challenge, model, tmp_path, option, sentence):
    assert protloc('prepare', challenge, tmp_path / 'other', *HOW, *option)[0] == 0
    code, _, err = protloc('evaluate', model, tmp_path / 'other')
    assert code == 2 and re.search(sentence, err), err


NAMES = ['Nucleoli', 'Plasma membrane', 'Cytosol']


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    return simulate_store(tmp_path_factory.mktemp('cells') / 'store', dict(train=30, val=10), classes=NAMES)


def classifier(backbone='resnet10', seed=0, **options):
    "Untrained, but with BatchNorm statistics that a training mode would change"
    with seeded(seed, 'test'):
        model = Classifier(backbone, 4, 3, 32, **options)
        model.mean.fill_(40)
        model.std.fill_(50)
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.2)
                layer.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize('backbone', ['resnet10', 'densenet121'])
def test_predictions_depend_on_nothing_but_the_image(cells, backbone):
    "Not on the batch size, the order, the other images, the mode of the model, or auxiliary BatchNorm"
    model, rows, rng = classifier(backbone), cells.rows()[:12], np.random.default_rng(0)
    alone = probabilities(model.eval(), cells, rows)
    for size in (1, 5, 12):
        assert probabilities(model, cells, rows, batch_size=size) == pytest.approx(alone, abs=1e-5)
    for _ in range(3):
        others = rng.permutation(len(cells))[:9]
        with_others = probabilities(model, cells, np.append(others, rows[:2]), batch_size=4)
        assert with_others[-2:] == pytest.approx(alone[:2], abs=1e-5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert probabilities(model.train(), cells, rows) == pytest.approx(alone, abs=1e-6) and model.training
    assert all((v == state[k]).all() for k, v in model.state_dict().items())
    assert probabilities(with_aux_bn(model).train(), cells, rows) == pytest.approx(alone, abs=1e-6)
    in_train_mode = model(torch.from_numpy(cells.images[rows])).sigmoid().detach().numpy()
    assert np.abs(in_train_mode - alone).max() > 0.01, 'this network would not have shown it'


def test_the_mode_comes_back_after_an_error(cells):
    models = [classifier().train(), classifier().eval()]

    def fails(images):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        map_batches(models, cells, cells.rows(), fails)
    assert [m.training for m in models] == [True, False]


def test_map_batches_gives_what_its_function_gives(cells):
    "Features and probabilities in one pass"
    model = classifier().eval()

    def both(images):
        features = model.features(images)
        return features, model.head(features).sigmoid()

    features, predicted = map_batches(model, cells, cells.rows(), both, batch_size=7)
    with torch.no_grad():
        expected = model.features(torch.from_numpy(np.array(cells.images)))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert predicted.numpy() == pytest.approx(probabilities(model, cells, cells.rows()), abs=1e-5)


def test_turned_images_get_the_same_answer_with_tta(cells, tmp_path):
    model, images = classifier().eval().requires_grad_(False), torch.from_numpy(cells.images[:6])
    predicted = probabilities(model, cells, cells.rows()[:6], tta=True)
    for turned in (images.rot90(1, (2, 3)), images.flip(2), images.transpose(2, 3)):
        mean = torch.stack([model(view).sigmoid() for view in symmetries(turned)]).mean(0)
        assert mean.numpy() == pytest.approx(predicted, abs=2e-6)
    assert (model(images.flip(2)).sigmoid() - model(images).sigmoid()).abs().max() > 1e-4


def test_several_classifiers_are_averaged(cells, tmp_path):
    for seed in range(3):
        save_classifier(classifier(seed=seed), tmp_path / str(seed), cells)
    models, card = load_classifiers([tmp_path / str(seed) for seed in range(3)])
    for tta in (False, True):
        each = [probabilities(model, cells, cells.rows(), tta=tta) for model in models]
        assert probabilities(models, cells, cells.rows(), tta=tta) == pytest.approx(np.mean(each, 0), abs=1e-6)
    for what, other in (
        ('classes', NAMES[::-1]),
        ('channels', ['a', 'b', 'c', 'd']),
        ('size', 64),
        ('fields', dict(tile=64)),
    ):
        (tmp_path / '1' / 'classifier.json').write_text(json.dumps({**card, what: other}))
        with pytest.raises(InputError, match=f'1 has {what} '):
            load_classifiers([tmp_path / '0', tmp_path / '1'])
    with pytest.raises(InputError, match='no classifier is given'):
        load_classifiers([])


def test_several_classifiers_on_a_folder(protloc, challenge, model, tmp_path):
    one, card = load_classifier(model)
    several, _ = load_classifiers([model, model])
    expected = predict_folder(one, card, challenge / 'train', workers=1, tta=True)
    predicted = predict_folder(several, card, challenge / 'train', workers=1, tta=True)
    assert predicted.to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-6)


@pytest.mark.parametrize(
    'what,other', [('channels', ['green', 'red', 'blue', 'yellow']), ('size', 64), ('classes', NAMES[::-1])]
)
def test_guard(cells, tmp_path, what, other):
    save_classifier(classifier(), tmp_path, cells)
    card = load_classifier(tmp_path)[1]
    cells.kind.must_match(ImageKind.of(card, 'the classifier'))
    with pytest.raises(InputError, match=f'has {what} .*, the classifier has .*: prepare the images again'):
        cells.kind.must_match(ImageKind.of({**card, what: other}, 'the classifier'), mend='prepare the images again')


# --- new images in other forms than the training images: read alike, or refused


def fields_of_depth(folder, how, n=6, size=64, kind='png'):
    "Fields of four stains, the same pixels in every form: 8 bits, 16 bits (times 257), or 16 bits that hold 0 to 255"
    rng = np.random.default_rng(0)
    (folder / 'train').mkdir(parents=True)
    for i in range(n):
        for stain in STAINS:
            plane = rng.integers(10 * i, 120 + 20 * i, (size, size)).astype(np.uint8)
            plane = dict(byte=plane, word=plane.astype(np.uint16) * 257, narrow=plane.astype(np.uint16))[how]
            Image.fromarray(plane).save(folder / 'train' / f'f{i}_{stain}.{kind}')
    (folder / 'train.csv').write_text('Id,Target\n' + ''.join(f'f{i},{i % 3}\n' for i in range(n)))
    return folder


@pytest.fixture
def trained(protloc, tmp_path):
    "trained(fields, *options) -> the folder of a classifier of these fields"

    def train(fields, *options):
        store, model = fields.parent / f'store of {fields.name}', fields.parent / f'model of {fields.name}'
        assert protloc('prepare', fields, store, '--size', 32, '--workers', 1, *options)[0] == 0
        quick = ('--set', 'loop={steps: 2, batch_size: 4}', '--set', 'backbone=resnet10')
        assert protloc('train-classifier', store, model, *quick)[0] == 0
        return model

    return train


def predicted_by(protloc, model, folder, *options):
    "The probabilities that `predict` writes, by Id"
    table = model.parent / 'p.csv'
    code, _, err = protloc(
        'predict', model, folder, model.parent / 'out.csv', '--overwrite', '--probabilities', table, *options
    )
    assert code == 0, err
    return pd.read_csv(table, index_col='Id')


@pytest.mark.slow
def test_a_classifier_of_16_bits_gives_the_same_pixels_of_any_depth_the_same_answer(protloc, trained, tmp_path):
    folders = {how: fields_of_depth(tmp_path / how, how) for how in ('byte', 'word', 'narrow')}
    for how, options in (('word', ()), ('byte', ('--normalise',))):
        model = trained(folders[how], *options)
        answers = [predicted_by(protloc, model, folder / 'train') for folder in folders.values()]
        assert len(answers[0]) == 6 and answers[0].to_numpy().std(0).max() > 1e-4
        for other in answers[1:]:
            assert list(other.index) == list(answers[0].index)
            assert other.to_numpy() == pytest.approx(answers[0].to_numpy(), abs=2e-3)


@pytest.mark.slow
def test_a_classifier_of_8_bits_refuses_other_depths(protloc, trained, tmp_path):
    byte, word = (fields_of_depth(tmp_path / how, how) for how in ('byte', 'word'))
    model = trained(byte)
    assert json.loads((model / 'classifier.json').read_text())['depths'] == ['uint8']
    out = tmp_path / 'new.csv'
    code, _, err = protloc('predict', model, word / 'train', out)
    assert code == 2 and not out.exists()
    sentence = err.strip().splitlines()[-1]
    assert 'uint16' in sentence and 'f0_red.png' in sentence
    assert sentence.endswith('export these with 8 bits too, or train on a store made by `protloc prepare --normalise`')
    for stain in STAINS:  # one of 16 bits among them
        (byte / 'train' / f'f3_{stain}.png').write_bytes((word / 'train' / f'f3_{stain}.png').read_bytes())
    code, _, err = protloc('predict', model, byte / 'train', out, '--skip-bad')
    assert code == 0
    assert f'1 of 6 fields are left out, see {out}.bad.csv' in err
    assert pd.read_csv(out).Id.tolist() == ['f0', 'f1', 'f2', 'f4', 'f5']
    assert pd.read_csv(f'{out}.bad.csv').Id.tolist() == ['f3']
    card = json.loads((model / 'classifier.json').read_text())
    del card['depths']  # as it was written before depths were noted: any depth, each read as `prepare` would
    (model / 'classifier.json').write_text(json.dumps(card))
    assert len(predicted_by(protloc, model, word / 'train')) == 6


@pytest.mark.slow
def test_scores_on_another_contrast_are_worth_a_word(protloc, trained, tmp_path):
    byte, word = (fields_of_depth(tmp_path / how, how) for how in ('byte', 'word'))
    of_bytes, of_words = trained(byte), trained(word)
    code, _, err = protloc('evaluate', of_bytes, tmp_path / 'store of word', '--split', '')
    assert code == 0
    assert 'stretched by their percentiles, those that the classifier was trained on were used as they are' in err
    for model, store in ((of_bytes, 'byte'), (of_words, 'word')):
        assert 'Note' not in protloc('evaluate', model, tmp_path / f'store of {store}', '--split', '')[2]
    simulated = simulate_store(tmp_path / 'cells', dict(train=5), classes=NAMES)
    assert contrast_note(load_classifier(of_words)[1], simulated) == ''


@pytest.mark.slow
def test_every_layout_is_predicted_as_it_is_prepared(protloc, trained, tmp_path):
    "A folder per class with plates in it, one file for each image: a row for every image, by its path"
    rng = np.random.default_rng(0)
    folder = tmp_path / 'classes'
    ids = []
    for name in ('Golgi', 'Cytosol'):
        for plate in ('p1', 'p2'):
            (folder / name / plate).mkdir(parents=True)
            for i in range(3):
                image = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / name / plate / f'cell {i}.png')
                ids.append(f'{name}/{plate}/cell {i}')
    model = trained(folder, '--tile', 32, '--group-from', r'(cell \d)$')
    table = predicted_by(protloc, model, folder)
    assert sorted(table.index) == sorted(ids)
    store = ImageStore(tmp_path / 'store of classes')
    tiles = pd.DataFrame(probabilities(load_classifier(model)[0], store, store.rows()))
    expected = tiles.groupby(store.table.id.str.replace(r'_y\d+x\d+$', '', regex=True).values).mean()
    assert table.loc[expected.index].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)
    some = predicted_by(protloc, model, folder, '--match', '*/p1/*', '--exclude', '*cell 2*')
    assert sorted(some.index) == sorted(id for id in ids if '/p1/' in id and 'cell 2' not in id)
    assert some.to_numpy() == pytest.approx(table.loc[some.index].to_numpy(), abs=1e-5)


@pytest.fixture
def predicted():
    "Probabilities of 300 images, and labels that they agree with more or less; no image shows the third class"
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 3)) < [0.5, 0.1, 0]).astype(np.float32)
    return np.float32(1 / (1 + np.exp(-(2 * labels - 1 + rng.normal(size=labels.shape))))), labels


def test_thresholds_are_chosen(predicted, tmp_path):
    p, labels = predicted
    best = choose_thresholds(p, labels, tmp_path / 't.json', NAMES)
    assert list(best.index) == NAMES and best.iloc[2] == 0.5

    def f1(k, threshold):
        passes = p[:, k] > threshold
        return 2 * (passes * labels[:, k]).sum() / (passes.sum() + labels[:, k].sum())

    for k in range(2):
        assert f1(k, best.iloc[k]) >= max(f1(k, threshold) for threshold in np.linspace(0, 1, 501))
    matched = choose_thresholds(p, labels, tmp_path / 't.csv', NAMES, 'prevalence')
    assert ((p > matched.to_numpy()).sum(0) == labels.sum(0)).all()
    assert ((p > prevalence_thresholds(p, [0, 0.25, 1])).sum(0) == [0, 75, 300]).all()
    with pytest.raises(InputError, match="no rule for thresholds 'f2'"):
        choose_thresholds(p, labels, tmp_path / 'x.json', NAMES, 'f2')
    assert not (tmp_path / 'x.json').exists()


@pytest.mark.parametrize('file,rule', [('t.json', 'f1'), ('t.csv', 'prevalence')])
def test_thresholds_are_read_by_name(predicted, tmp_path, file, rule):
    path = tmp_path / file
    expected = choose_thresholds(*predicted, path, NAMES, rule)
    assert (read_thresholds(path, NAMES) == expected).all()
    assert (read_thresholds(str(path), NAMES[::-1]) == expected[::-1]).all()
    with pytest.raises(InputError, match='of another vocabulary: only it or only the classifier has Actin, Nucleoli$'):
        read_thresholds(path, ['Actin', *NAMES[1:]])


@pytest.mark.parametrize(
    'text,sentence',
    [
        ('[1, 2]', 'not a table of thresholds'),
        ('hello', 'not a table of thresholds'),
        ('{"Nucleoli": "a"}', 'not a table'),
        ('{"Nucleoli": 2, "Plasma membrane": 0, "Cytosol": 1}', 'between 0 and 1'),
    ],
)
def test_files_that_are_no_thresholds(tmp_path, text, sentence):
    (tmp_path / 'bad.json').write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_thresholds(tmp_path / 'bad.json', NAMES)


def test_numbers_that_are_no_thresholds():
    for value in ('nan', -1, '1.5'):
        with pytest.raises(InputError, match='between 0 and 1'):
            read_thresholds(value, NAMES)
    with pytest.raises(InputError, match='there is no file'):
        read_thresholds('half', NAMES)


def test_submission_with_a_threshold_for_each_class():
    table = pd.DataFrame([[0.9, 0.6, 0.1], [0.2, 0.4, 0.3], [0.1, 0.1, 0.1]], index=list('abc'), columns=NAMES)
    assert submission(table, np.array([0.95, 0.3, 0.2])).Predicted.tolist() == ['1', '1 2', '0 1 2']


def test_tables_of_probabilities(tmp_path):
    table = pd.DataFrame(np.random.default_rng(0).random((3, 3)), index=pd.Index(list('abc'), name='Id'), columns=NAMES)
    write_probabilities(table, tmp_path / 'p.csv')
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / 'p.csv', index_col='Id'), table, atol=1e-6, rtol=0)
    if importlib.util.find_spec('pyarrow'):
        write_probabilities(table, tmp_path / 'p.parquet')
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / 'p.parquet').astype(float), table, atol=1e-6, rtol=0)
    else:
        with pytest.raises(InputError, match='Parquet needs pyarrow: run `pip install pyarrow`, or write a .csv file'):
            write_probabilities(table, tmp_path / 'p.parquet')
        assert not (tmp_path / 'p.parquet').exists()


PAPER = dict(pooling='avg+max', head='mlp_cosine')


@pytest.mark.parametrize(
    'kind,backbone,options',
    [
        ('onnx', 'resnet10', {}),
        ('onnx', 'resnet10', PAPER),
        ('torchscript', 'resnet10', {}),
        ('torchscript', 'resnet10', PAPER),
        ('export', 'resnet10', {}),
        ('export', 'resnet10', PAPER),
        pytest.param('torchscript', 'swin_t', {}, marks=pytest.mark.slow),
    ],
)
def test_exported_classifiers_say_the_same(cells, tmp_path, kind, backbone, options):
    if kind == 'onnx':
        for package in ('onnx', 'onnxscript', 'onnxruntime'):
            pytest.importorskip(package)
    model = classifier(backbone, **options).eval()
    save_classifier(model, tmp_path / 'model', cells)
    rng = np.random.default_rng(0)
    predicted, labels = rng.random((20, 3)), np.eye(3)[rng.integers(3, size=20)]
    chosen = choose_thresholds(predicted, labels, tmp_path / 'model' / 'thresholds.json', NAMES)
    export_classifier(tmp_path / 'model', tmp_path / 'file', kind)
    predict, card = open_exported(tmp_path / 'file', kind)
    expected = probabilities(model, cells, cells.rows())
    for n in (1, 2, 40):
        assert predict(torch.from_numpy(cells.images[:n])).numpy() == pytest.approx(expected[:n], abs=1e-5)
    assert card['classes'] == NAMES and card['channels'] == list(STAINS) and card['thresholds'] == chosen.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'model']


def test_an_export_that_says_something_else_is_not_kept(cells, tmp_path, monkeypatch):
    save_classifier(classifier(), tmp_path / 'model', cells)
    write, read = export.EXPORTS['torchscript']

    def read_wrongly(content):
        predict, card = read(content)
        return lambda images: predict(images) + 0.01, card

    monkeypatch.setitem(export.EXPORTS, 'torchscript', (write, read_wrongly))
    with pytest.raises(
        InputError, match='torchscript cannot express the backbone resnet10: its probabilities are off by 0.01'
    ):
        export_classifier(tmp_path / 'model', tmp_path / 'file.pt', 'torchscript')
    monkeypatch.setattr(export.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(
        InputError,
        match='ONNX needs onnx and onnxscript and onnxruntime: run `pip install onnx onnxscript onnxruntime`',
    ):
        export_classifier(tmp_path / 'model', tmp_path / 'file.onnx')
    assert [path.name for path in tmp_path.iterdir()] == ['model']
