"""The simulator: one cell, fields of cells, and stores of either."""

import hashlib
from dataclasses import fields, replace

import numpy as np
import pytest
from scipy import ndimage

from protloc.core import InputError, rng_for
from protloc.data.simulate.cells import Cell, CellLine, draw_shape, parameter_table
from protloc.data.simulate.datasets import oracle_store, simulate_store
from protloc.data.simulate.organelles import centrosome, organizing_center
from protloc.data.simulate.photographs import draw_field, simulate_cell
from protloc.data.store import ImageStore

CLASSES = ['Nucleoli', 'Plasma membrane', 'Mitotic spindle']


def nuclei(image):
    "Nuclei that can be told apart in the blue stain"
    blue = ndimage.gaussian_filter(image[2].astype(float), 1)
    return ndimage.label(blue > 0.2 * blue.max())[1]


def pixels(store):
    return hashlib.sha256((store.path / 'images.npy').read_bytes()).hexdigest()


# parameters


def test_table_holds_every_parameter():
    table = parameter_table()
    assert list(table.index) == [f.name for f in fields(CellLine)]
    assert list(table.columns) == ['default', 'low', 'high', 'unit', 'meaning']
    assert (table.low < table.high).all() and (table.low <= table.default).all() and (table.default <= table.high).all()
    assert (table.unit.str.len() > 0).all() and (table.meaning.str.len() > 5).all()


def test_lines_lie_in_the_ranges_and_differ():
    table = parameter_table()
    drawn = np.array([[getattr(CellLine.draw(k), name) for name in table.index] for k in range(60)])
    assert (drawn >= table.low.to_numpy(float)).all() and (drawn <= table.high.to_numpy(float)).all()
    room = (table.high - table.low).to_numpy(float)
    assert (np.ptp(drawn, axis=0) > 0.7 * room).all()


def test_first_parameters_of_a_line_never_change():
    "Data sets name their cell lines by number: a new parameter goes to the end of the table"
    line = CellLine.draw(3)
    assert list(parameter_table().index[:17]) == [
        'nucleus_radius',
        'nucleus_aspect',
        'cell_radius',
        'cell_aspect',
        'lobes',
        'polarity',
        'crowding',
        'nucleoli',
        'filaments',
        'vesicles',
        'grain',
        'red',
        'blue',
        'yellow',
        'background',
        'photons',
        'psf',
    ]
    share = rng_for(3, 'cell line').random(17)
    assert np.isclose([line.nucleus_radius, line.psf], [0.115 + share[0] * 0.05, 0.0035 + share[16] * 0.003]).all()


@pytest.mark.parametrize(
    'name, label',
    dict(
        mtoc=18,
        filaments=14,
        peroxisomes=8,
        endosomes=9,
        lysosomes=10,
        mitochondria=23,
        droplets=20,
        spot_size=5,
        crosstalk=0,
        psf=0,
        photons=0,
        background=0,
        nucleus_radius=0,
        nucleoli=2,
    ).items(),
)
def test_every_parameter_shows(name, label):
    parameter = parameter_table().loc[name]
    lines = [replace(CellLine(crowding=0.0), **{name: value}) for value in (parameter.low, parameter.high)]
    low, high = (simulate_cell([label], line, index=2, size=96) for line in lines)
    assert (low != high).mean() > 0.002


@pytest.mark.parametrize('label', [3, 4, 5, 8, 9, 10, 18, 20, 26])
def test_spot_size_reaches_all_dots(label):
    lines = [CellLine(crowding=0.0, spot_size=factor, crosstalk=0.0) for factor in (0.8, 1.25)]
    small, large = (simulate_cell([label], line, index=2, size=96)[1] for line in lines)
    assert (abs(small.astype(int) - large) > 10).mean() > 0.0005


@pytest.mark.parametrize('name, label', dict(mtoc=25, spot_size=25, peroxisomes=7, lysosomes=8).items())
def test_parameters_leave_other_organelles_alone(name, label):
    parameter = parameter_table().loc[name]
    alone = CellLine(crowding=0.0, crosstalk=0.0)
    lines = [replace(alone, **{name: value}) for value in (parameter.low, parameter.high)]
    low, high = (simulate_cell([label], line, index=2, size=64)[1] for line in lines)
    assert (low == high).all()


def test_mtoc_moves_the_centrosome():
    "From the rim of the nucleus, on the same side"

    def away(mtoc):
        cell = Cell(draw_shape(CellLine(mtoc=mtoc), {19}, np.random.default_rng(0)), 128)
        canvases = [organelle(cell, np.random.default_rng(1)) for organelle in (centrosome, organizing_center)]
        return [cell.t.flat[canvas.argmax()] for canvas in canvases]

    assert np.allclose(np.subtract(away(0.3), away(0.1)), 0.2, atol=0.06)


def test_a_wide_cell_with_a_far_nucleus():
    "A shift may make a cell wider than long; its nucleus stays inside"
    line = CellLine(cell_aspect=0.6, polarity=0.9, nucleus_radius=0.05)
    for i in range(40):
        assert np.isfinite(draw_shape(line, {0}, np.random.default_rng(i)).outline).all()


@pytest.mark.parametrize('shift', [0.5, 1.0])
def test_shifted_lines_can_be_drawn(shift):
    for k in range(40):
        shapes = draw_field(CellLine.draw(k, shift), {22}, 5, np.random.default_rng(k))[0]
        for shape in shapes:
            assert np.isfinite(shape.outline).all() and (shape.outline > shape.nucleus).all()


# fields


def test_one_cell_is_the_default():
    one = simulate_cell([0, 23], 2, 3, 4, 5, 64)
    assert (one == simulate_cell([0, 23], 2, 3, 4, 5, 64, cells=1)).all()
    assert (one != simulate_cell([0, 23], 2, 3, 4, 5, 64, cells=2)).any()


