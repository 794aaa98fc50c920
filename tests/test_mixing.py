"""Every strategy against plain arithmetic, at its limits, and against what it was; nothing is read from the device."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from protloc.classify import mixing
from protloc.classify.backbone import Classifier
from protloc.classify.losses import bce
from protloc.classify.mixing import ALIGNMENTS, STRATEGIES, build_strategy, coral, cut_boxes, mix_shares, mmd
from protloc.core import InputError

CAN_ALIGN = [name for name, kind in STRATEGIES.items() if kind.can_align]
TWO_KINDS = [
    name
    for name, kind in STRATEGIES.items()
    if kind.sources == ('real', 'synthetic') and kind.second_store == 'synthetic'
]


class Linear(nn.Module):
    "A linear classifier that notes how many images of each pass were real"

    def __init__(self, pixels=2 * 4 * 4, classes=3):
        super().__init__()
        self.head, self.passes = nn.Linear(pixels, classes), []

    def features(self, images, num_real=None):
        self.passes.append((len(images), num_real))
        return images.float().flatten(1) / 255

    def forward(self, images, num_real=None):
        return self.head(self.features(images, num_real))


class Normed(Linear):
    "A linear classifier behind a BatchNorm, with a second one for synthetic images"

    def __init__(self, channels=2, **options):
        super().__init__(**options)
        self.main, self.aux = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def features(self, images, num_real=None):
        self.passes.append((len(images), num_real))
        if num_real is None:
            num_real = len(images)
        real, synthetic = images[:num_real].float(), images[num_real:].float()
        normed = [norm(kind) for norm, kind in ((self.main, real), (self.aux, synthetic)) if len(kind)]
        return torch.cat(normed).flatten(1)


@pytest.fixture
def batches():
    "A real and a synthetic batch of six images"
    generator = torch.Generator().manual_seed(0)

    def batch(brightest):
        images = torch.randint(brightest, (6, 2, 4, 4), generator=generator, dtype=torch.uint8)
        return images, torch.randint(2, (6, 3), generator=generator).float()

    return batch(256), batch(128)


def draw_shares(monkeypatch, values):
    "Let the strategies draw these shares"

    def mix_shares(n, alpha, device=None):
        return torch.as_tensor(values, dtype=torch.float32).expand(n)

    monkeypatch.setattr(mixing, 'mix_shares', mix_shares)


def given(name, real, synthetic):
    "The batches as the training hands them over"
    wanted = STRATEGIES[name]().sources_at(0.0)
    return real if 'real' in wanted else None, synthetic if 'synthetic' in wanted else None


class ByHand:
    "The loss of each strategy in numpy: x and y are real images and labels, u and v synthetic ones"

    share = np.array([0, 0.1, 0.3, 0.5, 0.8, 1])

    def __init__(self, model, real, synthetic):
        self.weight, self.bias = (p.detach().double().numpy() for p in (model.head.weight, model.head.bias))
        tensors = (real[0] / 255, synthetic[0] / 255, real[1], synthetic[1])
        self.x, self.u, self.y, self.v = (tensor.double().flatten(1).numpy() for tensor in tensors)

    def bce(self, images, labels):
        "Loss of each image"
        p = 1 / (1 + np.exp(-(images @ self.weight.T + self.bias)))
        return -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean(1)

    def real(self):
        return self.bce(self.x, self.y).mean()

    def synthetic(self):
        return self.bce(self.u, self.v).mean()

    def concat(self):
        return (self.bce(self.x, self.y).sum() + self.bce(self.u, self.v).sum()) / 12

    duplicate_real = tail_only = soft_labels = concat
    pretrain_finetune = synthetic  # at the start

    def weighted(self):
        return (self.bce(self.x, self.y).sum() + 0.5 * self.bce(self.u, self.v).sum()) / 6

    def mix_loss(self):
        return (self.share * self.bce(self.x, self.y) + (1 - self.share) * self.bce(self.u, self.v)).mean()

    def input_mixup(self):
        share = self.share[:, None]
        return self.bce(share * self.x + (1 - share) * self.u, share * self.y + (1 - share) * self.v).mean()

    mix_representation = input_mixup  # the same for a linear model


@pytest.mark.parametrize('name', [name for name in STRATEGIES if hasattr(ByHand, name)])
def test_by_hand(name, batches, monkeypatch):
    model = Linear()
    draw_shares(monkeypatch, ByHand.share)
    loss = build_strategy(name).loss(model, bce, *given(name, *batches))
    expected = getattr(ByHand(model, *batches), name)()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_cutmix_by_hand(batches, monkeypatch):
    "Pixel by pixel, box by box"
    real, synthetic = batches
    centres = torch.tensor([[0.5, 0.5], [0, 0], [1, 0.5], [0.3, 0.8], [0.5, 0.5], [0.9, 0.1]])
    draw_shares(monkeypatch, ByHand.share)
    monkeypatch.setattr(torch, 'rand', lambda *size: centres)
    images, labels = build_strategy('cutmix').mix(real, synthetic)
    assert images.dtype == torch.uint8
    for i, (share, (row, column)) in enumerate(zip(ByHand.share, centres.tolist(), strict=True)):
        half, expected, pasted = np.sqrt(1 - share) / 2, real[0][i].clone(), 0
        rows = range(max(round((row - half) * 4), 0), min(round((row + half) * 4), 4))
        columns = range(max(round((column - half) * 4), 0), min(round((column + half) * 4), 4))
        for y in rows:
            for x in columns:
                expected[:, y, x] = synthetic[0][i, :, y, x]
                pasted += 1
        assert torch.equal(images[i], expected)
        torch.testing.assert_close(labels[i], (1 - pasted / 16) * real[1][i] + pasted / 16 * synthetic[1][i])
    model = Linear()
    assert build_strategy('cutmix').loss(model, bce, real, synthetic) == bce(model(images), labels).mean()


@pytest.mark.parametrize('alpha', [0.3, 1, 5])
@pytest.mark.parametrize('edges', [(32, 32), (7, 13), (512, 512)])
def test_label_shares_of_cutmix_are_counted_pixels(alpha, edges):
    n = 500 if edges[0] < 100 else 8
    ones = torch.ones((n, 1, *edges), dtype=torch.uint8), torch.ones(n, 1)
    zeros = torch.zeros((n, 1, *edges), dtype=torch.uint8), torch.zeros(n, 1)
    torch.manual_seed(0)
    images, labels = build_strategy('cutmix', alpha=alpha).mix(ones, zeros)
    torch.testing.assert_close(images.float().mean((1, 2, 3)), labels[:, 0], rtol=0, atol=1e-6)
    assert len(labels.unique()) > 3


def test_boxes_have_the_area_that_was_drawn_unless_cut_off():
    share = torch.rand(200)
    box = cut_boxes(share, torch.full((200, 2), 0.5), 256, 256)
    torch.testing.assert_close(1 - box.float().mean((1, 2, 3)), share, atol=0.01, rtol=0)
    outer = cut_boxes(share, torch.rand(200, 2), 256, 256)
    assert (outer.float().mean((1, 2, 3)) <= box.float().mean((1, 2, 3)) + 0.01).all()


def with_gradients(batches):
    "The batches with float images that take gradients"
    return [(images.float().requires_grad_(), labels) for images, labels in batches]


@pytest.mark.parametrize('share, alone', [(1.0, 'real'), (0.0, 'synthetic')])
@pytest.mark.parametrize('name', ['mix_loss', 'mix_representation', 'input_mixup', 'cutmix'])
def test_limits(name, share, alone, batches, monkeypatch):
    "A share of 1 or 0 is training on one kind alone, and the other one's pixels get no gradient"
    draw_shares(monkeypatch, share)
    monkeypatch.setattr(torch, 'rand', lambda *size: torch.full(size, 0.5))
    model, (real, synthetic) = Linear(), with_gradients(batches)
    loss = build_strategy(name).loss(model, bce, real, synthetic)
    torch.testing.assert_close(loss, build_strategy(alone).loss(model, bce, real, synthetic))
    on_real, on_synthetic = torch.autograd.grad(loss, (real[0], synthetic[0]))
    shown, hidden = (on_real, on_synthetic) if alone == 'real' else (on_synthetic, on_real)
    assert shown.abs().min() > 0
    assert (hidden == 0).all()


BOTH_AT_ONCE = [name for name in STRATEGIES if name not in ('real', 'synthetic', 'pretrain_finetune')]


@pytest.mark.parametrize('name', BOTH_AT_ONCE)
def test_gradients_reach_both_batches_and_the_head(name, batches):
    model, (real, synthetic) = Linear(), with_gradients(batches)
    torch.manual_seed(0)
    loss = build_strategy(name).loss(model, bce, real, synthetic)
    gradients = torch.autograd.grad(loss, (real[0], synthetic[0], *model.parameters()))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_released_and_image_shares_have_the_same_mean(batches):
    "but the released loss depends on the mean share alone"
    model, (real, synthetic) = Linear(), batches
    on_real = build_strategy('real').loss(model, bce, real).item()
    on_synthetic = build_strategy('synthetic').loss(model, bce, None, synthetic).item()
    torch.manual_seed(0)
    with torch.no_grad():
        for as_released in (False, True):
            mix_loss = build_strategy('mix_loss', as_released=as_released)
            draws = torch.stack([mix_loss.loss(model, bce, real, synthetic) for _ in range(3000)])
            assert abs(draws.mean() - (on_real + on_synthetic) / 2) < 4 * draws.std() / 3000**0.5
        torch.manual_seed(5)
        released = mix_loss.loss(model, bce, real, synthetic)
        torch.manual_seed(5)
        share = mix_shares(6).mean().item()
    assert released.item() == pytest.approx(share * on_real + (1 - share) * on_synthetic, rel=1e-5)


def test_weights_over_the_training(batches):
    model, (real, synthetic) = Linear(), batches

    def loss(name, synthetic, progress=None, **options):
        return build_strategy(name, **options).loss(model, bce, real, synthetic, progress).item()

    on_real, on_synthetic = loss('real', synthetic), loss('synthetic', synthetic)
    for progress in (0.0, 0.25, 1.0):
        fading = loss('weighted', synthetic, torch.tensor(progress), weight=0.8, final_weight=0.2)
        assert fading == pytest.approx(on_real + (0.8 - 0.6 * progress) * on_synthetic, rel=1e-5)
    two = tuple(tensor[:2] for tensor in synthetic)
    full_weight = loss('weighted', two, weight=1)
    assert full_weight == pytest.approx(on_real + loss('synthetic', two) * 2 / 6, rel=1e-5)
    assert full_weight == pytest.approx(loss('concat', two) * 8 / 6, rel=1e-5)


def test_sources_at():
    pretrain = build_strategy('pretrain_finetune', share=0.3)
    assert [pretrain.sources_at(step / 10) for step in range(10)] == 3 * [('synthetic',)] + 7 * [('real',)]
    for name, kind in STRATEGIES.items():
        read = {source for progress in (0.0, 0.5, 1.0) for source in kind().sources_at(progress)}
        assert read == set(kind.sources), name


def test_pretraining_takes_one_kind_a_step(batches):
    with pytest.raises(ValueError):
        build_strategy('pretrain_finetune').loss(Linear(), bce, *batches)


def test_usable_images_of_the_tail():
    real = np.eye(4, dtype=np.float32)[[0] * 10 + [1] * 5 + [2] * 2]
    synthetic = np.array([[1, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], np.float32)

    def usable(below, real=real, synthetic=synthetic):
        return build_strategy('tail_only', below=below).usable_synthetic(real, synthetic)

    for below, rows in ((3, [1, 3]), (0.2, [1, 3]), (6, [1, 2, 3]), (1, [3]), (0.999, [0, 1, 2, 3])):
        assert np.flatnonzero(usable(below)).tolist() == rows, below
    with pytest.raises(
        InputError,
        match='no synthetic image shows one of the 2 classes with fewer than 3 real training images: generate some',
    ):
        usable(3, synthetic=synthetic[:1])
    with pytest.raises(InputError, match='no class has fewer than 2 real training images: raise below'):
        usable(2, real[:15, :2], synthetic[:, :2])
    assert build_strategy('concat').usable_synthetic(real, synthetic).all()


def former(name, classifier, criterion, real, synthetic):
    "What the first five did before there were options"
    (x, y), (u, v) = real, synthetic
    if name == 'real':
        return criterion(classifier(x), y).mean()
    if name == 'synthetic':
        return criterion(classifier(u), v).mean()
    if name == 'concat':
        return criterion(classifier(torch.cat([x, u])), torch.cat([y, v])).mean()
    share = torch.distributions.Beta(0.3, 0.3).sample((len(x),))
    if name == 'mix_loss':
        return (share * criterion(classifier(x), y) + (1 - share) * criterion(classifier(u), v)).mean()
    share = share[:, None]
    features = share * classifier.features(x) + (1 - share) * classifier.features(u)
    return criterion(classifier.head(features), share * y + (1 - share) * v).mean()


@pytest.mark.parametrize('name', ['real', 'synthetic', 'concat', 'mix_loss', 'mix_representation'])
def test_the_first_five_are_what_they_were_bit_for_bit(name):
    "Losses, weights and running statistics after three steps of a ResNet with dropout before the head"
    assert list(STRATEGIES)[:5] == ['real', 'synthetic', 'concat', 'mix_loss', 'mix_representation']

    def random_batch():
        images = torch.randint(256, (8, 2, 16, 16), dtype=torch.uint8)
        return images.contiguous(memory_format=torch.channels_last), torch.randint(2, (8, 3)).float()

    def train(loss):
        torch.manual_seed(0)
        model, losses = Classifier('resnet10', 2, 3), []
        model.head = nn.Sequential(nn.Dropout(0.2), model.head)
        real, synthetic = random_batch(), random_batch()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(3):
            torch.manual_seed(step)
            losses.append(loss(model, bce, real, synthetic))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses, model.state_dict()

    losses, weights = train(build_strategy(name).loss)
    former_losses, former_weights = train(partial(former, name))
    assert torch.equal(torch.stack(losses), torch.stack(former_losses))
    assert all(torch.equal(weights[k], former_weights[k]) for k in former_weights)


@pytest.mark.parametrize('name', STRATEGIES)
def test_who_passes_through_which_statistics(name, batches):
    "With aux_bn one pass, real images first; mixed ones count as synthetic"
    real, synthetic = batches
    if name not in TWO_KINDS:
        with pytest.raises(InputError, match='aux_bn keeps real and synthetic images apart'):
            build_strategy(name, aux_bn=True)
        return
    model = Normed()
    build_strategy(name, aux_bn=True).loss(model, bce, *given(name, real, synthetic))
    assert model.passes == [(6, 0)] if name == 'pretrain_finetune' else [(12, 6)]
    model = Normed()
    build_strategy(name).loss(model, bce, *given(name, real, synthetic))
    if name.startswith('mix_'):
        assert model.passes == [(6, None)] * 2
    else:
        one_batch_of_six = name in ('input_mixup', 'cutmix', 'pretrain_finetune')
        assert model.passes == [(6 if one_batch_of_six else 12, None)]
    assert len(model.passes) == 1 or model.main.num_batches_tracked == 2


def test_real_images_pass_through_the_main_statistics(batches):
    model = Normed()
    build_strategy('pretrain_finetune', aux_bn=True).loss(model, bce, batches[0], None)
    assert model.passes == [(6, 6)] and model.main.num_batches_tracked == 1 and model.aux.num_batches_tracked == 0


@pytest.mark.parametrize('name', ['mix_loss', 'mix_representation'])
def test_one_pass_or_two(name, batches):
    "Without BatchNorm one pass gives what two give; with its auxiliary one too, and the running averages differ"
    real, synthetic = batches

    def loss(model, **options):
        torch.manual_seed(0)
        return build_strategy(name, **options).loss(model, bce, real, synthetic)

    model = Linear()
    one = loss(model)
    assert model.passes == [(12, None)]
    torch.manual_seed(0)
    torch.testing.assert_close(one, former(name, model, bce, real, synthetic))
    model = Normed()
    two, one = loss(model), loss(model, aux_bn=True)
    torch.testing.assert_close(one, two)
    assert model.main.num_batches_tracked == 3 and model.aux.num_batches_tracked == 1


@pytest.mark.parametrize('name', STRATEGIES)
def test_alignment(name, batches, monkeypatch):
    "The penalty is added where there are both kinds, costs nothing where it is off, and pulls both features"
    model, (real, synthetic) = Linear(), with_gradients(batches)
    if name not in CAN_ALIGN:
        with pytest.raises(InputError, match='align compares real with synthetic images'):
            build_strategy(name, align=0.1)
        return

    def loss(**options):
        torch.manual_seed(0)
        return build_strategy(name, **options).loss(model, bce, real, synthetic)

    for kind, distance in ALIGNMENTS.items():
        expected = distance(real[0].flatten(1) / 255, synthetic[0].flatten(1) / 255)
        penalty = loss(align=10, alignment=kind) - loss()
        torch.testing.assert_close(penalty, 10 * expected)
        gradients = torch.autograd.grad(penalty, (real[0], synthetic[0]))
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    monkeypatch.setattr(mixing, 'ALIGNMENTS', {})
    assert loss().isfinite()


def test_distances():
    torch.manual_seed(0)
    a, b = torch.randn(40, 5), torch.randn(30, 5) * 2 + 1
    difference = np.cov(a.numpy().T) - np.cov(b.numpy().T)
    assert coral(a, b).item() == pytest.approx((difference**2).sum() / 100, rel=1e-4)
    x = np.concatenate([a, b]).astype(float)
    distance = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    median = np.sort(distance[np.triu_indices(70, 1)])[(70 * 69 // 2 - 1) // 2]
    kernel = np.mean([np.exp(-(distance**2) / (2 * (width * median) ** 2)) for width in (0.25, 0.5, 1, 2, 4)], 0)
    expected = kernel[:40, :40].mean() + kernel[40:, 40:].mean() - 2 * kernel[:40, 40:].mean()
    assert mmd(a, b).item() == pytest.approx(expected, rel=1e-4)
    assert mmd(a, a).abs() < 1e-6 and mmd(a, b) == mmd(10 * a, 10 * b)
    same = torch.ones(4, 5, requires_grad=True)
    for f in (coral, mmd):
        assert torch.autograd.grad(f(same, same * 1), same)[0].isfinite().all()
    assert mmd(a[:1], b[:1]).isfinite()
    with pytest.raises(InputError, match='coral needs two images of each kind'):
        coral(a[:1], b)


def test_the_penalty_is_computed_in_full_precision(batches):
    model, (real, synthetic) = Linear(), batches
    with torch.autocast('cpu', torch.bfloat16):
        loss = build_strategy('concat').loss(model, bce, real, synthetic)
        penalty = build_strategy('concat', align=10).loss(model, bce, real, synthetic) - loss
    expected = 10 * coral(real[0].flatten(1) / 255, synthetic[0].flatten(1) / 255)
    torch.testing.assert_close(penalty, expected, rtol=1e-5, atol=1e-6)


WAITS = [getattr(torch.ops.aten, n) for n in ('_local_scalar_dense', 'equal', 'is_nonzero', 'nonzero', 'masked_select')]


class NoSync(TorchDispatchMode):
    "Nothing may be read from the device"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITS, f'a step waits for the device: {func}'
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', STRATEGIES)
def test_no_loss_waits_for_the_device(name, batches):
    ways = [{}]
    if name in CAN_ALIGN:
        ways += [dict(align=0.1, alignment=kind) for kind in ALIGNMENTS]
    if name in TWO_KINDS:
        ways += [dict(aux_bn=True)]
    if name == 'mix_loss':
        ways += [dict(as_released=True)]
    if name == 'weighted':
        ways += [dict(final_weight=0)]
    for options in ways:
        strategy, model, (real, synthetic) = build_strategy(name, **options), Normed(), given(name, *batches)
        with NoSync():
            strategy.loss(model, bce, real, synthetic, torch.tensor(0.5)).backward()


@pytest.mark.parametrize('name', [name for name in BOTH_AT_ONCE if not STRATEGIES[name].mixes_pairs])
def test_batches_of_other_sizes(name, batches):
    "Any ratio where images are not mixed one to one"
    real, synthetic = batches
    two = tuple(tensor[:2] for tensor in synthetic)
    for options in [{}, dict(aux_bn=True, align=0.1)] if name in CAN_ALIGN else [{}]:
        assert build_strategy(name, **options).loss(Normed(), bce, real, two).isfinite()


def test_strategies_hold_no_state(batches):
    for name in STRATEGIES:
        strategy = build_strategy(name)
        before = strategy.model_dump()
        strategy.loss(Linear(), bce, *given(name, *batches))
        assert strategy.model_dump() == before and strategy == build_strategy(name)
        with pytest.raises(ValueError, match='frozen'):
            strategy.align = 1


@pytest.mark.parametrize(
    'name, options, sentence',
    [
        ('mixloss', {}, "did you mean 'mix_loss'"),
        ('mix_loss', dict(alfa=1), "did you mean 'alpha'"),
        ('mix_loss', dict(alpha=0), "'alpha' is wrong"),
        ('weighted', dict(weight=-1), "'weight' is wrong"),
        ('pretrain_finetune', dict(share=1), "'share' is wrong"),
        ('tail_only', dict(below=0), "'below' is wrong"),
        ('concat', dict(align=-1), "'align' is wrong"),
        ('concat', dict(align=1, alignment='coal'), "'alignment' is wrong"),
        ('real', dict(alpha=1), "there is no setting 'alpha'"),
    ],
)
def test_wrong_options_are_told(name, options, sentence):
    with pytest.raises(InputError, match=sentence) as e:
        build_strategy(name, **options)
    assert '\n' not in str(e.value)
