"""Networks by name, their stems, sizes, pooling, heads and pretrained weights; losses against direct computation."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model, get_model_weights

from protloc.classify import backbone
from protloc.classify.backbone import (
    BACKBONES,
    HEADS,
    POOLINGS,
    AuxBatchNorm,
    Classifier,
    CosineHead,
    build_backbone,
    has_aux_bn,
    load_pretrained,
    lookup_backbone,
    stem_filters,
    with_aux_bn,
    with_stem,
)
from protloc.classify.losses import (
    CRITERIA,
    LARGEST_WEIGHT,
    arcface,
    bce,
    check_head,
    check_targets,
    criterion,
    positive_weights,
)
from protloc.core import InputError, write_json
from protloc.labels import STAINS
from protloc.training import save_weights, seeded

TORCHVISION = [n for n in BACKBONES if n != 'resnet10']


def built(name='resnet10', channels=4, size=32, **kw):
    with seeded(0, 'test'):
        return Classifier(name, channels, 5, size, **kw)


def batch(n=6, channels=4, size=32):
    return torch.randint(
        0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture
def said():
    "Warnings that were given"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        yield found


# Networks


@pytest.mark.parametrize('name', ['resnet10', 'resnet18'])
def test_first_weights_are_those_of_earlier_versions(name):
    with seeded(0, 'classifier'):
        now = Classifier(name, 4, 28)
    with seeded(0, 'classifier'):
        net = backbone.resnet10() if name == 'resnet10' else torchvision.models.resnet18()
        old = net.conv1
        net.conv1 = nn.Conv2d(4, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode='fan_out', nonlinearity='relu')
        head, net.fc = nn.Linear(net.fc.in_features, 28), nn.Identity()
    assert [*now.backbone.state_dict()] == [*net.state_dict()]
    for mine, its in ((now.backbone, net), (now.head, head)):
        assert all(a.equal(b) for a, b in zip(mine.state_dict().values(), its.state_dict().values()))


@pytest.mark.parametrize('name', TORCHVISION)
def test_cost_is_what_torchvision_says(name):
    meta = get_model_weights(name).DEFAULT.meta
    with torch.device('meta'):
        net, width = build_backbone(name, 3, 224)
        with FlopCounterMode(display=False) as flops:
            net.eval()(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in net.parameters()) + 1000 * (width + 1) == meta['num_params']
    assert flops.get_total_flops() / 2e9 + width / 1e6 == pytest.approx(meta['_ops'], rel=0.02)


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('pooling', POOLINGS)
@pytest.mark.parametrize('channels', [1, 5])
def test_every_network_pools_for_any_channels_and_its_least_size(name, pooling, channels):
    b = BACKBONES[name]
    if not b.pool and pooling != 'avg':
        with pytest.raises(InputError, match='class token'), torch.device('meta'):
            Classifier(name, channels, 5, b.least, pooling)
        return
    with torch.device('meta'):
        net, width = build_backbone(name, channels, b.least, pooling)
    assert net.eval()(torch.empty(2, channels, b.least, b.least, device='meta')).shape == (2, width)
    with pytest.raises(InputError, match='too deep for images of'):
        build_backbone(name, channels, b.least - 1)


@pytest.mark.parametrize('name', ['resnet18', 'swin_t', 'convnext_tiny', 'densenet121'])
def test_pooling_is_over_the_last_maps(name):
    x = batch(2)
    nets = {p: built(name, pooling=p).eval() for p in POOLINGS}
    for p in POOLINGS:
        nets[p].backbone.load_state_dict(nets['avg'].backbone.state_dict())
    with torch.no_grad():
        f = {p: nets[p].features(x) for p in POOLINGS}
    both = f['avg+max'].view(2, -1, 2)
    assert torch.allclose(both[..., 0], f['avg'], atol=1e-5) and torch.allclose(both[..., 1], f['max'], atol=1e-5)


def test_maximum_is_not_below_average():
    f = built('densenet121', size=64, pooling='avg+max').eval().features(batch(2, size=64)).view(2, -1, 2)
    assert (f[..., 1] >= f[..., 0] - 1e-6).all() and (f[..., 1] > f[..., 0] + 1e-3).any()


@pytest.mark.parametrize(
    'name,text', [('resnet81', "did you mean 'resnet18'"), ('vit_b16', "did you mean 'vit_b_16'"), ('zzz', 'known are')]
)
def test_unknown_networks(name, text):
    with pytest.raises(InputError, match=text):
        lookup_backbone(name)


def test_without_timm_one_sentence(monkeypatch):
    monkeypatch.setattr(backbone.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match='pip install timm'):
        Classifier('timm/resnet18', 4, 5)


def test_timm_networks(tmp_path):
    timm = pytest.importorskip('timm')
    x = batch(2, size=64)
    for name, pooling in (('resnet10t', 'avg+max'), ('vit_tiny_patch16_224', 'avg'), ('convnextv2_atto', 'max')):
        assert built(f'timm/{name}', size=64, pooling=pooling).eval()(x).shape == (2, 5)
    with pytest.raises(InputError, match='did you mean'):
        lookup_backbone('timm/resnet81')
    with pytest.raises(InputError, match='no multiple of its 16'):
        built('timm/vit_tiny_patch16_224', size=40)
    net = timm.create_model('resnet10t').eval()
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    c = load_pretrained(built('timm/resnet10t', size=64).eval(), tmp_path / 'net.pth', STAINS)
    grey = torch.rand(2, 1, 64, 64)
    net.reset_classifier(0)
    assert torch.allclose(c.features(grey.expand(-1, 4, -1, -1)), net(grey.expand(-1, 3, -1, -1)), atol=1e-5)
    with pytest.raises(InputError, match='does not fit'):
        load_pretrained(built('timm/vit_tiny_patch16_224', size=64), tmp_path / 'net.pth')


@pytest.mark.parametrize('name', ['vit_b_16', 'swin_t', 'convnext_tiny'])
def test_patches_keep_the_spread_of_the_response(name):
    "A random stem for N channels responds to noise as strongly as the one for three"
    b = BACKBONES[name]
    with seeded(0, 'stem'):
        old = (
            get_model(name).get_submodule(b.stem).weight
            if name != 'vit_b_16'
            else torch.randn(768, 3, 16, 16) / math.sqrt(768)
        )
        net = nn.Module()
        net.stem = nn.Conv2d(3, *old.shape[:1], old.shape[2])
        net.stem.weight.data = old.detach()
        with_stem(net, 'stem', 12)

    def response(w):
        return w.detach().square().flatten(1).sum(1).mean().item()

    assert response(net.stem.weight) == pytest.approx(response(old), rel=0.05) and net.stem.in_channels == 12


# Pretrained weights


@pytest.mark.parametrize('name', ['resnet18', 'swin_t', 'convnext_tiny', 'densenet121', 'vit_b_16'])
def test_pretrained_network_sees_grey_stains_as_a_grey_photograph(name, monkeypatch, tmp_path):
    options = {'image_size': 32} if name == 'vit_b_16' else {}
    with seeded(0, 'photo'):
        net = get_model(name, **options).eval()
    old = {
        k.replace('norm1.', 'norm.1.').replace('conv2.', 'conv.2.') if 'denselayer' in k else k: v
        for k, v in net.state_dict().items()
    }
    monkeypatch.setattr(backbone, '_read_file', lambda path: old)
    (tmp_path / 'net.pth').touch()
    c = load_pretrained(built(name).eval(), tmp_path / 'net.pth', STAINS)
    grey = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(
            net.get_submodule(BACKBONES[name].classifier)(c.features(grey.expand(-1, 4, -1, -1))),
            net(grey.expand(-1, 3, -1, -1)),
            atol=1e-4,
        )
    if name == 'vit_b_16':
        assert load_pretrained(built(name, size=64).eval(), tmp_path / 'net.pth').features(batch(2, size=64)).shape == (
            2,
            768,
        )


def test_stem_rule():
    w = torch.randn(8, 3, 3, 3)
    assert torch.allclose(stem_filters(w, 4, STAINS)[:, :3], 0.75 * w) and torch.allclose(
        stem_filters(w, 4, STAINS)[:, 3], 0.75 * w.mean(1)
    )
    assert torch.allclose(stem_filters(w, 3, ('blue', 'green', 'red')), w.flip(1))
    for names in (('red', 'green'), ('dapi', 'actin'), None):
        assert torch.allclose(stem_filters(w, 2, names), 1.5 * w.mean(1, keepdim=True).expand(-1, 2, -1, -1))


def test_imagenet_is_taken_from_the_cache_or_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))

    def offline(*args, **kw):
        raise OSError('no connection')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    file = get_model_weights('resnet18').DEFAULT.url.rsplit('/', 1)[1]
    with pytest.raises(
        InputError, match=f'download https.*{file} elsewhere and put it at {tmp_path}/checkpoints/{file}'
    ):
        load_pretrained(built('resnet18'), 'imagenet')
    with seeded(1, 'test'):
        net = get_model('resnet18')
    (tmp_path / 'checkpoints').mkdir(exist_ok=True)
    torch.save(net.state_dict(), tmp_path / 'checkpoints' / file)
    c = load_pretrained(built('resnet18'), 'imagenet', STAINS)
    assert c.backbone.layer4[0].conv1.weight.equal(net.layer4[0].conv1.weight) and c.head.weight.equal(
        built('resnet18').head.weight
    )
    with pytest.raises(InputError, match='no ImageNet weights'):
        load_pretrained(built(), 'imagenet')


def test_bad_weights(tmp_path):
    c = built('resnet18')
    assert load_pretrained(c, 'none') is c
    for content, text in ((b'oh', 'cannot be read as weights'), (b'', 'cannot be read as weights')):
        for name in ('a.pth', 'a.safetensors'):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError, match=text):
                load_pretrained(c, tmp_path / name)
    torch.save({'model': get_model('resnet18').state_dict()}, tmp_path / 'nested.pth')
    with pytest.raises(InputError, match='no state dict'):
        load_pretrained(c, tmp_path / 'nested.pth')
    torch.save(get_model('resnet34').state_dict(), tmp_path / 'other.pth')
    with pytest.raises(InputError, match="does not fit the backbone 'resnet18'"):
        load_pretrained(c, tmp_path / 'other.pth')
    with pytest.raises(InputError, match='there are no weights'):
        load_pretrained(c, tmp_path / 'nowhere.pth')


def saved(c, folder, classes=tuple('abcde'), **changes):
    save_weights(c, folder / 'classifier.safetensors')
    write_json(folder / 'classifier.json', {**c.card, 'channels': STAINS, 'classes': classes, **changes})
    return folder


def test_another_classifier_gives_its_head_to_the_same_classes_only(tmp_path, said):
    with seeded(1, 'test'):
        other = Classifier('resnet10', 4, 5).eval()
    other.mean.fill_(100.0)
    saved(other, tmp_path)
    x = batch()
    same = load_pretrained(built().eval(), tmp_path, STAINS, 'abcde')
    assert same(x).equal(other(x)) and not said
    new = load_pretrained(built().eval(), tmp_path, STAINS, 'abcdf')
    assert (
        new.features(x).equal(other.features(x))
        and new.head.weight.equal(built().head.weight)
        and 'its classes differ' in str(said[-1].message)
    )
    load_pretrained(built(), tmp_path)
    assert 'its classes differ' in str(said[-1].message), 'without names nothing is known of the classes'
    load_pretrained(built(pooling='max', head='mlp'), tmp_path, STAINS, 'abcde')
    assert 'its pooling and head differ' in str(said[-1].message)


def test_another_classifier_of_an_earlier_version_has_an_average_and_a_linear_head(tmp_path, said):
    saved(built(), tmp_path)
    card = json.loads((tmp_path / 'classifier.json').read_text())
    write_json(tmp_path / 'classifier.json', {k: v for k, v in card.items() if k not in ('pooling', 'head')})
    load_pretrained(Classifier('resnet10', 4, 5), tmp_path, STAINS, 'abcde')
    assert not said


def test_another_classifier_of_another_kind(tmp_path):
    saved(built(), tmp_path)
    with pytest.raises(InputError, match="holds the backbone 'resnet10', not 'resnet18'"):
        load_pretrained(built('resnet18'), tmp_path)
    with pytest.raises(InputError, match='was trained on the channels'):
        load_pretrained(built(channels=3), tmp_path)
    with pytest.raises(InputError, match='was trained on the channels'):
        load_pretrained(built(), tmp_path, STAINS[::-1])
    with pytest.warns(UserWarning, match='stays behind'):
        with_aux = load_pretrained(with_aux_bn(built()), tmp_path)
    assert with_aux.backbone.bn1.aux.weight.equal(with_aux.backbone.bn1.weight)


# Heads and batch statistics


@pytest.mark.parametrize('head', HEADS)
def test_heads(head):
    c = built(pooling='avg+max', head=head).eval()
    assert c(batch()).shape == (6, 5) and c.card == dict(backbone='resnet10', pooling='avg+max', head=head)
    if 'cosine' in head:
        assert c(batch()).abs().max() <= 30 * (1 + 1e-5)


def test_paper_head_is_1024_1024_512():
    with torch.device('meta'):
        c = Classifier('resnet34', 4, 28, 512, 'avg+max', 'mlp_cosine')
    assert [tuple(p.shape) for p in c.head.parameters() if p.dim() == 2] == [(1024, 1024), (512, 1024), (28, 512)]


def test_floats_and_bytes_are_the_same():
    c = built().eval()
    assert torch.allclose(c(batch()), c(batch().float()), atol=1e-5)


def test_aux_bn_is_two_batch_norms():
    c = built().train()
    layer = with_aux_bn(c).backbone.bn1
    main, aux = (nn.BatchNorm2d(32) for _ in range(2))
    x = torch.randn(8, 32, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    with backbone._first(c, 3):
        got = layer(x)
    want = torch.cat([main(y[:3]), aux(y[3:])])
    (got**3).sum().backward()
    (want**3).sum().backward()
    assert (
        got.equal(want)
        and x.grad.equal(y.grad)
        and layer.weight.grad.equal(main.weight.grad)
        and layer.aux.bias.grad.equal(aux.bias.grad)
    )
    assert layer.running_var.equal(main.running_var) and layer.aux.running_mean.equal(aux.running_mean)


@pytest.mark.parametrize('real', [0, 4, 6, 9, None])
def test_aux_bn_parts_are_as_separate_batches(real):
    c, plain, other, x = with_aux_bn(built()).train(), built().train(), built().train(), batch()
    n = 6 if real is None else real
    want = torch.cat([net(part) for net, part in ((plain, x[:n]), (other, x[n:])) if len(part)])
    assert torch.allclose(c(x, real), want, atol=1e-5)
    assert torch.allclose(c.backbone.bn1.running_mean, plain.backbone.bn1.running_mean) and torch.allclose(
        c.backbone.bn1.aux.running_mean, other.backbone.bn1.running_mean
    )
    c.eval()
    assert c(x, 2).equal(c(x)), 'in eval mode all use the main statistics'


def test_aux_bn_leaves_no_number_behind():
    c = with_aux_bn(built()).train()
    with pytest.raises(RuntimeError):
        c(batch(channels=3), 2)
    assert all(m.real is None for m in c.modules() if isinstance(m, AuxBatchNorm))


def test_aux_bn_twice_is_once_and_weights_stay_those_of_the_plain_network(said):
    c = with_aux_bn(with_aux_bn(built()))
    assert has_aux_bn(c) and not has_aux_bn(built()) and not said
    plain, keys = built().state_dict(), c.state_dict()
    assert {k for k in keys if '.aux.' not in k} == set(plain) and all(keys[k].equal(v) for k, v in plain.items())
    assert all(isinstance(m, nn.BatchNorm2d) for m in c.modules() if isinstance(m, AuxBatchNorm))
    with torch.device('meta'):
        swin = with_aux_bn(Classifier('swin_t', 4, 5))
    assert not has_aux_bn(swin) and str(said[0].message).startswith('aux_bn changes nothing')


# Losses

SOFT = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = (SOFT > 0.6).double()
LOGITS = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3


def test_limits():
    want = bce(LOGITS, SOFT)
    assert torch.allclose(criterion('focal', gamma=0)(LOGITS, SOFT), want)
    assert torch.allclose(criterion('focal', gamma=0, alpha=0.5)(LOGITS, SOFT), want / 2)
    assert torch.allclose(criterion('asymmetric', gamma_pos=0, gamma_neg=0, clip=0)(LOGITS, SOFT), want)
    assert torch.allclose(criterion('arcface', margin=0)(LOGITS, LABELS), bce(LOGITS, LABELS))
    assert criterion('bce')(LOGITS, SOFT).equal(want) and CRITERIA['bce'] is bce


def test_direct_computation():
    p = LOGITS.sigmoid()
    w = torch.tensor([1.0, 2, 3, 4])
    assert torch.allclose(
        criterion('bce', pos_weight=[1, 2, 3, 4])(LOGITS, SOFT),
        -(w * SOFT * p.log() + (1 - SOFT) * (1 - p).log()).mean(1),
    )
    assert torch.allclose(criterion('bce', label_smoothing=0.1)(LOGITS, LABELS), bce(LOGITS, LABELS * 0.9 + 0.05))
    m = (p - 0.1).clamp(min=0)
    assert torch.allclose(
        criterion('asymmetric', gamma_pos=1, gamma_neg=3, clip=0.1)(LOGITS, SOFT),
        -(SOFT * (1 - p) * p.log() + (1 - SOFT) * m**3 * (1 - m).log()).mean(1),
    )
    right = LABELS * p + (1 - LABELS) * (1 - p)
    share = LABELS * 0.25 + (1 - LABELS) * 0.75
    assert torch.allclose(
        criterion('focal', gamma=2, alpha=0.25)(LOGITS, LABELS), -(share * (1 - right) ** 2 * right.log()).mean(1)
    )
    angle = (LOGITS / 30).acos()
    assert torch.allclose(criterion('arcface')(LOGITS, LABELS), bce(30 * (angle + 0.5 * LABELS).cos(), LABELS))


@pytest.mark.parametrize('name', [n for n in CRITERIA if criterion(n).soft])
def test_soft_targets_cost_the_mix_of_their_parts(name):
    c = criterion(name)
    ones, zeros = torch.ones_like(LOGITS), torch.zeros_like(LOGITS)
    each = lambda t: torch.stack([c(LOGITS[:, i : i + 1], t[:, i : i + 1]) for i in range(4)], 1)
    assert torch.allclose(each(SOFT), SOFT * each(ones) + (1 - SOFT) * each(zeros))


@pytest.mark.parametrize(
    'name,options',
    [
        ('bce', dict(pos_weight=[1, 2, 3, 4], label_smoothing=0.1)),
        ('focal', dict(gamma=1)),
        ('focal', dict(alpha=0.25)),
        ('asymmetric', {}),
        ('asymmetric', dict(gamma_pos=0.5, gamma_neg=0.5, clip=0)),
        ('arcface', dict(scale=12)),
    ],
)
def test_gradients(name, options):
    c = criterion(name, **options)
    x = LOGITS.clone().requires_grad_()
    assert gradcheck(lambda x: c(x, SOFT if c.soft else LABELS), x)


@pytest.mark.parametrize('name', CRITERIA)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_extreme_logits_and_numbers_that_are_none(name, dtype):
    x = torch.tensor(
        [[-1e4, 1e4, 0, -30], [1e4, -1e4, 30, 30], [float('nan'), 0, 0, 0]], dtype=dtype, requires_grad=True
    )
    for targets in (LABELS[:3].float(), torch.zeros(3, 4), torch.ones(3, 4)):
        x.grad = None
        loss = criterion(name)(x, targets)
        assert loss.isfinite().tolist() == [True, True, False] and loss.dtype == torch.float32 and (loss[:2] >= 0).all()
        loss[:2].sum().backward()
        assert x.grad[:2].isfinite().all()


@pytest.mark.parametrize('name', CRITERIA)
def test_no_loss_waits_for_the_device(name):
    "Tensors on the meta device have no numbers to look at"
    options = {'pos_weight': [1.0, 2, 3, 4]} if name == 'bce' else {}
    assert criterion(name, **options)(LOGITS.to('meta'), LABELS.to('meta')).shape == (5,)


def test_arcface_falls_with_the_cosine_without_a_jump():
    cos = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None]
    loss = arcface(30 * cos, torch.ones_like(cos))
    assert (loss.diff() <= 1e-9).all() and loss.diff().abs().max() < 0.2
    assert (loss >= bce(30 * cos, torch.ones_like(cos)) - 1e-9).all()


def test_balanced_weights(said):
    labels = np.zeros((100, 4))
    labels[:50, 0] = 1
    labels[:10, 1] = 1
    labels[0, 2] = 1
    assert positive_weights('balanced', labels).tolist() == [1, 9, LARGEST_WEIGHT, 1]
    assert 'class(es) number 3' in str(said[0].message) and len(said) == 1
    with pytest.warns(UserWarning, match='number 0, 1'):
        assert positive_weights('balanced', np.zeros((3, 2))).tolist() == [1, 1]
    assert positive_weights('balanced', torch.ones(3, 2)).gt(0).all()


@pytest.mark.parametrize(
    'name,options,text',
    [
        ('bcee', {}, "did you mean 'bce'"),
        ('focal', dict(gama=2), 'did you mean gamma'),
        ('bce', dict(margin=0.5), 'does not take margin'),
        ('focal', dict(gamma=-1), 'from 0 to 10'),
        ('focal', dict(gamma='two'), 'must be a number'),
        ('focal', dict(gamma=0.5), '0, or 1 and more'),
        ('focal', dict(alpha=-0.5), '-1 for none'),
        ('asymmetric', dict(clip=1), 'from 0 to 0.9'),
        ('arcface', dict(margin=3), 'from 0 to 1.571'),
        ('bce', dict(label_smoothing=1), 'from 0 to 0.99'),
        ('bce', dict(pos_weight='balance'), "did you mean 'balanced'"),
        ('bce', dict(pos_weight='balanced'), 'training labels'),
        ('bce', dict(pos_weight=0), 'above 0'),
        ('bce', dict(pos_weight=[1, float('nan')]), 'above 0'),
        ('bce', dict(pos_weight={'a': 1}), 'a number a class'),
    ],
)
def test_bad_options(name, options, text):
    with pytest.raises(InputError, match=text):
        criterion(name, **options)


def test_mixed_labels_and_heads_that_do_not_fit():
    hard = criterion('arcface')
    check_targets(hard, LABELS)
    check_targets(criterion('focal'), SOFT)
    with pytest.raises(InputError, match='takes labels of 0 and 1 only'):
        check_targets(hard, SOFT)
    for bad in (torch.tensor([[2.0]]), torch.tensor([[float('nan')]])):
        with pytest.raises(InputError, match='between 0 and 1'):
            check_targets(hard, bad)
    for name, head in HEADS.items():
        if 'cosine' in name:
            check_head(hard, head(8, 3))
        else:
            with pytest.raises(InputError, match='cosine or mlp_cosine'):
                check_head(hard, head(8, 3))
        check_head(criterion('bce'), head(8, 3))
    with pytest.raises(InputError, match='make them equal'):
        check_head(hard, CosineHead(8, 3, 64))
