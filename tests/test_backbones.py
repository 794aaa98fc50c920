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

from protloc.classify import backbone, losses
from protloc.classify.backbone import (
    BACKBONES,
    HEADS,
    POOLINGS,
    AuxBatchNorm,
    Backbone,
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
    build_criterion,
    check_head,
    check_targets,
    positive_weights,
)
from protloc.core import InputError
from protloc.files import write_json
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
def warned():
    "Warnings that were given"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        yield caught


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
        both = zip(mine.state_dict().values(), its.state_dict().values(), strict=True)
        assert all(a.equal(b) for a, b in both)


@pytest.mark.parametrize('name', TORCHVISION)
def test_cost_is_what_torchvision_says(name):
    meta = get_model_weights(name).DEFAULT.meta
    with torch.device('meta'):
        net, width = build_backbone(name, 3, 224)
        with FlopCounterMode(display=False) as flops:
            net.eval()(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in net.parameters()) + 1000 * (width + 1) == meta['num_params']
    assert flops.get_total_flops() / 2e9 + width / 1e6 == pytest.approx(meta['_ops'], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('pooling', POOLINGS)
@pytest.mark.parametrize('channels', [1, 5])
def test_every_network_pools_for_any_channels_and_its_least_size(name, pooling, channels):
    size = BACKBONES[name].min_size
    if not BACKBONES[name].pool and pooling != 'avg':
        with pytest.raises(InputError, match='class token'), torch.device('meta'):
            Classifier(name, channels, 5, size, pooling)
        return
    with torch.device('meta'):
        net, width = build_backbone(name, channels, size, pooling)
    assert net.eval()(torch.empty(2, channels, size, size, device='meta')).shape == (2, width)
    with pytest.raises(InputError, match='too deep for images of'):
        build_backbone(name, channels, size - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name,entry',
    [
        ('resnet101', Backbone('conv1', 'fc')),
        ('vit_b_32', Backbone('conv_proj', 'heads.head', min_size=32, size_multiple=32, pool='')),
        ('densenet169', Backbone('features.conv0', 'classifier', pool='features.pool')),
        ('mobilenet_v2', Backbone('features.0.0', 'classifier.1', pool='features.pool')),
        ('mine', Backbone('conv1', 'fc', min_size=8, build=lambda: backbone.resnet10(width=16))),
    ],
)
def test_one_entry_adds_a_network(monkeypatch, tmp_path, name, entry):
    monkeypatch.setitem(BACKBONES, name, entry)
    with torch.device('meta'):
        for pooling in POOLINGS if entry.pool else ['avg']:
            assert Classifier(name, 4, 5, 64, pooling)(torch.empty(2, 4, 64, 64)).shape == (2, 5)
    if name == 'vit_b_32':
        torch.save(get_model(name, image_size=32).state_dict(), tmp_path / 'net.pth')
        assert load_pretrained(built(name, size=64), tmp_path / 'net.pth').features(batch(2, size=64)).shape == (2, 768)
    if name == 'mine':
        with pytest.raises(InputError, match="no ImageNet weights for 'mine'"):
            load_pretrained(built(name), 'imagenet')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'swin_t', 'convnext_tiny', 'densenet121'])
def test_pooling_is_over_the_last_maps(name):
    nets = {pooling: built(name, pooling=pooling).eval() for pooling in POOLINGS}
    for net in nets.values():
        net.backbone.load_state_dict(nets['avg'].backbone.state_dict())
    with torch.no_grad():
        features = {pooling: net.features(batch(2)) for pooling, net in nets.items()}
    average, maximum = features['avg+max'].view(2, -1, 2).unbind(2)
    assert torch.allclose(average, features['avg'], atol=1e-5) and torch.allclose(maximum, features['max'], atol=1e-5)