@pytest.mark.parametrize('label', range(28))
def test_every_class_shows_in_a_field(label):
    image = simulate_cell([label], label % 18, label, 0, label, 128, cells=4)
    without = simulate_cell([27 if label == 0 else 0], label % 18, label, 0, label, 128, cells=4)
    assert image.shape == (4, 128, 128) and image.dtype == np.uint8
    assert image[1].max() > 90 and image[1].std() > 2
    assert (abs(image[1].astype(int) - without[1]) > 25).mean() > 0.002


def test_a_field_shows_its_cells():
    line = replace(CellLine.draw(1), crowding=0.0)
    counts = [nuclei(simulate_cell([25], line, 0, 0, i, 256, cells=9)) for i in range(6)]
    assert all(8 <= n <= 10 for n in counts) and np.mean(counts) > 8.5


def test_cells_of_a_field_differ():
    shapes, places, across = draw_field(CellLine(), {0}, 9, np.random.default_rng(0))
    assert len(shapes) == len(places) == 9 and len({shape.nucleus.tobytes() for shape in shapes}) == 9
    assert (places > 0).all() and (places < across).all()
    apart = np.hypot(*(places[:, None] - places).transpose(2, 0, 1)) + np.eye(9)
    assert apart.min() > 0.3


def test_a_field_is_as_sharp_as_its_cells():
    "Blur and noise belong to the cell's scale: a wider field of the same cells is no softer"
    line = CellLine(crowding=0.0)

    def edge(cells, size):
        "Steepest step of the nuclear stain, share of its height"
        blue = simulate_cell([0], replace(line, grain=0.0, photons=1e6), 0, 0, 1, size, cells)[2].astype(float)
        return np.abs(np.diff(blue)).max() / blue.max()

    assert edge(4, 256) == pytest.approx(edge(16, 512), rel=0.15)


@pytest.mark.parametrize('label', [16, 17])
def test_some_cells_divide_and_at_least_one(label):
    fields_drawn = [draw_field(CellLine(), {label, 0}, 8, np.random.default_rng(i))[0] for i in range(40)]
    dividing = [np.mean([label in shape.labels for shape in shapes]) for shapes in fields_drawn]
    assert min(dividing) >= 1 / 8 and 0.15 < np.mean(dividing) < 0.4
    assert all(0 in shape.labels for shape in fields_drawn[0])


@pytest.mark.parametrize('cells', [2, 3, 9])
def test_junctions_lie_where_cells_touch(cells):
    for i in range(60):
        shapes = draw_field(CellLine.draw(i), {22}, cells, np.random.default_rng(i))[0]
        touching = [shape for shape in shapes if 22 in shape.labels]
        assert touching and all(shape.contact.any() for shape in touching)


def test_small_cells_grow_until_they_touch():
    for i in range(20):
        shapes = draw_field(CellLine(cell_radius=0.2), {22}, 2, np.random.default_rng(i))[0]
        assert any(22 in shape.labels for shape in shapes)


@pytest.mark.parametrize('size, cells', [(35, 2), (64, 7), (128, 28), (512, 16)])
def test_sizes_of_fields(size, cells):
    image = simulate_cell([2], 1, 0, 0, 0, size, cells)
    assert image.shape == (4, size, size) and min(image.reshape(4, -1).max(1)) > 60


@pytest.mark.parametrize(
    'size, cells, message',
    [
        (32, 0, 'whole number from 1'),
        (32, -3, 'whole number from 1'),
        (64, 2.5, 'whole number from 1'),
        (32, 2, 'at most 1, or a larger size'),
        (64, 8, 'at most 7,'),
        (128, 29, 'at most 28,'),
        (1024, 4, '32 to 512'),
    ],
)
def test_impossible_fields(size, cells, message, tmp_path):
    with pytest.raises(InputError, match=message):
        simulate_cell([0], size=size, cells=cells)
    with pytest.raises(InputError, match=message):
        simulate_store(tmp_path / 's', dict(train=28), size=size, cells=cells)
    assert not list(tmp_path.iterdir())


# stores


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return simulate_store(
        tmp_path_factory.mktemp('fields') / 'one', dict(train=52, val=6, test=6), 48, CLASSES, seed=3, cells=3
    )


def test_workers_do_not_change_a_store(store, tmp_path):
    two = simulate_store(tmp_path / 'two', dict(train=52, val=6, test=6), 48, CLASSES, seed=3, workers=2, cells=3)
    assert pixels(two) == pixels(store)
    row = store.table.iloc[51]
    names = store.vocab.names_of(row.target)
    again = simulate_cell(names, row.cell_line, int(row.group[-5:]), seed=3, index=51, size=48, cells=3)
    assert (again == store.images[51]).all()


def test_the_manifest_tells_the_cells(store, tmp_path):
    assert ImageStore(store.path).manifest['made']['cells'] == 3
    assert simulate_store(tmp_path / 's', dict(train=3), 32, CLASSES).manifest['made']['cells'] == 1


def test_the_oracle_of_fields_draws_fields(store, tmp_path):
    perfect = oracle_store(tmp_path / 'perfect', store, store.labels[:6], seed=1)
    made = perfect.manifest['made']
    assert (made['kind'], made['seed'], made['cells'], perfect.size) == ('oracle', 1, 3, 48)
    assert (perfect.labels == store.labels[:6]).all()
    old = ImageStore(store.path)
    old.manifest['made'].pop('cells')  # a store from before there were fields
    ones = oracle_store(tmp_path / 'ones', old, store.labels[:6], seed=1)
    assert ones.manifest['made']['cells'] == 1 and (ones.images != perfect.images).any((1, 2, 3)).all()
