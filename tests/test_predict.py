"""New fields are prepared for a classifier as its training images were."""
import numpy as np, pandas as pd, pytest
from PIL import Image

from protloc.classify.predict import load_classifier, probabilities
from protloc.data.store import ImageStore
from protloc.labels import STAINS

HOW = ('--size', 16, '--tile', 32, '--normalise', '--percentiles', '1,99', '--min-foreground', .2, '--workers', 1)


@pytest.fixture
def model(protloc, challenge, tmp_path):
    "A classifier trained on tiles, stretched, those without nuclei dropped; half of the fields have a nucleus in one tile only"
    for i in range(0, 8, 2):
        plane = np.zeros((64, 64), np.uint8); plane[:32, :32] = 200; plane[:16, :16] = 90+i
        Image.fromarray(plane).save(challenge/'train'/f'f{i}_blue.png')
    assert protloc('prepare', challenge, tmp_path/'store', *HOW)[0] == 0
    train = ('train-classifier', tmp_path/'store', tmp_path/'model', '--set', 'loop={steps: 2, batch_size: 8}', '--set', 'backbone=resnet10')
    assert protloc(*train)[0] == 0
    return tmp_path/'model'


def test_a_folder_is_prepared_as_the_training_images_were(protloc, challenge, model, tmp_path):
    code, _, err = protloc('predict', model, challenge, tmp_path/'said.csv', '--probabilities', tmp_path/'p.csv')
    assert code == 0, err
    store, found = ImageStore(tmp_path/'store'), pd.read_csv(tmp_path/'p.csv', index_col='Id')
    assert store.manifest['made']['tiles_dropped'] == 12
    expected = pd.DataFrame(probabilities(load_classifier(model)[0], store, store.rows())).groupby(store.table.group.values).mean()
    assert np.abs(found.loc[expected.index].to_numpy()-expected.to_numpy()).max() < 1e-5


def test_a_field_without_nuclei_still_gets_an_answer(protloc, challenge, model, tmp_path):
    new = tmp_path/'new'
    new.mkdir()
    for stain in STAINS: Image.fromarray(np.full((64, 64), 9, np.uint8)).save(new/f'glass_{stain}.png')
    assert protloc('predict', model, new, tmp_path/'said.csv')[0] == 0
    assert pd.read_csv(tmp_path/'said.csv').Id.tolist() == ['glass']


def test_bad_files_are_listed_beside_the_predictions(protloc, challenge, model, tmp_path):
    (challenge/'train'/'f3_red.png').write_text('hello')
    code, _, err = protloc('predict', model, challenge, tmp_path/'said.csv')
    assert code == 2 and f'1 of 8 fields cannot be used, see {tmp_path}/said.csv.bad.csv' in err and not (tmp_path/'said.csv').exists()
    assert pd.read_csv(tmp_path/'said.csv.bad.csv').Id.tolist() == ['f3']
    assert protloc('predict', model, challenge, tmp_path/'said.csv', '--skip-bad')[0] == 0
    assert len(pd.read_csv(tmp_path/'said.csv')) == 7


@pytest.mark.parametrize('option,sentence', [(('--tile', 64), 'has tile 64, the classifier was trained with 32'),
    (('--percentiles', '.1,99.9'), 'has percentiles 0.1, 99.9, the classifier was trained with 1.0, 99.0')])
def test_images_prepared_otherwise_are_refused(protloc, challenge, model, tmp_path, option, sentence):
    assert protloc('prepare', challenge, tmp_path/'other', *HOW, *option)[0] == 0
    code, _, err = protloc('evaluate', model, tmp_path/'other')
    assert code == 2 and sentence in err, err