def test_maximum_is_not_below_average():
    net = built('densenet121', size=64, pooling='avg+max').eval()
    average, maximum = net.features(batch(2, size=64)).view(2, -1, 2).unbind(2)
    assert (maximum >= average - 1e-6).all() and (maximum > average + 1e-3).any()


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
    images = batch(2, size=64)
    for name, pooling in (('resnet10t', 'avg+max'), ('vit_tiny_patch16_224', 'avg'), ('convnextv2_atto', 'max')):
        assert built(f'timm/{name}', size=64, pooling=pooling).eval()(images).shape == (2, 5)
    with pytest.raises(InputError, match='did you mean'):
        lookup_backbone('timm/resnet81')
    with pytest.raises(InputError, match='no multiple of its 16'):
        built('timm/vit_tiny_patch16_224', size=40)
    net = timm.create_model('resnet10t').eval()
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    classifier = load_pretrained(built('timm/resnet10t', size=64).eval(), tmp_path / 'net.pth', STAINS)
    grey = torch.rand(2, 1, 64, 64)
    net.reset_classifier(0)
    assert torch.allclose(classifier.features(grey.expand(-1, 4, -1, -1)), net(grey.expand(-1, 3, -1, -1)), atol=1e-5)
    with pytest.raises(InputError, match='does not fit'):
        load_pretrained(built('timm/vit_tiny_patch16_224', size=64), tmp_path / 'net.pth')


@pytest.mark.parametrize('name', ['vit_b_16', 'swin_t', 'convnext_tiny'])
def test_patches_keep_the_spread_of_the_response(name):
    "A random stem for N channels responds to noise as strongly as the one for three"
    with seeded(0, 'stem'):
        if name == 'vit_b_16':
            old = torch.randn(768, 3, 16, 16) / math.sqrt(768)
        else:
            old = get_model(name).get_submodule(BACKBONES[name].stem).weight
        net = nn.Module()
        net.stem = nn.Conv2d(3, *old.shape[:1], old.shape[2])
        net.stem.weight.data = old.detach()
        with_stem(net, 'stem', 12)

    def response(filters):
        return filters.detach().square().flatten(1).sum(1).mean().item()

    assert response(net.stem.weight) == pytest.approx(response(old), rel=0.05) and net.stem.in_channels == 12


# Pretrained weights


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'swin_t', 'convnext_tiny', 'densenet121', 'vit_b_16'])
def test_pretrained_network_sees_grey_stains_as_a_grey_photograph(name, monkeypatch, tmp_path):
    options = {'image_size': 32} if name == 'vit_b_16' else {}
    with seeded(0, 'photo'):
        net = get_model(name, **options).eval()

    def old_name(key):
        "Of DenseNet's weights in torchvision's files"
        return key.replace('norm1.', 'norm.1.').replace('conv2.', 'conv.2.') if 'denselayer' in key else key

    old = {old_name(key): value for key, value in net.state_dict().items()}
    monkeypatch.setattr(backbone, '_read_file', lambda path: old)
    (tmp_path / 'net.pth').touch()
    classifier = load_pretrained(built(name).eval(), tmp_path / 'net.pth', STAINS)
    grey = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    head = net.get_submodule(BACKBONES[name].classifier)
    with torch.no_grad():
        logits = head(classifier.features(grey.expand(-1, 4, -1, -1)))
        assert torch.allclose(logits, net(grey.expand(-1, 3, -1, -1)), atol=1e-4)
    if name == 'vit_b_16':
        larger = load_pretrained(built(name, size=64).eval(), tmp_path / 'net.pth')
        assert larger.features(batch(2, size=64)).shape == (2, 768)


def test_stem_rule():
    photo = torch.randn(8, 3, 3, 3)
    stains = stem_filters(photo, 4, STAINS)
    assert torch.allclose(stains[:, :3], 0.75 * photo) and torch.allclose(stains[:, 3], 0.75 * photo.mean(1))
    assert torch.allclose(stem_filters(photo, 3, ('blue', 'green', 'red')), photo.flip(1))
    mean_of_two = 1.5 * photo.mean(1, keepdim=True).expand(-1, 2, -1, -1)
    for names in (('red', 'green'), ('dapi', 'actin'), None):
        assert torch.allclose(stem_filters(photo, 2, names), mean_of_two)


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
    classifier = load_pretrained(built('resnet18'), 'imagenet', STAINS)
    assert classifier.backbone.layer4[0].conv1.weight.equal(net.layer4[0].conv1.weight)
    assert classifier.head.weight.equal(built('resnet18').head.weight)
    with pytest.raises(InputError, match='no ImageNet weights'):
        load_pretrained(built(), 'imagenet')


def test_bad_weights(tmp_path):
    classifier = built('resnet18')
    assert load_pretrained(classifier, 'none') is classifier
    for content, text in ((b'oh', 'cannot be read as weights'), (b'', 'cannot be read as weights')):
        for name in ('a.pth', 'a.safetensors'):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError, match=text):
                load_pretrained(classifier, tmp_path / name)
    torch.save({'model': get_model('resnet18').state_dict()}, tmp_path / 'nested.pth')
    with pytest.raises(InputError, match='no state dict'):
        load_pretrained(classifier, tmp_path / 'nested.pth')
    torch.save(get_model('resnet34').state_dict(), tmp_path / 'other.pth')
    with pytest.raises(InputError, match="does not fit the backbone 'resnet18'"):
        load_pretrained(classifier, tmp_path / 'other.pth')
    with pytest.raises(InputError, match='there are no weights'):
        load_pretrained(classifier, tmp_path / 'nowhere.pth')


def save(classifier, folder):
    "As a classifier of four stains and five classes"
    save_weights(classifier, folder / 'classifier.safetensors')
    write_json(folder / 'classifier.json', {**classifier.card, 'channels': STAINS, 'classes': list('abcde')})


def test_another_classifier_gives_its_head_to_the_same_classes_only(tmp_path, warned):
    with seeded(1, 'test'):
        other = Classifier('resnet10', 4, 5).eval()
    other.mean.fill_(100.0)
    save(other, tmp_path)
    images = batch()
    same = load_pretrained(built().eval(), tmp_path, STAINS, 'abcde')
    assert same(images).equal(other(images)) and not warned
    new = load_pretrained(built().eval(), tmp_path, STAINS, 'abcdf')
    assert new.features(images).equal(other.features(images))
    assert new.head.weight.equal(built().head.weight)
    assert 'its classes differ' in str(warned[-1].message)
    load_pretrained(built(), tmp_path)
    assert 'its classes differ' in str(warned[-1].message), 'without names nothing is known of the classes'
    load_pretrained(built(pooling='max', head='mlp'), tmp_path, STAINS, 'abcde')
    assert 'its pooling and head differ' in str(warned[-1].message)


def test_another_classifier_of_an_earlier_version_has_an_average_and_a_linear_head(tmp_path, warned):
    save(built(), tmp_path)
    card = json.loads((tmp_path / 'classifier.json').read_text())
    write_json(tmp_path / 'classifier.json', {k: v for k, v in card.items() if k not in ('pooling', 'head')})
    load_pretrained(Classifier('resnet10', 4, 5), tmp_path, STAINS, 'abcde')
    assert not warned


def test_another_classifier_of_another_kind(tmp_path):
    save(built(), tmp_path)
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
    classifier = built(pooling='avg+max', head=head).eval()
    assert classifier(batch()).shape == (6, 5)
    assert classifier.card == dict(backbone='resnet10', pooling='avg+max', head=head)
    if 'cosine' in head:
        assert classifier(batch()).abs().max() <= 30 * (1 + 1e-5)


def test_paper_head_is_1024_1024_512():
    with torch.device('meta'):
        classifier = Classifier('resnet34', 4, 28, 512, 'avg+max', 'mlp_cosine')
    matrices = [tuple(weight.shape) for weight in classifier.head.parameters() if weight.dim() == 2]
    assert matrices == [(1024, 1024), (512, 1024), (28, 512)]


def test_floats_and_bytes_are_the_same():
    classifier = built().eval()
    assert torch.allclose(classifier(batch()), classifier(batch().float()), atol=1e-5)


def test_aux_bn_is_two_batch_norms():
    layer = with_aux_bn(built().train()).backbone.bn1
    main, aux = (nn.BatchNorm2d(32) for _ in range(2))
    together = torch.randn(8, 32, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    apart = together.detach().clone().requires_grad_()
    with backbone._main_statistics_for(3, nn.Sequential(layer)):
        normed = layer(together)
    expected = torch.cat([main(apart[:3]), aux(apart[3:])])
    (normed**3).sum().backward()
    (expected**3).sum().backward()
    assert normed.equal(expected) and together.grad.equal(apart.grad)
    assert layer.weight.grad.equal(main.weight.grad) and layer.aux.bias.grad.equal(aux.bias.grad)
    assert layer.running_var.equal(main.running_var) and layer.aux.running_mean.equal(aux.running_mean)


@pytest.mark.parametrize('num_real', [0, 4, 6, 9, None])
def test_real_and_synthetic_images_are_as_separate_batches(num_real):
    both, real, synthetic = with_aux_bn(built()).train(), built().train(), built().train()
    images = batch()
    n = 6 if num_real is None else num_real
    expected = torch.cat([net(some) for net, some in ((real, images[:n]), (synthetic, images[n:])) if len(some)])
    assert torch.allclose(both(images, num_real), expected, atol=1e-5)
    bn = both.backbone.bn1
    assert torch.allclose(bn.running_mean, real.backbone.bn1.running_mean)
    assert torch.allclose(bn.aux.running_mean, synthetic.backbone.bn1.running_mean)
    both.eval()
    assert both(images, 2).equal(both(images)), 'in eval mode all use the main statistics'


def test_aux_bn_leaves_no_number_behind():
    classifier = with_aux_bn(built()).train()
    with pytest.raises(RuntimeError):
        classifier(batch(channels=3), 2)
    assert all(layer.num_real is None for layer in classifier.modules() if isinstance(layer, AuxBatchNorm))


def test_aux_bn_twice_is_once_and_weights_stay_those_of_the_plain_network(warned):
    classifier = with_aux_bn(with_aux_bn(built()))
    assert has_aux_bn(classifier) and not has_aux_bn(built()) and not warned
    plain, state = built().state_dict(), classifier.state_dict()
    assert {k for k in state if '.aux.' not in k} == set(plain) and all(state[k].equal(v) for k, v in plain.items())
    assert all(isinstance(m, nn.BatchNorm2d) for m in classifier.modules() if isinstance(m, AuxBatchNorm))
    with torch.device('meta'):
        swin = with_aux_bn(Classifier('swin_t', 4, 5))
    assert not has_aux_bn(swin) and str(warned[0].message).startswith('aux_bn changes nothing')


# Losses

SOFT = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = (SOFT > 0.6).double()
LOGITS = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3


def test_limits():
    plain = bce(LOGITS, SOFT)
    assert torch.allclose(build_criterion('focal', gamma=0)(LOGITS, SOFT), plain)
    assert torch.allclose(build_criterion('focal', gamma=0, alpha=0.5)(LOGITS, SOFT), plain / 2)
    assert torch.allclose(build_criterion('asymmetric', gamma_pos=0, gamma_neg=0, clip=0)(LOGITS, SOFT), plain)
    assert torch.allclose(build_criterion('arcface', margin=0)(LOGITS, LABELS), bce(LOGITS, LABELS))
    assert build_criterion('bce')(LOGITS, SOFT).equal(plain) and CRITERIA['bce'] is bce


def test_direct_computation():
    p = LOGITS.sigmoid()
    w = torch.tensor([1.0, 2, 3, 4])
    assert torch.allclose(
        build_criterion('bce', pos_weight=[1, 2, 3, 4])(LOGITS, SOFT),
        -(w * SOFT * p.log() + (1 - SOFT) * (1 - p).log()).mean(1),
    )
    assert torch.allclose(build_criterion('bce', label_smoothing=0.1)(LOGITS, LABELS), bce(LOGITS, LABELS * 0.9 + 0.05))
    clipped = (p - 0.1).clamp(min=0)
    assert torch.allclose(
        build_criterion('asymmetric', gamma_pos=1, gamma_neg=3, clip=0.1)(LOGITS, SOFT),
        -(SOFT * (1 - p) * p.log() + (1 - SOFT) * clipped**3 * (1 - clipped).log()).mean(1),
    )
    right = LABELS * p + (1 - LABELS) * (1 - p)
    share = LABELS * 0.25 + (1 - LABELS) * 0.75
    assert torch.allclose(
        build_criterion('focal', gamma=2, alpha=0.25)(LOGITS, LABELS), -(share * (1 - right) ** 2 * right.log()).mean(1)
    )
    angle = (LOGITS / 30).acos()
    assert torch.allclose(build_criterion('arcface')(LOGITS, LABELS), bce(30 * (angle + 0.5 * LABELS).cos(), LABELS))


@pytest.mark.parametrize('name', [name for name in CRITERIA if build_criterion(name).takes_soft_targets])
def test_a_soft_target_costs_the_mix_of_the_hard_ones(name):
    criterion = build_criterion(name)

    def by_class(targets):
        return torch.stack([criterion(LOGITS[:, i : i + 1], targets[:, i : i + 1]) for i in range(4)], 1)

    present, absent = by_class(torch.ones_like(LOGITS)), by_class(torch.zeros_like(LOGITS))
    assert torch.allclose(by_class(SOFT), SOFT * present + (1 - SOFT) * absent)


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
    criterion = build_criterion(name, **options)
    targets = SOFT if criterion.takes_soft_targets else LABELS
    assert gradcheck(criterion, (LOGITS.clone().requires_grad_(), targets))


@pytest.mark.parametrize('name', CRITERIA)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_extreme_logits_and_numbers_that_are_none(name, dtype):
    extreme = [[-1e4, 1e4, 0, -30], [1e4, -1e4, 30, 30], [float('nan'), 0, 0, 0]]
    logits = torch.tensor(extreme, dtype=dtype, requires_grad=True)
    for targets in (LABELS[:3].float(), torch.zeros(3, 4), torch.ones(3, 4)):
        logits.grad = None
        loss = build_criterion(name)(logits, targets)
        assert loss.isfinite().tolist() == [True, True, False] and loss.dtype == torch.float32 and (loss[:2] >= 0).all()
        loss[:2].sum().backward()
        assert logits.grad[:2].isfinite().all()


@pytest.mark.parametrize('name', CRITERIA)
def test_no_loss_waits_for_the_device(name):
    "Tensors on the meta device have no numbers to look at"
    options = {'pos_weight': [1.0, 2, 3, 4]} if name == 'bce' else {}
    assert build_criterion(name, **options)(LOGITS.to('meta'), LABELS.to('meta')).shape == (5,)


def test_arcface_falls_with_the_cosine_without_a_jump():
    cos = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None]
    loss = arcface(30 * cos, torch.ones_like(cos))
    assert (loss.diff() <= 1e-9).all() and loss.diff().abs().max() < 0.2
    assert (loss >= bce(30 * cos, torch.ones_like(cos)) - 1e-9).all()


def test_balanced_weights(warned):
    labels = np.zeros((100, 4))
    labels[:50, 0] = 1
    labels[:10, 1] = 1
    labels[0, 2] = 1
    assert positive_weights('balanced', labels).tolist() == [1, 9, LARGEST_WEIGHT, 1]
    assert 'class(es) number 3' in str(warned[0].message) and len(warned) == 1
    with pytest.warns(UserWarning, match='number 0, 1'):
        assert positive_weights('balanced', np.zeros((3, 2))).tolist() == [1, 1]
    assert positive_weights('balanced', torch.ones(3, 2)).gt(0).all()


def test_weights_are_counted_against_the_classes():
    "By a call through the module, which has only its own imports"
    for labels in (np.ones((3, 2)), torch.ones(3, 2)):
        assert losses.positive_weights([1, 2], labels).tolist() == [1, 2]
        with pytest.raises(InputError, match='pos_weight has 3 numbers for 2 classes'):
            losses.positive_weights([1, 2, 3], labels)


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
        build_criterion(name, **options)


def test_mixed_labels_and_heads_that_do_not_fit():
    hard = build_criterion('arcface')
    check_targets(hard, LABELS)
    check_targets(build_criterion('focal'), SOFT)
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
        check_head(build_criterion('bce'), head(8, 3))
    with pytest.raises(InputError, match='make them equal'):
        check_head(hard, CosineHead(8, 3, 64))
